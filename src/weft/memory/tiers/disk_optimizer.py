"""Any elementwise optimizer of torch with its state on disk: a drop-in for it, in one process.

    optimizer = DiskOptimizer(model.parameters(), torch.optim.AdamW, "/fast/disk/run7", lr=3e-4)
    ...
    loss.backward()
    optimizer.step()

Parameters and gradients stay where they are; state (twice the parameters for Adam) is streamed through a few buffers, and the
result is the optimizer's own, bit for bit. Every step ends with state and parameters complete on disk: after a crash the same
call with `resume=True` goes on after the last complete step.

Bits are equal where torch's kernels give an element the same result in any tensor: on one thread, or on several for tensors
that torch does not split among them (32,768 elements); with several threads torch itself cuts large tensors at odd places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.cluster.units import nbytes_of
from weft.memory.tiers.dense import flat, flat_like
from weft.memory.tiers.elementwise import Elementwise
from weft.memory.tiers.generators import random_state, restore_random
from weft.memory.tiers.gradients import Gradients
from weft.memory.tiers.groups import described, plain_options, refuse_more, restore
from weft.memory.tiers.layout import Segment, Shard
from weft.memory.tiers.manifest import Manifest
from weft.memory.tiers.peers import Peers
from weft.memory.tiers.resume import check_resume, open_states
from weft.memory.tiers.states import States
from weft.memory.tiers.whole import Layout, packed, replace, unpacked
from weft.memory.tiers.workplace import Workplace

__all__ = ["DiskOptimizer"]


class DiskOptimizer(torch.optim.Optimizer):
    """See the file's header.

    Args:
        params: parameters, (name, parameter) pairs or groups, as any optimizer takes them.
        kind: the optimizer's class.
        folder: of the state; for one job at a time.
        resume: go on from the state in the folder, which gives the parameters their values. Otherwise it must hold none.
        chunk: bytes of parameters updated at once; takes `buffers` times that, and the same again per state, of memory.
        buffers: 1 reads, updates and writes in turn; 3 do it at once.
        threads: that read and write.
        **options: of the optimizer.

    Attributes:
        steps: complete ones.
        notes: a JSON-able dict that is written with each step and comes back on resuming (epoch, position in the data).
    Raises:
        ValueError: the optimizer is not elementwise; the folder holds the state of another model, or some and `resume` is False.
        DiskFull: the folder has no room for the state (found before training).
        FolderInUse: another job works there.
        CheckpointDamaged: the state is not what was written.
    """

    def __init__(
        self,
        params: Iterable[Any],
        kind: type[torch.optim.Optimizer],
        folder: Path | str,
        *,
        resume: bool = False,
        chunk: int | str = "16 MiB",
        buffers: int = 3,
        threads: int = 4,
        **options: Any,
    ):
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or kind is torch.optim.Optimizer:
            got = repr(kind) if isinstance(kind, (str, type)) else f"an object of type {type(kind).__name__}"
            raise ValueError(
                f"DiskOptimizer: kind must be an optimizer's class, as torch.optim.AdamW, got {got}; its options follow by name"
            )
        if isinstance(params, nn.Module):
            raise ValueError("DiskOptimizer: params must be parameters, got a module; pass model.parameters()")
        check_resume(resume)
        defaults = kind([nn.Parameter(torch.zeros(1))], **options).defaults
        super().__init__(params, defaults)
        self.kind, self.notes = kind, {}
        self._parameters: list[nn.Parameter] = [p for group in self.param_groups for p in group["params"]]
        shards = self._shards()
        with ExitStack() as opened:
            self.place = Workplace(folder, threads=threads)
            opened.callback(self.place.close)
            self._folder = self.place.folder
            self.states = States(
                shards,
                [Elementwise(kind, defaults) for _ in self.param_groups],
                lambda g: plain_options(self.param_groups[g]),
                self._value,
                streamed=True,
                device=torch.device("cpu"),
                peers=Peers(),
                disk=self.place.disk,
                folder=self._folder,
                chunk=nbytes_of(chunk, "chunk"),
                buffers=buffers,
            )
            opened.callback(self.states.close)
            self._gradients = Gradients(shards)
            opened.callback(self._gradients.close)
            self._extra = self._open(resume)
            self._opened = opened.pop_all()
        self._versions = [parameter._version for parameter in self._parameters]
        self.laid_out = True

    def _shards(self) -> list[Shard]:
        """The parameters, whole.

        Raises:
            ValueError: one of them has no place, or no name of its own.
        """
        found: list[Shard] = []
        for index, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                name = group["param_names"][place] if "param_names" in group else str(len(found))
                if not parameter.dtype.is_floating_point and not parameter.dtype.is_complex:
                    raise ValueError(f"parameter {name} of dtype {parameter.dtype} cannot be trained; leave it out")
                if parameter.is_meta:
                    raise ValueError(
                        f"parameter {name} is on the meta device and has no values; materialise the model first"
                    )
                shape, numel = tuple(parameter.shape), parameter.numel()
                found.append(Shard(name, shape, parameter.dtype, 0, numel, index, on_disk=False))
        if len({id(parameter) for parameter in self._parameters}) < len(found):
            raise ValueError("a parameter is given twice, and would be updated twice; give each once")
        if len({shard.name for shard in found}) < len(found):
            raise ValueError("two parameters have one name; names tell them apart in the files")
        return found

    def _open(self, resume: bool) -> dict[str, Tensor]:
        found = open_states(self.states, self._folder, self._about, random_state, resume=resume)
        if found is None:
            for index, parameter in enumerate(self._parameters):
                self.states.seed(index, flat(parameter))
            self.states.commit(lambda: self._about(0), random_state())
            return {}
        self.notes.update(found.notes)
        restore(self.param_groups, found.groups)
        self.states.load_values(self.states.in_memory())
        return found.extra

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while it is made: the files have places for the parameters given then.

        Raises:
            ValueError: later.
        """
        refuse_more(self)
        super().add_param_group(param_group)

    def _value(self, segment: Segment) -> Tensor:
        return flat(self._parameters[segment.shard])[segment.start : segment.stop]

    def _about(self, step: int) -> Manifest:
        shapes = {s.name: (list(s.shape), str(s.dtype).removeprefix("torch.")) for s in self.states.shards}
        groups = [described(group) for group in self.param_groups]
        return Manifest(step, 0, 1, self.kind.__name__, shapes, [], groups, dict(self.notes))

    @property
    def steps(self) -> int:
        return self.states.step

    def restore_random(self) -> None:
        """Set torch's random generators to where they were after the step that was resumed."""
        restore_random(self._extra)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; on return it is complete on disk.

        Raises:
            DiskFull: parameters and state are as before the step. Changes made in place since the last one are kept, too, where
                torch counts them (`p.mul_()` does, `p.data.mul_()` does not).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        edited = {i: flat(p).clone() for i, p in enumerate(self._parameters) if p._version != self._versions[i]}
        try:
            changed = self._changed()
            order = sorted({c for index in changed for c, _ in self.states.of_shard[index]})
            self.states.update(order, self._gradients)
            self.states.commit(lambda: self._about(self.states.step + 1), random_state())
        except BaseException:
            self.states.rollback()
            self._versions = [parameter._version for parameter in self._parameters]
            for index, values in edited.items():  # of which the file does not know
                flat(self._parameters[index]).copy_(values)
            raise
        finally:
            self._gradients.clear()
        self._versions = [parameter._version for parameter in self._parameters]
        return loss

    def _changed(self) -> set[int]:
        """Parameters that have a gradient, which is taken, or other values than after the last step."""
        changed = set()
        for index, parameter in enumerate(self._parameters):
            shard = self.states.shards[index]
            if parameter.dtype != shard.dtype or parameter.shape != shard.shape:
                raise ValueError(
                    f"parameter {shard.name} is now {parameter.dtype} of shape {tuple(parameter.shape)}, and its state on "
                    f"disk is of {shard.dtype}, {shard.shape}; convert the model before the optimizer is made"
                )
            if parameter.grad is not None:
                shape, stride = tuple(parameter.shape), parameter.stride()
                self._gradients.add(index, flat_like(parameter.grad, shape, stride, shard.name))
                changed.add(index)
            elif parameter._version != self._versions[index]:
                changed.add(index)  # by the user, between steps: the files must tell of it
        return changed

    def state_dict(self) -> dict[str, Any]:
        """As the optimizer in memory would give it: all of the state is read into memory."""
        found = {index: packed(self.states, index, layout) for index, layout in self._layouts().items()}
        return {**super().state_dict(), "state": {index: state for index, state in found.items() if state is not None}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of an optimizer of the same kind and parameters, and write it to disk.

        Raises:
            ValueError: it is of other groups, shapes or options; parameters and state are as before.
        """
        given = unpacked(self.states, state_dict["state"], self._layouts())
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        try:
            replace(self.states, given)
            self.states.commit(lambda: self._about(self.states.step), random_state(), step=False)
        except BaseException:
            self.states.rollback()
            raise

    def _layouts(self) -> dict[int, Layout]:
        return {index: (tuple(p.shape), p.stride()) for index, p in enumerate(self._parameters)}

    def close(self) -> None:
        """Close the files and give the folder free; training cannot go on with this object."""
        self._opened.close()

    def __enter__(self) -> DiskOptimizer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
