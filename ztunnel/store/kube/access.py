"""Where the API server is and how to prove who we are: from a pod's service account, or from a kubeconfig.

Nothing here is kept longer than it is valid: a pod's token and CA file are read again when they change. Server
certificates are always verified; plain HTTP is for a server on this machine (`kubectl proxy`).
"""

import ipaddress
import os
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from ztunnel.store.kube import proxies
from ztunnel.store.kube.errors import ApiError

SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where kubelet puts a pod's token, CA file and namespace."""


class Access(NamedTuple):
    """One API server as one user. `files` are those whose change makes `tls` be called again.

    `authorization` gives the header's value, "" for none (a client certificate says it then). `proxy` is the URL of an
    HTTP proxy on the way, "" for none; it may hold credentials.
    """

    server: str
    namespace: str
    tls: Callable[[], ssl.SSLContext | None]
    authorization: Callable[[], str]
    files: tuple[Path, ...] = ()
    server_name: str = ""
    proxy: str = ""


def in_cluster(folder: Path = SERVICE_ACCOUNT, environment: Mapping[str, str] = os.environ) -> Access:
    """What kubelet gives every pod. Raises ApiError where this is no pod."""
    host = environment.get("KUBERNETES_SERVICE_HOST", "")
    port = environment.get("KUBERNETES_SERVICE_PORT", "443")
    token_file, ca_file = folder / "token", folder / "ca.crt"
    if not host:
        raise _unusable("KUBERNETES_SERVICE_HOST is not set", "run this in a pod, or give a kubeconfig")
    for file in (token_file, ca_file):
        if not file.is_file():
            raise _unusable(f"{file} is missing", "let the pod mount its service account's token")
    try:
        namespace = (folder / "namespace").read_text().strip()
    except OSError:
        namespace = "default"

    def authorization() -> str:
        try:
            return f"Bearer {token_file.read_text().strip()}"
        except OSError as error:
            raise _unusable(f"{token_file}: {error.strerror}", "check the pod's projected token") from error

    server = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    return Access(server, namespace, lambda: _verifying(ca_file), authorization, (ca_file,))


def from_kubeconfig(path: Path | None = None, context: str | None = None) -> Access:
    """What a kubeconfig says (default: KUBECONFIG, else ~/.kube/config) of a context (default: the current one).

    Raises ApiError for a file that cannot be used.
    """
    # 35 MB of memory: only here.
    from kubernetes import client, config

    given = str(path) if path is not None else os.environ.get("KUBECONFIG") or "~/.kube/config"
    file = os.path.expanduser(given)
    what = f"kubeconfig {given}"
    if not any(os.path.isfile(each) for each in file.split(os.pathsep)):
        raise _unusable(f"{what}: no such file", "give its path with --kubeconfig or KUBECONFIG")
    settings: Any = client.Configuration()
    try:
        contexts, active = config.list_kube_config_contexts(file)
        chosen = next(
            (each for each in contexts if each["name"] == (context or (active or {}).get("name"))), None
        )
        if chosen is None:
            names = ", ".join(each["name"] for each in contexts) or "none"
            raise _unusable(
                f"{what}: no context {context!r}" if context else f"{what}: no current context",
                f"choose one of: {names}",
            )
        config.load_kube_config(file, chosen["name"], client_configuration=settings)
        proxy_url = _proxy_url(file, str(chosen["context"].get("cluster", "")))
    except config.ConfigException as error:
        raise _unusable(f"{what}: {error}", "mend the file, or choose another context") from None
    except ApiError:
        raise
    except Exception as error:
        # What the parser says may quote the file.
        raise _unusable(f"{what}: cannot be read ({type(error).__name__})", "is it YAML?") from None
    server = str(settings.host or "").rstrip("/")
    if not settings.verify_ssl:
        raise _unusable(
            f"{what}: insecure-skip-tls-verify is not accepted",
            "give certificate-authority-data for the cluster instead",
        )
    if not server.startswith("https://") and not _on_this_machine(server):
        raise _unusable(f"{what}: {server} is not https://", "plain HTTP is for this machine only")

    try:
        proxy = proxies.proxy_for(server, proxy_url, os.environ)
    except ValueError as error:
        raise _unusable(f"{what}: {error}", "see proxy-url, HTTPS_PROXY and NO_PROXY") from None

    def tls() -> ssl.SSLContext | None:
        if not server.startswith("https://"):
            return None
        try:
            made = _verifying(Path(settings.ssl_ca_cert) if settings.ssl_ca_cert else None)
            if settings.cert_file:
                made.load_cert_chain(settings.cert_file, settings.key_file)
        except (OSError, ssl.SSLError) as error:
            raise _unusable(
                f"{what}: the certificates of context {chosen['name']} cannot be used ({error})",
                "check certificate-authority, client-certificate and client-key",
            ) from None
        return made

    def authorization() -> str:
        try:
            token = str(settings.get_api_key_with_prefix("BearerToken", "authorization") or "")
        except Exception as error:
            raise _unusable(f"{what}: no token ({type(error).__name__})", "log in again") from None
        return token if not token or token.lower().startswith("bearer ") else f"Bearer {token}"

    namespace = str(chosen["context"].get("namespace") or "default")
    return Access(
        server,
        namespace,
        tls,
        authorization,
        server_name=str(settings.tls_server_name or ""),
        proxy=proxy,
    )


def _proxy_url(file: str, cluster: str) -> str:
    """The `proxy-url` of a cluster in a kubeconfig, the first of several files that has it; "" for none."""
    from kubernetes.config.kube_config import KubeConfigMerger

    for node in KubeConfigMerger(file).config.value.get("clusters") or ():
        if node.value.get("name") == cluster:
            return str((node.value.get("cluster") or {}).get("proxy-url") or "")
    return ""


def _verifying(ca_file: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file is None:
        context.load_default_certs()
    else:
        context.load_verify_locations(ca_file)
    return context


def _on_this_machine(server: str) -> bool:
    parts = urlsplit(server)
    host = parts.hostname or ""
    try:
        return parts.scheme == "http" and (host == "localhost" or ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return False


def _unusable(message: str, remedy: str) -> ApiError:
    return ApiError(0, "Unusable", f"{message}; {remedy}")
