"""Train a HuggingFace model, unmodified and with keyword batches, by a plan over local processes.

python examples/huggingface.py             a small GPT-2, two processes, 50 steps
python examples/huggingface.py --quick     a tiny one, 3 steps
torchrun --nproc-per-node 2 examples/huggingface.py     the same over torchrun's processes
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import weft


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--processes", type=int, default=2)
    options = arguments.parse_args()

    from transformers import GPT2Config, GPT2LMHeadModel

    width, layers, steps = (32, 1, 3) if options.quick else (256, 4, 50)
    config = GPT2Config(vocab_size=256, n_positions=64, n_embd=width, n_layer=layers, n_head=4)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)

    text = torch.tensor(list(Path(torch.__file__).read_bytes()))  # any text will do: torch's own source
    starts = torch.randint(len(text) - 64, (steps, 8), generator=torch.Generator().manual_seed(0))
    batches = [torch.stack([text[i : i + 64] for i in row.tolist()]) for row in starts]
    batches = [{"input_ids": rows, "labels": rows.clone()} for rows in batches]

    cluster = weft.Cluster.local(processes=options.processes)
    plan = weft.plan(model, batches[0], cluster=cluster, optimizer=torch.optim.AdamW)
    print(plan)
    with weft.run(plan, model, torch.optim.AdamW, clip_norm=1.0) as trainer:
        for batch in batches:
            loss = trainer.step(batch)
        print(f"loss {trainer.losses[0]:.3f} -> {loss:.3f} in {trainer.steps} steps")


if __name__ == "__main__":
    main()
