"""MoNNA by real processes: five peers joined by gloo, one of them hostile, on the digits.

The hostile rank sees every honest vector of a round and sends, at once in the next, what its attack makes of them: its lies come
first, so that nobody goes on without having read them.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import time
import warnings
from datetime import timedelta
from typing import Any

import torch

from weft.bench.robust import Digits
from weft.bench.system import Row
from weft.comm.attacks import SignFlip

__all__ = ["real_run"]


def real_run(seed: int, size: int = 5, f: int = 1, steps: int = 200, limit: float = 150.0) -> Row:
    """Accuracy of the mean and the worst honest peer, under attack (MoNNA) and without one (averaging).

    Raises:
        RuntimeError: a process failed or did not end within `limit` seconds.
    """
    honest = _all_ranks(seed, size, 0, steps, limit)
    attacked = _all_ranks(seed, size, f, steps, limit)[: size - f]
    right = [found["accuracy"] for found in attacked]
    return Row(
        f"{size} gloo processes, sign flip x 10, f = {f}, alpha = 1",
        monna=sum(right) / len(right),
        monna_worst_peer=min(right),
        fault_free=sum(found["accuracy"] for found in honest) / size,
        liar_kept=sum(found["liar_kept"] for found in attacked),
        round_seconds=max(found["seconds"] for found in attacked) / steps,
    )


def _all_ranks(seed: int, size: int, liars: int, steps: int, limit: float) -> list[dict[str, float]]:
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        arguments = [(rank, size, liars, seed, steps, store, answers) for rank in range(size)]
        processes = [context.Process(target=_one_rank, args=given, daemon=True) for given in arguments]
        for process in processes:
            process.start()
        found: dict[int, dict[str, float]] = {}
        deadline = time.monotonic() + limit
        try:
            while len(found) < size:
                rank, answer = answers.get(timeout=max(deadline - time.monotonic(), 0.1))
                if isinstance(answer, str):
                    raise RuntimeError(f"rank {rank} of {size}: {answer}")
                found[rank] = answer
        except queue.Empty:
            raise RuntimeError(f"ranks {sorted(set(range(size)) - set(found))} did not end in {limit:g} s") from None
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
    return [found[rank] for rank in range(size)]


def _one_rank(rank: int, size: int, liars: int, seed: int, steps: int, store: str, answers: Any) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        limit = timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)
        answers.put((rank, _train(rank, size, liars, seed, steps)))
        dist.destroy_process_group()
    except Exception as error:
        answers.put((rank, f"{type(error).__name__}: {error}"))


def _train(rank: int, size: int, liars: int, seed: int, steps: int) -> dict[str, float]:
    import torch.distributed as dist
    from torch import nn

    from weft.comm.peer import attach_peer

    warnings.filterwarnings("ignore", message="MoNNA: n =")
    digits = Digits.shared_out(size, 1.0, seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    peer = attach_peer(model, optimizer, f=liars, beta=0.9, timeout=30.0)
    batches = digits.batches(steps, 16, seed)[:, rank]
    begin = time.monotonic()
    if rank >= size - liars:
        _lie(peer, size, steps)
    else:
        for numbers in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(digits.x[numbers]), digits.y[numbers]).backward()
            optimizer.step()
    seconds = time.monotonic() - begin
    dist.barrier()
    report = peer.report()
    peer.remove()
    with torch.no_grad():
        right = (model(digits.test_x).argmax(1) == digits.test_y).float().mean()
    kept = float(sum(count for sender, count in report.kept.items() if sender >= size - liars))
    return {"accuracy": float(right), "seconds": seconds, "liar_kept": kept}


def _lie(peer: Any, size: int, steps: int) -> None:
    vectors = torch.zeros(1, peer.post.nbytes // 4)
    for step in range(steps):
        lie = SignFlip(10.0).messages(vectors, 1, torch.Generator())[0]
        peer.post.send(step, lie.numpy().tobytes())
        came = peer.post.collect(step, size - 1, 30.0)
        if came:
            vectors = torch.stack([torch.frombuffer(bytearray(v), dtype=torch.float32) for v in came.values()])
