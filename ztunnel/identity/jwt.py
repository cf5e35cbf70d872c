"""Signed tokens (JWS compact serialisation, RFC 7515 and 7519) and key sets (RFC 7517), as Kubernetes makes them.

Two algorithms: ES256 and RS256. A token's own header chooses only among the keys of the set, and its algorithm has to
be that of the key; nothing of a token is believed before its signature is verified. No message repeats a token.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

from ztunnel.identity.errors import IdentityError

Claims = dict[str, Any]
KeySet = Mapping[str, "ec.EllipticCurvePublicKey | rsa.RSAPublicKey"]
"""Public keys by their ids."""

_COORDINATE: Final = 32  # bytes of a P-256 number


class TokenError(IdentityError, ValueError):
    """A token that is not a valid one, or a key set that cannot be read; the message says why."""


def sign(claims: Claims, key: ec.EllipticCurvePrivateKey) -> str:
    """A token with these claims, signed with a P-256 key (ES256)."""
    header = {"alg": "ES256", "typ": "JWT", "kid": key_id(key.public_key())}
    signed = f"{_encode(json.dumps(header).encode())}.{_encode(json.dumps(claims).encode())}"
    first, second = utils.decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{signed}.{_encode(first.to_bytes(_COORDINATE) + second.to_bytes(_COORDINATE))}"


def verify(token: str, keys: KeySet) -> Claims:
    """The claims of a token that one of the keys signed; their meaning is not looked at. Raises TokenError."""
    parts = token.split(".")
    if len(parts) != 3:
        raise TokenError("it is not a signed token (three parts with dots between them)")
    try:
        header = json.loads(_decode(parts[0]))
        signature = _decode(parts[2])
        algorithm, name = header["alg"], header.get("kid")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise TokenError("it is not a signed token (its header cannot be read)") from None
    key = keys.get(name) if isinstance(name, str) else None
    if key is None:
        raise TokenError("it is not signed with a key of this cluster's (another cluster's token?)")
    data = f"{parts[0]}.{parts[1]}".encode()
    try:
        if algorithm == "ES256" and isinstance(key, ec.EllipticCurvePublicKey):
            if len(signature) != 2 * _COORDINATE:
                raise InvalidSignature
            numbers = (int.from_bytes(signature[:_COORDINATE]), int.from_bytes(signature[_COORDINATE:]))
            key.verify(utils.encode_dss_signature(*numbers), data, ec.ECDSA(hashes.SHA256()))
        elif algorithm == "RS256" and isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
        else:
            raise TokenError(f"its algorithm {str(algorithm)[:20]!r} is not that of the cluster's key")
    except InvalidSignature:
        raise TokenError("its signature does not verify") from None
    try:
        claims = json.loads(_decode(parts[1]))
    except ValueError:
        claims = None
    if not isinstance(claims, dict):
        raise TokenError("its claims are not a JSON object")
    return claims


def key_set(*keys: ec.EllipticCurvePublicKey) -> bytes:
    """A key set (JSON) of P-256 keys."""
    return json.dumps({"keys": [_jwk(key) for key in keys]}).encode()


def parse_key_set(data: bytes) -> KeySet:
    """The keys of a key set that can verify tokens; others are passed over. Raises TokenError."""
    found: dict[str, ec.EllipticCurvePublicKey | rsa.RSAPublicKey] = {}
    try:
        for one in json.loads(data)["keys"]:
            if one["kty"] == "EC" and one["crv"] == "P-256":
                x, y = (int.from_bytes(_decode(one[name])) for name in ("x", "y"))
                found[one["kid"]] = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
            elif one["kty"] == "RSA":
                modulus, exponent = (int.from_bytes(_decode(one[name])) for name in ("n", "e"))
                found[one["kid"]] = rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TokenError(f"not a JSON Web Key Set: {type(error).__name__}: {error}") from None
    if not found:
        raise TokenError("no key in it can verify tokens: EC P-256 or RSA is needed")
    return found


def key_id(key: ec.EllipticCurvePublicKey) -> str:
    """An id for a key: it is made of the key, so another key has another."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return _encode(hashlib.sha256(der).digest())


def _jwk(key: ec.EllipticCurvePublicKey) -> dict[str, str]:
    numbers = key.public_numbers()
    return {
        "kty": "EC",
        "crv": "P-256",
        "use": "sig",
        "alg": "ES256",
        "kid": key_id(key),
        "x": _encode(numbers.x.to_bytes(_COORDINATE)),
        "y": _encode(numbers.y.to_bytes(_COORDINATE)),
    }


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
