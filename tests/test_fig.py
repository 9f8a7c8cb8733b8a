"""The README's figures from their commands."""

import json

from matplotlib import image

from fig import figures, framework, quantitative


def test_framework_is_drawn_from_the_sample_set(tmp_path, call):
    assert "Written" in call(framework.main, "--out", tmp_path / "framework.png")
    assert image.imread(tmp_path / "framework.png").shape[1] >= 900
    assert (tmp_path / "framework.png").stat().st_size <= 150_000


def test_curves_show_every_row_of_every_folder(tmp_path, call, monkeypatch):
    seen = []
    monkeypatch.setattr(quantitative, "draw_curves", lambda axis, series, *rest, **options: seen.append(
        (series, figures.draw_curves(axis, series, *rest, **options))[0]))
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
    out = tmp_path / "quantitative.png"
    call(quantitative.main, tmp_path / "a", tmp_path / "b", "--run", run, "--out", out)
    assert seen == [
        {f"{folder}: {label}": [(18, 9 + gain), (36, 18 + gain)] for folder, gain in (("a", 0), ("b", 1))
         for label in ("FBP", "SPDPS")},
        {f"{n} views": [(calls, n / 2 + gain) for calls in (0, 9) for gain in (0, 1)] for n in (36, 18)},
        {"val18/one-step": [(10, 30), (20, 40)]}]
    assert out.stat().st_size > 10_000
    before = out.read_bytes()
    assert "holds no validation PSNR" in call(quantitative.main, tmp_path / "a", "--run", tmp_path / "a", "--out", out,
                                              expect=1)
    (tmp_path / "b" / "summary.json").write_text("[{")
    for folder in (run, tmp_path / "b"):
        assert "holds no whole summary.json" in call(quantitative.main, folder, "--out", out, expect=1)
    assert out.read_bytes() == before
