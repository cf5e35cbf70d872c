"""What the resolver finds wrong with objects that are correct one by one but do not fit together."""

from typing import Literal, NamedTuple

from ztunnel.store.models import Key


class Finding(NamedTuple):
    """One thing wrong with the user's object `key`; where its file is, whoever reports it knows."""

    key: Key
    message: str
    remedy: str
    severity: Literal["error", "warning"] = "error"
