"""Fine-tune one model on several machines that send each other one byte per pair of forward passes.

python examples/comm_one_byte.py [--quick]            three machines as threads over TCP; one of them joins halfway
torchrun --nproc-per-node 2 examples/comm_one_byte.py   a fixed group over torch.distributed

No backward pass and no optimizer state; every machine makes everybody's random directions again from their numbers.
"""

from __future__ import annotations

import argparse
import os
import threading

import torch
from torch import Tensor, nn

from weft.comm.zeroth import Rendezvous, SharedSeed


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def machine() -> SharedSeed:
    """The same on every machine. With log="run.log" the scalars are kept in a file, which serves as checkpoint."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1)).eval()
    return SharedSeed(model, loss_fn, lr=0.02, samples=4)


def batches(shard: int, step: int) -> list[tuple[Tensor, Tensor]]:
    """A machine's own data: one minibatch per direction."""
    x = torch.randn(4, 64, 16, generator=torch.Generator().manual_seed(1000 * step + shard))
    return [(rows, rows[:, :4].sum(1, keepdim=True)) for rows in x]


def train(tuned: SharedSeed, shard: int, steps: int) -> None:
    sent = 0
    while len(tuned.log) < steps:
        info = tuned.step(batches(shard, len(tuned.log)))
        sent += info.bytes
    print(f"machine {shard}: loss {info.loss:.3f}, {sent:,} bytes sent, parameters {tuned.digest():016x}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="60 steps instead of 600")
    steps = 60 if parser.parse_args().quick else 600
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
        train(machine().join(torch.distributed.group.WORLD), int(os.environ["RANK"]), steps)
        torch.distributed.destroy_process_group()
        return

    def member(shard: int) -> None:
        tuned = machines[shard].join(place.address, name=f"machine {shard}")
        if shard == 2:
            print(f"machine 2 caught up with {len(tuned.log)} steps from their scalars")
        train(tuned, shard, steps)
        tuned.leave()

    machines = [machine() for _ in range(3)]
    with Rendezvous(start_with=2) as place:  # on a real network: Rendezvous("0.0.0.0", 29600) on one machine
        threads = [threading.Thread(target=member, args=(shard,)) for shard in range(3)]
        threads[0].start()
        threads[1].start()
        while place.hub.step < steps // 2 and threads[0].is_alive():
            threads[0].join(0.01)
        threads[2].start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
