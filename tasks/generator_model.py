"""The registered model as code: MLflow copies this file and runs it where the model is loaded.

Besides mlflow it needs only the package `gan`, which travels with it, and the bundle.
"""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from gan.bundle import load_bundle
from gan.sampling import SamplingError, draw

MAX_IMAGES = 10_000
"""The most images that one request may ask for."""


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
    ) -> npt.NDArray[np.uint8]:
        """Draw `num` images for each row, in order: uint8 [rows * num, 28, 28].

        The same rows, `num` and `seed` give the same images.
        """
        wishes = {"num": 1, "seed": 0} | (params or {})
        digits, num = model_input["digit"].tolist(), int(wishes["num"])
        if len(digits) * num > MAX_IMAGES:
            raise MlflowException.invalid_parameter_value(
                f"a request may ask for at most {MAX_IMAGES} images, not {len(digits) * num}"
            )
        try:
            images = draw(self.generator, digits, num=num, seed=int(wishes["seed"]))
        except SamplingError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return images.numpy()


mlflow.models.set_model(GeneratorModel())
