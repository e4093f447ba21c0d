"""results/reference holds the authors' records and what they say; everything else under results/ is the user's."""

import re
import shutil
import subprocess

import pytest

from lra.records.markup import refresh_block
from lra.records.table import render
from tests.conftest import ROOT

REFERENCE = ROOT / "results" / "reference"


def test_the_wide_tables_are_what_the_records_say():
    text = (REFERENCE / "TABLE.md").read_text()
    made = render(REFERENCE, "long", None, pytest.fail)
    assert refresh_block(text, "results", made) == text, (
        "run: python -m lra table --results results/reference --format long --write results/reference/TABLE.md"
    )


def test_the_table_of_the_readme_is_what_the_records_say():
    text = (ROOT / "README.md").read_text()
    made = render(REFERENCE, "compact", ["small"], pytest.fail)
    assert refresh_block(text, "results", made) == text, (
        "run: python -m lra table --results results/reference --preset small --write README.md"
    )


@pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(), reason="no git checkout")
def test_git_ignores_the_results_of_the_user_and_not_the_reference():
    for place, code in (("results/records/x.json", 0), ("results/TABLE.md", 0), ("results/reference/x.json", 1)):
        assert subprocess.run(["git", "check-ignore", "-q", place], cwd=ROOT).returncode == code, place


def test_no_test_reads_the_results_of_the_user():
    outside = re.compile(r"ROOT / .results.(?! / .reference.)")
    for path in sorted((ROOT / "tests").rglob("*.py")):
        lines = [line for line in path.read_text().splitlines() if "outside = " not in line]
        assert not any(map(outside.search, lines)), path.relative_to(ROOT)
