"""The end of a limit: everything that the user still refers to comes back into torch's own memory."""

from __future__ import annotations

import warnings
from collections import Counter

import torch

from weft.memory.core import Block, Step
from weft.memory.core.blocks import BY_ORDER
from weft.memory.execute.backends import Count, Hold
from weft.memory.execute.calls import Call
from weft.memory.execute.online import Online
from weft.memory.private import below, fill, storage_of

__all__ = ["hand_back"]

RUN = Count().run


def hand_back(online: Online) -> None:
    """Everything the user still refers to is there when this returns, budget or not, and `online` manages nothing any more.

    Independent of the core, which an exception may have left in the middle of something.
    """
    online._busy = True  # what dies meanwhile is of no interest any more
    wanted = [block for block in online._dropped if type(block.payload) is Hold and block.payload() is not None]
    steps: dict[Step, None] = {}
    stack = [block.step for block in wanted]
    while stack:
        step = stack.pop()
        if step is not None and step not in steps:
            steps[step] = None
            stack.extend(read.step for read in step.reads if not read.resident)
    readers = Counter(read for step in steps for read in step.reads)
    with below():
        for step in sorted(steps, key=BY_ORDER):
            if all(read.resident and read.payload is not None for read in step.reads):
                _rebuild(step, readers)
    gone = [block for block in wanted if not block.resident]
    for block in gone:  # a tensor without bytes must never be left behind: reading it would end the process
        fill(block.payload(), storage_of(torch.full((block.nbytes,), 255, dtype=torch.uint8, device=online.device)))
    if gone:
        warnings.warn(
            f"weft.memory.limit: {len(gone)} tensors could not be made again when the limit was left (the largest has "
            f"{max(block.nbytes for block in gone):,} bytes); they hold NaN", RuntimeWarning, stacklevel=4,
        )  # fmt: skip
    online.leave()


def _rebuild(step: Step, readers: Counter[Block]) -> None:
    """One step of `hand_back`: its outputs that are not there come to lie in torch's own memory."""
    call: Call = step.payload
    made = call.again(RUN)
    for old, position in step.overwrites:
        made.insert(position, old.payload)
        old.payload = None
    for reference, storage in zip(step.outputs, made, strict=True):
        block = reference()
        if block is not None and not block.resident and storage is not None:
            block.resident, block.offset = True, -1
            if type(block.payload) is Hold:
                mine = block.payload()
                if mine is not None:
                    fill(mine, storage)
            else:
                block.payload = storage
    for read in step.reads:
        readers[read] -= 1
        if not readers[read] and type(read.payload) is not Hold:
            read.payload = None
