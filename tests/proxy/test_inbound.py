"""Which CONNECT a pod's proxy serves, seen from the request alone."""

import pytest

from tests.proxy.ends import Bench
from ztunnel.proxy.errors import RequestRefused
from ztunnel.proxy.inbound import LONGEST_AUTHORITY, parse_authority


@pytest.mark.parametrize(
    ("authority", "parsed"),
    [
        ("10.244.1.2:80", ("10.244.1.2", 80)),
        ("10.244.1.2:65535", ("10.244.1.2", 65535)),
        ("[fd00:10:244:1::2]:8080", ("fd00:10:244:1::2", 8080)),
        ("[FD00::0002]:8080", ("fd00::2", 8080)),
        ("[::ffff:10.244.1.2]:80", ("10.244.1.2", 80)),
    ],
)
def test_addresses(authority: str, parsed: tuple[str, int]) -> None:
    assert parse_authority(authority) == parsed


@pytest.mark.parametrize(
    "authority",
    [
        "", ":", ":80", "10.244.1.2", "10.244.1.2:", "10.244.1.2:0", "10.244.1.2:65536", "10.244.1.2:-1",
        "10.244.1.2:+80", "10.244.1.2: 80", "10.244.1.2:٨٠", "10.244.1.2:" + "9" * 5000, "10.244.1.2:8_0",
        "[10.244.1.2]:80", "fd00::1:8080", "[fd00::1]", "[fd00::1]8080", "[fd00::1:8080", "user@10.244.1.2:80",
        "web.default.svc.cluster.local:80", "010.244.1.2:80", "10.244.1.2:80/path", "[fe80::1%eth0]:80",
        # Programs that listen on loopback only are nobody's business, in any disguise.
        "127.0.0.1:80", "127.9.9.9:80", "[::1]:80", "[::ffff:127.0.0.1]:80", "[::ffff:7f00:1]:80",
        "0.0.0.0:80", "[::]:80", "[::ffff:0.0.0.0]:80", "224.0.0.1:80", "[ff02::1]:80", "[::ffff:224.0.0.1]:80",
    ],
)  # fmt: skip
def test_what_is_no_address_of_a_pod_is_refused(authority: str) -> None:
    with pytest.raises(RequestRefused) as caught:
        parse_authority(authority)
    assert caught.value.status == 400
    assert len(str(caught.value)) < LONGEST_AUTHORITY + 100


def test_only_a_pods_own_addresses_are_remembered_as_such(bench: Bench) -> None:
    """Any number of others may be asked for; and an address that is not usable yet will be."""
    pod = bench.pod()
    try:
        assert pod.owns("127.0.0.1")
        for number in range(200):
            assert not pod.owns(f"198.51.100.{number}")
        assert pod._own == {"127.0.0.1"}
    finally:
        pod.close()
