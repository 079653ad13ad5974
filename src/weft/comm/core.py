"""The part of an exchange that its thread works on: states, settings, a step's undo, and the counters of the report.

Everything here is touched by the exchange thread alone, apart from the plain reads of a report and of a checkpoint, which are
made between steps.

what a bucket does first        `begin`    agree on new buckets, take over decisions, note states for the undo
what a bucket does last         `end`      undo a bad step, tell those who wait for it and for what was `held`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from weft.comm.agree import decided, describe, hashed, shared
from weft.comm.codec import Codec, Setting, Spec, State
from weft.comm.combine import Combine, Info
from weft.comm.controller import Controller, Numbers
from weft.comm.memory import Memory, NoMemory, VelocityMemory
from weft.comm.report import Tally
from weft.comm.rules.mean import Mean
from weft.comm.topology import Ring, Topology
from weft.comm.wired import Wired

if TYPE_CHECKING:
    from weft.comm.routes import Bucket, CombiningBucket, Item

__all__ = ["LOOK_EVERY", "Core", "Options", "seeds"]

LOOK_EVERY = 20  # steps between looks at the norm of delivered velocities, see `attach`
SMALL = 1 << 16  # bytes of uncompressed tensors that ride along in a bucket's message; more are all-reduced


@final
@dataclass(frozen=True, eq=False)
class Options:
    """What an exchange goes by; `Exchange` says what each is."""

    codec: Codec
    memory: Memory
    combine: Combine
    topology: Topology
    controller: Controller | None
    select: Callable[[Spec], bool]
    seed: int
    measure: int = field(repr=False)

    @property
    def words(self) -> str:
        """One a line: what must be the same on all ranks, and in a checkpoint."""
        return "\n".join(f"{kind.name} {describe(getattr(self, kind.name))}" for kind in fields(self) if kind.repr)

    def selects(self, spec: Spec) -> bool:
        """Whether the codec is for this tensor; it never is for one without entries."""
        return spec.numel > 0 and self.select(spec)

    def in_force(self, spec: Spec, decided: Mapping[str, Setting]) -> Setting:
        """A tensor's setting where a controller has decided so far; None for one that goes uncompressed."""
        if not self.selects(spec):
            return None
        if spec.name in decided:
            return self.codec.in_force(spec, decided[spec.name])
        first = self.codec.default(spec)
        if self.controller is not None:
            first = self.controller.initial(spec, first)
        return self.codec.in_force(spec, first)


@final
class Core:
    """See the module's header."""

    def __init__(self, options: Options, wired: Wired):
        self.options, self.wired = options, wired
        self.memory, self.combine = options.memory.sized(wired.ranks), options.combine
        self.topology, self.controller = options.topology, options.controller
        # a robust rule goes on without a rank whose gradient is bad
        self.trusting = options.combine.needs in ("count", "arrivals")
        self.keeps = not isinstance(options.memory, NoMemory)
        self.states: dict[str, State] = {}
        self.specs: dict[str, Spec] = {}
        self.settings: dict[str, Setting] = {}
        self.tallies: dict[str, Tally] = {}
        self.step = -1  # that of the last bucket begun
        self.skipped = 0
        self.plain_steps = 0  # steps that went by plain all-reduce, without the thread
        self.delivered = 0.0  # squared norm of what the step delivers, for velocity memories
        self._undo: list[tuple[State, dict[str, Any]]] = []
        self.poisoned = False  # the step, as far as it has come
        self.rounds = False  # some result of the step is rounded to a dtype of fewer bits
        self.gram: Tensor | None = None  # of the step's messages as far as they have come
        self.gram_of_pieces: Tensor | None = None  # of those that went to this rank alone
        self.held: list[CombiningBucket] = []  # whose results wait for it
        self._rule: tuple[Combine, Tensor] | None = None

    # ---- the course of a step

    def decides(self, step: int) -> bool:
        return self.controller is not None and step % self.controller.every == 0

    def begin(self, bucket: Bucket) -> None:
        """Get a bucket ready to be encoded; the first one of a step comes when nothing is on the wire."""
        if not self.wired.agreed(bucket.same):
            self.wired.compare(bucket.same, "\n".join((self.words(bucket.specs), *bucket.words)))
            self.check_codes(bucket.specs)
            if self.wired.crowded():
                self.wired.forget()
        for spec in bucket.specs:
            self.specs.setdefault(spec.name, spec)
        if bucket.step != self.step:
            self.step = bucket.step
            self._undo.clear()
            self.held.clear()
            self.poisoned, self.rounds, self.delivered = False, False, 0.0
            self.gram, self.gram_of_pieces, self._rule = None, None, None
            if self.decides(bucket.step):
                self._decide(bucket.step)
        for item in bucket.items:
            item.assign(self.options.codec, self.setting(item.spec), self.options.selects(item.spec), self.keeps)
            self.rounds |= item.out.dtype != item.x.dtype
            self.tally(item.spec.name).steps += 1
        bucket.key = (bucket.specs, tuple(item.setting for item in bucket.items))

    def _decide(self, step: int) -> None:
        controller = self.controller
        assert controller is not None
        chosen = {name: spec for name, spec in self.specs.items() if self.options.selects(spec)}
        alone = controller.agreed or self.wired.ranks == 1
        apart = self.wired.across is not None and controller.additive

        def decide() -> dict[str, Setting]:
            return dict(controller.decide(step, chosen, self._total) if apart else controller.decide(step, chosen))

        decision = (
            decide() if alone else decided("the controller's decision", decide, self.wired.group, self.wired.device)
        )
        changed = any(self.settings.get(name) != setting for name, setting in decision.items())
        self.settings.update(decision)
        if changed:
            self.wired.forget()
            self.check_codes(list(chosen.values()))

    def _total(self, numbers: Numbers) -> dict[str, list[float]]:
        """Numbers of whole tensors: those of the groups' parts added in the groups' order, what several hold once."""
        assert self.wired.across is not None
        once = {
            name: None if row is None else [number / self.specs[name].copies for number in row]
            for name, row in numbers.items()
        }
        groups = shared(once, self.wired.across)
        found = {}
        for name in dict.fromkeys(name for group in groups for name in group):
            rows = [group[name] for group in groups if name in group]
            if None not in rows:
                found[name] = [sum(column) for column in zip(*rows, strict=True)]
        return found

    def end(self, bucket: Bucket, poisoned: bool) -> None:
        self.poisoned |= poisoned
        if not bucket.last:
            if not self.held:
                bucket.done(None)
            return
        if self.poisoned:
            self._restore()
            self.skipped += 1
        held, self.held = self.held, []
        for other in held:
            if other is not bucket:
                other.done(None)
        bucket.done(None)

    def take_back(self, bucket: Bucket) -> None:
        """Forget that a bucket's messages were sent: the rule goes on without them."""
        self._restore({id(item.state) for item in bucket.items})

    def give_back(self, names: Set[str]) -> None:
        """Forget the step for these tensors, whose results nobody has used: their memories owe what they owed before."""
        used = {f"{where}{name}" for name in names for where in ("", "server of ")}
        pieces = tuple(f"owner of {name}[" for name in names)
        self._restore({id(state) for key, state in self.states.items() if key in used or key.startswith(pieces)})

    def setting(self, spec: Spec) -> Setting:
        return self.options.in_force(spec, self.settings)

    def words(self, specs: Sequence[Spec]) -> str:
        lines = [f"{spec.name}{spec.part} {spec.shape} {spec.dtype} setting {self.setting(spec)}" for spec in specs]
        return "\n".join((self.options.words, *lines))

    def check_codes(self, specs: Sequence[Spec]) -> None:
        """See that what memories keep stays bounded with their codes, here and where results are coded on the way back.

        Raises:
            ValueError: some tensor's would not.
        """
        codec, back = self.options.codec, self.topology.leg_back(self.options.codec)
        for spec in specs:
            setting = self.setting(spec)
            if setting is None:
                continue
            for used, memory in ((codec, self.memory), *([] if back is None else [back])):
                if used is not codec:
                    setting = used.default(spec)
                if memory is not None and not memory.suits(used, spec, setting):
                    raise ValueError(
                        f"Exchange: {memory} may keep ever more of {spec.name}, step by step: an error of {used} at setting "
                        f"{setting} can be as long as what it codes (omega = {used.variance(spec, setting):.3g}). Use "
                        "unbiased=False where the codec has it (which scales by 1/(1 + omega)), a finer setting, or no memory; "
                        "with Shift, a rate of 1/(1 + omega)"
                    )

    # ---- states

    def state(self, name: str, part: str = "") -> State:
        """Of one tensor, or of a server's part of one; seeds depend on the name and `Spec.part`, never on the bucket."""
        found = self.states.get(name)
        if found is None:
            found = self.states[name] = seeds(self.options.seed, name + part, self.wired.own)
        return found

    def inner(self, state: State, spec: Spec) -> State:
        """The state of a segment of a tensor, inside the tensor's."""
        found = state.get(spec.name)
        if found is None:
            found = seeds(self.options.seed, spec.name + spec.part, self.wired.own)
        state[spec.name] = found = dict(found)  # replaced, so that the undo keeps the old one
        return found

    def save(self, item: Item) -> None:
        self._undo.append((item.state, dict(item.state)))

    def _restore(self, only: set[int] | None = None) -> None:
        for state, before in reversed(self._undo):
            if only is None or id(state) in only:
                state.clear()
                state.update(before)

    def recode(
        self,
        step: int,
        spec: Spec,
        mean: Tensor,
        codec: Codec,
        setting: Setting,
        memory: Memory,
        places: Sequence[Tensor],
        where: str,
    ) -> bool:
        """Encode a combined result for the way back, with the memory of the server or owner, into the message's places.

        Returns:
            whether there was anything to encode: not if with what is owed the result is not finite.
        """
        state = self.state(f"{where} of {spec.name}", spec.part)
        self._undo.append((state, dict(state)))
        y = memory.before(mean, spec, state)
        if not isinstance(memory, NoMemory) and not bool(y.isfinite().all()):
            return False
        message = codec.encode(y, spec, state, setting, step)
        for place, part in zip(places, message, strict=True):
            place.copy_(part.view(place.shape))
        sent, positions = codec.sent(message, spec, setting)
        memory.after(y, sent, positions, state)
        return True

    # ---- combining over the whole model

    def add_gram(self, part: Tensor, of_all: bool) -> None:
        """`of_all`: every rank has the same part."""
        if of_all:
            self.gram = part if self.gram is None else self.gram + part
        else:
            self.gram_of_pieces = part if self.gram_of_pieces is None else self.gram_of_pieces + part

    def hold(self, bucket: CombiningBucket) -> None:
        """Keep a bucket's messages until the step's last bucket has come."""
        self.held.append(bucket)

    def fail_held(self, failed: Bucket, error: BaseException) -> None:
        """Tell those who wait for held buckets; `failed` tells its own."""
        held, self.held = self.held, []
        for bucket in held:
            if bucket is not failed:
                bucket.done(error)

    @property
    def nobody_left(self) -> bool:
        """By the whole model's inner products, no rank's message is finite; False where they are not known."""
        return self.gram is not None and not bool(self.gram.diagonal().isfinite().any())

    def rule_of_step(self, own: int) -> tuple[Combine, Tensor]:
        """(the rule that is left, which finishes, and its weights), made of the whole model's inner products."""
        if self._rule is None:
            self._rule = self.combine.resolve(Info(self.wired.ranks, self.gram, own))
        return self._rule

    # ---- what goes uncompressed, and counters

    def split(self, items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
        """(tensors of the message, tensors that are all-reduced): the second only if large, and only for the mean."""
        plain = [item for item in items if not item.coded]
        if not isinstance(self.combine, Mean) or sum(item.y.nbytes for item in plain) <= SMALL:
            return list(items), []
        return [item for item in items if item.coded], plain

    def tally(self, name: str) -> Tally:
        found = self.tallies.get(name)
        if found is None:
            found = self.tallies[name] = Tally()
        return found

    def measures(self, step: int) -> bool:
        return self.options.measure > 0 and step % self.options.measure == 0

    def rounded(self, spec: Spec) -> bool:
        """Whether codec or memory take a float64 tensor as float32."""
        used = self.setting(spec) is not None or (self.keeps and self.options.selects(spec))
        return used and self.options.codec.precision(spec).itemsize < spec.dtype.itemsize

    def count(self, name: str, nbytes: float, coded: Spec | None = None, ring: bool = False) -> None:
        """Add a message of `nbytes` bytes to the report; `coded`: what its result on the way back is of, if that is coded too."""
        topology = Ring() if ring else self.topology
        back = nbytes if coded is None else topology.back(coded, nbytes)
        self.tally(name).nbytes += topology.wire(nbytes, self.wired.ranks, back)

    def observe(self, item: Item, step: int) -> None:
        """Show the controller this rank's gradient, before any code."""
        controller = self.controller
        if controller is None or not controller.needs_gradient or not self.options.selects(item.spec):
            return
        if controller.agreed or self.wired.own == 0:
            controller.observe(item.spec, item.x, step)

    def look(self, mean: Tensor, step: int) -> None:
        """Now and then, add up the squared norm of what a velocity memory delivers."""
        if isinstance(self.memory, VelocityMemory) and step % LOOK_EVERY == 1:
            self.delivered += float(mean.square().sum())


def seeds(seed: int, name: str, own: int) -> dict[str, Any]:
    """What a state begins with: a seed of this rank's own, and one that all ranks have."""
    return {"seed": hashed(seed, name, own), "shared_seed": hashed(seed, name)}
