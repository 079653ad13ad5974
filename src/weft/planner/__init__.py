"""From a graph and a cluster to a plan: where every value and parameter lives, and what a step should cost.

    plan         find the fastest plan that fits                         Plan         the frozen result
    price        what a step of any assignment costs                     Prediction   seconds, bytes, memory, layers, timeline
    Constraints  decisions taken by hand: strategies, placements         OptimizerCost   an optimizer as the cost model sees it

    search       exact minimisation of sums of tables: elimination, folding of repeated blocks, integer programme
    model        the tables of a graph on a mesh          explore      candidates on one mesh
    costs        operators and boxings on a mesh          choose       all meshes, memory, the best
    buckets      parameters that travel together          memory       liveness over forward and backward
    roles        batch, sequence or tensor                bound        what no plan can beat
    coding       gradients by an exchange

Data, tensor and sequence parallelism, ZeRO and their mixes are outcomes of one search over placements, or constraints on it.
"""

from weft.planner.bound import lower_bound
from weft.planner.constraints import STRATEGIES, Constraints
from weft.planner.optimizer import OptimizerCost
from weft.planner.plan import Alternative, Plan
from weft.planner.price import Prediction, price

from weft.planner.choose import make_plan, plan  # isort: skip  (the function takes the place of the module `plan`)

__all__ = [
    "STRATEGIES", "Alternative", "Constraints", "OptimizerCost", "Plan", "Prediction", "lower_bound", "make_plan",
    "plan", "price",
]  # fmt: skip
