"""A step of configs/gpt_text.yaml against a plain torch loop's, one thread: `python benchmarks/gpt.py TEXT`.

The loop has the same net, data, batch size, clipping and optimizer, and logs nothing. `fit` is as shipped, validation
aside; TensorBoard has the times of its steps. Both alternate. Prints the median of 50 steps, and the ratio.
"""

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from experiments.gpt import GPT  # noqa: E402
from experiments.tokens import TokenDataModule  # noqa: E402

TEXT = Path(sys.argv[1]).resolve()  # in UTF-8
CONFIGS = [REPO / "configs" / name for name in ("gpt.yaml", "gpt_text.yaml")]
STEPS, PIECE, ROUNDS = 400, 50, 3


def fit(folder: Path) -> list[float]:
    """Seconds of each 50 steps of `main.py fit`."""
    options = [f"--data.path={TEXT}", f"--run_dir={folder}", "--num_threads=1", f"--trainer.max_steps={STEPS}"]
    options += [f"--trainer.log_every_n_steps={PIECE}", "--trainer.limit_val_batches=1", "--evaluate_best=false"]
    command = [sys.executable, str(REPO / "main.py"), "fit", *(f"--config={path}" for path in CONFIGS), *options]
    subprocess.run(command, cwd=folder.parent, check=True, stdout=subprocess.DEVNULL)
    times = [event.wall_time for event in EventAccumulator(str(folder)).Reload().Scalars("train/loss")]
    return [after - before for before, after in itertools.pairwise(times)]


def loop() -> list[float]:
    """Seconds of each 50 steps of the plain loop, but the first ones."""
    torch.set_num_threads(1)
    size = yaml.safe_load(CONFIGS[-1].read_text())["data"]["init_args"]["batch_size"]
    data = TokenDataModule(str(TEXT), batch_size=size)
    data.setup("fit")
    model = GPT(torch.optim.AdamW)
    model.build(data.vocab, data.block_size)
    optimizer = torch.optim.AdamW(model.parameter_groups(), lr=1e-3)
    before, after = data.sets["train"].tensors
    times = []
    for step in range(STEPS):
        index = torch.randint(len(before), (size,))
        loss = model.training_step((before[index], after[index]), 0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % PIECE == 0:
            times.append(time.time())
    return [after - before for before, after in itertools.pairwise(times)]


def main() -> None:
    """Measures and prints."""
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            ours += fit(Path(folder, str(number)))
            theirs += loop()
    step, plain = (1000 * statistics.median(times) / PIECE for times in (ours, theirs))
    print(f"fit {step:.1f} ms a step, loop {plain:.1f} ms, ratio {step / plain:.2f}")


if __name__ == "__main__":
    main()
