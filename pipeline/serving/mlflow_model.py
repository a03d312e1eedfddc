"""What MLflow runs to serve a logged model ("models from code"): a checkpoint folder and this package.

It is a file beside the model then, not a module of the checkout: it needs no params.yaml, DVC or git.
Images go in as one array [B, H, W, 3] of whole numbers 0 to 255, in JSON {"inputs": [...]}; a row an
image comes out. Nothing is cast: `as_colours` says what is taken.
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

    What comes out has the columns of `pipeline.predictor.Prediction.record`.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Read the checkpoint that was logged; the networks are packed for the machine that serves."""
        from pipeline.device import choose_device
        from pipeline.models import checkpoint  # not above: who logs a model needs none of it
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
        """Classify images [B, H, W, 3]; one row for each.

        Raises:
            MlflowException: they can't be classified; the server answers 400 with these words.
        """
        from pipeline.serving.predictor import PredictionError, as_colours

        if not isinstance(model_input, np.ndarray):
            raise _refusal(f"images are one array, not {type(model_input).__name__}")
        try:
            predictions = self.predictor(as_colours(model_input))
        except PredictionError as error:
            raise _refusal(str(error)) from None
        return pd.DataFrame([prediction.record() for prediction in predictions])


def _refusal(words: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(f'{words} (in JSON: {{"inputs": [B, H, W, 3]}})')


mlflow.models.set_model(Served())
