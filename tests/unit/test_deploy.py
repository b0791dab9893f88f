"""The files of deploy/ agree with the program: options, configuration, what is asked of the API server, programs and paths."""

import configparser
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from clusterstate.sources.kubeapi import resources
from nodeplane.__main__ import make_parser
from nodeplane.config import parse_config
from nodeplane.status import RUN_DIR

DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFESTS = {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "daemonset.yaml").read_text())}
CONTAINER = MANIFESTS["DaemonSet"]["spec"]["template"]["spec"]["containers"][0]


def unit():
    """Return the systemd unit, the last value of each key."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, comment_prefixes=("#",))
    parser.optionxform = str
    parser.read(DEPLOY / "nodeplane.service")
    return parser


def test_configuration_is_right():
    """The ConfigMap's file is one that the agent takes, with everything in it in force."""
    config = parse_config(yaml.safe_load(MANIFESTS["ConfigMap"]["data"]["config.yaml"]), "n1")
    assert (config.mode, config.policy, config.notes) == ("nftables", "nftables", ())
    assert config.overlay.net_conf.backend.type == "vxlan"


def test_command_lines_are_right():
    """Both ways to start the agent are command lines that it takes, with the same configuration file."""
    in_container = make_parser().parse_args(CONTAINER["args"])
    program, *words = shlex.split(unit()["Service"]["ExecStart"])
    on_host = make_parser().parse_args(words)
    assert Path(program).name == "nodeplane"
    assert in_container.config == on_host.config == Path("/etc/nodeplane/config.yaml")
    assert (in_container.command, on_host.command) == ("agent", "agent")


def test_probes_ask_what_is_served():
    """The kubelet asks the port at which the agent answers with the ConfigMap's configuration."""
    config = parse_config(yaml.safe_load(MANIFESTS["ConfigMap"]["data"]["config.yaml"]), "n1")
    (port,) = CONTAINER["ports"]
    assert port["containerPort"] == port["hostPort"] == config.servers.healthz.port
    asked = {name: CONTAINER[name]["httpGet"] for name in ("readinessProbe", "livenessProbe")}
    assert asked == {
        "readinessProbe": {"path": "/healthz", "port": port["name"]},
        "livenessProbe": {"path": "/livez", "port": port["name"]},
    }


def test_rights_are_those_that_are_used():
    """The role allows exactly the lists and watches that an agent with everything switched on asks for, and what it writes."""
    paths = [one.path.split("/")[1:] for one in resources("n1", services=True, all_nodes=True, policies=True)]
    asked = {(path[1] if path[0] == "apis" else "", path[-1]) for path in paths}
    allowed = {
        (group, plural)
        for rule in MANIFESTS["ClusterRole"]["rules"]
        for group in rule["apiGroups"]
        for plural in rule["resources"]
        if sorted(rule["verbs"]) == ["list", "watch"]
    }
    assert allowed == asked
    others = [rule for rule in MANIFESTS["ClusterRole"]["rules"] if sorted(rule["verbs"]) != ["list", "watch"]]
    assert others == [
        {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]},  # announcer.py
        {"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create"]},  # event_writer.py
    ]
    assert MANIFESTS["ClusterRoleBinding"]["roleRef"]["name"] == MANIFESTS["ClusterRole"]["metadata"]["name"]
    assert (
        MANIFESTS["DaemonSet"]["spec"]["template"]["spec"]["serviceAccountName"]
        == MANIFESTS["ServiceAccount"]["metadata"]["name"]
    )


def test_volumes_are_all_mounted():
    """Every volume is mounted, and the agent's run directory is the host's: plugin and status find it."""
    volumes = {one["name"]: one for one in MANIFESTS["DaemonSet"]["spec"]["template"]["spec"]["volumes"]}
    mounts = {one["name"]: one["mountPath"] for one in CONTAINER["volumeMounts"]}
    assert volumes.keys() == mounts.keys()
    assert mounts["run"] == volumes["run"]["hostPath"]["path"] == str(RUN_DIR)


@pytest.mark.parametrize("name", ["RuntimeDirectory", "StateDirectory"])
def test_directories_of_the_unit(name):
    """The unit makes the directories that the agent writes to."""
    assert "nodeplane" in unit()["Service"][name].split()


def test_image_has_what_the_agent_calls():
    """Packages of the image are packages that the project needs, and the programs that it executes are among them."""
    text = (DEPLOY / "Containerfile").read_text()
    stages = [
        set(re.sub(r"[\\&].*?(?=\n|$)", "", part.split("\n\n")[0]).split())
        for part in text.split("--no-install-recommends")[1:]
    ]
    known = {line.split("#")[0].strip() for line in (DEPLOY.parent / "packages.txt").read_text().splitlines()}
    runtime = {word for word in stages[1] if re.fullmatch(r"[a-z0-9.+-]+", word)} - {"rm", "-rf", "make"}
    assert {"iptables", "ipset", "python3-nftables", "libbpf1", "kmod", "iproute2"} <= runtime
    assert runtime - known <= {"libbpf1"}  # the others have it with libbpf-dev


def test_network_list_is_json():
    """The example of a network list names our plugin."""
    assert json.loads((DEPLOY / "cni/10-nodeplane.conflist").read_text())["plugins"][0]["type"] == "nodeplane-cni"
