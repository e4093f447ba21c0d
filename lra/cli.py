"""The command line: python -m lra COMMAND --help. Each room describes its own commands, in its options.py."""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import signal
import sys
import threading
from collections.abc import Iterable

from lra.options import BUSY, STOPPED, Held, UsageError
from tasks.base import SourceError

ROOMS = {  # command: the package whose options.py has its options, and its line in --help
    "list": ("lra", "names of attentions, tasks and presets, with paper and traits"),
    "prepare": ("lra.training", "build a task's data once, as memory-mapped arrays with a manifest"),
    "inspect": ("lra.figures", "look at prepared data: sizes, labels, lengths, floors, examples"),
    "cards": ("lra.figures", "the numbers of tasks/DATA.md, from what `inspect --out` wrote"),
    "train": ("lra.training", "train one task with one attention and one seed, and write its record"),
    "sweep": ("lra.scaling", "train every missing (task, attention, seed) of a grid"),
    "cost": ("lra.scaling", "predict seconds and memory of what `sweep` would run with the same options"),
    "evaluate": ("lra.leaderboard", "repeat the test evaluation of a record from its saved weights"),
    "reproduce": ("lra.leaderboard", "run a record again and compare; adds a counter-record"),
    "leaderboard": ("lra.leaderboard", "take records in, verify them, make the page of all results"),
    "table": ("lra.leaderboard", "make the results tables from the records alone"),
    "compare": ("lra.leaderboard", "set your records beside the reference's, cell by cell"),
    "plot": ("lra.figures", "draw the figures of the records and benchmarks, as SVG and PNG"),
    "tensorboard": ("lra.figures", "average the seeds of each cell, and show all learning curves"),
    "bench": ("lra.bench", "measure this machine, and write results/bench/ACTION.json and ACTION.md"),
    "variance": ("lra.variance", "bias and variance of random features, measured beside closed forms"),
    "gemma": ("lra.gemma", "exchange the attention of a pretrained Gemma, and finetune and measure it"),
    "doctor": ("lra.scaling", "versions, device, compiler, reachable sources and disk space"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. Bad input is one line on stderr and 2; no command, the list of them."""
    words = sys.argv[1:] if arguments is None else arguments
    args, rest = parser(words[:1]).parse_known_args(words)
    command = vars(args).pop("parser")
    if rest:
        command.error(unrecognized(command, words, rest))
    if args.run is None:
        command.print_help(sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        # In a log, too, an error comes after what was printed. Not every terminal can spell a table.
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C; training itself saves first
    module, _, function = args.run.partition(":")
    try:
        return getattr(importlib.import_module(module), function)(args) or 0
    except (UsageError, SourceError, OSError) as error:
        file = getattr(error, "filename", None)
        message = f"{error.strerror or error}: {file}" if file else str(error)
        print(f"error: {message}", file=sys.stderr)
        return BUSY if isinstance(error, Held) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return STOPPED


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default there is."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, []) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Defaults in --help, no abbreviations, and one line for an error."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=Formatter, **options)

    def error(self, message: str):
        """One line on stderr and exit code 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def parser(called: Iterable[str] = ROOMS) -> Parser:
    """The parser of all commands; those of `called` alone have options, and only their rooms are imported."""
    top = Parser(prog="python -m lra", description="A Long Range Arena suite.")
    top.set_defaults(run=None, parser=top)
    commands = top.add_subparsers(metavar="COMMAND")
    for name, (room, line) in ROOMS.items():
        sub = commands.add_parser(name, help=line, description=line)
        if name not in called:
            continue
        described = importlib.import_module(f"{room}.options").COMMANDS
        family = {words: command for words, command in described.items() if words.partition(" ")[0] == name}
        if name not in family:
            sub.set_defaults(run=None, parser=sub)
            actions = sub.add_subparsers(metavar="ACTION")
        for words, command in family.items():
            if words != name:
                action = words.partition(" ")[2]
                sub = actions.add_parser(action, help=command.help, description=command.help)
            sub.set_defaults(run=command.run, parser=sub)
            for option, facts in command.options:
                sub.add_argument(option, **facts)
    return top


def unrecognized(command: Parser, words: list[str], rest: list[str]) -> str:
    """The error for arguments that nobody asked for: a list written with spaces, or an option nearly right."""
    message = f"unrecognized arguments: {' '.join(rest)}"
    before = words[words.index(rest[0]) - 1]
    if before.endswith(",") or rest[0].startswith(","):
        joined = before.rpartition("=")[2] + "".join(word for word in rest if not word.startswith("-"))
        return f"{message}; a list takes no space: {joined}"
    near = difflib.get_close_matches(rest[0].partition("=")[0], command._option_string_actions, 1, 0.7)
    return f"{message}; did you mean {near[0]}?" if near else message
