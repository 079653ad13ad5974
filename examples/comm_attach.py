"""Another gradient exchange under stock DistributedDataParallel: one line, and one more to look at what it did.

torchrun --nproc-per-node 2 examples/comm_attach.py --quick     two processes
python examples/comm_attach.py --quick                          one: the same code, nothing to send
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from weft.comm import Cast, ErrorFeedback, Exchange, LowRank, MomentumCorrection, TopK, attach, auto
from weft.nn import GPT, GPTOptions

EXCHANGES = {
    "plain": lambda: Exchange(),
    "bfloat16": lambda: Exchange(Cast("bfloat16")),
    "low rank": lambda: Exchange(LowRank(4), ErrorFeedback()),
    "top-k": lambda: Exchange(TopK(0.01), MomentumCorrection(momentum=0.9)),
    "auto": lambda: auto(trial=2),  # measures the link and the steps, and takes a code only where it pays
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true")
    options = arguments.parse_args()
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update({key: os.environ.get(key, value) for key, value in alone.items()})
    dist.init_process_group("gloo")

    text = torch.tensor(list(Path(torch.__file__).read_bytes()), dtype=torch.long)  # any text will do
    layers, width, steps = (2, 64, 6) if options.quick else (6, 256, 100)
    for name, make in EXCHANGES.items():
        torch.manual_seed(0)
        model = GPT(GPTOptions(vocabulary=256, context=64, layers=layers, heads=4, width=width))
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)

        handle = attach(ddp, make(), optimizer)  # the line

        generator = torch.Generator().manual_seed(dist.get_rank())
        for _ in range(steps):
            rows = torch.stack([text[s : s + 65] for s in torch.randint(len(text) - 65, (8,), generator=generator)])
            optimizer.zero_grad()
            loss = ddp(rows[:, :-1], rows[:, 1:])
            loss.backward()
            optimizer.step()
        report = handle.exchange.report()
        if dist.get_rank() == 0:
            chosen = f" ({handle.chosen})" if handle.chosen else ""
            print(f"{name}{chosen}: loss {loss.item():.3f}, {report.nbytes / 1e6:.3f} MB a step")
        handle.remove()  # plain DDP again, momentum back in the optimizer
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
