"""An epoch of configs/base.yaml as shipped against a plain torch loop, one thread each: `python benchmarks/epoch.py`.

The loop has the same net, data, batch size, optimizer and schedule, keeps its images as floats, logs nothing, and
validates after each epoch. `fit` has both loggers, histograms, checkpoints, early stopping and, in a pseudo-terminal,
its progress bar. Processes alternate; an epoch lasts from one epoch's line to the next. Prints the medians of all
epochs but each process's first, and their ratio, for base.yaml and for the much smaller net of original.yaml.
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
CONFIGS = {"base.yaml": ["base"], "original.yaml": ["base", "original"]}
ROUNDS, EPOCHS = 3, 4


def plain(name: str) -> None:
    """Trains, and prints a line an epoch."""
    sys.path.insert(0, str(REPO))
    import torch
    import yaml
    from torch.nn import functional as F

    from mnist_cnn import CNN, MNISTDataModule, WarmupCosineLR

    torch.set_num_threads(1)
    torch.manual_seed(42)
    data = MNISTDataModule(str(REPO / "data"))
    data.setup("fit")
    images, targets = data.on_after_batch_transfer(data.sets["train"].tensors, 0)
    val_images, val_targets = data.on_after_batch_transfer(data.sets["val"].tensors, 0)
    config = yaml.safe_load((REPO / "configs" / name).read_text())["model"]["init_args"]
    net = CNN(**config["net"]["init_args"])
    net.to(memory_format=torch.channels_last if config["channels_last"] else torch.contiguous_format)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    schedule = WarmupCosineLR(optimizer, EPOCHS * 843) if config["lr_scheduler"] else None
    for epoch in range(EPOCHS):
        order = torch.randperm(54_000)
        for batch in order[: 54_000 // 64 * 64].split(64):
            loss = F.cross_entropy(net(images.index_select(0, batch)), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule:
                schedule.step()
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
    print(f"{'config':14}{'fit':>8}{'loop':>8}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, files in CONFIGS.items():
            configs = [f"--config={REPO / 'configs' / file}.yaml" for file in files]
            options = [*configs, f"--data.data_dir={REPO / 'data'}", f"--trainer.max_epochs={EPOCHS}"]
            fit, loop = [], []
            for _ in range(ROUNDS):
                fit += epochs(str(REPO / "main.py"), "fit", *options)
                loop += epochs(__file__, name)
            ours, theirs = statistics.median(fit), statistics.median(loop)
            print(f"{name:14}{ours:6.2f} s{theirs:6.2f} s{ours / theirs:8.2f}", flush=True)


if __name__ == "__main__":
    plain(sys.argv[1]) if sys.argv[1:] else main()
