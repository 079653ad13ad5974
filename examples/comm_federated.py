"""Federated training of clients that differ in speed and data: FedAvg, asynchronous FedAvg, FedBuff and FedFix.

python examples/comm_federated.py [--quick]               on a virtual clock: no sleeping, the same on every machine
torchrun --nproc-per-node 4 examples/comm_federated.py    for real: rank 0 serves, the other ranks are clients

Every client holds a strip of the plane, the slowest the right one. With equal weights an asynchronous server hears the fast ones
more often; unbiased weights make up for it.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn

from weft.comm.waits import All, Any, Clock, Count
from weft.federated import Asynchronous, Client, LocalSGD, join, listen, serve


def clients(count: int) -> list[Client]:
    """Points of the plane with their distance from (1, 1): client i has a strip of it, and needs (i + 1)/count seconds a job."""
    random, found = torch.Generator().manual_seed(0), []
    for i in range(count):
        x = torch.rand(200, 2, generator=random)
        x[:, 0] = (x[:, 0] + i) / count * 2
        y = (x - 1).norm(dim=1, keepdim=True)
        seconds = (i + 1) / count
        found.append(Client((x, y), seconds=seconds, declared=seconds))
    return found


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))


def for_real(seconds: float = 5.0) -> None:
    """One server and world size - 1 clients, over TCP; their speed is what it is."""
    dist.init_process_group("gloo")
    people = clients(dist.get_world_size() - 1)
    run = Asynchronous(network(), people, nn.functional.mse_loss, Clock("auto"), work=LocalSGD(10, 0.02))
    listener = listen() if dist.get_rank() == 0 else None  # listen("0.0.0.0") where clients are on other machines
    address = [listener.getsockname() if listener else None]
    dist.broadcast_object_list(address, src=0)
    if listener:
        _, trace = serve(run, listener, token="a shared secret", seconds=seconds)
        print(
            f"{len(trace.aggregations)} aggregations, loss {trace.losses()[-1][1]:.4f}, {trace.nbytes} bytes received"
        )
    else:
        jobs = join(run, dist.get_rank() - 1, tuple(address[0]), token="a shared secret")
        print(f"client {dist.get_rank() - 1} did {jobs} jobs")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less time")
    seconds = 10.0 if parser.parse_args().quick else 60.0
    schemes = {
        "FedAvg": (All(), "unbiased", 0.02),  # the local rate is tuned for each schedule
        "asynchronous, equal": (Any(), "equal", 0.001),
        "asynchronous": (Any(), "unbiased", 0.001),
        "FedBuff(4)": (Count(4), "equal", 0.02),
        "FedFix(0.5)": (Clock(0.5), "unbiased", 0.02),
    }
    people, loss = clients(8), nn.functional.mse_loss
    for name, (schedule, weights, rate) in schemes.items():
        run = Asynchronous(network(), people, loss, schedule, weights, LocalSGD(10, rate), every=1.0)
        model, trace = run.simulate(seconds)
        slowest = loss(model(people[-1].data[0]), people[-1].data[1]).item()
        rounds, mean = len(trace.aggregations), trace.losses()[-1][1]
        print(f"{name:20} {rounds:4} aggregations, loss {mean:.5f}, of the slowest client {slowest:.5f}")


if __name__ == "__main__":
    for_real() if "RANK" in os.environ else main()
