"""One thing wrong with an object, before anybody knows in which file it is."""

import re
from typing import Literal, NamedTuple

Path = tuple[str | int, ...]


class Fault(NamedTuple):
    """One thing wrong with an object: where, what, and what would be right."""

    path: Path
    message: str
    remedy: str
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return f"{path_text(self.path)}: {self.message}" if self.path else self.message


def path_text(path: Path) -> str:
    """A path as people write it: ("spec", "ports", 0, "port") is spec.ports[0].port."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif re.fullmatch(r"[A-Za-z0-9_]+", step):
            text += f".{step}" if text else step
        else:
            text += f"[{step}]"
    return text
