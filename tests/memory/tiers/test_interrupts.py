"""Ctrl-C at any place of a step: the run goes on with the bits of one without, and the folder always has a complete step."""

from __future__ import annotations

import errno
import json
import shutil
import threading
import time
import zlib

import pytest
import torch
from tests.memory.tiers.training import ADAMW, SMALL, differing
from torch import nn

from weft.memory.tiers import DiskOptimizer, Tiered, Tiers, manifest
from weft.memory.tiers.elementwise import Elementwise
from weft.memory.tiers.files import DiskFile
from weft.memory.tiers.manifest import Manifest
from weft.memory.tiers.passes import Passes
from weft.memory.tiers.presence import Presence
from weft.memory.tiers.ring import Ring
from weft.memory.tiers.statefile import StateFile
from weft.memory.tiers.states import States
from weft.memory.tiers.updates import Updates

LOWER, STAYS = Tiers("disk", "host", "disk"), Tiers("device", "device", "disk")


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))


def backward(model: nn.Module, turn: int) -> None:
    model(torch.randn(4, 64, generator=torch.Generator().manual_seed(turn))).square().mean().backward()


def trained(steps: int) -> dict[str, torch.Tensor]:
    model = small()
    optimizer = ADAMW(model.parameters())
    for turn in range(steps):
        backward(model, turn)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def go_on(model: nn.Module, tiered: Tiered, steps: int) -> int:
    """Train as a notebook does in which somebody presses Ctrl-C; how often."""
    hits = 0
    while tiered.steps < steps:
        turn = tiered.steps
        try:
            backward(model, turn)
            tiered.step()
        except KeyboardInterrupt:
            hits += 1
            if tiered.steps == turn:  # a step that counts has used its gradients up
                tiered.zero_grad()
    return hits


def interrupted(monkeypatch, kind: type, name: str, at: int, *, after: bool = False) -> None:
    """Ctrl-C in the `at`-th call of a method, before or after it has done its work."""
    real, calls = getattr(kind, name), []

    def method(*args, **options):
        calls.append(1)
        found = real(*args, **options) if after or len(calls) != at else None
        if len(calls) == at:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(kind, name, method)


PLACES = {
    "a parameter is to go, and is there": (Presence, "_take_away", False),
    "a parameter is away, and nobody knows": (Presence, "_take_away", True),
    "a parameter is there, and nobody knows": (Presence, "_know", True),
    "a buffer is taken, and nobody knows": (Ring, "take", True),
    "writing has begun, and nobody knows": (StateFile, "write", True),
    "a chunk is updated, and not written": (Elementwise, "update", True),
    "an update is done, and not counted": (States, "finish", True),
    "some chunks count, others do not yet": (StateFile, "turn", True),
    "the manifest is there": (Manifest, "write", True),
    "the step counts": (States, "commit", True),
    "the step counts, and is not tidied up after": (Passes, "end_step", False),
}


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("place", PLACES)
def test_interrupted_and_gone_on(tmp_path, monkeypatch, place, update):
    model, (kind, name, after) = small(), PLACES[place]
    with Tiered(model, ADAMW, LOWER, tmp_path, update=update, **SMALL) as tiered:
        go_on(model, tiered, 1)
        for at in (1, 2) if name in ("take", "write", "update", "finish", "turn") and kind is not Manifest else (1,):
            with monkeypatch.context() as patch:
                interrupted(patch, kind, name, at, after=after)
                assert go_on(model, tiered, tiered.steps + 1) == 1
        steps = tiered.steps + 1
        go_on(model, tiered, steps)
        expected = trained(steps)
        assert not differing(tiered.state_dict(), expected)
    with Tiered(small(), ADAMW, LOWER, tmp_path, resume=True, **SMALL) as tiered:
        assert tiered.steps == steps and not differing(tiered.state_dict(), expected)


@pytest.mark.parametrize("kind", ["step", "backward", "disk optimizer"])
def test_more_interrupts_than_buffers(tmp_path, monkeypatch, kind):
    model = small()
    if kind == "disk optimizer":
        run = DiskOptimizer(model.parameters(), torch.optim.AdamW, tmp_path, lr=1e-2, chunk=SMALL["chunk"])
    else:
        run = Tiered(model, ADAMW, LOWER, tmp_path, update=kind, **SMALL)
    with run:
        for _ in range(run.states.ring.number + 1):
            with monkeypatch.context() as patch:
                interrupted(patch, Ring, "take", 1, after=True)
                with pytest.raises(KeyboardInterrupt):
                    backward(model, 0)
                    run.step()
            run.zero_grad()
        backward(model, 0)
        run.step()
        found = dict(model.state_dict()) if kind == "disk optimizer" else run.state_dict()
    assert not differing(found, trained(1))


def test_no_buffer_is_free_while_it_is_written(tmp_path, monkeypatch):
    """Nobody knows of the writing that an interrupt came into; it is waited for all the same."""
    model, running, begun = small(), [], threading.Event()
    real = DiskFile.write_now

    def slow(self, view, offset):
        running.append(offset)
        begun.set()
        time.sleep(0.2)
        real(self, view, offset)
        running.remove(offset)

    def interrupt(self, transfer, buffer):
        begun.wait(10)
        raise KeyboardInterrupt

    with Tiered(model, ADAMW, LOWER, tmp_path, **SMALL) as tiered:
        backward(model, 0)
        monkeypatch.setattr(DiskFile, "write_now", slow)
        monkeypatch.setattr(Ring, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tiered.step()
        ring = tiered.states.ring
        assert not running and ring.taken == 0 and len({id(b) for b in ring._free}) == ring.number


class Killed(BaseException):
    pass


@pytest.mark.parametrize("tiers", [LOWER, STAYS])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "the disk has a fault")])
def test_a_step_that_is_undone_is_not_in_the_folder(tmp_path, monkeypatch, error, tiers):
    """It was, when its manifest had been renamed; what is written for it again goes to the places which that told of."""
    model, run, seen = small(), tmp_path / "run", tmp_path / "seen"
    with Tiered(model, ADAMW, tiers, run, **SMALL) as tiered:
        go_on(model, tiered, 3)
        real = manifest.flush_folder

        def fault(folder):
            monkeypatch.setattr(manifest, "flush_folder", real)
            raise error

        monkeypatch.setattr(manifest, "flush_folder", fault)
        backward(model, 7)
        with pytest.raises(type(error)):
            tiered.step()
        assert tiered.steps == 3
        tiered.zero_grad()

        def killed(*args):
            shutil.copytree(run, seen)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Manifest, "write", killed)
            backward(model, 8)
            with pytest.raises(Killed):
                tiered.step()
        tiered.zero_grad()
        go_on(model, tiered, 4)
        assert not differing(tiered.state_dict(), trained(4))
    with Tiered(small(), ADAMW, tiers, seen, resume=True, **SMALL) as tiered:
        assert tiered.steps == 3 and not differing(tiered.state_dict(), trained(3))


def test_a_state_dict_that_is_undone_leaves_the_one_before(tmp_path, monkeypatch):
    """The manifest of the last complete step was replaced, and comes back."""
    model = small()
    with DiskOptimizer(model.parameters(), torch.optim.AdamW, tmp_path, lr=1e-2) as streamed:
        backward(model, 0)
        streamed.step()
        before = streamed.state_dict()
        with monkeypatch.context() as patch:
            interrupted(patch, Manifest, "write", 1, after=True)
            with pytest.raises(KeyboardInterrupt):
                streamed.load_state_dict({"state": {}, "param_groups": before["param_groups"]})
        assert streamed.state_dict()["state"].keys() == before["state"].keys()
    with DiskOptimizer(model.parameters(), torch.optim.AdamW, tmp_path, lr=1e-2, resume=True) as streamed:
        for index, state in streamed.state_dict()["state"].items():
            assert not differing(state, before["state"][index])
        assert streamed.steps == 1


def test_a_manifest_that_cannot_be_withdrawn(tmp_path, monkeypatch):
    model = small()
    with Tiered(model, ADAMW, LOWER, tmp_path, **SMALL) as tiered:
        go_on(model, tiered, 1)
        monkeypatch.setattr(manifest, "flush_folder", lambda folder: (_ for _ in ()).throw(OSError(errno.EIO, "fault")))
        backward(model, 1)
        with pytest.raises(OSError, match="fault"):
            tiered.step()
        with pytest.raises(RuntimeError, match=r"could not be taken out .* resume=True"):
            tiered.step()


def test_a_manifest_of_a_step_that_others_did_not_complete_goes_on_resuming(tmp_path):
    model = small()
    with Tiered(model, ADAMW, LOWER, tmp_path, **SMALL) as tiered:
        go_on(model, tiered, 2)
    ahead, path = tmp_path / "0" / "rank0" / "manifest.1", tmp_path / "0" / "rank0" / "manifest.0"
    _, text, content = path.read_bytes().split(b"\n", 2)
    data = json.loads(text)
    text = json.dumps(
        {**data, "step": 3, "world": 2}
    ).encode()  # as if another rank had been killed before it wrote its own
    ahead.write_bytes(b"%08x\n%s\n%s" % (zlib.crc32(text), text, content))
    with Tiered(small(), ADAMW, LOWER, tmp_path, resume=True, **SMALL) as tiered:
        assert tiered.steps == 2 and not ahead.exists()


@pytest.mark.parametrize("resume", [False, True])
def test_what_was_left_while_opening_takes_nobodys_room(tmp_path, monkeypatch, resume):
    """A job that is killed before its first manifest, or that of a new layout, leaves a file as large as the state."""

    def killed(*args):
        raise Killed

    if resume:
        Tiered(small(), ADAMW, LOWER, tmp_path, **SMALL).close()
    options = {**SMALL, "chunk": 60_000, "resume": resume}
    seen, real = [], StateFile.open

    def watched(self, path, *, fresh):
        seen.append(sorted(int(layout.name) for layout in manifest.layouts(tmp_path)))
        real(self, path, fresh=fresh)

    monkeypatch.setattr(StateFile, "open", watched)
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Manifest, "write", killed)
            Tiered(small(), ADAMW, LOWER, tmp_path, **options)
    with Tiered(small(), ADAMW, LOWER, tmp_path, **options) as tiered:
        assert not differing(tiered.state_dict(), trained(0))
    assert seen == [[0] if resume else []] * 3
    assert len(manifest.layouts(tmp_path)) == 1


TWICE = {
    "nothing is undone": (Ring, "reset", False),
    "the manifest is taken back": (States, "_take_back", True),
    "parameters are to be read back": (States, "load_values", False),
    "parameters are read back": (States, "load_values", True),
}


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("place", TWICE)
def test_interrupted_twice_and_gone_on(tmp_path, monkeypatch, place, update):
    """The second time while the step is undone, which goes on all the same."""
    model, (kind, name, after) = small(), TWICE[place]
    with Tiered(model, ADAMW, STAYS, tmp_path, update=update, **SMALL) as tiered:
        go_on(model, tiered, 1)
        before = tiered.state_dict()
        for times in (1, 2):
            with monkeypatch.context() as patch:
                interrupted(patch, Manifest, "write", 1, after=True)
                for _ in range(times):
                    interrupted(patch, kind, name, 1, after=after)
                backward(model, 1)
                with pytest.raises(KeyboardInterrupt):
                    tiered.step()
            assert tiered.steps == 1 and not differing(tiered.state_dict(), before)
            tiered.zero_grad()
        assert go_on(model, tiered, 3) == 0
        assert not differing(tiered.state_dict(), trained(3))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "the disk has a fault")])
def test_a_step_that_cannot_be_undone_is_the_last(tmp_path, monkeypatch, error):
    """Some parameters are ahead of others then: nothing may be made of them, and the folder has what to go on from."""

    def fails(*args):
        raise error

    model = small()
    with Tiered(model, ADAMW, STAYS, tmp_path, **SMALL) as tiered:
        go_on(model, tiered, 1)
        backward(model, 1)
        with monkeypatch.context() as patch:
            interrupted(patch, Manifest, "write", 1)
            patch.setattr(States, "load_values", fails)
            with pytest.raises(type(error)):
                tiered.step()
        tiered.zero_grad()
        backward(model, 1)
        with pytest.raises(RuntimeError, match=r"ahead of others; .*resume=True"):
            tiered.step()
    with Tiered(small(), ADAMW, STAYS, tmp_path, resume=True, **SMALL) as tiered:
        assert tiered.steps == 1 and not differing(tiered.state_dict(), trained(1))


def test_interrupted_updates_in_backward_do_not_become_a_step(tmp_path, monkeypatch):
    model = small()
    with Tiered(model, ADAMW, LOWER, tmp_path, update="backward", **SMALL) as tiered:
        with monkeypatch.context() as patch:
            interrupted(patch, Updates, "_update", 2, after=True)
            with pytest.raises(KeyboardInterrupt):
                backward(model, 0)
        with pytest.raises(RuntimeError, match="backward was interrupted"):
            tiered.step()
        assert tiered.steps == 0 and not differing(tiered.state_dict(), trained(0))
