import pytest
import torch

from mnist_cnn import CNN, LitClassifier, StackCNN


def shapes_of(net):
    return {name: tuple(p.shape) for name, p in net.named_parameters() if name.endswith("weight")}


def test_layers_are_named_and_as_wide_as_asked_for():
    net = CNN(l1_chan=2, l2_chan=3, l3_chan=5, fc1_out=7)
    assert shapes_of(net) == {
        "conv1.weight": (2, 1, 3, 3),
        "conv2.weight": (3, 2, 3, 3),
        "conv3.weight": (5, 3, 3, 3),
        "fc1.weight": (7, 5),
        "fc2.weight": (10, 7),
    }
    assert [name for name, _ in net.named_children()] == (
        ["conv1", "relu1", "conv2", "relu2", "conv3", "relu3", "fc1", "relu4", "fc2"]
    )
    assert sum(p.numel() for p in CNN().parameters()) == 40 + 296 + 1168 + 510 + 310  # the original's


def test_stack_of_any_depth():
    net = StackCNN([4, 8], [4, 3], [2, 1], [1, 0], [1, 2]).eval()
    assert shapes_of(net) == {
        "conv1.weight": (4, 1, 4, 4),
        "norm1.weight": (4,),
        "conv2.weight": (8, 4, 3, 3),
        "norm2.weight": (8,),
        "fc.weight": (10, 8 * 6 * 6),
    }


@pytest.mark.parametrize("make", [CNN, StackCNN, lambda: StackCNN([4, 8], [4, 3], [2, 1], [1, 0], [1, 2])])
def test_logits_of_an_image_do_not_depend_on_its_batch(make):
    net, images = make().eval(), torch.rand(4, 1, 28, 28)
    assert net(images).shape == (4, 10)
    assert torch.allclose(net(images)[2:3], net(images[2:3]), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (([4], [3, 3], [1], [0], [1]), "kernel_sizes"),
        (([4, 4], [28, 2], [1, 1], [0, 0], [1, 1]), "convolution 2"),
        (([4], [24], [1], [0], [6]), "convolution 1"),
    ],
)
def test_impossible_stack_is_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        StackCNN(*settings)


def test_channels_last_is_the_same_net():
    net, images = CNN(), torch.rand(4, 1, 28, 28)
    before = net(images)
    model = LitClassifier(net, torch.optim.SGD, channels_last=True)
    assert net.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(model(images), before, atol=1e-6)
