"""Robust gradients: some workers lie, and the model learns all the same; with a server's rule or among peers.

python examples/comm_robust.py [--quick]            one process plays all workers
torchrun --nproc-per-node 5 examples/comm_robust.py     five peers, the last one hostile, no server (MoNNA)
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn

from weft.comm import NNM, Flag, Krum, Mean, TrimmedMean, attach_peer
from weft.comm.attacks import SignFlip

TRUTH = torch.randn(10, 20, generator=torch.Generator().manual_seed(0))


def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(32, 20, generator=generator)
    return x, (x @ TRUTH.T).argmax(1)


def gradient(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
    x, y = batch(generator)
    loss = nn.functional.cross_entropy(model(x), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def accuracy(model: nn.Module) -> float:
    x = torch.randn(2000, 20, generator=torch.Generator().manual_seed(1))
    return float((model(x).argmax(1) == (x @ TRUTH.T).argmax(1)).float().mean())


def with_a_server(steps: int, workers: int = 15, faulty: int = 3) -> None:
    for rule in (Mean(), Krum(faulty), TrimmedMean(faulty), Flag(), NNM(faulty, Flag())):
        torch.manual_seed(0)
        model, generator = nn.Linear(20, 10), torch.Generator().manual_seed(2)
        for _ in range(steps):
            honest = torch.stack([gradient(model, generator) for _ in range(workers - faulty)])
            lies = SignFlip(10.0).messages(honest, faulty, generator)
            step = rule(torch.cat([honest, lies]))  # weights from inner products, times messages
            with torch.no_grad():
                flat = nn.utils.parameters_to_vector(model.parameters()) - 0.5 * step
                nn.utils.vector_to_parameters(flat, model.parameters())
        print(f"{rule!s:60} accuracy {accuracy(model):.2f} with {faulty} of {workers} workers lying")


def among_peers(steps: int) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # all start alike
    model, generator = nn.Linear(20, 10), torch.Generator().manual_seed(10 + rank)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    peer = attach_peer(model, optimizer, f=1 if size > 2 else 0, beta=0.9)
    for _ in range(steps):
        x, y = batch(generator)
        sign = -10.0 if size > 2 and rank == size - 1 else 1.0  # the last one climbs instead of descending
        optimizer.zero_grad()
        (sign * nn.functional.cross_entropy(model(x), y)).backward()
        optimizer.step()  # the step, then the exchange
    print(
        f"rank {rank}: accuracy {accuracy(model):.2f}, vectors averaged by rank {dict(sorted(peer.report().kept.items()))}"
    )
    dist.barrier()
    peer.remove()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps")
    count = 30 if parser.parse_args().quick else 300
    among_peers(count) if "RANK" in os.environ else with_a_server(count)
