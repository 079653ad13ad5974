"""Costs against torch itself: FLOPs by its counter, what autograd keeps by its saved-tensor hooks, call by call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.graph.families import FAMILIES, captured
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from weft.graph import Graph, Node, Ref, call, capture, flatten_batch, interpret, map_refs, operator, reprice, unpriced


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def kept_by(node: Node, values: dict[Ref, torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run a call; its outputs and the tensors that autograd kept for its backward."""
    args, kwargs = map_refs((node.args, dict(node.kwargs)), values.__getitem__)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        result = operator(node.target)(*args, **kwargs)
    outputs = list(result) if isinstance(result, (list, tuple)) else [result]
    values.update({Ref(node.name, i): output for i, output in enumerate(outputs)})
    return outputs, [t for t in kept if t.numel()]


def differences(graph: Graph, node: Node, values: dict[Ref, torch.Tensor]) -> list[str]:
    """What a call's specs, kind and cost say otherwise than running it does."""
    outputs, kept = kept_by(node, values)
    operands = [values[ref] for ref in node.inputs]
    wrong = []
    for output, spec in zip(outputs, node.outputs, strict=True):
        real = (tuple(output.shape), output.dtype, output.requires_grad)
        if real != (spec.shape, spec.dtype, spec.requires_grad):
            wrong.append(f"{real} for {spec}")
    view = bool(operands) and storage(outputs[0]) == storage(operands[0])
    if view != (node.kind == "view") and not node.mutates:
        wrong.append(f"view: {view}")

    stores = [storage(operand) for operand in operands]
    own = {storage(output) for output in outputs}
    kept_stores = {storage(t): t.untyped_storage().nbytes() for t in kept}
    for i, (store, ref) in enumerate(zip(stores, node.inputs, strict=True)):
        state = graph[ref.node].role in ("parameter", "buffer") or operands[i].numel() == 1
        shared = stores.count(store) > 1  # q, k and v that are views of one tensor cannot be told apart
        keeps = node.cost.keeps_inputs[i] if i < len(node.cost.keeps_inputs) else False
        if not state and not shared and keeps != (store in kept_stores):
            wrong.append(f"keeps_inputs[{i}]: {store in kept_stores}")
    if node.cost.keeps_output != bool(own & set(kept_stores) - set(stores)) and node.kind != "view":
        wrong.append(f"keeps_output: {not node.cost.keeps_output}")
    saved = sum(nbytes for store, nbytes in kept_stores.items() if store not in own and store not in stores)
    tolerance = 0.1 if node.kind == "recurrent" else 0.02  # the workspace of the CPU's lstm is a fit
    if abs(node.cost.saved - saved) > tolerance * saved + 64:
        wrong.append(f"saved: {saved}, not {node.cost.saved}")
    return wrong


@pytest.mark.parametrize("name", FAMILIES)
def test_every_call_keeps_what_its_cost_says(name):
    (model, batch, _), graph = captured(name)
    model = copy.deepcopy(model)
    tensors: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    leaves = iter(flatten_batch(batch)[0])
    values: dict[Ref, torch.Tensor] = {}
    wrong = {}
    for node in graph.nodes:
        if node.role == "call":
            found = differences(graph, node, values)
            if found:
                wrong[f"{node.name} ({node.target} of {[graph.spec(ref).shape for ref in node.inputs]})"] = found
        else:
            source = {"input": lambda _: next(leaves), "constant": graph.constants.get}.get(node.role, tensors.get)
            values[Ref(node.name)] = source(node.target)
    assert not wrong
    assert not unpriced(graph)


@pytest.mark.parametrize("name", ["own-gpt", "gpt2", "llama", "t5", "vit", "resnet", "convnext", "unet", "mlp"])
def test_a_whole_forward_keeps_what_the_graph_says(name):
    (model, batch, _), graph = captured(name)
    tensors: dict[str, Any] = {**dict(model.named_parameters()), **dict(copy.deepcopy(model).named_buffers())}
    state = {storage(t) for t in tensors.values()}
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.setdefault(storage(t), t), t)[1], lambda t: t):
        loss = interpret(graph, tensors, flatten_batch(batch)[0])
    assert loss.grad_fn is not None
    real = sum(t.untyped_storage().nbytes() for store, t in kept.items() if store not in state)

    root = {Ref(node.name, i): Ref(node.name, i) for node in graph.nodes for i in range(len(node.outputs))}
    held: set[Ref] = set()
    saved = 0
    for node in graph.calls:
        outputs = [Ref(node.name, i) for i in range(len(node.outputs))]
        if node.kind == "view":
            root.update(dict.fromkeys(outputs, root[node.inputs[0]]))
        held |= {root[ref] for ref, keeps in zip(node.inputs, node.cost.keeps_inputs, strict=False) if keeps}
        held |= {root[output] for output in outputs if node.cost.keeps_output}
        saved += node.cost.saved
    predicted = saved + sum(
        graph.spec(ref).nbytes for ref in held if graph[ref.node].role not in ("parameter", "buffer")
    )
    assert predicted == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "whisper", "convnext", "own-resnet", "unet", "mlp"])
def test_flops_equal_torchs_counter(name):
    (model, batch, loss), graph = captured(name)
    model = copy.deepcopy(model)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value = call(model, batch, loss)
        forward = counter.get_total_flops()
        value.backward()
    backward = counter.get_total_flops() - forward
    counted = [node for node in graph.calls if node.kind in ("matmul", "conv", "attention")]
    small = sum(node.outputs[0].numel for node in counted)  # biases and softmaxes, which the counter leaves out
    scores = sum(
        node.inputs and graph.spec(node.inputs[0]).shape[-2] * node.outputs[0].numel
        for node in counted
        if node.kind == "attention"
    )
    mine_forward = sum(node.cost.flops_forward for node in counted)
    mine_backward = sum(node.cost.flops_backward for node in counted)
    assert forward <= mine_forward <= forward + 8 * (small + scores)
    fused = name == "whisper"  # the one kernel computes the scores again in backward
    recomputed = sum(node.cost.flops_forward / 2 for node in counted if node.kind == "attention") if fused else 0
    if name == "convnext":
        return  # torch counts the weight gradients of grouped convolutions as if there were one group
    assert backward + recomputed <= mine_backward <= backward + recomputed + 8 * (small + scores)


def price_of(function: Any, *inputs: torch.Tensor) -> Node:
    """The only priced call of a function of parameters."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tensors = nn.ParameterList(inputs)

        def forward(self, _):
            return function(*self.tensors).sum()

    (node,) = [n for n in capture(Model(), torch.ones(1)).calls if n.op != "sum" and n.kind != "view"]
    return node


def test_products_by_hand():
    x, w = torch.ones(2, 3, 4), torch.ones(5, 4)
    linear = price_of(F.linear, x, w)
    assert (
        linear.kind == "matmul"
        and linear.cost.flops_forward == 2 * 6 * 4 * 5
        and linear.cost.flops_backward == 4 * 6 * 4 * 5
    )
    assert linear.cost.bytes_forward == 4 * (24 + 20 + 30)
    assert price_of(torch.matmul, torch.ones(7, 2, 3), torch.ones(7, 3, 4)).cost.flops_forward == 2 * 7 * 2 * 3 * 4
    assert (
        price_of(
            lambda a, b: torch.einsum("bik,bkj->bij", a, b), torch.ones(7, 2, 3), torch.ones(7, 3, 4)
        ).cost.flops_forward
        == 336
    )
    conv = price_of(lambda a, b: F.conv2d(a, b, padding=1, groups=2), torch.ones(2, 4, 5, 6), torch.ones(8, 2, 3, 3))
    assert conv.kind == "conv" and conv.cost.flops_forward == 2 * (2 * 8 * 5 * 6) * (2 * 3 * 3)
    up = price_of(lambda a, b: F.conv_transpose2d(a, b, stride=2), torch.ones(2, 4, 5, 6), torch.ones(4, 8, 2, 2))
    assert up.cost.flops_forward == 2 * (2 * 4 * 5 * 6) * (8 * 2 * 2)


def test_embedding_moves_rows_forward_and_the_whole_table_backward():
    tokens = torch.zeros(3, 5, dtype=torch.int64)
    node = price_of(lambda table: F.embedding(tokens, table), torch.ones(100, 8))
    assert node.kind == "gather"
    assert node.cost.bytes_forward == 2 * 4 * 15 * 8 + 8 * 15
    assert node.cost.bytes_backward == 4 * 100 * 8 + 3 * 4 * 15 * 8


def test_causal_attention_is_half_the_work_and_dropout_keeps_scores_on_cpus_only():
    q = torch.ones(2, 4, 64, 8)
    plain = price_of(F.scaled_dot_product_attention, q, q.clone(), q.clone()).cost
    causal = price_of(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), q, q.clone(), q.clone()).cost
    assert plain.flops_forward == 4 * 2 * 4 * 64 * 64 * 8
    assert causal.flops_forward == pytest.approx(plain.flops_forward * 65 / 128)

    class Model(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q, dropout_p=0.1).sum()

    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.inner = nn.Parameter(q), Model()

        def forward(self, _):
            return self.inner(self.q)

    graph = capture(Trained(), torch.ones(1))
    scores = 4 * 2 * 4 * 64 * 64
    (here,) = [node.cost for node in graph.calls if node.kind == "attention"]
    (there,) = [node.cost for node in reprice(graph, "cuda").calls if node.kind == "attention"]
    assert here.saved > 3 * scores and not here.keeps_output
    assert there.saved < scores / 10 and there.keeps_output
    assert reprice(graph, "cpu") == graph


def test_an_operator_without_a_row_is_priced_by_its_bytes_and_listed():
    @torch.library.custom_op("weft_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @twice.register_fake
    def _(x):
        return torch.empty_like(x)

    class Model(nn.Module):
        def forward(self, x):
            return torch.ops.weft_tests.twice(x).sum()

    graph = capture(Model(), torch.ones(5, 4))
    (node,) = unpriced(graph)
    assert node.target == "weft_tests.twice.default"
    assert node.kind == "elementwise" and node.cost.bytes_forward == 2 * 4 * 20
