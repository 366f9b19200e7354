"""ModelScope's hub client with our rules: who may see the token, which requests are repeated, and how long to wait.

All retries are ours. The client's own would repeat a write whose answer was lost without a look at what it did, and
would wait without a word for as long as a hub asks.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from modelscope_dolly.errors import PublishError, SettingError
from train.publishing.hub_errors import HubRequestError, explain

T = TypeVar("T")

#: Seconds between attempts.
PAUSES = (1, 2, 4, 8)
LONGEST_PAUSE = 60
#: Headers that carry the token.
_SECRET = ("Authorization", "Cookie")
_PORTS = {"http": 80, "https": 443}


class HubClient:
    """The client of one hub, used by the owner of a token.

    Args:
        model_id: the repository, for messages.
        token: instead of MODELSCOPE_API_TOKEN or the token of `modelscope login`.
        endpoint: instead of MODELSCOPE_ENDPOINT or the public hub.
        trusted_hosts: hosts besides the endpoint that may see the token.
        say: gets lines about waiting.

    Attributes:
        api: modelscope_hub.HubApi. Its requests go through `call` or `read`.
        user: the name of the account, as soon as somebody knows it.
    """

    def __init__(
        self,
        model_id: str,
        token: str | None,
        endpoint: str | None,
        trusted_hosts: Iterable[str],
        say: Callable[[str], None],
    ):
        from modelscope_hub import HubApi, HubConfig

        config = HubConfig(token=token or None, endpoint=endpoint or None)
        self.token = (config.token or "").strip()
        if not self.token:
            raise SettingError("no token: run `modelscope login`, set MODELSCOPE_API_TOKEN, or pass --token")
        if not self.token.isascii() or not self.token.isprintable() or " " in self.token:
            raise SettingError("the token has spaces or characters that no token has; was it pasted whole?")
        config.token = self.token
        self.model_id, self.endpoint, self.say = model_id, config.endpoint, say
        self.trusted_hosts, self.user = set(trusted_hosts), "the owner of the token"
        self.api = HubApi(config)
        guard((self.api.openapi, self.api.legacy), self.trusts)

    def trusts(self, url: str) -> bool:
        """Whether the token may go there: to the endpoint, and to hosts that the user named."""
        if origin(url) == origin(self.endpoint):
            return True
        parts = urlsplit(url)
        same_scheme = parts.scheme == urlsplit(self.endpoint).scheme
        return same_scheme and bool({parts.hostname, parts.netloc} & self.trusted_hosts)

    def call(self, doing: str, request: Callable[..., T], *arguments: Any, sent_to: str = "", **options: Any) -> T:
        """One request, sent once. Raises HubRequestError.

        Args:
            doing: what it does, for the message.
            request: a method of `api`.
            arguments: of the method.
            sent_to: the address, where it is not the endpoint's.
            options: keyword arguments of the method.
        """
        from modelscope_hub.errors import HubError
        from urllib3.exceptions import HTTPError

        try:
            return request(*arguments, **options)
        except (Transient, HubError, OSError, HTTPError, AttributeError, LookupError, TypeError, ValueError) as error:
            # OSError: the base of all that requests raises. The last four: an answer that the client did not expect.
            cause, retry_after = (error.cause, error.retry_after) if isinstance(error, Transient) else (error, "")
            storage_host = urlsplit(sent_to).netloc if sent_to and not self.trusts(sent_to) else ""
            summary, advice = explain(cause, self.model_id, self.user, storage_host)
            summary, not_found = f"{doing}: {summary}", getattr(cause, "status_code", None) == 404
            # Without its cause: the client's own text may quote addresses with signatures in them.
            raise HubRequestError(summary.replace(self.token, "***"), advice, not_found, retry_after) from None

    def read(self, doing: str, request: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """A request that changes nothing, repeated until it is answered. Option `absent`: the result of a 404."""
        has_absent, absent = "absent" in options, options.pop("absent", None)
        try:
            return self.retry(lambda: self.call(doing, request, *arguments, **options))
        except HubRequestError as error:
            if has_absent and error.not_found:
                return absent
            raise

    def ensure(self, doing: str, look: Callable[[], T | None], act: Callable[[], Any]) -> T:
        """Act until `look` returns something. An error of `act` counts only if `look` still returns None after it."""
        if (seen := look()) is not None:
            return seen

        def attempt() -> T:
            error = HubRequestError(f"{doing}: the hub accepted it, but it did not happen")
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
                self._pause(error, pause, wait or time.sleep)
        raise AssertionError("unreachable")

    def _pause(self, error: HubRequestError, seconds: float, wait: Callable[[float], Any]) -> None:
        """Wait as long as the hub asks for. Raises HubRequestError if it asks for too much."""
        if re.fullmatch(r"\d{1,9}", error.retry_after):
            seconds = max(seconds, float(error.retry_after))
        if seconds > LONGEST_PAUSE:
            raise HubRequestError(f"{error.summary} (the hub asks to wait {seconds:.0f} seconds)", exhausted=True)
        self.say(f"{error.summary}; retrying in {seconds:g} s")
        wait(seconds)


class Transient(Exception):
    """A failed request that may succeed later, in a type that the client's own retry loops do not catch."""

    def __init__(self, cause: Exception, retry_after: str):
        super().__init__(str(cause))
        self.cause, self.retry_after = cause, retry_after


def origin(url: str) -> tuple[str, str, int | None]:
    """(scheme, host, port): what must be the same for a token to be sent along."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _PORTS.get(parts.scheme)


def guard(clients: Iterable[Any], trusted: Callable[[str], bool]) -> None:
    """Make every HTTP session of the hub's clients drop the token on the way to an address that is not trusted.

    The HTTP adapter is the one place that all requests pass: uploads to a storage host, and redirects, for which the
    client itself would send its cookies along. The client's own retries end here, too: with an exception that its
    loops do not know.
    """
    import requests
    from urllib3.util import Retry

    for client in clients:
        sessions = [value for value in vars(client).values() if isinstance(value, requests.Session)]
        if not sessions:  # better no publish than a session that sends the token anywhere
            raise PublishError(f"{type(client).__name__} of this modelscope-hub is unknown: install the tested version")
        for session in sessions:
            for adapter in session.adapters.values():
                adapter.max_retries = Retry(0, read=False)
                adapter.send = _guarded(adapter.send, trusted)


def _guarded(send: Callable, trusted: Callable[[str], bool]) -> Callable:
    import requests
    from modelscope_hub.errors import HubError, raise_for_status

    def send_guarded(request: Any, *arguments: Any, **options: Any) -> Any:
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

    return send_guarded
