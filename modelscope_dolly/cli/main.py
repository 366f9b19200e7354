"""The `dolly` command: ask, chat, plan, check, quantize, bench, eval. Also reachable as `modelscope dolly ...`.

Nothing heavy is imported before a command needs it. What a user can repair ends in one line and exit code 2; Ctrl-C in
130; `dolly check` answers with 0 or 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from modelscope_dolly import __version__
from modelscope_dolly.benchmark.bench_options import add_options as add_bench_options
from modelscope_dolly.benchmark.bench_options import settings_of
from modelscope_dolly.errors import DollyError, SettingError
from modelscope_dolly.evaluation.command import add_options as add_eval_options

if TYPE_CHECKING:
    from modelscope_dolly.generation import GenerationSettings, Update
    from modelscope_dolly.load import Dolly

MODEL_VARIABLE = "DOLLY_MODEL"


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as all others are told, and not after a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"dolly: {message}; {self.prog} --help lists what there is\n")


def build_parser(parser: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
    """The parser of all commands, on top of `parser` where another program provides one."""
    parser = parser or _Parser(prog="dolly", description="dolly-v2, an instruction-following model.")
    commands = parser.add_subparsers(dest="dolly_command", metavar="COMMAND", required=True, parser_class=_Parser)

    ask = _command(commands, "ask", run_ask, "answer one instruction; the answer is printed as it is made")
    ask.add_argument("instruction", help="the instruction; - reads it from standard input")
    ask.add_argument("--context", metavar="FILE", help="file with text the instruction is about; - is standard input")
    _add_model_options(ask)
    _add_generation_options(ask)

    chat = _command(commands, "chat", run_chat, "answer one instruction after another, each on its own")
    _add_model_options(chat)
    _add_generation_options(chat)

    plan = _command(commands, "plan", run_plan, "memory and disk a model needs, compared with what is here")
    plan.add_argument("model", help="3b, 7b, 12b, a directory, or a hub id (only its config.json is downloaded)")
    plan.add_argument("--revision", help="tag or branch of the hub id (default: master)")
    plan.add_argument("--json", action="store_true", help="print one JSON object, sizes in bytes")

    check = _command(commands, "check", run_check, "verify a checkpoint directory; exit code 0 if sound, 1 if not")
    check.add_argument("directory", help="the directory that holds config.json and the weights")
    check.add_argument("--json", action="store_true", help="print one JSON object")

    quantize = _command(commands, "quantize", run_quantize, "write a smaller copy of a checkpoint, for CPUs")
    quantize.add_argument("source", help="directory or hub id of a checkpoint")
    quantize.add_argument("target", help="the new directory")
    quantize.add_argument("--to", default="int8", metavar="METHOD", help="int8 or int4 (default: int8)")
    quantize.add_argument("--revision", help="tag or branch of the hub id (default: master)")

    bench = _command(commands, "bench", run_bench, "speed beside this machine's limit and beside other engines")
    add_bench_options(bench)

    evaluation = _command(commands, "eval", run_eval, "score a model on the seven tasks of the dolly-v2 card")
    add_eval_options(evaluation, MODEL_VARIABLE)
    return parser


def _command(commands: Any, name: str, run: Callable, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
    command.set_defaults(dolly_run=run)
    command.add_argument("--verbose", action="store_true", help="show ModelScope's and our own log lines")
    return command


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", help=f"directory or hub id (default: ${MODEL_VARIABLE})")
    group.add_argument("--revision", help="tag or branch of the hub id (default: master)")
    group.add_argument("--device", help="cpu, cuda:N, gpu or mps (default: first GPU, else CPU)")
    group.add_argument("--dtype", help="bf16, fp16 or fp32 (default: what suits the device)")
    group.add_argument("--quantize", help="none, int8 or int4: smaller and faster on a CPU, less exact (default: none)")
    group.add_argument("--threads", type=int, help="of the CPU (default: physical cores)")
    group.add_argument("--draft", metavar="MODEL", help="a smaller model with the same vocabulary that guesses ahead")


def _add_generation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=int, help="longest answer in tokens (default: 256)")
    group.add_argument("--greedy", action="store_true", help="always take the likeliest token instead of sampling")
    group.add_argument("--temperature", type=float, help="above 1 bolder, below 1 tamer (default: 1)")
    group.add_argument("--top-p", type=float, help="sample from the likeliest tokens of this total (default: 0.92)")
    group.add_argument("--top-k", type=int, help="sample from the k likeliest tokens (default: 0, all)")
    group.add_argument("--repetition-penalty", type=float, help="above 1: repeat less (default: 1)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before this text; repeatable")
    group.add_argument("--seed", type=int, help="makes sampling repeatable (default: a new one each time)")
    group.add_argument("--on-overflow", help="error or truncate_context, for a context that is too long")
    group.add_argument("--prompt-lookup", choices=("on", "off", "auto"), help="guess that answers copy from the prompt")
    group.add_argument("--json", action="store_true", help="print one JSON object instead of the bare text")


def _load(options: argparse.Namespace) -> tuple[Dolly, GenerationSettings]:
    model = options.model or os.environ.get(MODEL_VARIABLE)
    if not model:
        raise SettingError(f"no model named: pass --model DIRECTORY_OR_HUB_ID, or set {MODEL_VARIABLE}")
    from modelscope_dolly.generation import GenerationSettings

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed", "on_overflow")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.prompt_lookup is not None:
        given["prompt_lookup"] = {"on": True, "off": False}.get(options.prompt_lookup, options.prompt_lookup)
    settings = GenerationSettings().updated({**given, "do_sample": not options.greedy})
    from modelscope_dolly.checkpoint.reader import locate
    from modelscope_dolly.load import load

    path = locate(model, options.revision)
    more = {"quantize": options.quantize, "threads": options.threads, "draft": options.draft}
    return load(path, options.device, options.dtype, **more), settings


def run_ask(options: argparse.Namespace) -> int:
    if options.instruction == "-" and options.context == "-":
        raise SettingError("only one of the instruction and --context can come from standard input (-)")
    value = {"instruction": _read(options.instruction) if options.instruction == "-" else options.instruction}
    if options.context is not None:
        value["context"] = _read(options.context)
    from modelscope_dolly.generation import parse_input

    parse_input(value)  # before the minute a large model takes to load
    dolly, settings = _load(options)
    _answer(dolly, value, settings, options.json)
    return 0


def run_chat(options: argparse.Namespace) -> int:
    dolly, settings = _load(options)
    person = sys.stdin.isatty()
    if person:
        import readline  # noqa: F401 (line editing and history for input())

        print(
            "dolly answers instructions and is not a dialogue model: each line is a fresh start, earlier lines are "
            "forgotten.\nCtrl-C stops an answer, Ctrl-D leaves.",
            file=sys.stderr,
        )
    for line in _lines(person):
        try:
            _answer(dolly, line, settings, options.json)
        except KeyboardInterrupt:
            if not person:
                raise
            print()
        except DollyError as error:
            if not person:
                raise
            print(f"dolly: {error}", file=sys.stderr)
    return 0


def _lines(person: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> ") if person else next(sys.stdin)
        except (EOFError, StopIteration):
            if person:
                print()
            return
        if line.strip():
            yield line.strip()


def _answer(dolly: Dolly, value: Any, settings: GenerationSettings, as_json: bool) -> None:
    """Print one answer, growing or as JSON."""
    import dataclasses
    import secrets

    from modelscope_dolly.generation import parse_input

    if settings.seed is None:
        settings = dataclasses.replace(settings, seed=secrets.randbelow(2**31))
    shown, update = "", None
    for update in dolly.responder.respond([parse_input(value)], settings, slots=1):
        if not as_json:
            print(update.text[len(shown) :], end="", flush=True)
            shown = update.text
    print(json.dumps(_facts(dolly, update, settings), ensure_ascii=False) if as_json else "", flush=True)


def _facts(dolly: Dolly, update: Update, settings: GenerationSettings) -> dict:
    from modelscope_dolly.hardware import dtype_name

    return {
        "text": update.text,
        "finish_reason": update.finish_reason,
        "prompt_tokens": update.prompt_tokens,
        "new_tokens": update.new_tokens,
        "seed": settings.seed if settings.do_sample else None,
        "model": str(dolly.checkpoint.path),
        "device": str(dolly.device),
        "dtype": dtype_name(dolly.dtype),
    }


def _read(name: str) -> str:
    """Text of a file or of standard input, without the newline at its end."""
    try:
        if name == "-":
            return sys.stdin.buffer.read().decode("utf-8").rstrip("\n")
        with open(name, encoding="utf-8") as file:
            return file.read().rstrip("\n")
    except OSError as error:
        raise SettingError(f"{name}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        place = "standard input" if name == "-" else name
        raise SettingError(f"{place}: not UTF-8 (byte {error.object[error.start]:#04x} at {error.start})") from None


def run_plan(options: argparse.Namespace) -> int:
    from modelscope_dolly.checkpoint.memory import plan, report

    figures = plan(options.model, options.revision)
    print(json.dumps(figures, indent=2) if options.json else report(figures))
    return 0


def run_check(options: argparse.Namespace) -> int:
    import dataclasses

    from modelscope_dolly.checkpoint.check import check_directory, report

    findings = check_directory(options.directory)
    sound = all(finding.status != "problem" for finding in findings)
    if options.json:
        print(json.dumps({"sound": sound, "findings": [dataclasses.asdict(f) for f in findings]}, indent=2))
    else:
        print(report(findings))
        print(f"{options.directory}: {'sound' if sound else 'NOT usable'}")
    return 0 if sound else 1


def run_quantize(options: argparse.Namespace) -> int:
    from modelscope_dolly.checkpoint.quantize import quantize_checkpoint
    from modelscope_dolly.checkpoint.reader import locate

    print(quantize_checkpoint(locate(options.source, options.revision), options.target, options.to))
    return 0


def run_bench(options: argparse.Namespace) -> int:
    settings = settings_of(options)
    from modelscope_dolly.benchmark.report import format_report
    from modelscope_dolly.benchmark.suite import has_figures, run_benchmark

    results: dict = {}
    code = 0
    with _one_stop() as received:  # a run that is stopped still tells what it has
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
def _one_stop() -> Iterator[list[signal.Signals]]:
    """The first signal to stop is a KeyboardInterrupt; the next do not disturb the tidying up. Yields all that came."""
    received: list[signal.Signals] = []

    def stop(number: int, _: Any) -> None:
        received.append(signal.Signals(number))
        if len(received) == 1:
            raise KeyboardInterrupt

    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # nohup and a shell's & have some of them ignored: they stay so
    before = {number: handler for number in wanted if (handler := signal.getsignal(number)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_eval(options: argparse.Namespace) -> int:
    from modelscope_dolly.evaluation.command import run

    return run(options, options.model or os.environ.get(MODEL_VARIABLE))


def run(options: argparse.Namespace) -> int:
    """Run a parsed command and turn what goes wrong into an exit code."""
    try:
        if not options.verbose:
            logging.getLogger("modelscope.dolly").setLevel(logging.WARNING)
        code = options.dolly_run(options)
        sys.stdout.flush()
        return code
    except DollyError as error:
        print(f"dolly: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader went away (`dolly ask ... | head`). Python would complain again when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def main(arguments: list[str] | None = None) -> int:
    if sys.stdout.encoding.lower() != "utf-8":
        sys.stdout.reconfigure(errors="replace")  # an answer may hold characters that this terminal has not
    parser = build_parser()
    parser.add_argument("--version", action="version", version=f"modelscope-dolly {__version__}")
    return run(parser.parse_args(arguments))


class ModelScopeCommand:
    """`modelscope dolly ...`: how ModelScope's own command finds us (entry point group modelscope_hub.cli_plugins).

    Loading this entry point also imports the package in every `modelscope` process, `modelscope server` included, which
    is what registers the pipeline there.
    """

    name = "dolly"

    def __init__(self, options: argparse.Namespace):
        self.options = options

    @classmethod
    def register(cls, subparsers: Any) -> None:
        build_parser(subparsers.add_parser(cls.name, help="dolly-v2: ask, chat, plan, check"))
        subparsers.choices[cls.name].set_defaults(_command=cls)

    def execute(self) -> None:
        sys.exit(run(self.options))


if __name__ == "__main__":
    sys.exit(main())
