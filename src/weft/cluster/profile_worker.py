"""One process of `weft profile`: runs every probe beside its peers and returns what it measured, as plain numbers.

`measure` needs a process group (torchrun's, or the one that `main` makes from a file for processes that `weft.cluster.profiler`
started). Every wait is bounded: the process group has a timeout, and a process whose parent is gone ends itself.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from weft.cluster import probes
from weft.cluster.topology import machine_memory

__all__ = ["main", "measure"]

SIZES = (1 << 10, 16 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)  # bytes of the collectives' tensors
QUICK_SIZES = (1 << 10, 64 << 10, 1 << 20, 8 << 20)


def measure(
    quick: bool, host: str | None = None, offload: str = "", copies: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """Run all probes with the default process group; every process of it must call this.

    Returns, as JSON types, for this process: "host", "kind", "device", "memory", "operators" [(kind, label, phases, seconds)],
    "dtypes" {dtype: speed relative to float32}, "disturbance", "links" [(level, collective, nbytes, ranks, seconds)], "overlap";
    with `offload` the fields of what `copies(offload, device, quick, sharing)` gives, as "copies".
    """
    world, device = dist.group.WORLD, _device()
    assert world is not None
    window = 0.05 if quick else 0.15
    result: dict[str, Any] = {
        "host": host or platform.node() or "localhost",
        "device": str(device),
        **_identity(device),
    }
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, result["host"])
    sharing = hosts.count(result["host"])
    clock = probes.Clock(device, window, world, sharing / len(os.sched_getaffinity(0)))
    result["memory"] = _memory(device, sharing)
    result["operators"] = []
    probes.settle_memory()
    for probe in probes.operator_probes(quick):
        phases = [(phase.calls, phase.flops, phase.nbytes) for phase in probe.phases]
        result["operators"].append((probe.kind, probe.label, phases, clock.computing(probe.build(device))))
    result["dtypes"] = _dtypes(device, clock)
    result["disturbance"] = clock.disturbance
    result["links"], result["overlap"] = [], 1.0
    for level, ranks in _levels(hosts):
        group = dist.new_group(ranks)
        if dist.get_rank() not in ranks:
            continue
        own = probes.Clock(device, window, group)
        for name in probes.COLLECTIVES:
            for nbytes in QUICK_SIZES if quick else SIZES:
                seconds = own.between_computing(probes.collective(name, nbytes, device, group))
                if name != "send":
                    result["links"].append((level, name, nbytes, list(ranks), seconds))
                elif ranks.index(dist.get_rank()) ^ 1 < len(ranks):
                    result["links"].append((level, name, nbytes, list(ranks), seconds / 2))
    if dist.get_world_size() > 1:
        result["overlap"] = probes.measure_overlap(device, world, probes.Clock(device, 3 * window, world))
    if offload:
        assert copies is not None
        dist.barrier()  # all copy at once
        result["copies"] = vars(copies(offload, device, quick, sharing))
    return result


def _levels(hosts: list[str]) -> list[tuple[str, list[int]]]:
    """(level, ranks) of the groups to measure: each host with several processes, then one process of each host.

    Every process makes all groups in this order, as `new_group` asks.
    """
    by_host: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        by_host.setdefault(host, []).append(rank)
    inside = [("host", ranks) for ranks in by_host.values() if len(ranks) > 1]
    return inside + ([("network", [ranks[0] for ranks in by_host.values()])] if len(by_host) > 1 else [])


def _device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _identity(device: torch.device) -> dict[str, str]:
    if device.type == "cuda":
        return {"kind": torch.cuda.get_device_name(device), "machine": platform.machine()}
    return {"kind": "cpu-core", "machine": _processor()}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return f"{names[0]} x{len(names)}" if names else platform.processor() or platform.machine()


def _memory(device: torch.device, sharing: int) -> int:
    """Bytes for this process: all of its GPU's, or its share of the host's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return machine_memory() // sharing


def _dtypes(device: torch.device, clock: probes.Clock) -> dict[str, float]:
    seconds = {name: clock.computing(build(device)) for name, build in probes.dtype_probes()}
    return {name: seconds["float32"] / value for name, value in seconds.items()}


def main(arguments: list[str]) -> int:
    """`python -m weft.cluster.profile_worker RENDEZVOUS_FILE RANK PROCESSES QUICK TIMEOUT OUTPUT [OFFLOAD MODULE:FUNCTION]`

    Writes JSON to OUTPUT.
    """
    rendezvous, rank, processes, quick, timeout, output, *below = arguments
    _end_with_parent()
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=float(timeout))
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(processes), timeout=limit
    )
    offload, copies = "", None
    if below:
        offload, (module, _, function) = below[0], below[1].partition(":")
        copies = getattr(importlib.import_module(module), function)
    result = measure(quick == "1", offload=offload, copies=copies)
    partial = f"{output}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(result, file)
    os.replace(partial, output)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _end_with_parent() -> None:
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
