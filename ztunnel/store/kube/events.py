"""core/v1 Events: what people see of an object with `kubectl describe`. The same news again only counts up."""

import datetime
import hashlib
import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final

from ztunnel.store.kube.errors import ApiError

_REMEMBERED: Final = 4096  # events whose count is known without asking
_LONGEST: Final = 1024  # characters of a note that the API server takes


class Events:
    """Sends events, each (object, reason, message) once."""

    def __init__(self, send: Callable[[str, str, dict[str, Any] | None], Mapping[str, Any]]) -> None:
        self._send = send  # method, path, body
        self._counts: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def emit(self, obj_ref: Mapping[str, Any], reason: str, message: str, type_: str, component: str) -> None:
        """Tell of an object: `obj_ref` has apiVersion, kind, namespace, name, uid. Raises ApiError."""
        namespace = str(obj_ref.get("namespace") or "default")
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        message = message if len(message) <= _LONGEST else f"{message[: _LONGEST - 3]}..."
        told = "\0".join(
            (str(obj_ref.get("kind")), namespace, str(obj_ref.get("uid")), reason, message, component)
        )
        digest = hashlib.sha256(told.encode()).hexdigest()[:16]
        name = f"{str(obj_ref.get('name', 'unknown'))[:200].rstrip('-.')}.{digest}"
        folder = f"/api/v1/namespaces/{namespace}/events"
        with self._lock:
            count = self._counts.get(name, 0)
        if count and self._count_up(f"{folder}/{name}", count + 1, now, name):
            return
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "involvedObject": dict(obj_ref),
            "reason": reason,
            "message": message,
            "type": type_,
            "count": 1,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "source": {"component": component, "host": os.environ.get("NODE_NAME") or socket.gethostname()},
            "reportingComponent": component,
            "reportingInstance": os.environ.get("POD_NAME") or socket.gethostname(),
        }
        try:
            self._send("POST", folder, event)
        except ApiError as error:
            if not error.conflict:
                raise
            # Its answer tells the count; who may create and patch events may not always read them.
            before = self._send("PATCH", f"{folder}/{name}", {"lastTimestamp": now})
            self._count_up(f"{folder}/{name}", int(before.get("count") or 1) + 1, now, name)
        else:
            self._remember(name, 1)

    def _count_up(self, path: str, count: int, now: str, name: str) -> bool:
        """False if it is gone: events live for an hour."""
        try:
            self._send("PATCH", path, {"count": count, "lastTimestamp": now})
        except ApiError as error:
            if error.not_found:
                return False
            raise
        self._remember(name, count)
        return True

    def _remember(self, name: str, count: int) -> None:
        with self._lock:
            self._counts[name] = count
            self._counts.move_to_end(name)
            while len(self._counts) > _REMEMBERED:
                self._counts.popitem(last=False)
