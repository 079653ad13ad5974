"""Cluster files: YAML (or the same as a dictionary) to `Cluster` and back. The schema is docs/cluster-file.md.

Reading goes over the file's nodes, which know their lines: a first pass turns them into plain Python values and notes the
line of every path (`("devices", 2, "memory")`); a second pass builds the cluster and names the line of whatever is wrong. For
a dictionary the second pass is the same and names the path instead. Writing gives each device its full figures, by way of
`kinds`, so that a file does not change its meaning when the library's figures do.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from weft.cluster.device import KINDS, TIERS, ClusterError, Device, Link, Rate, Tier
from weft.cluster.library import DEVICES, LINKS
from weft.cluster.topology import Cluster, Level
from weft.cluster.units import quantity
from weft.names import nearest, pick
from weft.paths import to_file

__all__ = ["from_dict", "load", "save", "to_dict"]

Path_ = tuple[Hashable, ...]

TOP = ("name", "kinds", "devices", "levels", "links")
KIND = ("like", "kind", "memory", "rates", "overlap", "step", "offload")
DEVICE = ("device", "name", "host", "count", "memory", "rates", "overlap", "step", "offload")
RATE = ("flops", "bandwidth", "overhead")
LEVEL = ("name", "by", "groups", "link", "links")
GROUP = ("devices", "link")
LINK = ("type", "latency", "bandwidth", "shared")
PAIR = ("between", "link", *LINK)
OFFLOAD = ("to", "type", "latency", "bandwidth", "capacity", "folder", "overlap")
DTYPES = ("float64", "float32", "tf32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")


@dataclass
class Source:
    """Where values come from: the file and the line of each path, or nothing but the paths."""

    file: str = ""
    lines: dict[Path_, int] = field(default_factory=dict)

    def where(self, path: Path_) -> str:
        if not self.file:
            return (
                "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".") or "cluster"
            )
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.file}:{self.lines.get(path, 1)}"

    def error(self, path: Path_, problem: str) -> ClusterError:
        return ClusterError(self.where(path), problem)

    @contextlib.contextmanager
    def at(self, path: Path_) -> Iterator[None]:
        """Give errors raised inside, which know no place, the place `path`."""
        try:
            yield
        except ClusterError as error:
            raise (error if error.where else self.error(path, error.problem)) from None
        except ValueError as error:
            raise self.error(path, str(error)) from None


# -- the file's nodes to plain values and lines ------------------------------------------------------------------------


def load(path: str | Path) -> Cluster:
    """Read a cluster file. Raises ClusterError(file:line, problem), or OSError where the file cannot be read."""
    source = Source(str(path))
    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            data = {} if node is None else _plain(loader, node, (), source)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = " ".join(filter(None, (error.problem, error.context)))
        raise ClusterError(f"{path}:{line}", f"not YAML: {problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ClusterError(f"{path}:1", f"not YAML: {error}") from None
    return _cluster(data, source)


def _plain(loader: yaml.SafeLoader, node: yaml.Node, path: Path_, source: Source) -> Any:
    source.lines.setdefault(path, node.start_mark.line + 1)
    if len(path) > 12:
        raise source.error(path, "nested too deeply for a cluster file")
    if isinstance(node, yaml.MappingNode):
        _refuse_twice(loader, node, path, source)
        loader.flatten_mapping(node)  # `<<: *other`; the keys of `other` come first, so that own ones win
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            source.lines[(*path, key)] = key_node.start_mark.line + 1
            result[key] = _plain(loader, value_node, (*path, key), source)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, (*path, number), source) for number, item in enumerate(node.value)]
    return loader.construct_object(node, deep=True)  # type: ignore[no-untyped-call]


def _refuse_twice(loader: yaml.SafeLoader, node: yaml.MappingNode, path: Path_, source: Source) -> None:
    """YAML lets the last of two equal keys win; here the second one is more likely a slip."""
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        source.lines[(*path, str(key))] = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise source.error((*path, str(key)), f"a key must be a word, got {key!r}")
        if key in seen:
            raise source.error((*path, key), f"{key!r} is given twice")
        seen.add(key)


# -- plain values to a cluster -----------------------------------------------------------------------------------------


def from_dict(data: Mapping[str, Any]) -> Cluster:
    """Build a cluster from the content of a cluster file. Raises ClusterError that names the place."""
    return _cluster(data, Source())


def _cluster(data: Any, source: Source) -> Cluster:
    data = _mapping(data, (), TOP, source, "a cluster file")
    kinds = {}
    for name, entry in _mapping(data.get("kinds") or {}, ("kinds",), None, source, "kinds").items():
        kinds[str(name)] = _kind(str(name), entry, ("kinds", name), {**DEVICES, **kinds}, source)
    devices = _devices(data.get("devices"), {**DEVICES, **kinds}, source)
    levels = _levels(data.get("levels"), devices, source)
    pairs = {}
    for number, entry in enumerate(_sequence(data.get("links") or [], ("links",), source, "links")):
        path = ("links", number)
        entry = _mapping(entry, path, PAIR, source, "an entry of links")
        ends = _sequence(_needed(entry, "between", path, source), (*path, "between"), source, "between")
        members = [_members(end, (*path, "between", i), devices, source) for i, end in enumerate(ends)]
        if len(members) != 2 or any(len(member) != 1 for member in members):
            raise source.error((*path, "between"), f"between must name two devices, got {ends}")
        rest = {key: value for key, value in entry.items() if key not in ("between", "link")}
        if ("link" in entry) == bool(rest):
            raise source.error(path, "give either link: NAME or latency and bandwidth")
        pairs[members[0][0], members[1][0]] = (
            _link(entry["link"], (*path, "link"), source) if "link" in entry else _link(rest, path, source)
        )
    with source.at(("levels",) if data.get("levels") else ("devices",)):
        return Cluster(tuple(devices), tuple(levels), pairs, str(data.get("name") or "cluster"))


def _kind(name: str, entry: Any, path: Path_, known: Mapping[str, Device], source: Source) -> Device:
    """A kind of device: the library's, changed (`like`), or all of its own."""
    entry = _mapping(entry, path, KIND, source, "a kind of device")
    if "like" in entry:
        with source.at((*path, "like")):
            base = pick(str(entry["like"]), known, "device")
    else:
        for key in ("memory", "rates"):
            _needed(entry, key, path, source, " (or like: a device of the library to start from)")
        base = Device(name, name, 1, {"default": Rate({"float32": 1.0}, 1.0)})
        rates = _rates(entry["rates"], (*path, "rates"), {}, source)
        with source.at((*path, "rates")):
            base = replace(base, rates=rates)
    base = _changed(base, entry, path, source)
    with source.at((*path, "offload")):  # the only figure that depends on the kind
        return replace(base, kind=str(entry.get("kind", name)))


def _changed(base: Device, entry: Mapping[str, Any], path: Path_, source: Source) -> Device:
    """`base` with the figures that `entry` gives."""
    changes: dict[str, Any] = {}
    if "memory" in entry:
        changes["memory"] = _number(entry["memory"], (*path, "memory"), "bytes", source)
    if "overlap" in entry:
        changes["overlap"] = _number(entry["overlap"], (*path, "overlap"), "a plain number", source)
    if "step" in entry:
        changes["step"] = _number(entry["step"], (*path, "step"), "seconds", source)
    if "rates" in entry:
        changes["rates"] = _rates(entry["rates"], (*path, "rates"), base.rates, source)
    if "offload" in entry:
        changes["offload"] = _tier(entry["offload"], (*path, "offload"), source)
    for key, value in changes.items():
        with source.at((*path, key)):
            base = replace(base, **{key: value})
    return base


def _tier(entry: Any, path: Path_, source: Source) -> Tier | None:
    """The tier below a device; None takes away what the kind has."""
    if entry is None:
        return None
    entry = _mapping(entry, path, OFFLOAD, source, "offload")
    to = _needed(entry, "to", path, source, f" ({' or '.join(TIERS)})")
    link = _link({key: value for key, value in entry.items() if key in LINK}, path, source)
    capacity = _number(entry["capacity"], (*path, "capacity"), "bytes", source) if "capacity" in entry else math.inf
    folder = str(entry.get("folder", ""))
    overlap = _number(entry["overlap"], (*path, "overlap"), "a plain number", source) if "overlap" in entry else None
    return _at_first_bad(source, path, lambda: Tier(link.bandwidth, link.latency, capacity, str(to), folder, overlap))  # type: ignore[no-any-return]


def _rates(entry: Any, path: Path_, base: Mapping[str, Rate], source: Source) -> dict[str, Rate]:
    result = dict(base)
    for kind, given in _mapping(entry, path, (*KINDS, "default"), source, "rates").items():
        where = (*path, kind)
        given, old = _mapping(given, where, RATE, source, "a rate"), base.get(kind)
        if old is None:
            for key in ("flops", "bandwidth"):
                _needed(given, key, where, source)
        flops = dict(old.flops) if old else {}
        if isinstance(given.get("flops"), Mapping):
            table = _mapping(given["flops"], (*where, "flops"), DTYPES, source, "flops")
            flops.update(
                {dtype: _number(value, (*where, "flops", dtype), "FLOP/s", source) for dtype, value in table.items()}
            )
        elif "flops" in given:
            flops = {"float32": _number(given["flops"], (*where, "flops"), "FLOP/s", source)}
        bandwidth = (
            _number(given["bandwidth"], (*where, "bandwidth"), "bytes per second", source)
            if "bandwidth" in given
            else old.bandwidth
        )  # type: ignore[union-attr]
        overhead = (
            _number(given["overhead"], (*where, "overhead"), "seconds", source)
            if "overhead" in given
            else old.overhead
            if old
            else 0.0
        )
        result[kind] = _at_first_bad(source, where, lambda f=flops, b=bandwidth, o=overhead: Rate(f, b, o))  # type: ignore[misc]
    return result


def _at_first_bad(source: Source, path: Path_, make: Callable[[], Any]) -> Any:
    """`make()`; its error is placed at the key that its sentence begins with (`flops of float32`, `bandwidth`)."""
    try:
        return make()
    except ClusterError as error:
        words = error.problem.split()
        deeper = (*path, words[0], words[2]) if words[1:2] == ["of"] else (*path, words[0])
        raise source.error(deeper, error.problem) from None


def _devices(entries: Any, known: Mapping[str, Device], source: Source) -> list[Device]:
    entries = _sequence(entries, ("devices",), source, "devices") if entries is not None else []
    if not entries:
        raise source.error(
            ("devices",),
            "devices: a list of at least one device is needed, for example [{device: A100-80GB, count: 4}]",
        )
    devices: list[Device] = []
    on_host: dict[str, int] = {}
    owner: dict[str, int] = {}
    for number, entry in enumerate(entries):
        path = ("devices", number)
        entry = _mapping({"device": entry} if isinstance(entry, str) else entry, path, DEVICE, source, "a device")
        with source.at((*path, "device")):
            base = pick(str(_needed(entry, "device", path, source)), known, "device")
        base = _changed(base, entry, path, source)
        host, count = str(entry.get("host", "localhost")), entry.get("count", 1)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise source.error((*path, "count"), f"count must be a whole number >= 1, got {count!r}")
        for copy in range(count):
            order = on_host[host] = on_host.get(host, -1) + 1
            name = (
                f"{host}-{order}"
                if "name" not in entry
                else f"{entry['name']}-{copy}"
                if count > 1
                else str(entry["name"])
            )
            if name in owner:
                raise source.error(
                    (*path, "name"),
                    f"two devices are called {name!r}; the other one is at {source.where(('devices', owner[name]))}",
                )
            owner[name] = number
            with source.at((*path, "name")):
                devices.append(replace(base, name=name, host=host))
    return devices


def _levels(entries: Any, devices: list[Device], source: Source) -> list[Level]:
    if entries is None:
        if len(devices) > 1:
            raise source.error(
                (), "levels: say what joins the devices, for example [{by: host, link: nvlink3}, {link: ethernet-10g}]"
            )
        return []
    return [
        _level(entry, ("levels", number), devices, source)
        for number, entry in enumerate(_sequence(entries, ("levels",), source, "levels"))
    ]


def _level(entry: Any, path: Path_, devices: list[Device], source: Source) -> Level:
    entry = _mapping(entry, path, LEVEL, source, "a level")
    default = _link(entry["link"], (*path, "link"), source) if "link" in entry else None
    groups: list[tuple[int, ...]] = []
    links: list[Link | None] = []
    if "by" in entry:
        if entry["by"] != "host" or "groups" in entry:
            raise source.error((*path, "by"), f"by must be host, and stand without groups, got {entry['by']!r}")
        hosts = list(dict.fromkeys(device.host for device in devices))
        own = _mapping(entry.get("links") or {}, (*path, "links"), tuple(hosts), source, "links of hosts")
        for host in hosts:
            groups.append(tuple(i for i, device in enumerate(devices) if device.host == host))
            links.append(_link(own[host], (*path, "links", host), source) if host in own else default)
    elif "groups" in entry:
        for number, group in enumerate(_sequence(entry["groups"], (*path, "groups"), source, "groups")):
            where = (*path, "groups", number)
            group = group if isinstance(group, Mapping) else {"devices": group}
            group = _mapping(group, where, GROUP, source, "a group")
            names = _sequence(_needed(group, "devices", where, source), where, source, "a group")
            groups.append(tuple(sorted(d for name in names for d in _members(name, where, devices, source))))
            links.append(_link(group["link"], (*where, "link"), source) if "link" in group else default)
    else:
        groups, links = [tuple(range(len(devices)))], [default]
    for number, (group, link) in enumerate(zip(groups, links, strict=True)):
        if link is None and len(group) > 1:
            raise source.error(
                path,
                f"the devices {[devices[d].name for d in group]} have no link; give the level, or its group {number}, a link",
            )
    name = str(entry.get("name") or ("host" if "by" in entry else f"level-{path[-1]}"))
    return Level(
        name, tuple(groups), tuple(link or Link(0.0, 1.0) for link in links)
    )  # a group of one has no use for its link


def _members(name: Any, path: Path_, devices: list[Device], source: Source) -> list[int]:
    """Device numbers that a number, a device's name, or a host's name stands for."""
    if isinstance(name, int) and not isinstance(name, bool):
        if 0 <= name < len(devices):
            return [name]
        raise source.error(path, f"there is no device {name}; devices are 0..{len(devices) - 1}")
    found = [i for i, device in enumerate(devices) if device.name == name] or [
        i for i, device in enumerate(devices) if device.host == name
    ]
    if found:
        return found
    near = nearest(str(name), [device.name for device in devices] + [device.host for device in devices])
    raise source.error(
        path, f"no device or host is called {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
    )


def _link(entry: Any, path: Path_, source: Source) -> Link:
    if isinstance(entry, str):
        with source.at(path):
            return pick(entry, LINKS, "link")
    entry = _mapping(entry, path, LINK, source, "a link")
    base = None
    if "type" in entry:
        with source.at((*path, "type")):
            base = pick(str(entry["type"]), LINKS, "link")
    else:
        for key in ("latency", "bandwidth"):
            _needed(entry, key, path, source, " (or type: a link of the library to start from)")
    latency = _number(entry["latency"], (*path, "latency"), "seconds", source) if "latency" in entry else base.latency  # type: ignore[union-attr]
    bandwidth = (
        _number(entry["bandwidth"], (*path, "bandwidth"), "bytes per second", source)
        if "bandwidth" in entry
        else base.bandwidth
    )  # type: ignore[union-attr]
    shared = entry.get("shared", base.shared if base else False)
    if not isinstance(shared, bool):
        raise source.error((*path, "shared"), f"shared must be true or false, got {shared!r}")
    return _at_first_bad(source, path, lambda: Link(latency, bandwidth, shared))  # type: ignore[no-any-return]


# -- shapes of entries -------------------------------------------------------------------------------------------------


def _mapping(value: Any, path: Path_, keys: tuple[str, ...] | None, source: Source, what: str) -> dict[Any, Any]:
    """`value` as a dictionary with no key outside `keys` (None: any)."""
    if not isinstance(value, Mapping):
        raise source.error(path, f"{what} must be a mapping (key: value), got {value!r}")
    for key in value:
        if keys is not None and key not in keys:
            near = nearest(str(key), keys)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(keys)}"
            raise source.error((*path, key), f"{what} has no {key!r}; {hint}")
    return dict(value)


def _sequence(value: Any, path: Path_, source: Source, what: str) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    raise source.error(path, f"{what} must be a list, got {value!r}")


def _needed(entry: Mapping[str, Any], key: str, path: Path_, source: Source, instead: str = "") -> Any:
    if key not in entry or entry[key] is None:
        raise source.error(path, f"{key} is missing{instead}")
    return entry[key]


def _number(value: Any, path: Path_, dimension: str, source: Source) -> float:
    try:
        return quantity(value, dimension)
    except ValueError as error:
        raise source.error(path, f"{path[-1]}: {error}") from None


# -- a cluster to plain values -----------------------------------------------------------------------------------------


def to_dict(cluster: Cluster) -> dict[str, Any]:
    """The content of a cluster file, of plain JSON types. `from_dict` gives back an equal cluster."""
    kinds: list[tuple[str, Device]] = []
    devices = []
    for device in cluster.devices:
        name = next((name for name, kind in kinds if kind.same_as(device)), None)
        if name is None:
            same = sum(kind.kind == device.kind for _, kind in kinds)
            name = device.kind if not same else f"{device.kind} ({same + 1})"
            kinds.append((name, device))
        devices.append({"device": name, "name": device.name, "host": device.host})
    result: dict[str, Any] = {
        "name": cluster.name,
        "kinds": {name: _kind_dict(name, kind) for name, kind in kinds},
        "devices": devices,
    }
    if cluster.levels:
        result["levels"] = [_level_dict(level) for level in cluster.levels]
    if cluster.pairs:
        result["links"] = [{"between": list(pair), **_link_dict(link)} for pair, link in cluster.pairs.items()]
    return result


def _kind_dict(name: str, device: Device) -> dict[str, Any]:
    kind = {} if name == device.kind else {"kind": device.kind}
    rates = {
        k: {"flops": dict(rate.flops), "bandwidth": rate.bandwidth, "overhead": rate.overhead}
        for k, rate in device.rates.items()
    }
    offload = {} if device.offload is None else {"offload": _tier_dict(device.offload)}
    step = {"step": device.step} if device.step else {}
    return {**kind, "memory": device.memory, "overlap": device.overlap, **step, "rates": rates, **offload}


def _tier_dict(tier: Tier) -> dict[str, Any]:
    capacity = {"capacity": tier.capacity} if tier.capacity < math.inf else {}
    folder = {"folder": tier.folder} if tier.folder else {}
    overlap = {} if tier.overlap is None else {"overlap": tier.overlap}
    return {"to": tier.name, "latency": tier.latency, "bandwidth": tier.bandwidth, **capacity, **folder, **overlap}


def _level_dict(level: Level) -> dict[str, Any]:
    if len(level.groups) == 1:
        return {"name": level.name, "link": _link_dict(level.links[0])}
    if len(set(level.links)) == 1:
        return {
            "name": level.name,
            "link": _link_dict(level.links[0]),
            "groups": [list(group) for group in level.groups],
        }
    groups = [
        {"devices": list(group), "link": _link_dict(link)}
        for group, link in zip(level.groups, level.links, strict=True)
    ]
    return {"name": level.name, "groups": groups}


def _link_dict(link: Link) -> dict[str, Any]:
    return {"latency": link.latency, "bandwidth": link.bandwidth, **({"shared": True} if link.shared else {})}


def save(cluster: Cluster, path: str | Path, comment: str = "") -> None:
    """Write a cluster file, with `comment` on top. Raises ValueError where it cannot be written."""
    to_file("cluster.save:", path)
    head = "".join(f"# {line}\n" if line else "#\n" for line in comment.splitlines())
    text = yaml.safe_dump(to_dict(cluster), sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    Path(path).write_text(head + text, encoding="utf-8")
