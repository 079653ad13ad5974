"""Compile the native library on first use, keep it in the user's cache, load it.

A library is one C++ source of this folder, built by calling the compiler directly with torch's headers. Its file name carries a
hash of the sources, the flags and the torch they were built against, so a changed one never meets an old build. Two processes
that want it at once: one builds under a file lock, to a name of its own that is then renamed; the other waits and finds it.

Environment: `WEFT_NATIVE=0` (do without), `CXX` (the compiler), `WEFT_CACHE` (the folder; else $XDG_CACHE_HOME/weft,
~/.cache/weft).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from weft.errors import WeftError

__all__ = ["NativeUnavailable", "Source", "build", "cache_folder", "compiler", "load", "prepare"]

Source = Literal["allocator", "operators", "cuda"]

HERE = Path(__file__).parent
HEADERS: dict[Source, tuple[str, ...]] = {
    "allocator": ("arena.h", "control.h", "ledger.h"),
    "operators": (),
    "cuda": ("arena.h", "control.h", "ledger.h"),
}
LINKED: dict[Source, tuple[str, ...]] = {
    "allocator": ("c10",),
    "operators": ("c10", "torch_cpu"),
    "cuda": ("c10", "dl"),
}
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
SECONDS = 900  # a compiler that takes longer is stuck (seconds on an idle machine, minutes on a crowded one)


class NativeUnavailable(WeftError, RuntimeError):
    """The native library cannot be built or used here; `why` is a sentence. Everything that uses it has a fallback."""

    def __init__(self, why: str):
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"weft's native memory library is not available: {self.why}"


def compiler() -> str:
    """Path of the C++ compiler: `$CXX`, else the first of c++, g++, clang++ there is.

    Raises:
        NativeUnavailable: none.
    """
    wanted = os.environ.get("CXX")
    names = (wanted,) if wanted else ("c++", "g++", "clang++")
    for name in names:
        if found := shutil.which(name):
            return found
    raise NativeUnavailable(
        f"no C++ compiler ({', '.join(names)}) on this machine. Install g++ or set CXX to use it; without, bytes are counted "
        "from Python, which does not see operators' workspace"
    )


def cache_folder() -> Path:
    """The folder for built libraries: the user's own, or a private temporary one where that cannot be written or trusted."""
    base = os.environ.get("WEFT_CACHE")
    folder = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft"
    with contextlib.suppress(OSError):
        folder = folder / "native"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        # Code is loaded from here: it must be ours, and nobody else may write.
        if status.st_uid == os.geteuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    return _temporary_folder()


@cache
def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="weft-native-"))


def _command(source: Source, into: str) -> list[str]:
    root = Path(torch.__file__).parent
    abi = int(torch.compiled_with_cxx11_abi())
    libraries = [f"-l{name}" for name in LINKED[source]]
    return [
        *FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        f"-I{root / 'include'}",
        str(HERE / f"{source}.cpp"),
        "-o",
        into,
        f"-L{root / 'lib'}",
        *libraries,
    ]


def signature(source: Source) -> str:
    """Hash of all that decides what the build of a source is."""
    digest = hashlib.sha256()
    for name in (f"{source}.cpp", *HEADERS[source]):
        digest.update((HERE / name).read_bytes())
    described = (
        torch.__version__,
        torch.version.git_version,
        torch.compiled_with_cxx11_abi(),
        platform.machine(),
        FLAGS,
    )
    digest.update(repr(described).encode())
    return digest.hexdigest()[:20]


def build(source: Source, folder: Path | None = None) -> Path:
    """Path of the built library, compiled if the folder (default `cache_folder()`) does not have it.

    Raises:
        NativeUnavailable: switched off, another platform, no compiler, or the compiler fails (with what it said).
    """
    if os.environ.get("WEFT_NATIVE", "1").lower() in ("0", "no", "off", "false"):
        raise NativeUnavailable("it is switched off by WEFT_NATIVE")
    if not sys.platform.startswith("linux"):
        raise NativeUnavailable(f"it is written for Linux, this is {sys.platform}")
    folder = folder or cache_folder()
    path = folder / f"{source}-{signature(source)}.so"
    if not path.exists():
        with _lock(path.with_suffix(".lock")):
            if not path.exists():  # another process may have built it while this one waited
                _compile(source, path)
    return path


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a file lock; the system gives it back when its holder dies."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(source: Source, path: Path) -> None:
    command = compiler()
    made = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        done = subprocess.run([command, *_command(source, str(made))], capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            said = "\n".join(line for line in done.stderr.splitlines() if "error" in line)[:2000] or done.stderr[-2000:]
            raise NativeUnavailable(
                f"{command} cannot compile {source}.cpp against torch {torch.__version__} (exit {done.returncode}):\n{said}"
            )
        os.replace(made, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{command} did not compile {source}.cpp: {error}") from error
    finally:
        made.unlink(missing_ok=True)


@cache
def _outcome(source: Source) -> ctypes.PyDLL | NativeUnavailable:
    try:
        # PyDLL: calls keep the interpreter lock, since they are shorter than giving it up; nothing in them waits for it.
        return ctypes.PyDLL(str(build(source)))
    except NativeUnavailable as error:
        return error
    except OSError as error:
        return NativeUnavailable(f"the built library does not load: {error}")


def load(source: Source) -> ctypes.PyDLL:
    """The loaded library; built first if need be. What happened is remembered for the life of the process.

    Raises:
        NativeUnavailable: see `build`, or the library does not load.
    """
    found = _outcome(source)
    if isinstance(found, NativeUnavailable):
        raise NativeUnavailable(found.why)
    return found


def prepare(*sources: Source) -> None:
    """Build several at a time, so that `load` of each finds it; failures are for `load` to tell."""
    with ThreadPoolExecutor(len(sources)) as pool:
        list(pool.map(_outcome, sources))
