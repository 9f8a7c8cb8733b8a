"""Disks that fill up or fail: every write, rename and synchronization of every program in turn.

It ends with a sentence, and the same command then gives what an undisturbed run gives. FAULTS=all tries every call;
otherwise a few of each kind are tried.
"""

import builtins
import errno
import hashlib
import io
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import body, make_dicom, write_slices

import reconstruct
import test as evaluation
import train
from datasets import prepare
from models.presets import Preset

EVERY = os.environ.get("FAULTS") == "all"
SAME = {"train": ("checkpoint.safetensors", "best.safetensors", "run.json"), "test": ("images/fbp_36views/A_000.npy",),
        "prepare": ("train_img/*", "report.csv", "prepare.json"), "reconstruct": ("volume.npy", "report.csv"),
        "dicom": ("report.csv",)}


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """{name: (main, command line without --out)}. The network is small: each of its tensors is a few writes."""
    network = Preset.network
    monkeypatch.setattr(Preset, "network", lambda preset: replace(network(preset), multipliers=(1,)))
    write_slices(tmp_path / "data" / "train_img", "AB", 2, 32)
    write_slices(tmp_path / "data" / "val_img", "C", 1, 32)
    (tmp_path / "scan").mkdir()
    for z in range(3):
        make_dicom(tmp_path / "scan" / f"{z}.dcm", InstanceNumber=z + 1, ImagePositionPatient=[0, 0, z],
                   pixels=(body(32, z) + 1024).astype(np.uint16))
    data, scan = str(tmp_path / "data"), str(tmp_path / "scan")
    rebuild = [scan, "--views", "18", "--method", "fbp", "--device", "cpu"]
    return {
        "train": (train.main, ["--data", data, "--preset", "tiny", "--images", "4", "--val-every", "4", "--dc", "0",
                               "--save-every", "2", "--precision", "fp32", "--device", "cpu", "--stem", "4",
                               "--val-slices", "1", "--width", "32", "--blocks", "1"]),
        "test": (evaluation.main, ["--data", f"{data}/train_img", "--views", "36", "--methods", "fbp", "--save-images",
                                   "--device", "cpu", "--batch", "2"]),
        "prepare": (prepare.main, [scan, "--size", "32", "--workers", "1", "--split", "1", "0", "0"]),
        "reconstruct": (reconstruct.main, [*rebuild, "--format", "npy"]), "dicom": (reconstruct.main, rebuild)}


class Disk:
    """Counts what goes to the disk, and fails once, at the call of number `at`.

    A write is one of the system's: what a program writes is collected in a buffer first, as in every open file.
    """

    def __init__(self, monkeypatch, out, at=None, error=errno.ENOSPC):
        self.calls, self.at, self.error, self.out = [], at, error, str(out)
        opener = builtins.open

        def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **options):
            if not (set(mode) & set("wax") and self.ours(file)):
                return opener(file, mode, buffering, encoding, errors, newline, **options)
            raw = io.FileIO(file, re.sub("[bt+]", "", mode) + "+")
            raw.write = self.failing("write", raw.write)
            buffered = io.BufferedRandom(raw)  # NumPy writes to other kinds behind Python's back
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr(os, "fsync", self.failing("fsync", os.fsync))
        replace, failing = os.replace, self.failing("replace", os.replace)  # Numba's cache is none of ours
        monkeypatch.setattr(os, "replace", lambda old, new: (failing if self.ours(new) else replace)(old, new))

    def ours(self, file):
        return not isinstance(file, int) and os.fsdecode(file).startswith(self.out)

    def failing(self, name, function):
        def call(*args):
            self.calls.append(name)
            if len(self.calls) == self.at:
                raise OSError(self.error, os.strerror(self.error))
            return function(*args)
        return call


def content(out, patterns):
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for pattern in patterns for path in sorted(out.glob(pattern))}


@pytest.mark.parametrize("name", list(SAME))
def test_a_disk_that_fails_ends_a_run_with_a_sentence_and_the_next_one_completes_it(name, programs, tmp_path, capsys):
    main, command = programs[name]

    def go(out, **fault):
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, out, **fault)
            try:
                status = main([*command, "--out", str(out)]) or 0
            except SystemExit as stop:
                status = stop.code
        return status, disk.calls, capsys.readouterr().err.strip().splitlines()

    whole = tmp_path / "whole"
    status, calls, _ = go(whole)
    expected = content(whole, SAME[name])
    assert status == 0 and expected and {"fsync", "replace", "write"} <= set(calls)
    numbers = range(1, len(calls) + 1)
    for at in numbers if EVERY else sorted({int(i) for i in np.linspace(1, len(calls), 6)}):
        for error in (errno.ENOSPC, errno.EIO) if EVERY else (errno.EIO,):
            out = tmp_path / "out"
            status, _, said = go(out, at=at, error=error)
            where = f"{name}: {calls[at - 1]} {at} of {len(calls)}"
            assert status == 1 and said[-1].startswith("Stopped: "), f"{where}: {said}"
            status, *_ = go(out)
            assert status == 0 and content(out, SAME[name]) == expected, where
            assert not list(out.rglob(".*")), where
            shutil.rmtree(out)
