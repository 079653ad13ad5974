"""Checkpoints: folders of `torch.distributed.checkpoint` that any plan, and any number of processes, can load.

    folder/weft.json             format, names, optimizer's groups, class of the schedule, and size and CRC-32 of every other file
    folder/about.pt              what the trainer wants back: steps, scheduler, random state
    folder/exchange-<rank>.pt    what each process's exchange of gradients has kept, if there is one (see coded.py)
    folder/*.distcp, .metadata   the tensors, as DTensors; `model.<name>` and `optimizer.state.<name>.<key>` as torch's own
                                 `get_state_dict` calls them, so that plain torch programs can read them too

A process's pieces may be cut in ways that DTensor cannot say (weights, heads, uneven remainders). Such a tensor is gathered, one
at a time, and cut again as `torch.chunk` does; all others are handed over as they lie.                   `dtensors`

`save` writes beside the target and renames when everything is there; a run that dies while saving leaves the old checkpoint.
`load` checks every file, reads everything into memory of its own, and only then changes the engine.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from weft.errors import CheckpointDamaged, ExchangeMismatch
from weft.placement.assignment import ParameterPlacement
from weft.placement.layout import Mesh, Shard
from weft.runtime import coded
from weft.runtime.choice import Choice
from weft.runtime.optimizer import Recipe, plain_options
from weft.runtime.pieces import Holding, hold

if TYPE_CHECKING:
    from weft.runtime.engine import Engine

__all__ = [
    "check", "check_optimizer", "check_schedule", "dtensors", "load", "read_about", "read_index", "read_values", "read_whole",
    "save",
]  # fmt: skip

FORMAT = 1
INDEX, ABOUT = "weft.json", "about.pt"


def _dcp() -> ModuleType:
    """`torch.distributed.checkpoint`: it takes as long to import as all of weft, and most processes never save."""
    import torch.distributed.checkpoint as dcp

    return dcp


# ---- DTensors of pieces


def dtensors(engine: Engine) -> dict[str, Any]:
    """Model and optimizer state as nested dicts of DTensors (plain tensors on a mesh of one device); a collective."""
    model: dict[str, Any] = {
        name: _as_dtensor(engine, name, engine.store.pieces[name]) for name in engine.store.holdings
    }
    model.update({name: engine.whole(name) for name in engine.names if name not in engine.store.holdings})
    state: dict[str, dict[str, Any]] = {}
    for name, values in _optimizer_state(engine).items():
        state[name] = {}
        for key, value in values.items():
            piecewise = _is_piece(engine, name, value)
            state[name][key] = _as_dtensor(engine, name, value) if piecewise else torch.as_tensor(value)
    return {"model": model, "optimizer": {"state": state}}


def _optimizer_state(engine: Engine) -> dict[str, dict[str, Any]]:
    pieces = engine.store.pieces
    return {
        name: dict(engine.optimizer.state[pieces[name]]) for name in pieces if engine.optimizer.state.get(pieces[name])
    }


def _is_piece(engine: Engine, name: str, value: Any) -> bool:
    """Whether a tensor of the optimizer's state has one element per element of the piece."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == engine.store.pieces[name].shape


def _as_dtensor(engine: Engine, name: str, piece: Tensor) -> Any:
    h, mesh = engine.store.holdings[name], _device_mesh(engine)
    piece = piece.detach()
    if mesh is None:
        return piece
    if not _is_chunked(h.shape, h.placement, h.mesh):
        piece = _chunk(engine.store.whole(name, piece), h).contiguous()
    return _wrap(piece, h, mesh)


def _wrap(piece: Tensor, h: Holding, mesh: Any) -> Any:
    from torch.distributed.tensor import DTensor

    stride = tuple(math.prod(h.shape[dim + 1 :]) for dim in range(len(h.shape)))
    placements = _torch_placements(h)
    return DTensor.from_local(piece, mesh, placements, run_check=False, shape=torch.Size(h.shape), stride=stride)


def _cut_dims(h: Holding) -> list[int | None]:
    """Per mesh axis the dim that is cut, by use or by pieces."""
    return _dims_of(h.placement, h.scatter_axes)


def _dims_of(placement: ParameterPlacement, scatter_axes: tuple[int, ...]) -> list[int | None]:
    dims: list[int | None] = []
    for axis, used in enumerate(placement.used):
        stages = (used, placement.state[axis], placement.gradient[axis], placement.stored[axis])
        shards = [p for p in stages if isinstance(p, Shard)]
        dims.append(shards[0].dim if shards and (isinstance(used, Shard) or axis in scatter_axes) else None)
    return dims


def _torch_placements(h: Holding) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate() if dim is None else Shard(dim) for dim in _cut_dims(h)]


@lru_cache(maxsize=4096)
def _is_chunked(shape: tuple[int, ...], placement: ParameterPlacement, mesh: Mesh) -> bool:
    """Whether every device's piece is the one that DTensor's (nested `torch.chunk`) would be."""
    for position in mesh.positions():
        h = hold("", shape, torch.float32, True, placement, mesh, position)
        if h.offsets() != _chunk_box(shape, _cut_dims(h), mesh, position):
            return False
    return True


def _chunk_box(
    shape: tuple[int, ...], dims: list[int | None], mesh: Mesh, position: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    low, size = [0] * len(shape), list(shape)
    for axis, dim in enumerate(dims):
        if dim is not None:
            each = -(-size[dim] // mesh.shape[axis])
            start = min(each * position[axis], size[dim])
            low[dim] += start
            size[dim] = min(each, size[dim] - start)
    return tuple((start, start + count) for start, count in zip(low, size, strict=True))


def _chunk(whole: Tensor, h: Holding) -> Tensor:
    for dim, (start, stop) in enumerate(_chunk_box(h.shape, _cut_dims(h), h.mesh, h.position)):
        whole = whole.narrow(dim, start, stop - start)
    return whole


_MESHES: dict[object, Any] = {}


def _device_mesh(engine: Engine) -> Any:
    """torch's mesh of the plan's; None in a single process."""
    if not dist.is_initialized():
        return None
    from torch.distributed.device_mesh import DeviceMesh

    mesh = engine.comms.mesh
    key = (dist.group.WORLD, mesh)
    if key not in _MESHES:
        ranks = torch.tensor(mesh.ranks).view(mesh.shape)
        _MESHES[key] = DeviceMesh(engine.device.type, ranks, mesh_dim_names=mesh.names)
    return _MESHES[key]


# ---- saving


def save(engine: Engine, path: Path, about: Mapping[str, Any]) -> None:
    """Write a checkpoint folder, over an older one of that name; a collective.

    Args:
        path: the folder; on several machines it must be on a file system that all see.
        about: plain values and tensors to be given back by `load`.
    Raises:
        ValueError: there is something else of that name.
    """
    path = Path(os.path.abspath(path))
    rank, alone = engine.comms.rank, not dist.is_initialized()
    part = path.with_name(f".{path.name}.saving")
    _agree(engine, lambda: _make_room(path, part))
    state = dtensors(engine)
    with _quiet():
        _dcp().save(state, checkpoint_id=part, no_dist=alone)
    mine = [*sorted(part.glob(f"__{0 if alone else rank}_*")), *coded.save(engine.coded, part)]
    files: dict[str, list[int]] = {}
    for found in _gather({file.name: [file.stat().st_size, _crc(file)] for file in mine}):
        files.update(found)
    if rank == engine.comms.mesh.ranks[0]:
        _write_synced(part / ABOUT, _pickled(about))
        for name in (".metadata", ABOUT):
            files[name] = [(part / name).stat().st_size, _crc(part / name)]
        index = {
            "format": FORMAT,
            "steps": engine.steps,
            "model": {name: list(_shape(engine, name)) for name in engine.names},
            "optimizer": {
                "kind": engine.wanted.kind.__name__,
                "groups": [_json_options(group) for group in engine.optimizer.param_groups],
                "members": engine.wanted.names(),
                "state": {
                    name: {key: _is_piece(engine, name, value) for key, value in values.items()}
                    for name, values in _optimizer_state(engine).items()
                },
            },
            "exchange": coded.about(engine.coded),
            "names": about.get("names", {}),
            "schedule": about.get("schedule", ""),
            "files": files,
        }
        _write_synced(part / INDEX, json.dumps(index, indent=1).encode())
        _replace(part, path)
    if not alone:
        dist.barrier()


def _shape(engine: Engine, name: str) -> tuple[int, ...]:
    if name in engine.store.holdings:
        return engine.store.holdings[name].shape
    return next(node.outputs[0].shape for node in engine.graph.of("buffer") if node.target == name)


def _json_options(group: Mapping[str, Any]) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None), list, tuple)
    return {key: value for key, value in plain_options(group).items() if isinstance(value, plain)}


def _make_room(path: Path, part: Path) -> None:
    """An empty folder to write in. What stands at `path` will be replaced, so it must be a checkpoint."""
    if path.exists() and not (path / INDEX).exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"{path} holds something else than a checkpoint, which saving would replace; name another folder"
        )
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _replace(part: Path, path: Path) -> None:
    """Put a finished folder in place of an older one; at every moment one of them can be found."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    part.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


# ---- loading


def check(path: Path) -> dict[str, Any]:
    """The index of a checkpoint, after seeing that every file is whole.

    Raises:
        ValueError: there is no checkpoint.
        CheckpointDamaged: a file is missing, cut short or altered.
    """
    index = read_index(path)
    for name, (size, crc) in index["files"].items():
        file = Path(index["path"]) / name
        if not file.is_file():
            raise CheckpointDamaged(index["path"], f"{name} is missing")
        if file.stat().st_size != size:
            raise CheckpointDamaged(index["path"], f"{name} has {file.stat().st_size} bytes instead of {size}")
        if _crc(file) != crc:
            raise CheckpointDamaged(index["path"], f"the content of {name} has changed")
    return index


def read_index(path: Path) -> dict[str, Any]:
    """What `weft.json` says, and under "path" the folder; the other files are not looked at. Raises as `check`."""
    path = Path(path)
    if not path.exists() and path.with_name(f".{path.name}.old").exists():  # died between two renames
        path = path.with_name(f".{path.name}.old")
    if not path.is_dir():
        raise ValueError(f"no checkpoint at {path}; a checkpoint is a folder written by trainer.save")
    try:
        index: dict[str, Any] = json.loads((path / INDEX).read_text())
        index["files"] = dict(index["files"])
    except FileNotFoundError:
        raise CheckpointDamaged(str(path), f"{INDEX} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointDamaged(str(path), f"{INDEX} cannot be read ({error})") from None
    if index.get("format") != FORMAT:
        raise ValueError(f"checkpoint {path} has format {index.get('format')}, this version of weft reads {FORMAT}")
    index["path"] = str(path)
    return index


def load(engine: Engine, path: Path) -> dict[str, Any]:
    """Read a checkpoint into an engine of any plan for the same model; a collective.

    Returns:
        What `save` was told as `about`; besides, under "remark", what the user should know of the exchange's memories.
    Raises:
        ValueError: no checkpoint, or one of another model, optimizer or exchange (`ExchangeMismatch`).
        CheckpointDamaged: the files are not what was written. In both cases nothing has been changed.
    """
    index = _agree(engine, lambda: _checked(engine, Path(path)))
    alone = not dist.is_initialized()
    if index["takes"]:
        engine.take_exchange(index["takes"])
    state = _empty_like(engine, index)
    try:
        with _quiet():
            _dcp().load(state, checkpoint_id=index["path"], no_dist=alone)
        about = read_about(index)
        memories = coded.read(engine.coded, index)
        problem: Exception | None = None
    except ExchangeMismatch as error:
        problem = error
    except Exception as error:
        problem = CheckpointDamaged(index["path"], f"{type(error).__name__}: {error}")
    for found in _gather(problem):
        if found is not None:
            raise found
    if memories and engine.coded is not None:
        engine.coded.load(memories)
    _take_over(engine, index, state)
    return {**about, "remark": index["remark"]}


def _checked(engine: Engine, path: Path) -> dict[str, Any]:
    index = check(path)
    here = {name: list(_shape(engine, name)) for name in engine.names}
    if index["model"] != here:
        lacking = sorted(set(here) - set(index["model"]))
        extra = sorted(set(index["model"]) - set(here))
        other = [name for name in here if name in index["model"] and here[name] != index["model"][name]]
        raise ValueError(
            f"checkpoint {path} is of another model: it lacks {lacking[:3] or 'nothing'}, has {extra[:3] or 'nothing'} besides, "
            f"and differs in the shape of {other[:3] or 'nothing'}"
        )
    check_optimizer(index, engine.wanted)
    exchange, index["takes"] = engine.coded.exchange if engine.coded is not None else None, ""
    carried = bool(coded.Rows.of(engine.store.reduced).axes)
    if isinstance(engine.options.exchange, Choice) and index.get("exchange") and carried:
        fitting = engine.options.exchange.fitting(index["exchange"]["options"])  # as the run chose that saved it
        if fitting and (engine.coded is None or engine.coded.name != fitting):
            exchange, index["takes"] = engine.options.exchange.make(fitting), fitting
    index["remark"] = coded.check(exchange, engine.store.reduced, index)
    return index


def read_about(index: Mapping[str, Any]) -> dict[str, Any]:
    """What `save` was told about the checkpoint of an index."""
    return torch.load(Path(index["path"]) / ABOUT, weights_only=True)


def check_optimizer(index: Mapping[str, Any], wanted: Recipe) -> None:
    """See whether a run's optimizer can go on with the state and options in the checkpoint of an index.

    Raises:
        ValueError: it is another one, or has its parameters in other groups. Ones that were not trained before, or are not any
            more, may come and go.
    """
    saved, here = index["optimizer"], wanted.names()
    remedy = "or load the weights alone: trainer.load_state_dict(weft.runtime.read_whole(path))"
    if saved["kind"] != wanted.kind.__name__:
        raise ValueError(
            f"checkpoint {index['path']} is of a run with {saved['kind']}, but this one uses {wanted.kind.__name__}; use that "
            f"optimizer, {remedy}"
        )
    if len(saved["groups"]) != len(here):
        raise ValueError(
            f"checkpoint {index['path']} has {len(saved['groups'])} parameter groups, but this run's optimizer has {len(here)}; "
            f"give it the groups of the run that saved, {remedy}"
        )
    before = {name: number for number, names in enumerate(saved.get("members", ())) for name in names}
    for number, names in enumerate(here):
        for name in names:
            if before.get(name, number) != number:
                raise ValueError(
                    f"checkpoint {index['path']} has {name!r} in parameter group {before[name]}, but this run's optimizer has it "
                    f"in group {number}; give it the groups of the run that saved, {remedy}"
                )


def check_schedule(index: Mapping[str, Any], here: str) -> None:
    """See whether a run's learning-rate schedule (by its class, "" for none) can take the state in the checkpoint of an index.

    Raises:
        ValueError: it is of another class. A run may leave the schedule out, or begin one.
    """
    saved = index.get("schedule", "")
    if saved and here and saved != here:
        raise ValueError(
            f"checkpoint {index['path']} is of a run with the schedule {saved}, but this one uses {here}; use that schedule, or "
            "load the weights alone: trainer.load_state_dict(weft.runtime.read_whole(path))"
        )


def _empty_like(engine: Engine, index: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors of our own to read into, with the keys of the checkpoint."""
    mesh = _device_mesh(engine)

    def empty(name: str, dtype: torch.dtype | None = None) -> Any:
        h = engine.store.holdings[name]
        if mesh is None:
            return torch.empty(h.shape, dtype=dtype or h.dtype)
        box = _chunk_box(h.shape, _cut_dims(h), h.mesh, h.position)
        return _wrap(torch.empty([b - a for a, b in box], dtype=dtype or h.dtype), h, mesh)

    dtypes = _dtypes(index["path"])
    model: dict[str, Any] = {name: empty(name) for name in engine.store.holdings}
    model.update({name: torch.empty_like(engine.whole(name)) for name in engine.names if name not in model})
    state = {}
    for name, keys in index["optimizer"]["state"].items():
        state[name] = {}
        for key, piecewise in keys.items():
            dtype, shape = dtypes[f"optimizer.state.{name}.{key}"]
            state[name][key] = empty(name, dtype) if piecewise else torch.empty(shape, dtype=dtype)
    return {"model": model, "optimizer": {"state": state}}


def _dtypes(path: str) -> dict[str, tuple[torch.dtype, torch.Size]]:
    metadata = _dcp().FileSystemReader(path).read_metadata().state_dict_metadata
    return {
        key: (value.properties.dtype, value.size) for key, value in metadata.items() if hasattr(value, "properties")
    }


@torch.no_grad()
def _take_over(engine: Engine, index: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Put what was read in its place."""
    for name, value in state["model"].items():
        if name in engine.store.holdings:
            engine.store.set_piece(name, _to_piece(engine, name, value))
        else:
            engine.load_one(name, value)
    engine.store.updated()
    engine.optimizer.state.clear()
    for name, values in state["optimizer"]["state"].items():
        if name in engine.store.pieces:
            keys = index["optimizer"]["state"][name]
            engine.optimizer.state[engine.store.pieces[name]] = {
                key: _to_piece(engine, name, value).to(engine.device) if keys[key] else value
                for key, value in values.items()
            }
    for group, options in zip(engine.optimizer.param_groups, index["optimizer"]["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in plain_options(options).items()})
    engine.steps = int(index["steps"])


def _to_piece(engine: Engine, name: str, value: Any) -> Tensor:
    h = engine.store.holdings[name]
    if not hasattr(value, "to_local"):
        return value
    if _is_chunked(h.shape, h.placement, h.mesh):
        return value.to_local()
    return h.take(value.full_tensor()).clone()


def read_whole(path: str | Path) -> dict[str, Tensor]:
    """The model's tensors of a checkpoint, whole, under the names of the original module's state dict; needs no processes.

    Raises:
        ValueError, CheckpointDamaged: as `check`.
    """
    index = check(Path(path))
    model = read_values(index)
    return {name: model[source] for name, source in (index["names"] or {n: n for n in model}).items()}


def read_values(index: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's tensors in the checkpoint of an index, whole, under the names that weft holds them by."""
    dtypes = _dtypes(index["path"])
    model = {name: torch.empty(shape, dtype=dtypes[f"model.{name}"][0]) for name, shape in index["model"].items()}
    try:
        with _quiet():
            _dcp().load({"model": model}, checkpoint_id=index["path"], no_dist=True)
    except Exception as error:
        raise CheckpointDamaged(index["path"], f"{type(error).__name__}: {error}") from error
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the remark that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


# ---- agreement between processes


def _agree(engine: Engine, check_it: Any) -> Any:
    """Run a check on the first process only; its result, or its error, on every process."""
    outcome: list[Any] = [None, None]
    if engine.comms.rank == engine.comms.mesh.ranks[0]:
        try:
            outcome[0] = check_it()
        except Exception as error:
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=engine.comms.mesh.ranks[0])
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _gather(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
