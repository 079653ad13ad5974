"""Execute a plan: parameters and their buckets, steps, processes and their failures, checkpoints.

run          train a model by a plan: local processes, or those of torchrun       Trainer      what a user then holds
export       weights as one safetensors file                                      read_whole   weights of a checkpoint

engine       one process's steps                    store, buckets, pieces   who holds and exchanges what, when
driver       this process is one of them            launch, worker           this process starts and tells them
optimizer    the user's optimizer over pieces       failure                  a process died: name it, end all
checkpoint   save, and load into any plan           coded, choice            gradients by an exchange, and which one
batches, progress, shared
"""

from weft.runtime.checkpoint import read_whole
from weft.runtime.export import export
from weft.runtime.trainer import Trainer

from weft.runtime.run import run  # isort: skip  (the function takes the place of the module `run`)

__all__ = ["Trainer", "export", "read_whole", "run"]
