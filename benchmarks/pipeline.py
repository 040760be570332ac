"""Whole batches from memory against the usual pipeline: `python benchmarks/pipeline.py`.

The usual one is torchvision's MNIST with a transform for each image and DataLoaders with worker processes; both train
configs/base.yaml as shipped and differ in `data` alone. Processes take turns; an epoch lasts from one epoch's line
to the next. Prints medians of second epochs, and their ratios.
"""

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from epoch import ROUNDS, epochs
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, random_split
from torchvision import datasets, transforms

REPO = Path(__file__).parents[1]


class PerImage(LightningDataModule):
    """MNIST as most projects feed it, at its best: workers that live on from epoch to epoch.

    Args:
        num_workers: Worker processes of each DataLoader.
    """

    def __init__(self, num_workers: int = 2) -> None:
        super().__init__()
        self.workers: Any = {"num_workers": num_workers, "persistent_workers": True}

    def setup(self, stage: str) -> None:
        """Splits the training images."""
        transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
        data = datasets.MNIST(REPO / "data", transform=transform)
        self.train, self.val = random_split(data, [54_000, 6_000], torch.Generator().manual_seed(0))
        self.test = datasets.MNIST(REPO / "data", train=False, transform=transform)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches."""
        return DataLoader(self.train, 64, shuffle=True, drop_last=True, **self.workers)

    def val_dataloader(self) -> DataLoader:
        """Batches in order."""
        return DataLoader(self.val, 1000, **self.workers)

    def test_dataloader(self) -> DataLoader:
        """Batches in order."""
        return DataLoader(self.test, 1000, **self.workers)


def main() -> None:
    """Measures and prints."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    fit = [str(REPO / "main.py"), "fit", f"--config={REPO / 'configs/base.yaml'}", "--trainer.max_epochs=2"]
    usual = {
        f"usual, {workers} workers": ["--data=pipeline.PerImage", f"--data.num_workers={workers}"]
        for workers in (1, 2, 4)
    }
    commands = {"base.yaml": [f"--data.data_dir={REPO / 'data'}"]} | usual
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for _ in range(ROUNDS):
            for name, options in commands.items():
                seconds[name] += epochs(*fit, *options, count=2)
    ours = statistics.median(seconds["base.yaml"])
    for name, times in seconds.items():
        print(f"{name:18}{statistics.median(times):6.2f} s an epoch{statistics.median(times) / ours:8.2f}")


if __name__ == "__main__":
    main()
