"""Training state on whatever memory there is: device, host, disk.

    Tiered          a model with parameters, gradients, optimizer states, activations on tiers                     tiered
    DiskOptimizer   any elementwise torch optimizer with its state on disk, in one process                 disk_optimizer
    tile            a wide linear layer as tiles that run one after the other                                      tiling
    choose          which tiers, from what they hold and how fast they are                                        traffic
    copies          how fast activations are copied to a tier and back; `measured` makes a `Tier` of it             rates
    describe        what a folder lies on, to print beside every number measured there                              files

A step of `Tiered`, one file each: what runs in the model (`passes`), which parameters are on the device (`presence`), how they
get there (`fetch`, in the order that `prefetch` records and `rounds` agree on), what autograd saves and gives (`backward`,
`activations`, `gradients`), updates within backward (`updates`), the end of it (`stepping`); what lives where (`store`).
What is underneath: bytes past the page cache (`files`), memory that copies itself (`pinned`), who holds which elements (`layout`,
`dense`), optimizers on pieces (`elementwise`, `groups`), states on their way through memory (`states`, `ring`) and in two places
on disk (`statefile`), crash-safe records (`manifest`, `notes`), one job per folder (`workplace`, `lock`), resuming on any number
of processes (`resume`), states as state dicts have them (`whole`).
Source: Rajbhandari et al., ZeRO-Infinity, arXiv:2104.07857.
"""

from __future__ import annotations

from weft.memory.tiers.disk_optimizer import DiskOptimizer
from weft.memory.tiers.files import Place, describe, measure
from weft.memory.tiers.rates import Copies, copies, measured
from weft.memory.tiers.store import TIERS, Tiers
from weft.memory.tiers.tiered import Tiered
from weft.memory.tiers.tiling import TiledLinear, tile
from weft.memory.tiers.traffic import Room, Traffic, choose, efficiency, intensity, traffic

__all__ = [
    "TIERS", "Copies", "DiskOptimizer", "Place", "Room", "TiledLinear", "Tiered", "Tiers", "Traffic",
    "choose", "copies", "describe", "efficiency", "intensity", "measure", "measured", "tile", "traffic",
]  # fmt: skip
