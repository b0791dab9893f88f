"""The network configuration: what the plugin is told on stdin, checked, and rendered into what is to be done.

    stdin ----------------------.
    /run/flannel/subnet.env ----+--> rendered: {"type", "mode", "mtu", "ipam": {"type", "ranges"}, ...}
                                         |
                                         '--> kept per attachment (store.py), so that DEL needs neither of the two again

A rendered configuration is itself one that this plugin takes. Three ways to attach a pod:

    mode "routed"          the default: a veth of its own, to which the node routes (routed.py)
    mode "bridge"          a port of cni0 (bridge.py); also what flannel's ``delegate`` without a type asks for
    delegate.type          another plugin is executed, as flannel's plugin does it

Decides which of them, and with which values. What subnet.env says is read in ``subnet_env.py``.
Source: flannel-io/cni-plugin README; the CNI specification, section 1.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from ipaddress import ip_interface
from typing import Any

from nodeplane.cni.protocol import INVALID_CONFIG, CniError, Json, is_name
from nodeplane.cni.subnet_env import SMALLEST_MTU, SubnetEnv, read_subnet_env

TYPE = "nodeplane-cni"
SUBNET_FILE = "/run/flannel/subnet.env"
DATA_DIR = "/var/lib/cni/nodeplane"
MODES = ("routed", "bridge")

_FIELDS: dict[str, type] = {
    "mode": str,
    "subnetFile": str,
    "dataDir": str,
    "bridge": str,
    "mtu": int,
    "ipam": dict,
    "delegate": dict,
    "runtimeConfig": dict,
    "args": dict,
    "dns": dict,
    "prevResult": dict,
    "isGateway": bool,
    "isDefaultGateway": bool,
    "hairpinMode": bool,
    "forceAddress": bool,
    "ipMasq": bool,
    "policySocket": str,
    "policyWaitSeconds": int,
}
"""What the plugin reads, and the JSON type it must have. Other keys are the runtime's or other plugins', and no business of ours."""
_JSON_NAMES = {str: "a string", int: "a whole number", bool: "true or false", dict: "an object"}
_KEPT = ("cniVersion", "name", "runtimeConfig", "args", "dns", "dataDir", "policySocket", "policyWaitSeconds")
_BRIDGE_ONLY = ("bridge", "forceAddress", "hairpinMode", "isGateway")
_OWN_DELEGATE = frozenset({*_BRIDGE_ONLY, "isDefaultGateway", "mtu", "ipMasq", "cniVersion"})
"""Fields of a ``delegate`` without a type that our bridge knows; any other makes it the bridge plugin's."""


# -- checking --------------------------------------------------------------------------------------------------------


def check_config(conf: Json) -> None:
    """Check what is stated. Raises CniError naming field and value."""
    if not isinstance(conf.get("name"), str) or not is_name(conf["name"]):
        raise _wrong(conf, "name", "letters, digits, '_', '.' and '-'")
    _check_types(conf, "")
    if conf.get("mode", MODES[0]) not in MODES:
        raise _wrong(conf, "mode", " or ".join(MODES))
    if conf.get("mtu", SMALLEST_MTU) < SMALLEST_MTU:
        raise _wrong(conf, "mtu", f"at least {SMALLEST_MTU}")
    if conf.get("policyWaitSeconds", 1) < 1:
        raise _wrong(conf, "policyWaitSeconds", "at least 1")
    if conf.get("ipMasq"):
        raise CniError(INVALID_CONFIG, "ipMasq: must be false, is true: masquerading is the agent's (overlay.ipMasq)")
    bridge = conf.get("bridge")
    if bridge is not None and (not bridge or len(bridge) > 15 or "/" in bridge):
        raise _wrong(conf, "bridge", "a link's name")
    stray = [field for field in _BRIDGE_ONLY if field in conf]
    if stray and conf.get("mode") != "bridge":
        raise _wrong(conf, stray[0], 'left to mode "bridge"')
    if "delegate" in conf:
        _check_delegate(conf)


def _check_types(conf: Json, prefix: str) -> None:
    for field, kind in _FIELDS.items():
        value = conf.get(field)
        if field in conf and value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise _wrong(conf, field, _JSON_NAMES[kind], prefix)


def _check_delegate(conf: Json) -> None:
    delegate = conf["delegate"]
    for field in ("name", "ipam"):
        if field in delegate:
            raise _wrong(delegate, field, "left to this plugin", "delegate.")
    if "mode" in conf:
        raise _wrong(conf, "mode", "left out beside delegate")
    kind = delegate.get("type", "bridge")
    if not isinstance(kind, str) or not kind or "/" in kind:
        raise _wrong(delegate, "type", "a plugin's name", "delegate.")
    _check_types(delegate, "delegate.")


def _wrong(conf: Json, field: str, must: str, prefix: str = "") -> CniError:
    return CniError(INVALID_CONFIG, f"{prefix}{field}: must be {must}, is {conf.get(field)!r}")


def stated_mac(conf: Json, args: Mapping[str, str]) -> str:
    """Return the MAC that the runtime asks for, or nothing. Raises CniError where it is none of one host."""
    cni_args: Any = (conf.get("args") or {}).get("cni") or {}
    found = (conf.get("runtimeConfig") or {}).get("mac") or cni_args.get("mac") or args.get("MAC") or ""
    if not found:
        return ""
    parts = found.replace("-", ":").lower().split(":") if isinstance(found, str) else []
    if len(parts) != 6 or any(len(p) != 2 or not set(p) <= set("0123456789abcdef") for p in parts) or int(parts[0], 16) & 1:
        raise CniError(INVALID_CONFIG, f"mac: must be the MAC of one host, is {found!r}")
    return ":".join(parts)


# -- rendering -------------------------------------------------------------------------------------------------------


def render(conf: Json) -> Json:
    """Return what is to be done: the configuration with everything that subnet.env says in it.

    Raises CniError: 11 (try again later) while the agent has not written subnet.env, 7 where that or the configuration is wrong.
    """
    if is_rendered(conf):
        return _rendered(conf, _own_options(conf), conf["mtu"], conf["ipam"])
    env = read_subnet_env(conf.get("subnetFile") or SUBNET_FILE)
    if conf.get("delegate") is not None:
        return _render_delegate(conf, env)
    return _rendered(conf, _own_options(conf), conf.get("mtu") or env.mtu, _ipam(conf, env, ()))


def is_rendered(conf: Json) -> bool:
    """Whether a configuration states all that subnet.env would say."""
    ipam = conf.get("ipam") or {}
    has_addresses = bool(ipam.get("ranges") or ipam.get("subnet")) or ipam.get("type") not in {None, "host-local"}
    return bool(conf.get("mtu")) and has_addresses and not conf.get("subnetFile") and conf.get("delegate") is None


def _own_options(conf: Json) -> Json:
    """Return the options of an attachment of ours; what is not stated is as in flannel's own conflist."""
    mode = conf.get("mode") or MODES[0]
    options: Json = {"type": TYPE, "mode": mode, "isDefaultGateway": conf.get("isDefaultGateway", True)}
    if mode == "bridge":
        options |= {
            "bridge": conf.get("bridge") or "cni0",
            "isGateway": conf.get("isGateway", True) or options["isDefaultGateway"],
            "hairpinMode": conf.get("hairpinMode", True),
            "forceAddress": conf.get("forceAddress", False),
        }
    return options


def _render_delegate(conf: Json, env: SubnetEnv) -> Json:
    """Render as flannel's plugin does: its defaults, and a route to the cluster's network beside those that are stated."""
    delegate = conf["delegate"]
    ip_masq = delegate.get("ipMasq", not env.ip_masq)
    ipam = _ipam(conf, env, env.networks)
    mtu = delegate.get("mtu") or env.mtu
    if "type" in delegate or ip_masq or not delegate.keys() <= _OWN_DELEGATE:
        kind = delegate.get("type", "bridge")
        gateway = {"isGateway": delegate.get("isGateway", True)} if kind == "bridge" else {}
        return _rendered(conf, {**delegate, **gateway, "type": kind, "ipMasq": ip_masq}, mtu, ipam)
    stated = {key: value for key, value in delegate.items() if key not in {"mtu", "ipMasq", "cniVersion"}}
    unstated = {"isDefaultGateway": False, "hairpinMode": False}
    return _rendered(conf, _own_options({"mode": "bridge", **unstated, **stated}), mtu, ipam)


def _rendered(conf: Json, options: Json, mtu: int, ipam: Json) -> Json:
    kept = {key: conf[key] for key in _KEPT if conf.get(key)}
    return {**options, **kept, "mtu": mtu, "ipam": ipam}


def _ipam(conf: Json, env: SubnetEnv, networks: tuple[str, ...]) -> Json:
    """Return the address management: host-local in the node's own subnets unless other ranges, or another plugin, are stated."""
    ipam = {"type": "host-local", **(conf.get("ipam") or {})}
    if ipam["type"] == "host-local" and not (ipam.get("ranges") or ipam.get("subnet")):
        ipam["ranges"] = [[{"subnet": str(ip_interface(one).network)}] for one in env.subnets]
    if networks:
        ipam["routes"] = [*(ipam.get("routes") or []), *({"dst": one} for one in networks)]
    return ipam


def data_dir(conf: Json) -> str:
    """Return where attachments of this network are kept."""
    return os.path.join(conf.get("dataDir") or DATA_DIR, conf["name"])
