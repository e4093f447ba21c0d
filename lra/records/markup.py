"""One document, three languages: headings, text, lists and tables as Markdown, LaTeX or HTML. No torch.

Blocks hold plain text. Only here is it escaped, and all of it is, so a name from a record is inert in each of
them. A line break inside a table cell is a newline; elsewhere white space is collapsed.
"""

import html
import re
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import make_dataclass
from functools import partial
from typing import NamedTuple

from lra.options import UsageError

Heading = make_dataclass("Heading", [("text", str)], frozen=True)  # of the third level
Text = make_dataclass("Text", [("text", str)], frozen=True)  # a paragraph
Bullets = make_dataclass("Bullets", [("items", tuple[str, ...])], frozen=True)
# The first column holds names, the others figures.
Grid = make_dataclass("Grid", [("header", tuple[str, ...]), ("rows", tuple[tuple[str, ...], ...])], frozen=True)
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
    Raises UsageError unless each marker stands there once, in that order."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UsageError(f"cannot place the block: the text must hold {begin} once and, after it, {end} once")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{block.strip()}\n{end}{rest.partition(end)[2]}"


class Language(NamedTuple):
    """How to escape text, what stands around each part, and how a table is put together from its cells."""

    escape: Callable[[str], str]
    heading: str
    text: str
    item: str
    bullets: str
    bold: str
    italic: str
    newline: str  # within a cell
    grid: Callable[[Callable[[str], str], Sequence[str], Sequence[Sequence[str]]], str]

    def block(self, block: Block) -> str:
        """A block in this language."""
        match block:
            case Heading(text):
                return self.heading.format(self.escape(flat(text)))
            case Text(text):
                return self.text.format(self.escape(flat(text)))
            case Bullets(items):
                return self.bullets.format("\n".join(self.item.format(self.escape(flat(item))) for item in items))
            case Grid(header, rows):
                return self.grid(self.cell, header, rows)

    def cell(self, cell: str) -> str:
        """A cell of a table in this language."""
        face = self.bold if isinstance(cell, Bold) else self.italic if isinstance(cell, Italic) else "{}"
        return self.newline.join(face.format(self.escape(flat(line))) for line in cell.split("\n"))


_MARKDOWN = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {c: "\\" + c for c in "\\|*`~"})


def _markdown(text: str) -> str:
    # Brackets alone are no link: intervals stay readable.
    return re.sub(r"\](?=[\[(:])", r"\\]", text.translate(_MARKDOWN))


def _markdown_grid(cell: Callable[[str], str], header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first, *rest = (f"| {' | '.join(map(cell, row))} |" for row in (header, *rows))
    return "\n".join([first, "|:--|" + "--:|" * (len(header) - 1), *rest])


MARKDOWN = Language(_markdown, "### {}", "{}", "* {}", "{}", "**{}**", "*{}*", "<br>", _markdown_grid)


def markdown(blocks: Sequence[Block], width: int = 0) -> str:
    """GitHub's Markdown; paragraphs are broken into lines of at most `width` characters, if given."""
    texts = list(map(MARKDOWN.block, blocks))
    if width:
        fill = partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False)
        texts = [fill(text) if isinstance(block, Text) else text for block, text in zip(blocks, texts, strict=True)]
    return "\n\n".join(texts) + "\n"


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


def _latex(text: str) -> str:
    def spelled(character):
        known = character in _LATEX
        plain = character if known else unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
        return "".join(_LATEX.get(c, c) for c in plain if c.isprintable()) or "?"

    return "".join(map(spelled, text))


def _latex_grid(cell: Callable[[str], str], header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells):
        return " & ".join(rf"\shortstack[r]{{{cell(c)}}}" if "\n" in c else cell(c) for c in cells) + r" \\"

    columns = "l" + "r" * (len(header) - 1)
    top = [r"\begin{lrbox}{\grid}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(header), r"\midrule"]
    bottom = [r"\bottomrule", r"\end{tabular}", r"\end{lrbox}", r"\fit"]
    parts = [rows[i : i + LATEX_ROWS] for i in range(0, len(rows), LATEX_ROWS)] or [()]
    return "\n\n".join("\n".join([*top, *map(line, part), *bottom]) for part in parts)


_ITEMIZE = "\\begin{{itemize}}\n{}\n\\end{{itemize}}"
_FACES = r"\textbf{{{}}}", r"\textit{{{}}}", r"\\"
LATEX = Language(_latex, r"\section*{{{}}}", "{}", r"\item {}", _ITEMIZE, *_FACES, _latex_grid)


def latex(blocks: Sequence[Block]) -> str:
    """A whole document for any LaTeX with booktabs. A character beyond ASCII that is not known here becomes
    its nearest ASCII letters, or ?."""
    return "\n\n".join([_LATEX_BEGIN, *map(LATEX.block, blocks), r"\end{document}"]) + "\n"


def _html_grid(cell: Callable[[str], str], header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{cell(c)}</{tag}>" for c in cells) + "</tr>"

    body = [line(row, "td") for row in rows]
    return "\n".join(["<div><table>", f"<thead>{line(header, 'th')}</thead>", *body, "</table></div>"])


_TAGS = "<h3>{}</h3>", "<p>{}</p>", "<li>{}</li>", "<ul>\n{}\n</ul>", "<strong>{}</strong>", "<em>{}</em>", "<br>"
HTML = Language(html.escape, *_TAGS, _html_grid)


def html_fragment(blocks: Sequence[Block]) -> str:
    """What goes into the body of a page."""
    return "\n".join(map(HTML.block, blocks))


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
