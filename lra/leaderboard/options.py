"""Options of `leaderboard ...`, `evaluate`, `reproduce`, `table` and `compare`; answers --help without torch."""

from pathlib import Path

from lra.options import DATA, DEVICE, PLACES, PORT, READ, RUNS, TRUST, Command, folder, numbers, option

LEVELS = (
    "0 form and identity, 1 agrees with itself, 2 first losses repeated (needs --data), "
    "3 saved weights evaluated (needs --data and --runs), 4 equivalent to somebody else's runs"
)
FORMS = "compact: accuracies of the default runs; long: every row, remarks, costs; tex: as long; csv: a line per record"
TRIED = "CPU threads, e.g. 1,2: one run each, compared; the first becomes the counter-record (default: the record's)"
LONGER = (
    "times the length in training, e.g. 2,4: test the weights on longer data of a generated task, drawn anew, and keep "
    "the counts in RESULTS/longer/ for the table (default: the record's own test split alone)"
)
CHECKED = (TRUST, DATA, READ, RUNS, DEVICE)

RECORD = option("record", "its JSON file", Path)
REFERENCE = option("--reference", "folder of the records beside them", folder, Path("results/reference"))
ONLY = option("--preset", "only this preset (default: all)", list)
FORMAT = option("--format", FORMS, ("compact", "long", "tex", "csv"), "compact")
WRITE = option("--write", "a file; of a Markdown file, what is between its results markers", Path)
LENGTHS = option("--lengths", LONGER, numbers(int, 2, several=True), metavar="F[,F...]")
COUNTER = option("--by", "whose counter-record it becomes: results/counter/BY/", default="rerun")
THREADS = option("--threads", TRIED, metavar="N[,N...]")
RAW = option("--data-dir", "folder with raw data, where the record's are local", Path)
FILES = option("files", "JSON files of records, their predictions beside them", Path, nargs="+")
BY = option("--by", "whose runs they are: they are added to results/counter/BY/", required=True)
THESE = option("files", "JSON files of records (default: all of --results)", Path, nargs="*")
LEVEL = option("--level", LEVELS, range(5), 1, type=int)
EVERY = option("--level", f"verify every record up to it: {LEVELS}", range(1, 4), 1, type=int)

COMMANDS = {
    "evaluate": Command("lra.leaderboard.rerun:show", (RECORD, LENGTHS, TRUST, *PLACES)),
    "reproduce": Command("lra.leaderboard.reproduce:reproduce", (RECORD, COUNTER, THREADS, RAW, TRUST, *PLACES)),
    "table": Command("lra.leaderboard.page:show_table", (READ, FORMAT, ONLY, WRITE)),
    "compare": Command("lra.leaderboard.page:compare", (READ, REFERENCE, ONLY)),
    "leaderboard submit": Command(
        "lra.leaderboard.levels:submit", (FILES, BY, TRUST, *PLACES), "verify records from elsewhere at V1 and add them"
    ),
    "leaderboard verify": Command(
        "lra.leaderboard.levels:verify_all", (THESE, LEVEL, *CHECKED), "check records, and write nothing"
    ),
    "leaderboard build": Command("lra.leaderboard.page:build", (EVERY, *CHECKED), "make the page RESULTS/index.html"),
    "leaderboard serve": Command(
        "lra.leaderboard.page:serve", (READ, PORT), "show results to a browser of this machine"
    ),
}
