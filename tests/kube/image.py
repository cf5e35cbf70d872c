"""The lab's images, put together from this machine's files, without registry or daemon: docker archives.

lab.local/ambient:test is the project: the interpreter of this environment, the project's dependencies for running (none
for testing), its packages as they are in the tree, and its compiled CNI plugin. lab.local/tools:test is for clients and
servers of tests: the same interpreter, and PROGRAMS. lab.local/pause:1 is every pod's first container.
manifests/Dockerfile builds the image that users get.
"""

import hashlib
import io
import json
import os
import py_compile
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

from tests.kube.binaries import cache, locked

AMBIENT = "lab.local/ambient:test"
TOOLS = "lab.local/tools:test"
PAUSE = "lab.local/pause:1"
ROOT = Path(__file__).parents[2]
PLUGIN = Path("cni/plugin/ambient-cni")  # compiled, beside its source
PACKAGES = ("ztunnel", "cni", "waypoint", "manifests")
# fmt: off
PROGRAMS = (
    "bash", "cat", "chmod", "cp", "curl", "cut", "date", "dd", "dig", "echo", "env", "false", "grep",
    "h2load", "head", "hostname", "id", "ip", "iperf3", "kill", "ln", "ls", "mkdir", "mv", "ncat",
    "nft", "nginx", "nsenter", "openssl", "ps", "rm", "sed", "seq", "sh", "sleep", "ss", "stat",
    "sysctl", "tail", "tee", "test", "timeout", "touch", "tr", "true", "uname", "wc", "wrk",
)
# fmt: on
SHELL = ("sh", "cat", "ls", "sleep")  # what little of a shell the plain Python base image of users also has
UNUSED = {"test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "site-packages"}
UNUSED_PARTS = {
    "..",
    "tests",
    "_tests",
    "aio",
}  # of packages; the last is the Kubernetes client once more, for asyncio
OPTIMIZED = 2  # the nodes' daemons run without docstrings and assertions (python -OO)
NOT_ON_NODES = {"kubernetes", "scapy"}  # large packages that no daemon of a node loads
FOLDERS = (
    "tmp",
    "proc",
    "sys",
    "dev",
    "run",
    "var",
    "var/log/nginx",
    "var/lib/nginx",
    "root",
    "etc",
    "usr/local/bin",
)
MERGED = ("bin", "sbin", "lib", "lib32", "lib64")
KEPT = 4  # archives in the cache


class ImageError(Exception):
    """An image cannot be built; the message says which part of it is missing."""


class Built(NamedTuple):
    """An archive and the images in it."""

    path: Path
    names: tuple[str, ...]


class Files:
    """A layer in the making: places in the image, and what lies there."""

    def __init__(self) -> None:
        self._files: dict[str, Path] = {}
        self._texts: dict[str, tuple[bytes, int]] = {}
        self._links: dict[str, str] = {}
        self._binaries: list[Path] = []
        self._modules: dict[str, tuple[Path, tuple[int, ...]]] = {}  # and for which levels of optimization

    def text(self, place: str, content: str | bytes, mode: int = 0o644) -> None:
        self._texts[_place(place)] = (content.encode() if isinstance(content, str) else content, mode)

    def link(self, place: str, target: str) -> None:
        self._links[_place(place)] = target

    def file(self, source: Path, place: str = "") -> None:
        """A file with its content, and the shared libraries that it needs."""
        self._files[_place(place or str(source))] = source.resolve()
        if source.suffix == ".so" or ".so." in source.name or os.access(source, os.X_OK):
            with source.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    self._binaries.append(source)

    def module(self, source: Path, place: str, levels: Iterable[int] = (0, OPTIMIZED)) -> None:
        """A Python file, to which its compiled forms are added when the layer is written."""
        self.text(place, source.read_bytes())
        self._modules[_place(place)] = source, tuple(levels)

    def program(self, name: str) -> None:
        """A program of this machine at its place. Raises ImageError when it is not installed."""
        found = shutil.which(name, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        if found is None:
            raise ImageError(
                f"{TOOLS}: program {name} is not installed; `make programs` installs what tests need"
            )
        self.file(Path(found))

    def tree(self, source: Path, place: str = "", skip: Iterable[str] = ()) -> None:
        skipped = {*skip}
        for folder, folders, names in os.walk(source):
            folders[:] = sorted(
                name for name in folders if name not in skipped and not name.startswith("config-3")
            )
            for name in sorted(names):
                path = Path(folder, name)
                if path.suffix != ".a" and not name.startswith("_tkinter") and path.exists():
                    self.file(path, f"{place or source}/{path.relative_to(source)}")

    def key(self) -> str:
        """Tells this content from other content. Large files are known by size and time."""
        digest = hashlib.sha256()
        for place, path in sorted(self._files.items()):
            status = path.stat()
            digest.update(
                f"{place}\0{path}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_mode}\n".encode()
            )
        for place, (content, mode) in sorted(self._texts.items()):
            digest.update(f"{place}\0{mode}\0".encode() + hashlib.sha256(content).digest())
        digest.update(json.dumps(sorted(self._links.items())).encode())
        return digest.hexdigest()[:24]

    def write(self, target: Path, merged: bool = False) -> None:
        """The layer as a tar file; `merged`: with the links of the lowest layer, /bin to usr/bin and the like."""
        self._compile()
        made: set[str] = set()
        with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as tar:

            def folder(place: str) -> None:
                if place and place not in made:
                    folder(os.path.dirname(place))
                    made.add(place)
                    info = tarfile.TarInfo(place)
                    info.type = tarfile.DIRTYPE
                    info.mode = 0o1777 if place == "tmp" else 0o755
                    tar.addfile(info)

            def link(place: str, to: str) -> None:
                info = tarfile.TarInfo(place)
                info.type = tarfile.SYMTYPE
                info.linkname = to
                tar.addfile(info)

            if merged:
                for place in (*FOLDERS, *(f"usr/{name}" for name in MERGED)):
                    folder(place)
                for name in MERGED:
                    link(name, f"usr/{name}")
                link("var/run", "/run")
            for place, path in sorted(self._files.items()):
                folder(os.path.dirname(place))
                info = tarfile.TarInfo(place)
                status = path.stat()
                # Compiled modules are valid for the time of their source.
                info.size, info.mtime = status.st_size, int(status.st_mtime)
                info.mode = 0o755 if status.st_mode & 0o100 else 0o644
                with path.open("rb") as content:
                    tar.addfile(info, content)
            for place, (data, mode) in sorted(self._texts.items()):
                folder(os.path.dirname(place))
                info = tarfile.TarInfo(place)
                info.size, info.mode = len(data), mode
                tar.addfile(info, io.BytesIO(data))
            for place, to in sorted(self._links.items()):
                folder(os.path.dirname(place))
                link(place, to)

    def libraries(self) -> None:
        """Add what the loader would load for the programs and libraries so far. One call for all: it is slow."""
        said = subprocess.run(["ldd", *map(str, self._binaries)], capture_output=True, text=True).stdout
        for library in sorted({*re.findall(r"(/\S+) \(0x", said)}):
            self._files.setdefault(_place(library), Path(library).resolve())

    def _compile(self) -> None:
        """The compiled forms of the modules. They are not compared with the source: containers' files do not change."""
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        with tempfile.TemporaryDirectory() as folder:
            for place, (source, levels) in self._modules.items():
                for level in levels:
                    compiled = Path(folder, "compiled")
                    py_compile.compile(
                        str(source), str(compiled), f"/{place}", True, optimize=level, invalidation_mode=mode
                    )
                    kind = f".opt-{level}" if level else ""
                    cached = f"__pycache__/{source.stem}.{sys.implementation.cache_tag}{kind}.pyc"
                    self.text(f"{os.path.dirname(place)}/{cached}", compiled.read_bytes())


def build() -> Built:
    """The archive with all images, from the cache where nothing has changed. Raises ImageError."""
    folder = cache() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        layers = {
            "python": _python(),
            "ambient": _ambient(folder),
            "tools": _tools(),
            "pause": _pause(folder),
        }
        keys = {name: files.key() for name, files in layers.items()}
        version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
        archive = (
            folder
            / f"images-{hashlib.sha256('-'.join([*keys.values(), version]).encode()).hexdigest()[:24]}.tar"
        )
        names = (AMBIENT, TOOLS, PAUSE)
        if archive.exists():
            archive.touch()
            return Built(archive, names)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as place:
            paths = {}
            for name, files in layers.items():
                # The large ones are kept by themselves: they change when the environment does, not with the code.
                path = (
                    folder / f"layer-{name}-{keys[name]}-{version}.tar"
                    if name in ("python", "tools")
                    else Path(place, name)
                )
                if not path.exists():
                    files.write(Path(place, "new"), merged=name == "python")
                    Path(place, "new").rename(path)
                path.touch()
                paths[name] = path
            images = {
                AMBIENT: ([paths["python"], paths["ambient"]], []),
                TOOLS: ([paths["python"], paths["tools"]], ["/bin/sh"]),
                PAUSE: ([paths["pause"]], ["/pause"]),
            }
            _archive(Path(place, "archive"), images)
            Path(place, "archive").rename(archive)
        for pattern in ("images-*.tar", "layer-python-*.tar", "layer-tools-*.tar"):
            for old in sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)[:-KEPT]:
                old.unlink()
        return Built(archive, names)


def init_program(folder: Path) -> Path:
    """The compiled init.c, which is both a cell's last program and a pod's first. Raises ImageError."""
    source = Path(__file__).with_name("init.c")
    program = folder / f"init-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f".init-{os.getpid()}"
        compiler = ["gcc", "-Os", "-static", "-s", "-o", str(new), str(source)]
        try:
            subprocess.run(compiler, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise ImageError("init.c: no gcc; `make programs` installs what tests need") from None
        except subprocess.CalledProcessError as error:
            raise ImageError(f"init.c: {error.stderr}") from None
        new.rename(program)
    return program


def _pause(folder: Path) -> Files:
    files = Files()
    files.text("/pause", init_program(folder).read_bytes(), 0o755)
    return files


def _python() -> Files:
    """The interpreter below this environment, and what the project needs to run."""
    files = Files()
    base = Path(sys.base_prefix)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    interpreter = base / "bin" / version
    files.file(interpreter)
    for name in ("python", "python3"):
        files.link(f"/usr/local/bin/{name}", str(interpreter))
    files.tree(base / "lib" / version, skip=UNUSED)
    packages = _site_packages()
    for path, place in _dependencies():
        if place.split("/")[0] in NOT_ON_NODES or path.suffix not in (".py", ".pyc"):
            files.file(path, f"{packages}/{place}")
        elif path.suffix == ".py":
            files.module(path, f"{packages}/{place}")
    for name in SHELL:
        files.program(name)
    for library in ("/lib/x86_64-linux-gnu/libgcc_s.so.1", "/lib/aarch64-linux-gnu/libgcc_s.so.1"):
        if Path(library).exists():
            files.file(Path(library))  # loaded by name when a thread ends
    files.libraries()
    files.text("/etc/passwd", "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/nonexistent:/bin/false\n")
    files.text("/etc/group", "root:x:0:\nnogroup:x:65534:\n")
    files.text("/etc/nsswitch.conf", "hosts: files dns\n")
    return files


def _site_packages() -> str:
    """Where the interpreter itself, outside an environment, looks for packages."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    interpreter = Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")
    return subprocess.run(
        [interpreter, "-I", "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def _project() -> Mapping[str, Any]:
    project: Mapping[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def _dependencies() -> Iterator[tuple[Path, str]]:
    """Files of all packages that the project needs to run, and their places below site-packages."""
    waiting = [Requirement(text) for text in _project()["dependencies"]]
    done: set[str] = set()
    while waiting:
        wanted = waiting.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if name in done or (wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})):
            continue
        done.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise ImageError(
                f"{AMBIENT}: package {name} is not installed; `make lint` sets up .venv"
            ) from None
        waiting += [Requirement(text) for text in found.requires or []]
        for file in found.files or []:
            path = Path(str(found.locate_file(file)))
            if (
                not UNUSED_PARTS.intersection(file.parts)
                and path.is_file()
                and path.suffix not in (".pyi", ".h")
            ):
                yield path, str(file)


def _plugin(folder: Path) -> Path:
    """The CNI plugin, compiled by its own rules when its files have changed. Raises ImageError."""
    sources = sorted(path for path in (ROOT / PLUGIN).parent.iterdir() if path.suffix in (".c", ".h", ".py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    program = folder / f"plugin-{digest}"
    if not program.exists():
        argv = [sys.executable, "-m", "cni.plugin.build", str(program)]
        done = subprocess.run(
            argv, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise ImageError(f"{AMBIENT}: the CNI plugin: {(done.stderr or done.stdout).strip()}")
    return program


def _ambient(folder: Path) -> Files:
    """The project's packages as they are now, compiled, so that a container with a read-only disk starts fast."""
    files = Files()
    packages = _site_packages()
    files.text(f"{packages}/{PLUGIN}", _plugin(folder).read_bytes(), 0o755)
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            place = f"{packages}/{path.relative_to(ROOT)}"
            if not path.is_file() or "__pycache__" in path.parts or path.relative_to(ROOT) == PLUGIN:
                continue
            if path.suffix == ".py":
                files.module(path, place)
            else:
                files.text(place, path.read_bytes(), 0o755 if os.access(path, os.X_OK) else 0o644)
    project = _project()
    about = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    files.text(f"{packages}/ambient_mesh-{project['version']}.dist-info/METADATA", about)
    module, _, function = project["scripts"]["ambient"].partition(":")
    script = f"#!/usr/local/bin/python\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
    files.text("/usr/local/bin/ambient", script, 0o755)
    return files


def _tools() -> Files:
    files = Files()
    for name in PROGRAMS:
        files.program(name)
    files.libraries()
    modules = Path("/etc/nginx/mime.types")
    if modules.exists():
        files.file(modules)
    openssl = Path("/etc/ssl/openssl.cnf")
    if openssl.exists():
        files.file(openssl)
    files.text(
        "/etc/passwd",
        "root:x:0:0::/root:/bin/sh\nwww-data:x:33:33::/:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
    )
    files.text("/etc/group", "root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n")
    return files


def _archive(target: Path, images: Mapping[str, tuple[list[Path], list[str]]]) -> None:
    """Docker's archive format: layers, a configuration and a list, each named by its digest."""
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    environment = [f"PATH={path}", "PYTHONUNBUFFERED=1", "PYTHONDONTWRITEBYTECODE=1"]
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    digests: dict[Path, str] = {}
    manifest = []
    with tarfile.open(target, "w") as tar:
        for name, (layers, command) in images.items():
            for layer in layers:
                if layer not in digests:
                    with layer.open("rb") as data:
                        digests[layer] = hashlib.file_digest(data, "sha256").hexdigest()
                    tar.add(layer, f"{digests[layer]}/layer.tar")
            config = json.dumps(
                {
                    "architecture": machine,
                    "os": "linux",
                    "config": {"Env": environment, "Cmd": command},
                    "rootfs": {
                        "type": "layers",
                        "diff_ids": [f"sha256:{digests[layer]}" for layer in layers],
                    },
                    "history": [{"created_by": "tests/kube/image.py"} for _ in layers],
                }
            ).encode()
            place = f"{hashlib.sha256(config).hexdigest()}.json"
            _add(tar, place, config)
            manifest.append(
                {
                    "Config": place,
                    "RepoTags": [name],
                    "Layers": [f"{digests[layer]}/layer.tar" for layer in layers],
                }
            )
        _add(tar, "manifest.json", json.dumps(manifest).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _place(path: str) -> str:
    """A path in the image: /bin, /lib and the like lie below /usr."""
    place = os.path.normpath(path).lstrip("/")
    return f"usr/{place}" if place.split("/")[0] in MERGED else place
