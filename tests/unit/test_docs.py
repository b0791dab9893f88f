"""What the documents quote and link to is there."""

import re
from pathlib import Path

import pytest

from proxy.modes import TRAITS

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("netns-lab/**/*.md"), *ROOT.glob("bench/*.md")])
GOLDEN = {line for path in ROOT.glob("tests/golden/*/*.txt") for line in path.read_text().splitlines()}


def test_quoted_rules_are_golden():
    """Every rule that the packet walk quotes stands in a golden file; only the section on wording shows others."""
    text = (ROOT / "docs/packet-walk.md").read_text().split("## Two ways to print one rule")[0]
    quoted = re.findall(r"^    (-A .*)$", text, re.MULTILINE)
    assert len(quoted) > 20
    assert [line for line in quoted if line not in GOLDEN] == []


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_links_lead_somewhere(page):
    """Relative links point to files that exist, and to headings that are in them."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert heading in slugs, f"{page.name} links to {target}"


def test_every_difference_between_modes_is_told():
    """docs/modes.md has a line for each trait, with what each mode does, and no other line."""
    row = r"^\| `(\w+)`" + r" \| (yes|no)" * len(TRAITS) + r" \|"
    rows = re.findall(row, (ROOT / "docs/modes.md").read_text(), re.MULTILINE)
    told = {name: [word == "yes" for word in words] for name, *words in rows}
    fields = [f for f in TRAITS["iptables"].__struct_fields__ if f != "name"]
    assert told == {f: [getattr(TRAITS[mode], f) for mode in ("iptables", "ipvs", "nftables", "ebpf")] for f in fields}
