"""report.py, on real sweeps, and its page in a real browser."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHROMIUM, REPO
from sweeps import LOSS, grid, in_new_process, rows

import report
import sweep


def text_of(page: Path) -> str:
    """What a page says, without its scripts and plots."""
    content = re.sub(r"<script.*?</script>|<style.*?</style>", "", page.read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", content)).split())


def dom_of(page: Path, script: str, folder: Path) -> str:
    """The page as a browser without a network has it, after a script of ours."""
    copy = folder / "page.html"
    copy.write_text(page.read_text().replace("</html>", f"<script>{script}</script></html>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder}/profile", "--dump-dom"]
    command = [CHROMIUM, *flags, "--enable-unsafe-swiftshader", "--virtual-time-budget=10000", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_sweep_ends_with_a_page_that_has_its_facts(tiny):
    page = tiny[0] / "logs/sweeps/tiny/report.html"
    assert tiny[1].splitlines()[-1] == "report: logs/sweeps/tiny/report.html"
    text = text_of(page)
    assert "4 of 4 runs are finished. Compared by val/acc" in text
    results = sorted(rows(tiny[0] / "logs/sweeps/tiny"), key=lambda row: -float(row["val/acc"]))
    best = results[0]
    assert f"{best['name']} reached val/acc {float(best['val/acc']):.4f}" in text
    for row in results:
        assert f"{row['name'][:3]} finished {row['model.net.l1_chan']} {row['model.optimizer.nesterov']}" in text
        assert f"python main.py fit --config logs/sweeps/tiny/configs/{row['name']}.yaml" in text
        for key in ("val/acc", "val/loss", "test/acc", "test/loss"):
            assert f" {float(row[key]):.4f} " in text
    four, eight = (
        sum(float(row["val/acc"]) for row in results if row["model.net.l1_chan"] == c) / 2 for c in ("4", "8")
    )
    assert f"l1_chan 4: {four:.4f} (2) 8: {eight:.4f} (2)" in text
    assert page.read_text().partition("<h1>")[2].count("data:image/png;base64,") == 2
    assert not re.search(r'(?:src|href)="(?!data:)', page.read_text().partition("<h1>")[2])


@pytest.mark.skipif(not CHROMIUM, reason="no chromium")
def test_a_browser_draws_the_page_and_sorts_its_table(tiny, tmp_path):
    page = tiny[0] / "logs/sweeps/tiny/report.html"
    script = "document.querySelectorAll('#runs th')[COLUMN].click()"
    results = rows(tiny[0] / "logs/sweeps/tiny")
    for column, key in ((0, "name"), (4, "val/acc")):
        dom = dom_of(page, script.replace("COLUMN", str(column)), tmp_path)
        body = re.search(r"<tbody>(.*?)</tbody>", dom, re.DOTALL)[1]
        order = re.findall(r"<tr><td>(\d+)", body)
        values = {row["name"][:3]: row["name"] if key == "name" else float(row[key]) for row in results}
        assert order == sorted(order, key=values.get), key
    plots = dom.count('class="plotly-graph-div')
    assert plots == 4 and dom.count('<svg class="main-svg"') >= plots  # curves twice, coordinates, importance


def test_a_sweep_with_failed_runs_says_what_is_missing(foreign):
    Path("slow.yaml").write_text("model: {lr: 0.001}\n")
    axes = grid(model__fault=["exit", None, "x<b>"], config=[None, "slow.yaml"], model__bias=[False, True])
    assert sweep.main([*LOSS, "--name=tiny", "--base=[]", axes, "--max_failures=9"]) == 1
    text = text_of(Path("logs/sweeps/tiny/report.html"))
    assert "8 of 12 runs are finished, 4 failed. Compared by loss (less is better)" in text
    assert "4 of 12 runs are failed, and are not in the plots." in text
    assert "000-fault=exit-config=null-bias=false failed this fault was asked for" in text
    assert "fault exit: (0) null:" in text and "config null: " in text and "slow: " in text
    best = min((row for row in rows() if row["loss"]), key=lambda row: float(row["loss"]))
    assert f"{best['name']} reached loss {float(best['loss']):.4f}" in text
    assert '<b>"' not in text and "importance" in Path("logs/sweeps/tiny/report.html").read_text()


def test_a_sweep_that_has_not_begun_gets_an_honest_page(foreign):
    assert sweep.main([*LOSS, "--name=tiny", "--base=[]", grid(model__lr=[0.1, 0.2]), "--dry_run"]) == 0
    text = text_of(report.report(Path("logs/sweeps/tiny")))
    assert "0 of 2 runs are finished, 2 pending" in text and "000 pending 0.1" in text
    assert "The best run" not in text and "Mean" not in text


def test_without_the_extra_the_sweep_ends_well_and_says_what_to_install(foreign):
    Path("optuna.py").write_text("raise ModuleNotFoundError('No module named optuna', name='optuna')\n")
    done = in_new_process(*LOSS, "--name=tiny", "--base=[]", grid(model__lr=[0.1]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "no report.html, since optuna is missing: pip install '.[report]'"
    assert not Path("logs/sweeps/tiny/report.html").exists()


def test_a_folder_that_is_no_sweep_is_a_mistake(folder):
    command = [sys.executable, str(REPO / "report.py"), "nix"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: nix is no sweep's folder: it has no configs/*.yaml\n"


def test_correlation_is_pearsons():
    assert report.correlation([1, 2, 3], [2.0, 4.0, 6.0]) == pytest.approx(1)
    assert report.correlation([False, True, False, True], [0.4, 0.2, 0.4, 0.2]) == pytest.approx(-1)
    assert str(report.correlation(["a", "b"], [1.0, 2.0])) == str(report.correlation([1, 1], [1.0, 2.0])) == "nan"
