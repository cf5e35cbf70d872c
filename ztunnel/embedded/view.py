"""A live copy of the cluster's objects in memory, for those who act on them: read it, then wait for a change."""

import trio

from ztunnel.store.directory import DirectoryStore
from ztunnel.store.models import Key, Namespace, Object, Pod, Service

KINDS = (Namespace, Pod, Service)


class View:
    """Namespaces by name, Services and Pods by key. Only `run` changes it, between two awaits of others."""

    def __init__(self) -> None:
        self.namespaces: dict[str, Namespace] = {}
        self.services: dict[Key, Service] = {}
        self.pods: dict[Key, Pod] = {}
        self.version = 0
        self._changed = trio.Event()

    async def changed(self, since: int) -> int:
        """Return the version as soon as it differs from `since`."""
        while self.version == since:
            await self._changed.wait()
        return self.version

    def put(self, obj: Object) -> None:
        """Take an object in, new or changed."""
        if isinstance(obj, Namespace):
            self.namespaces[obj.name] = obj
        elif isinstance(obj, Service):
            self.services[obj.key] = obj
        elif isinstance(obj, Pod):
            self.pods[obj.key] = obj

    def drop(self, obj: Object) -> None:
        """Take an object out; one that is not there is no error."""
        if isinstance(obj, Namespace):
            self.namespaces.pop(obj.name, None)
        elif isinstance(obj, Service):
            self.services.pop(obj.key, None)
        elif isinstance(obj, Pod):
            self.pods.pop(obj.key, None)

    def notify(self) -> None:
        """Wake those who wait: what was put and dropped since is one change to them."""
        self.version += 1
        self._changed.set()
        self._changed = trio.Event()

    async def run(
        self, store: DirectoryStore, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Follow the store for ever; started when everything that was in it is here."""
        synced = False
        async for change in store.watch(*KINDS):
            if change.op == "synced":
                synced = True
                task_status.started()
            elif change.op == "deleted" and change.obj is not None:
                self.drop(change.obj)
            elif change.obj is not None:
                self.put(change.obj)
            if synced:
                self.notify()
