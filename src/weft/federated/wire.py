"""What server and clients say: frames of a short JSON header and raw bytes, nothing that is ever executed.

frame = header length (4 bytes, big endian) | payload length (8 bytes) | header, JSON | payload
"""

from __future__ import annotations

import json
import struct
from typing import Any

from weft.comm.sockets import Broken, Framing, Parts

__all__ = ["framing", "pack", "unpack"]

HEAD = struct.Struct(">IQ")
LONGEST_HEADER = 4096  # bytes


def framing(longest: int) -> Framing:
    """Frames with payloads of at most `longest` bytes."""
    return Framing(HEAD, {0: LONGEST_HEADER, 1: longest})


def pack(header: dict[str, Any], payload: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return HEAD.pack(len(text), len(payload)) + text + payload


def unpack(frame: Parts) -> tuple[dict[str, Any], bytes]:
    """Header and payload. Raises `Broken` where the header is no JSON object."""
    (size, _), body = frame
    try:
        header = json.loads(body[:size])
    except (ValueError, RecursionError) as error:
        raise Broken(f"a header that is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise Broken("a header that is no JSON object")
    return header, body[size:]
