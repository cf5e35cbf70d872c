"""Which authority replicas sign with while it changes: pure steps, with a clock of the test's own."""

import json
import time
from collections.abc import Callable

import pytest
from cryptography import x509

from ztunnel.controlplane.kube import ca_state
from ztunnel.controlplane.kube.ca_state import EndedError, Replica, State
from ztunnel.identity import keys, templates
from ztunnel.identity.ca import Authority, Lifetimes, pem
from ztunnel.identity.errors import AuthorityError
from ztunnel.identity.succession import SETTLE

HOUR = 3600.0
LIFE = Lifetimes(24 * 3600, 48 * 3600)
NOW = float(int(time.time()))  # authorities look at the clock of the machine


def authority(now: float = NOW) -> Authority:
    return Authority.create(now=lambda: now, lifetimes=LIFE)


def doing(state: State, *names: str, at: float = 0.0) -> list[Replica]:
    return [Replica(name, f"uid of {name}", state.digest, at, LIFE.most) for name in names]


def told(state: State) -> set[bytes]:
    return {pem([one]) for one in x509.load_pem_x509_certificates(state.answering.root_pem)}


def again(state: State, now: float) -> State:
    """As another process reads it."""
    return ca_state.parse(state.dump, "mesh/istio-ca-state", now, LIFE)


def test_nothing_changes_while_nothing_else_is_wanted() -> None:
    one = authority()
    state = again(ca_state.first(one, NOW), NOW)
    following, waiting = ca_state.next_state(state, one, doing(state, "a", "b"), NOW + HOUR)
    assert following.kept == state.kept
    assert waiting == []
    assert ca_state.phase(state, one) == "stable"


def test_a_change_of_the_root_waits_for_what_any_replica_may_have_signed() -> None:
    old, new = authority(), authority()
    state = again(ca_state.first(old, NOW), NOW)
    state, waiting = ca_state.next_state(state, new, doing(state, "a", "b"), NOW)
    assert waiting
    assert state.answering.certificate == old.certificate
    assert told(state) == {old.root_pem, new.root_pem}
    assert ca_state.phase(state, new) == "distributing"

    told_at = NOW + 100  # when the last replica did it
    replicas = [*doing(state, "a", at=NOW + 1), *doing(state, "b", at=told_at)]
    switch = told_at + LIFE.most + SETTLE
    for now, signs in ((told_at, old), (switch - 1, old), (switch + 1, new)):
        following, _ = ca_state.next_state(again(state, now), new, replicas, now)
        assert following.answering.certificate == signs.certificate, now - NOW
        assert told(following) == {old.root_pem, new.root_pem}
    assert ca_state.phase(following, new) == "retiring"

    state, retired_at = again(following, switch + 1), switch + 50
    replicas = doing(state, "a", "b", at=retired_at)
    for now, roots in (
        (retired_at + LIFE.most - 1, {old.root_pem, new.root_pem}),
        (retired_at + LIFE.most + SETTLE + 1, {new.root_pem}),
    ):
        following, waiting = ca_state.next_state(again(state, now), new, replicas, now)
        assert told(following) == roots
    assert waiting == []
    assert ca_state.phase(following, new) == "stable"


def test_a_replica_that_has_not_followed_is_waited_for_until_it_is_gone() -> None:
    old, new = authority(), authority()
    before = ca_state.first(old, NOW)
    state, _ = ca_state.next_state(before, new, doing(before, "a", "cut-off"), NOW)
    replicas = [*doing(state, "a", at=NOW), *doing(before, "cut-off")]
    late = NOW + 30 * 24 * HOUR
    following, waiting = ca_state.next_state(again(state, late), new, replicas, late)
    assert following.answering.certificate == old.certificate
    assert "cut-off" in waiting[0]
    # Its pod is gone: what it signed last, without the new root, may be in use for as long as certificates live.
    state = ca_state.without(again(state, late), replicas[1:], late)
    assert state.told == late
    for now, signs in ((late + LIFE.most, old), (late + LIFE.most + SETTLE + 1, new)):
        following, _ = ca_state.next_state(again(state, now), new, replicas[:1], now)
        assert following.answering.certificate == signs.certificate
    # One that did as it should took nothing with it but the time since when it did.
    assert ca_state.without(state, doing(state, "other", at=5.0), late + 1).told == late


def test_shorter_lives_count_once_the_longer_ones_are_over() -> None:
    short = Lifetimes(1800, 3600)
    old = authority()
    state = ca_state.first(old, NOW)
    quick = Authority(
        old.key, old.certificate, old.intermediates, old.roots, now=lambda: NOW, lifetimes=short
    )
    replicas = doing(state, "a")
    # One replica still gives out long ones.
    following, _ = ca_state.next_state(state, quick, replicas, NOW)
    assert following.kept == state.kept
    replicas = [replicas[0]._replace(most=3600)]
    state, _ = ca_state.next_state(state, quick, replicas, NOW)
    assert (state.longest, state.ends) == (LIFE.most, NOW + LIFE.most + SETTLE)
    for now, longest in ((NOW + LIFE.most, LIFE.most), (NOW + LIFE.most + SETTLE, 3600)):
        state = ca_state.parse(state.dump, "mesh/state", now, short)
        state, _ = ca_state.next_state(state, quick, replicas, now)
        assert state.longest == longest
    # Now a change of the root takes hours, not days.
    begin = NOW + 100 * HOUR
    made = Authority.create(now=lambda: NOW)
    new = Authority(
        made.key, made.certificate, made.intermediates, made.roots, now=lambda: NOW, lifetimes=short
    )
    state, _ = ca_state.next_state(ca_state.parse(state.dump, "s", begin, short), new, replicas, begin)
    now = begin + 3600 + SETTLE + 1
    state = ca_state.parse(state.dump, "mesh/state", now, short)
    replicas = [replicas[0]._replace(digest=state.digest, at=begin)]
    following, _ = ca_state.next_state(state, new, replicas, now)
    assert following.answering.certificate == new.certificate


def test_another_intermediate_of_a_known_root_signs_at_once() -> None:
    root_key, key, next_key = keys.generate(), keys.generate(), keys.generate()
    root = templates.make_root(root_key, NOW)

    def below(key_: templates.SigningKey) -> Authority:
        made = templates.make_intermediate(key_, root_key, root, NOW)
        return Authority(key_, made, (), (root,), now=lambda: NOW, lifetimes=LIFE)

    one, two = below(key), below(next_key)
    state = ca_state.first(one, NOW)
    following, waiting = ca_state.next_state(state, two, doing(state, "a"), NOW + 1)
    assert following.answering.certificate == two.certificate
    assert following.digest != state.digest
    assert waiting == []


def test_an_authority_that_has_ended_holds_nobody_up() -> None:
    state = ca_state.first(authority(), NOW)
    with pytest.raises(EndedError):
        again(state, NOW + 11 * 365 * 24 * HOUR)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense",
        b"[]",
        b"{}",
        json.dumps({"authority": {"chain": "x", "key": "y", "roots": ""}}).encode(),
    ],
)
def test_a_state_that_cannot_be_read(data: bytes) -> None:
    with pytest.raises(AuthorityError, match="mesh/state") as refused:
        ca_state.parse(data, "mesh/state", NOW, LIFE)
    assert "restore it, or delete it" in str(refused.value)


def test_a_state_of_before_there_were_versions() -> None:
    """Nothing is known of how long the replicas of then let certificates live but what the succession says."""
    one = authority()
    older = json.loads(ca_state.first(one, NOW).dump)
    for name in ("version", "told", "longest", "ends"):
        del older[name]
    older["succession"]["most"] = 500 * HOUR
    short = Lifetimes(1800, 3600)
    state = ca_state.parse(json.dumps(older).encode(), "mesh/state", NOW + HOUR, short)
    assert (state.told, state.longest, state.ends) == (NOW + HOUR, 500 * HOUR, 0.0)
    assert told(state) == {one.root_pem}


@pytest.mark.parametrize("version", [2, -1, "1", None, [], 0.5])
def test_a_state_of_a_version_that_is_not_known(version: object) -> None:
    later = json.loads(ca_state.first(authority(), NOW).dump) | {"version": version}
    with pytest.raises(AuthorityError, match="mesh/state: the state is of version"):
        ca_state.parse(json.dumps(later).encode(), "mesh/state", NOW, LIFE)


def secret() -> dict[str, bytes]:
    made = authority()
    return {
        "ca-cert.pem": pem([made.certificate]),
        "ca-key.pem": keys.to_pem(made.key),
        "root-cert.pem": made.root_pem,
        "cert-chain.pem": b"",
    }


def test_an_operators_authority() -> None:
    data = secret()
    assert ca_state.authority_of(data, "mesh/cacerts", LIFE).root_pem == data["root-cert.pem"]
    # Istio's own self-made one: a root that signs by itself.
    key = keys.generate()
    root = templates.make_root(key, NOW)
    data = {
        "ca-cert.pem": pem([root]),
        "ca-key.pem": keys.to_pem(key),
        "root-cert.pem": b"",
        "cert-chain.pem": b"",
    }
    assert ca_state.authority_of(data, "mesh/istio-ca-secret", LIFE).certificate == root


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda d: d.pop("ca-cert.pem"), "ca-cert.pem is missing"),
        (lambda d: d.pop("ca-key.pem"), "ca-key.pem is missing"),
        (lambda d: d.pop("root-cert.pem"), "root-cert.pem is missing"),
        (lambda d: d.update({"ca-cert.pem": b"x"}), "ca-cert.pem is no PEM certificate"),
        (lambda d: d.update({"ca-key.pem": b"x"}), "ca-key.pem is no PEM private key"),
        (lambda d: d.update({"ca-key.pem": keys.to_pem(keys.generate())}), "its key is another one"),
        (lambda d: d.update({"root-cert.pem": authority().root_pem}), "does not chain to the root"),
    ],
)
def test_an_operators_authority_that_does_not_do(
    change: Callable[[dict[str, bytes]], object], complaint: str
) -> None:
    data = secret()
    key = data["ca-key.pem"].splitlines()[1].decode()
    change(data)
    with pytest.raises(AuthorityError) as refused:
        ca_state.authority_of(data, "mesh/cacerts", LIFE)
    assert complaint in str(refused.value)
    assert "mesh/cacerts" in str(refused.value)
    assert key not in str(refused.value)
