"""sweep.py, on real MNIST limited to a few batches and on a program that it doesn't know."""

import contextlib
import itertools
import json
import multiprocessing.forkserver
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pytest
import yaml
from conftest import BASE, REPO, SHORT, metrics_of, wait_for
from sweeps import GRID, LOSS, NAMES, QUIET, grid, in_new_process, less_times, parts_of, rows, settings, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sweep
from main import main


def error(capfd, *args: str) -> str:
    """The one line with which a sweep ends that can't begin."""
    capfd.readouterr()
    assert sweep.main(list(args)) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


# A sweep from its beginning to its end.


def test_results_have_a_row_for_each_run_with_its_metrics(tiny):
    results = rows(tiny[0] / "logs/sweeps/tiny")
    assert [row["name"] for row in results] == NAMES
    assert {row["status"] for row in results} == {"finished"}
    swept = list(itertools.product(["4", "8"], ["false", "true"]))
    assert [(row["model.net.l1_chan"], row["model.optimizer.nesterov"]) for row in results] == swept
    for row in results:
        metrics = json.loads((tiny[0] / "logs/sweeps/tiny" / row["name"] / "metrics.json").read_text())
        del metrics["best_checkpoint"]
        assert {key: float(row[key]) for key in metrics} == metrics
    assert len({row["val/loss"] for row in results}) == 4


def test_duckdb_gives_results_their_types(tiny):
    table = duckdb.read_csv(str(tiny[0] / "logs/sweeps/tiny/results.csv"))
    kinds = dict(zip(table.columns, map(str, table.types)))
    assert kinds["model.net.l1_chan"] == kinds["epochs"] == "BIGINT" and kinds["model.optimizer.nesterov"] == "BOOLEAN"
    assert kinds["val/acc"] == kinds["test/loss"] == kinds["seconds"] == "DOUBLE"


def test_the_table_is_sorted_by_the_metric_and_the_last_line_says_where_all_is(tiny):
    lines = tiny[1].splitlines()
    header = next(index for index, line in enumerate(lines) if line.startswith("run"))
    assert lines[header].split()[:3] == ["run", "l1_chan", "nesterov"]
    order = sorted(rows(tiny[0] / "logs/sweeps/tiny"), key=lambda row: (-float(row["val/acc"]), row["name"]))
    assert [line.split()[0] for line in lines[header + 1 : header + 5]] == [row["name"][:3] for row in order]
    assert lines[-2].startswith("4 of 4 runs are finished") and lines[-2].endswith("logs/sweeps/tiny/results.csv")
    assert sum(line.startswith("[") for line in lines) == 4  # plain lines, since this is no terminal


def test_a_written_config_is_that_of_the_run_and_gives_the_same_numbers_alone(tiny, folder):
    sweeps = tiny[0] / "logs/sweeps/tiny"
    config = sweeps / "configs" / f"{NAMES[3]}.yaml"
    assert yaml.safe_load(config.read_text()) == yaml.safe_load((sweeps / NAMES[3] / "config.yaml").read_text())
    main(["fit", "--config", str(config), "--wandb=null", "--tensorboard=null"])
    (run,) = Path("logs/mnist").glob("version_*")
    assert metrics_of(run) == metrics_of(sweeps / NAMES[3])


def test_settings_typed_in_place_of_a_config_file_are_trained(folder):
    main(["fit", *BASE, '--config={"trainer": {"max_epochs": 1}}', *SHORT[1:], "--wandb=null"])
    assert metrics_of(Path("logs/mnist/version_0"))["epochs"] == 1


def test_nothing_is_warned_of(tiny):
    for name in NAMES:
        assert "warn" not in (tiny[0] / "logs/sweeps/tiny" / name / "output.log").read_text().lower()


def test_tensorboard_has_each_runs_metrics_and_what_was_swept(tiny):
    for name in NAMES:
        (event_file,) = (tiny[0] / "logs/sweeps/tiny" / name).glob("events.*")
        accumulator = EventAccumulator(str(event_file)).Reload()
        assert {"val/loss", "val/acc", "test/loss", "test/acc"} <= set(accumulator.Tags()["scalars"])
        content = accumulator.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        assert b"l1_chan" in content and b"nesterov" in content


def test_the_same_command_again_trains_nothing(tiny):
    before = {path: path.stat().st_mtime_ns for path in tiny[0].glob("logs/sweeps/tiny/0*/*")}
    results = less_times(tiny[0] / "logs/sweeps/tiny/results.csv")
    done = in_new_process("--config=tiny.yaml", cwd=tiny[0])
    assert done.returncode == 0 and "4 of 4 runs are finished" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in tiny[0].glob("logs/sweeps/tiny/0*/*")} == before
    assert less_times(tiny[0] / "logs/sweeps/tiny/results.csv") == results


def test_a_damaged_run_starts_over(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    sweeps = Path("logs/sweeps/tiny")
    before = less_times(sweeps / "results.csv")
    metrics = sweeps / NAMES[0] / "metrics.json"
    metrics.write_text(metrics.read_text()[:50])
    config = sweeps / NAMES[1] / "config.yaml"
    config.write_text(config.read_text().replace("max_epochs: 2", "max_epochs: 1"))
    (sweeps / "configs" / f"{NAMES[2]}.yaml").write_text("trainer: [")
    kept = {name: (sweeps / name / "metrics.json").stat().st_mtime_ns for name in NAMES}
    assert sweep.main(["--config=tiny.yaml"]) == 0
    assert less_times(sweeps / "results.csv") == before
    again = [name for name in NAMES if (sweeps / name / "metrics.json").stat().st_mtime_ns != kept[name]]
    assert again == NAMES[:2]


# From a grid to configs.


def test_keys_get_their_last_words_for_a_name():
    keys = ["model.net.init_args.width", "data.init_args.width", "model.optimizer.lr", "model.net.class_path"]
    assert list(sweep.short_names(keys).values()) == ["net.width", "data.width", "lr", "net"]


def test_values_get_short_names_that_tell_them_apart():
    values = [4, 0.1, -1, 1e-05, True, None, "a b/c", "torch.optim.Adam", [1, 2], "-x-", "4"]
    shown = ["4", "0.1", "-1", "1e-05", "true", "null", "a-b-c", "Adam", "1-2", "x"]
    assert sweep.labels("key", values)[:-1] == shown
    assert sweep.labels("key", values)[-1].startswith("4~")
    assert sweep.labels("key", values[:3]) == shown[:3]
    assert sweep.labels("config", [None, "a/b.yaml", ["c/d.yaml", "e.v2.yaml"]]) == ["null", "b", "d+e.v2"]
    alike = [{"class_path": "x.Adam"}, {"class_path": "y.Adam"}, "1", 1, "\u00e9", "\u00e8", "x" * 300, "x" * 301]
    names = sweep.run_names(Path(), {"model.key": alike}, [(index,) for index in range(len(alike))])
    assert [name[:8] for name in names] == [f"00{index}-key=" for index in range(len(alike))]
    assert len({name[4:] for name in names}) == len(alike)
    assert all(name.isascii() and len(name) < 200 for name in names)


AXES = {
    "independent": {"model.net.l1_chan": [4, 8], "trainer.max_epochs": [1, 2, 3], "data.batch_size": [32, 64]},
    "class and argument": {"model.net": ["CNN", "torch.nn.Flatten"], "model.optimizer.lr": [0.1, 0.2]},
    "argument of every class": {"model.optimizer": ["SGD", "Adam"], "model.optimizer.lr": [0.1, 0.2, 0.3]},
    "overlay and its keys": {"config": [None, "over.yaml"], "trainer.max_epochs": [1, 2], "data.batch_size": [32, 64]},
    "any value": {
        "trainer.limit_train_batches": [1, 2.0, 0.5, None],
        "tensorboard": [None, {"class_path": "RunFolderTensorBoard", "init_args": {"max_queue": 5}}],
        "trainer.callbacks": [None, [{"class_path": "Timer"}]],
        "evaluate_best": [True, False],
    },
}


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES.keys())
def test_combined_configs_are_what_the_parser_makes_of_each_combination(axes, folder):
    Path("over.yaml").write_text("trainer: {max_epochs: 7, limit_val_batches: 3}\nmodel: {init_args: {net: CNN}}\n")
    made = sweep.Grid("main:main", ["fit", *BASE], ["--seed_everything=true"], axes)
    for point in itertools.product(*(range(len(values)) for values in axes.values())):
        assert repr(sorted(made.config(point).items())) == repr(sorted(made._parse(point).items()))
    assert made.config(point)["seed_everything",] == 0


def test_each_value_of_an_independent_axis_is_parsed_once(folder, monkeypatch):
    parse, parsed = sweep.Grid._parse, []
    monkeypatch.setattr(sweep.Grid, "_parse", lambda grid, point: parsed.append(point) or parse(grid, point))
    made = sweep.Grid("main:main", ["fit", *BASE], [], AXES["independent"])
    for point in itertools.product(range(2), range(3), range(2)):
        made.config(point)
    assert parsed[:6] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 2, 0), (0, 0, 1), (1, 2, 1)]
    assert len(parsed) == 9  # three more points, for a comparison


def test_whole_numbers_stay_whole(folder):
    # 1 batch and 1.0, all of them, are different; which one the parser takes depended on what had been imported.
    done = in_new_process(*settings(folder, grid={"trainer.limit_predict_batches": [1, 2, 1.0]}), "--dry_run")
    assert done.returncode == 0, done.stderr
    configs = [yaml.safe_load(path.read_text()) for path in sorted(Path("logs/sweeps/tiny/configs").iterdir())]
    assert [repr(config["trainer"]["limit_predict_batches"]) for config in configs] == ["1", "2", "1.0"]
    assert [repr(config["trainer"]["limit_train_batches"]) for config in configs] == ["20"] * 3


def test_a_dry_run_writes_configs_prints_the_runs_and_trains_nothing(folder, capfd):
    assert sweep.main([*settings(folder), "--dry_run"]) == 0
    printed = capfd.readouterr().out.splitlines()
    assert [line.split() for line in printed[:3]] == [
        ["run", "l1_chan", "nesterov"],
        ["000", "4", "false"],
        ["001", "4", "true"],
    ]
    assert sorted(os.listdir("logs/sweeps/tiny")) == [".locks", "configs", "sweep.yaml"]
    assert sorted(os.listdir("logs/sweeps/tiny/configs")) == [f"{name}.yaml" for name in NAMES]


def test_the_original_grid_has_64_runs_and_is_no_part_of_another(folder):
    shutil.copytree(REPO / "configs", "configs")
    own = ["--base=configs/base.yaml", grid(model__optimizer__lr=[0.1]), "--name=own", "--dry_run"]
    assert sweep.main(own) == 0
    assert os.listdir("logs/sweeps/own/configs") == ["000-lr=0.1.yaml"]
    assert sweep.main(["--dry_run"]) == 0
    names = sorted(os.listdir("logs/sweeps/mnist/configs"))
    assert len(names) == 64
    assert names[17] == "017-l1_chan=4-l2_chan=16-l3_chan=16-lr=0.02-momentum=0.8-nesterov=true.yaml"


def test_an_extended_grid_goes_on_with_its_numbers(folder, capfd):
    assert sweep.main([*settings(folder), "--dry_run", "--limit=3"]) == 0
    assert len(os.listdir("logs/sweeps/tiny/configs")) == 3
    before = {path: path.read_text() for path in Path("logs/sweeps/tiny/configs").iterdir()}
    extended = {"model.net.l1_chan": [2, 4, 8], "model.optimizer.nesterov": [False, True]}
    assert sweep.main([*settings(folder, grid=extended), "--dry_run", f"--limit={10**30}"]) == 0
    assert {path: path.read_text() for path in before} == before
    new = sorted(os.listdir("logs/sweeps/tiny/configs"))[3:]
    assert new == [
        f"00{3 + i}-l1_chan={c}-nesterov={n}.yaml" for i, (c, n) in enumerate([(2, "false"), (2, "true"), (8, "true")])
    ]
    told = error(capfd, *settings(folder), "--dry_run")
    assert "model.net.l1_chan: [2, 4, 8], now it is [4, 8]: give the sweep another name, or delete its folder" in told


@pytest.mark.parametrize(
    "change, told",
    [
        (
            {"grid": {"model.net.l1_chan": [4], **{k: v for k, v in GRID.items() if "nest" in k}}},
            "l1_chan: [4, 8], now",
        ),
        (
            {"grid": {**GRID, "data.batch_size": [32, 64]}},
            "nesterov'], now it is ['model.net.l1_chan', 'model.optimizer.nesterov', 'data.batch_size']",
        ),
        (
            {"grid": {k: v for k, v in GRID.items() if "nest" in k}},
            "the axes: ['model.net.l1_chan', 'model.optimizer.nesterov'], now it is ['model.optimizer.nesterov']",
        ),
        ({"grid": dict(reversed(GRID.items()))}, "now it is ['model.optimizer.nesterov', 'model.net.l1_chan']"),
        ({"program": "other:main"}, "the program: ['main:main'], now it is ['other:main']"),
        ({"fixed": {**QUIET, "trainer.max_epochs": 5}}, "trainer.max_epochs: 2, now it is 5"),
        ({"base": [str(REPO / "configs/base.yaml"), "over.yaml"]}, "seed_everything: 138, now it is 7"),
    ],
    ids=["fewer values", "another axis", "an axis less", "another order", "program", "fixed", "base"],
)
def test_another_sweep_in_the_same_folder_is_refused(change, told, folder, capfd):
    Path("over.yaml").write_text("seed_everything: 7\n")
    Path("other.py").write_text("from main import main\n")
    assert sweep.main([*settings(folder), "--dry_run"]) == 0
    before = {path: path.read_text() for path in Path("logs").rglob("*") if path.is_file()}
    assert told in error(capfd, *settings(folder, **change), "--dry_run")
    assert {path: path.read_text() for path in Path("logs").rglob("*") if path.is_file()} == before


MISTAKES = {
    "empty grid": (["--grid={}"], "the grid is empty"),
    "empty axis": ([grid(a=[])], "a must be a list of one value or more, got []"),
    "no list": ([grid(a=3)], "a must be a list of one value or more, got 3"),
    "no file": ([grid(config=[{"a": 1}])], 'a value of config is a file, a list of files, or null, not {"a": 1}'),
    "twice": ([grid(model__net__l1_chan=[4, 8, 4])], "model.net.l1_chan has 4 twice"),
    "the same run": ([grid(model__net=["CNN", "mnist_cnn.CNN"])], "are the same run"),
    "unknown key": (
        [grid(model__optimizer__lrr=[0.1])],
        "unknown key model.optimizer.lrr (did you mean lr?) (with model.optimizer.lrr=0.1)",
    ),
    "unknown key of another program": (
        [*LOSS, "--base=[]", "--fixed={}", grid(data__batch_sise=[16])],
        "unrecognized arguments: --data.batch_sise (did you mean data.batch_size?)"
        " (with data.batch_sise=16, without a base)",
    ),
    "unknown fixed key of another program": (
        [*LOSS, "--base=[]", '--fixed={"model.basi": true}', grid(model__lr=[0.1])],
        "unrecognized arguments: --model.basi (did you mean model.bias?) (with model.lr=0.1, without a base)",
    ),
    "wrong value": ([grid(model__optimizer__lr=[0.1, "high"])], "model.optimizer.lr: expected float, got 'high'"),
    "in both": ([grid(trainer__max_epochs=[1, 2])], "trainer.max_epochs is both in grid and in fixed"),
    "no overlay": ([grid(config=["nix.yaml"])], "nix.yaml' (with "),
    "no base": (["--base=nix.yaml"], "nix.yaml' (with "),
    "no base at all": (["--base=[]"], "(with model.net.l1_chan=4, model.optimizer.nesterov=false, without a base)"),
    "base fails": ([f"--base=[{REPO}/configs/base.yaml, over.yaml]"], "unknown key modle.a (did you mean model?)"),
    "no program": (["--program=nix:main"], "program nix:main can't be imported: ModuleNotFoundError"),
    "no function": (["--program=main:nix"], "program main:nix can't be imported: AttributeError"),
    "broken program": (["--program=broken:main"], "program broken:main can't be imported: SyntaxError"),
    "no CLI": (["--program=foreign:makes_none"], "returns no LightningCLI, but 3"),
    "CLI not returned": (
        ["--program=foreign:forgets", "--base=[]", "--fixed={}", grid(model__lr=[1])],
        "returns no LightningCLI, but None",
    ),
    "path": (["--name=../x"], "can't be the name of a folder"),
    "no name": (["--name="], "can't be the name of a folder"),
    "long name": (["--name=" + 86 * "日"], "can't be the name of a folder"),
    "no configs": (["--config=nix.yaml"], "File does not exist: "),
    "setting": (["--nmae=x"], "unknown setting nmae (did you mean name?)"),
    "lost": (["--fixed.trainer.max_epochs=1", "--fixed.trainer.min_epochs=1"], "can be given once for each KEY"),
    "key that is no text": (["--grid={1: [1]}"], "grid and fixed take text as keys"),
    "value that JSON hasn't": (["--grid={a: [!!binary aGk=]}"], "and values as JSON has them, not ['a', [b'hi']]"),
    "half a class": (['--fixed={"a": {"class_path": "CNN", "init_args": 3}}'], "these settings can't be read"),
    "limit": (["--limit=0"], "limit: expected PositiveInt or null, got 0"),
    "mode": (["--mode=best"], "mode: expected Literal['max', 'min'], got best"),
    "failures": (["--max_failures=0"], "max_failures: Not of type PositiveInt: 0 does not conform to restriction v>0"),
}


@pytest.mark.parametrize("args, told", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_gets_a_line_and_leaves_nothing(args, told, foreign, capfd):
    Path("over.yaml").write_text("modle: {a: 1}\n")
    Path("broken.py").write_text("def main(:\n")
    assert told in error(capfd, *settings(foreign), *args)
    assert not Path("logs").exists()


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"metric": None}, "metric: null is no value"),
        ({"max_failures": None}, "max_failures: null is no value"),
        ({"slurm": {"options": None}}, "slurm.options: null is no value"),
        ({"slurm": {"tme": 3}}, "unknown setting slurm.tme (did you mean slurm.time?)"),
        ({"slurm": {"time": "1:00:00"}}, "slurm.time: Not of type PositiveInt: "),
        ({"slurm": [3]}, "slurm: expected its settings, got [3]"),
        ({"slurm": None}, "slurm: expected its settings, got None"),
        ({"slurm": b"a"}, "slurm: expected its settings, got b'a'"),
        ({"limit": "all"}, "limit: expected PositiveInt or null, got all"),
    ],
    ids=str,
)
def test_a_mistake_in_a_sweeps_file(changes, told, folder, capfd):
    assert error(capfd, *settings(folder, **changes)).startswith(f"error: {told}")
    assert os.listdir() == ["tiny.yaml"]


@pytest.mark.parametrize("content", ["[1]", "", "limit: ["], ids=["list", "empty", "broken"])
def test_a_file_that_holds_no_settings_is_named(content, folder, capfd):
    Path("odd.yaml").write_text(content)
    assert error(capfd, "--config=odd.yaml").endswith("(--config=odd.yaml)")


@pytest.mark.parametrize("content", [[], ["a.txt"]], ids=["empty", "other files"])
def test_a_folder_without_configs_is_a_mistake(content, folder, capfd):
    os.mkdir("some")
    for name in content:
        Path("some", name).touch()
    assert "some has no config files" in error(capfd, "--run_dir=some")
    assert "run_dir takes the place of base and grid" in error(capfd, *settings(folder), "--run_dir=some")


# From configs to runs.


def test_a_folder_of_configs_is_run(tiny, folder):
    shutil.copytree(tiny[0] / "logs/sweeps/tiny/configs", "mine")
    for name in NAMES[1:3]:
        os.remove(f"mine/{name}.yaml")
    Path("mine/own.yaml").write_text(Path(f"mine/{NAMES[0]}.yaml").read_text().replace("l1_chan: 4", "l1_chan: 5"))
    fixed = '--fixed={"wandb": null, "tensorboard": null}'
    assert sweep.main(["--run_dir=mine", fixed]) == 0
    results = rows(Path("logs/sweeps/mine"))
    assert [row["name"] for row in results] == [NAMES[0], NAMES[3], "own"]
    assert [row["model.optimizer.nesterov"] for row in results[:2]] == ["false", "true"]
    there = {row["name"]: row for row in rows(tiny[0] / "logs/sweeps/tiny")}
    for row in results[:2]:
        assert row["val/loss"] == there[row["name"]]["val/loss"]


def test_the_configs_of_a_dry_run_are_run_in_their_sweep(foreign):
    args = [*LOSS, "--name=tiny", "--base=[]", "--fixed={}", grid(model__lr=[0.1, 0.2])]
    assert sweep.main([*args, "--dry_run"]) == 0
    assert sweep.main([*LOSS, "--run_dir=logs/sweeps/tiny/configs"]) == 0
    assert [(row["status"], row["model.lr"]) for row in rows()] == [("finished", "0.1"), ("finished", "0.2")]
    assert sweep.main(args) == 0
    assert len(Path("trained.txt").read_text().splitlines()) == 2


def test_a_foreign_program_is_swept(foreign):
    Path("slow.yaml").write_text("model: {lr: 0.001}\ntrainer: {max_epochs: 3}\n")
    axes = grid(config=[None, "slow.yaml"], model__bias=[False, True], data__batch_size=[16, 32])
    args = [*LOSS, "--name=tiny", "--base=[]", axes]
    done = in_new_process(*args)
    assert done.returncode == 0, done.stderr
    results = rows()
    assert [row["name"] for row in results][::4] == [
        "000-config=null-bias=false-batch_size=16",
        "004-config=slow-bias=false-batch_size=16",
    ]
    assert [row["epochs"] for row in results] == ["2"] * 4 + ["3"] * 4
    assert all(float(results[i]["loss"]) < float(results[4 + i]["loss"]) for i in range(4))
    for row in results:
        metrics = json.loads(Path("logs/sweeps/tiny", row["name"], "metrics.json").read_text())
        assert Path("logs/sweeps/tiny", row["name"], metrics["best_checkpoint"]).is_file()
    best = min(results, key=lambda row: float(row["loss"]))
    line = done.stdout.splitlines()[9].split()
    assert (
        line[0] == best["name"][:3] and f"{float(best['loss']):.4f}" in line
    )  # behind eight lines of progress and the header


def test_a_program_may_write_its_own_metrics_and_config(foreign):
    Path("own.py").write_text(
        "import json, foreign\ndef main(args=None):\n    cli = foreign.main(args)\n"
        "    json.dump({'loss': 1, 'note': 'x'} if cli.model.lr < 0.2 else {}, open(cli.trainer.default_root_dir + "
        "'/metrics.json', 'w'))\n    return cli\n"
    )
    args = ["--program=own:main", "--metric=loss", "--name=tiny", "--base=[]", grid(model__lr=[0.1, 0.2])]
    assert sweep.main([*args, "--fixed.trainer.logger=false"]) == 0
    assert [(row["status"], row["loss"]) for row in rows()] == [("finished", "1"), ("finished", "")]


def test_another_folder_called_configs_is_left_alone(foreign):
    for name in ("configs", "a"):
        os.mkdir(name)
    Path("configs/a.yaml").write_text("model: {lr: 0.1}\n")
    Path("a/mine.txt").touch()
    assert sweep.main([*LOSS, "--run_dir=configs"]) == 0
    assert [row["name"] for row in rows(Path("logs/sweeps/configs"))] == ["a"]
    assert os.listdir("a") == ["mine.txt"] and Path("configs/a.yaml").read_text() == "model: {lr: 0.1}\n"


def test_failed_runs_are_told_and_the_rest_goes_on(foreign, capfd):
    faults = ["exit", None, "kill", "nan", "none"]
    args = [*LOSS, "--name=tiny", "--base=[]", grid(model__fault=faults)]
    assert sweep.main(args) == 1
    printed = capfd.readouterr().out
    assert [row["status"] for row in rows()] == ["failed", "finished", "failed", "failed", "finished"]
    for name, reason in {
        "000-fault=exit": "this fault was asked for",
        "002-fault=kill": "killed by SIGKILL",
        "003-fault=nan": "diverged: loss is nan",
    }.items():
        assert f"{name} failed: {reason}" in printed and f"(see logs/sweeps/tiny/{name}/output.log)" in printed
    assert "2 of 5 runs are finished" in printed
    tried = len(Path("trained.txt").read_text().splitlines())
    assert sweep.main([*args, "--retry_failed=false"]) == 1
    assert len(Path("trained.txt").read_text().splitlines()) == tried == 5
    assert sweep.main([*args, "--retry_failed", "--max_failures=9"]) == 1
    assert len(Path("trained.txt").read_text().splitlines()) == tried + 3


def test_a_fault_of_all_runs_stops_the_sweep(foreign, capfd):
    args = [*LOSS, "--name=tiny", "--base=[]", "--fixed.model.fault=exit", grid(model__lr=[0.1, 0.2, 0.3, 0.4, 0.5])]
    assert "stopped, since 3 runs failed in a row" in error(capfd, *args)
    assert [row["status"] for row in rows()] == ["failed"] * 3 + ["pending"] * 2
    assert "2 runs failed in a row" in error(capfd, *args, "--max_failures=2")


def test_a_misspelt_metric_is_told_after_the_first_run(foreign, capfd):
    args = ["--program=foreign:main", "--name=tiny", "--base=[]", grid(model__lr=[0.1, 0.2])]
    assert "reports no metric los (did you mean loss?)" in error(capfd, *args, "--metric=los")
    assert [row["status"] for row in rows()] == ["finished", "pending"]
    assert sweep.main([*args, "--metric=loss"]) == 0
    assert len(Path("trained.txt").read_text().splitlines()) == 2


def test_a_run_that_diverges_has_failed(folder, capfd):
    axes = {"model.optimizer.lr": [1e30, 0.1]}
    assert sweep.main(settings(folder, grid=axes)) == 1
    printed = capfd.readouterr().out
    assert "000-lr=1e+30 failed: train/loss became nan" in printed and "diverged" in printed
    assert [row["status"] for row in rows()] == ["failed", "finished"]


def test_ctrl_c_ends_the_current_run_cleanly_and_the_same_command_goes_on(foreign):
    args = [*LOSS, "--name=tiny", "--base=[]", grid(model__fault=[None, "pause", "x"])]
    process = start(*args)
    wait_for(lambda: os.path.exists("trained.txt") and len(Path("trained.txt").read_text().splitlines()) == 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in printed
    assert "001-fault=pause interrupted: stopped by Ctrl-C or a signal" in printed
    assert printed.splitlines()[-1] == "stopped: the same command goes on from here"
    assert [row["status"] for row in rows()] == ["finished", "interrupted", "pending"]
    assert "attempting graceful shutdown" in Path("logs/sweeps/tiny/001-fault=pause/output.log").read_text()
    assert in_new_process(*args).returncode == 0
    assert [row["status"] for row in rows()] == ["finished"] * 3
    assert len(Path("trained.txt").read_text().splitlines()) == 4


def test_ctrl_c_twice_ends_it_at_once(foreign):
    process = start(*LOSS, "--name=tiny", "--base=[]", grid(model__fault=["deaf", "x"]))
    wait_for(lambda: os.path.exists("trained.txt"))
    os.kill(process.pid, signal.SIGINT)
    assert "stopping 000-fault=deaf" in process.stdout.readline()
    time.sleep(1)
    assert process.poll() is None  # the run doesn't hear it
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert [row["status"] for row in rows()] == ["interrupted", "pending"]


def test_a_run_dies_with_its_sweep_and_starts_over(foreign):
    args = [*LOSS, "--name=tiny", "--base=[]", grid(model__fault=["wait"])]
    process = start(*args)
    wait_for(lambda: os.path.exists("trained.txt"))
    process.kill()
    process.wait()
    sweep.lock(Path("logs/sweeps/tiny"), "000-fault=wait.run", timeout=10)  # nobody holds it any more
    assert sweep.status(Path("logs/sweeps/tiny"), "000-fault=wait", "loss")[0] == "running"


def test_a_terminal_shows_the_whole_sweep_while_it_runs(foreign):
    pty = pytest.importorskip("pty")
    terminal, theirs = pty.openpty()
    args = [*LOSS, "--name=tiny", "--base=[]", grid(model__fault=[None, "exit", "pause"])]
    size = {"COLUMNS": "90", "LINES": "30", "TERM": "xterm-256color"}
    process = start(*args, stdout=theirs, stderr=theirs, env=os.environ | size)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # that is how a terminal's end is told
        while part := os.read(terminal, 10_000):
            shown += part
    os.close(terminal)
    assert process.wait() == 1
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r", "").splitlines()
    lines = [line.strip() for line in lines]
    assert "\u2501" in shown.decode()  # the bar
    assert any(re.fullmatch(r"\[2/3\]  best 0\.\d{4} \(000\)  0:00:\d\d left  1 failed", line) for line in lines)
    assert any(line.startswith("002  ") for line in lines)  # with the last line of its log
    assert lines[-2].startswith("2 of 3 runs are finished")


def test_two_sweeps_share_the_work(foreign):
    args = [*LOSS, "--name=tiny", "--base=[]", "--fixed.model.fault=pause", grid(model__lr=[0.1, 0.2, 0.3, 0.4])]
    one, other = start(*args), start(*args)
    printed = [process.communicate(timeout=300)[0] for process in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0)
    assert [row["status"] for row in rows()] == ["finished"] * 4
    assert len(Path("trained.txt").read_text().splitlines()) == 4
    shares = [re.findall(r"^\[.*?\] +(\d+)-", one, flags=re.MULTILINE) for one in printed]
    assert all(shares) and sorted(shares[0] + shares[1]) == ["000", "001", "002", "003"]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="/proc is Linux's")
@pytest.mark.parametrize("program", ["main", "foreign"])
def test_the_server_has_one_thread_and_no_device(program, foreign):
    own = [*LOSS, "--name=tiny", "--base=[]", grid(model__fault=["wait"])]
    process = start(*(settings(foreign) if program == "main" else own))
    wait_for(lambda: list(Path("logs/sweeps/tiny").glob("*/output.log")))
    server, _ = parts_of(process)
    assert "Threads:\t1\n" in Path(f"/proc/{server}/status").read_text()
    assert not [path for path in Path(f"/proc/{server}/fd").iterdir() if "nvidia" in os.readlink(path)]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_a_program_prepares_the_server_once(foreign):
    Path("own.py").write_text(
        "from foreign import main\ndef preload():\n    open('prepared.txt', 'a').write('x')\n    raise ImportError\n"
    )
    args = ["--program=own:main", "--metric=loss", "--name=tiny", "--base=[]", grid(model__lr=[0.1, 0.2])]
    assert in_new_process(*args).returncode == 0
    assert Path("prepared.txt").read_text() == "x"


def test_the_preparation_leaves_no_package_to_import(folder):
    script = "import main, sys\nmain.preload()\nbefore = set(sys.modules)\n"
    script += f"main.main({['fit', *BASE, *SHORT]})\nprint(len(before), *(set(sys.modules) - before))\n"
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    before, *late = done.stdout.splitlines()[-1].split()
    assert int(before) > 2000
    packages = {"PIL", "fsspec", "google", "matplotlib", "omegaconf", "pandas", "tensorboard", "wandb"}
    assert [name for name in late if name.partition(".")[0] in packages] == []


def test_a_run_that_was_killed_before_all_can_be_tried_again(foreign):
    """Before it had a log, so that only the sweep's note is there."""
    args = [*LOSS, "--name=tiny", "--base=[]", grid(model__fault=["x"])]
    run = Path("logs/sweeps/tiny/000-fault=x")
    run.mkdir(parents=True)
    (run / "status.json").write_text(json.dumps({"status": "failed", "reason": "killed by SIGKILL", "time": 1}))
    assert sweep.main(args) == 0
    assert [row["status"] for row in rows()] == ["finished"]


def test_a_server_that_is_killed_before_it_forks_is_started_anew(foreign, monkeypatch):
    start_server, killed = sweep.start_server, []

    def start_and_kill(program):
        start_server(program)
        if len(killed) % 2 == 0:  # each time once
            os.kill(multiprocessing.forkserver._forkserver._forkserver_pid, signal.SIGKILL)
        killed.append(program)

    monkeypatch.setattr(sweep, "start_server", start_and_kill)
    assert sweep.main([*LOSS, "--name=tiny", "--base=[]", grid(model__fault=["x"])]) == 0
    assert len(killed) == 4
