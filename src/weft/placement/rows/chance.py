"""Rows of random operators: devices that hold the same values must draw the same numbers, those that hold other pieces others.

A local program gets a stream of seeds from `Local.random_stream`, equal along mesh axes where the output is not sharded. So a
dropout's mask agrees between the terms of a partial sum, and dropout is linear: Partial passes. Results do not depend on the
state of torch's own generator, nor change it.

    own generator              `drawn` (dropout, rand, bernoulli ...)
    operators without one      `seeded`: torch's generator is set for the call and put back (attention's and lstm's dropout)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weft.graph.rewrite import operator
from weft.placement.rows.build import broadcast
from weft.placement.signature import Call, Local, Row

__all__ = ["CHANCE", "drawn", "seeded"]

_default_generator = threading.Lock()  # devices simulated by threads of one process share it


def seeded(run: Callable[..., Any], stream: Callable[[], int]) -> Callable[..., Any]:
    """`run` with torch's default generator of its first tensor's device set to the stream's next seed, and put back after."""

    def call(*args: Any, **kwargs: Any) -> Any:
        device = next(
            (arg.device for arg in args if isinstance(arg, Tensor)), torch.device(kwargs.get("device") or "cpu")
        )
        generator = (
            torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
        )
        with _default_generator:
            state = generator.get_state()
            generator.manual_seed(stream())
            try:
                return run(*args, **kwargs)
            finally:
                generator.set_state(state)

    return call


def drawn(stream: Callable[[], int]) -> Callable[[torch.device], torch.Generator]:
    """A function giving a generator on a device, set to the stream's next seed."""
    kept: dict[torch.device, torch.Generator] = {}

    def generator(device: torch.device) -> torch.Generator:
        found = kept.get(device)
        if found is None:
            found = kept[device] = torch.Generator(device)
        found.manual_seed(stream())
        return found

    return generator


def dropout(call: Call) -> Row:
    """dropout(x, p, train); native_dropout also returns the mask."""
    outputs = tuple(range(len(call.outputs)))
    links = broadcast(call, (0,), outputs)
    probability, training = call.arg(1, "p"), call.arg(2, "train")
    inactive = probability == 0 or training is False

    def local(here: Local) -> Callable[..., Any]:
        if inactive:
            return operator(call.node.target)
        generator = drawn(here.random_stream())
        scale = 0.0 if probability == 1 else 1 / (1 - probability)

        def run(x: Tensor, *_: Any, **__: Any) -> Any:
            with torch.no_grad():
                noise = torch.empty_like(x).bernoulli_(1 - probability, generator=generator(x.device))
                kept = noise.bool() if len(outputs) > 1 else None
                noise.mul_(scale)
            return x * noise if kept is None else (x * noise, kept)

        return run

    return Row(links, linear=((0,),) if len(outputs) == 1 else (), local=local)


def feature_dropout(call: Call) -> Row:
    """feature_dropout(x (n, c, ...), p, train): whole channels at a time; the mask is of n and c only."""
    links = tuple(link for link in broadcast(call, (0,)) if link.outputs[0].dim < 2)
    probability, training = call.arg(1, "p"), call.arg(2, "train")

    def local(here: Local) -> Callable[..., Tensor]:
        if probability == 0 or training is False:
            return operator(call.node.target)
        generator = drawn(here.random_stream())
        scale = 0.0 if probability == 1 else 1 / (1 - probability)

        def run(x: Tensor, *_: Any, **__: Any) -> Tensor:
            with torch.no_grad():
                noise = x.new_empty([*x.shape[:2], *(1,) * (x.dim() - 2)])
                noise.bernoulli_(1 - probability, generator=generator(x.device)).mul_(scale)
            return x * noise

        return run

    return Row(links, linear=((0,),), local=local)


def random_values(call: Call) -> Row:
    """rand, randn, randint, normal, rand_like, bernoulli, ...: any dim may be cut, each piece with draws of its own."""
    links = broadcast(call, range(len(call.inputs)))
    sizes = (
        [place for place, value in enumerate(call.node.args) if isinstance(value, (list, tuple))]
        if not call.inputs
        else []
    )

    def local(here: Local) -> Callable[..., Tensor]:
        operate = operator(call.node.target)

        def run(*args: Any, **kwargs: Any) -> Tensor:
            kwargs.pop("generator", None)
            args = tuple(list(here.output_shape()) if place in sizes else arg for place, arg in enumerate(args))
            return operate(*args, **kwargs)

        return seeded(run, here.random_stream())

    return Row(links, local=local)


_DRAWS = ("rand", "randn", "randint", "normal", "rand_like", "randn_like", "randint_like", "bernoulli", "rrelu")

CHANCE: dict[str, Callable[[Call], Row]] = {
    "dropout": dropout, "native_dropout": dropout, "feature_dropout": feature_dropout,
    **dict.fromkeys(_DRAWS, random_values),
}  # fmt: skip
