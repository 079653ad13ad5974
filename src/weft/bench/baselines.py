"""What a user would otherwise pick, set up as its documentation recommends: the other side of every comparison.

    single       one device, no communication (every process runs the whole batch; report one)
    ddp          torch.nn.parallel.DistributedDataParallel, gradients as views of its buckets
    fsdp2        torch.distributed.fsdp.fully_shard per block and for the rest (ZeRO-3)
    tensor       torch.distributed.tensor.parallel.parallelize_module, column-wise then row-wise (Megatron's cut)

Each is a contender of `pair.side_by_side`. None is slowed: one thread per process and the same optimizer for all, and
the tensor-parallel model keeps one fused projection for queries, keys and values, whose rows are put in the order that lets a
contiguous cut give every process whole heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from weft.bench.meters import local, tensor_bytes
from weft.bench.pair import Problem, Step

__all__ = ["ddp", "fsdp2", "single", "tensor"]


@contextmanager
def single(problem: Problem) -> Iterator[Step]:
    """Plain PyTorch on the whole batch."""
    yield _plain_step(problem, problem.model(), data_parallel=False)


@contextmanager
def ddp(problem: Problem) -> Iterator[Step]:
    """DistributedDataParallel on this process's rows."""
    from torch.nn.parallel import DistributedDataParallel

    yield _plain_step(
        problem, DistributedDataParallel(problem.model(), gradient_as_bucket_view=True), data_parallel=True
    )


@contextmanager
def fsdp2(problem: Problem, blocks: str = "blocks") -> Iterator[Step]:
    """`fully_shard` on every module of the list `model.<blocks>`, then on the rest; parameters are freed after forward."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = problem.model()
    for block in model.get_submodule(blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    yield _plain_step(problem, model, data_parallel=True)


@contextmanager
def tensor(problem: Problem) -> Iterator[Step]:
    """`parallelize_module` on the attention and MLP of every block of a `weft.nn.GPT` and on its head."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    model = problem.model()
    layers = {
        "attention.qkv": ColwiseParallel(),
        "attention.project": RowwiseParallel(),
        "expand": ColwiseParallel(),
        "contract": RowwiseParallel(),
    }
    for block in model.blocks:
        _cut_attention(block.attention, world)
        parallelize_module(block, mesh, layers)
    parallelize_module(model, mesh, {"head": ColwiseParallel(output_layouts=Replicate())})
    yield _plain_step(problem, model, data_parallel=False)


def _plain_step(problem: Problem, model: Any, data_parallel: bool) -> Step:
    """The usual training loop around a (wrapped) module whose forward returns the loss."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    parameters = list(model.parameters())
    cut = [p for p in parameters if isinstance(p, DTensor)]
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    optimizer = problem.optimizer([{"params": group} for group in (cut, whole) if group])
    rank, world = dist.get_rank(), dist.get_world_size()

    def run(batch: tuple[Any, ...]) -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = model(*(problem.share(batch, rank, world) if data_parallel else batch))
        loss.backward()
        optimizer.step()
        return loss.detach()

    def facts() -> dict[str, float]:
        named = dict(model.named_parameters())
        found = {"parameter_bytes": float(tensor_bytes(named.values()))}
        heads = [parameter for name, parameter in named.items() if name.endswith("head.weight")]
        return {**found, "head_bytes": float(sum(local(head).nbytes for head in heads))} if heads else found

    return Step(run, mean=data_parallel, facts=facts)


def _cut_attention(attention: Any, world: int) -> None:
    """Make a fused `weft.nn` attention run on 1/world of its heads.

    The rows of the fused projection stand as (q, k, v) x heads; a contiguous cut needs (process) x (q, k, v) x heads of that
    process. Then the module's forward needs to know only that it sees fewer heads.
    """
    import torch
    from torch.nn import functional as F

    if not attention.fused or attention.heads % world:
        raise ValueError(f"tensor-parallel baseline: needs a fused projection and heads divisible by {world} processes")
    heads = attention.heads // world
    with torch.no_grad():
        for parameter in attention.qkv.parameters():
            rest = parameter.shape[1:]
            ordered = parameter.view(3, world, -1, *rest).transpose(0, 1).reshape(parameter.shape)
            parameter.copy_(ordered)

    def forward(self: Any, x_BTD: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x_BTD.shape
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in self.qkv(x_BTD).chunk(3, dim=2))
        dropout = self.dropout if self.training else 0.0
        y_BHTK = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.project(y_BHTK.transpose(1, 2).reshape(batch, tokens, -1))

    attention.forward = MethodType(forward, attention)
