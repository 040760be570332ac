"""Nets: plain `nn.Module`s from a batch of images to logits. They know nothing of training."""

from collections.abc import Sequence

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import nn


class CNN(nn.Module):
    """Three convolutions, a mean over the image, two linear layers; 2,324 parameters with the default widths.

    Args:
        l1_chan: Channels out of the first convolution (3x3, stride 2).
        l2_chan: Channels out of the second convolution (3x3, stride 1).
        l3_chan: Channels out of the third convolution (3x3, stride 2).
        fc1_out: Width of the hidden linear layer.
    """

    def __init__(
        self, l1_chan: PositiveInt = 4, l2_chan: PositiveInt = 8, l3_chan: PositiveInt = 16, fc1_out: PositiveInt = 30
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, l1_chan, kernel_size=3, stride=2)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(l1_chan, l2_chan, kernel_size=3, padding="same")
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(l2_chan, l3_chan, kernel_size=3, stride=2)
        self.relu3 = nn.ReLU()
        self.fc1 = nn.Linear(l3_chan, fc1_out)
        self.relu4 = nn.ReLU()
        self.fc2 = nn.Linear(fc1_out, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [N, 10] of images [N, 1, 28, 28]."""
        x = self.relu1(self.conv1(images))  # [N, l1_chan, 13, 13]
        x = self.relu2(self.conv2(x))  # [N, l2_chan, 13, 13]
        x = self.relu3(self.conv3(x))  # [N, l3_chan, 6, 6]
        x = x.mean(dim=(2, 3))  # [N, l3_chan]; adaptive pooling has no deterministic backward on CUDA
        return self.fc2(self.relu4(self.fc1(x)))


class StackCNN(nn.Sequential):
    """Layers conv1, norm1, relu1, perhaps pool1, conv2 and so on; then a linear layer. Convolutions have no bias.

    Args:
        channels: Channels out of each convolution.
        kernel_sizes: Kernel size of each one.
        strides: Stride of each one.
        paddings: Zero padding of each one.
        pools: Size of the max pooling after each one; 1: none.
    """

    def __init__(
        self,
        channels: Sequence[PositiveInt] = (16, 32, 64),
        kernel_sizes: Sequence[PositiveInt] = (5, 3, 3),
        strides: Sequence[PositiveInt] = (2, 2, 1),
        paddings: Sequence[NonNegativeInt] = (0, 0, 0),
        pools: Sequence[PositiveInt] = (1, 1, 1),
    ) -> None:
        super().__init__()
        lists = (channels, kernel_sizes, strides, paddings, pools)
        if len({len(each) for each in lists}) > 1:
            raise ValueError("channels, kernel_sizes, strides, paddings and pools must have the same length")
        width, before = 28, 1
        for index, (after, kernel, stride, padding, pool) in enumerate(zip(*lists), 1):
            self.add_module(f"conv{index}", nn.Conv2d(before, after, kernel, stride, padding, bias=False))
            self.add_module(f"norm{index}", nn.BatchNorm2d(after))
            self.add_module(f"relu{index}", nn.ReLU())
            if pool > 1:
                self.add_module(f"pool{index}", nn.MaxPool2d(pool))
            width, before = ((width + 2 * padding - kernel) // stride + 1) // pool, after
            if width < 1:
                raise ValueError(f"nothing of the image is left after convolution {index}")
        self.flatten = nn.Flatten()  # [N, channels[-1] * width * width]
        self.fc = nn.Linear(before * width * width, 10)
