"""Tiers on several processes: equal to data parallelism in memory; agreement where ways differ; resuming on another number."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from tests.memory.tiers.training import ADAMW, SMALL, Branching, differing, gpt, tokens
from torch import nn

from weft.errors import DiskFull, FolderInUse
from weft.memory.tiers.store import TIERS, Tiers
from weft.memory.tiers.tiered import Tiered


def average(model: nn.Module) -> None:
    """Gradients averaged over processes, summed in rank order; whoever has none counts as zero."""
    import torch.distributed as dist

    world = dist.get_world_size()
    for parameter in model.parameters():
        have = [None] * world
        dist.all_gather_object(have, parameter.grad is not None)
        if not any(have):
            continue
        own = parameter.grad.contiguous() if parameter.grad is not None else torch.zeros(parameter.shape)
        rows = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(rows, own)
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        parameter.grad = total / world


def in_memory(model, forward, turns, rank, optimizer=ADAMW):
    made, losses = optimizer(model.parameters()), []
    for turn in turns:
        torch.manual_seed(1000 * turn + rank)
        loss = forward(model, turn, rank)
        losses.append(loss.item())
        made.zero_grad()
        loss.backward()
        average(model)
        made.step()
    return losses


def on_tiers(model, tiered, forward, turns, rank):
    losses = []
    for turn in turns:
        torch.manual_seed(1000 * turn + rank)
        loss = forward(model, turn, rank)
        losses.append(loss.item())
        loss.backward()
        tiered.step()
    return losses


def gpt_loss(model, turn, rank):
    return model(*tokens(turn, rank))


def branching_loss(model, turn, rank):
    """Every rank goes its own way through the experts, and another one each time."""
    generator = torch.Generator().manual_seed(10 * turn + rank)
    way = torch.randint(len(model.experts), (int(torch.randint(0, 6, (1,), generator=generator)),), generator=generator)
    return model(torch.randn(4, 24, generator=generator), way.tolist()).square().mean()


FORWARD = {"gpt": (gpt, gpt_loss), "branching": (Branching, branching_loss)}


def worker_equal(kind: str, names: list[tuple[str, ...]], folder: str, turns: int, options: dict) -> list[str]:
    """Names of the tiers whose result differs from memory's."""
    import torch.distributed as dist

    rank, (make, forward) = dist.get_rank(), FORWARD[kind]
    torch.manual_seed(0)
    reference = make()
    losses, wrong = in_memory(reference, forward, range(turns), rank), []
    for tiers in names:
        torch.manual_seed(0)
        model = make()
        path = Path(folder) / "-".join(tiers)
        with Tiered(model, ADAMW, Tiers(*tiers), path, group=dist.group.WORLD, **{**SMALL, **options}) as tiered:
            found = on_tiers(model, tiered, forward, range(turns), rank)
            bad = differing(tiered.state_dict(), reference.state_dict())
            if found != losses or bad:
                wrong.append(f"{'-'.join(tiers)}: losses {found == losses}, {bad}")
    return wrong


COMBINATIONS = [*itertools.product(TIERS, TIERS, TIERS, ("device", "disk"))]


@pytest.mark.parametrize("update", ["step", pytest.param("backward", marks=pytest.mark.slow)])
def test_some_tiers_on_two_processes(pool, tmp_path, update):
    found = pool(2).run(worker_equal, "gpt", COMBINATIONS[::9], str(tmp_path), 3, {"update": update}, timeout=300)
    assert found == [[], []]


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def tiny_loss(model, turn, rank):
    return model(torch.randn(3, 6, generator=torch.Generator().manual_seed(2 * turn + rank))).square().mean()


FORWARD["tiny"] = (tiny, tiny_loss)


@pytest.mark.parametrize("update", ["step", "backward"])
def test_a_process_that_owns_nothing(pool, tmp_path, update):
    """Parameters are shared in parts of 64 elements; with fewer, the second process has none."""
    names = list(itertools.product(("device", "disk"), TIERS, TIERS, ("host",)))
    assert pool(2).run(worker_equal, "tiny", names, str(tmp_path), 2, {"update": update}, timeout=300) == [[], []]


@pytest.mark.slow
def test_some_tiers_on_three_processes(pool, tmp_path):
    found = pool(3).run(worker_equal, "gpt", COMBINATIONS[5::17], str(tmp_path), 2, {"keep_below": 4000}, timeout=300)
    assert found == [[], [], []]


@pytest.mark.slow
@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("first", TIERS)
def test_every_combination_on_two_processes(pool, tmp_path, first, update):
    names = list(itertools.product([first], TIERS, TIERS, TIERS))
    found = pool(2).run(worker_equal, "gpt", names, str(tmp_path), 3, {"update": update}, timeout=550)
    assert found == [[], []]


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("update", ["step", "backward"])
def test_every_rank_goes_its_own_way(pool, tmp_path, world, update):
    """Experts that only some ranks use, some twice, some nobody: no deadlock, and the gradients of data parallelism."""
    found = pool(world).run(
        worker_equal, "branching", [("disk", "host", "disk"), ("host", "disk", "host"), ("device", "device", "disk")],
        str(tmp_path), 6, {"update": update}, timeout=300,
    )  # fmt: skip
    assert found == [[]] * world


def worker_reaches(folder: str) -> bool:
    """One rank only looks at a parameter from outside, and evaluates more often than the other: served, not hung."""
    import torch.distributed as dist
    from torch.nn import functional as F

    rank = dist.get_rank()
    torch.manual_seed(0)
    model, reference = Branching(), None
    torch.manual_seed(0)
    reference = Branching()
    optimizer = ADAMW(reference.parameters())

    def loss(model, turn):
        x = torch.randn(4, 24, generator=torch.Generator().manual_seed(10 * turn + rank))
        y = model(x, [rank, 2]).square().mean()
        total = torch.tensor(y.item())
        dist.all_reduce(total)  # the user's own collective between forward and backward
        return y + (F.linear(x, model.experts[4].weight).square().mean() if rank == turn % 2 else 0.0)

    with Tiered(model, ADAMW, Tiers("disk", "host", "disk"), folder, group=dist.group.WORLD, **SMALL) as tiered:
        for turn in range(4):
            optimizer.zero_grad()
            loss(reference, turn).backward()
            average(reference)
            optimizer.step()
            loss(model, turn).backward()
            tiered.step()
        return not differing(tiered.state_dict(), reference.state_dict())


def test_reaching_in_from_one_rank(pool, tmp_path):
    assert pool(2).run(worker_reaches, str(tmp_path), timeout=200) == [True, True]


# ---- resuming


def worker_leg(folder: str, turns: tuple[int, int], resume: bool, names: tuple[str, ...]):
    """Some steps in which every rank sees the same rows, so that any number of processes gives the same means."""
    import torch.distributed as dist

    model = gpt()
    group = dist.group.WORLD if dist.is_initialized() else None
    with Tiered(model, ADAMW, Tiers(*names), folder, group=group, resume=resume, **SMALL) as tiered:
        assert tiered.steps == turns[0]
        losses = on_tiers(model, tiered, lambda model, turn, rank: model(*tokens(turn)), range(*turns), 0)
        tiered.notes["leg"] = turns[1]
        if not resume:
            assert tiered.notes == {"leg": turns[1]}
        return losses, {name: value.clone() for name, value in tiered.state_dict().items()}


def test_resume_on_another_number_of_processes(pool, tmp_path):
    """2 -> 1 -> 4 -> 2 processes; means of equal gradients are exact for powers of two."""
    reference, turns = gpt(), (0, 2, 4, 5, 6)
    made, expected = ADAMW(reference.parameters()), []
    states = []
    for turn in range(6):
        torch.manual_seed(1000 * turn)
        made.zero_grad()
        loss = reference(*tokens(turn))
        expected.append(loss.item())
        loss.backward()
        made.step()
        states.append(copy.deepcopy(reference.state_dict()))
    homes = [("disk", "host", "disk"), ("device", "device", "disk"), ("host", "disk", "disk"), ("disk", "disk", "disk")]
    for leg, world in enumerate((2, 1, 4, 2)):
        span = (turns[leg], turns[leg + 1])
        for losses, state in pool(world).run(worker_leg, str(tmp_path), span, leg > 0, homes[leg], timeout=200):
            assert losses == expected[slice(*span)]
            assert not differing(state, states[span[1] - 1])
    kept = [path for path in tmp_path.iterdir() if path.name.isdigit()]
    assert len(kept) == 1 and len(list(kept[0].glob("rank*"))) == 2


def few() -> nn.Module:
    """20 elements and 96: of the first layer's parameters only rank 0 has any."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 16), nn.Linear(16, 1))


def few_steps(model, optimizer, turns, everything: bool) -> None:
    for turn in turns:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(turn))
        optimizer.zero_grad()
        (model(x) if everything else model[0](x)).square().mean().backward()
        optimizer.step()


def worker_few(folder: str, everything: bool) -> tuple[dict, dict]:
    import torch.distributed as dist

    model = few() if everything else few()[:1]
    tiers = Tiers("disk", "host", "disk")
    with Tiered(model, ADAMW, tiers, folder, group=dist.group.WORLD, **SMALL) as tiered:
        few_steps(model, tiered.optimizer, range(2), everything)
        return tiered.state_dict(), tiered.optimizer.state_dict()["state"]


@pytest.mark.parametrize("everything", [False, True])
def test_ranks_that_hold_nothing(pool, tmp_path, everything):
    """They have no file; states are whole wherever they were, and the folder is resumed on one process."""
    reference, again = (few() if everything else few()[:1] for _ in range(2))
    made = ADAMW(reference.parameters())
    few_steps(reference, made, range(2), everything)
    for state, states in pool(2).run(worker_few, str(tmp_path), everything, timeout=200):
        assert not differing(state, reference.state_dict())
        for index, expected in made.state_dict()["state"].items():
            assert not differing(states[index], expected)
    few_steps(reference, made, range(2, 3), everything)
    with Tiered(again, ADAMW, Tiers("disk", "host", "disk"), tmp_path, resume=True, **SMALL) as tiered:
        few_steps(again, tiered.optimizer, range(2, 3), everything)
        assert not differing(tiered.state_dict(), reference.state_dict())


def test_a_rank_that_is_missing_from_the_folder(pool, tmp_path):
    import shutil

    from weft.errors import CheckpointDamaged

    pool(2).run(worker_leg, str(tmp_path), (0, 1), False, ("disk", "host", "disk"), timeout=200)
    shutil.rmtree(next(tmp_path.glob("*/rank1")))
    with pytest.raises(CheckpointDamaged, match="every rank"):
        Tiered(gpt(), ADAMW, Tiers("disk", "host", "disk"), tmp_path, resume=True, **SMALL)


# ---- faults


def worker_full(folder: str) -> tuple[str, bool, bool]:
    """Rank 1's disk fills up in a step: on both ranks the step is undone, and goes through when there is room."""
    import errno
    import os

    import torch.distributed as dist

    rank = dist.get_rank()
    torch.manual_seed(0)
    reference = gpt()
    in_memory(reference, gpt_loss, range(3), rank)
    model = gpt()
    with Tiered(model, ADAMW, Tiers("device", "host", "disk"), folder, group=dist.group.WORLD, **SMALL) as tiered:
        on_tiers(model, tiered, gpt_loss, range(1), rank)
        before = tiered.state_dict()
        torch.manual_seed(1000 + rank)
        model(*tokens(1, rank)).backward()
        real, said = os.pwritev, ""

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        try:
            if rank == 1:
                os.pwritev = full
            tiered.step()
        except DiskFull as error:
            said = type(error).__name__
        finally:
            os.pwritev = real
        undone = not differing(before, tiered.state_dict()) and tiered.steps == 1
        tiered.step()
        on_tiers(model, tiered, gpt_loss, range(2, 3), rank)
        return said, undone, not differing(tiered.state_dict(), reference.state_dict())


def test_one_rank_has_no_room(pool, tmp_path):
    assert pool(2).run(worker_full, str(tmp_path), timeout=200) == [("DiskFull", True, True)] * 2


def worker_disagrees(kind: str) -> tuple[str, str, bool]:
    """Rank 1 fails, or both do: what is raised here, and whether it is the very error that was raised here."""
    import torch.distributed as dist

    from weft.memory.tiers.peers import Peers

    class Local(ValueError):  # cannot be pickled, as the errors of classes made in functions
        def __init__(self, text: str, number: int):
            super().__init__(text)

    rank = dist.get_rank()
    own = {"both": KeyError(rank), "local": Local("its sentence", 1), "args": TwoArguments("its sentence", 1)}[kind]

    def work() -> None:
        if kind == "both" or rank == 1:
            raise own

    peers = Peers(dist.group.WORLD)
    try:
        peers.agree(work)
    except Exception as error:
        peers.wait()  # and nobody sits in a collective
        return type(error).__name__, str(error), error is own
    return "", "", False


class TwoArguments(ValueError):
    """Can be pickled, and not be unpickled."""

    def __init__(self, text: str, number: int):
        super().__init__(text)


def test_everybody_hears_of_an_error(pool):
    assert pool(2).run(worker_disagrees, "both", timeout=60) == [("KeyError", "0", True), ("KeyError", "1", True)]
    for kind, name in (("local", "Local"), ("args", "TwoArguments")):
        assert pool(2).run(worker_disagrees, kind, timeout=60) == [
            ("RuntimeError", f"{name}: its sentence", False), (name, "its sentence", True)
        ]  # fmt: skip


def worker_refused(folder: str, tier: str) -> bool:
    """The first manifest cannot be written, by rank 1; whether the model has its values again."""
    import torch.distributed as dist

    from weft.memory.tiers.manifest import Manifest

    def full(*_):
        raise DiskFull("manifest.0", 1, 0, "writing")

    model, real = gpt(), Manifest.write
    try:
        if dist.get_rank() == 1:
            Manifest.write = full
        Tiered(model, ADAMW, Tiers(tier, "host", "disk"), folder, group=dist.group.WORLD, **SMALL)
    except DiskFull:
        return not differing(model.state_dict(), gpt().state_dict())
    finally:
        Manifest.write = real
    return False


@pytest.mark.parametrize("tier", TIERS)
def test_models_are_what_they_were_when_one_cannot_be_put_on_tiers(pool, tmp_path, tier):
    assert pool(2).run(worker_refused, str(tmp_path), tier, timeout=100) == [True, True]


def worker_locked(folder: str) -> str:
    import torch.distributed as dist

    try:
        Tiered(gpt(), ADAMW, Tiers("disk", "host", "disk"), folder, group=dist.group.WORLD, **SMALL)
    except FolderInUse as error:
        return str(error)
    return "no error"


def test_a_folder_in_use_on_one_rank_is_refused_on_all(pool, tmp_path):
    from weft.memory.tiers.lock import Lock

    lock = Lock(tmp_path, 1)
    said = pool(2).run(worker_locked, str(tmp_path), timeout=100)
    lock.close()
    assert all("rank 1" in sentence for sentence in said)


def worker_rounds(seed: int) -> tuple[list, list]:
    """Random requests; what this rank was served, and the collectives that it took part in."""
    import random

    import torch.distributed as dist

    from weft.memory.tiers.rounds import Rounds

    rank, log, sums = dist.get_rank(), [], {}
    own = random.Random(100 * seed + rank)
    rounds = Rounds(
        dist.group.WORLD,
        lambda index, requested: log.append(("gather", index)),
        lambda index: log.append(("ahead", index)),
        lambda index, gradient: sums.setdefault(index, []).append(None if gradient is None else gradient.item()),
    )
    for _ in range(3):
        for _ in range(own.randrange(8)):
            index = own.randrange(4)
            if own.random() < 0.5:
                rounds.fetch(index, have=own.random() < 0.3, following=own.choice([-1, 0]))
            else:
                rounds.reduce(index, torch.tensor(float(rank + 1)), following=-1)
        rounds.settle()
    return log, [(index, values) for index, values in sorted(sums.items())]


@pytest.mark.parametrize("seed", range(4))
def test_collectives_are_the_same_on_every_rank(pool, seed):
    found = pool(3).run(worker_rounds, seed, timeout=60)
    assert found[0][0] == found[1][0] == found[2][0]
    assert [[(i, len(v)) for i, v in sums] for _, sums in found] == [[(i, len(v)) for i, v in found[0][1]]] * 3
