"""A GPU's paths, small, where there is one; and the table of `make gpu`."""

import json

import pytest
import torch
from conftest import FIT, QUIET, RUN, RUNS, assert_same_run, main

from benchmarks import gpu, plain_loop
from mnist_cnn import CNN


def on_gpu(test):
    """Marks a test that needs a CUDA device."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


@on_gpu
def test_backward_is_deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        net = CNN().cuda()
        net(torch.rand(64, 1, 28, 28, device="cuda")).sum().backward()  # raises if an operation has no such version
        assert all(parameter.grad is not None for parameter in net.parameters())
    finally:
        torch.use_deterministic_algorithms(False)


@on_gpu
def test_two_runs_have_the_same_digits(folder):
    assert main(FIT).trainer.strategy.root_device.type == "cuda"
    main(FIT)
    assert_same_run(RUNS / "version_0", RUNS / "version_1")


NO_WAIT = [*FIT, "--trainer.callbacks+=benchmarks.gpu.NoWait", "--histograms=null", "--graph=null"]


@on_gpu
def test_a_step_does_not_wait_for_the_device(folder):
    main(NO_WAIT)


@on_gpu
def test_a_net_that_waits_is_noticed(folder):
    (folder / "waiting.py").write_text(
        "from mnist_cnn import CNN\n"
        "class Waiting(CNN):\n"
        "    def forward(self, images):\n"
        "        assert images.sum().item() != 0.5\n"
        "        return super().forward(images)\n"
    )
    with pytest.raises(RuntimeError, match="synchronizing"):
        main([*NO_WAIT, "--trainer.num_sanity_val_steps=0", "--model.net=waiting.Waiting"])
    assert torch.cuda.get_sync_debug_mode() == 0


TRAIN = ["--trainer.limit_train_batches=200", "--trainer.callbacks+=benchmarks.gpu.PeakMemory"]


def accuracy_after_training(capfd, *options: str) -> float:
    """val/acc of 400 steps."""
    main([*FIT, *QUIET, *TRAIN, *options])
    assert "peak memory" in capfd.readouterr().out
    return json.loads((RUN / "metrics.json").read_text())["val/acc"]


@on_gpu
@pytest.mark.parametrize(
    "option", ["--trainer.precision=bf16-mixed", "--model.channels_last=false", "--data=benchmarks.gpu.DeviceMNIST"]
)
def test_trains_on_the_device(folder, capfd, option):
    assert accuracy_after_training(capfd, option) > 0.4  # by chance 0.1


@on_gpu
def test_images_on_the_device_are_the_same_batches(folder):
    main([*FIT, *QUIET])
    main([*FIT, *QUIET, "--data=benchmarks.gpu.DeviceMNIST"])
    assert_same_run(RUNS / "version_0", RUNS / "version_1")


@on_gpu
def test_plain_loop(capfd):
    plain_loop.train(["base.yaml"], "cuda", epochs=1, steps=4)
    assert 0 < float(capfd.readouterr().out.split()[-1]) < 1


def test_table_is_written_between_the_markers(tmp_path):
    rows = [
        gpu.Row("plain loop", epoch=2.0, accuracy=0.98),
        gpu.Row("base.yaml", 3.0, 16.04, 0.98765, "31 MiB", "a|b"),
        gpu.Row("sweep", finding="failed: no time"),
    ]
    assert gpu.table(rows).splitlines() == [
        "| part       | epoch  | over plain | fit    | test/acc | memory | finding         |",
        "| ---------- | ------ | ---------- | ------ | -------- | ------ | --------------- |",
        "| plain loop | 2.00 s | 1.00       |        | 0.9800   |        |                 |",
        "| base.yaml  | 3.00 s | 1.50       | 16.0 s | 0.9877   | 31 MiB | a\\|b            |",
        "| sweep      |        |            |        |          |        | failed: no time |",
    ]
    page = tmp_path / "gpu.md"
    page.write_text((gpu.REPO / "docs/gpu.md").read_text())
    before, after = page.read_text().split(gpu.BEGIN)[0], page.read_text().split(gpu.END)[1]
    for _ in range(2):  # the second time, there is a table to replace
        gpu.write(page, gpu.table(rows))
        assert page.read_text() == f"{before}{gpu.BEGIN}\n{gpu.table(rows)}\n{gpu.END}{after}"
