"""Fixed groups over torch.distributed: n ranks on n shards are one process, drift and its repair, ranks that differ or die."""

from __future__ import annotations

import os

import pytest
import torch
from tests.comm.zeroth.machines import SAMPLES, loss_fn, network, shard, tuned, values

from weft.comm.zeroth import Alone, Fixed, OtherRun, SharedSeed
from weft.comm.zeroth.transport import MEMBER, outliers
from weft.errors import PeerLost


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def _train(steps: int, options: dict) -> tuple:
    ours = tuned(**options).join(None)
    infos = [ours.step(shard(_rank(), t)) for t in range(steps)]
    return values(ours), ours.digest(), ours.log.records, infos[-1]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"wire": "float32", "divisor": "sqrt"}], ids=["byte", "float32"])
def test_n_ranks_are_one_process(pool, size, options):
    alone = tuned(**options).join(Alone(size))
    for t in range(25):
        alone.step([batch for member in range(size) for batch in shard(member, t)])
    for found, _, records, info in pool(size).run(_train, 25, options):
        assert all(torch.equal(a, b) for a, b in zip(found, values(alone), strict=True))
        assert records == alone.log.records
        assert info.bytes == MEMBER.size + SAMPLES * (4 if options else 1)


@pytest.mark.parametrize("drift", ["replay", "free"])
def test_200_steps(pool, drift):
    """Bit-equal with replay on, at the last repair; without, the ranks drift apart: a little, and it is seen here."""
    found = pool(2).run(_train, 200, {"drift": drift, "every": 20})
    gap = max(float((a - b).abs().max()) for a, b in zip(found[0][0], found[1][0], strict=True))
    if drift == "free":
        assert 0 < gap < 1e-3
    else:
        assert gap == 0 and found[0][3].drift > 0
        again = tuned()
        records, again_log = found[0][2], tuned().log
        for record in records:
            again_log.append(record)
        again.replay(again_log)
        assert all(torch.equal(a, b) for a, b in zip(values(again), found[0][0], strict=True))


def _broken(drift: str) -> tuple:
    ours, seen = tuned(digest_every=4, drift=drift, every=4).join(None), []
    for t in range(12):
        if t == 4 and _rank() == 1:
            ours.home[0].view(-1)[0] += 1e-3
            ours._settled()
        seen.append(ours.step(shard(_rank(), t)))
    return (
        ours.digest(),
        [len(record.entries) for record in ours.log],
        [i.resynchronised for i in seen],
        [i.dropped for i in seen],
    )


@pytest.mark.parametrize("drift", ["exact", "replay"])
def test_a_rank_whose_parameters_differ_is_repaired(pool, drift):
    found = pool(4).run(_broken, drift)
    assert len({digest for digest, *_ in found}) == 1
    for rank, (_, entries, repaired, dropped) in enumerate(found):
        assert entries == [4] * 4 + [3] + [4] * 7
        assert repaired == [rank == 1 and t == 4 for t in range(12)]
        assert dropped == [SAMPLES * (t == 4) for t in range(12)]


def _returns(folder: str) -> tuple:
    """Rank 1 comes back with a log of 3 steps, the others have 6."""
    ours = tuned(log=f"{folder}/{_rank()}").join(None)
    for t in range(6):
        if t == 3 and _rank() == 1:
            with open(f"{folder}/1", "rb") as file:
                kept = file.read()
        ours.step(shard(_rank(), t))
    ours.log.close()
    if _rank() == 1:
        with open(f"{folder}/1", "wb") as file:
            file.write(kept)
    back = tuned(log=f"{folder}/{_rank()}")
    had = len(back.log)
    back.join(None)
    back.step(shard(_rank(), 6))
    back.log.close()
    again = tuned(log=f"{folder}/{_rank()}")
    again.log.close()
    return had, len(back.log), back.digest(), again.digest()


def test_a_rank_that_comes_back_with_an_older_log(pool, tmp_path):
    found = pool(2).run(_returns, str(tmp_path))
    assert [had for had, *_ in found] == [6, 3] and [have for _, have, *_ in found] == [7, 7]
    assert len({digest for *_, digests in [(f[2:],) for f in found] for digest in digests}) == 1


def _other_model() -> None:
    SharedSeed(network(seed=1 + _rank()), loss_fn, lr=0.1).join(None)


def _other_samples() -> None:
    tuned(samples=1 + _rank()).join(None)


def test_ranks_that_do_not_fit_together(pool):
    for job, error, said in (
        (_other_model, OtherRun, "first values"),
        (_other_samples, ValueError, "samples must be the same"),
    ):
        outcomes = pool(2).collect(job)
        assert all(isinstance(outcome.error, error) and said in str(outcome.error) for outcome in outcomes)


def _dies() -> None:
    ours = tuned().join(None)
    for t in range(10):
        if t == 4 and _rank() == 1:
            os._exit(7)
        ours.step(shard(_rank(), t))


def test_a_rank_that_dies_is_named_not_waited_for(pool):
    outcome = pool(2).collect(_dies)[0]
    assert isinstance(outcome.error, PeerLost) and "step 4 of the one-byte exchange" in str(outcome.error)


def test_needs_a_process_group():
    with pytest.raises(ValueError, match="init_process_group"):
        Fixed()


def test_who_is_out():
    assert outliers([(3, 0), (3, 0)]) == set()
    assert outliers([(3, 5), (3, 6), (3, 6)]) == {0}
    assert outliers([(3, 5), (3, 6)]) == {1}  # the earlier member wins a tie
    assert outliers([(3, 5), (3, 0), (3, 5)]) == set()  # no digest, no doubt
    assert outliers([(2, 5), (3, 6), (3, 7), (3, 7)]) == {0, 1}
