"""The node's subnet.env as the plugin needs it, written by the agent or by flanneld.

Stricter than the agent's own reader (``overlay/subnet_env.py``), which takes what makes sense and goes on: a pod would get a wrong
address or MTU, so here a line that is missing or makes no sense is an error. Source: flannel-io/cni-plugin, flannel.go.
"""

from __future__ import annotations

from ipaddress import ip_interface, ip_network
from typing import NamedTuple

from nodeplane.cni.protocol import INVALID_CONFIG, TRY_LATER, CniError

SMALLEST_MTU = 68
"""Of IPv4 (RFC 791)."""
_FIELDS = (("FLANNEL_NETWORK", "FLANNEL_SUBNET"), ("FLANNEL_IPV6_NETWORK", "FLANNEL_IPV6_SUBNET"))


class SubnetEnv(NamedTuple):
    """The cluster's networks, the node's own subnets (their first address with the length), the pods' MTU, and who masquerades."""

    networks: tuple[str, ...]
    subnets: tuple[str, ...]
    mtu: int
    ip_masq: bool


def read_subnet_env(path: str) -> SubnetEnv:
    """Read the file. Raises CniError: 11 (try again later) while it cannot be read, 7 when it makes no sense."""
    try:
        with open(path, encoding="utf-8") as file:
            return parse_subnet_env(file.read(), path)
    except FileNotFoundError:
        raise CniError(TRY_LATER, f"{path} is missing: the agent has not yet said which pod network this node has") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CniError(TRY_LATER, f"{path}: cannot be read: {error}") from error


def parse_subnet_env(text: str, path: str) -> SubnetEnv:
    """Read the text; ``path`` is for the error. Raises CniError naming line and value."""
    stated = {
        key.strip(): value.strip() for line in text.splitlines() for key, is_one, value in [line.partition("=")] if is_one
    }

    def wrong(key: str, must: str) -> CniError:
        return CniError(INVALID_CONFIG, f"{path}: {key}: must be {must}, is {stated.get(key, 'missing')!r}")

    networks: list[str] = []
    subnets: list[str] = []
    for network, subnet in _FIELDS:
        try:
            networks += [str(ip_network(one)) for one in stated.get(network, "").split(",") if one]
        except ValueError:
            raise wrong(network, "networks") from None
        try:
            subnets += [str(ip_interface(stated[subnet]))] if stated.get(subnet) else []
        except ValueError:
            raise wrong(subnet, "an address with its length") from None
    for key, found in (("FLANNEL_NETWORK", networks), ("FLANNEL_SUBNET", subnets)):
        if not found:
            raise wrong(key, "stated, for either family")
    mtu = stated.get("FLANNEL_MTU", "")
    if not mtu.isdigit() or int(mtu) < SMALLEST_MTU:
        raise wrong("FLANNEL_MTU", f"a number of at least {SMALLEST_MTU}")
    if stated.get("FLANNEL_IPMASQ") not in {"true", "false"}:
        raise wrong("FLANNEL_IPMASQ", "true or false")
    return SubnetEnv(tuple(networks), tuple(subnets), int(mtu), stated["FLANNEL_IPMASQ"] == "true")
