"""`dolly bench`: speed beside this machine's limit and beside other engines."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from typing import Any

from modelscope_dolly.benchmark.bench_options import add_options, settings_of
from modelscope_dolly.errors import DollyError

SUMMARY = "speed beside this machine's limit and beside other engines"
add_arguments = add_options


def run(options: argparse.Namespace) -> int:
    settings = settings_of(options)
    from modelscope_dolly.benchmark.report import format_report
    from modelscope_dolly.benchmark.suite import has_figures, run_benchmark

    results: dict = {}
    code = 0
    with interrupt_once() as received:  # a run that is stopped still reports what it has measured
        try:
            run_benchmark(settings, results)
        except KeyboardInterrupt:
            number = received[0] if received else signal.SIGINT
            results["stopped"], code = number.name, 128 + number
        except DollyError as error:
            results["error"] = str(error)
            if not has_figures(results):
                raise
    if "stopped" in results and not has_figures(results):
        print(f"dolly: stopped by {results['stopped']} before anything was measured", file=sys.stderr)
        return code
    print(json.dumps(results, indent=2) if options.json else format_report(results))
    if "error" in results:
        raise DollyError(results["error"])
    return code


@contextlib.contextmanager
def interrupt_once() -> Iterator[list[signal.Signals]]:
    """The first signal to stop raises KeyboardInterrupt; later ones do not interrupt the cleanup.

    Yields the list of all that have been received.
    """
    received: list[signal.Signals] = []

    def stop(number: int, _: Any) -> None:
        received.append(signal.Signals(number))
        if len(received) == 1:
            raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # nohup and a shell's & have some of them ignored: they stay so
    before = {number: handler for number in numbers if (handler := signal.getsignal(number)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
