"""The trainer: what a user holds while a model trains.

    step        a global batch in, the global loss out                     sync, export   weights back into the model, into a file
    evaluate    the loss, nothing trained                                  save, load     checkpoints of everything
    gradients   the loss and whole gradients, nothing trained              state_dict     the same as values

It captures the model for each set of batch sizes that occurs (programs are kept), cuts batches into micro-batches, runs the
learning-rate schedule, and leaves the work to a `Driver`. The schedule acts on a stand-in optimizer of the user's class and
groups (`Trainer.optimizer`), whose options go to every process with each step: change `param_groups` there as in plain torch.
"""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from weft.graph import capture, check_batch, unflatten_batch
from weft.graph.graph import Graph
from weft.placement.deferred import tape_of
from weft.runtime import checkpoint
from weft.runtime.batches import count_samples, count_tokens, split
from weft.runtime.driver import Driver, Values, named_tensors, whole_values
from weft.runtime.engine import Job, StepResult, graph_key
from weft.runtime.optimizer import plain_options, recipe
from weft.runtime.progress import Log, Meter, Progress

__all__ = ["Trainer"]


@final
class Trainer:
    """Trains one model by one plan; made by `weft.run`, which also documents the arguments.

    Attributes:
        losses: global loss of every step so far, each before its update.
        steps: updates made so far.
        norm: gradient norm of the last step, before clipping; None without `clip_norm`.
        peak: most bytes of tensors on any one process at any moment so far; 0 unless they are measured: for a plan that computes
            activations again, for `progress` and for `log_dir`.
        optimizer: stand-in whose `param_groups` hold the options in force.
        scheduler: the learning-rate schedule, or None.
        model: the user's; `sync` brings its values up to date.
    """

    def __init__(
        self,
        plan: Any,
        model: nn.Module,
        optimizer: Any,
        driver: Driver,
        *,
        loss: Callable[..., Any] | None = None,
        accumulate: int = 1,
        scheduler: Callable[[Any], Any] | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 0,
        progress: bool = False,
        log_dir: str | Path | None = None,
    ):
        self.plan, self.model, self.driver, self._loss = plan, model, driver, loss
        # The plan's own graph, if it is of this loss; any other loss shows when the first batch is captured with it.
        self._planned: Graph | None = plan.graph if loss == plan.loss else None
        self._accumulate = accumulate
        self.losses: list[float] = []
        self.norm: float | None = None
        self.peak = 0
        self.meter = Meter()
        self._graph: Graph | None = None
        self._ready: set[Any] = set()  # keys of the programs that the driver has
        self._recipe = recipe(optimizer, model, loss)
        stand_ins = {name: nn.Parameter(torch.zeros(1)) for names in self._recipe.names() for name in names}
        self.optimizer = self._recipe.build(stand_ins)
        # The processes make the same of the recipe; empty where what they have is not known.
        self._sent = self._options()
        self.scheduler = _schedule(scheduler, self.optimizer) if scheduler is not None else None
        self._checkpoint = Path(checkpoint) if checkpoint is not None else None
        self._every = checkpoint_every
        first = driver.rank == 0
        self._progress = Progress() if progress and first else None
        self._log = Log(log_dir) if log_dir is not None and first else None
        self._nbytes = 0
        self._ended = False
        self._pending: list[_Waiting] = []

    # ---- steps

    @property
    def steps(self) -> int:
        return self.driver.last_step

    @property
    def exchange(self) -> str:
        """With `exchange="auto"`, after the first batch: the name of what sends gradients, "plain" for all-reduce; else ""."""
        return self.driver.exchange

    @property
    def tokens_per_second(self) -> float:
        """Over the last steps; 0 for batches without token ids."""
        return self.meter.tokens_per_second

    def step(self, batch: Any) -> float:
        """Train on one global batch; every process gives the same one. Returns the global loss before the update.

        The loss is the mean over the batch as the model's own loss takes it; with `accumulate=k` it is the mean of the
        micro-batches' losses weighted by their numbers of samples.

        Raises:
            ValueError: the batch has another structure or dtype than the captured one.
            PlanMismatch: the plan is for another model.
            NotFinite: the loss is NaN or infinite; nothing has been updated.
            WorkerDied: a process is gone; the run is over.
            KeyboardInterrupt: Ctrl-C, after the step that was under way has been finished on every process.
        """
        self.meter.begin()
        leaves, jobs = self._jobs(batch)
        options = self._options()
        result = self.driver.step(jobs, _changed(options, self._sent))
        self._sent = options
        self._count(result, leaves)
        if result.stop:
            raise KeyboardInterrupt
        return result.loss

    def evaluate(self, batch: Any) -> float:
        """Global loss of a batch, in evaluation mode; nothing is trained."""
        job = Job(self._leaves(batch), train=False)
        self._prepare([job])
        return self.driver.evaluate(job)

    def gradients(self, batch: Any) -> tuple[float, dict[str, Tensor]]:
        """Global loss, and the whole gradient of every trainable parameter by name; nothing is trained."""
        return self.driver.gradients(self._jobs(batch)[1])

    def _jobs(self, batch: Any) -> tuple[list[Tensor], list[Job]]:
        """The batch's tensors, and the micro-batches of a step on it, with programs for them."""
        leaves = self._leaves(batch)
        self._require_gradient()
        jobs = [Job(piece, share) for piece, share in split(leaves, self._accumulate)]
        self._prepare(jobs)
        return leaves, jobs

    def _leaves(self, batch: Any) -> list[Tensor]:
        """The batch's tensors in the graph's order; the first batch starts everything."""
        self._require_run()
        if self._graph is None:
            self._start(self._planned if self._planned is not None else self._captured(batch, train=True))
        while self._pending:
            self._pending[0].bring()  # one that fails says so with every batch
            del self._pending[0]
        assert self._graph is not None
        return check_batch(self._graph, batch, vary=None)

    def _start(self, graph: Graph) -> None:
        """Check that plan and model belong together, and build the engines."""
        self.plan.check_graph(graph)
        self._check_model(graph)
        values: Values = tape_of(self.model) or whole_values(self.model, self._loss)
        squeezes = {rank: s for s in self.plan.squeezes for rank in s.ranks}
        self.driver.setup(graph, self.plan.assignment, self._recipe, values, squeezes)
        self._graph = graph
        self._ready.add(graph_key(graph))
        self._nbytes = max(sum(kept.values()) for kept in self.driver.memory())

    def _check_model(self, graph: Graph) -> None:
        """The model must still be what was captured."""
        from weft.errors import PlanMismatch

        now = dict(named_tensors(self.model, self._loss))
        for role in ("parameter", "buffer"):
            for node in graph.of(role):  # type: ignore[arg-type]
                spec, tensor = node.outputs[0], now.get(node.target)
                found = "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
                if tensor is None or tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                    raise PlanMismatch(
                        "model",
                        f"{node.target!r} of {spec.shape} {spec.dtype}",
                        found,
                        "It has changed since; plan again.",
                    )

    def _prepare(self, jobs: list[Job]) -> None:
        """Make sure that there is a program for the sizes of every job."""
        assert self._graph is not None
        for job in jobs:
            if job.key in self._ready:
                continue
            batch = unflatten_batch(self._graph.batch, job.leaves)
            self.driver.add(self._captured(batch, job.train))
            self._ready.add(job.key)

    def _captured(self, batch: Any, train: bool) -> Graph:
        """The model's graph for a batch that the plan's own graph, if it has one, is not for."""
        try:
            return capture(self.model, batch, self._loss, train=train)
        except ValueError as error:
            if self._loss is not None:
                raise
            raise ValueError(
                f"weft.run was given no loss=, and the model without one cannot be captured for this batch; if the plan was made "
                f"with a loss, pass the same loss= (a plan in a file does not hold it). {error}"
            ) from error

    def _options(self) -> list[dict[str, Any]]:
        """Of each group, in force now."""
        return copy.deepcopy([plain_options(group) for group in self.optimizer.param_groups])

    def _count(self, result: StepResult, leaves: list[Tensor]) -> None:
        self.losses.append(result.loss)
        self.norm, self.peak = result.norm, max(self.peak, result.peak)
        if self.scheduler is not None:
            self.optimizer.step()  # the stand-ins have no gradients: this only tells the schedule that a step was made
            if not _needs_metric(self.scheduler):
                self.scheduler.step()
        self.meter.end(count_tokens(leaves), count_samples(leaves))
        if self._log is not None:
            scalars = {"loss": result.loss, "lr": float(self.optimizer.param_groups[0].get("lr", 0.0))}
            scalars["tokens_per_second"] = self.meter.tokens_per_second
            scalars["samples_per_second"] = self.meter.samples_per_second
            if result.norm is not None:
                scalars["gradient_norm"] = result.norm
            if self.peak:
                scalars["peak_bytes"] = float(self.peak)
            self._log.write(self.steps, scalars)
        if self._progress is not None:
            if self.steps <= 2:
                self._nbytes = max(sum(kept.values()) for kept in self.driver.memory())
            peak = (self.peak, self.plan.prediction.peak) if self.peak else None
            self._progress.show(self.steps, result.loss, self.meter, self._nbytes, peak)
        if self._checkpoint is not None and self._every and self.steps % self._every == 0:
            self.save(self._checkpoint)

    # ---- values

    def sync(self) -> nn.Module:
        """Copy the trained values into the user's model, and return it. A collective under torchrun."""
        own = dict(named_tensors(self.model, self._loss))
        with torch.no_grad():
            for name, value in self._newest():
                if name in own and own[name].device.type != "meta":
                    own[name].copy_(value)
        return self.model

    def _newest(self) -> Iterator[tuple[str, Tensor]]:
        """Whole values of the engines; before the first batch those that wait for it, the last ones last."""
        if self._graph is not None:
            yield from self.driver.values()
            return
        for waiting in self._pending:
            yield from waiting.values().items()

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer and trainer state.

        Under torchrun the tensors are DTensors, for `torch.distributed.checkpoint`; where weft started the processes itself they
        are whole tensors of the model.
        """
        self._require_start("state_dict")
        return {**self.driver.state(), "trainer": self._about()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take weights from whole tensors: a plain module's state dict, or {"model": such}. The optimizer's state stays.

        With a plan read from a file the values are kept until the first batch.

        Raises:
            ValueError: a tensor is missing or has another shape; nothing has been changed.
        """
        self._require_run()
        values = dict(state.get("model", state))
        values = {name: v.full_tensor() if hasattr(v, "full_tensor") else v for name, v in values.items()}
        if self._started():
            self._give(values)
        else:
            self._pending.append(_Waiting(partial(self._give, values), lambda: values))

    def _give(self, values: Mapping[str, Tensor]) -> None:
        """Whole tensors to the engines, by the names of the module's state dict."""
        held = self.names()
        first: dict[str, Tensor] = {held.get(name, name): value for name, value in reversed(list(values.items()))}
        others = {
            n: v for n, v in whole_values(self.model, self._loss).items() if n not in first and n not in held.values()
        }
        self.driver.load_values({**others, **first})

    def save(self, path: str | Path) -> None:
        """Write a checkpoint folder that any plan and any number of processes can load; an older one of that name is replaced."""
        self._require_start("save")
        self.driver.save(Path(path), self._about())

    def load(self, path: str | Path) -> None:
        """Go on from a checkpoint: weights, optimizer state, schedule, step count and random state.

        With a plan read from a file, before the first batch, the tensors are checked now and read then.

        Raises:
            ValueError: no checkpoint there, or one of another model, optimizer, exchange or class of schedule.
            CheckpointDamaged: a file is missing or cut short. Nothing has been changed in either case.
        """
        self._require_run()
        path, early = Path(path), self._graph is None
        index = checkpoint.check(path) if early else checkpoint.read_index(path)
        checkpoint.check_schedule(index, _kind(self.scheduler))
        if early:  # what is wrong is said before any process is asked
            checkpoint.check_optimizer(index, self._recipe)
        if self._started():
            self._go_on(self._read(path))
        else:
            self._pending = [_Waiting(partial(self._read, path), partial(checkpoint.read_values, index))]
            self._go_on(checkpoint.read_about(index))
            self.driver.last_step = int(index["steps"])

    def _started(self) -> bool:
        """Whether there are engines. A plan of this process has them built now; one from a file needs a batch, to capture."""
        if self._graph is None and self._planned is not None:
            self._start(self._planned)
        return self._graph is not None

    def _read(self, path: Path) -> dict[str, Any]:
        """Have the engines read a checkpoint; what `_about` gave for it."""
        about = self.driver.load(path)
        self._sent = []  # options there are those of the last step, and here those of the next
        if about.get("remark"):
            warnings.warn(about["remark"], stacklevel=3)
        return about

    def _go_on(self, about: Mapping[str, Any]) -> None:
        self.losses = list(about["losses"])
        for group, options in zip(self.optimizer.param_groups, about["groups"], strict=True):
            group.update(plain_options(options))
        if self.scheduler is not None and about.get("scheduler") is not None:
            self.scheduler.load_state_dict(about["scheduler"])
        if "torch_rng" in about:
            torch.set_rng_state(about["torch_rng"])
        if "python_rng" in about:
            version, numbers, rest = about["python_rng"]
            random.setstate((version, tuple(numbers), rest))

    def _about(self) -> dict[str, Any]:
        """What a checkpoint keeps besides tensors: values that `torch.load(weights_only=True)` reads."""
        version, numbers, rest = random.getstate()
        return {
            "losses": list(self.losses),
            "groups": self._options(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "schedule": _kind(self.scheduler),
            "torch_rng": torch.get_rng_state(),
            "python_rng": [version, list(numbers), rest],
            "names": self.names(),
        }

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters and buffers, one at a time, each valid until the next is asked for. A collective under torchrun."""
        self._require_start("values")
        return self.driver.values()

    def names(self) -> dict[str, str]:
        """Each name of the original module's state dict -> the name under which weft holds it (tied weights share one)."""
        first: dict[int, str] = {}
        held = {name: first.setdefault(id(tensor), name) for name, tensor in named_tensors(self.model)}
        return {name: held[name] for name in self.model.state_dict() if name in held}

    def export(self, path: str | Path) -> Path:
        """Write the weights as one safetensors file that the original module loads; see `export.export`."""
        from weft.runtime.export import export

        return export(self, path)

    def memory(self) -> list[dict[str, int]]:
        """Bytes kept between steps, by what they are; one entry per process that this one can see."""
        self._require_start("memory")
        return self.driver.memory()

    def _require_start(self, what: str) -> None:
        if self._graph is None:
            raise ValueError(f"{what}: nothing has been built yet; make a step (or evaluate a batch) first")

    def _require_run(self) -> None:
        if self._ended:
            raise ValueError("this run has ended; make steps inside of `with weft.run(...) as trainer:`")

    def _require_gradient(self) -> None:
        """Torch's own error would come out of the middle of a step, in every process."""
        assert self._graph is not None
        if not self._graph.spec(self._graph.loss).requires_grad:
            raise ValueError(
                "there is nothing to train: the loss does not depend on the parameters differentiably (it is a whole number, or "
                "detached); evaluate(batch) needs no gradient"
            )

    # ---- the end

    def close(self, error: BaseException | None = None) -> None:
        """End the run: a checkpoint if one was asked for, values into the user's model, processes gone."""
        usable = error is None or self._usable_after(error)
        self._ended = True
        with contextlib.ExitStack() as ends:
            ends.callback(self.driver.close, broken=not usable)
            for shown in (self._progress, self._log):
                if shown is not None:
                    ends.callback(shown.close)
            if usable:
                with self.driver.held():
                    self.sync()  # first: a full disk does not lose the values
                    if self._checkpoint is not None and self._graph is not None:
                        self.save(self._checkpoint)

    def _usable_after(self, error: BaseException) -> bool:
        """Whether the run is as its last step left it: the error is of the user's own code, and no other process waits.

        An error after a command that failed is taken for that command's.
        """
        agreed = isinstance(error, KeyboardInterrupt) or self.driver.alone
        return agreed and self.driver.failure is None and not isinstance(error, GeneratorExit)


class _Waiting(NamedTuple):
    """Values that came before the first batch, for a plan that needs one to start."""

    bring: Callable[[], Any]  # them to the engines
    values: Callable[[], Mapping[str, Tensor]]  # whole, for the model of a run without a batch


def _changed(options: list[dict[str, Any]], sent: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each group those options that differ from what was sent; all if nothing is known of that."""
    return [
        {key: value for key, value in group.items() if key not in before or before[key] != value}
        for group, before in zip(options, sent or [{} for _ in options], strict=True)
    ]


def _schedule(scheduler: Callable[[Any], Any], optimizer: torch.optim.Optimizer) -> Any:
    made = scheduler(optimizer)
    if not callable(getattr(made, "step", None)):
        raise ValueError(
            f"run: scheduler must give a torch.optim.lr_scheduler when called with an optimizer, got {made!r}; give "
            "lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)"
        )
    return made


def _kind(scheduler: Any) -> str:
    """A schedule's class, with those that it is made of; "" for none."""
    parts = ", ".join(map(_kind, getattr(scheduler, "_schedulers", ())))
    name = type(scheduler).__name__ if scheduler is not None else ""
    return f"{name}({parts})" if parts else name


def _needs_metric(scheduler: Any) -> bool:
    """ReduceLROnPlateau is stepped by the user, with a validation loss."""
    return isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
