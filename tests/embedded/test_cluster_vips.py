"""Services keep their addresses, get new ones, and cannot take those of others."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.embedded.vips import resolve
from ztunnel.store.models import IPFamily, Key, ObjectMeta, Service, ServicePort, ServiceSpec


def service(name: str, *addresses: str, **spec: object) -> Service:
    fields = {
        "clusterIP": addresses[0] if addresses else "",
        "clusterIPs": list(addresses),
        "ports": [ServicePort(port=80)],
        **spec,
    }
    return Service(
        metadata=ObjectMeta(name=name), spec=msgspec.convert(msgspec.to_builtins(fields), ServiceSpec)
    )


def solved(*services: Service, before: dict[Key, Service] | None = None) -> dict[str, Service]:
    resolved, findings = resolve(services, before or {})
    assert findings == []
    return {found.name: found for found in resolved}


def keyed(*services: Service) -> dict[Key, Service]:
    return {found.key: found for found in services}


def test_both_families_unless_said_otherwise() -> None:
    spec = solved(service("web"))["web"].spec
    assert spec.ip_families == ["IPv4", "IPv6"]
    assert spec.ip_family_policy == "PreferDualStack"
    assert spec.cluster_ip == spec.cluster_ips[0]
    assert spec.cluster_ips[0].startswith("10.96.")
    assert spec.cluster_ips[1].startswith("fd00:10:96::")


@pytest.mark.parametrize(
    ("given", "families"),
    [
        ({"ipFamilyPolicy": "SingleStack"}, ["IPv4"]),
        ({"ipFamilies": ["IPv6"]}, ["IPv6"]),
        ({"ipFamilies": ["IPv6", "IPv4"]}, ["IPv6", "IPv4"]),
        ({"ipFamilies": ["IPv6"], "ipFamilyPolicy": "PreferDualStack"}, ["IPv6", "IPv4"]),
        ({"ipFamilies": ["IPv6", "IPv4"], "ipFamilyPolicy": "SingleStack"}, ["IPv6"]),
        ({"ipFamilyPolicy": "RequireDualStack"}, ["IPv4", "IPv6"]),
        ({"clusterIP": "10.96.7.7"}, ["IPv4"]),
        ({"clusterIP": "fd00:10:96::77"}, ["IPv6"]),
        ({"clusterIP": "fd00:10:96::77", "ipFamilyPolicy": "PreferDualStack"}, ["IPv6", "IPv4"]),
        ({"clusterIP": "10.96.7.7", "clusterIPs": ["10.96.7.7", "fd00:10:96::77"]}, ["IPv4", "IPv6"]),
    ],
)
def test_families(given: dict[str, object], families: list[IPFamily]) -> None:
    spec = solved(service("web", **given))["web"].spec
    assert spec.ip_families == families
    assert [":" in address for address in spec.cluster_ips] == [family == "IPv6" for family in families]
    if "clusterIP" in given:
        assert spec.cluster_ip == given["clusterIP"]


def test_headless_and_external_services_have_no_address() -> None:
    found = solved(service("a", "None"), service("b", type="ExternalName", externalName="example.org"))
    assert found["a"].spec.cluster_ips == ["None"]
    assert found["a"].addresses == []
    assert found["b"].addresses == []


def test_given_addresses_are_kept_as_written() -> None:
    found = solved(service("a", "192.0.2.7"), service("b", "FD00:10:96:0::00AB"))
    assert found["a"].spec.cluster_ips == ["192.0.2.7"]
    assert found["b"].spec.cluster_ips == ["FD00:10:96:0::00AB"]


def test_addresses_stay() -> None:
    first = solved(service("a"), service("b"))
    moved = msgspec.structs.replace(
        first["a"],
        spec=msgspec.structs.replace(
            first["a"].spec, cluster_ip="10.96.3.3", cluster_ips=["10.96.3.3", "fd00:10:96::33"]
        ),
    )
    again = solved(service("a"), service("b"), service("c"), before=keyed(moved, first["b"]))
    assert again["a"].addresses == ["10.96.3.3", "fd00:10:96::33"]
    assert again["b"].addresses == first["b"].addresses


def test_a_family_more_or_less_keeps_the_other() -> None:
    both = solved(service("a"))["a"]
    one = solved(service("a", ipFamilyPolicy="SingleStack"), before=keyed(both))["a"]
    assert one.addresses == both.addresses[:1]
    again = solved(service("a"), before=keyed(one))["a"]
    assert again.addresses[0] == both.addresses[0]
    assert again.addresses[1].startswith("fd00:10:96::")


def refused(*services: Service, before: dict[Key, Service] | None = None) -> tuple[dict[str, Service], str]:
    resolved, (finding,) = resolve(services, before or {})
    return {found.name: found for found in resolved}, f"{finding.key}: {finding.message}; {finding.remedy}"


def test_of_two_with_one_address_the_first_by_name_gets_it() -> None:
    found, said = refused(service("b", "10.96.1.1"), service("a", "10.96.1.1"), service("c"))
    assert found.keys() == {"a", "c"}
    assert said == (
        "Service default/b: clusterIP 10.96.1.1 is the address of Service default/a; "
        "choose another clusterIP, or leave it out to be given one"
    )


def test_who_has_an_address_keeps_it_against_a_newcomer_with_an_earlier_name() -> None:
    has = solved(service("b", "10.96.1.1"))["b"]
    found, said = refused(service("a", "10.96.1.1"), service("b", "10.96.1.1"), before=keyed(has))
    assert found.keys() == {"b"}
    assert said.startswith("Service default/a: clusterIP 10.96.1.1 is the address of Service default/b")


def test_who_was_given_an_address_keeps_it_too() -> None:
    has = solved(service("b"))["b"]
    found, _ = refused(service("a", has.addresses[0]), service("b"), before=keyed(has))
    assert found["b"].addresses == has.addresses
    assert "a" not in found


def test_a_change_that_cannot_be_met_leaves_the_service_as_it_was() -> None:
    before = solved(service("a"), service("b", "10.96.1.1"))
    found, _ = refused(service("a", "10.96.1.1"), service("b", "10.96.1.1"), before=keyed(*before.values()))
    assert found["a"] == before["a"]


def test_an_address_moves_with_both_changed_at_once() -> None:
    before = solved(service("a", "10.96.1.1"))
    found = solved(service("a", "10.96.1.2"), service("b", "10.96.1.1"), before=keyed(*before.values()))
    assert (found["a"].addresses, found["b"].addresses) == (["10.96.1.2"], ["10.96.1.1"])


@pytest.mark.parametrize(
    ("addresses", "spec", "message"),
    [
        (["10.96.0.10"], {}, "clusterIP 10.96.0.10 is the cluster's DNS"),
        (["10.244.1.9"], {}, "clusterIP 10.244.1.9 is in the range of pods"),
        (["fd00:10:244:1::9"], {}, "clusterIP fd00:10:244:1::9 is in the range of pods"),
        (["10.99.0.11"], {}, "clusterIP 10.99.0.11 is in the range of nodes"),
        (["10.96.1.1"], {"ipFamilies": ["IPv6"]}, "clusterIP 10.96.1.1 does not fit ipFamilies (IPv6)"),
    ],
)
def test_addresses_that_cannot_be(addresses: list[str], spec: dict[str, object], message: str) -> None:
    found, said = refused(service("a", *addresses, **spec))
    assert found == {}
    assert message in said


GIVEN = ("10.96.1.1", "fd00:10:96::101")

service_lists = st.lists(
    st.tuples(
        st.text("abc", min_size=1, max_size=2),
        st.sampled_from([(), ("10.96.1.1",), ("10.96.1.2",), ("fd00:10:96::101",), ("None",), GIVEN]),
        st.sampled_from(["", "SingleStack", "PreferDualStack"]),
    ),
    max_size=8,
    unique_by=lambda item: item[0],
)  # fmt: skip


@given(st.lists(service_lists, min_size=1, max_size=5))
def test_through_any_history_addresses_are_of_one_service_and_stay(
    history: list[list[tuple[str, tuple[str, ...], str]]],
) -> None:
    before: dict[Key, Service] = {}
    for wanted in history:
        services = [service(name, *addresses, ipFamilyPolicy=policy) for name, addresses, policy in wanted]
        resolved, findings = resolve(services, before)
        addresses = [address for found in resolved for address in found.addresses]
        assert len(set(addresses)) == len(addresses)
        names = {found.key for found in resolved} | {finding.key for finding in findings}
        assert names == {found.key for found in services}
        # One whose old and new address both went to others leaves his second address free for the next look.
        for _ in services:
            again, _ = resolve(services, keyed(*resolved))
            if again == resolved:
                break
            resolved = again
        assert resolve(services, keyed(*resolved))[0] == resolved
        before = keyed(*resolved)
