"""SharedSeed on one process: equal to MeZO bit for bit, drift and its repair, the log, options, bad inputs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.comm.zeroth.machines import SAMPLES, loss_fn, network, shard, tuned, values
from torch import nn

from weft.comm.zeroth import Alone, Log, OtherRun, OutOfStep, Record, SharedSeed, Transport, seed_of
from weft.comm.zeroth.directions import DIRECTIONS
from weft.comm.zeroth.scalars import LEVEL, WIRES
from weft.errors import CheckpointDamaged, FolderInUse, PeerLost


def equal(a: SharedSeed | list, b: SharedSeed | list) -> bool:
    a, b = (list(x.model.parameters()) if isinstance(x, SharedSeed) else x for x in (a, b))
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def mezo(
    steps: int, *, in_place: bool, direction: str, wire: str, divisor: str, members: int = 1
) -> list[torch.Tensor]:
    """MeZO as written in its paper's algorithm 1, with averaged estimates and directions held whole."""
    model = network()
    theta = [p.data for p in model.parameters()]
    for t in range(steps):
        estimates = []
        for member in range(members):
            for k, batch in enumerate(shard(member, t)):
                z = [torch.zeros_like(p) for p in theta]
                DIRECTIONS[direction].move(z, z, [(seed_of(0, t, member, k), 1.0)])
                kept = [p.clone() for p in theta]
                with torch.no_grad():
                    for p, zp in zip(theta, z, strict=True):
                        p.copy_(p + 1e-3 * zp)
                    plus = float(loss_fn(model, batch))
                    for p, zp, kp in zip(theta, z, kept, strict=True):
                        p.copy_(p - 2e-3 * zp if in_place else kp - 1e-3 * zp)
                    minus = float(loss_fn(model, batch))
                    for p, zp, kp in zip(theta, z, kept, strict=True):
                        p.copy_(p + 1e-3 * zp if in_place else kp)
                g = WIRES[wire].decode(WIRES[wire].encode((plus - minus) / 2e-3))
                estimates.append((g, z))
        count = len(estimates) if divisor == "mean" else math.sqrt(len(estimates))
        for g, z in estimates:
            for p, zp in zip(theta, z, strict=True):
                p.add_(zp, alpha=-(0.05 / count * g))
    return theta


@pytest.mark.parametrize("divisor", ["mean", "sqrt"])
@pytest.mark.parametrize("wire", ["byte", "float32"])
@pytest.mark.parametrize("drift", ["exact", "free"])
def test_one_machine_is_mezo(drift, wire, divisor):
    ours = tuned(drift=drift, wire=wire, divisor=divisor)
    for t in range(20):
        ours.step(shard(0, t))
    expected = mezo(20, in_place=drift == "free", direction="rademacher", wire=wire, divisor=divisor)
    assert equal(list(ours.model.parameters()), expected)
    assert not equal(ours, list(network().parameters()))


def test_one_machine_is_mezo_with_normal_directions():
    """c z is not exact for normal z, so a fused multiply-add may differ from MeZO's two roundings: equal to 1e-6 then."""
    ours = tuned(direction="normal", wire="float32")
    for t in range(20):
        ours.step(shard(0, t))
    expected = mezo(20, in_place=False, direction="normal", wire="float32", divisor="mean")
    for a, b in zip(ours.model.parameters(), expected, strict=True):
        torch.testing.assert_close(a.data, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("members", [2, 5])
def test_one_process_may_stand_for_many(members):
    ours = tuned().join(Alone(members))
    for t in range(10):
        info = ours.step([batch for member in range(members) for batch in shard(member, t)])
        assert info.members == tuple(range(members)) and len(info.scalars) == members * SAMPLES
    expected = mezo(10, in_place=False, direction="rademacher", wire="byte", divisor="mean", members=members)
    assert equal(list(ours.model.parameters()), expected)


@pytest.mark.slow
def test_drift_and_its_repair():
    """In place theta drifts; with replay it is the log's replay at every repair, and the drift is reported there."""
    runs = {drift: tuned(drift=drift, every=8) for drift in ("exact", "replay", "free")}
    drifts = []
    for t in range(200):
        for drift, ours in runs.items():
            info = ours.step(shard(0, t))
            if drift == "replay":
                drifts.append(info.drift)
    assert [t for t, d in enumerate(drifts) if d is not None] == [t for t in range(200) if (t + 1) % 8 == 0]
    assert max(d for d in drifts if d is not None) > 0
    for drift, ours in runs.items():
        again = tuned()
        assert again.replay(ours.log) == 200
        assert equal(again, ours) == (drift != "free"), drift
    gap = max(
        float((a - b).abs().max()) for a, b in zip(runs["free"].tensors, mezo_replayed(runs["free"].log), strict=True)
    )
    assert 0 < gap < 1e-3  # what nobody repaired: reported here, small on this model


def mezo_replayed(log: Log) -> list[torch.Tensor]:
    again = tuned()
    again.replay(log)
    return again.tensors


@pytest.mark.parametrize("drift", ["exact", "replay", "free"])
def test_a_loss_that_raises_leaves_theta(drift):
    calls = []

    def flaky(model: nn.Module, batch) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("no more data")
        return loss_fn(model, batch)

    ours = SharedSeed(network(), flaky, lr=0.05, samples=SAMPLES, drift=drift)
    with pytest.raises(RuntimeError, match="no more data"):
        ours.step(shard(0, 0))
    assert len(ours.log) == 0
    for a, b in zip(ours.model.parameters(), network().parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if drift == "exact" else 1e-6)
    ours.step(shard(0, 0))
    assert len(ours.log) == 1


class Gone(Transport):
    """Peers that are lost as soon as something is sent; `enter` fails after a record has been applied."""

    def __init__(self, error, record=None):
        self.error, self.record = error, record

    def enter(self, replica):
        if self.record is not None:
            replica.apply([self.record])
            raise self.error

    def exchange(self, outgoing, replica):
        raise self.error

    def leave(self):
        pass


@pytest.mark.parametrize("drift", ["exact", "replay", "free"])
@pytest.mark.parametrize("error", [PeerLost(1, "step 1", "gone"), KeyboardInterrupt()], ids=["lost", "ctrl-c"])
def test_a_step_that_ends_early_leaves_theta_in_the_model(error, drift):
    ours = tuned(drift=drift)
    ours.step(shard(0, 0))
    before = values(ours)
    ours.join(Gone(error))
    with pytest.raises(type(error)):
        ours.step(shard(0, 1))
    for a, b in zip(values(ours), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if drift == "exact" else 1e-6)


def test_joining_that_fails_half_way_leaves_theta_in_the_model():
    whole, ours = tuned(), tuned()
    whole.step(shard(0, 0))
    with pytest.raises(KeyboardInterrupt):
        ours.join(Gone(KeyboardInterrupt(), whole.log[0]))
    assert len(ours.log) == 1 and equal(ours, whole)


@pytest.mark.parametrize("rate", [math.nan, math.inf, -0.1])
def test_a_rate_that_is_none_is_refused_before_anything_moves(rate):
    ours = tuned(lr=lambda step: rate)
    with pytest.raises(ValueError, match=r"lr must be >= 0 and finite, got .* for step 0"):
        ours.step(shard(0, 0))
    assert len(ours.log) == 0 and equal(ours, list(network().parameters()))


@pytest.mark.parametrize(
    ("found", "said"), [(torch.zeros(3), r"got shape \(3,\)"), (None, "got None"), ("1", "got '1'")], ids=str
)
def test_a_loss_that_is_no_number(found, said):
    ours = tuned()
    ours.loss_fn = lambda model, batch: found
    with pytest.raises(ValueError, match=f"loss must be one number, {said}"):
        ours.step(shard(0, 0))
    assert equal(ours, list(network().parameters()))


def test_weight_decay_spares_vectors_and_replays():
    ours = tuned(lr=0.5, weight_decay=0.5, wire="float32")
    before = [p.clone() for p in ours.model.parameters()]
    ours.loss_fn = lambda model, batch: 0.0
    ours.step(shard(0, 0))  # g = 0: decay alone
    for a, b in zip(ours.model.parameters(), before, strict=True):
        assert torch.equal(a, b * 0.75 if b.dim() > 1 else b)
    ours.loss_fn = loss_fn
    for t in range(1, 6):
        ours.step(shard(0, t))
    again = tuned(weight_decay=0.5, wire="float32")
    again.replay(ours.log)
    assert equal(again, ours)


def test_clipping_at_a_quantile():
    """A member that sends the largest number there is moves theta by no more than the others do."""
    record = Record(0, 1.0, ((0, bytes([60, 70])), (1, bytes([65, 127]))))
    plain, cut = tuned(), tuned(clip=0.75)
    assert [abs(c) * 4 for _, c in plain._terms(record)] == [LEVEL[60], LEVEL[70], LEVEL[65], LEVEL[127]]
    assert [abs(c) * 4 for _, c in cut._terms(record)] == [LEVEL[60], LEVEL[70], LEVEL[65], LEVEL[70]]


def test_what_is_tuned():
    model = network()
    model[0].bias.requires_grad_(False)
    assert list(SharedSeed(model, loss_fn, lr=0.1).named) == [n for n, _ in model.named_parameters() if n != "0.bias"]
    model[0].lora_a = nn.Linear(2, 2).eval()
    assert list(SharedSeed(model, loss_fn, lr=0.1, params="lora").named) == ["0.lora_a.weight", "0.lora_a.bias"]
    ours = SharedSeed(model, loss_fn, lr=0.1, samples=SAMPLES, params=lambda name, p: name.startswith("3."))
    before = copy.deepcopy(model.state_dict())
    ours.step(shard(0, 0))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"3.weight", "3.bias"}


def test_tied_parameters_are_moved_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6, bias=False)
            self.b = nn.Linear(6, 6, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    ours = SharedSeed(Tied().eval(), loss_fn, lr=0.1, samples=SAMPLES)
    assert list(ours.named) == ["a.weight"]
    ours.step(shard(0, 0))
    assert ours.model.b.weight is ours.model.a.weight


def test_not_finite_counts_as_nothing():
    ours = tuned()
    ours.loss_fn = lambda model, batch: torch.tensor(float("nan"))
    info = ours.step(shard(0, 0))
    assert info.not_finite == SAMPLES and info.scalars == (0.0,) * SAMPLES and math.isnan(info.loss)
    assert equal(ours, list(network().parameters()))


def test_a_learning_rate_by_step_is_in_the_log():
    ours = tuned(lr=lambda step: 0.1 / (step + 1))
    for t in range(3):
        ours.step(shard(0, t))
    assert [record.lr for record in ours.log] == [0.1, 0.1 / 2, 0.1 / 3]
    again = tuned(lr=77.0)
    again.replay(ours.log)
    assert equal(again, ours)


# ---- the log


def test_a_run_goes_on_from_its_file(tmp_path):
    whole = tuned()
    for t in range(12):
        whole.step(shard(0, t))
    part = tuned(log=tmp_path / "run.log")
    for t in range(7):
        part.step(shard(0, t))
    part.log.close()
    with (tmp_path / "run.log").open("ab") as file:
        file.write(b"\x19\x00\x00")  # the process died in the middle of step 7
    with pytest.raises(CheckpointDamaged, match="7 steps are whole"):
        Log.load(tmp_path / "run.log")
    again = tuned(log=tmp_path / "run.log", drift="replay", every=4)  # how it evaluates is its own affair
    assert len(again.log) == 7 and equal(again, part)
    again.log.close()
    again = tuned(log=tmp_path / "run.log")
    for t in range(7, 12):
        again.step(shard(0, t))
    assert equal(again, whole) and again.log.records == whole.log.records
    again.log.close()


def test_a_log_is_free_again_when_its_owner_is_gone(tmp_path, monkeypatch):
    path = tmp_path / "run.log"
    ours = tuned(log=path)
    with pytest.raises(FolderInUse, match="this or another process"):
        tuned(log=path)
    del ours
    with tuned(log=path) as ours:
        ours.step(shard(0, 0))
    assert ours.log.file is None and len(ours.log) == 1
    monkeypatch.setattr(SharedSeed, "_back_up", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError) as failed:  # its traceback keeps what was half made
        tuned(log=path)
    monkeypatch.undo()
    with tuned(log=path) as ours:
        assert len(ours.log) == 1 and failed


def test_the_log_of_another_run_is_refused(tmp_path):
    ours = tuned(log=tmp_path / "run.log")
    ours.step(shard(0, 0))
    ours.log.close()
    wider = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).eval()
    with pytest.raises(OtherRun, match="the set of tuned parameters"):
        SharedSeed(wider, loss_fn, lr=0.05, log=tmp_path / "run.log")
    with pytest.raises(OtherRun, match="the first values"):
        SharedSeed(network(seed=2), loss_fn, lr=0.05, log=tmp_path / "run.log")
    with pytest.raises(OtherRun, match="wire"):
        tuned(wire="float32").replay(Log.load(tmp_path / "run.log"))
    other = tuned()
    other.step(shard(0, 1))
    with pytest.raises(OtherRun, match="the history"):
        other.replay(ours.log)


def test_reload_needs_the_start():
    ours = tuned()
    with pytest.raises(OutOfStep, match=r"no start was given.*\(start=\.\.\.\)"):
        ours.reload()
    wrong = tuned(start=network(seed=2).state_dict())
    with pytest.raises(OtherRun, match="the first values"):
        wrong.reload()


@pytest.mark.parametrize("drift", ["exact", "replay"])
def test_reload_repairs(drift):
    ours = tuned(start=lambda: network().state_dict(), drift=drift, every=3)
    for t in range(7):
        ours.step(shard(0, t))
    ours.home[0].view(-1)[2] += 1
    ours.reload()
    ours._settled()
    again = tuned()
    again.replay(ours.log)
    assert equal(again, ours)


# ---- bad inputs


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eps": 0.0}, "eps must be > 0"),
        ({"eps": -1e-3}, "eps must be > 0"),
        ({"eps": float("nan")}, "eps must be > 0"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"samples": 16384, "wire": "float32"}, "samples must be at most 16383 with wire='float32', got 16384"),
        ({"samples": 65536}, "samples must be at most 65535"),
        ({"every": 0}, "every must be at least 1"),
        ({"digest_every": -1}, "digest_every must be at least 0"),
        ({"lr": -1.0}, "lr must be >= 0"),
        ({"wire": "bit"}, "no wire is called 'bit'"),
        ({"direction": "radmacher"}, "did you mean rademacher"),
        ({"divisor": "sum"}, "divisor must be"),
        ({"drift": "none"}, "drift must be"),
        ({"clip": 0.0}, "clip must be a quantile"),
        ({"run": -1}, "run must be >= 0"),
        ({"params": "adapters"}, "params must be"),
        ({"params": "lora"}, "no parameter of the model is chosen"),
        ({"params": lambda name, p: False}, "no parameter of the model is chosen"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(ValueError, match=said):
        tuned(**options)


def test_train_mode_is_refused():
    model = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.1))
    with pytest.raises(ValueError, match="train mode"):
        SharedSeed(model, loss_fn, lr=0.1)
    ours = SharedSeed(model.eval(), loss_fn, lr=0.1, samples=SAMPLES)
    model[1].train()
    with pytest.raises(ValueError, match="1 is in train mode"):
        ours.step(shard(0, 0))


def test_parameters_that_cannot_be_tuned():
    model = network()
    model[0].weight.data = torch.randn(6, 9).t()
    with pytest.raises(ValueError, match=r"0.weight must be contiguous"):
        SharedSeed(model, loss_fn, lr=0.1)
    model = network()
    model.count = nn.Parameter(torch.zeros(2, dtype=torch.int32), requires_grad=False)
    with pytest.raises(ValueError, match="count must be floating point"):
        SharedSeed(model, loss_fn, lr=0.1, params=lambda name, p: True)


def test_wrong_number_of_batches():
    with pytest.raises(ValueError, match=r"give 3 batches \(samples\) for each of 1 members, got 2"):
        tuned().step(shard(0, 0)[:2])
    with pytest.raises(ValueError, match="members must be at least 1"):
        Alone(0)


def test_parameters_changed_from_outside():
    for change in (
        lambda model: model.load_state_dict(network(seed=2).state_dict()),
        lambda model: setattr(model[0].weight, "data", torch.randn(9, 6)),
    ):
        ours = tuned()
        ours.step(shard(0, 0))
        change(ours.model)
        with pytest.raises(ValueError, match="changed from outside"):
            ours.step(shard(0, 1))
