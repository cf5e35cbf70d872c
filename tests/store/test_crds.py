"""The definitions in manifests/ are what the readers' own tables make, and the API server can take them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ztunnel.store import authorization, crds, peerauth
from ztunnel.store.models import AuthorizationPolicy, PeerAuthentication

MANIFESTS = Path(__file__).parents[2] / "manifests"
EVERY = [definition.object() for made in crds.FOLDERS.values() for definition in made()]


def test_files_are_those_generated() -> None:
    expected = crds.files()
    found = {
        str(path.relative_to(MANIFESTS)): path.read_text()
        for folder in crds.FOLDERS
        for path in (MANIFESTS / folder).iterdir()
    }
    assert found == expected, "run python -m ztunnel.store.crds"


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """A schema and all that are in it."""
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from nodes(inner, f"{path}.{name}")
    for name in ("items", "additionalProperties"):
        if name in schema:
            yield from nodes(schema[name], f"{path}[]")


@pytest.mark.parametrize("definition", EVERY, ids=lambda made: made["metadata"]["name"])
def test_schemas_are_structural_and_described(definition: dict[str, Any]) -> None:
    spec = definition["spec"]
    assert definition["metadata"]["name"] == f"{spec['names']['plural']}.{spec['group']}"
    assert [version["storage"] for version in spec["versions"]].count(True) == 1
    for version in spec["versions"]:
        assert version["subresources"] == {"status": {}}
        root = version["schema"]["openAPIV3Schema"]
        assert root["type"] == "object"
        for path, node in nodes(root):
            assert node.get("type"), path
            assert not {"$ref", "oneOf", "anyOf", "default"} & node.keys(), path
            if not path.endswith("[]"):
                assert node.get("description"), path


@pytest.mark.parametrize("definition", crds.definitions(), ids=lambda made: made.name)
def test_no_field_is_dropped(definition: crds.Definition) -> None:
    """What is misspelt reaches the mesh, which reports it: dropped, a DENY policy could come to deny nothing."""
    for path, node in nodes(definition.object()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]):
        if node["type"] == "object" and path and "additionalProperties" not in node:
            assert node["x-kubernetes-preserve-unknown-fields"] is True, path


def schema_of(kind: str) -> dict[str, Any]:
    """The schema of a kind's spec."""
    found = next(definition for definition in crds.definitions() if definition.kind == kind)
    properties: dict[str, Any] = found.spec["properties"]
    return properties


def test_fields_are_those_that_are_read() -> None:
    policy = schema_of("AuthorizationPolicy")
    rule = policy["rules"]["items"]["properties"]
    assert set(policy) == set(authorization.SPEC_FIELDS)
    assert set(rule) == set(authorization.RULE_FIELDS)
    source = rule["from"]["items"]["properties"]["source"]["properties"]
    operation = rule["to"]["items"]["properties"]["operation"]["properties"]
    assert set(source) == set(authorization.SOURCE_FIELDS)
    assert set(operation) == set(authorization.OPERATION_FIELDS)
    assert set(rule["when"]["items"]["properties"]) == set(authorization.CONDITION_FIELDS)
    assert policy["action"]["enum"] == list(authorization.ACTIONS.words)
    peer = schema_of("PeerAuthentication")
    assert set(peer) == set(peerauth.SPEC_FIELDS)
    assert peer["mtls"]["properties"]["mode"]["enum"] == list(peerauth.MODES.words)


@pytest.mark.parametrize("kind", [AuthorizationPolicy, PeerAuthentication])
def test_versions_and_names_are_the_models(kind: type[AuthorizationPolicy | PeerAuthentication]) -> None:
    made = next(definition for definition in crds.definitions() if definition.kind == kind.KIND)
    served = [f"{made.group}/{version}" for version in made.versions]
    assert served == [kind.API_VERSION, *kind.API_VERSIONS]
    assert (made.plural, made.short, made.namespaced) == (kind.PLURAL, kind.SHORT, kind.NAMESPACED)


def test_newest_version_is_stored() -> None:
    stored = {definition.kind: definition.versions[0] for definition in crds.definitions()}
    assert stored["VirtualService"] == "v1"
    assert stored["ServiceProfile"] == "v1alpha2"
    assert stored["TrafficSplit"] == "v1alpha4"


def test_gateway_api_is_told_apart_from_the_real_one() -> None:
    for definition in crds.gateway_api():
        made = definition.object()
        assert made["metadata"]["annotations"]["api-approved.kubernetes.io"].startswith("unapproved")
        assert made["metadata"]["labels"] == crds.PART_OF


def test_kustomizations_name_every_file() -> None:
    for kustomization in MANIFESTS.rglob("kustomization.yaml"):
        listed = yaml.safe_load(kustomization.read_text())["resources"]
        beside = {path.name for path in kustomization.parent.glob("*.yaml")} - {"kustomization.yaml"}
        assert beside == {name for name in listed if name.endswith(".yaml")}, kustomization
