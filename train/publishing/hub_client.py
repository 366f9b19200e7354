"""ModelScope's hub client with our rules: who may see the token, which requests are repeated, and how long to wait.

All retries are ours. The client's own would repeat a write whose answer was lost without a look at what it did, and
would wait without a word for as long as a hub asks.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from modelscope_dolly.errors import PublishError, SettingError
from train.publishing.hub_errors import HubRequestError, explain
from train.publishing.publish_settings import PublishSettings

T = TypeVar("T")

#: Seconds between attempts.
PAUSES = (1, 2, 4, 8)
LONGEST_PAUSE = 60
#: Headers that carry the token.
_SECRET = ("Authorization", "Cookie")
_PORTS = {"http": 80, "https": 443}
_AGAIN = "Trying again may help: the same command resumes"


class HubClient:
    """The client of one hub, used by the owner of a token.

    Args:
        settings: which repository and revision.
        token: instead of MODELSCOPE_API_TOKEN or the token of `modelscope login`.
        endpoint: instead of MODELSCOPE_ENDPOINT or the public hub.
        say: gets lines about waiting and progress.
        workers: files that are sent at the same time.

    `api` is modelscope_hub's HubApi; its requests go through `call` or `read`, which raise HubRequestError.
    """

    def __init__(
        self,
        settings: PublishSettings,
        token: str | None = None,
        endpoint: str | None = None,
        say: Callable[[str], None] = print,
        workers: int = 4,
    ):
        from modelscope_hub import HubApi, HubConfig

        config = HubConfig(token=token or None, endpoint=endpoint or None)
        config.token = self.token = (config.token or "").strip()
        if not self.token:
            raise SettingError("no token: run `modelscope login`, set MODELSCOPE_API_TOKEN, or pass --token")
        if not self.token.isascii() or not self.token.isprintable() or " " in self.token:
            raise SettingError("the token has spaces or characters that no token has; was it pasted whole?")
        self.settings, self.id, self.revision = settings, settings.model_id, settings.revision
        self.endpoint, self.say, self.workers = config.endpoint, say, max(1, workers)
        self.user = "the owner of the token"
        self.api = HubApi(config)
        for client in (self.api.openapi, self.api.legacy):
            guard(client, self.trusts)

    def trusts(self, url: str) -> bool:
        """Whether the token may go there: to the endpoint, and to hosts that the user named."""
        if origin(url) == origin(self.endpoint):
            return True
        parts, hosts = urlsplit(url), set(self.settings.trust_storage_host)
        return parts.scheme == urlsplit(self.endpoint).scheme and bool({parts.hostname, parts.netloc} & hosts)

    def call(self, doing: str, request: Callable[..., T], *arguments: Any, sent_to: str = "", **options: Any) -> T:
        """One request, sent once.

        Args:
            doing: what it does, for the message.
            request: a method of `api`, called with `arguments` and `options`.
            sent_to: the address, where it is not the endpoint's.
        """
        from modelscope_hub.errors import HubError
        from urllib3.exceptions import HTTPError

        try:
            return request(*arguments, **options)
        except (Transient, HubError, OSError, HTTPError, AttributeError, LookupError, TypeError, ValueError) as error:
            # OSError: the base of all that requests raises. The last four: an answer that the client did not expect.
            cause, retry_after = error.args if isinstance(error, Transient) else (error, "")
            storage_host = urlsplit(sent_to).netloc if sent_to and not self.trusts(sent_to) else ""
            what, advice = explain(cause, self.id, self.user, storage_host)
            message = f"{doing}: {what}. " + (f"Trying again does not help: {advice}" if advice else _AGAIN)
            not_found = getattr(cause, "status_code", None) == 404
            # Without its cause: the client's own text may quote addresses with signatures in them.
            raise HubRequestError(message.replace(self.token, "***"), not advice, not_found, retry_after) from None

    def read(self, doing: str, request: Callable[..., T], *arguments: Any, absent: Any = ..., **options: Any) -> T:
        """A request that changes nothing, repeated until it is answered. `absent`: the result of a 404."""
        try:
            return self.retry(lambda: self.call(doing, request, *arguments, **options))
        except HubRequestError as error:
            if absent is ... or not error.not_found:
                raise
            return absent

    def ensure(self, doing: str, look: Callable[[], T | None], act: Callable[[], Any]) -> T:
        """Act until `look` returns something. An error of `act` counts only if `look` still returns None after it."""
        if (seen := look()) is not None:
            return seen

        def attempt() -> T:
            error = HubRequestError(f"{doing}: the hub accepted it, but it did not happen. {_AGAIN}", retryable=True)
            try:
                act()
            except HubRequestError as problem:
                error = problem
            if (seen := look()) is None:
                raise error
            return seen

        return self.retry(attempt)

    def retry(self, attempt: Callable[[], T], wait: Callable[[float], Any] | None = None) -> T:
        """The result of `attempt`, repeated after errors that may pass, unless a part of it was repeated in vain."""
        for pause in (*PAUSES, None):
            try:
                return attempt()
            except HubRequestError as error:
                error.exhausted |= pause is None or not error.retryable
                if error.exhausted:
                    raise
                if re.fullmatch(r"\d{1,9}", error.retry_after):
                    pause = max(pause, float(error.retry_after))
                if pause > LONGEST_PAUSE:
                    message = f"{error} (the hub asks to wait {pause:.0f} seconds)"
                    raise HubRequestError(message, exhausted=True) from None
                self.say(f"{str(error).partition('. Trying')[0]}; retrying in {pause:g} s")
                (wait or time.sleep)(pause)
        raise AssertionError("unreachable")


class Transient(Exception):
    """(error, Retry-After header) of a request that may succeed later; the client's own retry loops do not catch it."""


def origin(url: str) -> tuple[str, str, int | None]:
    """(scheme, host, port): what must be the same for a token to be sent along."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _PORTS.get(parts.scheme)


def guard(client: Any, trusted: Callable[[str], bool]) -> None:
    """Make every HTTP session of a part of HubApi drop the token on the way to an address that is not trusted.

    The HTTP adapter is the one place that all requests pass: uploads to a storage host, and redirects, for which the
    client itself would send its cookies along. The client's own retries end here, too.
    """
    import requests
    from urllib3.util import Retry

    sessions = [value for value in vars(client).values() if isinstance(value, requests.Session)]
    if not sessions:  # better no publish than a session that sends the token anywhere
        raise PublishError(f"{type(client).__name__} of this modelscope-hub is unknown: install the tested version")
    for adapter in (adapter for session in sessions for adapter in session.adapters.values()):
        adapter.max_retries = Retry(0, read=False)
        adapter.send = functools.partial(_send_guarded, adapter.send, trusted)


def _send_guarded(send: Callable, trusted: Callable[[str], bool], request: Any, *arguments: Any, **options: Any) -> Any:
    import requests
    from modelscope_hub.errors import HubError, raise_for_status

    if not trusted(request.url):
        for name in _SECRET:
            request.headers.pop(name, None)
    retry_after = ""
    try:
        response = send(request, *arguments, **options)
        if response.status_code in (409, 429) or response.status_code >= 500:
            retry_after = response.headers.get("Retry-After", "")
            raise_for_status(response)
    except (requests.RequestException, HubError) as error:
        raise Transient(error, retry_after) from error
    return response
