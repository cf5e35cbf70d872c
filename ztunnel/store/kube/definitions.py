"""Which CustomResourceDefinitions a cluster has, told as they come: so that kinds installed later are followed."""

from collections.abc import Callable
from typing import Final

from ztunnel.store.kube.api import Api
from ztunnel.store.kube.reflector import Reflector
from ztunnel.store.models import Key, Object
from ztunnel.store.problems import Problem

# The schemas in them are large, and nobody's business here.
_NAMES_ONLY: Final = (
    "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1",
    "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1",
)


class Definition(Object, frozen=True, kw_only=True):
    """A CustomResourceDefinition; its name is PLURAL.GROUP."""

    KIND = "CustomResourceDefinition"
    API_VERSION = "apiextensions.k8s.io/v1"
    PLURAL = "customresourcedefinitions"
    NAMESPACED = False


class Definitions:
    """Calls `on_news` with the names of definitions that came or changed, `on_trouble` if they cannot be watched.

    Both are called from a thread.
    """

    def __init__(
        self, api: Api, on_news: Callable[[set[str]], None], on_trouble: Callable[[Problem | None], None]
    ) -> None:
        self._on_news = on_news
        self._on_trouble = on_trouble
        self._reflector = Reflector(api, Definition, self, accept=_NAMES_ONLY)

    def start(self) -> None:
        """Begin, in a thread."""
        self._reflector.start()

    def stop(self) -> None:
        """End."""
        self._reflector.stop()

    def put(self, obj: Object, problems: tuple[Problem, ...] = ()) -> None:
        """For the reflector."""
        self._on_news({obj.name})

    def unreadable(self, key: Key, problems: tuple[Problem, ...]) -> None:
        """For the reflector."""
        self._on_news({key.name})

    def drop(self, key: Key) -> None:
        """For the reflector: who follows the kind will hear of it by himself."""

    def replace(
        self, kind: type[Object], new: dict[Key, Object], faults: dict[Key, tuple[Problem, ...]]
    ) -> None:
        """For the reflector."""
        self._on_trouble(None)
        self._on_news({key.name for key in new})

    def trouble(self, kind: type[Object], problem: Problem | None) -> None:
        """For the reflector."""
        self._on_trouble(problem)
