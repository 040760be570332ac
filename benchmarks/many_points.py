"""How long a sweep takes to write and check its configs: `python benchmarks/many_points.py`.

1,000 and 10,000 points of five axes of base.yaml, each in a new process. The baseline is the program's own parser, once
for a point. Prints milliseconds a point, the ratio to the baseline, and the process's peak memory.
"""

import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))

import sweep  # noqa: E402


def measure(count: int) -> None:
    """Writes and checks so many points; prints seconds a point, seconds a parse, and the peak memory in MiB."""
    axes = {
        "model.net.l1_chan": list(range(4, 14)),
        "model.net.l2_chan": list(range(4, 14)),
        "model.optimizer.lr": [index / 100 for index in range(1, 11)],
        "model.optimizer.momentum": [0.8, 0.9],
        "seed_everything": list(range(count // 2_000)),
    }
    if count == 1_000:
        axes |= {"model.optimizer.momentum": [0.9], "seed_everything": [0]}
    root = Path("logs/sweeps/many")
    points = list(itertools.product(*(range(len(values)) for values in axes.values())))
    assert len(points) == count
    base = ["fit", f"--config={REPO / 'configs/base.yaml'}"]
    answers: list = []
    answer = types.SimpleNamespace(send=answers.append)
    sweep.import_program("main:main")
    start = time.monotonic()
    sweep.write_configs(answer, ("main:main", base, [], axes), points, root, {"grid": axes})
    seconds = time.monotonic() - start
    assert len(answers[0][0]) == count
    assert len(os.listdir(root / "configs")) == count
    grid = sweep.Grid("main:main", base, [], axes)
    start = time.monotonic()
    for point in points[:20]:
        grid._parse(point)
    parse = (time.monotonic() - start) / 20
    print(json.dumps([seconds / count, parse, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def main() -> None:
    """Measures each number of points in a new process and prints a table."""
    print("points   ms a point   ms a parse   ratio   peak MiB")
    for count in (1_000, 10_000):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, str(count)]
            done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
        point, parse, memory = json.loads(done.stdout.splitlines()[-1])
        print(f"{count:6}   {1000 * point:10.1f}   {1000 * parse:10.1f}   {point / parse:5.3f}   {memory:8.0f}")


if __name__ == "__main__":
    if sys.argv[1:]:
        measure(int(sys.argv[1]))
    else:
        main()
