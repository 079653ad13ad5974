"""Top-k gradients with a density for every layer: fewer bytes at the error of one density for all (L-GreCo).

torchrun --nproc-per-node 2 examples/comm_layerwise.py      two processes
python examples/comm_layerwise.py --quick                   one process, a few steps
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from weft.comm import ErrorFeedback, Exchange, LayerwiseBudget, TopK, attach

DENSITIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true")
    options = arguments.parse_args()

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    dist.init_process_group("gloo")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
    teacher = nn.Linear(64, 8)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)

    controller = LayerwiseBudget(DENSITIES, default=0.01, every=20)
    exchange = Exchange(TopK(0.01), memory=ErrorFeedback(), controller=controller)
    handle = attach(ddp, exchange, optimizer)

    torch.manual_seed(1 + dist.get_rank())
    for step in range(45 if options.quick else 500):
        inputs = torch.randn(64, 64)
        loss = nn.functional.mse_loss(ddp(inputs), teacher(inputs).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 and dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.4f}")

    if dist.get_rank() == 0:
        for name, row in controller.report()["tensors"].items():
            print(f"{name}: {row}")
        print(exchange.report())
    handle.remove()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
