"""Building the native library: one build whatever happens, and a clear sentence where there can be none."""

from __future__ import annotations

import multiprocessing
import os
import re
import stat
import threading
from pathlib import Path

import pytest

from weft.memory.native import build


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("WEFT_NATIVE", raising=False)
    return build.cache_folder()


def fake_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """Make CXX a shell script: `$out` is the file it is asked to write. Returns the log of its calls."""
    log, script = tmp_path / "calls", tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\necho call >> {log}\nwhile [ "$1" != -o ]; do shift; done\nout="$2"\n' + body)
    script.chmod(0o755)
    log.touch()
    monkeypatch.setenv("CXX", str(script))
    return log


def test_an_unchanged_source_is_compiled_once(folder, tmp_path, monkeypatch):
    log = fake_compiler(tmp_path, monkeypatch, 'echo built > "$out"\n')
    first = build.build("allocator")
    assert first.parent == folder and first.read_text() == "built\n"
    assert build.build("allocator") == first
    assert log.read_text().split() == ["call"]
    assert build.build("operators") != first


def test_another_source_or_another_torch_is_another_build(tmp_path, monkeypatch):
    before = build.signature("allocator")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("allocator.cpp", "operators.cpp", *build.HEADERS["allocator"]):
        (copy / name).write_bytes((build.HERE / name).read_bytes())
    monkeypatch.setattr(build, "HERE", copy)
    assert build.signature("allocator") == before
    others = build.signature("operators")
    header = copy / "ledger.h"
    header.write_text(header.read_text() + "\n// changed\n")
    assert build.signature("allocator") != before and build.signature("operators") == others
    changed = build.signature("allocator")
    monkeypatch.setattr(build.torch, "__version__", "0.0.0")
    assert build.signature("allocator") not in (before, changed)


@pytest.mark.parametrize("source", build.HEADERS)
def test_a_signature_covers_all_that_a_source_includes(source):
    """A header that it forgot would leave an old build in use."""

    def included(name: str) -> set[str]:
        own = set(re.findall(r'^#include "(.+)"', (build.HERE / name).read_text(), re.MULTILINE))
        return own.union(*map(included, own))

    assert included(f"{source}.cpp") == set(build.HEADERS[source])


def test_several_that_want_it_at_once_build_it_once(folder, tmp_path, monkeypatch):
    log = fake_compiler(tmp_path, monkeypatch, 'sleep 1\necho built > "$out"\n')
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build.build, args=("allocator",)) for _ in range(3)]
    threads = [threading.Thread(target=build.build, args=("allocator",)) for _ in range(2)]
    for worker in (*processes, *threads):
        worker.start()
    for worker in (*processes, *threads):
        worker.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text().split() == ["call"]
    assert build.build("allocator").read_text() == "built\n"


def test_a_builder_that_dies_leaves_nothing_in_the_way(folder, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, 'echo half > "$out"\nsleep 60\n')
    process = multiprocessing.get_context("fork").Process(target=build.build, args=("allocator",))
    process.start()
    while not list(folder.glob("*.tmp")):
        assert process.is_alive()
    process.kill()
    process.join()
    assert not list(folder.glob("*.so"))
    fake_compiler(tmp_path, monkeypatch, 'echo whole > "$out"\n')
    assert build.build("allocator").read_text() == "whole\n"


def test_a_failing_compiler_is_quoted_and_leaves_nothing(folder, tmp_path, monkeypatch):
    fake_compiler(
        tmp_path, monkeypatch, 'echo half > "$out"\necho "x.cpp:1: error: no such thing" >&2\necho noise >&2\nexit 3\n'
    )
    with pytest.raises(build.NativeUnavailable, match=r"exit 3\):\nx.cpp:1: error: no such thing$"):
        build.build("allocator")
    assert [path.suffix for path in folder.iterdir()] == [".lock"]


def test_why_there_is_none(folder, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        build.NativeUnavailable, match=r"no C\+\+ compiler \(no-such-compiler\).*Install g\+\+ or set CXX"
    ):
        build.build("allocator")
    monkeypatch.setenv("WEFT_NATIVE", "0")
    with pytest.raises(build.NativeUnavailable, match="switched off by WEFT_NATIVE"):
        build.build("allocator")
    monkeypatch.delenv("WEFT_NATIVE")
    monkeypatch.setattr(build.sys, "platform", "win32")
    with pytest.raises(build.NativeUnavailable, match="written for Linux, this is win32"):
        build.build("allocator")


def test_a_folder_that_others_can_write_is_not_trusted(folder, monkeypatch):
    folder.chmod(stat.S_IMODE(folder.stat().st_mode) | 0o020)
    other = build.cache_folder()
    assert other != folder and other.stat().st_uid == os.geteuid() and not other.stat().st_mode & 0o077
    monkeypatch.setenv("WEFT_CACHE", "/proc/no-such-place")
    assert build.cache_folder() == other
