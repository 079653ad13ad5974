"""The processes of a job: what they tell each other, and how it shows when one is gone."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from weft.errors import together

__all__ = ["Peers", "control_group"]


class Peers:
    """The other processes of a job; alone, all of it is trivial. `control` is a process group that moves CPU tensors."""

    def __init__(self, control: Any = None):
        self.control = control
        if control is None:
            self.rank, self.world = 0, 1
        else:
            import torch.distributed as dist

            self.rank, self.world = dist.get_rank(control), dist.get_world_size(control)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, in rank order."""
        if self.control is None:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        with together("agreeing with the other processes"):
            dist.all_gather_object(found, value, group=self.control)
        return found

    def wait(self) -> None:
        """Return when everybody has come here."""
        self.gather(None)

    def agree(self, work: Callable[[], Any]) -> Any:
        """Do something on every process; if it fails anywhere it fails everywhere: with a rank's own error, or else the first
        rank's that has one."""
        try:
            result = work()
        except Exception as error:
            self.gather(_told(error))
            raise
        failed = next((error for error in self.gather(None) if error is not None), None)
        if failed is not None:
            raise failed
        return result


def _told(error: Exception) -> Exception:
    """An error as the other processes can hear of it: itself, or what it says if it survives no pickling, there and back."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def control_group(group: Any) -> Any:
    """A process group of the same ranks that moves CPU tensors."""
    if group is None:
        return None
    import torch.distributed as dist

    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group must be a process group, as torch.distributed.group.WORLD, or None, got {group!r:.80}")
    if dist.get_world_size(group) == 1:
        return None
    if "gloo" in dist.get_backend(group):
        return group
    return dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)
