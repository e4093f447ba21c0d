"""The plan of the house as rules over the source. A rule lists its offenders; each has an impostor that it catches."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import lra.gemma.table

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for package in ("lra", "models", "tasks")
    for path in sorted((ROOT / package).rglob("*.py"))
}
BASE = {"lra.options", "lra.machine", "lra.registry", "tasks", "models"}
RUNS = BASE | {"lra.records", "lra.training"}
STUDY = RUNS | {"lra.figures", "lra.leaderboard", "lra.scaling"}
MAY_IMPORT = {  # of this project; a room always imports itself
    "tasks": set(),
    "models": set(),
    "lra.options": set(),
    "lra.machine": {"lra.options"},
    "lra.registry": {"lra.options", "tasks", "models"},
    "lra.cli": {"lra.options", "tasks"},
    "lra.__main__": {"lra.cli"},
    "lra.records": {"lra.options", "lra.registry", "tasks"},
    "lra.training": BASE | {"lra.records"},
    "lra.figures": RUNS,
    "lra.leaderboard": RUNS | {"lra.figures"},
    "lra.scaling": RUNS,
    "lra.bench": STUDY,
    "lra.variance": STUDY,
    "lra.gemma": STUDY,
}
TORCH_FREE = re.compile(
    r"lra/(cli|options|registry|records/\w+|\w+/options|leaderboard/(co\w+|levels)|figures/style"
    r"|gemma/table|variance/report)\.py"
)
TOP_LEVEL = {
    *("lra", "models", "tasks", "results", "tests", "docs", "run_all.sh", "run_tests.sh", "requirements.txt"),
    *("requirements-dev.txt", "README.md", "CONTRIBUTING.md", "LOG.md", "LICENSE", "pyproject.toml"),
    *("data", "runs"),  # made by running the suite, ignored by git
}
UNSAFE = {"eval", "exec", "os.system", "pickle.load", "pickle.loads", "torch.load"}
UNSAFE_MODULES = {"dill", "cloudpickle", "joblib", "shelve", "marshal"}
SLOW = {"PIL", "matplotlib", "jinja2", "pyarrow", "sklearn", "datasets", "huggingface_hub", "transformers"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def tree(text):
    """The syntax tree of a source."""
    return ast.parse(text)


def module(name):
    """lra/training/train.py -> lra.training.train"""
    return name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imported(text, top_level=False):
    """Absolute names of the imported modules, in functions too; `from a import b` gives a and a.b."""
    names = set()
    for node in tree(text).body if top_level else ast.walk(tree(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {"." if node.level else node.module}
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def tops(names):
    """The first parts of dotted names."""
    return {name.partition(".")[0] for name in names}


def graph(sources):
    """{module: the modules of this project that it imports}, packages of several rooms left out."""
    files = {module(name): text for name, text in sources.items()}
    known = set(files) - {"lra", "models", "tasks"}
    return {name: (imported(text) & known) - {name} for name, text in files.items() if name in known}


def rooms(sources):
    """The same between rooms: each package folder and each module beside them is one."""
    arrows = {}
    for name, targets in graph(sources).items():
        room = ".".join(name.split(".")[:2])
        arrows.setdefault(room, set()).update(".".join(t.split(".")[:2]) for t in targets)
    return {room: targets - {room} for room, targets in arrows.items()}


def floors(arrows):
    """What has no arrow out of it, then what has none but to those, ...; and what lies on a circle."""
    waiting, levels = {name: set(targets) for name, targets in arrows.items()}, []
    while free := [name for name, targets in waiting.items() if not targets]:
        levels.append(free)
        waiting = {name: targets - set(free) for name, targets in waiting.items() if name not in free}
    while above := set(waiting) - {target for targets in waiting.values() for target in targets}:
        waiting = {name: targets for name, targets in waiting.items() if name not in above}
    return levels, sorted(waiting)


# Who imports whom

GEMMA = ("models.gemma", "lra.gemma", "lra.bench.decode")


def imports_go_one_way(sources):
    """A room imports those of MAY_IMPORT; models.gemma is for lra.gemma and bench decode alone."""
    for name, text in sources.items():
        here = module(name)
        rule = next((r for r in MAY_IMPORT if here == r or here.startswith(r + ".")), None)
        for target in sorted(imported(text)):
            if target == ".":
                yield f"{name}: relative import"
            if not rule or target.partition(".")[0] not in ("lra", "models", "tasks", "tests"):
                continue
            if target in ("lra", "lra.__version__"):  # its parts, and the version
                continue
            allowed = MAY_IMPORT[rule] | {rule}
            fits = any(target == a or target.startswith(a + ".") for a in allowed)
            gemma = target.startswith("models.gemma") and not here.startswith(GEMMA)
            if not fits or gemma:
                yield f"{name}: {target}"


def files_have_no_circle(sources):
    """No file imports itself through others."""
    return floors(graph(sources))[1]


def rooms_have_no_circle(sources):
    """No room imports itself through others."""
    return floors(rooms(sources))[1]


def rooms_stand_on_eight_floors(sources):
    """The longest chain of rooms that import one another has 8."""
    return [", ".join(level) for level in floors(rooms(sources))[0][8:]]


def private_names_stay_at_home(sources):
    """No module or name with an underscore is imported from another package."""
    for name, text in sources.items():
        here = name.rpartition("/")[0].replace("/", ".")
        for target in imported(text):
            package, _, private = target.partition("._")
            if private and not private.startswith("_") and tops([target]) & {"lra", "models", "tasks"}:
                if package != here and package.rpartition(".")[0] != here:
                    yield f"{name}: {target}"


def torch_is_not_named_where_records_are_read(sources):
    """Records, options and the command line answer without torch."""
    return [n for n, text in sources.items() if TORCH_FREE.fullmatch(n) and "torch" in tops(imported(text))]


def slow_packages_are_imported_where_they_are_used(sources):
    """They are optional or take long to load; models/gemma is loaded by the gemma command alone."""
    others = {n: text for n, text in sources.items() if not n.startswith("models/gemma/")}
    return [n for n, text in others.items() if tops(imported(text, top_level=True)) & SLOW]


# Budgets


def rooms_are_small(sources):
    """14 files in a room, 10 in lra/ itself; __init__ not counted. models/attention has a file for each method."""
    folders = [name.rpartition("/")[0] for name in sources if not name.endswith("__init__.py")]
    for folder in sorted(set(folders) - {"models/attention"}):
        if folders.count(folder) > (10 if folder == "lra" else 14):
            yield f"{folder} has {folders.count(folder)} files"


def files_are_short(sources):
    """300 lines, 250 in tasks, 200 in models/attention."""
    for name, text in sources.items():
        budget = 200 if name.startswith("models/attention/") else 250 if name.startswith("tasks/") else 300
        if (lines := len(text.splitlines())) > budget:
            yield f"{name} has {lines} lines of {budget}"


def functions_are_short(sources):
    """60 lines, decorators included."""
    for name, text in sources.items():
        for node in ast.walk(tree(text)):
            if isinstance(node, FUNCTIONS):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                if node.end_lineno - first >= 60:
                    yield f"{name}:{first}: {node.name}"


def a_run_is_read_in_sixteen_files(sources):
    """From the command to the record: cli, the handler, and what lra.training.train reaches within lra, are at most
    16 files and 2,400 lines."""
    files = {module(name): text for name, text in sources.items() if not name.endswith("__init__.py")}
    arrows, path = graph(sources), {"lra.cli", "lra.training.commands"}
    waiting = ["lra.training.train"]
    while waiting:
        name = waiting.pop()
        if name in files and name.startswith("lra.") and name not in path:
            path.add(name)
            waiting += arrows[name]
    lines = sum(len(files[name].splitlines()) for name in path)
    return [f"{len(path)} files, {lines} lines: {', '.join(sorted(path))}"] * (len(path) > 16 or lines > 2400)


# Documentation


def public_things_have_docstrings(sources):
    """Modules, and their public functions and classes."""
    for name, text in sources.items():
        if tree(text).body and not ast.get_docstring(tree(text)):
            yield name
        for node in tree(text).body:
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
                if not ast.get_docstring(node):
                    yield f"{name}:{node.lineno}: {node.name}"


def legend():
    """The letters that the legend of shape suffixes explains."""
    file = next(f for f in ("models/attention/base.py", "models/base.py") if f in SOURCES)
    return set(re.findall(r"(?<![\w.])([A-Z]) (?=[a-zA-Z(])", ast.get_docstring(tree(SOURCES[file]))))


def shape_suffixes_are_in_the_legend(sources):
    """q_BHND: each letter is explained; a constant is no tensor. The Gemma modules have letters of their own."""
    for name, text in sources.items():
        if name.startswith(("tasks/", "models/gemma/")):
            continue
        nodes = ast.walk(tree(text))
        names = {n.id if isinstance(n, ast.Name) else n.arg for n in nodes if isinstance(n, ast.Name | ast.arg)}
        for suffixed in sorted(n for n in names if n != n.upper()):
            suffix = re.fullmatch(r"[a-zA-Z]\w*_([A-Z1]+)", suffixed)
            if suffix and not set(suffix[1]) <= legend() | {"1"}:
                yield f"{name}: {suffixed}"


# Safety


def nothing_is_unpickled_or_executed(sources):
    """Unpicklers that check every name are read CIFAR with; arrays are loaded with allow_pickle=False."""
    for name, text in sources.items():
        names = imported(text)
        if tops(names) & UNSAFE_MODULES:
            yield name
        if "pickle" in names:
            classes = [n for n in tree(text).body if isinstance(n, ast.ClassDef)]
            readers = [c for c in classes if "pickle.Unpickler" in map(ast.unparse, c.bases)]
            checked = all("find_class" in [getattr(n, "name", "") for n in r.body] for r in readers)
            if not readers or not checked or "super().find_class" in text:
                yield f"{name}: pickle"
        for node in (n for n in ast.walk(tree(text)) if isinstance(n, ast.Call)):
            called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            pickled = given.get("allow_pickle", "" if called == "np.load" else "False") != "False"
            if called in UNSAFE or pickled or given.get("shell", "False") != "False":
                yield f"{name}:{node.lineno}: {called}"


def no_file_names_a_path_of_one_machine(sources):
    """Neither sources nor tests, scripts and pages."""
    roots = re.compile(r"(?<![\w.])/(work|root|home|Users)/")
    for name, text in sources.items():
        for number, line in enumerate(text.splitlines(), 1):
            if roots.search(line) and name != "tests/test_layout.py":
                yield f"{name}:{number}"


def text_files_are_utf_8(sources):
    """Whatever the locale: a call that opens a file as text names its encoding."""
    for name, text in sources.items():
        for node in (n for n in ast.walk(tree(text)) if isinstance(n, ast.Call)):
            opens = re.fullmatch(r"open|.*\.(read|write)_text", ast.unparse(node.func))
            if opens and not re.search(r"utf-8|encoding|'[rwax+]+b\+?'", ast.unparse(node)):
                yield f"{name}:{node.lineno}: {ast.unparse(node.func)}"


def builders_alone_are_shared_by_tests(sources):
    """No file of tests is imported by another."""
    for name, text in sources.items():
        if name.startswith("tests/") and any(re.search(r"^tests\..*\btest_", target) for target in imported(text)):
            yield name


def nothing_is_decomposed_by_lu(sources):
    """MKL 2024.2 can hang in it with two threads: inverses and determinants of symmetric matrices go through eigh."""
    decomposed = re.compile(r"(linalg\.|torch\.|\.)(inv|pinv|solve|det|slogdet|logdet|inverse|lu\w*)\(")
    for name, text in sources.items():
        for number, line in enumerate(text.splitlines(), 1):
            if "torch" in tops(imported(text)) and decomposed.search(line):
                yield f"{name}:{number}"


LONG = "x = 1\n" * 301
FUNCTION = '"""Doc."""\ndef f():\n    """Doc."""\n' + "    x = 1\n" * 60
LAZY = "def f():\n    import "
CHAIN = {f"lra/new{k}.py": f"import lra.new{k + 1}" for k in range(9)}
IMPOSTORS = {  # rule: files that break it
    imports_go_one_way: {"lra/records/new.py": LAZY + "lra.training.train"},
    files_have_no_circle: {"lra/training/a.py": "import lra.training.b", "lra/training/b.py": LAZY + "lra.training.a"},
    rooms_have_no_circle: {"lra/a/a.py": "import lra.b.b", "lra/a/c.py": "", "lra/b/b.py": LAZY + "lra.a.c"},
    rooms_stand_on_eight_floors: CHAIN | {"lra/new9.py": ""},
    private_names_stay_at_home: {"lra/gemma/new.py": "from lra.records.record import _pack"},
    torch_is_not_named_where_records_are_read: {"lra/records/new.py": LAZY + "torch.nn"},
    slow_packages_are_imported_where_they_are_used: {"tasks/new.py": "from PIL import Image"},
    rooms_are_small: {f"lra/training/new{k}.py": "" for k in range(15)},
    files_are_short: {"lra/new.py": LONG},
    functions_are_short: {"lra/new.py": FUNCTION},
    a_run_is_read_in_sixteen_files: {"lra/training/train.py": "import lra.training.b", "lra/training/b.py": 8 * LONG},
    public_things_have_docstrings: {"lra/new.py": '"""Doc."""\ndef f():\n    pass'},
    shape_suffixes_are_in_the_legend: {"lra/new.py": "q_BZ = 1"},
    nothing_is_unpickled_or_executed: {"lra/new.py": "import numpy as np\nnp.load(file)"},
    builders_alone_are_shared_by_tests: {"tests/lra/test_new.py": "from tests.lra.test_cli import words"},
    nothing_is_decomposed_by_lu: {"models/new.py": "import torch\nx = torch.linalg.inv(S)"},
    text_files_are_utf_8: {"lra/new.py": "path.write_text(text)"},
    no_file_names_a_path_of_one_machine: {"tests/new.py": "open('/home/me/x')"},
}
IMPOSTORS[a_run_is_read_in_sixteen_files] |= {f"lra/{m}.py": "" for m in ("cli", "training/commands")}


@pytest.mark.parametrize("rule", IMPOSTORS, ids=lambda rule: rule.__name__)
def test_source_keeps_the_rule(rule):
    sources = SOURCES
    if rule in (no_file_names_a_path_of_one_machine, builders_alone_are_shared_by_tests):
        pages = [p for p in ROOT.iterdir() if p.suffix in (".sh", ".toml", ".txt", ".md")]
        pages += [*(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".ci").iterdir()]
        sources = SOURCES | {p.relative_to(ROOT).as_posix(): p.read_text() for p in pages}
    offenders = list(rule(sources))
    assert not offenders, "\n".join([rule.__doc__, *offenders])


@pytest.mark.parametrize("rule", IMPOSTORS, ids=lambda rule: rule.__name__)
def test_the_rule_catches_an_impostor(rule):
    assert list(rule(IMPOSTORS[rule])), rule.__doc__


# What no rule over single files can tell


def test_what_reads_records_does_not_load_torch_through_anything_it_imports():
    names = ", ".join(module(name) for name in SOURCES if TORCH_FREE.fullmatch(name))
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=300).returncode == 0


def test_legend_of_shape_suffixes_names_the_usual_dimensions():
    assert {"B", "H", "N", "D", "E", "M", "C", "T"} <= legend()


def test_run_all_fits_on_a_screen():
    assert len((ROOT / "run_all.sh").read_text().splitlines()) <= 60


def test_top_level_holds_what_the_plan_names_and_results_hold_no_code():
    assert {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} <= TOP_LEVEL
    allowed = {".json", ".gz", ".md", ".csv", ".tex", ".html", ".svg", ".png", ""}
    files = [path for path in (ROOT / "results" / "reference").rglob("*") if path.is_file()]
    assert [p.name for p in files if p.suffix not in allowed or p.stat().st_mode & 0o111] == []


def test_committed_gemma_tables_are_what_the_records_say():
    for kind, made in lra.gemma.table.render(ROOT / "results" / "reference").items():
        assert (ROOT / "results" / "reference" / "gemma" / f"{kind}.md").read_text() == made, (
            "run: python -m lra gemma table --results results/reference"
        )
