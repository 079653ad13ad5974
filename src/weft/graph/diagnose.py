"""Say which line of the user's code stopped a capture, and what to do about it.

Export's own errors describe its internals; users want the line of their module. `user_frame` finds it, in a trace-back or in
the stack text that export keeps with each node, as the innermost frame outside torch, weft and Python's library. `explain`
picks the advice by what went wrong.
"""

from __future__ import annotations

import functools
import linecache
import os
import re
import sysconfig
import traceback

import torch
from torch import fx

from weft.errors import CaptureError

__all__ = ["TRANSFORMED", "depends_on_data", "explain", "frame_at", "left_torch", "refuse"]

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TORCH = os.path.dirname(torch.__file__) + os.sep
_WEFT = os.path.dirname(os.path.dirname(__file__)) + os.sep
_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_SITE = sysconfig.get_paths()["purelib"] + os.sep

_DATA_DEPENDENT = (
    "the program takes a number out of a tensor (`if`, `while`, `bool()`, `int()`, `float()` or `.item()` on it)",
    "weft plans one fixed program, so values may not decide what runs: use torch.where or a mask, keep the number in a tensor, "
    "or compute it outside the model.",
)
_DYNAMIC_SIZE = (
    "the size of a tensor depends on the values of another (nonzero, unique, boolean indexing, ...)",
    "weft plans fixed sizes: keep the full size and mask (torch.where, masked_fill), or pad to a fixed length.",
)
_OPAQUE = (
    "a tensor left torch (numpy, .data, .tolist(), a C extension) or a tensor made elsewhere came in",
    "Use torch operations on the tensor itself, pass outside tensors as buffers or in the batch, or wrap foreign code as "
    "torch.library.custom_op with register_fake.",
)


TRANSFORMED = (
    "torch.func transforms (vmap, grad, jacrev, ...) leave marks in the program that are no operators",
    "Write the batched computation itself (einsum, bmm, broadcasting), or wrap it as torch.library.custom_op with register_fake.",
)


@functools.lru_cache(maxsize=4096)
def frame_at(stack: str) -> str:
    """`file.py:123` of the innermost user's line in a stack text; "" if there is none."""
    frames = _FRAME.findall(stack)
    for file, line in reversed(frames):
        if _is_users(file):
            return f"{os.path.basename(file)}:{line}"
    return ""


def refuse(node: fx.Node, why: str, todo: str) -> CaptureError:
    """The error for an exported call that the graph cannot hold; a value from outside is blamed on its first reader."""
    stack = node.meta.get("stack_trace") or next(
        (user.meta["stack_trace"] for user in node.users if user.meta.get("stack_trace")), ""
    )
    where, code = _innermost([(file, int(line)) for file, line in _FRAME.findall(stack)])
    return CaptureError(where, code, why, todo)


def depends_on_data(node: fx.Node) -> CaptureError:
    """The error for an exported call that gives a number, or a tensor whose size is not known."""
    number = not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple))
    return refuse(node, *(_DATA_DEPENDENT if number else _DYNAMIC_SIZE))


def left_torch(node: fx.Node) -> CaptureError:
    """The error for a value that came out of a tensor behind torch's back."""
    return refuse(node, *_OPAQUE)


def explain(error: Exception, model: torch.nn.Module) -> Exception:
    """What to raise in place of an error that came out of export.

    Errors of weft and `ValueError`s about the batch or the loss (raised by `weft.graph.batch`) pass through.
    """
    if isinstance(error, CaptureError):
        return error
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, ValueError) and frames and frames[-1][0].startswith(os.path.dirname(__file__) + os.sep):
        return error
    where, code = _innermost(frames)
    name, text = type(error).__name__, str(error)
    if "PendingUnbacked" in name or "DynamicOutputShape" in name:
        return CaptureError(where, code, *_DYNAMIC_SIZE)
    if "DataDependent" in name or "data-dependent" in text or "data dependent" in text or "is_nonzero" in text:
        sizes = (
            any(word in code for word in ("nonzero", "unique", "masked_select", "where(")) and " if " not in f" {code}"
        )
        return CaptureError(where, code, *(_DYNAMIC_SIZE if sizes else _DATA_DEPENDENT))
    if (
        "fake tensor in the exported program" in text
        or ("FakeTensor" in text and "numpy" in text)
        or ".numpy()" in text
    ):
        attribute = re.search(r"following model attribute: (\S+)\.", text)
        extra = f" (near {attribute[1]!r})" if attribute and not where else ""
        return CaptureError(where, code, _OPAQUE[0] + extra, _OPAQUE[1])
    summary = text.strip().split("\n\n")[0].strip().splitlines()
    said = " ".join(summary[:3])[:400] or name
    in_loss = any(frame.name == "_loss_of" for frame in traceback.extract_tb(error.__traceback__))
    return CaptureError(
        where,
        code,
        f"{'the loss' if in_loss else type(model).__name__} raised {name} while it was traced: {said}",
        "Check that model, batch and loss run together as model(batch) does. If they do, the line uses something torch.export "
        "cannot trace: use torch operations there, or wrap it as torch.library.custom_op with register_fake.",
    )


def _innermost(frames: list[tuple[str, int]]) -> tuple[str, str]:
    """`path:line` and source line of the innermost user's frame."""
    for file, line in reversed(frames):
        if _is_users(file):
            return f"{os.path.relpath(file) if _is_near(file) else file}:{line}", linecache.getline(file, line).strip()
    return "", ""


def _is_users(file: str) -> bool:
    if file.startswith((_TORCH, _WEFT + "graph" + os.sep, "<")):
        return False
    return file.startswith(_SITE) or not file.startswith(_STDLIB)


def _is_near(file: str) -> bool:
    return os.path.abspath(file).startswith(os.getcwd() + os.sep)
