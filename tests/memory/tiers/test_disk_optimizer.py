"""`DiskOptimizer`: the optimizer in memory, bit for bit; and what can go wrong with a folder."""

from __future__ import annotations

import copy
import errno
import os

import pytest
import torch
from tests.memory.tiers.test_elementwise import OPTIMIZERS
from tests.memory.tiers.training import differing, gpt, in_memory, train
from torch import nn

from weft.errors import CheckpointDamaged, DiskFull, FolderInUse
from weft.memory.tiers.disk_optimizer import DiskOptimizer


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(37, 129), nn.Tanh(), nn.Linear(129, 5, bias=False))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, turn: int) -> None:
    x = torch.randn(8, 37, generator=torch.Generator().manual_seed(turn))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("buffers", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equal_to_memory_and_resumed(tmp_path, name, buffers):
    kind, options = OPTIMIZERS[name]
    model, ours = net(), net()
    optimizer = kind(model.parameters(), **options)
    with DiskOptimizer(ours.parameters(), kind, tmp_path, chunk=1, buffers=buffers, **options) as streamed:
        assert len(streamed.states.chunks) > 1
        for turn in range(3):
            step(model, optimizer, turn)
            step(ours, streamed, turn)
        assert not differing(model.state_dict(), ours.state_dict())
    again = net(seed=1)
    with DiskOptimizer(again.parameters(), kind, tmp_path, chunk=1, resume=True, **options) as streamed:
        assert streamed.steps == 3 and not differing(model.state_dict(), again.state_dict())
        step(model, optimizer, 3)
        step(again, streamed, 3)
        assert not differing(model.state_dict(), again.state_dict())


def test_gpt_with_groups_and_a_schedule(tmp_path):
    def groups(model):
        named = dict(model.named_parameters())
        return [
            {"params": [p for n, p in named.items() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for n, p in named.items() if p.dim() == 1], "weight_decay": 0.0, "lr": 3e-3},
        ]

    results = []
    for folder in (None, tmp_path):
        model = gpt()
        if folder is None:
            optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
        else:
            optimizer = DiskOptimizer(groups(model), torch.optim.AdamW, folder, lr=1e-2, chunk="20 kB")
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        losses = []
        for turn in range(4):
            losses += train(model, optimizer, range(turn, turn + 1))
            schedule.step()
        results.append((losses, model.state_dict()))
    assert results[0][0] == results[1][0] and not differing(results[0][1], results[1][1])


def test_a_parameter_without_gradient_is_left_alone(tmp_path):
    model, ours = net(), net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with DiskOptimizer(ours.parameters(), torch.optim.AdamW, tmp_path, lr=0.1) as streamed:
        for turn in range(4):
            for m, o in ((model, optimizer), (ours, streamed)):
                o.zero_grad()
                m(torch.randn(8, 37, generator=torch.Generator().manual_seed(turn))).square().mean().backward()
                if turn % 2:  # its step count falls behind the others'
                    m[0].bias.grad = None
                o.step()
        assert not differing(model.state_dict(), ours.state_dict())


def test_state_dict_is_the_optimizers_own(tmp_path):
    model, ours = net(), net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with DiskOptimizer(ours.parameters(), torch.optim.AdamW, tmp_path, lr=0.1, chunk=1) as streamed:
        step(model, optimizer, 0)
        step(ours, streamed, 0)
        packed, given = streamed.state_dict(), copy.deepcopy(optimizer.state_dict())
        for index, state in given["state"].items():
            for key, value in state.items():
                assert torch.equal(packed["state"][index][key], value)
        other = torch.optim.AdamW(net().parameters(), lr=0.1)
        other.load_state_dict(packed)
        # and the other way: a run that began in memory goes on on disk
        third = net(seed=3)
        third.load_state_dict(model.state_dict())
        with DiskOptimizer(third.parameters(), torch.optim.AdamW, tmp_path / "third", lr=0.1, chunk=1) as taken:
            taken.load_state_dict(given)
            step(model, optimizer, 1)
            step(third, taken, 1)
            assert not differing(model.state_dict(), third.state_dict())


def test_parameters_changed_by_the_user_are_the_ones_resumed(tmp_path):
    ours = net()
    with DiskOptimizer(ours.parameters(), torch.optim.SGD, tmp_path, lr=0.1) as streamed:
        step(ours, streamed, 0)
        with torch.no_grad():
            ours[2].weight.fill_(2.0)  # no gradient will come for it
        streamed.zero_grad()
        ours[0](torch.ones(1, 37)).sum().backward()
        streamed.step()
        now = ours.state_dict()
    again = net(seed=1)
    with DiskOptimizer(again.parameters(), torch.optim.SGD, tmp_path, lr=0.1, resume=True):
        assert not differing(again.state_dict(), now)


def test_resumed_with_other_chunks_and_random_state(tmp_path):
    losses, final = in_memory(4)
    model = gpt()
    with DiskOptimizer(model.parameters(), torch.optim.AdamW, tmp_path, lr=1e-2, chunk="20 kB") as streamed:
        assert train(model, streamed, range(2)) == losses[:2]
        streamed.notes["position"] = 17
        assert train(model, streamed, range(2, 3)) == losses[2:3]
        expected = torch.rand(3)
    again = gpt()
    with DiskOptimizer(
        again.parameters(), torch.optim.AdamW, tmp_path, lr=1e-2, chunk="50 kB", resume=True
    ) as streamed:
        assert streamed.steps == 3 and streamed.notes == {"position": 17}
        streamed.restore_random()
        assert torch.equal(torch.rand(3), expected)
        assert train(again, streamed, range(3, 4)) == losses[3:] and not differing(again.state_dict(), final)
    # the old layout went when the new one was complete
    assert len([path for path in tmp_path.iterdir() if path.name.isdigit()]) == 1


@pytest.mark.parametrize("when", ["first write", "later write", "manifest"])
def test_a_full_disk_undoes_the_step(tmp_path, monkeypatch, when):
    model, ours = net(), net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with DiskOptimizer(ours.parameters(), torch.optim.AdamW, tmp_path, lr=0.1, chunk=1) as streamed:
        step(model, optimizer, 0)
        step(ours, streamed, 0)
        before = copy.deepcopy(ours.state_dict())
        pwritev, calls = os.pwritev, []

        def full(fd, views, offset):
            calls.append(offset)
            if len(calls) >= (1 if when == "first write" else 2):
                raise OSError(errno.ENOSPC, "No space left on device")
            return pwritev(fd, views, offset)

        def no_room(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            if when == "manifest":
                patch.setattr(os, "fsync", no_room)
            else:
                patch.setattr(os, "pwritev", full)
            with pytest.raises(OSError) as caught:
                step(ours, streamed, 1)
        assert when == "manifest" or isinstance(caught.value, DiskFull)
        assert not differing(before, ours.state_dict()) and streamed.steps == 1
        streamed.step()  # the gradients are still there
        step(model, optimizer, 1)
        step(model, optimizer, 2)
        step(ours, streamed, 2)
        assert not differing(model.state_dict(), ours.state_dict()) and streamed.steps == 3


def test_an_error_in_the_optimizer_undoes_the_step(tmp_path):
    ours = net()
    with DiskOptimizer(ours.parameters(), torch.optim.AdamW, tmp_path, lr=0.1, chunk=1) as streamed:
        step(ours, streamed, 0)
        before = copy.deepcopy(ours.state_dict())
        streamed.param_groups[0]["betas"] = None
        with pytest.raises(TypeError):
            step(ours, streamed, 1)
        assert not differing(before, ours.state_dict())
        streamed.param_groups[0]["betas"] = (0.9, 0.999)
        streamed.step()


def test_options_that_change_what_is_kept_are_refused(tmp_path):
    ours = net()
    with DiskOptimizer(ours.parameters(), torch.optim.SGD, tmp_path, lr=0.1) as streamed:
        step(ours, streamed, 0)
        before = copy.deepcopy(ours.state_dict())
        streamed.param_groups[0]["momentum"] = 0.9
        with pytest.raises(ValueError, match="momentum_buffer"):
            step(ours, streamed, 1)
        assert not differing(before, ours.state_dict())


# ---- folders


def run(tmp_path, steps=2, **options):
    ours = net()
    with DiskOptimizer(ours.parameters(), torch.optim.AdamW, tmp_path, lr=0.1, **options) as streamed:
        for turn in range(steps):
            step(ours, streamed, turn)
    return ours


def test_two_jobs_in_one_folder(tmp_path):
    with DiskOptimizer(net().parameters(), torch.optim.AdamW, tmp_path) as first:
        with pytest.raises(FolderInUse, match=str(os.getpid())):
            DiskOptimizer(net().parameters(), torch.optim.AdamW, tmp_path, resume=True)
        step(net(), first, 0)
    run(tmp_path, resume=True)  # free again


def test_what_cannot_be_closed_leaves_the_folder_free(tmp_path, monkeypatch):
    def failing(*_):
        raise OSError(errno.EIO, "Input/output error")

    streamed = DiskOptimizer(net().parameters(), torch.optim.AdamW, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(streamed.states.file, "close", failing)
        streamed.close()
    run(tmp_path, resume=True)


def test_a_folder_with_state_is_not_overwritten(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="resume=True"):
        run(tmp_path)
    run(tmp_path, resume=True)


def test_foreign_state(tmp_path):
    run(tmp_path)
    other = nn.Sequential(nn.Linear(36, 129), nn.Tanh(), nn.Linear(129, 5, bias=False))
    with pytest.raises(ValueError, match="another model"):
        DiskOptimizer(other.parameters(), torch.optim.AdamW, tmp_path, resume=True)
    with pytest.raises(ValueError, match="AdamW"):
        DiskOptimizer(net().parameters(), torch.optim.SGD, tmp_path, resume=True)
    with pytest.raises(ValueError, match="cannot keep training state"):
        (tmp_path / "file").write_text("")
        DiskOptimizer(net().parameters(), torch.optim.SGD, tmp_path / "file")
    run(tmp_path, resume=True)


def test_other_things_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "mine").write_text("precious")
    run(tmp_path)
    run(tmp_path, resume=True, chunk=1)
    assert (tmp_path / "7" / "mine").read_text() == "precious"


def files(tmp_path, pattern):
    return sorted(tmp_path.glob(f"*/rank0/{pattern}"))


@pytest.mark.parametrize("chunk", ["16 MiB", 1])  # taken over as it is, or converted
@pytest.mark.parametrize("damage", ["cut short", "missing", "a byte", "another file's page"])
def test_damaged_state_is_found(tmp_path, damage, chunk):
    run(tmp_path)
    (state,) = files(tmp_path, "state.bin")
    content = bytearray(state.read_bytes())
    if damage == "cut short":
        state.write_bytes(content[: len(content) // 2])
    elif damage == "missing":
        state.unlink()
    elif damage == "a byte":
        half = len(content) // 2
        content[100] ^= 1  # the same place of both halves: one of them counts
        content[half + 100] ^= 1
        state.write_bytes(content)
    else:
        half = len(content) // 2
        for start in (0, half):
            content[start : start + 4096], content[start + 4096 : start + 8192] = (
                content[start + 4096 : start + 8192], content[start : start + 4096]
            )  # fmt: skip
        state.write_bytes(content)
    model = net(seed=5)
    before, open_files = copy.deepcopy(model.state_dict()), len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointDamaged):
        DiskOptimizer(model.parameters(), torch.optim.AdamW, tmp_path, resume=True, chunk=chunk)
    assert len(os.listdir("/proc/self/fd")) <= open_files
    assert not differing(before, model.state_dict())


def test_a_damaged_manifest_is_not_believed(tmp_path):
    run(tmp_path, steps=3)
    newest = files(tmp_path, "manifest.1")[0]
    text = newest.read_bytes()
    newest.write_bytes(text.replace(b'"step":3', b'"step":9'))
    older = run_and_steps(tmp_path)
    assert older == 2  # complete, and not touched since
    for path in files(tmp_path, "manifest.*"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointDamaged, match="no whole manifest"):
        run_and_steps(tmp_path)


def run_and_steps(tmp_path):
    with DiskOptimizer(net().parameters(), torch.optim.AdamW, tmp_path, lr=0.1, resume=True) as streamed:
        return streamed.steps


def test_parameters_without_elements(tmp_path):
    """They have no place in the file, and no state; a file without any place is none."""
    shapes = ((0, 5), (7,), (0,), ())
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    memory = torch.optim.AdamW(theirs)

    def step(optimizer, parameters):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 2.0)
        optimizer.step()

    for resume in (False, True):
        with DiskOptimizer(ours, torch.optim.AdamW, tmp_path / "some", resume=resume) as optimizer:
            step(optimizer, ours)
            packed = optimizer.state_dict()
        step(memory, theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    torch.optim.AdamW(ours).load_state_dict(packed)
    for resume in (False, True):
        with DiskOptimizer(ours[:1], torch.optim.AdamW, tmp_path / "none", resume=resume) as optimizer:
            step(optimizer, ours[:1])
            assert optimizer.steps == 1 + resume


def test_a_refused_gradient_leaves_none_behind(tmp_path):
    """What came before it in the same step must not count twice in the next."""
    dense, sparse = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    with DiskOptimizer([("dense", dense), ("sparse", sparse)], torch.optim.SGD, tmp_path, lr=1.0) as optimizer:
        dense.grad, sparse.grad = torch.ones(4), torch.ones(4).to_sparse()
        with pytest.raises(ValueError, match="gradient of sparse has the layout"):
            optimizer.step()
        assert not dense.any() and optimizer.steps == 0
        sparse.grad = None
        optimizer.step()
    assert torch.equal(dense, -torch.ones(4))


def test_what_the_files_have_no_place_for(tmp_path):
    model = nn.Linear(3, 3)
    optimizer = DiskOptimizer(model.parameters(), torch.optim.AdamW, tmp_path / "state")
    with pytest.raises(ValueError, match="cannot be added later"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 1
    model.double()
    with pytest.raises(ValueError, match="parameter 0 is now"):
        optimizer.step()
    model.float()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.close()
    with pytest.raises(RuntimeError, match="closed; make a new one with resume=True"):
        optimizer.step()


@pytest.mark.parametrize(
    ("parameters", "kind", "match"),
    [
        ([nn.Parameter(torch.zeros(2))], "AdamW", "must be an optimizer's class"),
        ([nn.Parameter(torch.zeros(2))], torch.optim.LBFGS, "cannot be run on flat pieces"),
        ([nn.Parameter(torch.zeros(2, device="meta"))], torch.optim.AdamW, "parameter 0 is on the meta device"),
        ([nn.Parameter(torch.zeros(2))] * 2, torch.optim.AdamW, "given twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_what_cannot_be_streamed(tmp_path, parameters, kind, match):
    with pytest.raises(ValueError, match=match):
        DiskOptimizer(parameters, kind, tmp_path)


@pytest.mark.parametrize("folder", ["/proc/nowhere", "/dev/null", "/dev/null/below"])
def test_folders_that_cannot_be(folder):
    with pytest.raises(ValueError, match="name a folder to write in"):
        DiskOptimizer([nn.Parameter(torch.zeros(2))], torch.optim.AdamW, folder)


@pytest.mark.parametrize("options", [{"buffers": 0}, {"chunk": "16 apples"}, {"chunk": 0}, {"threads": 0}])
def test_bad_options(tmp_path, options):
    with pytest.raises(ValueError):
        DiskOptimizer(net().parameters(), torch.optim.AdamW, tmp_path, **options)
    run(tmp_path)  # the folder is free


def test_no_room_at_all(tmp_path, monkeypatch):
    """Not even for a folder; when there is some, the folder is free."""

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", full)
        for folder in (tmp_path, tmp_path / "new" / "below"):
            with pytest.raises(DiskFull, match="beginning to work") as caught:
                run(folder)
            kept.append(caught)
    run(tmp_path)
    assert all(caught.value.need > 0 for caught in kept)


def test_too_little_room_is_found_before_training(tmp_path, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DiskFull, match="1000 bytes") as caught:
        DiskOptimizer(net().parameters(), torch.optim.AdamW, tmp_path)
    assert caught.value.need > 1000
