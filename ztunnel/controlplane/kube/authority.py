"""The certificate authority of a cluster: kept in Secrets (ca_secrets.py), the same for all replicas.

Keys are in memory only, never in a file. `SharedAuthority` is what every replica runs, `lead` what the leader runs.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import trio

from ztunnel.controlplane.kube import ca_secrets, ca_state
from ztunnel.controlplane.kube.ca_secrets import CRL, OPERATORS, OWN, STATE, TIMEOUT
from ztunnel.controlplane.kube.ca_state import Replica, State
from ztunnel.controlplane.kube.mirror import Mirror, Name
from ztunnel.controlplane.revoking import counted, judge, revoked_signer
from ztunnel.identity import crl
from ztunnel.identity.ca import Authority, Lifetimes, fingerprint
from ztunnel.identity.errors import AuthorityError, CertificateError
from ztunnel.store.kube.api import Api
from ztunnel.store.kube.errors import ApiError
from ztunnel.telemetry.log import fields

logger = logging.getLogger("controlplane.ca")

ACKNOWLEDGED: Final = "replica.ca.ambient.mesh/"
"""Prefix of annotations of the state: what each replica does."""

LOOK: Final = 2.0  # seconds between looks while a change goes on
REST: Final = 60.0  # the same while nothing changes, and between looks for replicas that are gone
SOON: Final = 30 * 86400  # seconds: an authority that ends within them is warned about
_MOST_NAME: Final = 63


class SharedAuthority:
    """What one replica knows of the authority, and does. Made by `connect`; used in trio's thread."""

    def __init__(
        self,
        api: Api,
        namespace: str,
        state: State,
        *,
        replica: str,
        uid: str = "",
        lifetimes: Lifetimes,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`replica` is this pod's name, `uid` its uid ("": this is no pod, so nobody can see that it has gone)."""
        self._api = api
        self._namespace = namespace
        self._state = state
        self._annotation = ACKNOWLEDGED + replica[-_MOST_NAME:].strip("-._")
        self._uid = uid
        self._lifetimes = lifetimes
        self._now = now
        self._since = 0.0  # it signed in no other way before
        self._wanted: Authority | None = None
        self._waiting: list[str] = []
        self._problems: dict[str, str] = {}  # by Secret
        self._on_change: list[Callable[[], None]] = []
        self._acknowledge = trio.Event()
        self._acknowledge.set()
        self._look = trio.Event()
        self._acknowledged = trio.Event()
        self._operators_seen = False
        self._looked_for_gone = -float("inf")
        self.mirrors = {
            name: Mirror(
                api,
                f"/api/v1/namespaces/{namespace}/secrets",
                {"fieldSelector": f"metadata.name={name}"},
                f"Secret {namespace}/{name}",
                self._changed,
            )
            for name in (OPERATORS, OWN, STATE)
        }

    @property
    def authority(self) -> Authority:
        """The authority that signs now, with the roots to be told."""
        return self._state.answering

    @property
    def bundle(self) -> bytes:
        """The roots that everybody is to trust now, PEM."""
        return self._state.answering.root_pem

    @property
    def revocations(self) -> bytes:
        """The revocation lists that everybody is to honour now, PEM."""
        return self._state.revocations

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call this whenever another authority signs, other roots are told, or something else is revoked."""
        self._on_change.append(callback)

    def issued(self, authority: Authority, holder: str, identity: str, not_after: float) -> None:
        """A certificate was given out: nothing is remembered of it, for no replica knows of the others'."""

    def status(self) -> dict[str, Any]:
        """What `ambient ca status` shows, as JSON; no key is in it."""
        succession, now = self._state.succession, self._now()
        wanted = self._wanted or succession.signing
        return {
            "at": now,
            "phase": ca_state.phase(self._state, wanted),
            "waiting": "; ".join(self._waiting),
            "signing": _described(succession.signing),
            "wanted": _described(wanted),
            "roots": [
                {
                    "subject": root.certificate.subject.rfc4514_string(),
                    "serial": f"{root.certificate.serial_number:x}",
                    "not_before": root.certificate.not_valid_before_utc.timestamp(),
                    "not_after": root.certificate.not_valid_after_utc.timestamp(),
                    "sha256": fingerprint(root.certificate),
                    "since": root.since or None,
                    "retired": root.retired,
                }
                for root in succession.roots.values()
            ],
            "lifetimes": {"default": self._lifetimes.default, "most": self._lifetimes.most},
            "revocations": crl.describe(self.revocations),
            "replicas": {
                one.name: {"does": one.digest == self._state.digest, "since": one.at or None}
                for one in self._replicas().values()
            },
            "problems": [
                *self._problems.values(),
                *filter(None, [revoked_signer(self.revocations, succession)]),
            ],
        }

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Do what the shared state says, and acknowledge it, until cancelled.

        Started once this replica is known to the others: before that it must not sign.
        """
        async with trio.open_nursery() as nursery:
            for mirror in self.mirrors.values():
                nursery.start_soon(mirror.run)
            while not self.mirrors[STATE].synced:
                await trio.sleep(0.02)
            nursery.start_soon(self._acknowledge_changes)
            await self._acknowledged.wait()
            task_status.started()

    async def leave(self) -> None:
        """Nobody has to wait for this replica any more: it has signed its last."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + TIMEOUT):
            try:
                await trio.to_thread.run_sync(self._annotate, None)
            except ApiError as error:
                logger.debug("cannot sign off: %s", error)

    async def lead(self) -> None:
        """Lead changes of the authority through, until cancelled. Raises ApiError."""
        for name in (OPERATORS, OWN, STATE):
            while not self.mirrors[name].synced:
                await trio.sleep(0.05)
        while True:
            self._look = trio.Event()
            wanted = self._find_wanted()
            if wanted is not None:
                await self._lead_once(wanted)
            changing = bool(self._waiting) or self._wanted is not wanted
            with trio.move_on_after(LOOK if changing else REST):
                await self._look.wait()
            await trio.sleep(0.05)  # what comes together is looked at together

    # Every replica.

    def _changed(self, names: frozenset[Name]) -> None:
        self._look.set()
        if (self._namespace, STATE) not in names:
            return
        secret = self.mirrors[STATE].objects.get((self._namespace, STATE))
        if secret is None:
            self._tell(STATE, f"Secret {self._namespace}/{STATE} is gone; the leader makes it again")
            return
        try:
            state = ca_secrets.state_of(secret, self._namespace, self._now(), self._lifetimes)
        except AuthorityError as error:
            self._tell(STATE, f"{error}; what signed until now goes on")
            return
        self._problems.pop(STATE, None)
        self._adopt(state)

    def _adopt(self, state: State) -> None:
        before, self._state = self._state, state
        if before.revocations != state.revocations:
            logger.info("revocation list changed", extra=fields(**counted(state.revocations)))
        if before.digest != state.digest:
            self._since = self._now()
            logger.info(
                "the certificate authority changes",
                extra=fields(
                    signing=fingerprint(state.succession.signing.certificate)[:16],
                    roots=len(state.succession.roots),
                ),
            )
            self._acknowledge.set()
        elif self._annotation not in _annotations(self.mirrors[STATE].objects):
            self._acknowledge.set()
        if (before.digest, before.revocations) != (state.digest, state.revocations):
            for callback in self._on_change:
                callback()

    async def _acknowledge_changes(self) -> None:
        while True:
            await self._acknowledge.wait()
            self._acknowledge = trio.Event()
            acknowledged = {
                "uid": self._uid,
                "digest": self._state.digest,
                "at": self._since,
                "most": self._lifetimes.most,
            }
            try:
                await trio.to_thread.run_sync(self._annotate, json.dumps(acknowledged))
            except ApiError as error:
                self._tell("", f"cannot acknowledge the state of the certificate authority: {error}")
                self._acknowledge.set()
                await trio.sleep(5)
            else:
                self._problems.pop("", None)
                self._acknowledged.set()

    def _annotate(self, value: str | None) -> None:
        merge = {"metadata": {"annotations": {self._annotation: value}}}
        try:
            self._api.patch("v1", "Secret", self._namespace, STATE, merge)
        except ApiError as error:
            if value is not None and error.not_found:
                # Somebody deleted it. A leader makes it again, but while all replicas begin there is none yet.
                ca_secrets.create(self._api, ca_secrets.made_of(self._namespace, self._state))
            raise

    def _replicas(self) -> dict[str, Replica]:
        """The replicas that sign, by their annotations."""
        found = {}
        for name, value in _annotations(self.mirrors[STATE].objects).items():
            if name.startswith(ACKNOWLEDGED):
                try:
                    one = json.loads(value)
                    known = str(one["uid"]), str(one["digest"]), float(one["at"]), float(one["most"])
                except (ValueError, KeyError, TypeError):
                    known = "", "", 0.0, 0.0  # not understood: waited for
                found[name] = Replica(name.removeprefix(ACKNOWLEDGED), *known)
        return found

    # The leader.

    def _find_wanted(self) -> Authority | None:
        """The authority that is to sign; None where that cannot be said now."""
        for name in (OPERATORS, OWN):
            secret = self.mirrors[name].objects.get((self._namespace, name))
            if secret is None:
                continue
            try:
                wanted = ca_state.authority_of(
                    ca_secrets.data_of(secret), f"{self._namespace}/{name}", self._lifetimes
                )
            except AuthorityError as error:
                self._tell(name, f"{error}; what signed until now goes on")
                return None
            self._problems.pop(name, None)
            if name == OPERATORS:
                self._operators_seen = True
            elif self._operators_seen:
                # It may be on its way back: replaced by deleting and creating it.
                self._tell(
                    OPERATORS,
                    f"Secret {self._namespace}/{OPERATORS} is gone; its authority goes on. To return to {OWN},"
                    " restart the control plane",
                )
                return None
            self._warn(wanted, name)
            return wanted
        return None

    def _find_revocations(self, state: State) -> bytes:
        """The lists that are to be in force: those beside the authority, or the last good ones."""
        found = [self.mirrors[name].objects.get((self._namespace, name)) for name in (OPERATORS, OWN)]
        secret = next(filter(None, found), {})
        where = f"Secret {self._namespace}/{OPERATORS if found[0] else OWN}: {CRL}"
        problem = ""
        revocations = None
        try:
            revocations = ca_secrets.revocations_of(secret)
            judge(revocations or b"", state.succession)
        except CertificateError as error:
            problem = f"{where}: {error}; the last list stays in force"
            revocations = None
        else:
            if revocations is None and state.revocations.strip():
                problem = f"{where}: it is gone, the last list stays in force; an empty one withdraws it"
        if problem:
            self._tell(CRL, problem)
        else:
            self._problems.pop(CRL, None)
        return state.revocations if revocations is None else revocations

    async def _lead_once(self, wanted: Authority) -> None:
        self._wanted = wanted
        secret = self.mirrors[STATE].objects.get((self._namespace, STATE))
        if secret is None:
            await trio.to_thread.run_sync(
                ca_secrets.create, self._api, ca_secrets.made_of(self._namespace, self._state)
            )
            return
        try:
            state = ca_secrets.state_of(secret, self._namespace, self._now(), self._lifetimes)
        except AuthorityError:
            return  # told of already
        replicas = self._replicas()
        gone: list[str] = []
        late = any(one.digest != state.digest for one in replicas.values())
        if late or trio.current_time() - self._looked_for_gone > REST:
            gone = await trio.to_thread.run_sync(self._gone, replicas)
            self._looked_for_gone = trio.current_time()
        state = ca_state.without(state, [replicas[name] for name in gone], self._now())
        present = [one for name, one in replicas.items() if name not in gone]
        following, self._waiting = ca_state.next_state(state, wanted, present, self._now())
        following = following._replace(revocations=self._find_revocations(following))
        if following.kept != state.kept or gone:
            await trio.to_thread.run_sync(self._write, secret, following, gone)

    def _gone(self, replicas: Mapping[str, Replica]) -> list[str]:
        """Those whose pod is no more: nobody signs as them. Raises ApiError."""
        gone = []
        for name, one in replicas.items():
            if name == self._annotation or not one.uid:
                continue
            pod = self._api.get("v1", "Pod", self._namespace, one.name)
            phase = ((pod or {}).get("status") or {}).get("phase")
            if pod is None or phase in ("Succeeded", "Failed") or pod["metadata"]["uid"] != one.uid:
                gone.append(name)
        return gone

    def _write(self, secret: dict[str, Any], state: State, gone: list[str]) -> None:
        metadata = secret["metadata"]
        annotations = {
            name: value for name, value in (metadata.get("annotations") or {}).items() if name not in gone
        }
        new = ca_secrets.made_of(self._namespace, state)
        # With the resourceVersion that was read: refused if a replica, or another leader, wrote meanwhile.
        new["metadata"] |= {"resourceVersion": metadata["resourceVersion"], "annotations": annotations}
        path = f"/api/v1/namespaces/{self._namespace}/secrets/{STATE}"
        try:
            self._api.request("PUT", path, body=new, timeout=TIMEOUT)
        except ApiError as error:
            if not error.conflict:
                raise
        else:
            logger.info("the state of the certificate authority is written", extra=fields(state=state.digest))

    # Telling.

    def _tell(self, name: str, problem: str) -> None:
        if self._problems.get(name) != problem:
            self._problems[name] = problem
            logger.error("%s", problem)

    def _warn(self, authority: Authority, name: str) -> None:
        if authority.not_after - self._now() < SOON:
            self._tell(
                f"{name} ends",
                f"the certificate authority of Secret {self._namespace}/{name} ends within 30 days: put its successor"
                " there",
            )
        else:
            self._problems.pop(f"{name} ends", None)


def _annotations(objects: Mapping[Name, dict[str, Any]]) -> dict[str, str]:
    for obj in objects.values():
        return dict(obj["metadata"].get("annotations") or {})
    return {}


def _described(authority: Authority) -> dict[str, Any]:
    certificate = authority.certificate
    return {
        "subject": certificate.subject.rfc4514_string(),
        "serial": f"{certificate.serial_number:x}",
        "not_before": certificate.not_valid_before_utc.timestamp(),
        "not_after": certificate.not_valid_after_utc.timestamp(),
        "sha256": fingerprint(certificate),
    }
