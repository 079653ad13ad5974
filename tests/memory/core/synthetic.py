"""Small traces made by hand, for the tests of the policy core: chains, residual blocks, attention, writes in place."""

from __future__ import annotations

import random

from weft.memory.record import Op, Trace, Value


class Draft:
    """Collects operators and values; `trace()` gives every value that nobody ends the lifetime of its last reader.

    Sizes are bytes, costs seconds. `kept` values live until the backward operator that reads them.
    """

    def __init__(self) -> None:
        self.ops: list[dict] = []
        self.values: list[dict] = []
        self.storages = 0

    def leaf(self, nbytes: int, category: str = "parameter") -> int:
        """A value that is there before the step."""
        return self._value(nbytes, category, -1)

    def op(
        self,
        name,
        reads,
        sizes=(),
        seconds=1.0,
        *,
        over=(),
        workspace=0,
        repeatable=True,
        dense=False,
        category="activation",
    ):
        """An operator; the numbers of the values that it makes: one for each of `sizes`, then one for each of `over`."""
        index = len(self.ops)
        made = [self._value(nbytes, category, index) for nbytes in sizes]
        pairs = []
        for old in over:
            new = self._value(self.values[old]["nbytes"], self.values[old]["category"], index)
            self.storages -= 1
            self.values[new]["storage"] = self.values[old]["storage"]
            self.values[old]["dies"] = index
            pairs.append((old, new))
            made.append(new)
        reads = tuple(dict.fromkeys([*reads, *over]))
        self.ops.append(
            {
                "name": name,
                "module": "",
                "phase": "forward",
                "reads": reads,
                "makes": tuple(made),
                "overwrites": tuple(pairs),
                "workspace": workspace,
                "seconds": seconds,
                "repeatable": repeatable,
                "dense": dense,
            }
        )
        return made[0] if len(made) == 1 else tuple(made)

    def _value(self, nbytes: int, category: str, born: int) -> int:
        value = {
            "nbytes": nbytes,
            "storage": self.storages,
            "category": category,
            "name": "",
            "born": born,
            "dies": None,
        }
        self.values.append(value)
        self.storages += 1
        return len(self.values) - 1

    def trace(self, keep=()) -> Trace:
        """The trace; values of `keep`, leaves and gradients outlive the step, the others die after their last reader."""
        end = len(self.ops)
        for number, value in enumerate(self.values):
            if value["dies"] is None:
                readers = [i for i, op in enumerate(self.ops) if number in op["reads"]]
                stays = value["born"] < 0 or number in keep or value["category"] != "activation"
                value["dies"] = end if stays else max([*readers, value["born"]])
        found = Trace(tuple(Op(**op) for op in self.ops), tuple(Value(**value) for value in self.values))
        found.check()
        return found


def chain(length: int, nbytes: int = 1 << 20, seconds: float = 1.0) -> Trace:
    """x1..xn, then backward through all of them."""
    draft = Draft()
    kept = [draft.leaf(nbytes, "input")]
    for _ in range(length):
        kept.append(draft.op("f", [kept[-1]], [nbytes], seconds))
    grad = draft.op("loss", [kept[-1]], [nbytes], seconds)
    for x in reversed(kept[:-1]):
        grad = draft.op("df", [grad, x], [nbytes], seconds)
    return draft.trace()


def transformer(layers: int, width: int = 1 << 18, in_place: bool = True, gradients: bool = True) -> Trace:
    """Residual blocks with normalisation, attention with a big score matrix, workspace, dropout in place, and gradients."""
    draft = Draft()
    weights = [[draft.leaf(width // 2) for _ in range(2)] for _ in range(layers)]
    x = draft.leaf(width, "input")
    saved = []
    for w1, w2 in weights:
        normed, stats = draft.op("norm", [x], [width, 512], 0.2)
        q = draft.op("mm", [normed, w1], [3 * width], 3.0, dense=True)
        scores = draft.op("scores", [q], [4 * width], 1.0, dense=True)
        soft = draft.op("softmax", [scores], [4 * width], 0.6)
        mixed = draft.op("mix", [soft, q], [width], 1.0, dense=True, workspace=width // 3)
        grown = draft.op("mm", [mixed, w2], [2 * width], 2.0, dense=True)
        active = (
            draft.op("relu_", [], [], 0.3, over=[grown]) if in_place else draft.op("relu", [grown], [2 * width], 0.3)
        )
        back = draft.op("mm", [active, w2], [width], 2.0, dense=True)
        y = draft.op("add", [x, back], [width], 0.2)
        saved.append((x, stats, normed, q, soft, active, w1, w2))
        x = y
    grad = draft.op("loss", [x], [width], 0.5)
    kind = "gradient" if gradients else "activation"
    for x, stats, normed, q, soft, active, w1, w2 in reversed(saved):
        draft.op("mm", [grad, active], [width // 2], 2.0, dense=True, category=kind)
        g = draft.op("mm", [grad, w2], [2 * width], 2.0, dense=True)
        g = draft.op("drelu_", [active], [], 0.3, over=[g])
        g = draft.op("mm", [g, w2], [width], 2.0, dense=True, workspace=width // 3)
        gs = draft.op("dsoft", [g, soft, q], [4 * width], 1.5)
        gq = draft.op("dmix", [gs, q], [3 * width], 2.0, dense=True)
        draft.op("mm", [gq, normed], [width // 2], 3.0, dense=True, category=kind)
        gn = draft.op("mm", [gq, w1], [width], 3.0, dense=True)
        gx = draft.op("dnorm", [gn, x, stats], [width], 0.4)
        grad = draft.op("add_", [gx], [], 0.2, over=[grad])
    return draft.trace()


def scramble(seed: int, length: int = 30) -> Trace:
    """A random program: several outputs, reads far back, writes in place, effects, workspace, blocks of all sizes."""
    rng, draft = random.Random(seed), Draft()
    values = [draft.leaf(rng.randrange(1, 4000), "parameter"), draft.leaf(rng.randrange(1, 4000), "input")]
    leaves, keep = list(values), []
    for _ in range(length):
        reads = rng.sample(values, min(len(values), rng.randint(1, 3)))
        kind = rng.random()
        costs = rng.choice([0.0, 0.1, 1.0, 5.0])
        free = [v for v in values if v not in leaves]
        if kind < 0.25 and free:
            old = rng.choice(free)
            reads = [v for v in reads if v != old]
            new = draft.op("write_", reads, [], costs, over=[old])
            values[values.index(old)] = new
        elif kind < 0.3:
            old = leaves[0]  # the optimizer steps
            new = draft.op("step_", [v for v in reads if v != old], [], costs, over=[old], repeatable=False)
            values[values.index(old)] = leaves[0] = new
        else:
            gradient = rng.random() < 0.05
            several = 1 if gradient else rng.choice([1, 1, 1, 2, 3])
            sizes = [rng.choice([0, 4, 300, 5000, rng.randrange(1, 20000)]) for _ in range(several)]
            workspace, dense, repeatable = rng.choice([0, 0, 700, 9000]), rng.random() < 0.4, rng.random() < 0.95
            made = draft.op(
                "f", reads, sizes, costs, workspace=workspace, dense=dense, repeatable=repeatable,
                category="gradient" if gradient else "activation",
            )  # fmt: skip
            values += made if isinstance(made, tuple) else [made]
        if len(values) > 12:
            values.remove(rng.choice([v for v in values if v not in leaves]))
    return draft.trace(keep)
