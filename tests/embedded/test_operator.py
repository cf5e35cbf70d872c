"""What an IstioOperator in the mesh's directory sets."""

from pathlib import Path

import pytest

from ztunnel.embedded.operator import OperatorError, settings

FRAGMENT = """
apiVersion: install.istio.io/v1alpha1
kind: IstioOperator
spec:
  meshConfig:
    defaultConfig:
      certificates: []
  values:
    pilot:
      env:
        MAX_WORKLOAD_CERT_TTL: "%s"
        DEFAULT_WORKLOAD_CERT_TTL: "%s"
        ANOTHER: "1"
---
apiVersion: install.istio.io/v1alpha1
kind: IstioOperator
spec: {values: {global: {proxy: {}}}}
"""


def test_the_lifetimes_of_certificates(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("kind: IstioOperator\n\t")
    (tmp_path / "binary.yaml").write_bytes(b"\xff")
    assert settings(tmp_path) == {}
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "mesh.yaml").write_text(FRAGMENT % ("48h", "24h"))
    expected = {"MAX_WORKLOAD_CERT_TTL": "48h", "DEFAULT_WORKLOAD_CERT_TTL": "24h"}
    assert settings(tmp_path) == expected
    (tmp_path / "again.yml").write_text(FRAGMENT % ("48h", "24h"))
    assert settings(tmp_path) == expected


@pytest.mark.parametrize(
    ("most", "default", "complaint"),
    [
        (
            "two days",
            "24h",
            r"mesh.yaml: spec.values.pilot.env.MAX_WORKLOAD_CERT_TTL: 'two days' is not a duration",
        ),
        ("1h", "24h", r"spec.values.pilot.env: certificates of 24h by default and 1h at most"),
    ],
)
def test_lifetimes_that_cannot_be(most: str, default: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text(FRAGMENT % (most, default))
    with pytest.raises(OperatorError, match=complaint):
        settings(tmp_path)


def test_two_that_differ(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(FRAGMENT % ("48h", "24h"))
    (tmp_path / "b.yaml").write_text(FRAGMENT % ("48h", "12h"))
    with pytest.raises(OperatorError, match="'12h', elsewhere '24h'; keep one"):
        settings(tmp_path)
