"""A user's own images of digits, prepared as MNIST was."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mnist_cnn.run.errors import UserError


def read_images(source: str) -> tuple[Tensor, list[str], list[str]]:
    """Reads an image file, or all those in a folder and its subfolders, and prepares them as MNIST was.

    Returns uint8 [N, 28, 28], the N file names, and the files that could not be read, each with the reason.
    """
    root, known = Path(source), Image.registered_extensions()
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.suffix.lower() in known)
    images, unreadable = {}, []
    for file in files:
        name = file.name if file == root else file.relative_to(root).as_posix()
        try:
            with Image.open(file) as image:
                images[name] = to_mnist(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            unreadable.append(f"{name} ({error})")
    if not images:
        raise UserError("; ".join([f"predict_dir {source} has no readable image", *unreadable]))
    return torch.stack([*images.values()]), [*images], unreadable


def to_mnist(image: Image.Image) -> Tensor:
    """Prepares an image the way MNIST was made: ink white on black, fitted into 20x20, centred by mass: uint8 [28, 28].

    The method is that of LeCun et al., "Gradient-Based Learning Applied to Document Recognition" (1998), section III.A.
    The image may have any size and mode, dark on light or light on dark; the median of its border counts as background.
    A blank one raises a ValueError.
    """
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    grey = np.asarray(image if image.mode.startswith(("I", "F")) else image.convert("L"), dtype=np.float32)
    grey = grey / np.float32(257 if grey.max() > 255 else 1)  # 16 bits a pixel
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ink = np.abs(grey - np.median(border))
    if ink.max() < 16:
        raise ValueError("blank: no ink stands out from its background")
    rows, columns = np.nonzero(ink > ink.max() / 4)  # below a quarter: paper and JPEG noise
    ink = np.where(ink > ink.max() / 8, ink, 0)[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    digit = Image.fromarray(np.uint8(255 * ink / ink.max()))
    size = [max(1, round(20 / max(digit.size) * side)) for side in digit.size]
    small = np.asarray(digit.resize(size, Image.Resampling.BILINEAR), dtype=np.float32)
    canvas = np.zeros((28, 28), dtype=np.float32)
    top, left = (
        int(np.clip(round(14 - np.arange(length) @ small.sum(axis=1 - axis) / small.sum()), 0, 28 - length))
        for axis, length in enumerate(small.shape)  # MNIST's images have their mass at pixel (14.0, 14.0)
    )
    canvas[top : top + small.shape[0], left : left + small.shape[1]] = small * (255 / small.max())
    return torch.from_numpy(canvas.round().astype(np.uint8))
