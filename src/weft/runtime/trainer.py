"""The trainer: what a user holds while a model trains.

    step        a global batch in, the global loss out                     sync, export   weights back into the model, into a file
    evaluate    the loss, nothing trained                                  save, load     checkpoints of everything
    gradients   the loss and whole gradients, nothing trained              state_dict     the same as values

It captures the model for each set of batch sizes that occurs (programs are kept), cuts batches into micro-batches, runs the
learning-rate schedule, and leaves the work to a `Driver`. The schedule acts on a stand-in optimizer of the user's class and
groups (`Trainer.optimizer`), whose options go to every process with each step: change `param_groups` there as in plain torch.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from weft.graph import capture, check_batch, flatten_batch, unflatten_batch
from weft.graph.graph import Graph
from weft.placement.deferred import tape_of
from weft.runtime.batches import count_samples, count_tokens, split
from weft.runtime.driver import Driver, Values, named_tensors, whole_values
from weft.runtime.engine import Job, StepResult, graph_key
from weft.runtime.optimizer import recipe
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
        # What the processes make of the same recipe, but for what depends on the parameters themselves (`fused`).
        self._sent: list[dict[str, Any]] = [{} for _ in self.optimizer.param_groups]
        self._changed_options()
        self.scheduler = scheduler(self.optimizer) if scheduler is not None else None
        self._checkpoint = Path(checkpoint) if checkpoint is not None else None
        self._every = checkpoint_every
        first = driver.rank == 0
        self._progress = Progress() if progress and first else None
        self._log = Log(log_dir) if log_dir is not None and first else None
        self._nbytes = 0
        self._ended = False
        self._pending: tuple[str, Any] | None = None  # values or a checkpoint that came before the first batch

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
        leaves = self._leaves(batch)
        self._require_gradient()
        jobs = [Job(piece, share) for piece, share in split(leaves, self._accumulate)]
        self._prepare(jobs)
        result = self.driver.step(jobs, self._changed_options())
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
        leaves = self._leaves(batch)
        self._require_gradient()
        jobs = [Job(piece, share) for piece, share in split(leaves, self._accumulate)]
        self._prepare(jobs)
        return self.driver.gradients(jobs)

    def _leaves(self, batch: Any) -> list[Tensor]:
        """The batch's tensors in the graph's order; the first batch starts everything."""
        self._require_run()
        if count_samples(flatten_batch(batch)[0]) == 0:
            raise ValueError("batch: it is empty: its tensors have no rows")
        if self._graph is None:
            self._start(batch)
        assert self._graph is not None
        return check_batch(self._graph, batch, vary=None)

    def _start(self, batch: Any) -> None:
        """Check that plan and model belong together, and build the engines."""
        graph = self.plan.graph
        if graph is None:
            graph = self._captured(batch, train=True)
        self.plan.check_graph(graph)
        self._check_model(graph)
        values: Values = tape_of(self.model) or whole_values(self.model, self._loss)
        squeezes = {rank: s for s in self.plan.squeezes for rank in s.ranks}
        self.driver.setup(graph, self.plan.assignment, self._recipe, values, squeezes)
        self._graph = graph
        self._ready.add(graph_key(graph))
        self._nbytes = max(sum(kept.values()) for kept in self.driver.memory())
        pending, self._pending = self._pending, None
        if pending is not None:
            getattr(self, pending[0])(pending[1])

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

    def _changed_options(self) -> list[dict[str, Any]]:
        """Options of each group that differ from what the processes have."""
        changed = []
        for group, sent in zip(self.optimizer.param_groups, self._sent, strict=True):
            new = {k: _plain(v) for k, v in group.items() if k != "params" and (k not in sent or sent[k] != _plain(v))}
            sent.update(copy.deepcopy(new))
            changed.append(new)
        return changed

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
        if self._graph is None:
            return self.model
        own = dict(named_tensors(self.model, self._loss))
        with torch.no_grad():
            for name, value in self.driver.values():
                if name in own and own[name].device.type != "meta":
                    own[name].copy_(value)
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer and trainer state.

        Under torchrun the tensors are DTensors, for `torch.distributed.checkpoint`; where weft started the processes itself they
        are whole tensors of the model.
        """
        self._require_start("state_dict")
        return {**self.driver.state(), "trainer": self._about()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take weights from whole tensors: a plain module's state dict, or {"model": such}. The optimizer starts afresh.

        Before the first batch the values are kept until then.

        Raises:
            ValueError: a tensor is missing or has another shape; nothing has been changed.
        """
        self._require_run()
        if self._graph is None:
            self._pending = ("load_state_dict", state)
            return
        values = dict(state.get("model", state))
        values = {name: v.full_tensor() if hasattr(v, "full_tensor") else v for name, v in values.items()}
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

        Before the first batch it is checked now and read then.

        Raises:
            ValueError: no checkpoint there, or one of another model, optimizer or exchange.
            CheckpointDamaged: a file is missing or cut short. Nothing has been changed in either case.
        """
        from weft.runtime.checkpoint import check

        self._require_run()
        if self._graph is None:
            check(Path(path))
            self._pending = ("load", path)
            return
        about = self.driver.load(Path(path))
        if about.get("remark"):
            warnings.warn(about["remark"], stacklevel=2)
        self.losses = list(about.get("losses", []))
        for group, options in zip(self.optimizer.param_groups, about.get("groups", []), strict=False):
            group.update(options)
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
            "groups": [{k: _plain(v) for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups],
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
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
        from weft.errors import WorkerDied

        lost = isinstance(error, WorkerDied)
        usable = not lost and (error is None or isinstance(error, KeyboardInterrupt))
        self._ended = True
        try:
            if usable and self._graph is not None:
                if self._checkpoint is not None:
                    self.save(self._checkpoint)
                self.sync()
        finally:
            self.driver.close(broken=not usable)
            if self._progress is not None:
                self._progress.close()
            if self._log is not None:
                self._log.close()


def _plain(value: Any) -> Any:
    """An option as a value that can be sent and compared."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _needs_metric(scheduler: Any) -> bool:
    """ReduceLROnPlateau is stepped by the user, with a validation loss."""
    return isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
