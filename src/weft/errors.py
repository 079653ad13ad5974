"""The errors a caller may react to; every one says what is wrong, where, and what to do.

A user's mistake is a `ValueError`. Where a program may want to react to it (try a smaller model, ask for another device), it
has a class of its own here, deriving from `WeftError` and `ValueError` (or `RuntimeError` where nobody made a mistake: a
process died). Fields are passed to `Exception.__init__` as args, so that an error survives pickling between processes; `__str__`
builds the sentence for people. `weft` on the command line prints that sentence and no traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "BudgetError",
    "CaptureError",
    "CheckpointDamaged",
    "DiskFull",
    "DoesNotFit",
    "ExchangeMismatch",
    "FolderInUse",
    "GradientMoved",
    "ImpossibleConstraint",
    "MeshTooLarge",
    "NotFinite",
    "NotReplayable",
    "ParameterChanged",
    "ParameterReleased",
    "PeerLost",
    "PlanMismatch",
    "UnknownOperators",
    "Unreadable",
    "WeftError",
    "WorkerDied",
    "together",
]


class WeftError(Exception):
    """Base of weft's own errors: `except WeftError` catches what weft found wrong, not what it did wrong."""


class UnknownOperators(WeftError, ValueError):
    """Operators of the model have no placement rule; `operators` lists (node, operator, shapes, where) for each."""

    def __init__(self, operators: list[tuple[str, str, str, str]]):
        super().__init__(operators)
        self.operators = list(operators)

    def __str__(self) -> str:
        lines = [
            f"  {node}: {target} on {shapes}" + (f", called at {where}" if where else "")
            for node, target, shapes, where in self.operators
        ]
        names = sorted({target for _, target, _, _ in self.operators})
        return (
            f"{len(self.operators)} calls of {len(names)} operators have no placement rule, so weft does not know how to split "
            "them:\n"
            + "\n".join(lines)
            + "\nAdd a row for each in weft.placement.rows (docs/extend.md), or let them run whole on every "
            f"device with allow_replicated={names!r}."
        )


class PeerLost(WeftError, RuntimeError):
    """Another process did not answer: it died, or it is stuck. `rank` is its global rank, or -1 if nobody knows which."""

    def __init__(self, rank: int, doing: str, detail: str):
        super().__init__(rank, doing, detail)
        self.rank, self.doing, self.detail = rank, doing, detail

    def __str__(self) -> str:
        who = f"rank {self.rank}" if self.rank >= 0 else "another rank"
        return (
            f"lost {who} during {self.doing}: {self.detail}. Look at that process's own output for why it ended or stalled; "
            "if it was only slow, raise the timeout of the process group."
        )


def first_line(error: BaseException) -> str:
    """Of what an error says; its class where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def together(doing: str) -> Iterator[None]:
    """Around collectives: what torch says of a process that has ended, or did not come in time, becomes `PeerLost`. It has no
    finer class for that than `RuntimeError`; errors of our own pass."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, WeftError):
            raise
        raise PeerLost(-1, doing, first_line(error)) from error


class ExchangeMismatch(WeftError, ValueError):
    """Ranks do not exchange the same thing, or a checkpoint is that of another exchange. `what` differs: `ours`, `theirs`."""

    def __init__(self, what: str, ours: str, theirs: str, remedy: str):
        super().__init__(what, ours, theirs, remedy)
        self.what, self.ours, self.theirs, self.remedy = what, ours, theirs, remedy

    def __str__(self) -> str:
        return f"gradient exchange: {self.what} differ: here {self.ours}, there {self.theirs}. {self.remedy}"


class CaptureError(WeftError, ValueError):
    """A module cannot be turned into a graph. `where` is `file.py:line` of the user's code, `code` that line, `why` what
    stopped the trace, `todo` what to change."""

    def __init__(self, where: str, code: str, why: str, todo: str):
        super().__init__(where, code, why, todo)
        self.where, self.code, self.why, self.todo = where, code, why, todo

    def __str__(self) -> str:
        line = f"\n    {self.where}: {self.code}" if self.where else ""
        return f"cannot capture the model: {self.why}{line}\n{self.todo}"


class NotReplayable(WeftError, ValueError):
    """A model's construction cannot be recorded or replayed: `what` happened in `module` (or to that parameter), `fix` helps."""

    def __init__(self, module: str, what: str, fix: str):
        super().__init__(module, what, fix)
        self.module, self.what, self.fix = module, what, fix

    def __str__(self) -> str:
        return f"deferred initialisation of {self.module}: {self.what}; {self.fix}"


class WorkerDied(WeftError, RuntimeError):
    """A process of a run ended or stopped answering. `how` says what happened to it, `step` is the last step it finished."""

    def __init__(self, rank: int, pid: int, how: str, step: int, story: str = ""):
        super().__init__(rank, pid, how, step, story)
        self.rank, self.pid, self.how, self.step, self.story = rank, pid, how, step, story

    def __str__(self) -> str:
        said = f"\n{self.story.rstrip()}" if self.story else ""
        return (
            f"rank {self.rank} (pid {self.pid}) {self.how} after step {self.step}; the run has ended on every process. "
            f"Start again from the last checkpoint with trainer.load(path).{said}"
        )


class CheckpointDamaged(WeftError, ValueError):
    """A checkpoint cannot be read: a file is missing, cut short or altered. Nothing has been loaded from it."""

    def __init__(self, path: str, what: str):
        super().__init__(path, what)
        self.path, self.what = path, what

    def __str__(self) -> str:
        return f"checkpoint {self.path} is damaged: {self.what}. Nothing was changed; load another checkpoint."


class Unreadable(WeftError, ValueError):
    """A file is missing, damaged, or holds something else than what it was read as. `what` is wrong, `remedy` helps."""

    def __init__(self, path: str, what: str, remedy: str):
        super().__init__(path, what, remedy)
        self.path, self.what, self.remedy = path, what, remedy

    def __str__(self) -> str:
        return f"cannot read {self.path}: {self.what}. {self.remedy}"


class NotFinite(WeftError, RuntimeError):
    """The loss or the gradient norm of a step is NaN or infinite; the optimizer has not run. `parameters` have such gradients."""

    def __init__(self, step: int, loss: float, parameters: list[str]):
        super().__init__(step, loss, parameters)
        self.step, self.loss, self.parameters = step, loss, list(parameters)

    def __str__(self) -> str:
        names = ", ".join(self.parameters[:5]) + (
            f" and {len(self.parameters) - 5} more" if len(self.parameters) > 5 else ""
        )
        return (
            f"the loss of step {self.step} is {self.loss}; the parameters are as before that step. Gradients that are not "
            f"finite: {names or 'none'}. Look at that batch, lower the learning rate, or clip gradients (clip_norm=1.0)."
        )


class DoesNotFit(WeftError, ValueError):
    """No plan fits the devices' memory; `need` and `have` are bytes on `device` for the leanest plan found, with everything
    computed again that can be, unless that was ruled out."""

    def __init__(self, device: str, need: float, have: float, largest: str, remedy: str):
        super().__init__(device, need, have, largest, remedy)
        self.device, self.need, self.have, self.largest, self.remedy = device, need, have, largest, remedy

    def __str__(self) -> str:
        return (
            f"the leanest plan needs {_mib(self.need)} ({self.need:.0f} bytes) on {self.device}, which has {_mib(self.have)}. "
            f"The largest part is {self.largest}: {self.remedy}."
        )


class PlanMismatch(WeftError, ValueError):
    """A plan was made for something else than what it is used with: another model, cluster or number of processes."""

    def __init__(self, what: str, planned: str, given: str, remedy: str):
        super().__init__(what, planned, given, remedy)
        self.what, self.planned, self.given, self.remedy = what, planned, given, remedy

    def __str__(self) -> str:
        return f"the plan is for another {self.what}: planned {self.planned}, given {self.given}. {self.remedy}"


class ImpossibleConstraint(WeftError, ValueError):
    """A placement asked for by hand that an operator has no signature for; `legal` lists what it has."""

    def __init__(self, name: str, target: str, shapes: list[list[int]], wanted: str, legal: list[str]):
        super().__init__(name, target, shapes, wanted, legal)
        self.name, self.target, self.shapes, self.wanted, self.legal = name, target, shapes, wanted, list(legal)

    def __str__(self) -> str:
        shown = "; ".join(self.legal[:12]) + (f"; and {len(self.legal) - 12} more" if len(self.legal) > 12 else "")
        return (
            f"{self.name} ({self.target}, shapes {self.shapes}) cannot be placed as {self.wanted!r}. "
            f"It can be: {shown or 'nothing else'}."
        )


class MeshTooLarge(WeftError, ValueError):
    """A mesh axis has more devices than what it is to cut has entries, or the mesh more than the cluster."""

    def __init__(self, what: str, size: int, devices: int, axis: str):
        super().__init__(what, size, devices, axis)
        self.what, self.size, self.devices, self.axis = what, size, devices, axis

    def __str__(self) -> str:
        if self.what == "the cluster":
            return f"the mesh has {self.devices} devices, the cluster only {self.size}. Use a smaller mesh, or a larger cluster."
        return (
            f"mesh axis {self.axis} has {self.devices} devices, but {self.what} has only {self.size} entries to share "
            "among them. Use fewer devices on that axis, a larger batch, or another strategy."
        )


class BudgetError(WeftError, ValueError):
    """A step cannot be run within a budget. `budget` and `least` are bytes (`least` 0 if unknown), `what` names what does not
    fit: an operator, or the parameters."""

    def __init__(self, budget: int, least: int, what: str):
        super().__init__(budget, least, what)
        self.budget, self.least, self.what = budget, least, what

    def __str__(self) -> str:
        fits = f" The least that will do is {_mib(self.least)} ({self.least} bytes)." if self.least else ""
        return (
            f"the step does not fit in {_mib(self.budget)}: {self.what}.{fits} Give a larger budget, a smaller batch, "
            "or a lower tier to offload to."
        )


class DiskFull(WeftError, OSError):
    """A folder's file system has no room. `need` and `have` are bytes, `doing` says when it was found."""

    def __init__(self, path: str, need: int, have: int, doing: str):
        super().__init__(path, need, have, doing)
        self.path, self.need, self.have, self.doing = path, need, have, doing

    def __str__(self) -> str:
        return (
            f"{self.doing}: {self.path} needs {_mib(self.need)} ({self.need} bytes) and has {_mib(self.have)} "
            f"({self.have} bytes) left. The last complete step is intact; free some space, or name a folder on another disk."
        )

    def __reduce__(self) -> tuple[type[DiskFull], tuple[str, int, int, str]]:  # OSError keeps two arguments only
        return type(self), (self.path, self.need, self.have, self.doing)


class FolderInUse(WeftError, RuntimeError):
    """Another process works in a folder of training state. `holder` says which, as far as it is known."""

    def __init__(self, path: str, holder: str):
        super().__init__(path, holder)
        self.path, self.holder = path, holder

    def __str__(self) -> str:
        return (
            f"{self.path} is in use by {self.holder}; two jobs would destroy each other's state. Name another folder, "
            "or end it."
        )


class ParameterChanged(WeftError, RuntimeError):
    """A parameter that lives on a lower tier was written to by something else than the optimizer; the change would be lost."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return (
            f"parameter {self.name} was changed outside the optimizer while it was on the device; its home is a lower tier, so "
            "the change would be lost. Change it through Tiered.write(name, tensor)."
        )


class GradientMoved(WeftError, RuntimeError):
    """A gradient that has left `p.grad` for a lower tier was used in a way that is not possible there."""

    def __init__(self, name: str, why: str):
        super().__init__(name, why)
        self.name, self.why = name, why

    def __str__(self) -> str:
        return f"the gradient of {self.name} {self.why}."


class ParameterReleased(WeftError, RuntimeError):
    """A parameter that lives on a lower tier was used between steps, where its elements are not on the device."""

    def __init__(self, name: str, shape: tuple[int, ...]):
        super().__init__(  # the sentence, since `load_state_dict` shows people the args
            f"parameter {name} of shape {shape} lives on a lower tier; its elements are on the device only while the model runs. "
            "Read them with Tiered.read(name), change them with Tiered.write(name, tensor): on every process."
        )
        self.name, self.shape = name, shape

    def __reduce__(self) -> tuple[type[ParameterReleased], tuple[str, tuple[int, ...]]]:
        return type(self), (self.name, self.shape)


def _mib(nbytes: float) -> str:
    if nbytes < 2**20:
        return f"{nbytes / 2**10:,.1f} KiB"
    return f"{nbytes / 2**20:,.1f} MiB" if nbytes < 2**30 else f"{nbytes / 2**30:,.2f} GiB"
