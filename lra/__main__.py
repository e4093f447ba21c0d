"""The command line: python -m lra COMMAND --help."""

from __future__ import annotations

import argparse
import importlib
import io
import signal
import sys
import threading

from lra.cli import COMMANDS, FAMILIES
from lra.options import BUSY, STOPPED, Held, UsageError
from tasks.base import SourceError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. Bad input is one line on stderr and 2."""
    args = parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            line_buffering=True
        )  # in a log, too, an error comes after what was printed before it
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C; training itself saves first
    module, _, function = args.run.partition(":")
    code = 2
    try:
        return getattr(importlib.import_module(module), function)(args) or 0
    except Held as error:
        message, code = str(error), BUSY
    except (UsageError, SourceError) as error:
        message = str(error)
    except OSError as error:
        message = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return STOPPED
    print(f"error: {message}", file=sys.stderr)
    return code


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


def parser() -> Parser:
    """All commands and their options. A command's code is imported only when it is run."""
    top = Parser(prog="python -m lra", description="A Long Range Arena suite.")
    places = {"": top.add_subparsers(metavar="COMMAND", required=True)}
    for name, function, help, *groups in COMMANDS:
        family, _, word = name.rpartition(" ")
        if family not in places:
            parent = places[""].add_parser(family, help=FAMILIES[family], description=FAMILIES[family])
            places[family] = parent.add_subparsers(metavar="ACTION", required=True)
        sub = places[family].add_parser(word, help=help, description=help)
        sub.set_defaults(run=function)
        for add_options in groups:
            add_options(sub.add_argument)
    return top


if __name__ == "__main__":
    sys.exit(main())
