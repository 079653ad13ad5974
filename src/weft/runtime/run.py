"""`weft.run`: train a model by a plan, on the processes that there are or on ones that it starts."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import warnings
from collections.abc import Callable, Iterator
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.comm import Exchange, auto
from weft.comm.automatic import Auto
from weft.comm.memory import VelocityMemory
from weft.graph.origins import defining_modules
from weft.paths import to_folder
from weft.planner import Plan
from weft.runtime.choice import Choice
from weft.runtime.driver import Driver, InProcess
from weft.runtime.engine import Options
from weft.runtime.launch import Spawned
from weft.runtime.trainer import Trainer

__all__ = ["run"]

AUTOCAST = {None: None, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, torch.bfloat16: torch.bfloat16}


@contextlib.contextmanager
def run(
    plan: Plan,
    model: nn.Module,
    optimizer: Any = None,
    *,
    loss: Callable[..., Any] | None = None,
    clip_norm: float | None = None,
    accumulate: int = 1,
    autocast: str | torch.dtype | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    seed: int = 0,
    check_finite: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 0,
    resume: str | Path | None = None,
    progress: bool = False,
    log_dir: str | Path | None = None,
    device: str | None = None,
    timeout: float = 600.0,
    exchange: Exchange | Auto | str | None = None,
) -> Iterator[Trainer]:
    """Train a model by a plan: a context manager that gives a `Trainer`.

    Under torchrun, or where `torch.distributed` is initialised, this process is one of the mesh, and every process runs the same
    program with the same batches. Otherwise the plan's number of local processes is started, and this one tells them what to do.
    When the block ends, the trained values are in `model`: also after an error of your own, except under torchrun.

    Args:
        plan: from `weft.plan`, `Plan.manual` or a file.
        model: the module that was planned for, on the CPU or built by `weft.placement.deferred`; training starts from its values
            (those of the first process, where they differ).
        optimizer: a class, a `functools.partial`, a function of `model.parameters()`, or a fresh instance built on them.
            Default: the plan's, with torch's default options.
        loss: as given to `weft.plan`, which is the default; needed where the model must be captured again, for batches of other
            sizes or a plan read from a file. With another one: `PlanMismatch`, if the model with it is not what was planned.
        clip_norm: scale the whole gradient down to at most this Euclidean norm.
        accumulate: cut each batch into so many micro-batches, one after the other.
        autocast: "bf16" runs matrix products in bfloat16; parameters stay as they are.
        scheduler: a function from an optimizer to a `torch.optim.lr_scheduler`, stepped after every update.
        seed: of dropout and other random operators in the model.
        check_finite: raise `NotFinite` instead of updating with a NaN or infinite loss. If False, a step that an `exchange` skips
            is not counted in `trainer.steps`.
        checkpoint: a folder to save to when the block ends, also by Ctrl-C or (not under torchrun) an error of your own, and
            every `checkpoint_every` steps.
        resume: a checkpoint folder to go on from, with an optimizer, and if any a schedule, of the class that it was saved with.
        progress: show loss, tokens per second and memory: measured beside planned.
        log_dir: a folder for `log.jsonl`, and TensorBoard event files if tensorboard is installed.
        device: "cpu" or "cuda"; default: "cuda" if the plan's devices are GPUs and this machine has as many, else "cpu".
        timeout: seconds that any step or other command may take before the run is given up.
        exchange: how gradients travel (`weft.comm.Exchange`, `weft.comm.dgc`) along the mesh axes that sum all of them: those of
            data parallelism and ZeRO, also beside tensor parallelism; None for collectives. Its memories are in checkpoints.
            Where it is not None, a step that is not finite on some process changes nothing. A plan that was priced with an
            exchange (`plan.exchange`) wants the same.
            "auto", or `weft.comm.auto(candidates=...)`: whichever makes the predicted step shortest, all-reduce included;
            `trainer.exchange` names it.
    A plan that computes activations again, or moves them to a lower tier, to fit (`plan.squeezes`) is carried out within those
    bytes on each process, with the loss and gradients of the same plan without limit, bit for bit. A tier called "disk" is a
    temporary file of each process, where `TMPDIR` says.

    Raises:
        ValueError: an argument out of range, a plan for another number of processes, or an exchange with a function or class
            that processes started here could not import, such as a lambda.
        BudgetError: with a step: a process cannot stay within its bytes; the run has ended on all.
        PlanMismatch: with the first batch, or `resume`: the plan is for another model.
    """
    if isinstance(plan, str | Path):
        raise ValueError(f"run: plan must be a weft.Plan, got {str(plan)!r}; weft.Plan.load reads one from a file")
    if scheduler is not None and not callable(scheduler):
        raise ValueError(
            f"run: scheduler must be a function from an optimizer to a torch.optim.lr_scheduler, got {scheduler!r}; give "
            "functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=1000)"
        )
    if exchange == "auto":
        exchange = auto()
    if exchange is not None and not isinstance(exchange, Exchange | Auto):
        raise ValueError(
            f"run: exchange must be a weft.comm.Exchange, 'auto' or None, got {exchange!r}; `weft.comm.dgc()` makes one"
        )
    if exchange is not None:
        _check_velocities(clip_norm, exchange)
    _check_priced(plan, exchange)
    _check(clip_norm, accumulate, autocast, seed, checkpoint, checkpoint_every, device, timeout)
    if checkpoint is not None:
        to_folder("run: checkpoint", checkpoint, beside=True)
    if log_dir is not None:
        to_folder("run: log_dir", log_dir)
    if os.environ.get("WEFT_WORKER"):
        raise RuntimeError(
            "weft.run was called while a process of another run imported the main script; put the program under "
            "`if __name__ == '__main__':`"
        )
    options = Options(
        clip_norm, AUTOCAST[autocast], seed, check_finite, timeout, progress or log_dir is not None,
        Choice.of(exchange, plan) if isinstance(exchange, Auto) else exchange,
    )  # fmt: skip
    driver = _driver(plan, options, device)
    trainer = None
    try:
        trainer = Trainer(
            plan, model, optimizer or _optimizer(plan), driver, loss=loss if loss is not None else plan.loss,
            accumulate=accumulate, scheduler=scheduler, checkpoint=checkpoint, checkpoint_every=checkpoint_every,
            progress=progress, log_dir=log_dir,
        )  # fmt: skip
        if resume is not None:
            trainer.load(resume)
        yield trainer
    except BaseException as error:
        if trainer is None:
            driver.close(broken=True)
        else:
            trainer.close(error)
        raise
    else:
        trainer.close()


def _check_velocities(clip_norm: float | None, exchange: Exchange | Auto) -> None:
    """Refuse to clip velocities, also of a candidate that might not be chosen: that depends on the machine."""
    for which in exchange.exchanges().values() if isinstance(exchange, Auto) else (exchange,):
        if clip_norm is not None and isinstance(which.memory, VelocityMemory):
            raise ValueError(
                f"run: {type(which.memory).__name__} delivers velocities, and clip_norm={clip_norm} would take them for "
                "gradients; give the memory a clip of its own (weft.comm.dgc(clip=...)) and leave clip_norm out"
            )


def _check_priced(plan: Plan, exchange: Exchange | Auto | None) -> None:
    """Say so if gradients travel otherwise than the plan was priced: it may not be the fastest then, but it is right."""
    from weft.planner.coding import described

    planned, given = plan.exchange, exchange.options if isinstance(exchange, Exchange) else ""
    if not planned or planned == given or isinstance(exchange, Auto):
        return
    instead = described(given) if given else "all-reduce"
    if described(planned) == instead:
        lines = zip(planned.splitlines(), given.splitlines(), strict=False)
        instead += next((f" with {b!r} in place of {a!r}" for a, b in lines if a != b), "")
    warnings.warn(
        f"the plan was priced for gradients by {described(planned)}, but this run sends them by {instead}: its predictions do "
        "not hold. Give weft.run the exchange of weft.plan, or plan again with this one",
        stacklevel=4,
    )


def _check(
    clip_norm: float | None,
    accumulate: int,
    autocast: Any,
    seed: int,
    checkpoint: Any,
    checkpoint_every: int,
    device: Any,
    timeout: float,
) -> None:
    if clip_norm is not None and not (isinstance(clip_norm, Real) and clip_norm > 0):
        raise ValueError(f"run: clip_norm must be a number > 0, got {clip_norm!r}; None leaves gradients as they are")
    if not _whole(accumulate, least=1):
        raise ValueError(
            f"run: accumulate must be a whole number >= 1, got {accumulate!r}; it is the number of micro-batches"
        )
    if not isinstance(autocast, str | torch.dtype | None) or autocast not in AUTOCAST:
        raise ValueError(f"run: autocast must be 'bf16' or None, got {autocast!r}; float16 would need loss scaling")
    if not _whole(seed):
        raise ValueError(f"run: seed must be a whole number, got {seed!r}; leave it out for 0")
    if not _whole(checkpoint_every, least=0):
        raise ValueError(
            f"run: checkpoint_every must be a whole number of steps >= 0, got {checkpoint_every!r}; 0 saves at the end only"
        )
    if checkpoint_every and checkpoint is None:
        raise ValueError(f"run: checkpoint_every={checkpoint_every} needs checkpoint=, the folder to save to")
    if not (device is None or (isinstance(device, str) and device.split(":")[0] in ("cpu", "cuda"))):
        raise ValueError(f"run: device must be 'cpu', 'cuda' or None, got {device!r}; None takes what the plan is for")
    if not (isinstance(timeout, Real) and timeout > 0):
        raise ValueError(f"run: timeout must be a number > 0 of seconds, got {timeout!r}")


def _whole(value: Any, least: float = -math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _optimizer(plan: Plan) -> type[torch.optim.Optimizer]:
    kind = getattr(torch.optim, plan.optimizer.name, None)
    if kind is None:
        raise ValueError(
            f"run: the plan is for {plan.optimizer.name!r}, which torch.optim does not have; pass optimizer="
        )
    return kind


def _driver(plan: Plan, options: Options, device: str | None) -> Driver:
    """The processes that this run has: its own one, those of torchrun, or new ones."""
    import torch.distributed as dist

    mesh, owns = plan.assignment.mesh, False
    under_torchrun = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ)
    gpus = not any(each.kind.lower().startswith("cpu") for each in plan.cluster.devices)
    if not dist.is_initialized() and not under_torchrun:
        device = device or ("cuda" if gpus and torch.cuda.device_count() >= mesh.size else "cpu")
        if mesh.size == 1:
            return InProcess(options, device)
        if plan.graph is not None:
            defining_modules(plan.graph)  # refuses operators that the processes could not have, before any is started
        return Spawned(mesh.size, options, device)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = device or (f"cuda:{local}" if gpus and torch.cuda.device_count() > local else "cpu")
    if not dist.is_initialized():
        if int(os.environ["WORLD_SIZE"]) != mesh.size:
            raise ValueError(
                f"the plan is for {mesh.size} devices (mesh {mesh.shape}), but torchrun started {os.environ['WORLD_SIZE']} "
                "processes; start as many, or plan for this number"
            )
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=options.timeout))
        owns = True
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    return InProcess(options, device, owns=owns, watched=True)
