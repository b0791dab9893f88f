"""What legacy iptables holds, read through python-iptables: a second witness that shares nothing with our own text.

python-iptables asks libiptc for the kernel's table and each match's own ``save`` callback for its words, so neither the
iptables programs nor the text printed for them are trusted. That callback prints to file descriptor 1, which the library
points at a pipe meanwhile; a process with other threads cannot have that, so it happens in a process of its own, which also
keeps its import and its copy of the table to itself. Reading rule by rule, it is for chains that matter, not for a whole cluster
(110,000 rules: 2 s by iptables-save and parsing its text, a minute this way).

    read_back() --> python -m kernelstate.linux.xt_readback 4 nat KUBE-SERVICES --> {"KUBE-SERVICES": [["-s", ...], ...]}
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from kernelstate.errors import KernelRefusedError
from kernelstate.objects.address import Family
from kernelstate.objects.netfilter import ChainKey, Rule, Table
from kernelstate.text.iptables_parse import RuleReader

TIMEOUT = 120.0


def read_back(family: Family, table: Table, chains: Iterable[str]) -> dict[ChainKey, tuple[Rule, ...]]:
    """Return the rules of those of ``chains`` that exist, in the calling thread's namespace. Raises KernelRefusedError."""
    command = [sys.executable, "-m", __name__, str(family), table]
    try:
        done = subprocess.run(command, input="\n".join(chains), capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelRefusedError("read back", f"IPv{family} {table}", str(error)) from error
    if done.returncode != 0:
        raise KernelRefusedError("read back", f"IPv{family} {table}", done.stderr.strip().rpartition("\n")[2])
    reader = RuleReader(family)
    return {
        ChainKey(family, table, name): tuple(reader.rule(words) for words in rules)
        for name, rules in json.loads(done.stdout).items()
    }


def main(arguments: list[str]) -> None:
    """Print the chains named on stdin as JSON: for each its rules as words."""
    import iptc  # noqa: PLC0415  only in the process made for it

    family, name = arguments
    table = (iptc.Table if family == "4" else iptc.Table6)(name)
    table.autocommit = False  # reading commits nothing
    wanted = set(sys.stdin.read().split("\n"))
    print(json.dumps({c.name: [_words(rule) for rule in c.rules] for c in table.chains if c.name in wanted}))  # noqa: T201


def _words(rule: Any) -> list[str]:
    """Return a python-iptables rule as iptables-save would word it, without counters."""
    words: list[str] = []
    header = {"-s": rule.src, "-d": rule.dst, "-i": rule.in_interface, "-o": rule.out_interface, "-p": rule.protocol}
    for option, value in header.items():
        text = _cidr(value) if option in {"-s", "-d"} else value
        if text and text not in {"ip", "0.0.0.0/0", "::/0"}:
            words += ["!", option, text[1:]] if text.startswith("!") else [option, text]
    for match in rule.matches:
        words += ["-m", match.name, *_options(match)]
    if rule.target is not None and rule.target.name:
        words += ["-g" if rule.target.goto else "-j", rule.target.name, *_options(rule.target)]
    return words


def _cidr(text: str) -> str:
    """Return ``[!]10.0.0.0/255.0.0.0`` as ``[!]10.0.0.0/8``."""
    from ipaddress import ip_address  # noqa: PLC0415

    address, _, mask = text.partition("/")
    if not mask or mask.isdigit():
        return text
    bits = int(ip_address(mask)).bit_count()
    return f"{address}/{bits}"


def _options(extension: Any) -> list[str]:
    words: list[str] = []
    for name, values in extension.get_all_parameters().items():
        negated = values[:1] == ["!"]
        words += ["!"] if negated else []
        words += [f"--{name}", *values[negated:]]
    return words


if __name__ == "__main__":
    main(sys.argv[1:])
