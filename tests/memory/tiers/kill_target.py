"""A training job to be killed: a process that imports torch once and forks a job whenever it is told to.

Reads lines `run FOLDER STEPS WORLD UPDATE`, forks WORLD ranks (joined by gloo if more than one), and answers with their process
ids. A job resumes from the folder if it can, prints the step and a digest of its parameters after resuming, and every step that
returned, and ends after STEPS steps.
"""

from __future__ import annotations

import hashlib
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from tests.memory.tiers.training import ADAMW, gpt, tokens

from weft.memory.tiers.store import Tiers
from weft.memory.tiers.tiered import Tiered

TIERS = Tiers("disk", "disk", "disk")


def digest(state: dict[str, torch.Tensor]) -> str:
    found = hashlib.blake2b(digest_size=8)
    for name in sorted(state):
        found.update(state[name].numpy().tobytes())
    return found.hexdigest()


def reference(steps: int) -> list[str]:
    """Digests of the parameters after 0, 1, ... steps in memory. Every rank sees the same rows: means are exact for two."""
    model = gpt()
    optimizer = ADAMW(model.parameters())
    found = [digest(model.state_dict())]
    for turn in range(steps):
        torch.manual_seed(turn)
        optimizer.zero_grad()
        model(*tokens(turn)).backward()
        optimizer.step()
        found.append(digest(model.state_dict()))
    return found


def job(folder: str, steps: int, rank: int, world: int, update: str) -> None:
    def say(text: str) -> None:
        os.write(1, f"{text}\n".encode())  # one call: nothing is lost in a buffer when the process is killed

    group = None
    if world > 1:
        import torch.distributed as dist

        store = dist.FileStore(f"{folder}.store.{os.getppid()}.{job.count}", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        group = dist.group.WORLD
    model = gpt()
    options = {"keep_below": 1, "chunk": 20_000, "update": update}
    with Tiered(model, ADAMW, TIERS, folder, group=group, resume=True, **options) as tiered:
        whole = digest(tiered.state_dict())
        say(f"{rank} resumed {tiered.steps} {whole}")
        while tiered.steps < steps:
            turn = tiered.steps
            torch.manual_seed(turn)
            model(*tokens(turn)).backward()
            tiered.step()
            say(f"{rank} stepped {tiered.steps}")
        say(f"{rank} finished {tiered.steps} {digest(tiered.state_dict())}")


job.count = 0


def main() -> None:
    torch.set_num_threads(1)
    warm = gpt()  # torch imports much at its first step: before the fork, once
    optimizer = ADAMW(warm.parameters())
    warm(*tokens(0)).backward()
    optimizer.step()
    os.write(1, b"ready\n")
    for line in sys.stdin:
        _, folder, steps, world, update = line.split()
        job.count += 1
        pids = []
        for rank in range(int(world)):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    Path(folder).mkdir(exist_ok=True)
                    job(folder, int(steps), rank, int(world), update)
                    status = 0
                except BaseException as error:
                    os.write(1, f"{rank} failed {type(error).__name__}: {str(error)[:300]}\n".encode())
                finally:
                    os._exit(status)
            pids.append(pid)
        os.write(1, f"started {' '.join(map(str, pids))}\n".encode())
        for pid in pids:
            os.waitpid(pid, 0)
        os.write(1, b"ended\n")


if __name__ == "__main__":
    main()
