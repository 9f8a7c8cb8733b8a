"""Every command of README.md and docs/: the short ones are run, the long ones parsed, nothing else is written there."""

import importlib
import json
import re
import shlex
import shutil

import h5py
import numpy as np
import pytest
from conftest import ROOT, make_dicom, make_series
from scipy.io import savemat
from test_scanner import FAN, PARALLEL, line_integrals

from models.checkpoint import save_checkpoint, save_published
from models.scanner import make_scanner
from models.unet import UNet, UNetConfig
from utils import cli
from utils.units import mu_to_hu

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLLOWED = ROOT / "docs" / "change-it.md"  # by tests/test_change_it.py
BLOCK = re.compile(r"(?:^    .+\n)+", re.M)
LAUNCHER = re.compile(r"(?:torchrun --nproc-per-node \d+ |python )(?:-m )?(?=\S+)")
# Not a line of Python of ours.
OTHER = ("bash test.sh", "bash train.sh", ". .venv/bin/activate", "pip install astra-toolbox",
         "pip install --require-hashes -r requirements.lock",
         "pip install --no-deps --no-build-isolation ./torch-radon_fix")
# Minutes to hours, many slices or a download: their flags are checked.
LONG = (r"train.py --preset (tiny|real|paper|base)(?!.*--dry-run)", r"benchmarks\.\w+", r"fig.framework",
        r"models.train_trust",
        r"test.py .*(--limit (5|8|16)|cvg-diff)", r"test.py --data DATA --out results/test",
        r"datasets.rebin", r"(test.py --data|reconstruct.py) (FAN|PROJECTIONS)")


def commands() -> list[str]:
    """Without those that a block shows as history: it begins with a comment that names the commit."""
    found = {}
    for page in set(PAGES) - {FOLLOWED}:
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            lines = [line.strip() for line in block.splitlines()]
            if lines[0].split()[0] in ("python", "torchrun", "bash", "pip", "."):
                found |= dict.fromkeys(lines)
    return sorted(line for line in found if line not in OTHER)


def is_long(command: str) -> bool:
    return any(re.match(LAUNCHER.pattern + pattern, command) for pattern in LONG)


def script_and_argv(command: str):
    """(its module, its arguments); several processes are run as one."""
    name, *argv = shlex.split(LAUNCHER.sub("", command, count=1))
    return importlib.import_module(name.removesuffix(".py")), argv


@pytest.mark.parametrize("command", [c for c in commands() if is_long(c)])
def test_a_long_command_has_flags_that_exist(command, monkeypatch):
    parse = cli.Parser.parse_args

    def stop(parser, argv=None):
        parse(parser, argv)
        raise SystemExit(0)

    script, argv = script_and_argv(command)
    monkeypatch.setattr(cli.Parser, "parse_args", stop)
    with pytest.raises(SystemExit) as stopped:
        script.main(argv)
    assert stopped.value.code == 0


def measured_files(folder, fan):
    """Scans of docs/scans.md: scan.h5 and other.h5 of a beamline, with beamline.json, and scan.mat with fan.json."""
    parallel = PARALLEL | {"angles": {"start": 0, "step": 4, "count": 45}, "detector_count": 160,
                           "detector_pitch_mm": 3.2, "size": 32}
    counts = np.exp(-line_integrals(make_scanner(parallel)))[:, None] * 5000
    angles = np.arange(0, 180, 4.0)
    for name, data, white, black, theta in (
            ("scan.h5", *(f"exchange/{key}" for key in ("data", "data_white", "data_dark", "theta"))),
            ("other.h5", "raw/images", "raw/white", "raw/black", "raw/angle")):
        with h5py.File(folder / name, "w") as file:
            file[data], file[white], file[black] = counts, np.full((2, 1, 160), 5000.0), np.zeros((2, 1, 160))
            file[theta] = angles
    told = {key: parallel[key] for key in ("beam", "detector_pitch_mm", "field_of_view_mm", "size")}
    (folder / "beamline.json").write_text(json.dumps(told))
    savemat(folder / "scan.mat", {"CtData": {"sinogram": line_integrals(make_scanner(fan)),
                                             "angles": np.radians(np.arange(0, 360, 5.0))}})
    in_cm = {key.removesuffix("_mm"): value / 10 if key.endswith("_mm") else value for key, value in fan.items()
             if key not in ("angles", "detector_count")}
    (folder / "fan.json").write_text(json.dumps(in_cm | {"length_unit": "cm", "angle_unit": "radian"}))


@pytest.fixture
def places(data, tmp_path, monkeypatch):
    """What the words in capitals and the paths of the pages stand for."""
    for patient in "ABC":
        make_series(tmp_path / "series" / patient, 2, PatientID=patient, SeriesInstanceUID=f"1.{ord(patient)}", side=32)
    shutil.copytree(tmp_path / "series" / "A", tmp_path / "one")
    for patient in ("L067", "L333", "L506"):
        make_dicom(tmp_path / f"aapm/{patient}/full_1mm/{patient}_FD_1_1.CT.0000.IMA", PatientID="x",
                   SeriesInstanceUID=f"1.{patient[1:].lstrip('0')}")
    fields = FAN | {"angles": {"start": 0, "step": 5, "count": 72}, "size": 32}
    np.save(tmp_path / "scan.npy", line_integrals(make_scanner(fields)))
    (tmp_path / "scanner.json").write_text(json.dumps(fields))
    measured_files(tmp_path, fields)
    plain = UNet(UNetConfig(width=32))
    save_published(tmp_path / "in.pkl", plain)
    save_checkpoint(tmp_path / "paper.safetensors", plain.state_dict(), plain.config, {})
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"images": 10, "loss/restore": 1.0}\n{"images": 20, "loss/restore": 0.5}\n')
    results = tmp_path / "results"
    results.mkdir()
    (results / "summary.json").write_text(json.dumps([
        {"method": "fbp", "views": n, "window": [3000, 500], "psnr": n, "nfe": 0} for n in (18, 36)]))
    monkeypatch.chdir(ROOT)
    return {"SERIES": tmp_path / "one", "INPUT...": tmp_path / "series", "AAPM": tmp_path / "aapm",
            **{name: tmp_path / name for name in ("scan.h5", "other.h5", "scan.mat", "beamline.json", "fan.json")},
            "scan.npy": tmp_path / "scan.npy", "scanner.json": tmp_path / "scanner.json", "IN.pkl": tmp_path / "in.pkl",
            "OUT.safetensors": tmp_path / "out.safetensors", "OUT.pkl": tmp_path / "out.pkl", "runs/mine": run,
            "results/test": results, "runs/mine/checkpoint.safetensors": ROOT / "models" / "tiny.safetensors",
            "sheet.png": tmp_path / "sheet.png",
            "runs/paper/checkpoint.safetensors": tmp_path / "paper.safetensors"}


@pytest.mark.parametrize("command", [c for c in commands() if not is_long(c)])
def test_a_short_command_works(command, places, data, tmp_path, call):
    script, argv = script_and_argv(command)
    makes_data = script.__name__.startswith("datasets.pre")
    places |= {"DATA": tmp_path / "made" if makes_data else data, "OUT": tmp_path / "out"}
    if script.__name__.startswith("fig."):
        places |= {"OUT": places["runs/mine"] if "plot_run" in command else places["results/test"]}
    argv = [places.get(word, word) for word in argv]
    if "quantitative" in command:
        argv += ["--out", tmp_path / "figure.png"]
    if script.__name__ == "test":
        argv += ["--limit", 1]
    if script.__name__ == "reconstruct" and "--size" not in argv and "scanner.json" not in command:
        argv += ["--size", 32]
    before = {path for path in ROOT.iterdir()}
    assert call(script.main, *argv)
    assert {path for path in ROOT.iterdir()} == before


def test_the_readme_in_python():
    """Its block, with a test of what it gives."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.S)
    names = {}
    exec(block.replace('"datasets/', f'"{ROOT}/datasets/'), names)
    assert names["x0_hat"].shape == (1, 1, 256, 256) and 4 <= names["calls"][0] <= 11
    error = mu_to_hu(names["x0_hat"][0, 0]).numpy() - names["hu"]
    assert np.sqrt((error**2).mean()) < 60, "HU; half of it is what 720 views would leave too"


def test_every_link_leads_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
