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
import time
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
    status: str  # finished, failed, interrupted, running or pending
    reason: str = ""  # why it failed or was interrupted
    ended: float = 0  # when, in seconds since the epoch
    metrics: dict[str, float] = field(default_factory=dict)  # the numbers of metrics.json, if it is finished
    swept: dict[str, Any] = field(default_factory=dict)  # key -> value


def lock(root: Path, name: str, timeout: float = -1) -> Any:
    """Acquires a lock, which ends with the process that holds it.

    Raises:
        Timeout: If another process holds it.
    """
    (root / ".locks").mkdir(parents=True, exist_ok=True)
    return FileLock(root / ".locks" / f"{name}.lock").acquire(timeout=timeout)


def read_run(root: Path, name: str, metric: str) -> Run:
    """Reads the state of a run. One whose metric is not a finite number has failed."""
    swept = swept_values(root / "configs" / f"{name}.yaml")
    metrics, status = root / name / "metrics.json", root / name / "status.json"
    if metrics.exists():
        content = json.loads(metrics.read_text(encoding="utf-8"))
        numbers = {key: value for key, value in content.items() if isinstance(value, int | float)}
        if math.isfinite(numbers.get(metric, 0)):
            return Run(name, "finished", metrics=numbers, swept=swept)
        return Run(name, "failed", f"diverged: {metric} is {numbers[metric]}", metrics.stat().st_mtime, swept=swept)
    if status.exists():
        content = json.loads(status.read_text(encoding="utf-8"))
        return Run(name, content["status"], content["reason"], content["time"], swept=swept)
    if (root / ".locks" / f"{name}.lock").exists():
        try:
            lock(root, name, timeout=0).lock.release()
        except Timeout:
            return Run(name, "running", swept=swept)
    return Run(name, "pending", swept=swept)


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
    """Writes sweep.yaml, and the configs that do not exist yet.

    Args:
        root: The sweep's folder.
        settings: The sweep's settings; {} for a folder of configs, which has none.
        configs: Run name -> content of its config.

    Raises:
        UserError: If the folder holds a sweep with other settings. An axis may have more values than before.
    """
    if settings and (saved := read_settings(root)):
        path, axes, old_axes = root / "sweep.yaml", settings["grid"], saved["grid"]
        check_same(path, "program", saved["program"], settings["program"])
        check_same(path, "axes", [*old_axes], [*axes])
        for key, values in old_axes.items():
            if not set(map(repr, values)) <= set(map(repr, axes[key])):
                check_same(path, key, values, axes[key])
    texts = {root / "configs" / f"{name}.yaml": text for name, text in configs.items()}
    for path in filter(Path.exists, texts):
        if (existing := path.read_text(encoding="utf-8")) != texts[path]:
            old, new = (flatten(yaml.load(text, yaml.CSafeLoader)) for text in (existing, texts[path]))
            for key in {**old, **new}:
                check_same(path, ".".join(key), old.get(key, "absent"), new.get(key, "absent"))
    if settings:
        texts = {root / "sweep.yaml": yaml.dump(settings, Dumper=yaml.CSafeDumper, sort_keys=False)} | texts
    for path, text in texts.items():
        if path.name == "sweep.yaml" or not path.exists():
            with write_atomically(path) as file:
                file.write(text)


def check_same(path: Path, key: str, old: Any, new: Any) -> None:
    """Checks that a setting in a file has not changed; 1, 1.0 and true differ.

    Raises:
        UserError: If it has.
    """
    if repr(old) != repr(new):
        raise UserError(f"{path} has {key}: {old}, now it is {new}: give the sweep another name, or delete its folder")


def to_yaml(config: Config, swept: dict[str, Any]) -> str:
    """The content of a config file, whose first line says what was swept."""
    nested: dict[str, Any] = {}
    for path, value in config.items():
        functools.reduce(lambda inner, key: inner.setdefault(key, {}), path[:-1], nested)[path[-1]] = value
    return f"# swept: {json.dumps(swept)}\n{yaml.dump(nested, Dumper=yaml.CSafeDumper, sort_keys=False, width=1000)}"


def write_status(root: Path, name: str, status: str, reason: str) -> None:
    """Notes why a run did not finish."""
    with write_atomically(root / name / "status.json") as file:
        json.dump({"status": status, "reason": reason, "time": time.time()}, file)


def write_results(root: Path, runs: list[Run]) -> None:
    """Writes results.csv: one row per run with name, status, swept values and metrics; epochs and seconds come last."""
    rows = [{"name": run.name, "status": run.status, **run.swept, **run.metrics} for run in runs]
    last = ("epochs", "seconds")
    columns = [*dict.fromkeys(key for row in rows for key in row if key not in last), *last]
    with write_atomically(root / "results.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            values = [row.get(key, "") for key in columns]
            writer.writerow([value if isinstance(value, str | float) else json.dumps(value) for value in values])
