"""The daemon's settings: names of the environment, defaults, durations, and what is refused."""

from pathlib import Path

import pytest

from ztunnel.config import SettingError, Settings, WorkerSettings
from ztunnel.durations import parse as duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("24h", 86400), ("1h30m", 5400), ("500ms", 0.5), ("90", 90), ("1.5s", 1.5), (" 5m ", 300), ("0", 0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1s", "1d", "1h 30m", "s", "1hh", "1e3s", "inf"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        duration(text)


def test_defaults() -> None:
    settings = Settings.from_environment({"NODE_NAME": "node-7"})
    assert settings.node_name == "node-7"
    assert settings.workers == 2
    assert settings.admin_address == "127.0.0.1:15000"
    assert settings.readiness_address == "0.0.0.0:15021"
    assert settings.inpod_uds == "/var/run/ztunnel/ztunnel.sock"
    assert (settings.termination_grace, settings.secret_ttl) == (30, 0)
    assert settings.ca_address == settings.xds_address
    worker = WorkerSettings.from_environment({})
    assert (worker.streams_per_tunnel, worker.tunnel_idle, worker.trust_domain) == (100, 300, "cluster.local")


def test_the_authority_has_an_address_and_roots_of_its_own() -> None:
    settings = Settings.from_environment(
        {"XDS_ADDRESS": "https://a:1", "CA_ADDRESS": "https://b:2", "XDS_ROOT_CA": "x", "CA_ROOT_CA": "y"}
    )
    assert (settings.xds_address, settings.ca_address) == ("https://a:1", "https://b:2")
    assert (settings.xds_root_ca, settings.ca_root_ca) == (Path("x"), Path("y"))


def test_daemon_and_workers_read_the_same() -> None:
    environment = {"TERMINATION_GRACE_PERIOD": "1m30s", "TRUST_DOMAIN": "example.org"}
    assert Settings.from_environment(environment).termination_grace == 90
    assert WorkerSettings.from_environment(environment).termination_grace == 90
    assert WorkerSettings.from_environment(environment).trust_domain == "example.org"


def test_what_costs_memory_or_processor_time() -> None:
    settings = WorkerSettings.from_environment({})
    assert (settings.buffer_limit, settings.spin, settings.congestion_control) == (256 << 20, 0.0, "")
    assert settings.gather
    settings = WorkerSettings.from_environment(
        {
            "BUFFER_LIMIT": "2Gi",
            "ZTUNNEL_SPIN_MICROSECONDS": "50",
            "TUNNEL_CONGESTION_CONTROL": "reno",
            "ZTUNNEL_GATHER": "false",
        }
    )
    assert not settings.gather
    assert (settings.buffer_limit, settings.spin, settings.congestion_control) == (2 << 30, 50e-6, "reno")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ZTUNNEL_WORKER_THREADS", "0"),
        ("ZTUNNEL_WORKER_THREADS", "65"),
        ("ZTUNNEL_WORKER_THREADS", "two"),
        ("ZTUNNEL_WORKER_THREADS", ""),
        ("TERMINATION_GRACE_PERIOD", "30 seconds"),
        ("SECRET_TTL", "1day"),
        ("SECRET_TTL", "9s"),
        ("POOL_MAX_STREAMS_PER_CONNECTION", "0"),
        ("POOL_UNUSED_RELEASE_TIMEOUT", "-"),
        ("BUFFER_LIMIT", "much"),
        ("BUFFER_LIMIT", "100Ki"),
        ("ZTUNNEL_SPIN_MICROSECONDS", "-1"),
        ("ZTUNNEL_SPIN_MICROSECONDS", "10001"),
        ("ZTUNNEL_GATHER", "yes"),
        ("TUNNEL_CONGESTION_CONTROL", "snail"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingError, match=f"^{name}: "):
        Settings.from_environment({name: value})


@pytest.mark.parametrize(
    ("environment", "mebibytes"),
    [
        ({}, 256),
        ({"MEMORY_LIMIT": "0"}, 256),
        ({"MEMORY_LIMIT": "268435456"}, 40),
        ({"MEMORY_LIMIT": "256Mi", "ZTUNNEL_WORKER_THREADS": "1"}, 80),
        ({"MEMORY_LIMIT": "64Mi"}, 8),
        ({"MEMORY_LIMIT": "16Gi"}, 256),
        ({"MEMORY_LIMIT": "256Mi", "BUFFER_LIMIT": "100Mi"}, 100),
    ],
)
def test_what_may_wait_for_slow_readers_fits_the_containers_memory(
    environment: dict[str, str], mebibytes: int
) -> None:
    assert WorkerSettings.from_environment(environment).buffer_limit == mebibytes << 20


def test_a_memory_limit_that_is_none_is_refused() -> None:
    with pytest.raises(SettingError, match="MEMORY_LIMIT: 'much' is not a number of bytes"):
        WorkerSettings.from_environment({"MEMORY_LIMIT": "much"})
