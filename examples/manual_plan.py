"""Plans by hand: name a strategy per mesh axis, or fix the placement of single parameters; the rest is searched.

python examples/manual_plan.py [--quick]

Every plan is priced by the same model on the same cluster, and each one runs: their losses agree.
"""

from __future__ import annotations

import argparse
import copy

import torch

import weft
from weft.nn import GPT, GPTOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="run one of the plans instead of all")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = GPT(GPTOptions(vocabulary=64, context=16, layers=2, heads=4, width=64))
    batch = (torch.randint(64, (8, 16)), torch.randint(64, (8, 16)))
    cluster = weft.Cluster.local(processes=2)

    plans = {
        "data parallel": weft.Plan.manual(model, batch, cluster=cluster, strategy="dp"),
        "tensor parallel": weft.Plan.manual(model, batch, cluster=cluster, strategy="tp"),
        "ZeRO-3": weft.Plan.manual(model, batch, cluster=cluster, strategy="zero-3"),
        "split vocabulary": weft.Plan.manual(model, batch, cluster=cluster, parameters={"embed.weight": weft.Shard(0)}),
        "what weft finds": weft.plan(model, batch, cluster=cluster),
    }
    for name, plan in plans.items():
        memory = max(device.use.peak for device in plan.prediction.memory)
        print(
            f"{name:18} {plan.prediction.seconds * 1e3:7.2f} ms a step, {memory / 2**20:6.2f} MiB on the fullest device"
        )

    alone = model(*batch).item()
    print(f"{'one process':18} loss {alone:.6f}")
    for name in ["tensor parallel"] if arguments.quick else plans:
        with weft.run(plans[name], copy.deepcopy(model), torch.optim.SGD) as trainer:  # a copy: training changes it
            loss = trainer.step(batch)
        print(f"{name:18} loss {loss:.6f}")
        assert abs(loss - alone) < 1e-4


if __name__ == "__main__":
    main()
