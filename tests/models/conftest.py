"""For tests of attentions: what is small enough to be written out goes through the fused kernels as well."""

import pytest

from models.features import flash


@pytest.fixture(autouse=True)
def fused_at_any_size(monkeypatch):
    """The sizes of these tests are far below the limit."""
    monkeypatch.setattr(flash, "SMALL", 0)
