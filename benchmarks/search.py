"""How soon a search finds a good point, TPE against a random sample: `python benchmarks/search.py`.

Nothing is trained: benchmarks/points.csv has the mean val/acc of the 64 points of configs/sweep.yaml over three seeds.
Prints the mean of the best val/acc after some runs, over ten seeds of each, and draws assets/search.png.
"""

import csv
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from mnist_cnn.sweeps.axes import points_of
from mnist_cnn.sweeps.ledger import read_settings, swept_values
from mnist_cnn.sweeps.search import Search

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # main.py is there
RUNS, SEEDS = 40, range(10)
GRID = read_settings(REPO / "configs")["grid"]


def read_points() -> dict[str, float]:
    """The settings of each point, as JSON -> its mean val/acc."""
    with open(REPO / "benchmarks/points.csv") as file:
        rows = [{key: json.loads(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return {json.dumps({key: row[key] for key in GRID}): row["val/acc"] for row in rows}


def random_sample(points: dict[str, float], seed: int) -> list[float]:
    """The results of a sample."""
    return [points[json.dumps(point)] for point in points_of(GRID, [], RUNS, seed)]


def search(points: dict[str, float], seed: int) -> list[float]:
    """The results of a search whose runs find theirs in the table."""
    settings = {"base": [str(REPO / "configs/base.yaml")], "grid": GRID, "exclude": [], "fixed": {}, "name": None}
    settings |= {"search": "tpe", "sampler": None, "pruner": None, "sample": RUNS, "seed": seed}
    settings |= {"metric": "val/acc", "mode": "max", "program": "main:main"}
    found, root = [], Path(f"search{seed}")
    searching = Search(root, settings, print)
    names = searching.open()
    while names:
        (name,) = names
        found.append(points[json.dumps(swept_values(root / "configs" / f"{name}.yaml"))])
        (root / name).mkdir()
        (root / name / "metrics.json").write_text(json.dumps({"val/acc": found[-1]}))
        names = searching.open_runs()
    return found


def main() -> None:
    """Measures, prints and draws."""
    os.chdir(folder := tempfile.mkdtemp())
    points = read_points()
    matplotlib.use("agg")
    _, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, results, color in (("random sample", random_sample, "#7f7f7f"), ("TPE", search, "#d62728")):
        best = np.maximum.accumulate([results(points, seed) for seed in SEEDS], axis=1)
        mean, runs = best.mean(0), np.arange(1, RUNS + 1)
        axes.fill_between(runs, best.min(0), best.max(0), color=color, alpha=0.15, linewidth=0)
        axes.plot(runs, mean, color=color, label=name)
        print(name, *(f"{count} runs: {mean[count - 1]:.4f}" for count in (5, 10, 20, 30, 40)), sep="  ")
    axes.axhline(max(points.values()), color="black", linewidth=0.8, linestyle="--", label="best of the 64 points")
    axes.set(xlabel="runs", ylabel="best val/acc so far", ylim=(0.95, None))
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    plt.savefig(REPO / "assets/search.png", dpi=110)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
