"""What the many errors of the hub's client mean, in words, and whether trying again may help."""

from __future__ import annotations

import re

from modelscope_dolly.errors import one_line


def explain(error: Exception, model_id: str, user: str, elsewhere: str) -> tuple[str, bool | str]:
    """(what happened, True if trying again may help, else what would).

    Args:
        error: of the client, or of what it is made of.
        model_id: the repository.
        user: the name of the account.
        elsewhere: the storage host to which a file was sent without the token, if it was.
    """
    import requests
    from modelscope_hub import errors
    from urllib3.exceptions import HTTPError

    status, said = getattr(error, "status_code", None), one_line(getattr(error, "message", None) or error, 160)
    refused = status in (401, 403) or isinstance(error, errors.AuthenticationError)
    if isinstance(error, errors.QuotaExceededError) or status == 507 or re.search(r"quota|配额", said, re.IGNORECASE):
        return f"the quota of the account is used up ({said})", "free some space on the hub, or ask it for more"
    if refused and elsewhere:
        return (
            f"the storage host {elsewhere} refused a file that was sent without your token ({status})",
            f"if this host belongs to the hub, say --trust-storage-host {elsewhere}",
        )
    if status == 401 or isinstance(error, errors.AuthenticationError):
        return f"the hub does not accept the token (401: {said})", "make a new token on the hub, and `modelscope login`"
    if status == 403:
        return f"{user} has no right to do this to {model_id} (403: {said})", "ask its owner, or take another model_id"
    if status == 404:
        return f"the hub does not have it (404: {said})", "check model_id and endpoint"
    if isinstance(error, errors.AlreadyExistsError) and re.search(r"exist|already|taken", said, re.IGNORECASE):
        return f"the name is taken ({status}: {said})", "take another one"
    if status == 409:
        return f"somebody else wrote at the same time (409: {said})", True
    if status == 413:
        return f"too large for the hub (413: {said})", "save the model in smaller shards"
    if status == 429:
        return f"the hub asks for fewer requests (429: {said})", True
    if status == 400 and re.search(r"branch changed|could not update refs|retry|try again", said, re.IGNORECASE):
        return f"the hub was busy with the same branch (400: {said})", True
    if isinstance(error, errors.ServerError) or (status or 0) >= 500:
        return f"the hub is in trouble ({status or 'no answer'}: {said})", True
    if isinstance(error.__cause__, requests.exceptions.SSLError):
        return f"the hub's certificate is not accepted ({said})", "check the endpoint, the clock and the proxy"
    if isinstance(error, (ConnectionError, TimeoutError, requests.RequestException, HTTPError)):
        return f"the connection was lost ({said})", True
    if isinstance(error, errors.HubError):
        again = bool(error.retryable) or "repair what it names"
        return f"the hub refused ({status or type(error).__name__}: {said})", again
    if isinstance(error, OSError):
        return f"this machine could not do it ({said})", "repair what it names"
    return f"the hub gave an answer that makes no sense ({type(error).__name__}: {said})", True
