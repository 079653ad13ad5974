"""Machines that come and go, over real sockets: threads with replicas of their own, and other processes."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import warnings

import pytest
import torch
from tests.comm.zeroth.machines import SAMPLES, loss_fn, network, shard, tuned, values

from weft.comm.zeroth import Alone, Log, MemberRefused, OtherRun, OutOfStep, Passport, Rendezvous, SharedSeed
from weft.comm.zeroth.hub import RATED, Frame, Kind
from weft.comm.zeroth.tcp import CALLS
from weft.comm.zeroth.transport import HEADER, LR
from weft.errors import PeerLost

LIMIT = 30.0


def run(*jobs) -> list:
    """Each job in a thread of its own; their results, or the first error. Nothing may take longer than `LIMIT`."""
    results, errors = [None] * len(jobs), []

    def call(place, job):
        try:
            results[place] = job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=item, daemon=True) for item in enumerate(jobs)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + LIMIT
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
        assert not thread.is_alive(), "hangs"
    if errors:
        raise errors[0]
    return results


def machine(place: Rendezvous, name: str, steps: int, member: int, **options) -> SharedSeed:
    ours = tuned(**options).join(place.address, name, timeout=LIMIT)
    while len(ours.log) < steps:
        ours.step(shard(member, len(ours.log)))
    ours.leave()
    return ours


def as_one_process(log: Log, shards: dict[int, int]) -> list[torch.Tensor]:
    """One process that evaluates the triples of the log's members on their shards, step by step: no log is replayed."""
    ours = tuned()
    for t, record in enumerate(log):
        members = [member for member, _ in record.entries]
        ours.transport.own = tuple(members)
        ours.step([batch for member in members for batch in shard(shards[member], t)])
    assert ours.log.records == log.records
    return values(ours)


def test_n_machines_are_one_process():
    with Rendezvous(start_with=3) as place:
        machines = run(*(lambda m=m: machine(place, f"m{m}", 30, m) for m in range(3)))
    assert len({m.digest() for m in machines}) == 1
    # who got which number is a matter of chance: the transport of each knows
    shards = dict(zip([m.transport.own[0] for m in machines], range(3), strict=True))
    assert sorted(shards) == [0, 1, 2]
    assert all(
        torch.equal(a, b) for a, b in zip(values(machines[0]), as_one_process(machines[0].log, shards), strict=True)
    )


def test_join_late_leave_early_catch_up():
    """One is there for all 130 steps, one leaves after 60, one joins after 100 by the log: the same bits, and one process's."""
    with Rendezvous() as place:
        first = tuned().join(place.address, "first", timeout=LIMIT)
        second = None
        reached = threading.Event()

        def stays():
            while len(first.log) < 130:
                if len(first.log) == 100:
                    reached.set()
                    while len(place.hub.peers) < 2:  # so that the newcomer does not miss the end
                        time.sleep(0.01)
                first.step(shard(0, len(first.log)))
            first.leave()

        def leaves():
            nonlocal second
            second = machine(place, "second", 60, 1)

        def comes():
            assert reached.wait(LIMIT)
            return machine(place, "third", 130, 2)

        *_, third = run(stays, leaves, comes)
    assert second is not None and second.log.records == first.log.records[: len(second.log)]
    assert third.log.records == first.log.records[: len(third.log)] and len(third.log) >= 130
    members = [tuple(m for m, _ in record.entries) for record in first.log]
    assert (0, 1) in members and members[99] == (0,) and (0, 2) in members
    expected = as_one_process(first.log, {0: 0, 1: 1, 2: 2})
    assert all(torch.equal(a, b) for a, b in zip(values(first), expected, strict=True))
    again = tuned()
    again.replay(third.log)
    assert again.digest() == third.digest()


def test_two_of_one_name():
    with Rendezvous() as place:
        first = tuned().join(place.address, "twin", timeout=LIMIT)
        second = tuned()
        with pytest.raises(MemberRefused, match="'twin' is here already"):
            second.join(place.address, "twin", timeout=LIMIT)
        assert isinstance(second.transport, Alone)
        assert first.step(shard(0, 0)).members == (0,)
        first.leave()


def test_another_model_or_history_is_refused():
    with Rendezvous() as place:
        first = machine(place, "first", 3, 0)
        with pytest.raises(MemberRefused, match="the first values"):
            SharedSeed(network(seed=2), loss_fn, lr=0.05, samples=SAMPLES).join(place.address, "b", timeout=LIMIT)
        strayed = tuned()
        strayed.step(shard(1, 0))
        with pytest.raises(MemberRefused, match="not the group's"):
            strayed.join(place.address, "c", timeout=LIMIT)
        first.join(place.address, "first", timeout=LIMIT)  # the own history is a beginning of the group's
        first.step(shard(0, 3))
        first.leave()


@pytest.mark.parametrize("can_repair", [True, False])
def test_a_digest_that_differs(can_repair):
    """The machine is told; with the start it repairs itself, else it ends with a named error; the others go on."""
    start = {"start": lambda: network().state_dict()} if can_repair else {}
    with Rendezvous(start_with=3) as place:
        seen = []

        def broken():
            ours = tuned(digest_every=5, **start).join(place.address, "broken", timeout=LIMIT)
            while len(ours.log) < 20:
                if len(ours.log) == 7:
                    ours.home[0].view(-1)[0] += 1e-6  # a memory that loses a bit
                    ours._settled()
                seen.append(ours.step(shard(2, len(ours.log))))
            ours.leave()
            return ours

        def whole(name, member):
            return machine(place, name, 20, member, digest_every=5)

        jobs = [lambda: whole("a", 0), lambda: whole("b", 1)]
        if can_repair:
            a, b, c = run(*jobs, broken)
            assert [info.resynchronised for info in seen].count(True) == 1
            assert a.digest() == b.digest() == c.digest()
        else:

            def fails():
                with pytest.raises(OutOfStep) as error:
                    broken()
                return error.value

            a, b, error = run(*jobs, fails)
            assert error.step == 10 and a.digest() == b.digest()
        record = a.log[10]
        assert len(record.entries) == 2 and len(a.log[9].entries) == 3  # left out when it was found


def test_late_machines_are_dropped_and_catch_up():
    with Rendezvous(start_with=2, late_seconds=0.3) as place:
        infos, done = [], threading.Event()

        def slow():
            ours = tuned().join(place.address, "slow", timeout=LIMIT)
            while len(infos) < 8:
                if len(infos) == 3:
                    time.sleep(1.0)
                infos.append(ours.step(shard(1, len(ours.log))))
            done.set()
            return ours

        def steady():
            ours = tuned().join(place.address, "steady", timeout=LIMIT)
            while not done.is_set():
                time.sleep(0.02)
                ours.step(shard(0, len(ours.log)))
            return ours

        late, other = run(slow, steady)
        assert sum(info.late for info in infos) == 1
        assert late.log.records == other.log.records[: len(late.log)]
        assert [len(record.entries) for record in other.log][3] == 1
        assert place.hub.dropped == SAMPLES
        again = tuned()
        again.replay(late.log)
        assert again.digest() == late.digest()


def test_all_peers_gone():
    """First the peer, then the rendezvous: the machine goes on alone, says so, and nothing waits."""
    place = Rendezvous(start_with=2)
    peer = tuned()
    ours, _ = run(
        lambda: tuned().join(place.address, "a", timeout=LIMIT), lambda: peer.join(place.address, "b", timeout=LIMIT)
    )
    run(lambda: ours.step(shard(0, 0)), lambda: peer.step(shard(1, 0)))
    peer.transport._hang_up()  # dies without a word
    info = ours.step(shard(0, 1))
    assert len(info.members) == 1 and not info.alone
    place.close()
    with pytest.warns(RuntimeWarning, match="going on alone"):
        info = ours.step(shard(0, 2))
    assert info.alone and len(ours.log) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert ours.step(shard(0, 3)).alone
    again = tuned()
    again.replay(ours.log)
    assert again.digest() == ours.digest()
    assert not [thread for thread in threading.enumerate() if thread.name == "weft-rendezvous"]


def test_a_silent_rendezvous_is_no_hang():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(PeerLost, match="joining the rendezvous"):
            tuned().join(address, "a", timeout=0.2)
    with pytest.raises(PeerLost, match="joining the rendezvous"):
        tuned().join(address, "a", timeout=0.2)  # nobody there at all


@pytest.mark.parametrize("drift", ["exact", "replay"])
def test_payload_on_the_socket(drift):
    """A stand-in for the rendezvous counts what comes in: K bytes and a fixed header a step, and the first learning rate."""
    server = socket.create_server(("127.0.0.1", 0))
    counted = []

    def count():
        conn, _ = server.accept()
        conn.settimeout(LIMIT)
        inbox, raw = bytearray(), 0
        while True:
            data = conn.recv(4096)
            raw += len(data)
            inbox += data
            if (came := CALLS.take(inbox)) is None:
                continue
            frame = Frame.of(came)
            if frame.kind == Kind.HELLO:
                conn.sendall(Frame(Kind.RECORDS).pack())
            elif frame.kind == Kind.READY:
                conn.sendall(Frame(Kind.ADMIT, digest=4).pack())
            elif frame.kind == Kind.SCALARS:
                counted.append(raw)
                return conn.close()
            raw = 0

    def member():
        ours = tuned(drift=drift).join(f"127.0.0.1:{server.getsockname()[1]}", "m", timeout=LIMIT)
        with pytest.warns(RuntimeWarning):  # the stand-in never answers with a result
            return ours.step(shard(0, 0))

    with contextlib.closing(server):
        _, info = run(count, member)
    assert counted == [info.bytes] == [HEADER.size + LR.size + SAMPLES] and HEADER.size == 13


def test_learning_rates_travel_where_they_change():
    """A newcomer knows from the log what the last one was."""
    rates = [0.05, 0.05, 0.02, 0.02, 0.05]
    with Rendezvous() as place:
        first = tuned(lr=rates.__getitem__).join(place.address, "first", timeout=LIMIT)
        sent = [first.step(shard(0, t)).bytes - HEADER.size - SAMPLES for t in range(4)]
        first.leave()
        second = tuned(lr=rates.__getitem__).join(place.address, "second", timeout=LIMIT)
        sent += [second.step(shard(1, 4)).bytes - HEADER.size - SAMPLES]
        assert sent == [LR.size, 0, LR.size, 0, LR.size]
        assert [record.lr for record in second.log] == rates and [record.lr for record in first.log] == rates[:4]
        second.leave()


@pytest.mark.parametrize(
    "nonsense",
    [
        b"GET / HTTP/1.1\r\nHost: weft.example.org\r\nAccept: */*\r\n\r\n" * 3,
        Frame(Kind.HELLO, b"{}\n00\nname").pack(),
        Frame(Kind.HELLO, b"\xff\xfe\n00\nname").pack(),
        Frame(Kind.RESULT, b"").pack(),
        HEADER.pack(Kind.SCALARS, 2**31, 0, 0),
        HEADER.pack(99, 0, 0, 0),
        HEADER.pack(Kind.SCALARS | RATED, 3, 0, 0) + b"abc",
        Frame(Kind.SCALARS, b"\x01").pack(),
        Frame(Kind.HELLO, b"[" * 200_000 + b"\n00\nname").pack(),
        Frame(Kind.HELLO, Passport(0, ["byte"], "r", "m", 0.0, 1.0, "", "").to_json().encode() + b"\n00\nx").pack(),
        Frame(Kind.HELLO, Passport(0, "byte", "r", "m", 0.0, 1.0, "", "").to_json().encode() + b"\n00\nx").pack(),
    ],
    ids=[
        "http",
        "empty",
        "not-text",
        "wrong-side",
        "huge",
        "unknown",
        "no-rate",
        "no-hello",
        "deep",
        "no-text-wire",
        "other-model",
    ],
)
def test_strangers_do_no_harm(nonsense):
    """Whatever is sent, the stranger is hung up on (at the latest when it hangs up), and members go on."""
    with Rendezvous() as place:
        ours = tuned().join(place.address, "a", timeout=LIMIT)
        with socket.create_connection(ours.transport.place, timeout=LIMIT) as stranger:
            stranger.sendall(nonsense)
            with contextlib.suppress(ConnectionError):
                while stranger.recv(4096):
                    pass
        assert ours.step(shard(0, 0)).members == (0,)
        ours.leave()


def test_addresses_and_names():
    for address, name, said in (
        ("nowhere", "a", "host:port"),
        ("h:p", "a", "host:port"),
        ("h:1", "", "name must not be"),
    ):
        with pytest.raises(ValueError, match=said):
            tuned().join(address, name)
    with pytest.raises(ValueError, match="timeout must be > 0"):
        tuned().join("h:1", "a", timeout=0)


def test_a_rendezvous_that_starts_again():
    with Rendezvous() as place:
        first = machine(place, "first", 5, 0)
    with Rendezvous(log=first.log) as place:
        second = tuned().join(place.address, "second", timeout=LIMIT)
        assert second.step(shard(1, 5)).members == (1,)  # 0 is taken for ever
        assert second.log.records[:5] == first.log.records[:5]
        second.leave()


def _process(address: str | None, rank: int, size: int) -> tuple:
    """In a worker process: rank 0 keeps the rendezvous and tells the others where, through torch's store."""
    import torch.distributed as dist

    place = Rendezvous(start_with=size) if rank == 0 else None
    box = [place.address if place else None]
    dist.broadcast_object_list(box, src=0)
    ours = tuned().join(box[0], f"process-{os.getpid()}", timeout=LIMIT)
    for t in range(20):
        ours.step(shard(rank, t))
    number = ours.transport.own[0]
    ours.leave()
    dist.barrier()
    if place:
        place.close()
    return number, rank, ours.digest(), ours.log.records


def _process_of(size: int) -> tuple:
    import torch.distributed as dist

    return _process(None, dist.get_rank(), size)


@pytest.mark.parametrize("size", [2, 4])
def test_processes(pool, size):
    found = pool(size).run(_process_of, size)
    assert len({digest for *_, digest, _ in found}) == 1
    log = Log(tuned().passport)
    for record in found[0][3]:
        log.append(record)
    expected = as_one_process(log, {number: rank for number, rank, *_ in found})
    ours = tuned()
    ours.replay(log)
    assert ours.digest() == found[0][2] and all(torch.equal(a, b) for a, b in zip(values(ours), expected, strict=True))


def test_other_run_is_a_value_error():
    assert issubclass(OtherRun, ValueError) and issubclass(MemberRefused, ValueError)
