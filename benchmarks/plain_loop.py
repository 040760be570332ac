"""A plain torch loop with a config's net, data, optimizer and schedule: what epoch.py and gpu.py compare `fit` with.

    python benchmarks/plain_loop.py base.yaml original.yaml --epochs=4

All images are on the device as floats from the start; nothing is logged or saved. Prints a line an epoch.
"""

import argparse
import sys
from pathlib import Path

import torch
import yaml
from torch.nn import functional as F

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from mnist_cnn import CNN, MNISTDataModule, WarmupCosineLR  # noqa: E402
from mnist_cnn.run.folder import flatten  # noqa: E402


def train(configs: list[str], device: str, epochs: int, steps: int | None = None) -> None:
    """Trains for so many epochs of so many steps (None: a whole epoch) in one thread, and validates after each."""
    config = {}
    for name in configs:  # files of configs/; the last one wins
        config |= flatten(yaml.safe_load((REPO / "configs" / name).read_text()))
    net_of, optimizer_of, data_of = (
        {path[-1]: value for path, value in config.items() if path[:-1] == (*key.split(), "init_args")}
        for key in ("model init_args net", "model init_args optimizer", "data")
    )
    data = MNISTDataModule(str(REPO / "data"), **data_of)
    data.setup("fit")
    data.setup("test")
    on_device = {name: tuple(tensor.to(device) for tensor in part.tensors) for name, part in data.sets.items()}
    sets = {name: data.on_after_batch_transfer(tensors, 0) for name, tensors in on_device.items()}
    (images, targets), size = sets["train"], data.batch_size
    steps = steps or len(images) // size
    torch.set_num_threads(1)
    torch.manual_seed(42)
    channels_last = config["model", "init_args", "channels_last"]
    net = CNN(**net_of).to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    optimizer = torch.optim.SGD(net.parameters(), **optimizer_of)
    schedule = WarmupCosineLR(optimizer, epochs * steps) if config["model", "init_args", "lr_scheduler"] else None

    @torch.no_grad()
    def accuracy(name: str) -> float:
        right = [net(x).argmax(1) == y for x, y in zip(*(tensor.split(data.eval_batch_size) for tensor in sets[name]))]
        return torch.cat(right).float().mean().item()

    for epoch in range(epochs):
        for batch in torch.randperm(len(images), device=device)[: steps * size].split(size):
            loss = F.cross_entropy(net(images.index_select(0, batch)), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule:
                schedule.step()
        print(f"epoch {epoch}  val/acc {accuracy('val'):.4f}", flush=True)
    print(f"test/acc {accuracy('test'):.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("configs", nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int)
    train(**vars(parser.parse_args()))
