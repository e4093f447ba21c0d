"""Shared by the tests of the store: the task `tiny`, and ways to damage prepared data."""

from __future__ import annotations

import pytest

from lra.registry import load_task


@pytest.fixture
def task(plugins):
    """The module of the task `tiny`."""
    return load_task("tiny")


@pytest.fixture
def builds(task, monkeypatch):
    """How often the task was built, one entry each."""
    original, calls = task.build, []

    def build(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(task, "build", build)
    return calls
