"""One process's part of training: runs the local program, owns the parameters, updates its pieces.

    a step      forward and backward of each micro-batch, gradients reduced meanwhile   `Engine.accumulate`
                clip by the global norm, run the optimizer on pieces, gather            `Engine.update`
                both, within the bytes that the plan allows                             `Engine.step`
    values      whole tensors in, whole tensors out, one at a time                      `Engine.load`, `Engine.whole`

An engine does not talk to users: `trainer.Trainer` drives one in this process, `launch.Controller` one in each process that
it started. Every process runs the same calls in the same order; those marked *collective* communicate.

Loss: the global loss is the sum over devices of (local loss x seed), see `LocalModule.seed`; with micro-batches of n_i of N
samples each counts n_i / N. One all-reduce per step brings it, and whether somebody asked to stop, to every process; it is
under way during backward.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from weft.cluster import Tier
from weft.comm import Exchange
from weft.errors import BudgetError, NotFinite, PeerLost
from weft.graph.graph import Graph, Ref
from weft.placement.assignment import Assignment, refit
from weft.placement.axes import find_cuts
from weft.placement.boxing import box
from weft.placement.comms import Comms
from weft.placement.layout import Mesh, Replicate, take
from weft.placement.localize import LocalModule, localize
from weft.runtime.batches import held
from weft.runtime.budget import Keeper
from weft.runtime.choice import Choice
from weft.runtime.coded import Coded, code
from weft.runtime.evaluation import for_evaluation
from weft.runtime.optimizer import Recipe, check_elementwise
from weft.runtime.store import ParameterStore

__all__ = ["Engine", "Job", "Options", "StepResult", "connect", "graph_key", "shape_key"]

Key = tuple[Any, ...]  # of a program: shapes of the batch's leaves, and whether it trains


@dataclass(frozen=True)
class Options:
    """What a run may choose; checked where the user gives it (`run.run`).

    Attributes:
        clip_norm: largest Euclidean norm of the whole gradient; None leaves it as it is.
        autocast: dtype in which autocast runs matrix products; None for none.
        seed: of the run's random operators (dropout); the same on every process.
        check_finite: raise `NotFinite` before the optimizer runs on a NaN or infinite loss.
        timeout: seconds that any wait may take before the run is given up.
        measure: count bytes, for `StepResult.peak`; alike on every process, and on where any of them has a budget.
        exchange: how gradients travel along the axes that sum all of them, or what that is chosen from; None for all-reduce.
    """

    clip_norm: float | None = None
    autocast: torch.dtype | None = None
    seed: int = 0
    check_finite: bool = True
    timeout: float = 600.0
    measure: bool = False
    exchange: Exchange | Choice | None = None


@dataclass(frozen=True)
class Job:
    """A micro-batch: its leaves (whole, on every process), and its share of the step's samples."""

    leaves: Sequence[Tensor]
    weight: float = 1.0
    train: bool = True

    @property
    def key(self) -> Key:
        return shape_key(self.leaves, self.train)


@dataclass(frozen=True)
class StepResult:
    """What a step has come to.

    Attributes:
        loss: global, before the update.
        norm: of the gradient before clipping; None without.
        stop: some process wants to.
        steps: updates made so far: one that was skipped is none.
        peak: most bytes of tensors on any one process at any moment so far; 0 if nothing measures them. Of other processes,
            as far as this one has heard: up to the last micro-batch's backward.
    """

    loss: float
    norm: float | None = None
    stop: bool = False
    peak: int = 0
    steps: int = 0


def shape_key(leaves: Sequence[Tensor], train: bool) -> Key:
    """The program that a batch needs: there is one for each set of sizes."""
    return (train, *(tuple(leaf.shape) for leaf in leaves))


def graph_key(graph: Graph) -> Key:
    """`shape_key` of the batches that a graph is for."""
    return (graph.train, *(tuple(node.outputs[0].shape) for node in graph.of("input")))


def connect(mesh: Mesh) -> Comms:
    """This process's groups for a mesh; a mesh of one device needs no process group.

    Raises:
        ValueError: the mesh has another number of devices than there are processes.
    """
    import torch.distributed as dist

    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size != mesh.size:
        raise ValueError(
            f"the plan is for {mesh.size} devices (mesh {mesh.shape}), but this run has {world_size} processes; start as many, "
            "or plan for this number"
        )
    if mesh.size == 1 and not dist.is_initialized():
        from weft.placement.comms import thread_comms

        return thread_comms(mesh)[0]
    return Comms.torch(mesh)


class Engine:
    """The state of one process.

    Args:
        graph: the captured model at the sizes that were planned for.
        assignment: the plan's placements.
        comms: of the plan's mesh.
        wanted: the user's optimizer.
        budget: bytes of tensors that a step may take here, everything included; None for no limit.
        tier: where activations may wait that do not fit, besides being made again.
    Attributes:
        store: parameters and their pieces.
        buffers: local pieces of the model's buffers.
        optimizer: over the pieces.
        steps: updates made so far.
        keeper: of the budget.
        coded: what sends gradients in place of all-reduce, if anything.
    """

    def __init__(
        self,
        graph: Graph,
        assignment: Assignment,
        comms: Comms,
        wanted: Recipe,
        options: Options,
        device: torch.device | str = "cpu",
        budget: int | None = None,
        tier: Tier | None = None,
    ):
        self.graph, self.assignment, self.comms, self.options = graph, assignment, comms, options
        self.device = torch.device(device)
        self.store = ParameterStore(graph, assignment, comms, self.device)
        self.cuts = find_cuts(graph, finest=assignment.mesh.size, allow_replicated=True)
        self.programs: dict[Key, LocalModule] = {}
        # Entries of a batch, by position on the mesh; counted only if a rule asks.
        self._held: dict[Key, Callable[[], Mapping[tuple[int, ...], int]]] = {}
        self.buffers: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}  # buffers that steps write, as they were before the one under way
        self.add(graph)
        trainable = {name: p for name, p in self.store.pieces.items() if self.store.holdings[name].trainable}
        if not trainable:
            raise ValueError("the model has no parameter that requires a gradient and takes part in the loss")
        check_elementwise(wanted, [n for n in trainable if trainable[n].shape != self.store.holdings[n].shape])
        self.optimizer = wanted.build(trainable)
        self.coded: Coded | None = None
        if options.exchange is not None and comms.world.size > 1:
            pick = lambda choice: choice.pick(graph, assignment, self.cuts, self.device)
            self.coded = code(options.exchange, self.store.reduced, self.optimizer, pick)
        self.wanted = wanted
        self.steps = 0
        self.stop_requested = False
        self._losses = comms.world
        buffers = (*self.buffers.values(), *self._before.values())
        self.keeper = Keeper(
            self.store, buffers, self.device, comms.rank, budget, options.measure, tier, self.optimizer
        )

    def take_exchange(self, name: str) -> None:
        """Go on with that one of the exchanges that there are to choose from; collective."""
        if self.coded is not None:
            self.coded.exchange.close()
        wanted = self.options.exchange
        assert wanted is not None
        self.coded = code(wanted, self.store.reduced, self.optimizer, lambda choice: name)

    # ---- programs

    def add(self, graph: Graph) -> None:
        """Make the local program for a graph of the same model, at other sizes or in evaluation mode."""
        same = graph is self.graph
        if same:
            assignment = self.assignment
        elif graph.train == self.graph.train:
            assignment = refit(self.assignment, self.graph, graph)
        else:
            assignment = for_evaluation(self.assignment, self.graph, graph)
        program = localize(
            graph, assignment, self.comms.rank, self.comms, buckets=self.store.gathered, leaves=self.store.leaves,
            buffers=self.buffers, device=self.device, cuts=self.cuts if same else None,
        )  # fmt: skip
        program.hooks = self.store
        self.buffers = program.local_buffers
        self.programs[graph_key(graph)] = program
        if graph.train:
            self._held[graph_key(graph)] = functools.cache(functools.partial(held, graph, assignment))
            written = {graph[ref.node].target for node in graph.calls for ref in node.mutates}
            self._before.update(
                {name: self.buffers[name].clone() for name in written & {*self.buffers} - {*self._before}}
            )

    def _program(self, job: Job) -> LocalModule:
        try:
            return self.programs[job.key]
        except KeyError:
            raise ValueError(f"no program for a batch of shapes {job.key[1:]}; Engine.add its graph first") from None

    # ---- steps (collective)

    def step(self, jobs: Sequence[Job], options: Sequence[Mapping[str, Any]] | None = None) -> StepResult:
        """`accumulate` and `update`, within the budget.

        Raises:
            BudgetError: the step cannot be done within it. Others wait for this process by then: the run is over.
        """
        with self.keeper.step(leaf for job in jobs for leaf in job.leaves):
            result = self.update(self.accumulate(jobs), options)
        return replace(result, peak=max(result.peak, self.keeper.peak), steps=self.steps)

    def accumulate(self, jobs: Sequence[Job]) -> StepResult:
        """Global loss of the micro-batches, and its gradient in the pieces."""
        try:
            return self._accumulate(jobs)
        except (PeerLost, BudgetError):
            raise  # the run is over: nothing to tidy, and waiting for what is under way would not end
        except Exception:
            self._abandon()
            raise

    def _accumulate(self, jobs: Sequence[Job]) -> StepResult:
        here, measured = 2 + self.comms.world.index, self.options.measure
        totals = torch.zeros(2 + measured * self.comms.world.size, dtype=torch.float64, device=self.device)
        _copy(self._before, self.buffers)
        if self.coded is not None:
            self.coded.weigh((job.weight, self._held[job.key]()) for job in jobs)
        for number, job in enumerate(jobs):
            last = number == len(jobs) - 1
            program = self._program(job)
            program.new_step(_mix(self.options.seed, self.steps, number))
            self.store.begin_forward(training=True)
            with self._autocast():
                loss = program(*(leaf.to(self.device, non_blocking=True) for leaf in job.leaves))
            if loss.numel() != 1:
                raise ValueError(
                    f"the loss must be one number, got shape {tuple(loss.shape)}; reduce it with .mean() or .sum()"
                )
            scale = job.weight * program.seed
            totals[0] += loss.detach().double() * scale
            if last:
                totals[1] = float(self.stop_requested)
                if measured:
                    totals[here] = float(self.keeper.peak)
                pending = self._losses.all_reduce_async(totals)
            self.store.begin_backward(last)
            loss.backward(torch.full_like(loss, scale))
            self.store.end_backward()
        pending.wait()
        loss_value, stop, *peaks = totals.tolist()
        return StepResult(loss_value, stop=stop > 0, peak=int(max(peaks, default=0)))

    def update(self, result: StepResult, options: Sequence[Mapping[str, Any]] | None = None) -> StepResult:
        """Clip, and run the optimizer.

        Args:
            result: of `accumulate`.
            options: for each parameter group, options that changed since the last step (the learning rate).
        Raises:
            NotFinite: the loss, or the norm if gradients are clipped, is not; parameters are as they were.
        """
        if options is not None:
            for group, changed in zip(self.optimizer.param_groups, options, strict=True):
                group.update(changed)
        norm = None if self.options.clip_norm is None else float(self.store.gradient_norm())
        skip = self.coded is not None and self.coded.skip()
        if skip and not self.options.check_finite:
            self._abandon()
            return replace(result, norm=norm)
        if skip or (
            self.options.check_finite and not (math.isfinite(result.loss) and (norm is None or math.isfinite(norm)))
        ):
            bad = [name for name, g in self.store.gradients() if not torch.isfinite(g).all()]
            self._abandon()
            raise NotFinite(self.steps + 1, result.loss, bad)
        if self.options.clip_norm is not None and norm is not None:
            if norm > self.options.clip_norm:
                self.store.scale_gradients(self.options.clip_norm / (norm + 1e-6))
        if self.coded is not None:
            self.coded.carry_decay(self.optimizer)
        self.optimizer.step()
        self.store.updated(frozen=False)
        self.steps += 1
        return replace(result, norm=norm)

    def _abandon(self) -> None:
        """Leave the step without an update: everything is as before it."""
        self.store.abandon()
        _copy(self.buffers, self._before)

    def gradients(self, jobs: Sequence[Job]) -> tuple[float, Iterator[tuple[str, Tensor]]]:
        """Loss, and every parameter's whole gradient one at a time; nothing is updated."""
        aside = contextlib.nullcontext() if self.coded is None else self.coded.aside()
        with aside, self.keeper.step(leaf for job in jobs for leaf in job.leaves):
            result = self.accumulate(jobs)
        _copy(self.buffers, self._before)

        def whole() -> Iterator[tuple[str, Tensor]]:
            for name, gradient in list(self.store.gradients()):
                yield name, self.store.whole(name, gradient)
            self.store.abandon()

        return result.loss, whole()

    @torch.no_grad()
    def evaluate(self, job: Job) -> float:
        """Global loss of a batch; nothing is trained."""
        program = self._program(job)
        program.new_step(_mix(self.options.seed, self.steps, 0))
        self.store.begin_forward(training=False)
        with self._autocast():
            loss = program(*(leaf.to(self.device) for leaf in job.leaves))
        self.store.end_forward()
        total = (loss.double() * program.seed).reshape(1)
        return float(self._losses.all_reduce(total))

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.options.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.options.autocast)

    # ---- values (collective)

    @property
    def names(self) -> list[str]:
        """Parameters and buffers, in the same order on every process."""
        return [*self.store.holdings, *(node.target for node in self.graph.of("buffer"))]

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Fill parameters and buffers from whole tensors.

        Raises:
            ValueError: a tensor is missing or has another shape; nothing has been changed.
        """
        shapes = {
            node.target: node.outputs[0].shape for role in ("parameter", "buffer") for node in self.graph.of(role)
        }
        for name, shape in shapes.items():
            if name not in values:
                raise ValueError(f"there is no value for {name!r}, of shape {shape}")
            if tuple(values[name].shape) != shape:
                raise ValueError(f"{name!r} has shape {tuple(values[name].shape)}, but the plan is for {shape}")
        for name in self.names:
            self.load_one(name, values[name])
        self.store.updated()

    @torch.no_grad()
    def load_one(self, name: str, value: Tensor) -> None:
        """Keep this process's piece of a whole tensor; `store.updated()` must follow the last one."""
        if name in self.store.holdings:
            self.store.set_piece(name, self.store.holdings[name].take(value))
        else:
            piece = take(value, self._buffer_placements(name), self.comms.mesh, self.comms.coordinates)
            self.buffers[name].copy_(piece)

    @torch.no_grad()
    def whole(self, name: str) -> Tensor:
        """A whole parameter or buffer; every process must ask for the same."""
        if name in self.store.holdings:
            return self.store.whole(name)
        everywhere = (Replicate(),) * self.comms.mesh.ndim
        placements, shape = self._buffer_placements(name), self._buffer_node(name).outputs[0].shape
        return box(self.buffers[name], placements, everywhere, self.comms, shape)

    def _buffer_node(self, name: str) -> Any:
        return next(node for node in self.graph.of("buffer") if node.target == name)

    def _buffer_placements(self, name: str) -> Any:
        return self.assignment.output(self.graph, Ref(self._buffer_node(name).name))

    def memory(self) -> dict[str, int]:
        """Bytes kept between steps, by what they are."""
        state = sum(
            t.nbytes for values in self.optimizer.state.values() for t in values.values() if isinstance(t, Tensor)
        )
        kept = self.store.nbytes()
        return {**kept, "optimizer": state, "buffers": sum(b.nbytes for b in self.buffers.values())}


@torch.no_grad()
def _copy(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Those that both have."""
    for name in into.keys() & values.keys():
        into[name].copy_(values[name])


def _mix(seed: int, step: int, number: int) -> int:
    """One number for a step's micro-batch; `LocalModule` makes unrelated streams of neighbouring ones."""
    return (seed * 0x9E3779B1 + step * 0x10001 + number) & 0x7FFFFFFFFFFFFFFF
