"""Small traces for the tests of planning: a chain with its backward, and random steps with everything that a `Trace` can hold."""

from __future__ import annotations

import random

from weft.memory.record import Op, Trace, Value
from weft.memory.schedule import Action, Schedule


class Builder:
    """Writes a trace operator by operator; values die after their last reader unless `keep` says otherwise."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.values: list[Value] = []
        self.last: dict[int, int] = {}
        self.until: dict[int, int] = {}
        self.storages = 0

    def before(self, nbytes: int, category: str = "parameter", dies: int | None = None) -> int:
        """A value that is there before the step, and after it unless `dies` is given."""
        v = self._value(nbytes, category, -1)
        self.until[v] = 10**9 if dies is None else dies
        return v

    def op(self, reads=(), makes=(), *, seconds=1.0, over=(), name="op", category="activation", **rest) -> list[int]:
        """An operator that makes values of the given bytes, and new contents of those in `over`; returns what it makes."""
        index = len(self.ops)
        made = [self._value(nbytes, category, index) for nbytes in makes]
        pairs = []
        for old in over:
            new = self._value(self.values[old].nbytes, self.values[old].category, index, self.values[old].storage)
            self.until[old] = index
            if self.values[old].born < 0:
                self.until[new] = 10**9
            pairs.append((old, new))
        reads = tuple(dict.fromkeys((*reads, *over)))
        for v in reads:
            self.last[v] = index
        everything = (*made, *(new for _, new in pairs))
        phase = rest.pop("phase", "forward")
        self.ops.append(Op(name, "", phase, reads, everything, tuple(pairs), seconds=seconds, **rest))
        return list(everything)

    def keep(self, v: int, until: int | None = None) -> int:
        """Let `v` live until operator `until`, or beyond the step."""
        self.until[v] = 10**9 if until is None else until
        return v

    def trace(self) -> Trace:
        end = len(self.ops)
        values = []
        for v, value in enumerate(self.values):
            dies = min(max(self.until.get(v, 0), self.last.get(v, 0), value.born, 0), end)
            values.append(Value(value.nbytes, value.storage, value.category, value.name, value.born, dies))
        trace = Trace(tuple(self.ops), tuple(values))
        trace.check()
        return trace

    def _value(self, nbytes: int, category: str, born: int, storage: int = -1) -> int:
        if storage < 0:
            storage, self.storages = self.storages, self.storages + 1
        self.values.append(Value(nbytes, storage, category, "", born, born))
        return len(self.values) - 1


def chain(layers: int, *, nbytes: int = 100, weight: int = 0, seconds: float = 1.0) -> Trace:
    """x1 = f(x0), ..., loss; the backward of layer i reads x(i-1) and the gradient of x(i), as of a nonlinear layer."""
    build = Builder()
    x = [build.before(nbytes, "input")]
    w = [build.before(weight) for _ in range(layers)]
    for i in range(layers):
        x += build.op((x[-1], w[i]), (nbytes,), seconds=seconds, name=f"f{i}")
    gradient = build.op((x[-1],), (nbytes,), name="loss", phase="backward")[0]
    for i in reversed(range(layers)):
        made = build.op((x[i], w[i], gradient), (nbytes, weight), seconds=2 * seconds, name=f"b{i}", phase="backward")
        gradient = made[0]
        if weight:
            build.keep(made[1])
    return build.trace()


def random_step(seed: int, ops: int = 12, linger: float = 0.0) -> Trace:
    """A random step: several outputs, in-place writes, workspace, operators that cannot be repeated, early and late deaths.

    `linger`: how probably a value is referred to for some time after its last reader.
    """
    draw = random.Random(seed)
    build = Builder()
    pool = [build.before(draw.choice([0, 64, 128]), draw.choice(["parameter", "input"])) for _ in range(2)]
    fixed = set(pool)
    for _ in range(ops):
        reads = draw.sample(pool, min(len(pool), draw.randint(1, 3)))
        over = [v for v in reads if v not in fixed and draw.random() < 0.15][:1]
        makes = [
            64 * draw.randint(1, 6) for _ in range(draw.choice([0, 1, 1, 1, 2]) if over else draw.choice([1, 1, 1, 2]))
        ]
        made = build.op(
            [v for v in reads if v not in over],
            makes,
            over=over,
            seconds=float(draw.randint(1, 9)),
            workspace=draw.choice([0, 0, 0, 64, 192]),
            repeatable=draw.random() > 0.1,
        )
        pool = [v for v in pool if v not in over] + made
        if len(pool) > 6 and draw.random() < 0.5:
            gone = draw.choice(pool)
            pool.remove(gone)
    for v in draw.sample(sorted(set(pool) - fixed), min(1, len(set(pool) - fixed))):
        build.keep(v)
    for v, value in enumerate(build.values):
        if linger and value.born >= 0 and v not in build.until and draw.random() < linger:
            build.keep(v, draw.randint(value.born, ops - 1))
    return build.trace()


def eager(trace: Trace) -> Schedule:
    """Every operator once, nothing else."""
    return Schedule(tuple(Action("run", i) for i in range(len(trace.ops))))


def transformer(layers: int, *, unit: int = 64) -> Trace:
    """Steps of a pre-norm transformer, scores of attention materialised: what is dear (products) and what is cheap to repeat.

    A tensor of the residual stream takes `unit` bytes, scores and the hidden layer four of them.
    """
    build = Builder()
    x = build.before(unit, "input")
    kept = []
    for _ in range(layers):
        norm = build.op((x,), (unit,), seconds=1, name="norm")[0]
        qkv = build.op((norm,), (3 * unit,), seconds=12, name="qkv", dense=True)[0]
        scores = build.op((qkv,), (4 * unit,), seconds=5, name="scores", dense=True)[0]
        weights = build.op((scores,), (4 * unit,), seconds=4, name="softmax")[0]
        mixed = build.op((weights, qkv), (unit,), seconds=5, name="mix", dense=True)[0]
        out = build.op((mixed,), (unit,), seconds=4, name="project", dense=True)[0]
        middle = build.op((x, out), (unit,), seconds=0.5, name="add")[0]
        norm2 = build.op((middle,), (unit,), seconds=1, name="norm")[0]
        hidden = build.op((norm2,), (4 * unit,), seconds=16, name="expand", dense=True)[0]
        active = build.op((hidden,), (4 * unit,), seconds=2, name="gelu")[0]
        down = build.op((active,), (unit,), seconds=16, name="contract", dense=True)[0]
        end = build.op((middle, down), (unit,), seconds=0.5, name="add")[0]
        kept.append((x, norm, qkv, weights, mixed, middle, norm2, hidden, active))
        x = end
    g = build.op((x,), (unit,), seconds=1, name="loss", phase="backward")[0]
    for x, norm, qkv, weights, mixed, middle, norm2, hidden, active in reversed(kept):
        d = build.op((g, active), (4 * unit,), seconds=32, name="contract'", phase="backward")[0]
        d = build.op((d, hidden), (4 * unit,), seconds=3, name="gelu'", phase="backward")[0]
        d = build.op((d, norm2), (unit,), seconds=32, name="expand'", phase="backward")[0]
        d = build.op((d, middle), (unit,), seconds=2, name="norm'", phase="backward")[0]
        g = build.op((g, d), (unit,), seconds=0.5, name="add", phase="backward")[0]
        d = build.op((g, mixed), (unit,), seconds=8, name="project'", phase="backward")[0]
        s, v = build.op((d, weights, qkv), (4 * unit, unit), seconds=10, name="mix'", phase="backward")
        s = build.op((s, weights), (4 * unit,), seconds=5, name="softmax'", phase="backward")[0]
        d = build.op((s, v, qkv), (3 * unit,), seconds=10, name="scores'", phase="backward")[0]
        d = build.op((d, norm), (unit,), seconds=24, name="qkv'", phase="backward")[0]
        d = build.op((d, x), (unit,), seconds=2, name="norm'", phase="backward")[0]
        g = build.op((g, d), (unit,), seconds=0.5, name="add", phase="backward")[0]
    return build.trace()


def training(seed: int, layers: int = 25, unit: int = 2**16) -> Trace:
    """A random network in training: chains, skips, sums of layers of unlike sizes; backward reads inputs, outputs or neither."""
    draw, build = random.Random(seed), Builder()
    x = build.before(unit, "input")
    made, layered, gradient = [(x, unit)], [], {}
    for _ in range(layers):
        near = {made[max(0, len(made) - 1 - int(draw.expovariate(0.35)))] for _ in range(draw.choice([1, 1, 1, 2, 3]))}
        sources, nbytes, kind = sorted(near), int(unit * draw.choice([0.25, 0.5, 1, 1, 2, 4])), draw.random()
        seconds = draw.choice([0.2, 0.5, 1.0]) if kind < 0.5 else draw.choice([4.0, 8.0, 16.0])
        workspace = nbytes // 2 if kind > 0.8 else 0
        y = build.op([v for v, _ in sources], (nbytes,), seconds=seconds, workspace=workspace)[0]
        layered.append((sources, y, seconds, kind))
        made.append((y, nbytes))
    y, nbytes = made[-1]
    gradient[y] = build.op((y,), (nbytes,), seconds=0.5, phase="backward")[0]
    for sources, y, seconds, kind in reversed(layered):
        if y in gradient:
            reads = [gradient.pop(y), *([y] if kind < 0.3 else ()), *([v for v, _ in sources] if kind > 0.2 else ())]
            wanted = [(v, nbytes) for v, nbytes in sources if v != x]
            found = build.op(reads, [nbytes for _, nbytes in wanted], seconds=2 * seconds, phase="backward")
            for (v, nbytes), g in zip(wanted, found, strict=True):
                if v in gradient:
                    g = build.op((gradient[v], g), (nbytes,), seconds=0.2, phase="backward")[0]
                gradient[v] = g
    return build.trace()


def concatenating(layers: int = 12, *, unit: int = 2**16) -> Trace:
    """Steps of a densely connected network: a layer reads all before it side by side, so that no two tensors are alike in size.

    A layer makes `unit` bytes; a copy of what is there, a normalisation and a convolution follow each other. Seconds are few
    for the bytes: to copy all in the arena takes a large part of the step.
    """
    build, second = Builder(), 2e-6
    x, wide, kept = build.op((build.before(unit, "input"),), (unit,), seconds=10 * second, name="stem")[0], unit, []
    for _ in range(layers):
        seconds = second * wide / unit
        norm = build.op((x,), (wide,), seconds=seconds, name="norm")[0]
        active = build.op((norm,), (wide,), seconds=0.2 * seconds, name="relu")[0]
        y = build.op((active,), (unit,), seconds=2.5 * seconds, name="conv", dense=True)[0]
        kept.append((x, active, wide))
        wide += unit
        x = build.op((x, y), (wide,), seconds=0.3 * seconds, name="cat")[0]
    g = build.op((x,), (wide,), seconds=seconds, name="loss", phase="backward")[0]
    for x, active, wide in reversed(kept):
        seconds = second * wide / unit
        d = build.op((g,), (unit,), seconds=0.3 * second, name="cat'", phase="backward")[0]
        d = build.op((d, active), (wide,), seconds=5 * seconds, name="conv'", phase="backward")[0]
        d = build.op((d, active), (wide,), seconds=0.2 * seconds, name="relu'", phase="backward")[0]
        d = build.op((d, x), (wide,), seconds=2 * seconds, name="norm'", phase="backward")[0]
        g = build.op((g, d), (wide,), seconds=0.3 * seconds, name="add", phase="backward")[0]
    return build.trace()
