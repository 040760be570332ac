"""configs/fast.yaml against a public recipe for 99 % in one epoch: `python benchmarks/fast.py`.

The recipe, that of github.com/tuomaso/train_mnist_fast (99 % in 0.76 s, on a GPU), restated: 5x5 convolution to 24
channels, pool, ReLU, 3x3 convolution to 32, pool, ReLU, linear to 256, ReLU, linear to 10; Adam with OneCycleLR up to
0.01 and betas 0.7 and 0.9; one epoch of all 60,000 images in batches of 256. It is a plain torch loop, its images lie
ready as floats, and its time is that of the loop alone. The time of fast.yaml is that of the whole fit as metrics.json
has it, with loggers and reading of the data; neither has its import or its test counted. The two processes of each seed
take turns. Prints medians of seconds, means of test accuracies, and the ratio.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parents[1]
SEEDS = range(5)


def recipe(seed: int) -> None:
    """Trains and tests, and prints seconds and test accuracy."""
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torchvision.datasets import MNIST

    torch.set_num_threads(2)
    torch.manual_seed(seed)
    sets = [MNIST(REPO / "data", train=train) for train in (True, False)]
    (images, targets), (test_images, test_targets) = [
        (data.data.unsqueeze(1).float().div_(255).sub_(0.1307).div_(0.3081), data.targets) for data in sets
    ]
    net = nn.Sequential(
        *(nn.Conv2d(1, 24, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(24, 32, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32 * 5 * 5, 256), nn.ReLU(), nn.Linear(256, 10)),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, betas=(0.7, 0.9))
    batches = torch.randperm(60_000).split(256)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=len(batches), cycle_momentum=False)
    start = time.perf_counter()
    for batch in batches:
        loss = F.cross_entropy(net(images.index_select(0, batch)), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        right = (net(test_images).argmax(1) == test_targets).float().mean()
    print(json.dumps({"seconds": seconds, "test/acc": right.item()}))


def main() -> None:
    """Measures and prints."""
    results: dict[str, list[dict[str, float]]] = {"fast.yaml": [], "public recipe": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            fit = f"fit --config={REPO / 'configs/fast.yaml'} --data.data_dir={REPO / 'data'} --seed_everything={seed}"
            for command in ([str(REPO / "main.py"), *fit.split(), f"--run_dir={seed}"], [__file__, str(seed)]):
                done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
            results["fast.yaml"].append(json.loads(Path(folder, str(seed), "metrics.json").read_text()))
            results["public recipe"].append(json.loads(done.stdout))
    seconds = {name: statistics.median(run["seconds"] for run in runs) for name, runs in results.items()}
    for name, runs in results.items():
        accuracies = [run["test/acc"] for run in runs]
        told = f"{statistics.mean(accuracies):.4f}, {min(accuracies):.4f} to {max(accuracies):.4f}"
        print(f"{name:14}{seconds[name]:6.2f} s   test/acc {told}")
    print(f"{'ratio':14}{seconds['fast.yaml'] / seconds['public recipe']:6.2f}")


if __name__ == "__main__":
    recipe(int(sys.argv[1])) if sys.argv[1:] else main()
