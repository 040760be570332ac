"""How long a sweep's page takes to make, and how large it is: `python benchmarks/many_runs.py`.

64 and 1,000 finished runs, each with the event file of one real run of base.yaml and metrics of its own. The baseline
is the import of what draws the page. Prints seconds, the ratio to the baseline, and the page's size.
"""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parents[1]
BASE = REPO / "configs/base.yaml"
GRIDS = {
    64: {
        "model.net.l1_chan": [4, 8],
        "model.net.l2_chan": [8, 16],
        "model.optimizer.lr": [0.01, 0.02, 0.05, 0.1],
        "model.optimizer.momentum": [0.6, 0.7, 0.8, 0.9],
    },
    1000: {
        "model.net.l1_chan": [4, 5, 6, 7, 8],
        "model.net.l2_chan": [8, 10, 12, 14, 16],
        "model.optimizer.lr": [index / 100 for index in range(1, 11)],
        "model.optimizer.momentum": [0.6, 0.7, 0.8, 0.9],
    },
}


def run(*command: str, folder: Path) -> float:
    """Runs a Python command; returns its seconds."""
    start = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    subprocess.run([sys.executable, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.monotonic() - start


def finish(root: Path, real: Path) -> None:
    """Gives each run of a sweep's folder what a finished one has."""
    metrics, (events,) = json.loads((real / "metrics.json").read_text()), real.glob("events.*")
    for config in (root / "configs").glob("*.yaml"):
        folder = root / config.stem
        folder.mkdir()
        shutil.copy(config, folder / "config.yaml")
        (folder / events.name).symlink_to(events)
        (folder / "metrics.json").write_text(json.dumps(metrics | {"val/acc": random.uniform(0.9, 0.99)}))


def main() -> None:
    """Measures both numbers of runs three times each, in turn, and prints a table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(str(REPO / "main.py"), "fit", f"--config={BASE}", f"--data.data_dir={REPO / 'data'}", folder=folder)
        for count, grid in GRIDS.items():
            settings = [f"--base={BASE}", f"--grid={json.dumps(grid)}", f"--name={count}", "--dry_run"]
            run(str(REPO / "sweep.py"), *settings, folder=folder)
            finish(folder / f"logs/sweeps/{count}", folder / "logs/mnist/version_0")
        took: dict[int, list[float]] = {0: [], **{count: [] for count in GRIDS}}
        for _ in range(3):
            for count, some in took.items():
                module = "mnist_cnn.sweeps.report"
                command = ["-m", module, f"logs/sweeps/{count}"] if count else ["-c", f"import {module}"]
                some.append(run(*command, folder=folder if count else REPO))
        baseline = statistics.median(took.pop(0))
        print(f"runs   seconds   ratio to the import, {baseline:.1f} s   MB")
        for count, some in took.items():
            seconds = statistics.median(some)
            size = (folder / f"logs/sweeps/{count}/report.html").stat().st_size / 1e6
            print(f"{count:4}   {seconds:7.1f}   {seconds / baseline:28.1f}   {size:2.0f}")


if __name__ == "__main__":
    main()
