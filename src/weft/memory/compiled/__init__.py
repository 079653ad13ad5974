"""Compiled models within a budget: `torch.compile(model, backend=weft.memory.compiled.backend("6GiB"))`."""

from __future__ import annotations

from weft.memory.compiled.torch_compile import Backend, Region, backend

__all__ = ["Backend", "Region", "backend"]
