"""Shared by all tests. One thread, so that results are bit-equal from run to run and processes may be forked."""

from __future__ import annotations

import os
from dataclasses import replace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start

import pytest
import torch

from datasets.tasks import TASKS
from models.main_model import MainModel
from models.vae import ConditionalVAE

torch.set_num_threads(1)

# Few images are enough to see that a pool is used; the task's own take seconds to make.
DIGITS = TASKS["same_dataset_digits"]
TASKS["same_dataset_digits"] = replace(DIGITS, fine_tuning=DIGITS.fine_tuning | {"pseudo_pool": 200})


@pytest.fixture
def digits_classifier() -> MainModel:
    """The classifier of the digits task, untrained, in eval mode."""
    torch.manual_seed(0)
    return MainModel(image_size=8, image_channels=1, classes=11, dataset="mnist").eval()


@pytest.fixture
def digits_cvae() -> ConditionalVAE:
    """The CVAE of the digits task, untrained, in eval mode."""
    torch.manual_seed(1)
    return ConditionalVAE(image_size=8).eval()


@pytest.fixture(autouse=True)
def _denormal_numbers():
    """Commands that run in this process have denormal numbers count as zero; the next test has them again."""
    yield
    torch.set_flush_denormal(False)
