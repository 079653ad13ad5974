"""Bytes that this process has sent over TCP, each once, as the kernel counts them per socket, whatever else the machine sends."""

from __future__ import annotations

import os
import socket
import struct
import sys

import pytest

# Offsets in struct tcp_info (Linux 4.19). Where acknowledgements are late, on a busy machine, the kernel sends again.
BYTES_SENT, BYTES_SENT_AGAIN = 200, 208  # tcpi_bytes_sent, tcpi_bytes_retrans


def tcp_bytes_sent() -> int:
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as endpoint:
                if endpoint.type == socket.SOCK_STREAM and endpoint.family in (socket.AF_INET, socket.AF_INET6):
                    info = endpoint.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    sent, again = (struct.unpack_from("Q", info, at)[0] for at in (BYTES_SENT, BYTES_SENT_AGAIN))
                    total += sent - again
        except OSError:  # closed between the listing and here
            continue
    return total


def counts_tcp_bytes() -> bool:
    """Whether this machine's kernel counts."""
    if not sys.platform.startswith("linux"):
        return False
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return len(info) >= BYTES_SENT_AGAIN + 8


needs_tcp_counters = pytest.mark.skipif(not counts_tcp_bytes(), reason="needs Linux's TCP_INFO byte counters")
