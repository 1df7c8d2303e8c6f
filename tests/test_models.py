"""The networks against tables written from the method's description, and class mixing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cmg.config import FineTuneConfig
from cmg.mixing import mix_embeddings
from cmg.pseudo_ood import Codes, decode, draw_codes
from models.inference import for_inference
from models.layers import NineConvolutions, ResidualBlock
from models.main_model import MainModel
from models.vae import ConditionalVAE, PlainEncoder

# --- tables: state-dict name -> shape -----------------------------------------------------------


def conv(name: str, *shape: int, bias: bool = False) -> dict[str, tuple]:
    """`shape` is that of the weight: outputs, inputs, height, width."""
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def deconv(name: str, inputs: int, outputs: int) -> dict[str, tuple]:
    return {f"{name}.weight": (inputs, outputs, 4, 4), f"{name}.bias": (outputs,)}


def norm(name: str, channels: int) -> dict[str, tuple]:
    per_channel = {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}
    return per_channel | {f"{name}.num_batches_tracked": ()}


def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def nine_convolutions(channels: int) -> dict[str, tuple]:
    table, widths = {}, [channels, 64, 64, 128, 128, 128, 128, 128, 128, 128]
    for i in range(1, 10):
        table |= conv(f"convE.conv{i}", widths[i], widths[i - 1], 3, 3) | norm(f"convE.bn{i}", widths[i])
    return table


def resnet18() -> dict[str, tuple]:
    table = conv("convE.conv1", 64, 3, 3, 3) | norm("convE.bn1", 64)
    inputs = 64
    for layer, width in enumerate([64, 128, 256, 512], start=1):
        for block in (0, 1):
            name = f"convE.layer{layer}.{block}"
            table |= conv(f"{name}.conv1", width, inputs, 3, 3) | norm(f"{name}.bn1", width)
            table |= conv(f"{name}.conv2", width, width, 3, 3) | norm(f"{name}.bn2", width)
            if inputs != width:
                table |= conv(f"{name}.shortcut.0", width, inputs, 1, 1) | norm(f"{name}.shortcut.1", width)
            inputs = width
    return table


def head(features: int, classes: int) -> dict[str, tuple]:
    return linear("classifier.fc1", features, 512) | linear("classifier.fc2", 512, classes)


def residual_block(name: str) -> dict[str, tuple]:
    table = conv(f"{name}.block.1", 512, 512, 3, 3, bias=True) | norm(f"{name}.block.2", 512)
    return table | conv(f"{name}.block.4", 512, 512, 1, 1, bias=True) | norm(f"{name}.block.5", 512)


def plain_convolutions(channels: int) -> dict[str, tuple]:
    encoder = conv("convE.conv1", 64, channels, 4, 4, bias=True) | conv("convE.conv2", 128, 64, 4, 4, bias=True)
    return encoder | deconv("convD.deconv1", 128, 64) | deconv("convD.deconv2", 64, channels)


def residual_decoder() -> dict[str, tuple]:
    table = residual_block("convD.decoder.0") | residual_block("convD.decoder.1")
    table |= deconv("convD.decoder.3", 512, 512) | norm("convD.decoder.4", 512)
    table |= deconv("convD.decoder.6", 512, 512) | norm("convD.decoder.7", 512)
    return table | deconv("convD.decoder.9", 512, 3)


def dense_layers(encoded: int, decoded: int) -> dict[str, tuple]:
    table = linear("fcE", encoded, 1024) | linear("fcE_mean", 1024, 32) | linear("fcE_logvar", 1024, 32)
    return table | linear("fromZ", 64, 1024) | linear("fcD", 1024, decoded) | linear("class_embed", 10, 32)


CLASSIFIERS = {  # (size, channels, classes, family) -> (table, number of parameters)
    (28, 1, 11, "mnist"): (nine_convolutions(1) | head(2048, 11), 2_052_683),
    (8, 1, 11, "mnist"): (nine_convolutions(1) | head(128, 11), 1_069_643),
    (32, 3, 11, "cifar10"): (resnet18() | head(512, 11), 11_437_131),
    (32, 3, 110, "cifar10"): (resnet18() | head(512, 110), 11_487_918),
}
CVAES = {  # (channels, size, family) -> (table, number of parameters)
    (1, 28, "mnist"): (plain_convolutions(1) | dense_layers(100_352, 6_272), 109_587_233),
    (1, 8, "mnist"): (plain_convolutions(1) | dense_layers(8_192, 512), 9_311_393),
    (3, 32, "cifar10"): (resnet18() | residual_decoder() | dense_layers(512, 8_192), 33_888_739),
}


def shapes(network: torch.nn.Module) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def count_parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# --- classifier ---------------------------------------------------------------------------------


@pytest.mark.parametrize("key", CLASSIFIERS, ids=str)
def test_classifier_has_the_names_shapes_and_outputs_of_the_method(key):
    size, channels, classes, family = key
    network = MainModel(size, channels, classes, family).eval()
    table, parameters = CLASSIFIERS[key]
    assert shapes(network) == table
    assert count_parameters(network) == parameters
    images = torch.rand(2, channels, size, size)
    assert network.features(images).shape == (2, table["classifier.fc1.weight"][1])
    assert network(images).shape == (2, classes)


def test_initial_distributions_of_the_mnist_classifier(digits_classifier):
    state = digits_classifier.state_dict()
    filters = torch.cat([state[f"convE.conv{i}.weight"].flatten() for i in range(1, 10)])  # 995,904 values
    scales = torch.cat([state[f"convE.bn{i}.weight"] for i in range(1, 10)])  # 1,024 values
    assert abs(filters.mean()) < 5 * 0.05 / len(filters) ** 0.5
    assert abs(filters.std() - 0.05) < 5 * 0.05 / (2 * len(filters)) ** 0.5
    assert abs((filters.abs() < 0.05).double().mean() - 0.6827) < 0.003  # a normal distribution, not a uniform one
    assert abs(scales.mean() - 1) < 5 * 0.02 / len(scales) ** 0.5
    assert abs(scales.std() - 0.02) < 5 * 0.02 / (2 * len(scales)) ** 0.5
    assert all(not state[f"convE.bn{i}.bias"].any() for i in range(1, 10))


def test_initial_distributions_of_the_cifar10_classifier_are_those_of_torch():
    torch.manual_seed(0)
    for name, weights in MainModel(32, 3, 11, "cifar10").named_parameters():
        if weights.dim() > 1:  # uniform within 1 / sqrt(number of inputs)
            bound = weights[0].numel() ** -0.5
            assert 0.99 * bound < weights.abs().max() <= bound
            assert abs(weights.std() * 3**0.5 / bound - 1) < 5 / weights.numel() ** 0.5
        elif "classifier" not in name:  # batch norm
            assert (weights == (1 if name.endswith("weight") else 0)).all()


def test_mnist_extractor_equals_a_plain_restatement(digits_classifier):
    extractor, state = digits_classifier.convE, digits_classifier.convE.state_dict()
    x = images = torch.rand(3, 1, 8, 8)
    for i in range(1, 10):
        x = F.conv2d(x, state[f"conv{i}.weight"], stride=2 if i in (3, 6, 9) else 1, padding=1)
        x = x / (1 + 1e-5) ** 0.5 * state[f"bn{i}.weight"][:, None, None]  # mean 0 and variance 1 at the start
        x = torch.where(x > 0, x, 0.2 * x)
    torch.testing.assert_close(extractor(images), x)


def test_first_dropout_blanks_a_whole_one_channel_image():
    torch.manual_seed(0)
    seen = []
    extractor = NineConvolutions(1).train()
    extractor.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    extractor(torch.ones(2000, 1, 2, 2))
    per_image = seen[0].flatten(1)
    blank = (per_image == 0).all(1)
    assert (per_image[~blank] == 1.25).all()  # an image is blank as a whole or kept as a whole, scaled by 1 / 0.8
    assert abs(blank.double().mean() - 0.2) < 0.04


# --- CVAE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", CVAES, ids=str)
def test_cvae_has_the_names_shapes_and_outputs_of_the_method(key):
    channels, size, family = key
    network = ConditionalVAE(32, channels, size, 10, family).eval()
    table, parameters = CVAES[key]
    assert shapes(network) == table
    assert count_parameters(network) == parameters
    images, labels = torch.rand(2, channels, size, size), torch.tensor([0, 9])
    with torch.no_grad():
        reconstruction, mean, logvar = network(images, labels, torch.zeros(2, 32))
        torch.testing.assert_close(reconstruction, network.decode(mean, network.embed(labels)))
    assert reconstruction.shape == images.shape and mean.shape == logvar.shape == (2, 32)
    assert reconstruction.min() >= 0 and reconstruction.max() <= 1


@pytest.mark.parametrize("size", [8, 28, 32])
def test_encoder_padding_keeps_the_image_size(size):
    encoder = PlainEncoder(1, size)
    assert encoder.conv1.padding == encoder.conv2.padding == (size // 2 + 1, size // 2 + 1)
    assert encoder(torch.zeros(1, 1, size, size)).shape == (1, 128, size, size)


def test_another_image_size_is_refused():
    with pytest.raises(ValueError, match="image_size is 10, expected a multiple of 4"):
        PlainEncoder(1, 10)


def test_latent_is_mean_plus_noise_times_standard_deviation(digits_cvae):
    images, labels, noise = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2]), torch.randn(3, 32)
    reconstruction, mean, logvar = digits_cvae(images, labels, noise)
    expected = digits_cvae.decode(mean + noise * logvar.exp().sqrt(), digits_cvae.embed(labels))
    torch.testing.assert_close(reconstruction, expected)


def test_skip_of_the_residual_block_carries_relu_of_its_input():
    torch.manual_seed(0)
    block = ResidualBlock(6).eval()
    x = torch.randn(2, 6, 4, 4)
    y = F.relu(x)
    branch = F.conv2d(y, block.block[1].weight, block.block[1].bias, padding=1) / (1 + 1e-5) ** 0.5
    branch = F.conv2d(F.relu(branch), block.block[4].weight, block.block[4].bias) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(block(x.clone()), y + branch)


# --- class mixing -------------------------------------------------------------------------------


def config_of(num_ind: int) -> FineTuneConfig:
    return FineTuneConfig(num_ind=num_ind, sigma=3.0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 40), num_ind=st.integers(1, 10))
def test_mixing_takes_each_dimension_from_one_of_the_two_embeddings(seed, count, num_ind):
    draw = torch.Generator().manual_seed(seed)
    codes = draw_codes(count, 32, config_of(num_ind), draw)
    embeddings = torch.randn(num_ind, 32, generator=draw)
    mixed = mix_embeddings(embeddings[codes.first], embeddings[codes.second], codes.weight)
    assert torch.equal(mixed, torch.where(codes.weight.bool(), embeddings[codes.first], embeddings[codes.second]))
    assert codes.first.max() < num_ind and codes.second.max() < num_ind


def test_codes_are_uniform_independent_and_fair():
    codes = draw_codes(36_000, 32, config_of(6), torch.Generator().manual_seed(0))
    pairs = torch.bincount(6 * codes.first + codes.second, minlength=36)  # 1,000 expected of each, sd 31
    assert pairs.min() > 850 and pairs.max() < 1150
    assert set(codes.weight.unique().tolist()) == {0.0, 1.0}
    assert (codes.weight.mean(0) - 0.5).abs().max() < 5 * 0.5 / 36_000**0.5
    coins = codes.weight[:, 0] == codes.weight[:, 1]  # dimensions toss coins of their own
    assert abs(coins.double().mean() - 0.5) < 5 * 0.5 / 36_000**0.5
    assert codes.noise.mean().abs() < 0.005 and abs(codes.noise.std() - 1) < 0.005


def test_distinct_pairs_are_uniform_over_the_other_classes():
    config = replace(config_of(6), pairs="distinct")
    codes = draw_codes(30_000, 32, config, torch.Generator().manual_seed(0))
    pairs = torch.bincount(6 * codes.first + codes.second, minlength=36).view(6, 6)
    assert pairs.diag().sum() == 0
    others = pairs[~torch.eye(6, dtype=torch.bool)]  # 1,000 expected of each, sd 31
    assert others.min() > 850 and others.max() < 1150


def test_image_n_depends_on_row_n_alone(digits_cvae):
    codes = draw_codes(10, 32, config_of(6), torch.Generator().manual_seed(3))
    with torch.no_grad():
        together = decode(digits_cvae, codes, 3.0)
        in_parts = torch.cat([decode(digits_cvae, codes.rows(i, i + 3), 3.0) for i in range(0, 10, 3)])
    torch.testing.assert_close(together, in_parts, atol=1e-6, rtol=0)


def test_pseudo_ood_images_equal_a_plain_restatement(digits_cvae):
    codes = draw_codes(5, 32, config_of(6), torch.Generator().manual_seed(4))
    weight, bias = digits_cvae.class_embed.weight, digits_cvae.class_embed.bias
    images = []
    for n in range(5):
        e_i, e_j = weight[:, codes.first[n]] + bias, weight[:, codes.second[n]] + bias
        mixed = torch.stack([e_i[d] if codes.weight[n, d] == 1 else e_j[d] for d in range(32)])
        hidden = F.relu(digits_cvae.fromZ(torch.cat([3.0 * codes.noise[n], mixed])))
        small = digits_cvae.fcD(hidden).view(1, 128, 2, 2)
        images.append(digits_cvae.convD.deconv2(F.relu(digits_cvae.convD.deconv1(small))).sigmoid()[0])
    torch.testing.assert_close(decode(digits_cvae, codes, 3.0), torch.stack(images))


def test_codes_move_and_slice_as_one():
    codes = draw_codes(7, 4, config_of(6), torch.Generator().manual_seed(0))
    part = codes.rows(2, 5).to(torch.device("cpu"))
    assert all(torch.equal(a, b[2:5]) for a, b in zip(part, codes, strict=True)) and isinstance(part, Codes)


@pytest.mark.parametrize("dataset", ["mnist", "cifar10", "narrow"])
def test_networks_for_inference_compute_the_same(dataset):
    random = torch.Generator().manual_seed(0)
    channels, size = (1, 28) if dataset == "mnist" else (3, 32)
    classifier, vae = MainModel(size, channels, 11, dataset), ConditionalVAE(8, channels, size, 6, dataset)
    images = torch.rand(4, channels, size, size, generator=random)
    codes = draw_codes(4, 8, config_of(6), random)
    for network in (classifier, vae):
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):  # statistics and weights as after training
                for tensor, low, high in (
                    (layer.running_mean, -1, 1),
                    (layer.running_var, 0.5, 2),
                    (layer.weight, 0, 2),
                ):
                    tensor.data = low + (high - low) * torch.rand(tensor.shape, generator=random)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    quick, quick_vae = for_inference(classifier), for_inference(vae)
    assert classifier.training and not quick.training  # the network itself stays as it is
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in quick.convE.modules())
    with torch.no_grad():
        expected = classifier.eval()(images)
        torch.testing.assert_close(quick(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        expected = decode(vae.eval(), codes, 3.0)
        torch.testing.assert_close(decode(quick_vae, codes, 3.0), expected, rtol=0, atol=1e-4)
