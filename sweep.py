"""A sweep over a LightningCLI program: `python sweep.py` runs the grid of configs/sweep.yaml.

Its folder, logs/sweeps/NAME, holds its state: the same command continues a stopped sweep, a second one shares the work.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli
from jsonargparse.typing import NonNegativeInt, PositiveInt

from mnist_cnn.run.errors import Parser, UserError, fail
from mnist_cnn.sweeps import ledger, local
from mnist_cnn.sweeps import slurm as cluster
from mnist_cnn.sweeps.axes import flat_keys, points_of, read_axes
from mnist_cnn.sweeps.display import Display
from mnist_cnn.sweeps.grid import complete_configs, parse, run_names
from mnist_cnn.sweeps.points import Repeats, compare, has_seeds, rank, write_points
from mnist_cnn.sweeps.report import report
from mnist_cnn.sweeps.search import Search


def sweep(
    base: list[str] | str = [],  # noqa: B006  the defaults are only read
    grid: dict = {},  # noqa: B006  with types, jsonargparse would add the defaults of classes
    exclude: list[dict] = [],  # noqa: B006
    fixed: dict = {},  # noqa: B006
    sample: PositiveInt | None = None,
    seed: NonNegativeInt = 0,
    search: Literal["tpe"] | None = None,
    sampler: str | dict | None = None,
    pruner: str | dict | None = None,
    name: str | None = None,
    metric: str = "val/acc",
    mode: Literal["max", "min"] = "max",
    program: str = "main:main",
    jobs: PositiveInt = 1,
    dry_run: bool = False,
    limit: PositiveInt | None = None,
    max_failures: PositiveInt = 3,
    config_dir: str | None = None,
    launcher: Literal["local", "slurm"] = "local",
    slurm: cluster.Slurm = cluster.Slurm(),  # noqa: B008  it cannot be changed
    status: Path | None = None,
) -> int:
    """Writes a complete config for each point of a grid, runs them, and compares the results; 0 if none is left.

    Args:
        base: Config files of the program with which every run begins.
        grid: Key, as on the program's command line -> list of values. Those of `config` are files on top of base.
            `key, other key` -> list of pairs: both vary together. Key -> {low: 0.01, high: 0.2, log: true}: a range.
        exclude: Settings of the grid (key -> value); a point that has all those of one item is left out.
        fixed: Key -> value, in every run in which the grid does not set the key.
        sample: How many points are drawn, or searched; null: all of the grid.
        seed: Seed of the sample, or of the search.
        search: tpe: Optuna's TPESampler suggests one point after another.
        sampler: Search with this sampler of Optuna: a class path, or a class with arguments.
        pruner: Search with this pruner of Optuna, which stops runs that do worse than others.
        name: The folder in logs/sweeps, and the runs' group in W&B; null: the name of config_dir, or "sweep".
        metric: Metric that runs are compared by, as metrics.json names it.
        mode: Whether a higher (max) or lower (min) metric is better.
        program: module:function, where function(args) returns its LightningCLI.
        jobs: How many runs are executed at a time, each on one GPU if there are several jobs.
        dry_run: Write and check the configs, print the table of runs, run nothing.
        limit: Only the first runs of the grid.
        max_failures: Stop when so many runs fail in a row.
        config_dir: A folder of config files, each of which is run, instead of base and grid.
        launcher: Where runs are executed: here, or as SLURM jobs.
        slurm: What the launcher slurm requests for each run.
        status: Only print the runs of this sweep's folder, which may be running.
    """
    if status:
        return print_status(status)
    # Settings.
    base, grid, fixed = [base] if isinstance(base, str) else base, flat_keys(grid), flat_keys(fixed)
    files = sorted(Path(config_dir).glob("*.yaml")) if config_dir else []
    if config_dir and (base or grid or exclude or sample or not files):
        raise UserError(f"config_dir {config_dir} must have config files (*.yaml); it has no base, grid and exclude")
    grid = {"config": [str(file) for file in files]} if files else grid
    search = search or ("tpe" if sampler or pruner else None)
    if launcher == "slurm":
        cluster.check(jobs, search)
    root = ledger.folder_of(name, config_dir)
    settings: dict[str, Any] = {"base": base, "grid": grid, "exclude": list(map(flat_keys, exclude)), "fixed": fixed}
    settings |= {"sample": sample and int(min(sample, limit or sample)), "seed": int(seed), "name": name}
    settings |= {"search": search, "sampler": sampler, "pruner": pruner, "metric": metric, "mode": mode}
    settings |= {"program": program}
    # Points and their complete configs, all checked before anything is written.
    print(f"checking the configs of {root}; a {'higher' if mode == 'max' else 'lower'} {metric} is better", flush=True)
    display = Display(metric, mode)
    searching = Search(root, settings, display.say) if search else None
    names = searching.open() if searching else write_configs(root, settings, files, limit)
    if dry_run:
        return print_status(root)
    # Runs, each in a process of its own; results.csv after each; the table and the report at the end.
    todo = local.Sweep(root, names, program, metric, jobs, searching)
    ended = cluster.run_all(todo, display, slurm) if launcher == "slurm" else local.run_all(todo, display)
    return execute(todo, display, ended, max_failures)


def write_configs(root: Path, settings: dict[str, Any], files: list[Path], limit: int | None) -> list[str]:
    """Checks the complete configs of all points, writes those that do not exist yet, and returns the runs' names."""
    points = points_of(read_axes(settings["grid"]), settings["exclude"], settings["sample"], settings["seed"])
    configs = complete_configs(functools.partial(parse, settings), points[:limit])
    with ledger.lock(root, "sweep"):
        if files:  # perhaps those of a sweep, whose base, grid and fixed stay in sweep.yaml
            settings |= ledger.read_settings(root) | {key: settings[key] for key in ("program", "metric", "mode")}
            names, points = [file.stem for file in files], [ledger.swept_values(file) for file in files]
        else:
            names = run_names((path.stem for path in (root / "configs").glob("*.yaml")), points)
        contents = {name: ledger.to_yaml(config, point) for name, config, point in zip(names, configs, points)}
        ledger.write_sweep(root, settings, contents)
    return sorted(contents)


def execute(todo: local.Sweep, display: Display, ended_runs: Iterator[ledger.Run], max_failures: int) -> int:
    """Executes the runs, with results.csv after each, then writes the table and the report; returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, todo.interrupt)
    failures, runs = 0, []
    for ended in itertools.chain([None], ended_runs, [None]):  # before the runs, after each, and after all
        runs = ledger.read_runs(todo.root, todo.metric)
        ledger.write_results(todo.root, runs)
        runs = [run for run in runs if todo.search or run.name in todo.names]
        points, total = rank(runs, todo.metric, display.mode), todo.search.total(runs) if todo.search else len(runs)
        display.update(points, ended, total)
        failures = failures + 1 if ended and ended.status == "failed" else 0
        todo.gave_up |= failures >= max_failures
    finished = [run for run in runs if run.status == "finished"]
    display.print_table([point for point in points if point.runs[0].status == "finished"][:20])
    if finished and has_seeds(points):
        write_points(todo.root, points)
        display.say(compare(points, todo.metric))
    for run in runs:
        if run.status == "failed":
            display.say(f"failed: {run.name}: {run.reason} (see {todo.root / run.name / 'output.log'})")
    pruned = f", {count} pruned" if (count := sum(run.status == "pruned" for run in runs)) else ""
    display.say(f"{len(finished)} of {len(runs)} runs are finished{pruned}: {todo.root / 'results.csv'}")
    display.say(f"report: {report(todo.root)}")
    if todo.gave_up:
        raise UserError("stopped because too many runs failed in a row (max_failures): see their logs")
    if todo.interrupts:
        display.say("stopped: the same command continues from here")
        return 130
    done = ("finished", "pruned", "failed") if todo.search else ("finished", "pruned")  # a search replaces failed runs
    return int(any(run.status not in done for run in runs))


def print_status(root: Path) -> int:
    """Prints the runs of a sweep's folder, the best first, and how many have which status."""
    settings, runs = ledger.read_sweep(root)
    display = Display(settings["metric"], settings["mode"])
    display.print_table([Repeats([run]) for point in rank(runs, display.metric, display.mode) for run in point.runs])
    display.say(", ".join(f"{count} {status}" for status, count in Counter(run.status for run in runs).items()))
    return 0


def main(args: list[str]) -> int:
    """The command line; returns the exit status."""
    if not any(arg.startswith(("-c", "--config", "--grid", "--status", "-h", "--help")) for arg in args):
        args = [f"--config={Path(__file__).parent / 'configs/sweep.yaml'}", *args]
    args = ["--dry_run=true" if arg == "--dry_run" else arg for arg in args]
    # jsonargparse keeps only the last of two settings --grid.model.A and --grid.model.B; flat_keys reverts this.
    args = [re.sub(r"^(--(?:grid|fixed)\.)([^=]+)", lambda key: key[1] + key[2].replace(".", "/"), arg) for arg in args]
    try:
        return auto_cli(sweep, args=args, as_positional=False, parser_class=Parser, description=__doc__.split("\n")[0])
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        return 130
    finally:  # runs that still train after an error; multiprocessing would wait for them
        for process in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):  # it has no group yet
                os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            process.kill()
            process.join()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
