"""The node proxies' bearer tokens: what kubelet and API server do in a cluster. Signed, bound to a node, renewed."""

import time
from pathlib import Path
from typing import Any, Final

import trio

from ztunnel.identity import jwt, keys
from ztunnel.identity.ca_files import CERT_MODE, KEY_MODE, write

ISSUER: Final = "https://kubernetes.default.svc.cluster.local"
AUDIENCE: Final = "istio-ca"
LIFE: Final = 12 * 3600  # seconds, as in Istio's manifests
RENEWAL: Final = 3600.0  # seconds; well before the end, as kubelet does it
KEY_SET: Final = "token-keys.json"


class NodeTokens:
    """Makes and renews a token file for every node; the key lives in this process alone."""

    def __init__(self, directory: Path, key_set: Path, nodes: list[str]) -> None:
        """`directory` gets a file a node, named as it; `key_set` is what verifies them."""
        self._directory = directory
        self._key_set = key_set
        self._nodes = nodes
        self._key = keys.generate()

    def write(self) -> None:
        """Write the key set and all tokens. Raises OSError."""
        write(self._key_set, jwt.key_set(self._key.public_key()), CERT_MODE)
        self.renew()

    def renew(self) -> None:
        """Write all tokens anew. Raises OSError."""
        for node in self._nodes:
            write(self._directory / node, jwt.sign(self._claims(node), self._key).encode(), KEY_MODE)

    async def run(self) -> None:
        """Renew until cancelled."""
        while True:
            await trio.sleep(RENEWAL)
            await trio.to_thread.run_sync(self.renew)

    def _claims(self, node: str) -> dict[str, Any]:
        now = int(time.time())
        return {
            "iss": ISSUER,
            "aud": [AUDIENCE],
            "sub": "system:serviceaccount:istio-system:ztunnel",
            "iat": now,
            "nbf": now,
            "exp": now + LIFE,
            "kubernetes.io": {
                "namespace": "istio-system",
                "node": {"name": node},
                "pod": {"name": f"ztunnel-{node}"},
                "serviceaccount": {"name": "ztunnel"},
            },
        }
