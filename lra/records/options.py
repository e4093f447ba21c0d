"""Options of `table`; answers --help without torch."""

from __future__ import annotations

from pathlib import Path

from lra.options import RESULTS, Command, option

COMMANDS = {
    "table": Command(
        "lra.records.show:show_table",
        (
            RESULTS,
            option(
                "--format",
                "Markdown, LaTeX (a document with booktabs), HTML (a page), or CSV (one line per record)",
                ("md", "tex", "html", "csv"),
                "md",
            ),
            option("--preset", "only this preset (default: all)", list),
            option(
                "--write",
                "a file; of a Markdown file only the text between its results markers changes",
                Path,
            ),
        ),
    )
}
