"""The README's program: plan a small network for two local processes, look at the plan, train it.

python examples/quickstart.py [--quick]
"""

from __future__ import annotations

import argparse

import torch

import weft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5 steps instead of 100")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 10))
    batch = (torch.randn(32, 64), torch.randint(10, (32,)))
    loss = torch.nn.functional.cross_entropy

    plan = weft.plan(model, batch, loss=loss, cluster=weft.Cluster.local(processes=2))
    print(plan)  # what lives where, predicted time and memory, and what the alternatives would cost

    with weft.run(plan, model, torch.optim.AdamW) as trainer:
        for _ in range(5 if arguments.quick else 100):
            print(f"loss {trainer.step(batch):.4f}")


if __name__ == "__main__":
    main()
