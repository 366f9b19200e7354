"""One repository on a ModelScope hub: what it holds, and the actions of a publish.

Each action means "make it so": look, act, look again. So an action whose answer was lost is no failure, and a publish
that was interrupted anywhere resumes when it is started again.

The client's public calls are used where one does what is needed, which leaves four requests of `HubApi.legacy`:

- list_revisions_detail: the public list_repo_revisions returns branches and tags in one list, and a branch moves.
- validate_blobs, upload_blob, create_commit: upload_folder and upload_file create a missing repository as public,
  ignore the errors of that, and do not compare what they send with what was staged. upload_folder also commits the
  rest when a file was refused, and hides the reason. upload_file makes one commit for each file and delete_files one
  of its own: readers would see a branch that is incomplete.
"""

from __future__ import annotations

import io
import sys
import threading
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

from modelscope_dolly.errors import PublishError
from train.publishing.hub_client import HubClient
from train.publishing.hub_errors import HubRequestError
from train.publishing.remote_files import FileDigest, Files, RevisionDifference, compare, is_blob, make_commits
from train.publishing.transfer import OutgoingFile, Progress, format_size, run_in_threads

BRANCH = "master"
#: Blobs that are asked for in one request.
BLOBS_PER_REQUEST = 64


class Hub(HubClient):
    """One repository on a hub, as the owner of a token sees it.

    Every method raises PublishError, in one line that says whether trying again may help.
    """

    # Looking.

    def whoami(self) -> str:
        """The name of the account that the token belongs to."""
        self.user = self.read("asking who the token belongs to", self.api.whoami).username or self.user
        return self.user

    def visibility(self) -> str | None:
        """private, internal or public; None if there is no such repository."""
        repository = self.read(f"looking for {self.id}", self.api.get_repo, self.id, "model", absent=None)
        return None if repository is None else getattr(repository.visibility, "label", "of unknown visibility")

    def tags(self) -> list[str]:
        """Names of tags. Raises PublishError if the wanted tag is the name of a branch."""
        doing, request = f"listing the revisions of {self.id}", self.api.legacy.list_revisions_detail
        branches, tags = self.read(doing, request, self.id, "model", absent=([], []))
        if self.revision in [entry.get("Revision") for entry in branches]:
            raise PublishError(f"{self.revision} is a branch of {self.id}. Trying again does not help: choose a tag")
        return [entry.get("Revision") for entry in tags]

    def files(self, revision: str) -> Files:
        """The files of a revision; empty if there is none."""
        doing, options = f"listing {self.id}@{revision}", {"revision": revision, "absent": []}
        entries = self.read(doing, self.api.list_repo_files, self.id, "model", **options)
        return {entry.path: FileDigest(entry.size, entry.sha256 or "") for entry in entries if not entry.is_dir}

    # Acting.

    def create(self, visibility: str, license: str | None) -> None:
        """Create the repository, if it is not there."""
        from modelscope_hub import License

        spellings = {known.value.lower(): known.value for known in License}
        # Other where nobody named a licence, because the client would say Apache-2.0.
        license = spellings.get(license.lower(), license) if license else License.OTHER.value
        options = {"visibility": visibility, "license": license}
        doing, create = f"creating {self.id}", self.api.create_repo
        self.ensure(doing, self.visibility, lambda: self.call(doing, create, self.id, "model", **options))

    def send(self, directory: Path, files: Files) -> RevisionDifference:
        """Make the branch hold these files; returns how it then differs, which is by stale files only, or not at all.

        Raises:
            CheckpointError: a file is not what was staged any more.
        """
        difference, prune = RevisionDifference([], [], []), self.settings.prune

        def look() -> RevisionDifference | None:
            nonlocal difference
            difference = compare(files, self.files(BRANCH))
            return None if difference.to_send or (prune and difference.stale) else difference

        def act() -> None:
            blobs = {name: files[name] for name in difference.to_send if is_blob(name, files[name].size)}
            self._send_blobs(directory, blobs)
            doing, create = f"committing to {self.id}", self.api.legacy.create_commit
            for actions in make_commits(directory, files, difference, prune):
                self.call(doing, create, self.id, "model", actions, f"Publish {self.revision}", BRANCH)

        return self.ensure(f"publishing the files of {self.id}", look, act)

    def tag(self) -> Files:
        """Give the branch, as it is, the name of the revision, unless there is such a tag; returns the tag's files."""
        doing, exists = f"tagging {self.id}@{self.revision}", False

        def look() -> Files | None:
            nonlocal exists
            exists = self.revision in self.tags()
            return (self.files(self.revision) or None) if exists else None

        def act() -> None:
            if not exists:
                self.call(doing, self.api.create_repo_tag, self.id, "model", self.revision, revision=BRANCH)

        return self.ensure(doing, look, act)

    def download(self, cache: Path) -> Path:
        """Download the tag with ModelScope's own function, as any user would, into an empty cache."""
        from modelscope.hub.snapshot_download import snapshot_download

        options = {"revision": self.revision, "cache_dir": str(cache), "token": self.token}
        doing = f"downloading {self.id}@{self.revision}"
        # Its progress bars belong on a terminal only.
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            return Path(self.read(doing, snapshot_download, self.id, endpoint=self.endpoint, **options))

    # Sending files.

    def _send_blobs(self, directory: Path, blobs: Files) -> None:
        """Send the files that the hub does not store yet, each content once."""
        names = {content: name for name, content in blobs.items()}
        to_send = [content for content, address in self._upload_addresses(list(names)).items() if address]
        if not to_send:
            return
        stop, upload = threading.Event(), self.api.legacy.upload_blob

        def send(content: FileDigest) -> None:
            def attempt() -> None:
                address = self._upload_addresses([content])[content]  # anew each time: addresses expire
                if address is None:
                    return
                with OutgoingFile(directory / names[content], *content, progress.add, stop) as file:
                    try:
                        self.call(f"sending {names[content]}", upload, address, file, content.size, sent_to=address)
                    except HubRequestError:
                        progress.add(-file.tell())
                        raise

            self.retry(attempt, stop.wait)
            self.say(f"  {names[content]}  {format_size(content.size)}")

        with Progress(sum(content.size for content in to_send), self.say) as progress:
            run_in_threads(send, to_send, self.workers, stop)

    def _upload_addresses(self, contents: list[FileDigest]) -> dict[FileDigest, str | None]:
        """Where to send each content, or None if the hub stores it."""
        addresses: dict[FileDigest, str | None] = {}
        doing, request = f"asking {self.id} what it stores", self.api.legacy.validate_blobs
        for start in range(0, len(contents), BLOBS_PER_REQUEST):
            batch = contents[start : start + BLOBS_PER_REQUEST]
            objects = [{"oid": content.sha256, "size": content.size} for content in batch]
            answer = self.read(doing, request, self.id, "model", objects)
            addresses |= {content: answer.get(content.sha256) for content in batch}
        return addresses
