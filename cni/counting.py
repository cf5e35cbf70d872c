"""What the agent counts, and the page of it that Prometheus reads; names are istio-cni's where it has one.

A handful of numbers: written by hand, as Prometheus's own library would cost more memory than all the rest of them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

Labels = tuple[tuple[str, str], ...]

BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds


STEPS: Final = ("labels", "probes", "rules", "ztunnel")
"""What a pod that starts waits for: the API server, the node's rules, the pod's, ztunnel's listeners."""
NOTHING: Final[Mapping[str, float]] = MappingProxyType({})


class Histogram:
    """How long something took, in seconds."""

    def __init__(self) -> None:
        self._within = [0] * len(BUCKETS)
        self._count = 0
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Once more."""
        self._count += 1
        self._sum += seconds
        for index, bound in enumerate(BUCKETS):
            self._within[index] += seconds <= bound

    def lines(self, name: str, label: str = "") -> Iterator[str]:
        """Its samples; `label` as it is written."""
        before, alone = (f"{label},", f"{{{label}}}") if label else ("", "")
        for bound, count in zip((*BUCKETS, "+Inf"), (*self._within, self._count), strict=True):
            yield f'{name}_bucket{{{before}le="{bound}"}} {count}'
        yield f"{name}_sum{alone} {self._sum:.6f}"
        yield f"{name}_count{alone} {self._count}"


class Counters:
    """The numbers that only grow. Not for several threads."""

    def __init__(self) -> None:
        self.heard: Counter[str] = Counter()  # changes of pods and namespaces, by what happened
        self.installs: Counter[str] = Counter()  # by result
        self.repairs: Counter[str] = Counter()  # by what was repaired
        self.failures = 0  # of pods to join or to leave, each told once
        self.adds: Counter[str] = Counter()  # pods that the plugin asked for, by result
        self._answers = Histogram()
        self._steps = {step: Histogram() for step in STEPS}

    def added(self, result: str, seconds: float, steps: Mapping[str, float] = NOTHING) -> None:
        """A pod that starts was answered; `steps`: how long each of STEPS took that there was."""
        self.adds[result] += 1
        self._answers.observe(seconds)
        for step, taken in steps.items():
            self._steps[step].observe(taken)

    def families(self) -> Iterator[str]:
        """The lines of the page."""
        yield from family(
            "nodeagent_reconcile_events_total", "counter", "Changes of pods and namespaces that were acted on.",
            _by("type", self.heard),
        )  # fmt: skip
        yield from family(
            "istio_cni_installs_total", "counter", "Installations of the CNI plugin and its configuration.",
            _by("result", self.installs),
        )  # fmt: skip
        yield from family(
            "istio_cni_repairs_total", "counter", "What was found not to be as it should be, and was repaired.",
            _by("what", self.repairs),
        )  # fmt: skip
        yield from family(
            "istio_cni_redirection_failures_total", "counter", "Pods that could not join or leave, and why was told.",
            [((), self.failures)],
        )  # fmt: skip
        yield from family(
            "istio_cni_plugin_requests_total", "counter", "Pods that the CNI plugin asked for when they started.",
            _by("result", self.adds),
        )  # fmt: skip
        name = "istio_cni_plugin_request_duration_seconds"
        yield f"# HELP {name} What the mesh added to the start of a pod."
        yield f"# TYPE {name} histogram"
        yield from self._answers.lines(name)
        name = "istio_cni_plugin_step_duration_seconds"
        yield f"# HELP {name} What of that each step took; all but labels go on beside one another."
        yield f"# TYPE {name} histogram"
        for step, taken in self._steps.items():
            yield from taken.lines(name, f'step="{step}"')


def _by(label: str, counts: Counter[str]) -> list[tuple[Labels, float]]:
    return [(((label, key),), counts[key]) for key in sorted(counts)]


def family(name: str, kind: str, told: str, samples: Iterable[tuple[Labels, float]]) -> Iterator[str]:
    """The lines of one metric."""
    yield f"# HELP {name} {told}"
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        written = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
        yield f"{name}{{{written}}} {value:g}" if written else f"{name} {value:g}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
