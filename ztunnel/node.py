"""The command line of the node daemon, `python -m ztunnel`: its help, and the order in which it starts."""

from ztunnel import __version__
from ztunnel.config import Settings
from ztunnel.proxy.limits import raise_open_files
from ztunnel.proxy.prefork import fork_workers
from ztunnel.telemetry.log import Logger, fatal
from ztunnel.telemetry.sink import keep_standard_descriptors

USAGE = """usage: python -m ztunnel [--help | --version]

The node daemon of an ambient mesh. It is configured by its environment:
  XDS_ADDRESS, CA_ADDRESS     https://HOST:PORT of the control plane and of the certificate authority
  XDS_ROOT_CA, CA_ROOT_CA     PEM files with the roots that their certificates chain to
  AUTH_TOKEN                  file with the bearer token for both
  INPOD_UDS                   the node agent's socket (/var/run/ztunnel/ztunnel.sock)
  NODE_NAME, CLUSTER_ID, NETWORK, TRUST_DOMAIN, POD_NAME, POD_NAMESPACE, INSTANCE_IP
  ZTUNNEL_WORKER_THREADS      worker processes (2)
  ADMIN_ADDR, READINESS_ADDR  127.0.0.1:15000 and 0.0.0.0:15021; unix:PATH is possible
  METRICS_ADDR                of the metrics for Prometheus (0.0.0.0:15020); STATS_ADDR is another name for it
  POD_CONNECTION_LIMIT        connections that one pod may have, a worker (3/4 of its open files)
  POD_HANDSHAKE_LIMIT         peers of one pod that have not finished TLS, a worker (1024)
  MEMORY_LIMIT                of the container, if it has one
  BUFFER_LIMIT                bytes that may wait for slow readers, a worker (256Mi, or less to fit MEMORY_LIMIT)
  TUNNEL_CONGESTION_CONTROL   of the tunnels' TCP connections (the host's)
  ZTUNNEL_SPIN_MICROSECONDS   how long a worker asks again before it sleeps (0)
  SECRET_TTL                  how long certificates are to live (what the authority gives: 24h)
  CRL_PATH                    file with the certificate revocation list to honour (none)
  TERMINATION_GRACE_PERIOD    how long connections may go on after SIGTERM (30s)
  TERMINATION_AWAITS_SUCCESSOR  true: accept new ones, too, until another proxy listens or that time is over (false)
  LOG_LEVEL (info), LOG_FORMAT (text or json)

Example:
  XDS_ADDRESS=https://127.0.0.1:15012 XDS_ROOT_CA=root-cert.pem AUTH_TOKEN=token python -m ztunnel
"""


def main(arguments: list[str]) -> int:
    """Run; returns the exit code: 0 after an orderly end, 2 for settings that cannot be used."""
    if arguments in (["--help"], ["-h"]):
        print(USAGE, end="")
        return 0
    if arguments == ["--version"]:
        print(f"ztunnel {__version__}")
        return 0
    if arguments:
        return fatal(f"unknown argument {arguments[0]!r}", "see python -m ztunnel --help")
    keep_standard_descriptors()
    raise_open_files()
    try:
        logger = Logger.from_environment()
        settings = Settings.from_environment()
    except ValueError as error:  # SettingError, and what the logger says of its settings
        return fatal(str(error))
    logger.never_wait()
    forked = fork_workers(settings.workers, logger)
    # Only now: what a worker does not need is not to be in the workers.
    from ztunnel import daemon

    return daemon.run(settings, logger, forked)
