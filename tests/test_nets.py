import pytest
import torch

from mnist_cnn import CNN, LitClassifier, StackCNN


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


@pytest.mark.parametrize("batch_size", [1, 3])
def test_stack_of_any_depth(batch_size):
    net = StackCNN([4, 8], [4, 3], [2, 1], [1, 0], [1, 2]).eval()
    assert net(torch.rand(batch_size, 1, 28, 28)).shape == (batch_size, 10)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "conv1.weight": (4, 1, 4, 4),
        "norm1.weight": (4,),
        "conv2.weight": (8, 4, 3, 3),
        "norm2.weight": (8,),
        "fc.weight": (10, 8 * 6 * 6),
    }


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (([4], [3, 3], [1], [0], [1]), "equally many"),
        (([], [], [], [], []), "equally many"),
        (([0], [3], [1], [0], [1]), "at least 1"),
        (([4], [3], [1], [-1], [1]), "at least 0"),
        (([4, 4], [28, 2], [1, 1], [0, 0], [1, 1]), "convolution 2 leaves nothing"),
        (([4], [24], [1], [0], [6]), "convolution 1 leaves nothing"),
    ],
)
def test_stack_that_cannot_be_is_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        StackCNN(*settings)


def test_channels_last_is_the_same_net():
    torch.manual_seed(0)
    net, images = CNN(), torch.rand(4, 1, 28, 28)
    before = net(images)
    model = LitClassifier(net, torch.optim.SGD, channels_last=True)
    assert net.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(model(images), before, atol=1e-6)


def test_labels_are_smoothed_in_training_only():
    torch.manual_seed(0)
    model = LitClassifier(CNN(), torch.optim.SGD, label_smoothing=0.1)
    logits, targets = torch.randn(5, 10), torch.arange(5)
    nats = -logits.log_softmax(dim=1)  # those of the target count 0.9 and a tenth of 0.1, the others the latter
    plain = nats[range(5), targets].mean()
    assert torch.isclose(model._loss(logits, targets, "val"), plain)
    assert torch.isclose(model._loss(logits, targets, "train"), 0.9 * plain + 0.1 * nats.mean())


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.1])
def test_smoothing_out_of_range(label_smoothing):
    with pytest.raises(ValueError, match="label_smoothing must be between 0 and 1"):
        LitClassifier(CNN(), torch.optim.SGD, label_smoothing=label_smoothing)


@pytest.mark.parametrize("make", [CNN, lambda: StackCNN().eval()])
def test_images_of_a_batch_do_not_mix(make):
    net, images = make(), torch.rand(4, 1, 28, 28)
    assert torch.allclose(net(images)[2:3], net(images[2:3]), atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_backward_is_deterministic_on_cuda(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        CNN().cuda()(torch.rand(64, 1, 28, 28, device="cuda")).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
