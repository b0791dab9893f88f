"""The packet filter in memory: takes the same text as ``iptables-restore`` and refuses what the kernel would refuse.

Decides exactly what reconciling relies on: a table is committed whole or not at all, a chain line flushes and zeroes
counters, ``-X`` wants an empty chain nobody jumps to, ``-D`` wants a rule that is there, jumps want chains that exist and make
no loop. Whether a match or target is possible in a table is left to the real kernel.

For tests it counts what was written, fails on demand, and lets somebody else interfere (``flush``, ``run``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from kernelstate.errors import KernelRefusedError, ParseError
from kernelstate.objects.address import Family
from kernelstate.objects.netfilter import Anchor, ChainKey, Jump, Rule, Ruleset, Table
from kernelstate.text.iptables_parse import BUILTIN, RuleReader, split_words

MAX_NAME = 28
"""The kernel keeps 29 bytes for a chain's name, iptables takes 28 characters (XT_EXTENSION_MAXNAMELEN)."""

Chains = dict[str, list["CountedRule"]]


class CountedRule:
    """A rule in the fake kernel with the number of the commit that wrote it: a rewrite, which zeroes counters, changes it."""

    __slots__ = ("born", "rule")

    def __init__(self, rule: Rule, born: int) -> None:
        self.rule, self.born = rule, born


class Refusal(Exception):  # noqa: N818  what the kernel answers; becomes KernelRefusedError with its line
    """One line was refused; the text is the kernel's words."""


class FakeNetfilter:
    """Implements ``ports.NetfilterPort``.

    ``applied`` lists every (family, text) that was committed, ``fail_next`` is how many ``apply`` calls fail from now on,
    ``refuse`` decides for single rules whether the kernel takes them.
    """

    def __init__(self, refuse: Callable[[ChainKey, Rule], bool] = lambda _key, _rule: False) -> None:
        self.applied: list[tuple[Family, str]] = []
        self.fail_next = 0
        self.observations = 0
        self._refuse = refuse
        self._generation: dict[Family, int] = {4: 0, 6: 0}
        self._tables: dict[tuple[Family, Table], Chains] = {}
        for family in (4, 6):
            for table in BUILTIN:
                self._tables[family, table] = {name: [] for name in BUILTIN[table]}  # type: ignore[index]  # literals

    # -- NetfilterPort -------------------------------------------------------------------------------------------------

    def observe(self, family: Family, known: Mapping[ChainKey, Sequence[Rule]] | None = None) -> Ruleset:
        """Return every chain of the family; builtin ones as anchors."""
        self.observations += 1
        chains: dict[ChainKey, tuple[Rule, ...]] = {}
        anchors: list[Anchor] = []
        for key, rules in self._all(family):
            if key.name in BUILTIN[key.table]:
                anchors += [Anchor(key, counted.rule) for counted in rules]
            else:
                chains[key] = tuple(counted.rule for counted in rules)
        return Ruleset(chains, tuple(anchors))

    def apply(self, family: Family, restore_text: str) -> None:
        """Commit the text table by table. Raises KernelRefusedError with the line; tables before it stay committed."""
        if self.fail_next:
            self.fail_next -= 1
            raise KernelRefusedError("iptables-restore", f"IPv{family}", "Another app is currently holding the xtables lock.")
        self.run(family, restore_text)
        self.applied.append((family, restore_text))

    def generation(self, family: Family) -> object:
        """Return a number that every commit to the family raises."""
        return self._generation[family]

    # -- somebody else -------------------------------------------------------------------------------------------------

    def run(self, family: Family, restore_text: str) -> None:
        """Commit a text that does not count as ours and never fails on demand."""
        session: _Session | None = None
        for number, line in enumerate(restore_text.splitlines(), 1):
            try:
                if line.startswith("*"):
                    session = self._open(family, line[1:])
                elif session is not None and line != "COMMIT":
                    session.execute(split_words(line))
                else:
                    self._commit(session)
                    session = None
            except (Refusal, ParseError) as error:
                raise KernelRefusedError("iptables-restore", line, str(error), number) from error
        if session is not None:
            raise KernelRefusedError("iptables-restore", session.table, "COMMIT expected")

    def flush(self, family: Family, table: Table) -> None:
        """Do ``iptables -t TABLE -F``: every chain stays, every rule goes."""
        for rules in self._tables[family, table].values():
            rules.clear()
        self._generation[family] += 1

    def births(self, family: Family) -> dict[ChainKey, list[tuple[Rule, int]]]:
        """Return each chain's rules with the commit that wrote them: what is equal before and after kept its counters."""
        return {key: [(counted.rule, counted.born) for counted in rules] for key, rules in self._all(family)}

    # ------------------------------------------------------------------------------------------------------------------

    def _all(self, family: Family) -> Iterator[tuple[ChainKey, list[CountedRule]]]:
        for (of, table), chains in self._tables.items():
            if of == family:
                for name, rules in chains.items():
                    yield ChainKey(family, table, name), rules

    def _open(self, family: Family, name: str) -> _Session:
        for of, table in self._tables:
            if of == family and table == name:
                draft = {chain: list(rules) for chain, rules in self._tables[of, table].items()}
                return _Session(family, table, draft, self._generation[family] + 1, self._refuse)
        raise Refusal(f"can't initialize iptables table `{name}'")

    def _commit(self, session: _Session | None) -> None:
        if session is None:
            raise Refusal("outside of a table")
        session.check()
        self._tables[session.family, session.table] = session.draft
        self._generation[session.family] += 1


class RecordingNetfilter:
    """Implements ``ports.NetfilterPort`` over nothing: keeps the last text of each family and believes it was committed.

    For measuring everything up to the text without paying for a kernel, real or fake.
    """

    def __init__(self) -> None:
        self.texts: dict[Family, str] = {}

    def observe(self, family: Family, known: Mapping[ChainKey, Sequence[Rule]] | None = None) -> Ruleset:
        """Return nothing: as on a fresh node."""
        return Ruleset({})

    def apply(self, family: Family, restore_text: str) -> None:
        """Keep the text."""
        self.texts[family] = restore_text

    def generation(self, family: Family) -> object:
        """Return the same always: nobody else is here."""
        return 0


class _Session:
    """The draft of one table between ``*table`` and ``COMMIT``."""

    def __init__(
        self, family: Family, table: Table, draft: Chains, born: int, refuse: Callable[[ChainKey, Rule], bool]
    ) -> None:
        self.family, self.table, self.draft = family, table, draft
        self._born = born
        self._refuse = refuse
        self._reader = RuleReader(family)

    def execute(self, words: list[str]) -> None:
        """Do one line to the draft. Raises Refusal."""
        command, name = words[0], words[1] if len(words) > 1 else ""
        if command.startswith(":"):
            self._declare(command[1:])
        elif name not in self.draft:
            raise Refusal("No chain/target/match by that name.")
        elif command == "-A":
            self._insert(name, len(self.draft[name]), self._reader.rule(words, 2))
        elif command == "-I":
            numbered = words[2].isdigit()
            self._insert(name, int(words[2]) - 1 if numbered else 0, self._reader.rule(words, 3 if numbered else 2))
        elif command == "-D":
            self._delete(self.draft[name], self._reader.rule(words, 2))
        elif command == "-X":
            self._remove(name)
        else:
            raise Refusal(f"unknown command {command}")

    def check(self) -> None:
        """Refuse loops, as the kernel does when a table is committed. Raises Refusal."""
        jumps = {name: {_chain_of(counted.rule) for counted in rules} - {""} for name, rules in self.draft.items()}
        left = dict(jumps)
        while left:  # take away chains that only jump to chains already taken away; a loop never gets there
            leaves = [name for name, targets in left.items() if not targets & left.keys()]
            if not leaves:
                raise Refusal(f"loop hook through {min(left)} (Too many links)")
            for name in leaves:
                del left[name]

    def _declare(self, name: str) -> None:
        if len(name) > MAX_NAME:
            raise Refusal(f"chain name `{name}' too long (must be under 29 chars)")
        self.draft[name] = []

    def _insert(self, name: str, index: int, rule: Rule) -> None:
        target = _chain_of(rule)
        if self._refuse(ChainKey(self.family, self.table, name), rule):
            raise Refusal("RULE_APPEND failed (Invalid argument)")
        if target and (target not in self.draft or target in BUILTIN[self.table]):
            raise Refusal(f"Couldn't load target `{target}':No such file or directory")
        if index > len(self.draft[name]):
            raise Refusal("Index of insertion too big.")
        self.draft[name].insert(index, CountedRule(rule, self._born))

    def _delete(self, rules: list[CountedRule], rule: Rule) -> None:
        index = next((i for i, counted in enumerate(rules) if counted.rule == rule), None)
        if index is None:
            raise Refusal("Bad rule (does a matching rule exist in that chain?).")
        del rules[index]

    def _remove(self, name: str) -> None:
        if name in BUILTIN[self.table] or self.draft[name]:
            raise Refusal("CHAIN_DEL failed (Device or resource busy): not empty")
        if any(_chain_of(counted.rule) == name for rules in self.draft.values() for counted in rules):
            raise Refusal("CHAIN_DEL failed (Device or resource busy): too many links")
        del self.draft[name]


def _chain_of(rule: Rule) -> str:
    return rule.target.chain if isinstance(rule.target, Jump) else ""
