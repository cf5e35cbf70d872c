"""What a check is and how it can go."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from ztunnel.cli.checks.facts import Facts

MOST_DETAILS = 10
PODS, CERTIFICATES = "pods", "certificates"

_NUMBER = re.compile(r"\d+")


class Result(Enum):
    """How a check went."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass
class Outcome:
    """`details` say what is wrong with what, `remedy` what to do."""

    result: Result = Result.OK
    details: list[str] = field(default_factory=list)
    remedy: str = ""


@dataclass(frozen=True)
class Check:
    """One named check."""

    category: str
    name: str
    judge: Callable[[Facts], Outcome]
    pre: bool = False

    @property
    def moves(self) -> bool:
        """Whether a look may find it wrong although all goes its way: a pod on its way into the mesh."""
        return self.category in (PODS, CERTIFICATES)


def ok() -> Outcome:
    """All is well."""
    return Outcome()


def skipped(why: str) -> Outcome:
    """What the check needs is not known."""
    return Outcome(Result.SKIPPED, [why])


def wrong_if(details: Iterable[str], remedy: str, result: Result = Result.FAILED) -> Outcome:
    """The outcome of a check that found these things wrong; OK if there are none."""
    wrong = list(details)
    if not wrong:
        return ok()
    if len(wrong) > MOST_DETAILS:
        wrong[MOST_DETAILS:] = [f"and {len(wrong) - MOST_DETAILS} more"]
    return Outcome(result, wrong, remedy)


Results = Sequence[tuple[Check, Outcome]]


def lasting(before: Results, now: Results) -> list[tuple[Check, Outcome]]:
    """The later of two looks, shortly one after the other; of what moves by itself what both find is wrong.

    Of details the later ones, without those that the earlier look had not, if it had any of them. Numbers may differ
    (how long ago something was). What only one of the looks could judge is as that one found it.
    """
    return [
        (check, _lasting(old, new) if check.moves else new)
        for (_, old), (check, new) in zip(before, now, strict=True)
    ]


def _lasting(before: Outcome, now: Outcome) -> Outcome:
    if Result.OK in (before.result, now.result):
        return ok()
    if Result.SKIPPED in (before.result, now.result):
        return before if now.result is Result.SKIPPED else now
    known = {_NUMBER.sub("", line) for line in before.details}
    same = [line for line in now.details if _NUMBER.sub("", line) in known]
    return Outcome(now.result, same or now.details, now.remedy)
