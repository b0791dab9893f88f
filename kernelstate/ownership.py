"""Which chains and rules are ours: the mark that every packet filter object of ours bears before it is first written.

A chain is ours by its name, a rule in somebody else's chain by where it jumps or by its comment. Which names those are is the
caller's knowledge; here is only how they are told apart. What is ours may be rewritten and removed at will, what is not is
never touched.
"""

from __future__ import annotations

import msgspec

from kernelstate.objects.netfilter import Jump, Rule


class Ownership(msgspec.Struct, frozen=True):
    """Chains of ours by exact name or prefix (``KUBE-SVC-``), other rules of ours by their whole comment."""

    names: frozenset[str] = frozenset()
    prefixes: tuple[str, ...] = ()
    comments: frozenset[str] = frozenset()

    def owns(self, chain: str) -> bool:
        """Whether a chain of this name is ours."""
        return chain in self.names or chain.startswith(self.prefixes)

    def claims(self, rule: Rule) -> bool:
        """Whether a rule in somebody else's chain is ours: it jumps to a chain of ours or has a comment of ours."""
        target = rule.target
        if isinstance(target, Jump) and self.owns(target.chain):
            return True
        return bool(self.comments) and rule.comment in self.comments
