"""What a run costs in a sweep beside its epochs: `python benchmarks/fixed_cost.py`.

Runs of base.yaml with both loggers, in pairs: one epoch of one batch, and two. The first less the difference is the
fixed cost: start, set-up, evaluation, tear-down. The baseline is the same for a process of its own for each run
(`python main.py fit --config`). Prints medians and their ratio.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parents[1]
FIXED = {f"trainer.limit_{stage}_batches": 1 for stage in ("train", "val", "test")} | {
    "data.data_dir": str(REPO / "data")
}


def run(*args: str) -> float:
    """Seconds that a command took."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(done.stdout)
    return time.monotonic() - start


def fixed_costs(seconds: list[float]) -> list[float]:
    """Of pairs of runs, with one epoch and with two."""
    return [one - (two - one) for one, two in zip(seconds[::2], seconds[1::2])]


def main() -> None:
    """Measures and prints."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        grid = {"seed_everything": list(range(11)), "trainer.max_epochs": [1, 2]}
        args = [
            f"--base={REPO / 'configs/base.yaml'}",
            f"--grid={json.dumps(grid)}",
            f"--fixed={json.dumps(FIXED)}",
            "--name=runs",
        ]
        sweep, program = str(REPO / "sweep.py"), str(REPO / "main.py")
        run(sweep, *args, "--dry_run")
        configs = sorted(Path("logs/sweeps/runs/configs").iterdir())
        alone = [run(program, "fit", f"--config={config}") for config in configs[:4]]
        run(sweep, *args)
        alone += [run(program, "fit", f"--config={config}") for config in configs[-6:]]
        ends = [Path("logs/sweeps/runs", config.stem, "output.log").stat().st_mtime for config in configs]
        swept = [end - start for start, end in itertools.pairwise(ends)][1:]  # the first pair's start is not known
    own, one = fixed_costs(swept), fixed_costs(alone)
    for name, costs in (("in a sweep", own), ("in a process of its own", one)):
        told = f"median of {len(costs)} pairs, {min(costs):.2f} to {max(costs):.2f}"
        print(f"{name:25}{statistics.median(costs):5.2f} s  ({told})")
    print(f"{'ratio':25}{statistics.median(own) / statistics.median(one):5.2f}")


if __name__ == "__main__":
    main()
