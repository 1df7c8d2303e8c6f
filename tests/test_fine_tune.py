"""Stage 2: the engine against the reference, draw for draw, its parts by hand, and what must not influence it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.func import functional_call
from torch.nn import functional as F

from cmg.config import JOINT, FineTuneConfig, config_for
from cmg.data import FeatureBank, Stage2Data
from cmg.engine import HeadStack, fine_tune, margins_of, total_loss
from cmg.losses import MODES as ALL_MODES
from cmg.losses import energy_loss
from cmg.pseudo_ood import FreshFeatures, PooledFeatures, PseudoOOD, decode, draw_codes
from cmg.reference import reference
from cmg.results import Results, run_scores
from cmg.scores import SCORES
from cmg.stage2 import Stage2, Stage2Inputs, run_stage2, split_model
from datasets.datasetsHelper import Images, to_float
from datasets.tasks import TASKS, Experiment
from evaluation.report import PSEUDO
from models.main_model import Head
from training.train_classifier import build_classifier
from utils import derive_seed, generator

# A run beside others and the same run alone, or as a plain loop, differ by the rounding of batched products only.
# Adam makes a step of about the learning rate of any gradient, so the tolerance is a fraction of that.
LEARNING_RATE = 1e-3
TOLERANCE = {"rtol": 0, "atol": 0.02 * LEARNING_RATE}

MODES = ["CMG-softmax", "CMG-energy"]
CONFIG = FineTuneConfig(
    num_ind=6, epochs=2, batch_size=4, learning_rate=LEARNING_RATE, eval_every=10, sigma=3.0, precision="fp32"
)
COUNT = 70  # IND training images: 18 steps an epoch, more than are generated at once, the last of two images


@pytest.fixture
def head() -> Head:
    torch.manual_seed(2)
    return Head(16, 11)


@pytest.fixture
def pseudo(digits_cvae) -> PseudoOOD:
    projection = torch.randn(64, 16, generator=torch.Generator().manual_seed(5)) / 4
    features = lambda images: images.flatten(1) @ projection  # noqa: E731
    return PseudoOOD(digits_cvae.requires_grad_(False), features, CONFIG)


@pytest.fixture
def bank() -> FeatureBank:
    """Features of six classes, each about a centre of its own, and of two OOD sets."""
    draw = torch.Generator().manual_seed(6)
    centres = torch.randn(6, 16, generator=draw)

    def ind(count):
        labels = torch.arange(count) % 6
        return centres[labels] + 0.5 * torch.randn(count, 16, generator=draw), labels

    (train, train_labels), (validation, _), (test, test_labels) = ind(COUNT), ind(12), ind(30)
    ood = {"near": torch.randn(20, 16, generator=draw), "far": 3 * torch.randn(25, 16, generator=draw)}
    return FeatureBank(train, train_labels, validation, test, test_labels, ood)


def tune(head, bank, pseudo, config=CONFIG, modes=MODES, seeds=(1, 2)) -> dict:
    runs = fine_tune(head, bank, replace(pseudo, config=config), modes, list(seeds), show_progress=False)
    return {(run.mode, run.seed): run for run in runs}


def assert_close_runs(run, other) -> None:
    for name, parameter in run.last.items():
        torch.testing.assert_close(parameter, other.last[name], **TOLERANCE)
    assert [check.step for check in run.curve] == [check.step for check in other.curve]
    for check, counterpart in zip(run.curve, other.curve, strict=True):
        # Rounding may exchange two images whose scores are all but the same: a pair of 30 x 20, or of 12 x 12.
        assert check.auroc == pytest.approx(counterpart.auroc, abs=1.01 / 600)
        assert check.validation_auroc == pytest.approx(counterpart.validation_auroc, abs=1.01 / 144)


# --- the engine against the reference, and its parts by hand ------------------------------------


@pytest.fixture
def data() -> Stage2Data:
    draw = torch.Generator().manual_seed(8)

    def images(count):
        return torch.randint(256, (count, 1, 8, 8), generator=draw, dtype=torch.uint8)

    train, validation, test = (Images(images(n), torch.arange(n) % 6) for n in (40, 12, 18))
    return Stage2Data(train, validation, test, {"noise": images(15)})


@pytest.mark.parametrize("mode", MODES)
def test_the_engine_equals_the_reference_draw_for_draw(digits_classifier, digits_cvae, data, mode):
    config = replace(CONFIG, eval_every=6, batch_size=7)  # 6 steps an epoch, the last of 5 images
    bank = data.encode(digits_classifier.features, "fp32")
    pseudo = PseudoOOD(digits_cvae.requires_grad_(False), digits_classifier.features, config)
    runs = fine_tune(digits_classifier.classifier, bank, pseudo, [mode], [1, 2], show_progress=False)
    for run in runs:
        train, ood = data.train, data.ood["noise"]
        arguments = (train.images, train.labels, data.test.images, ood, config, mode, run.seed)
        expected = reference(digits_classifier, digits_cvae, *arguments)
        start = digits_classifier.classifier.state_dict()
        for name, parameter in expected.head.state_dict().items():
            # Adam makes a step of any gradient, be it rounding: what differs is small beside what was learned.
            assert (run.last[name] - parameter).norm() < 0.002 * (parameter - start[name]).norm()
        assert run.margins == (expected.margins and pytest.approx(expected.margins, abs=1e-5))
        assert [check.step for check in run.curve] == list(expected.curve) == [0, 6, 12]
        for check, auroc in zip(run.curve, expected.curve.values(), strict=True):
            assert check.auroc["noise"] == pytest.approx(auroc, abs=1.01 / (18 * 15))


def test_the_reference_refuses_what_it_does_not_know(digits_classifier, digits_cvae, data):
    arguments = (data.train.images, data.train.labels, data.test.images, data.ood["noise"])
    with pytest.raises(ValueError, match="mode is CMG-uniform, expected CMG-energy or CMG-softmax"):
        reference(digits_classifier, digits_cvae, *arguments, CONFIG, "CMG-uniform", 1)
    with pytest.raises(ValueError, match="mixing is mixup, expected the method's bernoulli"):
        reference(digits_classifier, digits_cvae, *arguments, replace(CONFIG, mixing="mixup"), "CMG-energy", 1)


@pytest.mark.parametrize(("size", "total"), [(None, 70), (3, 53), (4, 70), (9, 158)])  # 70 * size / 4, rounded up
def test_fresh_batches_are_consecutive_images_of_the_epochs_codes(pseudo, size, total):
    pseudo = replace(pseudo, config=replace(CONFIG, pseudo_batch_size=size))
    batches = list(FreshFeatures(pseudo, [1, 2]).of_epoch(3, COUNT))
    assert [batch.shape[1] for batch in batches] == [size or 4] * 17 + [total - 17 * (size or 4)]
    for s, seed in enumerate((1, 2)):
        codes = draw_codes(total, 32, CONFIG, generator(seed, "pseudo", 3))
        expected = pseudo.features(decode(pseudo.vae, codes, 3.0))
        torch.testing.assert_close(torch.cat([batch[s] for batch in batches]), expected)


def test_a_pool_is_made_once_and_drawn_from(pseudo):
    pseudo = replace(pseudo, config=replace(CONFIG, pseudo_pool=30, pseudo_batch_size=9))
    source = pseudo.batches([1, 2])
    assert isinstance(source, PooledFeatures)
    batches = list(source.of_epoch(3, COUNT))
    assert [batch.shape[1] for batch in batches] == [9] * 17 + [5]
    for s, seed in enumerate((1, 2)):
        pool = pseudo.features(decode(pseudo.vae, draw_codes(30, 32, CONFIG, generator(seed, "pool")), 3.0))
        torch.testing.assert_close(source.for_margins(COUNT)[s], pool)
        chosen = torch.randint(30, (158,), generator=generator(seed, "pseudo", 3))
        torch.testing.assert_close(torch.cat([batch[s] for batch in batches]), pool[chosen])


def test_confident_pseudo_ood_images_are_replaced_by_the_others_in_turn(pseudo, head):
    """`head` is random, so that the threshold lies where a third of them are above it."""
    pseudo = replace(pseudo, head=head)
    codes = pseudo.draw(40, generator(1, "pool"))
    everything = pseudo.encode(codes)
    with torch.no_grad():
        confidence = head(everything)[:, :6].softmax(1).amax(1)
    limit = confidence.sort().values[26].item()
    expected = [image for image, sure in zip(everything, confidence.tolist(), strict=True) if sure <= limit]
    assert len(expected) == 27
    found = replace(pseudo, config=replace(CONFIG, max_confidence=limit)).encode(codes)
    torch.testing.assert_close(found, torch.stack(expected + expected[:13]), rtol=0, atol=0)
    least = replace(pseudo, config=replace(CONFIG, max_confidence=1e-3)).encode(codes)
    assert torch.equal(least, everything[confidence.argmin()].expand(40, -1))


def test_stage_2_leaves_out_what_its_classifier_is_confident_of(digits_classifier, digits_cvae):
    digits_classifier.classifier.fc2.weight.data.mul_(1000)  # or its logits would be all but the same

    def confidences(limit):
        config = replace(CONFIG, max_confidence=limit)
        pseudo = Stage2.of(split_model(digits_classifier, "head"), digits_cvae, config).pseudo
        with torch.no_grad():
            features = pseudo.encode(pseudo.draw(40, generator(1, "pool")))
            return digits_classifier.classifier(features)[:, :6].softmax(1).amax(1)

    of_all = confidences(1.0)
    limit = of_all.median().item()
    found = confidences(limit)
    assert len(found) == 40 and found.max() <= limit + 1e-6 < of_all.max()


@pytest.mark.parametrize("mixing", ["bernoulli", "mixup", "none"])
def test_codes_hold_the_weights_of_the_mixing(mixing):
    config = replace(CONFIG, mixing=mixing, mixing_probability=0.9)
    codes, fair = (draw_codes(5000, 32, one, generator(1, "x")) for one in (config, CONFIG))
    assert torch.equal(codes.noise, fair.noise) and torch.equal(codes.second, fair.second)
    assert codes.first.unique().tolist() == [0, 1, 2, 3, 4, 5]
    if mixing == "bernoulli":
        assert codes.weight.unique().tolist() == [0.0, 1.0] and codes.weight.mean().item() == pytest.approx(
            0.9, abs=0.01
        )
        assert fair.weight.mean().item() == pytest.approx(0.5, abs=0.01)
    elif mixing == "mixup":
        assert (codes.weight == codes.weight[:, :1]).all() and codes.weight[:, 0].std().item() == pytest.approx(
            1 / 12**0.5, abs=0.01
        )
    else:
        assert (codes.weight == 1).all()


def test_the_loss_of_all_heads_is_the_sum_of_their_losses(head, bank, pseudo):
    source = replace(pseudo, config=CONFIG).batches([1, 2])
    margins = margins_of(head, bank, source, CONFIG)
    heads = {mode: HeadStack(head, 2) for mode in MODES}
    with torch.no_grad():
        for stack in heads.values():  # away from the start
            for k, leaf in enumerate(stack.leaves.values()):
                leaf += 0.01 * (k + 1)
    rows = torch.arange(12).view(2, 6)
    made = next(iter(source.of_epoch(0, COUNT)))
    found = total_loss(heads, bank.train[rows], bank.train_labels[rows], made, margins, CONFIG)
    expected = 0
    for mode, stack in heads.items():
        for s in range(2):
            own = stack.copy(s)
            ind, pseudo_logits = (functional_call(head, own, (part,)) for part in (bank.train[rows[s]], made[s]))
            of_seed = energy_loss if mode == "CMG-energy" else ALL_MODES[mode].loss
            expected += of_seed(
                ind, bank.train_labels[rows[s]], pseudo_logits, type(margins)(*(m[s] for m in margins)), CONFIG
            )
    torch.testing.assert_close(found, expected)


def test_the_anchor_s_gradient_is_that_of_the_squared_distance(head):
    stack, start = HeadStack(head, 2), {name: p.detach() for name, p in head.named_parameters()}
    with torch.no_grad():
        for leaf in stack.leaves.values():  # away from the start
            leaf += torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1))
    distance = sum((parameter - start[name]).square().sum() for name, parameter in stack.parameters.items())
    expected = torch.autograd.grad(0.5 * distance, list(stack.leaves.values()))
    for leaf in stack.leaves.values():
        leaf.grad = torch.ones_like(leaf)
    stack.pull(0.5)
    for leaf, gradient in zip(stack.leaves.values(), expected, strict=True):
        torch.testing.assert_close(leaf.grad, 1 + gradient)


def test_a_seed_beside_others_equals_the_seed_alone(head, bank, pseudo):
    together = tune(head, bank, pseudo, seeds=(1, 2, 3))
    for seed in (1, 2, 3):
        alone = tune(head, bank, pseudo, seeds=(seed,))
        for mode in MODES:
            assert_close_runs(together[mode, seed], alone[mode, seed])
            assert_close_validated(together[mode, seed], alone[mode, seed])


def assert_close_validated(run, other) -> None:
    assert run.validated_step == other.validated_step
    for name, parameter in run.validated.items():
        torch.testing.assert_close(parameter, other.validated[name], **TOLERANCE)


def test_a_mode_beside_another_equals_the_mode_alone(head, bank, pseudo):
    together = tune(head, bank, pseudo)
    for mode in MODES:
        alone = tune(head, bank, pseudo, modes=[mode])
        for seed in (1, 2):
            assert_close_runs(together[mode, seed], alone[mode, seed])


def test_the_same_seed_gives_the_same_result_and_another_seed_another(head, bank, pseudo):
    first, again = tune(head, bank, pseudo), tune(head, bank, pseudo)
    for key, run in first.items():
        assert all(torch.equal(parameter, again[key].last[name]) for name, parameter in run.last.items())
        assert run.curve == again[key].curve
    for mode in MODES:
        assert not torch.equal(first[mode, 1].last["fc2.weight"], first[mode, 2].last["fc2.weight"])


def test_margins_follow_the_quantiles_asked_for(head, bank, pseudo):
    config = replace(CONFIG, epochs=1, margins=(0.5, 0.0))
    m_in, m_out = tune(head, bank, pseudo, config, seeds=(4,))["CMG-energy", 4].margins
    with torch.no_grad():
        ind = -head(bank.train).logsumexp(1)
        made = -head(pseudo.encode(draw_codes(COUNT, 32, CONFIG, generator(4, "margins")))).logsumexp(1)
    assert m_in == pytest.approx(ind.sort().values[35].item(), abs=1e-6)
    assert m_out == pytest.approx(made.min().item(), abs=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_an_interpolated_head_lies_between_the_start_and_the_tuned_one(head, bank, pseudo, share):
    tuned = tune(head, bank, pseudo, CONFIG, seeds=(1,))["CMG-energy", 1]
    found = tune(head, bank, pseudo, replace(CONFIG, interpolation=share), seeds=(1,))["CMG-energy", 1]
    for name, start in head.named_parameters():
        expected = start + share * (tuned.last[name] - start)
        torch.testing.assert_close(found.last[name], expected, atol=1e-6, rtol=1e-6)
        assert share or torch.equal(found.last[name], start)
    assert found.curve[0] == tuned.curve[0]  # training itself is the same


def test_the_learning_rate_falls_by_half_in_every_half_life(head, bank, pseudo):
    """As in a plain loop in which each step's rate is set by the formula."""
    config = replace(CONFIG, half_life=5.0, pseudo_pool=30)
    found = tune(head, bank, pseudo, config, ["CMG-softmax"], [1])["CMG-softmax", 1]
    tuned, source = deepcopy(head), replace(pseudo, config=config).batches([1])
    optimizer = torch.optim.Adam(tuned.parameters())
    step = 0
    for epoch in range(2):
        order = torch.randperm(COUNT, generator=generator(1, "order", epoch))
        for rows, made in zip(order.split(4), source.of_epoch(epoch, COUNT), strict=True):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * 0.5 ** (step / 5)
            logits = tuned(bank.train[rows]), bank.train_labels[rows], tuned(made[0])
            optimizer.zero_grad()
            ALL_MODES["CMG-softmax"].loss(*logits, None, config).backward()
            optimizer.step()
            step += 1
    constant = tune(head, bank, pseudo, replace(config, half_life=0.0), ["CMG-softmax"], [1])["CMG-softmax", 1]
    for name, parameter in tuned.named_parameters():
        torch.testing.assert_close(found.last[name], parameter.detach(), **TOLERANCE)
        assert (constant.last[name] - parameter).norm() > 0.5 * (parameter - head.state_dict()[name]).norm()


def test_with_a_half_life_a_longer_run_ends_at_the_same_head(head, bank, pseudo):
    shorter, longer = (
        tune(head, bank, pseudo, replace(CONFIG, half_life=3.0, epochs=epochs), ["CMG-energy"], [1])["CMG-energy", 1]
        for epochs in (2, 6)
    )
    assert longer.curve[-1].step == 3 * shorter.curve[-1].step
    for name, parameter in longer.last.items():
        torch.testing.assert_close(shorter.last[name], parameter, **TOLERANCE)
        assert (parameter - head.state_dict()[name]).abs().max() > LEARNING_RATE


def test_with_a_half_life_of_all_but_nothing_only_the_first_step_counts(head, bank, pseudo):
    run = tune(head, bank, pseudo, replace(CONFIG, half_life=1e-9), ["CMG-energy"], [1])["CMG-energy", 1]
    moved = max((run.last[name] - p).abs().max().item() for name, p in head.named_parameters())
    assert moved == pytest.approx(LEARNING_RATE, rel=1e-2)  # Adam's first step of a gradient that is not tiny


def test_a_strong_anchor_keeps_the_head_near_its_start(head, bank, pseudo):
    start = dict(head.named_parameters())

    def moved(run) -> float:
        return sum((parameter - start[name]).square().sum().item() for name, parameter in run.last.items())

    free = tune(head, bank, pseudo, seeds=(1,))
    held = tune(head, bank, pseudo, replace(CONFIG, anchor=1e4), seeds=(1,))
    assert all(moved(held[key]) < 0.2 * moved(free[key]) for key in free)


# --- what must not influence it -----------------------------------------------------------------


def test_validated_step_is_the_first_best_on_validation_images(head, bank, pseudo):
    for run in tune(head, bank, pseudo, replace(CONFIG, eval_every=3)).values():
        figures = [check.validation_auroc for check in run.curve]
        assert run.validated_step == run.curve[figures.index(max(figures))].step
        with torch.no_grad():
            tuned = deepcopy(head)
            tuned.load_state_dict(run.validated)
            fresh = pseudo.encode(draw_codes(12, 32, CONFIG, generator(run.seed, "validation")))
            if run.mode == "CMG-energy":
                scores = -tuned(torch.cat([bank.validation, fresh]))[:, :6].logsumexp(1)
            else:
                scores = tuned(torch.cat([bank.validation, fresh]))[:, :7].softmax(1)[:, 6]
        assert max(figures) == pytest.approx(roc_auc_score([0] * 12 + [1] * 12, scores.numpy()), abs=1.01 / 144)


@pytest.mark.parametrize("changed", ["OOD permuted", "OOD replaced", "no OOD", "test permuted", "test replaced"])
def test_neither_ood_nor_test_images_influence_the_heads(head, bank, pseudo, changed):
    mix = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    other = replace(
        bank,
        **{
            "OOD permuted": {"ood": {name: features.flip(0) for name, features in bank.ood.items()}},
            "OOD replaced": {"ood": {"another": torch.ones(3, 16)}},
            "no OOD": {"ood": {}},
            "test permuted": {"test": bank.test[mix], "test_labels": bank.test_labels[mix]},
            "test replaced": {"test": torch.zeros(5, 16), "test_labels": torch.zeros(5, dtype=torch.int64)},
        }[changed],
    )
    config = replace(CONFIG, eval_every=3)
    ours, theirs = tune(head, bank, pseudo, config), tune(head, other, pseudo, config)
    for key, run in ours.items():
        assert run.validated_step == theirs[key].validated_step
        for parameters, counterparts in ((run.validated, theirs[key].validated), (run.last, theirs[key].last)):
            assert all(torch.equal(parameter, counterparts[name]) for name, parameter in parameters.items())


def test_without_validation_images_no_step_is_chosen(head, bank, pseudo):
    for run in tune(head, replace(bank, validation=torch.empty(0)), pseudo).values():
        assert run.validated is None and run.validated_step is None
        assert {check.validation_auroc for check in run.curve} == {None}


# --- networks and images ------------------------------------------------------------------------


@pytest.fixture
def inputs(digits_classifier, digits_cvae, data) -> Stage2Inputs:
    name = "same_dataset_digits"
    return Stage2Inputs(Experiment.of(name, TASKS[name]), digits_classifier, digits_cvae, {}, data)


@pytest.mark.parametrize("part", ["head", "last-layer"])
def test_networks_and_batch_norm_statistics_stay_bit_equal(digits_classifier, digits_cvae, inputs, part):
    before = [deepcopy(network.state_dict()) for network in (digits_classifier, digits_cvae)]
    config = replace(CONFIG, batch_size=16, tune=part)
    results = run_stage2(inputs, config, MODES, [1, 2])
    for network, state in zip((digits_classifier, digits_cvae), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    tuned = {name: p.shape for name, p in split_model(digits_classifier, part).head.named_parameters()}
    for run in results.runs:
        assert {name: p.shape for name, p in run.last.items()} == tuned
    assert set(tuned) == (
        {"weight", "bias"} if part == "last-layer" else {f"fc{i}.{p}" for i in (1, 2) for p in ("weight", "bias")}
    )


@pytest.mark.parametrize("part", ["head", "last-layer"])
def test_frozen_and_tuned_part_make_up_the_classifier(digits_classifier, data, part):
    features, head, *_ = split_model(digits_classifier, part)
    with torch.no_grad():
        expected = digits_classifier(to_float(data.test.images))
        torch.testing.assert_close(head(features(to_float(data.test.images))), expected)


def test_features_are_those_of_single_images(digits_classifier, data):
    bank = data.encode(digits_classifier.features, "fp32")
    for features, images in ((bank.train, data.train.images), (bank.ood["noise"], data.ood["noise"])):
        with torch.no_grad():
            single = torch.cat([digits_classifier.features(image[None] / 255) for image in images])
        torch.testing.assert_close(features, single, rtol=1e-4, atol=1e-4)
    assert torch.equal(bank.train_labels, data.train.labels) and torch.equal(bank.test_labels, data.test.labels)


def test_rows_report_the_last_the_validated_and_the_best_check(head, bank, pseudo):
    for run in tune(head, bank, pseudo).values():
        results = Results(run_scores(head, bank, run, pseudo), [run], bank, CONFIG)
        aurocs = {(row["at"], row["ood_dataset"]): row["auroc"] for row in results.detection()}
        by_step = {check.step: check for check in run.curve}
        for name in bank.ood:
            assert aurocs["last", name] == run.curve[-1].auroc[name]
            assert aurocs["validated", name] == by_step[run.validated_step].auroc[name]
            assert aurocs["max", name] == max(check.auroc[name] for check in run.curve)
        assert [row["at"] for row in results.ind()] == ["last", "validated"]
        assert results.ind()[0]["accuracy"] == run.curve[-1].accuracy


def test_scored_pseudo_ood_images_are_new_ones(head, bank, pseudo):
    (run,) = tune(head, bank, pseudo, modes=["CMG-energy"], seeds=[1]).values()
    last, _ = run_scores(head, bank, run, pseudo, score_pseudo=True)
    features = pseudo.encode(draw_codes(len(bank.test), 32, CONFIG, generator(1, "scored")))
    logits = functional_call(head, run.last, (features,))
    torch.testing.assert_close(last.scores[PSEUDO], -logits[:, :6].logsumexp(1))


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", list(SCORES))
def test_heads_are_scored_as_asked_for(head, bank, pseudo, score):
    (run,) = tune(head, bank, pseudo, replace(CONFIG, score=score), modes=["CMG-softmax"], seeds=[1]).values()
    ind, ood = (SCORES[score](functional_call(head, run.last, (part,)), 6) for part in (bank.test, bank.ood["near"]))
    expected = roc_auc_score([0] * len(ind) + [1] * len(ood), torch.cat([ind, ood]).detach().numpy())
    assert run.curve[-1].auroc["near"] == pytest.approx(expected, abs=1e-6)


def test_a_task_has_its_own_values_and_joint_training_the_classifiers():
    digits = Experiment.of("same_dataset_digits", TASKS["same_dataset_digits"])
    config = config_for(digits, "fp32", anchor=0.5)
    assert (config.num_ind, config.sigma, config.eval_every, config.anchor) == (6, 3.0, 20, 0.5)
    joint = config_for(digits, "fp32", tune=JOINT, sigma=2.0)
    assert (joint.epochs, joint.batch_size, joint.learning_rate, joint.sigma) == (60, 64, 1e-3, 2.0)


def test_joint_training_is_the_plain_loop_from_new_weights(digits_cvae, inputs):
    data, config = inputs.data, replace(CONFIG, batch_size=16, epochs=2, tune=JOINT)
    results = run_stage2(inputs, config, ["CMG-softmax"], [3])
    (run,) = results.runs

    torch.manual_seed(derive_seed(3, "initialisation", JOINT))
    model = build_classifier(inputs.experiment.task).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    for epoch in range(2):
        order = torch.randperm(40, generator=generator(3, "order", epoch))
        codes = draw_codes(40, 32, CONFIG, generator(3, "draws", epoch))
        for step, rows in enumerate(order.split(16)):
            torch.manual_seed(derive_seed(3, "dropout", epoch, step, 0))
            picked = type(codes)(*(field[16 * step : 16 * step + len(rows)] for field in codes))
            with torch.no_grad():
                pseudo = decode(digits_cvae, picked, 3.0)
            logits = model(torch.cat([to_float(data.train.images[rows]), pseudo]))
            ind_logits, pseudo_logits = logits[: len(rows)], logits[len(rows) :]
            loss = F.cross_entropy(ind_logits, data.train.labels[rows])
            loss = loss + F.cross_entropy(pseudo_logits[:, :7], torch.full((len(rows),), 6))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, parameter in model.classifier.named_parameters():
        torch.testing.assert_close(run.last[name], parameter.detach(), rtol=0, atol=0.1 * LEARNING_RATE)
    model.eval()
    with torch.no_grad():
        scores = [model(images / 255)[:, :7].softmax(1)[:, 6] for images in (data.test.images, data.ood["noise"])]
    expected = roc_auc_score([0] * 18 + [1] * 15, torch.cat(scores).numpy())
    (row,) = [row for row in results.detection() if row["at"] == "last"]
    assert row["auroc"] == pytest.approx(expected, abs=0.02)
    assert {row["at"] for row in results.detection()} == {"pretrained", "last"}
