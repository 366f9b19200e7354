"""What publishing asks of a ModelScope hub, and what its answers mean.

The only module of the recipe that uses the hub's client to publish. It takes the client's single requests, not its
upload_folder: that one creates a missing repository as public, commits whatever arrived when a file was refused, hides
the reason, and sends the token to whatever host the hub names as its storage.

Each action is "make it so": look, act, look again. So an action whose answer was lost is no failure, and a publish
that was interrupted anywhere goes on when it is started again.
"""

from __future__ import annotations

import io
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from modelscope_dolly.errors import PublishError, SettingError
from train.publishing import transfer as wire
from train.publishing.hub_errors import explain
from train.publishing.remote_files import (
    VISIBILITIES,
    Destination,
    Difference,
    Files,
    action_for,
    batches,
    compare,
    is_blob,
    ordered,
)

T = TypeVar("T")

BRANCH = "master"
#: Seconds between attempts.
PAUSES = (1, 2, 4, 8)
LONGEST_PAUSE = 60
#: Blobs that are asked after in one request.
BATCH = 64
_AGAIN = "Trying again may help: the same command goes on from here"
_NOT_AGAIN = "Trying again does not help: "


class Hub:
    """One repository on a hub, seen by the owner of a token.

    Args:
        destination: which repository.
        token: instead of MODELSCOPE_API_TOKEN or the token of `modelscope login`.
        endpoint: instead of MODELSCOPE_ENDPOINT or the public hub.
        say: gets lines about waiting and progress.
        workers: files that are sent at the same time.

    Every method raises PublishError, in one line that says whether trying again may help.
    """

    def __init__(
        self,
        destination: Destination,
        token: str | None = None,
        endpoint: str | None = None,
        say: Callable[[str], None] = print,
        workers: int = 4,
    ):
        from modelscope_hub import HubConfig
        from modelscope_hub._legacy_api import LegacyClient
        from modelscope_hub._openapi import OpenAPIClient

        config = HubConfig(token=token or None, endpoint=endpoint or None)
        self._token = (config.token or "").strip()
        if not self._token:
            raise SettingError("no token: run `modelscope login`, set MODELSCOPE_API_TOKEN, or give --token")
        if not self._token.isascii() or not self._token.isprintable() or " " in self._token:
            raise SettingError("the token holds spaces or characters that no token has; was it pasted whole?")
        config.token = self._token
        self.id, self.endpoint, self.say, self.workers = destination.model_id, config.endpoint, say, max(1, workers)
        self.destination, self.user = destination, "the owner of the token"
        self._heard = threading.local()
        self._openapi = OpenAPIClient(config, max_retries=1)
        self._api = LegacyClient(self._token, self.endpoint, max_retries=0)
        wire.guard((self._openapi, self._api), self.trusts, self._heard)

    def trusts(self, url: str) -> bool:
        """Whether the token may go there: to the endpoint, and to hosts that the user named."""
        if wire.origin(url) == wire.origin(self.endpoint):
            return True
        parts = urlsplit(url)
        same_scheme = parts.scheme == urlsplit(self.endpoint).scheme
        return same_scheme and bool({parts.hostname, parts.netloc} & set(self.destination.trust_storage_host))

    # Looking.

    def whoami(self) -> str:
        """The name of the account that the token belongs to."""
        found = self._patiently("asking who the token belongs to", self._openapi.get_current_username)
        self.user = found or self.user
        return self.user

    def visibility(self) -> str | None:
        """private, internal or public; None if there is no such repository."""
        found = self._patiently(f"looking for {self.id}", self._api.get_repo_info, self.id, "model", absent=None)
        if not found:
            return None
        if isinstance(found.get("private"), bool):
            return "private" if found["private"] else "public"
        return {1: "private", 3: "internal", 5: "public"}.get(found.get("Visibility"), "of unknown visibility")

    def tags(self) -> list[str]:
        """Names of tags. Raises PublishError if the wanted tag is the name of a branch."""
        doing = f"listing the revisions of {self.id}"
        branches, tags = self._patiently(doing, self._api.list_revisions_detail, self.id, "model", absent=([], []))
        if self.destination.revision in [entry.get("Revision") for entry in branches]:
            raise PublishError(f"{self.destination.revision} is a branch of {self.id}; {_NOT_AGAIN}name another tag")
        return [entry.get("Revision") for entry in tags]

    def tree(self, revision: str) -> dict[str, tuple[int, str]]:
        """path -> (bytes, sha256) of the files of a revision; empty if there is none."""
        doing = f"listing {self.id}@{revision}"
        entries = self._patiently(doing, self._api.list_repo_files, self.id, "model", revision, absent=[])
        files = [entry for entry in entries if entry.get("Type") != "tree"]
        return {entry["Path"]: (int(entry.get("Size") or 0), entry.get("Sha256") or "") for entry in files}

    # Acting.

    def create(self, visibility: str, license: str) -> None:
        """Make the repository, if it is not there."""
        owner, name = self.id.split("/")
        body = {"Path": owner, "Name": name, "Visibility": VISIBILITIES[visibility], "License": license}
        doing = f"creating {self.id}"
        self._until(doing, self.visibility, lambda: self._call(doing, self._api.create_repo, "model", body))

    def send(self, directory: Path, files: Files, prune: bool) -> Difference:
        """Make the branch hold these files; returns how it then differs, which is by stale files only, or not at all.

        Raises:
            CheckpointError: a file is not what was staged any more.
        """

        found = Difference([], [], [])

        def look() -> Difference | None:
            nonlocal found
            found = compare(files, self.tree(BRANCH))
            return None if found.missing or found.other or (prune and found.stale) else found

        def act() -> None:
            wanted = [*found.missing, *found.other]
            self._send_blobs(directory, {name: files[name] for name in wanted if is_blob(name, files[name][0])})
            deletions = [{"action": "delete", "path": name} for name in (found.stale if prune else ())]
            actions = deletions + [action_for(directory, name, *files[name]) for name in ordered(wanted)]
            for batch in batches(actions):
                doing, message = f"committing to {self.id}", f"Publish {self.destination.revision}"
                self._call(doing, self._api.create_commit, self.id, "model", batch, message, BRANCH)

        return self._until(f"publishing the files of {self.id}", look, act)

    def tag(self) -> dict[str, tuple[int, str]]:
        """Give the branch, as it is, the name of the revision, unless it has a tag already; returns the tag's tree."""
        tag, doing = self.destination.revision, f"tagging {self.id}@{self.destination.revision}"

        there = False

        def look() -> dict[str, tuple[int, str]] | None:
            nonlocal there
            there = tag in self.tags()
            return (self.tree(tag) or None) if there else None

        def act() -> None:
            if not there:
                self._call(doing, self._api.create_tag, self.id, "model", tag, BRANCH)

        return self._until(doing, look, act)

    def download(self, place: Path) -> Path:
        """Fetch the tag with ModelScope's own function, as any user would, into an empty cache."""
        from modelscope.hub.snapshot_download import snapshot_download

        options = {"revision": self.destination.revision, "cache_dir": str(place), "token": self._token}
        doing = f"downloading {self.id}@{self.destination.revision}"
        # Its bars belong on a terminal only.
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            return Path(self._patiently(doing, snapshot_download, self.id, endpoint=self.endpoint, **options))

    # Sending files.

    def _send_blobs(self, directory: Path, blobs: Files) -> None:
        """Send the files that the hub does not store yet, each content once."""
        names = {sha256: (name, size) for name, (size, sha256) in blobs.items()}
        left = [sha256 for sha256, address in self._addresses(names).items() if address]
        if not left:
            return
        stop = threading.Event()
        with wire.Progress(sum(names[sha256][1] for sha256 in left), self.say) as progress:

            def job(sha256: str) -> Callable[[], None]:
                name, size = names[sha256]
                return lambda: self._send_blob(directory, name, size, sha256, progress, stop)

            wire.in_parallel([job(sha256) for sha256 in left], self.workers, stop)

    def _addresses(self, names: Mapping[str, tuple[str, int]]) -> dict[str, str | None]:
        """sha256 -> where to send it, or None if it is stored."""
        found: dict[str, str | None] = {}
        objects = [{"oid": sha256, "size": size} for sha256, (_, size) in names.items()]
        for start in range(0, len(objects), BATCH):
            batch = objects[start : start + BATCH]
            doing = f"asking {self.id} what it stores"
            answer = self._patiently(doing, self._api.validate_blobs, self.id, "model", batch)
            found |= {entry["oid"]: answer.get(entry["oid"]) for entry in batch}
        return found

    def _send_blob(self, directory: Path, name: str, size: int, sha256: str, progress: Any, stop: Any) -> None:
        for pause in (*PAUSES, None):
            address = self._addresses({sha256: (name, size)})[sha256]  # anew each time: addresses expire
            if address is None:
                break
            with wire.Outgoing(directory / name, size, sha256, progress.add, stop) as file:
                try:
                    self._call(f"sending {name}", self._api.upload_blob, address, file, size, sent_to=address)
                    break
                except PublishError as error:
                    progress.add(-file.tell())
                    error.final = not error.again or pause is None
                    if error.final:
                        raise
                    self._pause(error, pause, stop.wait)
        self.say(f"  {name}  {wire.size(size)}")

    # Patience.

    def _call(self, doing: str, request: Callable[..., T], *arguments: Any, sent_to: str = "", **options: Any) -> T:
        """One request of the client, its errors put into words."""
        from modelscope_hub.errors import HubError
        from urllib3.exceptions import HTTPError

        self._heard.retry_after = None
        try:
            return request(*arguments, **options)
        except (HubError, OSError, HTTPError, AttributeError, LookupError, TypeError, ValueError) as e:
            # OSError: the base of all that requests raises. The last four: an answer that the client did not expect.
            elsewhere = urlsplit(sent_to).netloc if sent_to and not self.trusts(sent_to) else ""
            what, again = explain(e, self.id, self.user, elsewhere)
            text = f"{doing}: {what}. {_AGAIN}" if again is True else f"{doing}: {what}. {_NOT_AGAIN}{again}"
            error = PublishError(text.replace(self._token, "***"))
            error.again, error.absent = again is True, getattr(e, "status_code", None) == 404
            raise error from None  # the client's own text may quote addresses with signatures in them

    def _patiently(self, doing: str, request: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """A request that changes nothing, until it is answered. `absent`: what a 404 means."""
        knows_absence, absent = "absent" in options, options.pop("absent", None)
        for pause in (*PAUSES, None):
            try:
                return self._call(doing, request, *arguments, **options)
            except PublishError as error:
                if knows_absence and error.absent:
                    return absent
                error.final = not error.again or pause is None
                if error.final:
                    raise
                self._pause(error, pause)
        raise AssertionError("unreachable")

    def _until(self, doing: str, look: Callable[[], T | None], act: Callable[[], Any]) -> T:
        """Act until `look` finds what is wanted. What an error says counts only if it is not there after all.

        An error that a part of the action has waited for in vain (`final`) is not waited for once more.
        """
        found = look()
        for pause in (*PAUSES, None):
            if found is not None:
                return found
            error = PublishError(f"{doing}: the hub said yes, but it did not happen. {_AGAIN}")
            error.again = True
            try:
                act()
            except PublishError as problem:
                error = problem
            found = look()
            if found is None:
                if not error.again or pause is None or error.final:
                    raise error
                self._pause(error, pause)
        return found

    def _pause(self, error: PublishError, seconds: float, wait: Callable[[float], Any] | None = None) -> None:
        """Wait before the next attempt, as long as the hub asks for. Raises `error` if it asks for too much."""
        asked = getattr(self._heard, "retry_after", None)
        seconds = max(seconds, float(asked)) if asked and re.fullmatch(r"\d{1,9}", asked) else seconds
        if seconds > LONGEST_PAUSE:
            late = PublishError(f"{error} (the hub asks to wait {seconds:.0f} seconds)")
            late.again = late.final = True
            raise late
        self.say(f"{str(error).partition('. Trying')[0]}; once more in {seconds:g} s")
        (wait or time.sleep)(seconds)
