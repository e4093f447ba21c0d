"""ListOps expressions: their vocabulary, their value, and the files they are published in.

    basic_train.tsv, basic_val.tsv, basic_test.tsv: a header `Source<tab>Target`, then expression and value

An expression is written as left-nested pairs, `( ( ( [MAX 3 ) 5 ) ] )`; its symbols without the parentheses are
what a model reads.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tasks.base import SPLITS, Data, SourceError, Split
from tasks.store.files import ENDINGS, atomic_path, label_of, lines
from tasks.store.rng import kernel
from tasks.store.sources import ROOTS, listed, taken

# The vocabulary: a symbol's id is its position. `]` is written X; parentheses are dropped, brackets kept.
SYMBOLS = ("<pad>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "X")
ZERO, MIN, CLOSE = SYMBOLS.index("0"), SYMBOLS.index("[MIN"), SYMBOLS.index("X")
_ID = {symbol: i for i, symbol in enumerate(SYMBOLS[:CLOSE]) if i} | {"]": CLOSE}  # as files spell them
_HEADER = "Source\tTarget"
NAMES = {split: f"basic_{split}.tsv" for split in SPLITS}
FOLDERS = [root + folder for root in ROOTS for folder in ("", "listops-1000/")]  # of --data-dir and of the LRA release


@kernel
def evaluate(tokens):
    """Value of an expression (its ids), or -1 if the ids are not exactly one well-formed expression."""
    operators, first, values = np.empty((3, len(tokens)), np.int64)
    top = depth = 0
    for i in range(len(tokens)):
        token = np.int64(tokens[i])
        if token < ZERO or token > CLOSE or (i > 0 and depth == 0):
            return -1
        if token < MIN:
            values[top] = token - ZERO
            top += 1
        elif token < CLOSE:
            operators[depth], first[depth] = token - MIN, top
            depth += 1
        else:
            depth -= 1
            if depth < 0 or first[depth] == top:
                return -1
            args = np.sort(values[first[depth] : top])
            median = (args[(len(args) - 1) // 2] + args[len(args) // 2]) // 2  # truncated, as published
            values[first[depth]] = (args[0], args[-1], median, args.sum() % 10)[operators[depth]]
            top = first[depth] + 1
    return values[0] if top == 1 and depth == 0 else -1


def to_text(tokens: np.ndarray) -> str:
    """The published notation of a well-formed expression: left-nested pairs, `( ( ( [MAX 3 ) 5 ) ] )`."""
    parts, arity = [], [0]
    for token in reversed(tokens.tolist()):  # from the right: an operator's arity is known on reaching it
        if token == CLOSE:
            parts.append("] ) )")
            arity.append(0)
        else:
            parts.append(f"{SYMBOLS[token]} )" if token < MIN else "( " * (arity.pop() + 1) + SYMBOLS[token])
            arity[-1] += 1
    return " ".join(reversed(parts)).removesuffix(" )")  # the root is nobody's child


def read_tsv(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Read a file of the published format, plain, .gz or .xz: a list of uint16 id arrays and the uint8 labels.

    Every row is parsed and evaluated; SourceError names the file and line of the first that does not hold.
    """
    rows = ((number, line.decode(errors="replace")) for number, line in lines(path))
    header = next(rows, (1, ""))[1]
    if header != _HEADER:
        raise SourceError(f"{path}, line 1: {header[:40]!r} is not {_HEADER!r}; fetch the file again")
    sequences, labels = [], []
    for number, row in rows:
        source, _, target = row.partition("\t")
        symbols = source.replace("( ", "").replace(" )", "").split(" ")
        tokens = np.array([_ID.get(symbol, 0) for symbol in symbols], np.uint16)
        value = evaluate(tokens)
        if value < 0 or to_text(tokens) != source:  # parentheses and spaces, too
            raise SourceError(f"{path}, line {number}: malformed expression; fetch the file again")
        if label_of(target, 10, f"{path}, line {number}") != value:
            raise SourceError(f"{path}, line {number}: label {target} but value {value}; fetch the file again")
        sequences.append(tokens)
        labels.append(value)
    return sequences, np.array(labels, np.uint8)


def write_tsv(path: Path, tokens: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """Write expressions in the published format. SourceError for one that is cut short or not of its label."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="ascii", newline="\n") as file:
        file.write(f"{_HEADER}\n")
        for number, (ids, label) in enumerate(zip(tokens, labels, strict=True), 2):
            if evaluate(ids) != label:
                raise SourceError(f"{path}, line {number}: not a whole expression of value {label}: export uncut data")
            file.write(f"{to_text(ids)}\t{label}\n")


def find(data_dir: Path | None) -> dict[str, Path]:
    """The files of the splits in data_dir (default: here), of the first folder that has any; {} if none has."""
    for folder in FOLDERS:
        files = {s: [p for e in ENDINGS for p in listed(data_dir or ".", folder + n + e)] for s, n in NAMES.items()}
        if any(files.values()):
            return {split: paths[0] for split, paths in files.items() if paths}
    return {}


def read_splits(data: Data, paths: dict[str, Path], data_dir: Path | None) -> dict[str, Split]:
    """As many examples of each file as `data` asks for, from its top, cut on the right to seq_len."""
    if missing := ", ".join(name for split, name in NAMES.items() if split not in paths):
        way_out = "add what is missing, or use --source generated"
        raise SourceError(f"{data_dir or Path.cwd()}: missing {missing}; {way_out}")
    splits = {}
    for name, path in paths.items():
        tokens, labels = read_tsv(path)
        size = taken(data, name, len(labels), path)
        splits[name] = Split.of([ids[: data.seq_len] for ids in tokens[:size]], labels[:size])
    return splits
