"""What training loops do with `p.grad` between backward and step, when it is elsewhere: the bits of memory, or an error."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from tests.memory.tiers.test_processes import average
from tests.memory.tiers.training import ADAMW, SMALL, differing, gpt, tokens
from tests.slow import slow_but

from weft.errors import GradientMoved
from weft.memory.tiers import Tiered, Tiers

LOWER = (
    Tiers("disk", "disk", "disk"), Tiers("device", "host", "host"), Tiers("device", "disk", "device"), Tiers("host", "host")
)  # fmt: skip


def clip(model, optimizer, turn):
    return torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).item()


def clip_to_infinity_norm(model, optimizer, turn):
    return torch.nn.utils.clip_grad_norm_(
        model.parameters(), 0.01, norm_type=float("inf"), error_if_nonfinite=True
    ).item()


def clip_by_value(model, optimizer, turn):
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def by_numbers(model, optimizer, turn):
    for p in model.parameters():
        p.grad /= 2
        p.grad.data.mul_(torch.tensor(3.0)).nan_to_num_()


def with_tensors(model, optimizer, turn):
    """Noise, a mask, a normalisation, as research code has them."""
    for p in model.parameters():
        p.grad.add_(torch.ones(p.shape), alpha=1e-3)
        p.grad.mul_(torch.arange(p.numel()).reshape(p.shape) % 3 != 0)
        p.grad.copy_(p.grad - p.grad.mean())
        p.grad = p.grad / (p.grad.norm() + 1e-3)


def by_views(model, optimizer, turn):
    for p in model.parameters():
        flat = p.grad.view(-1)
        flat[0] = 1.0
        p.grad[-1] *= 2
        p.grad.numpy()[...] += 1e-3


def dropped_and_replaced(model, optimizer, turn):
    for i, p in enumerate(model.parameters()):
        if i % 3 == 0:
            p.grad = None
        elif i % 3 == 1:
            p.grad = torch.full_like(p.grad, 1e-3)
        else:
            p.grad.zero_()


def looked_at(model, optimizer, turn):
    """Whatever reads leaves things as they are."""
    grads = [p.grad for p in model.parameters()]
    found = [float(torch.cat([g.reshape(-1) for g in grads]).norm()), grads[0].clone().tolist()]
    torch.save(grads, io.BytesIO())
    return found, torch.stack([copy.deepcopy(g).abs().max() for g in grads]).tolist(), [g.shape for g in grads]


def weighed(model, optimizer, turn):
    """A weight from norms of gradients that are only returned, as GradNorm and VQGAN have it; what was accumulated stays."""
    weight = model.blocks[0].expand.weight
    norms = [torch.autograd.grad(model(*tokens(turn + k)), weight)[0].norm() for k in range(2)]
    (model(*tokens(turn)) * norms[0] / norms[1]).backward(inputs=[weight])
    return norms[0].item(), norms[1].item()


class Dead(torch.autograd.Function):
    """Gives nothing back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


def without_a_gradient(model, optimizer, turn):
    """A backward that comes to parameters with nothing."""
    sum(Dead.apply(p).sum() for p in model.parameters()).backward()


def loop(model, optimizer, change, turns=4):
    """Two backward passes a step, the second with a graph that is used twice."""
    said = []
    for turn in range(turns):
        torch.manual_seed(turn)
        model(*tokens(2 * turn)).backward()
        if turn == 2:
            said.append(change(model, optimizer, turn))
        loss = model(*tokens(2 * turn + 1))
        loss.backward(retain_graph=turn == 1)
        if turn == 1:
            loss.backward()
        said.append(change(model, optimizer, turn))
        optimizer.step()
        optimizer.zero_grad()
    return said


@pytest.mark.parametrize("tiers", slow_but(LOWER[::2], LOWER), ids=str)
@pytest.mark.parametrize(
    "change",
    [
        clip,
        clip_to_infinity_norm,
        clip_by_value,
        by_numbers,
        with_tensors,
        by_views,
        dropped_and_replaced,
        looked_at,
        weighed,
        without_a_gradient,
    ],
)
def test_what_is_done_with_gradients(tmp_path, tiers, change):
    reference, model = gpt(), gpt()
    said = loop(reference, ADAMW(reference.parameters()), change)
    with Tiered(model, ADAMW, tiers, tmp_path, **SMALL) as tiered:
        assert loop(model, tiered.optimizer, change) == said
        assert not differing(tiered.state_dict(), reference.state_dict())
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("tiers", LOWER, ids=str)
def test_a_gradient_scaler(tmp_path, tiers):
    """One step has an infinity and is left out; in the others gradients are divided and clipped."""

    def train(model, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
        for turn in range(6):
            torch.manual_seed(turn)
            loss = model(*tokens(turn))
            scaler.scale(loss * float("inf") if turn == 2 else loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return scaler.get_scale()

    reference, model = gpt(), gpt()
    scale = train(reference, ADAMW(reference.parameters()))
    with Tiered(model, ADAMW, tiers, tmp_path, **SMALL) as tiered:
        assert train(model, tiered.optimizer) == scale
        assert tiered.steps == 5 and not differing(tiered.state_dict(), reference.state_dict())


def test_a_gradient_that_is_gone(tmp_path):
    model = gpt()
    with Tiered(model, ADAMW, Tiers("disk", "disk", "disk"), tmp_path, **SMALL) as tiered:
        model(*tokens(0)).backward()
        kept = next(model.parameters()).grad
        assert (
            "on a lower tier" in repr(kept) and kept.shape == next(model.parameters()).shape and not kept.requires_grad
        )
        tiered.step()
        model(*tokens(1)).backward()
        for use in (kept.norm, kept.numpy, lambda: kept.mul_(2), lambda: kept[0]):
            with pytest.raises(GradientMoved, match="gone: a step has used it"):
                use()
        assert next(model.parameters()).grad.norm() > 0
    assert all(p.grad is None for p in model.parameters())


def test_gradients_used_up_in_backward(tmp_path):
    model = gpt()
    with Tiered(model, ADAMW, Tiers("disk", "host", "disk"), tmp_path, update="backward", **SMALL) as tiered:
        model(*tokens(0)).backward()
        for use in (clip, clip_by_value, by_views, dropped_and_replaced):
            with pytest.raises(GradientMoved, match="used up in backward"):
                use(model, tiered.optimizer, 1)
        tiered.step()


def several(folder):
    """Names of the values that differ from training in memory with averaged gradients."""
    import torch.distributed as dist

    rank, states = dist.get_rank(), []
    for on_tiers in (False, True):
        model = gpt(dropout=0.0)
        model.lonely = torch.nn.Parameter(torch.zeros(1))  # of one element: some process owns none of it
        tiered = None
        if on_tiers:
            tiered = Tiered(model, ADAMW, Tiers("disk", "host", "disk"), folder, group=dist.group.WORLD, **SMALL)
        optimizer = tiered.optimizer if tiered is not None else ADAMW(model.parameters())
        for turn in range(3):
            optimizer.zero_grad()
            (model(*tokens(turn, rank)) + model.lonely).backward()
            if tiered is None:
                average(model)
            else:
                for use in (clip, looked_at, with_tensors):
                    with pytest.raises(GradientMoved, match=r"spread over the processes.*Tiered\.clip_grad_norm_"):
                        use(model, optimizer, turn)
            by_numbers(model, optimizer, turn)
            clip_by_value(model, optimizer, turn)
            if turn == 1:
                model.lonely.grad = torch.ones(1)
            optimizer.step()
        states.append(model.state_dict() if tiered is None else tiered.state_dict())
    tiered.close()
    return differing(*states)


def test_several_processes_change_their_parts(pool, tmp_path):
    assert pool(2).run(several, str(tmp_path), timeout=120) == [[], []]
