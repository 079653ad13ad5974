"""Architectures of `transformers` that nothing in weft was written for: limits, compiled graphs and tiers leave every bit."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from tests.memory.tiers.training import SMALL, differing
from torch import nn

from weft.memory.compiled import backend
from weft.memory.execute.limit import limit
from weft.memory.meters import meter
from weft.memory.tiers import Tiered, Tiers

pytestmark = pytest.mark.slow

OF_SIZE = {
    32: ("hidden_size", "d_model", "n_embd", "embedding_size", "moe_intermediate_size", "lru_width", "attention_hidden_size"),
    64: ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "max_position_embeddings", "n_positions"),
    2: ("num_hidden_layers", "n_layer", "encoder_layers", "decoder_layers", "num_key_value_heads", "num_experts_per_tok"),
    4: (
        "num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "decoder_attention_heads", "num_experts",
        "num_local_experts", "time_step_rank", "mamba_n_heads",
    ),
    8: ("head_dim", "d_kv", "state_size", "rotary_dim", "mamba_d_state"),
    16: ("mamba_d_head",),
    1: ("mamba_n_groups", "bos_token_id", "decoder_start_token_id"),
    99: ("vocab_size",),
    0: ("pad_token_id",),
}  # fmt: skip
NAMES = (
    "AlbertForMaskedLM", "BambaForCausalLM", "BartForConditionalGeneration", "BigBirdForMaskedLM", "BloomForCausalLM",
    "DebertaV2ForMaskedLM", "FNetForMaskedLM", "GptOssForCausalLM", "LongformerForMaskedLM", "MambaForCausalLM",
    "MixtralForCausalLM", "MT5ForConditionalGeneration", "Qwen3MoeForCausalLM", "RecurrentGemmaForCausalLM", "RwkvForCausalLM",
    "XLMWithLMHeadModel",
)  # fmt: skip


def small(name: str) -> nn.Module:
    """A model of this class, of some thousand parameters, in training mode."""
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"this version of transformers has no {name}")
    default = kind.config_class()
    sizes = {option: size for size, options in OF_SIZE.items() for option in options if hasattr(default, option)}
    torch.manual_seed(0)
    config = kind.config_class(**sizes)
    config.use_cache = False
    return kind(config).train()


def train(
    model: nn.Module, call: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None
) -> list[float]:
    """Losses of three steps."""
    tokens = torch.randint(3, 90, (2, 32), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = (model if call is None else call)(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def eager_peak(model: nn.Module) -> int:
    """Bytes of the same steps without a budget, parameters included."""
    with meter() as measured:
        train(copy.deepcopy(model))
    return measured.peak


@pytest.mark.parametrize("name", NAMES)
def test_within_a_budget(name):
    model = small(name)
    peak, state = eager_peak(model), sum(4 * p.nbytes for p in model.parameters())  # gradients and AdamW's included
    budget = int(state + 0.7 * (peak - state))
    with meter() as measured:
        ours = copy.deepcopy(model)
        with limit(budget, model=ours):
            losses = train(ours)
    assert losses == train(model)
    assert measured.peak <= budget < peak
    assert not differing(ours.state_dict(), model.state_dict())


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("name", NAMES)
def test_on_tiers(tmp_path, name, update):
    model = small(name)
    ours = copy.deepcopy(model)
    tiers = Tiers("disk", "host", "disk", "disk")
    with Tiered(ours, partial(torch.optim.AdamW, lr=1e-3), tiers, tmp_path, update=update, **SMALL) as tiered:
        assert train(ours, optimizer=tiered.optimizer) == train(model)
        assert not differing(tiered.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "name", [name for name in NAMES if not name.startswith("XLM")]
)  # graphs that hold more than eager
def test_compiled(name):
    """The bits of the same graphs without a budget: tracing alone changes some in the last place."""
    model = small(name)
    peak = eager_peak(model)
    with meter() as measured:
        ours = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3)
        torch._dynamo.reset()
        losses = train(ours, torch.compile(ours, backend=backend(peak, optimizer=optimizer)), optimizer)
    assert measured.peak <= peak
    torch._dynamo.reset()
    assert losses == train(model, torch.compile(model, backend="aot_eager"))
    assert not differing(ours.state_dict(), model.state_dict())
