"""Where a server of this package listens: the address is tried before a model is loaded."""

from __future__ import annotations

import errno
import ipaddress
import socket

from modelscope_dolly.errors import SettingError, one_line, shown


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket with that address, which does not listen yet; port 0 is a free one.

    Raises:
        SettingError: no address of this machine, a port that does not exist, or one that is in use.
    """
    if not 0 <= port <= 65535:
        raise SettingError(f"port is {port}, it must be a whole number from 0 to 65535; 0 takes a free one")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        found = f"host {shown(host)} is no address of this machine ({one_line(error)})"
        raise SettingError(f"{found}; choose another one with --host") from None
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        reason, remedy = error.strerror, "choose another one with --port"
        if error.errno == errno.EADDRINUSE:
            reason = "it is in use by another program"
        elif error.errno == errno.EADDRNOTAVAIL:
            reason, remedy = "not an address of this machine", "choose another one with --host"
        raise SettingError(f"cannot listen on {shown(host)}, port {port}: {reason}; {remedy}") from None
    return bound


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
