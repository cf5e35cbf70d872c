"""The files of manifests/, from the source tree or an installed package: a kustomization read as kustomize would."""

import importlib.resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

import ztunnel


def folder() -> Traversable:
    """manifests/. Raises FileNotFoundError for an installation without it."""
    beside = Path(ztunnel.__file__).resolve().parents[1] / "manifests"
    if (beside / "kustomization.yaml").is_file():
        return beside
    try:
        return importlib.resources.files("manifests")
    except ModuleNotFoundError:
        raise FileNotFoundError(f"{beside}: the manifests are missing; install ambient-mesh again") from None


def documents(path: str) -> list[dict[str, Any]]:
    """The objects of a file, or of a folder's kustomization, in their order."""
    found: list[dict[str, Any]] = []
    place = folder()
    for part in path.split("/"):
        place = place / part
    if place.is_file():
        return [document for document in yaml.safe_load_all(place.read_text(encoding="utf-8")) if document]
    for name in yaml.safe_load((place / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]:
        found += documents(f"{path}/{name}")
    return found


def profiles() -> dict[str, dict[str, Any]]:
    """The profiles by their names: the `spec` of each."""
    return {
        place.name.removesuffix(".yaml"): yaml.safe_load(place.read_text(encoding="utf-8"))["spec"]
        for place in sorted((folder() / "profiles").iterdir(), key=lambda each: each.name)
        if place.name.endswith(".yaml")
    }
