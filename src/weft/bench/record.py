"""Recorded results: one JSON file per system and machine in `benchmarks/`, with what is needed to read the numbers later.

A record holds the rows of every seed, the claims with their values, the machine (processor, cores, memory, accelerator; never a
host name), versions, the date and the commit. README and `docs/systems.md` are written from these files alone (`report`).
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

__all__ = ["commit", "find_records", "machine", "read_record", "record_path", "versions", "write_record"]

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


def commit() -> str:
    """Short hash of the checked-out commit, with `+` if tracked files differ from it; "" outside a repository."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


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
