"""Samples and searches: points that are drawn, or that Optuna suggests."""

import json
import math
import os
import sys
from pathlib import Path

import optuna
import pytest
import yaml
from sweeps import FOREIGN, SWEEP, error_of, grid, rows, trained

import sweep
from mnist_cnn.run.errors import UserError
from mnist_cnn.sweeps.axes import DEFAULTS, Range, points_of, read_axes

RATE = {"low": 0.001, "high": 0.5, "log": True}
SEARCH = [*FOREIGN, "--search=tpe", "--fixed.seed_everything=1"]
AXES = [grid(model__lr=RATE, model__bias=[False, True], data__batch_size={"low": 8, "high": 32, "step": 8})]


def study() -> optuna.Study:
    journal = optuna.storages.journal.JournalFileBackend(str(SWEEP / "optuna.log"))
    return optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(journal))


def test_the_numbers_of_a_range():
    axes = {"a": [4, 30, 4], "b": [0, 2], "c": [0.1, 0.5, 0.1], "d": [0.1, 0.5], "e": [1, 3], "f": [0, 10**9]}
    grid = {f"{key}.{name}": value for key, axis in axes.items() for name, value in zip(DEFAULTS, axis)}
    grid["e.log"] = True
    assert {key: axis.numbers() for key, axis in read_axes(grid).items()} == {
        "a": [4, 8, 12, 16, 20, 24, 28],
        "b": [0, 1, 2],
        "c": [0.1, 0.2, 0.3, 0.4, 0.5],
        "d": [],
        "e": [1, 2, 3],
        "f": [],
    }
    assert Range(0.9, 0.9999999).closest(0.99999989) == 0.9999999  # not 1.0


def test_points_are_drawn_uniformly_within_their_ranges_and_by_the_seed():
    axes = {"a": Range(0.0, 1.0), "b": Range(0.001, 10.0, log=True), "c": Range(1, 1000, 1, log=True), "d": ["x", None]}
    drawn = points_of(axes, [], 1000, 0)
    assert len(drawn) == 1000 and drawn == points_of(axes, [], 1000, 0) != points_of(axes, [], 1000, 1)
    assert drawn[:10] == points_of(axes, [], 10, 0)  # a larger sample begins with the points of a smaller one
    expected = {
        "a": lambda value: value < 0.5,
        "b": lambda value: value < 0.1,
        "c": lambda value: value < math.sqrt(1000),
        "d": lambda value: value is None,
    }
    for key, is_low in expected.items():
        assert 0.45 < sum(is_low(point[key]) for point in drawn) / 1000 < 0.55, key
    assert all(isinstance(point["c"], int) and 1 <= point["c"] <= 1000 for point in drawn)
    assert all(0.001 <= point["b"] <= 10 and float(f"{point['b']:.6g}") == point["b"] for point in drawn)


def test_a_sample_of_a_grid_repeats_no_point_and_has_all_seeds(capfd):
    axes = {"a": list(range(10)), "seed_everything": [1, 2, 3], "b": Range(1, 3, 1)}
    exclude = [{"a": value} for value in range(7)]
    drawn = points_of(axes, exclude, 4, 0)
    assert len({json.dumps(point) for point in drawn}) == len(drawn) == 12
    assert len({(point["a"], point["b"]) for point in drawn}) == 4 and {point["a"] for point in drawn} <= {7, 8, 9}
    assert capfd.readouterr().out == ""
    assert len(points_of(axes, exclude, 10, 0)) == 27
    assert len(points_of(axes, [*exclude, {"a": 8, "seed_everything": 2}], 10, 0)) == 24
    assert capfd.readouterr().out == 2 * "sample: there are only 9 points, all of them are taken\n"


def test_an_item_of_exclude_need_not_be_drawn(capfd):
    axes = {key: list(range(10)) for key in "abcd"}
    assert len(points_of(axes, [{"a": 1, "b": 2, "c": 3}], 5, 0)) == 5
    assert len(points_of(axes, [{"a": value} for value in range(9)], 50, 0)) == 50
    with pytest.raises(UserError, match="exclude: no point of the grid has"):
        points_of(axes, [{"a": 10}], 5, 0)
    assert capfd.readouterr().out == ""


def test_a_sample_is_written_and_checked_before_the_first_run(foreign, capfd):
    args = [*FOREIGN, "--sample=5", *AXES]
    assert sweep.main([*args, "--dry_run"]) == 0
    configs = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((SWEEP / "configs").iterdir())}
    assert len(configs) == 5
    for name, config in configs.items():
        lr, bias = config["model"]["lr"], config["model"]["bias"]
        assert 0.001 <= lr <= 0.5 and config["data"]["batch_size"] in (8, 16, 24, 32)
        assert name[3:] == f"-lr={lr}-bias={json.dumps(bias)}-batch_size={config['data']['batch_size']}"
    assert sweep.main([*args, "--sample=6", "--dry_run"]) == 0
    assert set(configs) < {path.stem for path in (SWEEP / "configs").iterdir()}
    assert "is not in this grid" in error_of(capfd, *args, "--seed=1")
    assert not trained()


NEVER_ABOVE_2 = {"class_path": "optuna.pruners.ThresholdPruner", "init_args": {"upper": 2.0, "n_warmup_steps": 1}}


def test_runs_without_promise_are_pruned(foreign, capfd):
    args = [*SEARCH, "--fixed.trainer.max_epochs=3", grid(model__lr=[0.001, 0.5]), "--sample=2"]
    args += [f"--pruner={json.dumps(NEVER_ABOVE_2)}"]
    assert sweep.main(args) == 0
    finished, pruned = sorted(rows(), key=lambda row: row["status"])
    assert (finished["status"], pruned["status"], pruned["model.lr"]) == ("finished", "pruned", "0.001")
    printed = capfd.readouterr().out
    assert "pruned: after epoch 2" in printed and "1 of 2 runs are finished" in printed
    trial = study().trials[int(pruned["name"].partition("-")[0])]
    assert trial.state.name == "PRUNED" and [*trial.intermediate_values] == [0, 1] and trial.value > 2
    page = (SWEEP / "report.html").read_text()
    assert "1 of 2 runs are finished, 1 pruned" in page and "<td>after epoch 2" in page
    assert sweep.main(args) == 0 and len(trained()) == 2
    # Outside of the sweep, the config of a pruned run trains to the end.
    foreign_program = sys.modules["foreign"]
    cli = foreign_program.main(["fit", f"--config={SWEEP / pruned['name'] / 'config.yaml'}"])
    assert cli.trainer.current_epoch == 3


def test_a_search_ends_when_all_points_have_been_tried(foreign, capfd):
    args = [*SEARCH, grid(model__lr=[0.1, 0.2], model__bias=[False, True]), "--sample=20", "--jobs=2"]
    assert sweep.main([*args, '--exclude=[{"model.lr": 0.1, "model.bias": true}]']) == 0
    assert sorted((row["model.lr"], row["model.bias"]) for row in rows()) == [
        ("0.1", "false"),
        ("0.2", "false"),
        ("0.2", "true"),
    ]
    assert capfd.readouterr().out.count("search: all 3 points have been tried") == 1


def test_a_class_can_be_searched(foreign):
    axes = grid(trainer__callbacks=[None, [{"class_path": "DeviceStatsMonitor"}]])
    assert sweep.main([*SEARCH, axes, "--sample=2", "--dry_run"]) == 0


MISTAKES = {
    "no high": ([grid(model__lr={"low": 0.1})], "grid: model.lr: a range is {low: 0.01, high: 0.2}, with opt"),
    "no number": ([grid(model__lr={"low": "a", "high": 1})], "grid: model.lr: a range is"),
    "misspelt": ([grid(model__lr={"low": 0.1, "hihg": 0.2})], "grid: model.lr: a range is {low: 0.01"),
    "empty": ([grid(model__lr={"low": 0.1, "high": 0.1})], "model.lr: low, 0.1, must be below high, 0.1"),
    "low above high": ([grid(model__lr={"low": 0.2, "high": 0.1})], "model.lr: low, 0.2, must be below high, 0.1"),
    "log of 0": ([grid(model__lr={"low": 0, "high": 0.1, "log": True})], "with log, low must be above 0, got 0"),
    "log and step": ([grid(model__lr={"low": 1, "high": 9, "log": True, "step": 2})], "step must be above 0, and om"),
    "step": ([grid(model__lr={"low": 0.1, "high": 0.2, "step": 0})], "step must be above 0"),
    "no sample": (["--sample=null", grid(model__lr=RATE)], "model.lr has too many values to list: set sample"),
    "sample": (["--sample=0", *AXES], "sample: "),
    "excludes all": ([*AXES, '--exclude=[{"model.bias": true}, {"model.bias": false}]'], "exclude leaves no point"),
    "log": ([grid(model__lr={"low": 1, "high": 9, "log": "no"})], "model.lr: a range is"),
    "excludes nothing": (
        [*AXES, '--exclude=[{"model.bia": true}]'],
        'has {"model.bia": true} (did you mean model.bias?)',
    ),
    "search": (["--search=tp", *AXES], "search: Expected one of ['tpe'], got 'tp'"),
    "search without sample": (["--search=tpe", "--sample=null", *AXES], "a search needs sample, the number of runs"),
    "no sampler": (["--sampler=optuna.samplers.TPSampler", *AXES], "sampler: module 'optuna.samplers' has no"),
    "a pruner as sampler": (["--sampler=optuna.pruners.MedianPruner", *AXES], "to a subclass of BaseSampler"),
    "no pruner": (["--pruner=Median", *AXES], "pruner: there is no class Median of this kind"),
    "seeds": (["--search=tpe", grid(seed_everything=[1, 2])], "move seed_everything to fixed"),
    "wrong end": (["--search=tpe", grid(data__batch_size={"low": 1.5, "high": 8})], "data.batch_size"),
    "search excludes nothing": (
        ["--search=tpe", *AXES, '--exclude=[{"model.bias": 3}]'],
        'no point of the grid has {"model.bias": 3}',
    ),
    "folder": (["--config_dir=some", "--base=[]", "--grid={}"], "it has no base, grid"),
}


@pytest.mark.parametrize("args, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_gets_a_line_and_leaves_nothing(args, message, foreign, capfd):
    os.mkdir("some")
    Path("some/a.yaml").touch()
    assert message in error_of(capfd, *FOREIGN, "--sample=5", *args)
    assert not Path("logs").exists()


def test_a_search_without_optuna(foreign, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "a search needs Optuna: pip install '.[search]'" in error_of(capfd, *SEARCH, *AXES, "--sample=2")
    assert not Path("logs").exists()
