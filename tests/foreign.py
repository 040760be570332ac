"""A LightningCLI program that shares nothing with mnist_cnn, for sweep.py."""

import os
import signal
import time

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

RELU = torch.nn.ReLU()


class Line(LightningModule):
    """Fits y = 3x. It can misbehave."""

    def __init__(
        self,
        lr: float = 0.1,
        bias: bool = False,
        fault: str | None = None,
        unused: torch.nn.Module = RELU,  # YAML cannot hold it
    ):
        super().__init__()
        assert unused is RELU
        self.line, self.lr, self.fault = torch.nn.Linear(1, 1, bias=bias), lr, fault

    def training_step(self, batch, index):
        with open("trained.txt", "a") as file:  # one line a run
            file.write(f"{self.trainer.default_root_dir}\n" * (self.global_step == 0))
        match self.fault:
            case "exit":
                raise SystemExit("error: this fault was asked for")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "deaf":
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                time.sleep(600)
            case "wait":
                time.sleep(600)
            case "hold":
                while os.path.exists("held"):
                    time.sleep(0.05)
            case "pause":
                time.sleep(1)
        return torch.nn.functional.mse_loss(self.line(batch[0]), batch[1])

    def validation_step(self, batch, index):
        loss = torch.nn.functional.mse_loss(self.line(batch[0]), batch[1])
        self.log("loss", loss * float("nan") if self.fault == "nan" else loss)

    def test_step(self, batch, index):
        self.log("test_loss", torch.nn.functional.mse_loss(self.line(batch[0]), batch[1]))
        self.log("loss", 1000.0)  # validation's name

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Points(LightningDataModule):
    """64 points on y = 3x."""

    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        x = torch.linspace(-1, 1, 64).unsqueeze(1)
        return DataLoader(TensorDataset(x, 3 * x), self.batch_size)

    val_dataloader = test_dataloader = train_dataloader


def main(args=None):
    return LightningCLI(Line, Points, args=args, trainer_defaults={"max_epochs": 2, "accelerator": "cpu"})


def evaluates(args=None):
    cli = main(args)
    cli.trainer.validate(cli.model, cli.datamodule, ckpt_path="best")
    cli.trainer.test(cli.model, cli.datamodule, ckpt_path="best")
    return cli


def has_no_fit(args=None):
    return LightningCLI(Line, Points, args=args, run=False)


def takes_any_model(args=None):
    return LightningCLI(Line, Points, args=args, subclass_mode_model=True)


def forgets(args=None):
    main(args)


def exits(args=None):
    raise SystemExit(main(args) and 0)


def makes_none(args=None):
    return 3
