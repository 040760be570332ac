"""How long it takes until something is seen: `python benchmarks/start.py`.

`main.py fit --print_config` and `main.py --help` against a process that imports LightningCLI and torchvision and ends.
The processes take turns, ten times. Prints medians and ratios.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).parents[1]
MAIN = str(REPO / "main.py")
COMMANDS = {
    "import": ["-c", "from lightning.pytorch.cli import LightningCLI; import torchvision"],
    "--print_config": [MAIN, "fit", f"--config={REPO / 'configs/base.yaml'}", "--print_config"],
    "--help": [MAIN, "--help"],
    "fit --help": [MAIN, "fit", "--help"],
}


def main() -> None:
    """Measures and prints."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(10):
        for name, command in COMMANDS.items():
            start = time.monotonic()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.monotonic() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:16}{median:6.2f} s{median / medians['import']:8.2f}")


if __name__ == "__main__":
    main()
