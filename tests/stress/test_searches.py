"""Searches, whose runs train."""

from pathlib import Path

from conftest import RUN, metrics_of
from sweeps import SWEEP, error_of, grid, rows, settings, statuses, trained
from test_search import AXES, RATE, SEARCH, study

import sweep
from main import main


def test_a_run_of_a_search_is_rerun_from_its_config(folder):
    args = settings(folder, grid={"model.optimizer.lr": {"low": 0.01, "high": 0.1}}, search="tpe", sample=1)
    assert sweep.main([*args, "--pruner=optuna.pruners.MedianPruner"]) == 0
    (run,) = SWEEP.glob("0*")
    main(["fit", f"--config={run / 'config.yaml'}"])
    assert metrics_of(RUN) == metrics_of(run)


def test_a_pruner_needs_a_metric_of_validation(foreign, capfd):
    args = ["--program=foreign:main", "--name=tiny", "--metric=los", "--search=tpe", "--sample=9", "--max_failures=2"]
    error_of(capfd, *args, *AXES, "--pruner=optuna.pruners.MedianPruner")
    assert (
        "a pruner needs los, which validation does not log (did you mean loss?)" in (SWEEP / "report.html").read_text()
    )
    assert statuses() == ["failed"] * 2


def test_runs_that_fail_are_replaced(foreign):
    assert sweep.main([*SEARCH, grid(model__fault=["exit", None], model__lr=RATE), "--sample=4"]) == 0
    failed = statuses().count("failed")
    assert failed > 0 and statuses().count("finished") == 4 == len(rows()) - failed
    states = [trial.state.name for trial in study().trials]
    assert (states.count("COMPLETE"), states.count("PRUNED")) == (4, failed)


def test_a_search_goes_on_from_its_folder_as_if_it_had_not_stopped(foreign, capfd):
    assert sweep.main([*SEARCH, *AXES, "--sample=4"]) == 0
    undisturbed = [{**row, "seconds": ""} for row in rows()]
    assert statuses() == ["finished"] * 4
    assert [trial.value for trial in study().trials] == [float(row["loss"]) for row in rows()]
    assert [trial.state.name for trial in study().trials] == ["COMPLETE"] * 4
    page = (SWEEP / "report.html").read_text()
    assert "Optimization History Plot" in page and "Slice Plot" in page
    SWEEP.rename("undisturbed")
    Path("trained.txt").unlink()
    assert sweep.main([*SEARCH, *AXES, "--sample=2"]) == 0
    assert "2 of 2 runs are finished" in capfd.readouterr().out
    assert sweep.main([*SEARCH, *AXES, "--sample=4", "--jobs=2"]) == 0
    assert len(trained()) == 4
    assert [{**row, "seconds": ""} for row in rows()][:3] == undisturbed[:3]  # of two jobs the first one knows all
    assert "sweep.yaml has other settings (seed: 0, now 2)" in error_of(capfd, *SEARCH, *AXES, "--sample=4", "--seed=2")
    assert len(trained()) == 4
