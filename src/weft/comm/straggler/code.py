"""Gradient codes: any n - s of n coded sums give the whole sum.

Problem    n workers, n chunk gradients g_j, at most s workers late. Worker i sends one sum l_i = sum_j C[i, j] g_j over s + 1
           chunks; from any n - s of these the master must find sum_j g_j.
Method     cyclic: C[i, j] != 0 only for j = i..i + s (mod n), and the all-ones row lies in the span of every n - s rows:
           all rows of C lie in the null space of an s x n matrix H, of which any s columns are independent    `cyclic`
               H holds s discrete frequencies in arithmetic progression, none of them 0 (BCH bound); of all step widths
               the one that bounds rounding errors best is taken. n - s odd: C is circulant. n - s even: no real H is made of
               whole frequencies; the last row is half of a pair, a cosine with one of some phases, or all of H is random
               with zero row sums, whichever is better
           repetition, (s + 1) | n: groups of s + 1 workers hold the same s + 1 chunks and send plain sums      `repetition`
           decoding: the row a of least norm with a C = 1 on the workers that came                               `decode`
Guarantee  exact for every late set of at most s workers, up to rounding: the error is about |a| |C| eps.
Source     Tandon, Lei, Dimakis, Karampatziakis, Gradient Coding, ICML 2017, arXiv:1612.03301 (repetition, random H); Raviv,
           Tamo, Tandon, Dimakis, Gradient Coding from Cyclic MDS Codes, ICML 2018, arXiv:1707.03858 (frequencies).
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import numpy as np

__all__ = ["cyclic", "decode", "repetition"]

STEPS, PHASES, DRAWINGS = 4, 8, 64  # candidates for H, judged by decoding; conditions differ by orders of magnitude
JUDGED = 512  # late sets times workers by which a candidate is judged
FEW = 128  # late sets, of which all are looked at


@lru_cache(maxsize=64)
def cyclic(n: int, s: int) -> np.ndarray:
    """C, float64 (n, n), row i supported on i..i + s (mod n), C[i, i] = 1; read-only.

    Raises:
        ValueError: s is not in 0..n - 1.
    """
    if not 0 <= s < n:
        raise ValueError(f"cyclic: s must be in 0..n - 1, got s = {s} for n = {n}; with s = n nobody would be left")
    if s == 0:
        code = np.eye(n)
    elif s == n - 1:
        code = np.ones((n, n))
    else:
        code = min(_candidates(n, s), key=_badness)
    code.setflags(write=False)
    return code


@lru_cache(maxsize=64)
def repetition(n: int, s: int) -> np.ndarray:
    """C, 0/1 float64 (n, n): workers of group q hold chunks q(s + 1)..q(s + 1) + s.

    Raises:
        ValueError: s + 1 does not divide n.
    """
    if not 0 <= s < n or n % (s + 1):
        raise ValueError(
            f"repetition: s + 1 must divide the number of workers, got s = {s}, n = {n}; take another s or kind='cyclic'"
        )
    code = np.kron(np.eye(n // (s + 1)), np.ones((s + 1, s + 1)))
    code.setflags(write=False)
    return code


def decode(code: np.ndarray, late: np.ndarray) -> np.ndarray | None:
    """The weights a (n,), zero for late workers, with a C = 1; None if there are none.

    Args:
        code: C (n, n).
        late: bool (n,).
    """
    return _decode(code.tobytes(), len(code), late.tobytes())


@lru_cache(maxsize=4096)
def _decode(code: bytes, n: int, late: bytes) -> np.ndarray | None:
    matrix, here = np.frombuffer(code).reshape(n, n), ~np.frombuffer(late, dtype=bool)
    weights = np.zeros(n)
    if ((matrix == 0) | (matrix == 1)).all() and (matrix @ matrix == matrix.sum(1).max() * matrix).all():
        first = here & (np.cumsum(matrix * here, axis=1)[np.arange(n), np.arange(n)] == 1)  # the first of each group
        weights[first] = 1.0
    elif here.any():
        weights[here] = np.linalg.lstsq(matrix[here].T, np.ones(n), rcond=1e-10)[0]
    if not np.allclose(weights @ matrix, 1.0, rtol=0, atol=1e-6):
        return None
    weights.setflags(write=False)
    return weights


def _from_null_space(h: np.ndarray, rows: int) -> np.ndarray | None:
    """The first rows b_i of a code: H b_i = 0, b_i[i] = 1, support i..i + s; None if s neighbouring columns of H depend."""
    s, n = h.shape
    code = np.zeros((rows, n))
    for i in range(rows):
        others = (i + 1 + np.arange(s)) % n
        code[i, i] = 1.0
        try:
            code[i, others] = np.linalg.solve(h[:, others], -h[:, i])
        except np.linalg.LinAlgError:
            return None
    return code


def _candidates(n: int, s: int) -> list[np.ndarray]:
    """Codes from the step widths whose coefficients are smallest, each with some phases if a row is to be half of a pair."""
    phases = (0.0,) if (n - s) % 2 else _phases(n, s)
    steps = [step for step in range(1, n // 2 + 1) if math.gcd(step, n) == 1]
    found = [_from_null_space(_frequencies(n, s, step, phases[0]), rows=1) for step in steps]
    sums = [math.inf if code is None else float(np.abs(code[0]).sum()) for code in found]
    order = sorted(range(len(steps)), key=sums.__getitem__)
    made = [_from_null_space(_frequencies(n, s, steps[k], phase), rows=n) for k in order[:STEPS] for phase in phases]
    if len(phases) > 1 and n <= DRAWINGS:  # for large n a random H is hopeless: s neighbouring columns nearly depend
        for seed in range(DRAWINGS):
            h = np.random.default_rng(seed).standard_normal((s, n))
            made.append(_from_null_space(h - h.mean(1, keepdims=True), rows=n))
    return [code for code in made if code is not None]


def _phases(n: int, s: int) -> tuple[float, ...]:
    """Phases of a half pair that make unlike codes: others are these with workers renumbered, or numbered backwards.

    Its cosine takes n/g values, g = gcd(n, frequency), one apart by 2 pi g/n: at 0, 1/2 and 1 of half that step some workers'
    values are the same, whatever n, so none of these is among them.
    """
    half = math.pi * math.gcd(n, (n - s) // 2) / n
    return tuple((k + 1) / (PHASES + 1) * half for k in range(PHASES))


def _frequencies(n: int, s: int, step: int, phase: float) -> np.ndarray:
    """s real Fourier rows of length n: the frequencies nearest to n / 2, all times `step`, which is prime to n."""
    rows, angle = [], 2 * np.pi * step * np.arange(n) / n
    for frequency in range(n // 2, 0, -1):
        if 2 * frequency == n or len(rows) == s - 1:
            rows.append(np.cos(frequency * angle + (0.0 if 2 * frequency == n else phase)))
        else:
            rows += [np.cos(frequency * angle), np.sin(frequency * angle)]
        if len(rows) == s:
            break
    return np.stack(rows)


def _badness(code: np.ndarray) -> float:
    """How large rounding errors become: the largest |a| times the largest row sum of |C| over some late sets, or all if few."""
    n = len(code)
    s = int((code[0] != 0).sum()) - 1
    generator, worst = np.random.default_rng(0), 0.0
    drawn = (generator.choice(n, s, replace=False) for _ in range(max(4, JUDGED // n)))
    for chosen in itertools.combinations(range(n), s) if math.comb(n, s) <= FEW else drawn:
        late = np.zeros(n, dtype=bool)
        late[list(chosen)] = True
        weights = decode(code, late)
        worst = max(worst, np.inf if weights is None else float(np.abs(weights).max()))
    return worst * float(np.abs(code).sum(1).max())
