"""Stage 2: the batched engine against a plain loop, draw for draw, and what must not influence it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.func import functional_call
from torch.nn import functional as F

import eval
import training.fine_tune as fine_tune_module
from datasets.datasetsHelper import Images, to_float
from datasets.tasks import TASKS
from evaluation.report import PSEUDO
from evaluation.scores import SCORES
from models.main_model import Head
from models.vae import MIXING_WEIGHTS, Mixing, decode_pseudo_ood, draw_codes
from training.fine_tune import FeatureBank, FineTuneConfig, PseudoOOD, fine_tune
from training.scored import run_scores, summarise
from training.stage2 import JOINT, TUNABLE, Stage2Data, Stage2Inputs, run_stage2, split_model
from training.train_classifier import build_classifier
from utils import derive_seed, generator

# A run beside others and the same run alone, or as a plain loop, differ by the rounding of batched products only.
# Adam makes a step of about the learning rate of any gradient, so the tolerance is a fraction of that.
LEARNING_RATE = 1e-3
TOLERANCE = {"rtol": 0, "atol": 0.02 * LEARNING_RATE}

MODES = ["CMG-softmax", "CMG-energy"]
CONFIG = FineTuneConfig(
    num_ind=6, epochs=2, batch_size=4, learning_rate=LEARNING_RATE, check_every=10, sigma=3.0, precision="fp32"
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
    return PseudoOOD(digits_cvae.requires_grad_(False), features, 6, CONFIG.sigma, "fp32", torch.device("cpu"))


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
    runs = fine_tune(head, bank, pseudo, config, modes, list(seeds), show_progress=False)
    return {(run.mode, run.seed): run for run in runs}


def assert_close_runs(run, other) -> None:
    for name, parameter in run.last.items():
        torch.testing.assert_close(parameter, other.last[name], **TOLERANCE)
    assert [check.step for check in run.curve] == [check.step for check in other.curve]
    for check, counterpart in zip(run.curve, other.curve, strict=True):
        assert check.auroc == pytest.approx(counterpart.auroc, abs=1e-6)
        assert check.validation_auroc == pytest.approx(counterpart.validation_auroc, abs=1e-6)


# --- the engine against a plain loop ------------------------------------------------------------


def plain_fine_tune(head, bank, pseudo, config, mode, seed):
    """The method as it reads: one head, an ordinary Adam, images made batch by batch.

    Returns the head, its margins and (step, AUROC on each OOD set) at every check.
    """
    start, head = deepcopy(head).requires_grad_(False), deepcopy(head)
    encode = lambda codes: pseudo.features(decode_pseudo_ood(pseudo.vae, codes, config.sigma))  # noqa: E731
    with torch.no_grad():
        ind_energies = -head(bank.train).logsumexp(1)
        if config.pseudo_pool:
            pool = encode(draw_codes(config.pseudo_pool, 6, 32, generator(seed, "pool")))
        else:
            pool = encode(draw_codes(COUNT, 6, 32, generator(seed, "margins")))
        pseudo_energies = -head(pool).logsumexp(1)
        m_in, m_out = ind_energies.sort().values[14], pseudo_energies.sort().values[len(pool) * 8 // 10]  # 20 %, 80 %

    def check():
        with torch.no_grad():
            if mode == "CMG-energy":
                scores = lambda features: -head(features)[:, :6].logsumexp(1)  # noqa: E731
            else:
                scores = lambda features: head(features)[:, :7].softmax(1)[:, 6]  # noqa: E731
            ind = scores(bank.test)
            for name, features in bank.ood.items():
                labels = [0] * len(ind) + [1] * len(features)
                aurocs[name] = roc_auc_score(labels, torch.cat([ind, scores(features)]).numpy())
        curve.append((step, dict(aurocs)))

    optimizer = torch.optim.Adam(head.parameters(), config.learning_rate)
    step, curve, aurocs = 0, [], {}
    for epoch in range(config.epochs):
        order = torch.randperm(COUNT, generator=generator(seed, "order", epoch))
        draw = generator(seed, "pseudo", epoch)
        if config.pseudo_pool:
            chosen = torch.randint(config.pseudo_pool, (COUNT,), generator=draw)
        else:
            codes = draw_codes(COUNT, 6, 32, draw)
        for first in range(0, COUNT, config.batch_size):
            if step % config.check_every == 0:
                check()
            rows = order[first : first + config.batch_size]
            last = first + len(rows)
            made = pool[chosen[first:last]] if config.pseudo_pool else encode(codes.rows(first, last))
            ind_logits, pseudo_logits = head(bank.train[rows]), head(made)
            loss = F.cross_entropy(ind_logits, bank.train_labels[rows])
            if mode == "CMG-energy":
                excess = F.relu(-ind_logits.logsumexp(1) - m_in).square().mean()
                lack = F.relu(m_out + pseudo_logits.logsumexp(1)).square().mean()
                loss = loss + 0.1 * (excess + lack)
            else:
                loss = loss + F.cross_entropy(pseudo_logits[:, :7], torch.full((len(rows),), 6))
            for parameter, origin in zip(head.parameters(), start.parameters(), strict=True):
                loss = loss + config.anchor * (parameter - origin).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    check()
    return head, (m_in.item(), m_out.item()), curve


@pytest.mark.parametrize("options", [{}, {"pseudo_pool": 30}, {"anchor": 0.5}], ids=["fresh", "pool", "anchor"])
def test_engine_equals_a_plain_loop_draw_for_draw(head, bank, pseudo, options):
    config = replace(CONFIG, **options)
    runs = tune(head, bank, pseudo, config)
    for (mode, seed), run in runs.items():
        expected, margins, curve = plain_fine_tune(head, bank, pseudo, config, mode, seed)
        for name, parameter in expected.named_parameters():
            torch.testing.assert_close(run.last[name], parameter.detach(), **TOLERANCE)
        assert [check.step for check in run.curve] == [step for step, _ in curve] == [0, 10, 20, 30, 36]
        for check, (_, aurocs) in zip(run.curve, curve, strict=True):
            assert check.auroc == pytest.approx(aurocs, abs=1e-6)
        assert run.margins == (pytest.approx(margins, abs=1e-5) if mode == "CMG-energy" else None)


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
    config = replace(CONFIG, epochs=1, ind_quantile=0.5, pseudo_quantile=0.0)
    m_in, m_out = tune(head, bank, pseudo, config, seeds=(4,))["CMG-energy", 4].margins
    with torch.no_grad():
        ind = -head(bank.train).logsumexp(1)
        made = -head(pseudo.encode(draw_codes(COUNT, 6, 32, generator(4, "margins")))).logsumexp(1)
    assert m_in == pytest.approx(ind.sort().values[35].item(), abs=1e-6)
    assert m_out == pytest.approx(made.min().item(), abs=1e-6)


def test_a_strong_anchor_keeps_the_head_near_its_start(head, bank, pseudo):
    start = dict(head.named_parameters())

    def moved(run) -> float:
        return sum((parameter - start[name]).square().sum().item() for name, parameter in run.last.items())

    free = tune(head, bank, pseudo, seeds=(1,))
    held = tune(head, bank, pseudo, replace(CONFIG, anchor=1e4), seeds=(1,))
    assert all(moved(held[key]) < 0.2 * moved(free[key]) for key in free)


# --- what must not influence it -----------------------------------------------------------------


def test_validated_step_is_the_first_best_on_validation_images(head, bank, pseudo):
    for run in tune(head, bank, pseudo, replace(CONFIG, check_every=3)).values():
        figures = [check.validation_auroc for check in run.curve]
        assert run.validated_step == run.curve[figures.index(max(figures))].step
        with torch.no_grad():
            tuned = deepcopy(head)
            tuned.load_state_dict(run.validated)
            fresh = pseudo.encode(draw_codes(12, 6, 32, generator(run.seed, "validation")))
            if run.mode == "CMG-energy":
                scores = -tuned(torch.cat([bank.validation, fresh]))[:, :6].logsumexp(1)
            else:
                scores = tuned(torch.cat([bank.validation, fresh]))[:, :7].softmax(1)[:, 6]
        assert max(figures) == pytest.approx(roc_auc_score([0] * 12 + [1] * 12, scores.numpy()), abs=1e-6)


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
    config = replace(CONFIG, check_every=3)
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
def data() -> Stage2Data:
    draw = torch.Generator().manual_seed(8)

    def images(count):
        return torch.randint(256, (count, 1, 8, 8), generator=draw, dtype=torch.uint8)

    train, validation, test = (Images(images(n), torch.arange(n) % 6) for n in (40, 12, 18))
    return Stage2Data(train, validation, test, {"noise": images(15)})


@pytest.fixture
def inputs(digits_classifier, digits_cvae, data) -> Stage2Inputs:
    name = "same_dataset_digits"
    return Stage2Inputs(name, TASKS[name], "partition1", digits_classifier, digits_cvae, {}, data)


@pytest.mark.parametrize("part", ["head", "last-layer"])
def test_networks_and_batch_norm_statistics_stay_bit_equal(digits_classifier, digits_cvae, inputs, part):
    before = [deepcopy(network.state_dict()) for network in (digits_classifier, digits_cvae)]
    config = replace(CONFIG, batch_size=16)
    results = run_stage2(inputs, config, MODES, [1, 2], part)
    for network, state in zip((digits_classifier, digits_cvae), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    tuned = {name: p.shape for name, p in split_model(digits_classifier, part)[1].named_parameters()}
    for run in results["tuned"]:
        assert {name: p.shape for name, p in run.last.items()} == tuned
    assert set(tuned) == (
        {"weight", "bias"} if part == "last-layer" else {f"fc{i}.{p}" for i in (1, 2) for p in ("weight", "bias")}
    )


@pytest.mark.parametrize("part", ["head", "last-layer"])
def test_frozen_and_tuned_part_make_up_the_classifier(digits_classifier, data, part):
    features, head = split_model(digits_classifier, part)
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
        results = summarise(run_scores(head, bank, run, CONFIG), [run], bank, 6)
        figures = {(row["at"], row["ood_dataset"]): row["auroc"] for row in results["detection"]}
        by_step = {check.step: check for check in run.curve}
        for name in bank.ood:
            assert figures["last", name] == run.curve[-1].auroc[name]
            assert figures["validated", name] == by_step[run.validated_step].auroc[name]
            assert figures["max", name] == max(check.auroc[name] for check in run.curve)
        assert [row["at"] for row in results["ind"]] == ["last", "validated"]
        assert results["ind"][0]["accuracy"] == run.curve[-1].accuracy


def test_scored_pseudo_ood_images_are_new_ones(head, bank, pseudo):
    (run,) = tune(head, bank, pseudo, modes=["CMG-energy"], seeds=[1]).values()
    last, _ = run_scores(head, bank, run, CONFIG, pseudo)
    features = pseudo.encode(draw_codes(len(bank.test), 6, 32, generator(1, "scored")))
    logits = functional_call(head, run.last, (features,))
    torch.testing.assert_close(last.scores[PSEUDO], -logits[:, :6].logsumexp(1))


# --- ablations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"mixing": Mixing("weight")},
        {"mixing": Mixing("none")},
        {"mixing": Mixing("coin", 0.9)},
        {"pseudo_batch_size": 3},
        {"pseudo_batch_size": 9},
        {"pseudo_batch_size": 9, "pseudo_pool": 30},
        {"loss_energy": "ind"},
        {"score_energy": "all"},
    ],
    ids=str,
)
def test_an_ablation_is_the_plain_loop_with_that_change(head, bank, pseudo, change):
    config = replace(CONFIG, **change)
    pseudo = replace(pseudo, mixing=config.mixing)
    (run,) = tune(head, bank, pseudo, config, modes=["CMG-energy"], seeds=[1]).values()
    size = config.pseudo_batch_size or 4
    total = {3: 53, 4: 70, 9: 158}[size]  # 70 * size / 4, rounded up
    loss_logits, score_logits = {"all": 11, "ind": 6}[config.loss_energy], {"all": 11, "ind": 6}[config.score_energy]

    start, head = deepcopy(head).requires_grad_(False), deepcopy(head)
    encode = lambda codes: pseudo.features(decode_pseudo_ood(pseudo.vae, codes, 3.0))  # noqa: E731
    energy = lambda head, features: -head(features)[:, :loss_logits].logsumexp(1)  # noqa: E731
    with torch.no_grad():
        stream, count, rank = ("pool", 30, 24) if config.pseudo_pool else ("margins", COUNT, 56)
        pool = encode(draw_codes(count, 6, 32, generator(1, stream), config.mixing))
        m_in, m_out = energy(start, bank.train).sort().values[14], energy(start, pool).sort().values[rank]
    optimizer = torch.optim.Adam(head.parameters(), LEARNING_RATE)
    for epoch in range(2):
        order = torch.randperm(COUNT, generator=generator(1, "order", epoch))
        draw = generator(1, "pseudo", epoch)
        if config.pseudo_pool:
            made = pool[torch.randint(30, (total,), generator=draw)]
        else:
            made = encode(draw_codes(total, 6, 32, draw, config.mixing))
        batches = list(made.split(size))
        assert len(batches) == 18
        for rows, pseudo_features in zip(order.split(4), batches, strict=True):
            loss = F.cross_entropy(head(bank.train[rows]), bank.train_labels[rows])
            loss = loss + 0.1 * F.relu(energy(head, bank.train[rows]) - m_in).square().mean()
            loss = loss + 0.1 * F.relu(m_out - energy(head, pseudo_features)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(run.last[name], parameter.detach(), **TOLERANCE)
    with torch.no_grad():
        ind, ood = (-head(f)[:, :score_logits].logsumexp(1) for f in (bank.test, bank.ood["near"]))
    expected = roc_auc_score([0] * len(ind) + [1] * len(ood), torch.cat([ind, ood]).numpy())
    assert run.curve[-1].auroc["near"] == pytest.approx(expected, abs=1e-6)


def test_joint_training_is_the_plain_loop_from_new_weights(digits_cvae, inputs):
    data, config = inputs.data, replace(CONFIG, batch_size=16, epochs=2)
    results = run_stage2(inputs, config, ["CMG-softmax"], [3], JOINT)
    (run,) = results["tuned"]

    torch.manual_seed(derive_seed(3, "initialisation", JOINT))
    model = build_classifier(inputs.task).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    for epoch in range(2):
        order = torch.randperm(40, generator=generator(3, "order", epoch))
        codes = draw_codes(40, 6, 32, generator(3, "draws", epoch))
        for step, rows in enumerate(order.split(16)):
            torch.manual_seed(derive_seed(3, "dropout", epoch, step, 0))
            picked = type(codes)(*(field[16 * step : 16 * step + len(rows)] for field in codes))
            with torch.no_grad():
                pseudo = decode_pseudo_ood(digits_cvae, picked, 3.0)
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
    (row,) = [row for row in results["detection"] if row["at"] == "last"]
    assert row["auroc"] == pytest.approx(expected, abs=0.02)
    assert {row["at"] for row in results["detection"]} == {"untouched", "last"}


def test_the_names_eval_offers_are_those_there_are():
    assert set(eval.MODE_NAMES) == set(fine_tune_module.MODES)
    assert {score for mode in fine_tune_module.MODES.values() for score in mode.scores.values()} == set(SCORES)
    assert eval.TUNED == (*TUNABLE, JOINT) and eval.MIXINGS == tuple(MIXING_WEIGHTS)
