"""What the tests of sweeps share: sweeps of base.yaml and of another program, limited to a few batches."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import conftest
import yaml
from conftest import BASE, REPO, SHORT

QUIET = {"tensorboard": None, "wandb": None}
GRID = {"model.net.l1_chan": [4, 8], "model.optimizer.nesterov": [False, True]}
LOSS = ["--program=foreign:main", "--metric=loss", "--mode=min"]
NAMES = [
    "000-l1_chan=4-nesterov=false",
    "001-l1_chan=4-nesterov=true",
    "002-l1_chan=8-nesterov=false",
    "003-l1_chan=8-nesterov=true",
]


def settings(folder: Path, **changes) -> list[str]:
    """Writes a tiny sweep of base.yaml."""
    fixed = dict(option.removeprefix("--").split("=") for option in [BASE[2], *SHORT]) | QUIET
    content = {"name": "tiny", "base": str(REPO / "configs/base.yaml"), "grid": GRID, "fixed": fixed} | changes
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return ["--config=tiny.yaml"]


def grid(**axes) -> str:
    return f"--grid={json.dumps({key.replace('__', '.'): values for key, values in axes.items()})}"


def in_new_process(*args: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPO / "sweep.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


def rows(folder: Path = Path("logs/sweeps/tiny")) -> list[dict[str, str]]:
    with open(folder / "results.csv") as file:
        return list(csv.DictReader(file))


def less_times(results: Path) -> list[list[str]]:
    with open(results) as file:
        return [row[:-1] for row in csv.reader(file)]


def start(*args: str, **options) -> subprocess.Popen:
    return conftest.start("sweep.py", *args, **{"stderr": subprocess.STDOUT} | options)


def parts_of(sweep_process: subprocess.Popen) -> list[int]:
    """The processes of a sweep: the server, and the run or what comes before it, if there is one."""

    def children(pid: int) -> list[int]:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]

    try:
        for server in children(sweep_process.pid):
            if b"forkserver" in Path(f"/proc/{server}/cmdline").read_bytes():
                return [server, *children(server)]
    except OSError:
        pass
    return []
