"""Deferred initialisation: equal bits, one tensor's memory, every way in which constructors use random numbers."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from weft.errors import NotReplayable
from weft.nn import GPT, GPTOptions, LSTMLanguageModel, LSTMOptions, ResNet, ResNetOptions, UNet, UNetOptions
from weft.placement.deferred import deferred, materialise, tape_of
from weft.placement.layout import Mesh, Replicate, Shard, take
from weft.placement.replay import Replay


def reference(factory, seed):
    """Parameters and buffers of the model built on one device; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory()
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same(values, expected):
    assert set(values) == set(expected)
    for name, value in expected.items():
        assert values[name].dtype == value.dtype, name
        if value.is_contiguous():  # gaps between elements are not kept
            assert values[name].stride() == value.stride(), name
        assert torch.equal(values[name], value), name


def our_gpt():
    return GPT(GPTOptions(vocabulary=64, context=16, layers=3, heads=2, width=16))


def transformers_model(name):
    T = pytest.importorskip("transformers")
    small = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    if name == "gpt2":
        return T.GPT2LMHeadModel(
            T.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
        )
    if name == "llama":
        return T.LlamaForCausalLM(T.LlamaConfig(**small, num_key_value_heads=2))
    if name == "bert":
        return T.BertForMaskedLM(T.BertConfig(**small))
    if name == "vit":
        image = {"image_size": 16, "patch_size": 4, "num_labels": 8}
        return T.ViTForImageClassification(
            T.ViTConfig(**{k: v for k, v in small.items() if k != "vocab_size"}, **image)
        )
    config = T.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T.T5ForConditionalGeneration(config)


class Odd(nn.Module):
    """Initialises in ways that a simple tape would get wrong."""

    def __init__(self):
        super().__init__()
        own = torch.Generator().manual_seed(5)
        self.dead = nn.Linear(20, 20)  # overwritten below: moves the generator only
        self.first = nn.Parameter(torch.empty(17, 9))
        nn.init.orthogonal_(self.first, gain=2.0)
        self.own = nn.Parameter(torch.empty(4, 5).normal_(generator=own))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(99)
            self.forked = nn.Parameter(torch.randn(3, 3))
        self.after_fork = nn.Parameter(torch.randn(3, 3))
        state = torch.get_rng_state()
        self.twice = nn.Parameter(torch.rand(40))
        torch.set_rng_state(state)
        self.again = nn.Parameter(torch.rand(40))  # equals `twice`
        self.own_later = nn.Parameter(torch.empty(2, 30).uniform_(generator=own))
        nn.init.trunc_normal_(self.dead.weight, std=0.1)
        self.dead.bias.data = torch.linspace(0, 1, 20)
        self.padded = nn.Embedding(7, 5, padding_idx=3)
        self.narrow = nn.Parameter(torch.randn(6, 8)[1:4, ::2])
        self.last = nn.Parameter(torch.randn(8, 8, dtype=torch.float64).to(torch.bfloat16))
        self.literal = nn.Parameter(torch.tensor([[1.5, -2.0]]))
        self.array = nn.Parameter(torch.from_numpy(np.arange(6.0)))
        self.array.data.mul_(torch.rand(6))
        self.register_buffer("mask", torch.ones(4, 4).tril().bool())
        self.register_buffer("inverse_frequency", 1.0 / 10000 ** (torch.arange(0, 8, 2).float() / 8), persistent=False)
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]
        self.scale = float(self.first.detach().abs().max())  # depends on random numbers
        self.table = torch.arange(5) * 2  # neither parameter nor buffer
        with torch.no_grad():
            self.twice.mul_(0.5)
            self.padded.weight[0].copy_(self.own[0])
            nn.init.sparse_(self.narrow, 0.5)
        self.tied = nn.Linear(5, 7, bias=False)
        self.tied.weight = self.padded.weight
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2))


FACTORIES = {
    "gpt": our_gpt,
    "gpt float64": lambda: our_gpt().double(),
    "gpt bfloat16": lambda: our_gpt().to(torch.bfloat16),
    "lstm": lambda: LSTMLanguageModel(LSTMOptions(11, 6, 7, 2)),
    "resnet": lambda: ResNet(ResNetOptions(3, 5, (4, 8), (1, 2))),
    "unet": lambda: UNet(UNetOptions(3, 5, (4, 8), 2)),
    "encoder layer": lambda: nn.TransformerEncoderLayer(8, 2),
    "odd": Odd,
    **{name: lambda name=name: transformers_model(name) for name in ("gpt2", "llama", "bert", "vit", "t5")},
}


@pytest.mark.parametrize("name", FACTORIES)
def test_bits_equal_the_single_device(name):
    factory = FACTORIES[name]
    expected = reference(factory, seed=11)
    before = torch.get_rng_state()
    model = deferred(factory, seed=11)
    assert all(parameter.is_meta for parameter in model.parameters())
    values = dict(materialise(model))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(values, expected)


def test_values_that_constructors_ask_for():
    torch.manual_seed(11)
    expected, model = Odd(), deferred(Odd, seed=11)
    assert model.rates == expected.rates
    assert model.scale == expected.scale
    assert torch.equal(model.table, expected.table)  # a real tensor, since no state dict would bring it
    assert model.tied.weight is model.padded.weight
    values = dict(materialise(model))
    assert torch.equal(values["twice"] * 2, values["again"])
    assert "tied.weight" not in values  # its first name is padded.weight
    assert torch.equal(dict(materialise(model, names=["tied.weight"]))["tied.weight"], values["padded.weight"])


@pytest.mark.parametrize("name", ["odd", "gpt2"])
def test_any_subset_in_any_order(name):
    expected = reference(FACTORIES[name], seed=2)
    model = deferred(FACTORIES[name], seed=2)
    for chosen in (list(expected)[::-3], list(expected)[-1:], list(expected)[1::2]):
        assert_same(dict(materialise(model, names=chosen)), {name: expected[name] for name in chosen})


@pytest.mark.parametrize(("shape", "weights"), [((2,), ()), ((3,), ((3.0, 1.0, 1.0),)), ((2, 2), ())])
def test_pieces(shape, weights):
    mesh = Mesh(shape, weights=weights)
    expected = reference(our_gpt, seed=0)
    model = deferred(our_gpt)

    def placements(name):
        if "norm" in name:
            return (Replicate(),) * mesh.ndim
        return (Shard(0),) + (Shard(expected[name].dim() - 1),) * (mesh.ndim - 1)

    for position in mesh.positions():
        pieces = dict(materialise(model, placements, mesh=mesh, position=position))
        assert set(pieces) == set(expected)
        for name, piece in pieces.items():
            assert torch.equal(piece, take(expected[name], placements(name), mesh, position)), name
            assert piece.untyped_storage().nbytes() == piece.nbytes  # keeps nothing of the whole


def test_a_model_with_values_is_cut_the_same_way():
    torch.manual_seed(4)
    model, mesh = our_gpt(), Mesh((2,))
    placements = dict.fromkeys(["embed.weight", "norm.bias"], (Shard(0),))
    mine = dict(materialise(model, placements, mesh=mesh, position=(1,)))
    other = dict(materialise(deferred(our_gpt, seed=4), placements, mesh=mesh, position=(1,)))
    assert set(mine) == set(placements)
    assert_same(mine, other)


@pytest.mark.parametrize("name", ["gpt", "resnet", "gpt2", "llama", "bert", "vit", "t5"])
def test_memory_is_that_of_one_tensor(name):
    tape = tape_of(deferred(FACTORIES[name]))
    replay = Replay(tape)
    values = {n: v for n, v in tape.values.items() if n not in tape.aliases}
    largest = total = 0
    for _, value in replay.run(values):
        largest, total = max(largest, value.nbytes), total + value.nbytes
    assert replay.live == 0
    assert replay.peak <= largest
    assert total > 2 * largest  # so that the bound says something


def test_memory_where_one_value_needs_another():
    replay = Replay(tape_of(deferred(Odd)))
    values = {name: value for name, value in replay.tape.values.items() if name not in replay.tape.aliases}
    largest = max(value.nbytes for _, value in replay.run(values))
    assert replay.live == 0
    assert replay.peak <= 8 * largest  # orthogonal_: the draw, q, r, and their copies


def test_generator_states_are_not_hoarded():
    replay = Replay(tape_of(deferred(our_gpt)))
    values = {name: value for name, value in replay.tape.values.items() if name not in replay.tape.aliases}
    most = max(len(replay._after) for _ in replay.run(values))
    assert most <= 2


def test_a_dead_initialisation_costs_one_draw_and_no_write():
    def factory():
        layer = nn.Linear(64, 64)
        nn.init.zeros_(layer.weight)
        return layer

    tape = tape_of(deferred(factory))
    replay = Replay(tape)
    assert dict(replay.run({"weight": tape.values["weight"]}))["weight"].eq(0).all()
    assert not replay._drawn  # nothing random was needed at all


def test_pickles_and_copies():
    model = deferred(our_gpt, seed=8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(dict(materialise(other)), reference(our_gpt, seed=8))


def test_other_seed_other_values():
    one, two = (dict(materialise(deferred(our_gpt, seed=seed))) for seed in (0, 1))
    assert not torch.equal(one["embed.weight"], two["embed.weight"])


def test_inside_a_meta_context():
    with torch.device("meta"):
        model = deferred(transformers_model, "gpt2", seed=1)
    assert_same(dict(materialise(model)), reference(FACTORIES["gpt2"], seed=1))


def test_values_from_outside_are_kept():
    pretrained = torch.randn(5, 3)

    def factory():
        return nn.Sequential(nn.Embedding.from_pretrained(pretrained, freeze=False), nn.Linear(3, 2))

    model = deferred(factory)
    assert model[0].weight.is_meta and model[0].weight.requires_grad
    assert torch.equal(dict(materialise(model))["0.weight"], pretrained)


class WritesOutside(nn.Linear):
    outside = torch.zeros(3)

    def __init__(self):
        super().__init__(3, 3)
        self.outside.copy_(self.weight[0].detach())


def without_record():
    model = nn.Linear(3, 3, device="meta")
    return list(materialise(model))


def changed_since():
    model = deferred(nn.Linear, 3, 3)
    model.weight = nn.Parameter(torch.empty(4, 3, device="meta"))
    return list(materialise(model))


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: deferred(WritesOutside), NotReplayable, r"WritesOutside \(.*copy_.*tensor that existed before"),
        (lambda: deferred(nn.LazyLinear, 3), NotReplayable, "weight.*lazy"),
        (without_record, NotReplayable, "weight.*without a record.*deferred"),
        (changed_since, NotReplayable, "weight.*changed after construction"),
        (lambda: deferred(lambda: 3), ValueError, "must return an nn.Module, got int"),
        (lambda: list(materialise(deferred(nn.Linear, 3, 3), names=["wieght"])), ValueError, "no parameter.*wieght"),
        (lambda: list(materialise(deferred(nn.Linear, 3, 3), {"weight": (Shard(0),)})), ValueError, "need the mesh"),
        (lambda: deferred(nn.Linear, 3, -1), RuntimeError, "negative"),
    ],
)
def test_bad_input_is_named(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_a_failing_factory_leaves_the_generator_alone():
    before = torch.get_rng_state()

    def factory():
        nn.Linear(2, 2)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        deferred(factory)
    assert torch.equal(torch.get_rng_state(), before)
