"""Ranks on links of a chosen speed: one network namespace per rank, joined by virtual cables with a token bucket and a delay.

What is measured here crossed a queue of the kernel at that rate; nothing is slept or computed. Each direction of each cable:

    rate     tbf, the kernel's token bucket: at most `rate` bits per second, bursts of a few packets
    delay    every packet arrives `delay` seconds later (one way), by a process that carries them (see delay.py)

Two ranks share one cable; more hang on a bridge in a namespace of its own, and have no delay. Needs Linux, root and iproute2:
`why_not()` says what is missing, and `on_links` raises `LinksNotPermitted` with that sentence. Namespaces and processes are gone
afterwards; what a killed process could not remove, the next one does.

run a function on every rank         `on_links`        what of the wire a rank has used        `interface_bytes`
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["LinksNotPermitted", "Wire", "interface_bytes", "namespaces", "on_links", "why_not"]

DEVICE = "weft0"  # the interface inside every namespace
PORT = 29400
WORKER = "import sys; from weft.bench.links import serve; serve(sys.argv[1])"


class LinksNotPermitted(RuntimeError):
    """Network namespaces cannot be made here."""


@dataclass(frozen=True)
class Wire:
    """A cable: `rate` in bits per second in each direction (None: as fast as the kernel), `delay` in seconds one way."""

    rate: float | None = None
    delay: float = 0.0

    def __post_init__(self) -> None:
        if self.rate is not None and not self.rate >= 1e5:
            raise ValueError(f"Wire: rate must be at least 1e5 bits per second, or None, got {self.rate}")
        if not 0 <= self.delay <= 10:
            raise ValueError(f"Wire: delay must be in [0, 10] seconds, got {self.delay}")

    def __str__(self) -> str:
        speed = "unlimited" if self.rate is None else f"{self.rate / 1e6:g} Mbit/s"
        return speed + (f", {self.delay * 1e3:g} ms" if self.delay else "")

    @property
    def packet(self) -> int:
        """Bytes of the largest packet: small beside what the wire carries in some milliseconds, for a process to carry many."""
        return (
            1500
            if self.rate is None and not self.delay
            else min(65_000, max(1500, int((self.rate or 1e9) / 8 * 0.004)))
        )

    def rules(self, device: str) -> list[list[str]]:
        """The tc commands that make `device` this slow."""
        if self.rate is None:
            return []
        burst = max(16_000, 2 * self.packet if self.delay else 0, int(self.rate / 8 * 0.002))
        rate = ["rate", f"{int(self.rate)}bit", "burst", str(burst), "latency", "400ms"]
        return [["tc", "qdisc", "add", "dev", device, "root", "tbf", *rate]]


def why_not(wire: Wire | None = None) -> str:
    """Why two ranks cannot be put on such a wire (None: on one of 1 Gbit/s) here; "" if they can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"`{tool}` is not installed (package iproute2)"
    try:
        with namespaces(2, wire if wire is not None else Wire(1e9)):
            return ""
    except LinksNotPermitted as error:
        return str(error)


@contextmanager
def namespaces(ranks: int, wire: Wire) -> Iterator[list[str]]:
    """Names of `ranks` namespaces joined by such a wire; rank r has address 10.213.0.(r + 1) on device `weft0`.

    Raises:
        LinksNotPermitted: the kernel or the user's rights do not allow it.
    """
    if ranks < 1:
        raise ValueError(f"namespaces: ranks must be >= 1, got {ranks}")
    _sweep()
    tag = f"weft{os.getpid()}x{time.monotonic_ns() % 10**6}"
    names = [f"{tag}r{rank}" for rank in range(ranks)]
    hub = f"{tag}hub"
    made: list[str] = []
    relay: subprocess.Popen[bytes] | None = None
    try:
        for name in [*names, *([hub] if ranks > 2 else [])]:
            _ip("ip", "netns", "add", name)
            made.append(name)
            _ip("ip", "-n", name, "link", "set", "lo", "up")
        if wire.delay and ranks != 2:
            raise LinksNotPermitted(f"a delay needs exactly two ranks, got {ranks}")
        if wire.delay:
            relay = _relay(names, wire)
        elif ranks == 2:
            _ip("ip", "-n", names[0], "link", "add", DEVICE, "type", "veth", "peer", "name", DEVICE, "netns", names[1])
        elif ranks > 2:
            _ip("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
            _ip("ip", "-n", hub, "link", "set", "bridge", "up")
            for rank, name in enumerate(names):
                port = f"port{rank}"
                _ip("ip", "-n", hub, "link", "add", port, "type", "veth", "peer", "name", DEVICE, "netns", name)
                _ip("ip", "-n", hub, "link", "set", port, "master", "bridge", "up")
        for rank, name in enumerate(names):
            if ranks > 1:
                _ip("ip", "-n", name, "address", "add", f"10.213.{rank // 250}.{rank % 250 + 1}/16", "dev", DEVICE)
                mtu = ["mtu", str(wire.packet)] if wire.delay else []
                _ip("ip", "-n", name, "link", "set", DEVICE, *mtu, "txqueuelen", "10000", "up")
                for rule in wire.rules(DEVICE):
                    _ip("ip", "netns", "exec", name, *rule)
        yield names
    finally:
        if relay is not None:
            relay.kill()
            relay.wait(30)
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30, check=False)


def on_links(
    target: str, ranks: int, wire: Wire, options: dict[str, Any] | None = None, timeout: float = 300.0
) -> list[Any]:
    """Run `module:function(**options)` on every rank, with gloo initialised; the results in rank order.

    Args:
        target: `package.module:function`; its result must pickle.
        ranks: how many.
        wire: what joins them.
        options: keyword arguments.
        timeout: seconds for all of it.
    Raises:
        LinksNotPermitted: see `namespaces`.
        RuntimeError: a rank failed (with the end of what it printed), or did not end in time.
    """
    with namespaces(ranks, wire) as names, tempfile.TemporaryDirectory() as folder:
        started: list[subprocess.Popen[bytes]] = []
        try:
            for rank, name in enumerate(names):
                job = Path(folder) / f"{rank}.job"
                job.write_bytes(pickle.dumps((target, options or {}, timeout)))
                environment = {
                    **os.environ,
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "10.213.0.1" if ranks > 1 else "127.0.0.1", "MASTER_PORT": str(PORT),
                    "GLOO_SOCKET_IFNAME": DEVICE if ranks > 1 else "lo", "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                }  # fmt: skip
                with (Path(folder) / f"{rank}.log").open("wb") as log:
                    command = ["ip", "netns", "exec", name, sys.executable, "-c", WORKER, str(job)]
                    started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
            _wait(started, timeout)
            results = []
            for rank, process in enumerate(started):
                answer = Path(folder) / f"{rank}.result"
                if process.returncode or not answer.exists():
                    said = (Path(folder) / f"{rank}.log").read_text(errors="replace")[-3000:]
                    ended = (
                        "did not end in time"
                        if process.returncode in (None, -9)
                        else f"ended with {process.returncode}"
                    )
                    raise RuntimeError(f"rank {rank} of {target} on {wire} {ended}:\n{said}")
                results.append(pickle.loads(answer.read_bytes()))
            return results
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
                process.wait(30)


def interface_bytes(table: str | None = None, device: str = DEVICE) -> tuple[int, int]:
    """(received, sent) bytes of this namespace's interface since it was made; `table` stands in for /proc/net/dev in tests."""
    for line in (Path("/proc/net/dev").read_text() if table is None else table).splitlines():
        name, _, fields = line.partition(":")
        if name.strip() == device:
            numbers = fields.split()
            return int(numbers[0]), int(numbers[8])
    raise RuntimeError(f"no interface {device} here; call this inside on_links")


def serve(job: str) -> None:
    """One rank: run the job of a file, write the result beside it."""
    import torch.distributed as dist

    path = Path(job)
    target, options, timeout = pickle.loads(path.read_bytes())
    from datetime import timedelta

    import torch

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    module, _, function = target.partition(":")
    result = getattr(importlib.import_module(module), function)(**options)
    path.with_suffix(".result").write_bytes(pickle.dumps(result))
    dist.barrier()
    os._exit(0)  # no goodbye over slow links


def _wait(started: Sequence[subprocess.Popen[bytes]], timeout: float) -> None:
    """Until all have ended, one has failed (others get five seconds more), or the time is up."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and any(process.poll() is None for process in started):
        if any(process.poll() for process in started):
            deadline = min(deadline, time.monotonic() + 5)
        time.sleep(0.02)


def _sweep() -> None:
    """Remove namespaces of processes that were killed before they could."""
    try:
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, timeout=30, check=False, text=True).stdout
    except (OSError, subprocess.TimeoutExpired):
        return
    for line in listed.splitlines():
        found = re.match(r"(weft(\d+)x\d+\w+)", line)
        if found and not Path(f"/proc/{found[2]}").exists():
            subprocess.run(["ip", "netns", "delete", found[1]], capture_output=True, timeout=30, check=False)


def _relay(names: Sequence[str], wire: Wire) -> subprocess.Popen[bytes]:
    """The process that carries packets between two namespaces; it has made the devices when this returns."""
    command = [sys.executable, "-m", "weft.bench.delay", *names, DEVICE, str(wire.delay)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    relay = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert relay.stdout is not None and relay.stderr is not None
    if relay.stdout.readline().strip() != b"ready":
        said = relay.stderr.read().decode(errors="replace").strip().splitlines()[-1:]
        relay.wait(30)
        raise LinksNotPermitted(f"no tunnel devices for a delay: {''.join(said)}; /dev/net/tun is needed")
    return relay


def _ip(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, check=False, text=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LinksNotPermitted(f"`{' '.join(command)}` failed: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise LinksNotPermitted(
            f"`{' '.join(command)}` failed: {said}. Ranks on slow links need root and the kernel's veth and tbf"
        )
