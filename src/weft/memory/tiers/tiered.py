"""Train a model whose parameters, gradients, optimizer state or activations live on the host or on disk.

    tiers = Tiers(parameters="disk", gradients="host", optimizer="disk")
    with Tiered(model, partial(torch.optim.AdamW, lr=3e-4), tiers, folder="/fast/disk/run7") as tiered:
        for batch in loader:
            loss = model(*batch)
            loss.backward()
            tiered.step()

Problem    use a parameter whole, on the device, only while something computes with it, whatever the model does with it.
Method     before a module runs, its own parameters are fetched and put under the `nn.Parameter`s (`p.data`); after it has run
           they are taken away again, unless the recorded order says that they are used again at once   `passes`, `presence`
           what autograd saves of a parameter is replaced by a note of which one; a finished gradient leaves `p.grad` at once,
           summed to its owners, kept on its tier                                                       `backward`
           a step is complete on all processes, or undone on all                                        `stepping`
Guarantee  N processes or one, any tiers: the bits of training in memory (sums over processes in rank order).
Traps      a released parameter is one NaN, expanded; whoever kept one and uses it in a pass has it brought, between steps gets
           an error (`standins`). What looks at memory by itself (a pointer, a view made before) sees the NaN.
           A gradient that left `p.grad` has a stand-in there, which gives its elements to whoever asks (`moved`): in one process
           all loops work. With several, `torch.nn.utils.clip_grad_norm_` and `GradScaler` get an error: clip with
           `Tiered.clip_grad_norm_`, which reads and writes less, too.

Every process calls the model, backward and step equally often; what happens inside may differ between processes.
Source: Rajbhandari et al., ZeRO-Infinity, arXiv:2104.07857, sections 5 to 7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.cluster.units import nbytes_of
from weft.memory import private
from weft.memory.tiers.activations import Activations
from weft.memory.tiers.backward import Backward
from weft.memory.tiers.fetch import Fetcher, Slot
from weft.memory.tiers.files import Disk
from weft.memory.tiers.generators import restore_random
from weft.memory.tiers.gradients import Gradients
from weft.memory.tiers.moved import Moved
from weft.memory.tiers.passes import Passes
from weft.memory.tiers.peers import Peers, control_group
from weft.memory.tiers.presence import Presence
from weft.memory.tiers.resume import check_resume
from weft.memory.tiers.stepping import Steps
from weft.memory.tiers.store import Store, Tiers
from weft.memory.tiers.updates import Updates
from weft.memory.tiers.whole import assign
from weft.memory.tiers.workplace import Workplace

__all__ = ["Tiered", "Tiers"]


class Tiered:
    """See the file's header.

    Args:
        model: any module. Its parameters may be on the meta device, with their values in `values`.
        optimizer: a function of parameters (or groups) that makes an elementwise torch optimizer: a class, or
            `functools.partial` of one.
        tiers: where things live.
        folder: for what is on disk; of all processes. One job at a time.
        groups: parameter groups: dicts of options with "params" (parameters, or their names); default all in one.
        group: process group over which the data is parallel, gloo or NCCL; None is one process.
        device: where the model computes; default where its parameters are (the CPU for meta).
        values: (name, tensor) of every parameter and buffer, in any order, or a dict, for a model that was never in memory
            whole (`weft.placement.materialise(model)` of a `weft.deferred` one). Not looked at when a run is resumed.
        resume: go on from the state in the folder (optimizer="disk" only).
        update: "step" updates in `step`; "backward" updates a parameter as soon as its gradient is there, so that the disk works
            while the device computes. Then gradients cannot be clipped, a step is one backward, and the model is called again
            after `step` (or `zero_grad`), not before.
        keep_below: bytes; smaller parameters stay whole on the device.
        floor: bytes; smaller saved tensors stay on the device.
        ahead: bytes fetched before they are asked for.
        chunk, buffers, threads: see `DiskOptimizer`.

    Attributes:
        optimizer: for schedulers: `param_groups` as usual; its `step` is this one's.
    Raises:
        ValueError, DiskFull, FolderInUse, CheckpointDamaged: as `DiskOptimizer`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        tiers: Tiers,
        folder: Path | str | None = None,
        *,
        groups: Sequence[Mapping[str, Any]] | None = None,
        group: Any = None,
        device: torch.device | str | None = None,
        values: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor] | None = None,
        resume: bool = False,
        update: str = "step",
        keep_below: int | str = "400 kB",
        floor: int | str = "1 MiB",
        ahead: int | str = "64 MiB",
        chunk: int | str = "16 MiB",
        buffers: int = 3,
        threads: int = 4,
    ):
        _check(model, optimizer, tiers, folder, resume, update)
        sizes = {"keep_below": keep_below, "floor": floor, "ahead": ahead, "chunk": chunk}
        nbytes = {name: nbytes_of(size, name) for name, size in sizes.items()}
        self.model, self.tiers, self.device = model, tiers, _device(model, device)
        control = control_group(group)
        self.peers = Peers(control)
        self._place: Workplace | None = None
        with ExitStack() as opened:
            if tiers.uses_disk and folder is not None:
                self._place = self.peers.agree(lambda: Workplace(folder, self.peers.rank, threads=threads))
                opened.callback(self._place.close)
            self.store = self.peers.agree(
                lambda: Store(
                    model, optimizer, tiers, groups, self.peers, self.device, self._place,
                    chunk=nbytes["chunk"], buffers=buffers, keep_below=nbytes["keep_below"],
                )
            )  # fmt: skip
            opened.callback(self.store.close)
            opened.callback(self.store.give_back)
            self.gradients = self.peers.agree(self._make_gradients)
            opened.callback(self.gradients.close)
            self._extra = self.store.open(values, resume=resume)
            self.slots, self.states, self.optimizer = self.store.slots, self.store.states, self.store.front
            self._connect(opened, update, group, control, nbytes["ahead"], nbytes["floor"])
            if resume:
                self._steps.share_whole()
            self.store.keep()
            self._opened, self._closed = opened.pop_all(), False

    def _make_gradients(self) -> Gradients:
        tier, place = self.tiers.gradients, self._place
        disk, folder = (place.disk, place.scratch) if place is not None and tier == "disk" else (None, None)
        host = torch.device("cpu") if tier == "host" else None
        return Gradients(self.store.states.shards, device=host, disk=disk, folder=folder)

    def _make_activations(self, floor: int) -> Activations | None:
        if self.tiers.activations == "device":
            return None
        disk, folder = (self._place.disk, self._place.scratch) if self._place is not None else (None, None)
        return Activations(self.tiers.activations, self.device, floor=floor, disk=disk, folder=folder)

    def _connect(self, opened: ExitStack, update: str, group: Any, control: Any, ahead: int, floor: int) -> None:
        """Make what moves things while the model runs, each part from those before it, and put it on the model; `opened` learns
        how to take it off."""
        self.fetcher = Fetcher(self.slots, self.states.read, self._reduced, self.device, group, control, ahead)
        self.presence = Presence(self.slots, self.fetcher, self.store.placeholder)
        self.activations = self._make_activations(floor)
        if self.activations is not None:
            opened.callback(self.activations.close)
        opened.callback(self.fetcher.finish)
        updates = Updates(self.states, self.gradients) if update == "backward" else None
        alone = self.peers.world == 1
        moving = not alone or self.tiers.gradients != "device" or updates is not None
        moved = Moved(self.gradients, alone=alone, used=updates is not None) if moving else None
        self._backward = Backward(
            self.slots, self.presence, self.fetcher, self.gradients, self.activations, updates, moved
        )
        opened.callback(self._backward.close)
        self._backward.hook_gradients()
        if updates is not None:
            self.states.present = self._backward.present
        self._steps = Steps(self.store, self.gradients, self.fetcher, updates, moved, self._end_of_step)
        self.optimizer.run = self._steps
        self._updates = updates
        self._passes = Passes(self.model, self.presence, self._begin, self._end, self._backward.foreign)
        opened.callback(self._passes.close)
        self._passes.watch()
        self._saving_all = False
        for module in self.model.modules():
            opened.callback(module.register_state_dict_pre_hook(lambda *begun: self._begin_saving()).remove)
            opened.callback(module.register_state_dict_post_hook(lambda *saved: self._put_whole(*saved)).remove)
        opened.callback(self.model.__dict__.pop, "zero_grad", None)
        self.model.__dict__["zero_grad"] = self._zero_grad_of_model

    def _zero_grad_of_model(self, set_to_none: bool = True) -> None:
        """In place of the model's own, which knows only of gradients under `p.grad`."""
        self.zero_grad()

    def _reduced(self, index: int, part: Tensor) -> None:
        self._backward.reduced(index, part)

    # ---- passes and steps

    def _begin(self, again: bool) -> None:
        """A pass begins, or in backward a part of one is computed `again`."""
        if again:
            # A checkpoint without hooks of its own would save parameters themselves, to read them when they are released.
            if torch.is_grad_enabled() and private.hooks_on_saving() is None:
                self._backward.save()
            return
        self._backward.unsave()
        if self._updates is not None:
            self._updates.check_unmixed()
        self._backward.drop_updated(everything=True)
        training = torch.is_grad_enabled()
        self._passes.in_step |= training
        self.fetcher.order = self.fetcher.training if training else self.fetcher.inference
        if training:
            self._backward.begin()
            if self._updates is not None:
                self._updates.read_ahead()

    def _end(self, again: bool) -> None:
        """That is over, well or not."""
        training = self._backward.unsave()
        if again:
            return
        self.fetcher.settle()
        if not training:
            self.fetcher.finish()
            self.presence.trim()
            self.fetcher.order = self.fetcher.training

    def _end_of_step(self) -> None:
        """A step is complete."""
        self._backward.drop_updated(everything=True)
        self._passes.end_step()
        self.fetcher.finish()
        self.presence.release_idle()  # what is there is of the step before
        if self.activations is not None:
            self.activations.clear()
        self.fetcher.look_ahead()  # what the next step begins with

    def step(self) -> None:
        """Update the parameters with the gradients there are, and end the step; a collective.

        With optimizer="disk" it is complete on disk when this returns.

        Raises:
            DiskFull: on some process; on all of them parameters and states are as before the step, and unless they were used up
                (update="backward"), so are the gradients: call it again when there is room. Changes made in place since the
                last step to parameters on the device are kept where torch counts them (`p.mul_()`, not `p.data.mul_()`), but not
                with update="backward".
            ValueError: a gradient is not one that can be used: sparse, or of a parameter that no group has.
        """
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients, wherever they are."""
        self._steps.zero_grad()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients of this step so that their 2-norm is at most `max_norm`; returns the norm before; a collective.

        As `torch.nn.utils.clip_grad_norm_`: the norm of the norms of the parameters' gradients. With several processes, of
        their parts. It is done when the step updates parameters: clip when all gradients of the step are there, since those of a
        backward pass after it are scaled with the others; `p.grad` shows them unclipped.

        Raises:
            ValueError: update="backward", where parameters are updated before all gradients are known.
        """
        return self._steps.clip(max_norm)

    @property
    def steps(self) -> int:
        """Complete ones."""
        return self.states.step

    @property
    def disk(self) -> Disk | None:
        """The threads that read and write, with counts of bytes; None if nothing is on disk."""
        return self._place.disk if self._place is not None else None

    @property
    def notes(self) -> dict[str, Any]:
        """A JSON-able dict that is written with each step and comes back on resuming (epoch, position in the data)."""
        return self.store.notes

    # ---- reading and writing whole values

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        """A parameter's whole value, on the CPU; a collective."""
        self._check_open()
        slot = self._slot(name)
        if slot.tier == "device":
            return slot.parameter.detach().cpu().clone()
        self.fetcher.settle()
        return slot.shaped(self.fetcher.fetch(slot.index, ordered=False)).cpu().clone()

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Give a parameter another value, on its tier, between steps; a collective."""
        slot = self._slot(name)
        if tuple(value.shape) != slot.shape:
            raise ValueError(f"{name} has shape {slot.shape}, got {tuple(value.shape)}")
        self.fetcher.finish()
        value = value.to(slot.dtype)
        if slot.tier == "device":
            slot.parameter.copy_(value)
        elif slot.home is not None:
            slot.home[: slot.stop - slot.start].copy_(self.store.part(slot, value))
        if slot.whole is not None:  # still there, since a pass got no step
            slot.whole[: slot.numel].copy_(slot.flat(value))
        assign(self.states, slot.index, self.store.part(slot, value))
        self.states.commit(lambda: self.store.about(self.states.step), self.store.extra(), step=False)

    def state_dict(self) -> dict[str, Tensor]:
        """The model's state dict with whole values on the CPU; a collective. It must fit in memory."""
        self._check_open()
        self._saving_all = True
        try:
            found = self.model.state_dict()
        finally:
            self._saving_all = False
        return {name: value.detach().cpu().clone() for name, value in found.items()}

    def _begin_saving(self) -> None:
        """A state dict of the model or a part of it is begun."""
        self._passes.saving += 1

    def _put_whole(self, module: nn.Module, found: dict[str, Any], prefix: str, metadata: Any) -> None:
        """Of a state dict of the model or a part of it, what is released."""
        self._passes.saving = max(0, self._passes.saving - 1)
        for name, parameter in module._parameters.items():
            slot = self.presence.of(parameter)
            if slot is None or prefix + name not in found:
                continue
            if self.peers.world > 1 and not self._saving_all:
                raise ValueError(
                    "a state dict takes all processes, each of which holds a part: call Tiered.state_dict() on every one"
                )
            found[prefix + name] = self.read(slot.name)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(
                "the tiers are closed, and their files with them; make new ones with resume=True to go on"
            )

    def _slot(self, name: str) -> Slot:
        found = next((slot for slot in self.slots if slot.name == name), None)
        if found is None:
            raise ValueError(f"the model has no parameter {name!r}")
        return found

    def restore_random(self) -> None:
        """Set torch's random generators to where they were after the step that was resumed."""
        restore_random(self._extra)

    # ---- the end

    def close(self) -> None:
        """Take the hooks off and close the files. Parameters that are not on the device stay released."""
        self._closed = True
        self._opened.close()  # all of it, also if some fails to close: the folder would stay locked

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Of a copy of the model, or of a part of it, whose hooks lead here.

        Raises:
            TypeError: there are files, which one job works on.
        """
        if self._place is not None and not self._closed:
            raise TypeError(
                "a model that is on tiers with files cannot be copied or pickled, nor can a part of it: make another one and "
                "give it Tiered.state_dict(), or save that"
            )
        return super().__reduce_ex__(protocol)

    def __enter__(self) -> Tiered:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _check(
    model: nn.Module, optimizer: object, tiers: Tiers, folder: Path | str | None, resume: bool, update: str
) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"Tiered: model must be a torch.nn.Module, got {_kind(model)}")
    if not callable(optimizer):
        raise ValueError(
            "Tiered: optimizer must be what makes one, as torch.optim.AdamW or functools.partial(torch.optim.AdamW, lr=3e-4), "
            f"got {_kind(optimizer)}"
        )
    if not isinstance(tiers, Tiers):
        raise ValueError(
            f"Tiered: tiers must be Tiers, as Tiers(parameters='disk', optimizer='disk'), got {_kind(tiers)}"
        )
    check_resume(resume)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"Tiered: {name or 'the model'} was made by torch.jit, whose code reads parameters without asking their module, "
                "when they are elsewhere; give the nn.Module it was made from (torch.compile works)"
            )
        if isinstance(module, nn.RReLU) and tiers.activations != "device":
            raise ValueError(
                f"Tiered: {name or 'the model'} is an RReLU, whose noise torch saves for backward before it draws it, so that "
                "what moves saved tensors moves garbage; use activations='device' or another activation function"
            )
    if update not in ("step", "backward"):
        raise ValueError(f"Tiered: update must be 'step' or 'backward', got {update!r}")
    if tiers.uses_disk and folder is None:
        raise ValueError(f"Tiered: {tiers} needs a folder for what is on disk")
    if resume and tiers.optimizer != "disk":
        raise ValueError("Tiered: only runs with optimizer='disk' keep what resuming needs; use checkpoints for others")


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"


def _device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is None:
        first = next(model.parameters(), None)
        return torch.device("cpu") if first is None or first.device.type == "meta" else first.device
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"Tiered: device must be one of torch's, as 'cpu' or 'cuda:0', got {device!r}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"Tiered: device {device!r} cannot be used: torch finds no CUDA device here; use 'cpu'")
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found
