"""Statistics of an evaluation: means with bootstrap intervals, and paired comparisons of methods."""

from itertools import combinations, product

import numpy as np
from scipy.stats import wilcoxon

from utils.metrics import METRICS
from utils.units import number


def interval(values: np.ndarray, groups: list, seed: int = 0, draws: int = 2000) -> list[float] | None:
    """95 % percentile bootstrap interval of the mean of `values` (N,), drawing whole groups with replacement.

    groups: the group of each value: its slice, or its patient, since slices of one patient are alike. None for one or
    two groups, whose spread says nothing about others.
    """
    _, index = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    if len(sums) < 3:
        return None
    drawn = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
    return np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975]).tolist()


def holm(p: list[float]) -> list[float]:
    """Holm's step-down adjustment: the p-values at which each hypothesis falls, all errors together kept at 5 %."""
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate([(len(p) - i) * p[j] for i, j in enumerate(order)])
    return adjusted.clip(max=1).tolist()


def summarize(done: dict[tuple, list[dict]], patients: list[str], methods, views, seed: int = 0) -> list[dict]:
    """A row for each method, view count and window: means over slices, spread and intervals.

    done: result rows, one a window, by (file, method, views), the files in the order of `patients`; what it does not
    have is left out. A metric that is NaN for some slices is that of the others, and `<metric>_slices` says how many
    these are. `psnr_patients`: means of each patient, where there are several.
    """
    summary = []
    for n, method in product(views, methods):
        slices = [rows for (_, m, v), rows in done.items() if (m, v) == (method, n)]
        for rows in zip(*slices, strict=True):  # one window
            value = {k: np.array([float(row[k] or "nan") for row in rows])
                     for k in (*METRICS, "nfe", "seconds_per_slice", "peak_gib")}
            there = {k: ~np.isnan(v) for k, v in value.items()}
            mean = {k: float(v[there[k]].mean()) if there[k].any() else None for k, v in value.items()}
            peak = float(value["peak_gib"].max()) if mean.pop("peak_gib") is not None else None
            found = {"method": method, "views": n, "window": [number(rows[0][k]) for k in ("width", "centre")], **mean,
                     "peak_gib": peak, "slices": len(rows), "patients": len(set(patients))}
            for k in METRICS:
                if mean[k] is not None:
                    kept, owners = value[k][there[k]], np.array(patients)[there[k]]
                    found |= {} if len(kept) == len(rows) else {f"{k}_slices": len(kept)}
                    found[f"{k}_std"] = float(kept.std(ddof=1)) if len(kept) > 1 else None
                    found[f"{k}_ci_slices"] = interval(kept, range(len(kept)), seed)
                    found[f"{k}_ci_patients"] = interval(kept, owners, seed)
            if found["patients"] > 1:
                psnr, owners = value["psnr"], np.array(patients)
                each = {owner: psnr[(owners == owner) & there["psnr"]] for owner in dict.fromkeys(patients)}
                found["psnr_patients"] = {owner: float(v.mean()) if len(v) else None for owner, v in each.items()}
            summary.append(found)
    return summary


def compare(done: dict[tuple, list[dict]], methods, views) -> list[dict]:
    """Every pair of methods at every view count: mean difference of PSNR in the first window, and Wilcoxon's
    signed-rank test over slices, two-sided, Holm-adjusted over all rows."""
    rows = []
    there = {(m, v) for _, m, v in done}
    for n, (a, b) in product(views, combinations(methods, 2)):
        if not {(a, n), (b, n)} <= there:
            continue
        scores = [np.array([float(r[0]["psnr"]) for (_, k, v), r in done.items() if (k, v) == (m, n)]) for m in (a, b)]
        difference = scores[0] - scores[1]
        difference = difference[~np.isnan(difference)]
        if not len(difference):
            continue
        p = float(wilcoxon(difference).pvalue) if difference.any() else 1.0
        rows.append({"views": n, "method": a, "against": b, "psnr_difference": float(difference.mean()),
                     "slices": len(difference), "p_wilcoxon": p})
    for row, p in zip(rows, holm([row["p_wilcoxon"] for row in rows]), strict=True):
        row["p_holm"] = p
    return rows
