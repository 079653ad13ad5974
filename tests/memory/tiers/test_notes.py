"""What a user has written with a step comes back as it was, or is refused by name."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from weft.memory.tiers.notes import decode_notes, encode_notes

NOTES = {
    "epoch": 3,
    "none": None,
    "milestones": Counter({2: 1, 6: 2}),
    "betas": (0.9, (0.99, [1, (2,)])),
    5: {"a": {1: (True, float("inf"))}, (1, "x"): []},
    "odd": {"weft:tuple": [1]},
}


def test_notes_come_back_as_they_were():
    back = decode_notes(json.loads(json.dumps(encode_notes(NOTES))))
    assert back == NOTES and repr(back) == repr(NOTES)
    plain = {"epoch": 1, "list": [{"a": 1.5}]}
    assert encode_notes(plain) == plain  # as earlier versions wrote them


@pytest.mark.parametrize(
    ("notes", "where"),
    [
        ({"loss": torch.tensor(1.0)}, r"notes\['loss'\] is a Tensor"),
        ({"a": [1, {"b": {1, 2}}]}, r"notes\['a'\]\[1\]\['b'\] is a set"),
        ({"a": {b"x": 1}}, r"a key of notes\['a'\] is a bytes"),
    ],
)
def test_a_note_that_cannot_be_written_is_named(notes, where):
    with pytest.raises(ValueError, match=where):
        encode_notes(notes)
