"""GPT: whatever is a sequence of tokens is learned by predicting each token from those before it.

GPT-2 (Radford 2019), which refers to GPT (Radford 2018) for its equations.
"""

import math
from typing import Any

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveFloat, PositiveInt
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.evaluator import Evaluator
from experiments.tokens import Batch, pixels
from mnist_cnn.run.errors import UserError
from mnist_cnn.run.experiment import Experiment, LRSchedulerCallable
from mnist_cnn.run.loggers import log_images, log_text


class Block(nn.Module):
    """Attention, then a multilayer perceptron; each reads a normalised x and adds to x (Radford 2019, 2.3)."""

    def __init__(self, n_head: int, n_embd: int, dropout: float) -> None:
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.qkv, self.attn_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.fc, self.fc_proj = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor, cache: Tensor | None, start: int) -> Tensor:
        p, end = self.dropout if self.training else 0.0, start + x.shape[1]
        q, k, v = self.qkv(self.ln_1(x)).unflatten(2, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4).unbind()
        if cache is not None:  # [2, N, n_head, block_size, D]
            cache[0, :, :, start:end], cache[1, :, :, start:end] = k, v
            k, v = cache[0, :, :, :end], cache[1, :, :, :end]
        # softmax(Q K^T / sqrt(D)) V (Vaswani 2017, eq. 1); each is [N, n_head, T, D], D = n_embd / n_head
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=start == 0)
        x = x + F.dropout(self.attn_proj(y.transpose(1, 2).flatten(2)), p)  # [N, T, n_embd]
        # GELU(x W_1) W_2 (eq. 2, there with ReLU); GELU's tanh form, GPT-2's, takes 3 times as long on a CPU
        return x + F.dropout(self.fc_proj(F.gelu(self.fc(self.ln_2(x)))), p)


class GPT(Experiment):
    """Predicts the next token; logs the loss in nats a token, of a text also in bits.

    It samples digits or a text after fit, and in validate and test.

    Args:
        optimizer: Called with the parameters; its weight decay is for matrices only.
        lr_scheduler: Called with the optimizer; see `Experiment`.
        n_layer: Number of blocks.
        n_head: Attention heads of a block; divides n_embd.
        n_embd: Width of the vectors between the blocks.
        dropout: Share of the embedding, the attention and each half of a block that is dropped in training.
        temperature: Divides the logits from which tokens are sampled; lower: likelier tokens.
        top_k: Samples from so many of the likeliest tokens; null: from all.
        num_samples: Sampled digits, each class in turn, which a classifier judges; sampled characters of a text.
    """

    vocab: Tensor
    wpe: nn.Embedding

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        n_layer: PositiveInt = 4,
        n_head: PositiveInt = 4,
        n_embd: PositiveInt = 128,
        dropout: ClosedUnitInterval = 0.0,
        temperature: PositiveFloat = 1.0,
        top_k: PositiveInt | None = None,
        num_samples: PositiveInt = 1000,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        if n_embd % n_head:
            raise ValueError(f"n_embd={n_embd} is not a multiple of n_head={n_head}")
        self.n_head, self.n_embd, self.dropout = n_head, n_embd, dropout
        self.temperature, self.top_k, self.num_samples = temperature, top_k, num_samples
        self.blocks = nn.ModuleList([Block(n_head, n_embd, dropout) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)

    def configure_model(self) -> None:
        if self.has_trainer:  # otherwise, load_from_checkpoint calls it
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            self.build(data.vocab, data.block_size)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.build(checkpoint["state_dict"]["vocab"], len(checkpoint["state_dict"]["wpe.weight"]))

    def build(self, vocab: Tensor, block_size: int) -> None:
        """Creates the embeddings, whose sizes come from the data, and draws all weights; once."""
        if hasattr(self, "wte"):
            if not torch.equal(self.vocab.cpu(), vocab.cpu()) or block_size != self.wpe.num_embeddings:
                raise UserError("the checkpoint was trained on other tokens: give its data.path and data.block_size")
            return
        self.register_buffer("vocab", vocab.clone())  # in checkpoints, since weights mean nothing without it
        self.wte = nn.Embedding(len(vocab), self.n_embd)
        self.wpe = nn.Embedding(block_size, self.n_embd)
        for name, p in self.named_parameters():  # N(0, 0.02) (2018, 4.1), / sqrt(layers) if residual (2019, 2.3)
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * len(self.blocks) if "_proj" in name else 1))
            elif "bias" in name:
                nn.init.zeros_(p)

    def parameter_groups(self) -> list[dict[str, Any]]:
        matrices, others = ([p for p in self.parameters() if (p.ndim == 2) == two] for two in (True, False))
        return [{"params": matrices}, {"params": others, "weight_decay": 0.0}]

    def forward(self, tokens: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """Logits [N, T, vocab] of the token after each of [N, T]; with keys and values from before `start`, T is 1."""
        x = self.wte(tokens) + self.wpe.weight[start : start + tokens.shape[1]]  # h_0 = U W_e + W_p (2018, eq. 2)
        x = F.dropout(x, self.dropout, self.training)  # [N, T, n_embd]
        for index, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[index], start)  # h_l = transformer_block(h_l-1)
        return F.linear(self.ln_f(x), self.wte.weight)  # P(u) = softmax(h_n W_e^T)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean of -log P(u_i | u_1, ..., u_i-1) (Radford 2018, eq. 1)."""
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: Batch, stage: str) -> None:
        """Logs the loss, which Lightning averages over batches and processes."""
        loss = self.training_step(batch, 0)
        self.log(f"{stage}/loss", loss, batch_size=len(batch[0]), sync_dist=True)
        if self.trainer.datamodule.path is not None:  # type: ignore[attr-defined]
            self.log(f"{stage}/bits", loss / math.log(2), batch_size=len(batch[0]), sync_dist=True)

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int, seed: int = 0) -> Tensor:
        """Continues tokens [N, T] by `count` sampled ones; a full context forgets its older half."""
        generator, size = torch.Generator(tokens.device).manual_seed(seed), self.wpe.num_embeddings
        shape = (len(self.blocks), 2, len(tokens), self.n_head, size, self.n_embd // self.n_head)
        cache = self.wpe.weight.new_zeros(shape)  # keys and values of each block
        new, start = tokens[:, -size:], 0  # what is not in the cache yet, and how many tokens are
        for _ in range(count):
            if start + new.shape[1] > size:
                new, start = tokens[:, -(size + 1) // 2 :], 0
            logits = self(new, cache, start)[:, -1].float() / self.temperature  # [N, vocab]
            if self.top_k and self.top_k < len(self.vocab):
                logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -math.inf)
            start, new = start + new.shape[1], logits.softmax(1).multinomial(1, generator=generator)
            tokens = torch.cat([tokens, new], dim=1)
        return tokens

    def on_validation_epoch_end(self) -> None:
        if self.trainer.state.fn == "validate":
            self.sample("val")

    def on_test_epoch_end(self) -> None:
        self.sample("test")

    def sample(self, stage: str) -> None:
        """Logs a text; or digits, and the share of them that a classifier takes for the digit asked for."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.path is not None:
            text = self.generate(data.prompt_tokens.to(self.device), self.num_samples)
            return log_text(self.trainer, f"{stage}/sample", self.decode(text[0]))
        classes = torch.arange(self.num_samples, device=self.device) % 10
        parts = enumerate(classes[:, None].split(100), start=100 * self.trainer.testing)  # a cache of 80 MB for each
        images = pixels(torch.cat([self.generate(part, 196, seed) for seed, part in parts]))
        logits, _ = Evaluator().to(self.device)(images)
        self.log(f"{stage}/sampled_acc", (logits.argmax(1) == classes).float().mean(), sync_dist=True)
        log_images(self.trainer, f"{stage}/samples", images[:100], columns=10)

    def decode(self, tokens: Tensor) -> str:
        """The characters of tokens [T]."""
        return "".join(map(chr, self.vocab[tokens].tolist()))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Prints how the prompt goes on; or returns digits beside completions of their upper half, [N, 1, 28, 56]."""
        seed = torch.initial_seed() + batch_idx  # seed_everything chooses what is sampled
        if self.trainer.datamodule.path is not None:  # type: ignore[attr-defined]
            tokens = self.generate(batch[0], self.num_samples, seed)
            print(self.decode(tokens[0]))
            return tokens
        digits = torch.cat([batch[0], batch[1][:, -1:]], dim=1)  # [N, 197]
        return torch.cat([pixels(digits), pixels(self.generate(digits[:, : 1 + 7 * 14], 7 * 14, seed))], dim=3)
