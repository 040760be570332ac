"""The tokens that experiments/gpt.py learns: pixels of digits, or characters of a text."""

from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor
from torch.nn import functional as F

from experiments.evaluator import upscale
from mnist_cnn.data import MNISTDataModule, TensorBatches
from mnist_cnn.run.errors import UserError

Batch = tuple[Tensor, Tensor]  # tokens [N, T], and the token after each of them [N, T]; int64


class TokenDataModule(MNISTDataModule):
    """Digits in 197 tokens: the class (0 to 9), then 14x14 pixels in 8 grey levels (10 to 17). Or a text's characters.

    Args:
        path: A text in UTF-8 to learn instead of digits. Its end, of `val_size`, is for validation and test.
        block_size: Characters of a text that are seen at once; digits are seen whole.
        prompt: Characters with which a sampled text begins; by default the first one of `path`.
        kwargs: Arguments of MNISTDataModule.
    """

    def __init__(self, path: str | None = None, block_size: PositiveInt = 64, prompt: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path, self.block_size, self.prompt = path, 196 if path is None else block_size, prompt
        self.vocab = torch.arange(18)  # of a text: the code points of its characters, sorted

    def prepare_data(self) -> None:
        if self.path is None:
            super().prepare_data()

    def setup(self, stage: str) -> None:
        if stage == "predict" and self.predict_dir is not None:
            raise UserError("data.predict_dir: GPT completes digits of a known class, your own images have none")
        if self.path is None:
            return super().setup(stage)
        try:
            text = Path(self.path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path or 'data.path'} cannot be read: {error}") from error
        self.vocab, tokens = code_points(text).unique(return_inverse=True)
        num_val = round(self.val_size * len(text)) if isinstance(self.val_size, float) else self.val_size
        num_train, size = len(text) - num_val, self.block_size
        if num_train < size + self.batch_size or num_val <= size:
            parts = f"{num_train} characters to train and {num_val} to validate (val_size={self.val_size})"
            needed = f"block_size={size} and batch_size={self.batch_size} need {size + self.batch_size} and {size + 1}"
            raise UserError(f"{self.path} is too short: it has {parts}, {needed}")
        if unseen := {*self.prompt} - {*text}:
            raise UserError(f"the prompt has characters that {self.path} does not have: {sorted(unseen)}")
        windows = {"train": tokens[:num_train].unfold(0, size + 1, 1)}  # one from each offset: [N, size + 1]
        windows["val"] = windows["test"] = tokens[num_train:].unfold(0, size + 1, size)  # side by side
        self.prompt_tokens = torch.searchsorted(self.vocab, code_points(self.prompt or text[0]))[None]  # [1, T]
        if stage == "predict":
            windows["test"] = F.pad(self.prompt_tokens, (0, 1))
        self.sets = {name: TensorBatches(part[:, :-1], part[:, 1:]) for name, part in windows.items()}

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if self.path is not None:
            return batch
        images, classes = super().on_after_batch_transfer(batch, dataloader_idx)
        grey = (F.avg_pool2d(images.float() * self.std + self.mean, 2) * 7).round().clamp(0, 7)  # [N, 1, 14, 14]
        tokens = torch.cat([classes[:, None], 10 + grey.flatten(1).long()], dim=1)  # [N, 197]
        return tokens[:, :-1], tokens[:, 1:]


def code_points(text: str) -> Tensor:
    """The characters of a text as integers [T]."""
    return torch.tensor([ord(character) for character in text])


def pixels(tokens: Tensor) -> Tensor:
    """Tokens [N, 197] of digits as images [N, 1, 28, 28] in [0, 1]."""
    return upscale(((tokens[:, 1:] - 10) / 7).clamp(0, 1).unflatten(1, (1, 14, 14)))
