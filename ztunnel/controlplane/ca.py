"""The certificate service: who may have a certificate for which identity.

A node proxy gets those of the pods on its own node, which it names; anybody else that of its own service account.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import Any, Final

from cryptography import x509
from grpclib import GRPCError
from grpclib.const import Status

from ztunnel.controlplane.authn import NODE_PROXIES, Authenticator, Caller
from ztunnel.controlplane.xds import identify
from ztunnel.identity.ca import Authority
from ztunnel.identity.errors import AuthorityError, CsrError, SpiffeIdError
from ztunnel.identity.spiffe import SpiffeId
from ztunnel.telemetry.log import fields
from ztunnel.wire.citadel_grpc import IstioCertificateServiceBase
from ztunnel.wire.citadel_pb2 import IstioCertificateRequest, IstioCertificateResponse

logger = logging.getLogger("controlplane.ca")

IMPERSONATED_IDENTITY: Final = "ImpersonatedIdentity"

RunsOn = Callable[[str, str, str], Awaitable[bool]]
"""Whether a pod of (node, namespace, service account) exists."""

Issued = Callable[[Authority, str, str, float], None]
"""Told of a certificate: who signed it, its holder and identity, when it ends (Unix seconds).

The holder is a node's name, or `pod/NAMESPACE/NAME` where a pod asked for itself (`account/...`: not even a pod).
"""


class CertificateService(IstioCertificateServiceBase):
    """Checks who asks for what, then has the authority sign it."""

    def __init__(
        self,
        authenticator: Authenticator,
        authority: Callable[[], Authority],
        runs_on: RunsOn,
        trust_domain: str,
        issued: Issued | None = None,
        *,
        node_proxies: Collection[str] = NODE_PROXIES,
    ) -> None:
        """`authority` gives the one in force now; `runs_on` may take its time to find out.

        `issued` hears of each certificate that was signed; `node_proxies` are the service accounts that act for the
        pods of their node.
        """
        self._node_proxies = frozenset(node_proxies)
        self._issued = issued
        self.requests = 0
        self.signed = 0
        self.refusals: Counter[Status] = Counter()
        self._authenticator = authenticator
        self._authority = authority
        self._runs_on = runs_on
        self._trust_domain = trust_domain

    async def CreateCertificate(self, stream: Any) -> None:  # noqa: N802
        """Answer with the chain for the requested identity, leaf first and root last, or a status that says why not."""
        self.requests += 1
        try:
            caller = await identify(self._authenticator, stream)
        except GRPCError as error:
            self.refusals[error.status] += 1
            raise
        request: IstioCertificateRequest | None = await stream.recv_message()
        if request is None:
            raise GRPCError(Status.INVALID_ARGUMENT, "no request was sent")
        try:
            chain = await self._sign(caller, request)
        except GRPCError as error:
            self.refusals[error.status] += 1
            logger.warning(
                "not signed: %s", error.message, extra=fields(node=caller.node, account=caller.account)
            )
            raise
        self.signed += 1
        await stream.send_message(IstioCertificateResponse(cert_chain=chain))

    async def _sign(self, caller: Caller, request: IstioCertificateRequest) -> list[str]:
        requested = request.metadata.fields[IMPERSONATED_IDENTITY].string_value
        if caller.account in self._node_proxies:
            identity, holder = self._requested(requested), caller.node
            await self._authorize(caller, identity)
        else:
            identity, holder = self._own(caller, requested), _holder(caller)
        authority = self._authority()
        loop = asyncio.get_running_loop()
        try:
            # A signature takes a fraction of a millisecond, an RSA request's check can take many.
            sign = partial(authority.sign, request.csr.encode(), str(identity), request.validity_duration)
            chain = await loop.run_in_executor(None, sign)
        except (CsrError, SpiffeIdError) as error:
            raise GRPCError(Status.INVALID_ARGUMENT, str(error)) from None
        except AuthorityError as error:
            logger.error("the certificate authority cannot sign: %s", error)
            raise GRPCError(Status.UNAVAILABLE, str(error)) from None
        if self._issued is not None:
            not_after = x509.load_pem_x509_certificate(chain[0]).not_valid_after_utc.timestamp()
            self._issued(authority, holder, str(identity), not_after)
        logger.info("certificate signed", extra=fields(identity=str(identity), node=caller.node))
        return [pem.decode() for pem in chain]

    def _own(self, caller: Caller, requested: str) -> SpiffeId:
        identity = SpiffeId(self._trust_domain, caller.namespace, caller.service_account)
        if requested and requested != str(identity):
            raise GRPCError(
                Status.PERMISSION_DENIED,
                f"service account {caller.account} may have a certificate for {identity} only, not for"
                f" {requested[:200]!r}: only {', '.join(sorted(self._node_proxies))} acts for the pods of its node",
            )
        return identity

    def _requested(self, text: str) -> SpiffeId:
        if not text:
            raise GRPCError(
                Status.INVALID_ARGUMENT,
                f"metadata.{IMPERSONATED_IDENTITY} is missing: a node proxy names the pod identity that it asks for",
            )
        try:
            identity = SpiffeId.parse(text)
        except SpiffeIdError as error:
            raise GRPCError(Status.INVALID_ARGUMENT, f"metadata.{IMPERSONATED_IDENTITY}: {error}") from None
        if identity.trust_domain != self._trust_domain:
            raise GRPCError(
                Status.PERMISSION_DENIED,
                f"{identity} is of trust domain {identity.trust_domain}, this authority signs for"
                f" {self._trust_domain} only",
            )
        return identity

    async def _authorize(self, caller: Caller, identity: SpiffeId) -> None:
        if not await self._runs_on(caller.node, identity.namespace, identity.service_account):
            raise GRPCError(
                Status.PERMISSION_DENIED,
                f"no pod of service account {identity.namespace}/{identity.service_account} runs on node"
                f" {caller.node}, so its proxy may not have a certificate for {identity}",
            )


def _holder(caller: Caller) -> str:
    return f"pod/{caller.namespace}/{caller.pod}" if caller.pod else f"account/{caller.account}"
