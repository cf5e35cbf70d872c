"""Every verb that acts on a running mesh, as a program of its own, against a real directory, resolver and socket."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.cli.conftest import Machine
from ztunnel.embedded.testing import until
from ztunnel.store.models import Namespace, Pod, Service

SERVICE = """\
# Reviews, as people know them.
apiVersion: v1
kind: Service
metadata:
  name: reviews
spec:
  selector: {app: reviews}
  ports: [{name: http, port: 9080}]
"""

DEPLOYMENT = """\
apiVersion: apps/v1
kind: Deployment
metadata:
  name: reviews
spec:
  replicas: 2
  selector: {matchLabels: {app: reviews}}
  template:
    metadata: {labels: {app: reviews, version: v1}}
    spec:
      containers:
        - {name: reviews, command: [sleep, infinity]}
        - {name: helper, command: [sleep, infinity]}
"""

NAMESPACES = """\
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Namespace
metadata: {name: own}
"""

POD = """\
apiVersion: v1
kind: Pod
metadata: {name: legacy, labels: {app: legacy}}
spec:
  nodeName: node-2
  containers: [{name: main, command: [sleep, infinity]}]
"""


def write(directory: Path, **files: str) -> list[str]:
    directory.mkdir(exist_ok=True)
    for name, text in files.items():
        (directory / f"{name}.yaml").write_text(text)
    return [str(directory / f"{name}.yaml") for name in files]


def apply(machine: Machine, *texts: str) -> str:
    return machine.ok("apply", "-f", "-", given="---\n".join(texts))


def pods(machine: Machine) -> list[Pod]:
    return [pod for pod in machine.objects.list(Pod) if pod.metadata.owner_references]


# apply


def test_apply_creates_then_changes_nothing_then_configures(machine: Machine, tmp_path: Path) -> None:
    service, deployment = write(tmp_path / "in", service=SERVICE, deployment=DEPLOYMENT)
    both = machine.ok("apply", "-f", service, "-f", deployment)
    assert both == "service/reviews created\ndeployment/reviews created\n"
    seen = machine.objects.get(Service, "default", "reviews")
    assert seen is not None
    assert seen.addresses
    assert len(pods(machine)) == 2
    assert (
        machine.ok("apply", "-f", str(tmp_path / "in"))
        == "deployment/reviews unchanged\nservice/reviews unchanged\n"
    )
    Path(service).write_text(SERVICE.replace("9080", "9081"))
    assert machine.ok("apply", "-f", service) == "service/reviews configured\n"
    seen = machine.objects.get(Service, "default", "reviews")
    assert seen is not None
    assert [port.port for port in seen.spec.ports] == [9081]


def test_apply_from_standard_input_json_and_lists(machine: Machine) -> None:
    items = [yaml.safe_load(SERVICE), yaml.safe_load(POD)]
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    assert machine.ok("apply", "-f", "-", given=text) == "service/reviews created\npod/legacy created\n"
    assert machine.objects.get(Pod, "default", "legacy") is not None


def test_apply_keeps_fields_the_mesh_does_not_know_and_comments_of_the_users_files(machine: Machine) -> None:
    extra = POD.replace("main,", "main, readinessProbe: {tcpSocket: {port: 1}},")
    apply(machine, extra)
    assert "readinessProbe" in "".join(path.read_text() for path in machine.directory.glob("*.yaml"))
    (path,) = write(machine.directory, mine=SERVICE)
    until(lambda: machine.objects.get(Service, "default", "reviews"), "the file is resolved")
    changed = SERVICE.replace("# Reviews, as people know them.\n", "").replace("9080", "9090")
    assert machine.ok("apply", "-f", "-", given=changed) == "service/reviews configured\n"
    assert Path(path).read_text() == SERVICE.replace("9080", "9090")


def test_apply_into_a_namespace(machine: Machine) -> None:
    done = machine.ambient("apply", "-n", "nowhere", "-f", "-", given=POD)
    assert (done.returncode, done.stdout) == (0, "pod/legacy created\n")
    assert "warning: Pod nowhere/legacy" in done.stderr
    apply(machine, NAMESPACES)
    assert machine.ok("apply", "-n", "shop", "-f", "-", given=SERVICE) == "service/reviews created\n"
    assert machine.objects.get(Service, "shop", "reviews") is not None
    assert machine.objects.get(Service, "default", "reviews") is None
    named = SERVICE.replace("name: reviews", "name: reviews\n  namespace: own")
    machine.ok("apply", "-n", "shop", "-f", "-", given=named)
    assert machine.objects.get(Service, "own", "reviews") is not None


def test_apply_reports_what_is_wrong_and_applies_the_rest(machine: Machine, tmp_path: Path) -> None:
    broken, unknown, wrong = (
        "a: [b\n",
        "apiVersion: v1\nkind: Gadget\nmetadata: {name: x}\n",
        SERVICE.replace("9080", "99999"),
    )
    write(tmp_path / "in", a=broken, b=unknown, c=wrong, d=POD)
    done = machine.ambient("apply", "-f", str(tmp_path / "in"))
    assert (done.returncode, done.stdout) == (1, "pod/legacy created\n")
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert any("a.yaml:2" in line and "not valid YAML" in line for line in lines)
    assert any("Gadget" in line and "b.yaml" in line for line in lines)
    assert any("Service default/reviews" in line and "spec.ports[0].port" in line for line in lines)


def test_apply_warns_of_what_is_not_in_force(machine: Machine) -> None:
    foreign = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: deny}\nspec: {podSelector: {}}\n"
    done = machine.ambient("apply", "-f", "-", given=foreign)
    assert (done.returncode, done.stdout) == (0, "networkpolicy/deny created\n")
    assert done.stderr.startswith(
        "warning: NetworkPolicy default/deny (-:1): is not enforced by this version"
    )


def test_apply_tells_what_the_mesh_finds_wrong(machine: Machine) -> None:
    lonely = SERVICE.replace("{app: reviews}", "{app: nobody}")
    done = machine.ambient("apply", "-f", "-", given=lonely)
    assert (done.returncode, done.stdout) == (0, "service/reviews created\n")
    assert done.stderr.startswith("warning: Service default/reviews")
    without_command = POD.replace("command: [sleep, infinity]", "image: nginx")
    done = machine.ambient("apply", "-f", "-", given=without_command)
    assert done.returncode == 0
    assert "warning: Pod default/legacy" in done.stderr


def test_apply_of_what_cannot_be_read(machine: Machine, tmp_path: Path) -> None:
    assert "missing.yaml does not exist" in machine.fails("apply", "-f", str(tmp_path / "missing.yaml"))
    (tmp_path / "empty").mkdir()
    assert "files in" in machine.fails("apply", "-f", str(tmp_path / "empty"))
    assert "no objects in -" in machine.fails("apply", "-f", "-", given="# nothing\n")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    assert "is not UTF-8 text; save it as UTF-8" in machine.fails("apply", "-f", str(tmp_path / "latin.yaml"))


# delete


def test_delete_by_name_by_file_and_what_is_not_there(machine: Machine, tmp_path: Path) -> None:
    apply(machine, SERVICE, POD)
    assert machine.ok("delete", "svc", "reviews") == "service/reviews deleted\n"
    assert machine.objects.get(Service, "default", "reviews") is None
    (path,) = write(tmp_path / "in", pod=POD)
    assert machine.ok("delete", "-f", path) == "pod/legacy deleted\n"
    assert machine.objects.get(Pod, "default", "legacy") is None
    assert "Pod default/legacy not found" in machine.fails("delete", "-f", path)
    assert machine.ok("delete", "-f", path, "--ignore-not-found") == ""
    assert list(machine.directory.iterdir()) == []


def test_delete_keeps_the_other_documents_of_a_file(machine: Machine) -> None:
    (path,) = write(machine.directory, both=SERVICE + "---\n" + POD)
    until(lambda: machine.objects.get(Pod, "default", "legacy"), "the file is resolved")
    machine.ok("delete", "pod", "legacy")
    assert Path(path).read_text() == SERVICE


def test_a_deployments_pod_is_not_deleted_alone(machine: Machine) -> None:
    apply(machine, DEPLOYMENT)
    first = pods(machine)[0].name
    said = machine.fails("delete", "pod", first)
    assert f"Pod default/{first} belongs to Deployment default/reviews" in said
    assert "ambient delete deployment reviews" in said
    machine.ok("delete", "deployment", "reviews")
    until(lambda: not pods(machine), "its pods are gone")
    assert "made by the mesh itself" in machine.fails("delete", "node", "node-1")


def test_a_namespace_that_is_always_there_loses_its_labels(machine: Machine) -> None:
    machine.ok("label", "namespace", "default", "istio.io/dataplane-mode=ambient")
    assert machine.ok("delete", "namespace", "default") == "namespace/default deleted\n"
    seen = machine.objects.get(Namespace, "", "default")
    assert seen is not None
    assert seen.metadata.labels.get("istio.io/dataplane-mode") is None


# get


def test_get_shows_tables(machine: Machine) -> None:
    apply(machine, SERVICE, DEPLOYMENT, POD)
    heading, *rows = machine.ok("get", "pods").splitlines()
    assert heading.split() == ["NAME", "READY", "STATUS", "RESTARTS", "IP", "NODE", "MESH", "AGE"]
    assert len(rows) == 3
    legacy = next(row for row in rows if row.startswith("legacy")).split()
    assert (legacy[1], legacy[3], legacy[5], legacy[6]) == ("0/1", "0", "node-2", "no")
    wide = machine.ok("get", "po", "legacy", "-o", "wide").splitlines()
    assert "SERVICE ACCOUNT" in wide[0]
    assert " default " in wide[1]
    assert "app=legacy" in wide[1]
    services = machine.ok("get", "services").splitlines()
    assert services[0].split() == ["NAME", "TYPE", "CLUSTER-IP", "PORTS", "AGE"]
    assert services[1].split()[1:4:2] == ["ClusterIP", "9080/TCP"]
    assert machine.ok("get", "deploy").splitlines()[1].split()[:3] == ["reviews", "0/2", "2"]
    assert machine.ok("get", "nodes").splitlines()[1].split()[0] == "node-1"
    assert machine.ok("get", "sa").splitlines()[0].split() == ["NAME", "PODS", "AGE"]


def test_get_of_all_namespaces_several_kinds_and_selectors(machine: Machine) -> None:
    apply(machine, NAMESPACES, SERVICE, DEPLOYMENT, POD)
    machine.ok("apply", "-n", "shop", "-f", "-", given=POD)
    rows = machine.ok("get", "pods", "-A").splitlines()
    assert rows[0].startswith("NAMESPACE ")
    assert [row.split()[0] for row in rows[1:]].count("shop") == 1
    assert len(machine.ok("get", "pods", "-l", "app=reviews,version!=v2").splitlines()) == 3
    assert len(machine.ok("get", "pods", "-l", "!version", "-A").splitlines()) == 3
    both = machine.ok("get", "services,deployments").split("\n\n")
    assert [text.splitlines()[1].split()[1] for text in both] == ["ClusterIP", "0/2"]
    nothing = machine.ambient("get", "services", "-n", "empty")
    assert (nothing.returncode, nothing.stdout, nothing.stderr) == (0, "", "no services in namespace empty\n")


def test_get_as_json_and_yaml_is_what_can_be_applied_again(machine: Machine) -> None:
    apply(machine, SERVICE, POD)
    one = json.loads(machine.ok("get", "service", "reviews", "-o", "json"))
    assert (one["apiVersion"], one["kind"], one["metadata"]["name"]) == ("v1", "Service", "reviews")
    assert one["spec"]["clusterIP"]
    listed = yaml.safe_load(machine.ok("get", "pods", "-o", "yaml"))
    assert (listed["kind"], [item["kind"] for item in listed["items"]]) == ("List", ["Pod"])
    assert json.loads(machine.ok("get", "pods", "-n", "nowhere", "-o", "json"))["items"] == []
    text = machine.ok("get", "service", "reviews", "-o", "yaml")
    machine.ok("delete", "service", "reviews")
    assert machine.ok("apply", "-f", "-", given=text) == "service/reviews created\n"


def test_get_of_what_is_not_there(machine: Machine) -> None:
    said = machine.fails("get", "pod", "nobody", "-n", "shop")
    assert said == "error: Pod shop/nobody not found; see: ambient get pods -n shop\n"
    machine.fails("get", "pod", "nobody", "-A", code=2)


# label


def test_label_a_namespace_in_and_out(machine: Machine) -> None:
    label = "istio.io/dataplane-mode"

    def seen() -> str | None:
        namespace = machine.objects.get(Namespace, "", "default")
        assert namespace is not None
        return namespace.metadata.labels.get(label)

    assert machine.ok("label", "namespace", "default", f"{label}=ambient") == "namespace/default labeled\n"
    assert seen() == "ambient"
    assert machine.ok("label", "ns", "default", f"{label}=ambient") == "namespace/default not labeled\n"
    assert "change it with --overwrite" in machine.fails("label", "ns", "default", f"{label}=none")
    machine.ok("label", "ns", "default", f"{label}=none", "--overwrite")
    assert seen() == "none"
    assert machine.ok("label", "ns", "default", f"{label}-") == "namespace/default labeled\n"
    assert seen() is None
    done = machine.ambient("label", "ns", "default", f"{label}-")
    assert (done.returncode, done.stdout) == (0, "namespace/default not labeled\n")
    assert done.stderr == f'label "{label}" is not there\n'


def test_label_other_objects_in_the_files_where_they_live(machine: Machine) -> None:
    (path,) = write(machine.directory, mine=SERVICE)
    until(lambda: machine.objects.get(Service, "default", "reviews"), "the file is resolved")
    machine.ok("label", "service", "reviews", "tier=backend", "team=a")
    assert "# Reviews, as people know them." in Path(path).read_text()
    seen = machine.objects.get(Service, "default", "reviews")
    assert seen is not None
    assert seen.metadata.labels == {"tier": "backend", "team": "a"}
    apply(machine, DEPLOYMENT)
    said = machine.fails("label", "pod", pods(machine)[0].name, "a=b")
    assert "belongs to Deployment default/reviews" in said
    assert "spec.template.metadata.labels" in said
    assert "Pod default/nobody not found" in machine.fails("label", "pod", "nobody", "a=b")
    assert "reviews" in machine.fails("label", "service", "reviews", "tier=not a value", "--overwrite")


# exec


def test_exec_passes_streams_arguments_and_the_exit_code(machine: Machine) -> None:
    apply(machine, POD)
    script = "import sys; sys.stdout.write(sys.stdin.read().upper()); sys.stderr.write('err'); sys.exit(7)"
    done = machine.ambient("exec", "legacy", "--", sys.executable, "-c", script, given="hello")
    assert (done.returncode, done.stdout, done.stderr) == (7, "HELLO", "err")
    assert machine.ok("exec", "legacy", "--", "echo", "-n", "--", "x") == "-- x"
    asked = machine.requests[-1]
    assert (asked["namespace"], asked["pod"], asked["container"]) == ("default", "legacy", "main")
    done = machine.ambient("exec", "legacy", "--", "no-such-program")
    assert (done.returncode, done.stderr) == (127, "ambient: no-such-program: not found in PATH\n")


def test_exec_finds_pods_by_the_names_people_use(machine: Machine) -> None:
    apply(machine, DEPLOYMENT, POD)
    first, second = sorted(pod.name for pod in pods(machine))

    def asked(*arguments: str) -> Any:
        machine.ok("exec", *arguments, "--", "true")
        return machine.requests[-1]

    assert asked("leg")["pod"] == "legacy"
    assert asked(second)["pod"] == second
    assert asked("deploy/reviews")["pod"] == first
    assert asked("reviews")["pod"] == first
    assert asked("pod/legacy")["pod"] == "legacy"
    assert asked("deploy/reviews", "-c", "helper")["container"] == "helper"
    assert asked("node/node-1")["node"] == "node-1"
    for arguments, words in [
        (["nobody"], 'no pod "nobody" in namespace default; its pods are: '),
        (["re"], f'"re" could be {first}, {second}; write more'),
        (["legacy", "-n", "shop"], "there are no pods in it"),
        (["legacy", "-c", "other"], 'pod legacy has no container "other"; it has: main'),
        (["deploy/other"], "Deployment default/other has no pods"),
        (["service/reviews"], "only pods have programs"),
        (["node/node-9"], "there is no node node-9"),
    ]:
        assert words in machine.fails("exec", *arguments, "--", "true"), arguments


def test_exec_passes_signals_on(machine: Machine) -> None:
    apply(machine, POD)
    script = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(42));"
    script += "print('ready', flush=True); signal.pause()"
    process = subprocess.Popen(
        machine.argv(
            "exec", "legacy", "--state", str(machine.state.path), "--", sys.executable, "-c", script
        ),
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 42
    done = machine.ambient("exec", "legacy", "--", "sh", "-c", "kill -9 $$")
    assert done.returncode == 137


# logs


def log(machine: Machine, name: str, text: str) -> Path:
    path = machine.state.logs / "pods" / name
    with path.open("a") as file:
        file.write(text)
    return path


def test_logs_whole_tail_and_container(machine: Machine) -> None:
    apply(machine, DEPLOYMENT, POD)
    log(machine, "default_legacy_main.log", "one\ntwo\nthree\n")
    assert machine.ok("logs", "legacy") == "one\ntwo\nthree\n"
    for number, text in [("0", ""), ("1", "three\n"), ("2", "two\nthree\n"), ("9", "one\ntwo\nthree\n")]:
        assert machine.ok("logs", "legacy", "--tail", number) == text
    first = min(pod.name for pod in pods(machine))
    log(machine, f"default_{first}_helper.log", "no newline at the end")
    assert machine.ok("logs", "deploy/reviews", "-c", "helper", "--tail", "1") == "no newline at the end"
    assert "has printed nothing yet" in machine.fails("logs", "deploy/reviews")


def test_logs_of_the_meshs_own_processes(machine: Machine) -> None:
    (machine.state.logs / "ztunnel-node-1.log").write_text("hello\n")
    assert machine.ok("logs", "mesh/ztunnel-node-1") == "hello\n"
    assert 'no part "other"; it has: ztunnel-node-1' in machine.fails("logs", "mesh/other")


def test_logs_follow_what_is_added_until_interrupted(machine: Machine) -> None:
    apply(machine, POD)
    path = log(machine, "default_legacy_main.log", "one\n")
    process = subprocess.Popen(
        machine.argv("logs", "legacy", "-f", "--state", str(machine.state.path)),
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "one\n"
        log(machine, path.name, "two\n")
        assert process.stdout.readline() == "two\n"
        path.write_text("3\n")  # begun anew
        assert process.stdout.readline() == "3\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


# status, down


def test_status_shows_parts_pods_and_problems(machine: Machine) -> None:
    apply(machine, POD)
    machine.ambient("apply", "-f", "-", given=SERVICE)
    text = machine.ok("status")
    assert text.startswith(f"mesh of {machine.directory}, state {machine.state.path}, pid {os.getpid()}, up ")
    lines = [line.split() for line in text.splitlines()]
    assert ["ztunnel", "node-1", "yes", str(os.getpid()), "0"] in lines
    assert ["agent", "node-2", "no", str(os.getpid()), "0"] in lines
    assert any(line[:3] == ["default", "legacy", "node-2"] for line in lines)
    assert "problems:\n  warning: Service default/reviews" in text
    report = json.loads(machine.ok("status", "-o", "json"))
    assert {"state", "pid", "since", "dir", "nodes", "controlplane", "pods", "problems"} <= set(report)
    assert report["problems"][0]["object"] == "Service default/reviews"


def test_status_without_pods_says_where_they_would_come_from(machine: Machine) -> None:
    assert f"no pods; add resources to {machine.directory}" in machine.ok("status")


def test_upgrade_says_which_process_took_over_and_stops_at_the_first_that_cannot(machine: Machine) -> None:
    assert machine.ok("upgrade", "--node", "1") == (
        "NODE     OLD PID   NEW PID   READY IN\nnode-1   41        42        1.2 s\n"
    )
    assert json.loads(machine.ok("upgrade", "--node", "node-1", "-o", "json")) == [
        {"node": "node-1", "old": 41, "new": 42, "seconds": 1.25}
    ]
    assert "ztunnel-node-2 was not ready within 30 s; the old one serves on" in machine.fails("upgrade")
    assert "there is no node 'node-9'" in machine.fails("upgrade", "--node", "node-9")


def test_down_ends_the_mesh_and_then_there_is_none(machine: Machine) -> None:
    assert machine.ok("down") == f"the mesh on {machine.state.path} is down\n"
    assert not machine.state.socket.exists()
    gone = f"error: no mesh is running on {machine.state.path}; start one with: ambient up DIR\n"
    for arguments in (["down"], ["status"], ["get", "pods"], ["logs", "x"], ["exec", "x", "--", "true"]):
        assert machine.fails(*arguments) == gone
    assert machine.fails("apply", "-f", "-", given=SERVICE) == gone
    assert machine.fails("label", "ns", "default", "a=b") == gone


def test_down_removes_what_a_killed_mesh_has_left(tmp_path: Path, machine: Machine) -> None:
    left = tmp_path / "killed"
    (left / "objects" / "Pod" / "default").mkdir(parents=True)
    (left / "logs").mkdir()
    (left / "supervisor.json").write_text("{}")
    said = machine.ok("down", "--state", str(left))
    assert said == f"removed what a killed mesh had left on {left}\n"
    assert [path.name for path in left.iterdir()] == ["logs"]
    assert "no mesh is running" in machine.fails("down", "--state", str(left))


def test_a_mesh_of_another_user_is_told_as_such(machine: Machine) -> None:
    # Imports first: an interpreter installed by root may not be readable to others.
    script = (
        "import os, sys, click.shell_completion\n"
        "import ztunnel.cli.session, ztunnel.cli.tables, ztunnel.cli.verbs.get, ztunnel.embedded.client\n"
        "import ztunnel.store.directory\n"
        "from ztunnel.cli.app import run\n"
        "if os.geteuid() == 0:\n"
        "    os.setgroups([]), os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    if os.geteuid() != 0:
        machine.state.socket.chmod(0)
    done = subprocess.run(
        [sys.executable, "-c", script, "get", "pods", "--state", str(machine.state.path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"error: the mesh on {machine.state.path} belongs to another user; run this as that user, e.g. with sudo\n"
    )
