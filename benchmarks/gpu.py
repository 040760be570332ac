"""What a GPU gives, in at most eight minutes: `make gpu`, or `python benchmarks/gpu.py`.

Prints a table and writes it into docs/gpu.md, which says what the rows mean. Each row has processes of its own: if they
fail, the row says so, the others are still measured, and the exit status is 1. An epoch lasts from one epoch's line to
the next; the median of all but a run's first counts. `--device=cpu --short` tries the script: a few batches a run,
nothing is written.
"""

import argparse
import functools
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from mnist_cnn import MNISTDataModule  # noqa: E402
from mnist_cnn.data import TensorBatches  # noqa: E402

BEGIN, END = "<!-- figures: written by make gpu -->", "<!-- end of figures -->"
LIMIT = 460  # seconds for all rows; the rest of the eight minutes is for this script's own start and end
SHORT = {"trainer.max_epochs": 2} | {f"trainer.limit_{stage}_batches": 4 for stage in ("train", "val", "test")}
NEEDS_CUDA = "needs CUDA"
GRID = {"model.net.l1_chan": [8, 16], "model.optimizer.lr": [0.05, 0.1], "model.optimizer.momentum": [0.8, 0.9]}


class NoWait(Callback):
    """Makes it an error to wait for the device in a training step: forward, backward, optimizer, schedule.

    Callbacks that come before it log in the same interval: graph and histograms must be off. Experiment comes after it.
    """

    def on_train_batch_start(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    on_exception = on_train_batch_end


class PeakMemory(Callback):
    """Prints the most device memory that tensors have had during fit."""

    def on_train_end(self, *_: Any) -> None:
        allocated = f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
        print(f"peak memory {allocated if torch.cuda.is_available() else NEEDS_CUDA}")


class DeviceBatches(TensorBatches):
    """TensorBatches of tensors on a device."""

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, ...]:
        index = torch.tensor(indices).to(self.tensors[0].device, non_blocking=True)
        return tuple(tensor.index_select(0, index) for tensor in self.tensors)


class DeviceMNIST(MNISTDataModule):
    """MNISTDataModule with all images on the device from the start; its batches are the same."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        device = self.trainer.strategy.root_device
        self.sets = {name: DeviceBatches(*(t.to(device) for t in data.tensors)) for name, data in self.sets.items()}


@dataclass
class Row:
    """A row of the table: seconds of an epoch and of the whole fit, test/acc, peak memory, and what else was found."""

    part: str = ""
    epoch: float | None = None
    fit: float | None = None
    accuracy: float | None = None
    memory: str = ""
    finding: str = ""


def table(rows: list[Row]) -> str:
    """The rows in Markdown; each epoch is compared with that of the row `plain loop`."""
    plain = next((row.epoch for row in rows if row.part == "plain loop"), None)
    lines = [["part", "epoch", "over plain", "fit", "test/acc", "memory", "finding"]]
    for row in rows:
        ratio = row.epoch / plain if row.epoch and plain else None
        numbers = ((row.epoch, "{:.2f} s"), (ratio, "{:.2f}"), (row.fit, "{:.1f} s"), (row.accuracy, "{:.4f}"))
        cells = ["" if number is None else form.format(number) for number, form in numbers]
        lines.append([row.part, *cells, row.memory, row.finding.replace("|", "\\|")])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def write(page: Path, figures: str) -> None:
    """Replaces what is between the page's two markers."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{figures}\n{END}{rest.split(END)[1]}", encoding="utf-8")


class Bench:
    """Measures in the working directory; what still runs at `deadline`, of time.monotonic, is killed."""

    def __init__(self, device: str, short: bool, deadline: float) -> None:
        self.device, self.deadline, self.short = device, deadline, short
        self.settings = {"data.data_dir": str(REPO / "data"), "trainer.accelerator": device} | (SHORT if short else {})

    def parts(self) -> dict[str, Callable[[], Row]]:
        """The rows by name, in their order."""
        base = functools.partial(self.fit, config="base.yaml")
        return {
            "plain loop": self.plain,
            "base.yaml": lambda: base("first"),
            "base.yaml again": self.again,
            "images on the device": lambda: base("images", "--data=benchmarks.gpu.DeviceMNIST"),
            "bf16-mixed": lambda: base("bf16", "--trainer.precision=bf16-mixed"),
            "channels first": lambda: base("channels", "--model.channels_last=false"),
            "wait in a step": self.no_wait,
            "fast.yaml": lambda: self.fit("fast", config="fast.yaml"),
            "sweep": self.sweep,
            "best.yaml": lambda: self.fit("best", config="best.yaml"),
        }

    def run(self, *command: str) -> tuple[str, float | None]:
        """Runs a Python command; returns what it prints, and the seconds of an epoch if it trains more than one."""
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = os.environ | {"WANDB_MODE": "offline"}
        process: Any = subprocess.Popen([sys.executable, "-u", *command], env=environment, **streams)
        timer = threading.Timer(max(0, self.deadline - time.monotonic()), process.kill)
        timer.start()
        lines, times = [], []
        for line in process.stdout:
            lines.append(line)
            times += [time.monotonic()] if re.match(r"epoch +\d", line) else []
        timer.cancel()
        if process.wait():
            late = time.monotonic() > self.deadline
            raise RuntimeError(f"killed, since all rows took {LIMIT} s" if late else f"{command}\n{''.join(lines)}")
        epochs = [after - before for before, after in itertools.pairwise(times)]
        return "".join(lines), statistics.median(epochs) if epochs else None

    def fit(self, run: str, *options: str, config: str) -> Row:
        """Trains with a config of configs/; only base.yaml's epoch can be compared with the plain loop's."""
        settings = [f"--{key}={value}" for key, value in self.settings.items()]
        given = [f"--config={REPO / 'configs' / config}", f"--run_dir={run}", *settings, *options]
        output, epoch = self.run(str(REPO / "main.py"), "fit", *given, "--trainer.callbacks+=benchmarks.gpu.PeakMemory")
        metrics, memory = json.loads(Path(run, "metrics.json").read_text()), re.findall("peak memory (.*)", output)
        return Row("", epoch if config == "base.yaml" else None, metrics["seconds"], metrics["test/acc"], memory[0])

    def plain(self) -> Row:
        """Runs the plain loop, with as many epochs as base.yaml has."""
        size = ["--epochs=2", "--steps=4"] if self.short else []
        output, epoch = self.run(str(REPO / "benchmarks/plain_loop.py"), "base.yaml", f"--device={self.device}", *size)
        return Row(epoch=epoch, accuracy=float(output.split()[-1]))

    def again(self) -> Row:
        """Trains with base.yaml again, and compares metrics and last weights with those of the run `first`."""
        row = self.fit("again", config="base.yaml")
        first, again = (json.loads(Path(run, "metrics.json").read_text()) for run in ("first", "again"))
        states = [torch.load(f"{run}/checkpoints/last.ckpt", "cpu", weights_only=True) for run in ("first", "again")]
        weights, weights_again = (state["state_dict"] for state in states)
        same = all(torch.equal(weights[name], weights_again[name]) for name in weights)
        if not same or first | {"seconds": 0} != again | {"seconds": 0}:
            raise RuntimeError(f"its digits differ from the first run's: {first}, {again}")
        return replace(row, finding="the same digits")

    def no_wait(self) -> Row:
        """Trains 100 steps in which a wait is an error."""
        if self.device == "cpu":
            return Row(finding=NEEDS_CUDA)
        off = ["--histograms=null", "--graph=null", "--trainer.max_epochs=1", "--trainer.limit_train_batches=100"]
        self.fit("no_wait", "--trainer.callbacks+=benchmarks.gpu.NoWait", *off, config="base.yaml")
        return Row(finding="none in 100 steps")

    def sweep(self) -> Row:
        """Runs a grid, an epoch a run, one run after another; the accuracy is the best run's."""
        fixed, start = json.dumps(self.settings | {"trainer.max_epochs": 1}), time.monotonic()
        base, grid = f"--base={REPO / 'configs/base.yaml'}", f"--grid={json.dumps(GRID)}"
        self.run(str(REPO / "sweep.py"), base, grid, f"--fixed={fixed}", "--name=gpu")
        metrics = [json.loads(path.read_text()) for path in Path("logs/sweeps/gpu").glob("*/metrics.json")]
        finding = f"{len(metrics)} runs in {time.monotonic() - start:.0f} s"
        return Row(accuracy=max(run["test/acc"] for run in metrics), finding=finding)


def main() -> int:
    """Measures, prints and writes; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--short", action="store_true", help="a few batches a run; docs/gpu.md is not written")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device; --device=cpu --short tries the script without one")
    start, rows, failed = time.monotonic(), [], False
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.chdir(folder)
        for name, measure in Bench(args.device, args.short, start + LIMIT).parts().items():
            began = time.monotonic()
            try:
                row = measure()
            except Exception:
                lines = traceback.format_exc().strip().splitlines()
                print(*lines, sep="\n", file=sys.stderr)
                row, failed = Row(finding=f"failed: {lines[-1]}"), True
            rows.append(replace(row, part=name))
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}"
    took = f"{time.strftime('%Y-%m-%d')}, {time.monotonic() - start:.0f} s in all"
    figures = f"{device}, {versions}, {took}:\n\n{table(rows)}"
    print(figures)
    if args.device == "cuda" and not args.short:
        write(REPO / "docs/gpu.md", figures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
