"""A batch from the first look at its files to the last line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelscope_dolly.batch.answer_rows import Progress, answer_rows
from modelscope_dolly.batch.description import describe, settle
from modelscope_dolly.batch.row_file import RowFile
from modelscope_dolly.files import write_json

if TYPE_CHECKING:
    from modelscope_dolly.batch.input_rows import InputRows
    from modelscope_dolly.batch.output_paths import OutputPaths
    from modelscope_dolly.generation_settings import GenerationSettings
    from modelscope_dolly.load import Dolly


@dataclass(frozen=True)
class BatchOutcome:
    """What is in the files, and what this run has added.

    Attributes:
        rows: of the input.
        answered, bad: of these, all runs together.
        new_rows, new_tokens, seconds: of this run, loading not counted.
        seed: of the batch; None for greedy answers.
    """

    rows: int
    answered: int
    bad: int
    new_rows: int
    new_tokens: int
    seconds: float
    seed: int | None


def answer_file(
    rows: InputRows,
    paths: OutputPaths,
    dolly: Dolly,
    settings: GenerationSettings,
    *,
    quantize: str | None,
    draft: str | None,
    overwrite: bool,
    in_order: bool,
    check: Callable[[], None],
    say: Callable[[str], None],
) -> BatchOutcome:
    """Answer the rows that the files do not have yet.

    Args:
        rows: the input.
        paths: where to; this process holds their lock.
        dolly: answers.
        settings: of all answers; without a seed, answers are sampled with that of the run that goes on, or a new one.
        quantize, draft: how the model was loaded.
        overwrite: replace answers of another run.
        in_order: sort the files at the end.
        check: that the lock is still held.
        say: prints a line.

    Raises:
        SettingError: there are answers of another run.
        DollyError: see answer_rows; the files are fit to go on with.
    """
    description = describe(rows, dolly, settings, quantize, draft)
    if not settle(paths.description, description, paths.answers, overwrite):
        for path in (paths.answers, paths.problems):
            path.unlink(missing_ok=True)
        write_json(paths.description, description)
    settings = dataclasses.replace(settings, seed=description["settings"]["seed"])
    answers, problems = (RowFile(path, rows.count, check) for path in (paths.answers, paths.problems))
    done = answers.count + problems.count
    progress = Progress(rows.count, done, say)
    missing = rows.read(skip=lambda index: index in answers or index in problems)
    try:
        answer_rows(missing, dolly.text_generator, settings, answers, problems, progress)
    except KeyboardInterrupt:
        say(f"stopped: {answers.count:,} of {rows.count:,} rows are answered; the same command goes on")
        raise
    finally:
        progress.close()
        for file in (answers, problems):
            file.close()
    for file in (answers, problems) if in_order else ():
        file.sort()
    new = progress.done - done
    seed = settings.seed
    return BatchOutcome(rows.count, answers.count, problems.count, new, progress.new_tokens, progress.seconds, seed)
