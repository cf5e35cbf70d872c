"""Measures a push of a large mesh, decoding included: `python -m tests.xds.measure_push [WORKLOADS] [SERVICES]`.

Prints seconds, memory (PSS of a process that holds the model and nothing else) and the longest time between two
checkpoints. Not a test: it asserts nothing about time.

100,000 workloads (dual stack, one service each) and 10,000 services, 2 cores, CPython 3.11, protobuf 7.36:
as 19 responses of 2 MiB 2.3 s, 127 MB (peak and after; 23 MB before), longest turn 62 ms (a garbage collection, not
a slice: those take 2 ms); as one response (istiod's way) 1.7 s, 216 MB peak, 176 MB after.
"""

import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import trio

from tests.xds.resources import resource, service, workload
from ztunnel.mesh.state import MeshState
from ztunnel.wire import xds_pb2
from ztunnel.xds.channel import ControlPlane
from ztunnel.xds.client import NodeInfo, XdsClient, XdsConfig
from ztunnel.xds.decode import ADDRESS_TYPE
from ztunnel.xds.subscription import MORE_FOLLOWS

# Bytes, what this project's control plane puts into one response.
RESPONSE = 2 * 1024 * 1024


def pss() -> float:
    """The process's proportional memory, MB."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no Pss in smaps_rollup")


def resources(workloads: int, services: int) -> Iterator[xds_pb2.Resource]:
    """A mesh as a cluster would have it: Deployments of equal pods behind their services."""
    keys = [
        f"team-{number % 100}/app-{number}.team-{number % 100}.svc.cluster.local"
        for number in range(services)
    ]
    for number, key in enumerate(keys):
        message = service(f"app-{number}", f"10.{96 + (number >> 16)}.{number >> 8 & 255}.{number & 255}")
        message.namespace, _, message.hostname = key.partition("/")
        message.ports.add(service_port=80, target_port=8080)
        yield resource(message, f"v{number}")
    for number in range(workloads):
        app = number % services
        namespace = f"team-{app % 100}"
        message_ = workload(
            f"app-{app}-7d9f8b6c5d-{number:05x}",
            f"10.{128 + (number >> 16)}.{number >> 8 & 255}.{number & 255}",
            f"fd00::{number >> 16:x}:{number & 65535:x}",
            namespace=namespace,
            services={keys[app]: {80: 8080}},
        )
        message_.service_account = message_.workload_name = message_.canonical_name = f"app-{app}"
        message_.canonical_revision = "v1"
        message_.trust_domain = "cluster.local"
        message_.cluster_id = "Kubernetes"
        message_.node = f"node-{number % 1000}"
        message_.locality.region, message_.locality.zone = "eu-west", f"eu-west-{number % 3}"
        yield resource(message_, f"v{number}")


def write(folder: Path, workloads: int, services: int, limit: int) -> None:
    """The responses of a first push as files, in order."""
    pending: list[xds_pb2.Resource] = []
    size = written = 0

    def flush(version: str) -> None:
        response = xds_pb2.DeltaDiscoveryResponse(
            type_url=ADDRESS_TYPE, nonce="n", system_version_info=version, resources=pending
        )
        (folder / f"{written:06}").write_bytes(response.SerializeToString())

    for each in resources(workloads, services):
        pending.append(each)
        size += each.ByteSize()
        if size >= limit:
            flush("1" + MORE_FOLLOWS)
            pending, size, written = [], 0, written + 1
    flush("1")


def load(folder: Path) -> None:
    """Apply the responses as the client does, and print what it took."""
    server = ControlPlane(address="https://localhost:1", root_ca=folder, token=folder)
    config = XdsConfig(server=server, node=NodeInfo(node_name="node-1", pod_name="ztunnel"))
    state = MeshState()
    longest = 0.0
    last = 0.0

    def turn(tags: frozenset[str]) -> None:
        nonlocal longest, last
        now = time.perf_counter()
        longest = max(longest, now - last)
        last = now

    client = XdsClient(config, state, turn, lambda changes: None)
    gc.collect()
    before = peak = pss()
    spent = 0.0

    async def run() -> None:
        nonlocal spent, last, peak
        for file in sorted(folder.iterdir()):
            data = file.read_bytes()
            started = last = time.perf_counter()
            response = xds_pb2.DeltaDiscoveryResponse.FromString(data)
            errors = await client._apply(response)
            spent += time.perf_counter() - started
            peak = max(peak, pss())
            assert not errors, errors[:3]

    trio.run(run)
    assert client.addresses.synced.is_set()
    gc.collect()
    after = pss()
    print(
        f"{state.workload_count} workloads, {state.service_count} services, {len(list(folder.iterdir()))} responses: "
        f"{spent:.1f} s; PSS {before:.0f} MB before, {peak:.0f} at most, {after:.0f} after "
        f"({(after - before) * 1e6 / max(1, state.workload_count):.0f} bytes a workload); "
        f"longest turn {longest * 1000:.0f} ms"
    )


def main() -> None:
    """Command line: how many workloads and services."""
    workloads, services = (*map(int, sys.argv[1:3]), 100_000, 10_000)[:2]
    # Each step in a process of its own, so that none is measured with another's memory.
    context = get_context("spawn")
    for limit in (RESPONSE, 1 << 40):
        with tempfile.TemporaryDirectory() as name:
            for target, arguments in (
                (write, (Path(name), workloads, services, limit)),
                (load, (Path(name),)),
            ):
                process = context.Process(target=target, args=arguments)
                process.start()
                process.join()
                if process.exitcode:
                    sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
