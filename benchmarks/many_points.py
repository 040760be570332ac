"""How long a sweep takes to check and write its configs: `python benchmarks/many_points.py`.

64, 1,000 and 10,000 points of base.yaml, each in a new process. The baseline is one call of the program's own parser.
Prints the seconds of the check, the ratio of one point to the baseline, and the process's peak memory.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))

import sweep  # noqa: E402
from mnist_cnn.sweeps import grid  # noqa: E402

AXES = {
    "model.net.l1_chan": list(range(4, 14)),
    "model.net.l2_chan": list(range(4, 14)),
    "model.optimizer.lr": [index / 100 for index in range(1, 11)],
    "model.optimizer.momentum": [0.8, 0.9],
    "seed_everything": [0, 1, 2, 3, 4],
}
SIZES = {64: [4, 4, 4], 1_000: [10, 10, 10], 10_000: [10, 10, 10, 2, 5]}


def measure(count: int) -> None:
    """Checks and writes so many points; prints the seconds, the seconds of one call of the parser, and peak MiB."""
    axes = {key: values[:size] for (key, values), size in zip(AXES.items(), SIZES[count])}
    settings = {"program": "main:main", "base": [f"{REPO}/configs/base.yaml"], "fixed": {}, "grid": axes, "exclude": []}
    settings |= {"sample": None, "seed": 0}
    grid.import_program("main:main")
    start = time.monotonic()
    names = sweep.write_configs(Path("logs/sweeps/many"), settings, [], None)
    seconds = time.monotonic() - start
    assert len(names) == len(os.listdir("logs/sweeps/many/configs")) == count
    start = time.monotonic()
    for index in range(4):
        grid.parse(settings, {key: values[index % len(values)] for key, values in axes.items()})
    parse = (time.monotonic() - start) / 4
    print(json.dumps([seconds, parse, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def main() -> None:
    """Measures each number of points in a new process and prints a table."""
    print("points   seconds   ms of a parse   ratio   peak MiB")
    for count in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, str(count)]
            done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
        seconds, parse, memory = json.loads(done.stdout.splitlines()[-1])
        print(f"{count:6}   {seconds:7.1f}   {1000 * parse:13.0f}   {seconds / count / parse:5.3f}   {memory:8.0f}")


if __name__ == "__main__":
    if sys.argv[1:]:
        measure(int(sys.argv[1]))
    else:
        main()
