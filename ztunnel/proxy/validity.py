"""Tunnels whose certificates end or are revoked while they are open.

| | new streams | streams that are open |
|---|---|---|
| a certificate was renewed, or half of what its life was at the handshake is gone | in a new tunnel of ours | go on |
| nine tenths of it are gone | the peer of an inbound tunnel is told to open another (GOAWAY) | go on |
| a certificate of the handshake has ended | refused (401) | go on, as in Istio |
| a certificate, or one above it, is revoked | | cut |
"""

import time
from collections.abc import Sequence
from typing import Final

from cryptography import x509
from OpenSSL import crypto

from ztunnel.identity import crl
from ztunnel.proxy.context import Context
from ztunnel.proxy.errors import Revoked
from ztunnel.proxy.inbound import Inbounds
from ztunnel.proxy.tunnel import CLOSED, CLOSING, OPEN, Tunnel

SWEEP_INTERVAL: Final = 1.0  # seconds between looks for inbound tunnels that grow old
TURN: Final = 8  # chains that are verified again before the sockets get their turn: about 2 ms


class Validity:
    """Looks after one worker's tunnels."""

    def __init__(self, context: Context, inbounds: Inbounds) -> None:
        self.context = context
        self.inbounds = inbounds
        self._next_sweep = 0.0
        self._lists: Sequence[crl.List] = ()
        self._roots: dict[bytes, list[x509.Certificate]] = {}
        self._verdicts: dict[tuple[bytes, bytes], str] = {}
        self._queue: list[Tunnel] = []
        self._unfinished: list[
            Tunnel
        ] = []  # in their handshakes, with contexts that do not know the new lists

    def use(self, revocations: bytes) -> None:
        """Honour these lists (PEM), in handshakes that begin after this and for open tunnels. Raises CertificateError.

        Contexts that exist keep the lists they were made with: certificates have to be given anew.
        """
        lists = crl.parse(revocations)
        self.context.revocations = self._lists = lists
        self._roots.clear()
        self._verdicts.clear()
        self._unfinished.clear()
        self._queue = [
            one for pod in self.context.pods.values() for one in pod.tunnels if isinstance(one, Tunnel)
        ]
        if not lists:
            self._queue.clear()
        if self._queue:
            self.context.reactor.again(self._some)

    def sweep(self, now: float) -> None:
        """To be called often; `now` is the monotonic clock's, seconds."""
        if now < self._next_sweep:
            return
        self._next_sweep = now + SWEEP_INTERVAL
        wall = time.time()
        for tunnel in [one for one in self.inbounds.tunnels if one.drain_at <= wall]:
            self.context.reactor.guard(tunnel.drain)
        if self._unfinished:
            self._queue += self._unfinished
            self._unfinished = []
            self.context.reactor.again(self._some)

    def _some(self) -> None:
        turn, self._queue = self._queue[:TURN], self._queue[TURN:]
        for tunnel in turn:
            self.context.reactor.guard(self._look, tunnel)
        if self._queue:
            self.context.reactor.again(self._some)

    def _look(self, tunnel: Tunnel) -> None:
        if tunnel.state in (CLOSING, CLOSED):
            return
        if tunnel.state != OPEN:
            self._unfinished.append(tunnel)
            return
        chain = tunnel.engine.connection.get_verified_chain() or []
        identity = tunnel.pod.identity
        if not chain or not identity.roots_pem:
            return
        key = (chain[0].digest("sha256"), identity.roots_pem)
        revoked = self._verdicts.get(key)
        if revoked is None:
            revoked = self._verdicts[key] = self._judge(chain, identity.roots_pem)
        if revoked:
            tunnel.fail(
                Revoked(
                    f"{tunnel.peer_label()}: the peer's certificate was revoked ({revoked}) while the tunnel was open"
                )
            )

    def _judge(self, chain: Sequence[crypto.X509], roots_pem: bytes) -> str:
        roots = self._roots.get(roots_pem)
        if roots is None:
            roots = self._roots[roots_pem] = x509.load_pem_x509_certificates(roots_pem)
        return crl.revoked(chain, roots, self._lists)
