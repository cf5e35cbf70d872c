"""Builds the CNI plugin: `python -m cni.plugin.build [FILE]`; one static program, hosts have nothing that it needs."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).parent / "ambient-cni.c"
BINARY = Path(__file__).parent / "ambient-cni"
"""Where the image has it, and where the agent looks for it."""

_STATIC = ("-static", "-Os", "-s", "-fstack-protector-strong", "-ffunction-sections", "-Wl,--gc-sections")
_CHECKED = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_ALWAYS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-format-truncation")


class BuildError(Exception):
    """The plugin cannot be compiled; the message says why and what helps."""


def build(target: Path = BINARY, *, checked: bool = False) -> Path:
    """Compile the plugin to `target` (mode 0755) and return it; `checked`: with the compiler's checks of memory.

    The file is replaced at once: a plugin that is there works all the time. Raises BuildError.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise BuildError("no C compiler: install one (Debian: apt-get install gcc libc6-dev), or set CC")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    command = [compiler, *_ALWAYS, *(_CHECKED if checked else _STATIC), "-o", str(fresh), str(SOURCE)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"{' '.join(command)}: {done.stderr.strip()}")
        fresh.chmod(0o755)
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)
    return target


def main(argv: Sequence[str]) -> int:
    """Build to the file named, or beside the source; the exit code."""
    try:
        built = build(Path(argv[0])) if argv else build()
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{built}: {built.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
