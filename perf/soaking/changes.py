"""What changes in the mesh during a soak: ten changes a second, and visitors that come and go.

Every change is one that the control plane has to push to all proxies: Services and their ports, endpoints of a
Service in use, labels of pods in use, the locality of a whole node.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

from perf.soaking.ledger import Ledger
from perf.soaking.payload import HTTP_PORT
from perf.soaking.room import START_LIMIT, Server, SoakRoom, service, web
from perf.soaking.traffic import TIMEOUT

RATE = 10.0  # changes a second
LIVING = 5  # Services beside the one in use, at once
VISIT_EVERY = 10.0  # seconds
VISIT = 6.0  # seconds
LATEST_END = VISIT + START_LIMIT + TIMEOUT  # seconds after it came

NODE = """
apiVersion: v1
kind: Node
metadata: {{name: node-2, labels: {{topology.kubernetes.io/zone: zone-{zone}}}}}
"""


class Changes:
    """A thread that changes the mesh's directory until it is stopped; `written` counts the changes."""

    def __init__(self, room: SoakRoom, ledger: Ledger) -> None:
        self.written = 0
        self.late = 0.0
        self.visits = 0
        self.seconds = 0.0
        self._room = room
        self._ledger = ledger
        self._visiting: dict[str, float] = {}  # when each of them must have ended
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Change nothing more; returns when each visitor has ended and given its account."""
        self._stop.set()
        self._thread.join()

    @property
    def services(self) -> set[str]:
        """The Services that there are now."""
        return {path.stem for path in self._room.mesh.directory.glob("come-*.yaml")} | {"web"}

    def _run(self) -> None:
        try:
            self._change()
        except Exception as error:
            self._ledger.fail("changes", "program", f"{type(error).__name__}: {error}")

    def _change(self) -> None:
        began = due = time.monotonic()
        next_visit = began + VISIT_EVERY / 2
        for change in self._endless():
            if self._stop.wait(max(0.0, due - time.monotonic())):
                break
            self.late = max(self.late, time.monotonic() - due)
            change()
            self.written += 1
            now = time.monotonic()
            due = max(due + 1 / RATE, now)  # what was late is not made up for in a burst
            if now >= next_visit:
                next_visit = now + VISIT_EVERY
                self._come(now)
            self._go(now)
        self.seconds = time.monotonic() - began
        while self._visiting:
            time.sleep(0.1)
            self._go(time.monotonic())

    def _endless(self) -> Iterator[Callable[[], None]]:
        east, west, spare = (self._room.servers[name] for name in ("east", "west", "spare"))
        write = self._room.mesh.write
        for number in itertools.count(1):
            yield partial(self._serve, number)
            yield partial(self._join, spare)
            yield partial(self._label, west, number)
            yield partial(write, "node-2.yaml", NODE.format(zone=number % 3))
            yield partial(write, "web.yaml", web(8000 + number % 100))
            yield partial(self._end, number - LIVING)
            yield partial(self._part, spare)
            yield partial(self._label, east, number)
            yield partial(self._serve, number, HTTP_PORT)
            yield partial(write, "web.yaml", web())

    def _serve(self, number: int, more: int = 0) -> None:
        ports: list[dict[str, str | int]] = [{"name": "http", "port": 80, "targetPort": HTTP_PORT}]
        if more:
            ports.append({"name": "more", "port": more, "targetPort": HTTP_PORT})
        name = f"come-{number}"
        self._room.mesh.write(f"{name}.yaml", service(name, {"app": "west"}, ports))

    def _end(self, number: int) -> None:
        if number > 0:
            self._room.remove(f"come-{number}.yaml")
        else:
            self._serve(number)  # there is none yet that could end: one comes that will

    def _label(self, server: Server, number: int) -> None:
        server.labels["version"] = f"v{number}"
        self._room.write(server)

    def _join(self, server: Server) -> None:
        server.labels["web"] = "yes"
        self._room.write(server)

    def _part(self, server: Server) -> None:
        del server.labels["web"]
        self._room.write(server)

    # Visitors.

    def _come(self, now: float) -> None:
        self.visits += 1
        name = f"visitor-{self.visits}"
        self._room.mesh.write(f"{name}.yaml", self._room.visitor(name, f"node-{1 + self.visits % 2}", VISIT))
        self._visiting[name] = now + LATEST_END

    def _go(self, now: float) -> None:
        """Take in what the visitors said that have ended, and take their pods away."""
        for name, latest in list(self._visiting.items()):
            log = self._room.visitor_log(name)
            lines = log.read_text().splitlines() if log.exists() else []
            if (lines and '"end": true' in lines[-1]) or now > latest:
                for line in lines:
                    self._ledger.take(name, line)
                if lines:
                    self._ledger.close(name)
                else:
                    pods = [pod for pod in self._room.mesh.pods(name) if pod["name"] == name]
                    self._ledger.fail(name, "program", f"did not start: {pods or 'there is no such pod'}")
                del self._visiting[name]
                self._room.remove(f"{name}.yaml")
                log.unlink(missing_ok=True)
