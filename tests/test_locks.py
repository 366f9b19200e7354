"""One run at a time: a lock that a living run keeps, and that one which has ended loses."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelscope_dolly import locks
from modelscope_dolly.errors import DollyError
from modelscope_dolly.locks import GONE_AFTER, FileLock, Holder

NAME = "run.lock"
FORK = multiprocessing.get_context("fork")  # everything is imported already


def acquire(folder: Path) -> tuple[FileLock, list[str]]:
    return locks.acquire(folder / NAME, folder, "give another output_dir")


@contextmanager
def locked(folder: Path) -> Iterator[tuple[FileLock, list[str]]]:
    lock, lines = acquire(folder)
    try:
        yield lock, lines
    finally:
        lock.release()


def hold(run: Path, told) -> None:
    acquire(run)
    told.send("held")
    signal.pause()


@pytest.fixture
def other(tmp_path):
    """A process that holds the lock of tmp_path."""
    hears, tells = FORK.Pipe()
    process = FORK.Process(target=hold, args=(tmp_path, tells), daemon=True)
    process.start()
    assert hears.recv() == "held"
    yield process
    process.kill()
    process.join()
    hears.close(), tells.close()


def left(run: Path, seconds_ago: float = 0, **changes) -> Holder:
    """A lock file of somebody else, renewed so long ago."""
    holder = dataclasses.replace(Holder.this_process(), token="another", **changes)
    (run / NAME).write_text(json.dumps(dataclasses.asdict(holder)).ljust(511) + "\n")
    time = (run / NAME).stat().st_mtime - seconds_ago
    os.utime(run / NAME, (time, time))
    return holder


def no_flock(*arguments):
    raise OSError(95, "Operation not supported")


def test_a_second_run_is_refused_with_host_and_process_and_takes_over_when_the_first_is_killed(tmp_path, other):
    with pytest.raises(DollyError) as error:
        acquire(tmp_path)
    says, host = str(error.value), os.uname().nodename
    assert f"another run is at work here: process {other.pid} on {host}, started 20" in says and "\n" not in says
    assert "give another output_dir" in says and "if that machine" not in says
    other.kill()
    other.join()
    lock, lines = acquire(tmp_path)
    assert f"left by process {other.pid} on {host}, started 20" in lines[0]
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_of_this_process_is_refused_too(tmp_path):
    with locked(tmp_path), pytest.raises(DollyError, match=f"process {os.getpid()} on"), locked(tmp_path):
        pass


def test_a_run_on_another_machine_lives_as_long_as_it_renews_its_lock(tmp_path):
    left(tmp_path, seconds_ago=GONE_AFTER - 60, host="far", boot="another machine", process=7)
    with pytest.raises(DollyError, match=r"process 7 on far, .* last seen 60 s ago; .* machine is gone, .* in 60 s"):
        acquire(tmp_path)
    left(tmp_path, seconds_ago=GONE_AFTER + 1, host="far", boot="another machine", process=7)
    lock, lines = acquire(tmp_path)
    assert "left by process 7 on far" in lines[0]
    lock.release()


def test_the_age_is_told_by_the_clock_of_the_file_system(tmp_path, monkeypatch):
    left(tmp_path, host="far", boot="another machine")
    monkeypatch.setattr("time.time", lambda: 0.0)
    with pytest.raises(DollyError, match="last seen 0 s ago"):
        acquire(tmp_path)


def test_without_flock_a_process_is_known_by_number_and_start_time(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_flock)
    mine = left(tmp_path)
    with pytest.raises(DollyError, match=f"process {mine.process} on"):
        acquire(tmp_path)
    left(tmp_path, born=mine.born + 1)  # the number is another process's by now
    acquire(tmp_path)[0].release()
    left(tmp_path, processes="of another container")  # its numbers mean nothing here
    with pytest.raises(DollyError, match="if that machine is gone"):
        acquire(tmp_path)


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=600))
def test_whatever_a_lock_file_holds_that_nobody_holds_is_taken_over(tmp_path_factory, content):
    run = tmp_path_factory.mktemp("run", numbered=True)
    (run / NAME).write_bytes(content)
    lock, _ = acquire(run)
    lock.check()
    lock.release()


def test_one_that_was_taken_over_or_removed_stops_before_it_writes(tmp_path):
    with locked(tmp_path) as (lock, _):
        (tmp_path / NAME).unlink()
        with pytest.raises(DollyError, match=r"run\.lock is gone, so another run may be at work here"):
            lock.check()
        left(tmp_path, host="far", process=7)
        with pytest.raises(
            DollyError, match=r"taken over by process 7 on far, .* for 120 s: it stops before it writes"
        ):
            lock.check()
    assert (tmp_path / NAME).exists()  # it is the other's


def test_a_file_system_that_does_not_answer_just_now_ends_nothing(tmp_path, monkeypatch):
    with locked(tmp_path) as (lock, _):
        monkeypatch.setattr(Path, "read_bytes", lambda path: no_flock())
        lock.check()
        monkeypatch.undo()


def test_a_lock_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "RENEWED_EVERY", 0.001)
    lock, _ = acquire(tmp_path)
    os.utime(tmp_path / NAME, (0, 0))
    while (tmp_path / NAME).stat().st_mtime == 0:
        pass
    lock.release()


def test_a_lock_that_its_holder_removes_just_now_is_nobodys(tmp_path, monkeypatch):
    """Between opening the file and locking it: the next one to come would make a file of its own."""
    flocks = []

    def flock(descriptor):
        flocks.append(descriptor)
        if len(flocks) == 1:
            (tmp_path / NAME).unlink()
        return True

    monkeypatch.setattr(locks, "_flock", flock)
    lock, _ = acquire(tmp_path)
    lock.check()
    lock.release()
    assert len(flocks) == 2


def race(run: Path, times: int) -> None:
    while times:
        try:
            with locked(run):
                for mark in "[]":
                    with open(run / "marks", "a") as file:
                        file.write(mark)
                times -= 1
        except DollyError:
            pass


def test_of_many_that_start_at_once_one_gets_it_and_when_it_has_ended_another(tmp_path):
    racers = [FORK.Process(target=race, args=(tmp_path, 25), daemon=True) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0] * 4
    assert (tmp_path / "marks").read_text() == "[]" * 100
