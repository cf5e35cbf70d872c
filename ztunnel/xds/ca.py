"""Asks the certificate authority to sign: one call per certificate, in the name of a pod of this node."""

from typing import Final

import trio
import trio_asyncio

from ztunnel.wire.citadel_grpc import IstioCertificateServiceStub
from ztunnel.wire.citadel_pb2 import IstioCertificateRequest, IstioCertificateResponse
from ztunnel.xds.channel import CallError, ControlPlane, asyncio_loop, call_errors, open_channel

# Seconds for a whole call. Signing takes milliseconds; the caller retries.
CALL_TIMEOUT: Final = 10.0


class CaError(Exception):
    """The CA could not be asked or refused; the message is for operators."""


class CaClient:
    """Client of istio.v1.auth.IstioCertificateService. Safe for several tasks at once."""

    def __init__(self, server: ControlPlane, *, impersonate: bool = True) -> None:
        """Without `impersonate` certificates are asked for in the name of the token's own service account."""
        self._server = server
        self._impersonate = impersonate

    async def sign(self, csr_pem: bytes, identity: str, ttl: int) -> list[bytes]:
        """Have `identity` (a SPIFFE id) certified for the key of a CSR, for `ttl` seconds at most.

        Returns PEM certificates, leaf first, root last. Raises CaError.
        """
        request = IstioCertificateRequest(csr=csr_pem.decode("ascii"), validity_duration=ttl)
        if self._impersonate:
            request.metadata["ImpersonatedIdentity"] = identity
        try:
            response = await self._call(request)
        except CallError as error:
            raise CaError(f"certificate for {identity}: {error}") from error
        chain = [certificate.encode() for certificate in response.cert_chain]
        if len(chain) < 2 or not all(b"-----BEGIN CERTIFICATE-----" in certificate for certificate in chain):
            raise CaError(
                f"certificate for {identity}: CA {self._server.address} answered {len(chain)} entries: expected PEM, "
                "leaf first, root last"
            )
        return chain

    async def _call(self, request: IstioCertificateRequest) -> IstioCertificateResponse:
        # A channel per call: certificates are asked for once in hours, and the roots may have changed since.
        with call_errors(self._server):
            async with asyncio_loop(), open_channel(self._server) as channel:
                create = IstioCertificateServiceStub(channel).CreateCertificate
                metadata = self._server.metadata()
                with trio.fail_after(CALL_TIMEOUT):
                    answer: IstioCertificateResponse = await trio_asyncio.aio_as_trio(create)(
                        request, metadata=metadata
                    )
                return answer
