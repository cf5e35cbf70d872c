"""The control plane process: its parts put together, from the command line to the last goodbye."""

import os
import signal
from functools import partial
from pathlib import Path

import trio
import trio_asyncio

from ztunnel.admin.server import serve as serve_pages
from ztunnel.controlplane.authn import Authenticator, TokenDirectory
from ztunnel.controlplane.authority import AuthorityKeeper
from ztunnel.controlplane.options import Options, StartError, bind, check_directories
from ztunnel.controlplane.plane import Plane, log_loop_error, logger, stopped
from ztunnel.controlplane.stores import directory_store
from ztunnel.controlplane.tokens import ServiceAccountTokens
from ztunnel.identity.errors import AuthorityError


async def serve(options: Options, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
    """Run the control plane until SIGTERM or SIGINT; started, with its port, once it serves.

    Raises StartError for what the operator has to change.
    """
    if options.cluster is not None:
        # The cluster's side is loaded only where there is one.
        from ztunnel.controlplane.kube.serve import serve_cluster

        await serve_cluster(options, options.cluster, task_status=task_status)
        return
    check_directories(options)
    if options.store is None or options.ca_dir is None:
        raise StartError("neither --kubernetes nor --store and --ca-dir was given")
    listener = bind(options)
    store = directory_store(options.store)
    try:
        keeper = AuthorityKeeper(options.ca_dir, lifetimes=options.lifetimes, published=options.publish)
        plane = Plane(options.settings, store, keeper, _authenticator(options), host=options.host)
    except (AuthorityError, OSError) as error:
        raise StartError(f"--ca-dir {options.ca_dir}: {error}") from None
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio_asyncio.open_loop() as loop, trio.open_nursery() as nursery:
            loop.set_exception_handler(log_loop_error)
            await plane.read(nursery)
            if options.admin:
                await nursery.start(partial(serve_pages, options.admin, plane.pages(), loopback_only=True))
            nursery.start_soon(keeper.run, plane.in_use)
            port = await plane.listen(listener)
            if options.port_file is not None:
                write_whole(options.port_file, f"{port}\n")
            task_status.started(port)
            await stopped(signals)
            await plane.end()
            nursery.cancel_scope.cancel()
    logger.info("stopped")


def _authenticator(options: Options) -> Authenticator:
    if options.token_keys is not None:
        return ServiceAccountTokens(options.token_keys, options.token_issuer)
    if options.tokens is not None:
        return TokenDirectory(options.tokens)
    raise StartError("neither --tokens nor --token-keys was given")


def write_whole(path: Path, text: str) -> None:
    """Write a file that readers see whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
