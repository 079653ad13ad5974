"""The two products of every rule that is a row of weights: K = X X^T and W X, for n messages X of d entries, d large.

Problem    n is 10 to 100 and d is millions, so both products are a walk through memory, and K decides who is trusted: distances
           come from it as |x_i - x_j|^2 = K_ii + K_jj - 2 K_ij, where a running float32 sum over 10^6 entries is off by 3e-4,
           enough to name the wrong nearest neighbour.
Method     `gram`      blocks of columns that stay in cache, each block's product in float32 (or wider), their sum in float64.
                       Where messages lie so close together that the difference above loses what float32 products keep,
                       the products are made again in float64: `cancels` is that test.
           `weighted`  one pass; rows of weight 0 are not read, so an excluded message of NaN stays without influence.
Guarantee  partial Grams add up: over buckets of one model and over the segments that the ranks own. That is why messages are
           not centred first, though distances lose digits where all lie far from 0. A message that is not finite has a diagonal
           entry that is not finite, and no other message has, squares beyond float64 apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cancels", "gram", "weighted"]

BLOCK = 32768  # columns: 15 float32 messages of a block are 2 MB, 50 are 6.5 MB: a share of the last cache
ROWS = 16  # the matrix product's kernels take so many rows at a time: 15 rows cost 1.6 times as much as 16 (measured, AVX2)
TINY = 1e-30  # mean square of a message's entries below which some squares are less than float32's smallest, 1e-38
CLOSE = 1e-3  # |x_i - x_j|^2 / (K_ii + K_jj) below which products of 1e-6 relative error no longer tell distances apart


def gram(stack: Tensor) -> Tensor:
    """K = X X^T, float64 of shape (n, n), for messages X of shape (n, d) in any floating dtype.

    Squared distances made of it have an error of about 1e-16 (|x_i|^2 + |x_j|^2) for float64 messages, and for float32 ones of
    which some lie as close as CLOSE; of other float32 ones about 1e-5 of themselves. So of messages whose offset from 0 is 1e7
    times what they differ by, distances are right to 1e-2, and rules may choose among nearly equal ones differently.

    NaN or infinity in message i shows in K_ii; finite messages whose squares overflow or underflow float32 are multiplied in
    float64. Beyond float64 they are not: entries of 1e160 count as not finite, entries of 1e-170 as 0.
    """
    if stack.ndim != 2:
        raise ValueError(f"gram: messages must be stacked as (n, d), got shape {tuple(stack.shape)}")
    narrow = torch.float64 if stack.dtype == torch.float64 else torch.float32
    found = _products(stack, narrow)
    if narrow == torch.float32 and (cancels(found) or _overflown(found, stack) or _underflown(found, stack)):
        found = _products(stack, torch.float64)
    return found


def cancels(found: Tensor) -> bool:
    """Whether some pair of finite messages is too close for distances by float32 products (n, n)."""
    square = found.diagonal()
    fine = torch.isfinite(square)
    if int(fine.sum()) < 2:
        return False
    kept, square = found[fine][:, fine], square[fine]
    sums = square[:, None] + square[None, :]
    close = (sums - 2 * kept) < CLOSE * sums
    return bool((close & (sums > 0)).triu(1).any())


def weighted(weights: Tensor, stack: Tensor) -> Tensor:
    """W @ X for weights (n,) or (m, n), float64, and messages (n, d): (d,) or (m, d) in the messages' dtype.

    Rows whose weights are all 0 are not read: 0 x NaN never happens.
    """
    used = (weights != 0) if weights.ndim == 1 else (weights != 0).any(0)
    row = weights.to(device=stack.device, dtype=stack.dtype)
    if bool(used.all()):
        return row @ stack
    members = used.nonzero().flatten().tolist()
    if weights.ndim == 2:
        return row[:, members] @ stack[members]
    if not members:
        return stack.new_zeros(stack.shape[1])
    if len(members) == 1:
        return stack[members[0]] * row[members[0]]
    factors = row.tolist()
    result = torch.empty_like(stack[0])
    for start in range(0, stack.shape[1], BLOCK):
        block = stack[:, start : start + BLOCK]
        total = torch.mul(block[members[0]], factors[members[0]], out=result[start : start + BLOCK])
        for member in members[1:]:
            total.add_(block[member], alpha=factors[member])
    return result


def _products(stack: Tensor, dtype: torch.dtype) -> Tensor:
    count, length = stack.shape
    rows = -(-count // ROWS) * ROWS
    if count == rows or count < 0.9 * rows or length < BLOCK:
        total = torch.zeros(count, count, dtype=torch.float64, device=stack.device)
        for start in range(0, length, BLOCK):
            block = stack[:, start : start + BLOCK].to(dtype)
            total += block @ block.T
        return total
    padded = torch.zeros(rows, BLOCK, dtype=dtype, device=stack.device)
    total = torch.zeros(rows, rows, dtype=torch.float64, device=stack.device)
    for start in range(0, length, BLOCK):
        width = min(BLOCK, length - start)
        padded[:count, :width] = stack[:, start : start + width]
        total += padded[:, :width] @ padded[:, :width].T
    return total[:count, :count]


def _overflown(found: Tensor, stack: Tensor) -> bool:
    suspects = (~torch.isfinite(found.diagonal())).nonzero().flatten().tolist()
    return any(bool(torch.isfinite(stack[suspect]).all()) for suspect in suspects)


def _underflown(found: Tensor, stack: Tensor) -> bool:
    """Whether entries are so small that their squares have lost digits; messages of zeros have none to lose."""
    suspects = (found.diagonal() < TINY * stack.shape[1]).nonzero().flatten().tolist()
    return any(bool(stack[suspect].any()) for suspect in suspects)
