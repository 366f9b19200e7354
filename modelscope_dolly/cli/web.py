"""`dolly web`: a web page for people."""

from __future__ import annotations

import argparse
import signal
import sys

from modelscope_dolly.addresses import is_loopback
from modelscope_dolly.cli.bench import interrupt_once
from modelscope_dolly.cli.options import add_model_options, load_dolly
from modelscope_dolly.cli.streams import complain
from modelscope_dolly.errors import SettingError
from modelscope_dolly.web import launch

SUMMARY = "a web page to ask a model, in Chinese and English"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, positional=True)
    group = parser.add_argument_group("page")
    group.add_argument("--host", default=launch.HOST, help=f"address to listen on (default: {launch.HOST})")
    group.add_argument("--port", type=int, default=launch.PORT, help=f"port to listen on (default: {launch.PORT})")
    group.add_argument("--auth", metavar="USER:FILE", help="ask for this user and the password in the file")
    group.add_argument("--mcp", action="store_true", help="also be an MCP server, with a tool that asks the model")
    group.add_argument("--share", action="store_true", help="a public address, through a tunnel over gradio's servers")


def run(options: argparse.Namespace) -> int:
    launch.check_packages(options.mcp)
    launch.check_address(options.host, options.port)
    auth = launch.read_login(options.auth) if options.auth else None
    if auth and options.mcp:
        raise SettingError("--auth and --mcp exclude each other: MCP clients cannot log in to the page")
    dolly = load_dolly(options)
    with interrupt_once() as received:
        try:
            with launch.serving(dolly, options.host, options.port, options.share, options.mcp, auth) as page:
                if not auth and (options.share or not is_loopback(options.host)):
                    complain("warning: whoever reaches this address can ask; to ask for a password: --auth USER:FILE")
                print(f"{page.share_url or page.local_url}  (Ctrl-C stops)", flush=True)
                if options.mcp:
                    print(f"{page.local_url}gradio_api/mcp/  (MCP)", flush=True)
                page.server.thread.join()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return 128 + (received[0] if received else signal.SIGINT)
    complain("the web page has ended by itself")
    return 1
