"""Other machines: two programs at once, killed runs, damaged states, no git, no terminal, missing modules."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run, write_slices
from safetensors.torch import load
from torch_radon import backend_cpu

import reconstruct
import test as evaluation
import train
from datasets import prepare
from utils import progress, run_folder
from utils.cli import script
from utils.errors import RunFolderError, Stopped
from utils.files import atomic
from utils.progress import Progress
from utils.results import COLUMNS, append, open_results, whole_rows
from utils.state import commit, newest_state, save_state

SCRIPTS = {"train": ["train.py", "--data", "DATA", "--images", "4", "--stem", "4", "--dc", "0", "--device", "cpu",
                     "--precision", "fp32"],
           "test": ["test.py", "--data", "DATA/val_img", "--views", "36", "--methods", "fbp", "--device", "cpu"],
           "prepare": ["-m", "datasets.prepare", "DATA", "--size", "32", "--split", "1", "0", "0", "--workers", "1"],
           "reconstruct": ["reconstruct.py", "DATA/val_img", "--views", "36", "--method", "fbp", "--device", "cpu"]}
HOLD = """
import pathlib, sys
from utils import run_folder
run_folder.lock(pathlib.Path(sys.argv[1]))
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def data(tmp_path):
    write_slices(tmp_path / "data" / "train_img", "AB", 2, 32)
    write_slices(tmp_path / "data" / "val_img", "C", 2, 32)
    return tmp_path / "data"


MAIN = {"train": train.main, "test": evaluation.main, "prepare": prepare.main, "reconstruct": reconstruct.main}


@pytest.fixture
def command(data):
    return lambda name, out: [*(text.replace("DATA", str(data)) for text in SCRIPTS[name]), "--out", str(out)]


@pytest.fixture
def go(call, command):
    """Run a program in this process: go(name, out, more arguments, expect=0)."""
    return lambda name, out, *more, expect=0: call(
        MAIN[name], *command(name, out)[2 if name == "prepare" else 1:], *more, expect=expect)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_folder_in_use_is_refused_with_whose_it_is_until_that_ends_anyhow(name, go, tmp_path):
    out = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], cwd=ROOT, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    holder.stdout.readline()
    text = go(name, out, expect=1)
    assert f"in use by process {holder.pid} on {socket.gethostname()}" in text
    assert [path.name for path in out.iterdir()] == [run_folder.LOCK], "the second wrote nothing"
    holder.kill()
    holder.communicate()
    (out / ".run.json.123.partial").write_text("{")  # it was killed between making OUT and run.json
    go(name, out)
    assert not list(out.glob(".*")), "what it left is swept"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_folder_that_cannot_be_written_is_a_sentence_before_any_work(name, go, tmp_path):
    (tmp_path / "file").touch()
    text = go(name, tmp_path / "file" / "out", expect=1)
    assert text.startswith("Stopped: writing failed (") and len(text.strip().splitlines()) == 1


def test_a_lock_is_this_process_s_until_it_is_given_back(tmp_path):
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "new", tmp_path / "there"):
        run_folder.lock(out)
        run_folder.lock(out)
        assert (out / run_folder.LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    run_folder.unlock()
    assert not (tmp_path / "new").exists() and not list((tmp_path / "there").iterdir())
    (tmp_path / "there" / "mine.txt").touch()
    (tmp_path / "there" / ".mine.123.partial").touch()
    with pytest.raises(RunFolderError, match="holds no run of test.py"):
        run_folder.claim(tmp_path / "there", {}, "run of test.py")
    assert (tmp_path / "there" / ".mine.123.partial").exists(), "nothing is swept in a folder of others"
    run_folder.unlock()


def test_what_a_finished_run_publishes_is_its_state_s(tmp_path, go):
    """A kill between the last state and the file leaves an older one, or none."""
    out = tmp_path / "out"
    go("train", out)
    wanted = load((out / "checkpoint.safetensors").read_bytes())
    for killed in (lambda path: path.write_bytes(b"old"), lambda path: path.unlink()):
        killed(out / "checkpoint.safetensors")
        assert "Done" in go("train", out)
        found = load((out / "checkpoint.safetensors").read_bytes())
        assert found.keys() == wanted.keys() and all(torch.equal(value, found[k]) for k, value in wanted.items())


def test_another_seed_is_refused_before_slices_are_read(data, tmp_path, go):
    go("train", tmp_path / "out")
    for path in data.glob("*_img/*.npy"):
        path.write_bytes(b"nothing that could be read")
    assert "another seed" in go("train", tmp_path / "out", "--seed", 1, expect=1)


def test_a_bit_that_flips_in_a_state_is_noticed_or_does_not_matter(tmp_path, capsys):
    content = {"network": {"weight": torch.randn(40, 40)}, "seen": 8}
    save_state(tmp_path, 8, content)
    path, rng, noticed = tmp_path / "state-000000008.pt", random.Random(0), 0
    whole = path.read_bytes()
    for _ in range(200):
        bit = rng.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        _, found = newest_state(tmp_path)
        noticed += found is None
        assert found is None or found["seen"] == 8 and torch.equal(found["network"]["weight"],
                                                                   content["network"]["weight"])
    assert noticed > 150 and "cannot be read" in capsys.readouterr().err
    path.write_bytes(whole[:2000] + bytes(1000) + whole[3000:])
    assert newest_state(tmp_path) == (None, None)


def test_damaged_rows_are_done_again(tmp_path, capsys):
    rows = [{"file": f"A_{i}.npy", "patient": "A", "method": "fbp", "views": 18, "width": 3000, "centre": 500,
             "psnr": "30.25", "ssim": "0.9", "rmse_hu": "10.5", "vif": "0.5", "nfe": 0, "seconds_per_slice": "0.1",
             "peak_gib": "0.2"} for i in range(20)]
    about = {"methods": ["fbp"], "views": [18], "levels": {}, "windows": [[3000, 500]]}
    out = tmp_path / "out"
    open_results(out, about)
    append(out, 0, rows)
    _, expected = open_results(out, about)
    assert [row["file"] for (row,) in expected.values()] == [row["file"] for row in rows]
    path, rng = out / "results.csv", random.Random(0)
    whole = path.read_bytes()
    capsys.readouterr()
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 3, 30])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        for row in whole_rows(path):
            (there,) = expected[row["file"], "fbp", 18]
            assert all(row[name] == there[name] for name in COLUMNS)
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train", "test", "reconstruct"])
def test_a_damaged_description_is_named(name, go, tmp_path):
    (tmp_path / "out").mkdir()
    for content in (b"\xff\xfe", b"[1]", b"{", b"[" * 100_000, b'{"preset": 5, "data": {"a": 1}}'):
        (tmp_path / "out" / "run.json").write_bytes(content)
        assert str(tmp_path / "out") in go(name, tmp_path / "out", expect=1)


def test_folders_are_synchronized_after_a_rename(tmp_path, monkeypatch):
    seen, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: seen.append(os.fstat(number).st_ino) or sync(number))
    monkeypatch.setattr(os, "replace", lambda *paths: seen.append("renamed") or rename(*paths))
    with atomic(tmp_path / "a.txt") as partial:
        partial.write_text("a")
    assert seen == [(tmp_path / "a.txt").stat().st_ino, "renamed", tmp_path.stat().st_ino]
    with pytest.raises(Stopped, match="a.txt/b.txt cannot be written: Not a directory"), \
            atomic(tmp_path / "a.txt" / "b.txt") as partial:
        partial.write_text("b")


def test_without_git_the_commit_is_not_known(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == "unknown"


WINDOWS = """
import os, sys
import torch
sys.modules["resource"] = sys.modules["fcntl"] = None
del os.register_at_fork
import train, test, reconstruct, datasets.prepare, torch_radon
from utils.device import memory
assert memory("cpu") != memory("cpu")
"""


def test_modules_that_windows_does_not_have_are_not_needed():
    run("-c", WINDOWS)


def test_without_docstrings(command, tmp_path):
    run(*command("prepare", tmp_path / "out"), PYTHONOPTIMIZE="2")
    for name in ("train.py", "test.py", "reconstruct.py"):
        assert "usage: " in run(name, "--help", PYTHONOPTIMIZE="2")


def test_a_long_folder_for_temporary_files_and_a_plain_locale(command, tmp_path):
    folder = tmp_path / ("t" * 100)
    folder.mkdir()
    run(*command("prepare", tmp_path / "out"), TMPDIR=str(folder), LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="ascii")


def test_a_kernel_s_cache_may_be_damaged_or_missing(tmp_path, monkeypatch):
    (tmp_path / "kernels.py").write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    import kernels

    assert backend_cpu.jit(kernels.double)(2) == 4
    files = list(tmp_path.glob("__pycache__/*.nb[ic]"))
    assert len(files) == 2
    for path in files:
        for size in (0, 1, path.stat().st_size // 2):
            path.write_bytes(path.read_bytes()[:size])
            assert backend_cpu.jit(kernels.double)(3) == 6
            kernel = backend_cpu.jit(kernels.double)
            assert kernel(4) == 8 and kernel.stats.cache_hits, "written anew"

    def nowhere(*_):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(backend_cpu, "_Cache", nowhere)
    assert backend_cpu.jit(kernels.double)(5) == 10


def test_launchers_start_through_links_and_with_cdpath(tmp_path):
    (tmp_path / "link.sh").symlink_to(ROOT / "test.sh")
    (tmp_path / "project").symlink_to(ROOT)
    environment = {**os.environ, "PYTHON": sys.executable, "CDPATH": f"{tmp_path}:/"}
    for path in ("link.sh", "project/test.sh", "project/train.sh"):
        done = subprocess.run(["bash", path, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "usage: " in done.stdout, done.stderr


def test_without_a_terminal_lines_say_how_far_the_work_is(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 1)
    monkeypatch.setattr(Progress, "due", 0)
    with Progress(total=40, initial=10, desc="tiny", unit="img") as bar:
        for _ in range(6):
            bar.update(2)
            bar.set_postfix(loss="1e-2", refresh=False)
            time.sleep(0.6)  # a step takes its time
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 4
    assert all(line.startswith("tiny: ") and " of 40 img, " in line and line.endswith("left, loss=1e-2")
               for line in lines)
    Progress.due = time.monotonic() + 60
    for _ in Progress(range(3), desc="Soon done"):
        time.sleep(0.6)
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_that_an_import_turned_into_an_error_is_one_line_too(capsys):
    @script
    def interrupted(argv):
        raise SystemError("an extension was being imported") from KeyboardInterrupt()

    @script
    def wrong(argv):
        raise SystemError("a bug")

    with pytest.raises(SystemExit, match="130"):
        interrupted()
    assert capsys.readouterr().err.startswith("Stopped by Ctrl-C.")
    with pytest.raises(SystemError, match="a bug"):
        wrong()


@pytest.mark.skipif(os.name == "nt", reason="signals of a group")
@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_is_one_line(name, command, tmp_path):
    argv = [*command(name, tmp_path / "out"), *(["--images", "100000"] if name == "train" else [])]
    for i in range(2, 400):
        shutil.copy(tmp_path / "data" / "val_img" / "C_000.npy", tmp_path / "data" / "val_img" / f"C_{i:03d}.npy")
    process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, start_new_session=True,  # what runs in the background ignores Ctrl-C
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while process.poll() is None and not (tmp_path / "out").exists():
        time.sleep(0.02)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    try:
        said = process.communicate(timeout=60)[1].splitlines()
    finally:
        process.kill()
    said = [line for line in said if not line.startswith("torch_radon: ")]
    if process.returncode:  # else it had just finished
        assert process.returncode in (1, 130) and len(said) == 1 and said[0].startswith("Stopped by "), said
