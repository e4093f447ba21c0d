"""Pairs of Python source files from installed packages: does the first import the second?

The embedded stand-in for citation pairs of papers: real, long documents that every installation has.

Why one document does not tell the label:
- A square is two positive pairs (a, b), (c, d) of one split and their negatives (a, d), (c, b), which are unrelated.
- Only whole squares are used, so every file stands in as many positive as negative pairs, in each position.
- No file is in two splits.

Why nothing is left to look up:
- A file's text is the same in all its pairs. Its import statements are deleted.
- Every identifier that names a module or folder of any of the packages is deleted: whole words, in code, strings,
  comments and docstrings alike. Documents that mention a partner look like those that do not.

Negatives are any two files of a split, as LRA's are any two papers: mostly of different packages. Drawn within a
package they leave a small model nothing to learn from in the first 256 bytes (51-53% instead of 63%, both by a bag of
bytes under the Match head; TF-IDF 59% instead of 66%).
"""

import ast
import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.base import SPLITS, SourceError
from tasks.store.sources import distribution, listed

PACKAGES = {  # distribution -> (folder it installs, version the benchmark's numbers are made with)
    "torch": ("torch", "2.13.0"),
    "sympy": ("sympy", "1.14.0"),
    "pandas": ("pandas", "3.1.1"),
    "scipy": ("scipy", "1.17.1"),
    "numba": ("numba", "0.68.1"),
    "scikit-learn": ("sklearn", "1.9.1"),
}
SKIPPED_FOLDERS = {"tests", "test", "testing", "_testing", "__pycache__"}
# Package files are mostly imports; the others are written by the build and differ between platforms.
_SKIPPED = re.compile(r"__(init|main|config)__|_distributor_init|_?version|conftest")
MIN_BYTES = 512  # of cleaned text; shorter files hold nothing but imports
MAX_CHARS = 65_536  # of a file, before cleaning: more than any preset reads
PREFIX = 256  # bytes: of files that begin alike only the first is kept, so that splits stay disjoint when cut
MAX_PAIRS = 10  # positive pairs of one file in one position: a package's hubs are not its theme
SHARES = (0.6, 0.15)  # of the files, for train and val; the rest is test

_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_HEADER = re.compile(r"\A(?:[ \t]*(?:#.*)?\n)+")
_IMPORT_LINE = re.compile(r"^[^\w\n]*(?:from[ \t]+[.\w]+[ \t]+import\b|import[ \t]+\w).*$", re.MULTILINE)

Statement = ast.Import | ast.ImportFrom
Edge = tuple[str, str]  # dotted module names: importing, imported
Square = list[tuple[str, str, int]]  # four pairs with their labels


@dataclass(frozen=True)
class Corpus:
    """The cleaned texts, who imports whom among them, and what they were read from."""

    texts: dict[str, bytes]  # module -> text
    imports: dict[str, frozenset[str]]  # module -> modules of the corpus that it imports
    versions: dict[str, str]  # distribution -> installed version
    files: dict[str, str]  # "distribution==version" -> sha256 over the files read


def read(distributions: Sequence[str]) -> Corpus:
    """Read and clean the files of some of PACKAGES. SourceError for a package that is absent or broken."""
    from tqdm import tqdm

    versions, files, sources = {}, {}, {}
    for name in distributions:
        if name not in PACKAGES:
            raise SourceError(f"packages: {name!r} is not one of {', '.join(PACKAGES)}")
        folder, pinned = PACKAGES[name]
        installed, package = distribution(name, pinned), {}  # texts by dotted name
        versions[name] = installed.version.partition("+")[0]  # without "+cpu" and the like
        root = Path(str(installed.locate_file(folder)))
        if not root.is_dir():
            raise SourceError(f"{root}: missing from package {name}; run: pip install --force-reinstall {name}")
        for path in listed(root, "**/*.py"):
            if _SKIPPED.fullmatch(path.stem) or SKIPPED_FOLDERS & set(path.relative_to(root).parts):
                continue
            module = ".".join(path.relative_to(root.parent).with_suffix("").parts)
            try:  # newlines are translated, because wheels for Windows end lines with CR LF
                package[module] = path.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise SourceError(f"{path}: cannot be read ({error}); reinstall its package") from error
        digests = {module: hashlib.sha256(text.encode()).hexdigest() for module, text in package.items()}
        listing = "".join(f"{module} {digest}\n" for module, digest in sorted(digests.items()))
        files[f"{name}=={versions[name]}"] = hashlib.sha256(listing.encode()).hexdigest()
        sources |= package
    names = {part for module in sources for part in module.split(".")}
    texts, imports, beginnings = {}, {}, set()
    for module in tqdm(sorted(sources), "Python files", delay=2, disable=None, leave=False):
        statements = _imports(sources[module], module)
        text = _clean(sources[module], statements, names)
        if len(text) >= MIN_BYTES and text[:PREFIX] not in beginnings:
            beginnings.add(text[:PREFIX])
            texts[module] = text
            imports[module] = _targets(statements, module, sources)
    imports = {module: targets & texts.keys() - {module} for module, targets in imports.items()}
    return Corpus(texts, imports, versions, files)


def squares(corpus: Corpus, seed: int) -> dict[str, list[Square]]:
    """Squares of each split, in an order given by the seed: any prefix is balanced.

    Positive pairs are joined into squares, each with the last one before it that fits.
    """
    used: set[Edge] = set()  # the negative pairs of all squares

    def unrelated(x: str, y: str) -> bool:
        known = {(x, y), (y, x)} & used
        return x != y and not known and y not in corpus.imports[x] and x not in corpus.imports[y]

    edges = [(a, b) for a, targets in corpus.imports.items() for b in targets if a not in corpus.imports[b]]
    side = {module: _split(module, seed) for module in corpus.imports}
    result: dict[str, list[Square]] = {split: [] for split in SPLITS}
    firsts, seconds, waiting = Counter(), Counter(), {split: [] for split in SPLITS}
    for a, b in sorted(edges, key=lambda edge: _place(seed, *edge)):
        if side[a] == side[b] and firsts[a] < MAX_PAIRS and seconds[b] < MAX_PAIRS:
            firsts[a] += 1
            seconds[b] += 1
            waiting[side[a]].append((a, b))
    for split, pairs in waiting.items():
        while pairs:
            a, b = pairs.pop()
            for i in reversed(range(len(pairs))):
                c, d = pairs[i]
                if unrelated(a, d) and unrelated(c, b) and (a, d) != (b, c):
                    del pairs[i]
                    used |= {(a, d), (c, b)}
                    result[split].append([(a, b, 1), (a, d, 0), (c, d, 1), (c, b, 0)])
                    break
    return result


def _place(seed: int, *names: str) -> bytes:
    """A position in a random order that depends on nothing but the seed and the names."""
    return hashlib.sha256(" ".join((str(seed), *names)).encode()).digest()


def _split(module: str, seed: int) -> str:
    """The split of a file, by SHARES: given by the seed and its name alone."""
    u = int.from_bytes(_place(seed, module)[:8], "big") / 2**64
    return SPLITS[(u >= SHARES[0]) + (u >= sum(SHARES))]


def _imports(source: str, module: str) -> list[Statement]:
    """All import statements, nested ones too. Expressions hold none and are not visited."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            stack: list[ast.AST] = [ast.parse(source)]
        except (SyntaxError, ValueError) as error:
            raise SourceError(f"{module} is not valid Python ({error}); reinstall its package") from error
    statements = []
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            statements.append(node)
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            stack.extend(getattr(node, block, ()))
    return statements


def _targets(statements: list[Statement], module: str, known: dict[str, str]) -> frozenset[str]:
    """Known modules that the statements of `module` import by their own name."""
    targets = set()
    for node in statements:
        if isinstance(node, ast.Import):
            targets.update(alias.name for alias in node.names)
            continue
        package = module.split(".")[: -node.level] if node.level else []
        base = ".".join([*package, *filter(None, [node.module])])
        for alias in node.names:
            submodule = f"{base}.{alias.name}"
            targets.add(submodule if submodule in known else base)
    return frozenset(targets & known.keys())


def _clean(source: str, statements: list[Statement], names: set[str]) -> bytes:
    """The text a model sees: see the module docstring; runs of blanks and of empty lines become one."""
    lines = source[:MAX_CHARS].split("\n")
    for node in statements:
        lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    text = _IMPORT_LINE.sub("", _HEADER.sub("", "\n".join(lines)))
    text = _IDENTIFIER.sub(lambda match: "" if match[0] in names else match[0], text)
    text = re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t\f]+", " ", text))
    return text.strip().encode()
