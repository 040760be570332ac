"""report.html, made from sweeps that are written by hand."""

import html
import json
import math
import os
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.loggers import WandbLogger
from torch.utils.tensorboard import SummaryWriter

from mnist_cnn.run.errors import UserError
from mnist_cnn.run.loggers import RunFolderTensorBoard, log_result
from mnist_cnn.sweeps.report import compare_losses, draw_curves, explained, read_events, report

SWEEP = Path("logs/sweeps/tiny")
GRID = [
    {"model.net.l1_chan": chan, "model.optimizer.nesterov": nesterov} for chan in (4, 8) for nesterov in (False, True)
]
NAMES = [
    f"{i:03d}-l1_chan={chan}-nesterov={nesterov}"
    for i, (chan, nesterov) in enumerate([(4, "false"), (4, "true"), (8, "false"), (8, "true")])
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)


def write_run(name: str, swept: dict, metrics: dict | None = None, reason: str = "", events: bool = True) -> None:
    """Writes a run of a sweep: finished, if it has metrics; failed, if there is a reason; otherwise pending."""
    run_dir = SWEEP / name
    (SWEEP / "configs").mkdir(parents=True, exist_ok=True)
    (SWEEP / "configs" / f"{name}.yaml").write_text(f"# swept: {json.dumps(swept)}\nseed_everything: 1\n")
    if reason:
        run_dir.mkdir()
        (run_dir / "status.json").write_text(json.dumps({"status": "failed", "reason": reason}))
    if metrics:
        run_dir.mkdir()
        (run_dir / "metrics.json").write_text(json.dumps(metrics))
        if events:
            write_events(run_dir, [4.0, 2.0, 3.0])


def write_events(run_dir: Path, val_losses: list[float], first_step: int = 0) -> None:
    """Writes TensorBoard events: five steps from one validation to the next, histograms, two pictures."""
    with SummaryWriter(run_dir, filename_suffix=f".{first_step}") as writer:
        for step in range(first_step, first_step + 5 * len(val_losses)):
            writer.add_scalar("train/loss", 4 / (1 + step), step)
            writer.add_histogram("param/weight", np.arange(9), step)
        for index, loss in enumerate(val_losses):
            writer.add_scalar("val/loss", loss, first_step + 5 * index + 4)
        writer.add_scalar("best/val/loss", min(val_losses), first_step + 5 * len(val_losses))
        for tag in ("test/confusion_matrix", "test/worst_classified"):
            writer.add_image(tag, np.full((3, 60, 600), step, np.uint8))


def write_tiny() -> dict[str, dict]:
    """Writes a finished sweep of four runs; returns their metrics by name, the best first."""
    accuracies = [0.91, 0.93, 0.96, 0.94]
    metrics = [
        {"val/loss": 1.2 - acc, "val/acc": acc, "test/loss": 1.3 - acc, "test/acc": acc - 0.01}
        | {"epochs": 3, "seconds": 7.25, "best_checkpoint": "checkpoints/epoch01.ckpt"}
        for acc in accuracies
    ]
    for run in zip(NAMES, GRID, metrics):
        write_run(*run)
    return {NAMES[i]: metrics[i] for i in np.argsort(accuracies)[::-1]}


def text_of(page: Path) -> str:
    """The text of a page, without its scripts and plots."""
    content = re.sub(r"<script.*?</script>|<style.*?</style>", "", page.read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", content)).split())


def test_the_page_shows_a_finished_sweep():
    results = write_tiny()
    page = report(SWEEP)
    assert page == SWEEP / "report.html"
    text = text_of(page)
    assert (
        "4 of 4 runs are finished. The metric is val/acc; higher is better." in text and "Means and plots" not in text
    )
    assert "002-l1_chan=8-nesterov=false reached val/acc 0.9600 with l1_chan 8 , nesterov false ." in text
    assert "Metrics of epoch01.ckpt: val/loss val/acc" in text
    assert "val/loss val/acc test/loss test/acc epochs seconds 0.2400 0.9600 0.3400 0.9500 3 7 " in text
    assert re.findall(r"(\d{3}) finished", text) == [name[:3] for name in results]  # the best first
    for name, metrics in results.items():
        labels = " ".join(re.findall("=([^-]*)", name))
        numbers = " ".join(f"{metrics[key]:.4f}" for key in ("val/loss", "val/acc", "test/loss", "test/acc"))
        command = f"python main.py fit --config logs/sweeps/tiny/configs/{name}.yaml"
        assert f"{name[:3]} finished {labels} {numbers} 3 7 {command}" in text
    # Of the ranks' squared deviations, 1 of 5 is within the values of l1_chan: 1 - (1 / 2) / (5 / 3) = 0.7.
    assert "l1_chan 0.70 4: 0.9200 (2) 8: 0.9500 (2) nesterov 0.00 false: 0.9350 (2) true: 0.9350 (2)" in text
    assert (
        "Sign of overfitting: since step 9, val/loss rose from 2.0000 to 3.0000 while train/loss fell from 0." in text
    )
    assert "The gap at the end, val/loss minus train/loss, is 2.6886." in text
    body = page.read_text().partition("<h1>")[2]
    assert body.count("data:image/png;base64,") == 2
    assert not re.search(r'(?:src|href)="(?!data:)', body)  # nothing from the network
    assert len(re.findall('class="plotly-graph-div"', body)) == 3  # losses, coordinates, all curves


def test_a_sweep_with_failed_runs_says_what_is_missing():
    Path(SWEEP).mkdir(parents=True)
    (SWEEP / "sweep.yaml").write_text("{metric: loss, mode: min, program: 'my.foreign:main'}")
    points = [(fault, overlay) for fault in ("exit", None, "x<b>") for overlay in (None, "configs/slow.yaml")]
    for i, (fault, overlay) in enumerate(points):
        swept = {"model.init_args.fault": fault, "config": overlay}
        failed = fault == "exit"
        write_run(f"{i:03d}-f={i}", swept, None if failed else {"loss": 9.0 - i}, "<exit> at step 1" if failed else "")
    page = report(SWEEP)
    text = text_of(page)
    assert page.read_text().count('class="failed"') == 3  # red: the paragraph about what is missing, two runs
    assert "4 of 6 runs are finished, 2 failed. The metric is loss; lower is better." in text
    assert "Means and plots show only the 4 finished runs with loss." in text
    assert "005-f=5 reached loss 4.0000 with fault x-b- , config slow ." in text
    assert "python my/foreign.py fit --config logs/sweeps/tiny/configs/005-f=5.yaml" in text
    assert (
        "fault 0.70 exit: (0) null: 6.5000 (2) x-b-: 4.5000 (2) config 0.00 null: 6.0000 (2) slow: 5.0000 (2)" in text
    )
    assert "000 failed <exit> at step 1 logs/sweeps/tiny/000-f=0/output.log" in text


def test_a_sweep_that_has_not_begun():
    for name, swept in zip(NAMES, GRID):
        write_run(name, swept)
    text = text_of(report(SWEEP))
    assert "0 of 4 runs are finished, 4 pending." in text and "000 pending 4 false" in text
    assert "Best run" not in text and "Mean" not in text


def test_a_pending_run_is_no_warning():
    write_run(NAMES[0], GRID[0], {"val/acc": 0.5})
    write_run(NAMES[1], GRID[1])
    page = report(SWEEP)
    assert "1 of 2 runs are finished, 1 pending." in text_of(page)
    assert "<p>\nMeans and plots show only the 1 finished runs" in page.read_text()  # and not red
    assert 'class="failed"' not in page.read_text()


def test_missing_events_and_metrics_are_reported():
    best, *others = write_tiny()
    for file in (SWEEP / best).glob("events.*"):
        file.write_bytes(file.read_bytes()[:20])  # as a killed run leaves it
    (SWEEP / others[1] / "metrics.json").write_text('{"val/loss": 1.0}')
    text = text_of(report(SWEEP))
    assert "Means and plots show only the 3 finished runs with val/acc." in text
    assert "1 of 3 finished runs have no val/loss in their TensorBoard events." in text
    assert f"{best} reached val/acc 0.9600" in text and "verfitting" not in text
    assert re.findall(r"(\d{3}) finished", text)[-1] == others[1][:3]


@pytest.mark.parametrize(("count", "share"), [(1, "each run has its own value"), (2, "0.00")])
def test_equal_runs_show_no_influence(count, share):
    for name, swept in list(zip(NAMES, GRID))[:count]:
        write_run(name, swept, {"val/acc": 0.5}, events=False)
    assert f"l1_chan {share} 4: 0.5000 ({count})" in text_of(report(SWEEP))


def test_seeds_alone_are_one_point():
    for seed, name in enumerate(NAMES):
        write_run(name, {"seed_everything": seed}, {"val/acc": 0.5 + seed / 10, "f1": 1e-5 * seed}, events=False)
    text = text_of(report(SWEEP))
    assert (
        "Of val/acc: best 0.6500 ± 0.1291 (4 seeds). Each row is a point" in text
        and "Which setting matters" not in text
    )
    assert "003 finished 3 0.8000 3e-05 python" in text  # small numbers keep their digits


def test_points_are_compared_by_the_means_of_their_seeds():
    accuracies = {4: [0.90, 0.92, 0.94], 8: [0.91, 0.93, 0.95], 16: [0.5, 0.97]}
    for chan, values in accuracies.items():
        for seed, acc in enumerate(values):
            swept = {"model.net.l1_chan": chan, "seed_everything": seed}
            write_run(f"{chan:03d}-l1_chan={chan}-seed_everything={seed}", swept, {"val/acc": acc}, events=False)
    text = text_of(report(SWEEP))
    assert "Of val/acc: best 0.9300 ± 0.0200 (3 seeds); 2 others are within one standard error." in text
    # The standard error of the difference: sqrt(0.02^2 / 3 + 0.02^2 / 3).
    assert "leads the second by 0.0100 (standard error of the difference: 0.0163)." in text
    assert "val/acc 008 3 8 0.9300 ± 0.0200 004 3 4 0.9200 ± 0.0200 016 2 16 0.7350 ± 0.3323" in text
    assert "l1_chan each point has its own value 4: 0.9200 (1) 8: 0.9300 (1) 16: 0.7350 (1)" in text
    within = sum(len(ranks) * np.var(ranks) for ranks in ([2, 4, 6], [3, 5, 7], [1, 8])) / (8 - 3)
    share = within / np.var(range(8), ddof=1)
    assert f"seeds {min(1, share):.2f} of the variance of all runs' ranks lies between seeds of the same" in text


def test_seeds_without_a_finite_metric_and_points_of_one_seed():
    for seed, f1 in enumerate([1.0, math.inf]):
        write_run(NAMES[seed], {"lr": 1, "seed_everything": seed}, {"val/acc": 0.5, "f1": f1}, events=False)
    write_run(NAMES[2], {"lr": 2, "seed_everything": 0}, {"val/acc": 0.5, "f1": 1.0}, events=False)
    text = text_of(report(SWEEP))
    assert "0 others are within one standard error; 1 cannot be compared: too few seeds" in text
    assert "it is chance" not in text  # all values are equal


def test_a_resumed_run_is_one_curve():
    write_run(NAMES[0], GRID[0], {"val/acc": 0.5}, events=False)
    write_events(SWEEP / NAMES[0], [4.0, 2.0])
    write_events(SWEEP / NAMES[0] / "version_1", [1.0, 3.0], first_step=10)
    assert "since step 14, val/loss rose from 1.0000 to 3.0000" in text_of(report(SWEEP))


def test_another_metric_and_mode():
    results = write_tiny()
    worst = list(results)[-1]
    (SWEEP / "sweep.yaml").write_text("{metric: test/acc, mode: min}")
    assert f"{worst} reached test/acc {results[worst]['test/acc']:.4f}" in text_of(report(SWEEP))
    (SWEEP / "sweep.yaml").write_text("metric: f1")
    with pytest.raises(
        UserError, match="no run has the metric f1; known: val/loss, val/acc, test/loss, test/acc, epochs"
    ):
        report(SWEEP)
    (SWEEP / "sweep.yaml").write_text("metric: val/ac")
    with pytest.raises(UserError, match=r"no run has the metric val/ac \(did you mean val/acc\?\)"):
        report(SWEEP)


@pytest.mark.parametrize(
    "args, message",
    [
        (["nix"], "nix is not the folder of a sweep: it has no configs/*.yaml"),
        (["nix", "--foldr=x"], "unknown key foldr (did you mean folder?)"),
        ([], "the following arguments are required: folder"),
        (
            [str(SWEEP)],
            "[Errno 21] Is a directory: 'logs/sweeps/tiny/.report.html.PID' -> 'logs/sweeps/tiny/report.html'",
        ),
    ],
    ids=str,
)
def test_a_mistake_is_reported_in_one_line(args, message, monkeypatch, capfd):
    write_run(NAMES[0], GRID[0])
    os.mkdir(SWEEP / "report.html")
    monkeypatch.setattr(sys, "argv", ["report.py", *args])
    with pytest.warns(RuntimeWarning, match="found in sys.modules"), pytest.raises(SystemExit) as ended:
        runpy.run_module("mnist_cnn.sweeps.report", run_name="__main__")
    assert ended.value.code in (1, 2)
    assert capfd.readouterr().err.replace(str(os.getpid()), "PID") == f"error: {message}\n"


def test_explained_variance_is_corrected_for_the_number_of_values():
    assert explained([11.0, 12.0], [21.0, 22.0], []) == pytest.approx(0.7)  # 1 - (1 / 2) / (5 / 3)
    assert explained([11.0, 21.0], [12.0, 22.0]) == 0  # eta squared would be 1/5
    assert explained([1.0, 4.0], [2.0, 5.0], [3.0, 6.0]) == 0  # and here 4 / 17.5
    assert explained([1.0, 1.0], [2.0, 2.0]) == 1
    assert explained([1.0, 2.0, 3.0], [4.0, 5.0, 1e9]) == explained([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert explained([1.0], [2.0], [3.0], []) is None


def test_losses_are_compared_epoch_by_epoch():
    write_run(NAMES[0], GRID[0])
    write_events(SWEEP / NAMES[0], [4.0, 2.0, 3.0])
    losses, _ = compare_losses(read_events(SWEEP / NAMES[0])[0])
    train = [4 / (1 + step) for step in range(15)]
    means = {step: pytest.approx(np.mean(train[step - 4 : step + 1])) for step in (4, 9, 14)}
    assert losses == {"train/loss": means, "val/loss": {4: 4.0, 9: 2.0, 14: 3.0}}


def test_the_best_checkpoints_metrics_are_no_points_of_the_curves():
    board, wandb_run = RunFolderTensorBoard(), SimpleNamespace(summary={"val/loss": 0.5})
    board.start(SWEEP / "run")
    board.log_metrics({"val/loss": 0.5, "test/loss": 0.75}, step=9)
    loggers = [board, WandbLogger(experiment=wandb_run)]
    settings, metrics = {"seed_everything": 1, "model": {}, "data": {}}, {"val/loss": 0.25, "test/loss": 0.75}
    log_result(SimpleNamespace(loggers=loggers, global_step=10), settings, metrics)
    assert read_events(SWEEP / "run")[0] == {"val/loss": {9: 0.5}, "test/loss": {9: 0.75}, "best/val/loss": {10: 0.25}}
    assert wandb_run.summary == metrics


def test_curves_have_the_finite_values_of_all_steps():
    with SummaryWriter(SWEEP / "run") as writer:
        for step, loss in enumerate([1.0, math.nan, 0.5, math.inf, 1.0]):
            writer.add_scalar("val_loss", loss, step)
    assert read_events(SWEEP / "run")[0] == {"val_loss": {0: 1.0, 2: 0.5, 4: 1.0}}


@pytest.mark.parametrize(
    ("losses", "kind"),
    [([0.6931, 0.6929], None), ([0.5, 4.9], None), ([0.05, 2.3], "log"), ([-0.5, 100.0], None), ([0.0, 9.0], None)],
)
def test_only_an_axis_over_a_factor_of_ten_is_logarithmic(losses, kind):
    figure = draw_curves({"000": dict(enumerate(losses)), "001": {0: losses[0]}}, "val/loss")
    assert figure.layout.yaxis.type == kind
    assert [curve.mode for curve in figure.data] == ["lines", "markers"]  # one point makes no line


def test_train_and_val_have_different_colours():
    red, blue = draw_curves({"train/loss": {0: 1.0, 1: 0.5}, "val/loss": {0: 1.0, 1: 0.8}}, "loss").data
    assert red.line.color == "#d62728" and blue.line.color == "rgb(8, 48, 107)"


def test_a_run_without_both_losses_has_no_verdict():
    val = {1: 3.0, 3: 3.5}
    for curves in ({}, {"val/loss": val}, {"train/loss": {0: 4.0}, "val/loss": val, "test/loss": {4: 3.0}}):
        assert compare_losses(curves) == ({}, "")


@pytest.mark.parametrize(
    ("train", "val", "verdict"),
    [
        (
            [4.0, 2.0, 1.0],
            [4.0, 2.0, 3.0],
            "Sign of overfitting: since step 1, val/loss rose from 2.0000 to 3.0000 while train/loss fell from 2.0000 "
            "to 1.0000. The gap at the end, val/loss minus train/loss, is 2.0000.",
        ),
        (
            [4.0, 1.0, 2.0],
            [4.0, 2.0, 3.0],
            "No sign of overfitting: since val/loss was lowest, at step 1, train/loss did not fall. "
            "The gap at the end, val/loss minus train/loss, is 1.0000.",
        ),
        (
            [4.0, 2.0, 1.0],
            [4.0, 0.5, 0.504],
            "No sign of overfitting: val/loss rose by less than 1 % since step 1, where it was lowest. "
            "The gap at the end, val/loss minus train/loss, is -0.4960.",
        ),
        (
            [4.0, 2.0, -1.5e-5],
            [4.0, -1.0e-5, 1.0e-5],
            "Sign of overfitting: since step 1, val/loss rose from -1e-05 to 1e-05 while train/loss fell from 2.0000 "
            "to -1.5e-05. The gap at the end, val/loss minus train/loss, is 2.5e-05.",
        ),
        (
            [4.0, 2.0, 1.0],
            [4.0, 2.0, 2.0],
            "No sign of overfitting: val/loss rose by less than 1 % since step 2, where it was lowest. "
            "The gap at the end, val/loss minus train/loss, is 1.0000.",
        ),
    ],
)
def test_overfitting(train, val, verdict):
    assert compare_losses({"train/loss": dict(enumerate(train)), "val/loss": dict(enumerate(val))})[1] == verdict
