"""The figures of an evaluation, into the folder of test.py."""

from fig.figures import comparison, curves
from models.methods import LABELS
from utils.metrics import score
from utils.progress import Progress


def draw(args, reconstructor, noise, x0, name: str, summary) -> None:
    """A comparison and the error along the chain at each level for one slice; curves of the means over all slices."""
    for n in Progress(args.views, desc="Drawing", unit="figure"):
        if (args.out / f"comparison_{n}views.png").is_file():
            continue
        (solver, y), images, chains = noise.measure(reconstructor, x0, [name], n), {}, {}
        for method in args.methods:
            errors = []

            def watch(slices, n_t, x0_hat, errors=errors):
                errors.append((len(errors) + 1, score(x0_hat, x0, *args.windows[0])["psnr"].item()))

            images[LABELS[method]], _ = solver.run(
                method, y, x0.shape[-1], photons=noise.photons, electronic=noise.electronic, callback=watch,
                **args.options.get(method, {}))
            if len(errors) > 1:
                chains[LABELS[method]] = errors
        if chains:
            curves(args.out / f"chain_{n}views.png", chains, "network call", f"{name}, {n} views")
        comparison(args.out / f"comparison_{n}views.png", x0, images, f"{name}, {n} views")
    headline = [row for row in summary if row["window"] == list(args.windows[0])]
    if len(args.views) > 1:
        by_method = {LABELS[m]: sorted((r["views"], r["psnr"]) for r in headline if r["method"] == m)
                     for m in args.methods}
        curves(args.out / "psnr_views.png", by_method, "views", "mean over slices", log=True)
    by_calls = {f"{n} views": sorted((r["nfe"], r["psnr"]) for r in headline if r["views"] == n) for n in args.views}
    curves(args.out / "psnr_calls.png", by_calls, "network calls a slice",
                   ", ".join(LABELS[m] for m in args.methods), joined=False)
