"""The table of planted faults does not rot: each still has its place in the package, and its tests are still there."""

import re
from collections import Counter

import pytest
from mutants import ROOT, faults, main

TABLE = faults()


def test_the_table_is_large_and_names_each_fault_once():
    assert len(TABLE) >= 80
    twice = [name for name, n in Counter((fault.file, fault.name) for fault in TABLE).items() if n > 1]
    assert not twice


@pytest.mark.parametrize("file", sorted({fault.file for fault in TABLE}))
def test_every_fault_still_applies_and_is_python(file):
    source = (ROOT / "funcmha" / file).read_text()
    for fault in TABLE:
        if fault.file == file:
            assert fault.old != fault.new
            compile(fault.plant(source), f"{file} with the fault {fault.name!r}", "exec")


def test_every_test_that_must_fail_is_there():
    for node in {test for fault in TABLE for test in fault.tests}:
        file, _, function = node.partition("::")
        source = (ROOT / "tests" / file).read_text()
        assert not function or re.search(rf"^def {function}\(", source, re.MULTILINE), node


def test_a_fault_without_exactly_one_place_is_refused():
    fault = TABLE[0]
    for source in ("", 2 * fault.old):
        with pytest.raises(ValueError, match=r"must have this once, not [02] times"):
            fault.plant(source)


def test_a_word_that_no_fault_has_is_named(capsys):
    assert main("no fault is called so") == 1
    assert capsys.readouterr().out.startswith("No fault has the word 'no fault is called so'")
