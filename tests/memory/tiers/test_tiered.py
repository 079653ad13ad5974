"""`Tiered` in one process: the bits of training in memory, whatever lives where and whatever way the model takes."""

from __future__ import annotations

import copy
import errno
import gc
import io
import itertools
import math
import os
import pickle

import pytest
import torch
from tests.memory.tiers.training import (
    ADAMW,
    SMALL,
    Branching,
    Normed,
    differing,
    gpt,
    in_memory,
    tokens,
    train,
    train_tiered,
)
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import weft
from weft.errors import CheckpointDamaged, DiskFull, FolderInUse, ParameterChanged, ParameterReleased
from weft.memory import private
from weft.memory.tiers.backward import Backward
from weft.memory.tiers.disk_optimizer import DiskOptimizer
from weft.memory.tiers.fetch import Fetcher
from weft.memory.tiers.files import DiskFile
from weft.memory.tiers.manifest import Manifest
from weft.memory.tiers.moved import MovedGradient
from weft.memory.tiers.passes import Passes
from weft.memory.tiers.prefetch import Mode
from weft.memory.tiers.presence import Presence
from weft.memory.tiers.stepping import Steps
from weft.memory.tiers.store import TIERS, Tiers
from weft.memory.tiers.tiered import Tiered
from weft.memory.tiers.traffic import traffic

ALL = [*itertools.product(TIERS, TIERS, TIERS, ("device", "disk"))]
DISK = Tiers("disk", "disk", "disk", "disk")
LOWER = Tiers("disk", "host", "disk")


@pytest.fixture(scope="module")
def reference():
    return in_memory(3)


def check(tmp_path, reference, tiers, **options):
    losses, final = reference
    model = gpt()
    with Tiered(model, ADAMW, tiers, tmp_path, **{**SMALL, **options}) as tiered:
        assert train_tiered(model, tiered, range(3)) == losses
        assert not differing(tiered.state_dict(), final)
        assert tiered.steps == 3


@pytest.mark.parametrize("names", ALL[::5], ids="-".join)
def test_some_tiers(tmp_path, reference, names):
    check(tmp_path, reference, Tiers(*names))


@pytest.mark.slow
@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("names", list(itertools.product(TIERS, TIERS, TIERS, TIERS)), ids="-".join)
def test_every_combination_of_tiers(tmp_path, reference, names, update):
    check(tmp_path, reference, Tiers(*names), update=update)


@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("names", ["disk device disk device", "host host disk device", "disk disk host disk"])
def test_updates_in_backward(tmp_path, reference, names, buffers):
    check(tmp_path, reference, Tiers(*names.split()), update="backward", buffers=buffers)


@pytest.mark.parametrize("ahead", [1, "10 kB", "1 GB"])
@pytest.mark.parametrize("keep_below", [1, 500, "1 GB"])
def test_any_look_ahead_and_any_share_on_the_device(tmp_path, reference, ahead, keep_below):
    check(tmp_path, reference, Tiers("disk", "host", "disk"), ahead=ahead, keep_below=keep_below)


def test_batchnorm_buffers_and_conv_weights(tmp_path):
    def steps(model, advance, zero):
        for turn in range(3):
            x = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(turn))
            zero()
            model(x).square().mean().backward()
            advance()

    torch.manual_seed(0)
    model = Normed().to(memory_format=torch.channels_last)
    optimizer = ADAMW(model.parameters())
    steps(model, optimizer.step, optimizer.zero_grad)
    torch.manual_seed(0)
    ours = Normed().to(memory_format=torch.channels_last)
    with Tiered(ours, ADAMW, DISK, tmp_path, **SMALL) as tiered:
        steps(ours, tiered.step, tiered.zero_grad)
        assert not differing(model.state_dict(), tiered.state_dict())
    torch.manual_seed(7)
    again = Normed().to(memory_format=torch.channels_last)
    with Tiered(again, ADAMW, DISK, tmp_path, resume=True, **SMALL) as tiered:
        assert not differing(model.state_dict(), tiered.state_dict())


# ---- where things are


def test_a_released_parameter_takes_no_memory_and_is_not_used_between_steps(tmp_path):
    model = gpt()
    with Tiered(model, ADAMW, Tiers("disk", "host", "disk"), tmp_path, **{**SMALL, "ahead": 1}) as tiered:
        loss = model(*tokens(0))
        for parameter in model.parameters():
            assert parameter.untyped_storage().nbytes() == parameter.element_size()
        loss.backward()
        assert all(isinstance(parameter.grad, MovedGradient) for parameter in model.parameters())
        tiered.step()
        whole = dict(model.named_parameters())
        weight = whole["blocks.0.expand.weight"]
        assert weight.requires_grad and weight.is_leaf and weight.numel() == weight.shape[0] * weight.shape[1]
        assert torch.zeros_like(weight).count_nonzero() == 0 and "on a lower tier" in repr(weight)
        uses = (
            lambda: weight.norm(), lambda: weight.detach(), lambda: weight.data, lambda: weight.T, lambda: weight.add_(1),
            lambda: torch.stack([weight, weight]), lambda: torch.add(torch.zeros(()), other=weight), weight.numpy,
            lambda: copy.deepcopy(weight), lambda: torch.save(weight, io.BytesIO()),
            lambda: model.blocks[0].expand.to(torch.float64), lambda: setattr(weight, "data", torch.zeros_like(weight)),
        )  # fmt: skip
        for use in uses:
            with pytest.raises(ParameterReleased, match=r"expand\.weight.*Tiered\.read\(name\)"), torch.no_grad():
                use()
        assert not any(tiered.read(name).isnan().any() for name in whole)
        with pytest.raises(RuntimeError, match=r"exception occurred : .*expand\.weight.*Tiered\.write\(name, tensor\)"):
            model.load_state_dict(tiered.state_dict())
        with pytest.raises(ParameterReleased) as error:
            weight.norm()
        there = pickle.loads(pickle.dumps(error.value))
        assert (there.name, there.shape, str(there)) == ("blocks.0.expand.weight", weight.shape, str(error.value))


class Kept(nn.Module):
    """Weights that the model reads from a list of its own, and in a backward function that saved them as it pleased."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.weights = [self.first.weight, self.second.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.third(Times.apply(x, self.second)).square().mean() + sum(w.abs().mean() for w in self.weights)


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, linear):
        ctx.weight = linear.weight
        return x @ linear.weight.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.weight.t(), None


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("ahead", [1, "1 MB"])
def test_a_parameter_that_somebody_kept(tmp_path, update, ahead):
    def steps(model, optimizer):
        losses = []
        for turn in range(3):
            loss = model(torch.randn(4, 8, generator=torch.Generator().manual_seed(turn)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    torch.manual_seed(0)
    model, ours = Kept(), Kept()
    ours.load_state_dict(model.state_dict())
    with Tiered(ours, ADAMW, LOWER, tmp_path, update=update, **{**SMALL, "ahead": ahead}) as tiered:
        assert steps(ours, tiered.optimizer) == steps(model, ADAMW(model.parameters()))
        assert not differing(tiered.state_dict(), model.state_dict())


def live_bytes(step) -> int:
    """Most bytes of tensors at any moment of a step, beyond those before it."""
    from weft.memory.meters import meter

    gc.collect()
    with meter() as found:
        before = found.live
        step()
        return found.peak - before


def test_peak_memory_of_a_step(tmp_path):
    """A chain of wide layers: on disk, a step may hold two of them, its gradient and the ring, not the model."""
    width, layers = 128, 12
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    x, one = torch.randn(2, width), width * width * 4
    ahead, chunk = one, one
    with Tiered(
        model, ADAMW, Tiers("disk", "disk", "disk"), tmp_path, keep_below=1, ahead=ahead, chunk=chunk, buffers=2
    ) as tiered:  # fmt: skip

        def step():
            model(x).sum().backward()
            tiered.step()

        step()
        peak = live_bytes(step)
    # parameters: one used, one coming, one kept for the next use; gradients: new, being written (2), read; temporaries
    assert peak <= 12 * one, f"{peak / one:.1f} layers' worth of bytes"
    # the ring was there before, in the first step: two records of three arrays
    assert 12 * one + 2 * 3 * one < 4 * layers * one  # what training in memory holds: parameter, gradient, two states


def test_bytes_moved_are_the_formulas(tmp_path):
    """Counted bytes of a step = the formulas, per class; sizes are whole pages so that padding is nothing."""
    width, layers = 64, 3  # 64 x 64 floats: 4 pages
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    parameters = layers * width * width * 4
    for tiers in (
        Tiers("disk", "device", "device"),
        Tiers("device", "disk", "device"),
        Tiers("device", "device", "disk"),
        Tiers("disk", "disk", "disk"),
    ):
        folder = tmp_path / "-".join((tiers.parameters, tiers.gradients, tiers.optimizer))
        # Nothing is fetched ahead of a step and kept: each of the two passes fetches everything.
        with Tiered(model, ADAMW, tiers, folder, keep_below=1, ahead=1) as tiered:
            for _ in range(3):
                disk = tiered._place.disk
                before = disk.bytes_read, disk.bytes_written
                model(
                    torch.ones(1, width, requires_grad=True)
                ).sum().backward()  # every layer's backward uses its weight
                tiered.fetcher.finish()  # what was read ahead for the next pass counts there
                tiered.step()
                moved = disk.bytes_read - before[0], disk.bytes_written - before[1]
            # The last layer's parameter stays for its backward.
            expected = traffic(tiers, parameters)
            stays = parameters // layers if tiers.parameters == "disk" else 0
            assert moved[0] == expected.read["disk"] - stays
            assert moved[1] == expected.write["disk"]
            model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


# ---- models that take other ways


def compare(tmp_path, make, steps, tiers=LOWER, optimizer=ADAMW, **options):
    """`steps(model, begin, end)` in memory and on tiers; the Tiered, for more questions."""
    torch.manual_seed(0)
    model = make()
    reference = optimizer(model.parameters())
    expected = steps(model, reference.zero_grad, reference.step)
    torch.manual_seed(0)
    ours = make()
    tiered = Tiered(ours, optimizer, tiers, tmp_path, **{**SMALL, **options})
    found = steps(ours, lambda: None, tiered.step)
    assert found == expected
    assert not differing(tiered.state_dict(), model.state_dict())
    tiered.close()
    return tiered


WAYS = [[0, 1, 2], [0, 1, 2], [2, 0], [4, 3, 2, 1, 0], [1, 1, 1], [], [0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("update", ["step", "backward"])
def test_data_dependent_branches(tmp_path, update):
    def steps(model, begin, end):
        losses = []
        for turn, way in enumerate(WAYS):
            x = torch.randn(4, 24, generator=torch.Generator().manual_seed(turn))
            begin()
            loss = model(x, way).square().mean()
            losses.append(loss.item())
            loss.backward()
            end()
        return losses

    tiered = compare(tmp_path, Branching, steps, update=update)
    order = tiered.fetcher.training
    assert order.rerecorded == 5  # every change of the way, and the way back
    names = [tiered.slots[index].name for index in order.trace]
    assert order.mode is Mode.COMPLETE
    weights = [name for name in names if name.endswith("weight")]  # forward, then what backward needs
    assert weights == [f"experts.{i}.weight" for i in (0, 1, 2)] + ["out.weight", "out.weight"] + [
        f"experts.{i}.weight" for i in (2, 1)
    ]


def test_tied_weights_used_outside_the_model(tmp_path):
    """The head is a functional use of another module's weight, once inside the model, once in the loss."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix = nn.Embedding(31, 24), nn.Linear(24, 24)

        def forward(self, x):
            return F.linear(torch.tanh(self.mix(self.embed(x))), self.embed.weight)

    def steps(model, begin, end):
        losses = []
        for turn in range(3):
            x = torch.randint(31, (6,), generator=torch.Generator().manual_seed(turn))
            begin()
            y = model(x)
            loss = F.cross_entropy(y, x) + (model.mix.weight * model.mix.weight).sum() + model.embed.weight.norm()
            losses.append(loss.item())
            loss.backward()
            end()
        return losses

    compare(tmp_path, Tied, steps)
    compare(tmp_path / "backward", Tied, steps, update="backward")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(tmp_path, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(12, 24)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24), nn.Dropout(0.1)) for _ in range(3)
            )

        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=reentrant)
            return x

    def steps(model, begin, end):
        losses = []
        for turn in range(3):
            torch.manual_seed(turn)
            begin()
            loss = model(torch.randn(5, 12)).square().mean()
            losses.append(loss.item())
            loss.backward()
            end()
        return losses

    compare(tmp_path, Checkpointed, steps, tiers=DISK)


class Scaled(nn.Module):
    """A frozen factor beside a trained layer, as adapters have them: backward reads the factor, the very object."""

    def __init__(self, frozen: bool):
        super().__init__()
        self.factor, self.layer = nn.Parameter(torch.rand(8) + 1, requires_grad=not frozen), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.tanh(self.factor * x))

    def again(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.forward, x, use_reentrant=False)

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        with saved_tensors_hooks(lambda t: t, lambda t: t):
            return self(x)

    def kept_within(self, x: torch.Tensor) -> torch.Tensor:
        with saved_tensors_hooks(lambda t: t, lambda t: t):
            return self.forward(x)


HOW = {
    "checkpoint": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "of two": lambda block, x: checkpoint(nn.Sequential(block, block), x, use_reentrant=False),
    "in another": lambda block, x: checkpoint(HOW["checkpoint"], block, x, use_reentrant=False),
    "of a method": Scaled.again,
    "hooks": Scaled.kept,
    "hooks within": Scaled.kept_within,
}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("how", HOW)
def test_parameters_that_other_hooks_keep(tmp_path, how, frozen):
    """Hooks of others on what autograd saves may keep a parameter itself, which is released before backward reads it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.blocks = nn.Linear(8, 8), nn.ModuleList(Scaled(frozen) for _ in range(2))

        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = HOW[how](block, x)
            return x.square().mean()

    def steps(model, begin, end):
        losses = []
        for turn in range(3):
            begin()
            loss = model(torch.randn(4, 8, generator=torch.Generator().manual_seed(turn)))
            losses.append(loss.item())
            loss.backward()
            end()
        return losses

    for tiers in (Tiers("host"), DISK):
        compare(tmp_path / tiers.parameters, Net, steps, tiers=tiers, ahead=1)
    tiered = compare(tmp_path / "backward", Net, steps, tiers=DISK, ahead=1, update="backward")
    assert not tiered.presence.held and private.hooks_on_saving() is None


def test_layers_that_hold_their_weights_themselves(tmp_path):
    """LSTM keeps a list of its parameters, MultiheadAttention uses the weight of a module it never calls."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.attention = nn.LSTM(8, 12, num_layers=2, bidirectional=True), nn.MultiheadAttention(24, 3)
            self.scale = nn.Parameter(torch.ones(24))

        def forward(self, x):
            y, _ = self.lstm(x)
            return self.attention(y, y, y)[0] * self.scale

    def steps(model, begin, end):
        losses = []
        for turn in range(3):
            begin()
            loss = model(torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(turn))).square().mean()
            losses.append(loss.item())
            loss.backward()
            end()
        return losses

    compare(tmp_path, Mixed, steps)


def test_frozen_and_unused_parameters(tmp_path):
    def make():
        model = Branching()
        model.experts[1].requires_grad_(False)
        return model

    def steps(model, begin, end):
        for turn in range(3):
            begin()
            model(torch.randn(4, 24, generator=torch.Generator().manual_seed(turn)), [0, 1]).square().mean().backward()
            end()

    compare(tmp_path, make, steps)


def test_micro_batches_and_evaluation_between(tmp_path):
    def steps(model, begin, end):
        losses = []
        for turn in range(3):
            begin()
            for part in range(3):
                torch.manual_seed(turn)
                loss = model(*tokens(3 * turn + part)) / 3
                loss.backward()
            with torch.no_grad():
                losses.append(model.eval()(*tokens(99)).item())
            model.train()
            end()
        return losses

    for name in ("host", "disk", "device"):
        compare(tmp_path / name, gpt, steps, tiers=Tiers("disk", name, "disk"))


def test_a_second_backward_is_refused_where_updates_are_done(tmp_path):
    model = gpt()
    with Tiered(model, ADAMW, Tiers("disk", "host", "disk"), tmp_path, update="backward", **SMALL) as tiered:
        before = tiered.state_dict()
        for _ in range(2):
            model(*tokens(0)).backward()
        with pytest.raises(RuntimeError, match="one backward per step"):
            tiered.step()
        assert not differing(before, tiered.state_dict()) and tiered.steps == 0


LIMITS = [[0.1], [], [0.3, 0.2, 1e9]]  # clipped once, not at all, and by what the first has left


def test_clipping(tmp_path):
    def in_place(model, optimizer):
        norms = []
        for turn in range(3):
            torch.manual_seed(turn)
            optimizer.zero_grad()
            model(*tokens(turn)).backward()
            for most in LIMITS[turn]:
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), most).item())
            optimizer.step()
        return norms

    reference = gpt()
    norms = in_place(reference, ADAMW(reference.parameters()))
    for name in ("device", "host", "disk"):
        model = gpt()
        with Tiered(
            model, ADAMW, Tiers("disk", name, "disk"), tmp_path / name, **{**SMALL, "chunk": "1 MiB"}
        ) as tiered:
            found = []
            for turn in range(3):
                torch.manual_seed(turn)
                model(*tokens(turn)).backward()
                found += [tiered.clip_grad_norm_(most).item() for most in LIMITS[turn]]
                tiered.step()
            assert found == norms
            assert not differing(tiered.state_dict(), reference.state_dict())
    with Tiered(gpt(), ADAMW, Tiers("host"), update="backward") as tiered, pytest.raises(ValueError, match="clipped"):
        tiered.clip_grad_norm_(1.0)


def test_groups_by_name_and_a_schedule(tmp_path):
    names = [name for name, p in gpt().named_parameters()]
    decayed = [name for name, p in gpt().named_parameters() if p.dim() > 1]
    groups = [
        {"params": decayed, "weight_decay": 0.3},
        {"params": [name for name in names if name not in decayed], "lr": 1e-3},
    ]
    reference = gpt()
    named = dict(reference.named_parameters())
    optimizer = torch.optim.AdamW([{**g, "params": [named[n] for n in g["params"]]} for g in groups], lr=1e-2)
    model = gpt()
    with Tiered(model, ADAMW, Tiers("disk", "host", "disk"), tmp_path, groups=groups, **SMALL) as tiered:
        schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (optimizer, tiered.optimizer)]
        for turn in range(3):
            torch.manual_seed(turn)
            optimizer.zero_grad()
            reference(*tokens(turn)).backward()
            optimizer.step()
            torch.manual_seed(turn)
            model(*tokens(turn)).backward()
            tiered.optimizer.step()
            for schedule in schedules:
                schedule.step()
        assert not differing(tiered.state_dict(), reference.state_dict())
        assert [g["lr"] for g in tiered.optimizer.param_groups] == [g["lr"] for g in optimizer.param_groups]
        with pytest.raises(ValueError, match="cannot be added later"):
            tiered.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


# ---- building a model piece by piece


def test_a_model_that_was_never_whole(tmp_path):
    from weft.placement import materialise

    reference = gpt()
    torch.manual_seed(0)
    model = weft.deferred(gpt)
    assert all(p.device.type == "meta" for p in model.parameters())
    with Tiered(model, ADAMW, Tiers("disk", "host", "disk"), tmp_path, values=materialise(model), **SMALL) as tiered:
        assert not differing(tiered.state_dict(), reference.state_dict())
        optimizer = ADAMW(reference.parameters())
        for turn in range(2):
            torch.manual_seed(turn)
            optimizer.zero_grad()
            reference(*tokens(turn)).backward()
            optimizer.step()
        train_tiered(model, tiered, range(2))
        assert not differing(tiered.state_dict(), reference.state_dict())
        assert model.head.weight is model.embed.weight
    again = weft.deferred(gpt)
    with Tiered(again, ADAMW, Tiers("host", "host", "disk"), tmp_path, resume=True, **SMALL) as tiered:
        assert tiered.steps == 2 and not differing(tiered.state_dict(), reference.state_dict())


def test_peak_memory_of_building(tmp_path):
    """32 layers, of which no more than a few are ever in memory."""
    from weft.placement import materialise

    width, layers = 96, 32
    model = weft.deferred(lambda: nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))))

    def build():
        tiered = Tiered(
            model, ADAMW, Tiers("disk", "disk", "disk"), tmp_path, values=materialise(model), keep_below=1, chunk=1
        )
        tiered.close()

    assert live_bytes(build) <= 6 * width * width * 4


@pytest.mark.parametrize("how", ["missing", "shape", "none"])
def test_values_that_do_not_fit(tmp_path, how):
    values = dict(gpt().state_dict())
    if how == "missing":
        del values["position.weight"]
    elif how == "shape":
        values["position.weight"] = torch.zeros(3, 3)
    with torch.device("meta"):
        model = gpt()
    with pytest.raises(
        ValueError, match="meta device" if how != "shape" else r"position.weight is torch.float32 \(3, 3\)"
    ):
        Tiered(
            model,
            ADAMW,
            Tiers("disk", "host", "disk"),
            tmp_path,
            values=None if how == "none" else values.items(),
            **SMALL,
        )


# ---- what goes wrong


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("when", ["values", "manifest"])
def test_a_model_is_what_it_was_when_it_cannot_be_put_on_tiers(tmp_path, monkeypatch, when, tier):
    model, before = gpt(), gpt().state_dict()

    def values():
        yield from list(before.items())[:3]
        raise OSError("the download broke")

    def full(*args):
        raise DiskFull("manifest.0", 1, 0, "writing")

    if when == "manifest":
        monkeypatch.setattr(Manifest, "write", full)
    given = values() if when == "values" else None
    with pytest.raises(OSError, match="download broke" if when == "values" else "manifest.0"):
        Tiered(model, ADAMW, Tiers(tier, "host", "disk"), tmp_path, values=given, **SMALL)
    assert not differing(model.state_dict(), before)
    monkeypatch.undo()
    Tiered(model, ADAMW, Tiers(tier, "host", "disk"), tmp_path, **SMALL).close()


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks")
PARTS = {
    "fetcher": (Fetcher, "__init__", 1), "presence": (Presence, "_take_away", 3), "gradients": (Backward, "hook_gradients", 1),
    "updates": (Steps, "__init__", 1), "modules": (nn.Module, "register_forward_hook", 4),
    "states": (nn.Module, "register_state_dict_post_hook", 4), "end": (Steps, "share_whole", 1),
}  # fmt: skip


@pytest.mark.parametrize(("part", "resume"), [*itertools.product(list(PARTS)[:-1], (False, True)), ("end", True)])
def test_a_model_is_what_it_was_when_its_tiers_cannot_be_connected(tmp_path, monkeypatch, part, resume):
    tiers, options = Tiers("disk", "disk", "disk", "disk"), {**SMALL, "update": "backward"}
    if resume:
        with Tiered(gpt(), ADAMW, tiers, tmp_path, **options):
            pass
    model, before, files = gpt(), gpt().state_dict(), len(os.listdir("/proc/self/fd"))
    kind, name, at = PARTS[part]
    real, calls = getattr(kind, name), []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(kind, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            Tiered(model, ADAMW, tiers, tmp_path, resume=resume, **options)
    assert len(os.listdir("/proc/self/fd")) <= files and not list(tmp_path.glob("scratch*"))
    assert not any(getattr(module, hooks) for module in model.modules() for hooks in HOOKS)
    assert all(type(module._parameters) is dict for module in model.modules()) and "zero_grad" not in vars(model)
    assert all(type(p) is nn.Parameter and not p._backward_hooks for p in model.parameters())
    assert not differing(model.state_dict(), before)
    with Tiered(model, ADAMW, tiers, tmp_path, resume=True, **options) as tiered:
        found = train_tiered(model, tiered, range(2))
    assert found == in_memory(2)[0]


@pytest.mark.parametrize("when", ["optimizer", "values", "connecting"])
def test_a_model_without_values_is_without_them_again(tmp_path, monkeypatch, when):
    """Else it would be taken the next time for one whose values are zeros."""
    with torch.device("meta"):
        model = Normed()
    made = Normed()
    optimizer, given = (torch.optim.LBFGS if when == "optimizer" else ADAMW), made.state_dict()
    if when == "values":
        del given["head.bias"]
    with monkeypatch.context() as patch, pytest.raises((ValueError, OSError)):
        if when == "connecting":
            patch.setattr(Passes, "watch", failing)
        Tiered(model, optimizer, LOWER, tmp_path, values=given.items(), **SMALL)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    with Tiered(model, ADAMW, LOWER, tmp_path, values=made.state_dict().items(), resume=True, **SMALL) as tiered:
        assert not differing(tiered.state_dict(), made.state_dict()) or when == "values"


def test_activations_that_cannot_be_written(tmp_path, reference, monkeypatch):
    """The pass that needs them fails; steps after it have nothing to do with them. And closing twice is closing once."""
    losses, final = reference
    model, real = gpt(), DiskFile.write_now

    def faulty(self, view, offset):
        if self.path.name == "activations.bin":
            raise OSError(errno.EIO, "the disk has a fault")
        real(self, view, offset)

    tiered = Tiered(model, ADAMW, Tiers("host", "host", "disk", "disk"), tmp_path, **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(DiskFile, "write_now", faulty)
        torch.manual_seed(0)
        loss = model(*tokens(0))
        for _ in range(2):
            with pytest.raises(OSError, match="fault"):
                loss.backward(retain_graph=True)
    del loss
    tiered.zero_grad()
    assert train_tiered(model, tiered, range(len(losses))) == losses
    assert not differing(tiered.state_dict(), final)
    tiered.close()
    tiered.close()


def test_activations_take_the_room_there_is(tmp_path, reference, monkeypatch):
    """Their file grows ahead of its use, where the disk has that much."""
    losses, final = reference
    real, grown = DiskFile._reserve, []

    def little(self, size):
        if self.path.name == "activations.bin" and size > 8 << 20:
            raise DiskFull(str(self.path), size, 8 << 20, "reserving space")
        grown.append(size)
        real(self, size)

    monkeypatch.setattr(DiskFile, "_reserve", little)
    model = gpt()
    with Tiered(model, ADAMW, DISK, tmp_path, **SMALL) as tiered:
        assert train_tiered(model, tiered, range(3)) == losses
        assert not differing(tiered.state_dict(), final)
    assert len(grown) > 2


def test_an_exception_in_forward_or_backward(tmp_path, reference):
    class Fault(Exception):
        pass

    losses, final = reference
    model = gpt()

    def fail(*_):
        raise Fault

    with Tiered(model, ADAMW, DISK, tmp_path, **SMALL) as tiered:
        assert train_tiered(model, tiered, range(1)) == losses[:1]
        hook = model.blocks[1].expand.register_forward_hook(fail)
        with pytest.raises(Fault):
            model(*tokens(1))
        hook.remove()
        loss = model(*tokens(1))
        hook = model.blocks[0].register_full_backward_hook(fail)
        torch.manual_seed(1)
        loss = model(*tokens(1))
        with pytest.raises(Fault):
            loss.backward()
        hook.remove()
        tiered.zero_grad()
        assert train_tiered(model, tiered, range(1, 3)) == losses[1:]
        assert not differing(tiered.state_dict(), final)


def test_a_parameter_changed_outside_the_optimizer(tmp_path):
    model = gpt()
    with Tiered(model, ADAMW, Tiers("disk", "host", "disk"), tmp_path, **{**SMALL, "ahead": 1}) as tiered:
        hook = model.blocks[0].expand.register_forward_hook(lambda m, *_: m.weight.data.mul_(2) is None)
        with torch.no_grad():
            hook.remove()
            hook = model.blocks[0].expand.register_forward_pre_hook(
                lambda m, *_: m.weight.detach().mul_(2) is None or None
            )
            with pytest.raises(ParameterChanged, match=r"blocks\.0\.expand\.weight"):
                model(*tokens(0))
        hook.remove()
        tiered.write("blocks.0.expand.weight", torch.ones(152, 38))
        assert (tiered.read("blocks.0.expand.weight") == 1).all() and tiered.steps == 0


class Unlike(nn.Module):
    """Parameters of three dtypes, in turns, and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.layers = nn.ModuleList(
            nn.Linear(40, 40, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64) * 3
        )

    def forward(self, x: torch.Tensor, used: int = 9) -> torch.Tensor:
        for layer in self.layers[:used]:
            x = layer(x.to(layer.weight.dtype)).sin()
        return x.square().sum() + self.empty.sum()


@pytest.mark.parametrize("tiers", [LOWER, Tiers("host", "device", "disk")])
def test_clipping_gradients_of_several_dtypes(tmp_path, tiers):
    """Norms are added dtype by dtype, as torch does: in another order the sum has other bits. Nor has a layer that was not used
    a part in it: a zero of its dtype would be a norm too."""
    torch.manual_seed(0)
    model = Unlike()
    ours = copy.deepcopy(model)
    optimizer = ADAMW(model.parameters())
    with Tiered(ours, ADAMW, tiers, tmp_path, **SMALL) as tiered:
        for turn in range(6):
            x = torch.randn(5, 40, generator=torch.Generator().manual_seed(turn))
            for each in (model, ours):
                each(x, (9, 2, 1)[turn % 3]).backward()
            for most in (0.1, 0.07):
                wanted = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
                found = tiered.clip_grad_norm_(most)
                assert torch.equal(found, wanted) and found.dtype == wanted.dtype
            tiered.step()
            optimizer.step()
            optimizer.zero_grad()
        assert not differing(tiered.state_dict(), model.state_dict())


def test_a_model_with_files_is_not_copied(tmp_path):
    """Its hooks would be copied with it, and the threads that they move bytes with; an average of weights begins so."""
    model = gpt()
    with Tiered(model, ADAMW, Tiers(optimizer="disk"), tmp_path, **SMALL) as tiered:
        for use in (copy.deepcopy, pickle.dumps, torch.optim.swa_utils.AveragedModel):
            for each in (model, model.blocks[0]):
                with pytest.raises(TypeError, match=r"cannot be copied or pickled.*Tiered\.state_dict"):
                    use(each)
        train_tiered(model, tiered, range(1))
    assert not differing(copy.deepcopy(model).state_dict(), model.state_dict())


def test_other_memory_under_a_parameter(tmp_path):
    model = gpt()
    weight = model.blocks[0].expand.weight
    with Tiered(model, ADAMW, Tiers("disk", "host", "disk"), tmp_path, **{**SMALL, "ahead": 1}):
        model.blocks[0].expand.register_forward_pre_hook(lambda m, *_: setattr(weight, "data", torch.ones(152, 38)))
        with pytest.raises(ParameterChanged, match=r"blocks\.0\.expand\.weight"):
            model(*tokens(0))


@pytest.mark.parametrize("parameters", TIERS)
def test_written_values_are_kept_and_resumed(tmp_path, parameters):
    names = (parameters, "host", "disk")
    model, other = gpt(), gpt()
    with Tiered(model, ADAMW, Tiers(*names), tmp_path, **SMALL) as tiered:
        train_tiered(model, tiered, range(1))
        for name, p in other.named_parameters():
            tiered.write(name, p.detach())
        assert not differing(tiered.state_dict(), other.state_dict())
    with Tiered(gpt(), ADAMW, Tiers(*names), tmp_path, resume=True, **SMALL) as tiered:
        assert tiered.steps == 1 and not differing(tiered.state_dict(), other.state_dict())


@pytest.mark.parametrize("ahead", [1, "1 MB"])
@pytest.mark.parametrize("parameters", TIERS)
def test_values_written_after_a_pass_without_a_step(tmp_path, parameters, ahead):
    """What the pass has left on the device, some of it held until the step, is not what is used next."""
    model, other = gpt(), gpt().requires_grad_(False)
    for p in other.parameters():
        p.mul_(1.5)
    with Tiered(model, ADAMW, Tiers(parameters, "host", "disk"), tmp_path, **{**SMALL, "ahead": ahead}) as tiered:
        train_tiered(model, tiered, range(2))
        model(*tokens(0))
        model.blocks[0].expand.weight.norm()
        for name, p in other.named_parameters():
            tiered.write(name, p)
        assert not differing(tiered.state_dict(), other.state_dict())
        assert model.eval()(*tokens(1)).item() == other.eval()(*tokens(1)).item()
        assert model.blocks[0].expand.weight.norm().item() == other.blocks[0].expand.weight.norm().item()


@pytest.mark.parametrize("frozen", [True, False])
def test_a_parameter_on_the_device_changed_in_place_is_resumed(tmp_path, frozen):
    """It has no gradient, so only its version tells."""
    model, stays = gpt(), Tiers(optimizer="disk")
    model.blocks[0].expand.requires_grad_(not frozen)
    with Tiered(model, ADAMW, stays, tmp_path, **SMALL) as tiered:
        train_tiered(model, tiered, range(1))
        with torch.no_grad():
            model.blocks[0].expand.requires_grad_(False).weight.zero_()
        train_tiered(model, tiered, range(2))
        expected = tiered.state_dict()
    assert expected["blocks.0.expand.weight"].count_nonzero() == 0
    model = gpt()
    model.blocks[0].expand.requires_grad_(not frozen)
    with Tiered(model, ADAMW, stays, tmp_path, resume=True, **SMALL) as tiered:
        assert not differing(tiered.state_dict(), expected)


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("parameters", TIERS)
def test_a_full_disk_undoes_the_step(tmp_path, reference, monkeypatch, parameters, update):
    losses, final = reference
    model = gpt()
    with Tiered(model, ADAMW, Tiers(parameters, "host", "disk"), tmp_path, update=update, **SMALL) as tiered:
        assert train_tiered(model, tiered, range(1)) == losses[:1]
        before = tiered.state_dict()
        pwritev, count = os.pwritev, []

        def full(fd, views, offset):
            count.append(1)
            if len(count) > 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return pwritev(fd, views, offset)

        torch.manual_seed(1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", full)
            with pytest.raises(DiskFull):
                model(*tokens(1)).backward()
                tiered.step()
        assert tiered.steps == 1 and not differing(before, tiered.state_dict())
        tiered.zero_grad()
        assert train_tiered(model, tiered, range(1, 3)) == losses[1:]
        assert not differing(tiered.state_dict(), final)


def test_states_in_memory_cannot_be_undone_and_say_so(tmp_path, monkeypatch):
    model = gpt()
    with Tiered(model, ADAMW, Tiers("disk", "host", "host"), tmp_path, **SMALL) as tiered:
        train_tiered(model, tiered, range(1))

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        model(*tokens(1)).backward()
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", full)
            with pytest.raises(DiskFull):
                tiered.step()
        model(*tokens(1)).backward()
        with pytest.raises(RuntimeError, match="load a checkpoint"):
            tiered.step()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tiers": Tiers("disk")}, "needs a folder"),
        ({"tiers": Tiers("host"), "resume": True}, "optimizer='disk'"),
        ({"update": "sometimes"}, "'step' or 'backward'"),
        ({"chunk": "many"}, "chunk"),
        ({"groups": [{"params": ["nobody"]}]}, "nobody is no parameter"),
        ({"groups": [{"params": ["head.bias"]}, {"params": ["head.bias"]}]}, "in two groups"),
        ({"optimizer": torch.optim.Adafactor, "tiers": Tiers(optimizer="disk"), "folder": "here"}, "elementwise"),
        ({"optimizer": torch.optim.Adafactor, "tiers": Tiers("host")}, "elementwise"),  # pieces there too
    ],
)
def test_bad_options(tmp_path, options, match):
    options = {"model": Normed(), "optimizer": ADAMW, "tiers": Tiers(), **options}
    if "folder" in options:
        options["folder"] = tmp_path
    with pytest.raises(ValueError, match=match):
        Tiered(**options)


def test_bad_tiers():
    with pytest.raises(ValueError, match="parameters must be one of device, host, disk, got 'nvme'"):
        Tiers(parameters="nvme")


def test_two_jobs_in_one_folder(tmp_path):
    with Tiered(gpt(), ADAMW, DISK, tmp_path), pytest.raises(FolderInUse):
        Tiered(gpt(), ADAMW, DISK, tmp_path, resume=True)


def failing(*_):
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("tiers", [Tiers(gradients="disk"), Tiers(activations="disk"), Tiers("disk")], ids=str)
@pytest.mark.parametrize("call", ["pwritev", "preadv"])
def test_a_failing_disk_leaves_the_folder_free(tmp_path, monkeypatch, tiers, call):
    model, before = gpt(), len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        with Tiered(model, ADAMW, tiers, tmp_path, **SMALL) as tiered:
            patch.setattr(os, call, failing)
            train_tiered(model, tiered, range(2))
    assert "zero_grad" not in vars(model) and len(os.listdir("/proc/self/fd")) <= before
    Tiered(gpt(), ADAMW, tiers, tmp_path, **SMALL).close()


def test_what_cannot_be_closed_leaves_the_folder_free(tmp_path, monkeypatch):
    tiered = Tiered(gpt(), ADAMW, DISK, tmp_path, **SMALL)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(tiered.store, "close", failing)
        patch.setattr(tiered.states.file, "close", failing)
        tiered.close()
    Tiered(gpt(), ADAMW, DISK, tmp_path, resume=True, **SMALL).close()


def test_a_refused_resume_leaves_no_file_open(tmp_path):
    Tiered(gpt(), ADAMW, DISK, tmp_path, **SMALL).close()
    (state,) = tmp_path.glob("*/rank0/state.bin")
    state.write_bytes(bytes(state.stat().st_size))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointDamaged):
        Tiered(gpt(), ADAMW, DISK, tmp_path, resume=True, **SMALL)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_closing_leaves_the_model_as_it_was(tmp_path):
    model = gpt()
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    tiered = Tiered(model, ADAMW, Tiers("device", "host", "disk"), tmp_path, **SMALL)
    assert hooks() > 0
    tiered.close()
    assert hooks() == 0 and all(type(m._parameters) is dict for m in model.modules())
    loss = model(*tokens(0))
    loss.backward()
    assert math.isfinite(loss.item()) and all(p.grad is not None for p in model.parameters())
    assert not list(tmp_path.glob("scratch*"))
    for use in (tiered.step, tiered.state_dict):  # not a file that is gone, nor NaN
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_a_refused_resume_leaves_parameters_on_the_device_alone(tmp_path):
    """Found when parameters could be loaded already: a buffer is of another shape."""

    def make(length: int) -> nn.Module:
        model = nn.Linear(8, 4)
        model.register_buffer("table", torch.zeros(length))
        return model

    for tiers in (Tiers(optimizer="disk"), Tiers("disk", "host", "disk")):
        folder = tmp_path / tiers.parameters
        Tiered(make(3), ADAMW, tiers, folder, keep_below=1).close()
        model = make(5)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"buffer table has shape \(3,\), this model's \(5,\)"):
            Tiered(model, ADAMW, tiers, folder, keep_below=1, resume=True)
        assert not differing(model.state_dict(), before)


@pytest.mark.parametrize("parameters", TIERS)
def test_a_pass_between_backward_and_step(tmp_path, parameters):
    """Parameters on disk are those of the step before until the step; of others some would be newer than others."""
    reference, model = gpt(0.0), gpt(0.0)
    with Tiered(model, ADAMW, Tiers(parameters, "host", "disk"), tmp_path, update="backward", **SMALL) as tiered:
        model(*tokens(0)).backward()
        with torch.no_grad():
            if parameters != "disk":
                with pytest.raises(RuntimeError, match=r"call step\(\) first"):
                    model(*tokens(1))
            else:
                assert model(*tokens(1)).item() == reference(*tokens(1)).item()
        tiered.step()
        train(reference, ADAMW(reference.parameters()), range(1))
        with torch.no_grad():
            assert model(*tokens(1)).item() == reference(*tokens(1)).item()
        assert not differing(tiered.state_dict(), reference.state_dict())


@pytest.mark.parametrize("kind", ["tiered", "disk optimizer"])
def test_changes_in_place_survive_a_step_that_is_undone(tmp_path, monkeypatch, kind):
    model, reference = nn.Linear(96, 64), nn.Linear(96, 64)
    reference.load_state_dict(model.state_dict())
    x, plain = torch.randn(4, 96), torch.optim.AdamW(reference.parameters(), lr=1e-2)
    if kind == "tiered":
        run = Tiered(model, ADAMW, Tiers(optimizer="disk"), tmp_path, **SMALL)
    else:
        run = DiskOptimizer(model.parameters(), torch.optim.AdamW, tmp_path, lr=1e-2, chunk=SMALL["chunk"])

    def full(*args: object) -> None:
        raise DiskFull("manifest.0", 1, 0, "writing")

    with run:
        for _ in range(2):
            for each, optimizer in ((model, run), (reference, plain)):
                with torch.no_grad():
                    each.weight.mul_(0.5)
                optimizer.zero_grad()
                each(x).square().mean().backward()
            before = copy.deepcopy(model.state_dict())
            with monkeypatch.context() as patch, pytest.raises(DiskFull):
                patch.setattr(Manifest, "write", full)
                run.step()
            assert not differing(model.state_dict(), before)
            run.step()
            plain.step()
            assert not differing(model.state_dict(), reference.state_dict())
