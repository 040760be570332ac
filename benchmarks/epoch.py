"""An epoch of configs/base.yaml as shipped against a plain torch loop, one thread each: `python benchmarks/epoch.py`.

The loop has the same net, data, batch size and optimizer, keeps its images as floats, logs nothing, and validates after
each epoch. `fit` has both loggers, histograms, checkpoints, early stopping and, in a pseudo-terminal, its progress bar.
Processes alternate; an epoch lasts from one epoch's line to the next. Prints the medians of all epochs but each
process's first, and their ratio, for the original net and for one of 8, 16 and 32 channels.
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
NETS = {"4/8/16": (4, 8, 16), "8/16/32": (8, 16, 32)}
ROUNDS, EPOCHS = 3, 4


def plain(channels: tuple[int, ...]) -> None:
    """Trains, and prints a line an epoch."""
    sys.path.insert(0, str(REPO))
    import torch
    from torch.nn import functional as F

    from mnist_cnn import CNN, MNISTDataModule

    torch.set_num_threads(1)
    torch.manual_seed(138)
    data = MNISTDataModule(str(REPO / "data"), val_size=0)
    data.setup("fit")
    images, targets = data.sets["train"].tensors
    images = images.unsqueeze(1).float().div(255)
    (val_images, val_targets), (images, targets) = (images[:6_000], targets[:6_000]), (images[6_000:], targets[6_000:])
    net = CNN(*channels)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(EPOCHS):
        order = torch.randperm(54_000)
        for batch in order[: 54_000 // 64 * 64].split(64):
            loss = F.cross_entropy(net(images.index_select(0, batch)), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right = sum((net(x).argmax(1) == y).sum() for x, y in zip(val_images.split(1000), val_targets.split(1000)))
        print(f"epoch {epoch}  val acc {right / 6_000:.4f}", flush=True)


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
    print(f"{'net':10}{'fit':>8}{'loop':>8}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, channels in NETS.items():
            widths = [f"--model.net.l{index}_chan={width}" for index, width in enumerate(channels, 1)]
            base = [f"--config={REPO / 'configs/base.yaml'}", f"--data.data_dir={REPO / 'data'}", "--num_threads=1"]
            options = [*base, *widths, f"--trainer.max_epochs={EPOCHS}"]
            fit, loop = [], []
            for _ in range(ROUNDS):
                fit += epochs(str(REPO / "main.py"), "fit", *options)
                loop += epochs(__file__, name)
            ours, theirs = statistics.median(fit), statistics.median(loop)
            print(f"{name:10}{ours:6.2f} s{theirs:6.2f} s{ours / theirs:8.2f}", flush=True)


if __name__ == "__main__":
    plain(NETS[sys.argv[1]]) if sys.argv[1:] else main()
