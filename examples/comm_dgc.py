"""Train with Deep Gradient Compression under stock DDP: one line more, some hundred times fewer bytes.

torchrun --nproc-per-node 2 examples/comm_dgc.py [--steps 200] [--ratio 0.01]
python examples/comm_dgc.py [--quick]          (starts the two processes itself)
"""

from __future__ import annotations

import argparse
import os
import tempfile
from itertools import islice

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from weft.comm import attach, dgc
from weft.tasks import language_model


def train(steps: int, ratio: float, width: int) -> None:
    task = language_model(layers=2, width=width, heads=2, context=32, batch_size=4, seed=dist.get_rank())
    torch.manual_seed(0)
    ddp = DistributedDataParallel(task.factory())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)

    exchange = dgc(ratio, warmup=[0.25, 0.0625], momentum=0.9, stage_steps=max(1, steps // 10))
    handle = attach(ddp, exchange, optimizer)  # the one line; the momentum moves from the optimizer into the exchange

    for step, (tokens, targets) in enumerate(islice(task.batches(), steps)):
        loss = torch.nn.functional.cross_entropy(ddp(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0 and step % max(1, steps // 5) == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    if dist.get_rank() == 0:
        print(str(exchange.report()).splitlines()[0])
    handle.remove()  # plain DDP again, the momentum back in the optimizer
    dist.destroy_process_group()


def started(rank: int, meeting: str, *options: float) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    train(*options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--ratio", type=float, default=0.01, help="fraction of each weight matrix's gradient that is sent"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps")
    arguments = parser.parse_args()
    options = (10, arguments.ratio, 32) if arguments.quick else (arguments.steps, arguments.ratio, 256)
    if "RANK" in os.environ:  # under torchrun
        dist.init_process_group("gloo")
        train(*options)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(started, args=(f"{folder}/meeting", *options), nprocs=2)


if __name__ == "__main__":
    main()
