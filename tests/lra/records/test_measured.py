"""Times per length, read from files of `bench`: ratios, the crossover, and one line for a broken file."""

import pytest

from lra.options import UsageError
from lra.records import measured
from lra.records.markup import Grid
from tests.lra.builders import LINEAR, QUADRATIC, bench, point


def test_ratios_are_taken_to_softmax_at_the_same_length(tmp_path):
    bench(tmp_path, [*LINEAR, *QUADRATIC, point("peer", 512, 4)])
    *_, grid = measured.blocks(tmp_path)
    assert isinstance(grid, Grid) and grid.header == ("attention", "N 512", "N 1,024", "N 2,048", "crossover")
    # 3 n = n^2 at n = 3, in units of 512 tokens
    assert grid.rows == (
        ("peer", "0.25 / –", "–", "–", "–"),
        ("performer", "0.33 / 4.00", "0.67 / 2.00", "1.33 / 1.00", "1,536"),
        ("softmax", "1.00 / 1.00", "1.00 / 1.00", "1.00 / 1.00", "–"),
    )


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [((1, 1, 1), 512), ((9, 9, 17), None), ((3, 6, 12), 1536), ((0.5, 8, 8), 1448.2), ((2, 4, 15), 512)],
)
def test_crossover_is_where_a_method_becomes_faster_for_good(seconds, expected):
    lengths = (512, 1024, 2048)
    base = [measured.Point(n, (n / 512) ** 2 + (n == 512)) for n in lengths]
    curve = [measured.Point(n, s) for n, s in zip(lengths, seconds, strict=True)]
    found = measured.crossover(curve, base)
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-4))


def test_the_ratio_of_interleaved_rounds_counts_before_that_of_medians(tmp_path):
    paired = [point("linear", 512, 0.5) | {"ratio": 0.8}, point("linear", 1024, 5) | {"ratio": 1.25}]
    bench(tmp_path, [*QUADRATIC, *paired])
    *_, grid = measured.blocks(tmp_path)
    assert grid.rows[0] == ("linear", "0.80 / –", "1.25 / –", "–", "724")  # half way in log-log


def test_nothing_measured_is_nothing_shown(tmp_path):
    assert measured.blocks(tmp_path) == [] and measured.attention(tmp_path) == {}


BROKEN = [
    5,
    [1],
    [{"name": "a"}],
    [point("a", 0, 1)],
    [point("a", 1, float("nan"))],
    [point("a", "x", 1)],
    [point("a", 1, 1) | {"ratio": -1}],
]


@pytest.mark.parametrize("points", BROKEN)
def test_a_broken_file_is_one_line(tmp_path, points):
    bench(tmp_path, points)
    with pytest.raises(UsageError, match="attention.json is not usable: "):
        measured.attention(tmp_path)
