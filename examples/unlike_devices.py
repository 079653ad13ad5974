"""Plan for unlike devices without having them: three quarters of the work to the fast one.

python examples/unlike_devices.py --quick     a smaller model
"""

from __future__ import annotations

import argparse

import torch

import weft
from weft.nn import GPT, GPTOptions

CLUSTER = {
    "name": "an A100 and a T4 over Ethernet",
    "devices": [{"device": "A100-80GB", "name": "fast", "host": "a"}, {"device": "T4", "name": "slow", "host": "b"}],
    "levels": [{"name": "network", "link": {"latency": 2e-5, "bandwidth": 1.25e9}}],
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true")
    options = arguments.parse_args()

    with torch.device("meta"):  # planning needs shapes, no values
        layers, width = (2, 64) if options.quick else (12, 768)
        model = GPT(GPTOptions(vocabulary=1024, context=128, layers=layers, heads=4, width=width))
    batch = (torch.zeros(32, 128, dtype=torch.long), torch.zeros(32, 128, dtype=torch.long))

    cluster = weft.Cluster.from_dict(CLUSTER)
    print(weft.plan(model, batch, cluster=cluster))
    even = weft.Plan.manual(model, batch, cluster=cluster, strategy="dp", weights=(1, 1))
    uneven = weft.Plan.manual(model, batch, cluster=cluster, strategy="dp", weights=(3, 1))
    print(
        f"data parallel: even shards {even.prediction.seconds:.4f} s, 3 to 1 {uneven.prediction.seconds:.4f} s a step"
    )


if __name__ == "__main__":
    main()
