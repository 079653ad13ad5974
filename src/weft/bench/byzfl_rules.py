"""ByzFL 0.0.11, the library whose rules are the baselines of weft's own: importing it where parts it does not need are missing.

ByzFL imports torchvision, matplotlib and seaborn for data sets and figures that no rule uses; torchvision does not load beside
the CPU build of torch 2.13. Each one missing is replaced by an empty stand-in while ByzFL is imported, and named on stderr.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

__all__ = ["load"]

UNUSED = ("torchvision", "matplotlib", "seaborn", "sklearn")


class _Nothing(ModuleType):
    """A module in which every name is another one of the kind, and may be called."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        inner = _Nothing(f"{self.__name__}.{name}")
        setattr(self, name, inner)
        return inner

    def __call__(self, *args: Any, **options: Any) -> _Nothing:  # ByzFL builds image transforms as it is imported
        return self


class _Finder:
    """Finds stand-ins, and modules inside them."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self.names:
            return importlib.util.spec_from_loader(name, self)  # type: ignore[arg-type]  # a loader in all but name
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Nothing(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return None


def _loads(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # torchvision fails with RuntimeError beside another build of torch
        for part in [key for key in sys.modules if key.split(".")[0] == name]:
            del sys.modules[part]
        return False
    return True


def load() -> Any:
    """The module `byzfl`.

    Raises:
        ImportError: it is not installed; says how to.
    """
    if "byzfl" in sys.modules:
        return sys.modules["byzfl"]
    if importlib.util.find_spec("byzfl") is None:
        raise ImportError("ByzFL, the baseline, is not installed: python -m pip install --no-deps byzfl==0.0.11")
    missing = tuple(name for name in UNUSED if not _loads(name))
    if missing:
        print(f"byzfl: empty stand-ins for {', '.join(missing)}, which its rules do not use", file=sys.stderr)
    finder = _Finder(missing)
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    try:
        return importlib.import_module("byzfl")
    finally:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
        for part in [key for key in sys.modules if key.split(".")[0] in missing]:
            del sys.modules[part]
