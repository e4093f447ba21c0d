"""Shared by the tests of training: a second laboratory, and a hand in the middle of a run."""

import pytest

from lra.training.trainer import Trainer
from tests.conftest import Lab


@pytest.fixture
def other(lab, tmp_path):
    """A second laboratory on the same data, with results of its own."""
    return Lab(lab.data, tmp_path / "other-results", tmp_path / "other-runs", lab.task)


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(n, action)`: call `action(trainer)` just before optimizer step n, once."""

    def arrange(n, action):
        original, done = Trainer.step, []

        def step(self, step):
            if step == n and not done:
                done.append(step)
                action(self)
            return original(self, step)

        monkeypatch.setattr(Trainer, "step", step)

    return arrange
