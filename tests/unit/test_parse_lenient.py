"""What Kubernetes lets pass, and what an object stands without."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from clusterstate.fields import parse_cidr, parse_ip
from clusterstate.objects import ObjectRef
from clusterstate.parse import parse_document, parse_object


def load_balancer(**spec):
    return {
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"type": "LoadBalancer", "clusterIP": "10.96.0.1", "ports": [{"port": 80}], **spec},
    }


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("172.30.0.041", "172.30.0.41"),
        ("010.000.000.001", "10.0.0.1"),
        ("0192.168.1.1", "192.168.1.1"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("::ffff:1.2.3.004", "1.2.3.4"),
        ("FD00::00A", "fd00::a"),
    ],
)
def test_addresses_are_read_sloppily(text, address):
    """Leading zeros are decimal, never octal, and an IPv4 address in IPv6 clothes is the IPv4 address."""
    assert parse_ip(text) == ip_address(address)


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("203.0.113.000/025", "203.0.113.0/25"),
        ("10.1.2.3/8", "10.0.0.0/8"),
        ("fd00::1/64", "fd00::/64"),
        ("0.0.0.0/0", "0.0.0.0/0"),
    ],
)
def test_networks_are_read_sloppily(text, network):
    """Leading zeros are dropped and so are the bits behind the prefix."""
    assert parse_cidr(text) == ip_network(network)


@pytest.mark.parametrize(
    "text", ["", "1.2.3", "1.2.3.4.5", "1.2.3.-4", "1.2.3.4 ", "a::b::c", "1.2.3.²", "12345", "::1%lo", "[::1]"]
)
def test_what_is_no_address_is_refused(text):
    """Sloppy is not careless: anything else raises."""
    with pytest.raises(ValueError):
        parse_ip(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10.0.0.0",
        "10.0.0.0/",
        "10.0.0.0/-1",
        "10.0.0.0/+8",
        "10.0.0.0/33",
        "10.0.0.0/255.0.0.0",
        "fd00::/129",
        "fe80::%lo/64",
    ],
)
def test_what_is_no_network_is_refused(text):
    """A network has an address and a plain prefix length within its family."""
    with pytest.raises(ValueError):
        parse_cidr(text)


@pytest.mark.parametrize(
    ("ranges", "kept"),
    [
        ([" 10.0.0.0/8", "192.0.2.0/24\n"], ["10.0.0.0/8", "192.0.2.0/24"]),
        (["10.0.0.0/8", "0.0.0.0/0"], []),
        (["10.0.0.0/8", "10.1.0.0/8"], ["10.0.0.0/8"]),
        (["0.0.0.0/0", "fd00::/8"], ["fd00::/8"]),
        (["10.0.0.0/8", "::/0"], ["10.0.0.0/8"]),
        (None, []),
    ],
)
def test_source_ranges_are_trimmed_and_all_means_none(ranges, kept):
    """A range of every address lifts the restriction of its family; of the other family it lifts nothing."""
    parsed = parse_object(load_balancer(loadBalancerSourceRanges=ranges), "x")
    assert parsed.errors == ()
    assert parsed.objects[0].source_ranges == tuple(ip_network(text) for text in kept)


def test_single_entries_are_left_out_and_told():
    """External IPs, load balancer addresses and source ranges that cannot be read are left out singly; the Service stands."""
    raw = load_balancer(
        externalIPs=["198.51.100.1", "nonsense", "127.0.0.1", "198.51.100.1"],
        loadBalancerSourceRanges=["10.0.0.0/8", "10.0.0.1"],
    )
    raw["status"] = {
        "loadBalancer": {"ingress": [{"ip": "192.0.2.300"}, {"ip": "192.0.2.1"}, {"ip": "192.0.2.2", "ipMode": "X"}]}
    }
    parsed = parse_object(raw, "x.yaml")
    (service,) = parsed.objects
    assert service.external_ips == (ip_address("198.51.100.1"),)
    assert [i.ip for i in service.load_balancer] == [ip_address("192.0.2.1")]
    assert service.source_ranges == (ip_network("10.0.0.0/8"),)
    assert [f"{e.field}: {e.reason}" for e in parsed.errors] == [
        'spec.externalIPs[1]: must be an IP address, is "nonsense"',
        'spec.externalIPs[2]: must not be an unspecified, loopback or link-local address, is "127.0.0.1"',
        'status.loadBalancer.ingress[0].ip: must be an IP address, is "192.0.2.300"',
        'status.loadBalancer.ingress[2].ipMode: must be VIP or Proxy, is "X"',
        'spec.loadBalancerSourceRanges[1]: must be a CIDR such as 10.0.0.0/8, is "10.0.0.1"',
    ]
    assert all(e.kept and e.ref == ObjectRef("Service", "default", "web") for e in parsed.errors)


def test_an_endpoint_without_address_is_left_out_and_told():
    """A slice stands without an endpoint that has no address."""
    raw = {
        "kind": "EndpointSlice",
        "metadata": {"name": "a"},
        "addressType": "IPv4",
        "endpoints": [{}, {"addresses": ["10.0.0.1"]}],
    }
    parsed = parse_object(raw, "x")
    assert [e.address for e in parsed.objects[0].endpoints] == [ip_address("10.0.0.1")]
    assert [(e.field, e.reason, e.kept) for e in parsed.errors] == [("endpoints[0].addresses", "must hold an address", True)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12:30", "12:30"),
        ("2026-11-25", "2026-11-25"),
        ("1:2:3", "1:2:3"),
        ("=", "="),
        ("0x1g", "0x1g"),
        ("1.2.3", "1.2.3"),
        ("'on'", "on"),
    ],
)
def test_plain_yaml_words_stay_words(text, value):
    """Times, dates and addresses are strings, as in the YAML that Go reads."""
    parsed = parse_document(f"kind: Namespace\nmetadata: {{name: a, labels: {{x: {text}}}}}\n".encode(), "x", is_json=False)
    assert parsed.errors == ()
    assert parsed.objects[0].labels["x"] == value


@pytest.mark.parametrize(
    ("text", "value"), [("080", 80), ("0x50", 80), ("+80", 80), ("8_0", 80), ("0b1010000", 80), ("0120", 80)]
)
def test_yaml_numbers_stay_numbers(text, value):
    """Ports may be written as YAML writes numbers; 080 is no octal number and thus text, which a port cannot be."""
    data = f"kind: Service\nmetadata: {{name: a}}\nspec: {{ports: [{{port: {text}}}]}}\n".encode()
    parsed = parse_document(data, "x", is_json=False)
    if text == "080":
        assert [e.reason for e in parsed.errors] == ['must be a whole number, is "080"']
    else:
        assert parsed.objects[0].ports[0].port == value


def test_equal_parts_are_one_object():
    """Ten thousand Services with the same port hold one ServicePort, and everything without labels one empty mapping."""
    one, two = (parse_object(load_balancer(), "x").objects[0] for _ in range(2))
    assert one.ports[0] is two.ports[0]
    assert one.labels is two.annotations


def test_a_byte_order_mark_is_no_content():
    """Editors that put a byte order mark before the text do no harm."""
    assert len(parse_document(b'\xef\xbb\xbf{"kind": "Namespace", "metadata": {"name": "a"}}', "x", is_json=True).objects) == 1
