"""The list of faults fits the source; `python -m tests.mutants` tries whether a test notices each."""

import pytest

from tests.mutants import listed


@pytest.mark.parametrize("area", sorted({fault.area for fault in listed()}))
def test_every_fault_can_be_planted_and_is_valid_python(area):
    for fault in (fault for fault in listed() if fault.area == area):
        assert fault.old != fault.new
        compile(fault.planted(), fault.file, "exec")
        assert fault.key()
