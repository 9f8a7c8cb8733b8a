"""The figures of an evaluation, into the folder of test.py: one slice reconstructed, curves of means over all."""

import json
from pathlib import Path

import numpy as np

from fig.figures import Figure, comparison, draw_curves, draw_points, draw_together, is_drawn, one_axis, psnr_in, said
from models.methods import LABELS
from utils.files import hash16
from utils.metrics import score
from utils.progress import Progress
from utils.units import mu_to_hu


def draw(args, reconstructor, noise, x0, name: str, summary: list[dict]) -> None:
    """Draw what is not drawn yet.

    args: of test.py. x0: the slice `name` of the figures, (1, 1, H, H) in mu. summary: rows of all that OUT holds.
    """
    groups, asked = [of_means(args, summary)], [args.methods, name, args.roi, args.display_window]
    key = hash16(json.dumps(asked))  # the rest is the same for all that OUT holds
    for n in Progress(args.views, desc=f"Figures of {name}", unit="view count"):
        path = args.out / f"comparison_{n}views.png"
        if not is_drawn(path, key):
            groups.append(of_slice(args, reconstructor, noise, x0, name, n, path, key))
    draw_together(groups)


def of_means(args, summary: list[dict]) -> list[Figure]:
    """Figures of means over all slices."""
    rows = [row for row in summary if row["window"] == list(args.windows[0])]
    label, title, key = psnr_in(args.windows[0]), f"mean over {rows[0]['slices']} slices", hash16(repr(rows))
    points = [(f"{r['views']} views", LABELS[r["method"]], r["nfe"], r["psnr"]) for r in rows]
    figures = [Figure(args.out / "psnr_calls.png", key, one_axis,
                      (draw_points, title, points, "network calls a slice", label))]
    if len({row["views"] for row in rows}) > 1:
        series = {LABELS[m]: sorted((r["views"], r["psnr"]) for r in rows if r["method"] == m)
                  for m in dict.fromkeys(row["method"] for row in rows)}
        figures.append(Figure(args.out / "psnr_views.png", key, one_axis,
                              (draw_curves, title, series, "views", label), {"xscale": "log"}))
    return figures


def of_slice(args, reconstructor, noise, x0, name: str, n: int, path: Path, key: str) -> list[Figure]:
    """Figures of one slice at n views, the comparison for `path` last."""
    images, chains = reconstruct(args, reconstructor, noise, x0, name, n)
    name, label = name.removesuffix(".npy"), psnr_in(args.windows[0])
    about = [name, f"{n} views", f"Display: {said(args.display_window)}", f"PSNR: {said(args.windows[0])}"]
    chain = Figure(path.with_name(f"chain_{n}views.png"), key, one_axis,
                   (draw_curves, f"{name}, {n} views", chains, "network call", label))
    return [*[chain] * bool(chains),
            Figure(path, key, comparison, (hounsfield(x0), images, about, args.display_window, args.roi))]


def reconstruct(args, reconstructor, noise, x0, name: str, n: int) -> tuple[dict, dict]:
    """({heading: HU (H, H)}, {label: (call, dB) along the chain}) of one slice at n views."""
    (reconstructor, y), images, chains = noise.measure(reconstructor, x0, [name], n), {}, {}

    def psnr(x0_hat):
        return score(x0_hat, x0, *args.windows[0])["psnr"].item()

    for method in args.methods:
        errors = []
        x0_hat, _ = reconstructor.run(
            method, y, x0.shape[-1], photons=noise.photons, electronic=noise.electronic,
            callback=lambda slices, n_t, x0_hat, errors=errors: errors.append((len(errors) + 1, psnr(x0_hat))),
            **args.options.get(method, {}))
        images[f"{LABELS[method]}\n{psnr(x0_hat):.1f} dB"] = hounsfield(x0_hat)
        if len(errors) > 1:
            chains[LABELS[method]] = errors
    return images, chains


def hounsfield(x) -> np.ndarray:
    """Mu (1, 1, H, H) -> HU (H, H)."""
    return mu_to_hu(x[0, 0]).cpu().numpy()
