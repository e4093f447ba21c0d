"""ListOps: the published distribution, the published file format, and what must never vary."""

import gzip
import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lra.__main__ import main
from tasks import listops
from tasks.base import SourceError, Split, majority
from tasks.listops import META, RECIPES, decode, generate
from tasks.listops.expressions import SYMBOLS, read_tsv, write_tsv
from tasks.store.prepare import prepare
from tasks.store.prepared import load
from tasks.store.rng import below, stream, uniform

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "data" / "listops_reference_1000.tsv.gz"
needs_reference = pytest.mark.skipif(not REFERENCE.is_file(), reason=f"needs shared/data/{REFERENCE.name}")
SHORT = dict(max_depth=5, max_args=5, min_length=5, max_length=60)
HEADER = "Source\tTarget\n"
ROW = "( ( ( [MED 3 ) 8 ) ] )\t5\n"


@pytest.fixture(scope="module")
def published():
    return generate(3000, seed=0)


@pytest.fixture(scope="module")
def reference():
    return read_tsv(REFERENCE)


@pytest.fixture(scope="module")
def short():
    return generate(2000, seed=3, **SHORT)


def parse(symbols):
    """Nested lists [operator, child, ...] of a decoded expression; digits are ints."""
    stack = [[]]
    for symbol in symbols.split():
        if symbol == "X":
            done = stack.pop()
            stack[-1].append(done)
        elif symbol.startswith("["):
            stack.append([symbol])
        else:
            stack[-1].append(int(symbol))
    assert len(stack) == 1 and len(stack[0]) == 1, "brackets do not match"
    return stack[0][0]


def value(tree):
    if isinstance(tree, int):
        return tree
    args = [value(child) for child in tree[1:]]
    functions = {"[MIN": min, "[MAX": max, "[MED": lambda a: int(np.median(a)), "[SM": lambda a: sum(a) % 10}
    return functions[tree[0]](args)


def depth(tree):
    return 1 if isinstance(tree, int) else 1 + max(depth(child) for child in tree[1:])


def operators(tree):
    """Every operator of the tree with its arity, the root first."""
    if isinstance(tree, int):
        return []
    return [(tree[0], len(tree) - 1)] + [found for child in tree[1:] for found in operators(child)]


def same_distribution(ours, reference):
    """p-value of a chi-square test of homogeneity on two samples of categories; rare ones are pooled."""
    categories = sorted({*ours, *reference})
    table = np.array([[counts[c] for c in categories] for counts in (Counter(ours), Counter(reference))])
    rare = table.sum(0) < 20
    if rare.any():
        table = np.column_stack([table[:, ~rare], table[:, rare].sum(1)])
    return stats.chi2_contingency(table).pvalue


def shrink(recipe, **changes):
    return replace(recipe, data=replace(recipe.data, **changes))


def build(recipe, source="embedded", data_dir=None, workers=1):
    return listops.build(recipe, source=source, data_dir=data_dir, workers=workers)


@needs_reference
def test_generated_trees_are_distributed_as_the_published_ones(published, reference):
    lengths = [[len(ids) for ids in sequences] for sequences, _ in (published, reference)]
    assert stats.ks_2samp(*lengths).pvalue > 0.01
    assert same_distribution(published[1].tolist(), reference[1].tolist()) > 0.01  # labels
    trees = [[parse(decode(ids)) for ids in sequences[:1000]] for sequences, _ in (published, reference)]
    for feature in (depth, lambda tree: tree[0], lambda tree: len(tree) - 1):  # root operator, root arity
        assert same_distribution(*([feature(tree) for tree in sample] for sample in trees)) > 0.01
    # The operators of one tree are not independent (arity decides whether it is kept): compare proportions.
    for part in (0, 1):
        ours, theirs = (Counter(op[part] for tree in sample for op in operators(tree)) for sample in trees)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key] / ours.total() == pytest.approx(theirs[key] / theirs.total(), abs=0.006)


def draw_whole(state, max_depth, max_args, depth=1):
    """The published recursion, finished whatever its length, as symbols."""
    if depth == max_depth or uniform(state) > 0.25:
        return [str(below(state, 10))]
    n = 2 + below(state, max_args - 1)
    children = [draw_whole(state, max_depth, max_args, depth + 1) for _ in range(n)]
    return ["[MIN [MAX [MED [SM".split()[below(state, 4)], *sum(children, []), "X"]


def test_rejecting_early_keeps_exactly_the_trees_that_rejecting_late_would(short):
    drawn = (draw_whole(stream(3, i), SHORT["max_depth"], SHORT["max_args"]) for i in range(1500))
    kept = dict.fromkeys(" ".join(s) for s in drawn if SHORT["min_length"] < len(s) < SHORT["max_length"])
    assert len(kept) > 100
    assert list(kept) == [decode(ids) for ids in short[0][: len(kept)]]


def test_published_limits_are_strict_and_all_distinct(published):
    lengths = [len(ids) for ids in published[0]]
    assert 500 < min(lengths) and max(lengths) < 2000
    assert np.mean(lengths) == pytest.approx(1037, abs=30)
    trees = [parse(decode(ids)) for ids in published[0][:300]]
    assert max(map(depth, trees)) == 10
    assert {arity for tree in trees for _, arity in operators(tree)} == set(range(2, 11))
    assert len({ids.tobytes() for ids in published[0]}) == 3000


def test_exact_limits_are_reachable_from_inside_only():
    sequences, _ = generate(99, seed=0, max_depth=4, max_args=4, min_length=6, max_length=9)
    assert {len(ids) for ids in sequences} == {7, 8}


def test_labels_agree_with_an_independent_evaluator(published, short):
    for sequences, labels in (published, short):
        for ids, label in zip(sequences[:300], labels):
            assert value(parse(decode(ids))) == label


def test_med_truncates_the_median_of_an_even_count(tmp_path):
    path = tmp_path / "one.tsv"
    path.write_text(HEADER + ROW)  # the median of 3 and 8 is 5.5
    assert read_tsv(path)[1].tolist() == [5]


def test_brackets_are_kept_and_the_vocabulary_is_fixed(short):
    assert SYMBOLS == ("<pad>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "X") and META.vocab == 16
    for ids in short[0][:200]:
        text = decode(ids)
        assert text.split().count("X") == text.count("[") > 0 and "(" not in text
        assert ids.dtype == np.uint16 and ids.min() >= 1 and ids.max() == META.vocab - 1
    assert decode(np.array([12, 4, 15, 0])) == "[MAX 3 X"


def test_the_same_seed_gives_the_same_bytes_everywhere(short):
    digest = hashlib.sha256()
    for ids, label in zip(*generate(200, seed=7)):
        digest.update(ids.astype("<u2").tobytes() + bytes([label]))
    assert digest.hexdigest() == "b1c9087c6d98c449f79ce053257752791782381f6f280ddbd6c7596ece6ac8c0"
    sequences, labels = generate(100, seed=4, **SHORT)
    assert any(a.tobytes() != b.tobytes() for a, b in zip(sequences, short[0]))


def test_neither_workers_nor_count_change_the_examples(short):
    for count, workers in ((2000, 2), (2000, 3), (150, 2), (0, 1)):
        sequences, labels = generate(count, seed=3, workers=workers, **SHORT)
        assert len(sequences) == count and labels.dtype == np.uint8
        assert all(a.tobytes() == b.tobytes() for a, b in zip(sequences, short[0]))
        assert np.array_equal(labels, short[1][:count])


def test_a_space_too_small_for_the_count_is_an_error_not_a_hang():
    # operator, two digits, bracket: 4 * 100 expressions of length 4, and no other
    everything = dict(max_depth=2, max_args=2, min_length=3, max_length=5)
    assert len({ids.tobytes() for ids in generate(400, seed=0, **everything)[0]}) == 400
    with pytest.raises(SourceError, match="found 400 of 401"):
        generate(401, seed=0, **everything)


@pytest.mark.parametrize("wrong", [dict(max_depth=1), dict(max_args=1), dict(min_length=1999), dict(min_length=-1)])
def test_impossible_limits_are_refused_by_value(wrong):
    with pytest.raises(SourceError, match=str(*wrong.values())):
        generate(1, seed=0, **wrong)


@needs_reference
def test_reference_file_round_trips_byte_for_byte(tmp_path, reference):
    sequences, labels = reference
    assert len(sequences) == len(labels) == 1000
    write_tsv(tmp_path / "ours.tsv", sequences, labels)
    with gzip.open(REFERENCE, "rb") as file:
        assert (tmp_path / "ours.tsv").read_bytes() == file.read()


def test_generated_examples_survive_the_published_format(tmp_path, short):
    path = tmp_path / "basic_train.tsv"
    write_tsv(path, *short)
    packed = tmp_path / "basic_train.tsv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for copy in (path, packed):
        sequences, labels = read_tsv(copy)
        assert all(np.array_equal(a, b) for a, b in zip(sequences, short[0], strict=True))
        assert np.array_equal(labels, short[1])


def test_a_sequence_that_was_cut_is_not_written(tmp_path, short):
    cut = [*short[0][:3], short[0][3][:-1]]
    with pytest.raises(SourceError, match="basic_val.tsv, line 5: not a whole expression"):
        write_tsv(tmp_path / "basic_val.tsv", cut, short[1][:4])
    assert not list(tmp_path.iterdir())


@needs_reference
def test_published_files_prepared_and_exported_are_the_same_bytes(tmp_path, monkeypatch):
    with gzip.open(REFERENCE, "rt", newline="\n") as file:
        header, *rows = file
    parts = {"test": rows[:101], "val": rows[101:198], "train": rows[198:]}
    for name, part in parts.items():
        (tmp_path / f"basic_{name}.tsv").write_text(header + "".join(part), newline="\n")
    monkeypatch.setitem(RECIPES, "paper", shrink(RECIPES["paper"], train=0, val=0, test=0))
    words = ["prepare", "listops", "--preset=paper", f"--data-dir={tmp_path}", f"--data={tmp_path / 'out'}"]
    assert main([*words, f"--export={tmp_path / 'again'}"]) == 0
    for name in parts:
        file = f"basic_{name}.tsv"
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_generated_data_exported_and_prepared_again_are_the_same_splits(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "smoke", shrink(RECIPES["smoke"], train=211, val=23, test=31))
    words = ["prepare", "listops", "--preset=smoke"]
    assert main([*words, f"--data={tmp_path / 'one'}", f"--export={tmp_path / 'raw'}"]) == 0
    assert main([*words, f"--data={tmp_path / 'two'}", f"--data-dir={tmp_path / 'raw'}"]) == 0
    one, two = (load(tmp_path / which / "listops" / "smoke") for which in ("one", "two"))
    assert (one.manifest["source"], two.manifest["source"]) == ("generated", "local")
    assert one.manifest["splits"] == two.manifest["splits"]


@pytest.mark.parametrize(
    "rows, complaint",
    [
        (ROW.replace("\t5", "\t6"), "line 2: label 6 but value 5"),
        (ROW + ROW.replace("\t5", ""), "line 3: label is ''"),
        (ROW + ROW.replace("MED", "AVG"), "line 3: malformed"),
        (ROW + ROW.replace("8", "18"), "line 3: malformed"),
        (ROW + ROW.replace("] ", ""), "line 3: malformed"),
        (ROW + ROW.replace("( ( (", "( ("), "line 3: malformed"),
        (ROW + ROW.replace("(", "").replace(")", ""), "line 3: malformed"),
        (ROW + "( ( [MAX ] ) ]\t0\n", "line 3: malformed"),
        (ROW + "( [MAX ] )\t0\n", "line 3: malformed"),
        (ROW + "]\t0\n", "line 3: malformed"),
        (ROW + "3 4\t3\n", "line 3: malformed"),
        (ROW + "\n" + ROW, "line 3: malformed"),
        (ROW + "( [MAX " * 50_000 + "\t0\n", "line 3: malformed"),
    ],
)
def test_a_bad_row_is_an_error_with_its_line_number(tmp_path, rows, complaint):
    path = tmp_path / "basic_val.tsv"
    path.write_text(HEADER + rows)
    with pytest.raises(SourceError, match=f"basic_val.tsv, {complaint}") as caught:
        read_tsv(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_files_that_are_not_listops_are_refused(tmp_path):
    (tmp_path / "headless.tsv").write_text(ROW)
    (tmp_path / "empty.tsv").write_text("")
    (tmp_path / "binary.tsv").write_bytes(HEADER.encode() + b"\xff\xfe")
    (tmp_path / "cut.tsv.gz").write_bytes(gzip.compress((HEADER + ROW * 99).encode())[:-20])
    for name in ("headless.tsv", "empty.tsv", "binary.tsv", "cut.tsv.gz", "absent.tsv"):
        with pytest.raises(SourceError, match=name):
            read_tsv(tmp_path / name)


def test_smoke_splits_are_disjoint_deterministic_and_fit():
    recipe = RECIPES["smoke"]
    built, again = build(recipe), build(recipe, source="generated", workers=2)
    assert (built.source, built.dataset, built.substitute) == ("generated", "ListOps", False)
    seen = set()
    for name, size in (("train", 2000), ("val", 200), ("test", 400)):
        split = built.splits[name]
        assert np.array_equal(split.tokens, again.splits[name].tokens) and len(split.labels) == size
        assert np.diff(split.offsets).max() <= recipe.data.seq_len
        seen |= {split.sequence(i).tobytes() for i in range(size)}
    assert len(seen) == 2600
    bigger = build(shrink(recipe, train=2500))
    assert np.array_equal(bigger.splits["test"].tokens, built.splits["test"].tokens)
    other = build(shrink(recipe, seed=1))
    assert not np.array_equal(other.splits["test"].labels, built.splits["test"].labels)


@pytest.mark.parametrize("factor", [2, 4])
def test_longer_expressions_are_right_and_longer_than_any_in_train(factor):
    data = replace(RECIPES["small"].data, test=53)
    split = listops.longer(data, Split.of([np.ones(3, np.uint16)] * 53, np.zeros(53, np.uint8)), factor)
    lengths = np.diff(split.offsets)
    assert len(split.labels) == 53 and lengths.min() > factor * data.seq_len // 2 >= data.seq_len
    assert 0.8 * factor * data.seq_len < lengths.max() <= factor * data.seq_len
    assert [listops.evaluate(split.sequence(i)) for i in range(53)] == split.labels.tolist()
    assert not np.array_equal(split.tokens, listops.longer(replace(data, seed=1), split, factor).tokens)


def test_published_floors():
    built = build(shrink(RECIPES["paper"], train=6000, val=10, test=4000))
    most_frequent = majority(built.splits["train"].labels, built.splits["test"].labels)
    assert most_frequent == pytest.approx(0.169, abs=0.02)
    assert built.floors["root operator"] == pytest.approx(0.362, abs=0.025)


def test_the_root_floor_reads_the_root_alone(tmp_path):
    maxima = "( ( ( [MAX 9 ) {} ) ] )\t9\n"
    minima = "( ( ( [MIN 0 ) {} ) ] )\t0\n"
    train = "".join(maxima.format(i) for i in range(10)) + "".join(minima.format(i) for i in range(9))
    for name, rows in (("train", train), ("val", ROW), ("test", maxima.format(1) + minima.format(1) * 3)):
        (tmp_path / f"basic_{name}.tsv").write_text(HEADER + rows)
    floors = build(shrink(RECIPES["smoke"], train=0, val=0, test=0), data_dir=tmp_path).floors
    assert floors == {"root operator": 1.0}


def test_local_files_are_read_cut_on_the_right_and_hashed(tmp_path, short):
    for start, name in enumerate(("train", "val", "test")):
        write_tsv(tmp_path / f"basic_{name}.tsv", short[0][start::3], short[1][start::3])
    recipe = shrink(RECIPES["smoke"], seq_len=11, train=0, val=7, test=5)
    built = build(recipe, data_dir=tmp_path)
    assert built.source == "local" and not built.substitute
    assert [len(built.splits[name].labels) for name in ("train", "val", "test")] == [667, 7, 5]
    assert built.splits["val"].sequence(2).tolist() == short[0][1::3][2][:11].tolist()
    raw = (tmp_path / "basic_val.tsv").read_bytes()
    assert len(built.files) == 3 and built.files["basic_val.tsv"] == hashlib.sha256(raw).hexdigest()
    with pytest.raises(SourceError, match="data.val=9000: .*basic_val.tsv has 667 examples; "):
        build(shrink(recipe, val=9000), data_dir=tmp_path)
    (tmp_path / "basic_val.tsv").unlink()
    (tmp_path / "basic_test.tsv").unlink()
    with pytest.raises(SourceError, match="missing .*basic_val.tsv, .*basic_test.tsv; "):
        build(recipe, data_dir=tmp_path)


def test_a_folder_with_other_tasks_data_does_not_stop_generation(tmp_path):
    (tmp_path / "new_aan_pairs.train.tsv").write_text("")
    recipe = shrink(RECIPES["smoke"], train=20, val=5, test=5)
    assert build(recipe, data_dir=tmp_path).source == "generated"
    with pytest.raises(SourceError, match="missing .*basic_train.tsv"):
        build(recipe, source="local", data_dir=tmp_path)


@pytest.mark.parametrize("source", ["hub", "kaggle"])
def test_sources_that_do_not_exist_name_those_that_do(source):
    with pytest.raises(SourceError, match=f"'{source}'.*generated"):
        build(RECIPES["smoke"], source=source)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (dict(options=dict(max_dept=3)), "max_dept"),
        (dict(options=dict(max_depth=2.5)), "2.5"),
        (dict(seq_len=63), "max_length 65: use seq_len . 1 = 64"),
        (dict(test=0), "'test': 0"),
    ],
)
def test_bad_recipes_are_refused_by_value(changes, complaint):
    with pytest.raises(SourceError, match=complaint):
        build(shrink(RECIPES["smoke"], **changes))


def test_recipes_are_the_agreed_sizes():
    assert {name: (r.data.train, r.data.val, r.data.test) for name, r in RECIPES.items()} == {
        "smoke": (2000, 200, 400),
        "small": (40_000, 2000, 4000),
        "paper": (96_000, 2000, 2000),
        "paper-large": (96_000, 2000, 2000),
    }
    for recipe in RECIPES.values():
        assert recipe.data.options["max_length"] == recipe.data.seq_len + (recipe.data.seq_len < 2000)


def test_a_data_dir_with_other_tasks_files_only_is_no_error(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "imdb_train.parquet").write_bytes(b"of another task")
    made, _ = prepare(listops, "smoke", out=tmp_path / "out", data_dir=tmp_path / "raw")
    assert made.manifest["source"] == "generated"
