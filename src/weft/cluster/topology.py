"""A cluster: devices, and the levels of links between them.

A level cuts the devices into groups and says what link the members of each group have. Levels go from the innermost (the
GPUs of one NVLink island) to the outermost (everything); each level's groups are unions of the groups of the level
before. Two devices talk over the link of the innermost group that holds both; single pairs may be given a link of
their own. Groups of one level may be of unlike sizes and have unlike links: that is the normal case.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weft.cluster.device import SELF_LINK, ClusterError, Device, Link

__all__ = ["Cluster", "Level"]


@dataclass(frozen=True)
class Level:
    """One level of the topology.

    Attributes:
        name: what joins the devices here ("nvlink", "host", "network").
        groups: device numbers of each group; every device is in exactly one. A group of one device has no use for its link.
        links: the link within each group, one per group.
    """

    name: str
    groups: tuple[tuple[int, ...], ...]
    links: tuple[Link, ...]

    def __post_init__(self) -> None:
        if len(self.groups) != len(self.links):
            raise ClusterError(
                "",
                f"level {self.name!r} has {len(self.groups)} groups but {len(self.links)} links; give one for each group",
            )


@dataclass(frozen=True)
class Cluster:
    """Devices in rank order with the levels of links that join them.

    Attributes:
        devices: device i runs rank i.
        levels: innermost first; the last one holds all devices in one group. None are needed for a single device.
        pairs: links of single pairs (i, j), which count before the levels; (i, j) holds for (j, i) unless that is given too.
        name: for people.

    Raises:
        ClusterError: no devices, two devices of one name, levels that do not nest, a pair of unknown devices.

    >>> cluster = Cluster.homogeneous("A100-80GB", 8, hosts=2)
    >>> cluster.link(0, 1).bandwidth > cluster.link(0, 4).bandwidth
    True
    """

    devices: tuple[Device, ...]
    levels: tuple[Level, ...] = ()
    pairs: Mapping[tuple[int, int], Link] = field(default_factory=dict)
    name: str = "cluster"

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", tuple(self.devices))
        object.__setattr__(self, "levels", tuple(self.levels))
        _check_devices(self.devices)
        _check_levels(self.devices, self.levels)
        for i, j in self.pairs:
            if not (0 <= i < len(self.devices) and 0 <= j < len(self.devices)) or i == j:
                raise ClusterError(
                    "",
                    f"a link is given between devices {i} and {j}, but devices are 0..{len(self.devices) - 1} and must differ",
                )
        self._index()

    def _index(self) -> None:
        """Tables for `link` and the memory of `weft.cluster.costs`; not part of the value."""
        member = [[0] * len(self.devices) for _ in self.levels]
        for depth, level in enumerate(self.levels):
            for number, group in enumerate(level.groups):
                for device in group:
                    member[depth][device] = number
        key = (
            self.devices,
            self.levels,
            tuple(sorted((pair, link.latency, link.bandwidth) for pair, link in self.pairs.items())),
            self.name,
        )
        object.__setattr__(self, "_member", member)  # [level][device] -> number of its group
        object.__setattr__(self, "_hash", hash(key))
        # of weft.cluster.costs: cost as a function of bytes, by collective and ranks
        object.__setattr__(self, "_curves", {})

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined,no-any-return]

    def __len__(self) -> int:
        return len(self.devices)

    def __iter__(self) -> Iterator[Device]:
        return iter(self.devices)

    def __getitem__(self, rank: int) -> Device:
        return self.devices[rank]

    def __getstate__(self) -> dict[str, Any]:
        return {"devices": self.devices, "levels": self.levels, "pairs": dict(self.pairs), "name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            object.__setattr__(self, key, value)
        self._index()

    # -- asking ----------------------------------------------------------------------------------------------------------

    def link(self, i: int, j: int) -> Link:
        """The link from device i to device j: that of the pair, or of the innermost group that holds both.

        Raises: IndexError for a device that is not there.
        """
        if i == j:
            return SELF_LINK
        return self.route(i, j)[0]

    def route(self, i: int, j: int) -> tuple[Link, int]:
        """The link from i to j and the number of the level it belongs to (-1 for a pair's own link)."""
        if self.pairs:
            found = self.pairs.get((i, j)) or self.pairs.get((j, i))
            if found is not None:
                return found, -1
        for depth, member in enumerate(self._member):  # type: ignore[attr-defined]
            if member[i] == member[j]:
                return self.levels[depth].links[member[i]], depth
        raise IndexError(f"no level joins devices {i} and {j} of {len(self)}")

    def port(self, level: int, device: int) -> int:
        """Number of the group below `level` that holds `device`: the devices that share one connection at that level."""
        return device if level <= 0 else self._member[level - 1][device]  # type: ignore[attr-defined,no-any-return]

    def ordered(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """`ranks` group by group from the outermost level in: the order in which a ring crosses slow links least."""
        members = self._member[::-1]  # type: ignore[attr-defined]
        return tuple(sorted(ranks, key=lambda rank: (*(member[rank] for member in members), rank)))

    def split(self, ranks: Sequence[int]) -> list[tuple[int, ...]]:
        """`ranks` cut into the groups of the outermost level that tells them apart (one group: no level does)."""
        for member in reversed(self._member):  # type: ignore[attr-defined]
            parts: dict[int, list[int]] = {}
            for rank in ranks:
                parts.setdefault(member[rank], []).append(rank)
            if len(parts) > 1:
                return [tuple(part) for part in parts.values()]
        return [tuple(ranks)]

    @property
    def hosts(self) -> tuple[str, ...]:
        """Hosts in the order of their first device."""
        return tuple(dict.fromkeys(device.host for device in self.devices))

    @property
    def uniform(self) -> bool:
        """Whether all devices are interchangeable (see `Device.same_as`); links may still differ."""
        return all(device.same_as(self.devices[0]) for device in self.devices)

    def subset(self, ranks: Sequence[int]) -> Cluster:
        """The cluster of some devices, renumbered 0.. in the order of `ranks`."""
        new = {rank: number for number, rank in enumerate(ranks)}
        if len(new) != len(ranks):
            raise ClusterError("", f"subset: ranks must differ, got {list(ranks)}")
        levels = []
        for level in self.levels:
            kept = [
                (tuple(sorted(new[d] for d in group if d in new)), link)
                for group, link in zip(level.groups, level.links, strict=True)
            ]
            kept = [(group, link) for group, link in kept if group]
            levels.append(Level(level.name, tuple(group for group, _ in kept), tuple(link for _, link in kept)))
        pairs = {(new[i], new[j]): link for (i, j), link in self.pairs.items() if i in new and j in new}
        return Cluster(tuple(self.devices[rank] for rank in ranks), tuple(levels), pairs, self.name)

    # -- making ----------------------------------------------------------------------------------------------------------

    @classmethod
    def local(cls, processes: int = 2, memory: int | None = None) -> Cluster:
        """This machine as `processes` devices of one CPU core each, with the library's figures and no measuring.

        Args:
            processes: number of processes, >= 1.
            memory: bytes for each; by default an equal share of the machine's memory.
        Instant and, for one machine, always the same. `weft profile` measures instead.
        """
        from weft.cluster.library import device, link_type

        if processes < 1:
            raise ClusterError("", f"processes must be >= 1, got {processes}")
        share = memory if memory is not None else machine_memory() // processes
        core = device("cpu-core")
        devices = tuple(replace(core, name=f"cpu{i}", memory=share, host="localhost") for i in range(processes))
        return cls(devices, (everyone("loopback", processes, link_type("loopback")),), name="local")

    @classmethod
    def homogeneous(
        cls, kind: str, count: int, hosts: int = 1, link: str | Link = "auto", network: str | Link = "infiniband-hdr"
    ) -> Cluster:
        """`count` devices of one library kind, spread evenly over `hosts` machines.

        Args:
            kind: a name of `weft.cluster.DEVICES`.
            count: devices in all, a multiple of `hosts`.
            hosts: machines.
            link: within a machine: a link, a name of `weft.cluster.LINKS`, or "auto" for what this kind usually has.
            network: between machines, likewise.
        Raises:
            ClusterError: an unknown name (with the nearest ones), or a count that `hosts` does not divide.
        """
        from weft.cluster.library import device, link_type, usual_link

        if count < 1 or hosts < 1 or count % hosts:
            raise ClusterError("", f"count must be a positive multiple of hosts, got {count} devices on {hosts} hosts")
        model, each = device(kind), count // hosts
        inner = usual_link(kind) if link == "auto" else link
        devices = tuple(
            replace(model, name=f"host{i // each}-{i % each}", host=f"host{i // each}") for i in range(count)
        )
        groups = tuple(tuple(range(h * each, (h + 1) * each)) for h in range(hosts))
        inside = inner if isinstance(inner, Link) else link_type(inner)
        levels = [Level("host", groups, (inside,) * hosts)]
        if hosts > 1:
            levels.append(everyone("network", count, network if isinstance(network, Link) else link_type(network)))
        return cls(devices, tuple(levels), name=f"{count} x {model.kind}")

    # -- files -----------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Read a cluster file (docs/cluster-file.md). Raises ClusterError with file:line for whatever is wrong in it."""
        from weft.cluster.yaml_io import load

        return load(path)

    def save(self, path: str | Path, comment: str = "") -> None:
        """Write a cluster file that `load` reads back as an equal cluster; `comment` goes on top."""
        from weft.cluster.yaml_io import save

        save(self, path, comment)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cluster:
        """From the content of a cluster file. Raises ClusterError that names the place (`devices[2].memory`)."""
        from weft.cluster.yaml_io import from_dict

        return from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        """The content of a cluster file, of plain JSON types; `from_dict(to_dict())` is equal to this cluster."""
        from weft.cluster.yaml_io import to_dict

        return to_dict(self)

    def __str__(self) -> str:
        kinds: dict[str, int] = {}
        for one in self.devices:
            kinds[one.kind] = kinds.get(one.kind, 0) + 1
        parts = [", ".join(f"{count} x {kind}" for kind, count in kinds.items()) + f" on {len(self.hosts)} host(s)"]
        for level in self.levels:
            speeds = sorted({link.bandwidth for link in level.links})
            speed = f"{speeds[0] / 1e9:.3g}" + (f"..{speeds[-1] / 1e9:.3g}" if len(speeds) > 1 else "")
            parts.append(
                f"{level.name}: {len(level.groups)} group(s), {speed} GB/s, {min(k.latency for k in level.links) * 1e6:.3g} us"
            )
        return "; ".join(parts)


def everyone(name: str, count: int, link: Link) -> Level:
    """The level that joins all of `count` devices."""
    return Level(name, (tuple(range(count)),), (link,))


def machine_memory() -> int:
    """Bytes of memory that processes here may use together: the machine's, or the limit of the control group if lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # not there, not ours, or "max"
            continue
    return total


def _check_devices(devices: Sequence[Device]) -> None:
    if not devices:
        raise ClusterError("", "a cluster needs at least one device")
    seen: dict[str, int] = {}
    for number, one in enumerate(devices):
        if one.name in seen:
            raise ClusterError(
                "", f"devices {seen[one.name]} and {number} are both called {one.name!r}; names must differ"
            )
        seen[one.name] = number


def _check_levels(devices: Sequence[Device], levels: Sequence[Level]) -> None:
    everything, below = set(range(len(devices))), [{i} for i in range(len(devices))]
    for level in levels:
        held = [device for group in level.groups for device in group]
        if sorted(held) != sorted(everything):
            missing, odd = sorted(everything - set(held)), sorted(set(held) - everything)
            twice = sorted({d for d in held if held.count(d) > 1})
            said = [
                f"{what} {which}"
                for what, which in (("misses", missing), ("names unknown", odd), ("repeats", twice))
                if which
            ]
            raise ClusterError("", f"level {level.name!r} must hold every device once, but it {' and '.join(said)}")
        groups = [set(group) for group in level.groups]
        for inner in below:
            if not any(inner <= group for group in groups):
                raise ClusterError(
                    "",
                    f"level {level.name!r} cuts through the devices {sorted(inner)}, which the level before it joins; "
                    "list levels innermost first",
                )
        below = groups
    if len(below) > 1:
        raise ClusterError(
            "",
            f"the outermost level must join all {len(devices)} devices, but leaves {len(below)} groups apart; "
            "add a level over them",
        )
