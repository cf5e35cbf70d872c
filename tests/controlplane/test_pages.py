"""The control plane's pages, asked of the real process while real streams are open."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import trio
import trio_asyncio

from tests.admin.test_server import ask
from tests.controlplane.objects import node, pod
from tests.controlplane.process import ControlPlane
from ztunnel.controlplane.resources import ADDRESS_TYPE


async def dump(path: Path, sections: str = "") -> dict[str, Any]:
    status, body = await ask(path, f"/config_dump?sections={sections}")
    assert status == 200
    found: dict[str, Any] = json.loads(body)
    return found


async def test_who_is_connected_and_how_far(tmp_path: Path) -> None:
    plane = ControlPlane(tmp_path)
    plane.apply(node("node-1"), pod("a", "10.0.0.1", node="node-1"))
    path = tmp_path / "admin.sock"
    command = plane.command("--listen", "127.0.0.1:0", "--admin", f"unix:{path}")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        with trio.fail_after(30):
            while not (tmp_path / "port").exists():
                await trio.sleep(0.01)
        plane.port = int((tmp_path / "port").read_text())
        whole = await dump(path)
        assert whole["clients"] == []
        assert whole["types"][ADDRESS_TYPE]["resources"] >= 1
        assert whole["authority"]["not_after"] > time.time() + 86400
        assert len(whole["authority"]["roots"]) == 1
        assert "PRIVATE" not in json.dumps(whole)
        async with trio_asyncio.open_loop(), plane.stream() as client:
            await client.send(subscribe=["*"])
            response = await client.receive(acknowledge=False)
            one = (await dump(path, "clients"))["clients"][0]
            assert (one["node"], one["types"][ADDRESS_TYPE]["status"]) == ("node-1", "STALE")
            await client.send(nonce=response.nonce)
            with trio.fail_after(30):
                while True:
                    (one,) = (await dump(path, "clients"))["clients"]
                    found = one["types"][ADDRESS_TYPE]
                    if found["status"] == "SYNCED":
                        break
                    await trio.sleep(0.01)
            assert found["sent"] == found["acknowledged"] == response.system_version_info
            assert found["sent_at"] <= found["answered_at"] <= time.time()
            assert one["id"].startswith("ztunnel~")
            assert one["since"] <= found["sent_at"]
        with trio.fail_after(30):
            while (await dump(path, "clients"))["clients"]:
                await trio.sleep(0.01)
    finally:
        process.terminate()
        assert process.wait(20) == 0
    assert not path.exists()
