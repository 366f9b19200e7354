"""Errors as the OpenAI API words them: a status and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from typing import Any

from modelscope_dolly.errors import DollyError, HardwareError


class ApiError(Exception):
    """A request is answered with an error.

    Args:
        status: of HTTP.
        message: one sentence for the caller.
        param: the field of the body that is at fault.
        code: a name for programs, for instance "context_length_exceeded".
        retry_after: seconds after which the same request may succeed.
        close: end the connection, because the rest of the body has not been read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        close: bool = False,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.close = retry_after, close

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def about(self, param: str | None) -> ApiError:
        """The same, with the field at fault."""
        self.param = param
        return self

    def headers(self) -> dict[str, str]:
        headers = {"retry-after": str(self.retry_after)} if self.retry_after is not None else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.close:
            headers["connection"] = "close"
        return headers


class ClientGone(Exception):
    """Whoever asked has closed the connection, or reads too slowly: nobody is there to be answered."""


def wrong(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A mistake in the body of a request."""
    return ApiError(400, message, param, code)


def of_engine(error: DollyError, code: str | None = None) -> ApiError:
    """What the engine or the settings say: the caller's mistake, with a code of it, or the device's."""
    if isinstance(error, HardwareError):
        return ApiError(500, str(error), code="device_error")
    return wrong(None, str(error), code)


def to_json(value: Any) -> bytes:
    """JSON as UTF-8; half a surrogate pair, which has no UTF-8 form, as an escape."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")
