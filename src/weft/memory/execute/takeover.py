"""From replay to online in the middle of a step: what was remembered becomes recipes, and the core decides from there on."""

from __future__ import annotations

import weakref

from weft.memory.core import Block, Step
from weft.memory.core.blocks import lost
from weft.memory.execute.backends import Hold
from weft.memory.execute.online import Online
from weft.memory.execute.replay import Replay

__all__ = ["take_over"]


def take_over(replay: Replay, online: Online) -> None:
    """`online` (fresh) manages from now on what `replay` managed; what is there and does not fit its budget is dropped."""
    replay.actions.load_all()
    core, steps = online.core, []
    blocks: dict[Block, None] = {}
    for order, (call, number) in enumerate(replay.log):
        op = replay.trace.ops[number] if number is not None else None
        seconds = op.seconds if op is not None else 0.0
        reads = list(dict.fromkeys(look[2] for look in call.looks if look[2] is not None))
        again = op.repeatable if op is not None else not call.facts.empty
        lasting = again and not call.facts.effect
        step = Step(reads, op.workspace if op is not None else 0, seconds, lasting, (), order)
        step.payload, step.late = call, op is not None and op.phase == "backward"
        makes = [new for _, new in call.over] + list(call.made)
        step.overwrites = [(old, position) for position, (old, _) in enumerate(call.over)]
        step.outputs = [weakref.ref(block) for block in makes]
        step.sizes = [block.nbytes for block in makes]
        step.repeatable = repeatable = step.repeatable and all(old.last == replay.token for old, _ in call.over)
        for block in makes:
            block.step = step if repeatable and not _stays(block) else None
            block.evictable, block.seconds, block.dense = block.step is not None, seconds, call.facts.dense
            block.late = core.late(step, block.nbytes)
            blocks[block] = None
        blocks.update((old, None) for old, _ in call.over)
        for block in reads:
            block.read = True
            blocks[block] = None
        steps.append((step, repeatable))
    core.num_steps = len(replay.log)
    blocks.update(dict.fromkeys(hold.block for hold in replay.owner.holds.values()))
    away = []
    for block in blocks:
        block.last, block.offset = core.clock, -1
        if block.step is None:
            block.evictable = False
        payload = block.payload
        if type(payload) is not Hold:  # nobody refers to it: it can be made again, or is not wanted any more
            block.payload, block.resident, block.alive = None, False, False
        elif not block.resident:
            away.append(block)
    for step, repeatable in steps:
        if repeatable and any(not block.resident for block in (r() for r in step.outputs) if block is not None):
            lost(step)
    for block in away:
        block.resident = True  # as the core knows how to drop it
        core.evict(block)
    for block in sorted(
        (block for block in blocks if block.resident and block not in away), key=lambda block: block.evictable
    ):
        if not core.arena.put(block):
            if block.evictable:
                core.evict(block)
            else:
                core.put(block)
    for hold in replay.owner.holds.values():
        if hold.exposed:
            core.pin(hold.block)
    core.evictions = 0
    core.leaves_lost = True  # replay keeps nothing for recipes that it does not plan to follow


def _stays(block: Block) -> bool:
    """Whether the user has something that nobody may take away."""
    payload = block.payload
    return type(payload) is Hold and (payload.exposed or payload.kind == "gradient")
