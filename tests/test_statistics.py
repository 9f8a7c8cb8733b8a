"""Bootstrap intervals, Holm's adjustment, paired comparisons, summaries."""

import numpy as np
import pytest

from utils.results import table as written
from utils.statistics import compare, holm, interval, summarize


def test_the_interval_of_independent_slices_is_the_normal_one():
    values = np.random.default_rng(0).normal(30, 2, 400)
    low, high = interval(values, range(400))
    half = 1.96 * values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert interval(values, range(400)) == [low, high] != interval(values, range(400), seed=1)


def test_slices_of_one_patient_count_as_one_witness():
    each = np.random.default_rng(0).normal(30, 2, 40)
    values, patients = np.repeat(each, 25), np.repeat(np.arange(40), 25)
    width = np.diff(interval(values, patients)).item()
    assert width == pytest.approx(2 * 1.96 * each.std(ddof=1) / 40**0.5, rel=0.1)
    assert width > 4 * np.diff(interval(values, range(1000))).item()
    assert interval(values, ["one"] * 1000) is None


def test_patients_weigh_by_their_slices():
    low, high = interval(np.array([0.0] * 961 + [1.0] * 39), ["big"] * 961 + [f"small{i}" for i in range(39)])
    assert low < 0.05 and high == 1.0, "the mean goes over slices; a third of the draws miss the big patient"


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def rows(psnr, **more):
    return [{"width": w, "centre": c, "psnr": psnr + i, "ssim": 0.9, "rmse_hu": 10, "vif": "" if i else 0.5, "nfe": 3,
             "seconds_per_slice": 1, "peak_gib": 2, **more}
            for i, (w, c) in enumerate([("3000", "500"), ("500.5", "50")])]


def table():
    psnr = {("a", 18): [30, 31, 33, 32, 35, 30], ("b", 18): [29, 29.5, 32.4, 30, 34, 28], ("c", 18): [30.0] * 6}
    return {(f"f{i}", m, n): rows(v) for (m, n), values in psnr.items() for i, v in enumerate(values)}


def test_what_is_not_a_number_for_one_slice_does_not_blank_the_others():
    done = {(f"f{i}", "a", 18): rows(30 + i, vif=vif) for i, vif in enumerate(["0.5", "nan", "0.7", "nan"])}
    first, second = summarize(done, ["A", "A", "B", "C"], ["a"], [18])
    assert first["vif"] == pytest.approx(0.6) and first["vif_slices"] == 2 and first["psnr"] == 31.5
    assert first["vif_ci_patients"] == interval(np.array([0.5, 0.7]), ["A", "B"]) and "psnr_slices" not in first
    nothing = {key: rows(30, vif="nan", peak_gib="nan") for key in done}
    (first, _) = summarize(nothing, ["A", "A", "B", "C"], ["a"], [18])
    assert first["vif"] is None and first["peak_gib"] is None and "vif_std" not in first
    both = {("f0", m, 18): rows(30) for m in "ab"} | {("f1", "a", 18): rows(30), ("f1", "b", 18): rows(float("nan"))}
    (row,) = compare(both, ["a", "b"], [18])
    assert row["slices"] == 1 and row["psnr_difference"] == 0


def test_compare_pairs_methods_by_slice():
    found = compare(table(), ["a", "b", "c"], [18])
    assert [(r["method"], r["against"]) for r in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found[0]["psnr_difference"] == pytest.approx(8.1 / 6)
    assert found[0]["p_wilcoxon"] == pytest.approx(2 / 2**6), "six differences of one sign, two-sided, exact"
    assert found[0]["p_holm"] == pytest.approx(3 * 2 / 2**6)
    alone = {key: value for key, value in table().items() if key[0] == "f0"}  # where c equals a
    assert [row["p_wilcoxon"] for row in compare(alone, ["a", "b", "c"], [18])] == [1.0, 1.0, 1.0]


def test_summarize():
    found = summarize(table(), ["P", "P", "Q", "Q", "R", "R"], ["a", "b", "c"], [18])
    assert [(r["method"], r["window"]) for r in found] == [(m, w) for m in "abc" for w in ([3000, 500], [500.5, 50])]
    assert found[0]["psnr"] == pytest.approx(191 / 6) and found[1]["psnr"] == pytest.approx(191 / 6 + 1)
    assert found[0]["psnr_std"] == pytest.approx(np.std([30, 31, 33, 32, 35, 30], ddof=1))
    assert found[0]["psnr_ci_slices"][0] < 191 / 6 < found[0]["psnr_ci_slices"][1] and found[0]["patients"] == 3
    assert found[0]["vif"] == 0.5 and found[1]["vif"] is None and "vif_std" not in found[1]
    alone = summarize({k: v for k, v in table().items() if k[0] == "f0"}, ["P"], ["a"], [18])[0]
    assert alone["psnr_std"] is None and alone["psnr_ci_slices"] is None and alone["slices"] == 1


def test_tables_have_numbers_by_patient():
    """Of several; with intervals over patients from three on, and the range of many."""
    done = {(f"f{i}", "a", 18): rows(30 + i) for i in range(12)}

    def lines(patients):
        summary = summarize(dict(list(done.items())[: len(patients)]), list(patients), ["a"], [18])
        return [line for line in written(summary, []).splitlines() if line.startswith("| ")]

    one = lines("PPP")
    assert len(one) == 4 and "PSNR dB [95 %]" in one[0] and "| 31.00 [30" in one[1]
    two = lines("PPQQ")
    assert two[-2:] == ["| views | method | P | Q |", "| 18 | a | 30.50 | 32.50 |"] and "[" not in "".join(two)
    assert "[" not in "".join(lines("PP")), "two slices"
    assert "PSNR dB [95 % over patients]" in lines("PPQQR")[0]
    assert lines("ABCDEFGHIJKL")[-2:] == ["| views | method | lowest patient | median | highest |",
                                          "| 18 | a | 30.00 | 35.50 | 41.00 |"]
