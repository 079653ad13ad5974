"""`weft profile`: measure this machine, or the processes under torchrun, and make a `Cluster` of it.

    1. start the processes (unless torchrun did), all at once: they contend for cores, memory and wires as in training
    2. every process times real operators and collectives                                        `weft.cluster.probes`
    3. fit a roofline per operator kind and a latency and bandwidth per level                    `weft.cluster.fit`
    4. devices of one host that are the same machine get the same figures, the medians over its processes
    5. if asked, a tier below each device: copies there and back, again by all at once, and its free room shared out  `tier_of`

Nothing waits without a bound, started processes end with this one, and a failure is a `ProfileError` that shows the failing
process's last words.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from weft.cluster import costs
from weft.cluster.device import ClusterError, Device, Link, Rate, Tier
from weft.cluster.library import STEP
from weft.cluster.topology import Cluster, Level
from weft.errors import WeftError

__all__ = ["ProfileError", "ProfileReport", "profile"]

WORKER = "weft.cluster.profile_worker"
STARTING = 90.0  # seconds that importing torch may take on a busy machine
MEASURING = {True: 120.0, False: 300.0}  # seconds the probes may take, by `quick`: many times what they need


class ProfileError(WeftError, RuntimeError):
    """Measuring failed: a process died, or did not finish in time. `rank` is that process, `output` the end of what it wrote."""

    def __init__(self, rank: int, problem: str, output: str):
        super().__init__(rank, problem, output)
        self.rank, self.problem, self.output = rank, problem, output

    def __str__(self) -> str:
        tail = f" Its last words:\n{self.output}" if self.output else " It wrote nothing."
        return f"profile: process {self.rank} {self.problem}.{tail}"


@dataclass(frozen=True)
class ProfileReport:
    """How well the fitted figures reproduce what was measured.

    Attributes:
        processes: how many measured at once.
        seconds: wall time of the whole profile.
        disturbance: fraction of the time that other programs held the cores; above a tenth, links and overlap are doubtful.
        machine: host name -> processor or GPU.
        operators: for each operator kind, (label, measured seconds, predicted seconds) of its samples.
        collectives: likewise, by "level collective"; copies to a tier by "disk copies" or "host copies".
        offload: what the tiers lie on, by host.
    """

    processes: int
    seconds: float
    disturbance: float
    machine: Mapping[str, str]
    operators: Mapping[str, tuple[tuple[str, float, float], ...]]
    collectives: Mapping[str, tuple[tuple[str, float, float], ...]]
    offload: Mapping[str, str] = field(default_factory=dict)

    def error(self, name: str) -> float:
        """Median relative error of an operator kind or a collective ("host all_reduce")."""
        rows = self.operators.get(name) or self.collectives[name]
        return median(abs(predicted - measured) / measured for _, measured, predicted in rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the fields above, and the median relative errors."""
        errors = {name: self.error(name) for name in (*self.operators, *self.collectives)}
        both = {"operators": self.operators, "collectives": self.collectives}
        tables = {
            what: {name: [list(row) for row in rows] for name, rows in table.items()} for what, table in both.items()
        }
        return {
            "processes": self.processes,
            "seconds": self.seconds,
            "disturbance": self.disturbance,
            "machine": dict(self.machine),
            "offload": dict(self.offload),
            "errors": errors,
            **tables,
        }

    def __str__(self) -> str:
        where = ", ".join(f"{host} ({machine})" for host, machine in self.machine.items())
        lines = [f"measured with {self.processes} process(es) at once on {where} in {self.seconds:.1f} s"]
        if self.disturbance > 0.1:
            lines.append(
                f"warning: other programs had {self.disturbance:.0%} of the cores' time; latencies and overlap are doubtful, "
                "measure again on a quiet machine"
            )
        lines += [f"{host} offloads to {place}" for host, place in self.offload.items()]
        for title, table in (("operators", self.operators), ("collectives", self.collectives)):
            if table:
                lines.append(
                    f"{title + ', forward and backward' if title == 'operators' else title:34} measured   predicted   error"
                )
            for name, rows in table.items():
                lines.append(f"  {name}: median error {self.error(name):.0%}")
                lines += [
                    f"    {label:30} {_time(measured):>10}  {_time(predicted):>10}  {predicted / measured - 1:+6.0%}"
                    for label, measured, predicted in rows
                ]
        return "\n".join(lines)


def profile(
    processes: int = 2,
    quick: bool = False,
    *,
    host: str | None = None,
    timeout: float | None = None,
    offload: str = "",
    copies: Callable[..., Any] | None = None,
) -> tuple[Cluster, ProfileReport]:
    """Measure devices and links as training will use them: all processes at once, one intra-op thread each.

    Under torchrun its processes measure (every one must call this, and every one gets the result); otherwise `processes`
    processes are started on this machine and end with the call.

    Args:
        processes: how many to start, >= 1; ignored under torchrun.
        quick: fewer sizes and shorter samples: under 20 s, and less exact.
        host: what to call this host; by default its node name.
        timeout: seconds after which a process counts as stuck; the default is many times what measuring takes.
        offload: also measure the tier below each device: a folder of a disk, or "host" for accelerators.
        copies: what measures it, called as `copies(offload, device, quick, sharing)` in every process:
            `weft.memory.tiers.copies`, of a package that this one knows nothing of.
    Returns:
        The cluster, and a report of how well it reproduces the measurements.
    Raises:
        ClusterError: `processes` is below 1, or `offload` comes without `copies`.
        ProfileError: a process died or got stuck.
    """
    begin = time.monotonic()
    if offload and copies is None:
        raise ClusterError("", "offload is measured by what `copies` says; give weft.memory.tiers.copies")
    limit = timeout if timeout is not None else STARTING + MEASURING[quick]
    if "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        results = _under_torchrun(quick, host, limit, offload, copies)
    else:
        if processes < 1:
            raise ClusterError("", f"processes must be >= 1, got {processes}")
        results = _started(processes, quick, limit, offload, copies)
    return assemble(results, lambda: time.monotonic() - begin)


# -- running the processes ---------------------------------------------------------------------------------------------


def _under_torchrun(
    quick: bool, host: str | None, limit: float, offload: str, copies: Callable[..., Any] | None
) -> list[dict[str, Any]]:
    import torch
    import torch.distributed as dist

    from weft.cluster.profile_worker import measure

    ours = not dist.is_initialized()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if ours:
            local = int(os.environ.get("LOCAL_RANK", "0"))
            on_gpu = torch.cuda.is_available() and torch.cuda.device_count() > local
            if on_gpu:
                torch.cuda.set_device(local)
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(seconds=limit))
        own = measure(quick, host, offload, copies)
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, own)
        return results
    except (OSError, RuntimeError, ValueError) as error:
        raise ProfileError(int(os.environ.get("RANK", "-1")), "could not measure with its peers", str(error)) from error
    finally:
        torch.set_num_threads(threads)
        if ours and dist.is_initialized():
            dist.destroy_process_group()


def _started(
    processes: int, quick: bool, limit: float, offload: str = "", copies: Callable[..., Any] | None = None
) -> list[dict[str, Any]]:
    """Start the processes, wait for their results, and end them whatever happens."""
    package = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH", "")]))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {**os.environ, **threads, "PYTHONPATH": path}
    below = [] if copies is None else [offload, f"{copies.__module__}:{copies.__qualname__}"]
    with tempfile.TemporaryDirectory(prefix="weft-profile-") as folder:
        running: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(processes):
                arguments = [
                    f"{folder}/rendezvous",
                    str(rank),
                    str(processes),
                    str(int(quick)),
                    str(limit),
                    f"{folder}/{rank}.json",
                    *below,
                ]
                with open(f"{folder}/{rank}.log", "wb") as log:
                    command = [sys.executable, "-m", WORKER, *arguments]
                    running.append(
                        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
                    )
            _wait(running, Path(folder), limit)
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
            for process in running:
                process.wait()
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(processes)]


def _wait(running: Sequence[subprocess.Popen[bytes]], folder: Path, limit: float) -> None:
    deadline = time.monotonic() + limit
    while True:
        codes = [process.poll() for process in running]
        for rank, code in enumerate(codes):
            if code:
                raise ProfileError(rank, f"ended with status {code}", _tail(folder / f"{rank}.log"))
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            rank = next(rank for rank, code in enumerate(codes) if code is None)
            raise ProfileError(rank, f"did not finish within {limit:.0f} s", _tail(folder / f"{rank}.log"))
        time.sleep(0.05)


def _tail(log: Path, lines: int = 15) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").strip().splitlines()[-lines:])
    except OSError:
        return ""


# -- from measurements to a cluster ------------------------------------------------------------------------------------


def assemble(results: Sequence[dict[str, Any]], elapsed: Any = lambda: 0.0) -> tuple[Cluster, ProfileReport]:
    """The cluster of what `profile_worker.measure` returned in each process, and the report of its fits."""
    alike: dict[tuple[str, str, str], list[int]] = {}
    for rank, result in enumerate(results):
        alike.setdefault((result["host"], result["kind"], result["machine"]), []).append(rank)
    devices: list[Device | None] = [None] * len(results)
    operators: dict[str, tuple[tuple[str, float, float], ...]] = {}
    tables: dict[str, tuple[tuple[str, float, float], ...]] = {}
    hosts, places = [result["host"] for result in results], {}
    for (host, kind, _), ranks in alike.items():
        rates, fits = _rates([results[rank] for rank in ranks])
        memory = min(results[rank]["memory"] for rank in ranks)
        overlap = round(median(results[rank]["overlap"] for rank in ranks), 3)
        tier = None
        if "copies" in results[ranks[0]]:
            tier, rows = tier_of([results[rank]["copies"] for rank in ranks], hosts.count(host))
            tables[f"{tier.name} copies" if len(alike) == 1 else f"{host} {kind} {tier.name} copies"] = rows
            places[host] = f"{tier.folder or tier.name} ({results[ranks[0]]['copies']['place']})"
        for rank in ranks:
            devices[rank] = Device(f"{host}-{rank}", kind, memory, rates, host, overlap, tier, STEP)
        for name, rows in fits.items():
            operators[name if len(alike) == 1 else f"{host} {kind} {name}"] = rows
    levels, collectives = _levels(results)
    disturbance = max(result["disturbance"] for result in results)
    cluster = Cluster(tuple(device for device in devices if device is not None), tuple(levels), name="measured")
    machines = {
        result["host"]: result["machine"] if result["kind"] == "cpu-core" else result["kind"] for result in results
    }
    collectives.update(tables)
    return cluster, ProfileReport(len(results), elapsed(), disturbance, machines, operators, collectives, places)


def tier_of(measured: Sequence[Mapping[str, Any]], sharing: int) -> tuple[Tier, tuple[tuple[str, float, float], ...]]:
    """The tier below devices that are alike, and its fit, from what `copies` found in each of their processes: "to", "folder",
    "room" in bytes, "seconds" [(bytes of a copy, there, back)], "overlap".

    Copies there and back share one link, so that their mean is fitted; the rows say how far each direction is from it.

    Args:
        sharing: processes of the machine, which share the room.
    """
    from weft.cluster.fit import CollectiveSample, fit_link

    sizes = [nbytes for nbytes, _, _ in measured[0]["seconds"]]
    both = [[median(one["seconds"][n][way] for one in measured) for way in (1, 2)] for n in range(len(sizes))]
    samples = [CollectiveSample("", 1.0, nbytes, sum(pair) / 2) for nbytes, pair in zip(sizes, both, strict=True)]
    link = _rounded(fit_link("copies", samples)[0])
    tier = Tier(
        link.bandwidth,
        link.latency,
        min(one["room"] for one in measured) // sharing,
        measured[0]["to"],
        measured[0]["folder"],
        None if measured[0]["overlap"] is None else median(one["overlap"] for one in measured),
    )
    rows = [
        (f"{_size(nbytes)} {way}", seconds, tier.seconds(nbytes))
        for nbytes, pair in zip(sizes, both, strict=True)
        for way, seconds in zip(("there", "back"), pair, strict=True)
    ]
    return tier, tuple(rows)


def _rates(
    results: Sequence[dict[str, Any]],
) -> tuple[dict[str, Rate], dict[str, tuple[tuple[str, float, float], ...]]]:
    """Rates of devices that are alike, from the medians over their processes."""
    from weft.cluster.fit import OperatorSample, Phase, fit_rate

    samples: dict[str, list[OperatorSample]] = {}
    for number, (kind, label, phases, _) in enumerate(results[0]["operators"]):
        seconds = median(result["operators"][number][3] for result in results)
        samples.setdefault(kind, []).append(OperatorSample(label, tuple(Phase(*phase) for phase in phases), seconds))
    speed = {dtype: median(result["dtypes"][dtype] for result in results) for dtype in results[0]["dtypes"]}
    rates, fits = {}, {}
    for kind, found in samples.items():
        rate, fit = fit_rate(kind, found)
        products = kind in ("matmul", "conv", "attention", "recurrent")
        flops = {
            dtype: float(f"{rate.flops['float32'] * (factor if products else 1.0):.4g}")
            for dtype, factor in speed.items()
        }
        rates[kind] = Rate(flops, float(f"{rate.bandwidth:.4g}"), float(f"{rate.overhead:.4g}"))
        fits[kind] = fit.samples
    return rates, fits


def _levels(results: Sequence[dict[str, Any]]) -> tuple[list[Level], dict[str, tuple[tuple[str, float, float], ...]]]:
    """Levels of the topology: each host, then the network that joins them, with a fitted link for each group."""
    from weft.cluster.fit import CollectiveSample, fit_link

    measured: dict[tuple[str, tuple[int, ...]], dict[tuple[str, int], list[float]]] = {}
    for result in results:
        for level, name, nbytes, ranks, seconds in result["links"]:
            measured.setdefault((level, tuple(ranks)), {}).setdefault((name, nbytes), []).append(seconds)
    links: dict[tuple[str, tuple[int, ...]], Link] = {}
    tables: dict[str, tuple[tuple[str, float, float], ...]] = {}
    for (level, ranks), rows in measured.items():
        samples = []
        for (name, nbytes), seconds in rows.items():
            messages, fraction = collective_shape(name, len(ranks))
            samples.append(CollectiveSample(f"{name} {_size(nbytes)}", messages, fraction * nbytes, median(seconds)))
        links[level, ranks], fit = fit_link(level, samples)
        several = sum(other == level for other, _ in measured) > 1
        for row in fit.samples:
            title = f"{level}{list(ranks) if several else ''} {row[0].split()[0]}"
            tables[title] = (*tables.get(title, ()), row)
    return _joined(results, links), tables


def _joined(results: Sequence[dict[str, Any]], links: Mapping[tuple[str, tuple[int, ...]], Link]) -> list[Level]:
    count = len(results)
    by_host: dict[str, list[int]] = {}
    for rank, result in enumerate(results):
        by_host.setdefault(result["host"], []).append(rank)
    groups = tuple(tuple(ranks) for ranks in by_host.values())
    levels = []
    if count > 1 and any(len(group) > 1 for group in groups):
        levels.append(
            Level("host", groups, tuple(_rounded(links[("host", g)]) if len(g) > 1 else Link(0.0, 1.0) for g in groups))
        )
    if len(groups) > 1:
        heads = tuple(group[0] for group in groups)
        levels.append(Level("network", (tuple(range(count)),), (_rounded(links[("network", heads)], shared=True),)))
    return levels


def _rounded(link: Link, shared: bool = False) -> Link:
    return Link(float(f"{link.latency:.4g}"), float(f"{link.bandwidth:.4g}"), shared)


def collective_shape(collective: str, p: int) -> tuple[float, float]:
    """(latencies, fraction of the bytes that cross one link) of a collective over p equal links, by `weft.cluster.costs`.

    Found by pricing it on links of latency 1 and no cost per byte, and the other way round; where there is a choice by the
    ring, which is what gloo and NCCL use for large tensors.
    """
    if collective == "send":
        return 1.0, 1.0
    ranks, device = tuple(range(p)), Device("d", "d", 1, {"default": Rate({"float32": 1.0}, 1.0)})
    devices = tuple(Device(f"d{i}", "d", 1, device.rates) for i in ranks)
    price = getattr(costs, collective)
    which = {"algorithm": "tree"} if collective == "broadcast" else {"algorithm": "ring"}
    latency = price(Cluster(devices, (Level("all", (ranks,), (Link(1.0, 1e30),)),)), ranks, 1.0, **which)
    fraction = price(Cluster(devices, (Level("all", (ranks,), (Link(0.0, 1.0),)),)), ranks, 1.0, **which)
    return latency, fraction


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
