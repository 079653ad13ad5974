"""Names: picking a method by its name, and a package's names that are loaded when they are first used.

`pick`      a package's table maps names to methods (`{"top-k": TopK, ...}`): one lookup for all of them, which answers a
            misspelt name with the nearest ones; names are compared without regard to case, and `_` counts as `-`
`lazily`    the `__getattr__` and `__dir__` of a package, so that importing it imports neither torch nor what is not used
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

__all__ = ["lazily", "nearest", "pick"]

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
    if not isinstance(name, str):
        raise ValueError(f"a {what} must be given by its name, one of {', '.join(sorted(table))}; got {name!r}")
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


def lazily(
    package: str, home: Mapping[str, str], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose public names stand in its modules.

    Args:
        package: its full name.
        home: public name -> the module of the package that has it, such as "planning.check".
        modules: modules and packages inside it that are public themselves.
    """

    def get(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(sorted(home))}")
        value = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home})

    return get, names


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-")
