"""The log of scalars: with the parameters of the start it *is* the checkpoint, and the way a newcomer catches up.

    record    step, learning rate, and per member its number and its codes, in the order in which they are applied   `Record`
    passport  what a log belongs to: run, wire, direction, divisor, parameters, and a digest of their first values   `Passport`
    chain     chain(t + 1) = blake2b(chain(t), record t): equal chains mean equal histories                        `Log.chain`

In a file: one line of JSON (the passport), then records of (length, body, crc32 of the body), each written by one call of
`write` on a file opened for appending. A process that dies leaves whole records and at most one that is cut short.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import struct
import weakref
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from weft.errors import CheckpointDamaged, DiskFull, FolderInUse, WeftError

__all__ = ["Log", "OtherRun", "Passport", "Record"]

MAGIC = "weft one-byte log 1"
HEAD = struct.Struct("<QdH")  # step, learning rate, members
ENTRY = struct.Struct("<IH")  # member's number, bytes of codes
LENGTH = struct.Struct("<I")
EMPTY = b"\0" * 8  # the chain of a log without records
LONGEST = 2**16 - 1  # bytes of one member's codes in a record, as an ENTRY counts them
LARGEST = 2**26  # bytes of one record: what is longer was never written by us


class OtherRun(WeftError, ValueError):
    """A log, or a member, belongs to another run: `what` differs, `here` and `there` are its values."""

    def __init__(self, what: str, here: str, there: str):
        super().__init__(what, here, there)
        self.what, self.here, self.there = what, here, there

    def __str__(self) -> str:
        return (
            f"this log of scalars belongs to another run: {self.what} is {self.here} here and {self.there} there. Start from "
            "the model, the options and the parameter values that the log was begun with."
        )


@dataclass(frozen=True)
class Record:
    """One step. `entries` are (member's number, its codes one after the other), in the order in which they are applied."""

    step: int
    lr: float
    entries: tuple[tuple[int, bytes], ...]

    def pack(self) -> bytes:
        parts = [HEAD.pack(self.step, self.lr, len(self.entries))]
        parts += [ENTRY.pack(member, len(codes)) + codes for member, codes in self.entries]
        return b"".join(parts)

    @staticmethod
    def unpack(body: bytes) -> Record:
        """The record of `pack`.

        Raises:
            ValueError: the bytes are no record.
        """
        try:
            step, lr, count = HEAD.unpack_from(body)
            at, entries = HEAD.size, []
            for _ in range(count):
                member, size = ENTRY.unpack_from(body, at)
                at += ENTRY.size + size
                entries.append((member, body[at - size : at]))
        except struct.error as error:
            raise ValueError(f"not a record: {error}") from error
        if at != len(body):
            raise ValueError(f"not a record: {len(body)} bytes, of which its entries take {at}")
        return Record(step, lr, tuple(entries))


@dataclass(frozen=True)
class Passport:
    """What must be the same wherever a log is replayed. Perturbation size and samples may differ between members.

    Attributes:
        run: seed of the run.
        wire, direction, divisor: names of the options.
        weight_decay, clip: as in `SharedSeed`.
        model: digest of names, shapes and dtypes of the tuned parameters.
        start: digest of their values before step 0.
    """

    run: int
    wire: str
    direction: str
    divisor: str
    weight_decay: float
    clip: float
    model: str
    start: str

    def check(self, other: Passport) -> None:
        """Raise `OtherRun` where `other` differs."""
        said = {"model": "the set of tuned parameters", "start": "the digest of the first values"}
        for field in dataclasses.fields(self):
            here, there = getattr(self, field.name), getattr(other, field.name)
            if here != there:
                raise OtherRun(said.get(field.name, field.name), repr(here), repr(there))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Passport:
        """The passport of `to_json`.

        Raises:
            ValueError: the text is no passport.
        """
        try:
            passport = Passport(**json.loads(text))
        except (TypeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not a passport: {error}") from error
        for field in dataclasses.fields(passport):
            value = getattr(passport, field.name)
            if type(value).__name__ != field.type:
                raise ValueError(f"not a passport: {field.name} must be of type {field.type}, got {value!r}")
        return passport


class Log(Sequence[Record]):
    """Append-only sequence of records, `log[t]` that of step t; in memory, and in a file as well if it has one.

    Make one by `Log(passport)`, `Log.open(path, passport)` (go on with that file, or begin it) or `Log.load(path)`. A file is
    locked until `close`, or until nobody holds the log any more.
    """

    def __init__(self, passport: Passport):
        self.passport = passport
        self.records: list[Record] = []
        self.chains: list[bytes] = [EMPTY]
        self.file: int | None = None
        # Closes the file, at the latest when nobody holds the log any more.
        self._let_go: weakref.finalize | None = None

    @overload
    def __getitem__(self, at: int) -> Record: ...
    @overload
    def __getitem__(self, at: slice) -> list[Record]: ...
    def __getitem__(self, at):
        return self.records[at]

    def __len__(self) -> int:
        return len(self.records)

    def chain(self, step: int) -> bytes:
        """8 bytes that stand for everything before `step`."""
        return self.chains[step]

    def append(self, record: Record) -> None:
        """Add the record of the next step, to the file too.

        Raises:
            ValueError: it is of another step.
            DiskFull: there is no room for it; log and file are as before.
        """
        if record.step != len(self):
            raise ValueError(f"Log: the next record must be of step {len(self)}, got {record.step}")
        body = record.pack()
        if self.file is not None:
            self._write(_framed(body))
        self._keep(record, body)

    def replace(self, records: Sequence[Record]) -> None:
        """Forget all records, in the file too, and take others instead."""
        self.records, self.chains = [], [EMPTY]
        if self.file is not None:
            os.ftruncate(self.file, len(_title(self.passport)))
        for record in records:
            self.append(record)

    def _write(self, data: bytes) -> None:
        assert self.file is not None
        before = os.fstat(self.file).st_size
        try:
            written = os.write(self.file, data)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            written = 0
        if written < len(data):
            os.ftruncate(self.file, before)  # nothing that is appended behind half a record can be read
            raise DiskFull("the log of scalars", len(data), written, "appending a step")

    def _keep(self, record: Record, body: bytes) -> None:
        self.records.append(record)
        self.chains.append(hashlib.blake2b(self.chains[-1] + body, digest_size=8).digest())

    def close(self) -> None:
        """Let go of the file; the log stays usable in memory."""
        if self._let_go is not None:
            self._let_go()
            self.file = self._let_go = None

    def save(self, path: str | Path) -> None:
        """Write the whole log to `path`, whole or not at all."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        with part.open("wb") as file:
            file.write(_title(self.passport))
            for record in self:
                body = record.pack()
                file.write(_framed(body))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path, *, repair: bool = False) -> Log:
        """A log from its file.

        Args:
            path: written by `save`, or by a `Log.open` of a process that may have died.
            repair: if the last record is cut short, leave it out instead of raising.
        Raises:
            CheckpointDamaged: no such file, no log, a record is altered, or the last one is cut short.
        """
        log, end, size = cls._read(Path(path))
        if end < size and not repair:
            raise CheckpointDamaged(
                str(path),
                f"its last record is cut short; {len(log)} steps are whole (Log.load(path, repair=True) takes those)",
            )
        return log

    @classmethod
    def open(cls, path: str | Path, passport: Passport) -> Log:
        """The log in `path` for appending: begun if there is none, cut back to its last whole step if it was cut short.

        Raises:
            OtherRun: the file is the log of another run.
            CheckpointDamaged: it is no log, or altered.
            FolderInUse: this or another process appends to it already.
        """
        path = Path(path)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = "this or another process that appends to it (`SharedSeed.close` or `Log.close` lets go)"
                raise FolderInUse(str(path), holder) from error
            if os.fstat(file).st_size == 0:
                log = cls(passport)
                os.write(file, _title(passport))
            else:
                log, end, size = cls._read(path)
                log.passport.check(passport)
                if end < size:
                    os.ftruncate(file, end)
        except BaseException:
            os.close(file)
            raise
        log.file, log._let_go = file, weakref.finalize(log, os.close, file)
        return log

    @classmethod
    def _read(cls, path: Path) -> tuple[Log, int, int]:
        """The whole records of a file, where they end, and the file's size.

        Raises:
            CheckpointDamaged: as in `load`, but for a record that is cut short.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointDamaged(str(path), f"it cannot be read ({error.strerror})") from error
        at = data.find(b"\n") + 1
        try:
            magic, passport = data[:at].decode().split("\t")
            if magic != MAGIC:
                raise ValueError(f"it begins with {magic!r}")
            log = cls(Passport.from_json(passport))
        except ValueError as error:
            raise CheckpointDamaged(str(path), f"it is no log of scalars ({error})") from error
        while at + LENGTH.size <= len(data):
            (size,) = LENGTH.unpack_from(data, at)
            end = at + 2 * LENGTH.size + size
            if size <= LARGEST and end > len(data):
                break  # cut short
            body = data[at + LENGTH.size : end - LENGTH.size]
            try:
                if size > LARGEST or LENGTH.unpack_from(data, end - LENGTH.size)[0] != zlib.crc32(body):
                    raise ValueError("its checksum is wrong")
                record = Record.unpack(body)
                if record.step != len(log):
                    raise ValueError(f"it is of step {record.step}")
            except ValueError as error:
                raise CheckpointDamaged(str(path), f"record {len(log)} is altered: {error}") from error
            log._keep(record, body)
            at = end
        return log, at, len(data)


def _framed(body: bytes) -> bytes:
    return LENGTH.pack(len(body)) + body + LENGTH.pack(zlib.crc32(body))


def pack_records(records: Sequence[Record]) -> Iterator[bytes]:
    """Records one after the other with their lengths, for a message."""
    for record in records:
        body = record.pack()
        yield LENGTH.pack(len(body)) + body


def unpack_records(data: bytes) -> list[Record]:
    """The records of `pack_records`.

    Raises:
        ValueError: the bytes are no records.
    """
    records, at = [], 0
    while at < len(data):
        if at + LENGTH.size > len(data):
            raise ValueError("records are cut short")
        (size,) = LENGTH.unpack_from(data, at)
        at += LENGTH.size + size
        records.append(Record.unpack(data[at - size : at]))
    return records


def _title(passport: Passport) -> bytes:
    return f"{MAGIC}\t{passport.to_json()}\n".encode()
