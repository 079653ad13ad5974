"""Frames over sockets: whole, in pieces, too long, broken off."""

from __future__ import annotations

import socket
import struct
import time

import pytest

from weft.federated.wire import Broken, Link


def pair(longest: int = 1000) -> tuple[Link, socket.socket]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(5.0)
    return Link(ours, longest), theirs


def receive(link: Link, count: int) -> list:
    found: list = []
    deadline = time.monotonic() + 5
    while len(found) < count and time.monotonic() < deadline:
        found += link.get()
    return found


def frame(header: bytes, payload: bytes) -> bytes:
    return struct.pack(">IQ", len(header), len(payload)) + header + payload


def test_frames_in_any_pieces():
    link, peer = pair()
    stream = frame(b'{"job": 1}', b"abc") + frame(b"{}", b"") + frame(b'{"job": 2}', bytes(1000))
    found: list = []
    for cut in range(0, len(stream), 7):
        peer.sendall(stream[cut : cut + 7])
        found += link.get()
    assert found + receive(link, 3 - len(found)) == [({"job": 1}, b"abc"), ({}, b""), ({"job": 2}, bytes(1000))]


def test_a_reader_that_sleeps_holds_up_nobody():
    left, right = socket.socketpair()
    sender, reader = Link(left, 0), Link(right, 4_000_000)
    start = time.monotonic()
    sender.put({"job": 1}, bytes(4_000_000))
    assert sender.busy and time.monotonic() - start < 2
    found: list = []
    while not found:
        sender.flush()
        found = reader.get()
    assert len(found[0][1]) == 4_000_000 and not sender.busy


@pytest.mark.parametrize(
    "stream",
    [
        struct.pack(">IQ", 10, 1 << 60),
        struct.pack(">IQ", 1 << 30, 0),
        frame(b"not json", b""),
        frame(b"[1]", b""),
        frame(b"\xff\xfe", b""),
    ],
)
def test_what_breaks_the_format_ends_the_connection(stream):
    link, peer = pair()
    peer.sendall(stream)
    with pytest.raises(Broken):
        receive(link, 1)


def test_half_a_frame_is_no_frame():
    link, peer = pair()
    peer.sendall(frame(b"{}", b"abcdef")[:-1])
    assert link.get() == []
    peer.close()
    with pytest.raises(Broken, match="closed the connection"):
        receive(link, 1)
