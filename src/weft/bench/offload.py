"""Training from disk: what is compared in `zero-infinity`.

Steps for `weft.bench.pair`, all on one GPT with the same batches:

    tiered      weft: parameters and optimizer state on disk, in turns (`overlap=False`) or at the same time
    mapped      parameters, gradients and state in memory-mapped files (`torch.from_file`), at most `cap` bytes of them resident
    raw         nothing but the bytes that weft moves, by plain threads: what the disk alone takes
    reader, raw_reader      reading one file with `weft.memory.tiers`, and with plain threads
    waiting     activations within a share of what they take, copied to the disk and back by `weft.memory.limit`
    gathered, broadcast     fetching parameters over links that a token bucket throttles, one per process

`mapped` is kept fair: the kernel's own readahead serves it (megabytes for each page that is missing), its activations do not
count, and what exceeds the cap is written and taken away a whole tensor at a time, least recently used first, when a gradient or
an update is done (the kernel, short of memory, does it page by page and at any moment). It needs no privileges, unlike a control
group. In its favour, parameters that forward and backward read stay besides until their update: `resident` says how many bytes
that makes in all.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from weft.bench.pair import Problem, Step

__all__ = [
    "Bucket",
    "broadcast",
    "gathered",
    "gpt_wide",
    "links",
    "mapped",
    "peak",
    "predicted",
    "raw",
    "raw_reader",
    "reader",
    "resident",
    "tiered",
    "waiting",
]


def gpt_wide(
    layers: int = 4, width: int = 768, batch: int = 1, tokens: int = 64, count: int = 4, seed: int = 0
) -> Problem:
    """A GPT of 28 million parameters by default: 454 MB of parameters, gradients and Adam state."""
    import torch

    from weft.bench.problems import gpt_on_text
    from weft.nn import GPT, GPTOptions

    batches = gpt_on_text(batch=batch, tokens=tokens, count=count, seed=seed).batches
    options = GPTOptions(vocabulary=256, context=tokens, layers=layers, heads=width // 64, width=width, tied=False)
    return Problem(partial(GPT, options), batches, partial(torch.optim.AdamW, lr=3e-4, fused=True), seed)


def _numel(problem: Problem) -> int:
    return sum(parameter.numel() for parameter in problem.model().parameters())


# ---- weft


def predicted(rates: Mapping[str, float], compute: float, overlap: bool, **sizes: int) -> float:
    """Seconds of a step of `tiered`, from the disk's rates (`read` and `write`) and the seconds of computing alone.

    `sizes` are those of `gpt_wide`.
    """
    from weft.memory.tiers import Room, Tiers, traffic

    tiers = Tiers("disk", "host" if overlap else "disk", "disk")
    moved = traffic(tiers, 4 * _numel(gpt_wide(**sizes)), reused=overlap)
    disk = Room(float("inf"), rates["read"], rates["write"])
    return moved.seconds(compute, {"disk": disk}, overlapped=overlap)


@contextlib.contextmanager
def tiered(problem: Problem, overlap: bool = True) -> Iterator[Step]:
    """Parameters and optimizer state on disk; a gradient is in memory until its update, which is at once with `overlap`."""
    from weft.memory.tiers import Tiered, Tiers

    model = problem.model()
    options: dict[str, Any] = {"update": "backward", "buffers": 4, "chunk": "4 MiB", "ahead": "16 MiB"}
    if not overlap:
        options = {"update": "step", "buffers": 1, "chunk": "4 MiB", "ahead": 1}
    gradients = "host" if overlap else "disk"
    with (
        tempfile.TemporaryDirectory(prefix="weft-bench-") as folder,
        Tiered(model, problem.optimizer, Tiers("disk", gradients, "disk"), folder, **options) as run,
    ):
        disk = run.disk
        assert disk is not None
        moved: list[tuple[int, int]] = []

        def step(batch: tuple[Any, ...]) -> Any:
            before = disk.bytes_read, disk.bytes_written
            loss = model(*batch)
            loss.backward()
            run.step()
            moved.append((disk.bytes_read - before[0], disk.bytes_written - before[1]))
            return loss.detach()

        def facts() -> dict[str, float]:
            return {"read_bytes": float(moved[-1][0]), "written_bytes": float(moved[-1][1])}

        yield Step(step, facts=facts)


@contextlib.contextmanager
def waiting(problem: Problem, share: float) -> Iterator[Step]:
    """Activations within `share` of their bytes, or the least that will do, by copies alone: no operator is repeated, so that
    what copies cost is all that differs from training in memory. `predicted` is the plan's seconds over those of the step as
    traced."""
    from dataclasses import replace

    from weft.memory import least, limit, plan, trace
    from weft.memory.tiers import measured

    model = problem.model()
    optimizer = problem.optimizer(model.parameters())
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        whole = trace(model, problem.batches[0], optimizer=problem.optimizer)
        kept = replace(whole, ops=tuple(replace(op, repeatable=False) for op in whole.ops))
        tier = measured(folder, quick=False)
        found = plan(kept, max(int(kept.fixed + share * (kept.peak - kept.fixed)), least(kept, tier)), tier=tier)
        # 64 KiB for what the trace does not have
        context = limit(replace(found, budget=found.budget + (64 << 10)), model=model)

        def step(batch: tuple[Any, ...]) -> Any:
            if context.resting:
                context.wake()
            else:
                context.__enter__()
            optimizer.zero_grad()
            loss = model(*batch)
            loss.backward()
            optimizer.step()
            context.step()
            context.rest()
            return loss.detach()

        def facts() -> dict[str, float]:
            return {
                "predicted": found.seconds / kept.seconds, "copied_bytes": float(found.checked.saved_bytes),
                "waited_seconds": found.checked.waited_seconds, "bandwidth": tier.bandwidth, "latency": tier.latency,
                "overlap": tier.hidden, "notes": float(len(context.notes)),
            }  # fmt: skip

        yield Step(step, facts=facts)
        context.wake()
        context.__exit__(None, None, None)


def peak(steps: int = 2, **options: Any) -> float:
    """Most bytes of tensors in steps of `tiered`, by the meter that sees what other threads give back too."""
    from weft.memory.meters import meter

    problem = gpt_wide()
    with meter() as meter_, tiered(problem, **options) as step:
        step.run(problem.batches[0])
        meter_.reset_peak()
        for turn in range(steps):
            step.run(problem.batches[1 + turn])
        return float(meter_.peak)


# ---- memory-mapped files


class Resident:
    """Which mapped tensors are in memory, as far as one wants to know: touched ones stay until `cap` bytes of others came."""

    def __init__(self, cap: int):
        self.cap = cap
        self.known: dict[int, int] = {}  # address -> bytes of all that were ever touched
        self._there: OrderedDict[int, tuple[int, int, int]] = OrderedDict()  # address -> (address, bytes, descriptor)
        self._libc = ctypes.CDLL(None, use_errno=True)

    def touched(self, tensor: Any, fd: int) -> None:
        """A tensor has been used, and perhaps written."""
        address, nbytes = tensor.data_ptr(), tensor.nbytes
        self.known[address] = nbytes
        self._there.pop(address, None)
        self._there[address] = (address, nbytes, fd)
        while sum(size for _, size, _ in self._there.values()) > self.cap and len(self._there) > 1:
            _, (start, size, descriptor) = self._there.popitem(last=False)
            os.fdatasync(descriptor)
            if self._libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED):
                raise OSError(ctypes.get_errno(), "madvise failed")
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def nbytes(self) -> int:
        """Bytes of mapped tensors that the page cache has now."""
        found = 0
        for address, nbytes in self.known.items():
            pages = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
            if self._libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), pages):
                raise OSError(ctypes.get_errno(), "mincore failed")
            found += bytes(pages).count(1) * mmap.PAGESIZE
        return found


def resident(cap: int) -> float:
    """Bytes of mapped tensors in memory when a step of `mapped` has finished its backward: the most there are in a step."""
    problem = gpt_wide(count=1)
    with mapped(problem, cap, watched=True) as step:
        for _ in range(2):
            step.run(problem.batches[0])
        return step.facts()["resident_bytes"]


@contextlib.contextmanager
def mapped(problem: Problem, cap: int, watched: bool = False) -> Iterator[Step]:
    """Parameters, gradients and Adam's state in shared mappings of files, one per tensor; about `cap` bytes resident.

    `watched` steps also say how many are.
    """
    import torch

    model, there = problem.model(), Resident(cap)
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder, contextlib.ExitStack() as stack:

        def on_disk(name: str, values: Any) -> tuple[Any, int]:
            path = os.path.join(folder, name)
            tensor = torch.from_file(path, shared=True, size=values.numel(), dtype=values.dtype).view(values.shape)
            tensor.copy_(values)
            fd = os.open(path, os.O_RDWR)
            stack.callback(os.close, fd)
            there.touched(tensor, fd)
            return tensor, fd

        optimizers = []
        for index, parameter in enumerate(model.parameters()):
            parameter.data, own = on_disk(f"{index}.parameter", parameter.data)
            optimizer = problem.optimizer([parameter])
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # makes its state; undone below
            state, places = optimizer.state[parameter], [(parameter.data, own)]
            for key, value in list(state.items()):
                if value.shape == parameter.shape:
                    state[key], fd = on_disk(f"{index}.{key}", torch.zeros_like(value))
                    places.append((state[key], fd))
                else:
                    value.zero_()
            parameter.grad, own = on_disk(f"{index}.gradient", torch.zeros_like(parameter))
            parameter.register_post_accumulate_grad_hook(lambda p, fd=own: there.touched(p.grad, fd))
            places.append((parameter.grad, own))
            optimizers.append((optimizer, places))
        with torch.no_grad():
            for parameter, fresh in zip(model.parameters(), problem.model().parameters(), strict=True):
                parameter.copy_(fresh)

        told: dict[str, float] = {}

        def step(batch: tuple[Any, ...]) -> Any:
            before = _moved_by_kernel()
            loss = model(*batch)
            loss.backward()
            if watched:
                told["resident_bytes"] = float(there.nbytes())
            for optimizer, places in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)  # it stays the mapping
                for tensor, fd in places:
                    there.touched(tensor, fd)
            for name, nbytes in _moved_by_kernel().items():
                told[name] = nbytes - before[name]
            return loss.detach()

        yield Step(step, facts=lambda: told)


def _moved_by_kernel() -> dict[str, float]:
    """Bytes that this process has had read from and written to devices, page faults and readahead included; none if unknown."""
    try:
        said = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return {}
    return {"read_bytes": float(said["read_bytes"]), "written_bytes": float(said["write_bytes"])}


# ---- the disk alone


class Raw:
    """A file, and plain threads that read and write it, each its own share."""

    def __init__(self, folder: str, nbytes: int, threads: int = 4, block: int = 4 << 20):
        from weft.memory.tiers.files import DiskFile, aligned

        self.each = -(-nbytes // threads // block) * block
        self.block, self.threads = block, threads
        self.file = DiskFile(Path(folder) / "raw", self.each * threads)
        self.buffers: list[Any] = [memoryview(aligned(block).zero_().numpy()) for _ in range(threads)]  # type: ignore[arg-type]
        self.pool = ThreadPoolExecutor(threads)
        self.write(nbytes)  # the first writes also allocate

    def _work(self, call: Any, index: int, nbytes: int) -> None:
        done = 0
        while done < nbytes:
            size = min(self.block, nbytes - done)
            offset = index * self.each + done % self.each
            if call(self.file.fd, [self.buffers[index][:size]], offset) != size:
                raise OSError("a short transfer")
            done += size

    def _all(self, call: Any, nbytes: int) -> None:
        share = -(-nbytes // self.threads // 4096) * 4096
        list(self.pool.map(lambda index: self._work(call, index, share), range(self.threads)))

    def read(self, nbytes: int) -> None:
        self._all(os.preadv, nbytes)
        if not self.file.direct:
            os.posix_fadvise(self.file.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def write(self, nbytes: int) -> None:
        self._all(os.pwritev, nbytes)
        self.file.sync()

    def close(self) -> None:
        self.pool.shutdown()
        self.file.close()


@contextlib.contextmanager
def raw(problem: Problem) -> Iterator[Step]:
    """The bytes that a step of `tiered` moves by the formula, and nothing else: reads, then writes."""
    from weft.memory.tiers import Tiers, traffic

    moved = traffic(Tiers("disk", "host", "disk"), 4 * _numel(problem), reused=True)
    nread, nwritten = moved.read["disk"], moved.write["disk"]
    seconds = [0.0, 0.0]
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder, contextlib.closing(Raw(folder, nread)) as file:

        def step(batch: tuple[Any, ...]) -> float:
            start = time.perf_counter()
            file.read(nread)
            middle = time.perf_counter()
            file.write(nwritten)
            seconds[:] = middle - start, time.perf_counter() - middle
            return 0.0

        def facts() -> dict[str, float]:
            rates = {"read_rate": nread / seconds[0], "write_rate": nwritten / seconds[1]}
            return {"read_bytes": float(nread), "written_bytes": float(nwritten), **rates}

        yield Step(step, facts=facts)


@contextlib.contextmanager
def raw_reader(problem: Problem, nbytes: int) -> Iterator[Step]:
    """`nbytes` by plain threads."""
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder, contextlib.closing(Raw(folder, nbytes)) as file:

        def step(batch: tuple[Any, ...]) -> float:
            file.read(nbytes)
            return 0.0

        yield Step(step)


@contextlib.contextmanager
def reader(problem: Problem, nbytes: int, transfer: int = 12 << 20) -> Iterator[Step]:
    """`nbytes` by `weft.memory.tiers.files.Disk` in transfers of a chunk's size, two ahead of the one that is waited for."""
    from weft.memory.tiers.files import Disk, DiskFile, aligned

    disk = Disk()
    count = nbytes // transfer
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        file = DiskFile(Path(folder) / "read", count * transfer)
        buffers = [aligned(transfer).zero_() for _ in range(3)]
        for index in range(count):
            disk.write(file, buffers[index % 3], index * transfer).wait()
        file.sync()

        def step(batch: tuple[Any, ...]) -> float:
            reading = [disk.read(file, buffers[index], index * transfer) for index in range(min(3, count))]
            for index in range(count):
                reading.pop(0).wait()
                if index + 3 < count:
                    reading.append(disk.read(file, buffers[index % 3], (index + 3) * transfer))
            return 0.0

        yield Step(step, facts=lambda: {"read_bytes": float(count * transfer)})
        disk.close()
        file.close()


# ---- links between a process and its tier


class Bucket:
    """A token bucket: `take(n)` returns once n bytes have passed at `rate` bytes per second, `burst` bytes at once at most."""

    def __init__(self, rate: float, burst: int = 64 << 10):
        self.rate, self.burst = rate, burst
        self._tokens, self._then = float(burst), time.perf_counter()
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> None:
        with self._lock:  # a link: what comes first goes first
            while nbytes > 0:
                now = time.perf_counter()
                self._tokens = min(self.burst, self._tokens + (now - self._then) * self.rate)
                self._then = now
                sent = min(nbytes, self._tokens)
                self._tokens -= sent
                nbytes -= sent  # type: ignore[assignment]
                if nbytes > 0:
                    time.sleep(min(nbytes, self.burst) / self.rate)


def links(parameters: int = 8, nbytes: int = 2 << 20, seed: int = 0) -> Problem:
    """Not a training: `parameters` tensors of `nbytes` each, to be fetched in order."""
    from torch import nn

    return Problem(lambda: nn.ParameterList(_tensor(i, nbytes) for i in range(parameters)), [()], None, seed)  # type: ignore[arg-type]


def _tensor(index: int, nbytes: int) -> Any:
    import torch

    return torch.full((nbytes // 4,), float(index + 1))


@contextlib.contextmanager
def gathered(problem: Problem, rate: float, ahead: int = 1) -> Iterator[Step]:
    """weft: every process reads its 1/N over its own link, then all gather; `ahead` bytes are read before they are needed."""
    import torch
    import torch.distributed as dist

    from weft.memory.tiers.fetch import Fetcher, Slot
    from weft.memory.tiers.files import Transfer
    from weft.memory.tiers.layout import shard_length, share

    model, rank, world = problem.model(), dist.get_rank(), dist.get_world_size()
    slots, bucket, pool = [], Bucket(rate), ThreadPoolExecutor(1)
    for index, parameter in enumerate(model.parameters()):
        start, stop = share(parameter.numel(), rank, world)
        each = shard_length(parameter.numel(), world)
        shape = tuple(parameter.shape)
        slots.append(Slot(index, str(index), parameter, shape, (1,), parameter.dtype, start, stop, each, "disk"))

    def read(index: int, buffer: Any) -> Transfer:
        slot = slots[index]

        def work() -> None:
            nbytes = (slot.stop - slot.start) * 4
            bucket.take(nbytes)
            buffer[:nbytes].view(torch.float32).copy_(slot.parameter.detach()[slot.start : slot.stop])

        return Transfer([pool.submit(work)])

    group = dist.group.WORLD
    fetcher = Fetcher(slots, read, lambda index, part: None, torch.device("cpu"), group, group, ahead)

    def step(batch: tuple[Any, ...]) -> float:
        total = sum(float(fetcher.fetch(slot.index)[-1]) for slot in slots)
        fetcher.settle()
        fetcher.finish()
        return total

    yield Step(step)
    pool.shutdown()


@contextlib.contextmanager
def broadcast(problem: Problem, rate: float, ahead: int = 0) -> Iterator[Step]:
    """Each parameter on one process in turn, which reads it over its link and broadcasts it; `ahead` are read early."""
    import torch
    import torch.distributed as dist

    model, rank, world = problem.model(), dist.get_rank(), dist.get_world_size()
    bucket, pool = Bucket(rate), ThreadPoolExecutor(1)
    parameters = [parameter.detach() for parameter in model.parameters()]

    def read(index: int) -> Any:
        bucket.take(parameters[index].nbytes)
        return parameters[index].clone()

    def step(batch: tuple[Any, ...]) -> float:
        total, coming = 0.0, {}
        for index, parameter in enumerate(parameters):
            for early in range(index, min(index + ahead + 1, len(parameters))):
                if early % world == rank and early not in coming:
                    coming[early] = pool.submit(read, early)
            whole = coming[index].result() if index % world == rank else torch.empty_like(parameter)
            dist.broadcast(whole, index % world)
            total += float(whole[-1])
        return total

    yield Step(step)
    pool.shutdown()
