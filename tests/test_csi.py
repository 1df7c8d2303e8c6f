"""CSI's parts: network, views, loss, optimizers, schedules, scores."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from csi.augmentation import RandomAugmentation, joint_labels, make_views, rotation_labels
from csi.loss import supervised_contrastive
from csi.network import Bn1AndLinear, CSINet, load_csi
from csi.optimizers import LARS, Together, step_decay, warmup_cosine
from csi.scores import marginalise, rotation_ensemble, single_view
from csi.stages import TRAININGS, LinearLayers, Representation

from cli.errors import UserError
from cmg.scores import msp
from tests import children
from training.processes import joined_processes
from utils import save_checkpoint


def randomised(model: CSINet, seed: int = 0) -> CSINet:
    """The network with every parameter and statistic of its own, so that no mix-up goes unseen."""
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            value = torch.rand(tensor.shape, generator=draw)
            tensor.copy_(
                value + 0.5 if tensor.dim() == 1 or "var" in name else (value - 0.5) * 2 / tensor[0].numel() ** 0.5
            )
    return model.eval()


# --- network ------------------------------------------------------------------------------------


def authors_shapes() -> dict[str, list[int]]:
    """Names and shapes of the authors' labelled CIFAR-10 checkpoint, spelt out from its structure."""
    shapes = {"conv1.weight": [64, 3, 3, 3]} | norm("bn1", 64)
    before = 64
    for stage, channels in enumerate((64, 128, 256, 512), start=1):
        for block in (0, 1):
            at = f"layer{stage}.{block}"
            shapes[f"{at}.conv1.weight"] = [channels, before, 3, 3]
            shapes[f"{at}.conv2.weight"] = [channels, channels, 3, 3]
            shapes |= norm(f"{at}.bn1", channels) | norm(f"{at}.bn2", channels)
            if before != channels:
                shapes[f"{at}.shortcut.0.weight"] = [channels, before, 1, 1]
                shapes |= norm(f"{at}.shortcut.1", channels)
            before = channels
    layers = {"linear": (512, 10), "simclr_layer.0": (512, 512), "simclr_layer.2": (512, 128)}
    layers |= {"shift_cls_layer": (512, 4), "joint_distribution_layer": (512, 40)}
    for name, (inputs, outputs) in layers.items():
        shapes |= {f"{name}.weight": [outputs, inputs], f"{name}.bias": [outputs]}
    return shapes


def norm(name: str, channels: int) -> dict[str, list[int]]:
    entries = {f"{name}.{entry}": [channels] for entry in ("weight", "bias", "running_mean", "running_var")}
    return entries | {f"{name}.num_batches_tracked": []}


def test_names_and_shapes_are_the_authors():
    assert {name: list(tensor.shape) for name, tensor in CSINet().state_dict().items()} == authors_shapes()


def test_forward_equals_a_plain_restatement():
    model, images = randomised(CSINet(classes=3, width=4)), torch.rand(5, 3, 32, 32)
    state = model.state_dict()

    def bn(x, name):
        mean, var, weight, bias = (
            state[f"{name}.{entry}"][:, None, None] for entry in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv(x, name, stride=1):
        return F.conv2d(x, state[f"{name}.weight"], stride=stride, padding=state[f"{name}.weight"].shape[-1] // 2)

    x = bn(conv(2 * images - 1, "conv1"), "bn1").relu()
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            out = bn(conv(bn(conv(x, f"{at}.conv1", stride), f"{at}.bn1").relu(), f"{at}.conv2"), f"{at}.bn2")
            if f"{at}.shortcut.0.weight" in state:
                x = bn(conv(x, f"{at}.shortcut.0", stride), f"{at}.shortcut.1")
            x = (out + x).relu()
    features = x.mean((2, 3))

    def layer(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    expected = {
        "linear": layer(features, "linear"),
        "simclr_layer": layer(layer(features, "simclr_layer.0").relu(), "simclr_layer.2"),
        "shift_cls_layer": layer(features, "shift_cls_layer"),
        "joint_distribution_layer": layer(features, "joint_distribution_layer"),
    }
    found = model(images, *expected)
    for head, outputs in expected.items():
        torch.testing.assert_close(found[head], outputs, rtol=1e-4, atol=1e-4, msg=head)
    torch.testing.assert_close(model(images), found["linear"])


def test_only_the_contrastive_head_reaches_the_extractor():
    model, images = CSINet(classes=3, width=2), torch.rand(4, 3, 32, 32)
    for head, reaches in (("linear", False), ("joint_distribution_layer", False), ("simclr_layer", True)):
        model.zero_grad()
        model(images, head)[head].sum().backward()
        assert (model.conv1.weight.grad is not None) is reaches, head


def test_authors_checkpoint_loads_with_dataparallel_prefix(tmp_path, capsys):
    model = randomised(CSINet(classes=10, width=2))
    save_checkpoint(tmp_path / "authors.model", {f"module.{k}": v for k, v in model.state_dict().items()})
    loaded, origin = load_csi(tmp_path / "authors.model", 10, {"dataset": "cifar10"}, "")
    assert origin == {}
    assert f"removed the prefix module. from its {len(model.state_dict())} names" in capsys.readouterr().out
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_names_that_do_not_fit_are_all_named(tmp_path):
    state = dict(CSINet(classes=10, width=2).state_dict())
    del state["shift_cls_layer.bias"], state["linear.weight"]
    save_checkpoint(tmp_path / "x.model", state | {"fc.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"lacks linear.weight, shift_cls_layer.bias; has fc.weight.*REMEDY"):
        load_csi(tmp_path / "x.model", 10, {}, "REMEDY")
    save_checkpoint(tmp_path / "y.model", dict(CSINet(classes=6, width=2).state_dict()))
    with pytest.raises(UserError, match=r"linear.weight is \[6, 16\], expected \[10, 16\]"):
        load_csi(tmp_path / "y.model", 10, {}, "")


# --- views --------------------------------------------------------------------------------------


def test_views_are_flips_and_rotations_in_order():
    images, flips = torch.rand(3, 3, 4, 4), torch.tensor([[True, False], [False, False], [True, True]])
    views = make_views(images, flips)
    assert views.shape == (24, 3, 4, 4)
    for rotation in range(4):
        for copy in range(2):
            for i in range(3):
                expected = images[i].flip(2) if flips[i, copy] else images[i]
                for _ in range(rotation):  # a quarter turn counter-clockwise: the last column becomes the first row
                    expected = expected.transpose(1, 2).flip(1)
                assert torch.equal(views[(rotation * 2 + copy) * 3 + i], expected)
    labels = torch.tensor([5, 0, 2])
    assert rotation_labels(labels, 2).tolist() == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 6
    assert joint_labels(labels, 2, 10).tolist() == [c + 10 * r for r in range(4) for _ in range(2) for c in (5, 0, 2)]


def test_augmentation_parameters_differ_per_image():
    augment = RandomAugmentation()
    torch.manual_seed(0)
    augment(torch.rand(64, 3, 32, 32))
    jitter, gray, crop = (step._params for step in augment.steps)
    for name in ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor"):
        assert jitter[name].unique().numel() > 32, name
    assert crop["src"].flatten(1).unique(dim=0).shape[0] > 32
    assert 0 < jitter["batch_prob"].mean() < 1 and 0 < gray["batch_prob"].mean() < 1
    assert (jitter["brightness_factor"] - 1).abs().max() <= 0.4
    assert (jitter["hue_factor"]).abs().max() <= 0.1


def test_augmentation_range_shape_and_chances():
    image = torch.stack(torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(1, 0, 32), indexing="ij"))
    images = torch.cat([image, image[:1] * 0.5])[None].repeat(1000, 1, 1, 1)
    torch.manual_seed(1)
    views = RandomAugmentation()(images)
    assert views.shape == images.shape and views.dtype == torch.float32
    assert views.min() >= 0 and views.max() <= 1
    gray = (views.amax(1) - views.amin(1)).amax((1, 2)) < 1e-3
    assert abs(gray.float().mean() - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 1000)
    assert (views[1:] - views[0]).abs().amax((1, 2, 3)).min() > 0  # no two views alike


def test_augmentation_follows_the_seed_under_autocast_too():
    images, augment = torch.rand(8, 3, 32, 32), RandomAugmentation()
    torch.manual_seed(2)
    plain = augment(images)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(images), plain)


# --- loss ---------------------------------------------------------------------------------------


def plain_loss(z: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """The supervised contrastive loss as a double loop."""
    z = [row / row.norm() for row in z]
    total = 0
    for i in range(len(z)):
        denominator = sum(torch.exp(z[i] @ z[k] / temperature) for k in range(len(z)) if k != i)
        positives = [p for p in range(len(z)) if p != i and labels[p] == labels[i]]
        terms = [torch.log(torch.exp(z[i] @ z[p] / temperature) / denominator) for p in positives]
        total = total - sum(terms) / len(positives)
    return total / len(z)


def test_loss_equals_a_double_loop():
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    fused, plain = (torch.randn(8, 5, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    loss, expected = supervised_contrastive(fused, labels), plain_loss(plain, labels, 0.07)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(fused.grad, plain.grad, rtol=1e-4, atol=1e-5)


def contrastive_batch() -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    draw = torch.Generator().manual_seed(3)
    inputs, labels = torch.randn(10, 6, generator=draw), torch.tensor([0, 1, 0, 1, 0, 1, 2, 2, 0, 2])
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(4, 6, generator=draw))
        layer.bias.zero_()
    return inputs, labels, layer


def half_of_the_loss(path: Path) -> None:
    """One of two gloo processes: 7 and 3 views, gradients averaged as DistributedDataParallel does."""
    with joined_processes("cpu") as processes:
        inputs, labels, layer = contrastive_batch()
        rows = slice(0, 7) if processes.is_main else slice(7, 10)
        weight = 2 * len(labels[rows]) / len(labels)
        parallel = processes.wrap(layer)
        loss = supervised_contrastive(parallel(inputs[rows]), labels[rows]) * weight
        loss.backward()
        mean = processes.mean(loss.detach())
        if processes.is_main:
            torch.save({"loss": mean, "weight": layer.weight.grad, "bias": layer.bias.grad}, path)
        del parallel, loss  # as the product does: the group ends when no wrapper holds it
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name]  # one that is left may abort the interpreter


def test_two_processes_equal_one(tmp_path):
    inputs, labels, layer = contrastive_batch()
    loss = supervised_contrastive(layer(inputs), labels)
    loss.backward()
    output = tmp_path / "output"
    processes = children.start_two(half_of_the_loss, tmp_path / "two.pt", output=output)
    assert children.finish(processes) == [0, 0], [path.read_text() for path in tmp_path.glob("output*")]
    two = torch.load(tmp_path / "two.pt")
    torch.testing.assert_close(two["loss"], loss.detach())
    torch.testing.assert_close(two["weight"], layer.weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(two["bias"], layer.bias.grad, rtol=1e-4, atol=1e-6)


# --- optimizers and schedules -------------------------------------------------------------------


def test_lars_by_hand():
    w, zero = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.zeros(2))
    optimizer = LARS([w, zero], lr=2.0, momentum=0.9, weight_decay=0.1)
    expected, velocity = torch.tensor([3.0, 4.0]), torch.zeros(2)
    for gradient in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])):
        w.grad, zero.grad = gradient.clone(), gradient.clone()
        scale = 1e-3 * expected.norm() / (gradient.norm() + 0.1 * expected.norm() + 1e-8)
        velocity = 0.9 * velocity + scale * (gradient + 0.1 * expected)
        expected = expected - 2.0 * velocity
        optimizer.step()
        torch.testing.assert_close(w.detach(), expected)
        if gradient[0]:
            torch.testing.assert_close(zero.detach(), -2.0 * gradient)  # nothing to scale by: a plain step
    assert torch.equal(w.grad, gradient)  # the gradients stay as they were


def test_optimizers_together_restore_their_state():
    def build():
        torch.manual_seed(0)
        layers = nn.Linear(3, 3), nn.Linear(3, 3)
        return layers, Together(LARS(layers[0].parameters(), 1.0), torch.optim.Adam(layers[1].parameters(), 1e-3))

    def step(layers, optimizer):
        optimizer.zero_grad()
        layers[1](layers[0](torch.ones(2, 3))).square().sum().backward()
        optimizer.step()

    layers, optimizer = build()
    step(layers, optimizer)
    others, restored = build()
    for mine, theirs in zip(others, layers, strict=True):
        mine.load_state_dict(theirs.state_dict())
    restored.load_state_dict(deepcopy(optimizer.state_dict()))
    step(layers, optimizer)
    step(others, restored)
    for mine, theirs in zip(others, layers, strict=True):
        assert torch.equal(mine.weight, theirs.weight)


@pytest.mark.parametrize(
    ("epoch", "rate"), [(0, 0.1), (5, 0.55), (10, 1.0), (240, 0.75), (355, 0.5), (470, 0.25), (700, 0.0)]
)
def test_warmup_and_cosine(epoch, rate):
    assert warmup_cosine(epoch, 1.0, 10, 700) == pytest.approx(rate, abs=1e-12)


@pytest.mark.parametrize(("epoch", "rate"), [(0, 0.1), (59.9, 0.1), (60, 1e-2), (75, 1e-3), (89.9, 1e-3), (90, 1e-4)])
def test_step_decay(epoch, rate):
    assert step_decay(epoch, 0.1, 100) == pytest.approx(rate)


# --- training steps -----------------------------------------------------------------------------


def toy_batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    return torch.randint(256, (count, 3, 32, 32), generator=draw, dtype=torch.uint8), torch.arange(count) % 2


def test_representation_step_moves_extractor_and_linear_only():
    model = CSINet(classes=2, width=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, objective = TRAININGS["sup_simclr_CSI"].prepare(model, 1.0), Representation(2)
    images, labels = toy_batch()
    means = objective(model, images, labels, *objective.draw(4, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(means["loss"], means["contrastive"] + means["linear"])
    means["loss"].backward()
    optimizer.step()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "simclr_layer", "linear"}


def test_linear_stage_leaves_the_extractor_bit_equal_and_equals_three_optimizers():
    torch.manual_seed(0)
    model, plain = CSINet(classes=2, width=2), CSINet(classes=2, width=2)
    plain.load_state_dict(model.state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objective, (images, labels) = LinearLayers(2, augment=nn.Identity()), toy_batch()
    optimizer = TRAININGS["sup_CSI_linear"].prepare(model, 0.1)
    heads = plain.linear, plain.shift_cls_layer, plain.joint_distribution_layer
    optimizers = [torch.optim.SGD(head.parameters(), 0.1, weight_decay=1e-6) for head in heads]
    plain.eval()
    for step in range(2):
        model.train()  # as the loop does
        assert not model.bn1.training and not model.layer4[1].bn2.training
        flips = objective.draw(4, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        objective(model, images, labels, *flips)["loss"].backward()
        optimizer.step()
        views = make_views(images / 255, *flips)
        features = plain.features(views).detach()
        rotations = torch.arange(4).repeat_interleave(4)
        targets = labels, rotations, labels.repeat(4) + 2 * rotations
        for head, separate, target in zip(heads, optimizers, targets, strict=True):
            separate.zero_grad()
            F.cross_entropy(head(features[: len(target)]), target).backward()
            separate.step()
    for name, tensor in model.state_dict().items():
        if name.split(".")[0] in ("linear", "shift_cls_layer", "joint_distribution_layer"):
            torch.testing.assert_close(tensor, plain.state_dict()[name])
            assert not torch.equal(tensor, before[name]), name
        else:
            assert torch.equal(tensor, before[name]), name


# --- scores -------------------------------------------------------------------------------------


def test_marginalised_logits_by_hand():
    # Two classes; entry [r, 0, 2 q + c] = 1000 r + 10 q + c: only q = r may be read.
    joint = torch.tensor([[[1000.0 * r + 10 * q + c for q in range(4) for c in range(2)]] for r in range(4)])
    # class c: mean of (0 + c), (1010 + c), (2020 + c), (3030 + c)
    assert marginalise(joint).tolist() == [[1515.0, 1516.0]]


def test_views_of_a_network_equal_single_images():
    model, images = randomised(CSINet(classes=3, width=2)), toy_batch(3)[0]
    ensemble, single = rotation_ensemble(model, images, "fp32"), single_view(model, images, "fp32")
    with torch.no_grad():
        for i, image in enumerate(images):
            pixels = image[None] / 255
            torch.testing.assert_close(single[i], model.linear(model.features(pixels))[0], rtol=1e-4, atol=1e-4)
            total = 0
            for r in range(4):
                rotated = torch.rot90(pixels, r, (2, 3))
                total = total + model.joint_distribution_layer(model.features(rotated))[0, 3 * r : 3 * r + 3]
            torch.testing.assert_close(ensemble[i], total / 4, rtol=1e-4, atol=1e-4)


def test_msp_score_keeps_the_order_of_confident_images():
    scores = msp(torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [0.0, 20.0], [0.0, 25.0]]))
    torch.testing.assert_close(scores[:2], torch.tensor([0.5, 0.25], dtype=torch.float64))
    assert scores[2] > scores[3] > 0


def test_bn1_and_linear_are_the_only_parameters_of_that_head():
    model = randomised(CSINet(classes=3, width=2))
    head = Bn1AndLinear(model)
    assert set(dict(head.named_parameters())) == {"bn1.weight", "bn1.bias", "linear.weight", "linear.bias"}
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(head(pixels.flatten(1)), model(pixels))
