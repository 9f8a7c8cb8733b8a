"""Figures: what they show, that no letters touch, where they go; the README's from their commands."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, body
from PIL import Image

import test as evaluation
from fig import figures, framework, plot_run, quantitative
from fig.figures import Figure
from fig.latex import escape, latex

NAMES = ["FBP", "FBP (FDK weights)", "SIRT", "TV", "One step", "Cold diffusion", "Sequential", "ReCo", "SPDPS"]
LABEL = "PSNR (W 3000 L 500 HU), dB"


def letters(figure) -> list[tuple[str, object]]:
    """(text, its box in pixels) of everything written on a figure."""
    figure.canvas.draw()
    found = list(figure.findobj(lambda artist: artist in figure.texts))
    for axis in figure.axes:
        found += [*axis.texts, axis.title]
        found += axis.get_legend().get_texts() if axis.get_legend() else []
        for line, limits in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())) if axis.axison else ():
            ticks = [tick for tick in line.get_major_ticks() if min(limits) <= tick.get_loc() <= max(limits)]
            found += [line.label, *(label for tick in ticks for label in (tick.label1, tick.label2))]
    return [(text.get_text(), text.get_window_extent()) for text in found if text.get_visible() and text.get_text()]


def assert_legible(figure):
    """Every letter is on the figure, none is on another, the names of curves are beside the curves, none is tiny."""
    found = letters(figure)
    for text, box in found:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, text
    for (a, one), (b, other) in itertools.combinations(found, 2):
        wide, high = min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0)
        assert wide < 1 or high < 1, f"{a!r} touches {b!r}"
    for axis in figure.axes:
        if axis.get_legend():
            assert axis.get_legend().get_window_extent().y0 >= axis.bbox.y1
    assert all(text.get_fontsize() >= 6 for text in figure.findobj(figures.plt.Text) if text.get_text())


@pytest.mark.parametrize(("count", "roi", "wide"), [(1, None, 3.5), (2, (4, 6, 40, 9), 3.5), (4, (0, 0, 9, 64), 7),
                                                    (6, None, 7), (9, None, 9.68)])
def test_a_comparison_names_window_and_units(count, roi, wide):
    truth = body(64, 1).astype(np.float32)
    images = {f"{name}\n{20 + i}.5 dB": truth + i for i, name in enumerate(NAMES[:count])}
    about = ["LIDC-IDRI-0001_074", "18 views", f"Display: {figures.said((400, -50))}"]
    figure = figures.comparison(truth, images, about, (400, -50), roi)
    assert figure.get_figwidth() == pytest.approx(wide, abs=0.01)
    assert_legible(figure)
    texts = [text for text, _ in letters(figure)]
    assert {"Truth\n720 views", "HU", "error, HU", "150", "\N{MINUS SIGN}50", *images} <= set(texts)
    assert "Display: W 400 L \N{MINUS SIGN}50 HU" in " ".join(texts).replace("\n", " ").replace("\xa0", " ")
    shown = [image for axis in figure.axes for image in axis.images if image.get_cmap().name == "gray"]
    assert len(shown) == 2 * (count + 1) and {image.get_clim() for image in shown} == {(-250, 150)}
    x, y, w, h = roi or figures.detail(truth.clip(-250, 150))
    enlarged = [image for image in shown if image.get_array().shape == (h, w)]
    np.testing.assert_array_equal(enlarged[0].get_array(), truth[y:y + h, x:x + w])
    figures.plt.close(figure)


def test_the_detail_is_where_the_image_varies_most():
    image = np.zeros((64, 64))
    image[40:48, 8:16] = 1000 * np.indices((8, 8)).sum(0)
    x, y, w, h = figures.detail(image)
    assert (w, h) == (16, 16) and x <= 8 and x + w >= 16 and y <= 40 and y + h >= 48
    assert figures.detail(np.zeros((4, 4))) == (0, 0, 4, 4)


@pytest.mark.parametrize("views", [(18,), (18, 36, 72), (18, 20, 24, 36, 54, 72, 126, 180, 360, 361)])
def test_curves_and_points_are_named_beside_the_data(views):
    series = {name: [(n, 20 + i + n / 18) for n in views] for i, name in enumerate(NAMES)}
    points = [(f"{n} views", name, i, 20 + i + n / 18) for i, name in enumerate(NAMES) for n in views]
    for draw, what, options in ((figures.draw_curves, series, {"xscale": "log"}), (figures.draw_points, points, {})):
        figure = figures.one_axis(draw, "mean over 8 slices", what, "views", LABEL, **options)
        assert_legible(figure)
        legend = figure.axes[0].get_legend()
        names = [text.get_text() for text in legend.get_texts()]
        assert names == (NAMES if draw is figures.draw_curves else [*(f"{n} views" for n in views), *NAMES])
        looks = [(str(line.get_color()), line.get_marker(), line.get_linestyle()) for line in legend.get_lines()]
        assert len(set(looks)) == len(names), "no two look alike"
        figures.plt.close(figure)


def test_a_figure_is_a_pdf_and_a_png_of_300_dpi_and_knows_what_it_was_drawn_for(tmp_path):
    def write(name, key):
        figure = figures.one_axis(figures.draw_curves, "t", {"a": [(1, 2), (3, 4)]}, "x", "y")
        return figures.write(figure, tmp_path / name, key)

    pdf, png = write("v1.2.png", "key")
    assert (pdf.name, png.name) == ("v1.2.pdf", "v1.2.png") and sorted(tmp_path.iterdir()) == [pdf, png]
    assert pdf.read_bytes()[:4] == b"%PDF" and b"/Type3" not in pdf.read_bytes()
    assert Image.open(png).info["dpi"] == pytest.approx((300, 300), abs=0.1)
    assert Image.open(png).width == pytest.approx(3.5 * 300, abs=1)
    assert figures.is_drawn(png, "key") and not figures.is_drawn(png, "other")
    before = pdf.read_bytes(), png.read_bytes()
    write("v1.2.pdf", "key")
    assert (pdf.read_bytes(), png.read_bytes()) == before, "the same figure is the same bytes"
    png.write_bytes(b"half")
    assert not figures.is_drawn(png, "key") and not figures.is_drawn(tmp_path / "none.png", "key")


@pytest.fixture
def go(data, tmp_path, call):
    """test.py on the slices D_000 to E_003 of 32 pixels; its FBP needs no time."""
    return lambda *extra, **options: call(
        evaluation.main, "--data", data, "--out", tmp_path / "out", "--methods", "fbp", "--views", 18, 36, *extra,
        **options)


def test_an_evaluation_draws_what_is_asked_and_nothing_twice(go, tmp_path):
    go()
    out, names = tmp_path / "out", ("comparison_18views", "comparison_36views", "psnr_views", "psnr_calls")
    assert {path.name for path in out.glob("*.p*")} == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    tables = {path: path.read_bytes() for path in out.iterdir() if path.suffix in (".csv", ".json", ".md", ".tex")}

    def times():
        return {path.name: path.stat().st_mtime_ns for path in sorted(out.glob("*.p*"))}

    before = times()
    go()
    assert times() == before
    go("--views", 54)
    changed = {name for name, when in times().items() if when != before.get(name)}
    assert changed == {f"{name}.{kind}" for name in ("comparison_54views", "psnr_views", "psnr_calls")
                       for kind in ("png", "pdf")}, "what is asked of 18 and 36 views is there"
    before = times()
    tables = {path: path.read_bytes() for path in tables}
    go("--display-window", "bone", "--slice", "E_003", "--roi", "0,0,8,4")
    changed = {name for name, when in times().items() if when != before[name]}
    assert changed == {f"comparison_{n}views.{kind}" for n in (18, 36) for kind in ("png", "pdf")}
    assert {path: path.read_bytes() for path in tables} == tables


def test_a_figure_that_cannot_be_is_refused_before_the_evaluation(go, tmp_path):
    assert "--roi 20,0,13,4 ends at column 33 and row 4, and the slices have 32 x 32" in go("--roi", "20,0,13,4",
                                                                                          expect=1)
    assert "--slice 8 is none of the 8 slices evaluated" in go("--slice", 8, expect=1)
    assert "such as E_000.npy" in go("--slice", "nobody", expect=1)
    assert not list((tmp_path).glob("out/*"))
    assert "expected X,Y,W,H in pixels" in go("--roi", "1,2,3", expect=2)
    assert "expected X,Y,W,H in pixels" in go("--roi", "0,0,0,4", expect=2)
    assert "expected WIDTH,CENTRE in HU" in go("--display-window", "liver", expect=2)


def test_a_process_that_dies_costs_its_figures_alone(go, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("fig.evaluation.of_means",
                      lambda args, _: [Figure(args.out / "psnr_calls.png", "", os._exit, (9,))])
        text = go()
    assert "a process died while it drew psnr_calls.png. The same command draws them" in text
    assert (tmp_path / "out" / "comparison_36views.pdf").is_file() and (tmp_path / "out" / "table.tex").is_file()
    assert "died" not in go() and (tmp_path / "out" / "psnr_calls.png").is_file()


def test_a_process_that_draws_does_not_wait_for_pytorch():
    program = "import sys, fig.figures; sys.exit(bool({'torch', 'scipy', 'numba'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_latex_says_what_markdown_says():
    assert escape(r"a_b & 95 % \ {~^} <x> #$ |") == (
        r"a\_b \& 95 \% \textbackslash{} \{\textasciitilde{}\textasciicircum{}\} \textless{}x\textgreater{} \#\$ "
        r"\textbar{}")
    text = latex("W3000/L500\n\n| views | me_thod | PSNR dB [95 %] |\n|---|---|---|\n| 18 | fbp | 23.03 [22, 24] |\n"
                 "| 18 | tv | - |\n| 36 | fbp | 25 |\n\nNotes: 100 %.")
    assert text.splitlines() == [
        r"% In the preamble: \usepackage{booktabs}", r"\begin{table}", r"\centering", r"\caption{W3000/L500}",
        r"\begin{tabular}{rlr}", r"\toprule", r"views & me\_thod & PSNR dB [95 \%] \\", r"\midrule",
        r"18 & fbp & 23.03 [22, 24] \\", r"18 & tv & - \\", r"\addlinespace", r"36 & fbp & 25 \\", r"\bottomrule",
        r"\end{tabular}", r"\end{table}", "% Notes: 100 %."]


def test_a_run_is_drawn_with_every_curve_named(tmp_path, call, monkeypatch):
    lines = [{"images": i, "loss/restore": 1 / i, "lr": 1e-3} | {f"val{n}/spdps/psnr": n + i for n in (18, 36, 72)}
             for i in (10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen, write = [], figures.write
    monkeypatch.setattr(figures, "write", lambda figure, path: [assert_legible(figure), seen.append(letters(figure)),
                                                                write(figure, path)])
    assert "3 lines" in call(plot_run.main, tmp_path)
    assert {"restore", "val18/spdps", "val72/spdps", "loss", "PSNR, dB", "learning rate"} <= {t for t, _ in seen[0]}
    assert (tmp_path / "curves.pdf").is_file() and (tmp_path / "curves.png").is_file()


def test_framework_is_drawn_from_the_sample_set(tmp_path, call, monkeypatch):
    monkeypatch.setattr(framework, "write", lambda figure, path, dpi: [assert_legible(figure),
                                                                       figures.write(figure, path, dpi=dpi)][1])
    assert "Written" in call(framework.main, "--out", tmp_path / "new" / "framework.png", "--dpi", 150)
    assert Image.open(tmp_path / "new" / "framework.png").width == 1050
    assert (tmp_path / "new" / "framework.png").stat().st_size <= 150_000
    assert (tmp_path / "new" / "framework.pdf").is_file()


def test_curves_show_every_row_of_every_folder(tmp_path, call, monkeypatch):
    seen = []
    for draw in (figures.draw_curves, figures.draw_points):
        monkeypatch.setattr(quantitative, draw.__name__, lambda axis, what, *rest, draw=draw, **options: (
            seen.append(what), draw(axis, what, *rest, **options))[1])
    for name, gain in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        rows = [{"method": method, "views": n, "window": window, "psnr": n / 2 + gain, "nfe": calls}
                for method, calls in (("fbp", 0), ("spdps", 9)) for n in (36, 18)
                for window in ([3000, 500], [500, 50])]
        (tmp_path / name / "summary.json").write_text(json.dumps(rows))
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"images": 10, "lr": 1}\n' + "".join(
        json.dumps({"images": i, "val18/one-step/psnr": 20 + i}) + "\n" for i in (10, 20)))
    text = call(quantitative.main, tmp_path / "a", tmp_path / "b", "--run", run)
    out = tmp_path / "a" / "quantitative.png"
    assert f"Written: {out} and quantitative.pdf" in text
    assert seen == [
        {f"{folder}: {label}": [(18, 9 + gain), (36, 18 + gain)] for folder, gain in (("a", 0), ("b", 1))
         for label in ("FBP", "SPDPS")},
        [(f"{n} views", f"{folder}: {label}", calls, n / 2 + gain) for n in (18, 36)
         for folder, gain in (("a", 0), ("b", 1)) for label, calls in (("FBP", 0), ("SPDPS", 9))],
        {"val18/one-step": [(10, 30), (20, 40)]}]
    before = out.read_bytes()
    assert "holds no validation PSNR" in call(quantitative.main, tmp_path / "a", "--run", tmp_path / "a", expect=1)
    other = [{"method": "fbp", "views": 18, "window": [500, 50], "psnr": 20, "nfe": 0}]
    (tmp_path / "b" / "summary.json").write_text(json.dumps(other))
    assert "have other headline windows" in call(quantitative.main, tmp_path / "a", tmp_path / "b", expect=1)
    (tmp_path / "b" / "summary.json").write_text("[{")
    for folder in (run, tmp_path / "b"):
        assert "holds no whole summary.json" in call(quantitative.main, folder, expect=1)
    assert out.read_bytes() == before
