"""The same server over TLS, with requests that have bodies: what a webhook needs."""

import ssl
from functools import partial
from pathlib import Path

import pytest
import trio

from ztunnel.admin.server import Answer, Query, serve
from ztunnel.identity.ca import Authority

MOST = 100_000  # bytes of a body
LIMIT = 60.0


async def echo(method: str, query: Query) -> Answer:
    return Answer(query.body)


class Https:
    """A server, and a client that trusts it."""

    def __init__(self, folder: Path) -> None:
        authority = Authority.create()
        certificate = authority.server_certificate(["localhost"])
        pair = folder / "pair.pem"
        pair.write_bytes(certificate.key_pem + certificate.chain_pem)
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server.load_cert_chain(pair)
        self.client = ssl.create_default_context(cadata=authority.root_pem.decode())
        self.port = 0

    async def ask(self, *pieces: bytes) -> tuple[int, bytes]:
        """Send a request; status and body of the answer."""
        with trio.fail_after(LIMIT):
            stream = await trio.open_ssl_over_tcp_stream(
                "localhost", self.port, ssl_context=self.client, https_compatible=True
            )
            async with stream:
                for piece in pieces:
                    await stream.send_all(piece)
                answer = b"".join([bytes(data) async for data in stream])
        head, _, body = answer.rpartition(b"\r\n\r\n")
        return int(head.rpartition(b"HTTP/1.1 ")[2].split()[0]), body


@pytest.fixture
async def https(tmp_path: Path, nursery: trio.Nursery) -> Https:
    made = Https(tmp_path)
    run = partial(serve, "127.0.0.1:0", {"/": echo}, loopback_only=True, tls=made.server, largest_body=MOST)
    told = await nursery.start(run)
    made.port = int(told.rpartition(":")[2])
    return made


def head(*headers: str) -> bytes:
    return "\r\n".join(["POST / HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""]).encode()


async def test_a_body_is_given_to_the_page(https: Https) -> None:
    body = bytes(range(256)) * 300
    assert await https.ask(head(f"Content-Length: {len(body)}"), body) == (200, body)
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in (body[:7], body[7:])) + b"0\r\n\r\n"
    assert await https.ask(head("Transfer-Encoding: chunked"), chunks) == (200, body)
    # Who asks whether he may send it is answered first.
    assert await https.ask(head("Content-Length: 2", "Expect: 100-continue"), b"ab") == (200, b"ab")
    assert await https.ask(head()) == (200, b"")


async def test_a_body_that_is_too_large(https: Https) -> None:
    status, told = await https.ask(head(f"Content-Length: {MOST + 1}"), b"x" * (MOST + 1))
    assert status == 413
    assert b"larger than 100000 bytes" in told


async def test_who_speaks_no_tls_ends_nobody_else(https: Https) -> None:
    with trio.fail_after(LIMIT):
        async with await trio.open_tcp_stream("127.0.0.1", https.port) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            try:
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
    assert (await https.ask(head()))[0] == 200
