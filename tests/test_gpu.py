"""What a GPU computes another way. Every other test takes the GPU, too, where a command does by default."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from cmg.config import FineTuneConfig
from cmg.data import Stage2Data
from cmg.engine import fine_tune
from cmg.graphed import FIRST_STEPS, Graphed
from cmg.pseudo_ood import PseudoOOD
from cmg.reference import reference
from datasets.datasetsHelper import Images
from models.main_model import Head
from training.config import LoopConfig
from training.loop import fit
from training.processes import Processes
from training.run_state import Recorder
from training.train_classifier import ClassifierObjective
from utils import tune_processor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CONFIG = FineTuneConfig(num_ind=6, epochs=3, batch_size=7, eval_every=6, sigma=3.0, precision="fp32")


@pytest.fixture
def gpu() -> torch.device:
    tune_processor()
    return torch.device("cuda:0")


def images_of(count: int, draw: torch.Generator) -> Images:
    return Images(torch.randint(256, (count, 1, 8, 8), generator=draw, dtype=torch.uint8), torch.arange(count) % 6)


def test_a_step_that_is_recorded_gives_the_weights_of_the_step_itself(gpu):
    """With batches of two sizes, each recorded once it has run often enough."""
    draw = torch.Generator().manual_seed(0)
    head = Head(16, 11).to(gpu)
    sizes = [8, 8, 8, 5] * (FIRST_STEPS + 2)
    batches = [(torch.randn(size, 16, generator=draw).to(gpu), (torch.arange(size) % 6).to(gpu)) for size in sizes]

    def train(wrapped) -> tuple[list[float], dict[str, torch.Tensor], object]:
        network = deepcopy(head)
        optimizer = torch.optim.Adam(network.parameters(), 1e-2, fused=True, capturable=True)

        def step(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            loss = F.cross_entropy(network(features), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss.detach()

        take_step = wrapped(step)
        return [take_step(*batch).item() for batch in batches], network.state_dict(), take_step

    losses, weights, _ = train(lambda step: step)
    graphed_losses, graphed_weights, graphed = train(Graphed)
    assert len(graphed.recorded) == 2 and len(set(losses)) == len(sizes)
    assert graphed_losses == pytest.approx(losses, rel=1e-5)
    for name, parameter in weights.items():
        torch.testing.assert_close(graphed_weights[name], parameter)


@pytest.mark.parametrize("mode", ["CMG-softmax", "CMG-energy"])
def test_the_engine_equals_the_reference_draw_for_draw(gpu, digits_classifier, digits_cvae, mode):
    draw = torch.Generator().manual_seed(8)
    train, validation, test = (images_of(count, draw).to(gpu) for count in (40, 12, 18))
    data = Stage2Data(train, validation, test, {"noise": images_of(15, draw).images.to(gpu)})
    classifier, cvae = digits_classifier.to(gpu), digits_cvae.requires_grad_(False).to(gpu)
    bank = data.encode(classifier.features, "fp32")
    pseudo = PseudoOOD(cvae, classifier.features, CONFIG)
    start = deepcopy(classifier.classifier.state_dict())
    for run in fine_tune(classifier.classifier, bank, pseudo, [mode], [1, 2], show_progress=False):
        arguments = (train.images, train.labels, test.images, data.ood["noise"], CONFIG, mode, run.seed)
        expected = reference(classifier, cvae, *arguments)
        for name, parameter in expected.head.state_dict().items():
            assert (run.last[name] - parameter).norm() < 0.005 * (parameter - start[name]).norm()
        assert [check.step for check in run.curve] == list(expected.curve) == [0, 6, 12, 18]
        for check, auroc in zip(run.curve, expected.curve.values(), strict=True):
            assert check.auroc["noise"] == pytest.approx(auroc, abs=2.01 / (18 * 15))


def test_a_learning_rate_that_falls_does_so_in_recorded_steps(gpu, digits_classifier, digits_cvae):
    """Thirty steps of batches of two sizes, most of them replayed, end where they do on the processor, and not where a
    constant rate does."""
    last = {}
    for device, half_life in (("cpu", 4.0), (gpu, 4.0), (gpu, 0.0)):
        draw = torch.Generator().manual_seed(8)
        data = Stage2Data(*(images_of(count, draw).to(device) for count in (40, 12, 18)), {})
        classifier, cvae = (deepcopy(it).requires_grad_(False).to(device) for it in (digits_classifier, digits_cvae))
        bank = data.encode(classifier.features, "fp32")
        pseudo = PseudoOOD(cvae, classifier.features, replace(CONFIG, half_life=half_life, epochs=5))
        run = fine_tune(classifier.classifier, bank, pseudo, ["CMG-softmax"], [1], show_progress=False)[0]
        last[device, half_life] = torch.cat([p.flatten().cpu() for p in run.last.values()])
    start = torch.cat([p.detach().flatten() for p in digits_classifier.classifier.parameters()])
    moved = (last["cpu", 4.0] - start).norm()
    assert (last[gpu, 4.0] - last["cpu", 4.0]).norm() < 0.02 * moved
    assert (last[gpu, 0.0] - last["cpu", 4.0]).norm() > 0.2 * moved


def test_a_training_on_a_gpu_comes_to_what_one_on_the_processor_does(gpu, digits_classifier):
    data = images_of(64, torch.Generator().manual_seed(1))
    config = LoopConfig(epochs=2, batch_size=16, learning_rate=1e-3, seed=5, precision="fp32")
    networks = []
    for device in (torch.device("cpu"), gpu):
        network = deepcopy(digits_classifier).to(device)
        for layer in network.modules():
            if isinstance(layer, torch.nn.Dropout2d):
                layer.p = 0.0  # of which either device draws its own
        optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=True)
        objective = ClassifierObjective(augment=False)
        history = fit(network, optimizer, data.to(device), objective, config, Processes(device), Recorder(name="test"))
        networks.append((history[-1]["loss"], network.cpu()))
    (loss, network), (gpu_loss, gpu_network) = networks
    assert gpu_loss == pytest.approx(loss, rel=1e-2)
    start = digits_classifier.state_dict()
    moved = torch.cat([(p.detach() - start[name]).flatten() for name, p in network.named_parameters()])
    apart = torch.cat(
        [(p - q).detach().flatten() for p, q in zip(network.parameters(), gpu_network.parameters(), strict=True)]
    )
    assert apart.norm() < 0.1 * moved.norm()


def test_fp32_is_not_tf32(gpu, digits_classifier):
    images = torch.rand(8, 1, 8, 8)
    exact = deepcopy(digits_classifier).double()(images.double())
    with torch.no_grad():
        found = digits_classifier.to(gpu)(images.to(gpu)).cpu()
    assert (found - exact).norm() < 1e-5 * exact.norm()
