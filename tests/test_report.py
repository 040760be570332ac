"""report.py, on real sweeps, and its page in a real browser."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO
from sweeps import LOSS, grid, in_new_process, rows

import report
import sweep


def text_of(page: Path) -> str:
    """What a page says, without its scripts and plots."""
    content = re.sub(r"<script.*?</script>|<style.*?</style>", "", page.read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", content)).split())


def test_a_sweep_ends_with_a_page_that_has_its_facts(tiny):
    page = tiny[0] / "logs/sweeps/tiny/report.html"
    assert tiny[1].splitlines()[-1] == "report: logs/sweeps/tiny/report.html"
    text = text_of(page)
    assert "4 of 4 runs are finished. Compared by val/acc" in text
    results = sorted(rows(tiny[0] / "logs/sweeps/tiny"), key=lambda row: -float(row["val/acc"]))
    best = results[0]
    assert f"{best['name']} reached val/acc {float(best['val/acc']):.4f}" in text
    assert re.findall(r"(\d{3}) finished", text) == [row["name"][:3] for row in results]  # the best first
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


def test_a_browser_draws_the_page_and_sorts_its_table(tiny, browser):
    browser.get((tiny[0] / "logs/sweeps/tiny/report.html").as_uri())
    results = {row["name"][:3]: row for row in rows(tiny[0] / "logs/sweeps/tiny")}

    def order():
        return [row.text for row in browser.find_elements("css selector", "#runs tbody td:first-child")]

    (head,) = (head for head in browser.find_elements("css selector", "#runs th") if head.text == "val/acc")
    for sign in (1, -1):
        head.click()
        assert order() == sorted(order(), key=lambda run: sign * float(results[run]["val/acc"]))
    assert sorted(order()) == sorted(results)
    plots = browser.find_elements("css selector", ".plotly-graph-div")
    assert len(plots) == 4  # the best run, importance, coordinates, all curves
    assert all(plot.find_elements("css selector", "svg.main-svg") for plot in plots)
    assert ["nesterov" in plot.text for plot in plots] == [False, True, True, False]
    pictures = browser.find_elements("css selector", "img")
    assert [picture.get_property("naturalWidth") > 500 for picture in pictures] == [True, True]


def test_a_sweep_with_failed_runs_says_what_is_missing(foreign):
    Path("slow.yaml").write_text("model: {lr: 0.001}\n")
    axes = grid(model__fault=["exit", None, "x<b>"], config=[None, "slow.yaml"], model__bias=[False, True])
    assert sweep.main([*LOSS, "--name=tiny", "--base=[]", axes, "--max_failures=9"]) == 1
    text = text_of(Path("logs/sweeps/tiny/report.html"))
    assert "8 of 12 runs are finished, 4 failed. Compared by loss (less is better)" in text
    assert "Not in the plots: 4 of 12 runs, failed." in text
    assert "000-fault=exit-config=null-bias=false failed this fault was asked for" in text
    assert "fault exit: (0) null:" in text and "config null: " in text and "slow: " in text
    best = min((row for row in rows() if row["loss"]), key=lambda row: float(row["loss"]))
    assert f"{best['name']} reached loss {float(best['loss']):.4f}" in text
    assert '<b>"' not in text and "Which setting matters" in text


def test_a_sweep_that_has_not_begun_gets_an_honest_page(foreign):
    assert sweep.main([*LOSS, "--name=tiny", "--base=[]", grid(model__lr=[0.1, 0.2]), "--dry_run"]) == 0
    text = text_of(report.report(Path("logs/sweeps/tiny")))
    assert "0 of 2 runs are finished, 2 pending" in text and "000 pending 0.1" in text
    assert "The best run" not in text and "Mean" not in text


def test_what_is_damaged_is_missing_and_said(tiny, tmp_path):
    root = tmp_path / "tiny"
    shutil.copytree(tiny[0] / "logs/sweeps/tiny", root)
    best, *others = sorted(rows(root), key=lambda row: -float(row["val/acc"]))
    for event_file in (root / best["name"]).glob("events.*"):  # cut off within the first record
        event_file.write_bytes(event_file.read_bytes()[:20])
    metrics = json.loads((root / others[1]["name"] / "metrics.json").read_text())
    (root / others[1]["name"] / "metrics.json").write_text(json.dumps({"val/loss": metrics["val/loss"]}))
    (root / others[2]["name"] / "metrics.json").write_text("{")
    text = text_of(report.report(root))
    assert "2 of 4 runs are finished, 1 finished without val/acc, 1 " in text
    assert "Without val/loss in TensorBoard's event files: 1 of 2 finished runs." in text
    assert f"{best['name']} reached val/acc {float(best['val/acc']):.4f}" in text


def test_a_metric_that_no_run_has_is_a_mistake(tiny):
    with pytest.raises(sweep.Mistake, match=r"no run reports a metric val/ac \(did you mean val/acc\?\)"):
        report.report(tiny[0] / "logs/sweeps/tiny", metric="val/ac")


def test_without_the_extra_the_sweep_ends_well_and_says_what_to_install(foreign):
    Path("optuna.py").write_text("raise ModuleNotFoundError('No module named optuna', name='optuna')\n")
    done = in_new_process(*LOSS, "--name=tiny", "--base=[]", grid(model__lr=[0.1]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "no report.html, since optuna is missing: pip install '.[report]'"
    assert not Path("logs/sweeps/tiny/report.html").exists()


@pytest.mark.parametrize(
    "args, told",
    [
        (["nix"], "nix is no sweep's folder: it has no configs/*.yaml"),
        (["nix", "--mode=x"], "mode: expected Literal['max', 'min'] or null, got x"),
        (["nix", "--metrik=x"], "unknown setting metrik (did you mean metric?)"),
        ([], "the following arguments are required: folder"),
    ],
    ids=str,
)
def test_a_mistake_gets_a_line(args, told, folder):
    done = subprocess.run([sys.executable, str(REPO / "report.py"), *args], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"error: {told}\n"


def test_a_page_that_cannot_be_written_gets_a_line(tiny, folder):
    shutil.copytree(tiny[0] / "logs/sweeps/tiny", "tiny")
    os.remove("tiny/report.html")
    os.mkdir("tiny/report.html")
    done = subprocess.run([sys.executable, str(REPO / "report.py"), "tiny"], capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch("error: .*tiny/report.html.*\n", done.stderr), done.stderr


def test_correlation_is_pearsons():
    assert report.correlation([1, 2, 3], [2.0, 4.0, 6.0]) == pytest.approx(1)
    assert report.correlation([False, True, False, True], [0.4, 0.2, 0.4, 0.2]) == pytest.approx(-1)
    assert str(report.correlation(["a", "b"], [1.0, 2.0])) == str(report.correlation([1, 1], [1.0, 2.0])) == "nan"


def test_explained_variance_adds_up_where_settings_act_apart():
    width, depth = [1, 1, 2, 2], [1, 2, 1, 2]
    metrics = [10.0 * a + b for a, b in zip(width, depth)]
    groups = [[[m for m, v in zip(metrics, values) if v == label] for label in (1, 2)] for values in (width, depth)]
    assert [report.explained(group) for group in groups] == pytest.approx([100 / 101, 1 / 101])
    assert report.explained([[metric] for metric in metrics]) == pytest.approx(1)


def test_losses_are_compared_epoch_by_epoch_up_to_the_last():
    train = [(0, 4.0), (1, 2.0), (2, 1.0), (3, 1.0)]
    val = [(1, 3.0), (3, 3.5), (4, 3.0), (4, 3.0)]  # the last two: the best checkpoint's once more
    shown = report.losses_of({"train/loss": train, "val/loss": val, "val/acc": val, "test/loss": [(4, 3.0)]})
    assert shown == {"train/loss": [(1, 3.0), (3, 1.0)], "val/loss": val[:2]}
    shown = report.losses_of({"train/loss": train[:1], "val/loss": val, "test/loss": [(4, 3.0), (4, 3.0)]})
    assert shown == {"val/loss": val[:2]} and report.overfit(shown) == ""
    assert report.without_best([(9, 1.0), (19, 1.0), (29, 1.0)]) == [(9, 1.0), (19, 1.0), (29, 1.0)]  # a plateau


@pytest.mark.parametrize(
    ("train", "val", "said"),
    [
        ([4.0, 2.0, 1.0], [4.0, 2.0, 3.0], "at step 1, it has changed by +50%, and train/loss by -50%: a sign of"),
        ([4.0, 1.0, 2.0], [4.0, 2.0, 3.0], "at step 1, it has changed by +50%, and train/loss by +100%: no sign of"),
        ([4.0, 2.0, 1.0], [4.0, 3.0, 2.0], "at step 2, it has changed by +0%, and train/loss by +0%: no sign of"),
    ],
)
def test_overfitting_is_said(train, val, said):
    losses = {"train/loss": list(enumerate(train)), "val/loss": list(enumerate(val))}
    assert said in report.overfit(losses)
    assert report.overfit({"val/loss": losses["val/loss"]}) == ""
