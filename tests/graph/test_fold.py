"""Repeated blocks: found where they are, and every repeat's copies are equal up to names."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.graph.families import FAMILIES, captured
from torch import nn
from torch.nn import functional as F

from weft.graph import Graph, Ref, Repeat, capture


class Stack(nn.Module):
    """`depth` residual blocks; `odd` makes one of them differ."""

    def __init__(self, depth: int, odd: int | None = None, shared: bool = False, skip: bool = False):
        super().__init__()
        blocks = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(depth)]
        if odd is not None:
            blocks[odd][2] = nn.ReLU()
        self.blocks = nn.ModuleList([blocks[0]] * depth if shared else blocks)
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.skip = skip

    def forward(self, x, mask):
        seen, x = [], self.stem(x)
        for block in self.blocks:
            x = x + block(x) * mask
            seen.append(x)
        return self.head(seen[0] + x if self.skip else x).sum()


def graph_of(**options) -> Graph:
    return capture(Stack(**options), (torch.ones(4, 8), torch.ones(8)))


def covered(graph: Graph) -> list[tuple[int, int]]:
    return [(repeat.length, repeat.count) for repeat in graph.repeats]


def test_equal_blocks_fold():
    assert covered(graph_of(depth=5)) == [(6, 5)]


def test_a_first_block_that_needs_no_gradient_of_its_input_costs_less_and_is_no_copy():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8)) for _ in range(4)])
    graph = capture(model, (torch.ones(2, 8), torch.ones(2, 8)), F.mse_loss)
    assert covered(graph) == [(3, 3)] and graph.repeats[0].start > 0


def test_a_parameter_shared_by_all_blocks_does_not_stop_folding():
    assert covered(graph_of(depth=4, shared=True)) == [(6, 4)]


def test_a_block_of_another_kind_splits_the_run():
    assert covered(graph_of(depth=6, odd=3)) == [(6, 3), (6, 2)]


def test_a_block_that_something_outside_reads_is_not_folded():
    assert covered(graph_of(depth=4, skip=True)) == [(6, 3)]


def test_other_widths_are_other_blocks():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8 + i, 9 + i), nn.ReLU(), nn.LayerNorm(9 + i)) for i in range(4)])
    assert capture(model, (torch.ones(2, 8), torch.ones(2, 12)), F.mse_loss).repeats == ()


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "mixtral", "bert", "vit", "whisper", "own-gpt"])
def test_transformers_fold_by_layer(name):
    _, graph = captured(name)
    (repeat,) = graph.repeats
    assert repeat.count == 2
    assert repeat.length * repeat.count > len(graph.calls) / 2


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_are_equal_up_to_names(name):
    _, graph = captured(name)
    for repeat in graph.repeats:
        check(graph, repeat)


def check(graph: Graph, repeat: Repeat) -> None:
    """The claim of `Repeat`, read off the graph by renaming the first copy into each other copy."""
    calls = graph.calls
    copies = [
        calls[repeat.start + k * repeat.length : repeat.start + (k + 1) * repeat.length] for k in range(repeat.count)
    ]
    place = {node.name: (k, i) for k, nodes in enumerate(copies) for i, node in enumerate(nodes)}
    for earlier, later in itertools.pairwise(copies):
        before: dict[tuple[int, int], Ref] = {}
        for a, b in zip(earlier, later, strict=True):
            assert (a.target, a.outputs, a.kind, a.cost) == (b.target, b.outputs, b.kind, b.cost)
            for one, other in zip(a.inputs, b.inputs, strict=True):
                assert one.index == other.index or other.node in place
                if one == other:
                    assert one.node not in place
                elif one.node not in place and other.node not in place:
                    assert graph[one.node].role in ("parameter", "buffer") and graph.spec(one) == graph.spec(other)
                else:
                    here, there = place.get(one.node), place[other.node]
                    inside = here is not None and here[1] == there[1] and here[0] == there[0] - 1
                    first = here is None and there[0] == 0
                    assert inside or first
                    if first:
                        assert before.setdefault((there[1], other.index), one) == one
    last = {node.name for node in copies[-1]}
    for ref, readers in graph.consumers().items():
        if ref.node in place and ref.node not in last:
            assert all(node.name in place for node, _ in readers)
