"""Headers of messages between server and clients: JSON objects, nothing else."""

from __future__ import annotations

import struct

import pytest

from weft.comm.sockets import Broken
from weft.federated.wire import framing, pack, unpack


def test_header_and_payload_come_back():
    inbox = bytearray(pack({"job": 1}, b"abc") + pack({}))
    assert unpack(framing(3).take(inbox)) == ({"job": 1}, b"abc")
    assert unpack(framing(3).take(inbox)) == ({}, b"") and not inbox


@pytest.mark.parametrize("header, payload", [(10, 1 << 60), (1 << 30, 0), (10, 4)])
def test_lengths_have_limits(header, payload):
    with pytest.raises(Broken, match="is the most"):
        framing(3).take(bytearray(struct.pack(">IQ", header, payload)))


@pytest.mark.parametrize("header", [b"not json", b"[1]", b"\xff\xfe", b"", b"[" * 4000])
def test_a_header_that_is_none(header):
    with pytest.raises(Broken, match="header that is no JSON"):
        unpack(((len(header), 0), header))
