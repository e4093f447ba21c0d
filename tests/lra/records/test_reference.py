"""The committed tables are what the committed records in results/reference say."""

import pytest

from lra.leaderboard.submit import reproductions
from lra.records.markup import refresh_block
from lra.records.table import render
from tests.conftest import ROOT

REFERENCE = ROOT / "results" / "reference"


def test_the_wide_tables_are_what_the_records_say():
    text = (REFERENCE / "TABLE.md").read_text()
    made = render(REFERENCE, "md", None, pytest.fail, reproductions(REFERENCE))
    assert refresh_block(text, "results", made) == text, (
        "run: python -m lra table --results results/reference --write results/reference/TABLE.md"
    )


def test_the_table_of_the_readme_is_what_the_records_say():
    text = (ROOT / "README.md").read_text()
    made = render(REFERENCE, "compact", ["small"], pytest.fail)
    assert refresh_block(text, "results", made) == text, (
        "run: python -m lra table --results results/reference --preset small --compact --write README.md"
    )
