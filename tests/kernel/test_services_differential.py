"""The third leg: packets through the real kernel meet the oracle, for random clusters, settings and flows."""

import pytest
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from service_worlds import LOCAL_ADDRESSES, NODE, flows, snapshots
from service_worlds import settings as proxy_settings
from wire import Wire
from wire_judge import Judge

from kernelstate.linux import netns as namespaces
from kernelstate.linux.iptables import IptablesPort
from kernelstate.reconcile import NetfilterReconciler
from nodeplane.pipeline import OWNERSHIP
from proxy.compile import compile_table
from proxy.oracle import Oracle
from proxy.render.iptables_program import render_iptables

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("variant", ["legacy", "nft"])
@pytest.mark.parametrize("family", [4, 6])
def test_kernel_meets_oracle(make_netns, variant, family):
    """Each packet sent through the programmed kernel ends as the oracle says, in both iptables variants and families."""
    node = make_netns()
    wire = Wire(node, make_netns())
    judge = Judge(wire)
    families = (4,) if family == 4 else (4, 6)

    with namespaces.inside(node):
        reconciler = NetfilterReconciler(IptablesPort(variant), OWNERSHIP)

    @seed(20)
    @hypothesis_settings(
        max_examples=25,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # shrinking would go through the kernel for minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(snapshots(families=families), proxy_settings(), st.lists(flows(family=family), min_size=30, max_size=40))
    def check(snapshot, config, asked):
        table = compile_table(snapshot, NODE)
        with namespaces.inside(node):
            reconciler.set_desired(render_iptables(table, config, NODE), None, (4, 6))
            report = reconciler.sync()
        assert report.ok, report.errors
        assert judge.disagreements(asked, Oracle(table, config, NODE, LOCAL_ADDRESSES)) == []

    try:
        check()
    finally:
        wire.close()
