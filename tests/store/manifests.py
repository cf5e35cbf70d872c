"""Texts and waiting that the store's tests share."""

from collections.abc import Callable

import trio

from ztunnel.store.directory import Change
from ztunnel.store.watching import Watch

LIMIT = 10.0  # seconds that anything here may take


def pod(name: str, namespace: str = "default", image: str = "none") -> str:
    """A Pod's document."""
    return (
        "apiVersion: v1\n"
        "kind: Pod\n"
        f"metadata:\n  name: {name}\n  namespace: {namespace}\n"
        f'spec:\n  containers:\n  - name: c\n    image: {image}\n    command: ["sleep", "inf"]\n'
    )


def namespace(name: str, **labels: str) -> str:
    """A Namespace's document."""
    text = f"apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n"
    if labels:
        text += "  labels:\n" + "".join(f"    {key}: {value}\n" for key, value in labels.items())
    return text


async def wait_until(true: Callable[[], object], limit: float = LIMIT) -> None:
    """Until the condition holds; fails after `limit` seconds."""
    with trio.fail_after(limit):
        while not true():
            await trio.sleep(0.005)


async def until_synced(watch: Watch) -> list[str]:
    """What a watch begins with: the objects' names."""
    names = []
    with trio.fail_after(LIMIT):
        async for op, obj in watch:
            if op == "synced":
                break
            assert op == "added"
            assert obj is not None
            names.append(obj.name)
    return names


async def following(watch: Watch) -> Change:
    """The next change of a watch."""
    with trio.fail_after(LIMIT):
        return await anext(watch)
