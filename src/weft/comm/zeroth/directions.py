"""Random directions that anybody can make again from a number: never sent, never stored, never held for a whole model.

Problem    machine m, step t, sample k: a direction z(t, m, k) with one entry per parameter, E z z^T = I, equal to the bit on
           every machine that knows the triple.
Method     the triple is mixed into one 64-bit seed:                                              `seed_of`
           Rademacher: entry i is +1 where bit i mod 64 of hash(seed + floor(i / 64) G) is set, -1 elsewhere. The hash is
           splitmix64's finaliser, in integers, so every device gives the same bits; 64 signs cost one hash. c z is exact in
           floating point for every c, so that fused and unfused multiply-add agree.              `Rademacher`
           normal: torch's own generator, one private to each seed, tensor after tensor as the paper has it: like
           machines agree, a CPU and a GPU do not.                                                `Normal`
           to = start + c_1 z_1 + c_2 z_2 + ..., added in that order, entry by entry. Rademacher goes through the model in
           pieces that stay in the cache, all terms of a piece before the next piece.             `Direction.move`
Source     Zelikman et al., arXiv:2306.10015 (shared randomness); Malladi et al., arXiv:2305.17333 (regeneration in place);
           Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014 (the hash). The sign form is ours.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

__all__ = ["DIRECTIONS", "Direction", "Normal", "Rademacher", "Term", "mix", "seed_of"]

Term = tuple[int, float]  # (seed of a direction, the factor it is added with)

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: counters times it never meet
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64's multipliers
WORD = 64  # signs per hash
PIECE = 2**18  # entries worked on at a time: few enough for the cache, enough to hide the cost of a call


def mix(x: int) -> int:
    """splitmix64's finaliser, a bijection of 64-bit numbers in which every input bit moves half of the output bits."""
    x &= MASK
    x = ((x ^ (x >> 30)) * FIRST) & MASK
    x = ((x ^ (x >> 27)) * SECOND) & MASK
    return x ^ (x >> 31)


def seed_of(run: int, step: int, member: int, sample: int) -> int:
    """The 64-bit seed of direction `sample` of `member` at `step` of the run with seed `run`; all >= 0.

    Each number is mixed in by a bijection of what came before, so that triples which differ in one place never meet.
    """
    seed = mix(run + GOLDEN)
    for number in (step, member, sample):
        seed = mix(seed + (number + 1) * GOLDEN)
    return seed


class Direction(abc.ABC):
    """A way to make directions from seeds. Holds options, never state."""

    @abc.abstractmethod
    def move(self, to: Sequence[Tensor], start: Sequence[Tensor], terms: Iterable[Term]) -> None:
        """`to` <- `start` + sum of c z(seed) over the terms, rounded after each, in their order.

        Args:
            to: contiguous floating-point tensors, overwritten; together one vector, in this order.
            start: tensors of the same shapes; may be `to` itself.
            terms: (seed, c) pairs.
        """


@final
@dataclass(frozen=True)
class Rademacher(Direction):
    """Signs from an integer hash: the same on every device."""

    def move(self, to: Sequence[Tensor], start: Sequence[Tensor], terms: Iterable[Term]) -> None:
        terms = list(terms)
        groups = _groups(to)
        longest = WORD * max((sum(count for *_, count in group) for group in groups), default=0)
        buffer, first_word = torch.empty(longest), 0
        for group in groups:
            words = sum(count for *_, count in group)
            pieces = [(to[i].view(-1)[a:b], start[i].view(-1)[a:b], count) for i, a, b, count in group]
            if not terms:
                for target, source, _ in pieces:
                    if target.data_ptr() != source.data_ptr():
                        target.copy_(source)
            for place, (seed, factor) in enumerate(terms):
                sign, at = signs(seed, first_word, words, pieces[0][0].device, buffer), 0
                for target, source, count in pieces:
                    z = sign[at : at + len(target)]
                    if place == 0 and target.data_ptr() != source.data_ptr():
                        torch.add(source, z, alpha=factor, out=target)
                    else:
                        target.add_(z, alpha=factor)
                    at += count * WORD
            first_word += words


@final
@dataclass(frozen=True)
class Normal(Direction):
    """Standard normal entries from torch's generator, as in MeZO: the same among like machines only."""

    def move(self, to: Sequence[Tensor], start: Sequence[Tensor], terms: Iterable[Term]) -> None:
        for target, source in zip(to, start, strict=True):
            if target.data_ptr() != source.data_ptr():
                target.copy_(source)
        for seed, factor in terms:
            generators: dict[torch.device, torch.Generator] = {}
            for target in to:
                generator = generators.get(target.device)
                if generator is None:
                    generator = generators[target.device] = torch.Generator(target.device).manual_seed(seed >> 1)
                z = torch.randn(target.shape, generator=generator, device=target.device, dtype=target.dtype)
                target.add_(z, alpha=factor)


DIRECTIONS: dict[str, Direction] = {"rademacher": Rademacher(), "normal": Normal()}


def _groups(tensors: Sequence[Tensor]) -> list[list[tuple[int, int, int, int]]]:
    """The tensors cut into pieces (tensor, from, to, words), gathered into groups of one device and about a piece's size.

    A tensor starts at a word of its own; gathering many small tensors lets one call of the hash serve them all.
    """
    groups: list[list[tuple[int, int, int, int]]] = []
    room, device = 0, None
    for number, tensor in enumerate(tensors):
        for begin in range(0, tensor.numel(), PIECE):
            end = min(begin + PIECE, tensor.numel())
            words = -(-(end - begin) // WORD)
            if words * WORD > room or tensor.device != device:
                groups.append([])
                room, device = PIECE, tensor.device
            groups[-1].append((number, begin, end, words))
            room -= words * WORD
    return groups


def signs(seed: int, first_word: int, words: int, device: torch.device, out: Tensor | None = None) -> Tensor:
    """Entries 64 `first_word` onwards of the direction of `seed`: float32 of shape (64 words,), all +1 or -1.

    `out`, at least as long, is written to instead of fresh memory, on a CPU.
    """
    origin = (seed + first_word * GOLDEN) & MASK
    if device.type == "cpu":
        bits = np.unpackbits(_hash_numpy(origin, words).view(np.uint8), bitorder="little")
        bits += bits  # 0 and 2
        bits -= 1  # 255 and 1: as signed bytes, -1 and +1
        found = torch.from_numpy(bits.view(np.int8))
        return found.float() if out is None else out[: len(found)].copy_(found)
    return signs_anywhere(origin, words, device)


def signs_anywhere(origin: int, words: int, device: torch.device) -> Tensor:
    """`signs` in torch's own integers, for any device; `origin` is seed + first word times `GOLDEN`."""
    x = torch.arange(words, device=device, dtype=torch.int64) * _signed(GOLDEN) + _signed(origin)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(FIRST)  # >> keeps the sign of int64: the masks make it logical
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(SECOND)
    x = x ^ ((x >> 31) & (2**33 - 1))
    bit = (x[:, None] >> torch.arange(WORD, device=device)) & 1
    return (2 * bit - 1).flatten().float()


def _hash_numpy(origin: int, words: int) -> np.ndarray:
    """splitmix64 at origin, origin + G, ...: little-endian 64-bit words, whose byte order `unpackbits` relies on."""
    x = np.arange(words, dtype="<u8")
    x *= np.uint64(GOLDEN)
    x += np.uint64(origin)
    x ^= x >> np.uint64(30)
    x *= np.uint64(FIRST)
    x ^= x >> np.uint64(27)
    x *= np.uint64(SECOND)
    x ^= x >> np.uint64(31)
    return x


def _signed(x: int) -> int:
    """The 64-bit pattern of x as a signed number."""
    x &= MASK
    return x - 2**64 if x >> 63 else x
