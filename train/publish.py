"""Publish a checkpoint as a revision on a ModelScope hub, every byte of it compared.

    python -m train.publish runs/dolly-3b/final --model-id me/dolly-v2-3b --revision v1.0.3

Reads from top to bottom: who, what, is it there already, send, compare, tag, compare. Interrupted anywhere, the same
command goes on; nothing that the hub stores is sent again.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path

from modelscope_dolly.errors import CheckpointError, DollyError, PublishError, one_line
from train.config import Parser
from train.publishing.hub import BRANCH, Hub
from train.publishing.remote_files import VISIBILITIES, Destination, Difference, Files, compare
from train.publishing.transfer import size

#: What the downloaded model is asked.
QUESTION = "Explain to me the difference between nuclear fission and fusion."
_SHOWN = 10


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 published; 1 the hub or the network did not allow it; 2 a mistake in the command or the files."""
    try:
        options = build_parser().parse(arguments)
        destination = Destination(
            options.model_id,
            options.revision,
            options.visibility,
            options.prune,
            options.verify_download,
            tuple(options.trust_storage_host),
            options.license,
        )
        hub = Hub(destination, options.token, options.endpoint, say, options.workers)
        publish(options.directory, hub, options.dry_run, options.run, options.evaluation, options.staging)
    except PublishError as error:
        print(f"train.publish: {error}", file=sys.stderr)
        return 1
    except DollyError as error:
        print(f"train.publish: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.publish: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def build_parser() -> Parser:
    """The command line."""
    parser = Parser("train.publish", "Publish a checkpoint as a revision on a ModelScope hub.")
    add = parser.add_argument
    add("directory", type=Path, help="a checkpoint: the final/ of a run, or any directory that dolly check finds sound")
    add("--model-id", required=True, metavar="OWNER/NAME", help="the repository; created if it is not there")
    add("--revision", required=True, metavar="TAG", help="for instance v1.0.3; a tag never moves")
    add(
        "--visibility",
        choices=sorted(VISIBILITIES),
        help="of a new repository (default: private); one that is there must have it",
    )
    add("--prune", action="store_true", help="remove files from the branch that this revision does not have")
    add("--dry-run", action="store_true", help="print what would be sent; change nothing on the hub")
    add("--verify-download", action="store_true", help="then fetch it into a clean cache and ask it something")
    add("--license", metavar="NAME", help="of the result, for the card and a new repository: mit, apache-2.0, ...")
    add(
        "--run", type=Path, help="the run it came from, for the card (default: the directory above, if it has run.json)"
    )
    add("--evaluation", type=Path, help="directory of `dolly eval` results, for the card")
    add("--staging", type=Path, help="where to put the staged directory (default: beside the checkpoint)")
    add("--workers", type=int, default=4, help="files sent at the same time (default: %(default)s)")
    add("--endpoint", help="the hub (default: MODELSCOPE_ENDPOINT, or the public one)")
    add("--token", help="better: MODELSCOPE_API_TOKEN or `modelscope login`; a command line is visible to others")
    add(
        "--trust-storage-host",
        action="append",
        default=[],
        metavar="HOST",
        help="a host beside the endpoint that may see the token when files are sent to it",
    )
    return parser


def publish(
    directory: Path,
    hub: Hub,
    dry_run: bool = False,
    run: Path | None = None,
    evaluation: Path | None = None,
    staging: Path | None = None,
) -> None:
    """Make the revision, or find that it is there already.

    Args:
        directory: the checkpoint.
        hub: knows where the revision goes.
        dry_run: look and tell only.
        run: for the card; see stage().
        evaluation: for the card.
        staging: the parent of the staged directory.

    Raises:
        PublishError: the hub or the network; one line that says whether trying again may help.
        DollyError: the checkpoint cannot be published.
    """
    from train.publishing.staging import stage

    to, name = hub.destination, f"{hub.id}@{hub.destination.revision}"

    # Who.
    hub.say(f"{name} at {hub.endpoint}, published by {hub.whoami()}")

    # What.
    staged = stage(directory, to, run, evaluation, staging)
    hub.say(f"{short(staged.directory)}: {len(staged.files)} files, {size(staged.size)}; weights are {staged.means}")
    if staged.left_out:
        hub.say(f"not published: {some(staged.left_out)}")

    # Where, and what is there.
    visibility = hub.visibility()
    if to.visibility and visibility not in (None, to.visibility):
        raise PublishError(
            f"{hub.id} is {visibility}, not {to.visibility}. Trying again does not help: change that on the hub, or "
            "leave --visibility out to publish to it as it is"
        )
    tagged = visibility is not None and to.revision in hub.tags()
    before = compare(staged.files, hub.tree(BRANCH) if visibility else {})
    if tagged:
        check_tag(hub, staged.files, hub.tree(to.revision))
        hub.say(f"{name} is there already, with the same {len(staged.files)} files")
    elif before.misleading and not to.prune:
        raise PublishError(
            f"{BRANCH} of {hub.id} has files of another revision that readers would take for part of this one: "
            f"{some(before.misleading)}. Trying again does not help: say --prune to remove them"
        )
    if dry_run:
        return _tell(hub, staged.files, visibility, before, tagged)

    # Send, compare, tag, compare.
    if not tagged:
        if visibility is None:
            hub.create(to.visibility or "private", licence(to.license))
            hub.say(f"created {hub.id} ({to.visibility or 'private'})")
        else:
            hub.say(f"{hub.id} is {visibility}")
        after = hub.send(staged.directory, staged.files, to.prune)
        hub.say(f"{BRANCH}: {len(staged.files)} files compared by size and sha256")
        if after.stale:
            hub.say(f"on the hub but not of this revision, left there (--prune removes them): {some(after.stale)}")
        check_tag(hub, staged.files, hub.tag())
        hub.say(f"{to.revision}: {len(staged.files)} files compared by size and sha256")

    if to.verify_download:
        verify_download(hub, staged.directory, staged.files)
    hub.say(f'published; to load it: pipeline(Tasks.text_generation, model="{hub.id}", model_revision="{to.revision}")')


def check_tag(hub: Hub, files: Files, remote: Files) -> None:
    """Raise PublishError unless the tag holds these files, and beside them none that readers would take for its own."""
    found = compare(files, remote)
    if found.wrong:
        raise PublishError(
            f"{hub.id}@{hub.destination.revision} holds other content: {some(found.wrong)}. Trying again does not "
            "help: a tag cannot be moved; publish under another revision"
        )


def _tell(hub: Hub, files: Files, visibility: str | None, before: Difference, tagged: bool) -> None:
    """What a publish would do."""
    if visibility is None:
        hub.say(f"would create {hub.id} ({hub.destination.visibility or 'private'})")
    wanted = [] if tagged else [*before.missing, *before.other]
    for name in sorted(wanted):
        hub.say(f"would send {name}  {size(files[name][0])}")
    if hub.destination.prune and not tagged:
        for name in before.stale:
            hub.say(f"would remove {name}")
    total = sum(files[name][0] for name in wanted)
    hub.say(f"dry run: {len(wanted)} files, {size(total)} at most; nothing was changed on the hub")


def verify_download(hub: Hub, staged: Path, files: Files) -> None:
    """Fetch the tag as a user would, compare it, and answer one prompt through ModelScope's pipeline().

    Raises:
        PublishError: what comes back is not what was sent.
    """
    from modelscope.pipelines import pipeline
    from modelscope.utils.constant import Tasks

    import modelscope_dolly  # noqa: F401 - registers the pipeline
    from train.publishing.staging import listing

    with tempfile.TemporaryDirectory(prefix=".download.", dir=staged.parent) as cache:
        there = hub.download(Path(cache))
        wrong = compare(files, listing(there)).wrong
        if wrong:
            raise PublishError(
                f"{hub.id}: the download differs: {some(wrong)}. Trying again does not help: ask the hub"
            )
        try:
            pipe = pipeline(Tasks.text_generation, model=str(there))
            answer = pipe(QUESTION, do_sample=False, max_new_tokens=64)["text"]
        except Exception as error:  # of this machine, whatever it is: the bytes are those that were sent
            raise CheckpointError(f"{hub.id} was downloaded whole, but does not answer: {one_line(error)}") from error
    hub.say(f"downloaded and compared {len(files)} files; asked {QUESTION!r}, it answers {answer!r}")


def licence(name: str | None) -> str:
    """A licence in the hub's spelling; Other where nobody named one, because the client would say Apache-2.0."""
    from modelscope_hub import License

    known = {licence.value.lower(): licence.value for licence in License}
    return known.get(name.lower(), name) if name else License.OTHER.value


def before_training(values: dict) -> None:
    """Find out before a long run whether its end could be published: token, hub, and a free revision.

    Raises:
        PublishError: not as things are now.
    """
    hub = Hub(Destination.of(values))
    hub.whoami()
    if hub.destination.revision in hub.tags():
        raise PublishError(f"{hub.id} has a revision {hub.destination.revision} already; name another one in publish")


def after_training(values: dict, directory: Path) -> None:
    """Publish the end of a run. Raises PublishError with the command that goes on."""
    destination = Destination.of(values)
    try:
        publish(directory, Hub(destination, say=say))
    except DollyError as error:
        raise PublishError(
            f"{error}. {directory} is complete; to go on: {' '.join(command(directory, destination))}"
        ) from error


def command(directory: Path, to: Destination) -> list[str]:
    """The command line that publishes a directory to a destination."""
    words = ["python", "-m", "train.publish", str(directory), "--model-id", to.model_id, "--revision", to.revision]
    words += ["--visibility", to.visibility] if to.visibility else []
    words += ["--prune"] * to.prune + ["--verify-download"] * to.verify_download
    words += ["--license", to.license] if to.license else []
    for host in to.trust_storage_host:
        words += ["--trust-storage-host", host]
    return [shlex.quote(word) for word in words]


def short(path: Path) -> Path:
    """As people would type it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def some(names: list[str]) -> str:
    """The first few names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def say(text: str) -> None:
    """Print a line, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
