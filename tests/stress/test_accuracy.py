"""What the configs promise: the accuracy of fast.yaml and best.yaml; that experiments learn on a short schedule."""

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


def test_a_graph_net_learns(folder):
    options = [
        "--trainer.max_epochs=3",
        "--data.num_images=3000",
        "--data.val_size=500",
        "--trainer.limit_test_batches=2",
    ]
    assert fit("graph", *options)["test/acc"] > 0.5


def test_two_bits_are_nearly_as_accurate_as_floats(folder):
    """Both trained for 200 batches; rounding alone takes 6 points from the net of base.yaml."""
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=200"]
    main(["fit", f"--config={REPO}/configs/base.yaml", f"--data.data_dir={DATA}", *QUIET, *short])
    floats = metrics_of(Path("logs/mnist/version_0"))["test/acc"]
    metrics = fit("quantized", *short)  # starts from that run
    assert metrics["test/acc"] > floats - 0.02 and metrics["test/packed_differs"] == 0


def test_diffusion_learns_the_digit_that_is_asked_for(folder):
    """Without the average of weights, which begins to help after 1,000 steps."""
    options = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=250", "--trainer.callbacks=null"]
    few = ["--trainer.limit_val_batches=2", "--trainer.limit_test_batches=2", "--model.num_samples=200"]
    metrics = fit("diffusion", *options, *few)
    assert metrics["test/sampled_acc"] > 0.4 and metrics["test/frechet"] < metrics["test/frechet_noise"] / 4


def test_gpt_learns_from_the_pixels_before(folder):
    """Class and position alone allow 0.662 nats: the mean surprise of a pixel, given its distribution over images."""
    few = ["--trainer.limit_val_batches=2", "--trainer.limit_test_batches=2", "--model.num_samples=100"]
    metrics = fit("gpt", "--trainer.max_steps=200", *few)
    assert metrics["test/loss"] < 0.64
