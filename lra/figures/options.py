"""Options of `inspect`, `cards`, `plot` and `tensorboard`; answers --help without torch."""

from pathlib import Path

from lra.options import DATA, PRESET, READ, RUNS, TASK, Command, at_least, folder, option

INSPECT = (
    TASK,
    PRESET,
    DATA,
    option("--out", "folder for facts (JSON), lengths (SVG, PNG) and a contact sheet (PNG)", Path),
)
CARDS = (
    option("--results", "its data/ holds what `inspect --out` wrote", folder, Path("results")),
    option("--write", "a file such as tasks/DATA.md: only the text between its markers changes", Path),
)
PLOT = (READ, option("--all", "draw all methods (default: at most eight in a panel)", bool))
TENSORBOARD = (
    RUNS,
    option("--task", "only this task: its attentions overlay one another (default: all tasks)"),
    option("--port", "on 127.0.0.1", at_least(1, 65535), 6006),
    option("--start", "start TensorBoard, instead of only printing the command", bool),
)
COMMANDS = {
    "inspect": Command("lra.figures.inspect:show", INSPECT),
    "cards": Command("lra.figures.inspect:cards", CARDS),
    "plot": Command("lra.leaderboard.page:plot", PLOT),
    "tensorboard": Command("lra.figures.tensorboard:tensorboard", TENSORBOARD),
}
