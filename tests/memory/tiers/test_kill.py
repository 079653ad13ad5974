"""SIGKILL at random moments of a step: whoever comes back finds a complete step, and no step that was reported is lost."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.memory.tiers.kill_target import reference

ROOT = Path(__file__).resolve().parents[3]


class Target:
    """The process that forks jobs (see kill_target)."""

    def __init__(self):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.memory.tiers.kill_target"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        assert self.next() == "ready"

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line.strip())

    def next(self, timeout: float = 120) -> str:
        return self.lines.get(timeout=timeout)

    def run(
        self, folder: Path, steps: int, world: int, update: str, kill_after: float | None, victims: slice = slice(None)
    ) -> list[list[str]]:
        """Run a job, some of its ranks killed some seconds after the first has resumed; returns what it said, in words."""
        self.process.stdin.write(f"run {folder} {steps} {world} {update}\n")
        self.process.stdin.flush()
        said: list[list[str]] = []
        pids: list[int] = []
        killer: threading.Timer | None = None
        while (line := self.next()) != "ended":
            words = line.split()
            if words[0] == "started":
                pids += [int(word) for word in words[1:]]
                continue
            said.append(words)
            if words[:2] == ["0", "resumed"] and kill_after is not None and killer is None:
                killer = threading.Timer(kill_after, _kill, (pids, victims))
                killer.start()
        if killer is not None:
            killer.cancel()
            killer.join()
        return said

    def close(self) -> None:
        self.process.stdin.close()
        self.process.kill()
        self.process.wait(10)


@pytest.fixture(scope="module")
def target():
    made = Target()
    yield made
    made.close()


def _kill(pids: list[int], victims: slice) -> None:
    for pid in pids[victims]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def attack(
    target: Target, folder: Path, kills: int, world: int, update: str, seed: int, victims: slice = slice(None)
) -> int:
    """Kill jobs, look at what comes back, then let one get through; returns how many were killed while they trained."""
    most = 20 * kills
    expected, generator = reference(most), random.Random(seed)
    reported, hit = 0, 0

    def judge(said: list[list[str]]) -> None:
        nonlocal reported, hit
        # A rank that is left alone says so.
        failed = [rest[0] for _, what, *rest in said if what == "failed"]
        assert all(name == "PeerLost:" for name in failed) and len(failed) <= len(range(world)[: victims.start or 0]), (
            said
        )
        for _, what, *rest in said:
            if what == "resumed":
                step, whole = int(rest[0]), rest[1]
                assert step >= reported, f"step {reported} was reported as complete, but {step} came back"
                assert whole == expected[step], f"the parameters after {step} steps are not those of any complete step"
        reported = max([reported, *(int(rest[0]) for _, what, *rest in said if what == "stepped")])
        hit += bool(said) and not any(what == "finished" for _, what, *_ in said)

    for _ in range(kills):
        judge(target.run(folder, most, world, update, generator.uniform(0.0, 0.25), victims))
    end = min(reported + 3, most)
    said = target.run(folder, end, world, update, None)
    judge(said)
    assert sorted(words for words in said if words[1] == "finished") == [
        [str(rank), "finished", str(end), expected[end]] for rank in range(world)
    ]
    return hit


def test_killed_eight_times(target, tmp_path):
    assert attack(target, tmp_path / "run", 8, 1, "step", seed=0) >= 6


def test_killed_in_updates_during_backward(target, tmp_path):
    assert attack(target, tmp_path / "run", 5, 1, "backward", seed=1) >= 4


@pytest.mark.slow
def test_two_processes_killed(target, tmp_path):
    assert attack(target, tmp_path / "run", 4, 2, "step", seed=2) >= 3


def test_one_of_two_processes_killed(target, tmp_path):
    assert attack(target, tmp_path / "run", 3, 2, "step", seed=3, victims=slice(1, 2)) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(("world", "update"), [(1, "step"), (1, "backward"), (2, "step")])
def test_killed_fifty_times(target, tmp_path, world, update):
    assert attack(target, tmp_path / "run", 50, world, update, seed=50) >= 45
