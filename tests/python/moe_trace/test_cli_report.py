"""`moe-native report`: the file that it writes, and what it refuses."""

from __future__ import annotations

import pytest
from command_line import failed, ok, write


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cli") / "trace")


def test_report_writes_a_page(trace, tmp_path):
    assert ok("report", trace, cwd=tmp_path) == "report.html\n"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "<h1>Routing of tiny-moe</h1>" in page
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_report_of_a_selection_to_stdout(trace):
    page = ok("report", trace, "--layer", "5", "--phase", "decode", "-o", "-")
    assert page.startswith("<!doctype html>") and "layers 5, phase decode" in page


def test_processes_that_share_the_work_write_the_same_page(trace):
    pages = [ok("report", trace, "--jobs", jobs, "-o", "-").split("<footer")[0] for jobs in ("1", "2")]
    assert pages[0] == pages[1]


def test_report_of_a_lossy_trace_is_written_and_says_so(tmp_path):
    lossy = write(tmp_path / "lossy", losses=[(0, 3, 9, 70)])
    out = tmp_path / "r.html"
    assert ok("report", lossy, "-o", out, code=3) == f"{out}\n"
    assert "This trace is not whole" in out.read_text(encoding="utf-8")


def test_report_refuses_before_it_works(trace, tmp_path):
    assert "there is no directory" in failed("report", trace, "-o", tmp_path / "no" / "r.html", code=1)
    assert "layer 9 is not in" in failed("report", trace, "--layer", "9", "-o", tmp_path / "r.html", code=2)
    assert "there is no trace" in failed("report", tmp_path / "nothing", code=1)
    assert not list(tmp_path.iterdir())
