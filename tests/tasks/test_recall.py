"""Recall: what stands behind a key is the answer, at any place, and no example is met twice."""

from dataclasses import replace

import numpy as np
import pytest

from lra.__main__ import main
from tasks.base import Optim, Recipe, SourceError, Split
from tasks.recall import BLANK, KEY, META, RECIPES, VALUE, build, commonest, decode
from tasks.store.prepared import load

SMOKE = RECIPES["smoke"]


def made(**changes):
    """The splits of the smoke recipe with other data settings; options by their names."""
    options = {name: changes.pop(name) for name in list(changes) if name in SMOKE.data.options}
    data = replace(SMOKE.data, **changes, options=SMOKE.data.options | options)
    return build(replace(SMOKE, data=data), source="generated", data_dir=None, workers=1)


def read(tokens):
    """The pairs in their order, as a dictionary of places, and the key asked for."""
    *places, query = [*tokens[:-1].reshape(-1, 2).tolist(), int(tokens[-1])]
    return {place: (key, value) for place, (key, value) in enumerate(places) if key != BLANK}, query


@pytest.fixture(scope="module")
def splits():
    return made().splits


def test_the_answer_is_the_value_behind_the_key_asked_for(splits):
    counts, used, asked = {}, set(), set()
    for split in splits.values():
        for i, label in enumerate(split.labels):
            pairs, query = read(split.sequence(i))
            behind = dict(pairs.values())
            assert len(behind) == len(pairs) and min(behind) >= KEY and behind[query] == VALUE + label
            assert all(VALUE <= value < KEY for value in behind.values())
            counts[len(pairs)] = counts.get(len(pairs), 0) + 1
            used |= set(pairs)
            asked.add([key for key, _ in pairs.values()].index(query) / len(pairs))
    total = sum(counts.values())
    assert set(counts) == {2, 4, 8} and abs(counts[2] / total - 4 / 7) < 0.05 and abs(counts[8] / total - 1 / 7) < 0.05
    assert len(used) == 8 + SMOKE.data.options["filler"] and len(asked) == 8, "places and questions are drawn at random"


def test_no_pairs_with_their_query_are_in_two_splits_whatever_their_places(splits):
    shown = {
        name: [
            (frozenset(pairs.values()), query)
            for pairs, query in map(read, map(split.sequence, range(len(split.labels))))
        ]
        for name, split in splits.items()
    }
    for name, other in (("test", "val"), ("test", "train"), ("val", "train")):
        assert not set(shown[name]) & set(shown[other])
    assert all(len(set(shown[name])) == len(shown[name]) for name in ("test", "val"))


def test_a_seed_gives_the_same_splits_and_a_larger_train_the_same_test(splits):
    for other, same in ((made(), True), (made(train=50), True), (made(seed=1), False)):
        assert np.array_equal(other.splits["test"].tokens, splits["test"].tokens) == same
    assert np.array_equal(made().splits["train"].tokens, splits["train"].tokens)


def test_commonest_shares_its_guess_among_values_that_tie():
    def row(*values, label):
        return np.array([part for k, v in enumerate(values) for part in (KEY + k, VALUE + v)] + [KEY]), label

    rows = [row(1, 2, label=1), row(3, 3, 4, label=3), row(3, 3, 4, label=4), row(5, 6, 7, 7, 6, label=6)]
    sequences, labels = zip(*rows, strict=True)
    assert commonest(Split.of(list(sequences), np.array(labels))) == (0.5 + 1 + 0 + 0.5) / 4
    floor = made().floors["commonest value shown"]
    assert 0.4 < floor < 0.55


def test_it_is_prepared_and_spelt(tmp_path, capsys):
    assert main(["prepare", "recall", "--preset=smoke", "--data", str(tmp_path)]) == 0
    prepared = load(tmp_path / "recall" / "smoke")
    assert set(prepared.manifest["floors"]) == {"majority", "commonest value shown"}
    assert not prepared.manifest["duplicates_removed"]
    words = decode(prepared.splits["test"].sequence(0)).split()
    assert len(words) == SMOKE.data.seq_len and words[-1] in words[:-1] and words[-1][0] == "k" and "_" in words
    assert KEY + max(r.data.options["keys"] for r in RECIPES.values()) <= META.vocab


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(pairs="2 32"), "32 pairs have 32 different keys, and keys is 16: use fewer pairs"),
        (dict(filler=3), "are 23 tokens, and seq_len is 21: use fewer pairs or less filler"),
        (dict(seq_len=9), "seq_len is 9"),
        (dict(pairs="two"), "pairs 'two': use whole numbers"),
        (dict(pairs=0), "pairs 0: use whole numbers"),
        (dict(keys=129), "keys 129: use a whole number from 1 to 128"),
        (dict(values=1), "values 1: use a whole number from 2 to 16"),
        (dict(filler=-1), "filler -1"),
        (dict(filler=0.5), "filler 0.5"),
        (dict(val=0), "need 1 or more"),
        (dict(pairs="1", keys=4, values=2), "test: .* new examples of 1 pairs cannot be had: use more keys or values"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(changes, told):
    with pytest.raises(SourceError, match=told) as error:
        made(**changes)
    assert "\n" not in str(error.value)


def test_unknown_options_and_sources_are_one_line():
    odd = Recipe(data=replace(SMOKE.data, options={"pears": 2}), train=Optim(steps=1))
    with pytest.raises(SourceError, match="options pears: use pairs, keys, values, filler"):
        build(odd, source="generated", data_dir=None, workers=1)
    with pytest.raises(SourceError, match="'hub' is not one of"):
        build(SMOKE, source="hub", data_dir=None, workers=1)
