"""Picking a method by its name: one lookup for every table of names in weft.

A package's table maps names to methods (`{"top-k": TopK, ...}`). `pick` reads it and answers a misspelt name with the
nearest ones; names are compared without regard to case, and `_` counts as `-`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

__all__ = ["nearest", "pick"]

T = TypeVar("T")


def pick(name: str, table: Mapping[str, T], what: str) -> T:
    """The entry of `table` called `name`.

    Args:
        name: as a user wrote it, e.g. "Top_K".
        table: names to entries.
        what: what the table holds, for the error: "compressor", "task", "device".
    Raises:
        ValueError: no such name; the message gives the nearest names, or all of them if none is near.

    >>> pick("Top_K", {"top-k": 1, "sign-sgd": 2}, "compressor")
    1
    """
    if name in table:
        return table[name]
    same = [key for key in table if _plain(key) == _plain(name)]
    if len(same) == 1:
        return table[same[0]]
    near = nearest(name, table)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif table:
        hint = f"known are {', '.join(sorted(table))}"
    else:
        hint = "there are none"
    raise ValueError(f"no {what} is called {name!r}; {hint}")


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` of `names` that look like `name`, best first.

    >>> nearest("H10", ["H100", "A100", "T4"])
    ['H100', 'A100']
    """
    by_plain = {_plain(key): key for key in names}
    plain = _plain(name)
    found = difflib.get_close_matches(plain, by_plain, n=count, cutoff=0.55)
    found += [key for key in sorted(by_plain) if plain and (plain in key or key in plain) and key not in found]
    return [by_plain[key] for key in found[:count]]


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-")
