"""Options of `compare`; answers --help without torch."""

from __future__ import annotations

from pathlib import Path

from lra.options import READ, Command, folder, option

PRESETS_SHOWN = option("--preset", "only this preset (default: all)", list)
REFERENCE = option("--reference", "folder of the records beside them", folder, Path("results/reference"))

COMMANDS = {"compare": Command("lra.leaderboard.page:compare", (READ, REFERENCE, PRESETS_SHOWN))}
