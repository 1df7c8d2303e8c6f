"""A detector as one ONNX graph: preprocessing, backbone, classifier, score and threshold."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cli.errors import UserError
from cli.files import check_outputs, replacing
from cmg.detector import CMGDetector
from datasets.datasetsHelper import to_float

OUTPUTS = ("score", "class", "is_ood")
TOLERANCE = 1e-4  # of scores, between torch and onnxruntime


class Graph(nn.Module):
    """Images, uint8 [N, C, S, S] -> OOD scores, float32 [N], numbers of the classes, int64 [N], and verdicts [N]."""

    def __init__(self, detector: CMGDetector):
        super().__init__()
        self.detector, self.encoder, self.head = detector, detector.encoder, detector.head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, classes = self.detector.judge(self.encoder(to_float(images)))
        return scores.float(), classes, scores > self.detector.threshold


def export_onnx(detector: CMGDetector, path: Path) -> None:
    """Write a fitted detector, on the CPU and in fp32, as an ONNX file, once onnxruntime has given what torch gives.

    The file's metadata hold the names of the classes and how an image is judged.

    Raises:
        UserError: onnx, onnxscript or onnxruntime is not installed, the network cannot be exported, the file cannot be
            written, or what onnxruntime computes differs.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # of torch's exporter
    except ImportError as error:
        raise UserError(f"--export: {error.name} is not installed; pip install onnx onnxscript onnxruntime") from None
    channels, size = detector.read_shape
    random = torch.Generator().manual_seed(0)
    example = torch.randint(256, (4, channels, size, size), generator=random, dtype=torch.uint8)
    graph = Graph(detector).eval()
    shapes = {"images": {0: torch.export.Dim("N")}}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph, (example,), input_names=["images"], output_names=list(OUTPUTS), dynamic_shapes=shapes,
                dynamo=True, verbose=False,
            )  # fmt: skip
    except Exception as error:  # the exporter's own, of many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--export: this network cannot be written as ONNX: {reason}") from None
    model = program.model_proto
    about = {"classes": json.dumps(list(detector.classes)), "rule": detector.rule()}
    onnx.helper.set_model_props(model, about)
    compare(graph, onnxruntime.InferenceSession(model.SerializeToString()), example)
    with replacing(path) as temporary:
        onnx.save(model, str(temporary))


def export_detector(detector_path: Path, path: Path) -> int:
    """Write the detector in a file as ONNX and say so. Raises `UserError`."""
    check_outputs(path, inputs=[detector_path])
    detector = CMGDetector.load(detector_path, torch.device("cpu"), "fp32")
    if detector.post_hoc:
        raise UserError(
            f"--export writes detectors of CMG, and {detector_path} scores with pytorch-ood's {detector.post_hoc.name}"
        )
    export_onnx(detector, path)
    channels, size = detector.read_shape
    print(f"wrote {path}: uint8 [N, {channels}, {size}, {size}] -> {', '.join(OUTPUTS)}; {detector.rule()}")
    return 0


@torch.no_grad()
def compare(graph: Graph, session: object, images: Tensor) -> None:
    """Raise `UserError` where onnxruntime gives other scores or verdicts than torch for one image or several."""
    for part in (images, images[:1]):
        ours = [output.numpy() for output in graph(part)]
        theirs = session.run(list(OUTPUTS), {"images": part.numpy()})
        near = np.abs(ours[0] - graph.detector.threshold) <= TOLERANCE  # a verdict that rounding may turn
        if not np.allclose(ours[0], theirs[0], rtol=TOLERANCE, atol=TOLERANCE) or (ours[2] != theirs[2])[~near].any():
            raise UserError(f"--export: onnxruntime gives the scores {theirs[0]}, torch {ours[0]}; nothing is written")
