"""Train within a number of bytes: measure the step, plan it, keep to the budget; every number stays as it was, bit for bit.

python examples/fit_in_memory.py [--quick] [--budget 60MiB]
"""

from __future__ import annotations

import argparse

import torch

import weft.memory
from weft.nn import GPT, GPTOptions


def make(quick: bool) -> tuple[GPT, tuple[torch.Tensor, torch.Tensor]]:
    """A GPT with dropout and a batch, the same for the same seed."""
    torch.manual_seed(0)
    layers, width, tokens, rows = (2, 32, 32, 4) if quick else (6, 128, 128, 8)
    model = GPT(GPTOptions(vocabulary=256, context=tokens, layers=layers, heads=4, width=width, dropout=0.1))
    return model, (torch.randint(256, (rows, tokens)), torch.randint(256, (rows, tokens)))


def train(model: GPT, batch: tuple[torch.Tensor, torch.Tensor], steps: int) -> tuple[float, int]:
    """An ordinary training loop. Gives the last loss and the most bytes of tensors that were alive."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters())
    with weft.memory.meter(model, optimizer) as meter:
        meter.count(batch, "input")
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(*batch)
            loss.backward()
            optimizer.step()
    return loss.item(), meter.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model and 4 steps instead of 20")
    parser.add_argument(
        "--budget", help="bytes, as 60MiB (default: halfway between what is possible and what is usual)"
    )
    arguments = parser.parse_args()
    steps = 4 if arguments.quick else 20

    model, batch = make(arguments.quick)
    trace = weft.memory.trace(
        model, batch, optimizer=torch.optim.AdamW
    )  # one step on paper: nothing of the model changes
    least = weft.memory.plan(trace).least
    plan = weft.memory.plan(trace, arguments.budget or (least + trace.peak) // 2)
    print(plan)  # fits in ..., % slower, least possible; what is computed again

    free_loss, free_peak = train(model, batch, steps)
    model, batch = make(arguments.quick)
    with weft.memory.limit(plan, model=model):
        loss, peak = train(model, batch, steps)

    print(f"without a budget  loss {free_loss:.6f}  peak {free_peak / 2**20:.2f} MiB")
    print(f"within it         loss {loss:.6f}  peak {peak / 2**20:.2f} MiB of {plan.budget / 2**20:.2f} MiB")
    assert loss == free_loss
    assert peak <= plan.budget


if __name__ == "__main__":
    main()
