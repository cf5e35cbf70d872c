"""A volume that kubelet writes anew (a projected token, a ConfigMap): everything behind a link is another at once."""

import itertools
import os
import shutil
from pathlib import Path

import pytest
import trio

from tests.xds.control_plane import FakeControlPlane, Pki
from tests.xds.test_client import Mesh
from tests.xds.test_client_faults import eventually
from ztunnel.identity.ca import Authority
from ztunnel.identity.revocations import Revocations, follow
from ztunnel.identity.testing import revoke
from ztunnel.xds.ca import CaClient, CaError


def mount(folder: Path, content: dict[str, bytes]) -> None:
    """Write the files as kubelet does: into a new folder, to which the link `..data` is then swapped."""
    folder.mkdir(exist_ok=True)
    data = folder / "..data"
    old = data.resolve() if data.is_symlink() else None
    new = folder / f"..{len(list(folder.iterdir()))}_{os.urandom(4).hex()}"
    new.mkdir()
    for name, value in content.items():
        (new / name).write_bytes(value)
    (folder / "..data_tmp").symlink_to(new.name)
    (folder / "..data_tmp").rename(data)
    for name in content:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(Path("..data") / name)
    if old is not None:
        shutil.rmtree(old)


async def test_a_new_token_and_a_new_root_are_taken(
    control_plane: FakeControlPlane, nursery: trio.Nursery, tmp_path: Path
) -> None:
    plane, volume = control_plane, tmp_path / "volume"
    mount(volume, {"token": b"first", "root-cert.pem": plane.pki.root_file.read_bytes()})
    plane.token_file, plane.pki.root_file = volume / "token", volume / "root-cert.pem"
    plane.tokens = {"first"}
    plane.chain = ["-----BEGIN CERTIFICATE-----"] * 2
    authority = CaClient(plane.address())
    await authority.sign(b"csr", "spiffe://a/ns/b/sa/c", 60)
    mesh = Mesh(plane)
    await nursery.start(mesh.client.run)
    connection = await plane.connection()
    await connection.request()
    await connection.push_and_ack()

    other = tmp_path / "other"
    other.mkdir()
    new = Pki(other)
    # The server's own context: what is loaded into it counts for connections from then on.
    plane.pki.server_context.load_cert_chain(other / "server.pem")
    plane.tokens = {"second"}
    with pytest.raises(CaError, match="its certificate is refused"):
        await authority.sign(b"csr", "spiffe://a/ns/b/sa/c", 60)
    connection.end()
    await eventually(lambda: "its certificate is refused" in mesh.client.error, "the stream is refused")
    mount(volume, {"token": b"second", "root-cert.pem": new.root_file.read_bytes()})
    await authority.sign(b"csr", "spiffe://a/ns/b/sa/c", 60)
    connection = await plane.connection()
    assert connection.metadata["authorization"] == "Bearer second"
    await connection.request()


async def test_what_is_followed_is_seen_to_be_another(nursery: trio.Nursery, tmp_path: Path) -> None:
    own = Authority.create()
    first, second = revoke(own, []), revoke(own, [own.certificate])
    volume = tmp_path / "volume"
    mount(volume, {"ca-crl.pem": first, "root-cert.pem": b"one"})
    revocations = Revocations(volume / "ca-crl.pem")
    lists: list[bytes] = []
    changed = trio.Event()
    nursery.start_soon(follow, volume / "root-cert.pem", changed.set, 0.05)
    mount(volume, {"ca-crl.pem": second, "root-cert.pem": b"two"})
    await revocations.check(lists.append)
    assert lists == [second]
    with trio.fail_after(60):
        for number in itertools.count():  # the first may come before the follower has looked at all
            mount(volume, {"ca-crl.pem": second, "root-cert.pem": b"%d" % number})
            with trio.move_on_after(2):
                await changed.wait()
                break
    # A ConfigMap that lost its key: nothing is pardoned.
    mount(volume, {"root-cert.pem": b"two"})
    await revocations.check(lists.append)
    assert lists == [second]
    assert "the last list stays in force" in revocations.problem
