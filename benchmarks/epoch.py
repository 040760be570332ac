"""An epoch of configs/base.yaml as shipped against a plain torch loop, one thread each: `python benchmarks/epoch.py`.

The loop (plain_loop.py) has the same net, data, batch size, optimizer and schedule. `fit` has both loggers, histograms,
checkpoints, early stopping and, in a pseudo-terminal, its progress bar. Processes alternate; an epoch lasts from one
epoch's line to the next. Prints the medians of all epochs but each process's first, and their ratio, for base.yaml and
for the much smaller net of original.yaml.
"""

import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parents[1]
CONFIGS = [["base.yaml"], ["base.yaml", "original.yaml"]]
ROUNDS, EPOCHS = 3, 4


def epochs(*command: str, count: int = EPOCHS) -> list[float]:
    """Seconds from one epoch's line to the next of a command that trains so many, in a pseudo-terminal."""
    terminal, end = os.openpty()
    process = subprocess.Popen([sys.executable, *command], stdout=end, stderr=subprocess.DEVNULL)
    os.close(end)
    times: list[float] = []
    text = ""
    while True:
        try:
            text += os.read(terminal, 65536).decode(errors="replace")
        except OSError:  # the command has ended
            break
        found = len(re.findall(r"epoch +\d+  .*acc", text))
        times += [time.monotonic()] * (found - len(times))
    os.close(terminal)
    if process.wait() or len(times) != count:
        sys.exit(f"{' '.join(command)} failed: {text}")
    return [after - before for before, after in itertools.pairwise(times)]


def main() -> None:
    """Measures and prints."""
    print(f"{'config':14}{'fit':>8}{'loop':>8}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for files in CONFIGS:
            configs = [f"--config={REPO / 'configs' / file}" for file in files]
            options = [*configs, f"--data.data_dir={REPO / 'data'}", f"--trainer.max_epochs={EPOCHS}"]
            fit, loop = [], []
            for _ in range(ROUNDS):
                fit += epochs(str(REPO / "main.py"), "fit", *options)
                loop += epochs(str(REPO / "benchmarks/plain_loop.py"), *files, f"--epochs={EPOCHS}")
            ours, theirs = statistics.median(fit), statistics.median(loop)
            print(f"{files[-1]:14}{ours:6.2f} s{theirs:6.2f} s{ours / theirs:8.2f}", flush=True)


if __name__ == "__main__":
    main()
