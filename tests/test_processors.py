"""What depends on the kernels that a processor's features select."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}

# Networks of every width whose shortcuts have few channels, trained as the commands train them: channels-last, fp32.
GRADIENTS = """
import torch
from models.layers import ResNet18

for width in (2, 3, 4, 6, 8):
    torch.manual_seed(width)
    network = ResNet18(3, width)
    exact = ResNet18(3, width).double()
    exact.load_state_dict(network.state_dict())
    images = torch.rand(16, 3, 32, 32)
    network.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last)).square().sum().backward()
    exact(images.double()).square().sum().backward()
    for (name, ours), theirs in zip(network.named_parameters(), exact.parameters(), strict=True):
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
        assert error < 0.05, (width, name, error)  # rounding gives 0.01, the fault 1 or a crash
"""


def test_gradients_of_narrow_networks_are_right_with_avx2_alone():
    """oneDNN's weight gradient of 1x1 convolutions of stride 2 with 2 to 7 channels is not: none may be used."""
    done = subprocess.run(
        [sys.executable, "-c", GRADIENTS], cwd=ROOT, env=os.environ | AVX2, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
