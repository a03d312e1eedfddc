"""PyTorch modules as ONNX graphs, for other engines (`make peers` installs what that takes)."""

import importlib
import logging
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.infra.errors import UserError

INSTALL = "`make peers` installs it"


class NoOnnxError(UserError):
    """ONNX's packages are not installed."""


def to_onnx(
    module: nn.Module, inputs: Sequence[Tensor], *, names: Sequence[str], outputs: Sequence[str]
) -> bytes:
    """A module in evaluation mode as an ONNX file, weights included.

    Args:
        inputs: examples of its inputs, with at least 2 rows. The first dimension may have any size
            afterwards, the same one in all inputs; an input without dimensions is a plain number.
        names, outputs: of the graph's inputs and outputs.

    Raises:
        NoOnnxError: a package is missing.
    """
    try:
        for package in ("onnx", "onnxscript"):
            importlib.import_module(package)
    except ImportError as error:
        raise NoOnnxError(f"{error.name} is not installed; {INSTALL}") from None
    rows = torch.export.Dim("B", min=1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter's own old calls
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs),
            input_names=list(names),
            output_names=list(outputs),
            dynamic_shapes=tuple({0: rows} if tensor.dim() else {} for tensor in inputs),
            dynamo=True,
            optimize=False,  # engines do it themselves, and it takes half of the time
            verbose=False,
        )
    assert program is not None
    return program.model_proto.SerializeToString()
