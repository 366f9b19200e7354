"""What the many errors of the hub's client mean, in words, and whether trying again may help."""

from __future__ import annotations

import re

from modelscope_dolly.errors import PublishError, one_line


class HubRequestError(PublishError):
    """A request that the hub or the network did not carry out.

    Attributes:
        retryable: trying again may help.
        not_found: the hub does not have what was asked for.
        retry_after: the Retry-After header of the hub's answer.
        exhausted: the request was repeated as often as it makes sense.
    """

    def __init__(self, message: str, retryable=False, not_found=False, retry_after="", exhausted=False):
        super().__init__(message)
        self.retryable, self.not_found = retryable, not_found
        self.retry_after, self.exhausted = retry_after, exhausted


def explain(error: Exception, model_id: str, user: str, storage_host: str) -> tuple[str, str]:
    """(what happened, what would help: "" where trying again may) for an error of the client or of what is below it.

    Args:
        error: what was raised.
        model_id: the repository.
        user: the name of the account.
        storage_host: the host to which a file was sent without the token, if it was.
    """
    import requests
    from modelscope_hub import errors
    from urllib3.exceptions import HTTPError

    status, said = getattr(error, "status_code", None), one_line(getattr(error, "message", None) or error, 160)
    over_quota = isinstance(error, errors.QuotaExceededError) or status == 507 or re.search(r"(?i)quota|配额", said)
    bad_token, forbidden = status == 401 or isinstance(error, errors.AuthenticationError), status == 403
    no_token = storage_host and (bad_token or forbidden)
    hint = f"if this host belongs to the hub, pass --trust-storage-host {storage_host}"
    name_taken = isinstance(error, errors.AlreadyExistsError) and re.search(r"(?i)exist|already|taken", said)
    branch_busy = status == 400 and re.search(r"(?i)branch changed|could not update refs|retry|try again", said)
    server_failed = isinstance(error, errors.ServerError) or (status or 0) >= 500
    bad_certificate = any(isinstance(cause, requests.exceptions.SSLError) for cause in (error, error.__cause__))
    no_connection = isinstance(error, (ConnectionError, TimeoutError, requests.RequestException, HTTPError))
    advice = "" if getattr(error, "retryable", False) else "fix what it names"
    kind = type(error).__name__
    rules = (
        (over_quota, f"the quota of the account is used up ({said})", "free some space on the hub, or ask it for more"),
        (no_token, f"the storage host {storage_host} refused a file that was sent without your token ({status})", hint),
        (bad_token, f"the hub does not accept the token (401: {said})", "make a new one there, and `modelscope login`"),
        (forbidden, f"{user} has no right to do this to {model_id} (403: {said})", "ask its owner, or use another id"),
        (status == 404, f"the hub does not have it (404: {said})", "check model_id and endpoint"),
        (name_taken, f"the name is taken ({status}: {said})", "choose another one"),
        (status == 409, f"somebody else wrote at the same time (409: {said})", ""),
        (status == 413, f"too large for the hub (413: {said})", "save the model in smaller shards"),
        (status == 429, f"the hub asks for fewer requests (429: {said})", ""),
        (branch_busy, f"the hub was busy with the same branch (400: {said})", ""),
        (server_failed, f"the hub failed ({status or 'no answer'}: {said})", ""),
        (bad_certificate, f"the hub's certificate is not accepted ({said})", "check endpoint, clock and proxy"),
        (no_connection, f"the connection was lost ({said})", ""),
        (isinstance(error, errors.HubError), f"the hub refused ({status or kind}: {said})", advice),
        (isinstance(error, OSError), f"this machine could not do it ({said})", "fix what it names"),
        (True, f"the hub's answer makes no sense ({kind}: {said})", ""),
    )
    return next((what, advice) for applies, what, advice in rules if applies)
