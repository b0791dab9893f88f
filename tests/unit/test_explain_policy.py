"""``explain`` and policies: both ends are judged, behind Services too, and the answer says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nodeplane.__main__ import main

FOLDER = Path(__file__).parents[1] / "golden/policies"


def ask(capsys, source: str, destination: str, *more: str, folder: Path = FOLDER) -> dict:
    arguments = ["explain", "--objects", str(folder / "cluster.yaml"), "--config", str(folder / "config.yaml"), "--node", "n1"]
    assert main([*arguments, *more, "--from", source, "--to", destination, "-o", "json"]) == 0
    return json.loads(capsys.readouterr().out)


CASES = {
    "let out and in": ("shop/web", "10.244.1.11:5432", "allow", "allow", "shop/db: ingress[0] lets it through"),
    "let out by one, not in by the other": ("shop/web", "10.244.2.10:8080", "deny", "allow", "no rule fits"),
    "a port of the right pod": ("ops/monitor", "10.244.1.10:9999", "none", "allow", "shop/web: ingress[1] lets it through"),
    "a stranger on a named port": ("203.0.113.9", "10.244.1.10:8080", "none", "allow", "shop/web: ingress[0] lets it through"),
    "a stranger elsewhere": ("203.0.113.9", "10.244.1.11:5432", "none", "deny", "fits TCP 5432, but not 203.0.113.9"),
    "out to a block": ("shop/web", "203.0.113.9:30050", "allow", "none", "shop/web: egress[1] lets it through"),
    "out to its exception": ("shop/web", "203.0.113.70:443", "deny", "none", "fits neither 203.0.113.70"),
    "the node to its own pod": ("node", "10.244.1.11:5432", "none", "allow", "the pod's own node may always reach it"),
    "a pod that only a policy of another node isolates": ("node", "10.244.2.10:22", "none", "deny", "no rule fits"),
}


TIERS = {
    "denied before anybody is asked": (
        "ops/monitor",
        "10.244.1.11:23",
        "deny",
        "deny",
        "ingress: Admin ClusterNetworkPolicy never: ingress[0] (telnet) denies it",
    ),
    "accepted before the NetworkPolicy": (
        "ops/monitor",
        "10.244.1.11:8080",
        "allow",
        "allow",
        "platform: ingress[0] (monitoring) accepts",
    ),
    "passed on, and let in": ("shop/web", "10.244.1.11:5432", "deny", "allow", "platform: ingress[1] (tenants) passes it on"),
    "passed on, and not let in": (
        "shop/web",
        "10.244.1.11:22",
        "deny",
        "deny",
        "isolated by NetworkPolicy shop/db, and no rule fits",
    ),
    "denied by the baseline": (
        "shop/web",
        "10.244.1.12:22",
        "deny",
        "deny",
        "Baseline ClusterNetworkPolicy default: ingress[0] denies it",
    ),
    "out to a network": ("lab/bench", "169.254.169.254:80", "deny", "none", "never: egress[0] (metadata) denies it"),
    "nobody minds": ("lab/bench", "203.0.113.9:22", "none", "none", ""),
}


@pytest.mark.parametrize("case", TIERS.values(), ids=list(TIERS))
def test_tiers_are_named(capsys, case):
    """Which tier, policy and rule decided is told; what is rendered agrees."""
    source, destination, egress, ingress, words = case
    answer = ask(capsys, source, destination, folder=FOLDER.with_name("cluster-policies"))
    policy = answer["policy"]
    assert (policy["egress"], policy["ingress"], policy["allowed"]) == (egress, ingress, "deny" not in (egress, ingress))
    assert any(words in line for line in policy["because"] or [""]), policy["because"]
    assert answer["agree"]


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_both_ends_are_judged(capsys, case):
    """Each end's decision is told, with the rule or the reason; what is rendered agrees."""
    source, destination, egress, ingress, words = case
    answer = ask(capsys, source, destination)
    policy = answer["policy"]
    assert (policy["egress"], policy["ingress"], policy["allowed"]) == (egress, ingress, "deny" not in (egress, ingress))
    assert any(words in line for line in policy["because"]), policy["because"]
    assert answer["agree"]


def test_nothing_is_claimed_where_nothing_is_enforced(capsys, tmp_path):
    """With policies not enforced the answer is none, and says so."""
    config = tmp_path / "config.yaml"
    config.write_text("{apiVersion: nodeplane.dev/v1alpha1, kind: NodeConfiguration, nodeName: n1}")
    answer = ask(capsys, "shop/web", "10.244.2.10:22", "--config", str(config))
    assert answer["policy"]["allowed"]
    assert "none is enforced" in answer["policy"]["because"][0]


def test_what_is_not_enforced_is_counted_by_kind(capsys, tmp_path):
    """Both kinds are told where none is enforced."""
    config = tmp_path / "config.yaml"
    config.write_text("{apiVersion: nodeplane.dev/v1alpha1, kind: NodeConfiguration, nodeName: n1}")
    folder = FOLDER.with_name("cluster-policies")
    (told,) = ask(capsys, "shop/web", "10.244.1.11:22", "--config", str(config), folder=folder)["policy"]["because"]
    assert (
        told
        == "1 NetworkPolicies and 3 ClusterNetworkPolicies are among the objects; policy.enabled is false, so none is enforced"
    )
