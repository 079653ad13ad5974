"""One byte per gradient: tuning by forward passes whose results alone are exchanged, against exchanging gradients.

Digits (4,810 parameters, a small model: hard for this method's case) and a transformer of 3.2 million parameters on a second
text. `sent_bytes` are those of one machine: codes, with `header_bytes` beside them where they travel; what is claimed of bytes
counts both. Rows with `_in_budget` say how far each method has come when it has sent no more than the codes of one byte per
gradient are in all, without headers: loss against bytes; LoRA averages as often as the same bytes allow. One and four machines
have the learning rates that suit them; a row of its own has one machine at that of four.
"""

from __future__ import annotations

from collections.abc import Iterator

from weft.bench.system import Claim, Measure, Results, Row, System, ratio, value

__all__ = ["SYSTEM", "run"]


def _points(ours: str, baseline: str) -> Measure:
    """Percentage points of accuracy that `ours` has more."""
    return lambda results: results[ours, "accuracy"] - results[baseline, "accuracy"]


def _dense_over_digits(results: Results) -> float:
    ours = "4 machines, byte, rademacher"
    return results["dense gradients", "sent_bytes"] / (results[ours, "sent_bytes"] + results[ours, "header_bytes"])


def _dense_over_ours(results: Results) -> float:
    return results["text", "dense_step_bytes"] / results["text", "step_bytes"]


SYSTEM = System(
    name="one-byte-per-gradient",
    title="Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized Language Model Finetuning Using Shared Randomness",
    paper="arXiv:2306.10015",
    cite="Zelikman et al., 2023",
    minutes=12,
    repeats="accuracies are means of the last five looks at a test set of 500",
    settings=("weft.bench.one_byte",),
    solves="fine-tune one model on machines that can hardly talk to each other, come and go, and have memory for inference only",
    keywords=("MeZO", "zeroth-order", "shared randomness", "low bandwidth", "volunteers"),
    use=("weft.comm.zeroth.SharedSeed", "weft.comm.zeroth.Rendezvous", "weft.comm.zeroth.Log"),
    baselines=(
        "centralised MeZO", "dense gradients", "DGC 0.1 %", "PowerSGD-1", "local training with rare averaging", "LoRA FedAvg",
    ),
    tests=(
        "tests/comm/zeroth/test_shared_seed.py", "tests/comm/zeroth/test_fixed.py", "tests/comm/zeroth/test_tcp.py",
        "tests/comm/zeroth/test_hub.py", "tests/comm/zeroth/test_scalars.py", "tests/comm/zeroth/test_directions.py",
        "tests/comm/zeroth/test_log.py",
    ),
    claims=(
        *(
            Claim(f"accuracy, float32 - byte, points, {machines}, {direction}",
                  _points(f"{machines}, float32, {direction}", f"{machines}, byte, {direction}"), at_most=1.0)
            for machines in ("1 machine", "4 machines") for direction in ("rademacher", "normal")
        ),
        Claim("accuracy, 4 machines - 1 machine, points, same steps and options",
              _points("4 machines, byte, rademacher", "1 machine, byte, rademacher, the learning rate of 4"), at_least=5.0),
        Claim("bytes for the same steps with headers, dense / ours, 4,810 parameters", _dense_over_digits, at_least=1000),
        Claim("bytes per step with header, dense / ours, 3.2 M parameters", _dense_over_ours, at_least=1e5),
        Claim("fall of the loss on a second text, relative", value("loss_fall", "text"), at_least=0.05),
        Claim("bytes sent for it, with headers", value("sent_bytes", "text"), at_most=20_000),
        Claim("parameters that differ from centralised MeZO, 4 machines, float32",
              value("differs_from_mezo", "4 machines, float32, rademacher"), at_most=0),
        Claim("accuracy, centralised MeZO - 4 machines by byte, points",
              _points("centralised MeZO", "4 machines, byte, rademacher"), at_most=1.0),
        Claim("parameters that differ, three machines over TCP that join and leave / one process",
              value("differs_from_one_process", "over TCP"), at_most=0),
        Claim("parameters that differ after catching up by the log", value("catch_up_differs", "over TCP"), at_most=0),
        Claim("passes per CPU second, signs by hash / MeZO's loop",
              ratio("passes_per_cpu_second", "pass: rademacher", "pass: MeZO's loop"), at_least=3.0),
    ),
)  # fmt: skip


def run(seed: int) -> Iterator[Row]:
    from weft.bench import one_byte

    for name, values in one_byte.passes():
        yield Row(f"pass: {name}", **values)
    data = one_byte.digits(seed)
    yield Row("before", accuracy=data.accuracy(data.model), loss=data.loss(data.model))
    yield Row("over TCP", **one_byte.group(data, seed))
    budget = one_byte.STEPS * one_byte.SAMPLES
    mezo, curve = one_byte.centralised_mezo(data, 4, seed)
    yield Row("centralised MeZO", **{name: curve.values(budget)[name] for name in ("accuracy", "loss")})
    for direction in ("rademacher", "normal"):
        for machines in (1, 4):
            for wire in ("byte", "float32"):
                ours, curve = one_byte.one_byte_digits(data, machines, wire, direction, seed)
                measured = {**curve.values(budget), "header_bytes": one_byte.header_bytes(ours.log)}
                if (machines, wire, direction) == (4, "float32", "rademacher"):
                    pairs = zip(ours.model.parameters(), mezo.parameters(), strict=True)
                    measured["differs_from_mezo"] = sum(int((a != b).sum()) for a, b in pairs)
                yield Row(f"{machines} machine{'s' * (machines > 1)}, {wire}, {direction}", **measured)
    ours, curve = one_byte.one_byte_digits(data, 1, "byte", "rademacher", seed, lr=one_byte.RATE[4])
    yield Row(
        "1 machine, byte, rademacher, the learning rate of 4",
        **curve.values(budget),
        header_bytes=one_byte.header_bytes(ours.log),
    )
    for name, method in (
        ("dense gradients", "dense"), ("DGC 0.1 %", "dgc"), ("PowerSGD-1", "power-sgd"),
        ("local training with rare averaging", "rare averaging"),
    ):  # fmt: skip
        yield Row(name, **one_byte.gradient_digits(data, method, 4, seed).values(budget))
    yield Row("LoRA FedAvg, same bytes", **one_byte.lora_digits(data, 4, budget, seed))
    for name, values in one_byte.text(seed):
        yield Row(name, **values)
