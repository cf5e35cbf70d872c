"""What is wrong with the user's objects, said so that it can be repaired: the object, the file, the remedy.

A problem never stops the rest: whoever finds one reports it and goes on.
"""

from typing import Literal

import msgspec


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that is wrong, for people: `str()` gives the sentence they read.

    `object` is such as "Service default/reviews" ("" where the file could not be read that far), `file` the path
    within the directory ("" where it concerns none), `line` counts from 1 (0: unknown). A "warning" is acted on
    as far as possible; an "error" means that the object, or this change of it, is not in force.
    """

    object: str
    file: str
    message: str
    remedy: str
    severity: Literal["error", "warning"] = "error"
    line: int = 0

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line and self.file else self.file
        head = f"{self.object} ({place})" if self.object and place else self.object or place
        sentence = f"{head}: {self.message}" if head else self.message
        return f"{sentence}; {self.remedy}" if self.remedy else sentence


class StoreError(Exception):
    """A request to the store that cannot be met; the message names the object and the remedy."""


class NotFound(StoreError, KeyError):
    """The object asked for does not exist."""

    def __str__(self) -> str:
        # KeyError would print the quoted representation.
        return str(self.args[0]) if self.args else ""


class Invalid(StoreError):
    """The object given is refused; `problems` says why, each with its remedy."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems
