"""Whether a run sends its gradients by a code: `weft.run(..., exchange="auto")`.

Problem    a code saves seconds on the wire and costs seconds of the processor, and what backward hides costs nothing.
Method     the plan predicts the step S with all-reduce, its communication C and the part E of it that nothing hides; so backward
           hides at least W = C - E. With the cluster's link and the codec seconds measured here, on the first process, the
           candidates of `weft.comm.auto` are predicted as there                                       `Choice.pick`
               step of a candidate = S - (what of E the wire explains) + codec + max(wire / buckets, wire - W)
Guarantee  a candidate is taken only if it is predicted to save more than `auto`'s margin of S, else plain all-reduce; never where
           a gradient is not owed to all processes alike. Every process takes the same.
Source     weft.comm.automatic, which tries its choice as well; a run does not, as another program could not go on in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
import torch.distributed as dist

from weft.cluster import Cluster, Link
from weft.cluster.costs import all_reduce
from weft.comm import Exchange, Spec
from weft.comm.agree import announce
from weft.comm.automatic import Auto, Trial

if TYPE_CHECKING:
    from weft.planner import Plan

__all__ = ["Choice", "link_of"]

NBYTES = 1 << 24  # of the all-reduce that shows a link's bandwidth: of a model, not of a message


def link_of(cluster: Cluster) -> Link:
    """The link on which a ring of all devices costs what an all-reduce costs on the cluster, at 8 bytes and at `NBYTES`.

    >>> link = link_of(Cluster.local(processes=2))
    >>> link.latency > 0 and link.bandwidth > 0
    True
    """
    ranks = range(len(cluster))
    n = len(cluster)
    if n == 1:
        return Link(0.0, 1e12)
    small, large = all_reduce(cluster, ranks, 8), all_reduce(cluster, ranks, NBYTES)
    return Link(small / (2 * (n - 1)), 2 * (n - 1) / n * (NBYTES - 8) / max(large - small, 1e-12))


@final
@dataclass(frozen=True, eq=False)
class Choice:
    """What is to be chosen from when the run's processes are there.

    Attributes:
        auto: candidates and margin; its link, or else the cluster's.
        link: between the processes.
        seconds, communication, exposed: of the plan's predicted step.
    """

    auto: Auto
    link: Link
    seconds: float
    communication: float
    exposed: float

    @classmethod
    def of(cls, auto: Auto, plan: Plan) -> Choice:
        p = plan.prediction
        return cls(auto, auto.link or link_of(plan.cluster), p.seconds, p.communication, p.exposed)

    def predict(self, specs: Sequence[Spec], ranks: int, buckets: int) -> dict[str, float]:
        """Predicted step seconds of "plain" and of every candidate."""
        trial = Trial(self.seconds, max(self.communication - self.exposed, 0.0), self.exposed, buckets)
        return self.auto.predict(specs, ranks, trial, self.link)

    def pick(self, specs: Sequence[Spec], ranks: int, buckets: int, device: torch.device) -> str:
        """The name of the exchange to use, or "plain"; every process of the default group calls this."""
        name = ""
        if dist.get_rank() == 0:
            name = self.auto.choose(self.predict(specs, ranks, buckets))
        world = dist.group.WORLD
        assert world is not None
        return str(announce(name, world, device))

    def fitting(self, options: str) -> str:
        """The candidate with these options (`Exchange.options`), "" if there is none."""
        found = self.auto.candidates()
        return next((name for name in sorted(found) if found[name].options == options), "")

    def make(self, name: str) -> Exchange | None:
        return None if name == "plain" else self.auto.candidates()[name]
