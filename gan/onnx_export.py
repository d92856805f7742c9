"""A generator for where torch does not run: ONNX, read by onnxruntime, browsers and phones."""

from __future__ import annotations

import copy
import warnings

import torch

from gan.networks import Generator

OPSET = 20
"""The version of ONNX's operators that the file is written in."""


def to_onnx(generator: Generator) -> bytes:
    """The generator as an ONNX file; it draws what torch draws, within 1e-4.

    Inputs are `latent`, float [n, latent_dim], standard normal noise, and, where digits can be
    asked for, `digit`, int64 [n], 0 to 9. The output is `image`, float [n, 1, 28, 28] in [-1, 1],
    paper to ink. Any n will do. The same weights give the same bytes.

    Raises:
        ImportError: the package onnxscript is not installed.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass  # noqa: PLC0415

    config = generator.config
    inputs = {
        "latent": torch.zeros(2, config.latent_dim),
        "digit": torch.zeros(2, dtype=torch.int64),
    }
    if config.num_classes == 0:
        del inputs["digit"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own doings; the result is tested
        program = torch.onnx.export(
            copy.deepcopy(generator).cpu().requires_grad_(False).eval(),
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=["image"],
            dynamic_shapes=({0: "n"},) * len(inputs),
        )
    assert program is not None
    # The exporter notes a stack trace at every node, with paths of this machine.
    ClearMetadataAndDocStringPass()(program.model)
    content: bytes = program.model_proto.SerializeToString(deterministic=True)
    return content
