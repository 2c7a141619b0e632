"""docs/faults.md is made from the tests as they are, and is honest about every row."""

import fault_table
import pytest


def test_the_page_is_up_to_date() -> None:
    figures = fault_table.figures_of(fault_table.PAGE)
    page = fault_table.render(fault_table.collect(), figures)
    assert fault_table.PAGE.read_text() == page, "python tests/fault_table.py --write"


@pytest.mark.parametrize("row", fault_table.ROWS)
def test_every_row_has_a_test_or_a_reason(row: str) -> None:
    covered = any(row in test.ids for test in fault_table.collect())
    assert covered != (row in fault_table.REASONS), f"{row}: either a test or a reason"


def test_every_test_names_rows_that_exist_and_says_its_promise() -> None:
    for test in fault_table.collect():
        assert set(test.ids) <= set(fault_table.ROWS), f"{test.place}: no such row"
        assert test.promise, f"{test.place} has no docstring"


def test_ids_are_read_from_names() -> None:
    assert fault_table.IDS.match("test_r1_o12_tail_dies")[1] == "r1_o12_"
    assert fault_table.IDS.match("test_reads_12_bytes") is None
    assert fault_table.IDS.match("test_s3_bucket")[1] == "s3_"


def test_figures_are_kept(tmp_path) -> None:
    page = tmp_path / "faults.md"
    assert fault_table.figures_of(page) == "None yet."
    page.write_text(fault_table.render([], "1000 histories"))
    assert fault_table.figures_of(page) == "1000 histories"
    assert fault_table.render([], "1000 histories") == page.read_text()
