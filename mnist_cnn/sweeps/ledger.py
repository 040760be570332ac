"""Reads and writes a sweep's folder, which is its only state.

sweep.yaml        the sweep's settings
configs/RUN.yaml  a run's complete config; its first line says what was swept
RUN/              a run's folder: output.log, metrics.json if it is finished, status.json if it is not
results.csv       one row per run
.locks/RUN.lock   held by the process that executes the run
"""

import csv
import functools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from mnist_cnn.run.config import flatten, swept_values
from mnist_cnn.run.errors import UserError
from mnist_cnn.run.files import write_atomically

Config = dict[tuple[str, ...], Any]  # path of keys -> value


@dataclass
class Run:
    """The state of a run."""

    name: str
    swept: dict[str, Any]  # key -> value
    status: str = "pending"  # or finished, failed, interrupted, running
    reason: str = ""  # why it failed or was interrupted
    ended: float = 0  # when, in seconds since the epoch
    metrics: dict[str, float] = field(default_factory=dict)  # the numbers of metrics.json, if it is finished


def lock(root: Path, name: str, timeout: float = -1) -> Any:
    """Acquires a lock, which ends with the process that holds it; raises Timeout if another process holds it."""
    (root / ".locks").mkdir(parents=True, exist_ok=True)
    return FileLock(root / ".locks" / f"{name}.lock").acquire(timeout=timeout)


def read_run(root: Path, name: str, metric: str) -> Run:
    """Reads the state of a run. One whose metric is not a finite number has failed."""
    run = Run(name, swept_values(root / "configs" / f"{name}.yaml"))
    metrics, status = root / name / "metrics.json", root / name / "status.json"
    if metrics.exists():
        content = json.loads(metrics.read_text(encoding="utf-8"))
        run.status, run.ended = "finished", metrics.stat().st_mtime
        run.metrics = {key: value for key, value in content.items() if isinstance(value, int | float)}
        if not math.isfinite(run.metrics.get(metric, 0)):
            run.status, run.reason, run.metrics = "failed", f"diverged: {metric} is {run.metrics[metric]}", {}
    elif status.exists():
        content = json.loads(status.read_text(encoding="utf-8"))
        run.status, run.reason, run.ended = content["status"], content["reason"], status.stat().st_mtime
    elif (root / ".locks" / f"{name}.lock").exists():
        try:
            lock(root, name, timeout=0).lock.release()
        except Timeout:
            run.status = "running"
    return run


def read_runs(root: Path, metric: str) -> list[Run]:
    """The state of all runs of a folder, in the order of their names."""
    return [read_run(root, config.stem, metric) for config in sorted((root / "configs").glob("*.yaml"))]


def run_number(name: str) -> str:
    """The number of a grid's run; the whole name of other runs."""
    return name.partition("-")[0] if re.match(r"\d+-.*=", name) else name


def read_settings(root: Path) -> dict[str, Any]:
    """The content of sweep.yaml; {} if there is none."""
    path = root / "sweep.yaml"
    return yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader) if path.exists() else {}


def write_sweep(root: Path, settings: dict[str, Any], configs: dict[str, str]) -> None:
    """Writes sweep.yaml and the configs that do not exist yet, unless those that exist have other settings.

    Args:
        root: The sweep's folder.
        settings: Those of sweep.yaml; {} for a folder of configs, which has none.
        configs: Run name -> content of its config.
    """
    if settings and (saved := read_settings(root)):  # run_names has checked the grid
        old, new = ({"program": each["program"], "base": each["base"]} | each["fixed"] for each in (saved, settings))
        check_same(root / "sweep.yaml", old, new)
    texts = {}
    for name, text in configs.items():
        path = root / "configs" / f"{name}.yaml"
        if not path.exists():
            texts[path] = text
        elif (existing := path.read_text(encoding="utf-8")) != text:
            check_same(path, yaml.load(existing, yaml.CSafeLoader), yaml.load(text, yaml.CSafeLoader))
    if settings:
        texts[root / "sweep.yaml"] = yaml.dump(settings, Dumper=yaml.CSafeDumper, sort_keys=False)
    for path, text in texts.items():
        with write_atomically(path) as file:
            file.write(text)


def check_same(path: Path, old: Any, new: Any) -> None:
    """Checks that the settings in a file have not changed; 1, 1.0 and true differ."""
    old, new = flatten(old), flatten(new)
    for key in {**old, **new}:
        if repr(old.get(key)) != repr(new.get(key)):
            change = f"{'.'.join(key)}: {old.get(key)}, now {new.get(key)}"
            raise UserError(f"{path} has other settings ({change}): give the sweep another name, or delete its folder")


def to_yaml(config: Config, swept: dict[str, Any]) -> str:
    """The content of a config file, whose first line says what was swept."""
    nested: dict[str, Any] = {}
    for path, value in config.items():
        functools.reduce(lambda inner, key: inner.setdefault(key, {}), path[:-1], nested)[path[-1]] = value
    return f"# swept: {json.dumps(swept)}\n{yaml.dump(nested, Dumper=yaml.CSafeDumper, sort_keys=False, width=1000)}"


def write_status(root: Path, name: str, status: str, reason: str) -> None:
    """Notes why a run did not finish."""
    with write_atomically(root / name / "status.json") as file:
        json.dump({"status": status, "reason": reason}, file)


def write_results(root: Path, runs: list[Run]) -> None:
    """Writes results.csv: one row per run with name, status, swept values and metrics."""
    settings = dict.fromkeys(key for run in runs for key in run.swept)
    metrics = dict.fromkeys(key for run in runs for key in run.metrics)
    with write_atomically(root / "results.csv") as file:
        writer = csv.DictWriter(file, ["name", "status", *settings, *metrics], lineterminator="\n")
        writer.writeheader()
        for run in runs:
            swept = {key: value if isinstance(value, str) else json.dumps(value) for key, value in run.swept.items()}
            writer.writerow({"name": run.name, "status": run.status, **swept, **run.metrics})
