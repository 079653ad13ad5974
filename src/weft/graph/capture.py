"""From a single-device training module and one batch to its operator graph.

Problem    users write `nn.Module`s; planning needs operators with shapes, at the altitude at which splitting rules are known
           (linear, layer_norm, attention, cross_entropy), for models that may be too large to exist here.
Method     `torch.export.export(strict=False)` of model, loss and batch together, with every parameter, buffer and leaf
           of the batch replaced by a shape without data for the time of the trace (`_without_data`); then `simplify` rewrites
           export's graph into nodes, `cost.price` prices each, and `fold.find_repeats` recognises repeated blocks.
Guarantee  the model is never run and never changed: parameters, buffers, training modes and random state are as before.
           Running the graph's operators in order (`interpret`) gives the model's loss and gradients.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parameter import UninitializedParameter

from weft.graph.batch import call, flatten_batch, unflatten_batch
from weft.graph.diagnose import explain
from weft.graph.fold import find_repeats
from weft.graph.graph import Graph
from weft.graph.simplify import Origin, simplify

__all__ = ["capture", "rarely_collecting"]


def capture(model: nn.Module, batch: Any, loss: Callable[..., Any] | None = None, *, train: bool = True) -> Graph:
    """The graph of one training step's forward: from the batch and the parameters to the loss.

    Args:
        model: any module that `torch.export` can trace; on any device, the meta device included.
        batch: one batch of tensors (only shapes and dtypes matter); see `weft.graph.batch` for how it reaches model and loss.
        loss: see `weft.graph.batch`; None if the model returns its loss.
        train: capture in training mode. A model in evaluation mode is switched for the time of the capture; one that is
            already in the wanted mode keeps the modes of its submodules (frozen batch norms stay frozen). With
            `train=False` a model without a loss may return any tensor.
    Returns:
        A graph whose parameters, buffers and batch leaves are nodes, used or not, in the order of the model and the batch.
    Raises:
        CaptureError: the model cannot be traced; names the line of the user's code and what to do.
        ValueError: the batch is not one, or there is no scalar to minimise.

    >>> graph = capture(nn.Linear(3, 2), (torch.ones(4, 3), torch.ones(4, 2)), nn.functional.mse_loss)
    >>> [node.op for node in graph.calls]
    ['linear', 'mse_loss']
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: must be a torch.nn.Module, got {type(model).__name__}")
    lazy = [name for name, tensor in model.named_parameters() if isinstance(tensor, UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"model: {lazy[0]} has no shape yet; run the model once on a batch so that its lazy layers find theirs"
        )
    leaves, paths, structure = flatten_batch(batch)
    if not leaves:
        raise ValueError("batch: there is no tensor in it; a batch holds at least one")
    step = _Step(model, loss, structure, scalar=train)
    origin = _origin(step, paths)
    with rarely_collecting(), _mode(model, train), _quiet(), _unchecked(), _without_data(step, leaves) as fakes:
        try:
            program = torch.export.export(step, tuple(fakes), strict=False)
        except Exception as error:
            raise explain(error, model) from error
    nodes, result, constants = simplify(program, origin)
    graph = Graph(nodes, result, structure, origin.aliases, constants, train=train)
    return graph.with_repeats(find_repeats(graph))


@contextlib.contextmanager
def rarely_collecting() -> Iterator[None]:
    """Python's garbage collector after 50,000 new objects instead of 700 (or whatever is set) while the context is open.

    Graphs are hundreds of thousands of objects that live: walking over them again and again takes a tenth of the time.
    """
    before = gc.get_threshold()
    if before[0]:  # 0: the user has switched it off
        gc.set_threshold(max(before[0], 50_000), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class _Step(nn.Module):
    """Model and loss as one module of the batch's leaves."""

    def __init__(self, model: nn.Module, loss: Callable[..., Any] | None, structure: Any, scalar: bool):
        super().__init__()
        self.model = model
        self.loss = loss  # registered as a submodule if it is one, so that its buffers and parameters are traced
        self.structure = structure
        self.scalar = scalar
        self.training = model.training

    def forward(self, *leaves: Tensor) -> Tensor:
        return call(self.model, unflatten_batch(self.structure, leaves), self.loss, scalar=self.scalar)


def _origin(step: _Step, paths: list[str]) -> Origin:
    """Where the graph's values come from: names of parameters and buffers as the user's module calls them.

    Buffers of the loss (class weights) are no state of the model: they become constants.
    """
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    parameters: dict[str, nn.Parameter] = {}
    buffers: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    for name, tensor in [*step.named_parameters(remove_duplicate=False), *step.named_buffers(remove_duplicate=False)]:
        inside, name = name, _user_name(name)
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        if isinstance(tensor, nn.Parameter):
            parameters[name] = tensor
        elif inside.startswith("loss."):
            constants[name] = tensor
        else:
            buffers[name] = tensor
    return Origin(paths, parameters, buffers, constants, aliases, _user_name)


def _user_name(name: str) -> str:
    """A name inside `_Step` as the user's module has it: `model.h.0` is `h.0`; the loss's own keep `loss.`."""
    return name.removeprefix("model.") if name != "model" else ""


@contextlib.contextmanager
def _mode(model: nn.Module, train: bool) -> Iterator[None]:
    """Training or evaluation mode for the time of a trace, with gradients on; modes and random states restored after."""
    modes = [(module, module.training) for module in model.modules()]
    states = torch.random.get_rng_state(), random.getstate()
    try:
        if model.training != train:
            model.train(train)
        with torch.enable_grad():
            yield
    finally:
        for module, was in modes:
            module.training = was
        torch.random.set_rng_state(states[0])
        random.setstate(states[1])


@contextlib.contextmanager
def _without_data(step: _Step, leaves: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters and buffers replaced by tensors without data while the context is open; yields such leaves too.

    Meta tensors become shapes on the CPU (or the model's device, if it has one), so that code which makes tensors
    without naming a device works with them. A tensor that occurs twice in the batch becomes two.
    """
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    known: dict[int, Tensor] = {}
    tensors = [*step.parameters(), *step.buffers()]
    homes = {tensor.device for tensor in tensors if tensor.device.type != "meta"}
    home = next(iter(homes)) if len(homes) == 1 else torch.device("cpu")

    def fake(tensor: Tensor) -> Tensor:
        device = home if tensor.device.type == "meta" or len(homes) < 2 else tensor.device
        shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(fake_mode, shape, device)  # as an operator within the mode it would take ten times as long

    def fake_once(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            value = fake(tensor)
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            known[id(tensor)] = value
        return known[id(tensor)]

    replaced = []
    try:
        for module in step.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        replaced.append((table, name, tensor))
                        table[name] = fake_once(tensor)  # type: ignore[assignment]
        yield [fake(leaf) for leaf in leaves]
    finally:
        for table, name, tensor in replaced:
            table[name] = tensor


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what tracing itself warns, logs and prints: weft's errors say it better. Models still print what they like."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stderr(_WithoutGraphs(sys.stderr)):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    """Without the checks of `torch.distributions`: they look at values, and there are none."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)


_TALKATIVE = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor", "torch.export._trace")


class _WithoutGraphs(io.TextIOBase):
    """A text stream that hands on everything but the half-made graphs that export prints when it fails."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        if "def forward(self" not in text:
            self.stream.write(text)
        return len(text)
