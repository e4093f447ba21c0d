"""Recall: what stands behind a key is the answer, at any place, and no example is met twice."""

from dataclasses import replace

import numpy as np
import pytest

from lra.__main__ import main
from tasks.base import Optim, Recipe, SourceError, Split
from tasks.recall import KEY, META, RECIPES, VALUE, build, commonest, decode, groups, longer
from tasks.store.prepared import load

SMOKE = RECIPES["smoke"]


def made(**changes):
    """The splits of the smoke recipe with other data settings; options by their names."""
    options = {name: changes.pop(name) for name in list(changes) if name in SMOKE.data.options}
    data = replace(SMOKE.data, **changes, options=SMOKE.data.options | options)
    return build(replace(SMOKE, data=data), source="generated", data_dir=None, workers=1)


def read(tokens):
    """The pairs in their order, as (place, key, value), the lone values, and the key asked for."""
    *tokens, query = tokens.tolist()
    keys = [place for place, token in enumerate(tokens) if token >= KEY]
    lone = [t for place, t in enumerate(tokens) if VALUE <= t < KEY and place - 1 not in keys]
    return [(place, tokens[place], tokens[place + 1]) for place in keys], lone, query


def shown(split):
    return [(frozenset(pair[1:] for pair in pairs), query) for pairs, _, query in each(split)]


def each(split):
    return [read(split.sequence(i)) for i in range(len(split.labels))]


@pytest.fixture(scope="module")
def splits():
    return made(test=1000).splits


def test_the_answer_is_the_value_behind_the_key_asked_for(splits):
    lone_values = []
    for split in splits.values():
        for (pairs, lone, query), label, length in zip(each(split), split.labels, np.diff(split.offsets), strict=True):
            behind = {key: value for _, key, value in pairs}
            assert len(behind) == len(pairs) and behind[query] == VALUE + label
            assert all(VALUE <= value < KEY for value in behind.values())
            assert length == 2 * len(pairs) + SMOKE.data.options["filler"] + 1
            lone_values.append(len(lone) / SMOKE.data.options["filler"])
    assert abs(np.mean(lone_values) - 0.5) < 0.02


def test_test_has_its_numbers_of_pairs_in_equal_shares_and_train_a_single_pair_too(splits):
    for name, shares in (
        ("test", {2: 1 / 4, 4: 1 / 4, 8: 1 / 4, 16: 1 / 4}),
        ("train", {1: 16 / 31, 2: 8 / 31, 4: 4 / 31, 8: 2 / 31, 16: 1 / 31}),
    ):
        counts = np.array([len(pairs) for pairs, *_ in each(splits[name])])
        assert set(counts) == set(shares)
        assert all(abs((counts == P).mean() - share) < 0.05 for P, share in shares.items())


def test_no_place_has_a_meaning(splits):
    """Each pair stands at even and at odd places, and each is asked for."""
    eights = [(pairs, query) for pairs, _, query in each(splits["test"]) if len(pairs) == 8]
    for j in range(8):
        assert {pairs[j][0] % 2 for pairs, _ in eights} == {0, 1}
        assert 0.05 < np.mean([pairs[j][1] == query for pairs, query in eights]) < 0.25


def test_no_pairs_with_their_query_are_in_two_splits_among_whatever_filler(splits):
    sets = {name: shown(split) for name, split in splits.items()}
    for name, other in (("test", "val"), ("test", "train"), ("val", "train")):
        assert not set(sets[name]) & set(sets[other])
    assert all(len(set(sets[name])) == len(sets[name]) for name in ("test", "val"))


def test_a_seed_gives_the_same_splits_and_a_larger_train_the_same_test(splits):
    for other, same in ((made(test=1000), True), (made(test=1000, train=50), True), (made(test=1000, seed=1), False)):
        assert np.array_equal(other.splits["test"].tokens, splits["test"].tokens) == same
    assert np.array_equal(made(test=1000).splits["train"].tokens, splits["train"].tokens)


@pytest.mark.parametrize("factor", [2, 3])
def test_longer_examples_keep_pairs_query_and_order_among_more_filler(splits, factor):
    test = splits["test"]
    split = longer(SMOKE.data, test, factor)
    assert np.array_equal(split.labels, test.labels)
    assert np.array_equal(np.diff(split.offsets), factor * np.diff(test.offsets))
    share = []
    for old, new, length in zip(each(test), each(split), np.diff(test.offsets), strict=True):
        assert [pair[1:] for pair in new[0]] == [pair[1:] for pair in old[0]] and new[2] == old[2]
        share.append((len(new[1]) - len(old[1])) / ((factor - 1) * length))
    assert abs(np.mean(share) - 0.5) < 0.02  # the other half are blanks
    ahead = np.mean([new[0][0][0] / n for new, n in zip(each(split), np.diff(split.offsets), strict=True)])
    assert 0.1 < ahead < 0.3  # filler comes before the first pair as well
    assert not np.array_equal(split.tokens, longer(SMOKE.data, test, factor + 1).tokens[: len(split.tokens)])
    assert np.array_equal(split.tokens, longer(SMOKE.data, test, factor).tokens)


def test_groups_are_numbers_of_pairs(splits):
    for split in splits.values():
        by, values = groups(split)
        assert by == "pairs" and values.tolist() == [len(pairs) for pairs, *_ in each(split)]


def test_commonest_shares_its_guess_among_values_that_tie():
    def row(*values, label):
        return np.array([part for k, v in enumerate(values) for part in (KEY + k, VALUE + v)] + [KEY]), label

    rows = [row(1, 2, label=1), row(3, 3, 4, label=3), row(3, 3, 4, label=4), row(5, 6, 7, 7, 6, label=6)]
    sequences, labels = zip(*rows, strict=True)
    assert commonest(Split.of(list(sequences), np.array(labels))) == (0.5 + 1 + 0 + 0.5) / 4
    floor = made().floors["commonest value shown"]
    assert 0.25 < floor < 0.45


def test_it_is_prepared_and_spelt(tmp_path, capsys):
    assert main(["prepare", "recall", "--preset=smoke", "--data", str(tmp_path)]) == 0
    prepared = load(tmp_path / "recall" / "smoke")
    assert set(prepared.manifest["floors"]) == {"majority", "commonest value shown"}
    assert not prepared.manifest["duplicates_removed"]
    words = decode(prepared.splits["test"].sequence(0)).split()
    assert words[-1] in words[:-1] and words[-1][0] == "k"
    assert KEY + max(r.data.options["keys"] for r in RECIPES.values()) <= META.vocab


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(pairs="2 64"), "64 pairs have 64 different keys, and keys is 32: use fewer pairs"),
        (dict(filler=5), "are 38 tokens, and seq_len is 37: use fewer pairs or less filler"),
        (dict(seq_len=9), "seq_len is 9"),
        (dict(pairs="two"), "pairs 'two': use whole numbers"),
        (dict(pairs=1), "pairs 1: use whole numbers from 2 on"),
        (dict(keys=129), "keys 129: use a whole number from 1 to 128"),
        (dict(values=1), "values 1: use a whole number from 2 to 16"),
        (dict(filler=-1), "filler -1"),
        (dict(filler=0.5), "filler 0.5"),
        (dict(val=0), "need 1 or more"),
        (dict(pairs="2", keys=3, values=2), "test: .* new examples of 2 pairs cannot be had: use more keys or values"),
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
