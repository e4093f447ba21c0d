"""The architecture as rules over the source: imports, safety, budgets, documentation, the top level."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lra.gemma.table
from lra.records.markup import refresh_block

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lra", "models", "tasks")
SOURCES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(), path.name)
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
TORCH_FREE = (
    "records/record", "records/cells", "records/table", "records/stats", "records/published", "options",
    "records/compare", "registry", "records/significance", "records/compact", "records/schema", "records/markup",
    "leaderboard/tables", "leaderboard/identity", "records/measured", "leaderboard/consistency", "leaderboard/levels",
    "leaderboard/submit", "figures/style", "bench/options", "gemma/options", "gemma/stats", "gemma/rows", "gemma/table",
    "gemma/figures", "variance/options", "variance/report",
)  # fmt: skip
TOP_LEVEL = {
    "lra", "models", "tasks", "results", "tests", "docs", "run_all.sh", "run_tests.sh", "requirements.txt",
    "requirements-dev.txt", "README.md", "CONTRIBUTING.md", "LOG.md", "LICENSE", "pyproject.toml",
}  # fmt: skip
MADE_HERE = {"data", "runs"}  # git-ignored: what running the suite leaves behind
UNSAFE = {"eval", "exec", "os.system", "pickle.load", "pickle.loads", "torch.load"}
SLOW = {"PIL", "matplotlib", "jinja2", "pyarrow", "sklearn", "datasets", "huggingface_hub", "transformers"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def of(package):
    """The sources of a package."""
    return [name for name in SOURCES if name.startswith(package + "/")]


def imports(name, tree=None):
    """Absolute names of the modules a file imports anywhere in it; `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(tree or SOURCES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative import on line {node.lineno}"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top(names):
    """The first parts of dotted names."""
    return {n.partition(".")[0] for n in names}


# Who imports whom


@pytest.mark.parametrize("name", of("tasks"))
def test_tasks_never_import_lra_models_or_transformers(name):
    assert not top(imports(name)) & {"lra", "models", "transformers", "tests"}


@pytest.mark.parametrize("name", of("models"))
def test_models_never_import_tasks_or_lra_and_transformers_only_for_gemma(name):
    forbidden = {"tasks", "lra", "tests"} | (set() if name.startswith("models/gemma/") else {"transformers"})
    assert not top(imports(name)) & forbidden


@pytest.mark.parametrize("name", [n for n in SOURCES if not n.startswith("models/gemma/")])
def test_only_the_gemma_command_imports_models_gemma(name):
    reaches = {n for n in imports(name) if n == "models.gemma" or n.startswith("models.gemma.")}
    assert not reaches or re.fullmatch(r"lra/gemma/\w+\.py", name)


@pytest.mark.parametrize("name", of("lra"))
def test_the_suite_does_not_import_its_tests(name):
    assert "tests" not in top(imports(name))


@pytest.mark.parametrize("name", [f"lra/{m}.py" for m in TORCH_FREE])
def test_what_reads_records_does_not_name_torch(name):
    assert "torch" not in top(imports(name))


def test_what_reads_records_does_not_load_torch_through_anything_it_imports():
    modules = ", ".join("lra." + m.replace("/", ".") for m in TORCH_FREE)
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize("name", SOURCES)
def test_dependencies_that_are_slow_or_optional_are_imported_where_they_are_used(name):
    if name.startswith("models/gemma/"):
        pytest.skip("imported by the gemma command alone")
    body = [node for node in SOURCES[name].body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not top(imports(name, ast.Module(body, []))) & SLOW


def test_imports_between_modules_have_no_cycle():
    graph = {}
    for name in SOURCES:
        module = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        body = [node for node in SOURCES[name].body if isinstance(node, ast.Import | ast.ImportFrom)]
        graph[module] = imports(name, ast.Module(body, []))
    waiting = {m: {d for d in found if d in graph and d != m} for m, found in graph.items()}
    while free := [m for m, needs in waiting.items() if not needs]:
        for m in free:
            del waiting[m]
        for needs in waiting.values():
            needs.difference_update(free)
    assert not waiting


# Safety


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_unpickled_or_executed(name):
    assert not top(imports(name)) & {"dill", "cloudpickle", "joblib", "shelve", "marshal"}
    if "pickle" in imports(name):  # only to read CIFAR's batches, every name in them checked
        classes = [n for n in SOURCES[name].body if isinstance(n, ast.ClassDef)]
        readers = [c for c in classes if "pickle.Unpickler" in map(ast.unparse, c.bases)]
        assert readers and all("find_class" in [getattr(n, "name", "") for n in r.body] for r in readers)
        assert "super().find_class" not in (ROOT / name).read_text()
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in UNSAFE, f"{name}:{node.lineno}: {called}"
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert given.get("allow_pickle", "False") == "False", f"{name}:{node.lineno}: allow_pickle"
            assert given.get("shell", "False") == "False", f"{name}:{node.lineno}: shell"
            if called == "np.load":
                assert "allow_pickle" in given, f"{name}:{node.lineno}: say allow_pickle=False"


# Budgets and documentation


@pytest.mark.parametrize("name", SOURCES)
def test_file_is_within_its_budget_of_lines(name):
    budget = 200 if name.startswith("models/attention/") else 250 if name.startswith("tasks/") else 300
    lines = len((ROOT / name).read_text().splitlines())
    assert lines <= budget, f"{name} has {lines} lines of {budget}: the design asks to be cut"


@pytest.mark.parametrize("name", SOURCES)
def test_no_function_is_longer_than_sixty_lines(name):
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, FUNCTIONS):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            assert node.end_lineno - first < 60, f"{name}:{first}: {node.name}"


def test_run_all_fits_on_a_screen():
    script = ROOT / "run_all.sh"
    if not script.exists():
        pytest.skip("run_all.sh is not there yet")
    assert len(script.read_text().splitlines()) <= 60


@pytest.mark.parametrize("name", SOURCES)
def test_module_and_every_public_function_and_class_has_a_docstring(name):
    tree = SOURCES[name]
    if tree.body:
        assert ast.get_docstring(tree), f"{name} has no docstring"
    for node in tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}:{node.lineno}: {node.name} has no docstring"


def legend():
    """The letters that the legend of models/base.py explains."""
    text = ast.get_docstring(SOURCES["models/base.py"])
    return set(re.findall(r"(?<![\w.])([A-Z]) (?=[a-zA-Z(])", text))


def test_legend_of_shape_suffixes_names_the_usual_dimensions():
    assert {"B", "H", "N", "D", "E", "M", "C", "T"} <= legend()


@pytest.mark.parametrize("name", [n for n in of("models") + of("lra") if not n.startswith("models/gemma/")])
def test_every_shape_suffix_is_in_the_legend(name):
    names = {n.id for n in ast.walk(SOURCES[name]) if isinstance(n, ast.Name)}
    names |= {n.arg for n in ast.walk(SOURCES[name]) if isinstance(n, ast.arg)}
    for suffixed in names:
        if found := re.fullmatch(r"[a-zA-Z]\w*_([A-Z1][A-Z1]*)", suffixed):
            if suffixed != suffixed.upper():  # a constant is no tensor
                assert set(found[1]) <= legend() | {"1"}, f"{name}: {suffixed}"


# What is where


def test_top_level_holds_what_the_architecture_names_and_nothing_else():
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert found <= TOP_LEVEL | MADE_HERE
    assert {"lra", "models", "tasks", "results", "tests"} <= found


def test_results_holds_no_code():
    allowed = {".json", ".gz", ".md", ".csv", ".tex", ".html", ".svg", ".png", ".gitkeep", ""}
    for path in (ROOT / "results" / "reference").rglob("*"):
        if path.is_file():
            assert path.suffix in allowed and not path.stat().st_mode & 0o111, path.relative_to(ROOT)


def test_no_file_names_a_path_of_one_machine():
    roots = re.compile(r"(?<![\w.])/(work|root|home|Users)/")
    texts = [ROOT / name for name in SOURCES] + sorted((ROOT / "tests").rglob("*.py"))
    texts += [p for p in ROOT.iterdir() if p.suffix in (".sh", ".toml", ".txt", ".md")]
    texts += [p for folder in ("docs", ".ci") for p in (ROOT / folder).rglob("*") if p.is_file()]
    for path in texts:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            allowed = path == Path(__file__).resolve() or not roots.search(line)
            assert allowed, f"{path.relative_to(ROOT)}:{number}"


def readme():
    """The README's text; skips where there is none yet."""
    path = ROOT / "README.md"
    if not path.exists():
        pytest.skip("README.md is not there yet")
    return path.read_text()


def test_readme_map_names_every_module_and_no_other():
    text = readme()
    assert "## Where things are" in text
    block = text.split("## Where things are", 1)[1].split("```")[1]
    lines = [line for line in block.splitlines()[1:] if line.strip()]
    assert all(re.match(r"\S+ {2,}\S", line) for line in lines), "each line: path  description"
    named = [line.split()[0] for line in lines]
    assert len(named) == len(set(named))
    for path in named:
        assert (ROOT / path).exists(), f"{path} does not exist"
    present = {name for name in SOURCES if SOURCES[name].body and not name.endswith("__init__.py")}
    assert present <= set(named), f"not named: {sorted(present - set(named))}"


def test_readme_gemma_results_are_what_the_records_say():
    text, made = readme(), lra.gemma.table.summary(ROOT / "results" / "reference")
    assert refresh_block(text, "gemma", made) == text, (
        "run: python -m lra gemma table --results results/reference --write README.md"
    )
    for kind, made in lra.gemma.table.render(ROOT / "results" / "reference").items():
        assert (ROOT / "results" / "reference" / "gemma" / f"{kind}.md").read_text() == made, (
            "run: python -m lra gemma table --results results/reference"
        )
