"""What `one-byte-per-gradient` runs: digits turned to their mirror images, and a byte-level transformer turned to a second text.

Digits       a 64-64-10 network (4,810 parameters), trained by backpropagation on scikit-learn's digits, is tuned to the same
             digits mirrored, on 1 and 4 machines with a part of the data each           `digits`, `one_byte_digits`
             against what else could be sent: dense gradients, DGC, PowerSGD, parameters averaged rarely   `gradient_digits`
             and factors of low rank beside frozen weights, averaged as often as the same bytes allow      `lora_digits`
Text         a GPT trained by backpropagation on the source of Python's standard library is tuned to Shakespeare by forward
             passes alone                                                                `text`
Speed        passes over a model's parameters per second: signs by hash against randn    `passes`

One process stands for several machines (`Alone(members)`): that this is the same to the bit is tested and claimed (`group`).
"""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.bench.digits import digit_images
from weft.bench.turns import least
from weft.comm.codec import LinearCodec, Spec
from weft.comm.codecs.low_rank import LowRank
from weft.comm.codecs.top_k import TopK
from weft.comm.memories.error_feedback import ErrorFeedback
from weft.comm.memories.momentum_correction import MomentumCorrection
from weft.comm.zeroth import Alone, Log, Rendezvous, SharedSeed
from weft.comm.zeroth.transport import HEADER, LR

__all__ = [
    "Digits", "centralised_mezo", "digits", "gradient_digits", "group", "header_bytes", "lora_digits", "one_byte_digits",
    "passes", "text",
]  # fmt: skip

BATCH = 64
STEPS, SAMPLES = 1500, 4
AVERAGE_EVERY = 250  # local steps between two averages
RATE = {1: 0.02, 4: 0.05}  # of 0.02, 0.05, 0.1 the best for so many machines


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


# ---- digits


@dataclass(frozen=True)
class Digits:
    """The trained network and the mirrored digits: (n, 64) float and (n,) class, for training and test."""

    model: nn.Module
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    def accuracy(self, model: nn.Module) -> float:
        """Test accuracy in percent."""
        with torch.no_grad():
            return 100 * float((model(self.x_test).argmax(1) == self.y_test).float().mean())

    def loss(self, model: nn.Module) -> float:
        """Test cross-entropy."""
        with torch.no_grad():
            return float(F.cross_entropy(model(self.x_test), self.y_test))

    def batch(self, step: int, machine: int, sample: int, machines: int, seed: int) -> tuple[Tensor, Tensor]:
        """A minibatch of a machine's own part of the data (every `machines`-th row)."""
        generator = torch.Generator().manual_seed(((seed * 9 + machine) * 100_000 + step) * 64 + sample)
        rows = machine + machines * torch.randint(len(self.x) // machines, (BATCH,), generator=generator)
        return self.x[rows], self.y[rows]

    def look(self, step: int, machine: int, machines: int, seed: int) -> tuple[Tensor, Tensor]:
        """All that a machine looks at in a step: its minibatches of all samples."""
        pairs = [self.batch(step, machine, k, machines, seed) for k in range(SAMPLES)]
        return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def digits(seed: int) -> Digits:
    """Train on the digits as they are; 500 held out.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    images, labels = digit_images()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    mirrored = x.unflatten(1, (8, 8)).flip(2).flatten(1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(600):
        rows = torch.randint(500, len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return Digits(model.eval(), mirrored[500:], y[500:], mirrored[:500], y[:500])


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@dataclass
class Curve:
    """Test loss and accuracy after so many bytes sent by one machine."""

    data: Digits
    points: list[tuple[int, int, float, float]] = field(default_factory=list)  # step, bytes, loss, accuracy

    def add(self, step: int, sent: int, model: nn.Module) -> None:
        self.points.append((step, sent, self.data.loss(model), self.data.accuracy(model)))

    def values(self, budget: int) -> dict[str, float]:
        """The mean of the last five points, and the last point at which no more than `budget` bytes had been sent."""
        within = [point for point in self.points if point[1] <= budget][-1]
        last = self.points[-5:]
        return {
            "accuracy": sum(point[3] for point in last) / 5, "loss": sum(point[2] for point in last) / 5,
            "sent_bytes": last[-1][1],
            "steps_in_budget": within[0], "loss_in_budget": within[2], "accuracy_in_budget": within[3],
        }  # fmt: skip


def one_byte_digits(
    data: Digits, machines: int, wire: str, direction: str, seed: int, lr: float = 0.0
) -> tuple[SharedSeed, Curve]:
    """Tune by shared seeds for `STEPS` steps; bytes are the codes that one machine sends."""
    ours = SharedSeed(
        copy.deepcopy(data.model), classify, lr=lr or RATE[machines], samples=SAMPLES, wire=wire, direction=direction, run=seed,
    ).join(Alone(machines))  # fmt: skip
    curve, width = Curve(data), ours.wire.nbytes
    curve.add(0, 0, ours.model)
    for step in range(STEPS):
        pairs = [(machine, k) for machine in range(machines) for k in range(SAMPLES)]
        ours.step([data.batch(step, machine, k, machines, seed) for machine, k in pairs])
        if (step + 1) % 50 == 0:
            curve.add(step + 1, (step + 1) * SAMPLES * width, ours.model)
    return ours, curve


def gradient_digits(data: Digits, method: str, machines: int, seed: int) -> Curve:
    """Tune by true gradients, exchanged by `method`: "dense", "dgc", "power-sgd", "rare averaging"; SGD throughout.

    A step uses `SAMPLES` minibatches per machine, as many as a step of one byte looks at.
    """
    local = method == "rare averaging"
    models = [copy.deepcopy(data.model) for _ in range(machines if local else 1)]
    model, lr, curve, sent = models[0], 0.1, Curve(data), 0
    specs = [Spec(name, tuple(p.shape)) for name, p in model.named_parameters()]
    states: list[list[dict[str, Any]]] = [[{"seed": 7, "shared_seed": 7} for _ in specs] for _ in range(machines)]
    codec, memory = {
        "dgc": (TopK(0.001, selection="exact"), MomentumCorrection(0.9)), "power-sgd": (LowRank(1), ErrorFeedback()),
    }.get(method, (None, None))  # fmt: skip
    curve.add(0, 0, model)
    for step in range(STEPS):
        found = []
        for machine in range(machines):
            replica = models[machine] if local else model
            x, y = data.look(step, machine, machines, seed)
            found.append(list(torch.autograd.grad(F.cross_entropy(replica(x), y), list(replica.parameters()))))
        if local:
            for replica, grads in zip(models, found, strict=True):
                _descend(replica.parameters(), grads, lr)
            if (step + 1) % AVERAGE_EVERY == 0:
                mean = [torch.stack(rows).mean(0) for rows in zip(*(m.parameters() for m in models), strict=True)]
                for replica in models:
                    for parameter, value in zip(replica.parameters(), mean, strict=True):
                        parameter.data.copy_(value)
                sent += 4 * sum(p.numel() for p in model.parameters())
        else:
            grads, nbytes = _exchange(found, specs, states, codec, memory, step)
            sent += nbytes
            rate = 0.1 * lr if method == "dgc" else lr  # momentum 0.9 multiplies DGC's step by ten
            _descend(model.parameters(), grads, rate)
        if step < 100 or (step + 1) % 50 == 0:
            curve.add(step + 1, sent, model)
    return curve


class Adapted(nn.Module):
    """A frozen linear layer plus B A, A (rank, in) and B (out, rank); B begins at zero, so that nothing changes at first."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features, generator=generator) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def lora_digits(data: Digits, machines: int, budget: int, seed: int) -> dict[str, float]:
    """FedAvg of LoRA factors: local SGD on A and B of every layer, averaged after equal times, as often as `budget` bytes allow.

    Rank and rate are those of a grid that end with the lowest loss on the training data. Averages are sent as float32; what is
    judged is the average after the last step. (Sun et al., arXiv:2403.12313, is why A and B averaged one by one is not the mean
    of the products; it is what FedAvg of LoRA weights does.)
    """
    best: tuple[float, dict[str, float]] = (float("inf"), {})
    for rank, lr in product((1, 2, 4), (0.1, 0.3, 1.0)):
        model, generator = copy.deepcopy(data.model), torch.Generator().manual_seed(seed)
        for name, layer in list(model.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(model, name, Adapted(layer, rank, generator))
        models = [copy.deepcopy(model) for _ in range(machines)]
        trained = [[p for p in replica.parameters() if p.requires_grad] for replica in models]
        nbytes = 4 * sum(p.numel() for p in trained[0])
        rounds = budget // nbytes
        if not rounds:
            continue
        for step in range(STEPS):
            for machine, (replica, factors) in enumerate(zip(models, trained, strict=True)):
                x, y = data.look(step, machine, machines, seed)
                _descend(factors, torch.autograd.grad(F.cross_entropy(replica(x), y), factors), lr)
            if (step + 1) * rounds // STEPS > step * rounds // STEPS:
                for same in zip(*trained, strict=True):
                    mean = torch.stack([p.detach() for p in same]).mean(0)
                    for p in same:
                        p.data.copy_(mean)
        with torch.no_grad():
            loss = float(F.cross_entropy(models[0](data.x), data.y))
        if loss < best[0]:
            accuracy, test_loss = data.accuracy(models[0]), data.loss(models[0])
            best = loss, {
                "accuracy": accuracy, "loss": test_loss, "sent_bytes": rounds * nbytes, "steps_in_budget": STEPS,
                "loss_in_budget": test_loss, "accuracy_in_budget": accuracy, "rank": rank, "lr": lr, "averages": rounds,
            }  # fmt: skip
    return best[1]


def _descend(parameters: Iterable[Tensor], grads: Any, lr: float) -> None:
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.data.add_(grad, alpha=-lr)


def _exchange(
    found: list, specs: list[Spec], states: list, codec: Any, memory: Any, step: int
) -> tuple[list[Tensor], int]:
    """The mean gradient as `codec` and `memory` let it through, and the bytes one machine sends for it."""
    means, sent = [], 0
    for place, spec in enumerate(specs):
        rows = [grads[place].flatten() for grads in found]
        if codec is None or codec.bypass(spec, codec.default(spec)):  # PowerSGD sends vectors dense, DGC here does not
            average = torch.stack(rows).mean(0)
            if memory is not None:
                average = memory.dense(average, spec, states[0][place])
            means.append(average.view(spec.shape))
            sent += 4 * spec.numel
            continue
        setting = codec.default(spec)
        ys = [memory.before(row, spec, state[place]) for row, state in zip(rows, states, strict=True)]
        if isinstance(codec, LinearCodec):
            total, nbytes = _rounds(codec, ys, spec, [state[place] for state in states], setting, step)
            sent += nbytes
            for y, state in zip(ys, states, strict=True):
                memory.after(y, total, None, state[place])
        else:
            total = torch.zeros(spec.numel)
            for y, state in zip(ys, states, strict=True):
                message = codec.encode(y, spec, state[place], setting, step)
                codec.add_to(total, message, spec, setting, 1 / len(ys))
                memory.after(y, *codec.sent(message, spec, setting), state[place])
            sent += sum(part.numel() * part.element_size() for part in message)
        means.append(total.view(spec.shape))
    return means, sent


def _rounds(codec: Any, ys: list[Tensor], spec: Spec, states: list, setting: Any, step: int) -> tuple[Tensor, int]:
    """Run a linear codec's rounds on every machine, averaging in between."""
    running = [codec.rounds(y, spec, state, setting, step) for y, state in zip(ys, states, strict=True)]
    sent, mean = 0, None
    while True:
        asked = []
        for generator in running:
            try:
                asked.append(generator.send(mean))
            except StopIteration as done:
                result = done.value
        if not asked:
            return result, sent
        mean = torch.stack(asked).mean(0)
        sent += 4 * mean.numel()


# ---- a group over TCP


def group(data: Digits, seed: int, steps: int = 60) -> dict[str, float]:
    """Three machines over TCP: one leaves after a third, one joins by the log after two thirds. Entries that differ from

        the log's replay on a fresh model           `catch_up_differs`
        one process evaluating the same triples     `differs_from_one_process`
    and the bytes that a machine put on its socket per step, header and codes.
    """

    def machine() -> SharedSeed:
        return SharedSeed(copy.deepcopy(data.model), classify, lr=0.02, samples=SAMPLES, run=seed)

    def batches(t: int, shard: int) -> list:
        return [data.batch(t, shard, k, 3, seed) for k in range(SAMPLES)]

    def go(name: str, shard: int, until: int, hold: int = -1) -> None:
        ours = machines[name]
        ours.join(place.address, name, timeout=60)
        numbers[ours.transport.own[0]] = shard
        while len(ours.log) < until:
            if len(ours.log) == hold:
                reached.set()
                joined.wait(60)
            sent.append(ours.step(batches(len(ours.log), shard)).bytes)
        ours.leave()

    names = ("stays", "leaves", "comes")
    machines = {name: machine() for name in names}
    numbers: dict[int, int] = {}
    sent: list[int] = []
    reached, joined = threading.Event(), threading.Event()
    with Rendezvous(start_with=2, late_seconds=60) as place:
        threads = [
            threading.Thread(target=go, args=("stays", 0, steps, 2 * steps // 3)),
            threading.Thread(target=go, args=("leaves", 1, steps // 3)),
        ]
        for thread in threads:
            thread.start()
        reached.wait(60)
        threads.append(threading.Thread(target=go, args=("comes", 2, steps)))
        threads[-1].start()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not any(p.name == "comes" for p in list(place.hub.peers.values())):
            time.sleep(0.01)
        joined.set()
        for thread in threads:
            thread.join(120)
    log: Log = machines["stays"].log
    one, again = machine(), machine()
    for t, record in enumerate(log):
        one.transport.own = tuple(member for member, _ in record.entries)
        one.step([batch for member, _ in record.entries for batch in batches(t, numbers[member])])
    again.replay(log)
    came = machine()
    came.replay(machines["comes"].log)
    return {
        "differs_from_one_process": _different(one, machines["stays"]),
        "catch_up_differs": _different(again, machines["stays"]) + _different(came, machines["comes"]),
        "steps_of_two": float(sum(len(record.entries) == 2 for record in log)),
        "socket_bytes_per_step": max(sent),
    }


def _different(a: SharedSeed, b: SharedSeed) -> float:
    """How many parameters are not equal to the bit."""
    return float(sum(int((x != y).sum()) for x, y in zip(a.tensors, b.tensors, strict=True)))


def centralised_mezo(data: Digits, machines: int, seed: int, steps: int = STEPS) -> tuple[nn.Module, Curve]:
    """MeZO in one process, floats and no wire: directions held whole, estimates averaged, parameters put back exactly."""
    from weft.comm.zeroth import Rademacher, seed_of

    model, eps, kind = copy.deepcopy(data.model), 1e-3, Rademacher()
    theta = [p.data for p in model.parameters()]
    curve = Curve(data)
    curve.add(0, 0, model)
    for t in range(steps):
        found = []
        for machine in range(machines):
            for k in range(SAMPLES):
                z = [torch.zeros_like(p) for p in theta]
                kind.move(z, z, [(seed_of(seed, t, machine, k), 1.0)])
                kept, batch = [p.clone() for p in theta], data.batch(t, machine, k, machines, seed)
                losses = []
                with torch.no_grad():
                    for sign in (1, -1):
                        for p, zp, kp in zip(theta, z, kept, strict=True):
                            p.copy_(kp + sign * eps * zp)
                        losses.append(float(classify(model, batch)))
                    for p, kp in zip(theta, kept, strict=True):
                        p.copy_(kp)
                found.append(((losses[0] - losses[1]) / (2 * eps), z))
        for g, z in found:
            g = float(torch.tensor(g, dtype=torch.float32))
            for p, zp in zip(theta, z, strict=True):
                p.add_(zp, alpha=-(RATE[machines] / len(found)) * g)
        if (t + 1) % 50 == 0:
            curve.add(t + 1, 0, model)
    return model, curve


# ---- text


def text(seed: int, steps: int = 130, samples: int = 2, lr: float = 1e-3) -> Iterator[tuple[str, dict[str, float]]]:
    """Tune a GPT of 3.2 million parameters, all of them, to a second text, on two machines with a half of it each.

    Loss is cross-entropy in nats a byte on windows of the held-out tenth. Nothing is yielded where the data are not.
    """
    import os
    from pathlib import Path

    from weft.nn import GPT, GPTOptions
    from weft.tasks.text import read_text, standard_library, windows

    folder = Path(os.environ.get("WEFT_DATA", "../shared/data"))
    path = folder / "tinyshakespeare" / "input.txt.gz"
    if not path.exists():
        say(f"no {path}: the second text is left out (set WEFT_DATA)")
        return
    context, rows, machines = 64, 8, 2
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT(GPTOptions(256, context, layers=4, heads=4, width=256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, batch in zip(range(200), windows(standard_library(), context, "train", rows, seed), strict=False):
        optimizer.zero_grad()
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            say(f"first text: step {step + 1}, loss {loss.item():.3f}")
    model.eval()
    second = read_text(path)
    held_out = next(windows(second, context, "test", 64, seed))
    streams = [windows(second, context, "train", rows // 2, seed + 1 + machine) for machine in range(machines)]

    def validation() -> float:
        with torch.no_grad():
            return float(model(held_out[:, :-1], held_out[:, 1:]))

    ours = SharedSeed(
        model, lambda model, batch: model(batch[:, :-1], batch[:, 1:]), lr=lr, samples=samples, run=seed, drift="replay",
    ).join(Alone(machines))  # fmt: skip
    before = validation()
    for step in range(steps):
        ours.step([next(stream) for stream in streams for _ in range(samples)])
        if (step + 1) % 25 == 0:
            say(f"second text: step {step + 1}, validation loss {validation():.4f} (before {before:.4f})")
    after, dense = validation(), 4 * sum(p.numel() for p in model.parameters())
    yield "text", {
        "loss_before": before, "loss": after, "loss_fall": 1 - after / before, "parameters": dense / 4,
        "sent_bytes": steps * samples + header_bytes(ours.log), "step_bytes": samples + HEADER.size, "dense_step_bytes": dense,
    }  # fmt: skip


def header_bytes(log: Log) -> int:
    """Bytes that a member of an open group sends beside its codes for the steps of a log: rates where they change."""
    rates = [record.lr for record in log]
    changes = sum(rate != before for before, rate in zip([None, *rates], rates, strict=False))
    return len(log) * HEADER.size + changes * LR.size


def passes(parameters: int = 4_000_000, rounds: int = 5) -> Iterator[tuple[str, dict[str, float]]]:
    """Passes (theta <- theta + c z) over 4 million parameters per CPU second, taking turns: the best of `rounds`."""
    from weft.comm.zeroth import Normal, Rademacher, seed_of

    theta = [torch.zeros(parameters // 8) for _ in range(8)]

    def plain() -> None:  # MeZO's own loop
        generator = torch.Generator().manual_seed(1)
        for tensor in theta:
            z = torch.normal(mean=0.0, std=1.0, size=tensor.shape, generator=generator)
            tensor.data = tensor.data + 1e-3 * z

    contenders: dict[str, Callable[[], None]] = {
        "MeZO's loop": plain,
        "normal": lambda: Normal().move(theta, theta, [(seed_of(0, 0, 0, 0), 1e-3)]),
        "rademacher": lambda: Rademacher().move(theta, theta, [(seed_of(0, 0, 0, 0), 1e-3)]),
        "rademacher, 8 at once": lambda: Rademacher().move(
            theta, theta, [(seed_of(0, 0, 0, k), 1e-3) for k in range(8)]
        ),
    }
    best, _ = least(contenders, rounds)
    best["rademacher, 8 at once"] /= 8
    for name, seconds in best.items():
        yield name, {"passes_per_cpu_second": 1 / seconds, "cpu_ns_per_parameter": 1e9 * seconds / parameters}
