"""Train four networks on worker processes of which one is often late: exact gradients, nobody waits for it.

python examples/comm_stragglers.py [--quick]
(The master starts its workers itself. Under torchrun the first rank is the master, and the others have nothing to do.)
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time

import torch
from torch import nn

from weft.comm.straggler import GC, MSGC, Crew, Farm, Uncoded, fit, slope


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 4))


def bother(pid: int, stop: threading.Event) -> None:
    """Take the processor away from one worker, again and again."""
    while not stop.wait(0.05):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.04)
        os.kill(pid, signal.SIGCONT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 workers and 12 jobs instead of 4 and 200")
    quick = parser.parse_args().quick
    if int(os.environ.get("RANK", "0")) > 0:
        return
    workers, jobs = (3, 12) if quick else (4, 200)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 20, generator=generator)
    y = (x @ torch.randn(20, 4, generator=generator)).argmax(1)

    with Crew(workers) as crew:

        def train(policy) -> tuple[float, float]:
            """Wall seconds and the last loss of four networks that take turns."""
            nets = [network(seed) for seed in range(4)]
            with Farm(policy, nets, [(x, y)], lambda p: torch.optim.SGD(p, lr=0.5), crew=crew) as farm:
                log = farm.run(jobs)
            records[type(policy).__name__] = log.times
            return log.seconds, log.losses[-1]

        records: dict = {}
        stop = threading.Event()
        thread = threading.Thread(target=bother, args=(crew.pids[1], stop))
        thread.start()
        try:
            for policy in (Uncoded(), Uncoded(drop=1), GC(1), MSGC(1, 2, 1)):
                seconds, loss = train(policy)
                print(f"{policy!s:<60} {seconds:6.2f} s   loss {loss:.6f}")
            train(Uncoded())
        finally:
            stop.set()
            thread.join()
            os.kill(crew.pids[1], signal.SIGCONT)
        print("\nfitted to the record of the uncoded run:")
        fit(records["Uncoded"], slope([1 / workers, 1.0], [1.0, 1.5]), max_delay=3, jobs=jobs)


if __name__ == "__main__":
    main()
