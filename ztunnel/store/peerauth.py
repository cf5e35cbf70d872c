"""What a PeerAuthentication (security.istio.io) says: which workloads take plaintext, and on which ports.

Nothing is raised, and what is wrong never opens anything: one that is not `sound` is to be taken for STRICT on all
ports of its workloads, in its whole namespace if the selector is not understood, whatever others say.
"""

from typing import Any, Final, NamedTuple

from ztunnel.store import specs
from ztunnel.store.faults import Fault, Path
from ztunnel.store.models import PeerAuthentication
from ztunnel.store.specs import Choice, NotUnderstood, Reader

UNSET: Final = "UNSET"
STRICT: Final = "STRICT"
PERMISSIVE: Final = "PERMISSIVE"
DISABLE: Final = "DISABLE"

MODES: Final = Choice((UNSET, DISABLE, PERMISSIVE, STRICT))
SPEC_FIELDS: Final = ("selector", "mtls", "portLevelMtls")


class PeerPolicy(NamedTuple):
    """`mode` and those of `ports` are UNSET, STRICT or PERMISSIVE: a port that is UNSET is as the workload.

    DISABLE reads as PERMISSIVE: a client decides by what the destination is capable of, never by this.
    """

    selector: dict[str, str]
    mode: str
    ports: dict[int, str]
    sound: bool
    disables: bool
    faults: tuple[Fault, ...]


def read(obj: PeerAuthentication) -> PeerPolicy:
    """What the object says, and everything that is wrong with it."""
    reader = Reader("until then it is taken for STRICT")
    spec = reader.mapping(obj.spec, ("spec",), SPEC_FIELDS) or {}
    selector = reader.selector(spec["selector"], ("spec", "selector")) if "selector" in spec else {}
    modes = [_mode(reader, spec["mtls"], ("spec", "mtls"))] if "mtls" in spec else [UNSET]
    ports: dict[int, str] = {}
    if "portLevelMtls" in spec:
        _ports(reader, spec["portLevelMtls"], ports)
        if selector == {} and ports:
            message = "is only possible together with a selector"
            reader.error(("spec", "portLevelMtls"), message, "add spec.selector.matchLabels, or remove it")
    disables = DISABLE in (*modes, *ports.values())
    if disables:
        path: Path = ("spec", "mtls") if DISABLE in modes else ("spec", "portLevelMtls")
        message = "DISABLE is the same as PERMISSIVE in ambient mode: mutual TLS is still accepted, and used by peers"
        reader.warn(path, message, "write PERMISSIVE, or take the pods out of the mesh")
    if reader.failed:
        return PeerPolicy(selector or {}, STRICT, {}, False, disables, tuple(reader.faults))
    plain = {port: PERMISSIVE if mode == DISABLE else mode for port, mode in ports.items()}
    mode = PERMISSIVE if modes[0] == DISABLE else modes[0]
    return PeerPolicy(selector or {}, mode, plain, True, disables, tuple(reader.faults))


def _mode(reader: Reader, data: object, path: Path) -> str:
    fields = reader.mapping(data, path, ("mode",))
    if fields is None or "mode" not in fields:
        return UNSET
    return MODES.check(reader, fields["mode"], (*path, "mode")) or STRICT


def _ports(reader: Reader, data: Any, ports: dict[int, str]) -> None:
    path: Path = ("spec", "portLevelMtls")
    if not isinstance(data, dict):
        reader.error(path, f"expected a mapping, got {specs.show(data)}", "give 'PORT: {mode: MODE}' lines")
        return
    if not data:
        reader.error(path, "is empty", "list at least one port, or remove the field")
    for key, value in data.items():
        try:
            ports[specs.port(str(key))] = _mode(reader, value, (*path, key))
        except NotUnderstood as error:
            reader.error((*path, key), error.message, error.remedy)
