"""The fields of a request's body, taken one by one; whatever is left at the end is unknown and refused."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from modelscope_dolly.errors import is_whole, shown, unknown_name
from modelscope_dolly.server.api_errors import ApiError, wrong


class Fields:
    """A JSON object. A field that is null counts as absent, as in the OpenAI API."""

    def __init__(self, body: Mapping[str, Any]):
        self._left = {name: value for name, value in body.items() if value is not None}
        self._known: set[str] = set()

    def any(self, name: str, default: Any = None) -> Any:
        self._known.add(name)
        return self._left.pop(name, default)

    def text(self, name: str, default: str | None = None) -> Any:
        value = self.any(name, default)
        return self._checked(name, value, value is default or isinstance(value, str), "a string")

    def flag(self, name: str) -> bool:
        value = self.any(name, False)
        return self._checked(name, value, isinstance(value, bool), "true or false")

    def whole(self, name: str, default: int | None, low: int, high: int) -> Any:
        value = self.any(name, default)
        holds = value is default or is_whole(value, low, high)
        return self._checked(name, value, holds, f"a whole number from {low} to {high}")

    def real(self, name: str, default: float | None, low: float, high: float) -> Any:
        value = self.any(name, default)
        number = isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= value <= high
        return self._checked(name, value, value is default or number, f"a number from {low:g} to {high:g}")

    def object(self, name: str) -> Mapping[str, Any]:
        value = self.any(name, {})
        return self._checked(name, value, isinstance(value, Mapping), "an object")

    def ignore(self, names: Iterable[str]) -> None:
        """Fields that change nothing here."""
        for name in names:
            self.any(name)

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Fields that ask for what dolly cannot do; empty and false ones ask for nothing."""
        for name, reason in reasons.items():
            if self.any(name):
                raise wrong(name, f"{name} is not supported: {reason}", "unsupported")

    def end(self) -> None:
        """Raises ApiError for a field that nobody has taken."""
        for name in self._left:
            raise wrong(name[:100], unknown_name("field", name, self._known), "unknown_field")

    def _checked(self, name: str, value: Any, holds: bool, allowed: str) -> Any:
        if not holds:
            raise wrong(name, f"{name} is {shown(value, 60)}, it must be {allowed}")
        return value


def required(name: str, value: Any) -> Any:
    """A field without a default. Raises ApiError where it is absent."""
    if value is None:
        raise wrong(name, f"{name} is missing", "missing_field")
    return value


def model_named(fields: Fields, name: str) -> None:
    """Raises ApiError: 404 where the body names another model than the one that is served; it may name none."""
    asked = fields.text("model")
    if asked is not None and asked != name:
        raise ApiError(404, f"there is no model {shown(asked, 100)}; this is {name!r}", "model", "model_not_found")
