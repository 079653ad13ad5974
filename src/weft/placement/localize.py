"""Turn a graph and an assignment into the plain module that one device runs.

Problem    every value has a placement; a reader may want another. Give each device a program on plain local tensors whose
           losses, weighted by `seed`, sum to the single-device loss, and whose autograd gradients are the local pieces of the
           single-device gradients (placed by `layout.dual`).
Method     one straight-line Python function, generated once:                                        `_Program`
               value in another placement        a compiled boxing, made once per (value, placement)
               operator                          itself on local tensors, or its row's local program
               end of life                       `del`, so that only what autograd keeps stays alive
           No tensor subclass, no dispatch of our own at run time: the generated source is `LocalModule.code`.
Guarantee  follows from the rows (proved by `verify`) and from boxing's backward being its adjoint.
Source     Yuan et al., OneFlow, arXiv:2110.15032, section 3; the seeds are ours (see `layout.dual`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.graph.graph import Graph, Node, Ref, map_refs
from weft.graph.rewrite import operator
from weft.placement.assignment import Assignment
from weft.placement.axes import Cuts, find_cuts
from weft.placement.boxing import compile_boxing
from weft.placement.comms import Comms
from weft.placement.layout import Placements, Replicate, Shard, intervals, local_shape
from weft.placement.signature import Local

__all__ = ["LocalModule", "ParameterHooks", "localize"]


class ParameterHooks:
    """What the runtime does around the uses of a bucket of parameters; this base does nothing.

    In forward, `fetch(i)` runs before the first operator that reads a parameter of bucket i, `release(i)` after the last.
    `guard(i, output)` gets each output of those operators and returns it, perhaps with a gradient hook: backward reaches
    the output before it needs the parameters.
    """

    def fetch(self, bucket: int) -> None:
        """Make the bucket's leaves hold their values."""

    def release(self, bucket: int) -> None:
        """The bucket's leaves are not read again in this forward."""

    def guard(self, bucket: int, output: Tensor) -> Tensor:
        """Called with every output of an operator that reads the bucket."""
        return output


class LocalModule(nn.Module):
    """One device's program: `module(*leaves of the whole batch)` returns the local loss.

    Backward is `loss.backward(torch.full_like(loss, module.seed))`. Then `leaves[name].grad` holds the gradient in the
    placement `dual(used)`: a Shard's own piece; what is Replicate still owes a sum over its axes.

    Attributes:
        leaves: parameters by name, in the placement in which they are used.
        local_buffers: buffers by name, likewise.
        loss_placements: of the loss that forward returns; `whole_loss` makes it Replicate.
        seed: the cotangent with which every device starts backward, so that the seeds of a replicated loss sum to 1.
        hooks: a `ParameterHooks`, called around the uses of each bucket.
        code: source of the generated forward.
    """

    def __init__(self, leaves: Mapping[str, nn.Parameter], buffers: Mapping[str, Tensor], mesh_shape: tuple[int, ...]):
        super().__init__()
        self.leaves = dict(leaves)
        self.local_buffers = dict(buffers)
        self.hooks = ParameterHooks()
        self.random_seed = 0
        self.code = ""
        self.loss_placements: Placements = (Replicate(),) * len(mesh_shape)
        self._mesh_shape = mesh_shape
        self._forward: Callable[..., Tensor]
        self._whole_loss: Callable[[Tensor], Tensor]

    @property
    def seed(self) -> float:
        seed = 1.0
        for p, placement in zip(self._mesh_shape, self.loss_placements, strict=True):
            seed /= p if isinstance(placement, Replicate) else 1
        return seed

    def new_step(self, seed: int) -> None:
        """Set the stream from which this step's random operators draw; the same number on every device."""
        self.random_seed = seed

    def whole_loss(self, loss: Tensor) -> Tensor:
        """The global loss from the local ones: one scalar all-reduce per axis on which it is Partial."""
        return self._whole_loss(loss)

    def forward(self, *batch: Tensor) -> Tensor:
        return self._forward(*batch)


def localize(
    graph: Graph,
    assignment: Assignment,
    rank: int,
    comms: Comms,
    *,
    buckets: Sequence[Sequence[str]] = (),
    leaves: Mapping[str, nn.Parameter] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    cuts: Cuts | None = None,
) -> LocalModule:
    """The program of one device.

    Args:
        graph: the captured model.
        assignment: placements for all of it.
        rank: global rank, one of `assignment.mesh.ranks`.
        comms: the process groups of the mesh.
        buckets: lists of parameter names around whose uses `LocalModule.hooks` is called.
        leaves, buffers: local tensors to use, by name (a refit program shares those of the planned one); missing ones are made
            with `torch.empty` and are the caller's to fill.
        device: where local tensors live; it also replaces the device in operators that create tensors.
        cuts: `find_cuts(graph)`, if at hand.
    Raises:
        ValueError: a shard does not fit its dim, or the assignment is for another graph; before any communication.
    """
    missing = [node.name for node in graph.calls if node.name not in assignment.signatures]
    lacking = [name for name in graph.parameters if name not in assignment.parameters]
    if missing or lacking:
        raise ValueError(
            f"the assignment is for another graph: it has no signature for {missing[:3]} and no placement for parameters "
            f"{lacking[:3]}; plan again for this model"
        )
    position = assignment.mesh.coordinates(rank)
    shape_of = lambda node, placements: local_shape(node.outputs[0].shape, placements, assignment.mesh, position)
    own_leaves, own_buffers = dict(leaves or {}), dict(buffers or {})
    for name, node in graph.parameters.items():
        if name not in own_leaves:
            empty = torch.empty(
                shape_of(node, assignment.parameters[name].used), dtype=node.outputs[0].dtype, device=device
            )
            own_leaves[name] = nn.Parameter(empty, requires_grad=node.outputs[0].requires_grad)
    for node in graph.of("buffer"):
        if node.target not in own_buffers:
            placements = assignment.output(graph, Ref(node.name))
            own_buffers[node.target] = torch.empty(
                shape_of(node, placements), dtype=node.outputs[0].dtype, device=device
            )
    module = LocalModule(own_leaves, own_buffers, assignment.mesh.shape)
    module.loss_placements = assignment.output(graph, graph.loss)
    cuts = cuts or find_cuts(graph, finest=assignment.mesh.size, allow_replicated=True)
    program = _Program(graph, assignment, comms, position, module, cuts, torch.device(device))
    module._forward = program.compile([list(bucket) for bucket in buckets])
    module.code = program.source
    everywhere = (Replicate(),) * assignment.mesh.ndim
    module._whole_loss = compile_boxing(module.loss_placements, everywhere, graph.spec(graph.loss).shape, comms)
    return module


class _LocalCall(Local):
    """`Local` for one node of a program."""

    def __init__(self, program: _Program, node: Node, number: int):
        self.node = node
        self._program = program
        self._number = number
        self._in = program.assignment.inputs(node)
        self._out = tuple(program.assignment.output(program.graph, Ref(node.name, i)) for i in range(len(node.outputs)))

    def _input(self, operand: int) -> tuple[tuple[int, ...], Placements]:
        return self._program.graph.spec(self.node.inputs[operand]).shape, self._in[operand]

    def _output(self, output: int) -> tuple[tuple[int, ...], Placements]:
        return self.node.outputs[output].shape, self._out[output]

    def _range(self, shape: tuple[int, ...], placements: Placements, dim: int) -> tuple[int, int]:
        held = intervals(shape[dim], dim, placements, self._program.assignment.mesh, self._program.position)
        if len(held) != 1:
            raise ValueError(
                f"{self.node.name}: dim {dim} is cut in blocks, but {self.node.target} needs one range per device"
            )
        return held[0]

    def input_shape(self, operand: int) -> tuple[int, ...]:
        return local_shape(*self._input(operand), self._program.assignment.mesh, self._program.position)

    def output_shape(self, output: int = 0) -> tuple[int, ...]:
        return local_shape(*self._output(output), self._program.assignment.mesh, self._program.position)

    def input_range(self, operand: int, dim: int) -> tuple[int, int]:
        shape, placements = self._input(operand)
        return self._range(shape, placements, dim)

    def output_range(self, output: int, dim: int) -> tuple[int, int]:
        shape, placements = self._output(output)
        return self._range(shape, placements, dim)

    def axes_of_input(self, operand: int, dim: int) -> tuple[int, ...]:
        return tuple(axis for axis, p in enumerate(self._in[operand]) if isinstance(p, Shard) and p.dim == dim)

    def axes_of_output(self, output: int, dim: int) -> tuple[int, ...]:
        return tuple(axis for axis, p in enumerate(self._out[output]) if isinstance(p, Shard) and p.dim == dim)

    def group(self, axis: int) -> Any:
        return self._program.comms.group(axis)

    def random_stream(self) -> Callable[[], int]:
        module, number = self._program.module, self._number
        sharded = {axis for placements in self._out for axis, p in enumerate(placements) if isinstance(p, Shard)}
        here = tuple(i if axis in sharded else -1 for axis, i in enumerate(self._program.position))

        def draw() -> int:
            return _mix(module.random_seed, number, *here)

        return draw


def _mix(*numbers: int) -> int:
    """A 63-bit seed from a few integers; neighbouring numbers give unrelated seeds (splitmix64)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class _Program:
    """Writes the source of one device's forward, line by line in the order of the graph."""

    def __init__(
        self,
        graph: Graph,
        assignment: Assignment,
        comms: Comms,
        position: tuple[int, ...],
        module: LocalModule,
        cuts: Cuts,
        device: torch.device,
    ):
        self.graph, self.assignment, self.comms, self.position = graph, assignment, comms, position
        self.module, self.cuts, self.device = module, cuts, device
        self.source = ""
        self._lines: list[str] = []
        self._names: dict[str, Any] = {"module": module}
        self._held: dict[tuple[Ref, Placements], str] = {}  # variable of a value in a placement

    def compile(self, buckets: list[list[str]]) -> Callable[..., Tensor]:
        graph = self.graph
        inputs = graph.of("input")
        around = _bucket_uses(graph, buckets)
        last_read = {ref: number for number, node in enumerate(graph.calls) for ref in node.inputs}
        last_read[graph.loss] = len(graph.calls)
        self._bring_in()
        for number, node in enumerate(graph.calls):
            first, last, using = around.get(node.name, ((), (), ()))
            self._lines += [f"module.hooks.fetch({bucket})" for bucket in first]
            self._call(node, number, using)
            self._lines += [f"module.hooks.release({bucket})" for bucket in last]
            ended = [v for (ref, _), v in self._held.items() if last_read.get(ref, number) == number]
            self._held = {key: v for key, v in self._held.items() if v not in ended}
            if ended:
                self._lines.append(f"del {', '.join(ended)}")
        loss = self._held.get((graph.loss, self.module.loss_placements))
        self._lines.append(f"return {loss}")
        parameters = ", ".join(_variable(Ref(node.name)) for node in inputs)
        self.source = f"def forward({parameters}):\n" + "".join(f"    {line}\n" for line in self._lines)
        scope = dict(self._names)
        exec(compile(self.source, f"<weft program of rank {self.assignment.mesh.at(self.position)}>", "exec"), scope)
        return scope["forward"]

    def _bring_in(self) -> None:
        """Variables of everything that is not a call."""
        graph, readers = self.graph, self.graph.consumers()
        for node in graph.nodes:
            ref = Ref(node.name)
            if node.role == "call" or (ref not in readers and ref != graph.loss):
                continue
            variable = _variable(ref)
            if node.role == "parameter":
                self._names[f"leaf_{variable}"] = self.module.leaves[node.target]
                self._lines.append(f"{variable} = leaf_{variable}")
            elif node.role == "buffer":
                self._names[f"buffer_{variable}"] = self.module.local_buffers[node.target]
                self._lines.append(f"{variable} = buffer_{variable}")
            elif node.role == "constant":
                self._names[f"constant_{variable}"] = graph.constants[node.target].to(self.device)
                self._lines.append(f"{variable} = constant_{variable}")
            self._held[ref, self.assignment.output(graph, ref)] = variable

    def _operand(self, ref: Ref, wanted: Placements) -> str:
        """The variable that holds a value as wanted; a boxing on first demand."""
        if (ref, wanted) not in self._held:
            made = self.assignment.output(self.graph, ref)
            shape = self.graph.spec(ref).shape
            variable = f"{_variable(ref)}_as_{len(self._lines)}"
            boxing = compile_boxing(made, wanted, shape, self.comms)
            self._names[f"box_{variable}"] = boxing
            self._lines.append(f"{variable} = box_{variable}({self._held[ref, made]})  # {_arrow(made, wanted)}")
            self._held[ref, wanted] = variable
        return self._held[ref, wanted]

    def _call(self, node: Node, number: int, using: Sequence[int]) -> None:
        """One operator: box its operands, call it, name its outputs."""
        for ref in node.mutates:
            wanted = self.assignment.inputs(node)[node.inputs.index(ref)]
            if wanted != self.assignment.output(self.graph, ref):
                raise ValueError(
                    f"{node.name} writes the buffer {self.graph[ref.node].target!r}, which cannot be boxed to {wanted}"
                )
        operands = iter([self._operand(*pair) for pair in zip(node.inputs, self.assignment.inputs(node), strict=True)])
        args, kwargs = map_refs((node.args, dict(node.kwargs)), lambda _: _Code(next(operands)))
        kwargs = {key: self.device if key == "device" and value is not None else value for key, value in kwargs.items()}
        arguments = [self._literal(arg) for arg in args] + [
            f"{key}={self._literal(value)}" for key, value in kwargs.items()
        ]
        local = self.cuts.rows[node.name].local
        self._names[f"op_{node.name}"] = (
            operator(node.target) if local is None else local(_LocalCall(self, node, number))
        )
        outputs = [_variable(Ref(node.name, index)) for index in range(len(node.outputs))]
        call = f"op_{node.name}({', '.join(arguments)})"
        if not outputs:
            self._lines.append(call)
            return
        single = len(outputs) == 1 and not _returns_many(node)
        self._lines.append(f"{outputs[0] if single else ', '.join(outputs) + ','} = {call}")
        for index, variable in enumerate(outputs):
            ref = Ref(node.name, index)
            if using and node.outputs[index].requires_grad:
                self._lines += [f"{variable} = module.hooks.guard({bucket}, {variable})" for bucket in using]
            self._held[ref, self.assignment.output(self.graph, ref)] = variable

    def _literal(self, value: Any) -> str:
        """Source of an argument; what has no literal becomes a name of the program."""
        if isinstance(value, _Code):
            return value
        if isinstance(value, (bool, int, str, type(None))):
            return repr(value)
        if isinstance(value, list):
            return f"[{', '.join(map(self._literal, value))}]"
        if isinstance(value, tuple):
            return f"({', '.join(map(self._literal, value))}{',' if len(value) == 1 else ''})"
        name = f"value_{len(self._names)}"
        self._names[name] = value
        return name


class _Code(str):
    """A string that is source already."""


def _variable(ref: Ref) -> str:
    return ref.node if ref.index == 0 else f"{ref.node}__{ref.index}"


def _arrow(made: Placements, wanted: Placements) -> str:
    return f"{' '.join(map(str, made))} -> {' '.join(map(str, wanted))}"


def _returns_many(node: Node) -> bool:
    """Whether the operator returns a tuple or list even for one output (a chunk into one piece)."""
    overload: Any = operator(node.target)
    returns = overload._schema.returns
    return len(returns) != 1 or "[]" in str(returns[0].type) or "List" in str(returns[0].type)


def _bucket_uses(
    graph: Graph, buckets: list[list[str]]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Per call: the buckets whose first use it is, whose last use it is, and all that it reads.

    A view of a parameter shares its memory, so that who reads the view reads the parameter.
    """
    bucket_of = {name: index for index, bucket in enumerate(buckets) for name in bucket}
    lives_in = {Ref(node.name): {bucket_of[node.target]} for node in graph.of("parameter") if node.target in bucket_of}
    used: dict[str, tuple[int, ...]] = {}
    for node in graph.calls:
        found = set().union(*(lives_in.get(ref, set()) for ref in node.inputs))
        used[node.name] = tuple(sorted(found))
        if found and node.kind == "view":
            lives_in.update({Ref(node.name, index): found for index in range(len(node.outputs))})
    order = list(used.items())
    first = _first_seen(order)
    last = _first_seen(reversed(order))
    return {
        name: (
            tuple(bucket for bucket in buckets_here if first[bucket] == name),
            tuple(bucket for bucket in buckets_here if last[bucket] == name),
            buckets_here,
        )
        for name, buckets_here in used.items()
        if buckets_here
    }


def _first_seen(order: Iterator[tuple[str, tuple[int, ...]]] | list[tuple[str, tuple[int, ...]]]) -> dict[int, str]:
    seen: dict[int, str] = {}
    for name, buckets in order:
        for bucket in buckets:
            seen.setdefault(bucket, name)
    return seen
