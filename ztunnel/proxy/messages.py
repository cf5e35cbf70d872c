"""What the control process and its workers say to each other: msgspec structs, MessagePack, and descriptors beside.

The worker asks where a destination is and remembers the answer until it is told to forget it; it is told which
pods are its own, with their namespaces and listening sockets, and which certificates to use.
"""

import msgspec

from ztunnel.mesh.policy import Authorization
from ztunnel.mesh.route import Route
from ztunnel.telemetry.counting import PodTraffic


class Message(msgspec.Struct, tag=True, array_like=True):
    """The base of all messages; the type's name is the tag."""


# control process -> worker


class AddPod(Message):
    """Serve this pod. Descriptors: its network namespace, then the listeners of `ports` in that order.

    `pod` is its number: a pod that left and comes back is another, with the same uid. `siblings` are the inodes of
    all workers' listeners on port 15008 there: another one that listens beside them is a successor's.
    """

    pod: int
    uid: str
    name: str
    namespace: str
    identity: str
    ports: tuple[int, ...]
    siblings: tuple[int, ...] = ()


class PodWaypoints(Message):
    """The identities whose word for a connection's original source counts at this pod: its waypoints'."""

    pod: int
    identities: tuple[str, ...]


class DeletePod(Message):
    """Accept no more for this pod; connections that are open go on."""

    pod: int


class DropPod(Message):
    """The pod is gone: end what is left of its connections."""

    pod: int


class UseCertificate(Message):
    """The certificate to use for an identity from now on, in handshakes that begin after this."""

    identity: str
    certificate: bytes


class ForgetCertificate(Message):
    """No certificate any more: it ended and none followed. Tunnels are refused until another comes."""

    identity: str
    reason: str


# Revocation.


class UseRevocations(Message):
    """The revocation lists (PEM, empty for none) to honour; certificates follow anew, for contexts with them."""

    lists: bytes


class RouteAnswer(Message):
    """The answer to AskRoute `query`. `remember` is False where the answer may be another the next moment."""

    query: int
    route: Route
    remember: bool = True


class ForgetRoutes(Message):
    """Forget the routes with any of these tags; all routes if there are none."""

    tags: tuple[str, ...] = ()


class Drain(Message):
    """Accept no more, tell tunnels' peers to go elsewhere (GOAWAY), end by yourself after `grace` seconds at most."""

    grace: float


class SetLevel(Message):
    """Log from this level on."""

    level: str


class AskStats(Message):
    """Send a Stats."""

    query: int


# Telemetry: what the control process asks and answers.


class AskTraffic(Message):
    """Send a Traffic now, with what has happened until now."""

    query: int


class PeerAnswer(Message):
    """The answer to AskPeer `query`: the source's pod and the service asked for, empty where not known.

    It holds until one of its `tags` is told by ForgetRoutes.
    """

    query: int
    workload: str
    namespace: str
    service: str
    tags: tuple[str, ...]


# worker -> control process


class PodAdded(Message):
    """The listeners of this pod are served; or `error` says why not."""

    pod: int
    error: str = ""


class AskRoute(Message):
    """Where does a connection of pod `uid` to `address` (packed; at a waypoint the authority) and `port` go?"""

    query: int
    uid: str
    address: bytes
    port: int


class PodLeft(Message):
    """Nothing is accepted for a deleted pod any more, and the other ends of its tunnels have been told."""

    pod: int


class PodIdle(Message):
    """A deleted pod has no connection left here."""

    pod: int


class Stats(Message):
    """What a worker holds and did. Bytes are since its start; `buffered` is what waits for slow readers now,
    for applications (of which BUFFER_LIMIT is the most) and in tunnels."""

    query: int
    pid: int
    pods: int
    connections: int
    tunnels_out: int
    tunnels_in: int
    routes: int
    buffered: int
    opened: int
    closed: int
    failed: int
    bytes_sent: int
    bytes_received: int


# for the debug pages: what a worker tells of itself (proxy/inspect.py)


class Inspect(Message):
    """Show something of yourself: tasks, memory, profile, connections or tunnels; `options` are its own."""

    query: int
    what: str
    options: dict[str, str]


class Inspected(Message):
    """A part of the answer to Inspect `query`, JSON. The last one has `more` False, and says what went wrong."""

    query: int
    body: bytes = b""
    more: bool = False
    error: str = ""


class Tap(Message):
    """Send a Tapped for each connection that begins or ends, or no more."""

    on: bool


class Tapped(Message):
    """Connections that began or ended, a line of JSON each; `lost` is how many more there were."""

    lines: bytes
    lost: int = 0


class AskPeer(Message):
    """Who is the client at `address` (text), and which service of this pod has the application's `port`?"""

    query: int
    pod_namespace: str
    pod_name: str
    address: str
    port: int


class Traffic(Message):
    """What connections did since the last one. `queries` are the AskTraffic that it answers, `dropped` counts log lines
    that could not be written."""

    queries: list[int]
    pods: list[PodTraffic]
    dropped: int


# policies (proxy/distribution.py, proxy/enforcement.py): what comes takes effect together, with PoliciesSettled


class Policies(Message):
    """A group of policies changed: these are new or different, and those (by key) are no longer in it."""

    group: int
    put: tuple[Authorization, ...] = ()
    dropped: tuple[str, ...] = ()


class ForgetPolicies(Message):
    """No pod is concerned by this group any more."""

    group: int


class PodPolicies(Message):
    """The pod is concerned by the policies of these groups; or it is closed, for this reason."""

    pod: int
    groups: tuple[int, ...]
    closed: str = ""


class PoliciesSettled(Message):
    """The change that came in the messages before this one is complete."""


ToWorker = (
    AddPod
    | PodWaypoints
    | DeletePod
    | DropPod
    | UseCertificate
    | ForgetCertificate
    | UseRevocations
    | RouteAnswer
    | ForgetRoutes
    | Drain
    | SetLevel
    | AskStats
    | Inspect
    | Tap
    | AskTraffic
    | PeerAnswer
    | Policies
    | ForgetPolicies
    | PodPolicies
    | PoliciesSettled
)
FromWorker = PodAdded | AskRoute | PodLeft | PodIdle | Stats | Inspected | Tapped | AskPeer | Traffic
