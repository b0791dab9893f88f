"""The addresses this node answers to, as rules with ``--dst-type LOCAL`` would see them."""

from __future__ import annotations

import socket

from kernelstate.objects.address import Prefix

FAMILIES = (socket.AF_INET, socket.AF_INET6)


class Addresses:
    """Implements ``ports.AddressPort`` for the network namespace of the calling thread."""

    def local_addresses(self) -> list[tuple[str, Prefix]]:
        """Return (link name, address as a host prefix) for each address of a link that is up, sorted, loopback included."""
        from pyroute2 import IPRoute  # noqa: PLC0415  0.2 s that a process without this question does not spend

        found: set[tuple[str, Prefix]] = set()
        with IPRoute() as ip:
            up = {link["index"]: str(link.get_attr("IFLA_IFNAME")) for link in ip.get_links() if link["flags"] & 1}  # IFF_UP
            for family in FAMILIES:
                for address in ip.get_addr(family=family):
                    # On a point-to-point link IFA_ADDRESS is the other end; IFA_LOCAL is ours where it is there at all.
                    text = address.get_attr("IFA_LOCAL") or address.get_attr("IFA_ADDRESS")
                    if address["index"] in up:
                        found.add((up[address["index"]], Prefix.parse(str(text))))
        return sorted(found)
