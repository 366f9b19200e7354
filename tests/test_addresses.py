"""Where a server listens."""

from __future__ import annotations

import pytest

from modelscope_dolly.addresses import bound_socket, is_loopback
from modelscope_dolly.errors import SettingError


@pytest.mark.parametrize(
    ("host", "only_here"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback_addresses(host, only_here):
    assert is_loopback(host) is only_here


def test_a_free_port_is_taken_and_a_taken_one_is_refused():
    with bound_socket("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        assert port > 0
        with pytest.raises(SettingError, match=f"port {port}: it is in use by another program; .* --port"):
            bound_socket("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", 65536, "port is 65536, it must be a whole number from 0 to 65535"),
        ("127.0.0.1", -1, "port is -1"),
        ("no such host", 80, "host 'no such host' is no address of this machine"),
        ("192.0.2.1", 0, "not an address of this machine; choose another one with --host"),
    ],
)
def test_what_is_no_address_is_one_line(host, port, message):
    with pytest.raises(SettingError, match=message):
        bound_socket(host, port)
