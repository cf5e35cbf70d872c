"""An authority and TLS contexts that are made once: nothing in these tests changes them."""

import pytest
from OpenSSL import SSL

from ztunnel.identity import testing, tls
from ztunnel.identity.ca import Authority


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority.create()


@pytest.fixture(scope="session")
def client_context(authority: Authority) -> SSL.Context:
    return tls.mesh_context(testing.workload(authority, testing.CLIENT))


@pytest.fixture(scope="session")
def server_context(authority: Authority) -> SSL.Context:
    return tls.mesh_context(testing.workload(authority, testing.SERVER))
