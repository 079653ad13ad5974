"""A setting for every tensor, such that the message is as small as possible and the error no larger than a uniform setting's.

Problem    tensors l = 1..L, settings j = 1..K (densities, bit widths, ranks), err[l][j] = |G_l - decode(encode(G_l, j))|^2 of the
           gradient G_l summed since the last decision, cost[l][j] in bytes or in seconds. Choose j(l):            `plan_layers`
               min sum_l cost[l][j(l)]   subject to   sum_l err[l][j(l)] <= alpha sum_l err[l][default]
           or, under a limit on bytes or seconds a step, the same with the two tables exchanged.
Method     dynamic programme over a grid of D cells of the budget,                                                 `_on_grid`
               e[l][j] = ceil(err[l][j] D / E),   best_l[e] = min_j best_{l-1}[e - e[l][j]] + cost[l][j]
           then the front of all (error, cost) that could still beat it, by the bound of the relaxed problem       `_improve`
Guarantee  the errors are rounded up, so the true error never exceeds the budget; rounding loses at most L cells of D, and nothing
           where the front stays short, as it does for some hundred layers: then the choice is the optimum, and a larger budget
           never costs more. A uniform choice within the budget is a candidate too: never larger than uniform.
           What is equal is the L2 error of one summed gradient, not the accuracy after training: look at both.
Source     Alimohammadi, Markov, Frantar, Alistarh, L-GreCo, arXiv:2210.17357. Front, limit and rounding up are ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, final

import numpy as np
from torch import Tensor

from weft.comm.codec import Codec, Setting, Spec
from weft.comm.controller import Controller, Total, alone
from weft.errors import WeftError

__all__ = ["BudgetTooSmall", "Choose", "LayerwiseBudget", "plan_layers"]

Table = Sequence[Sequence[float]]  # [layer][setting]
Choose = Callable[[Table, Table, float], list[int]]  # (error, cost, budget of the error) -> a setting's index per layer

FRONT = 20_000  # points up to which the exact front is followed; reached by hundreds of layers at most


class BudgetTooSmall(WeftError, ValueError):
    """No choice of settings keeps the budget; `need` is the least total that there is, `have` the budget."""

    def __init__(self, need: float, have: float):
        super().__init__(need, have)
        self.need, self.have = need, have

    def __str__(self) -> str:
        return f"no choice of settings stays within {self.have:.6g}, the least total is {self.need:.6g}; add finer settings"


def plan_layers(err: Table, size: Table, budget: float, grid: int = 10_000) -> list[int]:
    """The setting of each layer that makes the total size least, with a total error of at most `budget`.

    Args:
        err: err[l][j] >= 0 of setting j of layer l; the number of settings may differ from layer to layer. Infinite: forbidden.
        size: the same shape, >= 0, in any unit that adds up.
        budget: bound of the total error, >= 0.
        grid: cells D into which the budget is divided, >= 1; time is O(layers settings D).
    Returns:
        the chosen j for each layer. Ties go to the smaller error, then to the setting named first.
    Raises:
        ValueError: a table is empty, ragged against the other, negative or not a number; the message names layer and setting.
        BudgetTooSmall: even the least errors add up to more.

    >>> plan_layers([[4.0, 1.0, 0.0], [40.0, 10.0, 0.0]], [[1, 2, 8], [1, 2, 8]], budget=14.0)
    [0, 1]
    """
    errors, sizes = _checked(err, size, budget)
    if grid < 1:
        raise ValueError(f"plan_layers: grid must be >= 1, got {grid}; 10000 is usual")
    if not errors:
        return []
    least = [int(np.lexsort((s, e))[0]) for e, s in zip(errors, sizes, strict=True)]
    if _total(errors, least) > budget:
        raise BudgetTooSmall(_total(errors, least), budget)
    candidates = [least]
    if len({len(e) for e in errors}) == 1:
        candidates += [[j] * len(errors) for j in range(len(errors[0]))]
    candidates += _on_grid(errors, sizes, budget, grid)
    best = _best(errors, sizes, budget, candidates)
    better = _improve(errors, sizes, budget, _total(sizes, best))
    return best if better is None else better


def _best(errors: list[np.ndarray], sizes: list[np.ndarray], budget: float, candidates: list[list[int]]) -> list[int]:
    within = [c for c in candidates if _total(errors, c) <= budget]
    return min(within, key=lambda c: (_total(sizes, c), _total(errors, c), c))


def _total(table: Sequence[np.ndarray], choice: Sequence[int]) -> float:
    return math.fsum(float(row[j]) for row, j in zip(table, choice, strict=True))


def _checked(err: Table, size: Table, budget: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    if not budget >= 0:
        raise ValueError(f"plan_layers: budget must be a number >= 0, got {budget}")
    if len(err) != len(size):
        raise ValueError(f"plan_layers: err has {len(err)} layers and size {len(size)}; give both for every layer")
    tables: dict[str, list[np.ndarray]] = {"err": [], "size": []}
    for layer, rows in enumerate(zip(err, size, strict=True)):
        if len(rows[0]) != len(rows[1]) or len(rows[0]) < 1:
            raise ValueError(
                f"plan_layers: layer {layer} needs at least one setting, with an error and a size each; "
                f"got {len(rows[0])} errors and {len(rows[1])} sizes"
            )
        for name, row in zip(tables, rows, strict=True):
            found = np.asarray(row, dtype=np.float64)
            if not (found >= 0).all():
                j = int(np.argmin(found >= 0))
                raise ValueError(f"plan_layers: {name} must be >= 0, got {found[j]} for layer {layer}, setting {j}")
            tables[name].append(found)
    return tables["err"], tables["size"]


def _hull(error: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The corners of the lower convex hull of a layer's settings, from the least error to the least size."""
    corners: list[tuple[float, float]] = []
    for i in np.lexsort((size, error)):
        x, y = float(error[i]), float(size[i])
        if not np.isfinite(x + y) or (corners and y >= corners[-1][1]):
            continue
        while len(corners) > 1 and (corners[-1][1] - corners[-2][1]) * (x - corners[-2][0]) >= (y - corners[-2][1]) * (
            corners[-1][0] - corners[-2][0]
        ):
            corners.pop()
        if corners and corners[-1][0] == x:
            corners.pop()
        corners.append((x, y))
    return np.array([x for x, _ in corners]), np.array([y for _, y in corners])


def _bounds(errors: list[np.ndarray], sizes: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For l = 0..L the least size that layers l..L-1 need at least, as a polygon over the error that is left for them.

    It is the relaxation in which a layer may mix two settings: all hull edges of these layers, the steepest first.
    """
    found = [(np.zeros(1), np.zeros(1))]
    steps = np.zeros((2, 0))
    start = np.zeros(2)
    for e, s in zip(reversed(errors), reversed(sizes), strict=True):
        hull = np.stack(_hull(e, s))
        start = start + hull[:, 0]
        steps = np.concatenate([steps, np.diff(hull, axis=1)], axis=1)
        with np.errstate(over="ignore"):
            steps = steps[:, np.argsort(steps[1] / steps[0], kind="stable")]
        corners = np.cumsum(np.concatenate([start[:, None], steps], axis=1), axis=1)
        found.append((corners[0], corners[1]))
    found.reverse()
    return found


def _improve(errors: list[np.ndarray], sizes: list[np.ndarray], budget: float, known: float) -> list[int] | None:
    """The optimum, if it is smaller than the size `known`; None if it is not, or if the front grows beyond FRONT points.

    The front of (error, size) is followed layer by layer. A point is dropped where another has neither more error nor more size,
    and where even the relaxed rest would not bring it below `known`.
    """
    slack = 1e-12  # of sums of floats: a point is dropped only where it is surely useless
    error, size, back = np.zeros(1), np.zeros(1), []
    for layer, (rest_error, rest_size) in enumerate(_bounds(errors, sizes)[1:]):
        e, s = errors[layer], sizes[layer]
        wide_error, wide_size = (error[:, None] + e).ravel(), (size[:, None] + s).ravel()
        left = budget * (1 + slack) - wide_error
        with np.errstate(invalid="ignore"):
            bound = wide_size + np.interp(left, rest_error, rest_size)
        useful = np.flatnonzero((left >= rest_error[0] * (1 - slack)) & (bound < known * (1 - slack)))
        order = useful[np.lexsort((wide_size[useful], wide_error[useful]))]
        if not len(order):
            return None
        lowest = np.minimum.accumulate(wide_size[order])
        order = order[np.concatenate(([True], wide_size[order][1:] < lowest[:-1]))]
        if len(order) > FRONT:
            return None
        error, size = wide_error[order], wide_size[order]
        back.append(np.divmod(order, len(e)))
    for end in range(len(error) - 1, -1, -1):  # sizes fall along the front; `_total` judges without rounding
        choice, at = [], end
        for before, picked in reversed(back):
            choice.append(int(picked[at]))
            at = int(before[at])
        choice.reverse()
        if _total(errors, choice) <= budget:
            return choice
    return None


def _on_grid(errors: list[np.ndarray], sizes: list[np.ndarray], budget: float, grid: int) -> list[list[int]]:
    """The programme's choice in a list, which is empty where nothing fits once errors are rounded up to cells."""
    cells = []
    for e in errors:
        if budget > 0:
            with np.errstate(over="ignore"):  # the factor outweighs the rounding of the quotient: up, never down
                exact = np.ceil(e / budget * grid * (1 + 1e-15))
        else:
            exact = np.where(e > 0, np.inf, 0.0)
        cells.append(np.minimum(exact, grid + 1).astype(np.int64))
    best = np.zeros(grid + 1)  # best[c]: least size with at most c cells spent
    picks = []
    for cell, s in zip(cells, sizes, strict=True):
        following = np.full(grid + 1, np.inf)
        pick = np.full(grid + 1, -1, dtype=np.int32)
        for j in np.lexsort((cell, s)):
            if cell[j] > grid:
                continue
            candidate = best[: grid + 1 - cell[j]] + s[j]
            better = candidate < following[cell[j] :]
            np.copyto(following[cell[j] :], candidate, where=better)
            pick[cell[j] :][better] = j
        best = following
        picks.append(pick)
    if not np.isfinite(best[grid]):
        return []
    at = int(np.argmax(best == best[grid]))  # the fewest cells that reach the least size
    choice = []
    for cell, pick in zip(reversed(cells), reversed(picks), strict=True):
        j = int(pick[at])
        choice.append(j)
        at -= int(cell[j])
    choice.reverse()
    return [choice]


@final
class LayerwiseBudget(Controller):
    """Gives each tensor its own setting: fewest bytes (or seconds) at the total error of a uniform default.

    It works for any codec, through `Codec.error` and `Codec.nbytes`, which it gets from the exchange by `bind`. Rank 0 sums its
    gradients, as they are before any code, and decides; the exchange broadcasts. Give `settings` a floor not far below the
    default, a quarter of it for densities: an equal error of the sum leaves most tensors at the floor, and error feedback holds
    an entry back for 1/density steps.

    Args:
        settings: what a tensor may get, `default` among them: densities, bit widths or ranks; None is uncompressed.
        default: the uniform setting that is known to be safe; in force until the first decision.
        alpha: allowed total error relative to the default's, > 0; 1 means no worse.
        every: steps between decisions, whose gradients are summed, >= 1.
        start: steps of warm-up before the first decision, >= 0.
        grid: cells of the dynamic programme.
        cost: what is made small: "bytes" of a message, or "seconds".
        seconds: what a tensor costs at a setting, seconds(spec, setting), for `cost="seconds"`: say 0 for what hides behind the
            backward pass, and it is not squeezed. None for what the exchange knows.
        limit: if given, the sum of costs a step is bounded by it and the error is made small instead; alpha has no meaning then.
        smallest: tensors with fewer entries keep `default`.
        choose: `plan_layers`, or a baseline: `uniform_layers`, `greedy_layers`.
    Raises:
        ValueError: a value is out of range, or `default` is not in `settings`.
    """

    options = ("settings", "default", "alpha", "every", "start", "grid", "cost", "limit", "smallest", "choose")
    additive = True  # squared errors and costs

    def __init__(
        self,
        settings: Sequence[Setting],
        default: Setting,
        alpha: float = 1.0,
        every: int = 1000,
        start: int = 0,
        grid: int = 10_000,
        cost: Literal["bytes", "seconds"] = "bytes",
        seconds: Callable[[Spec, Setting], float] | None = None,
        limit: float | None = None,
        smallest: int = 1024,
        choose: Choose | None = None,
    ):
        self.settings = tuple(settings)
        if not self.settings:
            raise ValueError(
                "LayerwiseBudget: settings must not be empty; give the densities, bit widths or ranks to choose from"
            )
        if default not in self.settings:
            raise ValueError(f"LayerwiseBudget: default must be one of settings {self.settings}, got {default!r}")
        if not (alpha > 0 and math.isfinite(alpha)):
            raise ValueError(f"LayerwiseBudget: alpha must be > 0, got {alpha}; 1 allows the error of the default")
        if every < 1 or start < 0 or grid < 1:
            raise ValueError(
                f"LayerwiseBudget: every and grid must be >= 1 and start >= 0, got every={every}, grid={grid}, start={start}"
            )
        if cost not in ("bytes", "seconds"):
            raise ValueError(f"LayerwiseBudget: cost must be 'bytes' or 'seconds', got {cost!r}")
        if limit is not None and not limit > 0:
            raise ValueError(f"LayerwiseBudget: limit must be > 0 {cost} a step, or None, got {limit}")
        self.default, self.alpha, self.every, self.start, self.grid = default, alpha, every, start, grid
        self.cost, self.limit, self.smallest = cost, limit, smallest
        self.choose: Choose = choose or partial(plan_layers, grid=grid)
        self.codec: Codec | None = None
        self.seconds = seconds
        self.decision_seconds = 0.0  # CPU seconds spent on decisions so far
        self.skipped = 0  # decisions not taken because a gradient was not finite
        self.too_small = 0  # decisions at which no choice kept the budget: the most accurate (or cheapest) was taken
        self._sums: dict[str, Tensor] = {}
        self._settings: dict[str, Setting] = {}
        self._rows: dict[str, dict[str, Any]] = {}
        self._step = -1

    def bind(self, codec: Codec, seconds: Callable[[Spec, Setting], float] | None = None) -> None:
        """Learn the codec whose settings are chosen, and what a message costs: seconds(spec, setting).

        Raises:
            TypeError: the codec cannot say its error.
            ValueError: `cost="seconds"` and nobody can say the seconds.
        """
        if not callable(getattr(codec, "error", None)):
            raise TypeError(f"LayerwiseBudget: {type(codec).__name__} has no `error`, by which settings are compared")
        self.codec, self.seconds = codec, self.seconds or seconds
        if self.cost == "seconds" and self.seconds is None:
            raise ValueError(
                "LayerwiseBudget: cost='seconds' needs the argument seconds(spec, setting), which says them"
            )

    def initial(self, spec: Spec, default: Setting) -> Setting:
        return self.default

    def observe(self, spec: Spec, gradient: Tensor, step: int) -> None:
        """Add the gradient of one tensor to the sum that the next decision is made from."""
        if spec.numel < self.smallest or step < self.start:
            return
        if spec.name in self._sums:
            self._sums[spec.name] += gradient.detach().reshape(-1)
        else:
            self._sums[spec.name] = gradient.detach().reshape(-1).float().clone()

    def decide(self, step: int, specs: Mapping[str, Spec], total: Total = alone) -> Mapping[str, Setting]:
        """Settings from `step` on; {} where nothing has been observed, all gradients are zero or one is not finite."""
        if self.codec is None:
            raise ValueError(
                "LayerwiseBudget: no codec is bound; give the controller to an Exchange, or call bind(codec)"
            )
        begun = time.process_time()
        rows = total({name: self._numbers(spec) for name, spec in specs.items()})
        names, width = list(rows), len(self.settings)
        found: dict[str, Setting] = {}
        if names and not any(math.isnan(row[0]) for row in rows.values()):
            err, cost = [row[:width] for row in rows.values()], [row[width:] for row in rows.values()]
            uniform = self.settings.index(self.default)
            if math.fsum(row[uniform] for row in err) > 0 or self.limit is not None:
                found = self._chosen(names, err, cost, uniform)
                self._settings.update(found)
                self._step = step
        elif names:
            self.skipped += 1
        self._sums.clear()
        self.decision_seconds += time.process_time() - begun
        return found

    def _numbers(self, spec: Spec) -> list[float] | None:
        """Errors and then costs by setting; NaN if what was observed is not finite, None if nothing was."""
        if spec.name not in self._sums:
            return None
        costs = [self._cost(spec, setting) for setting in self.settings]
        if not self._sums[spec.name].isfinite().all():
            return [math.nan] * len(costs) + costs
        return self._errors(spec) + costs

    def _cost(self, spec: Spec, setting: Setting) -> float:
        if self.cost == "seconds":
            assert self.seconds is not None
            return self.seconds(spec, setting)
        return float(self._nbytes(spec, setting))

    def _nbytes(self, spec: Spec, setting: Setting) -> int:
        assert self.codec is not None
        if self.codec.in_force(spec, setting) is None:
            return spec.numel * spec.dtype.itemsize
        return self.codec.nbytes(spec, setting)

    def _errors(self, spec: Spec) -> list[float]:
        """Squared errors by setting; none where the tensor goes uncompressed."""
        assert self.codec is not None
        coded = [s for s in self.settings if self.codec.in_force(spec, s) is not None]
        found = dict(zip(coded, self.codec.error(self._sums[spec.name], spec, coded), strict=True)) if coded else {}
        return [found.get(setting, 0.0) for setting in self.settings]

    def _chosen(self, names: list[str], err: Table, cost: Table, uniform: int) -> dict[str, Setting]:
        total = math.fsum(row[uniform] for row in err)
        bounded = err if self.limit is None else cost
        try:
            if self.limit is None:
                choice = self.choose(err, cost, self.alpha * total)
            else:
                choice = self.choose(cost, err, self.limit)
        except BudgetTooSmall:
            self.too_small += 1
            choice = [min(range(len(row)), key=row.__getitem__) for row in bounded]
        self._rows = {
            name: {
                "setting": self.settings[j],
                "error_share": err[i][j] / total if total > 0 else 0.0,
                f"{self.cost}_saved": cost[i][uniform] - cost[i][j],
            }
            for i, (name, j) in enumerate(zip(names, choice, strict=True))
        }
        return {name: self.settings[j] for name, j in zip(names, choice, strict=True)}

    def report(self) -> dict[str, Any]:
        """What was decided last: per tensor its setting, its share of the uniform error and what it saves against uniform."""
        return {
            "step": self._step,
            "tensors": {name: dict(row) for name, row in self._rows.items()},
            "decision_seconds": self.decision_seconds,
            "skipped": self.skipped,
            "too_small": self.too_small,
        }

    def state_dict(self) -> dict[str, Any]:
        """The decision, its step, the sums and the counters: what a resumed run needs to decide the same."""
        return {
            "settings": dict(self._settings),
            "step": self._step,
            "sums": {name: total.clone() for name, total in self._sums.items()},
            "skipped": self.skipped,
            "too_small": self.too_small,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        missing = [key for key in ("settings", "step", "sums") if key not in state]
        if missing:
            raise ValueError(f"LayerwiseBudget: the checkpoint lacks {missing}; it is from another controller")
        self._settings = dict(state["settings"])
        self._step = int(state["step"])
        self._sums = {name: total.clone() for name, total in state["sums"].items()}
        self.skipped, self.too_small = int(state.get("skipped", 0)), int(state.get("too_small", 0))
        self._rows = {}
