"""Host memory that a device copies from and to by itself (pinned), for as long as there is some to be had.

How much may be pinned is limited: by the driver, by RLIMIT_MEMLOCK where it counts there, by a container. Memory that cannot be
pinned is taken unpinned: copies are as right as before, but whoever starts one waits for it, so less overlaps. That is warned of
once.
"""

from __future__ import annotations

import resource
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from weft.errors import first_line

__all__ = ["host_memory"]

_warned = False


def host_memory(shape: Sequence[int], dtype: torch.dtype, *, pin: bool) -> Tensor:
    """A new CPU tensor without values, pinned if asked and if possible.

    Raises:
        RuntimeError: there is no memory at all.
    """
    if pin:
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError as error:  # torch has no finer class for it
            why = first_line(error)
    found = torch.empty(shape, dtype=dtype)  # first: if there is none of this either, pinning was not the matter
    if pin:
        _warn_once(found.nbytes, why)
    return found


def _warn_once(nbytes: int, why: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        most = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        limit = "unlimited" if most == resource.RLIM_INFINITY else f"{most} bytes"
        warnings.warn(
            f"{nbytes} bytes of host memory could not be pinned ({why}), and are used unpinned, as may be others; copies to and "
            f"from the device overlap less with its work. The limit of locked memory (`ulimit -l`) is {limit}: raise it, or take "
            "smaller or fewer buffers (chunk, buffers, ahead)",
            stacklevel=4,
        )
