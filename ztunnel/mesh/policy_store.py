"""The one copy of all policies that a node holds, by whom they concern."""

from collections.abc import Collection, Mapping
from typing import Final

from ztunnel.mesh.policy import Authorization, PolicyScope

PolicyChanges = Mapping[str, Authorization | None]
"""Policies by key "namespace/name": as they are now, None for one that was removed."""

_NONE: Final[Mapping[str, Authorization]] = {}


class PolicyStore:
    """Policies by key "namespace/name". Not for several threads."""

    def __init__(self) -> None:
        self._policies: dict[str, Authorization] = {}
        self._everywhere: dict[str, Authorization] = {}
        self._namespaces: dict[str, dict[str, Authorization]] = {}

    def __len__(self) -> int:
        return len(self._policies)

    def __contains__(self, key: str) -> bool:
        return key in self._policies

    def get(self, key: str) -> Authorization | None:
        """The policy of this name."""
        return self._policies.get(key)

    def put(self, key: str, policy: Authorization | None) -> Authorization | None:
        """Add or replace a policy (None: remove it); returns what was there before."""
        old = self._policies.pop(key, None)
        if old is not None:
            if old.scope is PolicyScope.GLOBAL:
                del self._everywhere[key]
            elif old.scope is PolicyScope.NAMESPACE:
                own = self._namespaces[old.namespace]
                del own[key]
                if not own:
                    del self._namespaces[old.namespace]
        if policy is not None:
            self._policies[key] = policy
            if policy.scope is PolicyScope.GLOBAL:
                self._everywhere[key] = policy
            elif policy.scope is PolicyScope.NAMESPACE:
                self._namespaces.setdefault(policy.namespace, {})[key] = policy
        return old

    def keys(self) -> Collection[str]:
        """The names of all policies (a view)."""
        return self._policies.keys()

    def policies(self) -> Collection[Authorization]:
        """All policies (a view: copy it before you wait for anything)."""
        return self._policies.values()

    def everywhere(self) -> Mapping[str, Authorization]:
        """Those of the whole mesh (a view)."""
        return self._everywhere

    def of_namespace(self, namespace: str) -> Mapping[str, Authorization]:
        """Those of all workloads of a namespace (a view)."""
        return self._namespaces.get(namespace, _NONE)
