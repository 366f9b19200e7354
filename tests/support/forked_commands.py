"""Commands in processes of their own that start at once: forked from one that has imported everything and done nothing.

Starting Python and importing torch takes seconds, which a test that kills a command twenty times cannot afford.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

_SERVER = """
import json, os, signal, sys, traceback
import torch
import modelscope_dolly.batch.answer_file, modelscope_dolly.load
from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.cli.main import main
torch.set_num_threads(1)
open_checkpoint(sys.argv[1])  # what it imports
for line in sys.stdin:
    arguments, output = json.loads(line)
    child = os.fork()
    if child == 0:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(file, number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = 99
        try:
            code = main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class ForkedCommands:
    """`dolly` commands, one at a time. Use it in a `with` block.

    Args:
        model: a checkpoint directory, opened once so that whatever it takes is imported.
        output: file that gets what the newest command prints, to either stream.
    """

    def __init__(self, model: Path, output: Path):
        self.output = output
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _SERVER, str(model)]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> ForkedCommands:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(timeout=60)

    def start(self, *arguments: str) -> int:
        """The process number of a command that has begun."""
        print(json.dumps([arguments, str(self.output)]), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def wait(self) -> int:
        """The exit code of the command, negative for a signal."""
        return int(self._server.stdout.readline())

    def run(self, *arguments: str) -> int:
        self.start(*arguments)
        return self.wait()

    def kill(self, process: int, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal, unless the command has ended by itself; returns its exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
        return self.wait()

    @property
    def printed(self) -> str:
        return self.output.read_text()
