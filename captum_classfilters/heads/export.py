"""`export_onnx`: a network to an ONNX file that takes batches of any size."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from captum_classfilters.core.borrow import borrowed, unwrap
from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.files import check_folder, replacing

# The exporter writes no older operator set than this; for an older one it logs a message and writes this one
_LOWEST = 18


def export_onnx(model: nn.Module, example: Tensor, path: str | os.PathLike[str], *, opset: int = _LOWEST) -> None:
    """Write the network as ONNX, with a dynamic batch axis; a `DecomposedLinear` becomes Gather, Mul and a sum.

    Args:
        model: The network; exported in eval mode, given back as it was.
        example: Inputs ``(N, ...)`` on its device.
        path: The file to write; whole or not at all.
        opset: ONNX operator set, 18 or newer.

    Raises:
        OptionError: The exporter cannot write this operator set.
        ImportError: onnx or onnxscript is missing, or torch is older than 2.6.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}; install the extra: pip install 'captum-classfilters[export]'") from error
    newest = onnx.defs.onnx_opset_version()
    if isinstance(opset, bool) or not isinstance(opset, int) or not _LOWEST <= opset <= newest:
        raise OptionError(
            f"opset must be an integer in [{_LOWEST}, {newest}], what the exporter can write; got {opset!r}"
        )
    check_folder(Path(path))
    if not hasattr(torch.export.Dim, "DYNAMIC"):
        raise ImportError(
            "export_onnx needs torch 2.6 or newer, whose exporter leaves the batch's size open; "
            f"this is {torch.__version__}"
        )
    module = unwrap(model)
    # two samples: the exporter would take one for a fixed size
    example = torch.cat([example, example]) if len(example) == 1 else example
    with borrowed(module), warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(
            module, (example,), dynamo=True, opset_version=opset, verbose=False,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), input_names=["inputs"], output_names=["logits"],
        )  # fmt: skip
    model_proto = program.model_proto  # type: ignore[union-attr]
    written = next(entry.version for entry in model_proto.opset_import if entry.domain == "")
    if written != opset:
        raise OptionError(f"the exporter wrote operator set {written} where {opset} was asked for; ask for {written}")
    with replacing(path) as beside:
        onnx.save(model_proto, beside)


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Silence the exporter's loggers for a while."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
