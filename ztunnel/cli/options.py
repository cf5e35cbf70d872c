"""Options that several verbs share, so that they are named and explained alike everywhere."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ztunnel.cli.target import Which

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def default_state() -> Path:
    """Where a mesh keeps its state unless told: /run/ambient for root, else the user's XDG state directory."""
    given = os.environ.get("AMBIENT_STATE")
    if given:
        return Path(given)
    if os.geteuid() == 0:
        return Path("/run/ambient")
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "ambient"


def _state(_ctx: click.Context, _param: click.Parameter, given: str | None) -> Path:
    return (Path(given) if given else default_state()).absolute()


def state_option() -> Decorator:
    """`--state DIR`: which mesh (parameter `state: Path`, absolute)."""
    return click.option(
        "--state",
        metavar="DIR",
        callback=_state,
        help="State directory of the mesh [AMBIENT_STATE; default: /run/ambient as root, "
        "else ~/.local/state/ambient].",
    )


def kube_options() -> Decorator:
    """`--kubeconfig FILE` and `--context NAME`: which cluster (parameters `kubeconfig: Path | None`, `context`).

    For verbs that are for clusters only: `target.Cluster(kubeconfig, context).api()`. An ApiError that a verb leaves
    alone is shown as the user's error.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        function = click.option(
            "--context", metavar="NAME", help="Context of the kubeconfig [default: its current one]."
        )(function)
        return click.option(
            "--kubeconfig",
            metavar="FILE",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Which cluster [default: KUBECONFIG, else ~/.kube/config].",
        )(function)

    return decorate


def target_options() -> Decorator:
    """`--state`, `--kubeconfig` and `--context`: which mesh, here or in a cluster (parameter `which: Which`)."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def with_which(
            *arguments: Any, state: str | None, kubeconfig: Path | None, context: str | None, **others: Any
        ) -> Any:
            given = Path(state).absolute() if state else None
            return function(*arguments, which=Which(given, kubeconfig, context), **others)

        return click.option(
            "--state",
            metavar="DIR",
            help="The mesh embedded on this machine with this state directory [AMBIENT_STATE; default: /run/ambient "
            "as root, else ~/.local/state/ambient]. Without --kubeconfig and --context, one that runs at the default "
            "place goes before the kubeconfig's cluster.",
        )(kube_options()(with_which))

    return decorate


def namespace_option(default: str | None = "default") -> Decorator:
    """`-n NS` (parameter `namespace: str`, or None where `default` is None and none was given)."""
    return click.option(
        "-n",
        "--namespace",
        metavar="NS",
        default=default,
        help="Namespace [default: default]." if default else "Namespace.",
    )


def target_namespace_option() -> Decorator:
    """`-n NS` (parameter `namespace: str | None`; None is the mesh's `default_namespace`)."""
    return click.option(
        "-n", "--namespace", metavar="NS", help="Namespace [default: default; in a cluster the context's]."
    )


def container_option() -> Decorator:
    """`-c CONTAINER` (parameter `container: str | None`)."""
    return click.option(
        "-c", "--container", metavar="NAME", help="Which container [default: the pod's first one]."
    )


def files_option(*, required: bool) -> Decorator:
    """`-f FILE`, several times (parameter `files: tuple[str, ...]`)."""
    return click.option(
        "-f",
        "--filename",
        "files",
        multiple=True,
        required=required,
        metavar="FILE|DIR|-",
        help="YAML or JSON file, directory of such files, or - for standard input; may be given several times.",
    )
