"""Parameter groups: what they say apart from their parameters, and the optimizer that a training loop takes them from.

options     of a group, as they are now                                                `plain_options`
described   the same as far as JSON can say them: written with every step; `restore` puts them back on resuming, so that a
            learning rate is what a schedule had made of it
Front       has the groups of a `Tiered`, for schedules and loops; the state is where the tiers say
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

__all__ = ["Front", "Run", "described", "grouped", "plain_options", "refuse_more", "restore"]

Named = dict[str, nn.Parameter]


def plain_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options without its parameters."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def described(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options as far as JSON can say them."""
    plain = {key: _plain(value) for key, value in plain_options(group).items()}
    return {key: value for key, value in plain.items() if _sayable(value)}


def _plain(value: Any) -> Any:
    """With numbers in place of tensors that hold one."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _sayable(value: Any) -> bool:
    if isinstance(value, list):
        return all(_sayable(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def restore(groups: Sequence[dict[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Give groups the options that `described` told of as many; what they have besides stays."""
    if len(groups) != len(saved):
        return  # cut into groups anew: whoever did that says what holds for each
    for group, options in zip(groups, saved, strict=True):
        for key, value in options.items():
            group[key] = _put_back(group.get(key), value)


def _put_back(now: Any, value: Any) -> Any:
    """What `_plain` made a number or list of, in the form of what is there now."""
    if isinstance(now, Tensor):
        return now.fill_(value)
    if not isinstance(value, list):
        return value
    if isinstance(now, (list, tuple)) and len(now) == len(value):
        value = [_put_back(*pair) for pair in zip(now, value, strict=True)]
    return value if isinstance(now, list) else tuple(value)


def refuse_more(optimizer: torch.optim.Optimizer) -> None:
    """No more parameters once places for them are laid out."""
    if getattr(optimizer, "laid_out", False):
        raise ValueError(
            "parameters cannot be added later: the files have places for those given at the start; make an optimizer of all, "
            "frozen ones included (without a gradient they are left alone), in a new folder"
        )


def grouped(model: nn.Module, groups: Sequence[Mapping[str, Any]] | None) -> list[tuple[Named, dict[str, Any]]]:
    """(parameters by name, options) of each group. Without groups: one of all that are not frozen.

    Raises:
        ValueError: a group names what is no parameter, or is in another; there is nothing to train.
    """
    named = dict(model.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    if not trained:
        raise ValueError("Tiered: the model has no parameter that requires gradients")
    if groups is None:
        return [(trained, {})]
    names = {id(p): name for name, p in named.items()}
    found: list[tuple[Named, dict[str, Any]]] = []
    seen: set[str] = set()
    if (
        not isinstance(groups, Sequence)
        or not groups
        or not all(isinstance(g, Mapping) and "params" in g for g in groups)
    ):
        raise ValueError(
            "Tiered: groups must be a list of dicts with 'params' (parameters or their names) and options, got "
            f"{groups!r:.80}"
        )
    for group in groups:
        members = {}
        for item in _members(group["params"]):
            name = item if isinstance(item, str) else names.get(id(item), "")
            if name not in named or name in seen:
                what = "is in two groups" if name in seen else "is no parameter of the model"
                raise ValueError(f"Tiered: {name or 'a tensor in groups'} {what}")
            seen.add(name)
            members[name] = named[name]
        found.append((members, {k: v for k, v in group.items() if k != "params"}))
    return found


def _members(params: Any) -> Iterable[Any]:
    """The parameters of a group, or one alone, as torch's optimizers take them."""
    if isinstance(params, (str, Tensor)):
        return [params]
    if not isinstance(params, Iterable):
        raise ValueError(f"Tiered: 'params' of a group must be parameters or their names, got {type(params).__name__}")
    return params


class Run(Protocol):
    """What a `Front` needs of its training run (`stepping.Steps`)."""

    def advance(self) -> None: ...

    def zero_grad(self) -> None: ...

    def state(self) -> dict[int, dict[str, Any]]: ...

    def take_state(self, given: Mapping[int, Mapping[str, Any]]) -> Callable[[], None]: ...


@final
class Front(torch.optim.Optimizer):
    """What schedules and training loops take for the optimizer: the groups are the ones used, all it does is the run's."""

    run: Run

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any]):
        super().__init__(groups, defaults)
        self.laid_out = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        refuse_more(self)
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.run.advance()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients; `set_to_none` is always as if True."""
        self.run.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """As the optimizer in memory would give it, whole and on the CPU; a collective. It must fit in memory."""
        return {**super().state_dict(), "state": self.run.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of an optimizer of the same kind and parameters, in memory or on tiers; a collective.

        Raises:
            ValueError: it is of other groups, shapes or options. Nothing is changed then.
        """
        take = self.run.take_state(state_dict["state"])
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        take()
