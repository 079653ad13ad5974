"""Train a byte-level GPT on text over local processes, and write a sample from it.

python examples/train_gpt_text.py [--data FILE] [--processes 2] [--steps 300] [--quick]

The default text is the source of Python's own standard library; the sample therefore looks like Python.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial

import torch

import weft
from weft.tasks import language_model


@torch.no_grad()
def sample(model: torch.nn.Module, prompt: bytes, count: int, context: int) -> str:
    """`count` more bytes after the prompt, drawn from the model's predictions."""
    tokens = torch.tensor([list(prompt)])
    model.eval()
    for _ in range(count):
        probabilities = model(tokens[:, -context:])[:, -1].softmax(-1)
        tokens = torch.cat([tokens, probabilities.multinomial(1)], dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="FILE", help="any text; .gz and .xz are unpacked")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps")
    arguments = parser.parse_args()

    small = {"layers": 1, "width": 32, "heads": 2, "context": 32, "batch_size": 4}
    task = language_model(arguments.data, **(small if arguments.quick else {}))
    model = task.model
    plan = weft.plan(model, task.batch, cluster=weft.Cluster.local(processes=arguments.processes))
    print(plan)
    print(f"{task.metric.name} before: {task.evaluate(model):.2f}")

    steps = 4 if arguments.quick else arguments.steps
    optimizer = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    with weft.run(plan, model, optimizer, clip_norm=1.0, progress=not arguments.quick) as trainer:
        for batch in itertools.islice(task.batches(), steps):
            loss = trainer.step(batch)
        print(f"loss after {steps} steps: {loss:.3f}")
        trainer.sync()  # the trained weights, back into `model`

    print(f"{task.metric.name} after: {task.evaluate(model):.2f}")
    print(sample(model, b"def ", 20 if arguments.quick else 400, model.options.context))


if __name__ == "__main__":
    main()
