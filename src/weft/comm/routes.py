"""How one bucket of tensors travels: encode, collectives, decode and combine, by topology.

A bucket is one job of the exchange thread (see fifo.py). Its messages form one row of bytes:

    [step and flag, 8 bytes | message of tensor 1 | message of tensor 2 | ...]       `Packing`

with offsets fixed by specs and settings, so that send and receive buffers and the typed views into them are made once. The
flag says that the sender's gradient was not finite (rule R4).

    RingBucket       averages on the wire, round by round: linear codecs
    GatherBucket     all rows to all ranks; each decodes and combines in rank order (R7)     AllGather, Peer, Gossip
    ScatterBucket    segment r of every tensor to rank r, which combines and encodes it again
    StarBucket       all rows to a server, the combined one back
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from weft.comm.codec import Codec, LinearCodec, Setting, Spec, State
from weft.comm.codecs.plain import Identity
from weft.comm.combine import Info
from weft.comm.fifo import Job
from weft.comm.gram import gram, weighted
from weft.comm.memory import Memory, NoMemory
from weft.comm.packing import HEADER, Packing
from weft.comm.topology import Gossip, Peer, ScatterGather, Star
from weft.errors import ExchangeMismatch

if TYPE_CHECKING:
    from weft.comm.core import Core

__all__ = ["Bucket", "GatherBucket", "Item", "RingBucket", "ScatterBucket", "StarBucket"]

SMALL = 1 << 16  # bytes of uncompressed tensors that ride along in a message; more are all-reduced
PLAIN = Identity()


class Item:
    """One tensor of a bucket: where it lies, how it is coded."""

    __slots__ = ("codec", "coded", "out", "selected", "setting", "spec", "state", "x", "y")

    def __init__(self, spec: Spec, flat: Tensor, state: State):
        self.spec, self.out, self.state = spec, flat, state
        self.x = flat if flat.dtype == torch.float32 else flat.float()  # overwritten: the result goes to the same place
        self.y = self.x
        self.assign(PLAIN, None, False)

    def assign(self, codec: Codec, setting: Setting, selected: bool) -> None:
        """How it is coded in this step. Selected tensors go through the memory also where a setting of None leaves them whole."""
        self.setting, self.coded, self.selected = setting, setting is not None, selected
        self.codec = codec if self.coded else PLAIN

    def deliver(self, mean: Tensor, memory: Memory) -> Tensor:
        """Write the combined result (numel,) where the gradient was."""
        result = (memory.delivered if self.selected else memory.dense)(mean, self.spec, self.state)
        if result.data_ptr() != self.out.data_ptr():
            self.out.copy_(result)
        return result


class Bucket(Job):
    """Some tensors of one step. `last`: the step is complete with it. `done` is called once, with None or the error."""

    doing = "a gradient exchange"

    def __init__(
        self, exchange: Core, items: list[Item], step: int, last: bool, done: Callable[[BaseException | None], None]
    ):
        self.exchange, self.items, self.step, self.last, self.done = exchange, items, step, last, done
        self.group, self.ranks, self.own = exchange.wired.group, exchange.wired.ranks, exchange.wired.own
        self.specs = tuple(item.spec for item in items)
        self.alone = not exchange.wired.agreed(self.specs)
        self.key: tuple[Any, ...] = ()  # of this bucket's buffers: its specs and settings
        self.bad = False  # this rank's gradient is not finite

    def fail(self, error: BaseException) -> None:
        self.exchange.fail_held(error)
        self.done(error)

    def prepare(self) -> None:
        exchange = self.exchange
        exchange.begin(self)
        self.bad = not all(_finite(item.x) for item in self.items)
        for item in self.items:
            if self.bad and exchange.trusting:
                item.x = torch.zeros_like(item.x)  # codecs need not cope with NaN; what they do is undone
            elif self.bad:
                item.x = torch.nan_to_num(item.x, 0.0, 0.0, 0.0)
            exchange.save(item)
            item.y = item.x
            if item.selected:
                began = time.thread_time()
                item.y = exchange.memory.before(item.x, item.spec, item.state)
                exchange.tally(item.spec.name).codec_seconds += time.thread_time() - began
        self.encode()

    def encode(self) -> None:
        raise NotImplementedError

    def take_note(self, item: Item, sent: Tensor, where: Tensor | None) -> None:
        """Tell the memory, and now and then the report, what of item.y was sent."""
        if self.exchange.measures(self.step):
            self.exchange.tally(item.spec.name).measure(item.y, sent, where)
        self.exchange.memory.after(item.y, sent, where, item.state)

    def finish(self, poisoned: bool) -> None:
        """The results are in place: count, undo a bad step, tell whoever waits."""
        exchange = self.exchange
        if poisoned:
            for item in self.items:
                item.out.fill_(math.nan)
        exchange.end(self, poisoned)

    def check(self, headers: Sequence[int]) -> list[bool]:
        """Which ranks' gradients were not finite; the senders must be at our step."""
        for rank, header in enumerate(headers):
            if header >> 1 != self.step:
                raise ExchangeMismatch(
                    "the steps of the ranks", f"step {self.step} (rank {self.own})", f"step {header >> 1} (rank {rank})",
                    "Every rank must run the same number of synchronised backward passes.",
                )  # fmt: skip
        return [bool(header & 1) for header in headers]


@final
class RingBucket(Bucket):
    """Linear codecs: every round averages one flat buffer per dtype by all-reduce."""

    def encode(self) -> None:
        self.coding: list[tuple[Item, Any, Tensor | None]] = []
        for item in self.items:
            if item.coded:
                assert isinstance(item.codec, LinearCodec)
                began = time.thread_time()
                talk = item.codec.rounds(item.y, item.spec, item.state, item.setting, self.step)
                self.coding.append((item, talk, next(talk)))
                self.exchange.tally(item.spec.name).codec_seconds += time.thread_time() - began
            else:
                self.coding.append(
                    (item, None, item.y if item.out.dtype == torch.float32 else item.y.to(item.out.dtype))
                )

    def run(self) -> Iterator[dist.Work]:
        live, first, poisoned = self.coding, True, False
        while live:
            device = live[0][0].out.device
            flag = [torch.full((1,), math.nan if self.bad else 0.0, device=device)] if first else []
            kinds: dict[torch.dtype, list[Tensor]] = {torch.float32: flag} if first else {}
            for item, _, part in live:
                assert part is not None
                kinds.setdefault(part.dtype, []).append(part.reshape(-1))
                self.exchange.count(item.spec.name, part.numel() * part.element_size())
            flats = {}
            for dtype, parts in kinds.items():
                flats[dtype] = torch.cat(parts)
                flats[dtype].mul_(1 / self.ranks)
                yield dist.all_reduce(flats[dtype], group=self.group, async_op=True)
            if first:
                poisoned = bool(flats[torch.float32][0].isnan())
            places = dict.fromkeys(flats, 0)
            if first:
                places[torch.float32] = 1
            following = []
            for item, talk, part in live:
                assert part is not None
                start = places[part.dtype]
                places[part.dtype] = start + part.numel()
                mean = flats[part.dtype][start : start + part.numel()].view(part.shape)
                answer = self.go_on(item, talk, mean)
                if answer is not None:
                    following.append((item, talk, answer))
            live, first = following, False
        self.finish(poisoned or self.overflowed())

    def go_on(self, item: Item, talk: Any, mean: Tensor) -> Tensor | None:
        """Give an average to a codec; its next tensor to average, or None when the tensor is done."""
        exchange = self.exchange
        if talk is None:
            if item.selected:
                self.take_note(item, item.y, None)
            exchange.observe(item, item.deliver(mean.float(), exchange.memory), self.step)
            return None
        began = time.thread_time()
        try:
            answer: Tensor = talk.send(mean)
            return answer
        except StopIteration as stop:
            assert isinstance(item.codec, LinearCodec)
            if not isinstance(exchange.memory, NoMemory) or exchange.measures(self.step):
                sent, where = item.codec.own(item.y, stop.value, item.spec, item.state, item.setting)
                self.take_note(item, sent, where)
            exchange.observe(item, item.deliver(stop.value, exchange.memory), self.step)
            return None
        finally:
            exchange.tally(item.spec.name).codec_seconds += time.thread_time() - began

    def overflowed(self) -> bool:
        """A result that is not finite though every gradient was (float16 overflows): the same bits on all ranks."""
        return not all(_finite(item.out) for item in self.items)


class PackedBucket(Bucket):
    """What all routes of byte rows share."""

    def parts(self) -> list[tuple[Codec, Spec, Setting]]:
        return [(item.codec, item.spec, item.setting) for item in self.packed]

    def encode(self) -> None:
        exchange = self.exchange
        self.packed, self.reduced = exchange.split(self.items)
        wired = exchange.wired
        self.packing, self.send, self.views = wired.row((*self.key, "up"), self.parts, self.device)
        for item, views in zip(self.packed, self.views, strict=True):
            began = time.thread_time()
            message = item.codec.encode(item.y, item.spec, item.state, item.setting, self.step)
            for view, part in zip(views, message, strict=True):
                view.copy_(part.view(view.shape) if part.shape != view.shape else part)
            if item.selected:  # from the copy: the message may be y itself, which the memory changes
                sent, where = item.codec.sent(views, item.spec, item.setting)
                self.take_note(item, sent, where)
            exchange.tally(item.spec.name).codec_seconds += time.thread_time() - began
            exchange.count(item.spec.name, item.codec.nbytes(item.spec, item.setting))
        self.send[:HEADER].view(torch.int64)[0] = self.step << 1 | self.bad

    @property
    def device(self) -> torch.device:
        return self.items[0].out.device

    def reduce_rest(self) -> Iterator[dist.Work]:
        """All-reduce the tensors that go uncompressed and are too large to ride along."""
        if not self.reduced:
            return
        flat = torch.cat([item.y for item in self.reduced]).mul_(1 / self.ranks)
        for item in self.reduced:
            self.exchange.count(item.spec.name, item.y.numel() * 4, ring=True)
        yield dist.all_reduce(flat, group=self.group, async_op=True)
        start = 0
        for item in self.reduced:
            mean = flat[start : start + item.y.numel()]
            start += item.y.numel()
            if item.selected:
                self.take_note(item, item.y, None)
            self.exchange.observe(item, item.deliver(mean, self.exchange.memory), self.step)

    def stacked(self, rows: list[list[tuple[Tensor, ...]]], number: int, broken: Sequence[bool]) -> Tensor:
        """The decoded messages (n, numel) of one tensor; rows of broken ranks are NaN."""
        item = self.packed[number]
        stack = torch.stack([item.codec.decode(row[number], item.spec, item.setting) for row in rows])
        for rank, bad in enumerate(broken):
            if bad:
                stack[rank] = math.nan
        return stack

    def add_up(self, row: Sequence[float], rows: list[list[tuple[Tensor, ...]]], number: int) -> Tensor:
        """sum_r row[r] decode(message of rank r), in rank order."""
        item = self.packed[number]
        out = torch.zeros(item.spec.numel, device=self.device)
        for weight, messages in zip(row, rows, strict=True):
            if weight:
                item.codec.add_to(out, messages[number], item.spec, item.setting, weight)
        return out

    def weights(self, info: Info) -> list[float]:
        """The row of weights of this rank's result."""
        topology = self.exchange.topology
        if isinstance(topology, Gossip):
            return list(topology.weights[self.own])
        table = self.exchange.combine.weights(info)
        if table.dim() != 1:
            raise ValueError(
                f"{type(self.exchange.combine).__name__} gives {len(table)} results; an exchange delivers one: wrap it in a "
                "rule whose weights are one row"
            )
        return [float(weight) for weight in table]

    def combine_all(self, rows: list[list[tuple[Tensor, ...]]], broken: Sequence[bool]) -> None:
        """Combine and deliver every packed tensor; rules that need the whole model's inner products wait for the last bucket."""
        exchange, rule = self.exchange, self.exchange.combine
        if rule.needs == "gram":
            for number in range(len(self.packed)):
                exchange.add_gram(gram(self.stacked(rows, number, broken)))
            exchange.hold(self, lambda found: self.combine_held(rows, broken, found))
            return
        own = self.own if isinstance(exchange.topology, Peer) else -1
        row = None if rule.needs == "elementwise" else self.weights(Info(len(rows), None, own))
        for number, item in enumerate(self.packed):
            began = time.thread_time()
            if row is None:
                mean = rule.elementwise(self.stacked(rows, number, broken))
            else:
                mean = self.add_up(row, rows, number)
            result = item.deliver(mean, exchange.memory)
            exchange.tally(item.spec.name).codec_seconds += time.thread_time() - began
            exchange.observe(item, result, self.step)

    def combine_held(self, rows: list[list[tuple[Tensor, ...]]], broken: Sequence[bool], found: Tensor) -> None:
        exchange, rule = self.exchange, self.exchange.combine
        own = self.own if isinstance(exchange.topology, Peer) else -1
        table = exchange.row_of_step(Info(len(rows), found, own))
        for number, item in enumerate(self.packed):
            mean = rule.finish(weighted(table, self.stacked(rows, number, broken)))
            exchange.observe(item, item.deliver(mean, exchange.memory), self.step)


@final
class GatherBucket(PackedBucket):
    """Everybody gets every row."""

    def run(self) -> Iterator[dist.Work]:
        found, rows = self.exchange.wired.rows((*self.key, "all"), self.packing, self.ranks, self.device)
        yield dist.all_gather_single(found, self.send, group=self.group, async_op=True)
        headers = found.view(self.ranks, -1)[:, :HEADER].contiguous().view(torch.int64).flatten().tolist()
        broken = self.check(headers)
        poisoned = any(broken) and self.exchange.trusting
        yield from self.reduce_rest()
        if not poisoned:
            self.combine_all(rows, broken)
        self.finish(poisoned)


@final
class StarBucket(PackedBucket):
    """Rows to the server, which combines, encodes and sends the result to all; the server decodes its own message, too (R7)."""

    def run(self) -> Iterator[dist.Work]:
        exchange, star = self.exchange, self.exchange.topology
        assert isinstance(star, Star)
        root, server = dist.get_global_rank(self.group, star.root), star.root == self.own
        found, rows = exchange.wired.rows((*self.key, "all"), self.packing, self.ranks if server else 1, self.device)
        parts = list(found.view(-1, self.packing.nbytes).unbind()) if server else None
        yield dist.gather(self.send, parts, dst=root, group=self.group, async_op=True)
        down = star.down or PLAIN
        legs = [(down, item.spec, down.default(item.spec)) for item in self.packed]
        _, row, views = exchange.wired.row((*self.key, "down"), lambda: legs, self.device)
        header = row[:HEADER].view(torch.int64)
        if server:
            headers = torch.stack([part[:HEADER].view(torch.int64)[0] for part in parts or ()]).tolist()
            broken = self.check(headers)
            poisoned = any(broken) and exchange.trusting
            header[0] = self.step << 1 | poisoned
            if not poisoned:
                self.serve(rows, broken, legs, views, star.memory or NoMemory())
        yield dist.broadcast(row, root, group=self.group, async_op=True)
        poisoned = self.check(header.tolist())[0]
        yield from self.reduce_rest()
        if not poisoned:
            for (codec, spec, setting), message, item in zip(legs, views, self.packed, strict=True):
                result = item.deliver(codec.decode(message, spec, setting), exchange.memory)
                exchange.observe(item, result, self.step)
        self.finish(poisoned)

    def serve(
        self,
        rows: list[list[tuple[Tensor, ...]]],
        broken: Sequence[bool],
        legs: Sequence[tuple[Codec, Spec, Setting]],
        views: list[tuple[Tensor, ...]],
        memory: Memory,
    ) -> None:
        rule = self.exchange.combine
        for number, ((codec, spec, setting), places) in enumerate(zip(legs, views, strict=True)):
            if rule.needs == "elementwise":
                mean = rule.elementwise(self.stacked(rows, number, broken))
            else:
                mean = self.add_up(self.weights(Info(len(rows))), rows, number)
            self.exchange.recode(self.step, spec, mean, codec, setting, memory, places, "server")


@final
class ScatterBucket(Bucket):
    """Segment r of every tensor goes to rank r, and comes back combined."""

    def encode(self) -> None:
        exchange, n = self.exchange, self.ranks
        self.cuts = [[item.spec.numel * r // n for r in range(n + 1)] for item in self.items]
        self.pieces = [
            [(item.codec, *_segment(item, r, cut)) for item, cut in zip(self.items, self.cuts, strict=True)]
            for r in range(n)
        ]
        packings = [Packing(piece) for piece in self.pieces]
        width = max(packing.nbytes for packing in packings)  # all-to-all wants equal rows
        self.send = exchange.wired.buffer((*self.key, "scatter"), n * width, self.device)
        self.found = exchange.wired.buffer((*self.key, "found"), n * width, self.device)
        rows = [row[: packing.nbytes] for row, packing in zip(self.send.view(n, -1), packings, strict=True)]
        views = [packing.views(row) for row, packing in zip(rows, packings, strict=True)]
        for number, item in enumerate(self.items):
            began = time.thread_time()
            values, places = [], []
            for r in range(n):
                codec, spec, setting = self.pieces[r][number]
                start, end = self.cuts[number][r : r + 2]
                state = exchange.inner(item.state, f"segment {r}", spec.name)
                message = codec.encode(item.y[start:end], spec, state, setting, self.step)
                for view, part in zip(views[r][number], message, strict=True):
                    view.copy_(part.view(view.shape))
                sent, where = codec.sent(message, spec, setting)
                values.append(sent)
                places.append(None if where is None else where + start)
            if item.selected:
                sparse = [where for where in places if where is not None]
                self.take_note(item, torch.cat(values), torch.cat(sparse) if len(sparse) == n else None)
            exchange.tally(item.spec.name).codec_seconds += time.thread_time() - began
            exchange.count(item.spec.name, item.codec.nbytes(item.spec, item.setting))
        for row in rows:
            row[:HEADER].view(torch.int64)[0] = self.step << 1 | self.bad
        mine = packings[self.own]
        self.rows = [mine.views(row[: mine.nbytes]) for row in self.found.view(n, -1)]

    @property
    def device(self) -> torch.device:
        return self.items[0].out.device

    def run(self) -> Iterator[dist.Work]:
        exchange, topology, n = self.exchange, self.exchange.topology, self.ranks
        assert isinstance(topology, ScatterGather)
        yield dist.all_to_all_single(self.found, self.send, group=self.group, async_op=True)
        headers = self.found.view(n, -1)[:, :HEADER].contiguous().view(torch.int64).flatten().tolist()
        bad = any(self.check(headers))
        legs = [
            [
                ((topology.down or codec) if setting is not None else PLAIN, spec, setting)
                for codec, spec, setting in piece
            ]
            for piece in self.pieces
        ]
        if topology.down is not None:
            legs = [[(c, s, None if t is None else c.default(s)) for c, s, t in piece] for piece in legs]
        packings = [Packing(leg) for leg in legs]
        width = max(packing.nbytes for packing in packings)
        send = exchange.wired.buffer((*self.key, "owned"), width, self.device)
        found = exchange.wired.buffer((*self.key, "gathered"), n * width, self.device)
        views = packings[self.own].views(send[: packings[self.own].nbytes])
        send[:HEADER].view(torch.int64)[0] = self.step << 1 | bad
        row = exchange.combine.weights(Info(n)).tolist()
        memory = topology.memory or NoMemory()
        for number, (codec, spec, setting) in enumerate(self.pieces[self.own]):
            out = torch.zeros(spec.numel, device=self.device)
            for weight, messages in zip(row, self.rows, strict=True):
                codec.add_to(out, messages[number], spec, setting, weight)
            down, _, leg = legs[self.own][number]
            exchange.recode(self.step, spec, out, down, leg, memory, views[number], "owner")
        yield dist.all_gather_single(found, send, group=self.group, async_op=True)
        gathered = [found.view(n, -1)[r][: packing.nbytes] for r, packing in enumerate(packings)]
        poisoned = any(self.check([int(row[:HEADER].view(torch.int64)[0]) for row in gathered]))
        if not poisoned:
            messages = [packing.views(row) for row, packing in zip(gathered, packings, strict=True)]
            for number, item in enumerate(self.items):
                mean = torch.cat([
                    codec.decode(messages[r][number], spec, setting)
                    for r, (codec, spec, setting) in enumerate(leg[number] for leg in legs)
                ])  # fmt: skip
                exchange.observe(item, item.deliver(mean, exchange.memory), self.step)
        self.finish(poisoned)


def _segment(item: Item, rank: int, cut: Sequence[int]) -> tuple[Spec, Setting]:
    name = f"{item.spec.name}[{cut[rank]}:{cut[rank + 1]}]"
    return Spec(name, (cut[rank + 1] - cut[rank],), item.spec.dtype), item.setting


def _finite(x: Tensor) -> bool:
    """Whether all entries are finite: one sum, and a closer look only where that is not (it may have overflowed)."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())
