"""What a user has written with a step (epoch, position in the data, a schedule's state), as JSON and back."""

from __future__ import annotations

from collections import Counter
from typing import Any

__all__ = ["decode_notes", "encode_notes"]

TAG = "weft:"  # begins the key of a JSON object that stands for what JSON has not


def encode_notes(value: Any, where: str = "notes") -> Any:
    """Notes as JSON values; tuples, counters and keys that are no strings (as schedules have them) come back as they were.

    Raises:
        ValueError: one of them is something else.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [encode_notes(item, f"{where}[{place}]") for place, item in enumerate(value)]
        return {TAG + "tuple": items} if isinstance(value, tuple) else items
    if not isinstance(value, dict):
        raise ValueError(
            f"{where} is a {type(value).__name__}, which cannot be written with a step; notes take numbers, strings, None, and "
            "lists, tuples and dicts of them (of a tensor: .item() or .tolist())"
        )
    found = {key: encode_notes(item, f"{where}[{key!r}]") for key, item in value.items()}
    if not isinstance(value, Counter) and all(isinstance(key, str) and not key.startswith(TAG) for key in found):
        return found
    kind = "Counter" if isinstance(value, Counter) else "dict"
    return {TAG + kind: [[encode_notes(key, f"a key of {where}"), item] for key, item in found.items()]}


def decode_notes(value: Any) -> Any:
    """The inverse."""
    if isinstance(value, list):
        return [decode_notes(item) for item in value]
    if not isinstance(value, dict):
        return value
    for kind, made in (("dict", dict), ("Counter", Counter)):
        if TAG + kind in value:
            return made({decode_notes(key): decode_notes(item) for key, item in value[TAG + kind]})
    if TAG + "tuple" in value:
        return tuple(decode_notes(value[TAG + "tuple"]))
    return {key: decode_notes(item) for key, item in value.items()}
