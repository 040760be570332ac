"""The picture that predict writes for nets that draw."""

import io

from torch import Tensor
from torchvision.utils import save_image

from mnist_cnn.run.callbacks import PredictionWriter
from mnist_cnn.run.errors import UserError


class PictureWriter(PredictionWriter):
    """Writes predicted images [N, 1 or 3, H, W] in [0, 1] to one PNG file, ten in a row."""

    def content(self, predicted: Tensor, names: list[str] | None) -> bytes:
        if predicted.ndim != 4:
            raise UserError("PictureWriter needs a predict_step that returns images: give --predictions=null")
        save_image(predicted, file := io.BytesIO(), "png", nrow=10)
        return file.getvalue()
