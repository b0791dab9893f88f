"""What becomes of a packet that policies deny: counted for the pod, in some cases logged, dropped. The names that both renderers share.

    group's chain -- no rule fits --> deny-ingress, deny-egress     one chain a direction
                                        count     by the pod's address, in a set that holds every pod here that policies are about
                                        log       now and then, if that is wanted: a copy to NFLOG group GROUP
                                        drop

Counting and logging cost packets that are let through nothing. What is counted are packets that would open a connection: a TCP client that
tries again is counted again.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from netpolicy.table import Direction

GROUP = 612
"""The NFLOG group of denied packets; nothing else is known to use it."""
MARKS: Mapping[Direction, str] = {"ingress": "nodeplane-ingress", "egress": "nodeplane-egress"}
"""What a logged packet is marked with: which way the pod is, whose policies denied it."""


class DeniedLog(msgspec.Struct, frozen=True):
    """How many denied packets a second are logged in each direction, and how many at once after quiet."""

    per_second: int = 10
    burst: int = 20
