"""Write a schedule into the joint graph: what runs again is a second node, what is dropped has no later user.

Problem    a `Schedule` over the operators of a `Joint` (run, again, drop); wanted: a joint graph from which torch's own
           `default_partition`, which cuts where forward ends and saves what crosses, makes a forward and a backward graph that
           do just that.
Method     replay the schedule on names instead of bytes: `where[value]` is the new node that holds a value now.
           run, again   copy the node over the present holders of what it reads                   `_Writer._run`
           drop         forget the holder: later readers find the one that `again` left
           views        are taken from the present holder just before their use                   `_Writer._at`
           random       the first run leaves a copy of the generator's state behind, a repetition runs from that copy and puts the
                        generator back: `keep_state`, `from_state`. One call does both, so that nothing that a compiler may
                        throw away advances the generator.
           batch norm   is repeated without running statistics: they move once                     `joint.stateless`
Guarantee  every operator computes from the same bits as in the original graph, in the same order of first runs; so results are
           bit-equal wherever its kernel is deterministic (tests compare every gradient and buffer).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from weft.memory.compiled.joint import Joint, stateless
from weft.memory.execute.random_state import state_nbytes
from weft.memory.record import Trace
from weft.memory.schedule import Action, Schedule

__all__ = ["from_state", "keep_state", "promptly", "write_joint"]


def keep_state(device: torch.device, target: Callable[..., Any], /, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Run a random operator: (state of the device's generator before, on the host; its results)."""
    module: Any = torch if device.type == "cpu" else torch.get_device_module(device)
    state = module.get_rng_state(*(() if device.type == "cpu" else (device,)))
    made = target(*args, **kwargs)
    return (state, *made) if isinstance(made, (list, tuple)) else (state, made)


def from_state(
    state: torch.Tensor, device: torch.device, target: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """Run a random operator from a saved state of the generator, which is as before afterwards."""
    module: Any = torch if device.type == "cpu" else torch.get_device_module(device)
    where = () if device.type == "cpu" else (device,)
    before = module.get_rng_state(*where)
    module.set_rng_state(state, *where)
    try:
        return target(*args, **kwargs)
    finally:
        module.set_rng_state(before, *where)


def promptly(trace: Trace, schedule: Schedule) -> Schedule:
    """The same schedule as generated code carries it out: no addresses, and each drop right after the value's last reader."""
    after: list[list[Action]] = [[] for _ in schedule.actions]
    touched: dict[int, int] = {}  # value -> position of the last action that read it or made it
    kept: list[Action | None] = list(schedule.actions)
    for position, action in enumerate(schedule.actions):
        if action.kind == "drop":
            after[touched.get(action.index, position)].append(action)
            kept[position] = None
        elif action.kind == "move":
            kept[position] = None
        elif action.kind in ("run", "again"):
            kept[position] = Action(action.kind, action.index)
            op = trace.ops[action.index]
            touched.update(dict.fromkeys((*op.reads, *op.makes), position))
    actions = (x for action, drops in zip(kept, after, strict=True) for x in ((action, *drops) if action else drops))
    return Schedule(tuple(actions))


def write_joint(joint: Joint, schedule: Schedule) -> fx.Graph:
    """The joint graph that carries out `schedule`.

    Raises:
        ValueError: the schedule reads something that is not there, or wants a tier: not this joint graph's schedule.
    """
    return _Writer(joint).write(schedule)


@dataclass
class _Writer:
    joint: Joint
    graph: fx.Graph = field(default_factory=fx.Graph)
    where: dict[int, fx.Node] = field(default_factory=dict)  # value -> node that holds it now
    # view -> (holder it was taken from, new view)
    views: dict[fx.Node, tuple[fx.Node, fx.Node]] = field(default_factory=dict)
    plain: dict[fx.Node, fx.Node] = field(default_factory=dict)  # nodes without tensors: once is enough
    states: dict[int, fx.Node] = field(default_factory=dict)  # random operator -> node of the generator's state
    wanted: set[int] = field(default_factory=set)  # random operators that the schedule repeats
    repeated: dict[fx.Node, None] = field(default_factory=dict)
    backward: bool = False

    def write(self, schedule: Schedule) -> fx.Graph:
        joint = self.joint
        self.wanted = {a.index for a in schedule.actions if a.kind == "again" and a.index in joint.states}
        self._inputs()
        ends: dict[int, list[int]] = {}
        for value, held in enumerate(joint.trace.values):
            ends.setdefault(held.dies, []).append(value)
        results: list[Any] = []
        copies: list[tuple[fx.Node, fx.Node]] = []
        for action in schedule.actions:
            if action.kind == "drop":
                self.where.pop(action.index, None)
            elif action.kind in ("save", "load"):
                raise ValueError("write_joint: a compiled graph has no lower tier; plan without one")
            elif action.kind != "move":
                node = joint.nodes[action.index]
                if action.kind == "run" and action.index == joint.boundary:
                    results += [self._result(x) for x in joint.results[: joint.num_forward]]
                    self.backward = True
                    self.views.clear()  # so that what forward saves is holders, not views of them
                elif node is not None and node in joint.copies:
                    copies.append((node, self._at(node.args[1])))
                elif node is not None:
                    self._run(action.index, node, again=action.kind == "again")
                for value in ends.get(action.index, ()) if action.kind == "run" else ():
                    self.where.pop(value, None)
        for (
            node,
            source,
        ) in copies:  # at the very end, where torch's partitioners look for them; tags say which graph's they are
            self._copy(node, lambda n, node=node, source=source: source if n is node.args[1] else self._at(n))
        results += [self._result(x) for x in joint.results[joint.num_forward :]]
        output = self.graph.output(tuple(results))
        output.meta = dict(next(iter(self._original.find_nodes(op="output"))).meta)
        for new in reversed(self.repeated):  # all that a schedule repeats for nothing
            if not new.users:
                self.graph.erase_node(new)
        self.graph.lint()
        return self.graph

    @property
    def _original(self) -> fx.Graph:
        node = next(node for node in self.joint.home)
        return node.graph

    def _inputs(self) -> None:
        for op in ("placeholder", "get_attr"):
            for node in self._original.find_nodes(op=op):
                new = self.graph.node_copy(node, lambda n: n)
                self.plain[node] = new
                if node in self.joint.home:
                    self.where.setdefault(self.joint.home[node], new)

    # -- one operator -----------------------------------------------------------------------------------------------------

    def _run(self, index: int, node: fx.Node, again: bool) -> None:
        value: Any = node.meta.get("val")
        target, old, first = node.target, node.args, 0
        if again and (substitute := stateless(node)) is not None:
            (target, old), value = substitute, value[:3]  # statistics may have gone: it neither reads nor makes them
        args, kwargs = fx.map_arg((old, node.kwargs), self._at)
        if index in self.wanted and not again:
            new = self._call(
                keep_state, (_device(node), node.target, *args), kwargs, node, (_fake_state(node), *_as_list(value))
            )
            self.states[index], first = self._item(new, 0, node), 1
        elif index in self.wanted:
            new = self._call(
                from_state, (self.states[index], _device(node), node.target, *args), kwargs, node, _fresh(value)
            )
        elif again:
            new = self._call(target, args, kwargs, node, _fresh(value))
        else:
            new = self._copy(node, self._at)
        if again:
            self.repeated[new] = None
        self._hold(node, new, first)

    def _hold(self, node: fx.Node, new: fx.Node, first: int) -> None:
        """Make `new` the holder of the operator's values that are not there; `first` is the position of its first result."""
        if node in self.joint.home:
            value = self.joint.home[node]
            if value not in self.where:
                self.where[value] = self._item(new, 1, node) if first else new
            return
        used = {user.args[1] for user in node.users if user.target is operator.getitem}
        num_results = len(new.meta["val"]) - first  # a batch norm that is repeated gives no new statistics
        for position, value in self.joint.outputs[node].items():
            if position in used and position < num_results and value not in self.where:
                self.where[value] = self._item(new, first + position, node)
        if any(user.target is not operator.getitem for user in node.users):
            self.plain[node] = new

    def _item(self, source: fx.Node, position: int, like: fx.Node) -> fx.Node:
        new = self._call(operator.getitem, (source, position), {}, like, source.meta["val"][position])
        if source in self.repeated:
            self.repeated[new] = None
        return new

    def _at(self, node: fx.Node) -> fx.Node:
        """The new graph's node for an old one: the present holder of its value, or a view taken from it."""
        joint = self.joint
        if node in self.plain and node not in joint.home:
            return self.plain[node]
        if node.op in ("placeholder", "get_attr"):
            return self.plain[node]
        if node in joint.home:
            holder = self.where.get(joint.home[node])
            if holder is None:
                raise ValueError(
                    f"write_joint: the schedule reads {node.name}, which is not there; plan this joint graph anew"
                )
            return holder if self._is_holder(node) else self._view(node, holder)
        if not joint.outputs.get(node):
            return self._copy(node, self._at)
        return self._view(node, self.where.get(next(iter(joint.outputs[node].values()))))  # a list of views (`split`)

    def _view(self, node: fx.Node, holder: fx.Node | None) -> fx.Node:
        """A view taken from the present holder, once for all who look."""
        taken = self.views.get(node)
        if taken is not None and taken[0] is holder:
            return taken[1]
        assert holder is not None
        new = self._copy(node, self._at)
        if holder in self.repeated:  # its fake tensor has a storage of its own: so must this one's
            new.meta["val"] = _looked_at(new)
        self.views[node] = (holder, new)
        return new

    def _is_holder(self, node: fx.Node) -> bool:
        """Whether an old node is itself what made its value, or the `getitem` that took it out of several."""
        made = self.joint.trace.values[self.joint.home[node]].born
        maker = self.joint.nodes[made] if made >= 0 else None
        return maker is not None and (node is maker or (node.target is operator.getitem and node.args[0] is maker))

    # -- nodes ------------------------------------------------------------------------------------------------------------

    def _result(self, node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return node
        return self._at(node.args[0] if node in self.joint.copies else node)

    def _copy(self, node: fx.Node, at: Callable[[fx.Node], fx.Node]) -> fx.Node:
        args, kwargs = fx.map_arg((node.args, node.kwargs), at)  # before the node, which must stand after what it reads
        return self._tag(
            self.graph.create_node(node.op, node.target, args, kwargs, node.name, node.type), node, node.meta
        )

    def _call(
        self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], like: fx.Node, value: Any
    ) -> fx.Node:
        return self._tag(self.graph.call_function(target, args, dict(kwargs)), like, {**like.meta, "val": value})

    def _tag(self, new: fx.Node, old: fx.Node, meta: Mapping[str, Any]) -> fx.Node:
        new.meta = {
            k: v for k, v in meta.items() if k not in ("recompute", "ac_graph_id")
        }  # this plan is the checkpointing
        if new.op == "call_function" and old not in self.joint.copies:
            new.meta["partitioner_tag"] = "is_backward" if self.backward else "is_forward"
        if "tensor_meta" in new.meta and not isinstance(new.meta.get("val"), torch.Tensor):
            del new.meta["tensor_meta"]
        return new


def _looked_at(view: fx.Node) -> Any:
    """The fake value of a view, from those of its arguments."""
    args, kwargs = fx.map_arg((view.args, view.kwargs), lambda n: n.meta.get("val"))
    with _mode_of(args[0]):
        return view.target(*args, **kwargs)


def _mode_of(value: Any) -> Any:
    """The fake mode of a fake tensor, or of the first one of several."""
    first: Any = next(t for t in _as_list(value) if isinstance(t, torch.Tensor))
    return first.fake_mode


def _fake_state(node: fx.Node) -> Any:
    first = next(t for t in _as_list(node.meta["val"]) if isinstance(t, torch.Tensor))
    with _mode_of(first):
        return torch.empty(state_nbytes(first.device), dtype=torch.uint8)


def _device(node: fx.Node) -> torch.device:
    return next(t for t in _as_list(node.meta["val"]) if isinstance(t, torch.Tensor)).device


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _fresh(value: Any) -> Any:
    """Fake tensors like these in storages of their own: passes tell by them who shares bytes with whom."""
    if isinstance(value, (list, tuple)):
        return type(value)(_fresh(item) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    mode = getattr(value, "fake_mode", None)
    if mode is None:
        return value
    with mode:
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
