"""The comparison with published samples: it accepts what is drawn alike, and notices what is not."""

import json

import numpy as np
import pytest

from tasks import listops, pathfinder
from tasks.base import SourceError
from tasks.listops.expressions import SYMBOLS
from tests.conftest import ROOT
from tests.tasks import fidelity

REFERENCE = ROOT.parent / "shared" / "data"
REPORT = ROOT / "results" / "reference" / "bench" / "fidelity.json"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="needs shared/data beside the checkout")


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    """Samples enough for a test."""
    monkeypatch.setattr(fidelity, "OURS", {"ListOps": 1500, "Pathfinder": 1500})


@pytest.fixture(scope="module")
def reference():
    return fidelity.read_reference(REFERENCE)


def test_statistics_of_a_tree_are_counted_by_hand():
    names = "[MAX 3 [MIN 5 1 7 X [SM 2 2 X X".split()
    found = fidelity.tree_statistics(np.array([SYMBOLS.index(name) for name in names]))
    assert found == {
        "length": 12, "depth": 3, "operators": 3, "mean arity": pytest.approx(8 / 3), "root operator": 1,
        "root arity": 3, "share of MIN": pytest.approx(1 / 3), "share of MAX": pytest.approx(1 / 3),
        "share of MED": 0.0, "share of SM": pytest.approx(1 / 3),
    }  # fmt: skip


@needs_reference
def test_generated_samples_are_distributed_as_the_published_ones(reference):
    expressions, images = reference
    assert fidelity.compare_listops(*expressions)["passed"]
    for length in ("14", "6"):
        assert fidelity.compare_pathfinder(int(length), *images[length])["passed"], length


def test_trees_of_another_distribution_are_noticed():
    for change in (dict(max_args=9), dict(max_length=1600), dict(min_length=650)):
        found = fidelity.compare_listops(*listops.generate(1000, seed=5, **change))
        assert not found["passed"], change
    assert fidelity.compare_listops(*listops.generate(1000, seed=5))["passed"]


def test_images_of_another_kind_are_noticed():
    images, labels = pathfinder.generate(1100, seed=5)
    assert fidelity.compare_pathfinder(14, images, labels)["passed"]
    brighter = np.minimum(images.astype(int) * 21 // 20, 255).astype(np.uint8)
    assert not fidelity.compare_pathfinder(14, brighter, labels)["passed"]
    assert not fidelity.compare_pathfinder(14, pathfinder.generate(1100, seed=5, contour_length=9)[0], labels)["passed"]


def test_straightness_falls_with_curvature():
    y, x = np.mgrid[:32, :32] - 15.5
    radius = np.hypot(y, x)
    rings = [255 * (np.abs(radius - r) < 1) for r in (4, 7, 14)]
    line = 255 * (np.abs(y - x) < 1.5)
    found = fidelity.image_statistics(np.stack([*rings, line]).astype(np.uint8))["straightness over 9 px"]
    assert found[0] < found[1] < found[2] < found[3]


def test_probes_learn_what_can_be_learned_and_nothing_else(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(fidelity, "TRAIN", 640)
    monkeypatch.setattr(fidelity, "TEST", 320)
    labels = rng.integers(0, 2, 640)
    images = rng.integers(0, 90, (640, 32, 32)).astype(np.uint8)
    images[labels == 1, 4:12, 20:28] += 120
    score = fidelity.fit(images[:480], labels[:480], epochs=4)
    assert score(images[480:], labels[480:]) > 0.95
    assert 0.3 < fidelity.fit(images[:480], rng.integers(0, 2, 480), epochs=2)(images[480:], labels[480:]) < 0.7


@pytest.mark.skipif(not REPORT.is_file(), reason="results/reference/bench/fidelity.json is not there")
def test_the_committed_report_says_that_all_is_well_and_is_of_this_code():
    report = json.loads(REPORT.read_text())
    assert report["listops"]["passed"] and all(found["passed"] for found in report["pathfinder"].values())
    for name, ((own, _), (others, _)) in report["learning"]["transfer"].items():
        assert abs(own - others) <= 0.02, name
    assert abs(report["learning"]["told apart"][0] - 0.5) <= 0.02
    assert (
        fidelity.fidelity_tables(report, report["command"]).splitlines()[:-2]
        == (REPORT.with_suffix(".md").read_text().splitlines()[:-2])
    )
    assert report["hashes"] == fidelity.hashes()


@needs_reference
def test_references_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(SourceError, match="listops_reference_1000.tsv.gz"):
        fidelity.run(tmp_path, tmp_path)
    (tmp_path / fidelity.LISTOPS).write_bytes((REFERENCE / fidelity.LISTOPS).read_bytes())
    (tmp_path / fidelity.PATHFINDER).write_bytes(b"no archive")
    with pytest.raises(SourceError, match="not the reference images"):
        fidelity.run(tmp_path, tmp_path)
    assert not (tmp_path / "bench").exists()
