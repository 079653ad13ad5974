"""MASHA: extragradient methods for games and saddle points whose messages are compressed both ways, and which still converge.

Problem    find z* with <F(z*), z - z*> >= 0 for all z, F = (1/M) sum_m F_m, worker m knows F_m. For a min-max problem z = (x, y)
           and F = (grad_x f, -grad_y f). Compressing F itself stalls: F_m(z*) is not zero, and so neither is its coding error.
Method     a snapshot w, at which all know F(w) and worker m its F_m(w). A step:                                    `masha`
               zbar = tau z + (1 - tau) w,   half = zbar - gamma F(w)            without a word
               MASHA-1   worker m sends Q(F_m(half) - F_m(w)), the server Q of their mean, g;       z+ = half - gamma g
               MASHA-2   worker m sends C(gamma F_m(half) - gamma F_m(w) + e_m), g with the server's e;   z+ = half - g
               with probability 1 - tau:   w <- z+, all F_m(w) are sent uncompressed
           or nearly so: any references r_m that all know the mean s of will do for F_m(w), so the refresh may send a fine code
           of F_m(w) - r_m and all take r_m + code for the new r_m (`refresh`, ours; the proven rate is for exact ones). A server
           that codes its answer, too, sends what s lacks of the mean of r_m, old errors included: the steps until the next
           refresh are off by what is left, which vanishes as the r_m settle.
           Q unbiased, C a contraction with error feedback, gamma inside the memories. The coin is drawn by (seed, step) on every
           worker alike and is not sent. With inner="adam" the two moves are Adam's, along F(w) and F(w) + g.
Guarantee  what is coded is a difference that vanishes at the solution, so the fixed points are those of F. MASHA-1, F mu-strongly
           monotone, gamma as in `step_size`:   E|z^k - z*|^2 <= 2 (1 - gamma mu/2)^k |z^0 - z*|^2                  `rate`
           A gamma for each player is the method in scaled coordinates, where F stays monotone: tensors are coded one by one.
Source     Beznosikov, Richtarik, Diskin, Ryabinin, Gasnikov, arXiv:2110.03313; the snapshot at z+ rather than z, with the same
           constants: Alacaoglu, Malitsky, arXiv:2102.08352. The constant in `step_size` is ours: it counts the L of F itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor

from weft.comm.agree import hashed
from weft.comm.codec import Codec, Spec
from weft.comm.exchange import Exchange
from weft.comm.memories.shift import Shift
from weft.comm.memory import Memory, NoMemory
from weft.comm.rules.mean import Mean
from weft.comm.topology import Gossip, Peer
from weft.comm.variational import Adam, Ask, Inner, Named, Operator, Rate, Rounds, finite, moved, rate_of

__all__ = ["MASHA", "Anchor", "coin", "masha", "rate", "step_size"]

Loss = Tensor | tuple[Tensor, Tensor]


@dataclass(eq=False)
class Anchor:
    """What a worker keeps between steps: the snapshot w, F(w) and its own F_m(w); empty before the first step."""

    w: Named = field(default_factory=dict)
    mean: Named = field(default_factory=dict)
    own: Named = field(default_factory=dict)


def masha(
    z: Named,
    anchor: Anchor,
    operator: Operator,
    gamma: Rate,
    tau: float,
    mode: Literal[1, 2],
    refresh: bool,
    *,
    at_anchor: Operator | None = None,
    paired: bool = False,
    inner: Inner | None = None,
) -> Rounds:
    """One step of one worker; the first one sets the snapshot. It returns the new point, None if the step is skipped.

    Args:
        z: this step's point, the same on all workers.
        anchor: read, and replaced entry by entry where the snapshot moves.
        operator: F_m.
        gamma: step size, or one by name.
        tau: weight of z against the snapshot, in [0, 1]; 1 - tau is the probability of a refresh.
        mode: 1 or 2, as above.
        refresh: the coin.
        at_anchor: F_m at snapshots, if it is another one: over all data rather than a minibatch.
        paired: evaluate F_m at w again in every step, since the operator is another one in every step (a minibatch).
        inner: the move from one point along a direction; None for z - gamma direction.
    """
    if not anchor.w and not (yield from _refreshed(z, anchor, at_anchor or operator)):
        return None
    middle = {name: torch.lerp(anchor.w[name], tensor, tau) for name, tensor in z.items()}
    rates = {name: rate_of(gamma, name) for name in z}
    back = {name: -rate for name, rate in rates.items()}
    half = moved(middle, anchor.mean, back) if inner is None else inner(middle, anchor.mean, False)
    here = operator(half)
    there = operator(anchor.w) if paired else anchor.own
    g = yield Ask({n: (tensor - there[n]) * (rates[n] if mode == 2 else 1.0) for n, tensor in here.items()}, True)
    if g is None:
        return None
    if inner is None:
        z = moved(half, g, -1.0 if mode == 2 else back)
    else:  # a rate of 0 moves nothing, whatever the direction
        unscaled = {name: 1 / rate if rate else 0.0 for name, rate in rates.items()}
        z = inner(middle, moved(anchor.mean, g, unscaled if mode == 2 else 1.0), True)
    if refresh:
        yield from _refreshed(z, anchor, at_anchor or operator)
    return z


def _refreshed(z: Named, anchor: Anchor, operator: Operator) -> Generator[Ask, Named | None, bool]:
    """Move the snapshot to z; not if F is not finite there on some worker."""
    ask = Ask(operator(z), False)
    mean = yield ask
    if mean is None:
        return False
    anchor.w = {name: tensor.clone() for name, tensor in z.items()}
    anchor.own = {name: tensor.clone() for name, tensor in (ask.arrived or ask.vector).items()}
    anchor.mean = mean
    return True


def coin(seed: int, step: int, tau: float) -> bool:
    """Whether the snapshot is refreshed after a step: the same on every worker, true with probability 1 - tau."""
    return hashed(seed, "coin", step) / 2**62 >= tau


def step_size(
    tau: float, modulus: float, lipschitz: float, local: Sequence[float], variance: float, down: float = 0.0
) -> float:
    """gamma of MASHA-1 for which the rate is proven: min{(1 - tau)/(2 mu), sqrt(1 - tau)/(2 C)}.

        C^2 = (1 + omega_down) (L^2 + omega/M^2 sum_m L_m^2)     so that   E|g|^2 <= C^2 |half - w|^2

    as workers draw independently. The paper's C bounds L^2 by the mean of L_m^2 and is larger.

    Args:
        tau: in (0, 1).
        modulus: mu >= 0.
        lipschitz: L of F, > 0.
        local: L_m of every F_m.
        variance: omega of the workers' codec, E|Q(v) - v|^2 <= omega |v|^2.
        down: omega of the server's codec.
    """
    if not 0 < tau < 1:
        raise ValueError(f"step_size: tau must be in (0, 1), got {tau}")
    constant = math.sqrt((1 + down) * (lipschitz**2 + variance * sum(value**2 for value in local) / len(local) ** 2))
    bounds = [math.sqrt(1 - tau) / (2 * constant)]
    if modulus > 0:
        bounds.append((1 - tau) / (2 * modulus))
    return min(bounds)


def rate(gamma: float, modulus: float, steps: int) -> float:
    """The bound of E|z^k - z*|^2 / |z^0 - z*|^2 after `steps` steps of MASHA-1 with the gamma of `step_size`."""
    return 2 * (1 - gamma * modulus / 2) ** steps


@final
class MASHA(torch.optim.Optimizer):
    """MASHA as an optimizer over the ranks of an exchange, for parameters that some minimise and some maximise.

    `step(closure)` evaluates the closure at two or three points, so it must compute the loss anew each time, on the same data
    within a step, and must not call backward: it returns f, which `params_min` minimise and `params_max` maximise, or a pair of
    losses, which the first and the second group minimise each for itself. The parameters must begin equal on all ranks, and
    stay so bit for bit.

    Mode 1 takes an unbiased codec and no memory; mode 2 a contraction with `ErrorFeedback` on the workers and, where the
    exchange codes the way back (`Star(down=...)`, `ScatterGather`), at the server. With `ScatterGather` every rank is the server
    of its part and nothing is gathered in one place. Tensors that the exchange does not select go uncompressed.

    Args:
        params_min: parameters, or (name, parameter) pairs.
        params_max: the same for the maximising player; may be empty (perturbations local to a rank belong in the closure).
        exchange: codec, memory and topology, of which all ranks get one mean (no Gossip, no Peer, no robust rule: the method
            is proven for the mean, and ranks must stay equal); it must not be attached to a model.
        lr: gamma, > 0; a schedule may change it (mode 2 keeps it inside the memories), also for the two players apart: each is
            a parameter group.
        tau: in (0, 1); None for 1 - tau = bytes of a message / bytes uncompressed, so that refreshes cost as much as messages.
        mode: 1 or 2.
        inner: "sgd", or "adam" with `betas` and `eps`.
        refresh: None for uncompressed refreshes, or Exchange(a fine codec, Shift(1.0)): 6 bits, rounded to nearest, take a fifth
            of the bytes and change little. A way back that is coded needs a memory, as of every refresh's error something would
            stay: Star(down=the same codec, memory=ErrorFeedback()), ScatterGather(memory=ErrorFeedback()). It does not go with
            `paired`, where references are not what is subtracted.
        paired: the closure's data change from step to step; F_m(w) is then evaluated anew on the same data in every step.
        seed: of the coin, the same on all ranks.
    Raises:
        ValueError: options that are out of range or contradict each other, a parameter in both groups.

    >>> optimizer = MASHA(model.named_parameters(), (), Exchange(RandK(0.1)), lr=0.1)       # doctest: +SKIP
    >>> loss = optimizer.step(lambda: criterion(model(inputs), targets))                     # doctest: +SKIP
    """

    def __init__(
        self,
        params_min: Iterable[Any],
        params_max: Iterable[Any],
        exchange: Exchange,
        lr: float,
        tau: float | None = None,
        mode: Literal[1, 2] = 1,
        inner: Literal["sgd", "adam"] = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        paired: bool = False,
        refresh: Exchange | None = None,
        seed: int = 0,
    ):
        named = {**_named(params_min, "min"), **_named(params_max, "max")}
        self._maximised = {name for name in named if name.startswith("max.")}
        twice = [name for name, p in named.items() if sum(p is other for other in named.values()) > 1]
        if twice:
            raise ValueError(
                f"MASHA: {' and '.join(twice)} are one parameter; it cannot be in two groups, or twice in one"
            )
        if not named:
            raise ValueError("MASHA: no parameters given")
        if not lr > 0:
            raise ValueError(f"MASHA: lr must be > 0, got {lr}")
        if mode not in (1, 2):
            raise ValueError(
                f"MASHA: mode must be 1 (unbiased codec) or 2 (contraction with error feedback), got {mode!r}"
            )
        if inner not in ("sgd", "adam"):
            raise ValueError(f"MASHA: inner must be 'sgd' or 'adam', got {inner!r}")
        if not all(0 <= beta < 1 for beta in betas) or not eps > 0:
            raise ValueError(f"MASHA: betas must be in [0, 1) and eps > 0, got betas={betas}, eps={eps}")
        specs = [Spec(name, tuple(p.shape), p.dtype) for name, p in named.items()]
        coded = [spec for spec in specs if exchange.selects(spec)]
        _check(exchange, coded, mode)
        for each in (exchange, refresh):
            if each is not None:
                _check_mean(each)
        if refresh is not None and (refresh.memory != Shift(1.0) or paired):
            raise ValueError(
                "MASHA: refresh must be an Exchange with memory Shift(1.0), and does not go with paired=True"
            )
        if refresh is not None and any(_bare(memory) for _, _, memory in _back(refresh)):
            raise ValueError(
                "MASHA: refresh codes the way back and needs a memory there, or its errors add up: "
                f"{type(refresh.topology).__name__}(..., memory=ErrorFeedback())"
            )
        if tau is None:
            tau = 1 - _share(exchange, specs)
        if not 0 < tau < 1:
            raise ValueError(
                f"MASHA: tau must be in (0, 1), got {tau:g}; 1 - tau is the probability of an uncompressed refresh"
            )
        groups = [{"params": [named[n] for n in named if (n in self._maximised) is side]} for side in (False, True)]
        defaults = {"lr": lr, "step": 0, "skipped": 0}
        super().__init__([group for group in groups if group["params"]], defaults)
        self.exchange, self.tau, self.mode, self.inner, self.paired, self.seed = (
            exchange,
            tau,
            mode,
            inner,
            paired,
            seed,
        )
        self.betas, self.eps = betas, eps
        self._parameters = named
        self._plain = refresh or Exchange(group=exchange.group, timeout=exchange.timeout, seed=exchange.seed, measure=0)
        self._calls = 0  # of the uncompressed exchange

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the constructor adds groups: snapshots and the sides of the game are made there."""
        if hasattr(self, "_parameters"):
            raise ValueError("MASHA: all parameters must be given to the constructor; make a new optimizer with them")
        super().add_param_group(param_group)

    @property
    def skipped(self) -> int:
        """Steps left out because F was not finite on some rank."""
        return int(self.param_groups[0]["skipped"])

    @property
    def refreshes(self) -> int:
        """Uncompressed rounds so far, the first one included."""
        return self._calls

    def step(self, closure: Callable[[], Loss] | None = None, full: Callable[[], Loss] | None = None) -> Tensor:  # type: ignore[override]
        """One step of all ranks together.

        Args:
            closure: computes the local loss (or pair), see above.
            full: the same over more data, for snapshots; None for `closure`.
        Returns:
            the closure's (first) loss at the point looked ahead to, on this rank's data, detached.
        Raises:
            ValueError: no closure, it returns no loss, or the loss does not depend on some parameter, which is named.
        """
        if closure is None:
            raise ValueError("MASHA: step needs a closure that returns the loss; F is evaluated at several points")
        number, gamma = int(self.param_groups[0]["step"]), self._rates()
        seen: list[Tensor] = []
        draws = _draws({p.device for p in self._parameters.values()})

        def operator(loss: Callable[[], Loss]) -> Operator:
            def evaluate(point: Named) -> Named:
                for restore in draws:  # the same dropout at both points, as the same data
                    restore()
                gradient, value = self._gradient(point, loss)
                seen.append(value)
                return gradient

            return evaluate

        z = {name: p.detach().clone() for name, p in self._parameters.items()}
        anchor = Anchor(
            *({n: self.state[p][key] for n, p in self._parameters.items() if key in self.state[p]} for key in KEYS)
        )
        conversation = masha(
            z, anchor, operator(closure), gamma, self.tau, self.mode, coin(self.seed, number, self.tau),
            at_anchor=None if full is None else operator(full), paired=self.paired,
            inner=self._adam(gamma),
        )  # fmt: skip
        first = not anchor.w
        found = None
        try:
            found = self._converse(conversation)
        finally:  # where a closure or another rank fails, the parameters are those of before
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_((z if found is None else found)[name])
        for name, parameter in self._parameters.items():
            if anchor.w:
                self.state[parameter].update({key: getattr(anchor, key)[name] for key in KEYS})
        for each in self.param_groups:
            each["step"] = number + 1
            each["skipped"] += found is None
        return seen[min(int(first), len(seen) - 1)]

    def _converse(self, conversation: Rounds) -> Named | None:
        """Answer a conversation through the exchanges until the step ends."""
        answer: Named | None = None
        ask = next(conversation)
        while True:
            if ask.compressed:
                answer = self.exchange.reduce(ask.vector, int(self.param_groups[0]["step"])).wait()
            else:
                answer = self._plain.reduce(ask.vector, self._calls).wait()
                self._calls += 1
                if isinstance(self._plain.memory, Shift):
                    states = self._plain.core.states
                    ask.arrived = {
                        name: states[name]["reference"].view(tensor.shape).to(tensor.dtype)
                        if "reference" in states[name]
                        else tensor
                        for name, tensor in ask.vector.items()
                    }
            try:
                ask = conversation.send(answer if finite(answer) else None)
            except StopIteration as end:
                return end.value

    def _gradient(self, point: Named, closure: Callable[[], Loss]) -> tuple[Named, Tensor]:
        """(F_m at a point, the loss there); the parameters are left at the point."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(point[name])
        with torch.enable_grad():
            own, other = _pair(closure())
            gradients: dict[str, Tensor | None] = {}
            for value, maximised in ((own, False), (other, True)):
                names = [name for name in self._parameters if (name in self._maximised) is maximised]
                if not names:
                    continue
                if not value.requires_grad:
                    raise ValueError(
                        f"MASHA: the loss has no gradient for {names[0]}; return it without detach() or item()"
                    )
                found = torch.autograd.grad(
                    value, [self._parameters[n] for n in names], retain_graph=True, allow_unused=True
                )
                gradients.update(zip(names, found, strict=True))
        missing = [name for name in self._parameters if gradients[name] is None]
        if missing:
            raise ValueError(
                f"MASHA: the closure's loss does not depend on {', '.join(missing)}; leave out what is not used"
            )
        return {name: gradients[name].detach() for name in self._parameters}, own.detach()

    def _rates(self) -> dict[str, float]:
        """gamma of each parameter: its group's."""
        of = {id(p): float(group["lr"]) for group in self.param_groups for p in group["params"]}
        return {name: of[id(parameter)] for name, parameter in self._parameters.items()}

    def _adam(self, gamma: Rate) -> Inner | None:
        if self.inner != "adam":
            return None
        return Adam(gamma, self.betas, self.eps, {name: self.state[p] for name, p in self._parameters.items()})

    def state_dict(self) -> dict[str, Any]:
        """Snapshot, moments, counters; memories and warm starts of the exchange under "exchange"."""
        return {
            **super().state_dict(),
            "exchange": self.exchange.state_dict(),
            "refresh": self._plain.state_dict(),
            "calls": self._calls,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        state = dict(state_dict)
        if "exchange" not in state:
            raise ValueError("MASHA: the checkpoint holds no state of an exchange; it is from another optimizer")
        self.exchange.load_state_dict(state.pop("exchange"))
        self._plain.load_state_dict(state.pop("refresh"))
        self._calls = int(state.pop("calls"))
        super().load_state_dict(state)

    def close(self) -> None:
        """End the threads and process groups of both exchanges, on all ranks at the same time."""
        self.exchange.close()
        self._plain.close()


KEYS = ("w", "mean", "own")  # an Anchor's fields, kept in the optimizer's state of each parameter


def _named(params: Iterable[Any], side: str) -> dict[str, Tensor]:
    """Parameters by name: "min.NAME" or "min.NUMBER"."""
    found: dict[str, Tensor] = {}
    for number, item in enumerate(params):
        name, parameter = item if isinstance(item, tuple) else (str(number), item)
        if not isinstance(parameter, Tensor):
            raise ValueError(
                f"MASHA: parameters must be tensors or (name, tensor) pairs, got {type(parameter).__name__}"
            )
        if not (parameter.requires_grad and parameter.is_leaf):
            raise ValueError(f"MASHA: {side}.{name} takes no gradient; leave it out, or set requires_grad")
        found[f"{side}.{name}"] = parameter
    return found


def _pair(loss: Any) -> tuple[Tensor, Tensor]:
    """The losses that the two sides minimise."""
    losses = loss if isinstance(loss, tuple) else (loss,)
    if not 1 <= len(losses) <= 2 or not all(isinstance(one, Tensor) and one.numel() == 1 for one in losses):
        said = [f"shape {tuple(one.shape)}" if isinstance(one, Tensor) else repr(one) for one in losses]
        raise ValueError(
            f"MASHA: the closure must return the loss, a tensor of one entry, or a pair of them, got {', '.join(said)}"
        )
    return (losses[0], losses[1]) if len(losses) == 2 else (losses[0], -losses[0])


def _draws(devices: set[torch.device]) -> list[Callable[[], None]]:
    """Functions that set the random generators of the CPU and of `devices` back to where they are now."""
    found = [functools.partial(torch.set_rng_state, torch.get_rng_state())]
    for device in devices:
        if device.type != "cpu":
            module = torch.get_device_module(device)
            found.append(functools.partial(module.set_rng_state, module.get_rng_state(device), device))
    return found


def _share(exchange: Exchange, specs: Sequence[Spec]) -> float:
    """Bytes of a message / bytes of the tensors."""
    sent = 0.0
    for spec in specs:
        setting = exchange.codec.in_force(spec, exchange.codec.default(spec)) if exchange.selects(spec) else None
        sent += spec.numel * spec.dtype.itemsize if setting is None else exchange.codec.nbytes(spec, setting)
    return sent / sum(spec.numel * spec.dtype.itemsize for spec in specs)


def _check_mean(exchange: Exchange) -> None:
    """That all ranks get one result, and that it is the mean."""
    topology, rule = exchange.topology, exchange.combine
    if isinstance(topology, (Gossip, Peer)):
        raise ValueError(
            f"MASHA: all ranks must get the same mean, got topology {type(topology).__name__}, by which they drift apart; use "
            "AllGather, ScatterGather or Star"
        )
    if not isinstance(rule, Mean):
        raise ValueError(f"MASHA: combine must be Mean, for which the method is proven, got {type(rule).__name__}")


def _back(exchange: Exchange) -> list[tuple[str, Codec, Memory | None]]:
    """What results are coded by on the way back, under which name, and the memory there."""
    leg = exchange.topology.leg_back(exchange.codec)
    return [] if leg is None else [(f"{type(exchange.topology).__name__}'s down codec", *leg)]


def _bare(memory: Memory | None) -> bool:
    return memory is None or isinstance(memory, NoMemory)


def _check(exchange: Exchange, specs: Sequence[Spec], mode: int) -> None:
    """That codecs and memories are what the mode is proven for, up and down."""
    for what, codec, memory in [("codec", exchange.codec, exchange.memory), *_back(exchange)]:
        bare = _bare(memory)
        kind = type(codec).__name__
        if mode == 1 and not codec.unbiased:
            raise ValueError(f"MASHA: mode 1 needs an unbiased {what}, got {kind}; use RandK or Quantise, or mode=2")
        if mode == 1 and not bare:
            raise ValueError(f"MASHA: mode 1 goes without a memory, got {type(memory).__name__} beside the {what}")
        if mode == 2 and any(codec.contraction(spec, codec.default(spec)) <= 0 for spec in specs):
            raise ValueError(
                f"MASHA: mode 2 needs a contraction as {what}, got {kind}; use TopK, or mode=1 for unbiased ones"
            )
        if mode == 2 and bare and not codec.unbiased:
            raise ValueError(f"MASHA: mode 2 needs ErrorFeedback beside the {what}; without it the method stalls")
