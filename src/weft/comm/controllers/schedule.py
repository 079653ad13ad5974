"""A setting for every step, written down beforehand: warm-up.

    step        0 .. s-1      s .. 2s-1     ...     from len(warmup) s on
    setting     warmup[0]     warmup[1]     ...     final

Deep Gradient Compression begins with dense-ish exchange, as early gradients are large and change quickly, and sends less from
epoch to epoch: 25 %, 6.25 %, 1.5625 %, 0.4 %, then 0.1 %. Its public code computes other ratios than its paper gives, so weft
takes the list. Source: Lin et al., arXiv:1712.01887, section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from weft.comm.codec import Setting, Spec
from weft.comm.controller import Controller, Total, alone

__all__ = ["Schedule"]


@final
@dataclass(frozen=True)
class Schedule(Controller):
    """Decided by the step alone, the same for all tensors, on every rank without a word.

    Attributes:
        warmup: settings of the codec, in order, at least one; any sequence, kept as a tuple.
        final: the setting after them.
        stage_steps: steps each holds, >= 1: those of one epoch.
    """

    warmup: Sequence[Setting]
    final: Setting
    stage_steps: int = 100

    agreed = True
    needs_gradient = False

    def __post_init__(self) -> None:
        if isinstance(self.warmup, str) or not isinstance(self.warmup, Sequence) or not len(self.warmup):
            raise ValueError(
                f"Schedule: warmup must be a list of at least one setting, got {self.warmup!r}; leave the schedule out for none"
            )
        if self.stage_steps < 1:
            raise ValueError(f"Schedule: stage_steps must be >= 1, got {self.stage_steps}; give the steps of one epoch")
        object.__setattr__(self, "warmup", tuple(self.warmup))

    @property
    def every(self) -> int:  # type: ignore[override]
        """Steps between changes."""
        return self.stage_steps

    def setting(self, step: int) -> Setting:
        """What holds at a step.

        >>> [Schedule([0.25, 0.04], 0.01, stage_steps=10).setting(step) for step in (0, 9, 10, 20, 1000)]
        [0.25, 0.25, 0.04, 0.01, 0.01]
        """
        stage = step // self.stage_steps
        return self.warmup[stage] if stage < len(self.warmup) else self.final

    def initial(self, spec: Spec, default: Setting) -> Setting:
        """The last: what costs are predicted with. Decisions begin with step 0, so that it is not in force before its time."""
        return self.final

    def observe(self, spec: Spec, gradient: Any, step: int) -> None:
        return None

    def decide(self, step: int, specs: Mapping[str, Spec], total: Total = alone) -> Mapping[str, Setting]:
        return dict.fromkeys(specs, self.setting(step))
