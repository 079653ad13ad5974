"""Build a model without memory for its values, then make each device's piece of each value, bit for bit.

Problem    `torch.manual_seed(seed); factory()` fills every parameter from one stream of random numbers. A model larger than
           one process must come to life piece by piece, with those very values.
Method     construct it with every tensor on the meta device, and write down what would have filled them:    `deferred`
               a *tape* of operators that write, with the geometry of their operands                         `Tape`, `Op`
               random operators form a chain: each starts where another left its generator                   `Draw`
           then, one tensor at a time: run only the operators on which its final value depends, each random one from
           its own place in the stream, and keep only the local piece                                        `materialise`
           A draw that a later operator overwrites (HuggingFace initialises everything twice) still moves the generator:
           it is made in a scratch tensor and dropped. Generator states (5 KB) are kept where a draw must run twice.
Guarantee  the same operators on operands of the same geometry from the same generator state: equal bits on one machine and
           build of torch. Memory is that of one tensor and what its own initialisation needs beside it: `Replay.peak`.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from weft.errors import NotReplayable
from weft.placement.layout import Mesh, Placements, take
from weft.placement.replay import OVERWRITES, Draw, Op, Replay, Tape, View

__all__ = ["deferred", "materialise", "tape_of"]

Module = TypeVar("Module", bound=nn.Module)

EMPTY = frozenset({"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"})
META = torch.device("meta")
PRETENCES = {
    Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: True,  # type: ignore[attr-defined]
    Tensor.device.__get__: torch.device("cpu"),
}


def deferred(factory: Callable[..., Module], *args: Any, seed: int = 0, **kwargs: Any) -> Module:
    """`factory(*args, **kwargs)` on the meta device, with a tape from which `materialise` makes the values.

    The factory may be any code that builds a module on the CPU, unaware of all this: in-place initialisation, values
    computed from others, `.item()` and `.tolist()` (those few values are made at once), `torch.Generator`s of its own.

    Args:
        factory: a module class or a function that returns a module.
        seed: what `torch.manual_seed` gets before; the global generator is left as it was.
    Raises:
        NotReplayable: construction writes into a tensor that existed before, or draws on another device.

    >>> layer = deferred(nn.Linear, 4, 2, seed=7)
    >>> layer.weight.device
    device(type='meta')
    >>> _ = torch.manual_seed(7)
    >>> bool((dict(materialise(layer))["weight"] == nn.Linear(4, 2).weight).all())
    True
    """
    recorder = _Recorder()
    with torch.random.fork_rng(devices=[]), recorder.generators_restored():
        torch.manual_seed(seed)
        with torch.device("cpu"), _Pretend(recorder), recorder:
            model = factory(*args, **kwargs)
    if not isinstance(model, nn.Module):
        raise ValueError(f"deferred: the factory must return an nn.Module, got {type(model).__name__}")
    recorder.finish(model)
    model.__dict__["_weft_tape"] = recorder.tape
    return model


def tape_of(model: nn.Module) -> Tape | None:
    """The tape of a model that `deferred` built, else None."""
    return model.__dict__.get("_weft_tape")


class _Pretend(TorchFunctionMode):
    """Let construction see the tensors as CPU tensors: some initialisers skip meta tensors, some code asks for values."""

    def __init__(self, recorder: _Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in PRETENCES and self.recorder.knows(args[0]):
            return PRETENCES[function]
        if function in (Tensor.numpy, Tensor.tolist, Tensor.__array__) and self.recorder.knows(args[0]):
            with _disable_current_modes():
                return function(self.recorder.evaluate(args[0]), *args[1:], **(kwargs or {}))
        return function(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Runs every operator on meta tensors and writes down those that change or make values."""

    def __init__(self) -> None:
        super().__init__()
        self.tape = Tape()
        self._ids: dict[int, int] = {}  # address of a storage -> its number
        self._kept: list[Any] = []  # storages, so that no address is used twice
        self._twins: dict[int, Tensor] = {}  # literal's number -> a meta tensor over a storage of the same size
        self._marks: dict[bytes, int] = {}  # digest of a generator's state -> the random op that left it so
        self._generators: dict[int, tuple[torch.Generator, Tensor]] = {}

    @contextlib.contextmanager
    def generators_restored(self) -> Iterator[None]:
        """Recording leaves marks in generators that construction uses (see `_draw`); put them back."""
        try:
            yield
        finally:
            for generator, state in self._generators.values():
                generator.set_state(state)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._record(func, args, kwargs or {})

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in ("lift_fresh", "lift"):  # `torch.tensor([...])`: values from outside, then ours to write
            func, args, kwargs, name = torch.ops.aten.clone.default, (args[0].clone(),), {}, "clone"
        args, kwargs = tree_map(self._on_meta, (args, dict(kwargs)))
        declared = {argument.name: argument for argument in func._schema.arguments}
        if "device" in declared:
            kwargs["device"] = META
        if "pin_memory" in declared:
            kwargs["pin_memory"] = False
        written = self._written(func, args, kwargs)
        draw = self._draw(args, kwargs) if torch.Tag.nondeterministic_seeded in func.tags else None
        args_before, kwargs_before = self._encode((args, kwargs))
        result = self._run(func, args, kwargs, random=draw is not None)
        outputs = tuple(self._new_view(item) for item in tree_flatten(result)[0])
        if name in EMPTY or torch.Tag.inplace_view in func.tags or not (written or any(outputs)):
            return result
        dtype = declared.get("dtype")
        if dtype is not None and dtype.kwarg_only and isinstance(result, Tensor):
            kwargs_before["dtype"] = result.dtype  # the default dtype of this moment
        self._append(func, args_before, kwargs_before, outputs, written, draw)
        return result

    def _append(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        outputs: tuple[View | None, ...],
        written: list[View],
        draw: Draw | None,
    ) -> None:
        tape, name = self.tape, func._schema.name.partition("::")[2]
        views = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, View)]
        whole = set()
        if name in OVERWRITES and written and written[0].fills(tape.sizes[written[0].storage]):
            if sum(view.storage == written[0].storage for view in views) == 1:
                whole.add(written[0].storage)
        reads = tuple(dict.fromkeys(view.storage for view in views if view.storage not in whole))
        made = [view.storage for view in outputs if view is not None]
        writes = tuple(dict.fromkeys([view.storage for view in written] + made))
        for storage in writes:
            if storage in tape.literals:
                raise NotReplayable(_where(), f"{func} writes into a tensor that existed before", "clone it first")
        tape.ops.append(Op(str(func), args, kwargs, outputs, writes, reads, draw))

    def _run(self, func: Any, args: Any, kwargs: Any, *, random: bool) -> Any:
        """The operator on meta tensors; where that is impossible (it reads values), on the values."""
        kwargs = {key: value for key, value in kwargs.items() if not isinstance(value, torch.Generator)}
        try:
            return func(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as error:
            if random:
                raise NotReplayable(
                    _where(), f"{func} has no meta kernel ({error})", "initialise in another way"
                ) from error
        if kwargs.get("device") == META:
            kwargs["device"] = torch.device("cpu")
        real = func(*tree_map(self._real, args), **tree_map(self._real, kwargs))
        return tree_map(lambda item: _meta_like(item) if isinstance(item, Tensor) else item, real)

    def _draw(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Draw:
        """Which random operator, if any, left the generator in its present state; then mark the generator as left by this one.

        Nothing is drawn while recording, so the mark stands for the state that replay will find. It makes reseeding,
        `fork_rng` and saved states come out right, whoever uses them.
        """
        generator = next(
            (a for a in (*args, *kwargs.values()) if isinstance(a, torch.Generator)), torch.default_generator
        )
        if generator.device.type != "cpu":
            raise NotReplayable(_where(), f"it draws from a generator on {generator.device}", "initialise on the CPU")
        state = generator.get_state()
        self._generators.setdefault(id(generator), (generator, state))
        previous = self._marks.get(_digest(state))
        index = len(self.tape.ops)
        generator.manual_seed(0x5EED << 40 | index)
        self._marks[_digest(generator.get_state())] = index
        return Draw(previous, None if previous is not None else state)

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[View]:
        """Operands that the operator's schema says it writes."""
        written = []
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                written += [self._view(item) for item in tree_flatten(value)[0] if isinstance(item, Tensor)]
        return written

    # tensors <-> storages

    def knows(self, tensor: Any) -> bool:
        with torch._C.DisableTorchFunction():
            return tensor.is_meta and tensor.untyped_storage()._cdata in self._ids

    def evaluate(self, tensor: Tensor) -> Tensor:
        """The values of a meta tensor, now."""
        with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
            return Replay(self.tape).value(self._view(tensor))

    def _real(self, item: Any) -> Any:
        return self.evaluate(item) if isinstance(item, Tensor) else item

    def _number(self, storage: torch.UntypedStorage) -> int:
        number = self._ids.get(storage._cdata)
        if number is None:
            number = self._ids[storage._cdata] = len(self.tape.sizes)
            self.tape.sizes.append(storage.nbytes())
            self._kept.append(storage)
        return number

    def _view(self, tensor: Tensor) -> View:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            raise NotReplayable(
                _where(), f"a tensor of layout {tensor.layout} or of lazy sign", "use plain dense tensors"
            )
        number = self._number(tensor.untyped_storage())
        self.tape.sizes[number] = max(self.tape.sizes[number], tensor.untyped_storage().nbytes())
        return View(number, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def _new_view(self, item: Any) -> View | None:
        """The view of a result that brought a storage of its own; None for anything else."""
        if not isinstance(item, Tensor) or item.untyped_storage()._cdata in self._ids:
            return None
        return self._view(item)

    def _on_meta(self, item: Any) -> Any:
        return self._literal(item) if isinstance(item, Tensor) and item.device.type != "meta" else item

    def _literal(self, tensor: Tensor) -> Tensor:
        """A meta tensor that stands for a real one, and shares a storage with those that stand for views of the same."""
        storage = tensor.untyped_storage()
        number = self._number(storage)
        if number not in self._twins:
            flat = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
            self.tape.literals[number] = flat
            self._twins[number] = torch.empty(storage.nbytes(), dtype=torch.uint8, device=META)
            self._ids[self._twins[number].untyped_storage()._cdata] = number
        twin = torch.empty(0, dtype=tensor.dtype, device=META)
        return twin.set_(self._twins[number].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())

    def _encode(self, tree: Any) -> Any:
        def encode(item: Any) -> Any:
            if isinstance(item, Tensor):
                return self._view(item)
            if isinstance(item, torch.device):
                return torch.device("cpu")
            return None if isinstance(item, torch.Generator) else item

        return tree_map(encode, tree)

    def finish(self, model: nn.Module) -> None:
        """Name the model's values; give it real values where it keeps tensors that are neither parameters nor buffers."""
        registered: dict[int, str] = {}
        for kind in (nn.Module.named_parameters, nn.Module.named_buffers):
            for name, tensor in list(kind(model, remove_duplicate=False)):
                if isinstance(tensor, (UninitializedBuffer, UninitializedParameter)):
                    raise NotReplayable(name, "it is lazy: its shape is not known yet", "give the layer its input size")
                if tensor.device.type != "meta":
                    tensor = self._replace(model, tensor)
                self.tape.values[name] = self._view(tensor)
                first = registered.setdefault(id(tensor), name)
                if first != name:
                    self.tape.aliases[name] = first
        stray = lambda item: isinstance(item, Tensor) and id(item) not in registered and self.knows(item)
        for module in model.modules():
            for name, value in list(module.__dict__.items()):
                if name in ("_parameters", "_buffers", "_modules") or not isinstance(
                    value, (Tensor, list, tuple, dict)
                ):
                    continue
                if any(map(stray, tree_flatten(value)[0])):
                    module.__dict__[name] = tree_map(lambda item: self.evaluate(item) if stray(item) else item, value)

    def _replace(self, model: nn.Module, tensor: Tensor) -> Tensor:
        """Put the meta twin of a real parameter or buffer into the model, one twin per tensor, so that ties stay ties."""
        twin = self._literal(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for key, held in table.items():
                    if held is tensor:
                        table[key] = twin  # type: ignore[assignment]
        return twin


def _meta_like(tensor: Tensor) -> Tensor:
    base = torch.empty(tensor.untyped_storage().nbytes(), dtype=torch.uint8, device=META).untyped_storage()
    view = torch.empty(0, dtype=tensor.dtype, device=META)
    return view.set_(base, tensor.storage_offset(), tensor.shape, tensor.stride())


def _digest(state: Tensor) -> bytes:
    return hashlib.blake2b(state.numpy().tobytes(), digest_size=16).digest()


def _where() -> str:
    """Class, file and line of the innermost module whose method is running."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return f"{type(owner).__name__} ({frame.f_code.co_filename}:{frame.f_lineno})"
        frame = frame.f_back  # type: ignore[assignment]
    return "the model"


def materialise(
    source: nn.Module | Tape,
    placements: Callable[[str], Placements | None] | Mapping[str, Placements] | None = None,
    *,
    mesh: Mesh | None = None,
    position: Sequence[int] = (),
    names: Iterable[str] | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, local piece) of a model's parameters and buffers, in the order in which they are cheapest to make.

    Args:
        source: a model built by `deferred`, its tape, or a model with real values (which are then cut).
        placements: placement of each tensor by name; None, or no entry, skips it. Without `placements` all are whole.
        mesh, position: the mesh of those placements and this device's coordinates on it.
        names: which tensors; default every parameter and buffer, tied ones once, under their first name.
        device: where the pieces go. They are made on the CPU, for equal random numbers.
    Raises:
        NotReplayable: a model on the meta device without a tape, or one whose shapes changed since it was built.
        ValueError: unknown names, or placements without a mesh.
    """
    if placements is not None and mesh is None:
        raise ValueError("materialise: placements need the mesh that they refer to and this device's position on it")
    lookup = placements.get if isinstance(placements, Mapping) else placements
    known, aliases = _values(source)
    wanted = [name for name in known if name not in aliases] if names is None else list(names)
    if isinstance(placements, Mapping):
        wanted = [name for name in known if name in placements] if names is None else wanted
        unknown = set(placements) - set(known)
    else:
        unknown = set()
    unknown |= set(wanted) - set(known)
    if unknown:
        raise ValueError(f"materialise: the model has no parameter or buffer named {', '.join(sorted(unknown))}")
    cut = {name: lookup(name) if lookup else () for name in wanted}
    wanted = [name for name in wanted if cut[name] is not None]
    tape = source if isinstance(source, Tape) else tape_of(source)
    whole = Replay(tape).run({name: tape.values[name] for name in wanted}) if tape else ((n, known[n]) for n in wanted)
    for name, value in whole:
        piece = take(value, cut[name], mesh, position) if cut[name] else value  # type: ignore[arg-type]
        if piece.untyped_storage().nbytes() > piece.nbytes or not tape:
            piece = piece.clone()  # a view would keep the whole alive
        del value
        yield name, piece.to(device)


def _values(source: nn.Module | Tape) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """Tensors (or views of the tape) by name, and which of the names are further names of tied ones."""
    if isinstance(source, Tape):
        return source.values, source.aliases
    tape = tape_of(source)
    now = {
        **dict(source.named_parameters(remove_duplicate=False)),
        **dict(source.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in now.items():
        if tensor.device.type == "meta" and (tape is None or name not in tape.values):
            raise NotReplayable(
                name, "it is on the meta device without a record", "build the model with weft.deferred(...)"
            )
        if tape is not None and (tape.values[name].size, tape.values[name].dtype) != (
            tuple(tensor.shape),
            tensor.dtype,
        ):
            raise NotReplayable(name, "its shape or dtype changed after construction", "change it inside the factory")
    if tape is not None:
        return {name: tape.values[name] for name in now}, tape.aliases
    first: dict[int, str] = {}
    aliases = {name: first[id(t)] for name, t in now.items() if first.setdefault(id(t), name) != name}
    return {name: tensor.detach() for name, tensor in now.items()}, aliases
