"""MNIST as graphs: an image becomes about 79 superpixels, each linked to its 8 nearest, and a net passes messages."""

import multiprocessing
import signal
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from lightning.pytorch import Callback, LightningModule
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from mnist_cnn.data import MNISTDataModule, TensorBatches
from mnist_cnn.run.errors import UserError
from mnist_cnn.run.files import write_atomically
from mnist_cnn.run.loggers import log_figure

try:
    from skimage.segmentation import slic
    from torch_geometric.data import Data
    from torch_geometric.nn import MessagePassing, global_mean_pool
    from torch_geometric.utils import to_dense_batch
except ImportError as error:
    raise UserError("experiments.graph needs PyTorch Geometric and scikit-image: pip install '.[graph]'") from error


def make_graph(image: np.ndarray, n_segments: int, compactness: float, neighbours: int) -> np.ndarray:
    """The graph of an image, uint8 [28, 28]: a row for each superpixel, uint8 [M, 4 + neighbours]."""
    label = slic(image, n_segments, compactness, start_label=0, channel_axis=None).ravel()  # [784]
    area = np.bincount(label)  # [M]
    if not neighbours < len(area) <= 256:  # a row's number is a byte
        raise UserError(f"an image has {len(area)} superpixels: they must be more than {neighbours=}, at most 256")
    y, x = np.mgrid[:28, :28].reshape(2, -1)
    grey, x, y = (np.bincount(label, values) / area for values in (image.ravel(), x, y))
    distance = (x[:, None] - x) ** 2 + (y[:, None] - y) ** 2  # [M, M]
    np.fill_diagonal(distance, np.inf)
    nearest = distance.argsort(axis=1, kind="stable")[:, :neighbours]
    # Mean grey, centroid in ninths of a pixel, area in pixels, rows of the nearest; a byte each.
    return np.column_stack([grey, 9 * x, 9 * y, area.clip(max=255), nearest]).round().astype(np.uint8)


class SuperpixelDataModule(MNISTDataModule):
    """MNISTDataModule with graphs in place of the images: batches of graphs [N, M, 4 + neighbours] and targets [N].

    The graphs are made once, by all cores, and kept in data_dir, in two files whose names are the settings.

    Args:
        n_segments: Superpixels of an image, about; SLIC (Achanta et al., 2012) starts with 81 for 75.
        compactness: Weight of distance against grey in SLIC; with more, superpixels are more like squares.
        neighbours: Nearest superpixels from which each one gets messages.
        warp: Standard deviation of the noise of a random affine map of the positions of each training graph.
        num_images: The first images of the training and of the test set, for a trial in seconds; null: all.
        kwargs: Further arguments of MNISTDataModule.
    """

    def __init__(
        self,
        n_segments: PositiveInt = 75,
        compactness: PositiveFloat = 0.5,
        neighbours: PositiveInt = 8,
        warp: NonNegativeFloat = 0.0,
        num_images: PositiveInt | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(mean=0.0, std=1.0, augment=None, **kwargs)  # those of images
        self.settings = {"n_segments": n_segments, "compactness": compactness, "neighbours": neighbours}
        self.warp, self.num_images = warp, num_images

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "predict" and self.predict_dir is not None:
            images, targets = self.sets["predict"].tensors
            self.sets["predict"] = TensorBatches(self.make_graphs(images), targets)

    def _read(self, train: bool) -> tuple[Tensor, Tensor]:
        """The graphs, uint8 [N, M, 4 + neighbours], padded with zeros, and targets, int64 [N]."""
        images, targets = (part[: self.num_images] for part in super()._read(train))
        settings = self.settings | {"images": len(images), "skimage": version("scikit-image")}
        name = "-".join(["train" if train else "test", *(f"{key}={value}" for key, value in settings.items())])
        path = Path(self.data_dir, self.dataset.__name__, "superpixels", f"{name}.pt")
        if not path.exists():
            graphs = self.make_graphs(images)
            with write_atomically(path) as file:
                torch.save(graphs, file.buffer)
        return torch.load(path), targets

    def make_graphs(self, images: Tensor) -> Tensor:
        # A run's own handler, which the processes inherit, would ignore the signal that ends them.
        with multiprocessing.Pool(None, signal.signal, (signal.SIGTERM, signal.SIG_DFL)) as pool:
            graphs = pool.imap(partial(make_graph, **self.settings), images.numpy(), chunksize=50)
            bar = tqdm(graphs, "superpixels", len(images), unit=" images", disable=None)  # in a terminal only
            return nn.utils.rnn.pad_sequence([torch.from_numpy(graph) for graph in bar], batch_first=True)

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Makes graphs floats, and warps those of training; on the device."""
        graphs = batch[0].to(self.trainer.lightning_module.dtype if self.trainer else torch.float32)
        if self.warp and self.trainer and self.trainer.training:
            noise = self.warp * torch.randn(len(graphs), 3, 2).to(graphs)
            pos = graphs[..., 1:3] - 126  # [N, M, 2]; from the centre of the image, in ninths of a pixel
            graphs[..., 1:3] += pos @ noise[:, :2] + 126 * noise[:, 2:]
        return graphs, batch[1]


def join_graphs(graphs: Tensor) -> Data:
    """One graph of all V nodes of N graphs [N, M, 4 + neighbours], and their E edges, sorted by target."""
    is_node = graphs[..., 3] > 0  # [N, M]; padding has no area
    nodes, graph, size = graphs[is_node], is_node.nonzero()[:, 0], is_node.sum(dim=1)  # [V, 4 + neighbours], [V], [N]
    source = nodes[:, 4:].long() + (size.cumsum(0) - size)[graph, None]  # [V, neighbours]
    target = torch.arange(nodes.shape[0], device=nodes.device)[:, None].expand_as(source)
    edge_index = torch.stack([source.flatten(), target.flatten()])  # [2, E]
    pos = nodes[:, 1:3] / 126 - 1  # [V, 2], from -1 to 1
    offset = pos[edge_index[0]] - pos[edge_index[1]]  # [E, 2]
    edge_attr = 4 * torch.column_stack([offset, offset.norm(dim=1)])  # [E, 3], about -1 to 1
    x = torch.column_stack([nodes[:, 0] / 127.5 - 1, pos, nodes[:, 3] / 16 - 1])  # [V, 4]: grey, x, y, area
    return Data(x, edge_index, edge_attr, pos=pos, batch=graph)


class MoNetConv(MessagePassing):
    """Sums neighbours' features with K weights an edge, and mixes the sums (Monti et al., 2017, with other weights)."""

    def __init__(self, width: int, filters: int, hidden: int) -> None:
        super().__init__()
        self.root, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.weigh, self.mix = nn.Linear(hidden, filters), nn.Linear(filters * width, width, bias=False)

    def forward(self, x: Tensor, edge_index: Tensor, edges: Tensor) -> Tensor:
        """Features [V, C] from x [V, C], edge_index [2, E] and features of the edges [E, D]."""
        return self.norm(self.root(x) + self.propagate(edge_index, x=x, weights=self.weigh(edges)))

    def aggregate(self, inputs: Tensor, weights: Tensor, dim_size: int) -> Tensor:  # type: ignore[override]
        """Messages [E, C] and weights [E, K] to features [V, C]; all nodes have the same number of edges."""
        messages = inputs.view(dim_size, -1, inputs.shape[1])  # [V, neighbours, C]
        weights = weights.view(*messages.shape[:2], -1) / messages.shape[1]  # [V, neighbours, K]
        patches = weights.transpose(1, 2) @ messages  # [V, K, C]: D_k(i) x = sum_j w_k(u_ij) x_j (eq. 9)
        return self.mix(patches.flatten(1))  # [V, C]: sum_k g_k D_k(i) x (eq. 10)


class GraphNet(nn.Module):
    """A net from graphs to logits: convolutions, each added to its input, and the mean and maximum over the nodes.

    Args:
        width: Features of a node.
        num_layers: Number of convolutions.
        filters: Weights that a convolution gives to an edge.
        hidden: Features of an edge, from which the convolutions compute its weights.
    """

    def __init__(
        self, width: PositiveInt = 64, num_layers: PositiveInt = 4, filters: PositiveInt = 4, hidden: PositiveInt = 32
    ) -> None:
        super().__init__()
        self.nodes, self.edges = nn.Linear(4, width), nn.Linear(3, hidden)
        self.convs = nn.ModuleList(MoNetConv(width, filters, hidden) for _ in range(num_layers))
        self.fc1, self.fc2 = nn.Linear(2 * width, width), nn.Linear(width, 10)

    def forward(self, graphs: Tensor) -> Tensor:
        """Logits [N, 10] of graphs [N, M, 4 + neighbours]."""
        joined = join_graphs(graphs)
        x, edges = self.nodes(joined.x), self.edges(joined.edge_attr).relu()  # [V, C], [E, D]
        for conv in self.convs:
            x = x + conv(x, joined.edge_index, edges).relu()
        padded, _ = to_dense_batch(x, joined.batch, fill_value=-torch.inf)  # [N, nodes, C]
        pooled = torch.cat([global_mean_pool(x, joined.batch), padded.amax(dim=1)], dim=1)  # [N, 2 C]
        return self.fc2(self.fc1(pooled).relu())


class GraphPictures(Callback):
    """Logs graphs drawn over their digits after a test by one process: the first ones, and the worst-classified."""

    def on_test_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self._logits: list[Tensor] = []

    def on_test_batch_end(self, trainer: Any, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self._logits.append(outputs.cpu())

    def on_test_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        if trainer.world_size > 1 or not trainer.loggers:
            return
        data, logits = trainer.datamodule, torch.cat(self._logits)
        images, (graphs, targets) = data.dataset(data.data_dir, train=False).data, data.sets["test"].tensors
        loss = nn.functional.cross_entropy(logits, targets[: len(logits)], reduction="none")
        for tag, order in (("graphs", torch.arange(len(loss))), ("worst_graphs", loss.argsort(descending=True))):
            figure = Figure((8, 6.5), dpi=100, layout="constrained")
            for axes, index in zip(figure.subplots(3, 4).flat, order):
                graph = join_graphs(graphs[index][None].float())
                pos = 14 * (graph.pos + 1)  # [V, 2], in pixels
                axes.imshow(images[index], cmap="gray", alpha=0.4)
                axes.add_collection(LineCollection(pos[graph.edge_index.T].tolist(), linewidths=0.3))  # [E, 2, 2]
                axes.scatter(*pos.T, 25, graph.x[:, 0], cmap="gray", edgecolors="tab:orange", linewidths=0.5, zorder=3)
                probability, predicted = logits[index].softmax(0).max(0)
                axes.set_title(f"{targets[index]} → {predicted} ({probability:.2f})", fontsize=9)
                axes.axis("off")
            log_figure(trainer, f"test/{tag}", figure)
