"""The comparison with another commit: here with this one."""

import json

from conftest import ROOT, run


def test_two_trees_take_turns(tmp_path):
    text = run("-m", "benchmarks.compare", ROOT, "--rounds", 3, "--seconds", 0.001, "--size", 32, "--tasks",
               "P18^T, one", "CG 18, eight", "SPDPS with CG, one", "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert [row["task"] for row in rows] == ["P18^T, one", "CG 18, eight", "SPDPS with CG, one"]
    for row in rows:
        assert row["task"] in text and row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
        assert 0.02 < row["least"] < 50 and row["new_ms"] > 0, "the same code, on a machine that does other things too"
    assert rows[1]["new_ms"] > rows[0]["new_ms"]


def test_a_folder_without_this_project_gets_a_sentence(tmp_path):
    assert "expected a clone of this project" in run("-m", "benchmarks.compare", tmp_path, expect=1)
