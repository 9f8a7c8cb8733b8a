"""The projector package's own tests, which need PyTorch alone: torch-radon_fix/tests. And what it says of itself."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import torch_radon

PACKAGE = Path(__file__).parent.parent / "torch-radon_fix"


def test_its_own_tests_pass():
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", PACKAGE / "tests"],
                          cwd=PACKAGE.parent, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


def test_version_changelog_and_licence_agree():
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (PACKAGE / "CHANGELOG.md").read_text(encoding="utf-8")
    assert torch_radon.__version__ == re.search(r"^## (\S+)", changelog, re.M)[1]
    assert "version" in project["dynamic"]
    assert (PACKAGE / "LICENSE").read_text(encoding="utf-8") == (PACKAGE.parent / "LICENSE").read_text(encoding="utf-8")


def test_the_readmes_table_names_the_whole_api():
    """Every public name and method, and the other way round: what the table has, exists."""
    readme = (PACKAGE / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("## The API"):readme.index("## What upstream's defects were")]
    public = set(torch_radon.__all__) - {"v2", "volumes"}
    public |= {name for name in vars(torch_radon.BaseRadon) if not name.startswith("_")}
    public |= {name for name in vars(torch_radon.ReadingsLookup) if not name.startswith("_")}
    named = set(re.findall(r"[A-Za-z_]\w*", " ".join(re.findall(r"`([^`]*)`", table))))
    assert not public - named
