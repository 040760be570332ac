"""Two processes against one, and the memory of a fit: `python benchmarks/scale.py`.

Epochs of configs/base.yaml on the CPU without loggers: one process of one thread, one of two, and two of one thread
each over gloo (DDP, which makes a step of 2 x 64 images). The three take turns. Prints medians of training images a
second, the most memory (RSS) that a fit held, and how much of it is beside what the imports alone hold.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).parents[1]
ROUNDS, EPOCHS = 5, 2
SETUPS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}


def run(*command: str) -> tuple[str, float]:
    """What a command prints, and the most memory that it held, in MiB."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        text = output.read()
    if status:
        sys.exit(text)
    return text, usage.ru_maxrss / 1024


def main() -> None:
    """Measures and prints."""
    speeds: dict[str, list[float]] = {name: [] for name in SETUPS}
    memory: list[float] = []
    base = f"fit --config={REPO / 'configs/base.yaml'} --data.data_dir={REPO / 'data'} --trainer.max_epochs={EPOCHS}"
    base += " --trainer.accelerator=cpu"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for _ in range(ROUNDS):
            for name, (devices, threads) in SETUPS.items():
                strategy = "ddp" if devices > 1 else "auto"
                options = f" --trainer.devices={devices} --trainer.strategy={strategy} --num_threads={threads}"
                text, _ = run(str(REPO / "main.py"), *(base + options).split(), "--tensorboard=null", "--wandb=null")
                seconds = [float(found) for found in re.findall(r"epoch +\d+  .* ([\d.]+) s$", text, re.MULTILINE)]
                speeds[name].append(54_000 / min(seconds))
            memory.append(run(str(REPO / "main.py"), *base.split())[1])
        imports = run("-c", f"import sys; sys.path.insert(0, {str(REPO)!r}); import main; import wandb")[1]
    for name, values in speeds.items():
        print(f"{name:28}{statistics.median(values):8,.0f} images/s")
    most = statistics.median(memory)
    print(f"{'fit, both loggers':28}{most:8,.0f} MiB, {most - imports:,.0f} of them beside the imports")


if __name__ == "__main__":
    main()
