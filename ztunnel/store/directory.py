"""A directory of YAML and JSON as the store of objects: read, changed in place, and watched.

The files are the truth: several processes may use one directory, writers keep each other out with flock and replace
files at once. A change of one document leaves the others of its file byte for byte. A store is used by one thread.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec

from ztunnel.store import files
from ztunnel.store.base import Change
from ztunnel.store.decode import decode
from ztunnel.store.documents import dump
from ztunnel.store.editing import merge_patch, remove_document, replace_document
from ztunnel.store.index import Index
from ztunnel.store.kinds import KINDS
from ztunnel.store.manifest import Manifest, name_of, read_manifest
from ztunnel.store.models import K, Key, Object, key_of, to_dict, to_json
from ztunnel.store.problems import Invalid, NotFound, Problem, StoreError
from ztunnel.store.watching import Watch

__all__ = ["Change", "DirectoryStore", "object_file"]


# In the class, `list` is the method.
_Keys = list[Key]
_Objects = list
_Paths = list[Path]


class _Place(NamedTuple):
    """Where one object stands: the file as read just now, and the place in it."""

    path: Path
    text: str
    bom: str
    manifest: Manifest
    document: int
    item: int | None


class DirectoryStore:
    """The objects in the files below `path`.

    `on_problem` is called once for each problem when it is first seen; `problems` lists those of now. Objects are
    given out as they are kept, immutable; lists are sorted by namespace and name.
    """

    REMOTE = False

    def __init__(self, path: Path, on_problem: Callable[[Problem], None] | None = None) -> None:
        self.path = Path(path)
        self._on_problem = on_problem
        self.index = Index(self.path, on_problem)

    def report(self, problem: Problem) -> None:
        """Tell whoever made the store of a problem that is not in its files."""
        if self._on_problem is not None:
            self._on_problem(problem)

    def when_problems_change(self, call: Callable[[], None]) -> None:
        """Have `call` called after each look at the files that found more, fewer or other problems."""
        self.index.on_problems_change = call

    @property
    def problems(self) -> list[Problem]:
        """What is wrong with the files, as of the last look at them (`list`, `get`, a watch)."""
        return self.index.problems

    def list(self, kind: type[K], namespace: str | None = None) -> list[K]:
        """The objects of a kind, of all namespaces or of one, as the files are now."""
        self.index.refresh()
        found = self.index.of_kind(kind)
        return [
            cast(K, found[key])
            for key in sorted(found)
            if namespace is None or not kind.NAMESPACED or key.namespace == namespace
        ]

    def known(self, kind: type[K]) -> _Objects[K]:
        """The objects of a kind as of the last look at the files: what a watch has just told, without I/O."""
        found = self.index.of_kind(kind)
        return [cast(K, found[key]) for key in sorted(found)]

    def get(self, kind: type[K], namespace: str, name: str) -> K | None:
        """One object, None if there is none; the namespace is not looked at for kinds of the whole cluster."""
        return cast(K | None, self.find(key_of(kind, namespace, name)))

    def find(self, key: Key) -> Object | None:
        """One object by its key, None if there is none."""
        self._locate(key)
        return self.index.get(key)

    def keys(self) -> _Keys:
        """The keys of every object, those too that the mesh knows but does not act on."""
        self.index.refresh()
        return sorted(self.index.keys())

    def file_of(self, key: Key) -> Path | None:
        """The file that holds the object, None if there is none."""
        return next(iter(self._locate(key)), None)

    def apply(self, obj: Object | dict[str, Any], *, file: Path | None = None) -> Path:
        """Create or replace an object, in the file and document where it lives, else in a new file.

        A dict is an object as in a manifest (apiVersion, kind, ...), whose fields are all kept; it may be of a kind
        that the mesh does not act on, or of one that restricts traffic and has faults. `file` is where a new object
        goes (default: a name made of kind, namespace and name); with it, files that were never looked at are not
        searched for the object. Returns the file.
        Raises Invalid, StoreError.
        """
        data = to_dict(obj) if isinstance(obj, Object) else obj
        key = self._accepted(data)
        with files.locked(self.path):
            if file is not None:
                self.index.refresh_file(self.path / file)
            if self._locate(key, everywhere=file is None):
                return self._change(key, lambda old: data)
            path = self._new_file(key) if file is None else self.path / file
            if self.index.holds_objects(path):
                raise StoreError(f"{key}: {file} holds other objects; name another file")
            if path.suffix == ".json":
                text = to_json(obj) if isinstance(obj, Object) else _json(data)
            else:
                text = dump(data).encode()
            self._write(path, text)
            return path

    def delete(self, kind: type[Object], namespace: str, name: str) -> bool:
        """Remove an object; its file too, if nothing else is in it. False if there was none."""
        return self.delete_key(key_of(kind, namespace, name))

    def delete_key(self, key: Key) -> bool:
        """Remove an object wherever it stands, of whatever kind. False if there was none."""
        with files.locked(self.path):
            paths = self._locate(key)
            for path in paths:
                place = self._place(path, key)
                while place is not None:
                    self._remove(place)
                    place = self._place(path, key)
            return bool(paths)

    def patch(self, kind: type[K], namespace: str, name: str, merge: dict[str, Any], *, uid: str = "") -> K:
        """Change an object by a JSON merge patch (RFC 7386), and return it as it is then.

        With `uid`, only if it is still that very object. Raises NotFound, Invalid (nothing is written then),
        StoreError.
        """
        key = key_of(kind, namespace, name)
        with files.locked(self.path):
            if not self._locate(key):
                raise NotFound(f"{key}: not found; create it first")
            present = self.index.get(key)
            if uid and present is not None and present.metadata.uid != uid:
                raise NotFound(f"{key}: another one has its name by now; its uid is {present.metadata.uid}")
            return cast(K, self._merged(key, merge))

    def revise(
        self, kind: type[K], namespace: str, name: str, change: Callable[[K], dict[str, Any]], *, uid: str
    ) -> K:
        """Change an object by the JSON merge patch that `change` makes of it as it is ({}: none). Raises as `patch`."""
        key = key_of(kind, namespace, name)
        with files.locked(self.path):
            present = self.index.get(key) if self._locate(key) else None
            if present is None:
                raise NotFound(f"{key}: not found; create it first")
            if present.metadata.uid != uid:
                raise NotFound(f"{key}: another one has its name by now; its uid is {present.metadata.uid}")
            merge = change(cast(K, present))
            return cast(K, self._merged(key, merge) if merge else present)

    def watch(self, *kinds: type[Object]) -> Watch:
        """Every object of the kinds (default: all kinds) as "added", then "synced", then each change.

        `async for change in store.watch(Pod, Namespace)`; needs trio.
        """
        return Watch(self, kinds or tuple(KINDS.values()))

    def _merged(self, key: Key, merge: dict[str, Any]) -> Object:
        """The object once it is changed by a merge patch; the lock is held."""
        self._change(key, lambda old: merge_patch(old, merge))
        patched = self.index.get(key)
        if patched is None:
            raise StoreError(f"{key}: it is in its file, but with errors; correct them first")
        return patched

    def _locate(self, key: Key, *, everywhere: bool = True) -> _Paths:
        """The files that hold the object now, having looked at no more files than necessary."""
        known = self.index.places(key)
        if not known:
            known = [self._usual_file(key)]
        for path in known:
            self.index.refresh_file(path)
        found = self.index.places(key)
        if not found and everywhere:
            self.index.refresh()
            found = self.index.places(key)
        return found

    def _accepted(self, data: dict[str, Any]) -> Key:
        decoded = decode(data)
        if decoded.key is None or not decoded.counts:
            name = name_of(data, decoded)
            raise Invalid([Problem(name, "", str(fault), fault.remedy) for fault in decoded.faults])
        return decoded.key

    def _change(self, key: Key, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
        """Rewrite the object where it stands; the lock is held."""
        path = self.index.places(key)[0]
        if path.suffix == ".json" and (old := _single(path)) is not None:
            new = change(old)
            if new != old:
                self._same_object(key, new)
                self._write(path, _json(new))
            return path
        place = self._place(path, key)
        if place is None:
            raise StoreError(
                f"{key} ({self.index.relative(path)}): cannot be found in its file; correct the file's syntax first"
            )
        whole = place.manifest.documents[place.document].data
        old = whole if place.item is None else whole["items"][place.item]
        new = change(old)
        self._same_object(key, new)
        if place.item is not None:
            items = list(whole["items"])
            items[place.item] = new
            new = {**whole, "items": items}
        if new != whole:
            text = replace_document(
                place.text, place.manifest.documents, place.document, new, path.suffix == ".json"
            )
            self._write(path, (place.bom + text).encode())
        return path

    def _same_object(self, key: Key, data: dict[str, Any]) -> None:
        if self._accepted(data) != key:
            raise StoreError(
                f"{key}: its kind, namespace and name cannot be changed; delete it and create another"
            )

    def _remove(self, place: _Place) -> None:
        documents, is_json = place.manifest.documents, place.path.suffix == ".json"
        whole = documents[place.document].data
        if place.item is not None and len(whole["items"]) > 1:
            items = [item for index, item in enumerate(whole["items"]) if index != place.item]
            text = replace_document(place.text, documents, place.document, {**whole, "items": items}, is_json)
        else:
            text = remove_document(place.text, documents, place.document, is_json)
        if text:
            self._write(place.path, (place.bom + text).encode())
            return
        try:
            place.path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"{place.path}: cannot be removed: {error.strerror}; check permissions"
            ) from error
        self.index.refresh_file(place.path)

    def _place(self, path: Path, key: Key) -> _Place | None:
        """The place of the object in a file, read now; None if it is not in it."""
        try:
            text = path.read_bytes().decode("utf-8-sig")
            bom = "\ufeff" if path.read_bytes().startswith(b"\xef\xbb\xbf") else ""
        except (OSError, UnicodeDecodeError):
            return None
        manifest = read_manifest(text, self.index.relative(path), is_json=path.suffix == ".json")
        for entry in manifest.entries:
            if entry.decoded.key == key:
                return _Place(path, text, bom, manifest, entry.document, entry.item)
        return None

    def _write(self, path: Path, data: bytes) -> None:
        # What programs write as JSON changes often and can be made again; what people write is kept safe.
        files.write(path, data, durable=path.suffix != ".json")
        self.index.refresh_files([path])

    def _usual_file(self, key: Key) -> Path:
        """Where the resolver of the embedded mesh puts an object."""
        return self.path / object_file(key)

    def _new_file(self, key: Key) -> Path:
        words = [part for part in (key.kind.lower(), key.namespace, key.name) if part]
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(words))[:200]
        for number in range(1, 10_000):
            path = self.path / (f"{stem}.yaml" if number == 1 else f"{stem}-{number}.yaml")
            if not path.exists():
                return path
        raise StoreError(f"{key}: no free file name in {self.path}; remove some of {stem}-*.yaml")


def object_file(key: Key) -> Path:
    """The file of an object in a store that a program writes: KIND/NAMESPACE/NAME.json (_cluster without one)."""
    return Path(key.kind) / (key.namespace or "_cluster") / f"{key.name}.json"


def _single(path: Path) -> dict[str, Any] | None:
    """The one object in a JSON file, None if it holds something else."""
    try:
        data = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError):
        return None
    return (
        data if isinstance(data, dict) and isinstance(data.get("kind"), str) and "items" not in data else None
    )


def _json(data: dict[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n"
