"""Chain names equal kube-proxy's, character for character."""

import base64
import hashlib

import pytest

from proxy.names import endpoint_chain, hash16, port_hash


@pytest.mark.parametrize(
    ("service_port", "endpoint", "chain"),
    [
        ("ns1/svc1:p80", "10.180.0.1:80", "KUBE-SEP-SXIVWICOYRO3J4NJ"),
        ("ns4/svc4:p80", "10.180.0.5:80", "KUBE-SEP-C6EBXVWJJZMIWKLZ"),
    ],
)
def test_endpoint_chain(service_port, endpoint, chain):
    """A KUBE-SEP chain hashes ServicePort, protocol and endpoint."""
    assert endpoint_chain(service_port, "tcp", endpoint) == chain


def test_port_hash():
    """The chains of one ServicePort share one hash."""
    assert port_hash("ns1/svc1:p80", "tcp") == "XPGD46QRK7WJZT7O"


@pytest.mark.parametrize("text", ["", "a", "ns1/svc1:p80tcp", "x" * 300])
def test_hash_is_plain_base32(text):
    """The fast form equals the first 16 characters of the standard library's base32."""
    assert hash16(text) == base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()[:16]
