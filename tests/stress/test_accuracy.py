"""What the configs promise: the accuracy of fast.yaml and best.yaml."""

from pathlib import Path

from conftest import DATA, QUIET, REPO, SHORT, main, metrics_of


def fit(name: str, *options: str) -> dict:
    main(["fit", f"--config={REPO}/configs/{name}.yaml", f"--data.data_dir={DATA}", *QUIET, *options])
    return metrics_of(Path(f"logs/{name}/version_0"))


def test_fast_config_is_as_accurate_as_it_says(folder):
    metrics = fit("fast")
    assert metrics["test/acc"] > 0.988  # 0.990 on average; other processors round differently
    assert metrics["epochs"] == 1 and metrics["best_checkpoint"] == "checkpoints/last.ckpt"


def test_best_config_learns(folder):
    """All of it takes ten minutes; this is two epochs of 150 steps, with the whole schedule."""
    metrics = fit("best", *SHORT, "--trainer.limit_train_batches=150", "--trainer.limit_test_batches=1.0")
    assert metrics["test/acc"] > 0.97
