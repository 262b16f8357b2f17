"""Counting, sharing the file between windows, printing."""

from __future__ import annotations

from pathlib import Path

from albor_lsp.statistics import Statistics, as_svg, as_text, read_days


def test_windows_add_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "statistics.json"
    one = Statistics(path, lambda: "2030-01-01")
    two = Statistics(path, lambda: "2030-01-02")
    one.shown("abc", 3)
    one.accepted("abc")
    two.shown("de\nf", 9999)
    assert one.days()["2030-01-01"]["accepted"] == 1
    one.flush()
    two.flush()
    two.flush()
    days = read_days(path)
    assert days["2030-01-01"]["chars_accepted"] == 3
    assert days["2030-01-01"]["latency"][0] == 1
    assert days["2030-01-02"]["latency"][-1] == 1
    assert sorted(each.name for each in path.parent.iterdir()) == [
        "statistics.json",
        "statistics.lock",
    ]
    text = as_text(days)
    assert "2030-01-02" in text
    assert "all days" in text
    assert as_svg(days).count("<rect") == 2


def test_a_broken_file_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "statistics.json"
    for data in ("{", "[]", '{"2030-01-01": 3, "2030-01-02": {"shown": -1, "latency": "x"}}'):
        path.write_text(data)
        assert all(counts["shown"] == 0 for counts in read_days(path).values())
    assert as_text({}) == "No suggestions counted yet.\n"
    assert "<svg" in as_svg({})


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    statistics = Statistics(tmp_path / "file" / "statistics.json")
    statistics.shown("x", 1)
    statistics.flush()
