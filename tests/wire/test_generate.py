"""The checked-in modules are what the .proto files say."""

import importlib
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.message import Message

from ztunnel.wire import authorization_pb2, citadel_pb2, workload_pb2, xds_pb2, zds_pb2
from ztunnel.wire.generate import HERE, PROTOS, GenerateError, generate, outputs

# The generator stamps its version into every module; a newer generator alone is no reason to check in again.
STAMP = "# Protobuf Python Version: "


def stamp(module: Path) -> str:
    return next(line for line in module.read_text().splitlines() if line.startswith(STAMP))


def test_checked_in_modules_are_up_to_date(tmp_path: Path) -> None:
    generate(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == outputs()
    same_generator = stamp(tmp_path / "xds_pb2.py") == stamp(HERE / "xds_pb2.py")
    for name in outputs():
        checked_in, fresh = (HERE / name).read_text(), (tmp_path / name).read_text()
        if name.endswith("_pb2.py"):
            # The descriptor is one line, the same for every generator version.
            descriptor = [line for line in fresh.splitlines() if line.startswith("DESCRIPTOR = ")]
            assert descriptor
            assert descriptor[0] in checked_in, f"{name}: run python -m ztunnel.wire.generate"
        if same_generator:
            assert fresh == checked_in, f"{name}: run python -m ztunnel.wire.generate"


def test_no_stale_module_is_checked_in() -> None:
    present = sorted(
        path.name for pattern in ("*_pb2.py", "*_pb2.pyi", "*_grpc.py") for path in HERE.glob(pattern)
    )
    assert present == outputs()


def test_services_are_where_generate_expects_them() -> None:
    for proto in PROTOS.glob("*.proto"):
        file = descriptor_pb2.FileDescriptorProto()
        importlib.import_module(f"ztunnel.wire.{proto.stem}_pb2").DESCRIPTOR.CopyToProto(file)
        assert bool(file.service) == (f"{proto.stem}_grpc.py" in outputs()), proto.name


def test_an_unusable_proto_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.proto").write_text("message {")
    monkeypatch.setattr("ztunnel.wire.generate.PROTOS", tmp_path)
    with pytest.raises(GenerateError, match=r"broken\.proto"):
        generate(tmp_path)


@pytest.mark.parametrize(
    ("message", "encoded"),
    [
        # Field numbers that are not in the order of the fields: the ones easily got wrong. Bytes by hand:
        # tag = number << 3 | type (varint 0, length-delimited 2).
        (workload_pb2.Workload(uid="u"), b"\xa2\x01\x01u"),
        (workload_pb2.Workload(network_mode=workload_pb2.HOST_NETWORK), b"\xc8\x01\x01"),
        (workload_pb2.Workload(services={"k": workload_pb2.PortList()}), b"\xb2\x01\x05\x0a\x01k\x12\x00"),
        (
            workload_pb2.GatewayAddress(
                hostname=workload_pb2.NamespacedHostname(namespace="n"), hbone_mtls_port=15008
            ),
            b"\x0a\x03\x0a\x01n\x18\xa0\x75",
        ),
        (
            authorization_pb2.Match(
                service_accounts=[authorization_pb2.ServiceAccountMatch(serviceAccount="s")]
            ),
            b"\x5a\x03\x12\x01s",
        ),
        (zds_pb2.WorkloadRequest(keep=zds_pb2.KeepWorkload(uid="u")), b"\x2a\x03\x0a\x01u"),
        (citadel_pb2.IstioCertificateRequest(validity_duration=86400), b"\x18\x80\xa3\x05"),
        (xds_pb2.Resource(name="n", version="v"), b"\x0a\x01v\x1a\x01n"),
        (xds_pb2.DeltaDiscoveryResponse(removed_resources=["r"], nonce="n"), b"\x2a\x01n\x32\x01r"),
    ],
)
def test_bytes_on_the_wire(message: Message, encoded: bytes) -> None:
    assert message.SerializeToString(deterministic=True) == encoded
    assert type(message).FromString(encoded) == message


def test_full_names_are_those_of_the_protocols() -> None:
    assert workload_pb2.Address.DESCRIPTOR.full_name == "istio.workload.Address"
    assert authorization_pb2.Authorization.DESCRIPTOR.full_name == "istio.security.Authorization"
    assert zds_pb2.ZdsHello.DESCRIPTOR.full_name == "istio.workload.zds.ZdsHello"
    citadel = citadel_pb2.DESCRIPTOR.services_by_name["IstioCertificateService"]
    assert citadel.full_name == "istio.v1.auth.IstioCertificateService"
    ads = xds_pb2.DESCRIPTOR.services_by_name["AggregatedDiscoveryService"]
    assert ads.full_name == "envoy.service.discovery.v3.AggregatedDiscoveryService"
