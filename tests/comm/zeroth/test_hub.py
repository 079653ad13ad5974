"""The rendezvous' decisions, without sockets: one property over random lives of members, and the cases by name."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.comm.zeroth.hub import Frame, Hub, Kind
from weft.comm.zeroth.log import Log, Passport, Record, unpack_records
from weft.comm.zeroth.tcp import CALLS

PASSPORT = Passport(0, "byte", "rademacher", "mean", 0.0, 1.0, "aa", "bb")


def hello(hub: Hub, conn: int, name: str | None = None, log: Log | None = None) -> list:
    log = Log(PASSPORT) if log is None else log
    return hub.hello(conn, log.passport, name or f"m{conn}", len(log), log.chain(len(log)))


def admitted(hub: Hub, *conns: int) -> None:
    for conn in conns:
        hello(hub, conn)
        hub.ready(conn, hub.step)


def scalars(step: int, payload: bytes = b"\x10", digest: int = 0, lr: float | None = 0.5) -> Frame:
    return Frame(Kind.SCALARS, payload, step, digest, lr)


def kinds(sends: list) -> list[tuple[int, str]]:
    return [(conn, frame.kind.name) for conn, frame in sends]


def test_a_step_of_two():
    hub = Hub(start_with=2)
    assert kinds(hello(hub, 1)) == [(1, "RECORDS")]
    assert hub.ready(1, 0) == []  # waits for the second
    hello(hub, 2)
    assert kinds(hub.ready(2, 0)) == [(1, "ADMIT"), (2, "ADMIT")]
    assert hub.scalars(2, scalars(0, b"\x20"), now=0.0) == []
    sends = hub.scalars(1, scalars(0, b"\x10"), now=1.0)
    assert kinds(sends) == [(1, "RESULT"), (2, "RESULT")]
    assert sends[0][1].payload == sends[1][1].payload
    assert unpack_records(sends[0][1].payload) == [Record(0, 0.5, ((0, b"\x10"), (1, b"\x20")))]  # by order of joining


@pytest.mark.parametrize(
    ("passport", "chain"),
    [(dataclasses.replace(PASSPORT, wire="no-such-wire"), None), (dataclasses.replace(PASSPORT, run=7), b"nonsense")],
)
def test_who_is_refused_defines_no_run(passport, chain):
    hub = Hub()
    assert kinds(hub.hello(1, passport, "stranger", 0, chain or Log(passport).chain(0))) == [(1, "REFUSED")]
    assert kinds(hello(hub, 2)) == [(2, "RECORDS")] and hub.log.passport == PASSPORT


@pytest.mark.parametrize("lr", [0.0, 0.25, None])
def test_frames_come_as_they_went(lr):
    frame = Frame(Kind.SCALARS, b"codes", 2**32 - 1, 7, lr)
    inbox = bytearray(frame.pack() + b"more")
    assert Frame.of(CALLS.take(inbox)) == frame and inbox == b"more"


def test_no_rate_is_that_of_the_last_record():
    hub = Hub()
    admitted(hub, 1)
    records = [
        unpack_records(hub.scalars(1, scalars(t, lr=lr), 0.0)[0][1].payload)
        for t, lr in enumerate([0.5, None, 0.1, None])
    ]
    assert [record.lr for (record,) in records] == [0.5, 0.5, 0.1, 0.1]


def test_the_late_are_dropped_and_come_back():
    hub = Hub(late_seconds=5.0, start_with=3)
    admitted(hub, 1, 2, 3)
    hub.scalars(1, scalars(0), now=10.0)
    hub.scalars(3, scalars(0), now=12.0)
    assert hub.tick(14.9) == []
    assert kinds(hub.tick(15.0)) == [(2, "LATE"), (1, "RESULT"), (3, "RESULT")]
    assert hub.scalars(2, scalars(0), now=16.0) == [] and hub.dropped == 1  # too late: counted, not used
    assert hub.log[0].entries == ((0, b"\x10"), (2, b"\x10"))
    assert hub.ready(2, 0) == []  # at the next boundary
    hub.scalars(1, scalars(1), now=20.0)
    sends = hub.scalars(3, scalars(1), now=20.0)
    assert kinds(sends) == [(1, "RESULT"), (3, "RESULT"), (2, "ADMIT")]
    assert sends[0][1].digest == 1  # what was dropped since the last result
    assert unpack_records(sends[2][1].payload) == hub.log.records and sends[2][1].digest == 3  # a number of its own


def test_nobody_waits_for_those_who_are_gone():
    hub = Hub(start_with=3)
    admitted(hub, 1, 2, 3)
    hub.scalars(1, scalars(0), now=0.0)
    assert hub.lost(2, now=0.1) == []
    assert kinds(hub.lost(3, now=0.2)) == [(1, "RESULT")]
    assert hub.lost(1, now=0.3) == [] and hub.members == {}
    admitted_again = [*hello(hub, 9), *hub.ready(9, 0)]  # the group's memory outlives its members
    assert kinds(admitted_again) == [(9, "RECORDS"), (9, "ADMIT")]


def test_members_that_say_nothing_do_not_keep_newcomers_out():
    hub = Hub(late_seconds=5.0)
    admitted(hub, 1)
    assert hub.tick(0.0) == []
    hello(hub, 2)
    assert hub.ready(2, 0) == [] and hub.tick(4.9) == []
    assert kinds(hub.tick(5.0)) == [(2, "ADMIT")]
    hub.scalars(2, scalars(0), now=6.0)
    assert kinds(hub.tick(11.0)) == [(1, "LATE"), (2, "RESULT")]


def test_parameters_that_differ():
    hub = Hub(start_with=3)
    admitted(hub, 1, 2, 3)
    hub.scalars(1, scalars(0, digest=5), now=0.0)
    hub.scalars(2, scalars(0, b"\x33", digest=6), now=0.0)
    sends = hub.scalars(3, scalars(0, digest=5), now=0.0)
    assert kinds(sends) == [(2, "RESYNC"), (1, "RESULT"), (3, "RESULT")]
    assert [member for member, _ in hub.log[0].entries] == [0, 2] and sends[1][1].digest == 1


def test_of_two_that_differ_the_older_is_right():
    hub = Hub(start_with=2)
    admitted(hub, 1, 2)
    hub.scalars(2, scalars(0, digest=6), now=0.0)
    assert kinds(hub.scalars(1, scalars(0, digest=5), now=0.0)) == [(2, "RESYNC"), (1, "RESULT")]


def test_scalars_of_a_wrong_step():
    hub = Hub(start_with=2)
    admitted(hub, 1, 2)
    assert kinds(hub.scalars(1, scalars(7), now=0.0)) == [(1, "RESYNC")] and hub.dropped == 1
    assert kinds(hub.scalars(2, scalars(0), now=0.0)) == [(2, "RESULT")]
    assert hub.log[0].entries == ((1, b"\x10"),)


def test_a_second_answer_does_not_count():
    hub = Hub(start_with=2)
    admitted(hub, 1, 2)
    hub.scalars(1, scalars(0, b"\x01"), now=0.0)
    assert hub.scalars(1, scalars(0, b"\x02"), now=0.0) == [] and hub.dropped == 1
    hub.scalars(2, scalars(0), now=0.0)
    assert hub.log[0].entries[0] == (0, b"\x01")


def test_who_is_refused():
    hub = Hub()
    admitted(hub, 1)
    hub.scalars(1, scalars(0), now=0.0)
    other = Log(dataclasses.replace(PASSPORT, model="zz"))
    elsewhere = Log(PASSPORT)
    elsewhere.append(Record(0, 0.25, ()))
    ahead = Log(PASSPORT)
    for record in (*hub.log, Record(1, 0.5, ())):
        ahead.append(record)
    cases = [
        (hello(hub, 2, name="m1"), "is here already"),
        (hello(hub, 3, log=other), "tuned parameters"),
        (hello(hub, 4, log=elsewhere), "not the group's"),
        (hello(hub, 5, log=ahead), "not the group's"),
        (hub.scalars(6, scalars(1), 0.0), "before hello"),
        (hub.ready(7, 0), "makes no sense"),
        (hub.hello(8, dataclasses.replace(PASSPORT, wire="semaphore"), "m8", 0, bytes(8)), "no wire is called"),
        (hub.scalars(1, scalars(1, bytes(70_000)), 0.0), "are no scalars"),
    ]
    for sends, said in cases:
        assert sends[0][1].kind == Kind.REFUSED and said in sends[0][1].payload.decode(), said
    admitted(hub, 1)  # its name is free again
    assert hub.scalars(1, scalars(1, lr=float("nan")), 0.0)[0][1].kind == Kind.REFUSED
    fresh = Hub()
    admitted(fresh, 1)
    assert fresh.scalars(1, scalars(0, lr=None), 0.0)[0][1].kind == Kind.REFUSED  # there is no rate before it
    with pytest.raises(ValueError, match="start_with must be"):
        Hub(start_with=0)
    with pytest.raises(ValueError, match="late_seconds must be"):
        Hub(late_seconds=0)


class Member:
    """A machine with an exact replica: its records. It answers in random order, is silent for a while, dies, comes back."""

    def __init__(self, conn: int):
        self.conn, self.log, self.mail, self.busy = conn, Log(PASSPORT), [], False

    def read(self, frame: Frame) -> list[Frame]:
        for record in unpack_records(frame.payload) if frame.kind in (Kind.RECORDS, Kind.ADMIT, Kind.RESULT) else ():
            self.log.append(record)  # raises if it is not the next one
        if frame.kind in (Kind.ADMIT, Kind.RESULT):
            return [scalars(len(self.log), bytes([self.conn % 100 + 1]))]
        return [Frame(Kind.READY, step=len(self.log))]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_everybody_who_is_in_has_the_same_history(seed, start_with):
    """Members that answer, dawdle, vanish and come at random: each one's log is a beginning of the hub's, and it goes on."""
    rng, now = random.Random(seed), 0.0
    hub, members, inbox, fresh = Hub(start_with=start_with, late_seconds=3.0, near=1), {}, [], 0

    def send(sends):
        for conn, frame in sends:
            assert frame.kind != Kind.REFUSED, frame.payload
            if conn in members:
                members[conn].mail.append(frame)

    for _ in range(400):
        now += rng.random()
        send(hub.tick(now))
        event = rng.random()
        if (event < 0.05 and len(members) < 5) or len(members) < start_with:
            fresh += 1
            members[fresh] = Member(fresh)
            send(hello(hub, fresh))
        elif event < 0.08 and len(members) > start_with:
            gone = rng.choice(list(members))
            del members[gone]
            inbox = [(conn, frame) for conn, frame in inbox if conn != gone]
            send(hub.lost(gone, now))
        elif event < 0.5:
            member = rng.choice(list(members.values()))
            if member.mail:
                inbox += [(member.conn, frame) for frame in member.read(member.mail.pop(0))]
        elif inbox:
            conn = rng.choice(inbox)[0]  # any member, but each one's frames in their order
            place = next(i for i, (who, _) in enumerate(inbox) if who == conn)
            _, frame = inbox.pop(place)
            send(hub.ready(conn, frame.step) if frame.kind == Kind.READY else hub.scalars(conn, frame, now))
        numbers = [peer.number for peer in hub.members.values()]
        assert numbers == sorted(set(numbers))
        for member in members.values():
            assert hub.log.records[: len(member.log)] == member.log.records
    assert hub.step > 10
    for record in hub.log:
        assert record.entries and [m for m, _ in record.entries] == sorted({m for m, _ in record.entries})
