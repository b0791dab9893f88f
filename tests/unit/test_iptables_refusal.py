"""What the iptables tools say when they refuse a text, turned into an error that names the rule."""

from __future__ import annotations

import pytest

from kernelstate.linux.iptables import refusal

TEXT = "*nat\n:C - [0:0]\n-A C -j NOWHERE\nCOMMIT\n"
HINT = "Try `iptables-restore -h' or 'iptables-restore --help' for more information.\n"


@pytest.mark.parametrize(
    ("complaint", "expected"),
    [
        pytest.param(
            f"iptables-restore v1.8.9 (legacy): Couldn't load target `NOWHERE':No such file or directory\n\nError occurred at line: 3\n{HINT}",
            (3, "-A C -j NOWHERE", "Couldn't load target `NOWHERE':No such file or directory"),
            id="legacy, while parsing",
        ),
        pytest.param("iptables-restore: line 4 failed\n", (4, "COMMIT", "refused without a word"), id="legacy, by the kernel"),
        pytest.param(
            "iptables-nft-restore v1.8.9 (nf_tables): \nline 3: RULE_APPEND failed (Invalid argument): rule in chain C\n",
            (3, "-A C -j NOWHERE", "RULE_APPEND failed (Invalid argument): rule in chain C"),
            id="nft, by the kernel",
        ),
        pytest.param(
            f"iptables-restore v1.8.9 (legacy): iptables-restore: unable to initialize table 'nat'\n\nError occurred at line: 1\n{HINT}",
            (0, "tool", "unable to initialize table 'nat'"),
            id="a missing table is about no rule",
        ),
        pytest.param(
            "Another app is currently holding the xtables lock. Perhaps you want to use the -w option?\n",
            (0, "tool", "Another app is currently holding the xtables lock. Perhaps you want to use the -w option?"),
            id="the lock is about no rule",
        ),
    ],
)
def test_refusal(complaint: str, expected: tuple[int, str, str]) -> None:
    """Each row: a tool's complaint as it was seen, and the line, object and words that are made of it."""
    error = refusal("tool", TEXT, complaint)
    assert (error.line, error.obj, error.reason) == expected
