"""Archives: processes that die or hang, series that are found, patients that files do not tell."""

import multiprocessing
import os
import random
import threading
import time

import numpy as np
import pytest
from conftest import make_dicom, make_series

from datasets.archive import find_series, parallel, time_limit
from datasets.privacy import pseudonymizer
from datasets.series import LeftOut, Refused, Slice, refuse_on_error
from datasets.slices import evenly_spaced, patients_of
from utils.errors import InputError

DEADLY = set(random.Random(0).sample(range(300), 7))


def _die(number):
    if number in DEADLY:
        os._exit(11) if number % 2 else os.kill(os.getpid(), 11)
    return number


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_process_that_dies_costs_its_own_task_only(workers):
    files = len(os.listdir("/proc/self/fd"))
    assert parallel(_die, list(range(300)), workers, "dying") == [None if i in DEADLY else i for i in range(300)]
    assert not multiprocessing.active_children() and len(os.listdir("/proc/self/fd")) <= files + 2  # the fork server


def _die_soon(task):
    number, _ = task
    if number % 40 == 7:
        threading.Timer(0.02, os._exit, [11]).start()  # in a later task, or between two
    return number


def test_processes_that_die_at_any_moment_stop_nothing():
    tasks = [(i, bytes(100_000)) for i in range(300)]  # more than a pipe holds
    results = parallel(_die_soon, tasks, 2, "dying soon")
    assert len(results) == 300 and all(found in (i, None) for i, found in enumerate(results))
    assert results.count(None) <= 8


def _fail(number):
    if number == 50:
        raise OSError(28, "No space left on device")
    return number


def test_what_a_process_raises_is_raised():
    with pytest.raises(OSError, match="No space left on device"):
        parallel(_fail, list(range(100)), 2, "failing")
    assert not multiprocessing.active_children()


def _hang(number):
    with time_limit(1):
        while number == 3:
            time.sleep(60)
    return number


@pytest.mark.parametrize("count, workers", [(5, 1), (100, 2)])
def test_a_process_that_hangs_costs_its_own_task_only(count, workers):
    start = time.monotonic()
    assert parallel(_hang, list(range(count)), workers, "hanging") == [None if i == 3 else i for i in range(count)]
    assert time.monotonic() - start < 50


def test_no_tasks_give_no_results():
    assert parallel(_hang, [], 2, "nothing") == []


def test_any_error_of_a_reader_is_a_reason_that_quotes_nothing():
    @refuse_on_error("cannot be read")
    def read(error):
        raise error

    for _ in range(2):  # a decorator serves more than one call
        with pytest.raises(Refused, match=r"^cannot be read \(KeyError\)$") as refusal:
            read(KeyError("Topsecret^Jane"))
        assert isinstance(refusal.value, InputError) and refusal.value.status == 1
    with pytest.raises(LeftOut, match="^is a localiser$"):
        read(LeftOut("is a localiser"))


def test_one_series_is_found_or_the_choice_is_told(tmp_path):
    make_series(tmp_path / "in/a", 3)
    make_series(tmp_path / "in/b", 2, SeriesInstanceUID="1.9")
    (tmp_path / "in/b/notes.txt").write_text("not an image")
    with pytest.raises(InputError, match="2 series .1: 3 slices of in/a, 2: 2 slices of in/b.; choose one by --series"):
        find_series(tmp_path / "in", tmp_path / "out")
    slices, names, problems = find_series(tmp_path / "in", tmp_path / "out", 2)
    assert [one.position for one in slices] == [0, 2.5] and names == ["in/b/0.dcm", "in/b/1.dcm"]
    assert [(name, status) for name, status, _ in problems] == [("in/b/notes.txt", "refused")]
    with pytest.raises(InputError, match="holds no slices that can be used .*notes.txt is not an image"):
        find_series(tmp_path / "in/b/notes.txt", tmp_path / "out")


def test_names_of_patients_are_hidden_and_nothing_else(tmp_path):
    make_dicom(tmp_path / "Jane/SECRET-ID/1.dcm")
    _, (name,), _ = find_series(tmp_path / "Jane", tmp_path / "out")
    assert name.startswith("patient-") and "Jane" not in name and "SECRET" not in name and name.endswith("/1.dcm")
    slices = [Slice("x", patient="P", names=("Jane", "Doe"))]
    assert pseudonymizer(slices, keep=False)("Doering/jane.dcm").startswith("Doering/patient-")
    assert pseudonymizer(slices, keep=True)("Jane/Doe") == "Jane/Doe"


def test_a_manifest_tells_patients_or_says_what_it_lacks(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((8, 8)))
    (tmp_path / "manifest.csv").write_text("file,patient,spacing_mm,position\na.npy,Zoë,0.8,12.5\n", encoding="utf-8")
    assert patients_of([tmp_path / "a.npy"]) == ["Zoë"]
    (one,), _, _ = find_series(tmp_path, tmp_path / "out")
    assert (one.patient, one.spacing, one.position) == ("Zoë", 0.8, 12.5)
    (tmp_path / "manifest.csv").write_text("name,who\na.npy,Z\n")
    with pytest.raises(InputError, match="has the columns name, who; expected file and patient"):
        patients_of([tmp_path / "a.npy"])


def test_evenly_spaced_indices():
    assert evenly_spaced(5, 3) == [0, 2, 4] and evenly_spaced(3, 9) == evenly_spaced(3, None) == [0, 1, 2]
