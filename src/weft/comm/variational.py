"""Games and saddle points over several workers: extragradient methods as conversations, on simulated workers or real ones.

Problem    find z* with <F(z*), z - z*> >= 0 for all z, F = (1/M) sum_m F_m, where worker m can evaluate F_m only. For
           min over x, max over y of f: z = (x, y), F = (grad_x f, -grad_y f).
Method     each is a generator that one worker runs: it yields what it wants averaged over the workers (`Ask`), exactly or
           compressed, and is sent the average, the same on all; None says that some worker's vector was not finite.
               descent        z+ = z - gamma F(z)                                                     `descent`
               extragradient  half = z - gamma F(z),  z+ = z - gamma F(half)        2 averages         `extragradient`
               optimistic     half = z - gamma F(half before),  z+ = z - gamma F(half)  1 average      `optimistic`
               MASHA-1, -2    see weft.comm.masha                                                     `masha.masha`
           `Simulated` runs the generators of M workers in one process, as a star of workers around a server would.
Guarantee  extragradient converges for gamma < 1/L, linearly where F is strongly monotone. With `compressed=True` the three
           methods here compress F itself: they stall where the F_m(z*) are not zero, and are there to be compared with.
Source     Korpelevich, 1976; Popov, 1980; Beznosikov, Richtarik, Diskin, Ryabinin, Gasnikov, arXiv:2110.03313.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from weft.comm.agree import hashed
from weft.comm.codec import Codec, Spec, State
from weft.comm.memories.error_feedback import ErrorFeedback
from weft.comm.memories.shift import Shift
from weft.comm.memory import Memory, NoMemory

__all__ = ["Adam", "Ask", "Game", "Named", "Rounds", "Simulated", "descent", "extragradient", "optimistic"]

Named = dict[str, Tensor]
Operator = Callable[[Named], Named]  # F_m at a point
Rate = float | Mapping[str, float]  # a step size, or one by name
Inner = Callable[[Named, Named, bool], Named]  # (from, direction, is it the last move of the step) -> to


@dataclass(eq=False)
class Ask:
    """One worker's vector, to be averaged over all workers.

    Attributes:
        vector: what the worker has.
        compressed: through the codec, which may lose most of it; else as it is, or nearly.
        arrived: set with the answer where it was "nearly": what all took this worker's vector for.
    """

    vector: Named
    compressed: bool
    arrived: Named | None = None


Rounds = Generator[Ask, "Named | None", "Named | None"]  # one step: returns the new point, None if the step is skipped


def finite(named: Mapping[str, Tensor]) -> bool:
    return all(bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all()) for tensor in named.values())


def rate_of(rate: Rate, name: str) -> float:
    """The step size of one tensor."""
    return rate[name] if isinstance(rate, Mapping) else rate


def moved(z: Mapping[str, Tensor], direction: Mapping[str, Tensor], by: Rate) -> Named:
    """z + by * direction."""
    return {
        name: torch.add(tensor, direction[name].to(tensor.dtype), alpha=rate_of(by, name)) for name, tensor in z.items()
    }


@final
class Adam:
    """The move of a method in Adam's way: along a direction scaled by the root of its mean square, with momentum.

    Moments take in the direction of a step's last move; moves before it are only scaled by them. One object per worker.

    Args:
        lr: gamma, or one by name.
        betas, eps: as for torch.optim.Adam.
        state: count, "m" and "v" by name, to go on from.
    """

    def __init__(
        self,
        lr: Rate,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        state: Mapping[str, MutableMapping[str, Any]] | None = None,
    ):
        if not all(0 <= beta < 1 for beta in betas) or not eps > 0:
            raise ValueError(f"Adam: betas must be in [0, 1) and eps > 0, got betas={betas}, eps={eps}")
        self.lr, self.betas, self.eps = lr, betas, eps
        self.state: dict[str, MutableMapping[str, Any]] = dict(state or {})

    def __call__(self, start: Named, direction: Named, last: bool) -> Named:
        """The point reached from `start`; `last` says that this move ends the step."""
        first, second = self.betas
        found = {}
        for name, d in direction.items():
            kept = self.state.setdefault(name, {})
            count, m, v = kept.get("count", 0), kept.get("m"), kept.get("v")
            if m is None or v is None:
                m, v = torch.zeros_like(d), torch.zeros_like(d)
            if last or count == 0:
                count, m, v = count + 1, torch.lerp(m, d, 1 - first), torch.lerp(v, d.square(), 1 - second)
            if last:
                kept.update(count=count, m=m, v=v)
            scale = (v / (1 - second**count)).sqrt().add_(self.eps)
            found[name] = start[name] - rate_of(self.lr, name) * (m / (1 - first**count) if last else d) / scale
        return found


def descent(z: Named, operator: Operator, gamma: float, compressed: bool = False) -> Rounds:
    """One step of descent-ascent. On a bilinear game without curvature it diverges for every gamma."""
    mean = yield Ask(operator(z), compressed)
    return None if mean is None else moved(z, mean, -gamma)


def extragradient(
    z: Named, operator: Operator, gamma: float, compressed: bool = False, inner: Inner | None = None
) -> Rounds:
    """One step: a look ahead, and a step from z with what was found there; `inner` moves otherwise than by -gamma F."""
    mean = yield Ask(operator(z), compressed)
    if mean is None:
        return None
    ahead = moved(z, mean, -gamma) if inner is None else inner(z, mean, False)
    mean = yield Ask(operator(ahead), compressed)
    if mean is None:
        return None
    return moved(z, mean, -gamma) if inner is None else inner(z, mean, True)


def optimistic(z: Named, last: dict[str, Named], operator: Operator, gamma: float, compressed: bool = False) -> Rounds:
    """One step of Popov's method, which looks ahead with the average of the step before; `last` starts empty and keeps it."""
    ahead = last.get("mean")
    mean = yield Ask(operator(z if ahead is None else moved(z, ahead, -gamma)), compressed)
    if mean is None:
        return None
    last["mean"] = mean
    return moved(z, mean, -gamma)


@dataclass(frozen=True)
class Game:
    """A problem whose solution is known, for judging methods.

    Attributes:
        operators: F_m of each worker, at a point {"z": (d,)}.
        start, solution: points (d,), float64.
        modulus: mu of strong monotonicity of F.
        lipschitz: L of F.
        local: L_m of each F_m.
    """

    operators: tuple[Operator, ...]
    start: Tensor
    solution: Tensor
    modulus: float
    lipschitz: float
    local: tuple[float, ...]

    def distance(self, z: Mapping[str, Tensor]) -> float:
        """|z - z*| / |start - z*|."""
        return float((z["z"] - self.solution).norm() / (self.start - self.solution).norm())

    @staticmethod
    def bilinear(
        size: int = 100,
        workers: int = 10,
        curvature: float = 1.0,
        common: float = 0.0,
        spread: float = 6.0,
        seed: int = 0,
    ) -> Game:
        """f_m = x'A_m y + a_m'x + b_m'y + curvature/2 (|x|^2 - |y|^2), x and y of `size` entries, unlike A_m, a_m, b_m.

        A_m = A + N_m, Gaussian matrices of spectral norms about `common` and `spread`: the workers' own games are much stiffer
        than the common one, whose N has norm spread/sqrt(workers), and F_m(z*) is far from 0.
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        shared = draw(size, size) * common / (2 * size**0.5)
        identity = torch.eye(size, dtype=torch.float64)
        matrices, offsets = [], []
        for _ in range(workers):
            a = shared + draw(size, size) * spread / (2 * size**0.5)
            matrices.append(
                torch.cat([torch.cat([curvature * identity, a], 1), torch.cat([-a.T, curvature * identity], 1)])
            )
            offsets.append(draw(2 * size))
        mean = torch.stack(matrices).mean(0)
        solution = torch.linalg.solve(mean, -torch.stack(offsets).mean(0))

        def operator(matrix: Tensor, offset: Tensor) -> Operator:
            return lambda z: {"z": matrix @ z["z"] + offset}

        return Game(
            tuple(operator(m, o) for m, o in zip(matrices, offsets, strict=True)),
            draw(2 * size),
            solution,
            curvature,
            float(torch.linalg.matrix_norm(mean, 2)),
            tuple(float(torch.linalg.matrix_norm(m, 2)) for m in matrices),
        )


@final
@dataclass
class Simulated:
    """M workers and a server in one process: averages what the generators of all workers ask for, and counts the bytes.

    A compressed vector goes through `memory` and `codec` on each worker, the decoded mean through `server` and `down` on the way
    back (None: as it is). Vectors that are not compressed travel as `wire` both ways, or as `refresh` codes the difference to
    the last one: up, and where `down` is given back too, with error feedback at the server. A vector that is not finite on any
    worker gives None to all and leaves all memories as they were.

    Attributes:
        workers: M, >= 1.
        codec, memory: of each worker; the codec may be None if nothing is compressed.
        down, server: codec and memory of the server.
        refresh: a fine codec for vectors that are not to be compressed, see `masha.MASHA`; None sends them as they are.
        wire: dtype of what goes uncompressed.
        seed: of the codecs' randomness.
        sent: bytes that one worker has sent.
        received: bytes that the server has sent to one worker.
    """

    workers: int
    codec: Codec | None = None
    memory: Memory = field(default_factory=NoMemory)
    down: Codec | None = None
    server: Memory = field(default_factory=NoMemory)
    refresh: Codec | None = None
    wire: torch.dtype = torch.float32
    seed: int = 0
    sent: int = 0
    received: int = 0

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"Simulated: workers must be >= 1, got {self.workers}")
        self._states: dict[tuple[int, str], State] = {}
        self._step = 0

    def run(self, conversations: Sequence[Rounds]) -> list[Named | None]:
        """One step of every worker, in lockstep; what each returned."""
        if len(conversations) != self.workers:
            raise ValueError(f"Simulated: {self.workers} workers, but {len(conversations)} conversations")
        asks = [next(conversation) for conversation in conversations]
        while True:
            mean = self._average(asks)
            asks, results = [], []
            for conversation in conversations:
                try:
                    asks.append(
                        conversation.send(None if mean is None else {name: t.clone() for name, t in mean.items()})
                    )
                except StopIteration as end:
                    results.append(end.value)
            if results:
                if asks:
                    raise RuntimeError("Simulated: some workers ended their step before the others")
                return results

    def iterate(self, steps: int, step: Callable[[int, Named], Rounds], z: Named) -> Iterator[Named]:
        """The common point after each of `steps` steps, where step(worker, z) makes one worker's conversation.

        A skipped step yields the point it began with.
        """
        for _ in range(steps):
            found = self.run([step(worker, z) for worker in range(self.workers)])[0]
            z = z if found is None else found
            yield z

    def _average(self, asks: Sequence[Ask]) -> Named | None:
        if len({ask.compressed for ask in asks}) != 1:
            raise RuntimeError("Simulated: some workers ask for a compressed average and others for a plain one")
        if not all(finite(ask.vector) for ask in asks):
            return None
        step, self._step = self._step, self._step + 1
        mean: Named = {}
        for name, first in asks[0].vector.items():
            spec = Spec(name, tuple(first.shape), first.dtype)
            if not asks[0].compressed and self.refresh is not None:
                mean[name] = self._referenced(self.refresh, asks, spec, step)
                continue
            if not asks[0].compressed or self.codec is None:
                nbytes = spec.numel * self.wire.itemsize
                self.sent += nbytes
                self.received += nbytes
                mean[name] = sum(ask.vector[name].to(self.wire).to(first.dtype) for ask in asks) / self.workers
                continue
            total = torch.zeros(spec.numel, dtype=torch.float64)
            for worker, ask in enumerate(asks):
                state = self._state(worker, name)
                total += self._through(self.codec, self.memory, ask.vector[name].reshape(-1), spec, state, step)
            self.sent += self.codec.nbytes(spec, self.codec.default(spec))
            average = (total / self.workers).to(first.dtype)
            if self.down is None:
                self.received += spec.numel * self.wire.itemsize
            else:
                self.received += self.down.nbytes(spec, self.down.default(spec))
                average = self._through(self.down, self.server, average, spec, self._state(-1, name), step)
            average = self.memory.delivered(average, spec, self._state(-2, name))
            mean[name] = average.to(first.dtype).view(first.shape)
        return mean

    def _referenced(self, codec: Codec, asks: Sequence[Ask], spec: Spec, step: int) -> Tensor:
        """The mean of vectors that travel as coded differences to the last ones.

        Worker m's reference r_m is what the server takes its vector for, s what all take the mean for. Error feedback at the
        server sends back a code of mean r - s, whatever of it is old: s follows the mean, and no error of a code stays in it.
        """
        memory, total = Shift(1.0), torch.zeros(spec.numel, dtype=torch.float64)
        for worker, ask in enumerate(asks):
            state = self._state(worker, f"refresh of {spec.name}")
            total += self._through(codec, memory, ask.vector[spec.name].reshape(-1), spec, state, step)
            ask.arrived = {**(ask.arrived or {}), spec.name: state["reference"].view(spec.shape)}
        nbytes, mean = codec.nbytes(spec, codec.default(spec)), (total / self.workers).to(spec.dtype)
        self.sent += nbytes
        if self.down is None:
            self.received += spec.numel * self.wire.itemsize
        else:
            self.received += nbytes
            state = self._state(-1, f"refresh of {spec.name}")
            mean = self._through(codec, ErrorFeedback(), mean, spec, state, step)
        mean = memory.delivered(mean, spec, self._state(-2, f"refresh of {spec.name}"))
        return mean.view(spec.shape)

    def _through(self, codec: Codec, memory: Memory, x: Tensor, spec: Spec, state: State, step: int) -> Tensor:
        """What arrives of x, sent by whom `state` belongs to."""
        y = memory.before(x, spec, state)
        setting = codec.default(spec)
        message = codec.encode(y, spec, state, setting, step)
        values, where = codec.sent(message, spec, setting)
        memory.after(y, values, where, state)
        arrived = values.to(x.dtype)
        return arrived if where is None else torch.zeros_like(x).index_add_(0, where, arrived)

    def _state(self, worker: int, name: str) -> State:
        key = (worker, name)
        if key not in self._states:
            self._states[key] = {"seed": hashed(self.seed, name, worker), "shared_seed": hashed(self.seed, name)}
        return self._states[key]
