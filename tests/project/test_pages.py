"""The pages of the project: what they link to and name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
) + ["tests/README.md"]
# Stands for a name, or exists once a command has run.
NO_FILE = re.compile(
    r"[A-Z]{4}[./]|tidal_profiles/|\.venv|setup\.log|\.(cu|cuh|so|jsonl)$"
)


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page):
    for target in re.findall(r"\]\((?!http|#)([^)#]*)", text_of(page)):
        assert (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_linked_headings_exist(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#(.*?)\)", text_of(page)):
        linked = (ROOT / page).parent / target if target else ROOT / page
        headings = re.findall(r"^#+ (.*)", linked.read_text(), re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
        assert anchor in slugs, (target, anchor)


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    """Paths in backticks, from the root, the package or the page."""
    named = set(re.findall(r"`([\w.]+(?:/[\w.]+)*/?)[`:]", text_of(page)))
    for name in sorted(named):
        is_path = name.endswith((".py", ".md", ".sh", ".toml", ".txt", "/")) and (
            "/" in name or name.endswith((".md", ".toml"))
        )
        if is_path and not NO_FILE.search(name):
            folders = (ROOT, ROOT / "tidal_vllm", (ROOT / page).parent)
            assert any((folder / name).exists() for folder in folders), name


@pytest.mark.parametrize("page", PAGES)
def test_named_paths_exist(page):
    for path in set(
        re.findall(r"\b(?:tests|benchmarks|docs)/\w[\w./]*", text_of(page))
    ):
        assert (ROOT / path.rstrip(".")).exists(), path
