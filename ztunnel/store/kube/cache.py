"""What watches have told of the cluster, shared by all who follow it: objects by kind, problems, who waits for news.

Threads write (one a kind), trio's thread and others read; one lock guards everything, and is held for moments.
"""

import threading
from collections.abc import Callable, Iterable, Mapping

from ztunnel.store.models import Key, Object, group_of
from ztunnel.store.problems import Problem

Kind = tuple[str, str]  # group and name


def kind_key(kind: type[Object]) -> Kind:
    """How a kind is called in a key."""
    return group_of(kind.API_VERSION), kind.KIND


class Follower:
    """One who follows: `dirty` gathers the keys of changed objects, `wake` is called, from any thread, after that."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.wake = wake
        self.dirty: set[Key] = set()


class Cache:
    """The objects of the kinds that are watched now."""

    def __init__(self, on_problem: Callable[[Problem], None], on_change: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._objects: dict[Kind, dict[Key, Object]] = {}
        self._synced: set[Kind] = set()
        self._followers: list[Follower] = []
        self._faults: dict[Key, tuple[Problem, ...]] = {}  # of single objects
        self._troubles: dict[Kind, Problem] = {}  # of reaching a kind at all
        self._told: frozenset[Problem] = frozenset()
        self._altered = False  # there may be other problems than those told
        self._on_problem = on_problem
        self._on_change = on_change

    @property
    def problems(self) -> list[Problem]:
        """What is wrong now."""
        with self._lock:
            return sorted(self._present(), key=lambda problem: (problem.object, problem.message))

    def objects(self, kind: type[Object]) -> dict[Key, Object]:
        """The objects of a kind now, a copy."""
        with self._lock:
            return dict(self._objects.get(kind_key(kind), {}))

    def get(self, key: Key) -> Object | None:
        with self._lock:
            return self._objects.get(key[:2], {}).get(key)

    def synced(self, kinds: Iterable[type[Object]]) -> bool:
        """Whether all of the kinds have been listed, or are not served at all."""
        with self._lock:
            return all(kind_key(kind) in self._synced for kind in kinds)

    def follow(self, follower: Follower) -> None:
        with self._lock:
            self._followers.append(follower)

    def unfollow(self, follower: Follower) -> None:
        with self._lock:
            self._followers = [other for other in self._followers if other is not follower]

    def taken(self, follower: Follower) -> dict[Key, Object | None]:
        """What has changed for a follower since it was last asked: each object as it is now, None if it is gone."""
        with self._lock:
            dirty, follower.dirty = follower.dirty, set()
            return {key: self._objects.get(key[:2], {}).get(key) for key in dirty}

    def put(self, obj: Object, problems: tuple[Problem, ...] = ()) -> None:
        """An object is there, or has changed."""
        with self._lock:
            objects = self._objects.setdefault(obj.key[:2], {})
            changed = objects.get(obj.key) != obj
            if changed:
                objects[obj.key] = obj
            self._note(obj.key, problems)
        self._tell({obj.key} if changed else set())

    def unreadable(self, key: Key, problems: tuple[Problem, ...]) -> None:
        """An object is there, but cannot be read: what was known of it stays."""
        with self._lock:
            self._note(key, problems)
        self._tell(set())

    def drop(self, key: Key) -> None:
        """An object is gone."""
        with self._lock:
            there = self._objects.get(key[:2], {}).pop(key, None) is not None
            self._note(key, ())
        self._tell({key} if there else set())

    def replace(
        self, kind: type[Object], new: Mapping[Key, Object], faults: Mapping[Key, tuple[Problem, ...]]
    ) -> None:
        """The kind has been listed: `new` is all of it, except for the unreadable, which are among `faults` only."""
        with self._lock:
            old = self._objects.get(kind_key(kind), {})
            dirty = {key for key in old if key not in new and key not in faults}
            kept = {key: obj for key, obj in old.items() if key in faults and key not in new}
            for key, obj in new.items():
                before = old.get(key)
                if before == obj and before is not None:
                    kept[key] = before
                else:
                    kept[key] = obj
                    dirty.add(key)
            self._objects[kind_key(kind)] = kept
            for key in [key for key in self._faults if key[:2] == kind_key(kind)]:
                del self._faults[key]
            for key, problems in faults.items():
                self._note(key, problems)
            self._synced.add(kind_key(kind))
            self._troubles.pop(kind_key(kind), None)
            self._altered = True
        self._tell(dirty, always=True)

    def trouble(self, kind: type[Object], problem: Problem | None) -> None:
        """The kind cannot be watched just now (None: it can again); what is known of it stays."""
        with self._lock:
            self._altered = True
            if problem is None:
                self._troubles.pop(kind_key(kind), None)
            else:
                self._troubles[kind_key(kind)] = problem
        self._tell(set())

    def forget(self, kind: type[Object]) -> None:
        """Nobody follows the kind any more."""
        with self._lock:
            name = kind_key(kind)
            self._objects.pop(name, None)
            self._synced.discard(name)
            self._troubles.pop(name, None)
            for key in [key for key in self._faults if key[:2] == name]:
                del self._faults[key]

    def _note(self, key: Key, problems: tuple[Problem, ...]) -> None:
        if self._faults.get(key, ()) == problems:
            return
        self._altered = True
        if problems:
            self._faults[key] = problems
        else:
            del self._faults[key]

    def _present(self) -> frozenset[Problem]:
        faults = (problem for problems in self._faults.values() for problem in problems)
        return frozenset((*faults, *self._troubles.values()))

    def _tell(self, dirty: set[Key], *, always: bool = False) -> None:
        with self._lock:
            followers = list(self._followers) if dirty or always else []
            for follower in followers:
                follower.dirty |= dirty
            fresh: frozenset[Problem] = frozenset()
            changed = False
            if self._altered:
                self._altered = False
                present = self._present()
                fresh, changed = present - self._told, present != self._told
                self._told = present
        for follower in followers:
            follower.wake()
        for problem in sorted(fresh, key=str):
            self._on_problem(problem)
        if changed:
            self._on_change()
