"""Policies change under a flood: not one packet passes that was forbidden all the time, none is lost that was allowed all the time.

client  --- UDP 90: forbidden in every state ---.   by one side or the other, or both
                                                 node --- server
friend  --- UDP 80: allowed in every state   ---'
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice

import pytest
from packet_flood import Stream, counted, flood, mac_of, watch_node, watch_pod
from policy_changes import ALLOWED, FORBIDDEN, World
from service_node import ServiceNode, pod_ip

from clusterstate.snapshot import Update
from kernelstate.linux import netns
from nodeplane.config import parse_config
from nodeplane.host_kernel import host_kernel
from nodeplane.pipeline import HostFacts, Pipeline

pytestmark = pytest.mark.kernel

CLIENT, FRIEND, SERVER = 1, 2, 3
UPDATES = 200
MODES = {
    "nftables": {"policy": {"enabled": True, "mode": "nftables"}, "iptablesVariant": "nft"},
    "iptables-legacy": {"policy": {"enabled": True, "mode": "iptables"}, "iptablesVariant": "legacy"},
    "iptables-nft": {"policy": {"enabled": True, "mode": "iptables"}, "iptablesVariant": "nft"},
}


class Agent:
    """What an agent does with policies, in each of its rounds."""

    def __init__(self, node: str, mode: str) -> None:
        self.node = node
        kind = {"apiVersion": "nodeplane.dev/v1alpha1", "kind": "NodeConfiguration", "nodeName": "n1", "services": False}
        config = parse_config({**kind, **MODES[mode]})
        self.pipeline = Pipeline(config)
        with netns.inside(node):
            self.kernel = host_kernel(config, 0).kernel

    def take(self, update: Update) -> None:
        """Bring the kernel to a state; what no rule refers to any more goes with the next one."""
        desired = self.pipeline.update(update, HostFacts())
        self.kernel.set_desired(desired)
        with netns.inside(self.node):
            reports = self.kernel.sync()
        assert [error for report in reports for error in report.errors] == []

    def look(self) -> int:
        """Compare the kernel with what was written; return how much differed."""
        self.kernel.forget()
        with netns.inside(self.node):
            self.kernel.sync()  # sets that nobody asks any more are destroyed
            self.kernel.forget()
            return sum(report.changed for report in self.kernel.sync())

    def close(self) -> None:
        """Let go of the kernel: of sockets that an agent has until it ends."""
        del self.kernel
        gc.collect()


@pytest.fixture
def rig(make_netns) -> Iterator[ServiceNode]:
    made = ServiceNode(make_netns, 3)
    yield made
    made.close()


def streams_of(rig: ServiceNode) -> list[Stream]:
    """Return both flows in both families."""
    return [
        Stream(rig.pods[pod], "eth0", mac_of(rig.node, f"pod{pod}"), pod_ip(pod, family), pod_ip(SERVER, family), port)
        for family in (4, 6)
        for pod, port in ((CLIENT, FORBIDDEN), (FRIEND, ALLOWED))
    ]


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("mode", MODES)
def test_nothing_passes_and_nothing_is_lost(rig, mode):
    """Through 200 random changes of policies, pods and labels the forbidden flow never passes, the allowed one always does."""
    world = World(*(tuple(pod_ip(pod, family) for family in (4, 6)) for pod in (CLIENT, FRIEND, SERVER)))
    streams = streams_of(rig)
    watch_node(rig.node, streams)
    watch_pod(rig.pods[SERVER], streams)
    states = world.states(seed=5)
    ways = set()
    with ExitStack() as undo:
        agent = Agent(rig.node, mode)
        undo.callback(agent.close)
        agent.take(next(states))
        with flood(streams):
            for update in islice(states, UPDATES):
                agent.take(update)
                ways |= world.verdicts(update.snapshot)
        assert agent.look() == 0
    assert len(ways) >= 4, "it was forbidden in one way or the other"

    node = counted(rig.node)
    for family in (4, 6):
        assert node["before"][family, FORBIDDEN] > 20 * UPDATES
        assert node["before"][family, ALLOWED] > 20 * UPDATES
    arrived = counted(rig.pods[SERVER])["arrived"]
    passed = {family: node["after"][family, FORBIDDEN] + arrived[family, FORBIDDEN] for family in (4, 6)}
    lost = {family: node["before"][family, ALLOWED] - node["after"][family, ALLOWED] for family in (4, 6)}
    assert (passed, lost) == ({4: 0, 6: 0}, {4: 0, 6: 0}), node
