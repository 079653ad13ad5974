"""Recorded results: one JSON file per system and machine in `benchmarks/`, with what is needed to read the numbers later.

A record holds the rows of every seed, the claims with their values, the machine (processor, cores, memory, accelerator; never a
host name), versions, settings, the date and the commit. README and `docs/systems.md` are written from these files (`report`).
`added` lists rows that a later run of a part brought, with its date and commit; `judged` is the day when claims were judged anew.

The commit must be that of the code that ran: `check_committed` refuses a working tree that differs from it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

__all__ = [
    "check_committed", "commit", "differing", "find_records", "machine", "read_record", "record_path", "versions", "write_record",
]  # fmt: skip

PACKAGES = ("torch", "numpy", "scipy", "highspy", "transformers", "weft")


def machine() -> dict[str, Any]:
    """This machine: name (for the file), processor, cores that this process may use, memory in bytes, accelerators."""
    processor = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", facts.read_text(), re.MULTILINE)
        processor = found.group(1).strip() if found else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = _accelerators()
    words = re.sub(r"\(r\)|\(tm\)|cpu|processor|@.*", " ", processor, flags=re.IGNORECASE)
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "machine"
    name = f"{slug}-{cores}core" + (f"-{len(gpus)}x{re.sub(r'[^a-z0-9]+', '-', gpus[0].lower())}" if gpus else "")
    return {"name": name, "processor": processor, "cores": cores, "memory": memory, "accelerators": gpus,
            "system": f"{platform.system()} {platform.release().split('-')[0]}"}  # fmt: skip


def _accelerators() -> list[str]:
    import torch

    return (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


SOURCES = Path(__file__).parents[1]  # of weft


def _git(*words: str, sources: Path) -> str:
    done = subprocess.run(["git", "-C", str(sources), *words], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout


def _tracked(sources: Path) -> bool:
    """Whether a repository holds these sources of weft; not if they only lie in one, as an installed package may."""
    try:
        return bool(_git("ls-files", "--error-unmatch", "__init__.py", sources=sources))
    except (OSError, subprocess.SubprocessError):
        return False


def differing(records: Path | None = None, sources: Path = SOURCES) -> list[str]:
    """Files by which the working tree that weft runs from differs from its commit: tracked ones, and new ones among weft's own.

    Args:
        records: a folder that does not count, where records are written.
        sources: the folder of the package `weft`.
    Raises:
        subprocess.SubprocessError: git cannot say.
    """
    if not _tracked(sources):
        return []
    top = _git("rev-parse", "--show-toplevel", sources=sources).strip()
    status = _git("status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", sources=sources)
    found = [(entry[:2], entry[3:]) for entry in status.split("\0") if entry]
    apart = None if records is None else records.resolve()
    return [
        name
        for kind, name in found
        if not (apart is not None and Path(top, name).resolve().is_relative_to(apart))
        if kind != "??" or Path(top, name).resolve().is_relative_to(sources.resolve())
    ]


def commit(records: Path | None = None, sources: Path = SOURCES) -> str:
    """Short hash of the commit that weft runs from, with `+` if files are `differing`; "" outside a repository."""
    try:
        if not _tracked(sources):
            return ""
        head = _git("rev-parse", "--short=10", "HEAD", sources=sources).strip()
        return head + ("+" if differing(records, sources) else "")
    except subprocess.SubprocessError:
        return ""


def check_committed(records: Path, sources: Path = SOURCES) -> str:
    """The commit, or "" if weft does not run from a repository: its version tells then.

    Raises:
        ValueError: the working tree differs from it, beyond the folder of records, or git cannot say whether it does.
    """
    try:
        changed = differing(records, sources)
    except subprocess.SubprocessError as error:
        raise ValueError(
            f"a record names the commit whose code made its numbers, and git cannot tell it: {error}"
        ) from error
    if changed:
        some = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        raise ValueError(
            f"a record names the commit whose code made its numbers, and {some} differ{'s' * (len(changed) == 1)} from the "
            "checked-out one; commit or stash first (or leave --record out to see the numbers only)"
        )
    return commit(records, sources)


def record_path(record: dict[str, Any], folder: Path) -> Path:
    """Where a record lies in a folder; its picture lies beside it as .svg."""
    return folder / f"{record['system']}-{record['machine']['name']}.json"


def write_record(record: dict[str, Any], folder: Path) -> Path:
    """Write a record to `folder/<system>-<machine>.json`, whole or not at all, and return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = record_path(record, folder)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1, sort_keys=False) + "\n")
    part.replace(path)
    return path


def read_record(path: Path) -> dict[str, Any]:
    """A record from its file.

    Raises:
        ValueError: the file is no record.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        missing = [key for key in ("system", "machine", "date", "rows", "claims") if key not in record]
    except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a benchmark record: {error}") from error
    if missing:
        raise ValueError(f"{path} is not a benchmark record: it lacks {', '.join(missing)}")
    return record


def find_records(folder: Path, system: str = "") -> list[dict[str, Any]]:
    """Every record of the folder, or of one system, newest first."""
    records = [read_record(path) for path in sorted(folder.glob("*.json"))]
    records = [record for record in records if system in ("", record["system"])]
    return sorted(records, key=lambda record: record["date"], reverse=True)


def today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
