"""Durations as people write them: 24h, 1h30m, 500ms."""

import re

_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}


def parse(text: str) -> float:
    """Seconds of `24h`, `1h30m`, `500ms` or a plain number. Raises ValueError."""
    text = text.strip()
    position, seconds = 0, 0.0
    while position < len(text):
        match = _PART.match(text, position)
        if match is None:
            break
        seconds += float(match[1]) * _SECONDS[match[2]]
        position = match.end()
    if not text or position < len(text):
        raise ValueError(f"{text!r} is not a duration such as 24h, 1h30m or 500ms")
    return seconds


def told(seconds: float) -> str:
    """`seconds`, rounded to whole ones, as people write them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "m"), (rest, "s"))
    return "".join(f"{number}{unit}" for number, unit in parts if number) or "0s"
