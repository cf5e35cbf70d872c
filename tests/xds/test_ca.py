"""The CA client, against a real gRPC server over TLS."""

import pytest
import trio

from tests.xds.control_plane import TOKEN, FakeControlPlane, Line
from ztunnel.xds import ca
from ztunnel.xds.ca import CaClient, CaError

IDENTITY = "spiffe://cluster.local/ns/default/sa/reviews"
CSR = b"-----BEGIN CERTIFICATE REQUEST-----\nMIIB\n-----END CERTIFICATE REQUEST-----\n"
CHAIN = [
    f"-----BEGIN CERTIFICATE-----\n{name}\n-----END CERTIFICATE-----\n" for name in ("LEAF", "CA", "ROOT")
]


async def test_a_certificate_is_signed_in_the_name_of_a_pod(control_plane: FakeControlPlane) -> None:
    control_plane.chain = CHAIN
    chain = await CaClient(control_plane.address()).sign(CSR, IDENTITY, 3600)
    assert chain == [certificate.encode() for certificate in CHAIN]
    (request,) = control_plane.signed
    assert request.csr == CSR.decode()
    assert request.validity_duration == 3600
    assert request.metadata["ImpersonatedIdentity"] == IDENTITY


async def test_many_at_once(control_plane: FakeControlPlane) -> None:
    control_plane.chain = CHAIN
    client = CaClient(control_plane.address())
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(client.sign, CSR, f"{IDENTITY}-{number}", 3600)
    assert {request.metadata["ImpersonatedIdentity"] for request in control_plane.signed} == {
        f"{IDENTITY}-{number}" for number in range(20)
    }


async def test_a_refused_token_names_its_file(control_plane: FakeControlPlane) -> None:
    control_plane.token_file.write_text("another")
    with pytest.raises(CaError) as refused:
        await CaClient(control_plane.address()).sign(CSR, IDENTITY, 3600)
    assert IDENTITY in str(refused.value)
    assert "UNAUTHENTICATED" in str(refused.value)
    assert str(control_plane.token_file) in str(refused.value)
    control_plane.token_file.write_text(TOKEN)
    control_plane.chain = CHAIN
    await CaClient(control_plane.address()).sign(CSR, IDENTITY, 3600)


@pytest.mark.parametrize("chain", [[], CHAIN[:1], ["no PEM", "at all"]])
async def test_an_answer_that_is_no_chain(control_plane: FakeControlPlane, chain: list[str]) -> None:
    control_plane.chain = chain
    with pytest.raises(CaError, match="leaf first, root last"):
        await CaClient(control_plane.address()).sign(CSR, IDENTITY, 3600)


async def test_nobody_there(control_plane: FakeControlPlane, unused_port: int) -> None:
    with pytest.raises(CaError, match="connection refused"):
        await CaClient(control_plane.address(unused_port)).sign(CSR, IDENTITY, 3600)


async def test_no_answer(control_plane: FakeControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ca, "CALL_TIMEOUT", 0.2)
    line = Line(control_plane.port)
    line.dead = True
    async with line.open():
        with pytest.raises(CaError, match="no answer in time"):
            await CaClient(control_plane.address(line.port)).sign(CSR, IDENTITY, 3600)


async def test_cut_off_in_the_middle(control_plane: FakeControlPlane) -> None:
    control_plane.chain = CHAIN
    line = Line(control_plane.port)
    line.remaining = 1500
    async with line.open():
        with pytest.raises(CaError, match=f"{line.port}"):
            await CaClient(control_plane.address(line.port)).sign(CSR, IDENTITY, 3600)
