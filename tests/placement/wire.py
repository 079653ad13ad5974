"""Bytes that this process has sent over TCP, as the kernel counts them, per socket: other traffic of the machine is not in it."""

from __future__ import annotations

import os
import socket
import struct
import sys

import pytest

BYTES_SENT = 200  # offset of tcpi_bytes_sent in Linux's struct tcp_info (since 4.19)


def tcp_bytes_sent() -> int:
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as endpoint:
                if endpoint.type == socket.SOCK_STREAM and endpoint.family in (socket.AF_INET, socket.AF_INET6):
                    info = endpoint.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("Q", info, BYTES_SENT)[0]
        except OSError:  # closed between the listing and here
            continue
    return total


def counts_tcp_bytes() -> bool:
    """Whether this machine's kernel counts."""
    if not sys.platform.startswith("linux"):
        return False
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return len(info) >= BYTES_SENT + 8


needs_tcp_counters = pytest.mark.skipif(not counts_tcp_bytes(), reason="needs Linux's TCP_INFO byte counters")
