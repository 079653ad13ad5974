"""The server over sockets and the wall clock: real late workers with real late results, and clients that fail."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pickle
import socket
import struct
import threading
import time

import pytest
import torch
import torch.distributed as dist
from tests.federated.problems import Point, Pull, centres, half_square
from torch import nn

from weft.comm.codecs import CODECS
from weft.comm.waits import All, Any, Clock, Count
from weft.errors import PeerLost
from weft.federated import Asynchronous, Client, ClientRefused, NothingCame, join, listen, serve, spawn
from weft.federated.processes import _Serving

P = (0.5, 0.2, 0.3)


class Tired:
    """Work in closed form that really takes its time."""

    def __init__(self, rate: float, seconds: tuple[float, ...]):
        self.pull, self.seconds = Pull(rate, len(seconds)), seconds

    def __call__(self, start, client, job):
        time.sleep(self.seconds[client])
        return self.pull(start, client, job)


def setting(schedule, work, **options) -> Asynchronous:
    return Asynchronous(Point(), [Client(importance=p) for p in P], half_square, schedule, work=work, **options)


def as_rank(run: Asynchronous, token: str, aggregations: int):
    """Rank 0 serves, the others are clients; the trace and model of rank 0."""
    address = [None]
    if dist.get_rank() == 0:
        listener = listen()
        address = [listener.getsockname()]
    dist.broadcast_object_list(address, src=0)
    if dist.get_rank() > 0:
        return join(run, dist.get_rank() - 1, tuple(address[0]), token, timeout=30.0)
    model, trace = serve(run, listener, token, join_seconds=20.0, aggregations=aggregations)
    return model.theta.detach(), trace


def test_late_results_are_used_when_they_come(pool):
    """One of three processes needs a third of a second, the clock ticks ten times a second."""
    run = setting(Clock(0.1), Tired(0.1, (0.01, 0.01, 0.33)))
    (theta, trace), *jobs = pool(4).run(as_rank, run, "secret", 40, timeout=60)
    late = [done for done in trace.aggregations if 2 in done.who]
    assert len(late) >= 5
    for done in late[1:]:
        assert done.staleness[done.who.index(2)] in (3, 4, 5)  # it worked on a model of three or more ticks ago
    assert sum(0 in done.who for done in trace.aggregations) >= 3 * len(late)  # nobody waited for it
    weight = [done.weights[done.who.index(2)] for done in late[-3:]]
    assert all(2.5 < w / P[2] < 5.5 for w in weight)  # and what it does rarely counts the more
    wanted = torch.tensor(P, dtype=torch.float64) @ centres(3)
    assert (theta - wanted).norm() < 0.35 * wanted.norm()
    assert jobs[2] < jobs[0]


def with_threads(run: Asynchronous, clients=(0, 1, 2), before=(), **options):
    """Serve here, with clients as threads; `before`: functions of (address, token) that run in threads too."""
    listener, token = listen(), "secret"
    address = listener.getsockname()

    def client(i: int) -> None:
        try:
            join(run, i, address, token, timeout=20.0)
        except (PeerLost, RuntimeError):
            return

    threads = [threading.Thread(target=client, args=(i,), daemon=True) for i in clients]
    threads += [threading.Thread(target=rogue, args=(address, token), daemon=True) for rogue in before]
    for thread in threads:
        thread.start()
    try:
        return serve(run, listener, token, **{"join_seconds": 3.0, **options})
    finally:
        for thread in threads:
            thread.join(10.0)
        assert not any(thread.is_alive() for thread in threads)


def test_synchronous_rounds_are_those_of_the_simulator_bit_for_bit():
    run = setting(All(), Tired(0.3, (0.0, 0.02, 0.0)))
    real, trace = with_threads(run, aggregations=8)
    simulated, _ = run.simulate(8.0)
    assert torch.equal(real.theta, simulated.theta)
    assert [done.who for done in trace.aggregations] == [(0, 1, 2)] * 8


@pytest.mark.parametrize("schedule", [Any(), Count(2), Clock("auto")], ids=str)
def test_other_schedules(schedule):
    model, trace = with_threads(setting(schedule, Tired(0.2, (0.002, 0.004, 0.02))), aggregations=80)
    assert {client for done in trace.aggregations for client in done.who} == {0, 1, 2}
    assert torch.isfinite(model.theta).all()
    assert max(max(done.staleness) for done in trace.aggregations if done.who) > 0


def test_a_run_ends_on_time():
    start = time.monotonic()
    with_threads(setting(Any(), Tired(0.2, (0.01, 0.01, 0.01))), seconds=0.5)
    assert time.monotonic() - start < 10


class Dying(Tired):
    """Client 1 ends in its fourth job, as a process that dies would."""

    def __call__(self, start, client, job):
        if client == 1 and job == 3:
            raise RuntimeError("gone")
        return super().__call__(start, client, job)


@pytest.mark.parametrize("schedule", [Any(), Clock(0.05), Count(2)], ids=str)
def test_a_client_that_dies_blocks_nobody(schedule):
    _, trace = with_threads(setting(schedule, Dying(0.2, (0.01, 0.01, 0.01))), aggregations=30)
    assert sum(1 in done.who for done in trace.aggregations) <= 3
    assert trace.aggregations[-1].who


def test_synchronous_rounds_name_the_client_that_died():
    with pytest.raises(NothingCame, match="slowest is client 1") as found:
        with_threads(setting(All(), Dying(0.2, (0.01, 0.01, 0.01)), limit=0.5), aggregations=30)
    assert found.value.here == 2


def test_a_run_in_which_nothing_came_is_no_training():
    """As `simulate` says it: the model would be the untrained one."""
    with pytest.raises(NothingCame, match=r"2 of 3 clients have returned .* slowest is client 2"):
        with_threads(setting(All(), Tired(0.2, (0.0, 0.0, 0.0))), clients=(0, 1), join_seconds=0.3, seconds=0.5)


def test_all_clients_gone():
    with pytest.raises(PeerLost, match="all 3 clients have gone"):
        with_threads(setting(Any(), Dying(0.2, (0.01, 0.01, 0.01))), clients=(1,), join_seconds=0.3, aggregations=30)
    with pytest.raises(PeerLost, match="no client has joined within"):
        with_threads(setting(Any(), Pull(0.1, 3)), clients=(), join_seconds=0.2, aggregations=1)


def test_a_client_may_come_late_and_come_back():
    run = setting(Clock(0.05), Dying(0.2, (0.01, 0.01, 0.01)))

    def again(address, token):
        time.sleep(0.6)
        join(dataclasses.replace(run, work=Tired(0.2, (0.01, 0.01, 0.01))), 1, address, token, timeout=20.0)

    _, trace = with_threads(run, clients=(0, 1), before=[again], join_seconds=0.2, seconds=1.5)
    when = [done.seconds for done in trace.aggregations if 1 in done.who]
    assert min(when) < 0.4 and max(when) > 1.0
    assert not any(2 in done.who for done in trace.aggregations)


def test_changes_that_are_not_finite_are_rejected_and_counted():
    class Broken(Tired):
        def __call__(self, start, client, job):
            return start * math.nan if client == 0 else super().__call__(start, client, job)

    model, trace = with_threads(setting(Clock(0.05), Broken(0.2, (0.01, 0.01, 0.01))), aggregations=10)
    assert trace.rejected[0] > 3
    assert torch.isfinite(model.theta).all()
    assert not any(0 in done.who for done in trace.aggregations)


FORM = setting(All(), Pull(0.1, 3)).coder().fingerprint()


def raw_client(answer):
    """A client that speaks the protocol by hand; `answer(sock)` once it has its model."""

    def run(address, token):
        with socket.create_connection(address) as sock:
            sock.settimeout(10.0)
            text = json.dumps({"kind": "hello", "token": token, "client": 0, "form": FORM}).encode()
            sock.sendall(struct.pack(">IQ", len(text), 0) + text)
            sock.recv(1 << 16)
            with contextlib.suppress(ConnectionError):  # whoever is not let in may be cut off in the middle of a word
                answer(sock)
                while sock.recv(1 << 16):
                    pass

    return run


def says(payload: bytes, length: int | None = None, times: int = 1):
    text = b'{"kind": "result", "job": 1}'
    return lambda sock: sock.sendall((struct.pack(">IQ", len(text), length or len(payload)) + text + payload) * times)


def test_a_message_of_a_wrong_size_is_rejected():
    """Two float64 are expected; one of them is no change of this model."""
    model, trace = with_threads(
        setting(Clock(0.05), Tired(0.2, (0.01, 0.01, 0.01))), clients=(1, 2), before=[raw_client(says(bytes(8)))],
        aggregations=10,
    )  # fmt: skip
    assert trace.rejected == {0: 1}
    assert torch.isfinite(model.theta).all()


def guesses(token: str):
    """A stranger that says this token."""
    return lambda address, _: raw_client(says(bytes(16)))(address, token)


@pytest.mark.parametrize(
    "rogue",
    [
        raw_client(says(bytes(999))),
        raw_client(says(b"", length=1 << 40)),
        raw_client(lambda sock: sock.sendall(b"x" * 50)),
        raw_client(says(bytes(3), length=16)),
        raw_client(lambda sock: sock.sendall(struct.pack(">IQ", 4000, 0) + b"[" * 4000)),
        guesses("\ud800"),
    ],
    ids=["too long", "a terabyte", "noise", "half a message", "a deep header", "a token that is no text"],
)
def test_a_client_that_lies_or_stalls_is_left_out(rogue):
    _, trace = with_threads(
        setting(Clock(0.05), Tired(0.2, (0.01, 0.01, 0.01))),
        clients=(1, 2),
        before=[rogue],
        aggregations=10,
    )
    assert {client for done in trace.aggregations for client in done.who} == {1, 2}


class Matrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(20, 30))


@pytest.mark.parametrize("name", CODECS)
def test_no_bytes_end_the_server(name):
    """Positions beyond the tensor, sizes of nothing: what no encoder writes is rejected, or is some change."""
    run = Asynchronous(Matrix(), [Client()], None, Any(), "equal", Pull(0.1, 1), codec=CODECS[name]())
    serving, random = _Serving(run, listen(), "secret", 1.0, None, 1.0), torch.Generator().manual_seed(0)
    try:
        size = serving.coder.nbytes()
        noise = bytes(torch.randint(256, (size,), generator=random, dtype=torch.uint8).tolist())
        found = [serving.read(fill) for fill in (b"\0" * size, b"\x7f" * size, b"\x80" * size, b"\xff" * size, noise)]
        assert all(change is None or change.shape == (600,) for change in found)
        assert name != "top-k" or found[1] is None
    finally:
        serving.stop()


@contextlib.contextmanager
def served(run: Asynchronous, polled, **options):
    """A server all of whose clients are there, and whose next poll gives `polled`; no sockets."""
    serving = _Serving(run, listen(), "secret", 60.0, options.get("aggregations"), 1.0)
    count = len(run.clients)
    serving.server.begin(0)
    serving.jobs, serving.links = [2] * count, dict.fromkeys(range(count))
    serving.board.put = lambda *frame, **how: None
    serving.poll = lambda seconds: polled
    yield serving
    serving.board.close()


CHANGE = torch.ones(2, dtype=torch.float64)


def test_a_run_of_k_aggregations_makes_no_more():
    """Three results come at once."""
    with served(setting(Any(), Pull(0.1, 3)), [(client, 2, CHANGE) for client in range(3)], aggregations=2) as serving:
        serving.once()
        assert serving.done == len(serving.server.trace.aggregations) == 2


def test_a_result_from_before_a_client_came_back_is_void():
    with served(setting(Any(), Pull(0.1, 3)), [(0, 1, CHANGE), (1, 2, CHANGE)]) as serving:
        serving.once()
        assert [done.who for done in serving.server.trace.aggregations] == [(1,)]


@pytest.mark.parametrize(
    ("client", "token", "model", "why"),
    [
        (1, "guess", Point(), "token is not the server's"),
        (7, "secret", Point(), r"clients are 0\.\.2"),
        (True, "secret", Point(), r"clients are 0\.\.2"),
        (1, "secret", Point(3), "model, or its codec, is not the server's"),
        (1, "secret", Point().float(), "model, or its codec, is not the server's"),
    ],
    ids=["token", "number", "no number", "size", "dtype"],
)
def test_who_is_not_let_in_is_told_why(client, token, model, why):
    run, said = setting(Any(), Tired(0.1, (0.01, 0.01, 0.01))), []

    def other(address, _):
        with pytest.raises(ClientRefused, match=why) as refused:
            join(dataclasses.replace(run, model=model), client, address, token, timeout=20.0)
        said.append(pickle.loads(pickle.dumps(refused.value)))

    with_threads(run, clients=(0,), before=[other], join_seconds=1.0, seconds=0.2)
    assert said[0].client == client


def test_work_of_another_type_means_the_same_over_sockets():
    class Whole(Pull):
        def __call__(self, start, client, job):
            return torch.ones(2, dtype=torch.int64)

    run = setting(All(), Whole(0.1, 3))
    real, _ = with_threads(run, aggregations=3)
    assert torch.equal(real.theta, run.simulate(3.0).model.theta)
    assert real.theta.tolist() == pytest.approx([3.0, 3.0])


def test_a_second_result_for_one_model_is_rejected():
    twice = raw_client(says(bytes(16), times=2))
    _, trace = with_threads(
        setting(Clock(0.2), Tired(0.2, (0.0, 0.01, 0.01))), clients=(1, 2), before=[twice], aggregations=4
    )
    assert trace.rejected == {0: 1}
    assert sum(0 in done.who for done in trace.aggregations) == 1


def test_a_stranger_is_not_let_in():
    with pytest.raises(PeerLost, match="no client has joined"):
        with_threads(
            setting(Any(), Pull(0.1, 3)), clients=(), before=[guesses("guess")], join_seconds=0.5, aggregations=1
        )


def test_no_server_to_join():
    listener = listen()
    address = listener.getsockname()
    listener.close()
    with pytest.raises(PeerLost, match="no server at"):
        join(setting(Any(), Pull(0.1, 3)), 0, address, "secret", join_seconds=0.3)


def test_a_run_needs_an_end():
    with pytest.raises(ValueError, match="seconds must be > 0, or aggregations be given"):
        serve(setting(Any(), Pull(0.1, 3)), listen(), "secret")


@pytest.mark.slow
def test_processes_of_their_own():
    model, trace = spawn(setting(Any(), Tired(0.2, (0.01, 0.02, 0.1))), aggregations=60)
    assert {client for done in trace.aggregations for client in done.who} == {0, 1, 2}
    assert torch.isfinite(model.theta).all()
