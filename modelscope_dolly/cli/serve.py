"""`dolly serve`: answer over HTTP, as the OpenAI API and as ModelScope's own server do."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from modelscope_dolly.cli.options import add_model_options, add_slots, load_keywords, required_model_name
from modelscope_dolly.errors import DollyError, SettingError

if TYPE_CHECKING:
    from modelscope_dolly.load import Dolly

SUMMARY = "answer over HTTP: the OpenAI API, and ModelScope's /call"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("served", nargs="?", metavar="MODEL", help="directory or hub id, as --model")
    add_model_options(parser)
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: 8000)")
    add("--served-model-name", metavar="NAME", default="dolly", help="what requests give as model (default: dolly)")
    add("--api-key", metavar="KEY|FILE", help="a key, or a file with one a line, of which requests need one "
        "(default: $DOLLY_API_KEY)")  # fmt: skip
    add_slots(group, "as many as there is memory for, at most 32")
    add("--queue", type=int, default=128, metavar="N", help="answers that may wait for a slot (default: 128)")
    add("--rate", type=int, default=0, metavar="N", help="requests a minute of one key (default: any number)")
    add("--max-body-bytes", type=int, default=1 << 20, metavar="N", help="longest body (default: 1048576)")
    add("--arrival-timeout", type=float, default=30, metavar="SECONDS", help="for headers and body (default: 30)")
    add("--first-token-timeout", type=float, default=300, metavar="SECONDS",
        help="that a request waits at most for its first token (default: 300)")  # fmt: skip
    add("--idle-timeout", type=float, default=75, metavar="SECONDS", help="between two requests (default: 75)")
    add(
        "--stall-timeout", type=float, default=60, metavar="SECONDS", help="that a stream may stay unread (default: 60)"
    )
    add("--drain", type=float, default=30, metavar="SECONDS", help="for accepted requests, when stopped (default: 30)")


def run(options: argparse.Namespace) -> int:
    if options.served is not None and options.model is not None:
        raise SettingError("the model is named twice: as MODEL and with --model; give one of them")
    options.model = options.served or options.model
    model = required_model_name(options)
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise DollyError(f"dolly serve needs {error.name}: pip install 'modelscope-dolly[serve]'") from None
    from modelscope_dolly.server.lifecycle import serve
    from modelscope_dolly.server.server_settings import ServerSettings, read_keys

    settings = ServerSettings(
        host=options.host,
        port=options.port,
        name=options.served_model_name,
        keys=read_keys(options.api_key),
        queue=options.queue,
        rate=options.rate,
        body_bytes=options.max_body_bytes,
        arrival_seconds=options.arrival_timeout,
        first_seconds=options.first_token_timeout,
        idle_seconds=options.idle_timeout,
        stall_seconds=options.stall_timeout,
        drain_seconds=options.drain,
    )

    def load(progress: Callable[[int, int], None]) -> Dolly:
        from modelscope_dolly.checkpoint.download import locate
        from modelscope_dolly.load import load

        return load(locate(model, options.revision), **load_keywords(options), progress=progress)

    return serve(settings, load, options.slots, model)
