"""The certificate authority that the mesh of a cluster made for itself: replaced, with the user's own rights."""

from typing import TYPE_CHECKING

from ztunnel.cli.errors import UserError
from ztunnel.cli.kube.mesh import SYSTEM

if TYPE_CHECKING:
    from ztunnel.cli.target import Cluster

_FILES = ("ca-cert.pem", "ca-key.pem", "root-cert.pem", "cert-chain.pem")


def renew_authority(target: "Cluster", now: float) -> None:
    """Put a new authority, made here and kept nowhere else, into its Secret; `now` in Unix seconds.

    Raises UserError where the authority is an operator's, ApiError.
    """
    from ztunnel.controlplane.kube.ca_secrets import OPERATORS, OWN, made_own
    from ztunnel.store.kube.errors import ApiError

    api = target.api()
    if api.get("v1", "Secret", SYSTEM, OPERATORS) is not None:
        files = " ".join(f"--from-file={name}" for name in _FILES)
        raise UserError(
            f"Secret {SYSTEM}/{OPERATORS} holds your own authority, whose successor is not made here",
            f"put its successor there: kubectl create secret generic {OPERATORS} -n {SYSTEM} {files} --dry-run=client"
            " -o yaml | kubectl apply -f -",
        )
    old = api.get("v1", "Secret", SYSTEM, OWN)
    if old is None:
        raise UserError(
            f"Secret {SYSTEM}/{OWN} is not there: there is no authority to replace",
            f"is the mesh installed? kubectl get deployments -n {SYSTEM}; a control plane that runs with another"
            " Secret's authority goes on with it",
        )
    # The version that was read: of two who do this at once, one is told so. What else is in it stays.
    new = {**old, "data": {**(old.get("data") or {}), **made_own(SYSTEM, now)["data"]}}
    try:
        api.request("PUT", api.path("v1", "Secret", SYSTEM, OWN), body=new)
    except ApiError as error:
        if not error.conflict:
            raise
        raise UserError(
            f"Secret {SYSTEM}/{OWN} was changed by somebody else just now",
            "see what it is with: ambient ca status",
        ) from None
