"""A file of JSON lines, one for each row of the input, that a killed process leaves usable: appended, and counted again
when it is opened.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from array import array
from collections.abc import Callable
from pathlib import Path

from modelscope_dolly.errors import DollyError, SettingError, is_whole, one_line
from modelscope_dolly.files import parse_json_line

#: Seconds of work that a loss of power may cost. A process that is killed loses no line.
SYNC_EVERY = 5.0
_MISSING = -1


class RowFile:
    """Lines of JSON objects with an `index`, in the order in which they were written.

    Opening it removes a last line that is torn, which a killed process or a full disk has left. The file is made with
    its first line.

    Args:
        path: the file.
        rows: of the input; indices are below it.
        check: called before a line is written, at most every few seconds; it raises where nothing more may be written.

    Attributes:
        count: lines in the file.

    Raises:
        SettingError: the file holds something else; nothing is changed then.
    """

    def __init__(self, path: Path, rows: int, check: Callable[[], None]):
        self.path, self._rows, self._check = path, rows, check
        self._forget()
        self._descriptor: int | None = None
        self._synced = time.monotonic()
        if path.exists():
            self._read_places()

    def __contains__(self, index: int) -> bool:
        return self._places[index] != _MISSING

    def append(self, row: dict) -> None:
        """Write one line; it is in the file when this returns, whatever happens to this process.

        Raises:
            DollyError: the disk is full, or the file cannot be written; it then ends in its last whole line.
        """
        line = json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
        due = time.monotonic() - self._synced > SYNC_EVERY
        if due:
            self._check()
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
            if due:
                self._sync()
        except OSError as error:
            raise DollyError(
                f"{self.path}: cannot be written ({error.strerror}); its {self.count:,} lines are whole, and the same "
                "command goes on from there"
            ) from None
        self._places[row["index"]] = self._end
        self._end += len(line)
        self.count += 1

    def close(self) -> None:
        """Cut off what a failed or interrupted write has left, and give the file to the disk."""
        if self._descriptor is None:
            return
        try:
            if os.fstat(self._descriptor).st_size > self._end:
                os.ftruncate(self._descriptor, self._end)
            self._sync()
        except OSError as error:
            raise DollyError(f"{self.path}: cannot be written ({error.strerror})") from None
        finally:
            os.close(self._descriptor)
            self._descriptor = None

    def sort(self) -> None:
        """Put the lines in the order of their indices. The file is the old or the new one at any moment.

        Raises:
            DollyError: it cannot be written; the file is as it was.
        """
        self.close()
        places = array("q", (place for place in self._places if place != _MISSING))
        if all(places[i] < places[i + 1] for i in range(len(places) - 1)):
            return
        temporary = self.path.with_name(f".{self.path.name}.sorted")  # the run's lock is held: nobody else has one
        try:
            with open(self.path, "rb") as lines, open(temporary, "wb") as file:
                for place in places:
                    lines.seek(place)
                    file.write(lines.readline())
                file.flush()
                os.fsync(file.fileno())
            shutil.copymode(self.path, temporary)
            os.replace(temporary, self.path)
        except OSError as error:
            raise DollyError(
                f"{self.path}: cannot be sorted ({error.strerror}); it is complete, in the order in which the answers "
                "came, and the same command sorts it"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)
        self._read_places()

    def _sync(self) -> None:
        if self._descriptor is not None:
            os.fsync(self._descriptor)
        self._synced = time.monotonic()

    def _forget(self) -> None:
        self.count = self._end = 0
        self._places = array("q", [_MISSING]) * self._rows  # 8 bytes a row, where a set of numbers takes 60

    def _read_places(self) -> None:
        self._forget()
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break  # torn
                index = self._index(number, line)
                self._places[index] = self._end
                self._end += len(line)
                self.count += 1
        if os.path.getsize(self.path) > self._end:
            os.truncate(self.path, self._end)

    def _index(self, number: int, line: bytes) -> int:
        try:
            index = parse_json_line(line).get("index")
            if not is_whole(index, 0, self._rows - 1):
                raise ValueError(f"its index is {index!r}, it must be from 0 to {self._rows - 1}")
            if index in self:
                raise ValueError(f"row {index} stands there twice")
        except ValueError as error:
            raise SettingError(
                f"{self.path}:{number}: no line of this run ({one_line(error, 100)}); remove the line, give another "
                "name, or begin anew with --overwrite"
            ) from None
        return index
