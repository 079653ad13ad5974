"""Measuring the planner, and the profile that predictions rest on.

profiled_cluster    this machine measured into a cluster file for the time of a comparison
planning_row        seconds and bytes to capture and plan a GPT-2, in a fresh process with one thread
"""

from __future__ import annotations

import compileall
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weft.bench.system import Row

__all__ = ["planning_row", "profiled_cluster"]

# Memory is what the process grew by after torch was imported and the model (on the meta device) was built.
PROGRAM = """
import json, resource, sys, time
import torch
torch.set_num_threads(1)
import weft
from weft.bench.problems import gpt2
from weft.cluster import Cluster
devices, hosts, mesh = json.loads(sys.argv[1])
cluster = Cluster.homogeneous("A100-80GB", devices, hosts=hosts)
model, batch = gpt2(batch=max(8, devices))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start, cpu = peak(), time.perf_counter(), time.process_time()
plan = weft.plan(model, batch, cluster=cluster, mesh=tuple(mesh) if mesh else None)
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps({"planning_seconds": seconds, "planning_cpu_seconds": cpu, "planner_bytes": peak() - before,
                  "predicted_seconds": plan.prediction.seconds, "gap": plan.gap}))
"""


@contextmanager
def profiled_cluster(processes: int) -> Iterator[str]:
    """Path of a cluster file of this machine, measured now; it is gone after the block."""
    from weft.cluster import profile

    with tempfile.TemporaryDirectory(prefix="weft-profile-") as folder:
        cluster, _ = profile(processes=processes)
        path = str(Path(folder) / "cluster.yaml")
        cluster.save(path)
        yield path


def planning_row(label: str, devices: int, hosts: int, mesh: tuple[int, ...] | None = None) -> Row:
    """Capture and plan GPT-2 (12 layers, width 768, sequence 1024) for A100s, importing torch not counted.

    Importing weft's planner is counted, its modules compiled to bytecode as an installed package's are: a source tree under
    PYTHONDONTWRITEBYTECODE would be compiled anew by every process, which takes half a second.

    Raises:
        RuntimeError: planning failed; the message has its error.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    compileall.compile_dir(Path(__file__).parents[1], quiet=2)
    command = [sys.executable, "-c", PROGRAM, json.dumps([devices, hosts, mesh])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"planning for {devices} devices failed:\n{done.stderr.strip()}")
    return Row(label, **json.loads(done.stdout.splitlines()[-1]))
