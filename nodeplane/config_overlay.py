"""The ``overlay`` section of a NodeConfiguration: flannel's net-conf.json fields, and ours around them.

overlay:
Network: 10.244.0.0/16                     net-conf: overlay/netconf.py
Backend: {Type: vxlan}
iface: eth0                                ours, from here on
ipMasq: true
registry: {type: etcd, endpoints: [https://10.0.0.1:2379], caFile: /etc/etcd/ca.crt}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Literal

import msgspec

from kernelstate.objects.address import IPAddress, Prefix
from nodeplane.config_fields import ConfigError, Strict, decode_section, prefix_at, seconds_at
from overlay.netconf import NetConf, NetConfError, SubnetRange, parse_net_conf
from overlay.registry.subnets import pools_of
from overlay.render.checksums import ChecksumOffload


class EtcdOptions(msgspec.Struct, frozen=True):
    """flannel's etcd: where it is, who we are to it, and how early a lease is renewed."""

    endpoints: tuple[str, ...] = ("http://127.0.0.1:2379",)
    """URLs, tried in this order."""
    prefix: str = "/coreos.com/network"
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    username: str = ""
    password_file: str = ""
    renew_margin: float = 3600.0
    """Seconds before its end at which a lease is renewed."""


class OverlayOptions(msgspec.Struct, frozen=True):
    """What surrounds net-conf: the node's own link and the rules beside the tunnel."""

    net_conf: NetConf
    iface: str = ""
    """The link to the other nodes; empty: the one that holds the node's address."""
    ip_masq: bool = False
    no_masquerade: tuple[Prefix, ...] = ()
    """Networks outside the cluster that see pod addresses as they are."""
    forward_rules: bool = True
    subnet_file: str = "/run/flannel/subnet.env"
    source_check: bool = True
    """Whether packets from other nodes are dropped unless their source is a pod of the node that sent them."""
    checksum_offload: ChecksumOffload = "auto"
    """Whether checksums of what enters a vxlan tunnel are left to the uplink's hardware."""
    public_ips: tuple[IPAddress, ...] = ()
    """What others are told to be this node's address, at most one of each family; none: the uplink's own."""
    announce: bool = True
    """Whether flannel's annotations and condition NetworkUnavailable are written to this Node, where an API server is followed."""
    etcd: EtcdOptions | None = None
    """Where the nodes' leases are; None: Node objects say who is in the overlay."""
    network_in_etcd: bool = False
    """Whether etcd says what net-conf is, and the file nothing. As long as nobody has asked, ``net_conf`` has no family."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Fields that were stated and change nothing while Node objects say which subnet is whose; one line each."""
        if self.etcd is not None:
            return ()
        conf, subnet, address = (
            self.net_conf,
            "spec.podCIDRs says its subnet",
            "status.addresses or annotations say its address",
        )
        stated = [
            ("SubnetLen/SubnetMin/SubnetMax", subnet, conf.subnets != SubnetRange()),
            ("IPv6SubnetLen/Min/Max", subnet, conf.ipv6_subnets != SubnetRange()),
            ("publicIP/publicIPv6", address, bool(self.public_ips)),
        ]
        return tuple(f"overlay.{names}: not used: each Node's {where}" for names, where, is_stated in stated if is_stated)


class _RegistryFields(Strict, frozen=True):
    type: Literal["nodes", "etcd"] = "nodes"
    endpoints: tuple[str, ...] = ("http://127.0.0.1:2379",)
    prefix: str = "/coreos.com/network"
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    username: str = ""
    password_file: str = ""
    lease_renew_margin: str = "60m"


class _OverlayFields(Strict, frozen=True):
    iface: str = ""
    ip_masq: bool = False
    no_masquerade: tuple[str, ...] = ()
    forward_rules: bool = True
    subnet_file: str = "/run/flannel/subnet.env"
    source_check: bool = True
    checksum_offload: ChecksumOffload = "auto"
    announce: bool = True
    public_ip: str = msgspec.field(default="", name="publicIP")
    public_ipv6: str = msgspec.field(default="", name="publicIPv6")
    registry: _RegistryFields = _RegistryFields()


def read_overlay(raw: object) -> OverlayOptions:
    """Check and convert the section. Raises ConfigError."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"overlay: must be an object, is {raw!r}")
    ours = set(_OverlayFields.__struct_encode_fields__)
    options = decode_section({k: v for k, v in raw.items() if k in ours}, _OverlayFields, "overlay")
    etcd = _etcd(options.registry)
    net_conf = _net_conf({k: v for k, v in raw.items() if k not in ours}, in_etcd=etcd is not None)
    return OverlayOptions(
        net_conf=net_conf,
        iface=options.iface,
        ip_masq=options.ip_masq,
        no_masquerade=tuple(prefix_at(c, f"overlay.noMasquerade[{i}]") for i, c in enumerate(options.no_masquerade)),
        forward_rules=options.forward_rules,
        subnet_file=options.subnet_file,
        source_check=options.source_check,
        checksum_offload=options.checksum_offload,
        announce=options.announce,
        public_ips=_public_ips(options),
        etcd=etcd,
        network_in_etcd=etcd is not None and not net_conf.families,
    )


def _net_conf(stated: Mapping[str, object], *, in_etcd: bool) -> NetConf:
    """Read net-conf; with leases in etcd it may be there as well, and then all of it."""
    if in_etcd and not stated:
        return NetConf(None)
    try:
        net_conf = parse_net_conf(stated)
        if in_etcd:
            pools_of(net_conf)
    except NetConfError as error:
        hint = "; or leave out all of net-conf, and etcd says it" if in_etcd and error.path == "Network" else ""
        raise ConfigError(f"overlay.{error}{hint}") from error
    return net_conf


def _public_ips(options: _OverlayFields) -> tuple[IPAddress, ...]:
    found: list[IPAddress] = []
    for name, text, family in (("publicIP", options.public_ip, 4), ("publicIPv6", options.public_ipv6, 6)):
        if not text:
            continue
        try:
            address = ip_address(text)
        except ValueError as error:
            raise ConfigError(f"overlay.{name}: must be an IPv{family} address, is {text!r}") from error
        if address.version != family:
            raise ConfigError(f"overlay.{name}: must be an IPv{family} address, is {text!r}")
        found.append(address)
    return tuple(found)


def _etcd(stated: _RegistryFields) -> EtcdOptions | None:
    """Return where etcd is; None for Node objects, which need nothing stated."""
    if stated.type == "nodes":
        if stated != _RegistryFields():
            raise ConfigError("overlay.registry.type: must be etcd for endpoints, files and names to mean something, is nodes")
        return None
    for i, url in enumerate(stated.endpoints):
        if not re.fullmatch(r"https?://[^/\s]+/?", url):
            raise ConfigError(f"overlay.registry.endpoints[{i}]: must be like https://10.0.0.1:2379, is {url!r}")
    if not stated.endpoints:
        raise ConfigError("overlay.registry.endpoints: must name at least one")
    if bool(stated.cert_file) != bool(stated.key_file):
        raise ConfigError("overlay.registry.certFile: goes with keyFile; one of them is missing")
    if bool(stated.username) != bool(stated.password_file):
        raise ConfigError("overlay.registry.username: goes with passwordFile; one of them is missing")
    margin = seconds_at(stated.lease_renew_margin, 3600.0, "overlay.registry.leaseRenewMargin")
    if not 60 <= margin <= 1439 * 60:
        raise ConfigError(f"overlay.registry.leaseRenewMargin: must be between 1m and 1439m, is {stated.lease_renew_margin!r}")
    return EtcdOptions(
        endpoints=tuple(url.rstrip("/") for url in stated.endpoints),
        prefix="/" + stated.prefix.strip("/"),
        ca_file=stated.ca_file,
        cert_file=stated.cert_file,
        key_file=stated.key_file,
        username=stated.username,
        password_file=stated.password_file,
        renew_margin=margin,
    )
