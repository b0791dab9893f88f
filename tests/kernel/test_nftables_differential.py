"""Packets through nftables in the real kernel meet the oracle, for random clusters, settings and flows."""

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from service_worlds import LOCAL_ADDRESSES, NODE, flows, snapshots
from service_worlds import settings as proxy_settings
from wire import Wire
from wire_judge import Judge

from kernelstate.linux import netns as namespaces
from kernelstate.linux.nftables import NftablesPort
from kernelstate.objects.address import Prefix
from kernelstate.objects.nftables import TableKey
from kernelstate.reconcile_nftables import TABLE, NftablesReconciler
from proxy.compile import compile_table
from proxy.modes import TRAITS
from proxy.oracle import Oracle
from proxy.render.nftables_program import render_nftables

pytestmark = pytest.mark.kernel

SERVICE_CIDRS = (Prefix.parse("10.96.0.0/24"), Prefix.parse("fd00:96::/64"))


@pytest.mark.parametrize("family", [4, 6])
def test_kernel_meets_oracle(make_netns, family):
    """Each packet sent through the programmed kernel ends as the oracle says; the kernel holds what was rendered."""
    node = make_netns()
    wire = Wire(node, make_netns())
    judge = Judge(wire)
    families = (4,) if family == 4 else (4, 6)
    with namespaces.inside(node):
        port = NftablesPort()
    reconciler = NftablesReconciler(port)

    @seed(20)
    @hypothesis_settings(
        max_examples=40,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # shrinking would go through the kernel for minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(
        snapshots(families=families),
        proxy_settings(),
        st.booleans(),
        st.sampled_from([(), SERVICE_CIDRS]),
        st.lists(flows(family=family), min_size=30, max_size=40),
    )
    def check(snapshot, config, guard, cidrs, asked):
        config = msgspec.structs.replace(config, guard_node_ports=guard)
        facts = msgspec.structs.replace(NODE, service_cidrs=cidrs)
        table = compile_table(snapshot, facts)
        tables = render_nftables(table, config, facts)
        reconciler.set_desired(tables)
        report = reconciler.sync()
        assert report.ok, report.errors
        assert {f: port.observe(TableKey(f, TABLE), t) for f, t in tables.items()} == tables
        assert judge.disagreements(asked, Oracle(table, config, facts, LOCAL_ADDRESSES, TRAITS["nftables"])) == []

    try:
        check()
    finally:
        port.close()
        wire.close()
