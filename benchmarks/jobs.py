"""A sweep of four runs of base.yaml with --jobs=2 against the same sweep with one: `python benchmarks/jobs.py`.

An epoch a run, a thread each, on two cores or more. The sweeps alternate; prints the medians of their seconds, start
and checks included, the ratio, and whether all metrics of all runs are the same to the last digit.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
GRID = '--grid={"model.optimizer.lr": [0.02, 0.1], "model.optimizer.nesterov": [false, true]}'
ROUNDS = 2


def sweep(jobs: int, number: int) -> tuple[float, list[str]]:
    """Runs the sweep; returns its seconds and results.csv without each run's seconds, its last column."""
    name, fixed = f"jobs{jobs}-{number}", f'--fixed={{"trainer.max_epochs": 1, "data.data_dir": "{REPO}/data"}}'
    command = [str(REPO / "sweep.py"), f"--base={REPO}/configs/base.yaml", GRID, fixed, f"--name={name}"]
    start = time.monotonic()
    subprocess.run([sys.executable, *command, f"--jobs={jobs}"], check=True, stdout=subprocess.DEVNULL)
    lines = Path(f"logs/sweeps/{name}/results.csv").read_text().splitlines()
    return time.monotonic() - start, [line.rpartition(",")[0] for line in lines]


def main() -> None:
    """Measures and prints."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        rounds = [[sweep(jobs, number) for jobs in (1, 2)] for number in range(ROUNDS)]
    one, two = (statistics.median(seconds for seconds, _ in column) for column in zip(*rounds))
    same = len({tuple(results) for each in rounds for _, results in each}) == 1
    print(f"1 job {one:.0f} s  2 jobs {two:.0f} s  ratio {one / two:.2f}  same metrics: {same}")


if __name__ == "__main__":
    main()
