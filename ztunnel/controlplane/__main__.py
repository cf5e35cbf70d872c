"""`python -m ztunnel.controlplane`: exit status 0 after SIGTERM, 2 for what the operator has to change."""

import sys
from collections.abc import Sequence

import trio

from ztunnel.admin.server import AddressError
from ztunnel.controlplane.options import StartError, parse
from ztunnel.controlplane.server import serve
from ztunnel.telemetry.log import Logger, adopt_standard_logging, leaves


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the control plane; returns the exit status."""
    options = parse(arguments)
    try:
        adopt_standard_logging(Logger.from_environment())
    except ValueError as error:
        return _refuse(error)
    try:
        trio.run(serve, options)
    except StartError as error:
        return _refuse(error)
    except BaseExceptionGroup as group:
        ours, others = group.split((AddressError, StartError))
        if ours is None or others is not None:
            raise
        first = next(leaves(ours))
        return _refuse(first if isinstance(first, StartError) else StartError(f"--admin {first}"))
    return 0


def _refuse(error: Exception) -> int:
    print(f"ztunnel.controlplane: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
