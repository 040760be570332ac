"""A sweep's folder, its only state: sweep.yaml, configs/RUN.yaml, results.csv, and a folder RUN for each run.

RUN holds output.log, and metrics.json if it is finished or status.json if it is not. The process that executes the run,
and those that it starts, hold .locks/RUN.lock.
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

from mnist_cnn.run.errors import UserError
from mnist_cnn.run.files import write_atomically
from mnist_cnn.run.folder import flatten

Config = dict[tuple[str, ...], Any]  # path of keys -> value


@dataclass
class Run:
    """The state of a run."""

    name: str
    swept: dict[str, Any]  # key -> value
    status: str = "pending"  # or finished, failed, pruned, interrupted, running
    reason: str = ""  # why it is not finished
    metrics: dict[str, float] = field(default_factory=dict)  # the numbers of metrics.json, if it is finished
    metrics_of: str = ""  # the checkpoint whose metrics they are, or "last epoch"


def folder_of(name: str | None, config_dir: str | None) -> Path:
    """The folder of a sweep; for the configs of an older sweep, that one's."""
    if name is not None and not re.fullmatch(r"\w[\w.+=@ -]*", name):
        raise UserError(f"name: {name!r} is not the name of a folder: use letters, digits and . + = @ -")
    if config_dir and not name and Path(config_dir, "../.locks").exists():
        return Path(config_dir).parent
    return Path("logs/sweeps", name or Path(config_dir or "sweep").resolve().name)


def lock(root: Path, name: str, timeout: float = -1) -> Any:
    """Acquires a lock, which is released when its process ends; raises Timeout if another process holds it."""
    return FileLock(root / ".locks" / f"{name}.lock").acquire(timeout=timeout)


def swept_values(path: Path) -> dict[str, Any]:
    """The swept settings (key -> value) that sweep.py writes into a config's first line; {} for other files."""
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    return json.loads(line.removeprefix("# swept: ")) if line.startswith("# swept: ") else {}


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a file; None if there is none, or another process has just removed it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def read_run(root: Path, name: str, metric: str) -> Run:
    """Reads the state of a run. One whose metric is not a finite number has failed."""
    swept, folder = swept_values(root / "configs" / f"{name}.yaml"), root / name
    if (content := read_json(folder / "metrics.json")) is not None:
        metrics = {key: value for key, value in content.items() if isinstance(value, int | float)}
        if math.isfinite(metrics.get(metric, 0)):
            return Run(name, swept, "finished", "", metrics, Path(content.get("best_checkpoint") or "last epoch").name)
        return Run(name, swept, "failed", f"diverged: {metric} is {metrics[metric]}")
    if (content := read_json(folder / "status.json")) is not None:
        return Run(name, swept, **content)
    try:
        if (root / ".locks" / f"{name}.lock").exists():
            lock(root, name, timeout=0).lock.release()
        return Run(name, swept)
    except Timeout:
        return Run(name, swept, "running")


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


def read_sweep(root: Path) -> tuple[dict[str, Any], list[Run]]:
    """The settings and the runs of a sweep's folder, whatever their state."""
    settings = {"metric": "val/acc", "mode": "max", "program": "main:main"} | read_settings(root)
    if not (runs := read_runs(root, settings["metric"])):
        raise UserError(f"{root} is not the folder of a sweep: it has no configs/*.yaml")
    return settings, runs


def write_sweep(root: Path, settings: dict[str, Any], configs: dict[str, str]) -> None:
    """Writes sweep.yaml and new configs (run -> text); the program and the existing configs must not have changed."""
    texts = {root / "sweep.yaml": yaml.dump(settings, Dumper=yaml.CSafeDumper, sort_keys=False)}
    texts |= {root / "configs" / f"{name}.yaml": text for name, text in configs.items()}
    for path, text in texts.items():
        if path.exists() and (existing := path.read_text(encoding="utf-8")) != text:
            old, new = (flatten(yaml.load(each, yaml.CSafeLoader)) for each in (existing, text))
            for key in changes(old, new):
                searched = new.get(("search",)) and key not in (("sample",), ("name",))
                if path.parent != root or key == ("program",) or searched:  # base and fixed show in a grid's configs
                    change = f"{'.'.join(key)}: {old.get(key)}, now {new.get(key)}"
                    remedy = "give the sweep another name, or delete its folder"
                    raise UserError(f"{path} has other settings ({change}): {remedy}")
    for path, text in texts.items():
        if path.parent == root or not path.exists():
            with write_atomically(path) as file:
                file.write(text)


def changes(old: Config, new: Config) -> Config:
    """The new value of each path that differs; ... if the path is gone. 1, 1.0 and true differ."""
    return {path: new.get(path, ...) for path in {**old, **new} if repr(old.get(path, ...)) != repr(new.get(path, ...))}


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
    rows: list[dict[str, Any]] = []
    for run in runs:
        rows.append({"name": run.name, "status": run.status, **run.swept, "metrics_of": run.metrics_of, **run.metrics})
    write_csv(root / "results.csv", rows)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows, which need not have the same columns."""
    with write_atomically(path) as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()})
