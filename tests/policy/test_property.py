"""Whatever valid policies say: the way through the mesh and the naive reading of their data agree."""

import copy
from typing import Any

import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.policy import naive
from tests.policy.cast import PODS, Cast
from tests.policy.naive import Caller, Target, Written

NAMESPACES = ["default", "production", "istio-system"]
ACCOUNTS = ["", "default/a", "default/b", "production/a", "istio-system/ab"]
SOURCES = ["10.1.0.1", "10.1.0.2", "10.2.0.1", "fd00:1::1"]
LABELS: list[dict[str, str]] = [
    {"app": "web"},
    {"app": "web", "tier": "front"},
    {"tier": "back"},
    {"app": "api-server"},
]

patterns = {
    "principals": [
        "cluster.local/ns/default/sa/a", "cluster.local/ns/default/*", "*/sa/a", "*", "cluster.local/ns/x/sa/y"
    ],
    "namespaces": ["default", "prod*", "*-system", "*", "x"],
    "serviceAccounts": ["a", "b", "production/a", "x/y"],
    "ipBlocks": ["10.1.0.0/16", "10.1.0.1", "10.0.0.0/8", "0.0.0.0/0", "::/0", "fd00:1::/32"],
    "ports": ["80", "443", "8080"],
    "destination.ip": ["10.244.1.10", "10.244.0.0/16", "fd00::/8"],
    "http": ["a", "/b"],
}  # fmt: skip


def some(of: str) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(patterns[of]), min_size=1, max_size=2, unique=True)


def fields(*names: str, http: tuple[str, ...]) -> st.SearchStrategy[dict[str, list[str]]]:
    """One to three fields, a third of them negated, HTTP's only now and then."""
    known = {name: some(name) for name in names} | {f"not{n[0].upper()}{n[1:]}": some(n) for n in names}
    seen = st.lists(st.sampled_from([*names, *known]), min_size=1, max_size=2, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries({name: known[name] for name in chosen})
    )
    unseen = st.sampled_from(http).flatmap(lambda name: st.fixed_dictionaries({name: some("http")}))
    return st.one_of(
        seen, seen, seen, seen, unseen, st.tuples(seen, unseen).map(lambda both: both[0] | both[1])
    )


source = st.one_of(
    fields("principals", "namespaces", "ipBlocks", http=("requestPrincipals",)),
    fields("serviceAccounts", "ipBlocks", http=("notRequestPrincipals",)),
)
operation = fields("ports", http=("methods", "notPaths", "hosts"))
KEYS = {
    "source.principal": "principals",
    "source.namespace": "namespaces",
    "source.serviceAccount": "serviceAccounts",
    "source.ip": "ipBlocks",
    "destination.ip": "destination.ip",
    "destination.port": "ports",
    "request.headers[x]": "http",
}


@st.composite
def condition(draw: st.DrawFn) -> dict[str, Any]:
    key = draw(st.sampled_from(list(KEYS)))
    parts = draw(st.sampled_from([["values"], ["notValues"], ["values", "notValues"]]))
    return {"key": key, **{part: draw(some(KEYS[key])) for part in parts}}


@st.composite
def rule(draw: st.DrawFn) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if draw(st.booleans()):
        made["from"] = [{"source": each} for each in draw(st.lists(source, min_size=1, max_size=2))]
    if draw(st.booleans()):
        made["to"] = [{"operation": each} for each in draw(st.lists(operation, min_size=1, max_size=2))]
    if draw(st.booleans()):
        made["when"] = draw(st.lists(condition(), min_size=1, max_size=2))
    return made


def selected(draw: st.DrawFn) -> dict[str, Any]:
    labels = draw(st.one_of(st.none(), st.sampled_from(LABELS)))
    return {} if labels is None else {"selector": {"matchLabels": labels}}


@st.composite
def authorization(draw: st.DrawFn) -> Written:
    spec: dict[str, Any] = selected(draw)
    action = draw(st.sampled_from(["", "ALLOW", "DENY", "DENY", "AUDIT"]))
    if action:
        spec["action"] = action
    rules = draw(st.lists(rule(), max_size=2))
    if rules:
        spec["rules"] = rules
    if "selector" not in spec and draw(st.integers(0, 9)) == 0:
        spec["targetRefs"] = [{"kind": "Service", "name": "web"}]
    name, namespace = draw(st.sampled_from("abc")), draw(st.sampled_from(NAMESPACES))
    return Written("AuthorizationPolicy", namespace, name, spec, dry_run=draw(st.integers(0, 7)) == 0)


@st.composite
def peer(draw: st.DrawFn) -> Written:
    modes = st.sampled_from(["STRICT", "STRICT", "PERMISSIVE", "DISABLE", "UNSET"])
    spec: dict[str, Any] = selected(draw)
    if draw(st.booleans()):
        spec["mtls"] = {"mode": draw(modes)}
    if "selector" in spec and draw(st.booleans()):
        ports = draw(st.sampled_from([[80], [443], [80, 443], [80, 443]]))
        spec["portLevelMtls"] = {port: {"mode": draw(modes)} for port in ports}
    name, namespace = draw(st.sampled_from("abc")), draw(st.sampled_from(NAMESPACES))
    return Written("PeerAuthentication", namespace, name, spec, made=draw(st.integers(1, 3)))


def text(objects: list[Written]) -> str:
    return yaml.safe_dump_all(
        {
            "apiVersion": "security.istio.io/v1",
            "kind": each.kind,
            "metadata": {
                "name": each.name,
                "namespace": each.namespace,
                "creationTimestamp": f"2025-01-0{each.made}T00:00:00Z" if each.made else "",
                "annotations": {"istio.io/dry-run": "true"} if each.dry_run else {},
            },
            "spec": each.spec,
        }
        for each in objects
    )


Connections = list[tuple[str, str, str, int]]
PORTS = [80, 443, 8080]
some_connections = st.lists(
    st.tuples(
        st.sampled_from(ACCOUNTS),
        st.sampled_from(SOURCES),
        st.sampled_from(["web", "db", "api", "gateway"]),
        st.sampled_from(PORTS),
    ),
    min_size=8,
    max_size=8,
    unique=True,
)
some_objects = st.lists(
    st.one_of(authorization(), authorization(), peer()), max_size=4, unique_by=lambda each: each[:3]
)


def expects(objects: list[Written], account: str, ip: str, pod: str, port: int) -> bool:
    member = PODS[pod]
    target = Target(member.namespace, member.labels, member.addresses[0], port)
    return naive.passes(objects, Caller(account, ip), target)


def agree(objects: list[Written], connections: Connections) -> None:
    through_the_mesh = Cast(text(objects))
    assert not through_the_mesh.faults
    for account, ip, pod, port in connections:
        verdict = through_the_mesh.outcome(f"{account or 'plain'}@{ip} > {pod}:{port}").verdict
        assert verdict.allowed is expects(objects, account, ip, pod, port), verdict


@settings(max_examples=200, deadline=None)
@given(some_objects, some_connections)
def test_both_agree(objects: list[Written], connections: Connections) -> None:
    agree(objects, connections)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        peer().map(lambda each: each._replace(namespace=each.namespace.replace("production", "default"))),
        min_size=1,
        max_size=6,
        unique_by=lambda each: each[:3],
    )
)
def test_both_agree_on_plaintext(objects: list[Written]) -> None:
    agree(objects, [("", SOURCES[0], pod, port) for pod in ("web", "db", "gateway") for port in PORTS])


JUNK: list[Any] = [5, -1, "", [], {}, True, "*x*", "x/y/z", ["a"], {"x": "y"}, "deny", "99999", "10.0.0.0/99"]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in the data, from the top down."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


@st.composite
def slip(draw: st.DrawFn, spec: Any) -> Any:
    """The data with one thing in it that should not be there: another value, or a field with another name."""
    slipped = copy.deepcopy(spec)
    path = draw(st.sampled_from(places(slipped)))
    if not path:
        return draw(st.sampled_from([5, "", [], {"x": slipped}]))
    parent = slipped
    for step in path[:-1]:
        parent = parent[step]
    if isinstance(parent, dict) and draw(st.booleans()):
        parent[f"{path[-1]}x"] = parent.pop(path[-1])
    else:
        parent[path[-1]] = draw(st.sampled_from(JUNK))
    return slipped


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.data(), some_objects, some_connections)
def test_a_slip_of_the_pen_never_opens_anything(
    data: st.DataObject, objects: list[Written], connections: Connections
) -> None:
    """What passes with a policy that has a fault passes with the policy as it was meant, too."""
    assume(objects)
    index = data.draw(st.integers(0, len(objects) - 1))
    meant = objects[index]
    # For a waypoint, or of an action that ztunnel does not know: what is meant is not enforced either.
    assume("targetRefs" not in meant.spec and meant.spec.get("action") != "AUDIT")
    slipped = meant._replace(spec=data.draw(slip(dict(meant.spec))))
    through_the_mesh = Cast(text([*objects[:index], slipped, *objects[index + 1 :]]))
    assume(through_the_mesh.faults)
    for account, ip, pod, port in connections:
        if through_the_mesh.outcome(f"{account or 'plain'}@{ip} > {pod}:{port}").verdict.allowed:
            assert expects(objects, account, ip, pod, port), (meant, slipped)
