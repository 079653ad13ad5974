"""Ways of training the same model in fewer bytes, in turns in one process: what recomputing costs at a given peak.

    eager            everything is kept
    checkpoint       `torch.utils.checkpoint` around every block
    torch's budget   `torch._functorch.config.activation_memory_budget` in `torch.compile`
    weft             `weft.memory.limit`

A step is forward and backward on real text; gradients are allocated before (the peaks are of activations and workspace, as in
the papers). Every way takes its turn in every round, there and back again. Seconds are CPU seconds; what a machine shared with
others does to a whole round is taken out of all ways alike: with x[w, r] those of way w in round r,

    level[r]   = geometric mean over w of x[w, r]
    seconds[w] = median over r of x[w, r] / level[r] * median over r of level[r]

Peaks are read from the allocator in rounds of their own.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from weft.bench.turns import there_and_back, watch

__all__ = ["Way", "checkpointed", "compiled", "eager", "gpt_with_dropout", "limited", "measured", "take_turns"]

WARM_UP = (
    12  # steps: weft watches two, plans, then replays, the first eight with care; a compiler compiles in the first
)


@dataclass
class Way:
    """One way of running steps of a model of its own.

    Attributes:
        model: called as `model(*batch)`, returns the loss.
        around: entered around its steps whenever it is its turn.
        end_step: called after each step.
        seconds: CPU seconds of each timed step. peak: most activation bytes of a step. loss: of the last step.
    """

    name: str
    model: Any
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    end_step: Callable[[], None] = lambda: None
    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    peak: int = 0
    loss: float = float("nan")

    def step(self, batch: Any, seed: int) -> None:
        """Forward and backward from a seeded generator, gradients zeroed in place."""
        import torch

        for parameter in self.model.parameters():
            parameter.grad.zero_()
        torch.manual_seed(seed)
        loss = self.model(*batch)
        loss.backward()
        self.loss = float(loss.detach())
        del loss
        self.end_step()


def gpt_with_dropout(seed: int) -> tuple[Any, Any]:
    """(model, batch): the GPT of the Coop card: 6 layers of 256, batch 8 x 256 tokens of real text, dropout 0.1.

    Attention weights have no dropout, so that torch computes attention in one operator; with a vocabulary of 2048 eager
    needs the card's 268 MiB.
    """
    from itertools import islice

    import torch

    from weft.nn import GPT, GPTOptions
    from weft.tasks import language_model

    torch.manual_seed(seed)
    model: Any = GPT(GPTOptions(vocabulary=2048, context=256, layers=6, heads=8, width=256, dropout=0.1))
    for block in model.blocks:
        block.attention.dropout = 0.0
    [batch] = islice(language_model(context=256, batch_size=8, seed=seed).batches(), 1)
    return model.train(), batch


def eager(model: Any) -> Way:
    """Everything is kept."""
    return Way("eager", _with_gradients(model))


def checkpointed(model: Any) -> Way:
    """Every block under `torch.utils.checkpoint`, its generator state kept."""
    from torch.utils.checkpoint import checkpoint

    model = _with_gradients(model)
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return Way("checkpoint per block", model)


def compiled(model: Any, share: float) -> Way:
    """Compiled with torch's own memory budget, in (0, 1); graphs run operator by operator, as eager torch does.

    Only the way made last is valid: compiled programs are kept by the model's class.
    """
    import torch
    import torch._dynamo
    import torch._functorch.config as functorch

    torch._dynamo.reset()  # another share is another program, which the compiler's cache does not know
    model = _with_gradients(model)
    module = torch.compile(model, backend="aot_eager_decomp_partition")
    return Way(f"torch budget {share:g}", module, lambda: functorch.patch(activation_memory_budget=share))


def limited(model: Any, nbytes: int, label: str, replay: bool = True) -> Way:
    """Within `nbytes` of activations and workspace, by `weft.memory.limit`; parameters and gradients come on top.

    It is entered once and rests while others take their turns: what a loop does once is not what its steps cost.
    """
    from weft.memory import limit

    model = _with_gradients(model)
    held = 2 * sum(p.untyped_storage().nbytes() for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    context = limit(held + nbytes, model=model, replay=replay)

    @contextmanager
    def turn() -> Iterator[None]:
        if context.resting:
            context.wake()
        else:
            context.__enter__()
        yield
        context.rest()

    return Way(label, model, turn, context.step)


def take_turns(ways: list[Way], batch: Any, rounds: int) -> None:
    """Run every way in turn and fill in what it measured. Raises whatever a way raises, its name added."""
    for way in ways:
        if not way.peak:
            with _named(way), way.around():
                for _ in range(WARM_UP):
                    way.step(batch, seed=0)
                way.peak = _peak(way, batch)
    for number in range(rounds):
        for way in there_and_back(ways, number):
            with _named(way), way.around():
                with watch() as taken:
                    way.step(batch, seed=number)
                way.seconds.append(taken.cpu)
                way.wall.append(taken.wall)


def measured(ways: list[Way]) -> list[dict[str, float]]:
    """What the row of each way shows; seconds as in the head of this file."""
    cpu, wall = (_levelled(list(taken)) for taken in ((w.seconds for w in ways), (w.wall for w in ways)))
    return [
        {"cpu_seconds": c, "wall_seconds": w, "activation_bytes": way.peak, "loss": way.loss}
        for way, c, w in zip(ways, cpu, wall, strict=True)
    ]


def _levelled(taken: list[list[float]]) -> list[float]:
    """One number per way of what each took in every round."""
    levels = [statistics.geometric_mean(round_) for round_ in zip(*taken, strict=True)]
    usual = statistics.median(levels)
    return [statistics.median(x / level for x, level in zip(row, levels, strict=True)) * usual for row in taken]


def _peak(way: Way, batch: Any) -> int:
    """Most bytes of a step beyond those that are there before it, parameters and gradients left out."""
    from weft.memory import meter

    with meter(way.model) as counter:
        before = counter.live
        counter.reset_peak()
        way.step(batch, seed=0)
        return int(counter.peak - before)


def _with_gradients(model: Any) -> Any:
    import torch

    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


@contextmanager
def _named(way: Way) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"while running {way.name!r}")
        raise
