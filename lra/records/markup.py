"""One document, three languages: headings, text, lists and tables as Markdown, LaTeX or HTML. No torch.

Blocks hold plain text. Only here is it escaped, and all of it is, so a name from a record is inert in each of
them. A line break inside a table cell is a newline; elsewhere white space is collapsed.
"""

from __future__ import annotations

import html
import re
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lra.options import UsageError


@dataclass(frozen=True)
class Heading:
    """A title of the third level."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """A table: the first column holds names, the others figures."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


Block = Heading | Text | Bullets | Grid
MISSING = "–"  # in a cell of which nothing is known


class Bold(str):
    """A cell that is set in bold."""


class Italic(str):
    """A cell that is set in italics."""


def flat(text: str) -> str:
    """Text of a record on one line, without characters that show nothing or turn the order of others round."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def refresh_block(text: str, name: str, block: str) -> str:
    """`text` with what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` replaced by `block`.

    Raises UsageError unless each marker stands there once, in that order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UsageError(f"cannot place the block: the text must hold {begin} once and, after it, {end} once")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{block.strip()}\n{end}{rest.partition(end)[2]}"


# Markdown

_MARKDOWN = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {c: "\\" + c for c in "\\|*`~"})


def markdown(blocks: Sequence[Block], width: int = 0) -> str:
    """GitHub's Markdown; paragraphs are broken into lines of at most `width` characters, if given."""
    texts = [_markdown_block(block) for block in blocks]
    if width:
        texts = [
            textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
            if isinstance(block, Text)
            else text
            for block, text in zip(blocks, texts, strict=True)
        ]
    return "\n\n".join(texts) + "\n"


def _markdown(text: str) -> str:
    # Brackets alone are no link: intervals stay readable.
    return re.sub(r"\](?=[\[(:])", r"\\]", text.translate(_MARKDOWN))


def _markdown_block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"### {_markdown(flat(text))}"
        case Text(text):
            return _markdown(flat(text))
        case Bullets(items):
            return "\n".join(f"* {_markdown(flat(item))}" for item in items)
        case Grid(header, rows):
            lines = [[_lines(cell, _markdown, "<br>", "**{}**", "*{}*") for cell in row] for row in (header, *rows)]
            rule = "|:--|" + "--:|" * (len(header) - 1)
            first, *rest = (f"| {' | '.join(line)} |" for line in lines)
            return "\n".join([first, rule, *rest])


def _lines(cell: str, escape: Callable[[str], str], newline: str, bold: str, italic: str) -> str:
    face = bold if isinstance(cell, Bold) else italic if isinstance(cell, Italic) else "{}"
    return newline.join(face.format(escape(flat(line))) for line in cell.split("\n"))


# LaTeX

_LATEX = {c: "\\" + c for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "]": "{]}", '"': "''",
    "±": r"$\pm$", "–": "--", "−": "$-$", "†": r"$\dagger$", "×": r"$\times$", "`": r"\textasciigrave{}",
}  # fmt: skip
LATEX_ROWS = 32  # of a table on one page
_LATEX_BEGIN = r"""\documentclass{article}
\usepackage[a4paper,landscape,margin=15mm]{geometry}
\usepackage{booktabs}
\usepackage{graphicx}
\setlength{\parindent}{0pt}
\newsavebox{\grid}
\newcommand{\fit}{\ifdim\wd\grid>\textwidth\resizebox{\textwidth}{!}{\usebox{\grid}}\else\usebox{\grid}\fi}
\begin{document}"""


def latex(blocks: Sequence[Block]) -> str:
    """A whole document for any LaTeX with booktabs. A character beyond ASCII that is not known here becomes
    its nearest ASCII letters, or ?."""
    return "\n\n".join([_LATEX_BEGIN, *map(_latex_block, blocks), r"\end{document}"]) + "\n"


def _latex(text: str) -> str:
    return "".join(_LATEX.get(c) or (c if c.isascii() and c.isprintable() else _ascii(c)) for c in text)


def _ascii(character: str) -> str:
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return "".join(_LATEX.get(c, c) for c in plain if c.isprintable()) or "?"


def _latex_block(block: Block) -> str:
    match block:
        case Heading(text):
            return rf"\section*{{{_latex(flat(text))}}}"
        case Text(text):
            return _latex(flat(text))
        case Bullets(items):
            lines = [rf"\item {_latex(flat(item))}" for item in items]
            return "\n".join([r"\begin{itemize}", *lines, r"\end{itemize}"])
        case Grid(header, rows):
            parts = [rows[i : i + LATEX_ROWS] for i in range(0, len(rows), LATEX_ROWS)] or [()]
            return "\n\n".join(_latex_grid(header, part) for part in parts)


def _latex_grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells):
        return " & ".join(map(cell, cells)) + r" \\"

    def cell(text):
        stacked = _lines(text, _latex, r"\\", r"\textbf{{{}}}", r"\textit{{{}}}")
        return rf"\shortstack[r]{{{stacked}}}" if "\n" in text else stacked

    columns = "l" + "r" * (len(header) - 1)
    top = [r"\begin{lrbox}{\grid}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(header), r"\midrule"]
    bottom = [r"\bottomrule", r"\end{tabular}", r"\end{lrbox}", r"\fit"]
    return "\n".join([*top, *map(line, rows), *bottom])


# HTML


def html_fragment(blocks: Sequence[Block]) -> str:
    """What goes into the body of a page."""
    return "\n".join(map(_html_block, blocks))


def _html_block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h3>{html.escape(flat(text))}</h3>"
        case Text(text):
            return f"<p>{html.escape(flat(text))}</p>"
        case Bullets(items):
            return "\n".join(["<ul>", *(f"<li>{html.escape(flat(item))}</li>" for item in items), "</ul>"])
        case Grid(header, rows):
            body = [_html_row(row, "td") for row in rows]
            head = _html_row(header, "th")
            return "\n".join(["<div><table>", f"<thead>{head}</thead>", *body, "</table></div>"])


def _html_row(cells: Sequence[str], tag: str) -> str:
    texts = (_lines(cell, html.escape, "<br>", "<strong>{}</strong>", "<em>{}</em>") for cell in cells)
    return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"


def parsed(text: str) -> list[Block]:
    """Markdown that `markdown` wrote, as the blocks that it was made from."""

    def plain(part: str) -> str:
        return html.unescape(re.sub(r"\\([\\|*`~\]])", r"\1", part)).replace("<br>", "\n")

    blocks: list[Block] = []
    for part in text.strip().split("\n\n"):
        lines = part.splitlines()
        if part.startswith("| "):
            header, _, *rows = (tuple(map(plain, line[2:-2].split(" | "))) for line in lines)
            blocks.append(Grid(header, tuple(rows)))
        elif part.startswith("* "):
            blocks.append(Bullets(tuple(plain(line[2:]) for line in lines)))
        elif part.startswith("### "):
            blocks.append(Heading(plain(part[4:])))
        else:
            blocks.append(Text(plain(part)))
    return blocks
