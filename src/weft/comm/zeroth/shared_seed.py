"""Tune one model on many machines that send each other one byte per pair of forward passes.

Problem    n machines hold the same parameters theta and data of their own; they may send next to nothing.
Method     at step t member m draws directions z(t, m, k), k = 0..K-1, from their number alone (directions.py), and measures
               g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)          same minibatch twice     `SharedSeed._project`
           everybody gets every g (scalars.py, transport.py), in order of joining, then k, and makes every z again:
               theta <- theta - lr / D sum of g z,    D = S (mean) or sqrt(S), S scalars received    `SharedSeed.apply`
           No backward pass, no optimizer state; a scalar that is not finite counts as 0.
Drift      theta + eps z - 2 eps z + eps z is not theta to the last bit, and each machine perturbs along other directions.
               exact    a second copy keeps theta; perturbed values are always written from it: two passes, no drift
               replay   in place, three passes; every `every` steps theta is taken from a backup (which may lie on another
                        device) and the steps' records are applied to it again
               free     in place, nothing is repaired: MeZO on one machine, only approximately equal replicas on several
Guarantee  with exact, and with replay after each repair, theta is the start with the log replayed on it, bit for bit; n
           machines on n shards are one process that evaluates the same n K triples, bit for bit (exact).
Source     Zelikman et al., "Just One Byte (per gradient)", arXiv:2306.10015; Malladi et al. (MeZO), arXiv:2305.17333.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from weft.comm.zeroth.directions import DIRECTIONS, Term, mix, seed_of
from weft.comm.zeroth.log import LONGEST, Log, OtherRun, Passport, Record
from weft.comm.zeroth.scalars import WIRES
from weft.comm.zeroth.tcp import Open
from weft.comm.zeroth.transport import Alone, Fixed, Outcome, Outgoing, OutOfStep, Transport
from weft.names import pick

__all__ = ["Drift", "Params", "SharedSeed", "StepInfo"]

Drift = Literal["exact", "replay", "free"]
Params = Literal["all", "lora"] | Callable[[str, nn.Parameter], bool]
Start = Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class StepInfo:
    """What a step did.

    Attributes:
        step: its number.
        loss: mean of L(theta + eps z) and L(theta - eps z) over this process's own evaluations, NaN ones left out.
        scalars: all numbers that were applied, as decoded, in the order in which they were.
        members: numbers of the members they came from, in order of joining.
        bytes: what this process sent, codes and header; 0 without a network.
        not_finite: own projections that were NaN or infinite and went out as 0.
        dropped: scalars that came but were not counted.
        alone, late, resynchronised: see `Outcome`. Late: the step's own scalars were not used, and `step` may have moved on.
        drift: largest |theta in place - theta replayed|, on the steps at which `drift="replay"` repaired it.
    """

    step: int
    loss: float
    scalars: tuple[float, ...]
    members: tuple[int, ...]
    bytes: int = 0
    not_finite: int = 0
    dropped: int = 0
    alone: bool = False
    late: bool = False
    resynchronised: bool = False
    drift: float | None = None


@final
class SharedSeed:
    """Zeroth-order tuning by shared randomness; see the module's header.

    Args:
        model: in eval mode, its parameters the same on every machine.
        loss_fn: (model, batch) -> scalar loss; called twice per direction on one batch, and must be a function of the
            parameters and the batch alone.
        eps: size of the perturbation, > 0. Of weights or losses in bfloat16, which have 3 digits, 1e-3 changes little or
            nothing, and many scalars are 0: take a larger one, or compute the loss in float32.
        samples: directions per member and step, K; at most 65535 bytes of codes.
        lr: learning rate >= 0, or a function of the step (the first member's is used by all).
        wire: "byte", "byte-stochastic" (rounded without bias) or "float32".
        direction: "rademacher" (the same on every device) or "normal" (the paper's; like machines only).
        params: which to tune: "all" that require a gradient, "lora" (those with `lora` in their name), or a predicate of
            (name, parameter).
        divisor: "mean", or "sqrt" as the paper's code has it; the right learning rate depends on it.
        drift, every: see the module's header; `every` counts steps between two repairs.
        backup_device: where the backup of "replay" lies; by default beside the parameters.
        weight_decay: lambda of theta <- theta - lr lambda theta before each step, on tensors of two or more dimensions.
        clip: quantile in (0, 1] of a step's |g| above which they are cut to it; 1 cuts nothing. Against members that
            send absurd numbers.
        digest_every: steps between two comparisons of all members' parameters, 0 for never (always never with "free").
        run: seed of the run, >= 0.
        start: parameters by name before step 0, or a function that loads them: with it a machine whose parameters turn
            out to be wrong repairs itself by the log. Not kept in memory if it is a function.
        log: a file. Records are appended to it as they are made; if it has some, the run goes on from there. It is locked
            until `close`: `with SharedSeed(..., log=path) as tuned`.
    Raises:
        ValueError: an option out of its range, a module in train mode, a parameter that is not contiguous or not floating
            point, no parameter to tune.
        OtherRun, CheckpointDamaged, FolderInUse: see `Log.open`.

    >>> model = nn.Linear(2, 1).eval()
    >>> tuned = SharedSeed(model, lambda m, x: m(x).square().mean(), lr=0.1, samples=4)
    >>> info = tuned.step([torch.ones(3, 2)] * 4)
    >>> len(info.scalars), len(tuned.log)
    (4, 1)
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[nn.Module, Any], Tensor | float],
        *,
        lr: float | Callable[[int], float],
        eps: float = 1e-3,
        samples: int = 8,
        wire: str = "byte",
        direction: str = "rademacher",
        params: Params = "all",
        divisor: Literal["mean", "sqrt"] = "mean",
        drift: Drift = "exact",
        every: int = 16,
        backup_device: torch.device | str | None = None,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        digest_every: int = 64,
        run: int = 0,
        start: Start | None = None,
        log: str | Path | None = None,
    ):
        for name, number, least in (("samples", samples, 1), ("every", every, 1), ("digest_every", digest_every, 0)):
            if number < least:
                raise ValueError(f"SharedSeed: {name} must be at least {least}, got {number}")
        if not (eps > 0 and math.isfinite(eps)):
            raise ValueError(f"SharedSeed: eps must be > 0, got {eps}; MeZO uses 1e-3")
        if not callable(lr) and not (lr >= 0 and math.isfinite(lr)):
            raise ValueError(f"SharedSeed: lr must be >= 0 and finite, got {lr}")
        if divisor not in ("mean", "sqrt"):
            raise ValueError(f"SharedSeed: divisor must be 'mean' or 'sqrt', got {divisor!r}")
        if drift not in ("exact", "replay", "free"):
            raise ValueError(f"SharedSeed: drift must be 'exact', 'replay' or 'free', got {drift!r}")
        if not 0 < clip <= 1:
            raise ValueError(f"SharedSeed: clip must be a quantile in (0, 1], got {clip}; 1 cuts nothing")
        if not (weight_decay >= 0 and run >= 0):
            raise ValueError(f"SharedSeed: weight_decay and run must be >= 0, got {weight_decay} and {run}")
        self.model, self.loss_fn, self.lr, self.eps, self.samples = model, loss_fn, lr, eps, samples
        self.wire = pick(wire, WIRES, "wire")
        if samples * self.wire.nbytes > LONGEST:
            raise ValueError(
                f"SharedSeed: samples must be at most {LONGEST // self.wire.nbytes} with wire={wire!r}, got {samples}; a record "
                "holds no more of one member"
            )
        self.direction = pick(direction, DIRECTIONS, "direction")
        self.divisor, self.drift, self.every, self.digest_every = divisor, drift, every, digest_every
        self.weight_decay, self.clip, self.start = weight_decay, clip, start
        self._check_mode()
        self.named = _chosen(model, params)
        self.tensors = [parameter.data for parameter in self.named.values()]
        self.home = self.tensors  # theta between steps: the copy, or the parameters themselves
        if drift == "exact":
            self.home = [tensor.clone() for tensor in self.tensors]
        shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in self.named.items()]
        self.passport = Passport(
            run, _plain_name(wire, WIRES), _plain_name(direction, DIRECTIONS), divisor, float(weight_decay), float(clip),
            hashlib.blake2b(repr(shapes).encode(), digest_size=8).hexdigest(), f"{self.digest():016x}",
        )  # fmt: skip
        self.transport: Transport = Alone()
        self.backup: list[Tensor] | None = None
        self.backed_up = 0  # the step that the backup stands at
        if drift == "replay":
            self.backup = [torch.empty_like(tensor, device=backup_device or tensor.device) for tensor in self.tensors]
        self.log = Log(self.passport) if log is None else Log.open(log, self.passport)
        try:
            self._move(self.log.records)
            self._back_up()
            self._settled()
        except BaseException:
            self.log.close()
            raise

    # ---- what a user calls

    def join(self, peers: Transport | str | Any, name: str = "", timeout: float = 120.0) -> SharedSeed:
        """Exchange scalars with `peers` from now on, after catching up with them by their log; returns self.

        Args:
            peers: `host:port` of a `Rendezvous`, a torch.distributed process group (None: the default one), or a `Transport`.
            name: of this machine, unlike any other's; needed for a rendezvous.
            timeout: seconds to wait for an answer of the rendezvous.
        Raises:
            OtherRun, MemberRefused, PeerLost: see the transports.
        """
        if isinstance(peers, str):
            peers = Open(peers, name, timeout)
        elif not isinstance(peers, Transport):
            peers = Fixed(peers)
        try:
            peers.enter(self)
        finally:  # some records may have been applied before it failed
            self._settled()
        self.transport = peers
        return self

    def leave(self) -> None:
        """Part from the peers at this step boundary; steps go on alone."""
        own = self.transport.own[:1]
        self.transport.leave()
        self.transport = Alone()
        self.transport.own = own or (0,)

    def close(self) -> None:
        """Part from the peers and let go of the log's file; parameters and log stay as they are."""
        self.leave()
        self.log.close()

    def __enter__(self) -> SharedSeed:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @torch.no_grad()
    def step(self, batches: Sequence[Any]) -> StepInfo:
        """One step on `samples` minibatches, one per direction (for every member that this process stands for).

        Raises:
            ValueError: a module is in train mode, the wrong number of batches, parameters changed from outside, a rate that is
                negative or not finite, a loss that is not one number.
            OutOfStep, MemberRefused, PeerLost: see the transports.
        """
        self._check_mode()
        own = self.transport.own
        if len(batches) != len(own) * self.samples:
            raise ValueError(
                f"SharedSeed.step: give {self.samples} batches (samples) for each of {len(own)} members, got {len(batches)}"
            )
        if self._versions() != self.versions:
            raise ValueError(
                "SharedSeed.step: parameters were changed from outside since the last step, so the log no longer tells what "
                "they are; make a new SharedSeed on them"
            )
        number = len(self.log)
        lr = self._rate(number)
        digest = (self.digest() & 0xFFFFFFFF or 1) if self._digest_due(number) else 0
        try:
            codes, losses, bad = self._measure(number, batches)
            outcome = self.transport.exchange(Outgoing(number, lr, digest, codes), self)
            drift = self._settled()
        except BaseException:
            if self.drift == "exact":  # the model holds the values of the last evaluation
                self._show()
            raise
        return self._info(outcome, losses, bad, drift)

    @torch.no_grad()
    def replay(self, log: Log) -> int:
        """Apply the records of `log` that this machine lacks; returns how many there were.

        Raises:
            OtherRun: the log is of another model, start or options, or the own records are not its first ones.
        """
        self.passport.check(log.passport)
        have = len(self.log)
        if have > len(log) or self.log.chain(have) != log.chain(have):
            raise OtherRun("the history", f"{have} steps", f"{len(log)} steps that do not continue them")
        records = log[have:]
        self.apply(records)
        self._settled()
        return len(records)

    def digest(self) -> int:
        """64 bits that stand for theta, never 0: equal where all tuned parameters are equal to the bit."""
        found = hashlib.blake2b(digest_size=8)
        for tensor in self.home:
            flat = tensor.detach().cpu().contiguous().view(-1)
            found.update(flat.view(torch.uint8).numpy())
        return int.from_bytes(found.digest(), "little") or 1

    # ---- what a transport calls (`Replica`)

    @torch.no_grad()
    def apply(self, records: Sequence[Record]) -> None:
        """Append records to the log and apply them to theta."""
        for record in records:
            self.log.append(record)
        self._move(records)

    @torch.no_grad()
    def reload(self) -> None:
        """Theta from the start and the own log. Raises `OutOfStep` if there is no start, `OtherRun` if it is another's."""
        if self.start is None:
            raise OutOfStep(len(self.log), "its digest is not that of most members, and no start was given")
        values = self.start() if callable(self.start) else self.start
        for name, tensor in zip(self.named, self.home, strict=True):
            tensor.copy_(values[name])
        if f"{self.digest():016x}" != self.passport.start:
            raise OtherRun("the digest of the first values", self.passport.start, f"{self.digest():016x}")
        self._move(self.log.records)
        self._back_up()

    def state(self) -> list[Tensor]:
        """Theta's tensors, to be read or overwritten in place."""
        if self.backup is not None:  # in place they are only nearly theta once something was evaluated
            self._repair()
        return self.home

    def adopt(self, records: Sequence[Record]) -> None:
        """Take over a log whose parameters have been written into `state`."""
        self.log.replace(records)
        self._back_up()

    # ---- the arithmetic

    def _measure(self, step: int, batches: Sequence[Any]) -> tuple[tuple[bytes, ...], list[float], int]:
        """The codes of each member that this process stands for, the losses that are numbers, how many scalars are not finite."""
        codes, losses, bad = [], [], 0
        for place, member in enumerate(self.transport.own):
            code = b""
            for k in range(self.samples):
                seed = seed_of(self.passport.run, step, member, k)
                plus, minus = self._project(seed, batches[place * self.samples + k])
                g = (plus - minus) / (2 * self.eps)
                losses += [loss for loss in (plus, minus) if not math.isnan(loss)]
                bad += not math.isfinite(g)
                code += self.wire.encode(g, mix(seed + 1) / 2**64)
            codes.append(code)
        return tuple(codes), losses, bad

    def _rate(self, step: int) -> float:
        lr = float(self.lr(step) if callable(self.lr) else self.lr)
        if not (lr >= 0 and math.isfinite(lr)):
            raise ValueError(f"SharedSeed.step: lr must be >= 0 and finite, got {lr} for step {step}")
        return lr

    def _loss(self, batch: Any) -> float:
        found = self.loss_fn(self.model, batch)
        if not hasattr(found, "__float__") or (isinstance(found, Tensor) and found.numel() != 1):
            said = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"{found!r}"
            raise ValueError(f"SharedSeed.step: the loss must be one number, got {said}; return its mean")
        return float(found)

    def _project(self, seed: int, batch: Any) -> tuple[float, float]:
        """The losses at theta + eps z and theta - eps z. Perturbed in place theta is as before, to rounding, whatever happens;
        with "exact" the model is left at the last point, for `step` to set right."""
        exact, eps = self.drift == "exact", self.eps
        away = 0.0
        try:
            self.direction.move(self.tensors, self.home, [(seed, eps)])
            away = eps
            plus = self._loss(batch)
            self.direction.move(self.tensors, self.home, [(seed, -eps if exact else -2 * eps)])
            away = -eps
            minus = self._loss(batch)
        except BaseException:
            if away and not exact:
                self.direction.move(self.tensors, self.tensors, [(seed, -away)])
            raise
        if not exact:
            self.direction.move(self.tensors, self.tensors, [(seed, eps)])
        return plus, minus

    def _terms(self, record: Record) -> list[Term]:
        """The directions of a step with the factors they are added with. Scalars of 0 move nothing."""
        codes = [(member, self.wire.decode_all(codes)) for member, codes in record.entries]
        sizes = sorted(abs(g) for _, numbers in codes for g in numbers)
        if not sizes:
            return []
        limit = sizes[math.ceil(self.clip * len(sizes)) - 1]
        scale = record.lr / (len(sizes) if self.divisor == "mean" else math.sqrt(len(sizes)))
        return [
            (seed_of(self.passport.run, record.step, member, k), -scale * max(min(g, limit), -limit))
            for member, numbers in codes
            for k, g in enumerate(numbers)
            if g
        ]

    def _move(self, records: Sequence[Record]) -> None:
        """Apply records to theta: all at once, piece by piece of the model, or one by one if weights decay between them."""
        if not self.weight_decay:
            self.direction.move(self.home, self.home, [term for record in records for term in self._terms(record)])
            return
        for record in records:
            for tensor in self.home:
                if tensor.dim() > 1:
                    tensor.mul_(1 - record.lr * self.weight_decay)
            self.direction.move(self.home, self.home, self._terms(record))

    @torch.no_grad()
    def _settled(self) -> float | None:
        """Make the model's parameters theta after records were applied; the drift if it was repaired."""
        drift = None
        if self.drift == "exact":
            self._show()
        elif self.backup is not None and len(self.log) // self.every > self.backed_up // self.every:
            drift = self._repair()
        self.versions = self._versions()
        return drift

    def _show(self) -> None:
        for tensor, home in zip(self.tensors, self.home, strict=True):
            tensor.copy_(home)

    def _back_up(self) -> None:
        if self.backup is not None:
            for kept, tensor in zip(self.backup, self.tensors, strict=True):
                kept.copy_(tensor)
        self.backed_up = len(self.log)

    def _repair(self) -> float:
        """Theta from the backup and the records since; the largest difference that this made."""
        assert self.backup is not None
        for kept, tensor in zip(self.backup, self.tensors, strict=True):
            drifted = tensor.to(kept.device, copy=True)
            tensor.copy_(kept)
            kept.copy_(drifted)  # for the comparison; then the backup becomes theta
        self._move(self.log[self.backed_up :])
        pairs = zip(self.backup, self.tensors, strict=True)
        gap = max(float((kept - tensor.to(kept.device)).abs().max()) for kept, tensor in pairs)
        self._back_up()
        return gap

    # ---- checks

    def _digest_due(self, step: int) -> bool:
        if not self.digest_every or self.drift == "free":
            return False
        if self.drift == "replay":  # in between, the parameters are only nearly theta
            return step == self.backed_up and step % (self.every * max(self.digest_every // self.every, 1)) == 0
        return step % self.digest_every == 0

    def _check_mode(self) -> None:
        loud = next((name or "the model" for name, m in self.model.named_modules() if m.training), None)
        if loud is not None:
            raise ValueError(
                f"SharedSeed: {loud} is in train mode, so dropout or batch statistics could differ between the two passes of a "
                "direction; call model.eval()"
            )

    def _versions(self) -> list[tuple[int, int]]:
        """Changes where somebody else writes to a parameter, or gives it other memory. Writes to `.data`, such as ours, are not
        counted: `p.data.zero_()` goes unseen."""
        return [(parameter._version, parameter.data_ptr()) for parameter in self.named.values()]

    def _info(self, outcome: Outcome, losses: list[float], bad: int, drift: float | None) -> StepInfo:
        record = self.log[-1] if self.log else Record(0, 0.0, ())
        scalars = tuple(g for _, codes in record.entries for g in self.wire.decode_all(codes))
        return StepInfo(
            record.step, sum(losses) / len(losses) if losses else math.nan, scalars,
            tuple(member for member, _ in record.entries), outcome.sent, bad, outcome.dropped,
            outcome.alone, outcome.late, outcome.resynchronised, drift,
        )  # fmt: skip


def _chosen(model: nn.Module, params: Params) -> dict[str, nn.Parameter]:
    """The parameters to tune, by name, in the model's order."""
    if params == "all":
        found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    elif params == "lora":
        found = {name: p for name, p in model.named_parameters() if "lora" in name.lower()}
    elif callable(params):
        found = {name: p for name, p in model.named_parameters() if params(name, p)}
    else:
        raise ValueError(
            f"SharedSeed: params must be 'all', 'lora' or a predicate of (name, parameter), got {params!r}"
        )
    if not found:
        raise ValueError(f"SharedSeed: no parameter of the model is chosen by params={params!r}")
    for name, parameter in found.items():
        if not parameter.is_floating_point():
            raise ValueError(
                f"SharedSeed: {name} must be floating point, got {parameter.dtype}; leave it out by params"
            )
        if not parameter.is_contiguous():
            raise ValueError(
                f"SharedSeed: {name} must be contiguous; call parameter.data = parameter.data.contiguous()"
            )
    return found


def _plain_name(name: str, table: Mapping[str, Any]) -> str:
    """The table's own spelling of a name that `pick` accepted."""
    entry = pick(name, table, "name")
    return next(key for key, value in table.items() if value is entry)
