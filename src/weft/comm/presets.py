"""Exchanges put together as published, in one call.

dgc      Deep Gradient Compression: top-k of a velocity built up on each worker, with warm-up     arXiv:1712.01887
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist

from weft.comm.codecs.top_k import TopK
from weft.comm.controllers.schedule import Schedule
from weft.comm.exchange import Exchange
from weft.comm.memories.momentum_correction import MomentumCorrection

__all__ = ["dgc"]


def dgc(
    ratio: float = 0.001,
    warmup: Sequence[float] | None = None,
    momentum: float = 0.9,
    *,
    stage_steps: int = 100,
    nesterov: bool = False,
    masking: bool = True,
    clip: float | None = None,
    values: torch.dtype = torch.float32,
    selection: Literal["sampled", "exact"] = "sampled",
    group: dist.ProcessGroup | None = None,
    seed: int = 0,
    timeout: float = 300.0,
    measure: int = 50,
) -> Exchange:
    """Deep Gradient Compression, to be attached to a model trained by SGD with this momentum.

    Args:
        ratio: fraction of each weight matrix's entries sent, in (0, 1]; biases and norms go whole.
        warmup: ratios before that, each for `stage_steps` steps; None for none. The paper's: 0.25, 0.0625, 0.0156, 0.004.
        momentum: in [0, 1); `attach` takes it out of the optimizer.
        stage_steps: steps of one epoch, or any time in which the learning rate warms up by a quarter.
        nesterov: as the optimizer's.
        masking: stop stale momentum at positions just sent.
        clip: norm at which a tensor's gradient, summed over ranks, would be clipped; done here, before the velocity, and nowhere
            else.
        values: torch.float32 or torch.float16 on the wire.
        selection: "sampled" threshold or "exact".
        group: the ranks that exchange; None for all.
        seed: of the samples, the same on every rank.
        timeout: seconds for another rank to answer.
        measure: every how many steps the report measures errors; 0 for never.
    Raises:
        ValueError: an option out of its range, by name.

    Usage: `weft.comm.attach(ddp, dgc(ratio=0.001, warmup=[0.25, 0.0625, 0.0156, 0.004], momentum=0.9), optimizer=sgd)`
    """
    codec = TopK(ratio, selection=selection, values=values)
    controller = None
    if warmup is not None:
        for stage in warmup:
            if not 0 < stage <= 1:
                raise ValueError(f"dgc: warmup must hold ratios in (0, 1], got {stage} in {list(warmup)}")
        controller = Schedule(warmup, ratio, stage_steps)
    memory = MomentumCorrection(momentum, nesterov=nesterov, masking=masking, clip=clip)
    return Exchange(codec, memory, controller=controller, group=group, seed=seed, timeout=timeout, measure=measure)
