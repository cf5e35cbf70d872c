"""The life of a control process: made, run by trio, and its workers ended with it."""

from collections.abc import Callable
from typing import Protocol

import trio

from ztunnel.admin.server import AddressError
from ztunnel.proxy.prefork import Forked, end_workers
from ztunnel.telemetry.log import Logger, adopt_standard_logging, fatal, leaves


class Daemon(Protocol):
    """What a control process does until it is told to end."""

    async def run(self) -> None:
        """Until it ends."""
        ...


def live(make: Callable[[], Daemon], logger: Logger, forked: list[Forked]) -> int:
    """Be the daemon that `make` returns; the exit code: 0 after an orderly end, 2 for settings that cannot be used.

    `forked` are its first workers, of which none is left then.
    """
    adopt_standard_logging(logger)
    try:
        try:
            daemon = make()
        except ValueError as error:  # ConfigError
            return fatal(str(error))
        trio.run(daemon.run)
    except BaseExceptionGroup as group:
        ours, others = group.split(AddressError)
        if ours is None or others is not None:
            raise
        return fatal("; ".join(str(error) for error in leaves(ours)))
    finally:
        end_workers(forked)
    return 0
