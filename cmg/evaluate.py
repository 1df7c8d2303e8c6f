"""What `python -m eval` does once its arguments are read: load, run stage 2, print and write the results."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from cli.errors import UserError
from cli.files import check_outputs, write_json
from cmg.config import Request, config_for
from cmg.data import FeatureBank
from cmg.detector import CMGDetector
from cmg.results import Results, save_scores
from cmg.stage2 import Stage2Inputs, load_inputs, run_stage2, split_model
from datasets.datasetsHelper import Images
from datasets.obtain import files_read
from evaluation.report import NO_OOD, format_ind_table, format_table, heads_left_alone, left_out
from training.train_feature_cvae import encoder_of, evaluate_feature_cvae, little_explained
from utils import environment, pick_precision, start_computing


def evaluate(
    request: Request, baselines: Sequence[str], output: Path, scores: Path | None, detector: Path | None
) -> None:
    """Run stage 2, print its tables, and write the results and, where they are named, scores and detector.

    Raises:
        UserError: a checkpoint or the images are not what they should be, or a file cannot be written.
    """
    images = partial(files_read, request.experiment, request.machine.data_dir, request.ood_names)
    check_outputs(output, scores, detector, inputs=request.paths.values(), images=images)
    device = start_computing(request.machine.device)
    config = config_for(request.experiment, precision_of(request, device), **request.options)
    inputs = load(request, device)
    print(f"{request.experiment} on {device} in {config.precision}: {inputs.data.summary}", flush=True)
    results = run_stage2(
        inputs, config, request.modes, request.seeds, score_pseudo=scores is not None, baselines=baselines
    )
    tables = results.tables()
    about = describe("eval", request, inputs, device) | {"config": asdict(results.config)}
    remarks = [] if inputs.data.ood else [NO_OOD]
    if inputs.cvae.makes == "features":
        test = inputs.data.test
        if config.tune == "head":
            features = Images(results.bank.test, test.labels)
        else:  # the bank holds what lies behind the extractor
            features = encoder_of(inputs.classifier)(test, config.precision, device)
        metrics = evaluate_feature_cvae(inputs.cvae, features, config.num_ind, config.precision)
        about["generator"] = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        remarks += filter(None, [little_explained(metrics)])
    remarks += filter(None, [heads_left_alone([tables])])
    write_json(output, about | tables)
    written = [str(output)]
    if scores:
        save_scores(scores, results.scored)
        written.append(str(scores))
    if detector:
        made = make_detector(inputs, results)
        made.save(detector, about, request.experiment.name)
        written.append(f"{detector}: {made.rule()}")
    print(f"\n{format_table(tables['detection'], left_out([tables]))}\n\n{format_ind_table(tables['ind'])}\n")
    print("\n".join([*remarks, *(f"wrote {one}" for one in written)]))


def load(request: Request, device: torch.device) -> Stage2Inputs:
    """The networks and images of stage 2. Raises `UserError`."""
    precision, data_dir = precision_of(request, device), request.machine.data_dir
    return load_inputs(request.experiment, request.paths, request.ood_names, data_dir, device, precision)


def precision_of(request: Request, device: torch.device) -> str:
    """ "fp32" or "bf16"."""
    return pick_precision(request.machine.precision, device, request.experiment.task.precision)


def describe(module: str, request: Request, inputs: Stage2Inputs, device: torch.device) -> dict:
    """What a file of results says of how it was made, beside the configuration of stage 2."""
    return {
        "command": shlex.join(["python", "-m", module, *request.argv]),
        "task": request.experiment.name,
        "partition": request.experiment.partition,
        "positive_class": "OOD",
        "seeds": request.seeds,
        "images": inputs.data.counts(),
        "checkpoints": {
            command: {"file": str(path), "origin": inputs.origins[command]} for command, path in request.paths.items()
        },
        "environment": environment(device),
    }


def make_detector(inputs: Stage2Inputs, results: Results) -> CMGDetector:
    """The classifier with the head that the first run ended with, and the threshold that 95 % of the IND images kept
    from training, or where there are none of the IND test images, do not exceed."""
    run, bank, names = results.runs[0], results.bank, inputs.experiment.class_names
    detector = CMGDetector(inputs.classifier, None, results.config, run.mode, run.seed, names, inputs.backbone)
    return calibrated(detector.adopt(run.last), bank)


def make_post_hoc(inputs: Stage2Inputs, precision: str, name: str) -> CMGDetector:
    """The pretrained classifier under the post-hoc detector `name`, with the same threshold. Raises `UserError` where
    it cannot be fitted."""
    config, names = config_for(inputs.experiment, precision), inputs.experiment.class_names
    detector = CMGDetector(inputs.classifier, None, config, classes=names, backbone=inputs.backbone)
    # The backbone's part of the way is behind the images already.
    bank = replace(inputs.data, ood={}).encode(split_model(detector.encoder.network, config.tune).features, precision)
    try:
        return calibrated(detector.adopt_post_hoc(name, bank.train, bank.train_labels), bank)
    except ValueError as error:
        raise UserError(f"no detector is saved: {error}") from None


def calibrated(detector: CMGDetector, bank: FeatureBank) -> CMGDetector:
    """With the threshold that the IND images kept from training set, or where there are none the IND test images."""
    name, features = ("IND validation", bank.validation) if len(bank.validation) else ("IND test", bank.test)
    return detector.calibrate(features, name)
