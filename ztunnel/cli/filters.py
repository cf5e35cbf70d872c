"""The options with which verbs choose connections, and the filter that they make."""

from typing import TYPE_CHECKING, Any

import click

from ztunnel.cli.options import Decorator

if TYPE_CHECKING:
    from ztunnel.debug.filters import Filter
    from ztunnel.store.models import Pod

NAMES = "POD, a Deployment, a Service, a SPIFFE id or an address; NS/NAME for one of a namespace"


def filter_options() -> Decorator:
    """--from (parameter `source`), --to (`destination`), --port, --direction, --errors."""

    def decorate(function: Any) -> Any:
        for option in (
            click.option("--errors", is_flag=True, help="Only connections that ended with an error."),
            click.option(
                "--direction", type=click.Choice(["inbound", "outbound"]), help="Only as this side sees it."
            ),
            click.option("--port", type=click.IntRange(1, 65535), help="Only to this port."),
            click.option("--to", "destination", metavar="NAME", help="Only to this: see --from."),
            click.option("--from", "source", metavar="NAME", help=f"Only from this: {NAMES}."),
        ):
            function = option(function)
        return function

    return decorate


def make_filter(
    pod: "Pod | None",
    namespace: str | None,
    source: str | None,
    destination: str | None,
    port: int | None,
    direction: str | None,
    errors: bool,
) -> "Filter":
    """The filter of these options."""
    from ztunnel.debug.filters import Filter

    return Filter(
        namespace=namespace or "",
        source=source or "",
        destination=destination or "",
        pod=f"{pod.namespace}/{pod.name}" if pod is not None else "",
        port=port or 0,
        direction=direction or "",
        errors=errors,
    )


def end_of(one: dict[str, Any], end: str) -> str:
    """One end of a connection (`src` or `dst`) for people: namespace/workload, and its address."""
    workload, namespace = one.get(f"{end}.workload", ""), one.get(f"{end}.namespace", "")
    name = f"{namespace}/{workload}" if workload and namespace else workload
    if not name:
        name = one.get(f"{end}.identity", "").partition("/ns/")[2].replace("/sa/", "/sa:")
    address = one.get(f"{end}.addr", "")
    return f"{name} ({address})" if name and address else name or address or "?"


def size(count: float) -> str:
    """Bytes for people: 512B, 1.5KiB, 20MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f}{unit}" if unit == "B" or count >= 10 else f"{count:.1f}{unit}"
        count /= 1024
    return f"{count:.1f}TiB"


def security(one: dict[str, Any]) -> str:
    """What carries a connection: mTLS or plaintext; "-" for one that failed before that was decided."""
    if one.get("connection_security_policy") == "mutual_tls":
        return "mTLS"
    return "-" if one.get("error") and not (one.get("bytes_sent") or one.get("bytes_recv")) else "plaintext"
