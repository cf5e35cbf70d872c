"""`ambient exec`: run a program inside a pod."""

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.errors import UserError
from ztunnel.cli.options import container_option, target_namespace_option, target_options
from ztunnel.cli.target import Which


@click.command(
    "exec",
    cls=Examples,
    short_help="Run a program inside a pod.",
    context_settings={"ignore_unknown_options": False},
    examples=(
        "ambient exec deploy/productpage -- curl -s http://reviews:9080/",
        "ambient exec web -n shop -- ip addr",
        "ambient exec node/node-1 -- ip neigh    # in the node's own network namespace",
    ),
)
@click.argument("target", metavar="POD|deploy/NAME|node/NAME")
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- PROGRAM [ARG...]")
@target_namespace_option()
@container_option()
@target_options()
def command(
    target: str, argv: tuple[str, ...], namespace: str | None, container: str | None, which: Which
) -> int:
    """Run a program in the network namespace of a pod, with this terminal as its own.

    POD may be the beginning of a pod's name where only one begins so. The exit code is the program's. In a cluster
    this is `kubectl exec`, which is run for it.
    """
    from ztunnel.cli.session import EmbeddedMesh, container_of
    from ztunnel.cli.target import Embedded

    where = which.target()
    if not isinstance(where, Embedded):
        from ztunnel.cli.kube.kubectl import execute

        return execute(where, namespace, target, container, argv)
    mesh = EmbeddedMesh.find(where.state)
    kind, slash, name = target.partition("/")
    try:
        if slash and kind in ("node", "nodes", "no"):
            return mesh.client.exec_on_node(name, list(argv))
        pod = mesh.pod(namespace or mesh.default_namespace, target)
        return mesh.client.exec(pod.namespace, pod.name, list(argv), container_of(pod, container))
    except BrokenPipeError as error:  # of the control socket; one of standard output is not ours to see
        raise UserError("the mesh broke off the connection", "see: ambient status") from error
