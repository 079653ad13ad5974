"""Files and folders to be written: refused before any work if they could not be.

to_file(name, path)      a file, in a folder that is there
to_folder(name, path)    a folder, made with its parents where it is missing
"""

from __future__ import annotations

import tempfile
from pathlib import Path

__all__ = ["to_file", "to_folder"]


def to_file(name: str, path: str | Path) -> None:
    """Refuse a file that could not be written; `name` is the argument that asked for it."""
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise ValueError(f"{name} {path}: there is no folder {Path(path).parent}; make it first")
    if Path(path).is_dir():
        raise ValueError(f"{name} {path}: that is a folder; name the file to write")
    if not Path(path).exists():
        _try(name, path, folder)


def to_folder(name: str, path: str | Path, *, beside: bool = False) -> None:
    """Refuse a folder in which nothing could be written (`beside`: nor next to it, as whatever replaces it whole does)."""
    whole = Path(path).resolve()
    present = next(folder for folder in (whole, *whole.parents) if folder.exists())
    if not present.is_dir():
        what = "that is" if present == whole else f"{present} is"
        raise ValueError(f"{name} {path}: {what} a file; name a folder")
    _try(name, path, present.parent if beside and present == whole else present)


def _try(name: str, path: str | Path, folder: Path) -> None:
    """Make an entry and take it away again: permissions do not tell of read-only file systems, nor anything to root."""
    try:
        tempfile.TemporaryDirectory(prefix=".weft-", dir=folder).cleanup()
    except OSError as error:
        raise ValueError(f"{name} {path}: nothing can be written in {folder} ({error.strerror})") from error
