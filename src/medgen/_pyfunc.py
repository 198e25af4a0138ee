"""The MLflow model of a bundle.

MLflow copies this file into every registered model ("models from code"), with this package's sources beside it: a
version goes on running the code that it was registered with.
"""

from __future__ import annotations

import logging
import os
import traceback
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

__all__ = ["BundleModel"]

logger = logging.getLogger(__name__)


class BundleModel(PythonModel):
    """A bundle as its ``configs/serve.json`` says; without that file its network, from batch to batch.

    Runs on CUDA where there is one, or on the device named by MLflow's own variable MLFLOW_DEFAULT_PREDICTION_DEVICE.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Build the service and load its weights.

        Args:
            context: holds the bundle's folder under ``bundle``.
        """
        from medgen.serving.guard import guard_scoring_server
        from medgen.serving.load import load_service

        device = os.environ.get("MLFLOW_DEFAULT_PREDICTION_DEVICE")
        self.service = load_service(Path(context.artifacts["bundle"]), device)
        guard_scoring_server(self.service)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> Any:
        """Answer a request.

        Args:
            context: not used; part of the interface.
            model_input: images under ``image``; or a float32 batch (B, C, *sizes) where there is no serve.json.
            params: of the request; the signature says which there are.

        Returns:
            a list with a dictionary for each image or sample; or the network's output, float32.

        Raises:
            RequestError: the request is not as it must be, in one line that repeats nothing of the data.
        """
        from medgen.errors import find_user_error
        from medgen.serving.guard import refused

        try:
            return self.service(model_input, params)
        except Exception as error:
            if find_user_error(error) is None:
                # without the message, which may hold values of the request
                frames = "".join(traceback.format_tb(error.__traceback__))
                logger.error("a request failed with %s\n%s", type(error).__name__, frames)
            # without the chain, whose messages may hold values of the request
            raise refused(error) from None


mlflow.models.set_model(BundleModel())
