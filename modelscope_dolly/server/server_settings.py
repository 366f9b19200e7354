"""What `dolly serve` is told: address, keys and limits, all checked."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from modelscope_dolly.errors import SettingError, is_whole, shown

KEY_VARIABLE = "DOLLY_API_KEY"
#: Bytes of a body. A window of 2,048 tokens holds about 10,000 characters; a list of prompts is longer.
BODY_BYTES = 1 << 20


@dataclass(frozen=True)
class ServerSettings:
    """Settings of one server.

    Attributes:
        host, port: to listen on; port 0 takes a free one.
        name: that requests give as `model`.
        keys: of which a request must have one; none lets everybody in.
        queue: answers that may wait for a slot; further ones are refused with 429.
        body_bytes: longest body of a request.
        rate: requests per minute of one key, or of one address where there are no keys; 0 is no limit.
        arrival_seconds: that the headers of a request may take, and again its body.
        first_seconds: until the first token of an answer; a request that waits longer is refused with 503.
        idle_seconds: that a connection is kept open between requests.
        stall_seconds: that a reader may leave a stream unread once the buffers are full.
        drain_seconds: for accepted requests after the signal to stop.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = "dolly"
    keys: tuple[str, ...] = ()
    queue: int = 128
    body_bytes: int = BODY_BYTES
    rate: int = 0
    arrival_seconds: float = 30
    first_seconds: float = 300
    idle_seconds: float = 75
    stall_seconds: float = 60
    drain_seconds: float = 30

    def __post_init__(self) -> None:
        problems = [message for holds, message in self._requirements() if not holds]
        if problems:
            raise SettingError("; ".join(problems))

    def _requirements(self) -> Iterator[tuple[bool, str]]:
        def whole(name: str, low: int, high: int) -> tuple[bool, str]:
            value = getattr(self, name)
            return is_whole(value, low, high), f"{_flag(name)} is {shown(value)}, it must be {low} to {high}"

        yield bool(self.host), "--host is empty; 127.0.0.1 is this machine alone, 0.0.0.0 every network"
        yield self.name.isprintable() and bool(self.name.strip()), "--served-model-name is empty or not printable"
        yield whole("port", 0, 65535)
        yield whole("queue", 0, 100_000)
        yield whole("body_bytes", 1024, 1 << 30)
        yield whole("rate", 0, 1_000_000)
        for name in ("arrival_seconds", "first_seconds", "idle_seconds", "stall_seconds", "drain_seconds"):
            value = getattr(self, name)
            low = 0 if name == "drain_seconds" else 0.01
            yield math.isfinite(value) and low <= value <= 86400, f"{_flag(name)} is {value}, it must be {low} to 86400"


#: Settings whose flag is not their name.
FLAGS = {
    "body_bytes": "--max-body-bytes", "arrival_seconds": "--arrival-timeout", "first_seconds": "--first-token-timeout",
    "idle_seconds": "--idle-timeout", "stall_seconds": "--stall-timeout", "drain_seconds": "--drain",
}  # fmt: skip


def _flag(name: str) -> str:
    return FLAGS.get(name, f"--{name}")


def read_keys(given: str | None) -> tuple[str, ...]:
    """API keys: `given` itself, the lines of the file it names, or those of the environment variable.

    Raises:
        SettingError: a file without keys, or a key that no HTTP header can carry. The message never has the key.
    """
    source = "--api-key"
    if given is None:
        given, source = os.environ.get(KEY_VARIABLE), KEY_VARIABLE
    if given is None:
        return ()
    try:
        is_file = Path(given).is_file()
    except (OSError, ValueError):
        is_file = False
    if is_file:
        source = given
        try:
            lines = Path(given).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError(f"{given}: cannot be read as a file of keys: {type(error).__name__}") from None
        keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    else:
        keys = (given.strip(),)
    if not any(keys):
        raise SettingError(f"{source} has no key; one a line, or leave it out to let everybody in")
    if bad := [
        number for number, key in enumerate(keys, 1) if not key.isascii() or not key.isprintable() or " " in key
    ]:
        raise SettingError(f"{source}: key {bad[0]} has spaces or characters outside ASCII, which no header carries")
    return keys
