"""Before the first request: a free port, memory for the slots, and what is printed."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from modelscope_dolly.addresses import bound_socket, is_loopback
from modelscope_dolly.engine.engine import SLOTS
from modelscope_dolly.errors import HardwareError, SettingError
from modelscope_dolly.files import gigabytes
from modelscope_dolly.hardware import dtype_name, free_memory
from modelscope_dolly.load import Dolly
from modelscope_dolly.server.server_settings import ServerSettings

#: Bytes that the system keeps for a client who does not read; further ones wait in the server.
_UNREAD = 1 << 18


def bind(settings: ServerSettings) -> socket.socket:
    """A socket that listens on the server's address.

    Raises:
        SettingError: the port is in use, or the address is not one of this machine.
    """
    listener = bound_socket(settings.host, settings.port)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD)
        listener.listen(1024)
        listener.setblocking(False)
    except OSError as error:  # another program has listened there in the meantime
        listener.close()
        raise SettingError(f"cannot listen on {settings.host}, port {settings.port}: {error.strerror}") from None
    return listener


def choose_slots(dolly: Dolly, requested: int | None) -> int:
    """How many answers to work on at the same time: as many as there is memory for, each a quarter of the window long.

    Longer ones are admitted as memory goes, fewer at a time.

    Args:
        dolly: the loaded model.
        requested: overrides the choice.

    Raises:
        HardwareError: there is not that much memory.
    """
    engine = dolly.text_generator.engine
    length = engine.window // 4
    most = engine.capacity(length)
    if requested is not None and requested > most:
        need, free = gigabytes(requested * length * dolly.net.cache_bytes), gigabytes(free_memory(engine.device))
        raise HardwareError(
            f"{engine.device}: --slots {requested} needs {need} for keys and values of {length} tokens each, {free} "
            f"are free; use --slots {max(1, most)}"
        )
    return requested or max(1, min(SLOTS, most))


def warnings(settings: ServerSettings) -> Iterator[str]:
    """What a careful operator would not leave so."""
    if not settings.keys and not is_loopback(settings.host):
        yield f"anybody who reaches {settings.host} can ask: pass --api-key KEY or a file of keys, or --host 127.0.0.1"


def summary(settings: ServerSettings, dolly: Dolly, model: str) -> list[str]:
    """What is in force, line by line."""
    engine = dolly.text_generator.engine
    slots, each = engine.slots or SLOTS, dolly.net.cache_bytes * engine.window
    rate = f"{settings.rate} requests a minute of each caller" if settings.rate else "any number of requests a minute"
    return [
        f"model    {model} as {settings.name!r}, {dtype_name(dolly.dtype)} on {dolly.device}",
        f"slots    {slots} answers at a time, {settings.queue} may wait",
        f"memory   {gigabytes(each)} for keys and values of one answer of {engine.window} tokens, "
        f"{gigabytes(free_memory(engine.device))} free: {engine.capacity(engine.window)} of these at a time",
        f"limits   bodies of {settings.body_bytes} bytes, {rate}, {settings.arrival_seconds:g} s to arrive, "
        f"{settings.first_seconds:g} s to the first token, {settings.stall_seconds:g} s unread, "
        f"{settings.idle_seconds:g} s idle, {settings.drain_seconds:g} s to drain",
        f"keys     {len(settings.keys) or 'none: everybody may ask'}",
    ]
