"""The log: round trips, files cut short or altered anywhere, files of other runs."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.comm.zeroth.log import Log, OtherRun, Passport, Record, pack_records, unpack_records
from weft.errors import CheckpointDamaged, DiskFull, FolderInUse

PASSPORT = Passport(3, "byte", "rademacher", "mean", 0.0, 1.0, "aa", "bb")


def filled(steps: int = 5, passport: Passport = PASSPORT) -> Log:
    log = Log(passport)
    for step in range(steps):
        log.append(Record(step, 0.1 / (step + 1), ((0, bytes([step, 1])), (7, b"xyz"[: step % 4]))))
    return log


entries = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.binary(max_size=40)), max_size=5).map(tuple)
records = st.builds(Record, st.integers(0, 2**60), st.floats(allow_nan=False), entries)


@given(records)
def test_a_record_survives(record):
    assert Record.unpack(record.pack()) == record


@given(st.lists(records, max_size=4), st.data())
def test_records_in_a_message(many, data):
    packed = b"".join(pack_records(many))
    assert unpack_records(packed) == many
    if packed:
        part = packed[: data.draw(st.integers(1, len(packed) - 1))]
        with contextlib.suppress(ValueError):
            found = unpack_records(part)
            assert found == many[: len(found)]  # cut between two records


def test_save_and_load(tmp_path):
    log = filled()
    log.save(tmp_path / "run.log")
    back = Log.load(tmp_path / "run.log")
    assert back.records == log.records and back.passport == PASSPORT and back.chains == log.chains
    assert len(set(log.chains)) == len(log) + 1
    with pytest.raises(ValueError, match="must be of step 5"):
        log.append(Record(4, 0.1, ()))


def test_appended_files_equal_saved_ones_and_go_on(tmp_path):
    filled().save(tmp_path / "saved")
    with_file = Log.open(tmp_path / "appended", PASSPORT)
    for record in filled(3):
        with_file.append(record)
    with_file.close()
    again = Log.open(tmp_path / "appended", PASSPORT)
    assert len(again) == 3
    for record in filled()[3:]:
        again.append(record)
    assert (tmp_path / "appended").read_bytes() == (tmp_path / "saved").read_bytes()
    again.replace(filled(2).records)
    assert Log.load(tmp_path / "appended").records == filled(2).records
    again.close()


def test_cut_short_anywhere(tmp_path):
    """A file that ends early yields its whole steps, or a named error that says how many they are; never another step."""
    log, path = filled(), tmp_path / "run.log"
    log.save(path)
    data = path.read_bytes()
    title = data.index(b"\n") + 1
    for end in range(len(data)):
        path.write_bytes(data[:end])
        if end < title:
            with pytest.raises(CheckpointDamaged, match="no log of scalars"):
                Log.load(path, repair=True)
            continue
        whole = Log.load(path, repair=True)
        assert whole.records == log.records[: len(whole)]
        size = title + len(b"".join(pack_records(whole.records))) + 4 * len(whole)
        if size < end:
            with pytest.raises(CheckpointDamaged, match=f"cut short; {len(whole)} steps are whole"):
                Log.load(path)
        reopened = Log.open(path, PASSPORT)
        reopened.append(Record(len(whole), 9.0, ()))
        reopened.close()
        assert Log.load(path).records == [*whole.records, Record(len(whole), 9.0, ())]


def test_a_full_disk_leaves_no_part_of_a_record(tmp_path, monkeypatch):
    """There is room for a part only; later there is room again."""
    log, path, write = Log.open(tmp_path / "run.log", PASSPORT), tmp_path / "run.log", os.write
    first, second, third = filled(3)
    log.append(first)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[: len(data) // 2]))
        with pytest.raises(DiskFull, match="log of scalars"):
            log.append(second)
    assert Log.load(path).records == log.records == [first]
    log.append(second)
    log.append(third)
    log.close()
    assert Log.load(path).records == [first, second, third]


def test_a_disk_that_fails_is_not_a_full_one(tmp_path, monkeypatch):
    def fails(file, data):
        raise OSError(errno.EIO, "Input/output error")

    log = Log.open(tmp_path / "run.log", PASSPORT)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fails)
        with pytest.raises(OSError, match="Input/output") as found:
            log.append(filled(1)[0])
    assert not isinstance(found.value, DiskFull) and len(log) == 0
    log.close()


def test_a_file_is_let_go_with_its_log(tmp_path):
    log = Log.open(tmp_path / "run.log", PASSPORT)
    descriptor = log.file
    del log
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    Log.open(tmp_path / "run.log", PASSPORT).close()


def test_altered_anywhere(tmp_path):
    """No flipped byte is ever taken for a scalar."""
    log, path = filled(), tmp_path / "run.log"
    log.save(path)
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        try:
            found = Log.load(path)
            found.passport.check(PASSPORT)
            assert found.records == log.records  # unreachable but for bytes that mean nothing
        except (CheckpointDamaged, OtherRun):
            pass


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model", "cc", "the set of tuned parameters"),
        ("start", "dd", "first values"),
        ("wire", "float32", "wire"),
        ("run", 4, "run"),
    ],
)
def test_of_another_run(tmp_path, field, value, said):
    filled(passport=dataclasses.replace(PASSPORT, **{field: value})).save(tmp_path / "run.log")
    before = (tmp_path / "run.log").read_bytes()
    with pytest.raises(OtherRun, match=said):
        Log.open(tmp_path / "run.log", PASSPORT)
    assert (tmp_path / "run.log").read_bytes() == before


def test_no_file_or_in_use(tmp_path):
    with pytest.raises(CheckpointDamaged, match="cannot be read"):
        Log.load(tmp_path / "none")
    log = Log.open(tmp_path / "run.log", PASSPORT)
    with pytest.raises(FolderInUse):
        Log.open(tmp_path / "run.log", PASSPORT)
    log.close()
    Log.open(tmp_path / "run.log", PASSPORT).close()
