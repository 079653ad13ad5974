"""Real processes: training through a scheme is training on the whole batch, whoever is late, hangs or dies."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

from weft.comm.straggler.crew import Crew
from weft.comm.straggler.farm import Farm, cross_entropy
from weft.comm.straggler.gc import GC, Uncoded
from weft.comm.straggler.m_sgc import MSGC
from weft.comm.straggler.scheme import TooManyLate
from weft.comm.straggler.sr_sgc import SRSGC

WORKERS, JOBS = 4, 16


@pytest.fixture(scope="module")
def crew():
    with Crew(WORKERS) as crew:
        pids, members = crew.pids, crew.members
        yield crew
    assert len(pids) == WORKERS and not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert not any(member.mailbox.is_alive() for member in members)


def make(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(rows, 6, generator=generator).double(), torch.randint(3, (rows,), generator=generator))
        for rows in (50, 37)
    ]


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


def centralised(jobs, models):
    nets, data, losses = [make(k) for k in range(models)], batches(), []
    optimizers = [momentum(net.parameters()) for net in nets]
    for job in range(jobs):
        model = job % models
        loss = cross_entropy(nets[model], *data[job // models % len(data)]).mean()
        optimizers[model].zero_grad()
        loss.backward()
        optimizers[model].step()
        losses.append(loss.item())
    return nets, losses


def assert_equal(nets, others):
    for net, other in zip(nets, others, strict=True):
        for a, b in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-10)


SCHEMES = [
    Uncoded(), GC(1), GC(2), GC(1, "repetition"), SRSGC(1, 2, 2), SRSGC(2, 3, 3),
    MSGC(1, 2, 2), MSGC(2, 3, 1), MSGC(1, 3, 4), MSGC(1, 2, 0),
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_training_is_centralised_training(scheme, crew):
    nets = [make(k) for k in range(4)]
    with Farm(scheme, nets, batches(), momentum, crew=crew, limit=30.0) as farm:
        first, second = farm.run(JOBS - 6), farm.run(6)
    expected, losses = centralised(JOBS, 4)
    assert_equal(nets, expected)
    assert np.allclose(first.losses + second.losses, losses, rtol=0, atol=1e-10)
    assert first.lost == second.lost == ()


@pytest.mark.parametrize("scheme", [GC(1), SRSGC(1, 2, 2), MSGC(1, 2, 2)], ids=str)
def test_a_worker_that_is_stopped_and_comes_back(scheme, crew):
    """SIGSTOP, then SIGCONT: a late worker of which the policy knows nothing, whose old results come late."""
    stop = threading.Event()

    def bother():
        while not stop.wait(0.01):
            os.kill(crew.pids[2], signal.SIGSTOP)
            time.sleep(0.03)
            os.kill(crew.pids[2], signal.SIGCONT)

    nets, late, outdated = [make(k) for k in range(4)], False, 0
    with Farm(scheme, nets, batches(), momentum, crew=crew, limit=30.0) as farm:
        thread = threading.Thread(target=bother)
        thread.start()
        try:
            while farm.jobs < 400 and not (late and outdated):  # when it is stopped is chance
                log = farm.run(40)
                late, outdated = late or log.late[:, 2].any(), outdated + log.outdated
        finally:
            stop.set()
            thread.join()
            os.kill(crew.pids[2], signal.SIGCONT)
    assert_equal(nets, centralised(farm.jobs, 4)[0])
    assert late  # its round was lost, and nobody noticed
    assert outdated  # what it sent for closed rounds


def test_a_dead_worker_is_late_for_ever():
    with Crew(2) as crew:
        nets = [make(k) for k in range(2)]
        with Farm(GC(1), nets, batches(), momentum, crew=crew, limit=3.0) as farm:
            farm.run(4)
            os.kill(crew.pids[1], signal.SIGKILL)
            log = farm.run(60)
            assert log.lost == (1,) and log.late[:, 1].all()
            assert_equal(nets, centralised(64, 2)[0])
            os.kill(crew.pids[0], signal.SIGSTOP)  # one more: it hangs
            with pytest.raises(
                TooManyLate, match=r"workers \[0, 1\] do not come back; the scheme copes with any 1 of 2"
            ):
                farm.run(4)
            given_up = crew.members[0].process
            given_up.join(5.0)
            assert given_up.exitcode == -signal.SIGKILL  # though SIGSTOP held it
        pids = crew.pids
    assert len(pids) == 2 and not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    with pytest.raises(ValueError, match="ended by `close`"):
        farm.run(1)
    with pytest.raises(ValueError, match="crew is closed"):
        Farm(GC(1), nets, batches(), momentum, crew=crew)


def test_farms_that_take_turns_keep_their_own_data(crew):
    x, y = batches()[0]
    first, second, alone = make(0), make(1), make(0)
    a = Farm(Uncoded(), [first], [(x, y)], momentum, crew=crew)
    b = Farm(Uncoded(), [second], [(-x, (y + 1) % 3)], momentum, crew=crew)
    expected = []
    optimizer = momentum(alone.parameters())
    for _ in range(2):
        loss = cross_entropy(alone, x, y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert np.allclose([a.run(1).losses[0], b.run(1) and a.run(1).losses[0]], expected, rtol=0, atol=1e-10)
    assert_equal([first], [alone])


def test_an_interrupt_from_the_terminal_is_not_for_the_workers(crew):
    """Ctrl-C goes to the whole process group."""
    with Farm(Uncoded(), [make(0)], batches(), momentum, crew=crew, limit=30.0) as farm:
        for pid in crew.pids:
            os.kill(pid, signal.SIGINT)
        assert farm.run(2).lost == ()


def broken_loss(model, x, y):
    return cross_entropy(model, x, y).mean()


def test_errors_of_the_loss_reach_the_master(crew):
    with Farm(Uncoded(), [make(0)], batches(), momentum, loss=broken_loss, crew=crew) as farm:
        with pytest.raises(RuntimeError, match="one number per sample"):
            farm.run(1)
    with Farm(Uncoded(), [make(0)], batches(), momentum, crew=crew) as farm:  # the crew lives on
        farm.run(1)


@pytest.mark.parametrize(
    ("policy", "models", "message"),
    [
        (MSGC(2, 3, 1), [make(0)] * 3, "at least 4 models"),
        (SRSGC(1, 2, 1), [make(0)], "at least 2 models"),
        (GC(5), [make(0)], "s must be below"),
        (GC(1), [nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))], "batch norm at '1'"),
        (GC(1), [nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5))], "dropout at '1'"),
        (GC(1), [nn.Sequential(nn.Linear(6, 3), nn.LSTM(3, 3, 2, dropout=0.5))], "dropout at '1'"),
        (GC(1), [nn.Sequential(nn.MultiheadAttention(6, 2, dropout=0.5))], "dropout at '0'"),
        (GC(1), [nn.Sequential(nn.InstanceNorm1d(6, affine=True, track_running_stats=True))], "running stat"),
        (GC(1), [nn.Tanh()], "trainable parameters"),
        (GC(1), [make(0).bfloat16()], "as numpy has them, got .*bfloat16"),
    ],
)
def test_bad_farms(policy, models, message):
    with pytest.raises(ValueError, match=message):
        Farm(policy, models, batches(), momentum, workers=4)


def test_models_that_share_a_parameter(crew):
    model, other = make(0), make(1)
    with pytest.raises(ValueError, match="models 0 and 2 share a trainable parameter"):
        Farm(MSGC(1, 2, 1), [model, other, model], batches(), momentum, crew=crew)
    other[0].weight = model[0].weight
    with pytest.raises(ValueError, match="models 0 and 1 share"):
        Farm(MSGC(1, 2, 1), [model, other], batches(), momentum, crew=crew)
    with Farm(GC(1), [model], batches(), crew=crew) as farm:
        farm.run(1)


def test_bad_data_and_frozen_batch_norm(crew):
    whole, empty = batches()[0], (torch.zeros(0, 6).double(), torch.zeros(0).long())
    for data in ([], [()], [whole, empty], [whole, (whole[0], whole[1][:-1])]):
        with pytest.raises(ValueError, match="data must be batches"):
            Farm(GC(1), [make(0)], data, crew=crew)
    frozen = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).double().eval()
    with Farm(GC(1), [frozen], batches(), crew=crew) as farm:
        farm.run(1)
