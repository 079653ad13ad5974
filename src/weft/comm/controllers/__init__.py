"""Which setting of a codec each tensor gets, and when it changes.

    LayerwiseBudget  fewest bytes or seconds at a uniform setting's error (or least error within bytes or seconds)    L-GreCo
    Accordion        two settings, switched where the gradient's norm changes fast
    Uniform          one setting for all
    Schedule         one setting for all, changed by step: warm-up

The choice itself is a pure function of two tables, error and cost: `plan_layers` (optimal), `greedy_layers`, `uniform_layers`;
`LayerwiseBudget(choose=...)` takes any of them.
"""

from weft.comm.controller import Controller
from weft.comm.controllers.accordion import Accordion
from weft.comm.controllers.greedy import greedy_layers
from weft.comm.controllers.layerwise import BudgetTooSmall, LayerwiseBudget, plan_layers
from weft.comm.controllers.schedule import Schedule
from weft.comm.controllers.uniform import Uniform, uniform_layers

__all__ = [
    "CONTROLLERS",
    "Accordion",
    "BudgetTooSmall",
    "LayerwiseBudget",
    "Schedule",
    "Uniform",
    "greedy_layers",
    "plan_layers",
    "uniform_layers",
]

CONTROLLERS: dict[str, type[Controller]] = {
    "accordion": Accordion,
    "l-greco": LayerwiseBudget,
    "schedule": Schedule,
    "uniform": Uniform,
}
