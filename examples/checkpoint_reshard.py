"""Save a checkpoint from one plan and go on from it with another plan on another number of processes.

python examples/checkpoint_reshard.py [--quick]

Tensor parallel over two processes trains and saves; data parallel over one or three loads and goes on. The losses are those
of a run that was never interrupted. Not for torchrun: each of the two runs starts as many processes as its plan is for.
"""

from __future__ import annotations

import argparse
import tempfile

import torch

import weft
from weft.nn import GPT, GPTOptions


def build() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTOptions(vocabulary=64, context=16, layers=2, heads=4, width=32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="go on with one process instead of three")
    arguments = parser.parse_args()
    later = 1 if arguments.quick else 3
    batch = (torch.randint(64, (6, 16)), torch.randint(64, (6, 16)))

    model = build()
    plan = weft.Plan.manual(model, batch, cluster=weft.Cluster.local(processes=2), strategy="tp")
    with tempfile.TemporaryDirectory() as folder:
        with weft.run(plan, model, torch.optim.AdamW) as trainer:
            before = [trainer.step(batch) for _ in range(3)]
            trainer.save(f"{folder}/checkpoint")
            uninterrupted = [trainer.step(batch) for _ in range(2)]
        print("two processes, tensor parallel:   ", [f"{loss:.5f}" for loss in before + uninterrupted])

        model = build()
        plan = weft.Plan.manual(model, batch, cluster=weft.Cluster.local(processes=later), strategy="dp")
        with weft.run(plan, model, torch.optim.AdamW) as trainer:
            trainer.load(f"{folder}/checkpoint")
            resumed = [trainer.step(batch) for _ in range(2)]
        print(f"{later} process(es), data parallel, resumed:", [f"{loss:.5f}" for loss in resumed])
    assert all(abs(a - b) < 1e-3 for a, b in zip(uninterrupted, resumed, strict=True))


if __name__ == "__main__":
    main()
