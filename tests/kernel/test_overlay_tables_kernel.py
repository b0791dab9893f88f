"""The overlay's rules in nftables, written to a real kernel and kept there."""

from __future__ import annotations

import subprocess

import pytest
from overlay_worlds import DUAL, N1, N2, UPLINK, compile_nodes, snapshot

from kernelstate.linux.nftables import NftablesPort
from kernelstate.reconcile_nftables import NftablesReconciler
from overlay.render.masquerade_nftables import NAMES, render_masquerade_tables

pytestmark = pytest.mark.kernel

TABLES = render_masquerade_tables(compile_nodes(snapshot(N1, N2), "n1", DUAL, UPLINK), ip_masq=True)


def test_written_kept_and_removed(in_netns):
    """Both families' tables are written once, come back when somebody else empties one, and go without a trace."""
    port = NftablesPort()
    try:
        keeper = NftablesReconciler(port, NAMES, "overlay rules")
        keeper.set_desired(TABLES)
        assert keeper.sync().errors == ()
        first = nft("list ruleset")
        assert {line.split()[2] for line in first.splitlines() if line.startswith("table")} == set(NAMES.values())
        assert first.count("masquerade") == 4
        fresh = NftablesReconciler(port, NAMES, "overlay rules")
        fresh.set_desired(TABLES)
        assert fresh.sync().changed == 0, "what a kernel holds as desired is not written again"

        nft("flush chain ip flannel-ipv4 postrtg")
        assert fresh.drifted()
        assert fresh.sync().errors == ()
        assert nft("list ruleset") == first

        nft("add table ip somebody-elses")
        assert not fresh.drifted()
        assert fresh.cleanup().errors == ()
        assert nft("list ruleset").split() == ["table", "ip", "somebody-elses", "{", "}"]
    finally:
        port.close()


def nft(command: str) -> str:
    return subprocess.run(["nft", *command.split()], check=True, capture_output=True, text=True, timeout=120).stdout
