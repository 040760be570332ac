"""What the tests of sweeps share: tiny sweeps of base.yaml and of another program, in this process or a new one."""

import contextlib
import csv
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import yaml
from conftest import BASE, REPO, SHORT, SMALL

import sweep

QUIET = {"tensorboard": None, "wandb": None}
GRID = {"model.net.l1_chan": [4, 8], "model.optimizer.nesterov": [False, True]}
FOREIGN = ["--program=foreign:main", "--metric=loss", "--mode=min", "--name=tiny"]
SWEEP = Path("logs/sweeps/tiny")
SEEDS = [1, 2, 3]
NAMES = [  # of the four points, each with three seeds
    f"{place:03}-l1_chan={chan}-nesterov={nesterov}-seed_everything={seed}"
    for place, (chan, nesterov, seed) in enumerate(itertools.product((4, 8), ("false", "true"), SEEDS))
]


def settings(folder: Path, **changes) -> list[str]:
    """Writes a tiny sweep of base.yaml without loggers; returns the command-line arguments for it."""
    fixed = dict(option.removeprefix("--").split("=") for option in [BASE[2], *SMALL, *SHORT]) | QUIET
    content = {"name": "tiny", "base": str(REPO / "configs/base.yaml"), "grid": GRID, "fixed": fixed} | changes
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return ["--config=tiny.yaml"]


def run_tiny(folder: Path) -> str:
    """Runs a sweep of four points and three seeds with both loggers, two runs at a time; returns what it printed."""
    fixed = dict(option.removeprefix("--").split("=") for option in [BASE[2], *SMALL, *SHORT, "--trainer.max_epochs=1"])
    fixed |= {"test_pictures": None, "histograms": None, "graph": None}
    args = settings(folder, grid=GRID | {"seed_everything": SEEDS}, fixed=fixed)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        assert sweep.main([*args, "--jobs=2"]) == 0, printed.getvalue()
    return printed.getvalue()


def grid(**axes) -> str:
    return f"--grid={json.dumps({key.replace('__', '.'): values for key, values in axes.items()})}"


def error_of(capfd, *args: str) -> str:
    """The one line with which a sweep ends that cannot begin or go on."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        sweep.main(list(args))
    assert ended.value.code not in (0, None)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def in_new_process(*args: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPO / "sweep.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


def start(*args: str, **options) -> subprocess.Popen:
    return conftest.start("sweep.py", *args, **{"stderr": subprocess.STDOUT} | options)


def rows(folder: Path = SWEEP) -> list[dict[str, str]]:
    with open(folder / "results.csv") as file:
        return list(csv.DictReader(file))


def statuses() -> list[str]:
    return [row["status"] for row in rows()]


def less_times(results: Path) -> list[list[str]]:
    """results.csv without the seconds, its last column."""
    with open(results) as file:
        return [row[:-1] for row in csv.reader(file)]


def trained() -> list[str]:
    """The runs of foreign.py that began to train, each as often as it did."""
    return Path("trained.txt").read_text().split() if Path("trained.txt").exists() else []


def children(process: subprocess.Popen) -> list[int]:
    """The processes that a sweep's process started: its current run, if there is one."""
    try:
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    except OSError:
        return []
