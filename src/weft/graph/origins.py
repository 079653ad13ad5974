"""Which modules define the operators of a graph: a fresh process must import them before it can run it.

torch.library.custom_op     torch keeps the function, which knows its module
torch.library.Library       torch keeps the line that registered a definition, a kernel or a fake kernel
a library of C++            as above by its fake kernel in Python, or the module with the name of the namespace
torch's own                 are there in every process
"""

from __future__ import annotations

import os
import re
import sys

import torch

from weft.graph.graph import Graph

__all__ = ["defining_modules"]

BUILT_IN = ("aten", "prims")
OWN_SOURCES = re.compile(r"registered at \S*/(aten/src|torch/csrc)/")  # in the C++ that torch was built from


def defining_modules(graph: Graph) -> tuple[str, ...]:
    """Names of the modules that register the graph's operators beyond torch's own, "__main__" among them.

    Raises:
        ValueError: nothing tells where an operator was registered, or it was in a program without a file.
    """
    by_file = _modules_by_file()
    names = {".".join(node.target.split(".")[:2]) for node in graph.calls}
    found = {_module_of(name, by_file) for name in sorted(names) if name.split(".")[0] not in BUILT_IN}
    return tuple(sorted(module for module in found if module))


def _module_of(name: str, by_file: dict[str, str]) -> str:
    """The module of the operator `namespace.name`, "" for one that torch was built with."""
    from torch._library.custom_ops import OPDEFS

    namespace, _, short = name.partition(".")
    qualified = f"{namespace}::{short}"
    definition = OPDEFS.get(qualified)
    if definition is not None:
        module = definition._init_fn.__module__
    else:
        dump = torch._C._dispatch_dump(qualified)
        module = next((by_file[file] for file in _sources(qualified, dump) if file in by_file), "")
        if not module and OWN_SOURCES.search(dump):
            return ""
        module = module or (namespace if namespace in sys.modules else "")
    file = getattr(sys.modules.get(module), "__file__", None)
    if module not in sys.modules or (module == "__main__" and not os.path.isfile(file or "")):
        raise ValueError(
            f"operator {name} was registered outside of any module that the processes of the run could import; put its "
            "definition into a module and import that, or start the program with torchrun"
        )
    return module


def _sources(qualified: str, dump: str) -> list[str]:
    """Files that registered something for an operator, as torch noted them."""
    from torch._library.simple_registry import singleton

    kernels = getattr(singleton.find(qualified).fake_impl, "kernels", [])
    lines = [*re.findall(r"registered at (.+?:\d+)", dump), *(kernel.source for kernel in kernels)]
    return [os.path.abspath(line.rpartition(":")[0]) for line in lines]


def _modules_by_file() -> dict[str, str]:
    """Every imported module outside torch; torch's own lines only pass registrations on."""
    own = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    files.pop("__mp_main__", None)  # what multiprocessing calls `__main__` besides
    found = {os.path.abspath(file): name for name, file in files.items() if isinstance(file, str)}
    return {file: name for file, name in found.items() if not file.startswith(own)}
