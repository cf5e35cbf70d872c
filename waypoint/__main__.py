"""`python -m waypoint`: one pod of a waypoint. Settings come from the environment (see waypoint/config.py)."""

import sys

from waypoint.config import WaypointSettings
from waypoint.worker import WaypointWorker
from ztunnel import __version__
from ztunnel.proxy.limits import raise_open_files
from ztunnel.proxy.prefork import fork_workers
from ztunnel.telemetry.log import Logger, fatal
from ztunnel.telemetry.sink import keep_standard_descriptors

USAGE = """usage: python -m waypoint [--help | --version]

A waypoint of an ambient mesh: the proxy that traffic to some services or workloads passes, with an identity of its
own. It is configured by its environment, which the controller of Gateways sets:
  WAYPOINT_NAME               name of the Gateway, and of its Service
  POD_NAME, POD_NAMESPACE, SERVICE_ACCOUNT, INSTANCE_IP, NODE_NAME, CLUSTER_ID, NETWORK, TRUST_DOMAIN
  XDS_ADDRESS, CA_ADDRESS     https://HOST:PORT of the control plane and of the certificate authority
  XDS_ROOT_CA, CA_ROOT_CA     PEM files with the roots that their certificates chain to
  AUTH_TOKEN                  file with the bearer token for both
  ROOT_NAMESPACE              where the policies of the whole mesh are (istio-system)
  ZTUNNEL_WORKER_THREADS      worker processes (2)
  MINIMUM_DRAIN_DURATION      how long new connections are taken after SIGTERM (5s), within
  TERMINATION_GRACE_PERIOD    how long open ones may go on (30s)
  ADMIN_ADDR, READINESS_ADDR, METRICS_ADDR, the limits, SECRET_TTL, CRL_PATH, LOG_LEVEL and LOG_FORMAT are those of
  `python -m ztunnel --help`

Example:
  WAYPOINT_NAME=waypoint POD_NAMESPACE=default XDS_ADDRESS=https://127.0.0.1:15012 python -m waypoint
"""


def main(arguments: list[str]) -> int:
    """Run; returns the exit code: 0 after an orderly end, 2 for settings that cannot be used."""
    if arguments in (["--help"], ["-h"]):
        print(USAGE, end="")
        return 0
    if arguments == ["--version"]:
        print(f"waypoint {__version__}")
        return 0
    if arguments:
        return fatal(f"unknown argument {arguments[0]!r}", "see python -m waypoint --help")
    keep_standard_descriptors()
    raise_open_files()
    try:
        logger = Logger.from_environment()
        settings = WaypointSettings.from_environment()
    except ValueError as error:  # SettingError, and what the logger says of its settings
        return fatal(str(error))
    logger.never_wait()
    forked = fork_workers(settings.common.workers, logger, WaypointWorker)
    # Only now: what a worker does not need is not to be in the workers.
    from waypoint import daemon

    return daemon.run(settings, logger, forked)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
