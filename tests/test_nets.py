import pytest
import torch

from mnist_cnn import CNN


@pytest.mark.parametrize("batch_size", [1, 3])
def test_logits_for_any_batch_size(batch_size):
    assert CNN()(torch.rand(batch_size, 1, 28, 28)).shape == (batch_size, 10)


def test_layers_are_named_and_as_wide_as_asked_for():
    net = CNN(l1_chan=2, l2_chan=3, l3_chan=5, fc1_out=7)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "conv1.weight": (2, 1, 3, 3),
        "conv2.weight": (3, 2, 3, 3),
        "conv3.weight": (5, 3, 3, 3),
        "fc1.weight": (7, 5),
        "fc2.weight": (10, 7),
    }
    assert [name for name, _ in net.named_children()] == (
        ["conv1", "relu1", "conv2", "relu2", "conv3", "relu3", "fc1", "relu4", "fc2"]
    )


def test_size_of_the_original_net():
    assert sum(p.numel() for p in CNN().parameters()) == 40 + 296 + 1168 + 510 + 310


def test_images_of_a_batch_do_not_mix():
    net, images = CNN(), torch.rand(4, 1, 28, 28)
    assert torch.allclose(net(images)[2:3], net(images[2:3]), atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_backward_is_deterministic_on_cuda(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        CNN().cuda()(torch.rand(64, 1, 28, 28, device="cuda")).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
