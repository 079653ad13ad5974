"""Train a model whose parameters, gradients, optimizer state or activations live on the host or on disk.

    tiers = Tiers(parameters="disk", gradients="host", optimizer="disk")
    with Tiered(model, partial(torch.optim.AdamW, lr=3e-4), tiers, folder="/fast/disk/run7") as tiered:
        for batch in loader:
            loss = model(*batch)
            loss.backward()
            tiered.step()

Problem    use a parameter whole, on the device, only while something computes with it, whatever the model does with it.
Method     before a module runs, its own parameters are fetched and put under the `nn.Parameter`s (`p.data`); after it has run
           they are taken away again, unless the recorded order says that they are used again at once.   `_enter`, `_leave`
           what autograd saves of a parameter is replaced by a note of which one and how it was looked at; when the node runs,
           the note fetches it, and it dies with the node                                          `_pack`, `_unpack`
           a parameter that another module reaches for (tied weights, `self.other.weight`) is fetched by the access itself
           and stays while the module that reached for it runs; reached for outside the model, until the step ends   `_seen`
           a finished gradient leaves `p.grad` at once: summed to its owners, kept on its tier      `_gradient`
Guarantee  N processes or one, any tiers: the bits of training in memory (sums over processes in rank order).
Traps      a released parameter reads as NaN and cannot be written (it is one NaN, expanded): a use that nobody saw is loud.

Every process calls forward, backward and step equally often; what happens inside may differ between processes.
Source: Rajbhandari et al., ZeRO-Infinity, arXiv:2104.07857, sections 5 to 7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import ParameterChanged
from weft.memory import private
from weft.memory.tiers.activations import Activations, Saved
from weft.memory.tiers.disk_optimizer import nbytes_of, restore_random
from weft.memory.tiers.fetch import Fetcher, Slot
from weft.memory.tiers.files import Disk
from weft.memory.tiers.gradients import Gradients
from weft.memory.tiers.layout import Segment
from weft.memory.tiers.peers import Peers, control_group, together
from weft.memory.tiers.standins import View, Watched
from weft.memory.tiers.store import Store, Tiers, flat_in
from weft.memory.tiers.updates import Updates
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
        values: (name, tensor) of every parameter and buffer, in any order, for a model that was never in memory whole
            (`weft.placement.materialise(model)` of a `weft.deferred` one). Not looked at when a run is resumed.
        resume: go on from the state in the folder (optimizer="disk" only).
        update: "step" updates in `step`; "backward" updates a parameter as soon as its gradient is there, so that the disk works
            while the device computes. Then gradients cannot be clipped, and a step is one backward.
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
        values: Iterable[tuple[str, Tensor]] | None = None,
        resume: bool = False,
        update: str = "step",
        keep_below: int | str = "400 kB",
        floor: int | str = "1 MiB",
        ahead: int | str = "64 MiB",
        chunk: int | str = "16 MiB",
        buffers: int = 3,
        threads: int = 4,
    ):
        if update not in ("step", "backward"):
            raise ValueError(f"Tiered: update must be 'step' or 'backward', got {update!r}")
        if tiers.uses_disk and folder is None:
            raise ValueError(f"Tiered: {tiers} needs a folder for what is on disk")
        if resume and tiers.optimizer != "disk":
            raise ValueError(
                "Tiered: only runs with optimizer='disk' keep what resuming needs; use checkpoints for others"
            )
        self.model, self.tiers, self.update = model, tiers, update
        self.device = _device(model, device)
        control = control_group(group)
        self.peers = Peers(control)
        self._place: Workplace | None = None
        if tiers.uses_disk:
            self._place = self.peers.agree(lambda: Workplace(folder, self.peers.rank, threads=threads))
        disk, scratch = (self._place.disk, self._place.scratch) if self._place else (None, None)
        try:
            self.store = self.peers.agree(
                lambda: Store(
                    model, optimizer, tiers, groups, self.peers, self.device, self._place, chunk=nbytes_of(chunk, "chunk"),
                    buffers=buffers, keep_below=nbytes_of(keep_below, "keep_below"), advance=self._step,
                )
            )  # fmt: skip
            stored = tiers.gradients == "disk"
            self.gradients = self.peers.agree(
                lambda: Gradients(
                    self.store.states.shards, device=torch.device("cpu") if tiers.gradients == "host" else None,
                    disk=disk if stored else None, folder=scratch if stored else None,
                )
            )  # fmt: skip
            self._extra = self.store.open(values, resume=resume)
        except BaseException:
            if self._place is not None:
                self._place.close()
            raise
        self.slots, self.states, self.optimizer = self.store.slots, self.store.states, self.store.front
        self.fetcher = Fetcher(
            self.slots, self.states.read, self._reduced, self.device, group, control, nbytes_of(ahead, "ahead")
        )
        self.activations: Activations | None = None
        if tiers.activations != "device":
            self.activations = Activations(
                tiers.activations, self.device, floor=nbytes_of(floor, "floor"), disk=disk, folder=scratch
            )
        self._updates = Updates(self.states, self.gradients) if update == "backward" else None
        self._for_update: list[Slot] = []  # fetched by backward, and kept until their update needs them
        if self._updates is not None:
            self.states.present = self._present
        self._clip: Tensor | None = None
        self._of_parameter = {id(slot.parameter): slot for slot in self.slots if slot.tier != "device"}
        self._of_storage: dict[int, int] = {}  # id of a whole parameter's storage -> slot
        self._frames: list[list[Slot]] = []  # what each running module holds
        self._outside: list[Slot] = []
        self._held: set[int] = set()  # slots whose elements are on the device
        self._hooks: Any = None
        self._in_step = self._told_engine = False
        self._handles: list[Any] = []
        self._install()
        if resume and self.peers.world > 1:
            self._share_whole()

    # ---- hooks

    def _install(self) -> None:
        model = self.model
        for module in model.modules():
            if module._parameters:
                module.__dict__["_parameters"] = Watched(module._parameters, self._seen)
            self._handles += [
                module.register_forward_pre_hook(self._enter, prepend=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]
        # Around all others.
        self._handles += [
            model.register_forward_pre_hook(self._begin, prepend=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        whole = self.peers.world == 1 and self.tiers.gradients == "device" and self._updates is None
        if not whole:  # else gradients stay where torch puts them
            for slot in self.slots:
                if slot.parameter.requires_grad:
                    hook = lambda parameter, slot=slot: self._gradient(slot, parameter)
                    self._handles.append(slot.parameter.register_post_accumulate_grad_hook(hook))

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        """The model's forward begins."""
        self._unhook()
        for slot in [slot for frame in self._frames for slot in frame]:
            slot.users = 0  # of a pass that was interrupted from outside
        self._frames.clear()
        self._drop_updated(everything=True)
        self._told_engine = False
        training = torch.is_grad_enabled()
        self._in_step |= training
        self.fetcher.order = self.fetcher.training if training else self.fetcher.inference
        if training:
            self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
            self._hooks.__enter__()
            if self._updates is not None:
                self._updates.read_ahead()

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """The model's forward is over, well or not."""
        training = self._hooks is not None
        self._unhook()
        self.fetcher.settle()
        if not training:
            self.fetcher.finish()
            self._trim()
            self.fetcher.order = self.fetcher.training

    def _unhook(self) -> None:
        if self._hooks is not None:
            hooks, self._hooks = self._hooks, None
            hooks.__exit__(None, None, None)

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        frame: list[Slot] = []
        self._frames.append(frame)
        for parameter in module._parameters.values():
            slot = self._of_parameter.get(id(parameter))
            if slot is not None and slot not in frame:
                frame.append(slot)
                self._hold(slot)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        for slot in self._frames.pop():
            slot.users -= 1
        self._trim()

    def _seen(self, parameter: nn.Parameter) -> None:
        """A parameter is reached for."""
        slot = self._of_parameter.get(id(parameter))
        if slot is None:
            return
        if self._frames:
            if slot.users == 0:
                self._frames[-1].append(slot)
                self._hold(slot)
        elif self._in_step and slot.users == 0:
            self._outside.append(slot)
            self._hold(slot)

    # ---- parameters on the device

    def _hold(self, slot: Slot) -> None:
        """Put a parameter's elements under it."""
        slot.users += 1
        if slot.users > 1:
            return
        whole = self.fetcher.fetch(slot.index)
        if slot.whole is not whole:
            self._know(slot, whole)
        if slot.parameter.data.data_ptr() != whole.data_ptr() or slot.numel == 0:
            slot.parameter.data = slot.shaped(whole)
        self._trim()

    def _know(self, slot: Slot, whole: Tensor) -> None:
        slot.whole, slot.version = whole, slot.parameter._version
        self._held.add(slot.index)
        self._of_storage[id(whole.untyped_storage())] = slot.index

    def _trim(self) -> None:
        """Take away what nobody uses, except what is used again before `ahead` bytes of others."""
        idle = [index for index in self._held if self.slots[index].users == 0]
        if not idle:
            return
        soon, room = set(), self.fetcher.ahead
        for index in self.fetcher.order.ahead():
            if index not in soon:
                soon.add(index)
                room -= self.slots[index].nbytes
                if room < 0:
                    break
        for index in idle:
            if index not in soon:
                self._release(self.slots[index])

    def _release(self, slot: Slot) -> None:
        assert slot.whole is not None
        if slot.parameter._version != slot.version:
            name, slot.version = slot.name, slot.parameter._version
            raise ParameterChanged(name)
        self._of_storage.pop(id(slot.whole.untyped_storage()), None)
        self._held.discard(slot.index)
        slot.whole = None
        slot.parameter.data = self.store.placeholder(slot)

    # ---- autograd

    def _pack(self, tensor: Tensor) -> Any:
        index = self._of_storage.get(id(tensor.untyped_storage()))
        if index is not None and tensor.dtype == self.slots[index].dtype:
            base = self.slots[index].whole.storage_offset()
            return View(index, tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset() - base)
        if self.activations is not None and index is None:
            saved = self.activations.save(tensor)
            if saved is not None:
                return saved
        return tensor

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if isinstance(packed, Saved):
            return self.activations.load(packed)
        self._in_backward()
        slot = self.slots[packed.slot]
        whole = self.fetcher.fetch(slot.index)
        if slot.whole is None:
            self._know(slot, whole)  # for as long as it is used again soon
        if self._updates is not None and slot.parameter.requires_grad and slot not in self._for_update:
            slot.users += 1
            self._for_update.append(slot)
        if self._updates is not None:
            self._updates.read_ahead()
        self._trim()
        return whole.as_strided(packed.shape, packed.stride, whole.storage_offset() + packed.offset)

    def _in_backward(self) -> None:
        """Ask once per backward pass to be told of its end, where all processes meet."""
        self.fetcher.order = self.fetcher.training
        if self.peers.world > 1 and not self._told_engine:
            self._told_engine = private.at_end_of_backward(self._backward_done)

    def _backward_done(self) -> None:
        self._told_engine = False
        self.fetcher.settle()

    def _gradient(self, slot: Slot, parameter: nn.Parameter) -> None:
        """A gradient is finished."""
        gradient = parameter.grad
        if gradient is None:
            return
        parameter.grad = None
        self._in_backward()
        elements = flat_in(gradient, slot)
        if self.peers.world > 1:
            self.fetcher.reduce(slot.index, elements)
        else:
            self._reduced(slot.index, elements)

    def _reduced(self, index: int, part: Tensor) -> None:
        self.gradients.add(index, part)
        if self._updates is not None:
            self._updates.arrived(index)
            self._updates.read_ahead()
            self._drop_updated()

    def _present(self, segment: Segment) -> Tensor | None:
        """The elements of a segment, if backward has them on the device."""
        whole = self.slots[segment.shard].whole
        return None if whole is None else whole[segment.start : segment.stop]

    def _drop_updated(self, *, everything: bool = False) -> None:
        for slot in list(self._for_update):
            if everything or not self._updates.awaits(slot.index):
                self._for_update.remove(slot)
                slot.users -= 1
        self._trim()

    # ---- steps

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

    def step(self) -> None:
        """Update the parameters with the gradients there are, and end the step; a collective.

        With optimizer="disk" it is complete on disk when this returns.

        Raises:
            DiskFull: on some process; on all of them parameters and states are as before the step, and unless they were used up
                (update="backward"), so are the gradients: call it again when there is room.
        """
        self.optimizer.step()

    @torch.no_grad()
    def _step(self) -> None:
        self.fetcher.settle()
        self._collect()
        try:
            self.peers.agree(self._update)
            self.states.commit(lambda: self.store.about(self.states.step + 1), self.store.extra())
        except BaseException:
            self.states.rollback()
            if self._updates is not None:
                self._updates.finish()
                self.zero_grad()
            raise
        if self._updates is not None:
            self._updates.finish()
        if self.peers.world > 1:
            self._share_whole()
        self.zero_grad()
        self._end_of_step()

    def _collect(self) -> None:
        """Gradients that stayed under their parameters."""
        for slot in self.slots:
            if slot.parameter.grad is not None and slot.index not in self.gradients:
                self.gradients.add(slot.index, flat_in(slot.parameter.grad, slot))

    def _update(self) -> None:
        updates = self._updates
        if updates is not None and updates.failed is not None:
            raise updates.failed
        done = updates.done if updates is not None else set()
        shards = [slot.index for slot in self.slots if slot.index in self.gradients]
        due = {c for index in shards for c, _ in self.states.of_shard[index]} - done
        prepared = [c for c in self.states.prepared() if c in due]
        for c in set(self.states.prepared()) - due:
            self.states.forget(c)
        # Backward made gradients from the last parameter to the first; memory holds nothing of that order, so any will do.
        self.states.update([*prepared, *sorted(due - set(prepared))], self.gradients, self._clip)

    def _share_whole(self) -> None:
        """Parameters that live whole on every process get the parts that the others have updated."""
        import torch.distributed as dist

        for slot in self.slots:
            if slot.tier == "device":
                own = torch.zeros(slot.each, dtype=slot.dtype, device=self.device)
                values = slot.parameter.detach().as_strided((slot.numel,), (1,))
                own[: slot.stop - slot.start] = values[slot.start : slot.stop]
                whole = torch.empty(self.peers.world * slot.each, dtype=slot.dtype, device=self.device)
                with together(f"gathering {slot.name}"):
                    dist.all_gather_single(whole, own, group=self.fetcher.group)
                values.copy_(whole[: slot.numel])

    def _end_of_step(self) -> None:
        self._drop_updated(everything=True)
        for slot in self._outside:
            slot.users -= 1
        self._outside.clear()
        self.fetcher.finish()
        for index in list(self._held):
            if self.slots[index].users == 0:
                self._release(self.slots[index])  # what is there is of the step before
        if self.activations is not None:
            self.activations.clear()
        self._in_step = False
        self.fetcher.look_ahead()  # what the next step begins with

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.gradients.clear()
        self._clip = None
        for slot in self.slots:
            slot.parameter.grad = None

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients of this step so that their 2-norm is at most `max_norm`; returns the norm before; a collective.

        As `torch.nn.utils.clip_grad_norm_`: the norm of the norms of the parameters' gradients. With several processes, of
        their parts.

        Raises:
            ValueError: update="backward", where parameters are updated before all gradients are known.
        """
        if self._updates is not None:
            raise ValueError(
                "gradients cannot be clipped with update='backward', where parameters are updated as they come; use 'step'"
            )
        self.fetcher.settle()
        self._collect()
        norms = []
        for slot in self.slots:
            if slot.index in self.gradients:
                parts = [
                    self.gradients.get(self.states.chunks[c].segments[k]) for c, k in self.states.of_shard[slot.index]
                ]
                found = [torch.linalg.vector_norm(self._whole_of(slot, parts))] if parts else []
                norms += [norm.to("cpu") for norm in found]
        total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        if self.peers.world > 1:
            total = torch.linalg.vector_norm(torch.stack(self.peers.gather(total)))
        self._clip = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        return total

    def _whole_of(self, slot: Slot, parts: list[Tensor]) -> Tensor:
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        return flat.view(slot.shape) if flat.numel() == slot.numel and slot.shape else flat

    # ---- reading and writing whole values

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        """A parameter's whole value, on the CPU; a collective."""
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
        self.states.assign(slot.index, self.store.part(slot, value))
        self.states.commit(lambda: self.store.about(self.states.step), self.store.extra(), step=False)

    def state_dict(self) -> dict[str, Tensor]:
        """The model's state dict with whole values on the CPU; a collective. It must fit in memory."""
        ids = {id(slot.parameter): slot.name for slot in self.slots}
        tied = {name: ids[id(p)] for name, p in self.model.named_parameters(remove_duplicate=False)}
        whole = {slot.name: self.read(slot.name) for slot in self.slots}
        return {
            name: whole[tied[name]] if name in tied else value.detach().cpu().clone()
            for name, value in self.model.state_dict().items()
        }

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
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._unhook()
        for module in self.model.modules():
            if isinstance(module._parameters, Watched):
                module.__dict__["_parameters"] = dict(module._parameters)
        self.gradients.close()
        self.fetcher.finish()
        if self.activations is not None:
            self.activations.close()
        self.store.close()
        if self._place is not None:
            self._place.close()

    def __enter__(self) -> Tiered:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is None:
        first = next(model.parameters(), None)
        return torch.device("cpu") if first is None or first.device.type == "meta" else first.device
    found = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found
