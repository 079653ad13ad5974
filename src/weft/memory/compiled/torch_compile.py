"""`torch.compile(model, backend=backend("6GiB"))`: a compiled model whose forward and backward keep within a number of bytes.

Problem    torch saves for backward what is fastest, or (`activation_memory_budget`) a share of that; neither says how many bytes
           a step holds, and the latter repeats random operators with fresh numbers, so that gradients are silently wrong.
Method     for each compiled graph   read it as a trace                                          `weft.memory.compiled.joint`
                                     plan the trace within the budget                            `weft.memory.plan`
                                     write the plan into it, and let torch cut it in two         `weft.memory.compiled.emit`
           at each call              add up what other graphs hold at that moment                `weft.memory.compiled.book`
Guarantee  parameters, buffers, inputs, what is saved, gradients, temporaries, and workspace where it could be measured, of all
           compiled graphs together never exceed the budget; or `BudgetError` is raised before the call. What no compiled
           graph sees (optimizer state, a loss that is not compiled) is what `optimizer` and `outside` say. Fused kernels
           are checked after they ran                                                            `weft.memory.compiled.fused`
Needs      fixed shapes: `torch.compile(..., dynamic=False)`. And a model that is one graph: where torch cuts it in pieces, what
           runs between them is outside; a function that it cannot follow at all (or compiles too often) runs without our
           being asked. The first is told by a warning; `fullgraph=True` makes an error of both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final, get_args

import torch
from torch import fx

from weft.cluster.device import Device
from weft.cluster.units import nbytes_of
from weft.errors import BudgetError
from weft.memory.arguments import expect, shown
from weft.memory.compiled.book import Book
from weft.memory.compiled.emit import promptly, write_joint
from weft.memory.compiled.fused import Watch, compile_fused
from weft.memory.compiled.joint import Joint, read_joint
from weft.memory.compiled.price import device_of, price_graph
from weft.memory.planning.check import check
from weft.memory.planning.choose import plan
from weft.memory.private import broken_at, compiling
from weft.memory.record import Trace
from weft.memory.schedule import Action, Schedule
from weft.memory.tracing.costs import CostTable
from weft.names import pick

__all__ = ["Backend", "Compiler", "Region", "backend"]

Compiler = Literal["eager", "inductor"]
COMPILERS = {name: name for name in get_args(Compiler)}


@final
@dataclass(frozen=True)
class Region:
    """One compiled graph and what was decided for it.

    Attributes:
        trace: its forward and backward.
        schedule: what runs when; everything once, if that fits.
        peak: most bytes it holds, its inputs included.
        overhead: seconds of repetitions / seconds of the graph.
        repeated: how many operators run again.
        training: whether it has a backward.
        broken: where torch has cut the model in pieces, of which this is one: what runs between them is no part of any; "" if
            it has not.
    """

    trace: Trace
    schedule: Schedule
    peak: int
    overhead: float
    repeated: int
    training: bool
    broken: str = ""

    def __str__(self) -> str:
        kind = "forward and backward" if self.training else "forward"
        repeats = f", {self.repeated} operators again, {100 * self.overhead:.1f} % slower" if self.repeated else ""
        broken = f"; a piece of what is cut at {self.broken}" if self.broken else ""
        return f"{kind}: {len(self.trace.ops)} operators, {_mib(self.peak)} (unplanned {_mib(self.trace.peak)}){repeats}{broken}"


def backend(
    budget: int | str,
    *,
    outside: int | str = 0,
    optimizer: torch.optim.Optimizer | None = None,
    costs: CostTable | Device | None = None,
    compiler: Compiler = "eager",
) -> Backend:
    """A backend for `torch.compile` that keeps a model within `budget` bytes.

        step = torch.compile(model, backend=backend("6GiB", optimizer=optimizer), dynamic=False)

    Compile the loss with the model (a module that returns its loss), so that what it holds is planned too. A graph without
    backward (evaluation) is planned likewise.

    Args:
        budget: bytes of all tensors at once, as a number or as "6GiB".
        outside: bytes of tensors that compiled graphs do not see; without `optimizer`, its state among them.
        optimizer: whose state counts: what it is now, or what it will be after its first step.
        costs: prices of operators: a table, a device's rates, or None to measure them here, once per kind of call.
        compiler: "eager": operators run one by one, by the kernels of eager torch, and hold what was planned, to the byte.
            "inductor": fused kernels; their bytes are not known beforehand, so each step's are compared with the budget, and
            the backward of one that exceeded it raises `BudgetError`. Evaluation is watched, not planned.

    Raises:
        ValueError: the budget is no number of bytes, or not positive; no such compiler; no optimizer or costs.

    The compiled model raises `BudgetError`, before it holds anything, where the budget cannot be kept, and `ValueError` for
    graphs with symbolic sizes. Where torch cuts a model in pieces, a `RuntimeWarning` says where: what runs between them counts
    as `outside`. `torch.compile(..., fullgraph=True)` refuses such a model, and others that it would leave to eager execution.
    """
    return Backend(budget, outside=outside, optimizer=optimizer, costs=costs, compiler=compiler)


@final
class Backend:
    """What `backend` makes. `regions` are the graphs compiled so far; printing it says what was decided."""

    __name__ = "weft"  # torch.compile asks for it

    def __init__(
        self,
        budget: int | str,
        *,
        outside: int | str = 0,
        optimizer: torch.optim.Optimizer | None = None,
        costs: CostTable | Device | None = None,
        compiler: Compiler = "eager",
    ):
        pick(compiler, COMPILERS, "compiler")
        expect("backend: optimizer", optimizer, torch.optim.Optimizer, optional=True)
        if not (costs is None or isinstance(costs, (CostTable, Device))):
            raise ValueError(
                f"backend: costs must be a weft.memory.CostTable or a weft.cluster.Device, got {shown(costs)}"
            )
        self.compiler = compiler
        self.budget = nbytes_of(budget, "budget")
        self.book = Book(self.budget, nbytes_of(outside, "outside", least=0), optimizer)
        self.costs = costs
        self.regions: list[Region] = []
        self._told = False  # that torch cuts the model in pieces
        self.watch = Watch(self.budget) if compiler == "inductor" else None

    def __str__(self) -> str:
        lines = [f"budget {_mib(self.budget)}, {_mib(self.book.elsewhere)} of it outside of compiled graphs"]
        if not self.regions:
            lines.append(
                "  no graph yet: what torch.compile cannot follow runs as it is, within no budget (fullgraph=True says why)"
            )
        return "\n".join(lines + [f"  {region}" for region in self.regions])

    def __call__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """What dynamo calls for each graph; gives the function that it calls instead of the graph."""
        broken = broken_at(module)
        if broken and not self._told:
            self._told = True
            warnings.warn(
                f"weft.memory.compiled: torch.compile cuts the model in pieces, at {broken}. What runs between them is not "
                "planned and may exceed the budget: say its bytes as outside=, or have torch refuse it by fullgraph=True",
                RuntimeWarning,
                stacklevel=2,
            )
        try:
            return _Compilation(self, broken).compile(module, example_inputs)
        except (BudgetError, ValueError) as error:
            refusal = error  # dynamo hides the class of an error that is raised here, so it is raised by the first call

        def refuse(*_: Any) -> Any:
            raise refusal

        return refuse


class _Compilation:
    """One graph on its way through AOTAutograd."""

    def __init__(self, owner: Backend, broken: str):
        self.owner, self.book, self.broken = owner, owner.book, broken
        self.region: Region | None = None
        self.num_forward = 0
        self.fixed: set[int] = set()  # storages of the graph's inputs in its last call

    def compile(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.owner.compiler == "inductor":
            compiled = compile_fused(module, example_inputs, self.partition)
        else:
            compiled = compiling().aot_autograd(
                fw_compiler=self.forward,
                bw_compiler=self.backward,
                inference_compiler=self.inference,
                partition_fn=self.partition,
            )(module, example_inputs)

        def call(*args: Any) -> Any:
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            if self.owner.watch is not None:
                self.owner.watch.before(tensors)
                results = compiled(*args)
                self.owner.watch.after(results)
                return results
            self.fixed = {t.untyped_storage()._cdata for t in tensors}
            self.book.note(tensors)
            self.book.note(t.grad for t in tensors if t.is_leaf)
            if self.region is not None:
                self.book.admit(self.region.peak, (), self.fixed)
            return compiled(*args)

        return call

    # -- what AOTAutograd calls ---------------------------------------------------------------------------------------------

    def partition(self, module: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **options: Any) -> Any:
        fixed = list(options.get("static_lifetime_input_indices") or ())
        self.num_forward = num_fwd_outputs
        self._plan(module, num_fwd_outputs, fixed, training=True)
        return compiling().default_partition(
            module, inputs, num_fwd_outputs=num_fwd_outputs, static_lifetime_input_indices=fixed
        )

    def forward(self, module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        run = compiling().boxed(module, inputs)

        def saving(args: list[Any]) -> Any:
            results = run(args)
            self.book.note(results[self.num_forward :])
            return results

        return _is_boxed(saving)

    def backward(self, module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        run = compiling().boxed(module, inputs)

        def returning(args: list[Any]) -> Any:
            assert self.region is not None
            self.book.admit(self.region.peak, args, self.fixed)
            results = run(args)
            self.book.note(results)
            return results

        return _is_boxed(returning)

    def inference(self, module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self._plan(module, len(next(iter(module.graph.find_nodes(op="output"))).args[0]), (), training=False)
        run: Callable[..., Any] = compiling().boxed(module, inputs)
        return run

    # -- planning -----------------------------------------------------------------------------------------------------------

    def _plan(self, module: fx.GraphModule, num_forward: int, fixed: Sequence[int], training: bool) -> None:
        """Plan the graph within what is left, and write the plan into it."""
        room = max(0, self.owner.budget - self.book.elsewhere)
        device = device_of(module.graph)
        price = price_graph(module.graph, self.owner.costs, room)
        joint = read_joint(module.graph, num_forward, fixed, price, states=False, device=device)
        schedule = Schedule(tuple(Action("run", index) for index in range(len(joint.trace.ops))))
        if joint.trace.peak > room:
            # States of generators take bytes too: where those are what is missing, random operators run once. Inductor's
            # random operators draw from a seed in the graph, which is saved.
            readings = [joint]
            if self.owner.compiler == "eager":
                readings.insert(0, read_joint(module.graph, num_forward, fixed, price, device=device))
            joint, found = self._within(room, *readings)
            schedule = promptly(joint.trace, found)
            module.graph = write_joint(joint, schedule)
            module.recompile()
        trace = joint.with_states_of(schedule)
        checked = check(trace, schedule)
        self.region = Region(trace, schedule, checked.peak, checked.overhead, checked.repeated, training, self.broken)
        self.owner.regions.append(self.region)

    def _within(self, room: int, *joints: Joint) -> tuple[Joint, Schedule]:
        """The first of some readings of the graph that can be planned within `room` bytes, and its plan."""
        refused: list[BudgetError] = []
        # Near the least budget the search depends on what operators cost. Where it fails with measured costs, nominal ones,
        # the same in every run, decide: so a budget that one run named as the least will do in the next.
        for costs in (lambda trace: trace, _nominal):
            for joint in joints:
                try:
                    return joint, plan(costs(joint.trace), room).schedule
                except BudgetError as error:
                    refused.append(error)
        error = min(refused[len(joints) :], key=lambda e: e.least or self.owner.budget)
        elsewhere = self.book.elsewhere  # the user named the budget, not what is left of it for this graph
        beside = f"beside {elsewhere:,} bytes outside of the compiled graph, " if elsewhere else ""
        raise BudgetError(self.owner.budget, error.least + elsewhere if error.least else 0, beside + error.what)


def _nominal(trace: Trace) -> Trace:
    """The trace with costs that depend on nothing but bytes."""
    sizes = [sum(trace.values[v].nbytes for v in (*op.reads, *op.makes)) for op in trace.ops]
    return replace(
        trace, ops=tuple(replace(op, seconds=1e-6 + n / 1e10) for op, n in zip(trace.ops, sizes, strict=True))
    )


def _is_boxed(run: Callable[..., Any]) -> Callable[..., Any]:
    """Say that a function takes its arguments in one list, which it empties."""
    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"
