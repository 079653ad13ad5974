"""Export's graph rewritten as nodes: flat, without in-place operators, one spelling per meaning, nothing dead.

walk             every exported call in order, through the bodies of `no_grad` regions      `_Simplifier.run`
spelling         `rewrite.rewrite`
writes           to activations become new values, to buffers stay and are listed in `Node.mutates`
                 (`aliasing` keeps track of views)                                          `_write`
gradients        `TensorSpec.requires_grad` of every value; what enters a `no_grad` region is detached there
dead calls       those that neither the loss nor a buffer needs are dropped                 `_alive`
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind

from weft.graph.aliasing import Memory, NotWritable, Tracked, View, read, write
from weft.graph.cost import price
from weft.graph.diagnose import TRANSFORMED, depends_on_data, frame_at, left_torch, refuse
from weft.graph.graph import Node, Ref, TensorSpec, map_refs, refs_in
from weft.graph.masks import mask_kind
from weft.graph.rewrite import OUT_OF_PLACE, Draft, operator, rewrite, without_out
from weft.graph.strides import Strides

__all__ = ["Origin", "simplify"]


@dataclass(frozen=True)
class Origin:
    """Names of what comes into the graph: leaves of the batch, the model's parameters and buffers, tensors of the loss.

    `rename` turns a name inside the exported module into the user's; `aliases` maps tied names to the first one.
    """

    paths: Sequence[str]
    parameters: Mapping[str, nn.Parameter]
    buffers: Mapping[str, Tensor]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    rename: Callable[[str], str] = str


def simplify(program: torch.export.ExportedProgram, origin: Origin) -> tuple[tuple[Node, ...], Ref, dict[str, Tensor]]:
    """Nodes in execution order, the loss, and the values of constants.

    Raises:
        CaptureError: a call has no place in a graph (its output's size depends on data, it writes a parameter, ...).
    """
    return _Simplifier(program, origin).run()


# Operators that stop gradients although their output is of a floating dtype.
_STOPS = {
    "detach",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "rand_like",
    "randn_like",
    "bernoulli",
    "one_hot",
    "histc",
}
_STOPS |= {"new_zeros", "new_ones", "new_full", "new_empty", "normal_functional", "uniform", "sign_"}
# Calls that only check something for export.
_CHECKS = {
    "_assert_tensor_metadata",
    "_assert_async",
    "_assert_scalar",
    "sym_constrain_range",
    "_functional_assert_async",
}
_CHECKS |= {"sym_constrain_range_for_size", "_set_grad_enabled"}
# In-place operators that change how a tensor is seen, not what it holds.
_RESHAPES_ITSELF = {"squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_"}
# Operators that write their running statistics in training, which their schemas do not say: positions of (statistics), flag.
_STATISTICS = {"aten.batch_norm.default": ((3, 4), 5), "aten.instance_norm.default": ((3, 4), 5)}


class _Simplifier:
    """Walks export's graph and emits nodes; also the graph that `aliasing` reads and writes through."""

    def __init__(self, program: torch.export.ExportedProgram, origin: Origin):
        self.program, self.origin = program, origin
        self.nodes: dict[str, Node] = {}
        self.env: dict[fx.Node, Any] = {}
        self.constants: dict[str, Tensor] = {}
        self.here: fx.Node | None = None  # the exported call being rewritten: gives new nodes their module and line
        self.no_grad = False
        self.named: set[str] = set()
        self.masks: dict[Ref, str] = {}  # what attention masks hide, of those looked at
        self.device = next((p.device.type for p in origin.parameters.values() if p.device.type != "meta"), "cpu")
        self.strides = Strides(self.spec, self.device)

    def run(self) -> tuple[tuple[Node, ...], Ref, dict[str, Tensor]]:
        self._values_from_outside()
        results = self._body(self.program.graph_module)
        loss = read(results[-1], self)
        alive = self._alive(loss)
        readers = {ref.node for node in alive for ref in node.inputs} | {loss.node}
        kept = [node for node in alive if node.role != "constant" or node.name in readers]
        constants = {node.target: self.constants[node.target] for node in kept if node.role == "constant"}
        return tuple(kept), loss, constants

    # -- values from outside ---------------------------------------------------------------------------------------

    def _values_from_outside(self) -> None:
        """Nodes for every leaf, parameter and buffer, used or not, and for the constants of the program."""
        origin = self.origin
        constants = dict(origin.constants)
        roles = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer", InputKind.CONSTANT_TENSOR: "constant"}
        placeholders = {node.name: node for node in self.program.graph.nodes if node.op == "placeholder"}
        paths = iter(origin.paths)
        named: list[tuple[fx.Node, str]] = []
        known: dict[str, Tracked] = {}
        for item in self.program.graph_signature.input_specs:
            placeholder = placeholders[item.arg.name]
            if item.kind == InputKind.USER_INPUT:
                path = next(paths)
                self.env[placeholder] = self._outside("input", path, _spec_of(placeholder.meta["val"]), Memory())
            elif item.kind in roles:
                name = origin.rename(item.target or "")
                if item.kind == InputKind.CONSTANT_TENSOR:
                    constants[name] = self.program.constants[item.target or ""]
                    if isinstance(constants[name], FakeTensor):
                        raise left_torch(placeholder)
                named.append((placeholder, origin.aliases.get(name, name)))
            else:
                raise refuse(
                    placeholder,
                    f"export made an input of kind {item.kind.name}",
                    "Pass its tensors in the batch instead.",
                )
        for name, parameter in origin.parameters.items():
            spec = replace(_spec_of(parameter), requires_grad=parameter.requires_grad)
            known[name] = self._outside("parameter", name, spec, Memory(parameter=name))
        for name, buffer in origin.buffers.items():
            known[name] = self._outside("buffer", name, _spec_of(buffer), Memory())
            known[name].memory.buffer = known[name].ref
        for name, value in constants.items():
            if value.is_meta:
                raise ValueError(
                    f"the constant {name!r} is on the meta device, so its values are unknown; make it a buffer"
                )
            self.constants[name] = value.detach().cpu()
            known[name] = self._outside("constant", name, _spec_of(value), Memory())
        for placeholder, name in named:
            self.env[placeholder] = known[name]

    def _outside(self, role: Any, target: str, spec: TensorSpec, memory: Memory) -> Tracked:
        prefix = {"input": "x", "parameter": "p", "buffer": "b", "constant": "c"}[role]
        name = self._fresh(f"{prefix}_{target}")
        self.nodes[name] = Node(name=name, role=role, target=target, outputs=(spec,))
        return Tracked(Ref(name), memory)

    # -- the walk --------------------------------------------------------------------------------------------------

    def _body(self, module: fx.GraphModule) -> list[Any]:
        """Emit a graph's calls; the values of its outputs."""
        for node in module.graph.nodes:
            if node.op == "call_function":
                self.here = node
                self.env[node] = self._call(module, node)
            elif node.op == "output":
                outputs = node.args[0]
                return [self.env.get(item) for item in (outputs if isinstance(outputs, (list, tuple)) else [outputs])]
        raise AssertionError("a graph ends in an output")

    def _call(self, module: fx.GraphModule, node: fx.Node) -> Any:
        target: Any = node.target
        if target is python_operator.getitem:
            return self.env[node.args[0]][node.args[1]]  # type: ignore[index]
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._region(module, node)
        if getattr(target, "__module__", "").startswith("torch._functorch"):
            raise refuse(node, *TRANSFORMED)
        if not isinstance(target, torch._ops.OpOverload):
            raise depends_on_data(node)  # arithmetic on sizes; with static sizes there is none
        if target._schema.name.split("::")[1] in _CHECKS:
            return None
        name = f"{target.namespace}.{target._opname}.{target._overloadname}"
        values = fx.node.map_aggregate((node.args, node.kwargs), self._tracked)
        written = [
            i
            for i, argument in enumerate(target._schema.arguments)
            if argument.alias_info and argument.alias_info.is_write
        ]
        if target._opname == "detach_":
            written = []
        if written:
            return self._write(node, name, written, *_thawed(values))
        return self._read(node, name, *_thawed(values))

    def _tracked(self, item: Any) -> Any:
        if isinstance(item, fx.Node):
            value = self.env[item]
            if value is None and "val" in item.meta and not isinstance(item.meta["val"], Tensor):
                raise depends_on_data(item)
            return value
        return item

    def _region(self, module: fx.GraphModule, node: fx.Node) -> Any:
        """The body of a `with torch.no_grad()` block, in place of the block."""
        target: Any = node.target
        if target.name() == "wrap_with_set_grad_enabled":
            enabled, body, *operands = node.args
            body_module = getattr(module, body.target)  # type: ignore[union-attr]
        elif target.name() == "wrap_with_autocast" and not node.args[2]:
            _, _, _, _, body, *operands = node.args
            enabled, body_module = True, getattr(module, body.target)  # type: ignore[union-attr]
        elif target.name() == "wrap_with_autocast":
            body = getattr(module, node.args[4].target).graph  # type: ignore[union-attr]
            first = next((item for item in body.nodes if item.meta.get("stack_trace")), node)
            raise refuse(
                first,
                "it turns autocast on",
                "Leave precision to weft: remove that block and pass autocast= to weft.run.",
            )
        else:
            raise refuse(
                node,
                f"it uses {target.name()}, control flow inside the program",
                "weft plans one fixed program: use torch.where or a Python loop.",
            )
        outer, was = self.here, self.no_grad
        self.no_grad = was or not enabled
        placeholders = [item for item in body_module.graph.nodes if item.op == "placeholder"]
        given = [self._tracked(item) for item in operands]
        for placeholder, value in zip(placeholders, given, strict=True):
            self.env[placeholder] = self._detached(value) if self.no_grad and isinstance(value, Tracked) else value
        back = {id(self.env[placeholder]): value for placeholder, value in zip(placeholders, given, strict=True)}
        outputs = self._body(body_module)
        self.here, self.no_grad = outer, was
        return [back.get(id(value), value) for value in outputs]

    def _detached(self, value: Tracked) -> Tracked:
        ref = read(value, self)
        if not self.spec(ref).requires_grad:
            return value
        view = View("aten.detach.default")
        return Tracked(self.emit_view(ref, view, like=ref), value.memory, value, view, value.memory.version)

    # -- calls that only read --------------------------------------------------------------------------------------

    def _read(self, node: fx.Node, target: str, args: Any, kwargs: Any) -> Any:
        if target == "aten.broadcast_tensors.default":
            return [self._broadcast(value, spec) for value, spec in zip(args[0], _outputs_of(node), strict=True)]
        outputs = _outputs_of(node)
        source = self._shares_memory_with(node)
        refs_args, refs_kwargs = self._as_refs(args), self._as_refs(kwargs)
        if target == "aten.detach.default" and self.spec(refs_args[0]).requires_grad:
            return self._detached(args[0])
        draft = self.draft(target, refs_args, dict(refs_kwargs), outputs)
        result = rewrite(self._known_mask(draft))
        if isinstance(result, Ref):
            return self._equal(result, source, node)
        view = self._as_view(result, source)
        refs = self._emit(node.name, result, self._statistics(target, args))
        made = [
            Tracked(ref, source.memory if source else Memory(), source, replace(view, index=i) if view else None,
                    source.memory.version if source else 0)
            for i, ref in enumerate(refs)
        ]  # fmt: skip
        return made if isinstance(node.meta["val"], (list, tuple)) else made[0]

    def _known_mask(self, draft: Draft) -> Draft:
        """Attention told by a flag, not by a tensor, that it is causal or that nothing is hidden."""
        mask = draft.args[3] if len(draft.args) > 3 else draft.kwargs.get("attn_mask")
        if draft.target != "aten.scaled_dot_product_attention.default" or not isinstance(mask, Ref):
            return draft
        if mask not in self.masks:
            self.masks[mask] = mask_kind(mask, self.nodes_by_ref, self.constants)
        if self.masks[mask] == "other":
            return draft
        defaults = [None, 0.0, False]  # mask, dropout, causal
        args = [*draft.args[:6], *defaults[len(draft.args) - 3 :]] if len(draft.args) < 6 else list(draft.args)
        args[3], args[5] = None, self.masks[mask] == "causal"
        kwargs = {key: item for key, item in draft.kwargs.items() if key not in ("attn_mask", "dropout_p", "is_causal")}
        args[4] = draft.kwargs.get("dropout_p", args[4])
        return self.draft(draft.target, args, kwargs, draft.outputs)

    def _broadcast(self, value: Tracked, spec: TensorSpec) -> Tracked:
        ref = read(value, self)
        if self.shape(ref) == spec.shape:
            return value
        view = View("aten.expand.default", (list(spec.shape),))
        made = self.emit(view.target, (ref, *view.args), shape=spec.shape, dtype=spec.dtype)
        return Tracked(made, value.memory, value, view, value.memory.version)

    def _equal(self, result: Ref, source: Tracked | None, node: fx.Node) -> Tracked:
        """A call that equals a value it read: the same tensor if it shares its memory, else a copy that may go its own way."""
        if source is not None:
            if source.ref == result:
                return source
            view = View("aten.reshape.default", (list(self.shape(result)),))
            return Tracked(result, source.memory, source, view, source.memory.version)
        if self._owner_is_buffer(node):  # it may be written before this is read
            result = self.emit("aten.clone.default", (result,), like=result)
        return Tracked(result, Memory())

    def _owner_is_buffer(self, node: fx.Node) -> bool:
        values = [self.env.get(item) for item in node.all_input_nodes]
        return any(isinstance(value, Tracked) and value.memory.buffer is not None for value in values)

    def _shares_memory_with(self, node: fx.Node) -> Tracked | None:
        """The operand whose memory the call's output is a view of, if any."""
        mine = _storage(node.meta.get("val"))
        if mine is None:
            return None
        for operand in node.all_input_nodes:
            value = self.env.get(operand)
            if isinstance(value, Tracked) and _storage(operand.meta.get("val")) == mine:
                return value
        return None

    def _as_view(self, draft: Draft, source: Tracked | None) -> View | None:
        """How to make the output again from `source`, should its memory be written."""
        if source is None:
            return None
        if draft.target == "aten.reshape.default":
            return View(draft.target, (list(draft.outputs[0].shape),))
        return View(draft.target, tuple(draft.args[1:]), dict(draft.kwargs))

    def _statistics(self, target: str, args: Sequence[Any]) -> tuple[Ref, ...]:
        if target not in _STATISTICS:
            return ()
        positions, flag = _STATISTICS[target]
        if not args[flag]:
            return ()
        return tuple(args[i].ref for i in positions if isinstance(args[i], Tracked))

    # -- calls that write ------------------------------------------------------------------------------------------

    def _write(self, node: fx.Node, target: str, written: list[int], args: Any, kwargs: Any) -> Any:
        name = target.split(".")[1]
        result = kwargs.get("out")
        if isinstance(result, Tracked) and len(written) == 1:
            given = {key: item for key, item in kwargs.items() if key != "out"}
            return self._replace(node, without_out(target), result, args, given)
        value = args[0] if args else None
        if written != [0] or not name.endswith("_") or not isinstance(value, Tracked):
            why = f"{target} writes its arguments in a way weft cannot follow"
            raise refuse(node, why, "Use an operator that returns its result.")
        if name in _RESHAPES_ITSELF:
            made = self._read(node, target.replace("_.", ".", 1), args, kwargs)
            self.env[node.args[0]] = made  # type: ignore[index]
            return made
        buffer = value.memory.buffer
        if buffer is None or value.source is not None or name == "copy_":
            return self._replace(node, target, value, args, kwargs)
        rest = tuple(self._as_refs(args[1:]))
        draft = self.draft(target, (buffer, *rest), dict(self._as_refs(kwargs)), (self.spec(buffer),))
        (new,) = self._emit(node.name, draft, (buffer,))
        write(value, new, self)
        return value

    def _replace(self, node: fx.Node, target: str, value: Tracked, args: Any, kwargs: Any) -> Tracked:
        """A write as new values of the tensor and of all it is a view of; a buffer among those is written at once."""
        if value.memory.parameter is not None:
            why = f"its forward writes the parameter {value.memory.parameter!r}"
            raise refuse(node, why, "Do it outside forward, or compute a new tensor.")
        ref = read(value, self)
        new = self._new_value(node, target, ref, args, kwargs)
        if new == ref:
            return value
        try:
            owner = write(value, new, self)
        except NotWritable as error:
            raise refuse(node, str(error), "Use an out-of-place operation: x = x * 2, not x.mul_(2).") from error
        buffer = owner.memory.buffer
        if buffer is not None:
            draft = self.draft("aten.copy_.default", (buffer, owner.ref), {}, (self.spec(buffer),))
            (owner.ref,) = self._emit(f"write_{buffer.node}", draft, (buffer,))
        return value

    def _new_value(self, node: fx.Node, target: str, ref: Ref, args: Any, kwargs: Any) -> Ref:
        """What the written tensor holds afterwards, as a value of its own."""
        spec = self.spec(ref)
        refs_args, refs_kwargs = list(self._as_refs(args)), dict(self._as_refs(kwargs))
        if target in ("aten.copy_.default", "aten.fill_.Tensor"):
            return self._fitted(refs_args[1], spec, isinstance(args[1], Tracked) and args[1].memory.buffer is not None)
        in_place = target.split(".")[1].endswith("_") and not target.startswith("aten.__")
        functional = OUT_OF_PLACE.get(target) or (target.replace("_.", ".", 1) if in_place else target)
        try:
            operator(functional)
        except ValueError:
            raise refuse(
                node, f"{target} has no out-of-place form", "Use an operator that returns its result."
            ) from None
        refs_args += _missing(functional, target, len(refs_args))
        draft = self.draft(functional, refs_args, refs_kwargs, (spec,))
        promoted = _result_dtype(draft) if self._mixes_dtypes(draft) else spec.dtype
        draft.outputs = (replace(spec, dtype=promoted),)
        result = rewrite(draft)
        (new,) = (result,) if isinstance(result, Ref) else self._emit(node.name, result)
        return self._fitted(new, spec, False)

    def _mixes_dtypes(self, draft: Draft) -> bool:
        return len({self.spec(ref).dtype for ref in refs_in((draft.args, draft.kwargs))}) > 1

    def _fitted(self, ref: Ref, spec: TensorSpec, copy: bool) -> Ref:
        """A value broadcast and cast to the shape and dtype of the tensor it is written to."""
        if self.spec(ref).dtype != spec.dtype:
            ref, copy = self.emit("aten.to.dtype", (ref, spec.dtype), shape=self.shape(ref), dtype=spec.dtype), False
        if self.shape(ref) != spec.shape:
            ref = self.emit("aten.expand.default", (ref, list(spec.shape)), shape=spec.shape, dtype=spec.dtype)
        return self.emit("aten.clone.default", (ref,), like=ref) if copy else ref

    def draft(self, target: str, args: Sequence[Any], kwargs: dict[str, Any], outputs: tuple[TensorSpec, ...]) -> Draft:
        return Draft(target, tuple(args), kwargs, outputs, self.spec, self.nodes_by_ref)

    # -- emitting --------------------------------------------------------------------------------------------------

    def spec(self, ref: Ref) -> TensorSpec:
        return self.nodes[ref.node].outputs[ref.index]

    def shape(self, ref: Ref) -> tuple[int, ...]:
        return self.spec(ref).shape

    def nodes_by_ref(self, ref: Ref) -> Node:
        return self.nodes[ref.node]

    def emit(
        self, target: str, args: Sequence[Any], kwargs: dict[str, Any] | None = None, *, like: Ref | None = None,
        shape: Sequence[int] | None = None, dtype: torch.dtype | None = None,
    ) -> Ref:  # fmt: skip
        """A call of our own; its output is like `like`, or has the given shape and dtype."""
        spec = self.spec(like) if like is not None else TensorSpec(tuple(shape or ()), dtype or torch.float32)
        draft = self.draft(target, args, dict(kwargs or {}), (spec,))
        result = rewrite(draft) if target != "aten.clone.default" else draft
        if isinstance(result, Ref):
            return result
        return self._emit(target.split(".")[1], result)[0]

    def emit_view(self, source: Ref, view: View, like: Ref) -> Ref:
        count = len(self.nodes[like.node].outputs)
        outputs = (self.spec(like),) if view.index == 0 and count == 1 else self.nodes[like.node].outputs
        draft = self.draft(view.target, (source, *view.args), dict(view.kwargs), outputs)
        result = rewrite(draft) if view.target != "aten.detach.default" else draft
        return result if isinstance(result, Ref) else self._emit(view.target.split(".")[1], result)[view.index]

    def _emit(self, name: str, draft: Draft, mutates: tuple[Ref, ...] = ()) -> list[Ref]:
        name = self._fresh(name)
        inputs = list(refs_in((draft.args, draft.kwargs)))
        stops = draft.target.split(".")[1] in _STOPS
        needs = not stops and any(self.spec(ref).requires_grad for ref in inputs)
        outputs = tuple(
            replace(spec, requires_grad=needs and (spec.dtype.is_floating_point or spec.dtype.is_complex))
            for spec in draft.outputs
        )
        meta = self.here.meta if self.here is not None else {}
        view = self.strides.note(name, draft, meta.get("val"))
        kind, cost = price(
            draft.target, draft.args, draft.kwargs, [self.spec(ref) for ref in inputs], outputs, view=view, device=self.device,
            scattered=[i for i, ref in enumerate(inputs) if ref in self.strides],
        )  # fmt: skip
        self.nodes[name] = Node(
            name=name, role="call", target=draft.target, args=draft.args, kwargs=draft.kwargs, outputs=outputs,
            module=self.origin.rename(_module_of(meta)), where=frame_at(meta.get("stack_trace") or ""), kind=kind, cost=cost,
            mutates=mutates,
        )  # fmt: skip
        return [Ref(name, i) for i in range(len(outputs))]

    def _fresh(self, name: str) -> str:
        name = "".join(c if c.isalnum() else "_" for c in name)
        unique, number = name, 1
        while unique in self.named:
            unique, number = f"{name}_{number}", number + 1
        self.named.add(unique)
        return unique

    def _as_refs(self, tree: Any) -> Any:
        if isinstance(tree, Tracked):
            return read(tree, self)
        if isinstance(tree, (list, tuple)):
            return type(tree)(self._as_refs(item) for item in tree)
        if isinstance(tree, dict):
            return {key: self._as_refs(item) for key, item in tree.items()}
        if isinstance(tree, torch.SymInt):
            assert self.here is not None
            raise depends_on_data(self.here)
        return tree

    def _alive(self, loss: Ref) -> list[Node]:
        """Nodes in order, without the calls that neither the loss nor a written buffer needs."""
        needed = {loss.node}
        kept = []
        for node in reversed(self.nodes.values()):
            if node.role != "call" or node.mutates or node.name in needed:
                kept.append(node)
                needed.update(ref.node for ref in node.inputs)
        return kept[::-1]


def _thawed(tree: Any) -> Any:
    """fx's immutable containers as plain lists, tuples and dicts."""
    if isinstance(tree, list):
        return [_thawed(item) for item in tree]
    if isinstance(tree, tuple):
        return tuple(_thawed(item) for item in tree)
    if isinstance(tree, dict):
        return {key: _thawed(item) for key, item in tree.items()}
    return tree


def _spec_of(value: Any) -> TensorSpec:
    if not isinstance(value, Tensor):
        return TensorSpec((0,), torch.float32)  # an output that this call does not fill
    return TensorSpec(tuple(value.shape), value.dtype)


def _outputs_of(node: fx.Node) -> tuple[TensorSpec, ...]:
    value = node.meta["val"]
    values = value if isinstance(value, (list, tuple)) else (value,)
    for item in values:
        if isinstance(item, Tensor) and any(type(size) is not int for size in item.shape):
            raise depends_on_data(node)
        if isinstance(item, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise depends_on_data(node)
    return tuple(_spec_of(item) for item in values)


def _storage(value: Any) -> int | None:
    """Identity of a tensor's memory; of the first one's for several."""
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _module_of(meta: Mapping[str, Any]) -> str:
    stack = meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0].split("@")[0] if stack else ""


def _missing(functional: str, target: str, given: int) -> list[Any]:
    """Arguments that an in-place operator may leave to its defaults and its out-of-place form must be told."""
    wanted = operator(functional)._schema.arguments[given:]
    defaults = {argument.name: argument.default_value for argument in operator(target)._schema.arguments}
    return [defaults[a.name] for a in wanted if not a.kwarg_only and not a.has_default_value()]


def _result_dtype(draft: Draft) -> torch.dtype:
    """Dtype of an operator's result, by running it on tensors without data."""
    empty = map_refs(
        (draft.args, draft.kwargs),
        lambda ref: torch.empty(draft.spec(ref).shape, dtype=draft.spec(ref).dtype, device="meta"),
    )
    return operator(draft.target)(*empty[0], **empty[1]).dtype
