"""The agent's own encoding of ZDS is protobuf's, as the generated classes read and write it."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from cni import zds_messages as messages
from ztunnel.inpod.pods import WorkloadInfo, ZdsError
from ztunnel.wire import zds_pb2

texts = st.text(max_size=300)  # longer than what one byte can count


@given(texts, texts, texts, texts)
def test_what_is_asked_is_what_protobuf_encodes(uid: str, name: str, namespace: str, account: str) -> None:
    info = zds_pb2.WorkloadInfo(name=name, namespace=namespace, service_account=account)
    deletion = zds_pb2.WorkloadRequest()
    getattr(deletion, "del").uid = uid
    for ours, theirs in (
        (
            messages.add(uid, WorkloadInfo(name, namespace, account)),
            zds_pb2.WorkloadRequest(add=zds_pb2.AddWorkload(uid=uid, workload_info=info)),
        ),
        (messages.keep(uid), zds_pb2.WorkloadRequest(keep=zds_pb2.KeepWorkload(uid=uid))),
        (messages.delete(uid), deletion),
        (messages.SNAPSHOT_SENT, zds_pb2.WorkloadRequest(snapshot_sent=zds_pb2.SnapshotSent())),
    ):
        assert ours.data == theirs.SerializeToString(deterministic=True)
        assert ours.name == theirs.WhichOneof("payload")


@given(texts)
def test_what_protobuf_encodes_is_what_is_read(error: str) -> None:
    answered = zds_pb2.WorkloadResponse(ack=zds_pb2.Ack(error=error)).SerializeToString()
    assert messages.answer(answered) == error
    assert messages.hello_version(zds_pb2.ZdsHello(version=zds_pb2.V1).SerializeToString()) == messages.V1


def test_fields_of_later_versions_are_passed_over() -> None:
    later = b"\x10\xff\xff\xff\xff\x0f\x19eight888\x22\x03abc\x2dfour"  # a field of each kind
    assert messages.hello_version(later + b"\x08\x01" + later) == 1
    assert messages.answer(later + b"\x0a\x04\x0a\x02no" + later) == "no"
    assert messages.answer(later) is None
    assert messages.hello_version(later) == 0
    # A message in two parts is one.
    parts = b"\x0a\x04\x0a\x02no" + b"\x0a\x00" + b"\x0a\x02\x10\x01"
    assert messages.answer(parts) == zds_pb2.WorkloadResponse.FromString(parts).ack.error == "no"


@given(st.binary(max_size=40))
def test_any_bytes_are_refused_or_read_as_protobuf_reads_them(data: bytes) -> None:
    try:
        error = messages.answer(data)
        response = zds_pb2.WorkloadResponse.FromString(data)
    except (ZdsError, DecodeError):  # protobuf refuses numbers that are longer than they need be
        return
    assert (response.ack.error if response.HasField("ack") else None) == error


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(b"\x0a", id="no length"),
        pytest.param(b"\x0a\x05ab", id="too short"),
        pytest.param(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", id="a length without an end"),
        pytest.param(b"\x0b\x01", id="a group"),
        pytest.param(b"\x00\x01", id="field 0, a number"),
        pytest.param(b"\x02\x00", id="field 0, bytes"),
        pytest.param(b"\x08", id="no number"),
        pytest.param(b"\x09\0\0\0", id="four bytes of eight"),
        pytest.param(b"\x0a\x03\x0a\x01\xff", id="no UTF-8"),
    ],
)
def test_what_is_no_message_is_refused(packet: bytes) -> None:
    with pytest.raises(ZdsError, match="malformed packet, expected WorkloadResponse"):
        messages.answer(packet)
