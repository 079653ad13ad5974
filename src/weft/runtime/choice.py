"""Whether a run sends its gradients by a code: `weft.run(..., exchange="auto")`.

Problem    a code saves seconds on the wire and costs seconds of the processor, and what backward hides costs nothing.
Method     the planner prices the plan's step with all-reduce and with every candidate, window by window (`planner.coding`): over
           the cluster's link, with codec seconds measured here, on the first process                  `Choice.predict`
Guarantee  a candidate is taken only if it is predicted to save more than `auto`'s margin, else plain all-reduce; never where no
           mesh axis sums all gradients. Every process takes the same. What is predicted for a candidate is what
           `weft.plan(..., exchange=candidate)` would predict for this plan.
Source     weft.comm.automatic, which tries its choice as well; a run does not, as another program could not go on in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
import torch.distributed as dist

from weft.cluster import Cluster
from weft.comm import Exchange
from weft.comm.agree import decided
from weft.comm.automatic import Auto
from weft.graph.graph import Graph
from weft.placement.assignment import Assignment
from weft.placement.axes import Cuts

if TYPE_CHECKING:
    from weft.planner import OptimizerCost, Plan

__all__ = ["Choice"]


@final
@dataclass(frozen=True, eq=False)
class Choice:
    """What is to be chosen from when the run's processes are there.

    Attributes:
        auto: candidates and margin; its link, or else the cluster's.
        cluster, optimizer: that the plan is for.
        repeated: seconds of a step in which the plan computes again, or waits for a lower tier.
    """

    auto: Auto
    cluster: Cluster
    optimizer: OptimizerCost
    repeated: float = 0.0

    @classmethod
    def of(cls, auto: Auto, plan: Plan) -> Choice:
        again = max((squeeze.seconds for squeeze in plan.squeezes), default=0.0)
        return cls(auto, plan.cluster, plan.optimizer, again + plan.prediction.waiting)

    def predict(self, graph: Graph, assignment: Assignment, cuts: Cuts) -> dict[str, float]:
        """Predicted step seconds of "plain" and of every candidate."""
        from weft.planner.coding import Coding
        from weft.planner.costs import Costs
        from weft.planner.prepared import Prepared
        from weft.planner.price import Pricing
        from weft.planner.roles import Roles

        link = self.auto.link
        plain = None if link is None else Exchange(select=lambda spec: False)  # over the same link as the others
        prepared = Prepared(graph, cuts)
        pricing = Pricing(prepared, Roles(prepared), Costs(self.cluster, assignment.mesh), self.optimizer)
        found = {}
        for name, exchange in {"plain": plain, **self.auto.exchanges()}.items():
            pricing.coding = None if exchange is None else Coding.of(exchange, graph, self.cluster, link)
            found[name] = pricing.price(assignment, details=False).seconds + self.repeated
        return found

    def pick(self, graph: Graph, assignment: Assignment, cuts: Cuts, device: torch.device) -> str:
        """The name of the exchange to use, or "plain"; every process of the default group calls this."""
        world = dist.group.WORLD
        assert world is not None

        def choose() -> str:
            return self.auto.choose(self.predict(graph, assignment, cuts))

        return str(decided("the choice of an exchange", choose, world, device))

    def fitting(self, options: str) -> str:
        """The candidate with these options (`Exchange.options`), "" if there is none."""
        found = self.auto.exchanges()
        return next((name for name in sorted(found) if found[name].options == options), "")

    def make(self, name: str) -> Exchange | None:
        return None if name == "plain" else self.auto.exchanges()[name]
