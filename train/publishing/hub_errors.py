"""What the many errors of the hub's client mean, in words, and whether trying again may help."""

from __future__ import annotations

import re
from typing import NamedTuple

from modelscope_dolly.errors import PublishError, one_line


class HubRequestError(PublishError):
    """A request that the hub or the network did not carry out.

    Attributes:
        summary: what happened.
        retryable: trying again may help.
        not_found: the hub does not have what was asked for.
        retry_after: what the hub's Retry-After header says, if it sent one.
        exhausted: the request was repeated as often as it makes sense.
    """

    def __init__(
        self, summary: str, advice: str = "", not_found: bool = False, retry_after: str = "", exhausted: bool = False
    ):
        """`advice`: what would help where trying again does not."""
        hint = f"Trying again does not help: {advice}" if advice else "Trying again may help: the same command resumes"
        super().__init__(f"{summary}. {hint}")
        self.summary, self.retryable, self.not_found = summary, not advice, not_found
        self.retry_after, self.exhausted = retry_after, exhausted


class Explanation(NamedTuple):
    """What happened, and what would help; no advice where trying again may help."""

    summary: str
    advice: str = ""


def explain(error: Exception, model_id: str, user: str, storage_host: str) -> Explanation:
    """An error of the hub's client, or of the libraries below it, in words.

    Args:
        error: what was raised.
        model_id: the repository.
        user: the name of the account.
        storage_host: the host to which a file was sent without the token, if it was.
    """
    import requests
    from modelscope_hub import errors
    from urllib3.exceptions import HTTPError

    status, message = getattr(error, "status_code", None), one_line(getattr(error, "message", None) or error, 160)
    unauthenticated = status == 401 or isinstance(error, errors.AuthenticationError)
    over_quota = isinstance(error, errors.QuotaExceededError) or status == 507
    if over_quota or re.search(r"quota|配额", message, re.IGNORECASE):
        return Explanation(
            f"the quota of the account is used up ({message})", "free some space on the hub, or ask it for more"
        )
    if storage_host and (unauthenticated or status == 403):
        return Explanation(
            f"the storage host {storage_host} refused a file that was sent without your token ({status})",
            f"if this host belongs to the hub, pass --trust-storage-host {storage_host}",
        )
    if unauthenticated:
        return Explanation(
            f"the hub does not accept the token (401: {message})", "make a new token on the hub, and `modelscope login`"
        )
    if status == 403:
        return Explanation(
            f"{user} has no right to do this to {model_id} (403: {message})", "ask its owner, or use another model_id"
        )
    if status == 404:
        return Explanation(f"the hub does not have it (404: {message})", "check model_id and endpoint")
    if isinstance(error, errors.AlreadyExistsError) and re.search(r"exist|already|taken", message, re.IGNORECASE):
        return Explanation(f"the name is taken ({status}: {message})", "choose another one")
    if status == 409:
        return Explanation(f"somebody else wrote at the same time (409: {message})")
    if status == 413:
        return Explanation(f"too large for the hub (413: {message})", "save the model in smaller shards")
    if status == 429:
        return Explanation(f"the hub asks for fewer requests (429: {message})")
    if status == 400 and re.search(r"branch changed|could not update refs|retry|try again", message, re.IGNORECASE):
        return Explanation(f"the hub was busy with the same branch (400: {message})")
    if isinstance(error, errors.ServerError) or (status or 0) >= 500:
        return Explanation(f"the hub failed ({status or 'no answer'}: {message})")
    if any(isinstance(cause, requests.exceptions.SSLError) for cause in (error, error.__cause__)):
        return Explanation(
            f"the hub's certificate is not accepted ({message})", "check the endpoint, the clock and the proxy"
        )
    if isinstance(error, (ConnectionError, TimeoutError, requests.RequestException, HTTPError)):
        return Explanation(f"the connection was lost ({message})")
    if isinstance(error, errors.HubError):
        advice = "" if error.retryable else "fix what it names"
        return Explanation(f"the hub refused ({status or type(error).__name__}: {message})", advice)
    if isinstance(error, OSError):
        return Explanation(f"this machine could not do it ({message})", "fix what it names")
    return Explanation(f"the hub's answer makes no sense ({type(error).__name__}: {message})")
