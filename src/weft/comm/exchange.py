"""The exchange of named tensors between the ranks of a group: what is sent, how it travels, what is made of it.

    result = combine over ranks r of  decode(encode(memory(x_r)))

An `Exchange` joins six decisions (codec, memory, combine, topology, wait, controller) and owns what changes: the memories and
warm starts of every tensor by its name (R2), settings, counters. All its communication is done by one thread, first in first out,
on a process group of its own (R1); messages have fixed sizes (R3); ranks decode and add in rank order, so that results are
bit-identical (R7); a tensor that `select` or the setting None excludes is averaged as it is (R8).

Source: Lin et al., Deep Gradient Compression, arXiv:1712.01887, and section 5 of weft's design of the exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from weft.cluster import Link
from weft.comm.agree import agree
from weft.comm.codec import Codec, LinearCodec, Spec
from weft.comm.codecs.plain import Identity
from weft.comm.combine import Combine, Info
from weft.comm.controller import Controller
from weft.comm.core import Core, Options
from weft.comm.memory import Memory, NoMemory, VelocityMemory
from weft.comm.report import Report, TensorReport
from weft.comm.routes import Bucket, GatherBucket, Item, RingBucket, StarBucket
from weft.comm.rules.mean import Mean
from weft.comm.segments import Cut, ScatterBucket, ShardBucket
from weft.comm.topology import AllGather, Gossip, Peer, Ring, ScatterGather, Star, Topology, choose
from weft.comm.wait import Wait
from weft.comm.wired import Wired
from weft.errors import ExchangeMismatch

__all__ = ["Exchange", "matrices"]

FORMAT = 1
ROUTES: dict[type[Topology], type[Bucket]] = {
    Ring: RingBucket,
    AllGather: GatherBucket,
    Peer: GatherBucket,
    Gossip: GatherBucket,
    ScatterGather: ScatterBucket,
    Star: StarBucket,
}


def matrices(spec: Spec) -> bool:
    """Tensors of more than one dimension; biases and norms are small, and sensitive."""
    return len(spec.shape) > 1


@final
class Exchange:
    """Exchange tensors with the other ranks of a group.

    Args:
        codec: what goes on the wire in place of a tensor.
        memory: what this rank keeps of what it did not send.
        combine: how n messages become one.
        topology: who sends to whom; "auto" picks a ring where messages may be added on the wire, else an all-gather.
        wait: None, or `weft.comm.waits.All()`: every round waits for every rank. Rounds that go on without late ranks are run by
            `weft.comm.straggler`, not by an exchange.
        controller: changes settings from step to step.
        select: which tensors the codec is for; the others go as they are.
        group: the ranks; None for all. The exchange makes a process group of its own for them.
        seed: of all randomness, the same on every rank.
        timeout: seconds for another rank to answer, > 0; after that every waiting future fails with `PeerLost`.
        measure: every how many steps the report measures errors; 0 for never.

    Raises:
        ValueError: options that contradict each other.

    Usage: `weft.comm.attach(ddp, Exchange(...))`, or `reduce` by itself.
    """

    def __init__(
        self,
        codec: Codec | None = None,
        memory: Memory | None = None,
        combine: Combine | None = None,
        topology: Topology | str = "auto",
        wait: Wait | None = None,
        controller: Controller | None = None,
        select: Callable[[Spec], bool] = matrices,
        group: dist.ProcessGroup | None = None,
        *,
        seed: int = 0,
        timeout: float = 300.0,
        measure: int = 50,
    ):
        self.codec: Codec = codec if codec is not None else Identity()
        self.memory: Memory = memory if memory is not None else NoMemory()
        self.combine: Combine = combine if combine is not None else Mean()
        self.wait, self.controller, self.select, self.group = wait, controller, select, group
        self.seed, self.timeout, self.measure = seed, timeout, measure
        if isinstance(topology, str):
            if topology != "auto":
                raise ValueError(f"Exchange: topology must be 'auto' or a Topology, got {topology!r}")
            topology = choose(self.codec, self.combine)
        self.topology: Topology = topology
        self._options = Options(self.codec, self.memory, self.combine, topology, controller, select, seed, measure)
        self._check()
        self._core: Core | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._waited = 0.0  # wall seconds that backward passes waited
        if controller is not None:
            controller.bind(self.codec, self._seconds)

    def _check(self) -> None:
        if type(self.topology) not in ROUTES:
            raise ValueError(
                f"Exchange: topology must be one of {[kind.__name__ for kind in ROUTES]}, got {self.topology}"
            )
        if isinstance(self.topology, Ring) and not (
            isinstance(self.codec, LinearCodec) and isinstance(self.combine, Mean)
        ):
            raise ValueError(
                f"Exchange: a Ring adds messages on the wire, which {type(self.codec).__name__} with "
                f"{type(self.combine).__name__} does not allow; use AllGather() or topology='auto'"
            )
        if isinstance(self.topology, Gossip) and not isinstance(self.combine, Mean):
            raise ValueError("Exchange: Gossip's weights are the rule; leave `combine` out")
        if self.combine.needs == "arrivals":
            raise ValueError(
                f"Exchange: {type(self.combine).__name__} weighs messages by when they arrive, but an exchange waits for all; "
                "use weft.comm.straggler or weft.federated"
            )
        kept = getattr(self.topology, "memory", None)
        if kept is not None and (isinstance(kept, VelocityMemory) or type(kept).delivered is not Memory.delivered):
            raise ValueError(
                f"Exchange: memory of {type(self.topology).__name__} must keep what was not sent, and nothing else, got {kept}: "
                "ranks decode results as they come; use ErrorFeedback() there"
            )
        if self.wait is not None and type(self.wait).__name__ != "All":
            raise ValueError(
                f"Exchange: wait must be None or All(), got {self.wait}; rounds that go on without late ranks are run by "
                "weft.comm.straggler"
            )
        if not self.timeout > 0:
            raise ValueError(f"Exchange: timeout must be > 0 seconds, got {self.timeout}")
        if self.measure < 0:
            raise ValueError(f"Exchange: measure must be >= 0 steps, got {self.measure}")
        if self.controller is not None and self.controller.every < 1:
            raise ValueError(f"Exchange: controller.every must be >= 1 steps, got {self.controller.every}")

    @property
    def plain(self) -> bool:
        """Nothing but the mean of the tensors themselves: what plain data parallel training does."""
        return (
            isinstance(self.codec, Identity)
            and isinstance(self.memory, NoMemory)
            and isinstance(self.topology, Ring)
            and self.controller is None
        )

    def selects(self, spec: Spec) -> bool:
        """Whether the codec is for this tensor; it never is for one without entries."""
        return self._options.selects(spec)

    @property
    def options(self) -> str:
        """In words, one a line; exchanges of the same options understand each other, and each other's checkpoints."""
        return self._options.words

    @property
    def skipped(self) -> int:
        """Steps undone so far, since a gradient was not finite on some rank."""
        return 0 if self._core is None else self._core.skipped

    # ---- the work

    def open(
        self,
        specs: Sequence[Spec] = (),
        rows: Sequence[Sequence[int]] = (),
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Make the process group and compare options and tensors over the ranks; every rank calls this at the same time.

        `reduce` does it on first use. Open again after `close` with the same states.

        Args:
            specs: the tensors, so far as they are known.
            rows: groups of the ranks, equally long, that exchange side by side, each by itself: ranks of a row are numbered in
                its order. A step that is not finite in one is undone in all. Ask `one_group` whether that may be.
            group: the ranks this time, where the exchange was given none.
        Raises:
            ExchangeMismatch: on every rank, if any has other options or tensors; or a loaded checkpoint is of others.
            PeerLost: a rank did not come.
            ValueError: it is at work already, with tensors of another model; their memories would be mixed up. Or, on every
                rank, topology or rule are not for so many ranks, or the codec is none for the memory (`Memory.suits`).
        """
        if self._core is not None and self._core.specs and specs:
            raise ValueError(
                "Exchange: is at work already; make one for each model, or end the other use first (handle.remove(), close())"
            )
        fresh = self._core is None
        if fresh:
            if not dist.is_available() or not dist.is_initialized():
                raise ValueError(
                    "Exchange: torch.distributed is not initialised; call init_process_group first, or use torchrun"
                )
            if len(rows) > 1 and self.group is not None:
                raise ValueError("Exchange: rows are groups of all ranks; leave group out")
            wired = Wired(self.group or group, self.timeout, rows)
            self._core = Core(self._options, wired)
        core = self._core
        assert core is not None
        try:
            self._compare(core, specs)
        except BaseException:
            if fresh:
                core.wired.close()
                self._core = None
            raise

    def _compare(self, core: Core, specs: Sequence[Spec]) -> None:
        refusal = None
        try:
            self._check_ranks(core.wired.ranks)
            core.check_codes(specs)
        except ValueError as error:
            refusal = error  # raised when the others have heard of it: a group that one rank leaves is lost to all
        core.specs.update({spec.name: spec for spec in specs})
        words = core.words(specs) if refusal is None else f"{core.words(specs)}\n{refusal}"
        agree(
            "options or tensors", words, core.wired.group, core.wired.device,
            "Every rank must have the same model and the same exchange options.",
        )  # fmt: skip
        if refusal is not None:
            raise refusal
        failed = None
        if self._loaded is not None:
            try:
                self._take_over(self._loaded)
            except ExchangeMismatch as error:
                failed = error  # raised when the others have heard of it
        try:
            agree(
                "checkpoints of the ranks", f"step {core.step}" if failed is None else str(failed), core.wired.group,
                core.wired.device, "Every rank must load the checkpoint of the same step, or none.",
            )  # fmt: skip
        finally:
            if failed is not None:
                raise failed

    def _check_ranks(self, ranks: int) -> None:
        """That topology and rule are for so many ranks, before anything is sent."""
        if isinstance(self.topology, Star) and self.topology.root >= ranks:
            raise ValueError(f"Star: root must be < {ranks}, the number of ranks, got {self.topology.root}")
        if isinstance(self.topology, Gossip) and len(self.topology.weights) != ranks:
            raise ValueError(f"Gossip: weights must be {ranks} x {ranks}, one row per rank")
        rule = self.combine
        if rule.needs == "elementwise":
            rule.elementwise(torch.zeros(ranks, 1))
        elif rule.needs == "gram":
            rule.weights(
                Info(ranks, torch.eye(ranks, dtype=torch.float64), 0 if isinstance(self.topology, Peer) else -1)
            )

    @property
    def core(self) -> Core:
        if self._core is None:
            self.open()
        assert self._core is not None
        return self._core

    @property
    def wired(self) -> Wired:
        """Its own process group: who the ranks are, where their messages lie."""
        return self.core.wired

    @property
    def next_step(self) -> int:
        """The number of the step to come, which a checkpoint may have set."""
        return self.core.step + 1

    def count_plain(self, step: int, bad: bool) -> None:
        """Take note of a step that a `plain` exchange's owner all-reduced by itself; `bad`: its result is not finite."""
        core = self.core
        core.step, core.plain_steps, core.skipped = step, core.plain_steps + 1, core.skipped + bad

    def submit(
        self,
        named: Sequence[tuple[Spec, Tensor]],
        step: int,
        last: bool,
        done: Callable[[BaseException | None], None],
        cuts: Sequence[Cut] = (),
    ) -> None:
        """Exchange flat tensors in place; `done(error or None)` is called from the exchange thread. All ranks submit alike.

        Args:
            named: spec and flat tensor (numel,) each; overwritten by the results.
            step: counted from 0, the same on all ranks.
            last: nothing else belongs to this step.
            done: called once. After an error the tensors' values are undefined.
            cuts: of each tensor, if rank r wants nothing but piece r; what then stands beside it is undefined.
        """
        core = self.core
        items = [Item(spec, flat, core.state(spec.name, spec.part)) for spec, flat in named]
        bucket: Bucket
        if cuts and self.scatters:
            bucket = ShardBucket(core, items, step, last, done, cuts=cuts)
        else:
            bucket = ROUTES[type(self.topology)](core, items, step, last, done)
        core.wired.submit(bucket)

    def reduce(self, named: Mapping[str, Tensor], step: int) -> torch.futures.Future[dict[str, Tensor]]:
        """Exchange tensors by name, as one step; boxing Partial -> Replicate.

        Args:
            named: the same names, shapes and dtypes in the same order on all ranks; read before this returns.
            step: counted from 0, the same on all ranks; each step once.
        Returns:
            A future of new tensors of the same shapes. Its `wait()` raises `PeerLost`, `ExchangeMismatch` and what a codec or
            rule raised. Where a tensor was not finite on some rank (and `combine` trusts ranks), the results are NaN, all
            memories are as before, and `skipped` is one more.
        Raises:
            TypeError: a tensor is sparse, or not of real floating-point numbers.
        """
        future: torch.futures.Future[dict[str, Tensor]] = torch.futures.Future()
        pairs = _flat(named)

        def done(error: BaseException | None) -> None:
            if error is None:
                future.set_result({spec.name: flat.view(spec.shape) for spec, flat in pairs})
            else:
                future.set_exception(error)  # type: ignore[arg-type]

        self.submit(pairs, step, True, done)
        return future

    def reduce_scatter(
        self, named: Mapping[str, Tensor], step: int, shard: Mapping[str, int] | int = 0
    ) -> torch.futures.Future[dict[str, Tensor]]:
        """Like `reduce`, but each rank gets its piece alone; boxing Partial -> Shard.

        Where `scatters`, a rank receives nothing but the n messages for its piece, (n-1)/n of a message instead of 2 (n-1)/n by
        a ring or n - 1 by an all-gather. Codes and memories then see a tensor's pieces one by one. What is sent as it is
        (`Identity`, tensors not selected) is added in rank order: the same bits as `reduce` and a cut over an all-gather, a star
        or scatter-gather, and over a ring of two; a ring of more adds in another order, `Cast` there in 16 bits and here in 32.
        Elsewhere it is `reduce` and a cut.

        Args:
            named: as for `reduce`.
            step: as for `reduce`.
            shard: the dimension to cut, for all tensors or by name; pieces are those of `torch.tensor_split`.
        """
        dims = []
        for name, tensor in named.items():
            dim = shard if isinstance(shard, int) else shard[name]
            if not -tensor.dim() <= dim < tensor.dim():
                raise ValueError(f"{name} of shape {tuple(tensor.shape)} has no dimension {dim} to cut")
            dims.append(dim % tensor.dim())
        ranks, own = self.wired.ranks, self.wired.own
        future: torch.futures.Future[dict[str, Tensor]] = torch.futures.Future()
        pairs = _flat(named)
        cuts = [Cut.of(spec.shape, dim, ranks) for (spec, _), dim in zip(pairs, dims, strict=True)]

        def done(error: BaseException | None) -> None:
            if error is None:
                mine = zip(pairs, cuts, strict=True)
                future.set_result({spec.name: cut.window(flat, own).clone() for (spec, flat), cut in mine})
            else:
                future.set_exception(error)  # type: ignore[arg-type]

        self.submit(pairs, step, True, done, cuts)
        return future

    @property
    def scatters(self) -> bool:
        """Whether `reduce_scatter` sends pieces to their owners alone.

        Not by a star, nor where ranks' results differ (Peer, Gossip); not for low rank and other codes that a ring adds but that
        have no pieces; and not where a memory needs whole results (`Shift`).
        """
        topology, codec, memory = self.topology, self.codec, self.memory
        pieces = isinstance(topology, AllGather | ScatterGather) or (
            isinstance(topology, Ring) and isinstance(codec, LinearCodec) and codec.elementwise
        )
        stateless = type(memory).delivered is Memory.delivered and (
            type(memory).dense is Memory.dense or isinstance(self.combine, Mean)
        )
        return pieces and stateless

    @property
    def one_group(self) -> str:
        """Why groups may not exchange parts of a model side by side, "" if they may.

        What several groups hold must get the same bits in each, so nothing may depend on the other tensors of a group but what
        adds up over groups: inner products of messages, and what a controller says does (`Controller.additive`).
        """
        controller = self.controller
        if controller is not None and not (controller.agreed or controller.additive):
            return (
                f"{type(controller).__name__} would decide in each group by itself: it is neither agreed nor additive "
                "(Controller); use LayerwiseBudget, Accordion or Schedule"
            )
        return ""

    def waited(self, seconds: float) -> None:
        """Count wall seconds that somebody waited for results."""
        self._waited += seconds

    def close(self) -> None:
        """End the thread and the process group, on every rank at the same time. States stay."""
        if self._core is not None:
            self._loaded = self.state_dict()
            self._core.wired.close()
            self._core = None

    # ---- what is known of it

    def report(self) -> Report:
        """What was sent, lost and spent so far, tensor by tensor; call it between steps."""
        core = self._core
        if core is None:
            return Report()
        steps = max((tally.steps for tally in core.tallies.values()), default=0) + core.plain_steps
        tensors = {}
        for name, spec in core.specs.items():
            tally = core.tallies.get(name)
            dense = Ring().wire(spec.numel * spec.dtype.itemsize, core.wired.ranks)
            if tally is None or not tally.steps:
                if core.plain_steps:
                    tensors[name] = TensorReport(None, dense, 1.0, 0.0, 0.0)
                continue
            nbytes = tally.nbytes / tally.steps
            tensors[name] = TensorReport(
                setting=core.setting(spec),
                nbytes=nbytes,
                ratio=dense / nbytes if nbytes else 1.0,
                relative_error=(tally.error / tally.size) ** 0.5 if tally.size else 0.0,
                codec_seconds=tally.codec_seconds / tally.steps,
                rounded=core.rounded(spec),
            )
        return Report(tensors, steps, core.skipped, self._waited / steps if steps else 0.0)

    def wire(self, specs: Sequence[Spec], ranks: int, scatter: bool = False) -> tuple[int, float]:
        """(latencies one after the other, bytes that the busiest rank sends) for tensors that travel as one message.

        `scatter`: each rank wants a piece of each, see `reduce_scatter`.
        """
        pieces = scatter and self.scatters
        coded = back = whole = 0.0
        for spec in specs:
            setting = self.setting_of(spec)
            if setting is None:
                whole += spec.numel * spec.dtype.itemsize
            else:
                piece = Spec(spec.name, (-(-spec.numel // ranks),), spec.dtype)
                nbytes = ranks * self.codec.nbytes(piece, setting) if pieces else self.codec.nbytes(spec, setting)
                coded, back = coded + nbytes, back + self.topology.back(spec, nbytes)
        if pieces:
            stateful = type(self.memory).dense is not Memory.dense
            reduced = whole if stateful else 0.0
            return ranks - 1, (ranks - 1) / ranks * (coded + whole - reduced) + Ring().wire(reduced, ranks)
        rounds = self.codec.num_rounds if coded and isinstance(self.codec, LinearCodec) else 1
        topology = self.topology if coded else Ring()
        return topology.hops(ranks) * rounds, topology.wire(coded, ranks, back) + Ring().wire(whole, ranks)

    def cost(self, spec: Spec, link: Link, ranks: int | None = None, scatter: bool = False) -> float:
        """Predicted seconds to exchange one tensor over links like `link`: messages, and codec seconds as far as measured.

        Args:
            spec: the tensor.
            link: latency alpha in seconds, bandwidth beta in bytes per second.
            ranks: how many; None for those of the group.
            scatter: each rank wants a piece of it (`reduce_scatter`).
        """
        hops, nbytes = self.wire([spec], ranks if ranks is not None else self.wired.ranks, scatter)
        coded = self.setting_of(spec) is not None
        return (self._seconds(spec, None) if coded else 0.0) + hops * link.latency + nbytes / link.bandwidth

    def setting_of(self, spec: Spec) -> Any:
        """The codec's setting for a tensor: in force now, or the one to begin with; None for a tensor that goes as it is."""
        return self._options.in_force(spec, {} if self._core is None else self._core.settings)

    def _seconds(self, spec: Spec, setting: Any) -> float:
        """Codec seconds of one tensor, measured so far; what a controller is told that budgets time."""
        core = self._core
        tally = None if core is None else core.tallies.get(spec.name)
        return 0.0 if tally is None or not tally.steps else tally.codec_seconds / tally.steps

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Memories, warm starts, settings and the controller's state of this rank; call it between steps.

        Tensors are not copied: the exchange replaces them and never writes into them.
        """
        core = self._core
        if core is None:
            return dict(self._loaded) if self._loaded is not None else {}
        return {
            "format": FORMAT,
            "options": self.options,
            "rank": core.wired.own,
            "ranks": core.wired.ranks,
            "tensors": {name: (tuple(spec.shape), str(spec.dtype)) for name, spec in core.specs.items()},
            "states": {name: _copied(state) for name, state in core.states.items()},
            "settings": dict(core.settings),
            "controller": self.controller.state_dict() if self.controller is not None else {},
            "step": core.step,
            "skipped": core.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, on the same rank of as many ranks; any bucketing, any order of tensors.

        On another number of ranks see `weft.comm.regroup`.

        Raises:
            ExchangeMismatch: the state is of other options, tensors, ranks; nothing is changed then.
        """
        if not state:
            return
        if state.get("format") != FORMAT:
            raise ExchangeMismatch(
                "formats of the checkpoint",
                f"format {FORMAT}",
                f"{state.get('format')!r}",
                "Load a state_dict of an Exchange.",
            )
        if self._core is None:
            self._loaded = dict(state)
        else:
            self._take_over(state)

    def _take_over(self, state: Mapping[str, Any]) -> None:
        core = self.core
        remedy = "Load the checkpoint of the same exchange on the same rank, or start with empty memories."
        for what, ours, theirs in (
            ("options of exchange and checkpoint", self.options, state["options"]),
            ("numbers of ranks of exchange and checkpoint", core.wired.ranks, state["ranks"]),
            ("ranks of exchange and checkpoint", core.wired.own, state["rank"]),
        ):
            if ours != theirs:
                raise ExchangeMismatch(what, str(ours), str(theirs), remedy)
        for name, (shape, dtype) in state["tensors"].items():
            spec = core.specs.get(name)
            if spec is None and not core.specs:
                continue  # opened without tensors: they are compared when they come
            if spec is None or (tuple(spec.shape), str(spec.dtype)) != (tuple(shape), dtype):
                ours = "no such tensor" if spec is None else f"{tuple(spec.shape)} {spec.dtype}"
                raise ExchangeMismatch(
                    f"shapes of {name} of exchange and checkpoint", ours, f"{tuple(shape)} {dtype}", remedy
                )
        core.states = {name: _copied(kept) for name, kept in state["states"].items()}
        core.settings = dict(state["settings"])
        core.step, core.skipped = int(state["step"]), int(state["skipped"])
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])
        self._loaded = None


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, dict) else value for key, value in state.items()}


def _flat(named: Mapping[str, Tensor]) -> list[tuple[Spec, Tensor]]:
    """Spec and flat copy of each tensor."""
    pairs = []
    for name, tensor in named.items():
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} has layout {tensor.layout}; an exchange takes dense tensors: use sparse=False")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; an exchange takes real floating-point tensors")
        pairs.append((Spec(name, tuple(tensor.shape), tensor.dtype), tensor.detach().reshape(-1).clone()))
    return pairs
