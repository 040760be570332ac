"""A classifier that judges generated digits: is it the digit asked for, and how far are the features from real ones?

`python main.py fit --config configs/evaluator.yaml` trains it; then this file, given the checkpoint, keeps its weights:
`python -m experiments.evaluator logs/evaluator/version_0/checkpoints/last.ckpt`
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_cnn.nets import StackCNN

WEIGHTS = Path(__file__).with_suffix(".pt")


class Coarse(nn.Module):
    """Shows half of the images in 14x14 pixels and 8 grey levels, as GPT draws them."""

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 1, 28, 28] in [0, 1]."""
        coarse = (F.avg_pool2d(images, 2) * 7).round() / 7
        return torch.where(torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5, upscale(coarse), images)


def upscale(images: Tensor) -> Tensor:
    """Images [N, 1, 14, 14] as [N, 1, 28, 28]."""
    return F.interpolate(images, scale_factor=2.0, mode="nearest-exact")


class DigitNet(StackCNN):
    """Four convolutions, the last of which leaves 64 features of an image, and a linear layer."""

    def __init__(self) -> None:  # width 28 -> 14 -> 12, pooled to 6 -> 6, pooled to 3 -> 1
        super().__init__([32, 64, 96, 64], [4, 3, 3, 3], [2, 1, 1, 1], [1, 0, 1, 0], [1, 2, 2, 1])


class Evaluator(nn.Module):
    """The classifier of MNIST's digits with its weights, frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.net = DigitNet()
        self.net.load_state_dict(torch.load(WEIGHTS, weights_only=True))
        self.head, self.net.fc = self.net.fc, nn.Identity()  # type: ignore[assignment]
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, 10] and features [N, 64], the inputs of the last layer, of images [N, 1, 28, 28] in [0, 1]."""
        normalised = (images - 0.1307) / 0.3081  # as MNISTDataModule does
        features = torch.cat([self.net(part) for part in normalised.split(1000)])
        return self.head(features), features


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The squared Fréchet distance of normal distributions, fitted to features [N, D], [M, D] (Heusel 2017, eq. 6)."""
    a, b = a.double().cpu(), b.double().cpu()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()  # the trace of the product's square root
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root)


if __name__ == "__main__":
    state = torch.load(sys.argv[1], map_location="cpu", weights_only=True)["state_dict"]
    torch.save({name.removeprefix("net."): value.contiguous() for name, value in state.items()}, WEIGHTS)
