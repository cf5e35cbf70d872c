"""The environment and command line of a container: fields of the pod, and $(NAME) as Kubernetes expands it. Pure."""

import re
from collections.abc import Mapping

from ztunnel.store.models import Container, EnvVarSource, Pod

# What a program needs of the machine that it runs on, there being no image to say it.
INHERITED = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "TERM")
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_REFERENCE = re.compile(r"\$(\$|\(([^)]*)\))")
_SUBSCRIPT = re.compile(r"metadata\.(labels|annotations)\['([^']*)'\]")


class VariableError(Exception):
    """A variable that cannot be had; the message names the container and the variable."""


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Replace $(NAME) by the variable's value; $$ is a dollar, and unknown names stay as they are written."""

    def value(match: re.Match[str]) -> str:
        if match[1] == "$":
            return "$"
        return variables.get(match[2], match[0])

    return _REFERENCE.sub(value, text)


def environment(pod: Pod, container: Container, machine: Mapping[str, str]) -> dict[str, str]:
    """All variables of a container: the machine's basics, the pod's name and place, then the container's own.

    Raises VariableError.
    """
    variables = {name: machine[name] for name in INHERITED if name in machine}
    variables.setdefault("PATH", DEFAULT_PATH)
    variables |= {
        "HOSTNAME": pod.spec.hostname or pod.name,
        "POD_NAME": pod.name,
        "POD_NAMESPACE": pod.namespace,
        "POD_IP": pod.addresses[0] if pod.addresses else "",
        "NODE_NAME": pod.spec.node_name,
    }
    for variable in container.env:
        if variable.value_from is not None:
            variables[variable.name] = _field(pod, container, variable.name, variable.value_from)
        else:
            variables[variable.name] = expand(variable.value, variables)
    return variables


def command_line(container: Container, variables: Mapping[str, str]) -> list[str]:
    """`command` and `args` with their references expanded."""
    return [expand(word, variables) for word in [*container.command, *container.args]]


def _field(pod: Pod, container: Container, name: str, source: EnvVarSource) -> str:
    if source.field_ref is None:
        raise VariableError(
            f"container {container.name}: env {name}: only valueFrom.fieldRef is known here; write its value"
        )
    path = source.field_ref.field_path
    if match := _SUBSCRIPT.fullmatch(path):
        entries = pod.metadata.labels if match[1] == "labels" else pod.metadata.annotations
        return entries.get(match[2], "")
    fields = {
        "metadata.name": pod.name,
        "metadata.namespace": pod.namespace,
        "metadata.uid": pod.metadata.uid,
        "spec.nodeName": pod.spec.node_name,
        "spec.serviceAccountName": pod.service_account,
        "status.podIP": pod.addresses[0] if pod.addresses else "",
        "status.podIPs": ",".join(pod.addresses),
        "status.hostIP": pod.status.host_ip,
    }
    if path not in fields:
        raise VariableError(
            f"container {container.name}: env {name}: fieldPath {path} is unknown; known are "
            + ", ".join([*fields, "metadata.labels['KEY']", "metadata.annotations['KEY']"])
        )
    return fields[path]
