"""sweep.py, on real MNIST limited to a few batches and on a program that shares nothing with mnist_cnn."""

import csv
import functools
import itertools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path

import duckdb
import pytest
import torch
import yaml
from conftest import BASE, REPO, metrics_of
from sweeps import FOREIGN, NAMES, SWEEP, error_of, grid, less_times, rows, settings, statuses, trained
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sweep
from main import main
from mnist_cnn.sweeps.axes import points_of
from mnist_cnn.sweeps.grid import complete_configs, labels, parse, run_names, short_names
from mnist_cnn.sweeps.local import Sweep, idle

# A sweep of four points and three seeds from its beginning to its end ------------------------------------------------


def test_a_config_of_a_sweep_means_its_run(tiny, monkeypatch):
    monkeypatch.chdir(tiny[0])
    for name in NAMES[:2]:
        cli = main(["test", f"--config={SWEEP}/configs/{name}.yaml"])
        metrics = metrics_of(SWEEP / name)
        assert cli.trainer.callback_metrics["test/loss"].item() == metrics["test/loss"]


def test_results_have_a_row_for_each_run_with_its_metrics(tiny):
    results = rows(tiny[0] / SWEEP)
    assert [row["name"] for row in results] == NAMES
    assert {row["status"] for row in results} == {"finished"}
    swept = list(itertools.product(["4", "8"], ["false", "true"], ["1", "2", "3"]))
    keys = ("model.net.l1_chan", "model.optimizer.nesterov", "seed_everything")
    assert [tuple(row[key] for key in keys) for row in results] == swept
    for row in results:
        metrics = json.loads((tiny[0] / SWEEP / row["name"] / "metrics.json").read_text())
        assert row["metrics_of"] == Path(metrics.pop("best_checkpoint")).name
        assert {key: float(row[key]) for key in metrics} == metrics
    assert len({row["val/loss"] for row in results}) == 12


def test_duckdb_gives_results_their_types(tiny):
    table = duckdb.read_csv(str(tiny[0] / SWEEP / "results.csv"))
    kinds = dict(zip(table.columns, map(str, table.types)))
    assert kinds["model.net.l1_chan"] == kinds["epochs"] == "BIGINT" and kinds["model.optimizer.nesterov"] == "BOOLEAN"
    assert kinds["val/acc"] == kinds["test/loss"] == kinds["seconds"] == "DOUBLE"


def test_runs_that_differ_in_their_seed_are_one_point(tiny):
    losses: dict[tuple[str, ...], list[float]] = {}
    for row in rows(tiny[0] / SWEEP):
        losses.setdefault((row["model.net.l1_chan"], row["model.optimizer.nesterov"]), []).append(float(row["val/acc"]))
    order = sorted(losses, key=lambda point: -statistics.fmean(losses[point]))
    with open(tiny[0] / SWEEP / "results_by_point.csv") as file:
        points = list(csv.DictReader(file))
    assert [(point["model.net.l1_chan"], point["model.optimizer.nesterov"]) for point in points] == order
    for point, key in zip(points, order):
        assert point["seeds"] == "3" and float(point["val/acc"]) == statistics.fmean(losses[key])
        assert float(point["val/acc std"]) == pytest.approx(statistics.stdev(losses[key]))
    lines = tiny[1].splitlines()
    (header,) = [index for index, line in enumerate(lines) if line.startswith("run ")]
    shown = [re.split(r"  +", line) for line in lines[header : header + 5]]
    assert shown[0][:4] == ["run", "seeds", "l1_chan", "nesterov"]
    for row, key in zip(shown[1:], order):
        assert row[1:4] == ["3", *key]
        assert row[shown[0].index("val/acc")].startswith(f"{statistics.fmean(losses[key]):.4f} ± ")
    verdict, page = lines[header + 5], (tiny[0] / SWEEP / "report.html").read_text()
    assert re.match(r"best 0\.\d+ ± 0\.\d+ \(3 seeds\); [0-3] others? (is|are) within one standard error", verdict)
    assert verdict in page and "Best point" in page and "lies between seeds of the same point" in page


def test_each_run_has_a_line_and_the_last_ones_say_where_the_results_are(tiny):
    lines = tiny[1].splitlines()
    assert lines[-2].startswith("12 of 12 runs are finished") and lines[-2].endswith("logs/sweeps/tiny/results.csv")
    assert lines[-1] == "report: logs/sweeps/tiny/report.html" and (tiny[0] / SWEEP / "report.html").is_file()
    assert sum(line.startswith("[") for line in lines) == 12  # this is not a terminal


def test_a_written_config_is_that_of_the_run_and_gives_the_same_numbers_alone(tiny, folder):
    config, run = tiny[0] / SWEEP / "configs" / f"{NAMES[3]}.yaml", tiny[0] / SWEEP / NAMES[3]
    assert yaml.safe_load(config.read_text()) == yaml.safe_load((run / "config.yaml").read_text())
    main(["fit", "--config", str(config), "--wandb=null", "--tensorboard=null"])
    assert metrics_of(Path("logs/mnist/version_0")) == metrics_of(run)


def test_logs_have_no_warnings(tiny):
    for name in NAMES:
        assert "warn" not in (tiny[0] / SWEEP / name / "output.log").read_text().lower()


def test_tensorboard_has_each_runs_metrics_and_what_was_swept(tiny):
    for name in NAMES:
        (event_file,) = (tiny[0] / SWEEP / name).glob("events.*")
        accumulator = EventAccumulator(str(event_file)).Reload()
        assert {"val/loss", "val/acc", "test/loss", "test/acc"} <= set(accumulator.Tags()["scalars"])
        content = accumulator.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        assert b"l1_chan" in content and b"nesterov" in content


def test_wandb_groups_the_runs_under_their_names(tiny):
    logs = [file.read_bytes() for file in (tiny[0] / "logs/wandb").glob("offline-run-*/run-*.wandb")]
    assert len(logs) == 12
    for name in NAMES:
        assert sum(name.encode() in log and b"tiny" in log for log in logs) == 1


def test_the_same_command_again_only_repeats_unfinished_runs(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    before = less_times(SWEEP / "results.csv")
    (SWEEP / NAMES[1] / "metrics.json").unlink()  # as kill -9 leaves it
    kept = {path: path.stat().st_mtime_ns for path in SWEEP.glob("0*/*") if path.parent.name != NAMES[1]}
    assert sweep.main(["--config=tiny.yaml"]) == 0
    assert less_times(SWEEP / "results.csv") == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_folder_of_configs_is_run(tiny, folder):
    shutil.copytree(tiny[0] / SWEEP / "configs", "mine")
    for name in {*NAMES} - {NAMES[3]}:
        os.remove(f"mine/{name}.yaml")
    Path("mine/own.yaml").write_text("# no sweep\n" + Path(f"mine/{NAMES[3]}.yaml").read_text().partition("\n")[2])
    options = ["--metric=test/loss", "--mode=min", '--fixed={"wandb": null, "tensorboard": null}']
    assert sweep.main(["--config_dir=mine", *options]) == 0
    there = {row["name"]: row for row in rows(tiny[0] / SWEEP)}
    swept, own = rows(Path("logs/sweeps/mine"))
    assert yaml.safe_load(Path("logs/sweeps/mine/sweep.yaml").read_text())["metric"] == "test/loss"
    page = Path("logs/sweeps/mine/report.html").read_text()
    assert "The metric is test/loss; lower is better." in page
    assert (swept["name"], own["name"]) == (NAMES[3], "own")
    assert (swept["model.optimizer.nesterov"], own["model.optimizer.nesterov"]) == ("true", "")
    assert swept["val/loss"] == own["val/loss"] == there[NAMES[3]]["val/loss"]


# From a grid to configs -----------------------------------------------------------------------------------------------


def test_keys_get_their_last_word_or_all_words_for_a_name():
    keys = ["model.net.init_args.width", "data.init_args.width", "model.optimizer.lr", "model.net.class_path"]
    assert list(short_names(keys).values()) == ["model.net.width", "data.width", "lr", "net"]


def test_values_get_short_names_that_distinguish_them():
    values = [4, 0.1, -1, 1e-05, True, None, "a b/c", "torch.optim.Adam", [1, 2], "-x-", "4"]
    shown = ["4", "0.1", "-1", "1e-05", "true", "null", "a-c", "Adam", "1-2", "-x-"]
    assert [*labels(values).values()][:-1] == shown
    assert labels(values)['"4"'].startswith("4~")
    assert [*labels(values[:3]).values()] == shown[:3]
    assert [*labels([None, "a/b.yaml", ["c/d.yaml", "e.v2.yaml"]]).values()] == ["null", "b", "d-e.v2"]
    alike = [{"class_path": "x.Adam"}, {"class_path": "y.Adam"}, "1", 1, "\u00e9", "\u00e8", "x" * 300, "x" * 301]
    names = run_names([], [{"model.key": value} for value in alike])
    assert [name[:8] for name in names] == [f"00{index}-key=" for index in range(len(alike))]
    assert len({name[4:] for name in names}) == len(alike)
    assert all(name.isascii() and len(name) < 200 for name in names)


AXES = {
    "independent": {"model.net": ["CNN", "torch.nn.Flatten"], "model.optimizer.lr": [0.1, 0.2]},
    "argument of every class": {"model.optimizer": ["SGD", "Adam"], "model.optimizer.lr": [0.1, 0.2]},
    "overlay and its keys": {"config": [None, "over.yaml"], "trainer.max_epochs": [1, 2], "data.batch_size": [32, 64]},
    "any value": {
        "trainer.limit_train_batches": [1, 1.0, None],
        "trainer.callbacks": [None, [{"class_path": "DeviceStatsMonitor"}]],
        "early_stopping": [None, {"class_path": "EarlyStopping", "init_args": {"monitor": "val/acc"}}],
    },
}


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES.keys())
def test_combined_configs_are_what_the_parser_makes_of_each_combination(axes, folder):
    Path("over.yaml").write_text("trainer: {max_epochs: 7, limit_val_batches: 3}\nmodel: {init_args: {net: CNN}}\n")
    swept = {"program": "main:main", "base": [BASE[1]], "fixed": {"trainer.min_epochs": 1}}
    points = points_of(axes, [])
    parse_json = functools.cache(lambda code: parse(swept, json.loads(code)))
    for point, config in zip(points, complete_configs(lambda point: parse_json(json.dumps(point)), points)):
        assert repr(sorted(config.items())) == repr(sorted(parse_json(json.dumps(point)).items()))


def test_pairs_vary_together_and_excluded_points_are_left_out(folder, capfd):
    axes = {
        "model.net.l1_chan, model.net.l2_chan": [[4, 8], [8, 16]],
        "model.optimizer": ["SGD", {"class_path": "SGD", "init_args": {"momentum": 0.8}}, "Adam"],
        "model.optimizer.lr": [0.1, 0.01],
    }
    exclude = [
        {"model.optimizer": "Adam", "model.optimizer.lr": 0.1},
        {"model.net.l1_chan": 8, "model.optimizer": "SGD"},
    ]
    assert sweep.main([*settings(folder, grid=axes, exclude=exclude), "--dry_run"]) == 0
    configs = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((SWEEP / "configs").iterdir())}
    assert len(configs) == 8
    assert next(iter(configs)) == "000-l1_chan=4-l2_chan=8-optimizer=SGD-lr=0.1"
    found = set()
    for config in configs.values():
        net, optimizer = (config["model"]["init_args"][name] for name in ("net", "optimizer"))
        arguments = optimizer["init_args"]
        kind = optimizer["class_path"].rpartition(".")[2], arguments.get("momentum"), arguments["lr"]
        found.add((net["init_args"]["l1_chan"], net["init_args"]["l2_chan"], *kind))
    sgd = {(*net, "SGD", 0.8, lr) for net in ((4, 8), (8, 16)) for lr in (0.1, 0.01)}
    assert found == sgd | {
        (4, 8, "SGD", 0.9, 0.1),
        (4, 8, "SGD", 0.9, 0.01),
        (4, 8, "Adam", None, 0.01),
        (8, 16, "Adam", None, 0.01),
    }


def test_a_class_keeps_the_arguments_of_base_and_can_be_excluded(folder):
    nets = [{"class_path": "mnist_cnn.nets.CNN", "init_args": {"l1_chan": chan}} for chan in (5, 6)]
    exclude = [{"model.net": {"class_path": "mnist_cnn.nets.CNN", "init_args": {"l1_chan": 5}}}]
    args = settings(folder, grid={"model.net": ["CNN", *nets]}, exclude=exclude, fixed={"model.net.fc1_out": 9})
    assert sweep.main([*args, "--dry_run"]) == 0
    configs = [yaml.safe_load(path.read_text()) for path in sorted((SWEEP / "configs").iterdir())]
    found = [config["model"]["init_args"]["net"]["init_args"] for config in configs]
    assert [net["l1_chan"] for net in found] == [16, 6]
    assert all((net["l2_chan"], net["l3_chan"], net["fc1_out"]) == (24, 128, 9) for net in found)


def test_a_point_that_is_excluded_need_not_be_valid(folder, capfd):
    axes = {"model.optimizer": ["SGD", "Adam"], "data.batch_size": [8, 0]}
    args = settings(folder, grid=axes, exclude=[{"data.batch_size": 0, "model.optimizer": "SGD"}])
    assert "data.batch_size" in error_of(capfd, *args, "--dry_run")
    args = settings(folder, grid=axes, exclude=[{"data.batch_size": 0}])
    assert sweep.main([*args, "--dry_run"]) == 0
    assert len(os.listdir(SWEEP / "configs")) == 2


def test_each_value_of_an_independent_axis_is_parsed_once():
    parsed = []

    def parse(point):
        parsed.append(tuple(point.values()))
        return {("a",): point["x"], ("b", "c"): point["y"], ("d",): point["z"]}

    points = [dict(zip("xyz", values)) for values in itertools.product(range(2), range(3), range(50))]
    assert complete_configs(parse, points) == [parse(point) for point in points]
    alone = [(1, 0, 0), (0, 1, 0), (0, 2, 0), *((0, 0, index) for index in range(1, 50))]
    assert parsed[:53] == [(0, 0, 0), *alone] and 54 < len(parsed) - len(points) <= 57  # and up to four for comparison


def test_axes_that_act_on_each_other_are_parsed_in_all_combinations():
    points = [dict(zip("xyz", values)) for values in itertools.product(range(2), range(2), range(2))]

    def hidden(point):  # changes with all three only
        return {("a",): int(all(point.values()))}

    def nested(point):
        return {("a",): {}} if point["x"] else {("a", "b"): point["y"]}

    assert complete_configs(hidden, points) == list(map(hidden, points))
    assert complete_configs(nested, points) == list(map(nested, points))


def test_a_dry_run_writes_configs_prints_the_runs_and_trains_nothing(foreign, capfd):
    args = [*FOREIGN, "--grid.model.lr=[0.1, 0.2]", "--grid.model.bias=[false, true]", "--dry_run"]
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "loss"}}
    assert sweep.main([*args, f"--fixed.trainer.callbacks={json.dumps([stopping])}"]) == 0
    printed = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert printed[1:5] == [
        ["run", "lr", "bias"],
        ["000", "0.1", "false"],
        ["001", "0.1", "true"],
        ["002", "0.2", "false"],
    ]
    assert sorted(os.listdir(SWEEP)) == [".locks", "configs", "sweep.yaml"]
    assert sorted(os.listdir(SWEEP / "configs"))[::3] == ["000-lr=0.1-bias=false.yaml", "003-lr=0.2-bias=true.yaml"]
    assert yaml.safe_load((SWEEP / "sweep.yaml").read_text())["grid"] == {
        "model.lr": [0.1, 0.2],
        "model.bias": [False, True],
    }


def test_an_extended_grid_keeps_the_numbers_of_its_runs(foreign, capfd):
    assert sweep.main([*FOREIGN, grid(model__lr=[0.1, 0.2], model__bias=[False, True]), "--dry_run", "--limit=3"]) == 0
    before = {path: path.read_text() for path in (SWEEP / "configs").iterdir()}
    assert len(before) == 3
    assert sweep.main([*FOREIGN, grid(model__lr=[0.05, 0.1, 0.2], model__bias=[False, True]), "--dry_run"]) == 0
    assert {path: path.read_text() for path in before} == before
    new = [name[:16] for name in sorted(os.listdir(SWEEP / "configs"))[3:]]
    assert new == ["003-lr=0.05-bias", "004-lr=0.05-bias", "005-lr=0.2-bias="]
    line = error_of(capfd, *FOREIGN, grid(model__lr=[0.1, 0.2], model__bias=[False, True]), "--dry_run")
    assert "run 003-lr=0.05-bias=false is not in this grid: give the sweep another name, or delete its folder" in line


TWO = {"model.lr": [0.1, 0.2], "model.bias": [False, True]}
CHANGES = {
    "fewer values": ({"grid": TWO | {"model.lr": [0.1]}}, "run 002-lr=0.2-bias=false is not in this grid: give"),
    "another axis": ({"grid": TWO | {"data.batch_size": [8]}}, "run 000-lr=0.1-bias=false is not in this grid"),
    "an axis less": ({"grid": {"model.lr": [0.1, 0.2]}}, "run 000-lr=0.1-bias=false is not in this grid"),
    "another order": ({"grid": dict(reversed(TWO.items()))}, "run 000-lr=0.1-bias=false is not in this grid"),
    "program": (
        {"program": "other:main"},
        "sweep.yaml has other settings (program: foreign:main, now other:main): give",
    ),
    "fixed": ({"fixed": {"trainer.max_epochs": 5}}, "false.yaml has other settings (trainer.max_epochs: 2, now 5)"),
    "base": ({"base": "over.yaml"}, "000-lr=0.1-bias=false.yaml has other settings (seed_everything: 7, now 9)"),
    "content of base": (
        {},
        "000-lr=0.1-bias=false.yaml has other settings (seed_everything: 7, now 8): give the sweep",
    ),
}


@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES.keys())
def test_another_sweep_in_the_same_folder_is_refused(change, message, foreign, capfd):
    Path("mine.yaml").write_text("seed_everything: 7\n")
    Path("over.yaml").write_text("seed_everything: 9\n")
    Path("other.py").write_text("from foreign import main\n")
    content = {"program": "foreign:main", "name": "tiny", "base": "mine.yaml", "grid": TWO}
    for name, sweep_settings in (("a.yaml", content), ("b.yaml", content | change)):
        Path(name).write_text(yaml.safe_dump(sweep_settings, sort_keys=False))
    assert sweep.main(["--config=a.yaml", "--dry_run"]) == 0
    Path("mine.yaml").write_text(f"seed_everything: {7 if change else 8}\n")
    before = {path: path.read_text() for path in Path("logs").rglob("*") if path.is_file()}
    assert message in error_of(capfd, "--config=b.yaml", "--dry_run")
    assert {path: path.read_text() for path in Path("logs").rglob("*") if path.is_file()} == before


MISTAKES = {
    "empty grid": (["--grid={}"], "the grid is empty"),
    "empty axis": ([grid(a=[])], "a must be a list of different values or a range, got []"),
    "no list": ([grid(a=3)], "a must be a list of different values or a range, got 3"),
    "twice": (
        [grid(model__net__l1_chan=[4, 8, 4])],
        "l1_chan must be a list of different values or a range, got [4, 8, 4]",
    ),
    "two spellings": (
        ['--grid={"model.optimizer.lr": [0.1], "model": {"init_args": {"optimizer.init_args.lr": [0.2]}}}'],
        "model.optimizer.lr is given twice",
    ),
    "unknown key": (
        [grid(model__optimizer__lrr=[0.1])],
        "unknown key model.optimizer.lrr (did you mean model.optimizer.lr?) (with model.optimizer.lrr=0.1)",
    ),
    "unknown key of another program": (
        [*FOREIGN, "--base=[]", "--fixed={}", grid(data__batch_sise=[16])],
        "unknown key data.batch_sise (did you mean data.batch_size?) (with data.batch_sise=16; base is not given)",
    ),
    "unknown fixed key of another program": (
        [*FOREIGN, "--base=[]", '--fixed={"model.basi": true}', grid(model__lr=[0.1])],
        "unknown key model.basi (did you mean model.bias?) (with model.lr=0.1; base is not given)",
    ),
    "wrong value": ([grid(model__optimizer__lr=[0.1, "high"])], "'high' (with model.optimizer.lr=\"high\")"),
    "no overlay": ([grid(config=["nix.yaml"])], "nix.yaml' (with "),
    "no base": (["--base=nix.yaml"], "nix.yaml' (with "),
    "no base at all": (["--base=[]"], "(with model.net.l1_chan=4, model.optimizer.nesterov=false; base is not given)"),
    "no model": (["--base=[]", "--fixed={}", grid(seed_everything=[1])], "no config file names a model (with seed_e"),
    "base fails": (
        [f"--base=[{REPO}/configs/base.yaml, over.yaml]"],
        "over.yaml: unknown key modle (did you mean model?)",
    ),
    "no program": (["--program=nix:main"], "program nix:main cannot be imported: ModuleNotFoundError"),
    "no function": (["--program=main:nix"], "program main:nix cannot be imported: AttributeError"),
    "broken program": (["--program=broken:main"], "program broken:main cannot be imported: SyntaxError"),
    "no CLI": (["--program=foreign:makes_none"], "program foreign:makes_none prints no config"),
    "no subcommands": (["--program=foreign:has_no_fit"], "has no subcommand fit: omit run=False, or parse args[1:]"),
    "__main__": (
        ["--program=foreign:takes_any_model", "--base=[]", "--fixed={}", grid(model=["__main__.Line"])],
        "__main__ is sweep.py here: write foreign.CLASS instead",
    ),
    "unguarded": (["--program=unguarded:main"], "program unguarded:main cannot be imported: SystemExit"),
    "path": (["--name=../x"], "is not the name of a folder"),
    "no name": (["--name="], "is not the name of a folder"),
    "no configs": (["--config=nix.yaml"], "nix.yaml"),
    "broken configs": (["--config=odd.yaml"], "config file odd.yaml: it has no settings"),
    "setting": (["--nmae=x"], "unknown key nmae (did you mean name?)"),
    "limit": (["--limit=0"], "limit: "),
    "jobs": (["--jobs=0"], "jobs: "),
    "pairs": (
        [grid(**{"data.batch_size, model.optimizer.lr": [[1, 0.1], [2]]})],
        "must be lists of 2 values, one of th",
    ),
    "key twice": ([grid(**{"data.batch_size, data.batch_size": [[1, 2]]})], "data.batch_size is given twice"),
    "excludes nothing": (
        ['--exclude=[{"model.net.l1_chann": 4}]'],
        'no point of the grid has {"model.net.l1_chann": 4}',
    ),
    "excludes all": (['--exclude=[{"model.net.l1_chan": 4}, {"model.net.l1_chan": 8}]'], "exclude leaves no point"),
    "key of one class": (
        ['--grid={"model.optimizer": ["SGD", "Adam"], "model.optimizer.momentum": [0.8, 0.9]}'],
        "write the class with its arguments as one value, or use exclude",
    ),
    "mode": (["--mode=best"], "mode: "),
    "failures": (["--max_failures=0"], "max_failures: "),
    "slurm's setting": (["--slurm.tme=3"], "unknown key slurm.tme (did you mean slurm.time?)"),
    "slurm's time": (["--slurm.time=1:00:00"], "slurm.time: "),
    "config_dir and grid": (["--config_dir=some"], "must have config files (*.yaml); it has no base, grid"),
    "config_dir and exclude": (
        ["--config_dir=some", "--base=[]", "--grid={}", '--exclude=[{"config": "some/a.yaml"}]'],
        "it has no base, grid and exclude",
    ),
    "empty config_dir": (
        ["--config_dir=some", "--base=[]", "--grid={}"],
        "config_dir some must have config files (*.yaml); it has no base, grid and exclude",
    ),
}


@pytest.mark.parametrize("args, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_gets_a_line_and_leaves_nothing(args, message, foreign, capfd):
    Path("over.yaml").write_text("modle: {a: 1}\n")
    Path("odd.yaml").write_text("[1]")
    Path("broken.py").write_text("def main(:\n")
    Path("unguarded.py").write_text("from foreign import main\nmain()\n")
    os.mkdir("some")
    assert message in error_of(capfd, *settings(foreign), *args)
    assert not Path("logs").exists()


# From configs to runs -------------------------------------------------------------------------------------------------


def test_a_dry_run_is_continued_by_its_folder_and_by_its_command(foreign):
    args = [*FOREIGN, grid(model__lr=[0.1, 0.2])]
    assert sweep.main([*args, "--dry_run"]) == 0
    assert sweep.main([*FOREIGN[:3], f"--config_dir={SWEEP}/configs"]) == 0
    assert [(row["status"], row["model.lr"]) for row in rows()] == [("finished", "0.1"), ("finished", "0.2")]
    assert yaml.safe_load((SWEEP / "sweep.yaml").read_text())["grid"] == {"model.lr": [0.1, 0.2]}
    assert sweep.main(args) == 0
    assert len(trained()) == 2


def test_a_foreign_program_is_swept(foreign, capfd):
    Path("slow.yaml").write_text("model: {lr: 0.001}\ntrainer: {max_epochs: 3}\n")
    axes = grid(config=[None, "slow.yaml"], data__batch_size=[16, 32])
    assert sweep.main([*FOREIGN, axes]) == 0
    results = rows()
    assert [row["name"] for row in results][::2] == ["000-config=null-batch_size=16", "002-config=slow-batch_size=16"]
    assert [row["epochs"] for row in results] == ["2"] * 2 + ["3"] * 2
    assert all(float(results[i]["loss"]) < float(results[2 + i]["loss"]) for i in range(2))
    for row in results:
        run = SWEEP / row["name"]
        assert json.loads((run / "metrics.json").read_text())["best_checkpoint"] is None  # nothing is monitored
        assert yaml.safe_load((run / "config.yaml").read_text())["data"]["batch_size"] == int(row["data.batch_size"])
    best = min(results, key=lambda row: float(row["loss"]))
    first = capfd.readouterr().out.partition("\nrun ")[2].splitlines()[1].split()
    assert first[0] == best["name"][:3] and f"{float(best['loss']):.4f}" in first


def test_metrics_are_those_of_the_best_checkpoint_or_else_of_the_last_epoch(foreign):
    best = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "loss"}}  # one class, not a list
    args = ["--program=foreign:evaluates", *FOREIGN[1:], "--fixed.model.lr=4", grid(trainer__callbacks=[best, None])]
    assert sweep.main(args) == 0  # the loss rises
    names = [("epoch=0-step=4.ckpt", "epoch=0-step=4.ckpt"), ("epoch=1-step=8.ckpt", "last epoch")]
    for row, expected in zip(rows(), names):
        (checkpoint,) = (SWEEP / row["name"]).rglob("*.ckpt")
        assert (checkpoint.name, row["metrics_of"]) == expected
        (weight,) = torch.load(checkpoint, weights_only=True)["state_dict"].values()
        loss = torch.linspace(weight.item() - 3, 3 - weight.item(), 64).square().mean().item()
        assert float(row["loss"]) == pytest.approx(loss, 1e-4) and row["test_loss"] == row["loss"]


def test_a_metric_of_an_earlier_epoch_is_not_one_of_the_last(foreign, capfd):
    options = ["--fixed.trainer.max_epochs=3", "--fixed.trainer.check_val_every_n_epoch=2"]
    line = error_of(capfd, *FOREIGN, *options, grid(model__lr=[0.1]))
    assert "no run has the metric loss; known: epochs, seconds" in line


def test_a_run_of_main_that_is_not_evaluated_has_the_metrics_of_its_last_epoch(folder):
    assert sweep.main(settings(folder, grid={"evaluate_best": [False]})) == 0
    (row,) = rows()
    assert row["metrics_of"] == "last epoch" and float(row["val/loss"]) > 0 and "test/loss" not in row


ODD = """
import sys
sys.path.append("src")
import torch, extra
from foreign import DataLoader, Line, LightningCLI, Points
print("a: 1")

class Dataset:
    def __init__(self):
        self.read = lambda index: (torch.ones(1), torch.ones(1))
    def __len__(self):
        return 8
    def __getitem__(self, index):
        return self.read(index)

class Data(Points):
    def train_dataloader(self):
        return DataLoader(Dataset(), 4, num_workers=2)
    val_dataloader = train_dataloader

def main(args):
    print("b: 2")
    return LightningCLI(Line, Data, args=args, trainer_defaults={"max_epochs": 1, "accelerator": "cpu"})
"""


def test_a_program_may_print_extend_sys_path_and_use_workers_and_a_lambda(foreign):
    Path("odd.py").write_text(ODD)
    os.mkdir("src")
    Path("src/extra.py").touch()
    assert sweep.main(["--program=odd:main", *FOREIGN[1:], grid(model__lr=[0.1])]) == 0
    assert "seed_everything" in yaml.safe_load((SWEEP / "configs/000-lr=0.1.yaml").read_text())


def test_the_program_of_the_docs_is_swept_as_printed(folder):
    text = (REPO / "docs/sweeps.md").read_text()
    ((name, code),) = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", text, re.DOTALL)
    (command,) = re.findall(r"^python CLONE/sweep\.py (.*)", text, re.MULTILINE)
    Path(name).write_text(code)
    assert sweep.main(shlex.split(command)) == 0
    results = rows(Path("logs/sweeps/line"))
    assert [row["metrics_of"] for row in results] == ["epoch=2-step=12.ckpt"] * 2
    assert all(row["val_loss"] == row["test_loss"] for row in results)


def test_a_program_may_write_its_own_metrics_and_config(foreign):
    Path("own.py").write_text(
        "import json, foreign\ndef main(args=None):\n    cli = foreign.main(args)\n"
        "    json.dump({'loss': 1, 'note': 'x'} if cli.model.lr < 0.2 else {}, open(cli.trainer.default_root_dir + "
        "'/metrics.json', 'w'))\n    return cli\n"
    )
    args = ["--program=own:main", "--metric=loss", "--name=tiny", grid(model__lr=[0.1, 0.2])]
    assert sweep.main([*args, "--fixed.trainer.logger=false"]) == 0
    assert [(row["status"], row["loss"]) for row in rows()] == [("finished", "1"), ("finished", "")]


def test_failed_runs_are_named_and_the_rest_is_run(foreign, capfd):
    args = [*FOREIGN, grid(model__fault=["exit", None, "kill", "nan", "none"])]
    assert sweep.main(args) == 1
    printed = capfd.readouterr().out
    assert statuses() == ["failed", "finished", "failed", "failed", "finished"]
    for name, reason in {
        "000-fault=exit": "this fault was asked for",
        "002-fault=kill": "killed by SIGKILL",
        "003-fault=nan": "diverged: loss is nan",
    }.items():
        assert f"failed: {name}: {reason}" in printed and f"(see logs/sweeps/tiny/{name}/output.log)" in printed
    assert "2 of 5 runs are finished" in printed and "3 failed" in printed
    assert len(trained()) == 5
    assert sweep.main([*args, "--max_failures=9"]) == 1
    assert len(trained()) == 8


MEETS = """
import os
import time
from pathlib import Path

import foreign

def main(args):
    if "--print_config" not in args:
        Path(f"gpu{os.environ['CUDA_VISIBLE_DEVICES']}").touch()
        while len(list(Path().glob("gpu*"))) < 2:  # until both have begun
            time.sleep(0.05)
    return foreign.main(args)
"""


def test_several_jobs_run_at_a_time_each_with_a_gpu_of_its_own(foreign, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    Path("meets.py").write_text(MEETS)
    args = ["--program=meets:main", *FOREIGN[1:], grid(model__lr=[0.1, 0.2, 0.3])]
    assert sweep.main([*args, "--jobs=2"]) == 0
    assert {path.name for path in Path().glob("gpu*")} == {"gpu3", "gpu5"}
    assert statuses() == ["finished"] * 3


def test_cores_that_stand_idle_are_noticed(tiny, monkeypatch):
    todo = Sweep(tiny[0] / SWEEP, NAMES, "main:main", "val/acc")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(2))
    assert idle(todo) == "2 cores, 1 in use: --jobs=2 would use both"
    assert idle(replace(todo, jobs=2)) == ""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    assert idle(replace(todo, jobs=3)) == "8 cores, 3 in use: --jobs=8 would use all"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert idle(todo) == "3 GPUs, 1 in use: --jobs=3 would use all"


def test_after_a_failure_the_run_that_has_least_in_common_with_it_is_next(foreign):
    args = [*FOREIGN, "--max_failures=2"]
    assert sweep.main([*args, grid(model__fault=["exit", None], model__lr=[0.1, 0.2])]) == 1
    order = [Path(run).name.partition("-")[0] for run in trained()]
    assert order == ["000", "003", "001", "002"]  # each of the last two has a value of the first
    os.remove("trained.txt")
    with pytest.raises(SystemExit):  # all that is left fails
        sweep.main([*args, grid(model__fault=["exit", None], model__lr=[0.1, 0.2, 0.3])])
    assert Path(trained()[0]).name.endswith("fault=null-lr=0.3")  # the others have failed before


def test_the_status_of_a_sweep_is_printed_and_its_folder_not_touched(foreign, capfd):
    args = [*FOREIGN, grid(model__fault=["exit", None], model__lr=[0.1, 0.2])]
    assert sweep.main([*args, "--limit=3"]) == 1
    assert sweep.main([*args, "--dry_run"]) == 0
    before = {path: path.stat().st_mtime_ns for path in SWEEP.rglob("*")}
    capfd.readouterr()
    assert sweep.main([f"--status={SWEEP}"]) == 0
    header, *lines, counts = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert header[:4] == ["run", "status", "fault", "lr"]
    assert [line[:2] for line in lines] == [
        ["002", "finished"],
        *([run, "failed"] for run in ("000", "001")),
        ["003", "pending"],
    ]
    assert " ".join(counts) == "2 failed, 1 finished, 1 pending"
    assert {path: path.stat().st_mtime_ns for path in SWEEP.rglob("*")} == before
    assert "logs is not the folder of a sweep" in error_of(capfd, "--status", "logs")


FAULTS = {"forgets": "must return its LightningCLI; it returned None", "exits": "exits, but must return its Light"}


@pytest.mark.parametrize("function, fault", FAULTS.items())
def test_a_program_that_does_not_return_its_cli_is_named(function, fault, foreign, capfd):
    assert sweep.main([f"--program=foreign:{function}", "--metric=loss", "--name=tiny", grid(model__lr=[0.1])]) == 1
    assert f"failed: 000-lr=0.1: program foreign:{function} {fault}" in capfd.readouterr().out


def test_a_fault_of_all_runs_stops_the_sweep(foreign, capfd):
    args = [*FOREIGN, "--fixed.model.fault=exit", grid(model__lr=[0.1, 0.2, 0.3, 0.4, 0.5])]
    assert "stopped because too many runs failed in a row" in error_of(capfd, *args)
    assert statuses() == ["failed"] * 3 + ["pending"] * 2
    assert "too many runs failed" in error_of(capfd, *args, "--max_failures=2")
    assert len(trained()) == 5


def test_a_misspelt_metric_is_reported_after_the_first_run(foreign, capfd):
    args = ["--program=foreign:main", "--name=tiny", grid(model__lr=[0.1, 0.2])]
    assert "no run has the metric los (did you mean loss?)" in error_of(capfd, *args, "--metric=los")
    assert statuses() == ["finished", "pending"]
    assert sweep.main([*args, "--metric=loss"]) == 0
    assert len(trained()) == 2


def test_an_error_ends_the_other_jobs(foreign, capfd):
    args = ["--program=foreign:main", "--name=tiny", "--jobs=2", grid(model__fault=[None, "wait"])]
    assert "no run has the metric los" in error_of(capfd, *args, "--metric=los")
    assert multiprocessing.active_children() == []


def test_a_run_that_diverges_has_failed(folder, capfd):
    assert sweep.main(settings(folder, grid={"model.optimizer.lr": [1e30, 0.1]})) == 1
    assert "failed: 000-lr=1e+30: " in capfd.readouterr().out
    assert statuses() == ["failed", "finished"]


def send(signals: str, pid: int, when: str) -> subprocess.Popen:
    """Sends signals to a process, half a second apart, when a shell condition holds."""
    script = f"until {when}; do sleep 0.1; done; for s in {signals}; do sleep 0.5; kill -$s {pid}; done"
    return subprocess.Popen(["sh", "-c", script])


def test_ctrl_c_ends_the_current_run_cleanly_and_the_same_command_continues(foreign, capfd):
    args = [*FOREIGN, grid(model__fault=[None, "hold", "x"])]
    Path("held").touch()
    with send("INT", os.getpid(), "grep -qs hold trained.txt"):
        assert sweep.main(args) == 130
    os.remove("held")
    printed = capfd.readouterr().out
    assert "stopping 001-fault=hold" in printed
    assert printed.splitlines()[-1] == "stopped: the same command continues from here"
    assert statuses() == ["finished", "interrupted", "pending"]
    assert sweep.main(args) == 0
    assert statuses() == ["finished"] * 3
    assert len(trained()) == 4


def test_ctrl_c_twice_kills_the_current_run(foreign):
    with send("INT INT", os.getpid(), "test -e trained.txt"):
        assert sweep.main([*FOREIGN, grid(model__fault=["deaf", "x"])]) == 130
    assert statuses() == ["interrupted", "pending"]
