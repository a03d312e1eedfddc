"""The code that MLflow runs to serve a logged model ("models from code").

MLflow copies this file beside the model, with the checkpoint folder and this package, so it needs no
checkout, params.yaml, DVC or Git. The input is one array of images [B, H, W, 3] of whole numbers 0 to
255, in JSON {"inputs": [...]}; the output has a row for each image. Nothing is cast: see `as_colours`.
A policy between paths takes another gamma or budget with each request: {"inputs": [...], "params":
{"budget": 0.4}}.
"""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

ARTIFACT = "checkpoint"


class Served(PythonModel):
    """The networks of a checkpoint behind MLflow's interface.

    The output has the columns of `Prediction.record` (serving/predictor.py).
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Read the checkpoint that was logged, and choose an executor for the machine that serves."""
        # not above: MLflow imports this file also where a model is only logged
        from pipeline.device import choose_device
        from pipeline.models import checkpoint
        from pipeline.serving.predictor import Predictor

        self.predictor = Predictor(
            checkpoint.load(Path(context.artifacts[ARTIFACT])), device=choose_device()
        )

    def predict(
        self,
        context: PythonModelContext,
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Classify images [B, H, W, 3]; a row for each.

        Args:
            params: `gamma` or `budget`, of `Predictor.gamma_of`.

        Raises:
            MlflowException: they can't be classified; the server answers 400 with its message.
        """
        from pipeline.serving.predictor import PredictionError, as_colours

        if not isinstance(model_input, np.ndarray):
            raise _refusal(f"images are one array, not {type(model_input).__name__}")
        try:
            gamma = self.predictor.gamma_of(**(params or {}))
            predictions = self.predictor(as_colours(model_input), gamma=gamma)
        except PredictionError as error:
            raise _refusal(str(error)) from None
        return pd.DataFrame([prediction.record() for prediction in predictions])


def _refusal(message: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(f'{message} (in JSON: {{"inputs": [B, H, W, 3]}})')


mlflow.models.set_model(Served())
