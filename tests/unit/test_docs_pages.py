"""The pages as such: links and anchors lead somewhere, lines of prose are short, every page is on the map."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")), *sorted(DOCS.rglob("*.md"))]
MAX_LINE = 120
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")


def prose(page):
    """The page's lines outside of fenced code, each with its number."""
    fenced = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


def slug(heading):
    """A heading's anchor, for GitHub and for the site: they agree where words are parted by single spaces."""
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def anchors(page):
    return {slug(line.lstrip("#")) for _, line in prose(page) if re.match(r"#+ ", line)}


def links(page):
    for number, line in prose(page):
        for target in LINK.findall(re.sub(r"`[^`]*`", "", line)):
            if not re.match(r"[a-z]+:", target):
                yield number, target


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_lead_somewhere(page):
    dead = []
    for number, target in links(page):
        path, _, anchor = target.partition("#")
        aim = (page.parent / path).resolve() if path else page
        if not aim.exists() or (anchor and anchor not in anchors(aim)):
            dead.append(f"{number}: {target}")
    assert not dead


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_of_prose_are_short(page):
    """Rows of tables and pictures cannot be broken, nor can a line that is one word."""
    long = [n for n, line in prose(page) if len(line) > MAX_LINE and not line.startswith(("|", "![")) and " " in line]
    assert not long


def test_pages_named_in_code_are_there():
    where = ["src", "tests", "benchmarks/*.py", "pyproject.toml"]
    command = ["git", "grep", "-hoE", r"docs/[a-z_/-]+\.(md|svg|png)", "--", *where]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert len(files) > 10
    assert {name for name in files if not (ROOT / name).is_file()} == set()


def test_every_page_is_on_the_map_and_in_the_site():
    """The map is `docs/index.md`; the site's order of pages is in `mkdocs.yml`."""
    mapped = {(DOCS / target.partition("#")[0]).resolve() for _, target in links(DOCS / "index.md")}
    pages = {page for page in DOCS.rglob("*.md") if page.name != "index.md"}
    assert {name_of(page) for page in pages - mapped} == set()
    site = re.findall(r"[\w/-]+\.md$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(site) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_pages_that_come_from_the_program_are_up_to_date():
    command = [sys.executable, str(DOCS / "make_reference.py"), "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_the_api_page_has_every_public_name():
    import lockstep
    from lockstep import testing

    page = (DOCS / "reference" / "api.md").read_text()
    told = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith(":::")}
    errors = {name for name in lockstep.__all__ if name.endswith("Error")}  # by their module
    assert {*lockstep.__all__, *testing.__all__} - told - errors - {"__version__"} == set()


def test_the_checks_find_what_is_wrong(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `name` here\n\n[a](#a-name-here) [b](gone.md)\n\n```\n[c](not-a-link.md)\n```\n")
    assert anchors(page) == {"a-name-here"}
    assert [target for _, target in links(page)] == ["#a-name-here", "gone.md"]
