"""Diffusion as rectified flow: a U-Net learns the velocity that carries noise to digits along straight lines.

Lipman et al., Flow Matching for Generative Modeling (2023); Liu et al., Flow Straight and Fast (2023).
"""

import math
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveInt
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.evaluator import Evaluator, frechet_distance
from mnist_cnn.classifier import Batch
from mnist_cnn.run.experiment import Experiment, LRSchedulerCallable
from mnist_cnn.run.loggers import log_images

NO_CLASS = 10  # what the net gets in place of a class that it isn't told


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut; the embedding of time and class scales and shifts between them."""

    def __init__(self, inputs: int, outputs: int, emb_dim: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.film = nn.Linear(emb_dim, 2 * outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # each block begins as its shortcut

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class UNet(nn.Module):
    """The velocity [N, 1, 28, 28] at images [N, 1, 28, 28], times [N] in [0, 1] and classes [N].

    Args:
        width: Channels at 14x14, where 2x2 pixels are one position; a multiple of 8.
        deep_width: Channels at 7x7; a multiple of 8.
        emb_dim: Width of the embedding of time and class; even.
    """

    frequencies: Tensor

    def __init__(self, width: PositiveInt = 48, deep_width: PositiveInt = 96, emb_dim: PositiveInt = 128) -> None:
        super().__init__()
        if width % 8 or deep_width % 8 or emb_dim % 2:
            raise ValueError("width and deep_width must be multiples of 8, emb_dim of 2")
        self.classes = nn.Embedding(NO_CLASS + 1, emb_dim)
        self.time = nn.Sequential(nn.Linear(emb_dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(1000), emb_dim // 2)))
        self.first = nn.Conv2d(4, width, 3, padding=1)
        self.down = ResBlock(width, width, emb_dim)
        self.deep1 = ResBlock(width, deep_width, emb_dim)
        self.deep2 = ResBlock(deep_width, deep_width, emb_dim)
        self.up = ResBlock(deep_width + width, width, emb_dim)
        self.norm, self.last = nn.GroupNorm(8, width), nn.Conv2d(width, 4, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, images: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        angles = times[:, None] * self.frequencies  # [N, emb_dim / 2]
        emb = F.silu(self.time(torch.cat([angles.sin(), angles.cos()], dim=1)) + self.classes(classes))
        h = self.first(F.pixel_unshuffle(images, 2))  # [N, width, 14, 14]
        skip = self.down(h, emb)
        h = self.deep2(self.deep1(F.avg_pool2d(skip, 2), emb), emb)  # [N, deep_width, 7, 7]
        h = self.up(torch.cat([F.interpolate(h, scale_factor=2.0), skip], dim=1), emb)  # [N, width, 14, 14]
        return F.pixel_shuffle(self.last(F.silu(self.norm(h))), 2)


class RectifiedFlow(Experiment):
    """Learns to generate digits of a given class; generates some after fit, and in validate and test.

    Of these it logs sampled_acc, the share that a classifier takes for the digit asked for, and frechet, the Fréchet
    distance to the real images in that classifier's features; a test also logs that of training images (frechet_floor)
    and of noise (frechet_noise).

    Args:
        net: Maps images [N, 1, 28, 28], times [N] and classes [N] to velocities [N, 1, 28, 28].
        optimizer: Called with the parameters of the net.
        lr_scheduler: Called with the optimizer; see `Experiment`.
        drop_class: Share of training images whose class the net isn't told, for guidance.
        guidance: Strength w of classifier-free guidance; 0: none.
        solver: Method that integrates the velocity; heun evaluates the net twice a step.
        steps: Number of steps from noise to image.
        num_samples: Generated digits, each class in turn.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        drop_class: ClosedUnitInterval = 0.1,
        guidance: NonNegativeFloat = 0.7,
        solver: Literal["euler", "heun"] = "euler",
        steps: PositiveInt = 20,
        num_samples: PositiveInt = 1000,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.net = net.to(memory_format=torch.channels_last)
        self.drop_class, self.guidance = drop_class, guidance
        self.solver, self.steps, self.num_samples = solver, steps, num_samples

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, classes = batch
        # Times near the middle are the hardest: logit-normal (Esser et al., Scaling Rectified Flow, 2024, eq. 19).
        times = torch.randn(len(images), device=images.device).sigmoid()
        classes = classes.masked_fill(torch.rand_like(times) < self.drop_class, NO_CLASS)
        return self.loss(images, torch.randn_like(images), times, classes)

    def loss(self, images: Tensor, noise: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        """The mean squared error of the velocity (Lipman 2023, eq. 23 with σ_min = 0)."""
        t = times[:, None, None, None]
        x = (1 - t) * noise + t * images  # on the line from noise, at t = 0, to the image, at t = 1
        return F.mse_loss(self.net(x, times, classes), images - noise)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch, batch_idx, "test")

    def evaluate(self, batch: Batch, batch_idx: int, stage: str) -> None:
        """Logs the loss with the same noise and evenly spaced times in every run."""
        images, classes = batch
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(batch_idx)).to(images)
        times = torch.linspace(0, 1, len(images), device=images.device)
        loss = self.loss(images, noise, times, classes)
        self.log(f"{stage}/loss", loss, batch_size=len(images), sync_dist=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Ten new digits of each class, [100, 1, 28, 28] in [0, 1], whatever the batch holds."""
        seed = torch.initial_seed() + batch_idx  # seed_everything chooses the digits
        return self.pixels(self.sample(torch.arange(10, device=self.device).repeat(10), seed)[-1])

    @torch.no_grad()
    def sample(self, classes: Tensor, seed: int) -> Tensor:
        """The paths [steps + 1, N, 1, 28, 28] from noise to digits of the classes [N]."""
        noise = torch.randn(len(classes), 1, 28, 28, generator=torch.Generator().manual_seed(seed))
        x = noise.to(self.device, self.dtype)  # type: ignore[arg-type]
        path, h = [x], 1 / self.steps
        for step in range(self.steps):
            velocity = self.guided(x, step * h, classes)
            if self.solver == "heun":  # the mean of the velocities at both ends of an Euler step
                velocity = (velocity + self.guided(x + h * velocity, (step + 1) * h, classes)) / 2
            x = x + h * velocity
            path.append(x)
        return torch.stack(path)

    def guided(self, x: Tensor, time: float, classes: Tensor) -> Tensor:
        """The velocity with classifier-free guidance: (1 + w) v(x, class) - w v(x) (Ho and Salimans 2022, eq. 6)."""
        times = torch.full([len(x)], time, device=x.device, dtype=x.dtype)
        conditional, without = self.net(x, times, classes), self.net(x, times, torch.full_like(classes, NO_CLASS))
        return conditional + self.guidance * (conditional - without)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.state.fn == "validate":
            self.judge("val", self.trainer.num_val_batches)

    def on_test_epoch_end(self) -> None:
        self.judge("test", self.trainer.num_test_batches)

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised images in [0, 1] again."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return (images.float() * data.std + data.mean).clamp(0, 1)

    def judge(self, stage: str, batches: list[int | float]) -> None:
        """Generates digits; logs how well they are recognised and how far they are from the real ones, and pictures."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        count = int(sum(batches)) * data.eval_batch_size * self.trainer.world_size
        real = data.sets[stage].tensors[0][:count, None].to(self.device) / 255
        classes = torch.arange(self.num_samples, device=self.device) % 10
        parts = enumerate(classes.split(100), start=100 * self.trainer.testing)  # other noise in a test
        paths = self.pixels(torch.cat([self.sample(part, seed) for seed, part in parts], dim=1))
        evaluator = Evaluator().to(self.device)
        (logits, features), (_, of_real) = evaluator(paths[-1]), evaluator(real)
        self.log(f"{stage}/sampled_acc", (logits.argmax(dim=1) == classes).float().mean())
        self.log(f"{stage}/frechet", frechet_distance(features, of_real))
        if stage == "test":
            data.setup("fit")  # reads the training images, if only a test runs
            training = data.sets["train"].tensors[0][: len(classes), None].to(self.device) / 255
            self.log("test/frechet_floor", frechet_distance(evaluator(training)[1], of_real))
            self.log("test/frechet_noise", frechet_distance(evaluator(paths[0])[1], of_real))
            log_images(self.trainer, "test/samples", paths[-1, :100], columns=10)
            first = paths[:: max(1, self.steps // 10), :10]  # [11, 10, 1, 28, 28] with 20 steps
            log_images(self.trainer, "test/paths", first.transpose(0, 1).flatten(0, 1), columns=len(first))
