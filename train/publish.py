"""Publish a checkpoint as a revision on a ModelScope hub, every byte of it compared.

    python -m train.publish runs/dolly-3b/final --model-id me/dolly-v2-3b --revision v1.0.3

Reads from top to bottom: who, what, is it there already, send, compare, tag, compare. Interrupted anywhere, the same
command resumes; nothing that the hub stores is sent again.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import fields
from pathlib import Path

from modelscope_dolly.cli.exit_codes import exit_code
from modelscope_dolly.cli.parser import UsageParser
from modelscope_dolly.cli.streams import complain
from modelscope_dolly.errors import CheckpointError, DollyError, PublishError, SettingError, one_line
from train.publishing.hub import BRANCH, Hub
from train.publishing.publish_settings import VISIBILITIES, PublishSettings
from train.publishing.remote_files import Files, RevisionDifference, compare
from train.publishing.transfer import format_size
from train.recipe_file import shown

#: The prompt for the downloaded model.
QUESTION = "Explain to me the difference between nuclear fission and fusion."
_NAMES_SHOWN = 10
MOST_WORKERS = 64


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 published; 1 the hub or the network did not allow it; 2 a mistake in the command or the files."""
    return exit_code(lambda: command(arguments), "train.publish")


def command(arguments: list[str] | None) -> int:
    """The command itself: raises DollyError for what is a mistake."""
    try:
        options = build_parser().parse_args(arguments)
        values = {field.name: getattr(options, field.name) for field in fields(PublishSettings)}
        settings = PublishSettings.from_recipe(values)
        if not 1 <= options.workers <= MOST_WORKERS:
            raise DollyError(f"--workers is {shown(options.workers)}, it must be at least 1 and at most {MOST_WORKERS}")
        hub = Hub(settings, options.token, options.endpoint, say, options.workers)
        publish(options.directory, hub, options.dry_run, options.run, options.evaluation, options.staging)
    except PublishError as error:
        complain(str(error), "train.publish")
        return 1
    except KeyboardInterrupt:
        complain("stopped; the same command resumes", "train.publish")
        return 130
    return 0


def build_parser() -> UsageParser:
    """The command line."""
    parser = UsageParser(
        prog="train.publish", description="Publish a checkpoint as a revision on a ModelScope hub.", allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "directory",
        type=Path,
        help="the final/ or the adapter/ of a run, or any directory that dolly check finds sound",
    )
    add("--model-id", required=True, metavar="OWNER/NAME", help="the repository; created if there is none")
    add("--revision", required=True, metavar="TAG", help="for instance v1.0.3; a tag never moves")
    add("--visibility", choices=VISIBILITIES, help="of a new repository (default: private); an old one must have it")
    add("--prune", action="store_true", help="remove files from the branch that this revision does not have")
    add("--dry-run", action="store_true", help="print what would be sent; change nothing on the hub")
    add("--verify-download", action="store_true", help="then download it into an empty cache and ask it something")
    add("--license", metavar="NAME", help="of the result, for the card and a new repository: mit, apache-2.0, ...")
    add("--run", type=Path, help="the run it came from, for the card (default: the directory above, if it is one)")
    add("--evaluation", type=Path, help="directory of `dolly eval` results, for the card")
    add("--staging", type=Path, help="where to put the staged directory (default: beside the checkpoint)")
    add("--workers", type=int, default=4, help="files sent at the same time (default: %(default)s)")
    add("--endpoint", help="the hub (default: MODELSCOPE_ENDPOINT, or the public one)")
    add("--token", help="better: MODELSCOPE_API_TOKEN or `modelscope login`; a command line is visible to others")
    trust = "a host besides the endpoint that may see the token when files are sent to it"
    add("--trust-storage-host", action="append", default=[], metavar="HOST", help=trust)
    return parser


def publish(
    directory: Path,
    hub: Hub,
    dry_run: bool = False,
    run: Path | None = None,
    evaluation: Path | None = None,
    staging: Path | None = None,
) -> None:
    """Publish a checkpoint as a revision, or find that it is published already.

    Args:
        directory: the checkpoint.
        hub: the repository, with the settings of the revision.
        dry_run: look and report only.
        run: for the card; see stage().
        evaluation: for the card.
        staging: the parent of the staged directory.

    Raises:
        PublishError: the hub or the network; one line that says whether trying again may help.
        DollyError: the checkpoint cannot be published.
    """
    from train.publishing.adapter_staging import is_adapter, stage_adapter
    from train.publishing.staging import stage

    settings, revision = hub.settings, f"{hub.id}@{hub.revision}"

    # Who.
    hub.say(f"{revision} at {hub.endpoint}, published by {hub.whoami()}")

    # What.
    adapter = is_adapter(directory)
    if adapter and evaluation:
        raise SettingError("--evaluation is of a whole model; an adapter's card shows none: publish final/ with it")
    if adapter:
        staged = stage_adapter(directory, settings, run, staging)
    else:
        staged = stage(directory, settings, run, evaluation, staging)
    files = staged.files
    size = format_size(sum(file.size for file in files.values()))
    hub.say(f"{short(staged.directory)}: {len(files)} files, {size}; weights are {staged.weights_as}")
    if staged.left_out:
        hub.say(f"not published: {some(staged.left_out)}")

    # Where, and what is there.
    visibility, new_visibility = hub.visibility(), settings.visibility or "private"
    if settings.visibility and visibility not in (None, settings.visibility):
        raise PublishError(
            f"{hub.id} is {visibility}, not {settings.visibility}. Trying again does not help: change that on the hub, "
            "or leave --visibility out to publish to it as it is"
        )
    tagged = visibility is not None and hub.revision in hub.tags()
    before = compare(files, hub.files(BRANCH) if visibility else {})
    if tagged:
        check_tag(hub, files, hub.files(hub.revision))
        hub.say(f"{revision} is there already, with the same {len(files)} files")
    elif before.misleading and not settings.prune:
        raise PublishError(
            f"{BRANCH} of {hub.id} has files of another revision that readers would take for part of this one: "
            f"{some(before.misleading)}. Trying again does not help: pass --prune to remove them"
        )
    if dry_run:
        return report_dry_run(hub, files, visibility, before, tagged)

    # Send, compare, tag, compare.
    if not tagged:
        if visibility is None:
            hub.create(new_visibility, settings.license)
        hub.say(f"{hub.id} is {visibility}" if visibility else f"created {hub.id} ({new_visibility})")
        after = hub.send(staged.directory, files)
        hub.say(f"{BRANCH}: {len(files)} files compared by size and sha256")
        if after.stale:
            hub.say(f"on the hub but not of this revision, left there (--prune removes them): {some(after.stale)}")
        check_tag(hub, files, hub.tag())
        hub.say(f"{hub.revision}: {len(files)} files compared by size and sha256")

    if settings.verify_download:
        verify_download(hub, staged.directory, files, ask=not adapter)
    model = f'model=BASE, adapter="{revision}"' if adapter else f'model="{hub.id}", model_revision="{hub.revision}"'
    arguments = f"Tasks.text_generation, {model}"
    hub.say(f"published; to load it: pipeline({arguments})")


def check_tag(hub: Hub, files: Files, remote: Files) -> None:
    """Raise PublishError unless the tag holds these files, and besides them none that readers would load with them."""
    mismatches = compare(files, remote).mismatches
    if mismatches:
        raise PublishError(
            f"{hub.id}@{hub.revision} has other content: {some(mismatches)}. Trying again does not help: a tag cannot "
            "be moved; publish under another revision"
        )


def report_dry_run(hub: Hub, files: Files, visibility: str | None, before: RevisionDifference, tagged: bool) -> None:
    """Say what a publish would do."""
    if visibility is None:
        hub.say(f"would create {hub.id} ({hub.settings.visibility or 'private'})")
    names = [] if tagged else sorted(before.to_send)
    for name in names:
        hub.say(f"would send {name}  {format_size(files[name].size)}")
    if hub.settings.prune and not tagged:
        for name in before.stale:
            hub.say(f"would remove {name}")
    total = format_size(sum(files[name].size for name in names))
    hub.say(f"dry run: {len(names)} files, {total} at most; nothing was changed on the hub")


def verify_download(hub: Hub, staged: Path, files: Files, ask: bool = True) -> None:
    """Download the tag as a user would, compare it, and answer one prompt through ModelScope's pipeline().

    An adapter answers nothing without its base: there, `ask` is false.

    Raises:
        PublishError: the download is not what was sent.
        CheckpointError: the downloaded model does not answer.
    """
    from modelscope.pipelines import pipeline
    from modelscope.utils.constant import Tasks

    import modelscope_dolly  # noqa: F401 - registers the pipeline
    from train.publishing.staging import list_files

    with tempfile.TemporaryDirectory(prefix=".download.", dir=staged.parent) as cache:
        downloaded = hub.download(Path(cache))
        mismatches = compare(files, list_files(downloaded)).mismatches
        if mismatches:
            raise PublishError(f"{hub.id}: the download differs: {some(mismatches)}. Trying again does not help")
        if not ask:
            return hub.say(f"downloaded and compared {len(files)} files of the adapter")
        try:
            pipe = pipeline(Tasks.text_generation, model=str(downloaded))
            answer = pipe(QUESTION, do_sample=False, max_new_tokens=64)["text"]
        except Exception as error:  # of this machine, whatever it is: the bytes are those that were sent
            raise CheckpointError(f"{hub.id} was downloaded whole, but does not answer: {one_line(error)}") from error
    hub.say(f"downloaded and compared {len(files)} files; asked {QUESTION!r}, it answers {answer!r}")


def before_training(values: dict) -> None:
    """Find out before a long run whether its result could be published: token, hub, and a free revision.

    Args:
        values: the `publish` key of the recipe.

    Raises:
        PublishError: it could not, as things are now.
    """
    hub = Hub(PublishSettings.from_recipe(values))
    hub.whoami()
    if hub.revision in hub.tags():
        raise PublishError(f"{hub.id} has a revision {hub.revision} already; name another one in publish")


def after_training(values: dict, directory: Path) -> None:
    """Publish the result of a run. Raises PublishError with the command that resumes."""
    settings = PublishSettings.from_recipe(values)
    try:
        publish(directory, Hub(settings, say=say))
    except DollyError as error:
        raise PublishError(f"{error}. {directory} is complete; to resume: {settings.command(directory)}") from error


def short(path: Path) -> Path:
    """As people would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def some(names: list[str]) -> str:
    """The first few names."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def say(text: str) -> None:
    """Print a line, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
