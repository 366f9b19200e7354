"""What may come next in an answer that has to keep to a form. What the form is, the engine is not told."""

from __future__ import annotations

from typing import Protocol

import torch


class Constraint(Protocol):
    """The form of one answer, and how much of it is there; for instance structured.LLGuidanceConstraint."""

    def allowed(self) -> torch.Tensor:
        """bool [V], on the CPU: ids that may come next. At least one; those that end the answer where it is complete.

        Raises:
            SettingError: the form has become too complex to follow.
        """

    def advance(self, token: int) -> None:
        """`token` is the next one of the answer."""

    def copy(self) -> Constraint:
        """Another one in the same state."""
