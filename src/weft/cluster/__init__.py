"""What machines there are, and what computing and moving bytes costs on them, in seconds.

    Device, Rate      how fast one device runs each kind of operator (a roofline), and its memory
    Link              latency and bandwidth between two devices
    Tier              memory below a device, for activations that wait: its host's, a disk
    Cluster, Level    devices and levels of links; from a file, from the library, or measured
    costs             seconds of point-to-point messages and collectives over unlike links (a module)
    DEVICES, LINKS    named devices and links with the sources of their figures
    profile           measure this machine, or the processes under torchrun

Sizes are bytes, times seconds, rates FLOP/s and bytes/s. Nothing here imports torch
or a solver until something is measured.

>>> from weft.cluster import Cluster, costs
>>> cluster = Cluster.homogeneous("A100-80GB", 8)
>>> f"{costs.all_reduce(cluster, range(8), 100e6) * 1e3:.2f} ms"
'0.81 ms'
"""

from weft.cluster import costs
from weft.cluster.device import KINDS, ClusterError, Device, Link, Rate, Tier
from weft.cluster.library import DEVICES, LINKS
from weft.cluster.profiler import ProfileError, ProfileReport, profile
from weft.cluster.topology import Cluster, Level

__all__ = [
    "DEVICES",
    "KINDS",
    "LINKS",
    "Cluster",
    "ClusterError",
    "Device",
    "Level",
    "Link",
    "ProfileError",
    "ProfileReport",
    "Rate",
    "Tier",
    "costs",
    "profile",
]
