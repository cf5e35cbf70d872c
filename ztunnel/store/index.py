"""What the files of a directory hold, kept in memory and brought up to date by looking only at what changed."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

from ztunnel.store import files
from ztunnel.store.decode import decode_json
from ztunnel.store.files import Signature, Tree
from ztunnel.store.manifest import read_manifest
from ztunnel.store.models import Key, Object, group_of
from ztunnel.store.problems import Problem


class _File(NamedTuple):
    signature: Signature | None  # None: look again, it may have changed unnoticed
    objects: dict[Key, Object | None]  # None: known, but not acted on
    problems: list[Problem]


class Index:
    """The objects of a directory tree. Where one is in two files, the first file by name holds it.

    While a file cannot be parsed, or an object in it is wrong, what it last held stays: a slip of the pen in a file
    must not tear down what runs.
    """

    def __init__(self, root: Path, on_problem: Callable[[Problem], None] | None) -> None:
        self.root = root
        self.directories: list[Path] = []
        self.on_problems_change: Callable[[], None] | None = None
        self.cost = 0.0  # seconds that the last look at everything took
        self._on_problem = on_problem
        self._files: dict[Path, _File] = {}
        self._places: dict[Key, list[Path]] = {}
        self._objects: dict[tuple[str, str], dict[Key, Object]] = {}
        self._faulty: dict[Path, list[Problem]] = {}
        self._doubled = set[Key]()
        self._missing: Problem | None = None
        self._reported = set[Problem]()
        self._followers: list[set[Key]] = []
        self._scans: list[set[Path]] = []

    def refresh(self, patience: float = 0.0) -> set[Path]:
        """Look at the whole tree, at once; otherwise as `looking`."""
        steps = self.looking(patience)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return cast(set[Path], end.value)

    def looking(self, patience: float) -> Generator[None, None, set[Path]]:
        """Look at the whole tree in steps of 1 to 2 ms; what is found is taken in by the last one, all of it.

        A root that is missing is a problem; what was known stays. Files known from before that were changed less
        than `patience` seconds ago are left for later, somebody may be in the middle of writing them: they are
        what is returned.
        """
        tree = Tree({}, [])
        # Files that are read while the scan is under way: it may have passed their directories before they were there.
        fresh = set[Path]()
        self._scans.append(fresh)
        cost, started = 0.0, time.perf_counter()
        try:
            for _ in files.scan(self.root, tree):
                cost += time.perf_counter() - started
                yield
                started = time.perf_counter()
        except OSError as error:
            self.directories = []
            self._missing = Problem(
                "", str(self.root), f"{error.strerror}: the directory cannot be read", "create it again"
            )
            self._report()
            return set()
        finally:
            self._scans = [other for other in self._scans if other is not fresh]
        later = self._take(tree, fresh, patience)
        self.cost = cost + time.perf_counter() - started
        return later

    def _take(self, tree: Tree, fresh: set[Path], patience: float) -> set[Path]:
        self._missing = None
        self.directories = tree.directories
        changed = [
            path
            for path, signature in tree.files.items()
            if (known := self._files.get(path)) is None or known.signature != signature
        ]
        young = time.time_ns() - int(patience * 1e9)
        later = {
            path for path in changed if patience and path in self._files and tree.files[path].mtime_ns > young
        }
        gone = [path for path in self._files if path not in tree.files and path not in fresh]
        for path in gone:
            self._put(path, None)
        for path in changed:
            if path not in later:
                self._load(path)
        self._report()
        return later

    def refresh_files(self, paths: Iterable[Path]) -> None:
        """Look at these files again, whatever their times say."""
        for path in paths:
            if files.counts(path.name):
                self._load(path)
        self._report()

    def refresh_rested(self, paths: set[Path], patience: float) -> set[Path]:
        """Look again at those of these files that were not changed for `patience` seconds; the others."""
        young = time.time_ns() - int(patience * 1e9)
        later = {path for path in paths if _changed_ns(path) > young}
        self.refresh_files(sorted(paths - later))
        return later

    def refresh_file(self, path: Path) -> None:
        """Look at one file, and read it if it changed."""
        known = self._files.get(path)
        if known is not None and known.signature is not None:
            try:
                if Signature.of(path.stat()) == known.signature:
                    return
            except OSError:
                pass
        self._load(path)
        self._report()

    def of_kind(self, kind: type[Object]) -> dict[Key, Object]:
        """The objects of a kind by key, in no particular order; not to be changed."""
        return self._objects.get((group_of(kind.API_VERSION), kind.KIND), {})

    def get(self, key: Key) -> Object | None:
        return self._objects.get((key.group, key.kind), {}).get(key)

    def places(self, key: Key) -> list[Path]:
        """The files that hold the object, the one that counts first."""
        return sorted(self._places.get(key, ()))

    def holds_objects(self, path: Path) -> bool:
        """Whether the file held any object at the last look at it."""
        return path in self._files and bool(self._files[path].objects)

    def keys(self) -> Iterator[Key]:
        """Every object, those of kinds that are not acted on too."""
        return iter(self._places)

    @property
    def problems(self) -> list[Problem]:
        """Everything that is wrong now, by file and line."""
        found = [problem for problems in self._faulty.values() for problem in problems]
        found += self._duplicates()
        if self._missing is not None:
            found.append(self._missing)
        return sorted(found, key=lambda problem: (problem.file, problem.line, problem.object))

    def follow(self) -> set[Key]:
        """A set into which the keys of changed objects are put from now on; its owner empties it."""
        follower = set[Key]()
        self._followers.append(follower)
        return follower

    def unfollow(self, follower: set[Key]) -> None:
        # By identity: two empty sets are equal.
        self._followers = [other for other in self._followers if other is not follower]

    def relative(self, path: Path) -> str:
        try:
            return str(path.relative_to(self.root))
        except ValueError:
            return str(path)

    def _load(self, path: Path) -> None:
        now = time.time_ns()
        try:
            data, signature = files.read(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            self._put(path, None)
            return
        except OSError as error:
            old = self._files.get(path)
            problem = Problem(
                "", self.relative(path), f"cannot be read: {error.strerror}", "check its permissions"
            )
            self._put(path, _File(None, old.objects if old else {}, [problem]))
            return
        kept = signature if signature.settled(now) else None
        known = self._files.get(path)
        if path.suffix == ".json" and (obj := decode_json(data)) is not None:
            self._put(path, _File(kept, {obj.key: obj}, []))
            return
        self._put(path, self._read(path, data, kept, known))

    def _read(self, path: Path, data: bytes, signature: Signature | None, known: _File | None) -> _File:
        name = self.relative(path)
        before = known.objects if known is not None else {}
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            problem = Problem("", name, "is not UTF-8 text", "save it as UTF-8", line=line)
            return _File(signature, before, [problem])
        manifest = read_manifest(text, name, is_json=path.suffix == ".json")
        objects: dict[Key, Object | None] = {}
        problems = list(manifest.problems)
        for entry in manifest.entries:
            key = entry.decoded.key
            if key is None:
                continue
            if key in objects and key.name:
                remedy = "remove one of the two documents"
                line = manifest.documents[entry.document].line
                problems.append(Problem(str(key), name, "is in this file twice", remedy, line=line))
            elif entry.decoded.counts:
                objects[key] = entry.decoded.obj
            elif before.get(key) is not None:
                objects[key] = before[key]
        if not manifest.readable:
            objects = {**before, **objects}
        return _File(signature, objects, problems)

    def _put(self, path: Path, file: _File | None) -> None:
        for scan in self._scans:
            scan.add(path)
        old = self._files.pop(path, None)
        self._faulty.pop(path, None)
        if file is not None:
            self._files[path] = file
            if file.problems:
                self._faulty[path] = file.problems
        before = old.objects if old is not None else {}
        after = file.objects if file is not None else {}
        for key in before.keys() - after.keys():
            self._places[key].remove(path)
            if not self._places[key]:
                del self._places[key]
            self._settle(key)
        for key in after:
            if key not in before:
                self._places.setdefault(key, []).append(path)
            self._settle(key)

    def _settle(self, key: Key) -> None:
        """Bring the object that counts under `key` up to date, and tell the followers if it changed."""
        places = self._places.get(key, ())
        if len(places) > 1 and key.name:
            self._doubled.add(key)
        else:
            self._doubled.discard(key)
        now = self._files[min(places)].objects[key] if places else None
        objects = self._objects.setdefault((key.group, key.kind), {})
        if now == objects.get(key):
            return
        if now is None:
            del objects[key]
        else:
            objects[key] = now
        for follower in self._followers:
            follower.add(key)

    def _duplicates(self) -> Iterator[Problem]:
        for key in self._doubled:
            first, *others = sorted(self._places[key])
            for other in others:
                message = f"is in {self.relative(first)} too, which is the one that counts"
                yield Problem(str(key), self.relative(other), message, "remove one of the two")

    def _report(self) -> None:
        present = self.problems
        if set(present) == self._reported:
            return
        fresh = [problem for problem in present if problem not in self._reported]
        self._reported = set(present)
        if self._on_problem is not None:
            for problem in fresh:
                self._on_problem(problem)
        if self.on_problems_change is not None:
            self.on_problems_change()


def _changed_ns(path: Path) -> int:
    """When the file was last changed; 0 for one that is gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
