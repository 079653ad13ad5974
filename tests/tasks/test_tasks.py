"""Tasks: deterministic batches, held-out parts that stay out, a model that learns, errors that say what to do."""

from __future__ import annotations

import builtins
import gzip
import itertools
import pickle

import numpy as np
import pytest
import torch

from weft.tasks import TASKS, build, huggingface, image_classification, language_model
from weft.tasks.images import SHAPES, drawn_shapes, load_images
from weft.tasks.task import loss_of
from weft.tasks.text import standard_library, windows


def flat(batch):
    return list(batch.values()) if isinstance(batch, dict) else list(batch)


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(flat(one), flat(two), strict=True))


SMALL = {
    "language-model": {"layers": 1, "width": 32, "heads": 2, "context": 16, "batch_size": 4},
    "image-classification": {"data": "shapes", "widths": (8, 16), "depths": (1, 1), "batch_size": 16},
}


@pytest.mark.parametrize("name", TASKS)
def test_every_task(name):
    task = build(name, **SMALL[name])
    first = list(itertools.islice(task.batches(), 3))
    assert all(equal(a, b) for a, b in zip(first, task.batches(), strict=False))
    assert not equal(first[0], next(task.batches(seed=1)))
    assert not equal(first[0], first[1])
    assert equal(task.batch, first[0])
    assert len(next(task.batches(batch_size=3))[0]) == 3
    before = torch.get_rng_state()
    one, two = task.model, task.model
    assert torch.equal(torch.get_rng_state(), before)
    assert one.training
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    value = task.evaluate(one, batches=2)
    assert one.training
    assert np.isfinite(value)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_learns(name):
    task = build(name, **SMALL[name])
    model = task.model
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    before = task.evaluate(model, batches=4)
    for batch in itertools.islice(task.batches(), 60):
        optimizer.zero_grad()
        loss_of(model, batch, task.loss).backward()
        optimizer.step()
    after = task.evaluate(model, batches=4)
    assert (after > before + 0.1) if task.metric.larger_is_better else (after < before - 0.5)


def test_tasks_are_frozen_and_pickle():
    task = build("language-model", **SMALL["language-model"])
    with pytest.raises(AttributeError):
        task.seed = 3
    assert equal(pickle.loads(pickle.dumps(task)).batch, task.batch)
    assert not equal(task.but(seed=3).batch, task.batch)


def test_the_default_corpus_is_python_source():
    text = standard_library()
    assert text.count(b"import ") > 1000
    assert len(text) <= 8 * 2**20
    assert standard_library(1000) == text[:1000]


def test_test_windows_cover_the_held_out_part_once_and_only_it():
    text = bytes(range(200)) * 5
    rows = torch.cat(list(windows(text, 9, "test", 4, seed=0)))
    assert rows.shape[1] == 10
    held_out = text[-100:]
    assert bytes(rows[:, :-1].flatten().tolist()) == held_out[: 9 * len(rows)]
    numbered = b"".join(bytes([i % 256]) for i in range(900)) + b"\xff" * 100
    assert all((row != 255).sum() > 0 for row in next(windows(numbered, 9, "train", 50, seed=0)))


@pytest.mark.parametrize("suffix", ["", ".txt", ".gz"])
def test_any_text_file(tmp_path, suffix):
    path = tmp_path / f"text{suffix}"
    opener = gzip.open if suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write("näive café ".encode() * 300)
    tokens, targets = language_model(path, **SMALL["language-model"]).batch
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert tokens.max() > 127  # bytes of two-byte letters


def test_drawn_shapes():
    x, y = drawn_shapes(160, seed=3)
    assert x.shape == (160, 3, 32, 32) and x.dtype == torch.uint8
    assert y.bincount().tolist() == [20] * len(SHAPES)
    assert torch.equal(x, drawn_shapes(160, seed=3)[0])
    assert not torch.equal(x, drawn_shapes(160, seed=4)[0])


def test_names_say_what_the_data_is(monkeypatch):
    monkeypatch.delenv("WEFT_DATA", raising=False)
    assert image_classification().name == "image-classification/drawn-shapes"
    assert language_model(**SMALL["language-model"]).name == "language-model/standard-library"


def test_images_from_a_file_and_a_folder(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    x, y = random.integers(0, 256, (40, 8, 8), dtype=np.uint8), random.integers(0, 3, 40)
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    images = load_images(tmp_path / "mine.npz")
    assert images.train[0].shape == (35, 1, 8, 8) and images.test[0].shape == (5, 1, 8, 8) and images.classes == 3
    (tmp_path / "cifar10").mkdir()
    np.savez(
        tmp_path / "cifar10" / "lossless_first4000.npz", x=np.zeros((16, 32, 32, 3), np.uint8), y=np.arange(16) % 10
    )
    monkeypatch.setenv("WEFT_DATA", str(tmp_path))
    load_images.cache_clear()
    assert image_classification(batch_size=4).name == "image-classification/cifar10-4000"
    load_images.cache_clear()


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("hf:gpt2", {"input_ids", "labels"}),
        ("hf:bert", {"input_ids", "labels"}),
        ("hf:t5", {"input_ids", "labels"}),
        ("hf:vit", {"pixel_values", "labels"}),
    ],
)
def test_huggingface(name, keys):
    pytest.importorskip("transformers")
    task = build(name, batch_size=2)
    model, batch = task.model, task.batch
    assert set(batch) == keys
    loss = loss_of(model, batch, task.loss)
    loss.backward()
    assert 1 < loss.item() < 8
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000
    assert np.isfinite(task.evaluate(model, batches=1))


def test_huggingface_settings_and_configurations(tmp_path):
    pytest.importorskip("transformers")
    assert len(build("hf:gpt2,n_layer=3,n_embd=32").model.transformer.h) == 3
    assert len(huggingface("gpt2", settings={"n_layer": 1}).model.transformer.h) == 1
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "gpt2", "n_layer": 1, "n_embd": 24, "n_head": 2, "vocab_size": 300}')
    assert huggingface("gpt2", config=path).model.transformer.wte.weight.shape == (300, 24)


def without_transformers(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_missing_extra_is_named(monkeypatch):
    without_transformers(monkeypatch)
    with pytest.raises(ImportError, match=r"pip install 'weft\[hf\]'"):
        build("hf:gpt2")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: build("langage-model"), "did you mean language-model"),
        (lambda: build("language-model", rows=3), "unexpected keyword argument 'rows'"),
        (lambda: build("language-model", batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: language_model("/no/such/text"), "cannot read the text /no/such/text"),
        (lambda: language_model(model="mlp"), "must be 'gpt' or 'lstm'"),
        (lambda: windows(b"abc" * 20, 30, "test", 1, 0), "60 bytes, too few for a test window of 31"),
        (
            lambda: build("language-model", **SMALL["language-model"]).batches(split="dev"),
            "'train' or 'test', got 'dev'",
        ),
        (lambda: image_classification("imagenet"), "known are|known names are shapes"),
        (
            lambda: next(image_classification("shapes", batch_size=10**6).batches()),
            "larger than the 8192 training images",
        ),
        (lambda: build("hf:gtp2"), "did you mean.*gpt2"),
        (lambda: build("hf:gpt2,n_layers=3"), "no 'n_layers'; did you mean.*n_layer"),
        (lambda: build("hf:gpt2,n_layer"), "write NAME=VALUE"),
        (lambda: build("hf:gpt2,vocab_size=100"), "at least 256"),
        (lambda: build("hf:whisper"), "batches of your own"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
