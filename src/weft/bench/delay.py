"""A cable with a delay, in user space: for kernels without netem.

Two tunnel devices, one in each of two network namespaces, and one process that carries packets between them, each `delay` seconds
after it came. Packets are large (up to 65,000 bytes), so that a gigabit needs some two thousand a second. The rate is still the
kernel's token bucket, on the tunnel devices.

    python -m weft.bench.delay NAMESPACE NAMESPACE DEVICE DELAY      until it is killed; prints "ready" once both devices exist
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import select
import struct
import sys
import time

__all__ = ["carry", "main", "open_tunnel"]

TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000
LARGEST = 65_535


def open_tunnel(namespace: str, device: str) -> int:
    """A file descriptor of a new tunnel device in a namespace; packets are read from and written to it."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = os.open(f"/var/run/netns/{namespace}", os.O_RDONLY)
    try:
        if libc.setns(place, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter namespace {namespace}")
    finally:
        os.close(place)
    tunnel = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tunnel, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
    return tunnel


def carry(ends: tuple[int, int], delay: float) -> None:
    """Carry packets both ways for ever, each `delay` seconds after it came."""
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    under_way: list[tuple[float, int, int, bytes]] = []
    number = 0  # keeps packets of one moment in order
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready, _, _ = select.select(ends, (), (), wait)
        for end in ready:
            try:
                packet = os.read(end, LARGEST)
            except BlockingIOError:
                continue
            number += 1
            heapq.heappush(under_way, (time.monotonic() + delay, number, other[end], packet))
        now = time.monotonic()
        while under_way and under_way[0][0] <= now:
            _, _, end, packet = heapq.heappop(under_way)
            try:
                os.write(end, packet)
            except OSError:  # the device is not up yet, or its queue is full: a lost packet, as on any cable
                continue


def main(arguments: list[str]) -> None:
    first, second, device, delay = arguments
    ends = open_tunnel(first, device), open_tunnel(second, device)
    print("ready", flush=True)
    carry(ends, float(delay))


if __name__ == "__main__":
    main(sys.argv[1:])
