"""What `Session.evaluate` gives: loss, replies and right fields on the held-out rows. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """One held-out prompt, the reply it should have, the reply it got, and how many of the fields are right."""

    prompt: str
    expected: str
    reply: str
    fields_right: int
    fields: int


@dataclass(frozen=True)
class Evaluation:
    """`loss`: mean over the labelled tokens of the held-out rows, in nats."""

    loss: float
    answers: tuple[Answer, ...]

    @property
    def fields_right(self) -> int:
        return sum(answer.fields_right for answer in self.answers)

    @property
    def fields(self) -> int:
        return sum(answer.fields for answer in self.answers)

    def __str__(self) -> str:
        share = self.fields_right / self.fields if self.fields else math.nan
        return (
            f"held-out loss {self.loss:.3f} on {len(self.answers)} rows; "
            f"{self.fields_right} of {self.fields} fields right ({share:.0%})"
        )
