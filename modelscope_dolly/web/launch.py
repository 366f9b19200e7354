"""Starting and stopping the web page. What can be wrong is found before a model is loaded."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelscope_dolly.addresses import bound_socket
from modelscope_dolly.errors import HardwareError, SettingError, one_line, shown

if TYPE_CHECKING:
    from modelscope_dolly.load import Dolly

HOST, PORT = "127.0.0.1", 7860
#: Threads beside those that answer: for buttons, and for reading files.
_SPARE_THREADS = 8


def check_packages(mcp: bool = False) -> None:
    """Whether gradio is there, and what its MCP server needs. Raises SettingError with the command that installs it."""
    if importlib.util.find_spec("gradio") is None:
        raise SettingError("the web page needs gradio: pip install 'modelscope-dolly[web]'")
    if mcp and importlib.util.find_spec("mcp") is None:
        raise SettingError("--mcp needs the package mcp: pip install 'gradio[mcp]'")


def check_address(host: str, port: int) -> None:
    """Whether this process may listen there. Raises SettingError."""
    if not 1 <= port <= 65535:  # gradio cannot say which free one it took
        raise SettingError(f"port is {port}, it must be a whole number from 1 to 65535")
    bound_socket(host, port).close()


def read_login(given: str) -> tuple[str, str]:
    """USER:FILE -> name and password, which is the first line of the file. Raises SettingError."""
    user, _, file = given.partition(":")
    if not user or not file:
        raise SettingError(f"auth is {shown(user)}, it must be USER:FILE, with the password in the file's first line")
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise SettingError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if not lines or not lines[0].strip():
        raise SettingError(f"{file}: its first line, the password, is empty")
    return user, lines[0].strip()


@contextlib.contextmanager
def serving(
    dolly: Dolly,
    host: str = HOST,
    port: int = PORT,
    share: bool = False,
    mcp: bool = False,
    auth: tuple[str, str] | None = None,
) -> Iterator[Any]:
    """Serve the page while the block runs; yields gradio's Blocks, with `local_url` and `share_url`.

    Args:
        dolly: the loaded model.
        host, port: where to listen; see check_address.
        share: ask gradio for a public address, through a tunnel over its servers.
        mcp: also be a server of the Model Context Protocol, with one tool.
        auth: user and password that the page asks for.

    Raises:
        HardwareError: gradio could not be started.
    """
    _stay_at_home()
    from modelscope_dolly.engine.engine import SLOTS
    from modelscope_dolly.web.page import CSS, build, theme

    page = build(dolly.text_generator)
    try:
        _launch(
            page,
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            share=share,
            mcp_server=mcp,
            auth=auth,
            max_threads=(dolly.text_generator.engine.slots or SLOTS) + _SPARE_THREADS,
            theme=theme(),
            css=CSS,
        )
        if share and not page.share_url:
            raise HardwareError("no public address was given: gradio's tunnel cannot be reached; leave out --share")
        yield page
    finally:
        page.close(verbose=False)


def _launch(page: Any, **options: Any) -> None:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # gradio prints some lines even where it is asked not to
            page.launch(
                quiet=True,
                prevent_thread_lock=True,
                inbrowser=False,
                inline=False,
                ssr_mode=False,
                pwa=False,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                **options,
            )
    except Exception as error:  # whatever gradio, uvicorn or httpx raise
        raise HardwareError(f"the web page could not be started: {one_line(error)}") from error


def _stay_at_home() -> None:
    """gradio reports to its makers, and asks its own server through a proxy if one is set, unless told otherwise."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    for name in ("no_proxy", "NO_PROXY"):
        known = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*known, "localhost", "127.0.0.1", "::1"]))
