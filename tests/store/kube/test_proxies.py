"""Proxies on the way to an API server: which one, and that requests pass it."""

import base64
from pathlib import Path

import pytest

from tests.store.kube.server import Answer, serving
from ztunnel.store.kube.api import Api, ApiError
from ztunnel.store.kube.proxies import proxy_for

PROXY = "http://proxy.example:3128"


@pytest.mark.parametrize(
    ("server", "given", "environment", "expected"),
    [
        ("https://api.example:6443", "", {}, ""),
        ("https://api.example:6443", "", {"HTTPS_PROXY": PROXY}, PROXY),
        ("https://api.example:6443", "", {"https_proxy": PROXY, "HTTPS_PROXY": "http://other:1"}, PROXY),
        ("https://api.example:6443", "", {"HTTP_PROXY": PROXY}, ""),
        ("https://api.example:6443", "", {"HTTPS_PROXY": "proxy.example"}, "http://proxy.example:80"),
        ("https://api.example:6443", "", {"HTTPS_PROXY": PROXY, "NO_PROXY": "a, example"}, ""),
        ("https://api.example:6443", "", {"HTTPS_PROXY": PROXY, "NO_PROXY": "API.example"}, ""),
        ("https://api.example:6443", "", {"HTTPS_PROXY": PROXY, "NO_PROXY": ".example"}, ""),
        ("https://api.example:6443", "", {"HTTPS_PROXY": PROXY, "NO_PROXY": "*.example"}, ""),
        ("https://api.example:6443", "", {"HTTPS_PROXY": PROXY, "NO_PROXY": "*"}, ""),
        ("https://api.example:6443", "", {"HTTPS_PROXY": PROXY, "NO_PROXY": "api.example:6443"}, ""),
        ("https://api.example:6443", "", {"HTTPS_PROXY": PROXY, "NO_PROXY": "api.example:443"}, PROXY),
        ("https://api.example:6443", "", {"HTTPS_PROXY": PROXY, "NO_PROXY": ".api.example,ample"}, PROXY),
        ("https://10.1.2.3", "", {"HTTPS_PROXY": PROXY, "NO_PROXY": "10.0.0.0/8"}, ""),
        ("https://10.1.2.3", "", {"HTTPS_PROXY": PROXY, "NO_PROXY": "10.1.2.4,10.2.0.0/16"}, PROXY),
        ("https://[fd00::1]:6443", "", {"HTTPS_PROXY": PROXY, "NO_PROXY": "[fd00::1]"}, ""),
        ("https://127.0.0.1:6443", "", {"HTTPS_PROXY": PROXY}, ""),
        ("https://localhost:6443", "", {"HTTPS_PROXY": PROXY}, ""),
        ("https://api.example", PROXY, {"NO_PROXY": "*"}, PROXY),
        ("https://127.0.0.1", PROXY, {"HTTPS_PROXY": "http://other:1"}, PROXY),
        ("https://api.example", "http://me:p%40ss@[fd00::2]:8", {}, "http://me:p%40ss@[fd00::2]:8"),
    ],
)
def test_which_proxy(server: str, given: str, environment: dict[str, str], expected: str) -> None:
    assert proxy_for(server, given, environment) == expected


KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: here
clusters:
- {name: there, cluster: {server: "http://127.0.0.1:1", proxy-url: "PROXY"}}
users:
- {name: me, user: {token: t}}
contexts:
- {name: here, context: {cluster: there, user: me}}
"""


def test_requests_pass_the_proxy_of_the_kubeconfig(tmp_path: Path) -> None:
    file = tmp_path / "config"
    with serving(lambda request: Answer(body={"by": "the proxy"})) as proxy:
        file.write_text(KUBECONFIG.replace("PROXY", f"http://me:p%40ss@127.0.0.1:{proxy.port}"))
        assert Api.from_kubeconfig(file).get_json("/version") == {"by": "the proxy"}
        (request,) = proxy.requests
    headers = {name.lower(): value for name, value in request.headers.items()}
    assert headers["proxy-authorization"] == f"Basic {base64.b64encode(b'me:p@ss').decode()}"


@pytest.mark.parametrize(
    "proxy", ["socks5://me:s3cr3t@host:1", "http://me:s3cr3t@:1", "http://me:s3cr3t@host:x"]
)
def test_a_proxy_that_cannot_be_used_is_explained_without_its_password(tmp_path: Path, proxy: str) -> None:
    file = tmp_path / "config"
    file.write_text(KUBECONFIG.replace("PROXY", proxy))
    with pytest.raises(ApiError, match="proxy") as caught:
        Api.from_kubeconfig(file)
    assert "s3cr3t" not in str(caught.value)


def test_what_the_environment_exempts_is_asked_directly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:s3cr3t@proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8")
    file = tmp_path / "config"
    text = KUBECONFIG.replace(', proxy-url: "PROXY"', "")
    file.write_text(text.replace("http://127.0.0.1:1", "https://10.9.8.7"))
    assert Api.from_kubeconfig(file).access.proxy == ""
    file.write_text(text.replace("http://127.0.0.1:1", "https://192.0.2.1"))
    assert Api.from_kubeconfig(file).access.proxy == "http://me:s3cr3t@proxy.example:3128"
