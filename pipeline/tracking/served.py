"""What MLflow runs to serve a logged model ("models from code"): a checkpoint folder and this package.

It is a file beside the model then, not a module of the checkout: it needs no params.yaml, DVC or git.
Images go in as one uint8 array [B, H, W, 3], in JSON {"inputs": [...]}; a row an image comes out.
"""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

ARTIFACT = "checkpoint"


class Served(PythonModel):
    """The networks of a checkpoint behind MLflow's interface.

    What comes out has the columns of `pipeline.predictor.Prediction.record`.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Read the checkpoint that was logged; the networks are packed for the machine that serves."""
        from pipeline import checkpoint  # not above: who logs a model needs none of it
        from pipeline.predictor import Predictor
        from pipeline.runtime import choose_device

        self.predictor = Predictor(
            checkpoint.load(Path(context.artifacts[ARTIFACT])), device=choose_device()
        )

    def predict(
        self,
        context: PythonModelContext,
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Classify images [B, H, W, 3] uint8; one row for each.

        Raises:
            PredictionError: they have another size or type.
        """
        return pd.DataFrame([prediction.record() for prediction in self.predictor(model_input)])


mlflow.models.set_model(Served())
