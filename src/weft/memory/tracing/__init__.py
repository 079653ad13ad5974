"""Recording steps: which operators ran, what they allocated, when it was freed, what each costs.

trace            one step of a model, with fake tensors (any device) or really       `tracer`
Recorder         whatever runs in a block of your own                                `recorder`
CostTable        frozen seconds and workspace by operator signature                  `costs`
measure_operators  a table measured call by call on made-up numbers                  `costs`
show, table      a trace as an HTML page, as text                                    `picture`, `moments`
Untouched        run a step and put everything back                                  `untouched`
alone            whether nobody else has the gradient that an operator is given      `lone`
"""

from weft.memory.tracing.costs import CostTable, Work, measure_operators
from weft.memory.tracing.moments import by_category, curves, held_at, peak_operator, table
from weft.memory.tracing.picture import show
from weft.memory.tracing.recorder import Recorder
from weft.memory.tracing.tracer import trace
from weft.memory.tracing.untouched import Untouched

__all__ = [
    "CostTable", "Recorder", "Untouched", "Work", "by_category", "curves", "held_at", "measure_operators", "peak_operator",
    "show", "table", "trace",
]  # fmt: skip
