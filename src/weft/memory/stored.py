"""Traces, plans and cost tables as files: JSON, compressed if the name ends in `.z`."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from weft.errors import Unreadable, first_line
from weft.paths import to_file

__all__ = ["read", "write"]

T = TypeVar("T")

# an entry that each kind of file has, and no other -> what reads it
_KINDS = {
    "ops": "weft.memory.Trace",
    "actions": "weft.memory.MemoryPlan",
    "workspace": "weft.memory.CostTable",
    "assignment": "weft.Plan",
}


def write(data: Any, path: str | Path, what: str) -> None:
    """Write a JSON-able value.

    Raises:
        ValueError: nothing can be written there: no such folder, say. `what` is to be written, for the error.
    """
    to_file(what, path)
    text = json.dumps(data, separators=(",", ":")).encode()
    Path(path).write_bytes(zlib.compress(text, 9) if _compressed(path) else text)


def read(path: str | Path, make: Callable[[Any], T], kind: str) -> T:
    """What `make` makes of the value in a file. `kind` is one of the classes in `_KINDS`.

    Raises:
        Unreadable: there is no such file, or it does not hold that.
    """
    data: Any = None
    try:
        text = Path(path).read_bytes()
        data = json.loads(zlib.decompress(text) if _compressed(path) else text)
        return make(data)
    except OSError as error:
        what, cause = error.strerror or str(error), error
    except (zlib.error, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        form = "compressed JSON, as its name says" if _compressed(path) else "JSON"
        what, cause = f"it is not {form}, or cut short ({first_line(error)})", error
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # whatever a wrong value in it leads to
        said = str(error) if type(error) is ValueError else f"{type(error).__name__}: {first_line(error)}"
        other = [name for entry, name in _KINDS.items() if isinstance(data, dict) and entry in data and name != kind]
        what = f"it holds a {other[0]}, whose load reads it" if other else f"it holds no {kind} ({said})"
        cause = error
    raise Unreadable(str(path), what, f"Name a file that {kind}.save has written, or make another one") from cause


def _compressed(path: str | Path) -> bool:
    return str(path).endswith(".z")
