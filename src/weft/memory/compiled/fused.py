"""Plans for inductor's fused kernels, whose bytes cannot be worked out beforehand and are watched instead.

Inductor takes the partition function as it is: what is saved and what is computed again are as planned, and so are the bits.
But it fuses operators, whose results between them then never exist, and reorders what is left, so that a step holds less than
planned, or, now and then, more. `Watch` reads the meter when a step's backward is over: an excess is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import fx

from weft.errors import BudgetError
from weft.memory.meters import Meter, meter
from weft.memory.private import inductor

__all__ = ["Watch", "compile_fused"]


def compile_fused(
    module: fx.GraphModule, example_inputs: Sequence[Any], partition: Callable[..., Any]
) -> Callable[..., Any]:
    """Compile a graph by inductor, cut in two by `partition`."""
    parts = inductor()

    class Partition(parts.partitioner):  # type: ignore[misc, name-defined]
        def __call__(self, graph: fx.GraphModule, inputs: Any, **options: Any) -> Any:
            options.pop("compiler", None)
            return partition(graph, inputs, **options)

        def uuid(self) -> None:
            return None  # a plan depends on the budget, so its kernels are not taken from inductor's cache

    with parts.options.patch(custom_partitioner_fn=Partition()):
        compiled: Callable[..., Any] = parts.compile_fx(module, example_inputs)
    return compiled


@final
class Watch:
    """Bytes of tensors during the steps of fused graphs, compared with the budget when a step's backward is over.

    Raises:
        RuntimeError: (`before`) bytes cannot be counted here, so that an excess would not be seen.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self._meter: Meter | None = None
        self._judged = True

    def before(self, tensors: Sequence[torch.Tensor]) -> None:
        """A call on `tensors` begins. A step that had no backward is judged now."""
        if self._meter is None:
            self._meter = meter(device=tensors[0].device if tensors else "cpu")
            if not self._meter.exact:
                raise RuntimeError(
                    f"compiler='inductor' needs its bytes counted, and {self._meter.note}; use compiler='eager'"
                )
        if not self._judged:
            self.judge()
        self._meter.count(list(tensors), "input")
        self._meter.reset_peak()
        self._judged = False

    def after(self, results: Any) -> None:
        """The call has returned `results`: judge the step when their gradients have been computed."""
        for result in results if isinstance(results, (list, tuple)) else (results,):
            node = getattr(result, "grad_fn", None)
            if node is not None:
                node.register_hook(lambda *_: self.judge())

    def judge(self, *_: Any) -> None:
        """
        Raises:
            BudgetError: since the call began, more bytes were held than the budget allows.
        """
        assert self._meter is not None
        self._judged = True
        peak = self._meter.peak
        if peak > self.budget:
            raise BudgetError(
                self.budget,
                0,
                f"this step held {peak:,} bytes, more than planned, since inductor fuses and reorders operators. "
                "compiler='eager' follows the plan to the byte",
            )
