"""`moe-native plot`: the pictures that it writes, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import segment_bytes as sb
from command_line import STEPS, failed, ok, write
from matplotlib.image import imread

from moe_trace import cli


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cli") / "trace")


@pytest.mark.parametrize("arguments", [[], ["--layer", "5"], ["--layer", "0-1", "--phase", "decode"]])
def test_plot_writes_a_picture(trace, tmp_path, arguments):
    out = tmp_path / "hist.png"
    assert ok("plot", trace, "-o", out, *arguments) == f"{out}\n"
    pixels = imread(out)
    assert pixels.shape[1] > 1000 and pixels.std() > 0.05


def test_plot_draws_the_shares_of_the_trace(trace, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("moe_trace.plots.save", lambda figure, path: drawn.append(figure))
    assert cli.main(["plot", str(trace), "--layer", "5", "-o", str(tmp_path / "x.png")]) == 0
    (axes,) = drawn[0].axes
    counts = np.bincount(sb.of_rows(STEPS, 5).ravel(), minlength=60)
    np.testing.assert_allclose([patch.get_height() for patch in axes.patches], counts / counts.sum())
    assert axes.get_title(loc="left") == "tiny-moe · layer 5"
    assert any(text.get_text().startswith("103 rows") for text in axes.texts)


def test_plot_refuses_before_it_works(trace, tmp_path):
    assert ".png" in failed("plot", trace, "-o", tmp_path / "hist.bmp", code=2)
    message = failed("plot", trace, "-o", tmp_path / "hist.png", "--since", "2030-01-01", code=1)
    assert "nothing to draw" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["heatmap", "balance", "coactivation", "time", "phases"])
def test_plot_draws_other_kinds(trace, tmp_path, kind):
    assert ok("plot", trace, "--kind", kind, cwd=tmp_path) == f"{kind}.png\n"
    assert imread(tmp_path / f"{kind}.png").std() > 0.02


def test_plot_draws_a_request_and_a_second_trace(trace, tmp_path):
    out = tmp_path / "x.png"
    assert ok("plot", trace, "--kind", "request", "--request", "a", "-o", out) == f"{out}\n"
    other = write(tmp_path / "other")
    assert ok("plot", trace, "--kind", "compare", "--against", other, "-o", out) == f"{out}\n"


def test_plot_asks_for_what_a_kind_needs(trace, tmp_path):
    assert "--kind compare needs --against" in failed("plot", trace, "--kind", "compare", code=2)
    assert "--kind request needs --request" in failed("plot", trace, "--kind", "request", code=2)
    assert "--against is for --kind compare" in failed("plot", trace, "--against", trace, code=2)
    assert "no request 'nobody'" in failed("plot", trace, "--kind", "request", "--request", "nobody", code=1)


def test_intervals_are_drawn_of_one_layer(trace, tmp_path):
    plain, with_them = tmp_path / "plain.svg", tmp_path / "intervals.svg"
    ok("plot", trace, "--layer", "5", "-o", plain)
    ok("plot", trace, "--layer", "5", "--intervals", "-o", with_them)
    assert "95 % interval over requests" in with_them.read_text() and "interval" not in plain.read_text()
    for more in ([], ["--kind", "heatmap", "--layer", "5"]):
        assert "intervals are of the histogram of one layer" in failed(
            "plot", trace, "--intervals", *more, "-o", tmp_path / "x.png", code=1
        )
