"""The same server and the same schedules over real processes and the wall clock: late workers are late, and so are their results.

    server side   listener = listen(); serve(setting, listener, token, seconds=60)
    client side   join(setting, client, address, token)          anywhere the address can be reached, with that client's data
    one machine   spawn(setting, seconds=60)                     both, with one process per client

    client -> server   hello {token, client, form}   result {job} + message    the first opens, each later one answers a model
    server -> client   model {job} + parameters      stop {}                   refused {why}

`serve` feeds a `Server` (the state machine that the simulator runs too) with what comes, and calls `tick` when its clock says so.
Every wait has an end: for clients to join, for an aggregation (`limit`), for a stopped reader. A client whose connection ends is
left out from then on and may come back; results of a wrong size, or beyond one per model, are rejected and counted; no pickle is
ever read. Without a client that has left, `Any` and `Clock` go on; `All` waits for it until `limit` ends the run, as `Count` and
`First` do once fewer than they count are left.
"""

from __future__ import annotations

import hmac
import math
import multiprocessing
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from weft.comm.codec import State
from weft.comm.sockets import Broken, Connection, Switchboard, dial
from weft.comm.waits import nanoseconds
from weft.errors import PeerLost, WeftError
from weft.federated.asynchronous import Asynchronous, Client, Trained
from weft.federated.local import LocalSGD
from weft.federated.server import Step
from weft.federated.wire import framing, pack, unpack

__all__ = ["ClientRefused", "join", "listen", "serve", "spawn"]

Address = tuple[str, int]


class ClientRefused(WeftError, ValueError):
    """The server did not let `client` in; `why` is its reason."""

    def __init__(self, client: int, why: str):
        super().__init__(client, why)
        self.client, self.why = client, why

    def __str__(self) -> str:
        return (
            f"the server refused client {self.client}: {self.why}. Join with the setting and the token that it serves."
        )


def listen(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """A socket for `serve`; its address, for the clients, is `listener.getsockname()`."""
    return socket.create_server((host, port))


def serve(
    setting: Asynchronous,
    listener: socket.socket,
    token: str,
    *,
    seconds: float = math.inf,
    aggregations: int | None = None,
    join_seconds: float = 60.0,
) -> Trained:
    """Train with clients that `join`, for so many seconds or so many aggregations of results.

    Args:
        setting: the clients' `seconds` and `jitter` are not used: they take what they take. `limit`, if infinite, is 60 s here.
        listener: of `listen`; it is closed at the end.
        token: what a client must say to be let in.
        seconds, aggregations: at least one of them; the run ends with whichever is first.
        join_seconds: the start waits so long for all clients, then goes on with those that came; others may come later.
    Raises:
        NothingCame: no aggregation for `limit` seconds, or none at all; names the slowest client.
        PeerLost: no client joined, or all have gone.
    """
    if not seconds > 0 or (seconds == math.inf and aggregations is None):
        raise ValueError(f"serve: seconds must be > 0, or aggregations be given, got {seconds} and {aggregations}")
    if setting.limit == math.inf:
        setting = replace(setting, limit=60.0)
    return _Serving(setting, listener, token, seconds, aggregations, join_seconds).run()


def join(
    setting: Asynchronous,
    client: int,
    address: Address,
    token: str,
    *,
    timeout: float = 120.0,
    join_seconds: float = 60.0,
) -> int:
    """Work as one client until the server says stop; returns the number of jobs done.

    Args:
        setting: as at the server; only this client's data are needed.
        timeout: seconds without a word from the server after which it is given up.
    Raises:
        ClientRefused: the token is wrong, there is no such client, or it has another model or codec than the server.
        PeerLost: the server does not answer, or is gone.
        ValueError: the client's work gives no vector of the model's length.
    """
    link = _connect(address, setting, join_seconds)
    try:
        form = setting.coder().fingerprint()
        link.put(pack({"kind": "hello", "token": token, "client": client, "form": form}))
        return _work(setting, client, link, timeout)
    finally:
        link.close()


def spawn(
    setting: Asynchronous, *, seconds: float = math.inf, aggregations: int | None = None, join_seconds: float = 120.0
) -> Trained:
    """`serve` here, with one new process on this machine per client. Model, loss, work and data must be picklable."""
    context = multiprocessing.get_context("spawn")
    listener, token = listen(), secrets.token_hex(16)
    processes = []
    try:
        for client in range(len(setting.clients)):
            alone = replace(
                setting, clients=[c if i == client else _elsewhere(c) for i, c in enumerate(setting.clients)]
            )
            arguments = (alone, client, listener.getsockname(), token, join_seconds)
            processes.append(context.Process(target=_client_process, args=arguments, daemon=True))
            processes[-1].start()
        return serve(setting, listener, token, seconds=seconds, aggregations=aggregations, join_seconds=join_seconds)
    finally:
        listener.close()
        _end(processes)


def _elsewhere(client: Client) -> Client:
    return replace(client, data=None, seconds=1.0)


def _client_process(setting: Asynchronous, client: int, address: Address, token: str, join_seconds: float) -> None:
    torch.set_num_threads(1)
    try:
        join(setting, client, address, token, join_seconds=join_seconds)
    except PeerLost:  # the server has ended, which its own error tells
        return


def _end(processes: Sequence[Any]) -> None:
    """Give processes a moment to end by themselves, then end them."""
    deadline = time.monotonic() + 5.0
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join(5.0)


@final
class _Serving:
    """One run over sockets. Times are nanoseconds since its start."""

    def __init__(
        self,
        setting: Asynchronous,
        listener: socket.socket,
        token: str,
        seconds: float,
        aggregations: int | None,
        join_seconds: float,
    ):
        self.setting, self.token = setting, token
        self.server, self.coder, self.judge = setting.server(), setting.coder(), setting.judge()
        self.end = nanoseconds(seconds) if seconds < math.inf else None
        self.aggregations, self.join_seconds, self.done = aggregations, join_seconds, 0
        self.board = Switchboard(framing(self.coder.nbytes()), listener)
        self.links: dict[int, Connection] = {}  # by client
        self.who: dict[Connection, int] = {}  # its inverse: strangers are in neither
        self.jobs = [0] * len(setting.clients)  # models sent, by client
        self.began = 0
        self.zero = time.monotonic_ns()

    def now(self) -> int:
        return time.monotonic_ns() - self.zero

    def run(self) -> Trained:
        try:
            self.gather()
            self.zero = time.monotonic_ns()
            self.server.gone = set(range(len(self.jobs))) - set(self.links)
            self.began = 1
            self.act(self.server.begin(0))
            while not self.over():
                self.once()
            if not self.done:
                raise self.server.nothing(self.now())
            return self.setting.trained(self.server)
        finally:
            self.stop()

    def over(self) -> bool:
        """Whether the run has had its time or its aggregations."""
        if self.aggregations is not None and self.done >= self.aggregations:
            return True
        return self.end is not None and self.now() >= self.end

    def gather(self) -> None:
        """Wait for the clients to join."""
        deadline = nanoseconds(self.join_seconds)
        while len(self.links) < len(self.jobs) and self.now() < deadline:
            self.poll((deadline - self.now()) / 1e9)
        if not self.links:
            raise PeerLost(-1, "the start of a federated run", f"no client has joined within {self.join_seconds:g} s")

    def once(self) -> None:
        """One turn: what has come, then the clock."""
        moments = [moment for moment in (self.server.due(), self.end) if moment is not None]
        wait = (min(moments) - self.now()) / 1e9 if moments else 1.0
        for client, job, change in sorted(self.poll(wait), key=lambda found: found[0]):
            if self.over():
                return
            if client not in self.links or job != self.jobs[client]:
                continue  # it is gone, or gone and back, since
            if client in self.server.here:
                self.server.reject(client)  # a second result for one model
            else:
                self.act(self.server.returned(client, change, self.now()))
        due = self.server.due()
        if due is not None and self.now() >= due and not self.over():
            self.act(self.server.tick(self.now()))
        if not self.links:
            raise PeerLost(-1, "a federated run", f"all {len(self.jobs)} clients have gone")

    def act(self, step: Step) -> None:
        """Send models, note the loss."""
        payload = _raw([self.server.model]) if step.send else b""
        for client in step.send:
            self.jobs[client] += 1
            if client in self.links:
                self.board.put(self.links[client], pack({"kind": "model", "job": self.jobs[client]}, payload))
        if step.aggregation is not None and step.aggregation.who:
            self.done += 1
            loss = self.judge(self.server, step.aggregation.seconds)
            if not math.isnan(loss):
                self.server.evaluated(loss)

    def poll(self, seconds: float) -> list[tuple[int, int, Tensor | None]]:
        """Wait at most so long for anything; the results that have come: client, number of the job, change."""
        found: list[tuple[int, int, Tensor | None]] = []
        for link, frame in self.board.poll(min(seconds, 1.0)):
            if frame is None:
                self.drop(link)
                continue
            try:
                header, payload = unpack(frame)
                if link not in self.who:
                    self.welcome(link, header)
                elif header.get("job") == self.jobs[self.who[link]]:
                    found.append((self.who[link], self.jobs[self.who[link]], self.read(payload)))
            except Broken:
                self.drop(link)
        return found

    def read(self, payload: bytes) -> Tensor | None:
        """The change in a message; None if the message is not of the form that was agreed, or says that it is not finite."""
        layout = self.coder.layout()
        self.server.trace.nbytes += len(payload)
        if len(payload) != self.coder.nbytes():
            return None
        tensors, start = [], 0
        for shape, dtype in layout:
            size = math.prod(shape) * dtype.itemsize
            piece = bytearray(payload[start : start + size])
            tensors.append(
                torch.frombuffer(piece, dtype=dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
            )
            start += size
        try:
            return self.coder.decode(tensors)
        except (IndexError, RuntimeError, ValueError):
            return None  # codecs raise these for positions and sizes that no encoder writes

    def welcome(self, link: Connection, header: dict[str, Any]) -> None:
        """Let a client in, in place of an earlier connection of its own if there is one."""
        why = self.refusal(header)
        if why:
            self.board.put(link, pack({"kind": "refused", "why": why}), last=True)
            return
        client = header["client"]
        if client in self.links:
            self.drop(self.links[client])
        self.board.trust(link)
        self.links[client], self.who[link] = link, client
        if self.began:
            self.act(self.server.back(client, self.now()))

    def refusal(self, header: dict[str, Any]) -> str:
        """Why who says this is not let in; empty if it is."""
        client, token = header.get("client"), header.get("token")
        if not isinstance(token, str) or not hmac.compare_digest(
            *(said.encode("utf-8", "surrogatepass") for said in (token, self.token))
        ):
            return "the token is not the server's"
        if type(client) is not int or not 0 <= client < len(self.jobs):
            return f"clients are 0..{len(self.jobs) - 1}"
        if header.get("form") != self.coder.fingerprint():
            return "its model, or its codec, is not the server's: names, shapes and types of the trained tensors must be the same"
        return ""

    def drop(self, link: Connection) -> None:
        """A connection has ended, or shall."""
        self.board.hang_up(link)
        client = self.who.pop(link, None)
        if client is not None:
            del self.links[client]
            self.server.lost(client)

    def stop(self) -> None:
        """Tell the clients, wait at most 2 s for the last bytes to go, close everything."""
        for link in self.links.values():
            self.board.put(link, pack({"kind": "stop"}))
        self.board.close(2.0)


def _connect(address: Address, setting: Asynchronous, join_seconds: float) -> Connection:
    deadline = time.monotonic() + join_seconds
    longest = sum(p.numel() * p.element_size() for p in setting.model.parameters())
    while True:
        try:
            return dial(address, framing(longest), max(0.1, deadline - time.monotonic()))
        except Broken as error:
            if time.monotonic() >= deadline:
                raise PeerLost(
                    -1, "joining a federated run", f"no server at {address} within {join_seconds:g} s"
                ) from error
            time.sleep(0.1)


def _work(setting: Asynchronous, client: int, link: Connection, timeout: float) -> int:
    """Answer every model with a result, until told to stop."""
    coder, states, done = setting.coder(), dict[str, State](), 0
    trainer = setting.trainer() if isinstance(setting.work, LocalSGD) else None
    dtype = coder.dtype
    while True:
        header, payload = _next(link, timeout)
        if header.get("kind") == "stop":
            return done
        if header.get("kind") == "refused":
            raise ClientRefused(client, str(header.get("why")))
        start = torch.frombuffer(bytearray(payload), dtype=dtype)
        if trainer is not None:
            change = trainer.changes(start[None], [client], [done])[0]
        else:
            change = setting.work(start, client, done)
        message = coder.encode(change, client, done, states)
        done += 1
        link.put(pack({"kind": "result", "job": header.get("job")}, b"" if message is None else _raw(message)))


def _next(link: Connection, timeout: float) -> tuple[dict[str, Any], bytes]:
    """The last frame that has come."""
    try:
        frame = later = link.receive(timeout)
        while later is not None:
            frame, later = later, link.take()
        if frame is not None:
            return unpack(frame)
    except Broken as error:
        raise PeerLost(-1, "a federated run", f"the server has gone ({error})") from error
    raise PeerLost(-1, "a federated run", f"the server has said nothing for {timeout:g} s")


def _raw(tensors: Sequence[Tensor]) -> bytes:
    """The bytes of tensors, one after the other."""
    return b"".join(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
