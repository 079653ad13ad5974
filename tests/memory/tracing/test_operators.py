from __future__ import annotations

import pytest
import torch

from weft.memory.tracing.operators import fills

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("func", "tensor", "all_of_it"),
    [
        (aten.normal_.default, torch.empty(4, 8), True),
        (aten.normal_.default, torch.empty(4, 8).t(), True),
        (aten.zero_.default, torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (aten.normal_.default, torch.empty(4, 8)[:, :7], False),
        (aten.normal_.default, torch.empty(4, 8)[1:], False),
        (aten.normal_.default, torch.empty(6).as_strided((2, 3), (1, 1)), False),  # some elements lie at one place
        (aten.add_.Tensor, torch.empty(4, 8), False),  # reads what was there
        (aten.sin.out, torch.empty(4, 8).t(), True),
    ],
)
def test_who_gives_a_storage_all_its_content(func, tensor, all_of_it):
    assert fills(func, tensor) is all_of_it
