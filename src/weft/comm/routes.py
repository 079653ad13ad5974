"""How one bucket of tensors travels: encode, collectives, decode and combine, by topology.

A bucket is one job of the exchange thread (see fifo.py). Its messages form one row of bytes:

    [step and flag, 8 bytes | message of tensor 1 | message of tensor 2 | ...]       `Packing`

with offsets fixed by specs and settings, so that send and receive buffers and the typed views into them are made once. The
flag says that the sender's gradient was not finite (rule R4).

    RingBucket       averages on the wire, round by round: linear codecs
    GatherBucket     all rows to all ranks; each decodes and combines in rank order (R7)     AllGather, Peer, Gossip
    StarBucket       all rows to a server, the combined one back
    (segments.py)    segment r of every tensor to rank r

All but the ring go `up`, where messages come to who combines them, and `down`, where results go to who wants them. A rule that
weighs ranks by the inner products of the whole model gets as far as `up` with each bucket, and `down` with the step's last.
Where groups side by side exchange parts of a model, those of the parts add up to those of the whole, and every group weighs its
ranks alike.
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
from weft.comm.packing import HEADER
from weft.comm.topology import Gossip, Peer, Star
from weft.errors import ExchangeMismatch

if TYPE_CHECKING:
    from weft.comm.core import Core

__all__ = ["PLAIN", "Bucket", "CombiningBucket", "GatherBucket", "Item", "RingBucket", "StarBucket", "overflowed"]

PLAIN = Identity()
STEPS = 61  # a ring compares steps modulo this: a prime that no interval of checkpoints is a multiple of


class Item:
    """One tensor of a bucket: where it lies, how it is coded."""

    __slots__ = ("codec", "coded", "out", "selected", "setting", "spec", "state", "x", "y")

    def __init__(self, spec: Spec, flat: Tensor, state: State):
        self.spec, self.out, self.state = spec, flat, state
        self.x = flat  # overwritten: the result goes to the same place
        self.assign(PLAIN, None, False, False)
        self.y = self.x

    def assign(self, codec: Codec, setting: Setting, selected: bool, kept: bool) -> None:
        """How it is coded in this step. Selected tensors go through the memory also where a setting of None leaves them whole.

        `kept`: the memory keeps something of them, in one dtype for all settings.
        """
        self.setting, self.coded, self.selected = setting, setting is not None, selected
        self.codec = codec if self.coded else PLAIN
        dtype = (codec if self.coded or (selected and kept) else PLAIN).precision(self.spec)
        if self.x.dtype != dtype:
            self.x = self.out.to(dtype)

    def deliver(self, mean: Tensor, memory: Memory) -> Tensor:
        """Write the combined result (numel,) where the gradient was."""
        result = (memory.delivered if self.selected else memory.dense)(mean, self.spec, self.state)
        if result.data_ptr() != self.out.data_ptr():
            self.out.copy_(result)
        return result


class Bucket(Job):
    """Some tensors of one step. `last`: the step is complete with it. `done` is called once, with None or the error."""

    doing = "a gradient exchange"
    alike = True  # every rank gets the same bits

    def __init__(
        self,
        exchange: Core,
        items: list[Item],
        step: int,
        last: bool,
        done: Callable[[BaseException | None], None],
        words: tuple[str, ...] = (),
    ):
        self.exchange, self.items, self.step, self.last, self.done = exchange, items, step, last, done
        self.group, self.ranks, self.own = exchange.wired.group, exchange.wired.ranks, exchange.wired.own
        self.specs = tuple(item.spec for item in items)
        self.words: tuple[str, ...] = words  # what else must be the same on all ranks
        self.alone = not exchange.wired.agreed(self.same)
        self.key: tuple[Any, ...] = ()  # of this bucket's buffers: its specs and settings
        self.bad = False  # this rank's gradient is not finite

    @property
    def same(self) -> tuple[object, ...]:
        """What must be the same on all ranks for the bucket to travel."""
        return (*self.specs, *self.words)

    @property
    def device(self) -> torch.device:
        return self.items[0].out.device

    def fail(self, error: BaseException) -> None:
        self.exchange.fail_held(self, error)
        self.done(error)

    def prepare(self) -> None:
        exchange = self.exchange
        exchange.begin(self)
        self.bad = not all(finite(item.x) for item in self.items)
        for item in self.items:
            if self.bad and exchange.trusting:
                item.x = torch.zeros_like(item.x)  # codecs need not cope with NaN; what they do is undone
            elif self.bad:
                item.x = torch.nan_to_num(item.x, 0.0, 0.0, 0.0)
            exchange.save(item)
            if not self.bad:
                exchange.observe(item, self.step)
            item.y = item.x
            if item.selected:
                began = time.thread_time()
                item.y = exchange.memory.before(item.x, item.spec, item.state)
                if exchange.keeps and not finite(item.y):  # what is owed and x have outgrown the dtype together
                    self.bad, item.y = True, torch.zeros_like(item.y)
                exchange.tally(item.spec.name).codec_seconds += time.thread_time() - began
        self.encode()

    def encode(self) -> None:
        raise NotImplementedError

    @property
    def noted(self) -> bool:
        """Whether anybody asks what was sent of a tensor: a memory, or the report."""
        return self.exchange.keeps or self.exchange.measures(self.step)

    def take_note(self, item: Item, sent: Tensor, where: Tensor | None) -> None:
        """Tell the memory, and now and then the report, what of item.y was sent."""
        if self.exchange.measures(self.step):
            self.exchange.tally(item.spec.name).measure(item.y, sent, where)
        self.exchange.memory.after(item.y, sent, where, item.state)

    def finish(self, poisoned: bool) -> Iterator[dist.Work]:
        """The results are in place: count, undo a bad step, tell whoever waits. A step is bad in all groups or in none."""
        exchange = self.exchange
        if poisoned:
            self.void()
        # Where results differ, one rank's alone may outgrow its dtype: the others must hear of it.
        apart = exchange.trusting and exchange.rounds and not self.alike
        for group in (self.group if apart else None, exchange.wired.across):
            if self.last and group is not None:
                bad = torch.full((1,), float(poisoned or exchange.poisoned), device=self.device)
                yield dist.all_reduce(bad, group=group, async_op=True)
                poisoned = bool(bad)
        exchange.end(self, poisoned)

    def spoiled(self) -> bool:
        """A result is not finite though every gradient was: by its code, what a memory adds, or its own dtype."""
        kept = self.exchange.keeps
        return not all(
            finite(self.result(item))
            for item in self.items
            if kept or item.codec.narrows or item.out.dtype != item.x.dtype
        )

    def result(self, item: Item) -> Tensor:
        """Where this rank's result of a tensor lies."""
        return item.out

    def void(self) -> None:
        for item in self.items:
            item.out.fill_(math.nan)

    def check(self, headers: Sequence[int]) -> list[bool]:
        """Which ranks' gradients were not finite; the senders must be at our step."""
        for rank, header in enumerate(headers):
            if header >> 1 != self.step:
                raise self.out_of_step(f"step {header >> 1} (rank {rank})")
        return [bool(header & 1) for header in headers]

    def out_of_step(self, theirs: str) -> ExchangeMismatch:
        return ExchangeMismatch(
            "the steps of the ranks", f"step {self.step} (rank {self.own})", theirs,
            "Every rank must run the same number of synchronised backward passes.",
        )  # fmt: skip


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
                self.coding.append((item, None, item.y.to(item.out.dtype)))

    def run(self) -> Iterator[dist.Work]:
        live, first, poisoned = self.coding, True, False
        while live:
            device = live[0][0].out.device
            number = float(self.step % STEPS)
            head = [math.nan if self.bad else 0.0, number, number * number]
            kinds: dict[torch.dtype, list[Tensor]] = {}
            if first:
                kinds[torch.float32] = [torch.tensor(head, device=device)]
            for item, _, part in live:
                assert part is not None
                kinds.setdefault(part.dtype, []).append(part.reshape(-1))
                self.exchange.count(item.spec.name, part.numel() * part.element_size())
            flats = {}
            for dtype, parts in kinds.items():
                flats[dtype] = torch.cat(parts)
                flats[dtype].mul_(1 / self.ranks)
                yield dist.all_reduce(flats[dtype], group=self.group, async_op=True)
            places = dict.fromkeys(flats, 0)
            if first:
                flag, mean_step, square = flats[torch.float32][:3].tolist()
                poisoned, places[torch.float32] = math.isnan(flag), 3
                # one rank that is one off: twice as much
                if square - mean_step**2 > 0.5 * (self.ranks - 1) / self.ranks**2:
                    raise self.out_of_step("another one (steps vary over the ranks)")
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
        yield from self.finish(poisoned or self.spoiled())

    def go_on(self, item: Item, talk: Any, mean: Tensor) -> Tensor | None:
        """Give an average to a codec; its next tensor to average, or None when the tensor is done."""
        exchange = self.exchange
        if talk is None:
            if item.selected:
                self.take_note(item, item.y, None)
            exchange.look(item.deliver(mean.to(item.x.dtype), exchange.memory), self.step)
            return None
        began = time.thread_time()
        try:
            answer: Tensor = talk.send(mean)
            return answer
        except StopIteration as stop:
            assert isinstance(item.codec, LinearCodec)
            if self.noted:
                sent, where = item.codec.own(item.y, stop.value, item.spec, item.state, item.setting)
                self.take_note(item, sent, where)
            exchange.look(item.deliver(stop.value, exchange.memory), self.step)
            return None
        finally:
            exchange.tally(item.spec.name).codec_seconds += time.thread_time() - began


class CombiningBucket(Bucket):
    """What all routes share whose messages are combined by ranks and not on the wire.

    `encode` sets `combined`, `up` sets `rows` and `broken`; `down` delivers what `mix` makes of them.
    """

    combined: Sequence[tuple[Codec, Spec, Setting]] = ()  # how the tensors are coded that this rank combines
    rows: Sequence[list[tuple[Tensor, ...]]] = ()  # every rank's messages for them; none where nothing is combined
    broken: Sequence[bool] = ()  # whose gradients are not finite
    poisoned = False  # so that the step changes nothing
    sees_all = True  # this rank has every message, not those for its pieces alone
    _row: list[float] | None = None

    def run(self) -> Iterator[dist.Work]:
        exchange = self.exchange
        yield from self.up()
        # a robust rule goes on without the broken ones, as long as anybody is left
        self.poisoned = any(self.broken) if exchange.trusting else bool(self.broken) and all(self.broken)
        if self.bad and not exchange.trusting:  # the others go on without us
            exchange.take_back(self)
        if exchange.combine.needs != "gram":
            yield from self.settle()
            yield from self.finish(self.poisoned)
            return
        for number, (_, spec, _) in enumerate(self.combined if self.rows else ()):
            exchange.add_gram(gram(self.stacked(number)) / spec.copies, self.sees_all)
        exchange.hold(self)
        if self.last:
            if exchange.gram_of_pieces is not None:  # the sum over owners is that of whole tensors
                yield dist.all_reduce(exchange.gram_of_pieces, group=self.group, async_op=True)
                exchange.add_gram(exchange.gram_of_pieces, True)
            yield from self.add_groups()
            for bucket in exchange.held:
                bucket.poisoned = exchange.nobody_left
                yield from bucket.settle()
                if bucket.poisoned:
                    exchange.poisoned = True
                    bucket.void()
        yield from self.finish(self.poisoned)

    def settle(self) -> Iterator[dist.Work]:
        yield from self.down()
        self.poisoned = self.poisoned or self.spoiled()

    def add_groups(self) -> Iterator[dist.Work]:
        """Make the Gram matrix that of the parts of all groups, added in the groups' order: the same bits in each (R7)."""
        exchange, across = self.exchange, self.exchange.wired.across
        if across is None or exchange.gram is None:  # one group, or a star's rank that combines nothing
            return
        found = exchange.gram.new_empty(dist.get_world_size(across), *exchange.gram.shape)
        yield dist.all_gather_single(found.view(-1), exchange.gram.reshape(-1), group=across, async_op=True)
        exchange.gram = found.sum(0)

    def up(self) -> Iterator[dist.Work]:
        raise NotImplementedError

    def down(self) -> Iterator[dist.Work]:
        raise NotImplementedError

    def stacked(self, number: int) -> Tensor:
        """The decoded messages (n, numel) of one tensor; rows of broken ranks are NaN."""
        codec, spec, setting = self.combined[number]
        stack = torch.stack([codec.decode(row[number], spec, setting) for row in self.rows])
        for rank, bad in enumerate(self.broken):
            if bad:
                stack[rank] = math.nan
        return stack

    def mix(self, number: int, into: Tensor | None = None) -> Tensor:
        """What the rule makes of the messages for one tensor: W @ messages, (numel,); it may be written `into` there."""
        exchange, rule = self.exchange, self.exchange.combine
        if rule.needs == "elementwise":
            return rule.elementwise(self.stacked(number))
        own = self.own if isinstance(exchange.topology, Peer) else -1
        if rule.needs == "gram":
            left, row = exchange.rule_of_step(own)
            return left.finish(weighted(row, self.stacked(number)))
        if self._row is None:
            self._row = self.weights(own)
        codec, spec, setting = self.combined[number]
        dtype = codec.precision(spec)
        fits = into is not None and into.dtype == dtype
        out = into.zero_() if into is not None and fits else torch.zeros(spec.numel, dtype=dtype, device=self.device)
        for weight, messages in zip(self._row, self.rows, strict=True):  # in rank order (R7)
            if weight:
                codec.add_to(out, messages[number], spec, setting, weight)
        return out

    def weights(self, own: int) -> list[float]:
        """The row of weights of this rank's result, where they depend on the number of messages alone."""
        topology = self.exchange.topology
        if isinstance(topology, Gossip):
            return list(topology.weights[self.own])
        table = self.exchange.combine.weights(Info(self.ranks, None, own))
        if table.dim() != 1:
            raise ValueError(
                f"{type(self.exchange.combine).__name__} gives {len(table)} results; an exchange delivers one: wrap it in a "
                "rule whose weights are one row"
            )
        return [float(weight) for weight in table]

    def reduce_whole(self, items: Sequence[Item]) -> Iterator[dist.Work]:
        """All-reduce tensors that go uncompressed, those of one dtype together."""
        for dtype in dict.fromkeys(item.y.dtype for item in items):
            alike = [item for item in items if item.y.dtype == dtype]
            flat = torch.cat([item.y for item in alike]).mul_(1 / self.ranks)
            for item in alike:
                self.exchange.count(item.spec.name, item.y.nbytes, ring=True)
            yield dist.all_reduce(flat, group=self.group, async_op=True)
            for item, mean in zip(alike, flat.split([item.y.numel() for item in alike]), strict=True):
                if item.selected:
                    self.take_note(item, item.y, None)
                self.exchange.look(item.deliver(mean, self.exchange.memory), self.step)


class PackedBucket(CombiningBucket):
    """All of a bucket in one row of bytes, but for large tensors that go whole."""

    def parts(self) -> list[tuple[Codec, Spec, Setting]]:
        return [(item.codec, item.spec, item.setting) for item in self.packed]

    def encode(self) -> None:
        exchange = self.exchange
        self.packed, self.reduced = exchange.split(self.items)
        self.combined = self.parts()
        wired = exchange.wired
        self.packing, self.send, self.views = wired.row((*self.key, "up"), self.parts, self.device)
        for item, views in zip(self.packed, self.views, strict=True):
            began = time.thread_time()
            message = item.codec.encode(item.y, item.spec, item.state, item.setting, self.step)
            for view, part in zip(views, message, strict=True):
                view.copy_(part.view(view.shape) if part.shape != view.shape else part)
            if item.selected and self.noted:  # from the copy: the message may be y itself, which the memory changes
                sent, where = item.codec.sent(views, item.spec, item.setting)
                self.take_note(item, sent, where)
            exchange.tally(item.spec.name).codec_seconds += time.thread_time() - began
            nbytes = item.codec.nbytes(item.spec, item.setting)
            exchange.count(item.spec.name, nbytes, item.spec if item.coded else None)
        self.bad |= overflowed(self.combined, self.views)
        self.send[:HEADER].view(torch.int64)[0] = self.step << 1 | self.bad


@final
class GatherBucket(PackedBucket):
    """Everybody gets every row."""

    @property
    def alike(self) -> bool:  # type: ignore[override]
        return not isinstance(self.exchange.topology, (Peer, Gossip))

    def up(self) -> Iterator[dist.Work]:
        found, self.rows = self.exchange.wired.received((*self.key, "all"), self.packing, self.ranks, self.device)
        yield dist.all_gather_single(found, self.send, group=self.group, async_op=True)
        headers = found.view(self.ranks, -1)[:, :HEADER].contiguous().view(torch.int64).flatten().tolist()
        self.broken = self.check(headers)
        yield from self.reduce_whole(self.reduced)

    def down(self) -> Iterator[dist.Work]:
        exchange = self.exchange
        for number, item in enumerate(() if self.poisoned else self.packed):
            began = time.thread_time()
            result = item.deliver(self.mix(number, item.out), exchange.memory)  # memory and codec have read it by now
            exchange.tally(item.spec.name).codec_seconds += time.thread_time() - began
            exchange.look(result, self.step)
        yield from ()


@final
class StarBucket(PackedBucket):
    """Rows to the server, which combines, encodes and sends the result to all; the server decodes its own message, too (R7)."""

    def up(self) -> Iterator[dist.Work]:
        star = self.exchange.topology
        assert isinstance(star, Star)
        self.root, self.serves = dist.get_global_rank(self.group, star.root), star.root == self.own
        key, parts = (*self.key, "all"), None
        if self.serves:
            found, self.rows = self.exchange.wired.received(key, self.packing, self.ranks, self.device)
            parts = list(found.view(-1, self.packing.nbytes).unbind())
        yield dist.gather(self.send, parts, dst=self.root, group=self.group, async_op=True)
        if parts is not None:
            self.broken = self.check(torch.stack([part[:HEADER].view(torch.int64)[0] for part in parts]).tolist())

    def down(self) -> Iterator[dist.Work]:
        exchange, star = self.exchange, self.exchange.topology
        assert isinstance(star, Star)
        down: Codec = star.down or PLAIN
        legs = [
            (down, item.spec, down.default(item.spec)) if item.coded else (PLAIN, item.spec, None)
            for item in self.packed
        ]  # what goes up as it is comes down as it is
        _, row, views = exchange.wired.row((*self.key, "down"), lambda: legs, self.device)
        header = row[:HEADER].view(torch.int64)
        if self.serves:
            memory = star.memory or NoMemory()
            for number, ((codec, spec, setting), places) in enumerate(zip(legs, views, strict=True)):
                if not self.poisoned:
                    self.poisoned = not exchange.recode(
                        self.step, spec, self.mix(number), codec, setting, memory, places, "server"
                    )
            self.poisoned |= not self.poisoned and overflowed(legs, views)
            header[0] = self.step << 1 | self.poisoned
        yield dist.broadcast(row, self.root, group=self.group, async_op=True)
        self.poisoned = self.check(header.tolist())[0]
        yield from self.reduce_whole(self.reduced)
        if self.poisoned:
            return
        for (codec, spec, setting), message, item in zip(legs, views, self.packed, strict=True):
            result = item.deliver(codec.decode(message, spec, setting), exchange.memory)
            exchange.look(result, self.step)


def overflowed(parts: Sequence[tuple[Codec, Spec, Setting]], messages: Sequence[tuple[Tensor, ...]]) -> bool:
    """Whether a code has made numbers that are not finite (float16 ends at 65,504) of finite ones."""
    return any(
        codec.narrows and any(part.is_floating_point() and not finite(part) for part in message)
        for (codec, _, _), message in zip(parts, messages, strict=True)
    )


def finite(x: Tensor) -> bool:
    """Whether all entries are finite: one sum, and a closer look only where that is not (it may have overflowed)."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())
