"""docs/change-it.md followed word by word on a copy of the code."""

import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, body

PAGE = (ROOT / "docs" / "change-it.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
EDIT = re.compile(r"^In `([^`]+)`, (above|below) the line that begins with `([^`]+)`:\n\n```python\n(.*?)```$",
                  re.M | re.S)
COPIED = ("models", "datasets", "utils", "fig", "train.py", "test.py", "reconstruct.py")


@pytest.fixture
def copy(tmp_path):
    for name in COPIED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, tmp_path / "code" / name, ignore=shutil.ignore_patterns("__pycache__", "sample"))
        else:
            shutil.copy(path, tmp_path / "code" / name)
    return tmp_path / "code"


def apply(code, path: str, where: str, beginning: str, added: str) -> None:
    """Make one edit; the line it names must be there once."""
    lines = (code / path).read_text(encoding="utf-8").splitlines(keepends=True)
    (index,) = (i for i, line in enumerate(lines) if line.startswith(beginning))
    lines.insert(index + (where == "below"), added)
    (code / path).write_text("".join(lines), encoding="utf-8")


def follow(code, command: list[str]) -> tuple[int, str]:
    done = subprocess.run([sys.executable, *command[1:]], cwd=code, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_there_are_four_recipes():
    assert list(RECIPES) == ["A sampler", "A metric", "A preset", "An input format"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_works_and_without_it_the_command_does_not(name, copy, data, tmp_path):
    recipe = RECIPES[name]
    edits, said = EDIT.findall(recipe), re.search(r"^It prints `(.+)`\.$", recipe, re.M)[1]
    assert edits and len({path for path, *_ in edits}) == 1, "one file"
    (tmp_path / "input").mkdir()
    for i in range(2):
        np.save(tmp_path / "input" / f"body_{i}.npy", body(32, i))
    if "INPUT" in recipe:
        from PIL import Image

        Image.fromarray(body(32, 7).astype(np.float32)).save(tmp_path / "input" / "body_7.tiff")
    places = {"DATA": data, "OUT": tmp_path / "out", "INPUT": tmp_path / "input"}
    line = re.search(r"^    (python .+)$", recipe, re.M)[1]
    command = [str(places.get(word, word)) for word in shlex.split(line)]
    assert said not in follow(copy, command)[1]
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    for edit in edits:
        apply(copy, *edit)
    status, text = follow(copy, command)
    assert status == 0 and said in text, text
