"""Shared by the tests of the page: a real browser, where there is one."""

import pytest

from tests.lra.leaderboard.browser import ABSENT, CHROMIUM, DRIVER, Browser


@pytest.fixture(scope="session")
def chromium():
    """Opens windows: `with chromium(width, height) as window`. Skips the test where there is no browser."""
    if not (DRIVER and CHROMIUM):
        pytest.skip(ABSENT)
    return Browser
