"""A min-max game over several processes with 4-bit messages that still converges: MASHA-1.

torchrun --nproc-per-node 4 examples/comm_masha.py      four processes, each with its own game
python examples/comm_masha.py --quick                   one process, a few steps
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn

from weft.comm import MASHA, AllGather, Exchange, Quantise


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true")
    options = arguments.parse_args()

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    dist.init_process_group("gloo")

    # min over x, max over y of  x'Ay + a'x + b'y + |x|^2/2 - |y|^2/2, with other A, a, b on every process
    torch.manual_seed(dist.get_rank())
    size = 30
    matrix, a, b = torch.randn(size, size) / size**0.5, torch.randn(size), torch.randn(size)
    x, y = nn.Parameter(torch.ones(size, 1)), nn.Parameter(torch.ones(size, 1))

    def game() -> torch.Tensor:
        return (x.T @ matrix @ y).sum() + a @ x[:, 0] + b @ y[:, 0] + x.square().sum() / 2 - y.square().sum() / 2

    exchange = Exchange(Quantise(4, bucket=64, scale="max"), topology=AllGather())
    optimizer = MASHA([("x", x)], [("y", y)], exchange, lr=0.15)  # tau: refreshes cost as much as messages

    steps = 60 if options.quick else 200
    for step in range(steps):
        optimizer.step(game)
        if step % 20 == 19:
            gradient = torch.cat(torch.autograd.grad(game(), [x, y]))
            dist.all_reduce(gradient)
            if dist.get_rank() == 0:
                print(f"step {step + 1}: |F| = {gradient.norm() / dist.get_world_size():.2e}")

    if dist.get_rank() == 0:
        sent = exchange.report()
        print(f"{steps} steps, {optimizer.refreshes} of them with an uncompressed refresh")
        print(sent)
    optimizer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
