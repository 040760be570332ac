"""Two processes against one, and the memory of a fit: `python benchmarks/scale.py`.

Second epochs of configs/base.yaml on the CPU without loggers, from one epoch's line to the next: one process of one
thread, one of two, and two of one thread each over gloo (DDP, which makes a step of 2 x 64 images), in turns. Prints
medians of training images a second, the most memory (RSS) that the process of a fit with both loggers held, without
W&B's own process, and how much of it is beside what the imports alone hold.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from epoch import ROUNDS, epochs

REPO = Path(__file__).parents[1]
SETUPS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}


def memory_of(*command: str) -> float:
    """The most memory that a command's process held, in MiB."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return usage.ru_maxrss / 1024


def main() -> None:
    """Measures and prints."""
    speeds: dict[str, list[float]] = {name: [] for name in SETUPS}
    memory: list[float] = []
    imports: list[float] = []
    base = f"fit --config={REPO / 'configs/base.yaml'} --data.data_dir={REPO / 'data'} --trainer.max_epochs=2"
    base += " --trainer.accelerator=cpu"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for _ in range(ROUNDS):
            for name, (devices, threads) in SETUPS.items():
                strategy = "ddp" if devices > 1 else "auto"
                options = f" --trainer.devices={devices} --trainer.strategy={strategy} --num_threads={threads}"
                command = [str(REPO / "main.py"), *(base + options).split(), "--tensorboard=null", "--wandb=null"]
                speeds[name] += [53_952 / seconds for seconds in epochs(*command, count=2)]
            memory.append(memory_of(str(REPO / "main.py"), *base.split()))
            imports.append(memory_of("-c", f"import sys; sys.path.insert(0, {str(REPO)!r}); import main, wandb"))
    for name, values in speeds.items():
        print(f"{name:28}{statistics.median(values):8,.0f} images/s")
    most, before = statistics.median(memory), statistics.median(imports)
    print(f"{'fit, both loggers':28}{most:8,.0f} MiB, {most - before:,.0f} of them beside the imports")


if __name__ == "__main__":
    main()
