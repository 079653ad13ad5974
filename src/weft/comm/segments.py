"""Routes by segments: segment r of every tensor goes to rank r, which combines what all ranks say of it.

    ScatterBucket    the owner encodes its result again and sends it to all: Partial -> Replicate      topology ScatterGather
    ShardBucket      the owner keeps it: Partial -> Shard, half of that                                `Exchange.reduce_scatter`

A tensor is cut into n boxes, one per rank, which need not be equally large (`Cut`); each piece is a tensor of its own to the
codec. An all-to-all with rows of unlike length moves
(n-1)/n of a message per rank, where an all-reduce moves 2 (n-1)/n and an all-gather n - 1. (gloo's reduce-scatter is an
all-reduce inside, and NCCL's could not add codes.)
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from weft.comm.codec import Codec, Setting, Spec
from weft.comm.codecs.plain import Cast
from weft.comm.memory import Memory, NoMemory
from weft.comm.packing import HEADER, Packing
from weft.comm.routes import PLAIN, CombiningBucket, Item, overflowed
from weft.comm.topology import ScatterGather

__all__ = ["Cut", "ScatterBucket", "ShardBucket"]

LOSSLESS = {torch.float16: Cast("float16"), torch.bfloat16: Cast("bfloat16")}  # for gradients of that type


Box = tuple[tuple[int, int], ...]  # half-open index range per dim


@final
@dataclass(frozen=True)
class Cut:
    """How one tensor is cut: piece r is box `boxes[r]` of a tensor of shape `shape`; together the boxes are all of it.

    >>> cut = Cut.of((2, 3), 1, 2)                  # columns 0, 1 | column 2
    >>> cut.piece(torch.arange(6), 0).tolist(), cut.piece(torch.arange(6), 1).tolist()
    ([0, 1, 3, 4], [2, 5])
    >>> cut.whole(torch.tensor([0, 1]), 1).tolist()
    [2, 5]
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], dim: int, ranks: int) -> Cut:
        """Along one dim, as `torch.tensor_split` cuts: the first length % n pieces are one longer."""
        short, longer = divmod(shape[dim], ranks)
        return cls._along(shape, dim % len(shape), [r * short + min(r, longer) for r in range(ranks + 1)])

    @classmethod
    def flat(cls, numel: int, ranks: int) -> Cut:
        return cls._along((numel,), 0, [numel * r // ranks for r in range(ranks + 1)])

    @classmethod
    def _along(cls, shape: tuple[int, ...], dim: int, bounds: Sequence[int]) -> Cut:
        whole = tuple((0, size) for size in shape)
        pieces = itertools.pairwise(bounds)
        return cls(shape, tuple((*whole[:dim], piece, *whole[dim + 1 :]) for piece in pieces))

    def piece_shape(self, rank: int) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.boxes[rank])

    def window(self, flat: Tensor, rank: int) -> Tensor:
        """Piece `rank` of a flat tensor in its shape, a view."""
        found = flat.view(self.shape)
        for dim, (start, stop) in enumerate(self.boxes[rank]):
            if stop - start < self.shape[dim]:
                found = found.narrow(dim, start, stop - start)
        return found

    def piece(self, flat: Tensor, rank: int) -> Tensor:
        """Piece `rank` of a flat tensor, flat; a view where it is contiguous."""
        return self.window(flat, rank).reshape(-1)

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """The flat tensor of all pieces."""
        flat = pieces[0].new_empty(math.prod(self.shape))
        for rank, piece in enumerate(pieces):
            window = self.window(flat, rank)
            window.copy_(piece.view(window.shape))
        return flat

    def whole(self, where: Tensor, rank: int) -> Tensor:
        """Positions in the flat tensor of positions in flat piece `rank`."""
        # (size, start, stop), innermost first; what is whole is one with the next
        runs: list[tuple[int, int, int]] = []
        for size, (start, stop) in zip(reversed(self.shape), reversed(self.boxes[rank]), strict=True):
            if runs and runs[-1][0] == runs[-1][2] - runs[-1][1]:
                inner = runs.pop()[0]
                size, start, stop = size * inner, start * inner, stop * inner
            runs.append((size, start, stop))
        found, stride = torch.zeros_like(where), 1
        for number, (size, start, stop) in enumerate(runs):
            outermost = number == len(runs) - 1
            here = where if outermost else where % max(stop - start, 1)
            found = found + (here + start) * stride
            if not outermost:
                where = where // max(stop - start, 1)
            stride *= size
        return found

    def name(self, rank: int) -> str:
        """Of a piece, as one would index it: `[:, 3:5]`."""
        cut = [dim for dim in range(len(self.shape)) if any(box[dim] != (0, self.shape[dim]) for box in self.boxes)]
        ranges = [
            f"{start}:{stop}" if dim in cut else ":"
            for dim, (start, stop) in enumerate(self.boxes[rank][: max(cut, default=-1) + 1])
        ]
        return f"[{', '.join(ranges)}]"


class SegmentBucket(CombiningBucket):
    """What both have in common: pieces are coded one by one, and an all-to-all brings each to its owner."""

    sees_all = False

    def cut(self, item: Item) -> Cut:
        raise NotImplementedError

    def coded(self, item: Item, spec: Spec) -> tuple[Codec, Spec, Setting]:
        return (item.codec if spec.numel else PLAIN, spec, item.setting)

    def encode(self) -> None:
        self.scattered = self.items
        self.encode_pieces()

    def encode_pieces(self) -> None:
        exchange, n = self.exchange, self.ranks
        self.cuts = [self.cut(item) for item in self.scattered]
        self.pieces = [
            [self.coded(item, _piece(item, cut, r)) for item, cut in zip(self.scattered, self.cuts, strict=True)]
            for r in range(n)
        ]
        self.combined = self.pieces[self.own]
        packings = [Packing(piece) for piece in self.pieces]
        self.sizes = [packing.nbytes for packing in packings]
        self.send = exchange.wired.buffer((*self.key, *self.words, "scatter"), sum(self.sizes), self.device)
        found = exchange.wired.buffer((*self.key, *self.words, "found"), n * self.sizes[self.own], self.device)
        self.found = found.view(n, -1)
        rows = self.send.split(self.sizes)
        views = [packing.views(row) for row, packing in zip(rows, packings, strict=True)]
        for number, (item, cut) in enumerate(zip(self.scattered, self.cuts, strict=True)):
            began = time.thread_time()
            values, places, nbytes = [], [], 0
            for r in range(n):
                codec, spec, setting = self.pieces[r][number]
                state = exchange.inner(item.state, spec)
                message = codec.encode(cut.piece(item.y, r), spec, state, setting, self.step)
                for view, part in zip(views[r][number], message, strict=True):
                    view.copy_(part.view(view.shape))
                if spec.numel:
                    sent, where = codec.sent(views[r][number], spec, setting)  # of the copy: the memory changes y
                    values.append(sent)
                    places.append(where)
                else:
                    values.append(item.y[:0])
                    places.append(None)
                nbytes += codec.nbytes(spec, setting) if r != self.own else 0
            if item.selected:
                sparse = [cut.whole(where, r) for r, where in enumerate(places) if where is not None]
                if sparse:
                    self.take_note(item, torch.cat(values), torch.cat(sparse))
                else:
                    self.take_note(item, cut.joined(values), None)
            exchange.tally(item.spec.name).codec_seconds += time.thread_time() - began
            self.count(item, nbytes)
        self.bad |= any(overflowed(*pair) for pair in zip(self.pieces, views, strict=True))
        for row in rows:
            row[:HEADER].view(torch.int64)[0] = self.step << 1 | self.bad
        self.rows = [packings[self.own].views(row) for row in self.found]

    def count(self, item: Item, nbytes: int) -> None:
        """Add to the report; `nbytes` go from here to the owners."""
        raise NotImplementedError

    def up(self) -> Iterator[dist.Work]:
        own = [self.sizes[self.own]] * self.ranks
        yield dist.all_to_all_single(self.found.view(-1), self.send, own, self.sizes, group=self.group, async_op=True)
        self.broken = self.check(self.found[:, :HEADER].contiguous().view(torch.int64).flatten().tolist())


@final
class ScatterBucket(SegmentBucket):
    """Segment r of every flat tensor goes to rank r, and comes back combined."""

    def cut(self, item: Item) -> Cut:
        return Cut.flat(item.spec.numel, self.ranks)

    def count(self, item: Item, nbytes: int) -> None:
        whole = item.codec.nbytes(item.spec, item.setting)
        self.exchange.count(item.spec.name, whole, item.spec if item.coded else None)

    def down(self) -> Iterator[dist.Work]:
        exchange, topology, n = self.exchange, self.exchange.topology, self.ranks
        assert isinstance(topology, ScatterGather)
        legs = [[_leg(topology.down, *part) for part in piece] for piece in self.pieces]
        packings = [Packing(leg) for leg in legs]
        width = max(packing.nbytes for packing in packings)
        send = exchange.wired.buffer((*self.key, "owned"), width, self.device)
        found = exchange.wired.buffer((*self.key, "gathered"), n * width, self.device)
        views = packings[self.own].views(send[: packings[self.own].nbytes])
        memory: Memory = topology.memory or NoMemory()
        for number, (down, spec, leg) in enumerate(legs[self.own]):
            if not self.poisoned:
                self.poisoned = not exchange.recode(
                    self.step, spec, self.mix(number), down, leg, memory, views[number], "owner"
                )
        self.poisoned |= not self.poisoned and overflowed(legs[self.own], views)
        send[:HEADER].view(torch.int64)[0] = self.step << 1 | self.poisoned
        yield dist.all_gather_single(found, send, group=self.group, async_op=True)
        gathered = [found.view(n, -1)[r][: packing.nbytes] for r, packing in enumerate(packings)]
        self.poisoned |= any(self.check([int(row[:HEADER].view(torch.int64)[0]) for row in gathered]))
        if self.poisoned:
            return
        messages = [packing.views(row) for row, packing in zip(gathered, packings, strict=True)]
        for number, (item, cut) in enumerate(zip(self.items, self.cuts, strict=True)):
            mean = cut.joined([
                codec.decode(messages[r][number], spec, setting)
                for r, (codec, spec, setting) in enumerate(leg[number] for leg in legs)
            ])  # fmt: skip
            exchange.look(item.deliver(mean, exchange.memory), self.step)


@final
class ShardBucket(SegmentBucket):
    """Piece r of every tensor goes to rank r, and stays there: this rank's lies where it was, what is beside it means nothing.

    Tensors that a memory delivers whole with a state of its own (`Memory.dense`) are all-reduced.

    Args:
        cuts: of each item.
    """

    alike = False

    def __init__(self, *args: Any, cuts: Sequence[Cut]):
        super().__init__(*args, words=tuple(f"shard {cut.boxes}" for cut in cuts))
        self.shards = {item.spec.name: cut for item, cut in zip(self.items, cuts, strict=True)}

    def cut(self, item: Item) -> Cut:
        return self.shards[item.spec.name]

    def result(self, item: Item) -> Tensor:
        return self.cut(item).window(item.out, self.own)

    def encode(self) -> None:
        stateful = type(self.exchange.memory).dense is not Memory.dense
        self.reduced = [item for item in self.items if stateful and not item.selected]
        self.scattered = [item for item in self.items if not (stateful and not item.selected)]
        self.encode_pieces()

    def coded(self, item: Item, spec: Spec) -> tuple[Codec, Spec, Setting]:
        if item.selected:
            return super().coded(item, spec)
        return (LOSSLESS.get(spec.dtype, PLAIN), spec, None)

    def count(self, item: Item, nbytes: int) -> None:
        self.exchange.tally(item.spec.name).nbytes += nbytes

    def down(self) -> Iterator[dist.Work]:
        yield from self.reduce_whole(self.reduced)
        for number, item in enumerate(() if self.poisoned else self.scattered):
            window = self.cut(item).window(item.out, self.own)
            window.copy_(self.mix(number).view(window.shape))


def _piece(item: Item, cut: Cut, rank: int) -> Spec:
    return replace(item.spec, name=f"{item.spec.name}{cut.name(rank)}", shape=cut.piece_shape(rank))


def _leg(down: Codec | None, codec: Codec, spec: Spec, setting: Setting) -> tuple[Codec, Spec, Setting]:
    """How the owner of a piece codes its result."""
    if setting is None or not spec.numel:
        return PLAIN, spec, setting
    return (codec, spec, setting) if down is None else (down, spec, down.default(spec))
