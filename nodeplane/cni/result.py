"""Results of ADD: held in the form of 1.1.0, read and printed in the form of whichever version a configuration is written in.

    0.1.0 0.2.0          {"ip4": {"ip": CIDR, "gateway", "routes": [{"dst", "gw"}]}, "ip6": ..., "dns"}
    0.3.0 0.3.1 0.4.0    {"interfaces": [{"name", "mac", "sandbox"}], "ips": [{"version": "4", "address", "gateway", "interface"}], ...}
    1.0.0                the same without "version"
    1.1.0                interfaces have "mtu", routes "mtu", "advmss", "priority", "table", "scope"

Decides nothing of what a result says. Source: the CNI specification of each version, section "Result types".
"""

from __future__ import annotations

from ipaddress import ip_interface, ip_network

from nodeplane.cni.protocol import UNDECODABLE, CniError, Json, is_older

SINCE_1_1 = {"interfaces": ("mtu", "socketPath", "pciID"), "routes": ("mtu", "advmss", "priority", "table", "scope")}


def print_result(result: Json, version: str) -> Json:
    """Return a result of the form of 1.1.0 in the form of ``version``; what that cannot say is left out."""
    if is_older(version, "0.3.0"):
        return _print_old(result, version)
    found: Json = {"cniVersion": version}
    for key in ("interfaces", "ips", "routes"):
        entries = [dict(one) for one in result.get(key) or []]
        if is_older(version, "1.1.0"):
            entries = [{k: v for k, v in one.items() if k not in SINCE_1_1.get(key, ())} for one in entries]
        if key == "ips" and is_older(version, "1.0.0"):
            entries = [{"version": str(ip_interface(one["address"]).version), **one} for one in entries]
        if entries:
            found[key] = entries
    return {**found, "dns": result.get("dns") or {}}


def _print_old(result: Json, version: str) -> Json:
    """Of each family only the first address can be said, with the routes of that family."""
    found: Json = {"cniVersion": version}
    for one in result.get("ips") or []:
        family = ip_interface(one["address"]).version
        if f"ip{family}" in found:
            continue
        routes = [r for r in result.get("routes") or [] if ip_network(r["dst"], strict=False).version == family]
        entry: Json = {"ip": one["address"]}
        if one.get("gateway"):
            entry["gateway"] = one["gateway"]
        if routes:
            entry["routes"] = [{key: route[key] for key in ("dst", "gw") if route.get(key)} for route in routes]
        found[f"ip{family}"] = entry
    return {**found, "dns": result.get("dns") or {}}


def parse_result(raw: Json) -> Json:
    """Return a result of any version in the form of 1.1.0. Raises CniError naming the entry that makes no sense."""
    ips, routes = list(raw.get("ips") or []), list(raw.get("routes") or [])
    for key in ("ip4", "ip6"):
        old = raw.get(key)
        if old:
            ips.append({"address": old.get("ip"), **({"gateway": old["gateway"]} if old.get("gateway") else {})})
            routes += old.get("routes") or []
    for key, field, entries in (("ips", "address", ips), ("routes", "dst", routes)):
        for one in entries:
            try:
                ip_interface(one[field])
            except (KeyError, TypeError, ValueError) as error:
                raise CniError(
                    UNDECODABLE, f"result: {key}: {field}: must be an address with its length, is {one!r}"
                ) from error
    return {
        "cniVersion": "1.1.0",
        "interfaces": list(raw.get("interfaces") or []),
        "ips": [{key: value for key, value in one.items() if key != "version"} for one in ips],
        "routes": routes,
        "dns": raw.get("dns") or {},
    }
