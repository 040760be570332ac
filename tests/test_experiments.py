"""experiments/: each trains, is resumed and repeated to the last digit, and leaves its metrics and pictures."""

import sys
from functools import partial

import pytest
import torch
from conftest import DATA, QUIET, REPO, RUN, RUNS, assert_same_run, error_of, main, metrics_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.diffusion import RectifiedFlow, UNet
from experiments.evaluator import Evaluator, frechet_distance
from experiments.gpt import GPT
from experiments.quantized import Quantized, read_packed, write_packed
from experiments.tokens import TokenDataModule, pixels
from mnist_cnn import CNN, MNISTDataModule
from mnist_cnn.run.errors import UserError

SMALL = {  # options that make it fast
    "diffusion": ["--model.net.width=8", "--model.net.deep_width=8", "--model.num_samples=20", "--model.steps=2"],
    "gpt": ["--model.n_layer=1", "--model.n_embd=16", "--model.n_head=2", "--model.num_samples=20"],
    "graph": ["--model.net.width=8", "--data.num_images=300", "--data.val_size=100"],
    "quantized": ["--model.net.weights=null"],
}
SMALL["gpt"] += ["--data.batch_size=4", "--data.eval_batch_size=20", "--trainer.max_steps=-1"]
METRICS = {
    "diffusion": ["sampled_acc", "frechet", "frechet_floor", "frechet_noise"],
    "gpt": ["sampled_acc"],
    "graph": ["acc"],
    "quantized": ["acc", "bytes", "packed_acc", "packed_differs"],
}
PICTURES = {
    "diffusion": ["samples", "paths"],
    "gpt": ["samples"],
    "graph": ["graphs", "worst_graphs", "confusion_matrix"],
    "quantized": ["weights", "confusion_matrix", "worst_classified"],
}
LIMITS = [f"--trainer.limit_{stage}_batches=2" for stage in ("train", "val", "test")]
LIMITS += ["--data.eval_batch_size=50", "--trainer.log_every_n_steps=1", "--model.lr_scheduler=null"]


def command(name: str, *options: str) -> list[str]:
    """A fit with two batches an epoch; its runs go where RUNS says."""
    config = [f"--config={REPO}/configs/{name}.yaml", f"--data.data_dir={DATA}", f"--trainer.default_root_dir={RUNS}"]
    return ["fit", *config, *LIMITS, *SMALL[name], "--trainer.max_epochs=2", *options]


@pytest.mark.parametrize("name", SMALL)
def test_an_experiment_is_a_run_like_any_other(folder, name, capfd):
    main(command(name))
    metrics = metrics_of(RUN)
    assert {f"test/{metric}" for metric in ("loss", *METRICS[name])} < set(metrics)
    assert metrics.get("test/packed_differs", 0) == 0
    events = EventAccumulator(str(RUN)).Reload()
    assert sorted(events.Tags()["images"]) == sorted(f"test/{picture}" for picture in PICTURES[name])
    assert any(tag.startswith("grad/") for tag in events.Tags()["histograms"])
    assert events.Tags()["graph"] and "no graph" not in capfd.readouterr().err
    main(command(name, "--trainer.fast_dev_run=true"))
    again = ["fit", f"--config={RUN}/config.yaml", *QUIET]
    main([*again, "--trainer.max_epochs=1"])
    main([*again, f"--ckpt_path={RUNS}/version_1/checkpoints/last.ckpt"])  # repeats the first run, too
    assert_same_run(RUNS / "version_2", RUN)
    assert sorted(path.name for path in RUNS.iterdir()) == ["version_0", "version_1", "version_2"]
    if name in ("diffusion", "gpt"):
        main(["predict", f"--config={RUN}/config.yaml", "--predictions.path=new/digits.png"])
        assert (folder / "new/digits.png").read_bytes().startswith(b"\x89PNG")


def test_a_fit_starts_from_the_weights_of_a_checkpoint(folder, capfd):
    """Without an epoch it only evaluates them, as in a sweep over how digits are sampled."""
    main(command("diffusion", *QUIET, "--trainer.max_epochs=1"))
    weights = f"--weights={RUN}/checkpoints/last.ckpt"
    main(command("diffusion", *QUIET, weights, "--trainer.max_epochs=0"))
    for name in ("val/frechet", "test/frechet", "test/loss"):
        assert metrics_of(RUNS / "version_1")[name] == metrics_of(RUN)[name]
    assert "cannot be loaded" in error_of(capfd, *command("diffusion", weights, "--model.net.width=16"))


def test_an_euler_and_a_heun_step_along_a_known_velocity():
    """The velocity 2t carries x by 1 in unit time; Heun's method is exact for it, Euler's lacks 1 / steps."""

    class Known(torch.nn.Module):
        def forward(self, images, times, classes):
            return torch.zeros_like(images) + 2 * times[:, None, None, None]

    for solver, end in (("heun", 1.0), ("euler", 0.75)):
        model = RectifiedFlow(Known(), torch.optim.Adam, solver=solver, steps=4)
        path = model.sample(torch.tensor([3, 7]), seed=0)
        assert path.shape == (5, 2, 1, 28, 28)
        assert torch.allclose(path[-1] - path[0], torch.tensor(end), atol=1e-5)


def test_guidance_moves_away_from_the_velocity_without_a_class():
    net = UNet(8, 8)
    torch.nn.init.normal_(net.last.weight)
    x, classes = torch.randn(2, 1, 28, 28), torch.tensor([3, 7])
    plain, guided = (RectifiedFlow(net, torch.optim.Adam, guidance=w).guided(x, 0.5, classes) for w in (0, 2))
    without = net(x, torch.full([2], 0.5), torch.full([2], 10))
    assert torch.allclose(guided, 3 * plain - 2 * without, atol=1e-5)


def test_the_cache_of_gpt_does_not_change_its_logits():
    torch.manual_seed(0)
    model = GPT(torch.optim.AdamW, n_layer=2, n_embd=16, n_head=2)
    model.build(torch.arange(18), block_size=12)
    tokens = torch.randint(18, [3, 12])
    cache = torch.zeros(2, 2, 3, 2, 12, 8)
    steps = [model(tokens[:, :5], cache)] + [model(tokens[:, t : t + 1], cache, t) for t in range(5, 12)]
    assert torch.allclose(torch.cat(steps, dim=1), model(tokens), atol=1e-5)


def test_gpt_samples_what_its_logits_say():
    """The likeliest token each; of a full context the older half is forgotten."""
    torch.manual_seed(0)
    model = GPT(torch.optim.AdamW, n_layer=2, n_embd=16, n_head=2, top_k=1)
    model.build(torch.arange(18), block_size=12)
    torch.nn.init.normal_(model.wpe.weight)  # so that the likeliest token is not that before
    tokens = context = torch.randint(18, [3, 5])
    for _ in range(20):
        context = torch.cat([context, model(context)[:, -1:].argmax(-1)], dim=1)
        tokens = torch.cat([tokens, context[:, -1:]], dim=1)
        context = context[:, -7:] if context.shape[1] > 12 else context
    assert torch.equal(model.generate(tokens[:, :5], 20), tokens)


def test_tokens_are_digits_of_8_grey_levels():
    data = TokenDataModule(data_dir=str(DATA))
    data.setup("test")
    images, classes = data.sets["test"][:10]
    before, after = data.on_after_batch_transfer((images, classes), 0)
    tokens = torch.cat([before, after[:, -1:]], dim=1)
    assert tokens.shape == (10, 197) and torch.equal(tokens[:, 0], classes)
    means = torch.nn.functional.avg_pool2d(images[:, None] / 255, 2)
    assert (pixels(tokens)[:, :, ::2, ::2] - means).abs().max() <= 0.5 / 7 + 1e-6


def test_gpt_learns_a_text_and_continues_a_prompt(folder, capfd):
    (folder / "text.txt").write_text("zwei × drei ist sechs\n" * 50, encoding="utf-8")
    overlay = f"--config={REPO}/configs/gpt_text.yaml"
    text = partial(command, "gpt", overlay, *QUIET, "--data.path=text.txt", "--data.block_size=8")
    main(text())
    assert metrics_of(RUN)["val/bits"] == pytest.approx(metrics_of(RUN)["val/loss"] * 1.442695)
    main(["predict", f"--config={RUN}/config.yaml", "--data.prompt=drei ×"])
    assert "\ndrei ×" in capfd.readouterr().out
    assert "the prompt has characters that text.txt does not have: ['?']" in error_of(capfd, *text("--data.prompt=s?"))
    assert "text.txt is too short" in error_of(capfd, *text("--data.block_size=2000"))


@pytest.mark.parametrize(
    ("name", "option", "part"),
    [
        ("quantized", "--model.net.weight_bits=0", "weight_bits must be 2 to 8, or 1.58, not 0"),
        ("quantized", "--model.net.act_bits=33", "act_bits must be 2 to 8, not 33"),
        ("quantized", "--model.net.net=torch.nn.Identity", "Identity has no Conv2d or Linear layer to quantize"),
        ("graph", "--data.neighbours=200", "81 superpixels: they must be more than neighbours=200, at most 256"),
        ("diffusion", "--model.net.width=12", "width and deep_width must be multiples of 8, emb_dim of 2"),
        ("quantized", "--model.net.weights=none.ckpt", "weights=none.ckpt does not load into CNN: [Errno 2]"),
        ("gpt", "--data.path=none.txt", "none.txt cannot be read: [Errno 2] No such file"),
        ("gpt", "--data.path=", "cannot be read: [Errno 21] Is a directory"),
        ("gpt", "--model.n_head=3", "n_embd=16 is not a multiple of n_head=3"),
        ("gpt", "--model=experiments.gpt.GPT2", "module 'experiments.gpt' has no attribute 'GPT2'"),
    ],
)
def test_a_wrong_setting_is_one_line(folder, capfd, name, option, part):
    assert part in error_of(capfd, *command(name, option))
    assert not RUNS.exists()


def test_an_extra_that_is_not_installed_is_named(folder, capfd, monkeypatch):
    monkeypatch.delitem(sys.modules, "experiments.graph", raising=False)
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    line = error_of(capfd, *command("graph"))
    assert "experiments.graph needs PyTorch Geometric and scikit-image: pip install '.[graph]'" in line


def test_the_evaluator_recognises_digits():
    """In 28x28 pixels, and in 14x14 as GPT draws them; noise is far from digits, other digits are near."""
    data = MNISTDataModule(str(DATA))
    data.setup("test")
    images, targets = data.sets["test"].tensors[0][:2000, None] / 255, data.sets["test"].tensors[1][:2000]
    logits, features = Evaluator()(images)
    assert (logits.argmax(dim=1) == targets).float().mean() > 0.99
    coarse = torch.nn.functional.avg_pool2d(images, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (Evaluator()(coarse)[0].argmax(dim=1) == targets).float().mean() > 0.98
    noise = Evaluator()(torch.rand_like(images))[1]
    assert frechet_distance(features, noise) > 10 * frechet_distance(features[:1000], features[1000:])


@pytest.mark.parametrize("bits", [1.58, 2, 3, 4, 8])
def test_packed_weights_come_back_as_integers(tmp_path, bits):
    net, images = Quantized(CNN(), weight_bits=bits), torch.rand(4, 1, 28, 28)
    logits = net(images)  # which sets the step sizes of the inputs
    write_packed(net, tmp_path / "net.npz")
    read = read_packed(Quantized(CNN(), weight_bits=bits), tmp_path / "net.npz")
    assert {layer.layer.weight.dtype for layer in read.quantized().values()} == {torch.int32}
    assert torch.allclose(read(images), logits, atol=1e-5)
    with pytest.raises(UserError, match="the checkpoint has 32 levels, not"):
        net.load_state_dict(Quantized(CNN(), weight_bits=5).state_dict())


def test_frechet_distance_of_known_distributions():
    """Of independent normal features it is the sum of (μ1 - μ2)² + (σ1 - σ2)²."""
    sample = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])  # uncorrelated
    sigma = (4 / 3) ** 0.5  # unbiased
    assert frechet_distance(sample, 3 * sample + 2) == pytest.approx(2 * (2**2 + (2 * sigma) ** 2))
