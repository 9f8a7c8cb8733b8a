"""The tables of README.md and docs/ are what docs/results/*.json gives, and nothing quotes a result beside them."""

import json
import re
import shutil
from pathlib import Path

import pytest

from fig.tables import TABLE, TABLES, main, read_results, summary, texts, with_tables
from utils.errors import InputError

ROOT = Path(__file__).parent.parent
FILES = sorted(path.stem for path in (ROOT / "docs" / "results").glob("*.json"))
PLACES = [(str(path.relative_to(ROOT)), match[2]) for path in texts(ROOT)
          for match in TABLE.finditer(path.read_text(encoding="utf-8"))]


@pytest.fixture
def copy(tmp_path):
    """A copy of README.md and docs/ that may be changed."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return tmp_path


def check(root: Path) -> int:
    return main(["--check", "--root", str(root)])


def change(path: Path, edit) -> None:
    """Edit a file of results: edit(its content) changes it in place."""
    found = json.loads(path.read_text(encoding="utf-8"))
    edit(found)
    path.write_text(json.dumps(found), encoding="utf-8")


def another_row(found: dict) -> None:
    """Add the last row once more, for one view more."""
    found["rows"].append(found["rows"][-1] | {"views": found["rows"][-1]["views"] + 1})


def outside_tables(path: Path) -> str:
    return TABLE.sub("", path.read_text(encoding="utf-8"))


def test_every_table_is_what_its_file_gives():
    assert check(ROOT) == 0


def test_every_file_of_results_has_a_table_and_every_table_stands_in_the_docs():
    assert {file for file, _ in TABLES.values()} == set(FILES)
    assert {name for file, name in PLACES if file == "docs/results.md"} == set(TABLES)


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 12_000


# docs/performance.md is arithmetic from shapes and formats, by its own words.
@pytest.mark.parametrize("path", [path for path in texts(ROOT) if path.name != "performance.md"], ids=lambda p: p.name)
def test_no_result_is_quoted_beside_the_tables(path):
    prose = outside_tables(path)
    assert not re.findall(r"\d\.\d+ dB|\b\d\d\.\d+ */ *\d\d\.\d+", prose)
    cells = [text.strip() for line in prose.splitlines() if line.startswith("|") for text in line.split("|")]
    assert not [text for text in cells if re.fullmatch(r"[+-]?\d+\.\d\d?", text)]


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_a_digit_changed_in_a_text_is_found(copy, file, name, capsys):
    path = copy / file
    text = path.read_text(encoding="utf-8")
    table = next(match for match in TABLE.finditer(text) if match[2] == name)
    digit = table.start() + re.search(r"\| [^|]*\d\.(\d)", table[0]).start(1)
    changed = text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1:]
    path.write_text(changed, encoding="utf-8")
    assert check(copy) == 1
    assert f"{path}: table '{name}' is not what its file gives" in capsys.readouterr().out
    assert path.read_text(encoding="utf-8") == changed


@pytest.mark.parametrize("name", FILES)
def test_a_digit_changed_in_a_file_is_found(copy, name, capsys):
    def edit(found):
        row = found["rows"][0]
        name = "psnr" if "psnr" in row else "coverage"
        row[name] = round(row[name] + 0.01, 3)

    change(copy / "docs" / "results" / f"{name}.json", edit)
    assert check(copy) == 1
    named = {mark for mark, (file, _) in TABLES.items() if file == name}
    assert set(re.findall(r"table '(\S+)'", capsys.readouterr().out)) <= named


@pytest.mark.parametrize("name", FILES)
def test_a_row_more_changes_the_table(copy, name):
    before = (copy / "docs" / "results.md").read_text(encoding="utf-8")
    change(copy / "docs" / "results" / f"{name}.json", another_row)
    assert check(copy) == 1
    assert main(["--root", str(copy)]) == 0
    assert (copy / "docs" / "results.md").read_text(encoding="utf-8") != before
    assert check(copy) == 0


@pytest.mark.parametrize("field", ["title", "command", "commit", "date", "machine", "weights", "slices"])
def test_where_a_number_comes_from_is_part_of_its_table(copy, field):
    change(copy / "docs" / "results" / "test.json", lambda found: found.update({field: "elsewhere"}))
    assert check(copy) == 1


def test_the_rows_of_a_run_can_take_the_place_of_those_in_a_file():
    row = {"method": "fbp", "views": 18, "window": [3000, 500], "psnr": 23.0263, "ssim": 0.422968, "rmse_hu": 214.476,
           "nfe": 0.0, "seconds_per_slice": 0.00218, "peak_gib": 0.777, "slices": 8, "patients": 1, "vif": 0.183873,
           "psnr_std": 1.511, "psnr_ci_slices": [22.09, 24.03], "psnr_ci_patients": None}
    other = row | {"window": [500, 50], "vif": None}
    assert summary([row, other])[2:] == ["| 18 | fbp | 23.03 | 42.30 | 214.5 | 18.39 | 0.0 | 0.00 |"]


def test_a_mark_without_partner_a_table_that_nobody_knows_and_a_damaged_file_are_named(copy, capsys):
    with pytest.raises(InputError, match="no partner"):
        with_tables("<!-- table: test -->\n", ROOT / "docs" / "results")
    with pytest.raises(InputError, match="No table is called 'tset'; expected one of test"):
        with_tables("<!-- table: tset -->\n<!-- end of table -->\n", ROOT / "docs" / "results")
    path = copy / "docs" / "results" / "test.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="lacks title, command, commit"):
        read_results(path)
    with pytest.raises(SystemExit) as stopped:
        check(copy)
    assert stopped.value.code == 1
    assert "test.json lacks title" in capsys.readouterr().err


def test_a_row_that_its_table_cannot_show_is_named(copy, capsys):
    change(copy / "docs" / "results" / "any-views.json", lambda found: found["rows"][0].update(method="tv"))
    with pytest.raises(SystemExit):
        check(copy)
    assert "any-views.json" in capsys.readouterr().err


def test_two_rows_for_one_cell_are_named(copy, capsys):
    change(copy / "docs" / "results" / "robustness.json", lambda found: found["rows"].append(found["rows"][0]))
    with pytest.raises(SystemExit):
        check(copy)
    assert "two rows for tiny, fbp" in capsys.readouterr().err


def rows_of(name: str) -> list[dict]:
    return read_results(ROOT / "docs" / "results" / f"{name}.json")["rows"]


def test_what_the_text_says_of_two_calls():
    def psnr(**options):
        """{views: PSNR} of the rows that have just these options."""
        return {row["views"]: row["psnr"] for row in rows_of("consistency")
                if {k: row[k] for k in ("method", "dc", "levels", "semantic_budget") if k in row} == options}

    one, two, eight = (psnr(dc=16, **options) for options in (
        {"method": "one-step"}, {"method": "sequential", "levels": [288]}, {"method": "sequential"}))
    share = {n: (two[n] - one[n]) / (eight[n] - one[n]) for n in (18, 36, 72)}
    assert 0.4 < share[18] < 0.6 and 0.4 < share[36] < 0.6 < share[72]


def test_what_the_text_says_of_robustness():
    psnr = {(row["checkpoint"], row["measurement"], row["views"], row["method"]): row["psnr"]
            for row in rows_of("robustness")}
    gains = {(*cell, method): psnr[*cell, method] - psnr[*cell, method.removesuffix(" + dc")]
             for *cell, method in psnr if method.endswith(" + dc")}
    assert min(gains.values()) > 0
    assert min(gains, key=gains.get) == ("tiny", "1e4 photons", 72, "one-step + dc")
