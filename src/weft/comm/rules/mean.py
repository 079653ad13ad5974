"""The mean, the rule that everything else is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from weft.comm.combine import Combine, Info

__all__ = ["Mean"]


@final
@dataclass(frozen=True)
class Mean(Combine):
    """1/n of each message: the best one can do where every worker can be trusted, and broken by a single one that cannot."""

    def weights(self, info: Info) -> Tensor:
        if info.count < 1:
            raise ValueError("Mean: no message to average")
        return torch.full((info.count,), 1 / info.count, dtype=torch.float64)
