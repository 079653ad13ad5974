"""What a worker keeps of what it did not send; every name is a class of `weft.comm.memory.Memory`.

none                    nothing
error-feedback          the difference, added to the next gradient              any codec, any optimizer
shift                   the value itself as a reference, followed by every rank   DIANA, EF21
momentum-correction     momentum before the compression, masked where sent      SGD with momentum, sparse codecs
"""

from __future__ import annotations

from weft.comm.memories.error_feedback import ErrorFeedback
from weft.comm.memories.momentum_correction import MomentumCorrection
from weft.comm.memories.shift import Shift
from weft.comm.memory import Memory, NoMemory

__all__ = ["MEMORIES", "ErrorFeedback", "MomentumCorrection", "Shift"]

MEMORIES: dict[str, type[Memory]] = {
    "error-feedback": ErrorFeedback,
    "momentum-correction": MomentumCorrection,
    "none": NoMemory,
    "shift": Shift,
}
