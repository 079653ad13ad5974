"""A model's parameters and optimizer states on their tiers: how they get there, and what a folder says of them.

`Store` knows what lives where; it knows nothing of hooks, order or training steps (that is `tiered`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.memory.tiers.dense import flat
from weft.memory.tiers.elementwise import Elementwise
from weft.memory.tiers.fetch import Slot
from weft.memory.tiers.generators import random_state
from weft.memory.tiers.groups import Front, described, grouped, plain_options, restore
from weft.memory.tiers.layout import Segment, Shard, shard_length, share
from weft.memory.tiers.manifest import Manifest
from weft.memory.tiers.peers import Peers
from weft.memory.tiers.pinned import host_memory
from weft.memory.tiers.resume import open_states
from weft.memory.tiers.standins import present
from weft.memory.tiers.states import States
from weft.memory.tiers.workplace import Workplace

__all__ = ["TIERS", "Store", "Tiers"]

TIERS = ("device", "host", "disk")
BUFFER = "buffer."  # prefix of module buffers among the extra tensors of a step


@dataclass(frozen=True)
class Tiers:
    """Where each class of a training run's bytes lives: "device", "host" or "disk".

    Attributes:
        parameters: "device" keeps them whole on every process; otherwise each process keeps 1/N.
        gradients: between backward and update; each process keeps its 1/N.
        optimizer: its state, 1/N on each process. On "disk", parameters are written along with it at every step, and the folder
            is enough to resume after a crash.
        activations: what autograd saves for backward.
    """

    parameters: str = "device"
    gradients: str = "device"
    optimizer: str = "device"
    activations: str = "device"

    def __post_init__(self) -> None:
        for name in ("parameters", "gradients", "optimizer", "activations"):
            if getattr(self, name) not in TIERS:
                raise ValueError(f"Tiers: {name} must be one of {', '.join(TIERS)}, got {getattr(self, name)!r}")

    @property
    def uses_disk(self) -> bool:
        return "disk" in (self.parameters, self.gradients, self.optimizer, self.activations)


class Store:
    """See the file's header.

    Args:
        model, optimizer, tiers, groups: as `Tiered` takes them.
        peers: the other processes.
        device: where parameters are used.
        place: the folder to work in, if there is one.
        chunk, buffers, keep_below: in bytes, buffers, bytes.

    Attributes:
        slots: one per parameter, in the model's order.
        states: their optimizer states.
        front: the optimizer for users; whoever makes the store says what its `run` is.
        notes: goes with every step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        tiers: Tiers,
        groups: Sequence[Mapping[str, Any]] | None,
        peers: Peers,
        device: torch.device,
        place: Workplace | None,
        *,
        chunk: int,
        buffers: int,
        keep_below: int,
    ):
        self.model, self.tiers, self.peers, self.device, self.place = model, tiers, peers, device, place
        self.notes: dict[str, Any] = {}
        trained = grouped(model, groups)
        made = _made(optimizer, trained)
        self.kind = type(made)
        strides = {name: torch.empty_like(p, device="meta").stride() for name, p in model.named_parameters()}
        # What parameters had, and modules in place of parameters and buffers without values, until all are on their tiers.
        self._before: list[tuple[nn.Parameter, Tensor]] = []
        self._on_meta: list[tuple[nn.Module, str, Any]] = []
        swapped = self._leave_meta()
        self._hollow = set(swapped)  # parameters that have no values yet
        try:
            self._lay_out(made, trained, swapped, strides, chunk, buffers, keep_below)
        except BaseException:
            self.give_back()
            raise

    def _lay_out(
        self,
        made: torch.optim.Optimizer,
        trained: Sequence[tuple[dict[str, nn.Parameter], dict[str, Any]]],
        swapped: Mapping[str, nn.Parameter],
        strides: Mapping[str, tuple[int, ...]],
        chunk: int,
        buffers: int,
        keep_below: int,
    ) -> None:
        """Say where everything will be."""
        self.front = Front(
            [
                {**plain_options(g), "params": [swapped.get(n, p) for n, p in parameters.items()]}
                for g, (parameters, _) in zip(made.param_groups, trained, strict=True)
            ],
            made.defaults,
        )
        self.slots = [
            self._slot(index, name, parameter, strides[name], keep_below)
            for index, (name, parameter) in enumerate(self.model.named_parameters())
        ]
        group_of = {name: g for g, (parameters, _) in enumerate(trained) for name in parameters}
        self.states = States(
            [
                Shard(s.name, s.shape, s.dtype, s.start, s.stop, group_of.get(s.name, -1), s.tier == "disk")
                for s in self.slots
            ],
            [Elementwise(self.kind, made.defaults) for _ in trained],
            lambda g: plain_options(self.front.param_groups[g]),
            self.value,
            streamed=self.tiers.optimizer == "disk",
            device=self.device if self.tiers.optimizer == "device" else torch.device("cpu"),
            peers=self.peers,
            disk=self.place.disk if self.place is not None else None,
            chunk=chunk,
            buffers=buffers,
        )

    def _slot(self, index: int, name: str, parameter: nn.Parameter, stride: tuple[int, ...], keep_below: int) -> Slot:
        numel, world = parameter.numel(), self.peers.world
        start, stop = share(numel, self.peers.rank, world)
        tier = "device" if numel * parameter.dtype.itemsize < keep_below else self.tiers.parameters
        shape, each = tuple(parameter.shape), shard_length(numel, world)
        return Slot(index, name, parameter, shape, stride, parameter.dtype, start, stop, each, tier)

    # ---- opening

    def open(
        self, values: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor] | None, *, resume: bool
    ) -> dict[str, Tensor]:
        """Bring every parameter to its tier, from the folder or from its values; a collective. `keep` or `give_back` comes next.

        Returns:
            Random states of the step that was resumed, if one was.
        """
        for slot in self.slots:
            if slot.tier == "host":
                slot.home = host_memory((slot.each,), slot.dtype, pin=self.device.type == "cuda").zero_()
            if slot.tier == "device" and resume:
                self._make_whole(slot)
        found = None
        if self.tiers.optimizer == "disk":
            assert self.place is not None
            found = open_states(self.states, self.place.folder, self.about, self.extra, resume=resume)
        else:
            self.peers.agree(self._open_scratch)
        if found is None:
            self.peers.agree(lambda: self._take(values))
            if self.tiers.optimizer == "disk":
                self.states.commit(lambda: self.about(0), self.extra())
            return {}
        self.notes.update(found.notes)
        restore(self.front.param_groups, found.groups)
        buffers = {
            name: found.extra[BUFFER + name] for name, _ in self.model.named_buffers() if BUFFER + name in found.extra
        }
        self.peers.agree(lambda: self._check_buffers(buffers))
        self.peers.agree(lambda: self.states.load_values(self.states.in_memory()))
        for name, buffer in list(self.model.named_buffers()):
            if name in buffers:
                self._set_buffer(buffer, buffers[name].to(self.device))
        for slot in self.slots:
            if slot.tier != "device":
                self._release(slot, slot.parameter.data)
        return {name: tensor for name, tensor in found.extra.items() if not name.startswith(BUFFER)}

    def _check_buffers(self, found: Mapping[str, Tensor]) -> None:
        for name, buffer in self.model.named_buffers():
            if name in found and found[name].shape != buffer.shape:
                raise ValueError(
                    f"the folder holds the state of another model: its buffer {name} has shape {tuple(found[name].shape)}, this "
                    f"model's {tuple(buffer.shape)}; name another folder, or make the model as it was"
                )

    def keep(self) -> None:
        """The model is on its tiers."""
        self._before.clear()
        self._on_meta.clear()

    def give_back(self) -> None:
        """It cannot be, and gets back what it had; only what stays on the device, where it was, has the values it was given."""
        for parameter, data in reversed(self._before):
            present(parameter, data)
        for module, name, held in self._on_meta:
            (module._parameters if isinstance(held, nn.Parameter) else module._buffers)[name] = held
        self.keep()

    def _open_scratch(self) -> None:
        """Room for this process's parts of parameters on disk, whose states are not; it may own none."""
        if self.states.nbytes:
            assert self.place is not None
            self.states.folder = self.place.scratch
            self.states.open(fresh=True)

    def _take(self, values: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor] | None) -> None:
        """Give parameters and buffers their first values, one at a time."""
        slots = {slot.name: slot for slot in self.slots}
        buffers = dict(self.model.named_buffers())
        missing = set(slots) | {name for name, buffer in buffers.items() if buffer.device.type == "meta"}
        if values is None:
            values = [(name, slot.parameter.detach()) for name, slot in slots.items() if name not in self._hollow]
            values += [(name, buffer) for name, buffer in buffers.items() if buffer.device.type != "meta"]
        for given in values.items() if isinstance(values, Mapping) else values:
            if not (isinstance(given, (tuple, list)) and len(given) == 2 and isinstance(given[1], Tensor)):
                raise ValueError(
                    f"Tiered: values must be (name, tensor) pairs or a dict of them, got an item of type {type(given).__name__}"
                )
            name, tensor = given
            if name not in slots and name not in buffers:
                continue  # a further name of a tied parameter
            missing.discard(name)
            if name in buffers:
                self._set_buffer(buffers[name], tensor.detach().to(self.device))
                continue
            slot = slots[name]
            if tuple(tensor.shape) != slot.shape or tensor.dtype != slot.dtype:
                raise ValueError(
                    f"the value of {name} is {tensor.dtype} {tuple(tensor.shape)}, the parameter {slot.dtype} {slot.shape}"
                )
            self.put(slot, tensor)
            if slot.stop > slot.start:
                self.states.seed(slot.index, self.part(slot, tensor))
            del tensor
        if missing:
            raise ValueError(
                f"{len(missing)} tensors have no value, for example {min(missing)}: they are on the meta device; pass values=..."
            )

    def _make_whole(self, slot: Slot) -> None:
        """Memory for a parameter that lives whole on the device."""
        data = slot.parameter.data
        if data.stride() != slot.stride or data.device != self.device:
            if slot.name not in self._hollow:
                self._before.append((slot.parameter, data))
            slot.parameter.data = torch.empty_strided(slot.shape, slot.stride, dtype=slot.dtype, device=self.device)

    def put(self, slot: Slot, tensor: Tensor) -> None:
        """Bring a whole value to a parameter's home, as far as that is memory; release the parameter if it is not the device."""
        if slot.tier == "device":
            self._make_whole(slot)
            if slot.parameter.data_ptr() != tensor.data_ptr():
                slot.parameter.data.copy_(tensor)
            return
        if slot.home is not None:
            slot.home[: slot.stop - slot.start].copy_(self.part(slot, tensor))
        self._release(slot, self._again(slot, tensor))

    def _release(self, slot: Slot, again: Tensor) -> None:
        """Take a parameter's elements away; `again` would be their place."""
        if slot.name not in self._hollow:
            self._before.append((slot.parameter, again))
        slot.parameter.data = self.placeholder(slot)

    def _again(self, slot: Slot, tensor: Tensor) -> Tensor:
        """What gives a parameter its data back; its home, where that has all of it, so that it is not in memory twice."""
        data = slot.parameter.data
        own = data.data_ptr() == tensor.data_ptr() and data.device.type == "cpu"
        return slot.shaped(slot.home) if slot.home is not None and own and self.peers.world == 1 else data

    def part(self, slot: Slot, tensor: Tensor) -> Tensor:
        """This process's elements of a whole value, in memory order."""
        return slot.flat(tensor)[slot.start : slot.stop]

    def placeholder(self, slot: Slot) -> Tensor:
        """What a released parameter holds: its shape, one NaN."""
        nothing = float("nan") if slot.dtype.is_floating_point or slot.dtype.is_complex else 0
        return torch.full((), nothing, dtype=slot.dtype, device=self.device).expand(slot.shape)

    def _leave_meta(self) -> dict[str, nn.Parameter]:
        """Put parameters without data on the device in place of those on meta, one for each, so that ties stay ties."""
        twins: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for key, held in module._parameters.items():
                if held is not None and held.device.type == "meta":
                    self._on_meta.append((module, key, held))  # which also keeps its id from being given again
                    if id(held) not in twins:
                        data = torch.zeros((), dtype=held.dtype, device=self.device).expand(held.shape)
                        twins[id(held)] = nn.Parameter(data, requires_grad=held.requires_grad)
                    module._parameters[key] = twins[id(held)]
        made = {id(twin) for twin in twins.values()}
        return {name: p for name, p in self.model.named_parameters() if id(p) in made}

    def _set_buffer(self, old: Tensor, new: Tensor) -> None:
        """Give a buffer its values, in place if it has memory, under all its names if not."""
        if old.device == new.device:
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)
            return
        for module in self.model.modules():
            for key, held in module._buffers.items():
                if held is old:
                    self._on_meta.append((module, key, held))
                    module._buffers[key] = new

    # ---- what the states ask for

    def value(self, segment: Segment) -> Tensor:
        """The elements of a segment whose home is memory."""
        slot = self.slots[segment.shard]
        if slot.home is not None:
            return slot.home[segment.start - slot.start : segment.stop - slot.start]
        return flat(slot.parameter)[segment.start : segment.stop]

    def about(self, step: int) -> Manifest:
        shapes = {slot.name: (list(slot.shape), str(slot.dtype).removeprefix("torch.")) for slot in self.slots}
        groups = [described(group) for group in self.front.param_groups]
        return Manifest(
            step, self.peers.rank, self.peers.world, self.kind.__name__, shapes, [], groups, dict(self.notes)
        )

    def extra(self) -> dict[str, Tensor]:
        """What goes with a step besides parameters and states: buffers, random states."""
        return {**{BUFFER + name: buffer for name, buffer in self.model.named_buffers()}, **random_state()}

    def close(self) -> None:
        self.states.close()


def _made(
    optimizer: Callable[[Any], torch.optim.Optimizer], trained: Sequence[tuple[dict[str, nn.Parameter], dict[str, Any]]]
) -> torch.optim.Optimizer:
    """The user's optimizer, on stand-ins for the parameters: for its class and its options."""
    made = optimizer([
        {**options, "params": [nn.Parameter(torch.zeros(2, dtype=parameter.dtype)) for parameter in parameters.values()]}
        for parameters, options in trained
    ])  # fmt: skip
    if not isinstance(made, torch.optim.Optimizer):
        raise ValueError(
            "Tiered: optimizer must make a torch optimizer of the parameters it is given, but returned an object of type "
            f"{type(made).__name__}"
        )
    return made
