"""Programs of Kubernetes, built once from the Go module proxy and kept outside the tree.

`python3 -m tests.kube.binaries` builds what is missing (about 7 minutes on two cores with cold caches, 500 MB) and
says where it is; with `--begin` the build goes on in the background, and a later call waits for it. Uses the standard
library only.
"""

import argparse
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VERSION = "1.34.4"
GO_VERSION = (1, 24)
PROGRAMS = ("kubectl", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")
MODULE = "k8s.io/kubernetes"


class BuildError(Exception):
    """The programs cannot be built; the message says what is missing or what the compiler said."""


def cache() -> Path:
    """The folder for everything of the project that is worth keeping between checkouts."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "ambient-mesh"


def kubernetes() -> Path:
    """The folder with all PROGRAMS, built if they are not there yet. Raises BuildError."""
    folder = cache() / f"kubernetes-{VERSION}"
    if not _missing(folder):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock"), "another build is under way: waiting for it"):
        missing = _missing(folder)
        if missing:
            _build(folder, missing)
    return folder


@contextmanager
def locked(path: Path, word: str = "") -> Iterator[None]:
    """Hold an exclusive lock between processes; it ends with its holder. `word` is said when there is a wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if word:
                _say(word)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _missing(folder: Path) -> list[str]:
    return [name for name in PROGRAMS if not os.access(folder / name, os.X_OK)]


def _build(folder: Path, missing: list[str]) -> None:
    go = _go()
    began = time.monotonic()
    work = folder / ".work"  # one that was killed left its own
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        _say(f"building Kubernetes {VERSION}: fetching its sources")
        (work / "go.mod").write_text(f"module kube\n\ngo {'.'.join(map(str, GO_VERSION))}\n")
        described = json.loads(_run([go, "mod", "download", "-json", f"{MODULE}@v{VERSION}"], work))
        (work / "go.mod").write_text(_go_mod(Path(described["GoMod"]).read_text()))
        minor = VERSION.removeprefix("1.")
        stamp = "k8s.io/component-base/version"
        values = {
            "gitVersion": f"v{VERSION}",
            "gitMajor": "1",
            "gitMinor": minor.split(".")[0],
            "gitTreeState": "clean",
        }
        flags = " ".join(["-s -w", *(f"-X {stamp}.{name}={value}" for name, value in values.items())])
        for number, name in enumerate(missing, 1):
            _say(
                f"building Kubernetes {VERSION}: {name} ({number} of {len(missing)}, {time.monotonic() - began:.0f} s)"
            )
            built = folder / f".{name}.new"
            _run([go, "build", "-mod=mod", "-ldflags", flags, "-o", str(built), f"{MODULE}/cmd/{name}"], work)
            built.rename(folder / name)
    finally:
        shutil.rmtree(work)
    _say(f"built Kubernetes {VERSION} in {time.monotonic() - began:.0f} s: {folder}")


def _go_mod(theirs: str) -> str:
    """A module that needs Kubernetes. Its staging modules have no version of their own in its go.mod; they are
    published as v0.MINOR.PATCH."""
    staging = sorted(set(re.findall(r"^\s+(k8s\.io/[a-z-]+) v0\.0\.0$", theirs, re.MULTILINE)))
    version = f"v0.{VERSION.removeprefix('1.')}"
    lines = [
        f"module kube\n\ngo {'.'.join(map(str, GO_VERSION))}.0\n",
        f"require {MODULE} v{VERSION}\n",
        "replace (",
    ]
    lines += [f"\t{module} => {module} {version}" for module in staging]
    return "\n".join([*lines, ")\n"])


def _go() -> str:
    """The Go compiler. Raises BuildError when there is none, or one that is too old."""
    path = f"{os.environ.get('PATH', '')}:/usr/local/go/bin"
    go = shutil.which("go", path=path)
    wanted = ".".join(map(str, GO_VERSION))
    if go is None:
        raise BuildError(
            f"Kubernetes {VERSION} is built with Go {wanted} or newer: no `go` on the PATH (https://go.dev/dl)"
        )
    said = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True).stdout.strip()
    found = re.match(r"go(\d+)\.(\d+)", said)
    if found is None or (int(found[1]), int(found[2])) < GO_VERSION:
        raise BuildError(
            f"Kubernetes {VERSION} needs Go {wanted} or newer; {go} is {said or 'none that works'}"
        )
    return go


def _run(argv: list[str], work: Path) -> str:
    environment = {
        **os.environ,
        "CGO_ENABLED": "0",
        "GOFLAGS": "-mod=mod",
        "GOWORK": "off",
        "GOTMPDIR": str(work),
    }
    done = subprocess.run(argv, cwd=work, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-20:])
        raise BuildError(f"{' '.join(argv[:3])} ... failed:\n{tail}")
    return done.stdout


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=f"Build Kubernetes {VERSION} for the tests, if it is not there."
    )
    parser.add_argument(
        "--begin", action="store_true", help="return at once; the build goes on in the background"
    )
    arguments = parser.parse_args()
    if arguments.begin:
        if _missing(cache() / f"kubernetes-{VERSION}"):
            cache().mkdir(parents=True, exist_ok=True)
            with (cache() / "build.log").open("w") as log:
                subprocess.Popen(
                    ["nice", sys.executable, "-m", "tests.kube.binaries"],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # the compiler ends, too
    try:
        print(kubernetes())
    except BuildError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
