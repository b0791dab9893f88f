"""Service entries made by hand, for tests of what comes behind compiling."""

from ipaddress import ip_address

from proxy.table import Backend, Frontend, Kind, PortName, ServiceEntry


def entry_of(name, *, endpoints=1, node_port=0):
    """Return the entry of a Service of one TCP port with so many endpoints and perhaps a NodePort."""
    base = int(ip_address("10.244.0.1"))
    pool = tuple(Backend(f"{ip_address(base + i)}:80", ip_address(base + i), 80) for i in range(endpoints))
    frontends = (Frontend(Kind.CLUSTER_IP, ip_address("10.96.0.10"), 80),)
    if node_port:
        frontends += (Frontend(Kind.NODE_PORT, None, node_port),)
    return ServiceEntry(PortName("default", name, "http", "TCP"), 4, frontends, cluster=pool, has_any=True)
