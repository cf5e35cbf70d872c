"""Queries and answers as bytes; a general library (dnslib) writes the one and reads the other."""

from ipaddress import ip_address

import pytest
from dnslib import EDNS0, QTYPE, RCODE, RR, TXT, DNSHeader, DNSQuestion, DNSRecord
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ztunnel.dns import packets
from ztunnel.dns.packets import FormatError, NotAQuery, Query, parse

NAME = "web.default.svc.cluster.local"


def query(name: str = NAME, kind: str = "A", *, edns: int | None = None, **header: int) -> bytes:
    """A query as dig sends it; `edns` is the size it gives."""
    record = DNSRecord.question(name, kind)
    record.header.id = 4711
    for field, value in header.items():
        setattr(record.header, field, value)
    if edns is not None:
        record.add_ar(EDNS0(udp_len=edns))
    return bytes(record.pack())


def rdata(record: DNSRecord) -> list[str]:
    return [f"{QTYPE[rr.rtype]} {rr.rdata}" for rr in record.rr]


OPT = query(edns=1232)[-11:]


class TestParse:
    def test_a_plain_query(self) -> None:
        data = query("WEB.Default.svc.cluster.local", "AAAA")
        asked = parse(data)
        assert (asked.name, asked.qtype, asked.qclass) == (NAME, packets.AAAA, packets.IN)
        assert (asked.udp_size, asked.edns, asked.plain, asked.end) == (512, -1, True, len(data))

    def test_edns(self) -> None:
        asked = parse(query(edns=4096))
        assert (asked.udp_size, asked.edns, asked.plain) == (4096, 0, True)
        assert parse(query(edns=100)).udp_size == 512
        record = DNSRecord.question(NAME)
        record.add_ar(EDNS0(version=3, flags="do"))
        asked = parse(record.pack())
        assert (asked.edns, asked.dnssec) == (3, True)

    def test_the_root(self) -> None:
        assert parse(query(".", "NS")).name == ""

    def test_a_dot_inside_of_a_label_is_not_one_between_labels(self) -> None:
        data = bytearray(query("web-default.svc.cluster.local"))
        data[data.index(b"-")] = ord(".")
        assert parse(bytes(data)).name == r"web\.default.svc.cluster.local"

    def test_what_only_another_server_can_judge_is_not_plain(self) -> None:
        signed = DNSRecord.question(NAME)
        signed.add_ar(RR("key.", QTYPE.TXT, rdata=TXT("a signature, for example")))
        assert not parse(signed.pack()).plain
        assert not parse(query() + b"more").plain
        update = parse(query(kind="SOA", opcode=5))
        assert (update.plain, update.end) == (False, packets.HEADER)

    @pytest.mark.parametrize(
        "data",
        [
            query()[:-1],
            query(edns=1232)[:-1],
            query()[:14],
            DNSRecord(DNSHeader(id=1), questions=[DNSQuestion(NAME), DNSQuestion(NAME)]).pack(),
            DNSRecord(DNSHeader(id=1)).pack(),
            query()[:12] + b"\xc0\x0c\0\x01\0\x01",
            query()[:12] + b"\x40" + b"a" * 64 + b"\0\0\x01\0\x01",
            query()[:12] + (b"\x3f" + b"a" * 63) * 4 + b"\0\0\x01\0\x01",
            query(edns=1232)[:11] + b"\2" + query(edns=1232)[12:] + OPT,
            query(edns=1232)[:11] + b"\2" + query(edns=1232)[12:],
        ],
        ids=[
            "short",
            "short-opt",
            "in-a-label",
            "two",
            "none",
            "pointer",
            "label",
            "long",
            "two-opt",
            "one-missing",
        ],
    )
    def test_format_errors(self, data: bytes) -> None:
        with pytest.raises(FormatError):
            parse(data)
        answer = DNSRecord.parse(packets.format_error(data))
        assert (answer.header.rcode, answer.header.qr) == (RCODE.FORMERR, 1)
        assert answer.header.id == int.from_bytes(data[:2], "big")

    @pytest.mark.parametrize("data", [b"", b"\0" * 11, query(qr=1)], ids=["empty", "short", "an answer"])
    def test_what_is_no_query(self, data: bytes) -> None:
        with pytest.raises(NotAQuery):
            parse(data)

    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.binary(max_size=600))
    def test_any_bytes(self, data: bytes) -> None:
        check_all(data)

    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        st.sampled_from([query(), query(edns=1232), query(NAME * 3, "SRV")]),
        st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255))),
        st.integers(0, 200),
    )
    def test_damaged_queries(self, data: bytes, changes: list[tuple[int, int]], cut: int) -> None:
        damaged = bytearray(data)
        for position, value in changes:
            if position < len(damaged):
                damaged[position] = value
        check_all(bytes(damaged[: len(damaged) - cut] if cut < 20 else damaged))


def check_all(data: bytes) -> None:
    """Whatever comes is read or refused, and every answer to what is read can be read."""
    try:
        asked = parse(data)
    except NotAQuery:
        return
    except FormatError:
        answers = [packets.format_error(data)]
    else:
        answers = [packets.refusal(asked, packets.SERVFAIL)]
        if asked.plain:
            answers += [
                packets.addresses(asked, [bytes(4 if asked.qtype == packets.A else 16)] * 40, asked.udp_size),
                packets.no_data(asked, packets.HEADER),
            ]
            assert all(len(answer) <= max(asked.udp_size, asked.end + 60) for answer in answers)
    for answer in answers:
        assert answer[:2] == data[:2]
        assert answer[2] & 0x80
    packets.answers(parse(query()), data)


class TestAnswers:
    @pytest.mark.parametrize("kind", ["A", "AAAA"])
    def test_addresses(self, kind: str) -> None:
        texts = ["10.96.0.1", "10.96.0.2"] if kind == "A" else ["fd00::1", "fd00::2"]
        asked = parse(query("Web.default.svc.cluster.local", kind, id=77))
        answer = DNSRecord.parse(packets.addresses(asked, [ip_address(t).packed for t in texts], 512))
        assert (answer.header.id, answer.header.rcode, answer.header.aa, answer.header.ra) == (77, 0, 1, 1)
        assert (answer.header.tc, answer.header.rd) == (0, 1)
        assert rdata(answer) == [f"{kind} {text}" for text in texts]
        assert {rr.ttl for rr in answer.rr} == {packets.TTL}
        assert str(answer.q.qname) == "Web.default.svc.cluster.local."  # as it was asked
        assert {str(rr.rname) for rr in answer.rr} == {str(answer.q.qname)}
        assert not answer.ar

    def test_an_alias_before_the_search_domain(self) -> None:
        asked = parse(query("web.default.svc.cluster.local"))
        cut = packets.HEADER + len("web.")
        answer = DNSRecord.parse(packets.addresses(asked, [b"\x0a\0\0\1"], 512, cut))
        assert rdata(answer) == ["CNAME web.", "A 10.0.0.1"]
        assert [str(rr.rname) for rr in answer.rr] == [f"{NAME}.", "web."]

    @pytest.mark.parametrize(
        ("size", "edns", "fit"), [(None, 0, 29), (512, 1, 28), (1232, 1, 73), (4096, 1, 100)]
    )
    def test_what_does_not_fit_is_cut_off(self, size: int | None, edns: int, fit: int) -> None:
        asked = parse(query(edns=size))
        found = [bytes([10, 0, 0, number]) for number in range(100)]
        data = packets.addresses(asked, found, asked.udp_size)
        answer = DNSRecord.parse(data)
        assert len(answer.rr) == fit
        assert answer.header.tc == (fit < 100)
        assert len(data) <= asked.udp_size
        assert len(answer.ar) == edns

    def test_over_tcp_nearly_everything_fits(self) -> None:
        found = [number.to_bytes(4, "big") for number in range(5000)]
        data = packets.addresses(parse(query()), found, packets.MAX_SIZE)
        assert len(data) <= packets.MAX_SIZE
        assert len(DNSRecord.parse(data).rr) == 4093

    def test_no_data_names_the_authority(self) -> None:
        asked = parse(query(kind="AAAA", edns=1232))
        zone = packets.HEADER + NAME.index("cluster.local")
        answer = DNSRecord.parse(packets.no_data(asked, zone))
        assert (answer.header.rcode, answer.header.aa, answer.rr) == (RCODE.NOERROR, 1, [])
        (soa,) = answer.auth
        assert (QTYPE[soa.rtype], str(soa.rname), soa.ttl) == ("SOA", "cluster.local.", packets.TTL)
        assert soa.rdata.times[-1] == packets.TTL
        assert len(answer.ar) == 1

    def test_edns_is_answered_with_edns(self) -> None:
        record = DNSRecord.question(NAME)
        record.add_ar(EDNS0(flags="do", udp_len=4096))
        answer = DNSRecord.parse(packets.addresses(parse(record.pack()), [b"\x0a\0\0\1"], 4096))
        (opt,) = answer.ar
        assert (opt.edns_len, opt.edns_do, opt.edns_ver, opt.edns_rcode) == (1232, 1, 0, 0)

    def test_a_version_of_edns_that_nobody_knows(self) -> None:
        record = DNSRecord.question(NAME)
        record.add_ar(EDNS0(version=1))
        answer = DNSRecord.parse(packets.refusal(parse(record.pack()), packets.BADVERS))
        assert (answer.header.rcode, answer.ar[0].edns_rcode, answer.ar[0].edns_ver) == (0, 1, 0)

    @pytest.mark.parametrize(
        "data", [query(), query(edns=1232), query(opcode=5)], ids=["plain", "edns", "update"]
    )
    def test_refusals(self, data: bytes) -> None:
        answer = DNSRecord.parse(packets.refusal(parse(data), packets.SERVFAIL))
        assert (answer.header.rcode, answer.header.opcode) == (RCODE.SERVFAIL, data[2] >> 3 & 15)


class TestMatching:
    def response(self, name: str = NAME, kind: str = "A", **header: int) -> bytes:
        return query(name, kind, **{"qr": 1, **header})

    @pytest.mark.parametrize(
        ("changes", "fits"),
        [
            ({}, True),
            ({"name": NAME.upper()}, True),
            ({"rcode": 3}, True),
            ({"name": "other.default.svc.cluster.local"}, False),
            ({"kind": "AAAA"}, False),
            ({"opcode": 4}, False),
            ({"qr": 0}, False),
        ],
    )
    def test_an_answer_repeats_the_question(self, changes: dict[str, object], fits: bool) -> None:
        asked = parse(query())
        assert packets.answers(asked, self.response(**changes)) == fits  # type: ignore[arg-type]

    def test_letters_of_types_are_not_letters_of_names(self) -> None:
        asked = parse(query(kind="HTTPS"))  # 65, which is an A; 97 is an a
        assert not packets.answers(asked, self.response()[:-4] + b"\0\x61\0\1")

    def test_without_a_question_only_an_error_is_believed(self) -> None:
        asked = parse(query())
        assert packets.answers(asked, DNSRecord(DNSHeader(qr=1, rcode=RCODE.FORMERR)).pack())
        assert not packets.answers(asked, DNSRecord(DNSHeader(qr=1)).pack())
        assert not packets.answers(asked, b"\0\0\x80")


def test_types_are_counted_by_name_up_to_a_bound() -> None:
    assert parse(query(kind="HTTPS")).type_name == "https"
    assert Query(b"", 0, "", 12, 12345, 1).type_name == "other"
