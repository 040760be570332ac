"""Weights of few bits: a net is trained with rounded weights and activations, then computes with integers.

LSQ: Esser et al., Learned Step Size Quantization, 2020 (arXiv 1902.08153). As in its figure 1, a layer adds up products
of integers, and multiplies the sums by both step sizes. In training the integers are float32, in which their sums are
exact below 2^24; the net that is read from the packed file does the same in int32.
"""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from mnist_cnn.run.errors import UserError
from mnist_cnn.run.files import write_atomically
from mnist_cnn.run.loggers import log_figure


class LSQ(nn.Module):
    """Rounds v to integers v̄ from -Q_N to Q_P, in units of a step size s that is learned (eq. 1)."""

    def __init__(self, bits: float, weight: Tensor | None = None) -> None:
        super().__init__()
        self.levels, self.step = round(2**bits), nn.Parameter(torch.ones(()))
        self.low = self.high = self.count = 0  # -Q_N, Q_P and N; for activations the first batch sets them, and s
        self.packed: Tensor | None = None  # weights from a file, int32
        if weight is not None:
            self.initialize(weight, signed=True, count=weight.numel())

    @torch.no_grad()
    def initialize(self, v: Tensor, signed: bool, count: int) -> None:
        """Sets s = 2⟨|v|⟩ / √Q_P (section 2.1); for pixels, whose s is not learned, such that none is clipped."""
        self.low, self.count = -(self.levels // 2) if signed else 0, count
        v, self.high = v.abs(), self.low + self.levels - 1
        self.step.copy_(2 * v.mean() / math.sqrt(self.high) if self.step.requires_grad else v.max() / self.high)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(self.step, 0)  # each process has another batch

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.low, self.high, self.count])  # in a checkpoint, beside s

    def set_extra_state(self, state: Tensor) -> None:
        self.low, self.high, self.count = map(int, state)
        if self.count and (found := self.high - self.low + 1) != self.levels:
            raise UserError(f"the checkpoint has {found} levels, not {self.levels}: give its number of bits")

    def step_size(self) -> Tensor:
        """The step size s, with its gradient multiplied by g = 1 / √(N Q_P) (section 2.2)."""
        scaled = self.step / math.sqrt(self.count * self.high)
        return self.step.detach() + (scaled - scaled.detach())

    def forward(self, v: Tensor) -> Tensor:
        """v̄ = ⌊clip(v/s, -Q_N, Q_P)⌉ (eq. 1), of v's shape; ⌊⌉ has gradient 1, so that autograd gives eq. 3 and 5."""
        if self.packed is not None:
            return self.packed
        if not self.count:
            self.initialize(v, signed=bool(v.min() < 0), count=v[0].numel())  # N is that of one image
        v = F.hardtanh(v * (1 / self.step_size()), self.low, self.high)  # clip, with a fast backward pass
        return (v.round() - v).detach() + v


class QuantizedLayer(nn.Module):
    """A convolution or linear layer with rounded weights and inputs."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, weight_bits: float, input_bits: float) -> None:
        super().__init__()
        self.input_lsq, self.weight_lsq = LSQ(input_bits), LSQ(weight_bits, layer.weight)
        self.layer, self.bias, layer.bias = layer, layer.bias, None
        parametrize.register_parametrization(layer, "weight", self.weight_lsq)

    def forward(self, x: Tensor) -> Tensor:
        """For x [N, C, H, W] or [..., C]: sums of x̄ w̄, times s_x s_w (figure 1), plus the bias."""
        x = self.input_lsq(x) if self.weight_lsq.packed is None else self.input_lsq(x).int()
        y = self.layer(x) * (self.input_lsq.step_size() * self.weight_lsq.step_size())
        return y if self.bias is None else y + (self.bias.view(-1, 1, 1) if y.ndim == 4 else self.bias)


class Quantized(nn.Module):
    """A net whose convolutions and linear layers have weights and inputs of few bits, with learned step sizes.

    Args:
        net: Any net; layers other than Conv2d and Linear stay as they are.
        weight_bits: Bits of the weights: 2 to 8, or 1.58, which is ternary (-1, 0, 1).
        act_bits: Bits of the inputs of these layers: 2 to 8.
        first_last_bits: Bits of both in the first and the last one: 2 to 8.
        weights: Checkpoint of the same net in floating point, to start from; null: random weights.
    """

    def __init__(
        self,
        net: nn.Module,
        weight_bits: float = 2,
        act_bits: int = 8,
        first_last_bits: int = 8,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        for name, bits in zip(("weight_bits", "act_bits", "first_last_bits"), (weight_bits, act_bits, first_last_bits)):
            if bits not in range(2, 9) and (name, bits) != ("weight_bits", 1.58):
                raise ValueError(f"{name} must be 2 to 8{', or 1.58' * (name == 'weight_bits')}, not {bits:g}")
        self.net = net
        layers = {name: layer for name, layer in self.named_modules() if type(layer) in (nn.Conv2d, nn.Linear)}
        if not layers:
            raise ValueError(f"{type(net).__name__} has no Conv2d or Linear layer to quantize")
        if weights is not None:
            try:
                state = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
                net.load_state_dict({name.removeprefix("net."): value for name, value in state.items()})
            except Exception as error:  # torch raises many kinds
                raise ValueError(f"weights={weights} does not load into {type(net).__name__}: {error!s:.240}") from None
        names = [*layers]
        for name, layer in layers.items():
            both = (first_last_bits, first_last_bits) if name in (names[0], names[-1]) else (weight_bits, act_bits)
            self.set_submodule(name, quantized := QuantizedLayer(layer, *both))
            quantized.input_lsq.requires_grad_(name != names[0])  # a gradient for pixels would take a sixth of the time

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def quantized(self) -> dict[str, QuantizedLayer]:
        return {name: layer for name, layer in self.named_modules() if isinstance(layer, QuantizedLayer)}

    def other_state(self) -> dict[str, Tensor]:
        """The tensors of the state_dict that are not weights of quantized layers."""
        return {name: value for name, value in self.state_dict().items() if ".parametrizations." not in name}


def place_values(layer: QuantizedLayer) -> np.ndarray:
    """Of the digits of a 64-bit word, a weight each: 40 ternary ones, 32 of two bits, 16 of four, 8 of eight."""
    levels = layer.weight_lsq.levels
    return np.uint64(levels) ** np.arange(int(64 / math.log2(levels)), dtype=np.uint64)


def write_packed(net: Quantized, path: Path) -> None:
    """Writes the integer weights as digits of 64-bit words, and all other numbers as float32."""
    words = []
    for layer in net.quantized().values():
        places, weight = place_values(layer), layer.layer.weight.detach().cpu().float().contiguous().numpy().flatten()
        digits = np.pad(weight - layer.weight_lsq.low, (0, -weight.size % places.size)).astype(np.uint64)
        words.append((digits.reshape(-1, places.size) * places).sum(axis=1, dtype=np.uint64))
    numbers = torch.cat([value.detach().cpu().float().flatten() for value in net.other_state().values()])
    with write_atomically(path) as file:
        np.savez(file.buffer, words=np.concatenate(words), numbers=numbers.numpy())


def read_packed(net: Quantized, path: Path) -> Quantized:
    """A copy of the net, on the CPU, with all numbers from the file, which computes in int32."""
    file, net = np.load(path), copy.deepcopy(net).cpu().eval()
    words, state = file["words"], net.other_state()
    numbers = torch.from_numpy(file["numbers"]).split([value.numel() for value in state.values()])
    net.load_state_dict({key: new.view_as(state[key]) for key, new in zip(state, numbers)}, strict=False)
    for layer in net.quantized().values():
        places, shape, lsq = place_values(layer), layer.layer.weight.shape, layer.weight_lsq
        used, words = np.split(words, [-(-shape.numel() // len(places))])
        digits = (used[:, None] // places % np.uint64(lsq.levels)).flatten()[: shape.numel()].astype(np.int32)
        lsq.packed = torch.from_numpy(digits).view(shape) + lsq.low
    return net


class PackedWeights(Callback):
    """Packs the tested net into quantized.npz, after fit in the run's folder, and tests what is read with integers.

    Logs test/bytes (the size of the file), test/packed_acc, and test/packed_differs: how many predictions differ.
    """

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if not isinstance(net := getattr(pl_module, "net", None), Quantized):
            raise UserError(f"PackedWeights needs experiments.quantized.Quantized, not the net {type(net).__name__}")

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        net, run = pl_module.net, Path(trainer.ckpt_path or ".").absolute().parents[1]
        after_fit = (run / "config.yaml").exists() and not (run / "metrics.json").exists()
        path = (run if after_fit else Path()) / "quantized.npz"
        if trainer.is_global_zero:
            write_packed(net, path)
        trainer.strategy.barrier()
        self.packed = read_packed(net, path)
        self.bytes = float(path.stat().st_size)
        layers = net.quantized()
        figure = Figure((3 * len(layers), 4), dpi=80, layout="constrained")
        for axes, (name, layer) in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers.items()):
            weight, low = layer.layer.weight.detach().cpu().flatten(1).T, layer.weight_lsq.low
            axes.imshow(weight, "RdBu", aspect="auto", interpolation="nearest", vmin=low, vmax=-low)
            axes.set(title=f"{name[4:]}: {layer.weight_lsq.levels} levels", xlabel="output", ylabel="input")
        log_figure(trainer, "test/weights", figure)

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        predicted, targets = self.packed(batch[0].cpu()).argmax(dim=1), batch[1].cpu()
        differs = (predicted != outputs.argmax(dim=1).cpu()).float().sum()
        options: dict[str, Any] = {"batch_size": len(targets), "sync_dist": True}
        pl_module.log("test/bytes", self.bytes, reduce_fx="max", **options)
        pl_module.log("test/packed_acc", (predicted == targets).float().mean(), **options)
        pl_module.log("test/packed_differs", differs, reduce_fx="sum", **options)
