"""Whether all ranks are about to exchange the same thing: one hash, compared before anything of that shape is sent.

what an exchange is, in words       `describe`
the comparison                      `agree`, 16 bytes a rank; the words themselves travel only where hashes differ
what rank 0 decided, to all         `announce`; what it is still to decide, which may fail  `decided`
what each knows, to all             `shared`
"""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from weft.errors import ExchangeMismatch, together

__all__ = ["agree", "announce", "decided", "describe", "hashed", "shared"]


def describe(thing: Any) -> str:
    """Options in words, the same on every rank for the same options: fields of dataclasses, and what `options` names, by name."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        inner = ", ".join(
            f"{field.name}={describe(getattr(thing, field.name))}" for field in dataclasses.fields(thing) if field.repr
        )
        return f"{type(thing).__name__}({inner})"
    if isinstance(thing, list | tuple):
        return "(" + ", ".join(describe(part) for part in thing) + ")"
    if isinstance(thing, dict):
        return "{" + ", ".join(f"{key}: {describe(thing[key])}" for key in sorted(thing, key=str)) + "}"
    names = getattr(type(thing), "options", ())
    if isinstance(names, tuple) and names:  # an object with state, which says what of it are options
        return f"{type(thing).__name__}({', '.join(f'{name}={describe(getattr(thing, name))}' for name in names)})"
    if thing is None or isinstance(thing, bool | int | float | str | torch.dtype):
        return str(thing)
    if isinstance(thing, type) or callable(thing):
        return str(getattr(thing, "__qualname__", type(thing).__qualname__))
    return type(thing).__qualname__


def hashed(*parts: object) -> int:
    """A 62-bit number from names and numbers: seeds that differ wherever a part differs.

    >>> hashed("layer.weight", 0) != hashed("layer.weight", 1)
    True
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 2


def agree(what: str, text: str, group: dist.ProcessGroup, device: torch.device, remedy: str) -> None:
    """Compare `text` over the ranks of a group; every rank calls this.

    Raises:
        ExchangeMismatch: on every rank, naming the first rank whose text differs and the first place where it does.
        PeerLost: another rank is gone.
    """
    ranks, own = dist.get_world_size(group), dist.get_rank(group)
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(device)
    found = torch.empty(16 * ranks, dtype=torch.uint8, device=device)
    with together(f"comparing {what}"):
        dist.all_gather_single(found, mine, group=group)
    digests = [bytes(row.tolist()) for row in found.view(ranks, 16).cpu()]
    if len(set(digests)) == 1:
        return
    texts: list[Any] = [None] * ranks
    with together(f"comparing {what}"):
        dist.all_gather_object(texts, text, group=group)
    other = next(r for r in range(ranks) if texts[r] != text)
    ours, theirs = _first_difference(text, texts[other])
    raise ExchangeMismatch(what, f"{ours} (rank {own})", f"{theirs} (rank {other})", remedy)


def announce(value: Any, group: dist.ProcessGroup, device: torch.device) -> Any:
    """Rank 0's value on every rank. Two broadcasts: its length, its bytes."""
    own = dist.get_rank(group)
    data = pickle.dumps(value) if own == 0 else b""
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    source = dist.get_global_rank(group, 0)
    with together("a decision of rank 0"):
        dist.broadcast(length, source, group=group)
    buffer = torch.empty(int(length), dtype=torch.uint8, device=device)
    if own == 0:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    with together("a decision of rank 0"):
        dist.broadcast(buffer, source, group=group)
    return pickle.loads(bytes(buffer.cpu().numpy()))


def decided(what: str, make: Callable[[], Any], group: dist.ProcessGroup, device: torch.device) -> Any:
    """What `make` gives on rank 0, on every rank.

    Raises:
        Exception: on rank 0, what `make` raised.
        RuntimeError: on the others, with that error's words: nobody waits for a decision that does not come.
    """
    value, error = None, None
    if dist.get_rank(group) == 0:
        try:
            value = make()
        except Exception as raised:
            error = raised
    value, words = announce((value, "" if error is None else f"{type(error).__name__}: {error}"), group, device)
    if error is not None:
        raise error
    if words:
        raise RuntimeError(f"{what} failed on rank 0: {words}")
    return value


def shared(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    found: list[Any] = [None] * dist.get_world_size(group)
    with together("comparing what ranks know"):
        dist.all_gather_object(found, value, group=group)
    return found


def _first_difference(ours: str, theirs: str) -> tuple[str, str]:
    """The first lines that differ."""
    a, b = ours.splitlines(), theirs.splitlines()
    for number in range(max(len(a), len(b))):
        x, y = (a[number] if number < len(a) else "nothing"), (b[number] if number < len(b) else "nothing")
        if x != y:
            return x, y
    return ours, theirs
