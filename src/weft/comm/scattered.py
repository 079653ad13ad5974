"""Robust all-reduce: a rule of `weft.comm.rules` at the price of an all-reduce, with no server.

Problem    a server that combines n vectors of d entries receives n d; an all-reduce moves 2 d per rank.
Method     rank r owns a n-th of the entries. An all-to-all brings it everybody's values there; inner products of its segment are
           added up over the ranks (n^2 numbers), from which every rank makes the same weights; each combines its own segment,
           and an all-gather hands the segments round                                                     `scattered`
Guarantee  the same result as the rule on all vectors in one place, to rounding, and bit-equal on all ranks, since each entry is
           computed by one of them. 2 d (n-1)/n + 8 n^2 bytes and 4 d-byte words per rank and direction.
Trust      against wrong vectors: bad data, bad memory, bad hardware. Not against a hostile process, which could make up the
           segment it owns: see `weft.comm.peer`.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from weft.comm.combine import Combine, Info
from weft.comm.gram import gram, weighted

__all__ = ["scattered"]


def scattered(vector: Tensor, rule: Combine, group: dist.ProcessGroup | None = None) -> Tensor:
    """What `rule` makes of all ranks' vectors (d,) of one shape and dtype; called by all ranks of the group.

    Raises:
        ValueError: as the rule, on every rank; or the rule weighs senders by arrival or by who receives.
    """
    if vector.ndim != 1:
        raise ValueError(f"scattered: the vector must be flat, got shape {tuple(vector.shape)}")
    if rule.needs == "arrivals":
        raise ValueError(f"scattered: {type(rule).__name__} weighs messages by arrival; here all come at once")
    ranks = dist.get_world_size(group)
    length = -(-len(vector) // ranks)
    sent = vector.new_zeros(ranks, length)
    sent.view(-1)[: len(vector)] = vector
    stack = torch.empty_like(sent)  # row r: rank r's values of the segment that is ours
    dist.all_to_all_single(stack, sent, group=group)
    if rule.needs == "elementwise":
        whole = torch.zeros(ranks, dtype=torch.float32, device=vector.device)
        whole[dist.get_rank(group)] = torch.isfinite(vector).all().float()
        dist.all_reduce(whole, group=group)
        stack[whole == 0] = math.nan  # broken elsewhere is broken here: one judgement on all segments
        mine = rule.elementwise(stack)
    else:
        found = None
        if rule.needs == "gram":
            found = gram(stack)
            dist.all_reduce(found, group=group)
        left, row = rule.resolve(Info(ranks, found))
        mine = left.finish(weighted(row, stack))
    result = vector.new_empty(ranks * length)
    dist.all_gather_single(result, mine.contiguous(), group=group)
    return result[: len(vector)]
