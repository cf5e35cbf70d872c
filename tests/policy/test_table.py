"""What policies mean, as a table: a policy, connections, and whether they pass. The meaning is that of Istio's
documents of AuthorizationPolicy and PeerAuthentication for a proxy that sees connections only.

A row is `yes` or `no`, then SOURCE > POD:PORT (see cast.py). Each scene's policies are the whole of the mesh's.
"""

import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.policy.cast import PODS, cast


class Scene(NamedTuple):
    """Policies, and rows about them. `wrong` is how many errors are reported on them."""

    name: str
    policies: str
    rows: str
    wrong: int = 0


def allow(rules: str, name: str = "p", namespace: str = "default", **more: str) -> str:
    """An AuthorizationPolicy with action ALLOW."""
    return policy(f"rules:\n{indented(rules)}" if rules else "{}", name, namespace, **more)


def deny(rules: str, name: str = "p", namespace: str = "default", **more: str) -> str:
    """An AuthorizationPolicy with action DENY."""
    return policy(f"action: DENY\nrules:\n{indented(rules)}", name, namespace, **more)


def policy(spec: str, name: str = "p", namespace: str = "default", *, app: str = "", note: str = "") -> str:
    """An AuthorizationPolicy, for the pods of one app if that is given."""
    selector = f"selector: {{matchLabels: {{app: {app}}}}}\n" if app else ""
    return document("AuthorizationPolicy", name, namespace, selector + spec, note)


def peers(spec: str, name: str = "p", namespace: str = "default", *, app: str = "") -> str:
    """A PeerAuthentication, for the pods of one app if that is given."""
    selector = f"selector: {{matchLabels: {{app: {app}}}}}\n" if app else ""
    return document("PeerAuthentication", name, namespace, selector + spec)


def document(kind: str, name: str, namespace: str, spec: str, note: str = "") -> str:
    annotations = f", annotations: {{{note}}}" if note else ""
    return (
        f"---\napiVersion: security.istio.io/v1\nkind: {kind}\n"
        f"metadata: {{name: {name}, namespace: {namespace}{annotations}}}\nspec:\n{indented(spec)}\n"
    )


def indented(text: str) -> str:
    return textwrap.indent(textwrap.dedent(text).strip(), "  ")


ROOT = "istio-system"
STRICT = "mtls: {mode: STRICT}"
PERMISSIVE = "mtls: {mode: PERMISSIVE}"
SEED = Path(__file__).with_name("seed.yaml").read_text()

SCENES = [
    Scene("without policies everything passes", "", """
        yes  default/client > web:80
        yes  far.example:else/where > web:80
        yes  plain > web:80
    """),
    # --- who: principals
    Scene("principals: the whole identity", allow("""
        - from: [{source: {principals: [cluster.local/ns/default/sa/client]}}]
    """), """
        yes  default/client > web:80
        yes  default/client > db:5432
        no   default/client2 > web:80
        no   default/clien > web:80
        no   other/client > web:80
        no   far.example:default/client > web:80
        no   plain > web:80
        yes  plain > api:80
    """),
    Scene("principals: one of several", allow("""
        - from: [{source: {principals: [cluster.local/ns/a/sa/b, cluster.local/ns/c/sa/d]}}]
    """), """
        yes  a/b > web:80
        yes  c/d > web:80
        no   a/d > web:80
    """),
    Scene("principals: a beginning", allow("""
        - from: [{source: {principals: [cluster.local/ns/a/sa/*]}}]
    """), """
        yes  a/b > web:80
        yes  a/c > web:80
        no   ab/b > web:80
        no   far.example:a/b > web:80
        no   plain > web:80
    """),
    Scene("principals: an end", allow("""
        - from: [{source: {principals: ["*/sa/b"]}}]
    """), """
        yes  a/b > web:80
        yes  far.example:c/b > web:80
        no   a/bb > web:80
        no   plain > web:80
    """),
    Scene("principals: any at all", allow("""
        - from: [{source: {principals: ["*"]}}]
    """), """
        yes  a/b > web:80
        yes  far.example:c/d > web:80
        no   plain > web:80
    """),
    Scene("notPrincipals: all but these, those without identity too", allow("""
        - from: [{source: {notPrincipals: [cluster.local/ns/a/sa/b, "*/sa/c"]}}]
    """), """
        no   a/b > web:80
        no   x/c > web:80
        yes  a/d > web:80
        yes  plain > web:80
    """),
    Scene("DENY notPrincipals *: mutual TLS is demanded", deny("""
        - from: [{source: {notPrincipals: ["*"]}}]
    """), """
        yes  a/b > web:80
        no   plain > web:80
        yes  plain > api:80
    """),
    Scene("DENY principals", deny("""
        - from: [{source: {principals: [cluster.local/ns/a/sa/b]}}]
    """), """
        no   a/b > web:80
        yes  a/c > web:80
        yes  plain > web:80
    """),
    # --- who: namespaces
    Scene("namespaces", allow("""
        - from: [{source: {namespaces: [a, "team-*", "*-prod"]}}]
    """), """
        yes  a/x > web:80
        yes  team-blue/x > web:80
        yes  shop-prod/x > web:80
        no   b/x > web:80
        no   ateam-/x > web:80
        no   plain > web:80
    """),
    Scene("namespaces: any", allow("""
        - from: [{source: {namespaces: ["*"]}}]
    """), """
        yes  a/x > web:80
        no   plain > web:80
    """),
    Scene("DENY notNamespaces: only this one may", deny("""
        - from: [{source: {notNamespaces: [default]}}]
    """), """
        yes  default/x > web:80
        no   a/x > web:80
        no   plain > web:80
    """),
    # --- who: service accounts
    Scene("serviceAccounts: of the policy's namespace, or with one; of whatever trust domain", allow("""
        - from: [{source: {serviceAccounts: [client, other/theirs]}}]
    """), """
        yes  default/client > web:80
        yes  other/theirs > web:80
        yes  far.example:default/client > web:80
        no   other/client > web:80
        no   default/theirs > web:80
        no   plain > web:80
    """),
    Scene("DENY notServiceAccounts", deny("""
        - from: [{source: {notServiceAccounts: [client]}}]
    """), """
        yes  default/client > web:80
        no   default/x > web:80
        no   plain > web:80
    """),
    # --- where from
    Scene("ipBlocks: addresses and blocks, bits of the host ignored", allow("""
        - from: [{source: {ipBlocks: [10.1.2.3, 10.9.9.9/16, "fd00:1::/32"]}}]
    """), """
        yes  plain@10.1.2.3 > web:80
        no   plain@10.1.2.4 > web:80
        yes  plain@10.9.0.1 > web:80
        yes  a/b@10.9.255.255 > web:80
        no   a/b@10.10.0.0 > web:80
        yes  plain@fd00:1:ffff::1 > web:80
        no   plain@fd00:2::1 > web:80
        yes  plain@::ffff:10.1.2.3 > web:80
    """),
    Scene("DENY ipBlocks 0.0.0.0/0 is all of IPv4 and nothing of IPv6", deny("""
        - from: [{source: {ipBlocks: [0.0.0.0/0]}}]
    """), """
        no   a/b@10.1.2.3 > web:80
        yes  a/b@fd00::1 > web:80
    """),
    Scene("ipBlocks ::ffff:0:0/96 is IPv4", allow("""
        - from: [{source: {ipBlocks: ["::ffff:10.0.0.0/104"]}}]
    """), """
        yes  plain@10.200.0.1 > web:80
        no   plain@11.0.0.1 > web:80
    """),
    Scene("notIpBlocks", allow("""
        - from: [{source: {notIpBlocks: [10.1.0.0/16]}}]
    """), """
        no   plain@10.1.2.3 > web:80
        yes  plain@10.2.2.3 > web:80
        yes  plain@fd00::1 > web:80
    """),
    Scene("ipBlocks without those of notIpBlocks", allow("""
        - from: [{source: {ipBlocks: [10.0.0.0/8], notIpBlocks: [10.1.0.0/16]}}]
    """), """
        yes  plain@10.2.0.1 > web:80
        no   plain@10.1.0.1 > web:80
        no   plain@11.0.0.1 > web:80
    """),
    # --- where to
    Scene("ports", allow("""
        - to: [{operation: {ports: ["80", "8080"]}}]
    """), """
        yes  plain > web:80
        yes  a/b > web:8080
        no   a/b > web:81
    """),
    Scene("DENY notPorts", deny("""
        - to: [{operation: {notPorts: ["80"]}}]
    """), """
        yes  a/b > web:80
        no   a/b > web:443
    """),
    Scene("several operations are alternatives", allow("""
        - to: [{operation: {ports: ["80"]}}, {operation: {ports: ["90", "91"], notPorts: ["91"]}}]
    """), """
        yes  a/b > web:80
        yes  a/b > web:90
        no   a/b > web:91
    """),
    # --- when
    Scene("when source.principal", allow("""
        - when: [{key: source.principal, values: [cluster.local/ns/a/*], notValues: ["*/sa/bad"]}]
    """), """
        yes  a/b > web:80
        no   a/bad > web:80
        no   b/b > web:80
        no   plain > web:80
    """),
    Scene("when source.namespace", allow("""
        - when: [{key: source.namespace, values: [a, b]}]
    """), """
        yes  a/x > web:80
        no   c/x > web:80
    """),
    Scene("when source.namespace notValues", deny("""
        - when: [{key: source.namespace, notValues: [a]}]
    """), """
        yes  a/x > web:80
        no   c/x > web:80
        no   plain > web:80
    """),
    Scene("when source.serviceAccount", allow("""
        - when: [{key: source.serviceAccount, values: [client, a/b]}]
    """), """
        yes  default/client > web:80
        yes  a/b > web:80
        no   a/client > web:80
    """),
    Scene("when source.ip", allow("""
        - when: [{key: source.ip, values: [10.0.0.0/8], notValues: [10.1.2.3]}]
    """), """
        yes  plain@10.1.2.4 > web:80
        no   plain@10.1.2.3 > web:80
        no   plain@192.0.2.1 > web:80
    """),
    Scene("when destination.ip", allow("""
        - when: [{key: destination.ip, values: [10.244.1.10]}]
    """), """
        yes  a/b > web:80
        no   a/b > web@fd00:10:244:1::10:80
        no   a/b > db:80
    """),
    Scene("when destination.ip notValues", allow("""
        - when: [{key: destination.ip, notValues: [10.244.0.0/16]}]
    """), """
        no   a/b > web:80
        yes  a/b > web@fd00:10:244:1::10:80
    """),
    Scene("when destination.port", deny("""
        - when: [{key: destination.port, values: ["22", "23"]}]
    """), """
        no   a/b > web:22
        no   a/b > web:23
        yes  a/b > web:80
    """),
    Scene("all conditions must hold", allow("""
        - when:
          - {key: destination.port, values: ["80"]}
          - {key: source.namespace, values: [a]}
    """), """
        yes  a/x > web:80
        no   a/x > web:81
        no   b/x > web:80
    """),
    # --- and, or
    Scene("within a source everything must hold, sources are alternatives", allow("""
        - from:
          - source: {namespaces: [a], ipBlocks: [10.1.0.0/16]}
          - source: {principals: [cluster.local/ns/b/sa/c]}
    """), """
        yes  a/x@10.1.0.1 > web:80
        no   a/x@10.2.0.1 > web:80
        no   c/x@10.1.0.1 > web:80
        yes  b/c@10.9.0.1 > web:80
    """),
    Scene("from, to and when must hold together", allow("""
        - from: [{source: {namespaces: [a]}}]
          to: [{operation: {ports: ["80"]}}]
          when: [{key: source.ip, notValues: [10.6.6.6]}]
    """), """
        yes  a/x > web:80
        no   b/x > web:80
        no   a/x > web:81
        no   a/x@10.6.6.6 > web:80
    """),
    Scene("rules are alternatives", allow("""
        - from: [{source: {namespaces: [a]}}]
        - to: [{operation: {ports: ["443"]}}]
    """), """
        yes  a/x > web:80
        yes  b/x > web:443
        no   b/x > web:80
    """),
    Scene("an empty rule matches everything", allow("- {}"), """
        yes  a/b > web:80
        yes  plain > web:80
    """),
    Scene("DENY of an empty rule denies everything", deny("- {}"), """
        no   a/b > web:80
        no   plain > web:80
        yes  a/b > api:80
    """),
    # --- together
    Scene("an empty spec allows nothing", policy("{}"), """
        no   default/client > web:80
        no   plain > web:80
        yes  default/client > api:80
    """),
    Scene("DENY without rules denies nothing", policy("action: DENY"), """
        yes  a/b > web:80
    """),
    Scene("what one ALLOW policy allows, another one does not take away",
          policy("{}", "nothing") + allow("- from: [{source: {namespaces: [a]}}]", "a"), """
        yes  a/x > web:80
        no   b/x > web:80
    """),
    Scene("ALLOW policies add up", allow("- from: [{source: {namespaces: [a]}}]", "a")
          + allow("- to: [{operation: {ports: ['443']}}]", "b"), """
        yes  a/x > web:80
        yes  b/x > web:443
        no   b/x > web:80
    """),
    Scene("DENY wins over ALLOW", allow("- {}", "all") + deny("- from: [{source: {namespaces: [bad]}}]", "bad"), """
        yes  a/x > web:80
        no   bad/x > web:80
    """),
    Scene("not to be denied is not to be allowed",
          allow("- from: [{source: {namespaces: [a]}}]", "a") + deny("- to: [{operation: {ports: ['22']}}]", "ssh"), """
        yes  a/x > web:80
        no   a/x > web:22
        no   b/x > web:80
    """),
    # --- for whom
    Scene("a selector picks pods of the policy's namespace", allow("""
        - from: [{source: {namespaces: [a]}}]
    """, app="web"), """
        no   b/x > web:80
        yes  a/x > web:80
        yes  b/x > db:80
        yes  b/x > old:80
    """),
    Scene("all labels of a selector must be there", policy("""
        selector: {matchLabels: {app: web, tier: back}}
    """) + policy("selector: {matchLabels: {app: db, tier: back}}", "q"), """
        yes  a/x > web:80
        no   a/x > db:80
    """),
    Scene("an empty selector picks the whole namespace", policy("selector: {}"), """
        no   a/x > web:80
        no   a/x > db:80
        yes  a/x > api:80
    """),
    Scene("the root namespace's policies are for all namespaces", deny("""
        - from: [{source: {namespaces: [bad]}}]
    """, namespace=ROOT), """
        no   bad/x > web:80
        no   bad/x > api:80
        no   bad/x > gateway:80
        yes  good/x > api:80
    """),
    Scene("its selector picks pods of all namespaces", deny("- {}", namespace=ROOT, app="web"), """
        no   a/x > web:80
        no   a/x > old:80
        yes  a/x > db:80
    """),
    Scene("a DENY of the root namespace stands above what a namespace allows",
          deny("- from: [{source: {namespaces: [bad]}}]", namespace=ROOT) + allow("- {}"), """
        no   bad/x > web:80
        yes  a/x > web:80
    """),
    Scene("an ALLOW of the root namespace adds to what a namespace allows",
          allow("- from: [{source: {namespaces: [monitoring]}}]", namespace=ROOT)
          + allow("- from: [{source: {namespaces: [a]}}]"), """
        yes  monitoring/x > web:80
        yes  a/x > web:80
        no   b/x > web:80
        no   b/x > api:80
    """),
    # --- what only HTTP knows
    Scene("an ALLOW rule that needs HTTP allows nothing", allow("""
        - to: [{operation: {methods: [GET], ports: ["80"]}}]
        - from: [{source: {namespaces: [a]}}]
    """), """
        no   b/x > web:80
        yes  a/x > web:80
    """),
    *(Scene(f"an ALLOW rule that needs {field} allows nothing", allow(f"- {part}: [{{{inner}: {{{field}: {value}}}}}]"),
            "no   a/x > web:80")
      for part, inner, field, value in (
          ("to", "operation", "hosts", "[a]"), ("to", "operation", "notHosts", "[a]"),
          ("to", "operation", "notMethods", "[GET]"), ("to", "operation", "paths", "[/a]"),
          ("to", "operation", "notPaths", "[/a]"), ("from", "source", "requestPrincipals", '["*"]'),
          ("from", "source", "notRequestPrincipals", '["*"]'), ("from", "source", "remoteIpBlocks", "[10.0.0.0/8]"),
          ("from", "source", "notRemoteIpBlocks", "[192.0.2.1]"),
      )),
    *(Scene(f"an ALLOW rule that needs {key} allows nothing, and a DENY rule of it denies everything",
            allow(f"- when: [{{key: '{key}', values: ['10.0.0.0/8']}}]", app="web")
            + deny(f"- when: [{{key: '{key}', notValues: ['10.0.0.0/8']}}]", "q", app="db"),
            "no   a/x > web:80\nno   a/x > db:80")
      for key in ("request.headers[x]", "request.auth.claims[iss]", "request.auth.principal",
                  "request.auth.audiences", "request.auth.presenter", "remote.ip", "connection.sni")),
    Scene("a DENY rule keeps what is left of it", deny("""
        - from: [{source: {namespaces: [a], requestPrincipals: ["*"]}}]
          to: [{operation: {methods: [DELETE], ports: ["80"]}}]
    """), """
        no   a/x > web:80
        yes  b/x > web:80
        yes  a/x > web:81
    """),
    Scene("a DENY rule of nothing but HTTP denies everything", deny("""
        - to: [{operation: {paths: [/admin]}}]
    """), """
        no   a/x > web:80
        no   plain > web:443
        yes  a/x > api:80
    """),
    Scene("one source that cannot be known may be anybody", deny("""
        - from: [{source: {requestPrincipals: ["*"]}}, {source: {namespaces: [a]}}]
          to: [{operation: {ports: ["80"]}}]
    """), """
        no   b/x > web:80
        yes  a/x > web:81
    """),
    # --- what is wrong is never open
    Scene("an ALLOW rule with a fault allows nothing, the others count", allow("""
        - from: [{source: {ipBlocks: [10.0.0.0/33, 10.1.0.0/16]}}]
        - from: [{source: {namespaces: [a]}}]
    """), """
        no   b/x@10.1.0.1 > web:80
        yes  a/x > web:80
    """, 1),
    Scene("a DENY field with a fault denies whatever it may have meant", deny("""
        - from: [{source: {ipBlocks: [10.0.0.0/33, 10.1.0.0/16], namespaces: [a]}}]
    """), """
        no   a/x@192.0.2.1 > web:80
        yes  b/x@10.1.0.1 > web:80
    """, 1),
    Scene("an unknown field of a DENY source", deny("- from: [{source: {principal: [a]}}]"), "no  a/x > web:80", 1),
    Scene("an unknown field of an operation", allow("- to: [{operation: {port: ['80']}}]"), "no  a/x > web:80", 1),
    Scene("an unknown key", deny("- when: [{key: source.name, values: [a]}]"), "no  a/x > web:80", 1),
    Scene("an unknown key of an ALLOW rule", allow("- when: [{key: source.name, values: [a]}]"), "no  a/x > web:80", 1),
    Scene("an empty list of principals is nobody, not everybody", allow("- from: [{source: {principals: []}}]"),
          "no   a/x > web:80\nno   plain > web:80", 1),
    Scene("an empty text", allow("- from: [{source: {namespaces: ['']}}]"), "no  plain > web:80", 1),
    Scene("a port out of range", deny("- to: [{operation: {ports: ['80', '99999']}}]"), "no  a/x > web:443", 1),
    Scene("a port that is no text", allow("- to: [{operation: {ports: [80]}}]"), "no   a/x > web:80", 1),
    Scene("an unknown action denies everything", policy("action: Deny\nrules: [{to: [{operation: {ports: ['22']}}]}]"),
          "no   a/x > web:80\nyes  a/x > api:80", 1),
    Scene("rules that are misspelt", policy("action: DENY\nrule: [{}]"), "no  a/x > web:80", 1),
    Scene("a selector that is not understood selects the namespace",
          policy("selector: {matchLabel: {app: db}}\naction: DENY\nrules: [{to: [{operation: {ports: ['22']}}]}]"),
          "no   a/x > web:80\nyes  a/x > api:80", 1),
    Scene("a principal with its scheme", allow("- from: [{source: {principals: ['spiffe://cluster.local/ns/a/sa/x']}}]"),
          "no   a/x > web:80", 1),
    Scene("service accounts and principals in one source",
          deny("- from: [{source: {serviceAccounts: [x], principals: [cluster.local/ns/a/sa/x]}}]"),
          "no   a/x > web:80", 1),
    Scene("other policies are not affected",
          allow("- from: [{source: {ipBlocks: [x]}}]", "bad", app="db") + allow("- {}", "good", app="web"),
          "yes  a/x > web:80\nno   a/x > db:80", 1),
    # --- what ztunnel does not enforce
    Scene("a CUSTOM action has no effect", policy("action: CUSTOM\nprovider: {name: opa}\nrules: [{}]"),
          "yes  a/x > web:80"),
    Scene("an AUDIT action has no effect", policy("action: AUDIT\nrules: [{}]"), "yes  a/x > web:80"),
    Scene("a policy for a waypoint is the waypoint's", policy("targetRefs: [{kind: Service, group: '', name: web}]"),
          "yes  a/x > web:80"),
    # --- dry run
    Scene("a dry run denies nothing", deny("- {}", note='istio.io/dry-run: "true"'), "yes  a/x > web:80"),
    Scene("a dry run of ALLOW limits nobody", policy("{}", note='istio.io/dry-run: "true"'), "yes  a/x > web:80"),
    Scene("a dry run allows nobody either",
          allow("- {}", "dry", note='istio.io/dry-run: "true"') + policy("{}", "real"), "no   a/x > web:80"),
    Scene("a dry run that says false", deny("- {}", note='istio.io/dry-run: "false"'), "no   a/x > web:80"),
    Scene("a dry run of DENY that says something else", deny("- {}", note='istio.io/dry-run: "yes"'),
          "no  a/x > web:80", 1),
    Scene("a dry run of ALLOW that says something else",
          allow("- {}", note='istio.io/dry-run: "yes"') + allow("- from: [{source: {namespaces: [b]}}]", "q"),
          "no   a/x > web:80\nyes  b/x > web:80", 1),
    # --- PeerAuthentication
    Scene("STRICT of the mesh", peers(STRICT, namespace=ROOT), """
        no   plain > web:80
        no   plain > api:80
        no   plain > gateway:80
        yes  a/x > web:80
        yes  far.example:a/x > api:80
    """),
    Scene("STRICT of a namespace", peers(STRICT), """
        no   plain > web:80
        no   plain > db:80
        yes  plain > api:80
        yes  a/x > web:80
    """),
    Scene("STRICT of a workload", peers(STRICT, app="web"), """
        no   plain > web:80
        yes  plain > db:80
        yes  plain > old:80
    """),
    Scene("the nearest counts: PERMISSIVE under STRICT", peers(STRICT, namespace=ROOT) + peers(PERMISSIVE), """
        yes  plain > web:80
        no   plain > api:80
    """),
    Scene("the nearest counts: a workload's", peers(STRICT) + peers(PERMISSIVE, "w", app="web"), """
        yes  plain > web:80
        no   plain > db:80
    """),
    Scene("UNSET inherits",
          peers(STRICT, namespace=ROOT) + peers("mtls: {mode: UNSET}") + peers("mtls: {}", "w", app="web"), """
        no   plain > web:80
        no   plain > db:80
    """),
    Scene("DISABLE takes plaintext, and mutual TLS", peers(STRICT, namespace=ROOT) + peers("mtls: {mode: DISABLE}"), """
        yes  plain > web:80
        yes  a/x > web:80
    """),
    Scene("a port that takes plaintext",
          peers(f"{STRICT}\nportLevelMtls: {{8080: {{mode: PERMISSIVE}}}}", app="web"), """
        yes  plain > web:8080
        no   plain > web:80
        yes  a/x > web:80
        yes  plain > db:80
    """),
    Scene("a port that does not", peers(f"{PERMISSIVE}\nportLevelMtls: {{443: {{mode: STRICT}}}}", app="web"), """
        no   plain > web:443
        yes  plain > web:80
        yes  a/x > web:443
    """),
    Scene("ports under an inherited mode", peers(STRICT, namespace=ROOT)
          + peers("portLevelMtls: {80: {mode: DISABLE}, 90: {mode: UNSET}, 91: {mode: STRICT}}", app="web"), """
        yes  plain > web:80
        no   plain > web:90
        no   plain > web:91
        no   plain > web:92
    """),
    Scene("a PeerAuthentication with a fault is STRICT", peers("mtls: {mode: strict}"), """
        no   plain > web:80
        yes  a/x > web:80
        yes  plain > api:80
    """, 1),
    Scene("whatever others say", peers("mtls: {mode: ON}", app="web") + peers(PERMISSIVE, "q"), """
        no   plain > web:80
        yes  plain > db:80
    """, 1),
    Scene("ports of a whole namespace are a fault", peers(f"{PERMISSIVE}\nportLevelMtls: {{80: {{mode: PERMISSIVE}}}}"),
          "no   plain > web:80", 1),
    Scene("STRICT and an ALLOW policy", peers(STRICT) + allow("- to: [{operation: {ports: ['80']}}]"), """
        no   plain > web:80
        yes  a/x > web:80
        no   a/x > web:81
    """),
    Scene("an ALLOW of everything does not open STRICT", peers(STRICT) + allow("- {}"), """
        no   plain > web:80
        yes  a/x > web:80
    """),
    # --- the documents of the seed
    Scene("the seed's example", SEED, """
        no   plain > web:80
        yes  default/client > web:80
        no   default/productpage > reviews:9080
        no   default/client > reviews:9080
        no   production/frontend > api:8080
        no   production/frontend > batch:8080
        no   plain > batch:8080
        yes  plain > old:80
        yes  default/client > old:80
    """),
]  # fmt: skip

ROWS = [
    pytest.param(scene, words[0] == "yes", " ".join(words[1:]), id=f"{scene.name}: {' '.join(words)}")
    for scene in SCENES
    for words in (row.split() for row in scene.rows.strip().splitlines())
]


@pytest.mark.parametrize(("scene", "passes", "connection"), ROWS)
def test_table(scene: Scene, passes: bool, connection: str) -> None:
    assert cast(scene.policies).outcome(connection).verdict.allowed is passes


def test_the_table_is_large_and_its_faults_are_told() -> None:
    assert len(ROWS) >= 150
    assert {str(param.values[2]).split("> ")[1].split(":")[0].split("@")[0] for param in ROWS} == set(PODS)
    for scene in SCENES:
        assert len(cast(scene.policies).faults) == scene.wrong, (scene.name, cast(scene.policies).faults)


def test_what_a_dry_run_would_have_done() -> None:
    note = 'istio.io/dry-run: "true"'
    denying = cast(deny("- to: [{operation: {ports: ['22']}}]", note=note))
    assert denying.outcome("a/x > web:22").rehearsed == (False, "default/p", 0)
    assert denying.outcome("a/x > web:80").rehearsed.allowed
    limiting = cast(allow("- from: [{source: {namespaces: [a]}}]", note=note))
    assert limiting.outcome("a/x > web:80").rehearsed == (True, "default/p", 0)
    assert limiting.outcome("b/x > web:80").rehearsed == (False, "", -1)
    assert limiting.outcome("b/x > web:80").verdict.allowed
