"""Turns the .proto files into the checked-in Python modules: `python -m ztunnel.wire.generate`.

Needs the `test` extra (grpcio-tools, mypy-protobuf); nothing here runs in a mesh.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PROTOS = HERE / "proto"

# The modules' package, as a folder: protoc derives the generated imports from the .proto's (virtual) path.
PACKAGE = "ztunnel/wire"

WITH_SERVICES = frozenset({"citadel", "xds"})


class GenerateError(Exception):
    """protoc refused a .proto file, or is not installed; the message holds what it printed."""


def outputs() -> list[str]:
    """The file names that `generate` writes, sorted."""
    names: list[str] = []
    for proto in PROTOS.glob("*.proto"):
        names += [f"{proto.stem}_pb2.py", f"{proto.stem}_pb2.pyi"]
        if proto.stem in WITH_SERVICES:
            names.append(f"{proto.stem}_grpc.py")
    return sorted(names)


def generate(target: Path) -> None:
    """Write the modules of every .proto file into the folder `target`. Raises GenerateError."""
    # protoc starts its plugins from PATH: those of this interpreter's environment come first.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # Not straight into the target: grpclib's plugin writes an (empty) module for files without services too.
    with tempfile.TemporaryDirectory(prefix="wire-") as scratch:
        command = [
            *(sys.executable, "-m", "grpc_tools.protoc"),
            f"-I{PACKAGE}={PROTOS}",
            f"--python_out={scratch}",
            f"--mypy_out=quiet:{scratch}",
            f"--grpclib_python_out={scratch}",
            *(f"{PACKAGE}/{proto.name}" for proto in sorted(PROTOS.glob("*.proto"))),
        ]
        done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        if done.returncode != 0:
            raise GenerateError(f"{PROTOS}: protoc says: {done.stderr.strip()}")
        for name in outputs():
            (target / name).write_bytes((Path(scratch) / PACKAGE / name).read_bytes())


def main() -> None:
    """Command line: the target folder, by default this package."""
    parser = argparse.ArgumentParser(prog="python -m ztunnel.wire.generate", description=__doc__)
    parser.add_argument("target", nargs="?", type=Path, default=HERE, help="folder to write the modules into")
    generate(parser.parse_args().target)


if __name__ == "__main__":
    main()
