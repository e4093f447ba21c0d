"""`list`, from its options to its output."""

from __future__ import annotations

import json
import re
from argparse import Namespace

from lra.options import PRESETS, UsageError
from lra.registry import TRAITS, attention_class, attention_module, attention_names, load_task, task_names


def show(args: Namespace) -> None:
    """`list`: each name with a line about it; a plug-in that cannot be imported has its error there."""
    kinds = {
        "attentions": (attention_names, attention_line),
        "tasks": (task_names, lambda name: load_task(name).META.description),
        "presets": (lambda: list(PRESETS), PRESETS.get),
    }
    chosen = [args.what] if args.what else list(kinds)
    if args.json:
        names = {kind: kinds[kind][0]() for kind in chosen}
        print(json.dumps(names[args.what] if args.what else names))
        return
    for kind in chosen:
        names, line = kinds[kind]
        if not args.what:
            print(f"{kind}:")
        for name in names():
            try:
                about = line(name)
            except UsageError as error:
                about = f"broken: {error}"
            print(f"{'' if args.what else '  '}{name:<12} {about}".rstrip())


def attention_line(name: str) -> str:
    """An attention in the first line of its docstring, its paper, and the traits it claims."""
    cls, text = attention_class(name), attention_module(name).__doc__ or ""
    paper = re.search(r"arXiv \d{4}\.\d{4,5}", f"{cls.__doc__} {text}")
    traits = [trait for trait in TRAITS if trait != "reads_qk" and getattr(cls, trait)]
    about = [*text.strip().splitlines(), ""][0].rstrip(".")
    return f"{about} [{'; '.join([*([paper[0]] if paper else []), ', '.join(traits)])}]"
