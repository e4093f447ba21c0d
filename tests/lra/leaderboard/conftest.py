"""Shared by the tests of the leaderboard: runs of an owner and of a guest, and a real browser, where there is one."""

import shutil

import pytest

from lra.figures import style
from tests.conftest import Lab, plug_in
from tests.lra.leaderboard.browser import ABSENT, CHROMIUM, DRIVER, Browser


@pytest.fixture(scope="package", autouse=True)
def coarse():
    """Few pixels make a figure of a page as well as many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(style.STYLE, "savefig.dpi", 20)
        yield


@pytest.fixture(scope="session")
def chromium():
    """Opens windows: `with chromium(width, height) as window`. Skips the test where there is no browser."""
    if not (DRIVER and CHROMIUM):
        pytest.skip(ABSENT)
    return Browser


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_data):
    """Two laboratories with finished runs of performer: an owner's seeds 0 to 2, and a guest's 3 to 5. Not to be
    changed."""
    labs = []
    with pytest.MonkeyPatch.context() as patch:
        plug_in(patch)
        for name, seeds in (("owner", (0, 1, 2)), ("guest", (3, 4, 5))):
            folder = tmp_path_factory.mktemp(name)
            labs.append(Lab(tiny_data, folder / "results", folder / "runs"))
            for seed in seeds:
                labs[-1].train(attention="performer", seed=seed)
    return labs


@pytest.fixture
def owner(trained, tmp_path, plugins):
    """A copy of the owner's results, to be changed."""
    own, _ = trained
    shutil.copytree(own.results, tmp_path / "results")
    return Lab(own.data, tmp_path / "results", own.runs)


def same_files(folder):
    """Every file below a folder with its bytes and its time: equal before and after what must not write."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}
