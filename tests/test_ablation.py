"""The ablation: equal compute, every row's flags known to the scripts, results kept."""

import json
import shlex
from dataclasses import replace

import pytest
from conftest import run

import test as evaluation
from benchmarks import ablation
from models.cost import cost
from models.schedule import budget


@pytest.mark.parametrize("row", ablation.ROWS)
def test_every_row_spends_the_same(row):
    """As many whole batches as fit: one more would cost more than was given."""
    trains, tests = ablation.ROWS[row]
    preset = ablation.preset_of(["--preset", "tiny", *shlex.split(ablation.SHORT), *shlex.split(trains)])
    evaluation.parse(["--data", "-", "--out", "-", *shlex.split(tests)])
    images = ablation.affordable(preset, 558, 64, 0.001)
    flops = cost(preset.network(), 64, preset.precision)[1]
    spent, more = (budget(replace(preset, images=n), 558)[2] * flops for n in (images, images + preset.batch))
    assert spent <= 1e12 < more


def test_what_is_done_is_not_done_again(data, tmp_path):
    command = ("-m", "benchmarks.ablation", "--data", data, "--out", tmp_path / "out", "--rows", "no EPCT", "--slices",
               "1", "--pflop", "1e-5")
    first, second = run(*command), run(*command)
    rows = [[line for line in text.splitlines() if line.startswith("| no EPCT | sequential | 3407 |")]
            for text in (first, second)]
    assert "train.py" in first and "test.py" in first and "train.py" not in second
    assert len(rows[0]) == 1 and rows[0] == rows[1]
    assert "holds this row made otherwise" in run(*command[:-1], "2e-5", expect=1)
    assert "does not pay for one batch" in run(*command[:-1], "1e-9", "--seeds", 1, expect=1)


def test_a_training_may_last_so_many_minutes(data, tmp_path):
    command = ("-m", "benchmarks.ablation", "--data", data, "--out", tmp_path / "out", "--rows", "no EPCT", "--slices",
               "1", "--minutes", "0.01")
    assert "0.01 minutes a training" in run(*command)
    images = json.loads((tmp_path / "out/no-epct-3407/row.json").read_text())["images"]
    again = run(*command)
    assert "train.py" not in again and f"| 3407 | {images} |" in again
    assert "expected a positive number" in run(*command[:-1], "0", expect=2)


def test_minutes_become_images_by_the_speed_of_a_training(monkeypatch):
    calls = []

    def call(command):
        calls.append(command)
        out = command[command.index("--out") + 1]
        out.mkdir()
        (out / "metrics.jsonl").write_text('{"images": 32, "images_per_second": 0.7}\n{"images": 32, "val18/mse": 1}\n')

    monkeypatch.setattr(ablation, "call", call)
    assert ablation.fitting(2, 4, ["train.py"]) == 84
    assert ablation.fitting(1e-6, 4, ["train.py"]) == 4
    assert [one[one.index("--images") + 1] for one in calls[:2]] == [4, 32]
    assert all(one[-2:] == ["--epct-start", 0] for one in calls), "as fast as the rest of the training"
