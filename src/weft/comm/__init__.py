"""Gradient exchange: what workers send each other, and what they make of it.

    Codec        what goes on the wire in place of a tensor            `codecs`        CODECS
    Memory       what a worker keeps of what it did not send           `memories`      MEMORIES
    Combine      how n messages become one: W @ messages               `rules`         RULES
    Topology     who sends to whom, and what that costs                `topology`
    Wait         for whom a round waits                                `waits`, `straggler`   WAITS
    Controller   which setting each tensor gets, from when on          `controllers`   CONTROLLERS

    Exchange     the six put together; `reduce`, `report`, `cost`, checkpoints              `exchange`
    attach       an exchange under DistributedDataParallel, in one line                     `ddp`
    auto, dgc    exchanges put together: by the link, as published                          `automatic`, `presets`
    attach_peer  no server and nobody trusted: parameters, nearest to one's own (MoNNA)     `peer`
    MASHA        games and other variational inequalities with compressed differences       `masha`
    straggler    exact gradients although some workers are late                             `straggler`
    zeroth       tuning by forward passes, one byte per pair of them                        `zeroth`

Imports `weft.graph`, `weft.cluster` and `weft.nn` only, and works without the rest of weft. Each name is loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.names import lazily

if TYPE_CHECKING:
    from weft.comm.attacks import ATTACKS
    from weft.comm.automatic import auto
    from weft.comm.codec import Codec, LinearCodec, Spec
    from weft.comm.codecs import CODECS, Cast, Identity, LowRank, Quantise, RandK, ScalarSeed, SharedRandK, Sign, TopK
    from weft.comm.combine import Arrival, Combine, Info
    from weft.comm.controller import Controller
    from weft.comm.controllers import (
        CONTROLLERS,
        Accordion,
        BudgetTooSmall,
        LayerwiseBudget,
        Schedule,
        Uniform,
        greedy_layers,
        plan_layers,
        uniform_layers,
    )
    from weft.comm.ddp import Handle, attach
    from weft.comm.exchange import Exchange
    from weft.comm.masha import MASHA
    from weft.comm.memories import MEMORIES, ErrorFeedback, MomentumCorrection, Shift
    from weft.comm.memory import Memory, NoMemory, VelocityMemory
    from weft.comm.peer import MoNNA, attach_peer
    from weft.comm.presets import dgc
    from weft.comm.report import Report
    from weft.comm.rules import (
        MDA,
        NNM,
        RULES,
        Bucketing,
        Bulyan,
        CenteredClip,
        Flag,
        GeometricMedian,
        Krum,
        Meamed,
        Mean,
        Median,
        MultiKrum,
        NearestToOwn,
        NormEqualisedMean,
        TrimmedMean,
    )
    from weft.comm.topology import AllGather, Gossip, Peer, Ring, ScatterGather, Star, Topology
    from weft.comm.wait import Decision, Task, Wait
    from weft.comm.waits import WAITS

_HOME = {  # public name -> the module that has it
    "ATTACKS": "attacks",
    "auto": "automatic",
    **dict.fromkeys(("Codec", "LinearCodec", "Spec"), "codec"),
    **dict.fromkeys(
        ("CODECS", "Cast", "Identity", "LowRank", "Quantise", "RandK", "ScalarSeed", "SharedRandK", "Sign", "TopK"), "codecs"
    ),
    **dict.fromkeys(("Arrival", "Combine", "Info"), "combine"),
    "Controller": "controller",
    **dict.fromkeys(
        (
            "CONTROLLERS", "Accordion", "BudgetTooSmall", "LayerwiseBudget", "Schedule", "Uniform", "greedy_layers",
            "plan_layers", "uniform_layers",
        ),
        "controllers",
    ),
    **dict.fromkeys(("Handle", "attach"), "ddp"),
    "Exchange": "exchange",
    "MASHA": "masha",
    **dict.fromkeys(("MEMORIES", "ErrorFeedback", "MomentumCorrection", "Shift"), "memories"),
    **dict.fromkeys(("Memory", "NoMemory", "VelocityMemory"), "memory"),
    **dict.fromkeys(("MoNNA", "attach_peer"), "peer"),
    "dgc": "presets",
    "Report": "report",
    **dict.fromkeys(
        (
            "RULES", "Bucketing", "Bulyan", "CenteredClip", "Flag", "GeometricMedian", "Krum", "MDA", "Mean", "Meamed", "Median",
            "MultiKrum", "NNM", "NearestToOwn", "NormEqualisedMean", "TrimmedMean",
        ),
        "rules",
    ),
    **dict.fromkeys(("AllGather", "Gossip", "Peer", "Ring", "ScatterGather", "Star", "Topology"), "topology"),
    **dict.fromkeys(("Decision", "Task", "Wait"), "wait"),
    "WAITS": "waits",
}  # fmt: skip

__all__ = [
    "ATTACKS", "CODECS", "CONTROLLERS", "MASHA", "MDA", "MEMORIES", "NNM", "RULES", "WAITS",
    "Accordion", "AllGather", "Arrival", "Bucketing", "BudgetTooSmall", "Bulyan", "Cast", "CenteredClip", "Codec", "Combine",
    "Controller", "Decision", "ErrorFeedback", "Exchange", "Flag", "GeometricMedian", "Gossip", "Handle", "Identity", "Info",
    "Krum", "LayerwiseBudget", "LinearCodec", "LowRank", "Mean", "Meamed", "Median", "Memory", "MoNNA", "MomentumCorrection",
    "MultiKrum", "NearestToOwn", "NoMemory", "NormEqualisedMean", "Peer", "Quantise", "RandK", "Report", "Ring",
    "ScalarSeed", "ScatterGather", "Schedule", "SharedRandK", "Shift", "Sign", "Spec", "Star", "Task", "TopK", "Topology",
    "TrimmedMean", "Uniform", "VelocityMemory", "Wait",
    "attach", "attach_peer", "auto", "dgc", "greedy_layers", "plan_layers", "uniform_layers",
]  # fmt: skip


__getattr__, __dir__ = lazily(__name__, _HOME, ("straggler", "zeroth"))
