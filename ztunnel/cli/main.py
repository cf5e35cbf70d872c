"""Where the console script `ambient` begins: checks the interpreter first, so this file must parse on Python 3.6."""

import sys

MINIMUM = (3, 11)


def main() -> int:
    """Run `ambient` with sys.argv; the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    if sys.version_info < MINIMUM:
        needed, present = (".".join(map(str, version)) for version in (MINIMUM, sys.version_info[:2]))
        sys.stderr.write(
            f"error: ambient needs Python {needed} or newer, this is Python {present} ({sys.executable}); "
            f"install it with a newer one, e.g.: python{needed} -m pip install ambient-mesh\n"
        )
        return 1
    try:
        from ztunnel.cli.app import run

        return run()
    except KeyboardInterrupt:  # while the modules are loaded
        return 130


if __name__ == "__main__":
    sys.exit(main())
