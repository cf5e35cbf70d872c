"""`python -m tests.kube.lab`: a lab for developers, which stays until it is taken down."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.kube import image
from tests.kube.binaries import BuildError
from tests.kube.cell import CellError
from tests.kube.image import ImageError
from tests.kube.lab import Lab, LabError
from tests.kube.record import LabInUse, Record, all_records, sweep
from tests.kube.rest import RestError

DEFAULT = "dev"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kube.lab", description="A Kubernetes of your own.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", help="start a lab: etcd, API server, and nodes with the project's images")
    up.add_argument("--nodes", type=int, choices=(0, 1, 2), default=2)
    down = verbs.add_parser("down", help="end a lab and remove every trace of it")
    image_ = verbs.add_parser("image", help="build the images; with --import into a lab that is up")
    image_.add_argument("--import", dest="into", action="store_true")
    enter = verbs.add_parser("node", help="a shell, or a program, in a node's namespaces")
    enter.add_argument("number", type=int, choices=(1, 2))
    kubectl = verbs.add_parser("kubectl", help="kubectl as administrator")
    for verb in (up, down, image_, enter, kubectl):
        verb.add_argument(
            "--name", default=os.environ.get("AMBIENT_LAB", DEFAULT), help="of the lab (%(default)s)"
        )
    for verb in (enter, kubectl):
        verb.add_argument("arguments", nargs=argparse.REMAINDER)
    verbs.add_parser("list", help="the labs of this machine")
    try:
        return _run(parser.parse_args())
    except (LabError, LabInUse, CellError, ImageError, BuildError, RestError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    match arguments.verb:
        case "up":
            began = time.monotonic()
            lab = Lab.up(arguments.name, arguments.nodes, detached=True, say=_say)
            _say(f"lab {lab.name} is up after {time.monotonic() - began:.1f} s")
            print(f"export KUBECONFIG={lab.kubeconfig} AMBIENT_LAB={lab.name}")
        case "down":
            sweep()
            record = Record(arguments.name)
            record.own()
            record.clear()
            record.disown()
        case "image":
            built = image.build()
            print(built.path)
            if arguments.into:
                Lab.attach(arguments.name).import_image(built.path)
        case "list":
            sweep()
            for record in all_records():
                print(f"{record.name}\t{Path(record.folder) / 'admin.conf'}")
        case "kubectl":
            lab = Lab.attach(arguments.name)
            return subprocess.run(lab.kubectl_command(*arguments.arguments)).returncode
        case "node":
            cell = Lab.attach(arguments.name).node(arguments.number).cell
            return subprocess.run(cell.enter(arguments.arguments or ["bash"])).returncode
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
