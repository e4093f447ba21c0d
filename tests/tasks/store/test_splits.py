"""Splits: disjoint by content, and within what META and the recipe promise."""

import numpy as np
import pytest

from tasks.base import Meta, SourceError, Split, majority
from tasks.store.prepared import check, disjoint, facts
from tests.tasks.store.builders import sequences

# Rule 7


def test_rule_7_splits_are_disjoint_by_content_and_test_is_never_touched():
    splits = {
        "train": Split.of(sequences("a", "b", "c", "d", "a"), [0, 1, 2, 3, 4]),
        "val": Split.of(sequences("c", "e", "f"), [2, 5, 6]),
        "test": Split.of(sequences("b", "e", "g"), [1, 5, 7]),
    }
    kept, removed, repeated = disjoint(splits, 1)
    assert removed == {"train": 2, "val": 1} and repeated == {"train": 1}
    assert kept["test"] is splits["test"]
    assert kept["val"].labels.tolist() == [2, 6]
    assert kept["train"].labels.tolist() == [0, 3, 4]
    assert [kept["train"].sequence(i).tolist() for i in range(3)] == [[1], [4], [1]]


def test_rule_7_a_pair_is_a_duplicate_only_as_a_pair():
    splits = {
        "train": Split.of(sequences("a", "b", "ab", "c", "x", "y"), [0, 1, 2]),
        "val": Split.of(sequences("b", "a", "a", "bc"), [3, 4]),
        "test": Split.of(sequences("x", "y"), [5]),
    }
    kept, removed, repeated = disjoint(splits, 2)
    assert removed == {"train": 1} and not repeated and kept["train"].labels.tolist() == [0, 1]
    assert len(kept["train"].offsets) == 5 and len(kept["val"].labels) == 2


# What a split may hold

META = Meta(name="any", version=1, classes=3, vocab=5, towers=2, description="")
GOOD = [[1, 2], [3], [4, 4, 4], [1]], [0, 2]  # of two examples: their sequences, their labels
BAD = {
    "padding as a symbol": ([[1, 2], [0], [4], [1]], [0, 2], "token id 0 is outside 1 to 4 (0 is padding"),
    "beyond the vocabulary": ([[1, 2], [3], [5], [1]], [0, 2], "token id 5 is outside 1 to 4"),
    "beyond uint16": ([[1, 65_537], [3], [4], [1]], [0, 2], "token id 65537 is outside 1 to 4"),
    "negative": ([[1, -65_535], [3], [4], [1]], [0, 2], "token id -65535 is outside"),
    "fractions": (
        [[1, 2.5], [3], [4], [1]],
        [0, 2],
        "the token ids are float64, expected uint16: whole numbers up to 65,535 (give",
    ),
    "not a number": ([[1, np.nan], [3], [4], [1]], [0, 2], "token id nan is outside"),
    "beyond the classes": ([[1, 2], [3], [4], [1]], [0, 3], "label 3 is outside 0 to 2 (META.classes)"),
    "beyond uint8": ([[1, 2], [3], [4], [1]], [0, 256], "label 256 is outside 0 to 2"),
    "a negative label": ([[1, 2], [3], [4], [1]], [-1, 2], "label -1 is outside 0 to 2"),
    "a fraction of a label": ([[1, 2], [3], [4], [1]], [0.5, 2], "the labels are float64, expected uint8"),
    "an empty sequence": ([[1, 2], [], [4], [1]], [0, 2], "sequence 1 has 0 tokens, expected 1 to seq_len=3"),
    "too long": ([[1, 2], [3], [4], [1] * 4], [0, 2], "sequence 3 has 4 tokens, expected 1 to seq_len=3"),
    "a tower too few": ([[1, 2], [3], [4]], [0, 2], "3 sequences of 2 examples, expected 2 each"),
    "no example": ([], [], "empty"),
}


def split_of(sequences, labels):
    return Split.of([np.array(sequence) for sequence in sequences], np.array(labels))


def test_a_split_within_the_bounds_is_stored_in_few_bytes():
    split = split_of(*GOOD)
    assert split.tokens.dtype == np.uint16 and split.labels.dtype == np.uint8
    check(META, "val", split, 3)


@pytest.mark.parametrize("name", BAD)
def test_what_breaks_a_rule_is_named_with_task_split_and_value(name):
    sequences, labels, message = BAD[name]
    with pytest.raises(SourceError) as caught:
        check(META, "val", split_of(sequences, labels), 3)
    assert str(caught.value).startswith(f"task any, val split: {message}") and "\n" not in str(caught.value)


def test_offsets_that_leave_tokens_over_are_refused():
    split = split_of(*GOOD)
    with pytest.raises(SourceError, match="task any, test split: 4 sequences of 2 examples"):
        check(META, "test", Split(np.append(split.tokens, 1), split.offsets, split.labels), 3)


def test_every_part_of_a_split_is_hashed_and_the_majority_is_that_of_train():
    one = Split.of(sequences("ab", "c"), [0, 1])
    others = (
        Split.of(sequences(*texts), labels)
        for *texts, labels in (("ab", "d", [0, 1]), ("a", "bc", [0, 1]), ("ab", "c", [1, 1]))
    )
    assert facts(one)["sha256"] not in [facts(other)["sha256"] for other in others]
    assert majority(np.array([0, 0, 1]), np.array([0, 1, 1])) == 1 / 3
