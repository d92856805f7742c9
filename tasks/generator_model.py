"""The registered model as code: MLflow copies this file and runs it where the model is loaded.

Besides mlflow it needs only the package `gan`, which travels with it, and the bundle.
"""

import base64
import io
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image

from gan.bundle import load_bundle
from gan.sampling import SamplingError, draw

MAX_IMAGES = 10_000
"""The most images that one request may ask for."""
DEFAULTS: dict[str, Any] = {"num": 1, "seed": 0, "format": "array"}


class GeneratorModel(PythonModel):
    """Draws handwritten digits: one row a wish, column `digit` 0 to 9 or -1 for any."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the bundle, verifying its digests."""
        self.generator = load_bundle(Path(context.artifacts["bundle"]))

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> npt.NDArray[np.uint8] | pd.DataFrame:
        """Draw `num` images for each row, in order.

        The same rows, `num` and `seed` give the same images: with `format` "array" uint8
        [rows * num, 28, 28], with "png" a column `png`, a base64 string an image.
        """
        wishes = DEFAULTS | {k: v for k, v in (params or {}).items() if v is not None}
        digits, num = model_input["digit"].tolist(), int(wishes["num"])
        if wishes["format"] not in ("array", "png"):
            raise MlflowException.invalid_parameter_value(
                f"format must be array or png, not {wishes['format']!r}"
            )
        if len(digits) * num > MAX_IMAGES:
            raise MlflowException.invalid_parameter_value(
                f"a request may ask for at most {MAX_IMAGES} images, not {len(digits) * num}"
            )
        try:
            images = draw(self.generator, digits, num=num, seed=int(wishes["seed"])).numpy()
        except SamplingError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        if wishes["format"] == "png":
            return pd.DataFrame({"png": [encode_png(image) for image in images]})
        return images


def encode_png(image: npt.NDArray[np.uint8]) -> str:
    """A grey image, uint8 [height, width], as PNG in base64."""
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    return base64.b64encode(png.getvalue()).decode()


mlflow.models.set_model(GeneratorModel())
