"""The training loop: order, seeds, resume, interruption, failure, several processes."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import train
from cli.errors import run_command
from cli.files import replacing
from cli.progress import Progress
from datasets.datasetsHelper import Images
from datasets.tasks import COMMANDS, TASKS, Experiment
from tests import children
from tests.children import finish
from training.checkpoints import save_network
from training.config import LoopConfig
from training.loop import fit, warmup_schedule
from training.processes import Processes, joined_processes
from training.run_state import Recorder, RunState, load_optimizer
from training.runs import remove_leftovers
from training.stages import STAGES
from training.train_classifier import ClassifierObjective
from training.train_cvae import collapse_remark
from utils import derive_seed, generator, load_checkpoint, save_checkpoint

CPU = Processes(torch.device("cpu"))
STEPS = 12  # of an epoch of digits: 722 images in batches of 64
CONFIG = LoopConfig(epochs=3, batch_size=4, learning_rate=0.01, seed=5, precision="fp32")


def numbered(count: int) -> Images:
    """Images that hold nothing, labelled 0, 1, …"""
    return Images(torch.zeros(count, 1, 8, 8, dtype=torch.uint8), torch.arange(count))


@dataclass
class Recording:
    """An objective that notes the labels of every batch and minimises a weight's square.

    At a step in `at` it calls the function there, and a loss that this returns takes the place of its own.
    """

    draws: int = 0
    at: dict = field(default_factory=dict)
    batches: list[list[int]] = field(default_factory=list)

    def draw(self, count, generator):
        return (torch.randn(count, self.draws, generator=generator),)

    def __call__(self, model, images, labels, *draws):
        self.batches.append(labels.tolist())
        loss = model.weight.square().sum() * 0 + labels.double().mean()
        event = self.at.get(len(self.batches), lambda: None)()
        return {"loss": loss if event is None else loss * event}


def fit_recording(objective: Recording, config: LoopConfig = CONFIG, count: int = 10, **recorder) -> list[dict]:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate)
    return fit(model, optimizer, numbered(count), objective, config, CPU, Recorder(name="test", **recorder))


# --- order and seeds ----------------------------------------------------------------------------


def test_an_epoch_is_one_permutation_with_its_last_partial_batch():
    objective = Recording()
    fit_recording(objective)
    assert [len(batch) for batch in objective.batches] == [4, 4, 2] * 3
    epochs = [sum(objective.batches[3 * e : 3 * e + 3], []) for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[2] == torch.randperm(10, generator=generator(5, "order", 2)).tolist()


def test_more_draws_or_another_use_of_torch_do_not_shift_the_order():
    few, many = Recording(draws=0), Recording(draws=100, at={2: lambda: torch.rand(9).sum() * 0 + 1})
    fit_recording(few)
    fit_recording(many)
    assert few.batches == many.batches


def test_streams_have_seeds_of_their_own():
    names = [("order", 0), ("order", 1), ("draws", 0), ("initialisation",), ("order", 10), ("order", "1/0")]
    seeds = [derive_seed(seed, *name) for seed in (1, 2, 11) for name in names]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


def test_loss_of_an_epoch_is_the_mean_over_its_images():
    history = fit_recording(Recording())
    assert [line["loss"] for line in history] == [4.5] * 3  # batches of 4, 4 and 2 count by their images


# --- the command with a tiny network ------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A function that runs `train` on digits with the tiny network.

    `stop` maps steps, counted from 0, to a signal that arrives there or a factor on the loss.
    """
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, epochs: int = 4, stop: dict | None = None, file: str = "net.pkl") -> int:
        stage = STAGES["train_classifier"]
        steps = 0

        def objective(task):
            inner = stage.objective(task)

            class Interrupted:
                draw = inner.draw

                def __call__(self, *args):
                    nonlocal steps
                    means, event = inner(*args), (stop or {}).get(steps)
                    steps += 1
                    if isinstance(event, signal.Signals):
                        os.kill(os.getpid(), event)
                    return means if not isinstance(event, float) else means | {"loss": means["loss"] * event}

            return Interrupted()

        monkeypatch.setitem(STAGES, "train_classifier", replace(stage, build=children.build_tiny, objective=objective))
        try:
            return run_command(train.main, train.get_parser(), [*options(Path(file), epochs), *argv])
        finally:
            monkeypatch.setitem(STAGES, "train_classifier", stage)

    return run


def assert_same_network(path: str | Path, other: str | Path) -> None:
    ours, theirs = load_checkpoint(Path(path)), load_checkpoint(Path(other))
    assert ours.origin == theirs.origin and list(ours) == list(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_same_seed_gives_the_same_network_and_another_seed_another(tiny):
    for file, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert tiny("--seed", seed, file=file, epochs=2) == 0
    assert_same_network("a", "b")
    a, c = load_checkpoint(Path("a")), load_checkpoint(Path("c"))
    assert not any(torch.equal(a[name], c[name]) for name in a if "num_batches" not in name)


@pytest.mark.parametrize(
    ("signum", "step"),
    [(signal.SIGTERM, 0), (signal.SIGINT, 5), (signal.SIGUSR1, STEPS - 1), (signal.SIGTERM, 2 * STEPS + 3)],
)
def test_a_run_stopped_by_a_signal_resumes_to_the_same_network(tiny, capsys, monkeypatch, signum, step):
    closed = []  # how much each run, those before it included, had done and how much there was
    monkeypatch.setattr(Progress, "close", lambda progress: closed.append((progress.done, progress.total)))
    tiny("--log", "whole.jsonl", file="whole")
    assert tiny("--log", "parts.jsonl", file="parts", stop={step: signum}) == 128 + signum
    assert not Path("parts").exists() and Path("parts.resume").exists()
    expected = (
        f"stopped in epoch {(step + 1) // STEPS + 1}, the state is saved in parts.resume: the same command goes on"
    )
    assert expected in capsys.readouterr().err
    assert tiny("--log", "parts.jsonl", file="parts") == 0
    assert "resuming at epoch" in capsys.readouterr().out
    assert closed == [(4 * 722, 4 * 722)] * 2
    assert_same_network("parts", "whole")
    assert not Path("parts.resume").exists()
    lines = [
        [json.loads(line) for line in Path(log).read_text().splitlines()] for log in ("whole.jsonl", "parts.jsonl")
    ]
    timing = {"images_per_second": 0, "time": 0}
    assert [line | timing for line in lines[0]] == [line | timing for line in lines[1]]


@pytest.mark.parametrize(
    ("option", "value", "difference"),
    [
        ("--lr", "0.01", "learning_rate was 0.001, is 0.01"),
        ("--batch-size", "32", "batch_size was 64, is 32"),
        ("--seed", "124", "seed was 123, is 124"),
        ("--precision", "bf16", "precision was fp32, is bf16"),
        ("--partition", "partition2", "partition was partition1, is partition2"),
        ("--val-fraction", "0.1", "val_fraction was 0.0, is 0.1"),
    ],
)
def test_a_resume_with_another_configuration_is_refused(tiny, capsys, option, value, difference):
    tiny(stop={STEPS + 2: signal.SIGTERM})
    before = Path("net.pkl.resume").read_bytes()
    capsys.readouterr()
    assert tiny(option, value) == 2
    error = capsys.readouterr().err
    assert difference in error and "--restart" in error and error.count("\n") == 1
    assert Path("net.pkl.resume").read_bytes() == before


def test_a_damaged_state_is_left_for_restart(tiny, capsys):
    Path("net.pkl.resume").write_bytes(b"half a state")
    assert tiny(epochs=1) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "train: error: net.pkl.resume: is not a checkpoint or is damaged; expected a dict of tensors"
    )
    assert error.endswith(". Start over with --restart\n") and error.count("\n") == 1
    assert tiny("--restart", epochs=1) == 0


def without(key: str) -> Callable[[dict], dict]:
    return lambda state: {k: v for k, v in state.items() if k != key}


def with_moments(state: dict, **changed: object) -> dict:
    optimizer = state["optimizer"]
    moments = {k: v | changed for k, v in optimizer["state"].items()}
    return state | {"optimizer": optimizer | {"state": moments}}


def moved_moments(state: dict, name: str, by: float) -> dict:
    optimizer = state["optimizer"]
    moments = {k: v | {name: v[name] + by} for k, v in optimizer["state"].items()}
    return state | {"optimizer": optimizer | {"state": moments}}


NO_STATE = "is not a state of a training. Start over with --restart"
NOT_OF_THIS = "is not a state of this training ("


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state | {"step": -5}, NO_STATE),
        (lambda state: state | {"step": True}, NO_STATE),
        (lambda state: state | {"step": state["step"] + 1}, NOT_OF_THIS),
        (lambda state: state | {"identity": {1: torch.zeros(2)}}, NO_STATE),
        (lambda state: state | {"identity": ["seed", 1]}, NO_STATE),
        (lambda state: state | {"losses": [torch.zeros(2)]}, NO_STATE),
        (lambda state: state | {"sums": {"loss": torch.zeros(2)}}, NO_STATE),
        (without("sums"), NO_STATE),
        (lambda state: state | {"history": [{"epoch": torch.tensor(1)}]}, NO_STATE),
        (lambda state: with_moments(state, step="one"), NOT_OF_THIS + "step of a parameter holds what no step gives"),
        (lambda state: with_moments(state, exp_avg=torch.tensor(1j)), NOT_OF_THIS + "exp_avg of a parameter holds"),
        (lambda state: with_moments(state, step=torch.tensor(-1.0)), NOT_OF_THIS + "the optimizer has made -1 steps"),
        (lambda state: moved_moments(state, "exp_avg_sq", -1), NOT_OF_THIS + "exp_avg_sq of a parameter holds what no"),
        (lambda state: moved_moments(state, "exp_avg", math.nan), NOT_OF_THIS + "exp_avg of a parameter holds what no"),
        (lambda state: with_moments(state, exp_avg=torch.zeros(3)), NOT_OF_THIS + "exp_avg is [3], its parameter"),
        (lambda state: with_moments(state, exp_avg=torch.tensor(0.0)), NOT_OF_THIS + "exp_avg is [], its parameter"),
        (lambda state: with_moments(state, exp_avg=torch.tensor(1)), NOT_OF_THIS + "exp_avg of a parameter holds"),
        (lambda state: with_moments(state, exp_avg="abc"), NOT_OF_THIS + "exp_avg of a parameter holds"),
        (lambda state: with_moments(state, step=torch.ones(3)), NOT_OF_THIS + "step is [3], its parameter"),
        (lambda state: with_moments(state, step=torch.tensor(1e9)), NOT_OF_THIS + "the optimizer has made 1e+09 steps"),
        (
            lambda state: state | {"step": state["step"] + STEPS},
            NOT_OF_THIS + "its history is not of the epochs up to step",
        ),
        (lambda state: state | {"history": []}, NOT_OF_THIS + "its history is not of the epochs"),
        (lambda state: state | {"history": [{"a": 1}]}, NOT_OF_THIS + "its history is not of the epochs"),
        (lambda state: state | {"optimizer": state["optimizer"] | {"state": {}}}, NOT_OF_THIS + "the optimizer has no"),
    ],
)
def test_a_state_with_another_content_is_one_line(tiny, capsys, spoil, message):
    assert tiny(stop={STEPS + 2: signal.SIGTERM}) == 143
    capsys.readouterr()
    save_checkpoint(Path("net.pkl.resume"), spoil(load_checkpoint(Path("net.pkl.resume"))))
    assert tiny() == 2
    error = capsys.readouterr().err
    assert error.startswith("train: error: net.pkl.resume: ") and message in error and error.count("\n") == 1


def test_moments_that_show_more_values_than_they_hold_are_one_line():
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    load_optimizer(optimizer, state, 1)
    state["state"][0]["exp_avg"] = torch.zeros(()).expand(2, 3)
    with pytest.raises(ValueError, match="exp_avg of a parameter holds what no step gives"):
        load_optimizer(optimizer, state, 1)


def test_what_the_options_decide_is_not_taken_from_the_state(tiny):
    assert tiny(stop={STEPS + 2: signal.SIGTERM}) == 143
    state = load_checkpoint(Path("net.pkl.resume"))
    for group in state["optimizer"]["param_groups"]:
        group["lr"] = 7.0
    save_checkpoint(Path("net.pkl.resume"), state)
    assert tiny() == 0
    tiny(file="whole")
    assert_same_network("net.pkl", "whole")


def test_a_stopped_run_may_be_given_more_epochs(tiny):
    tiny(stop={STEPS: signal.SIGTERM}, epochs=2, file="parts")
    assert tiny(epochs=4, file="parts") == 0
    tiny(epochs=4, file="whole")
    assert_same_network("parts", "whole")


def test_a_stopped_run_refuses_fewer_epochs_than_it_has_behind_it(tiny, capsys):
    tiny(stop={2 * STEPS + 1: signal.SIGTERM})  # in its third epoch
    assert tiny(epochs=2) == 2
    assert "Ask for 3 epochs or more" in capsys.readouterr().err and not Path("net.pkl").exists()
    assert tiny(epochs=3) == 0


def test_a_complete_run_is_not_repeated_and_another_is_not_overwritten(tiny, capsys):
    tiny(epochs=1)
    before = Path("net.pkl").read_bytes()
    assert tiny(epochs=1, stop={0: math.nan}) == 0  # not a single step
    assert "net.pkl is already complete; --restart" in capsys.readouterr().out
    assert tiny(epochs=2) == 2
    assert "epochs was 1, is 2" in capsys.readouterr().err
    assert Path("net.pkl").read_bytes() == before


def test_restart_forgets_what_an_earlier_run_left(tiny):
    tiny("--seed", "9", epochs=2)
    shutil.copy("net.pkl", "old")
    assert tiny() == 2  # net.pkl is of another run
    assert tiny("--seed", "8", "--restart", stop={STEPS: signal.SIGTERM}) == 143
    assert_same_network("net.pkl", "old")  # until the new one is complete
    assert tiny() == 2  # the state is of another run
    assert tiny("--restart") == 0
    tiny(file="whole")
    assert_same_network("net.pkl", "whole")


@pytest.mark.parametrize(("save_every", "kept"), [("1", 4), ("3", 3), ("10", None)])
def test_states_are_kept_every_so_many_epochs(tiny, save_every, kept):
    tiny("--save-every", save_every, epochs=6, stop={4 * STEPS + 2: math.nan})
    path = Path("net.pkl.resume")
    assert (load_checkpoint(path)["step"] if path.exists() else None) == (kept and kept * STEPS)


def test_by_default_states_take_a_twentieth_of_the_time_at_most(monkeypatch):
    model = nn.Linear(1, 1)
    state = RunState(model, torch.optim.SGD(model.parameters()), CONFIG, Recorder(name="test"), CPU, 3)
    for seconds, spent, due in [(1.0, 0.0, True), (10.0, 0.625, False), (12.0, 0.625, False), (12.5, 0.625, True)]:
        clock = SimpleNamespace(monotonic=lambda now=state.started + seconds: now)
        monkeypatch.setattr("training.run_state.time", clock)
        state.spent_saving = spent
        assert state.is_due() == due


# --- failure ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "word"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tiny, capsys, value, word):
    assert tiny(stop={STEPS + 3: value}) == 2
    error = capsys.readouterr().err
    assert f"the loss is {word} at step {STEPS + 4} (epoch 2): lower --lr, or what else was raised." in error
    assert "net.pkl.resume" in error and not Path("net.pkl").exists()
    assert tiny() == 0  # the state goes on where it was good
    tiny(file="whole")
    assert_same_network("net.pkl", "whole")


def test_a_bad_state_is_not_saved_when_a_signal_comes(tiny):
    assert tiny(stop={STEPS + 3: math.nan, STEPS + 4: signal.SIGTERM}) == 2
    assert load_checkpoint(Path("net.pkl.resume"))["step"] == STEPS


def test_progress_of_one_of_several_processes_waits_for_no_other():
    """Only the main process shows the loss: it must not begin a reduction that the others do not join."""
    model = nn.Linear(1, 1)
    several = Processes(torch.device("cpu"), rank=0, world=2)
    state = RunState(model, torch.optim.SGD(model.parameters()), CONFIG, Recorder(name="test"), several, 3)
    state.add({"loss": torch.tensor(math.nan)}, 4)
    assert math.isnan(state.latest_loss())


def test_what_a_run_killed_while_writing_left_is_removed(tiny):
    left = [".net.abcd_123", ".net.resume.zyxw9876"]
    kept = [
        ".net.pkl.abcd_123",
        ".net.pkl.resume.abcd_123",
        ".net.settings2",
        ".net.Settings",
        ".net.a1",
        ".other.abcd_123",
    ]
    for name in left + kept:
        Path(name).write_text("half a file")
    Path(".net.a_folder").mkdir()
    assert tiny(epochs=1, file="net") == 0
    assert sorted(path.name for path in Path().iterdir()) == sorted([*kept, ".net.a_folder", "net"])


def test_what_is_being_written_has_a_name_that_counts_as_left_behind(tmp_path):
    for path in (tmp_path / "net", tmp_path / "net.resume"):
        with replacing(path) as temporary:
            remove_leftovers(tmp_path / "net")
            assert not temporary.exists()
            temporary.touch()  # which is renamed at the end


@pytest.mark.parametrize("option", ["--params-dict-name", "--log"])
def test_a_path_that_cannot_be_written_is_found_before_training(tiny, capsys, option):
    Path("file").write_text("")
    assert tiny(option, "file/below.pkl", stop={0: signal.SIGTERM}) == 2
    assert "cannot write file/below.pkl" in capsys.readouterr().err


@pytest.mark.parametrize("length", [239, 246, 300])  # too long for the state, the checkpoint, any file
@pytest.mark.parametrize("more", [(), ("--restart",)])
def test_a_name_that_is_too_long_is_found_before_training(tiny, capsys, length, more):
    assert tiny(*more, file="n" * length, stop={0: signal.SIGTERM}) == 2
    error = capsys.readouterr().err
    assert re.search(r"cannot write n+(\.resume)?: the name is too long; give a shorter one\n$", error)
    assert error.count("\n") == 1 and not list(Path().iterdir())


def test_a_folder_as_output_is_refused_before_training(tiny, capsys):
    Path("folder").mkdir()
    assert tiny(file="folder", stop={0: signal.SIGTERM}) == 2
    assert "folder: it is a folder; name a file" in capsys.readouterr().err


def test_a_disk_too_full_for_the_checkpoints_is_found_before_training(tiny, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert tiny(stop={0: signal.SIGTERM}) == 2
    assert "net.pkl" in (error := capsys.readouterr().err) and "free" in error and error.count("\n") == 1


def test_a_full_disk_for_the_log_ends_in_one_line(tiny, capsys):
    assert tiny("--log", "/dev/full") == 2
    error = capsys.readouterr().err
    assert "/dev/full" in error and error.count("\n") == 1


def test_tensorboard_that_is_not_installed_is_named(tiny, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert tiny("--tensorboard", "board") == 2
    assert "pip install tensorboard" in capsys.readouterr().err


def test_tensorboard_shows_the_metrics_of_the_log(tiny):
    tiny("--tensorboard", "board", "--log", "log.jsonl", epochs=3)
    lines = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    events = EventAccumulator("board").Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "accuracy", "learning_rate", "images_per_second"}
    for name in events.Tags()["scalars"]:
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert [scalar.value for scalar in scalars] == pytest.approx([line[name] for line in lines], rel=1e-6)


def test_log_lines(tiny):
    tiny("--log", "deep/er/log.jsonl", epochs=2)
    lines = [json.loads(line) for line in Path("deep/er/log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    for line in lines:
        assert set(line) == {"epoch", "loss", "accuracy", "learning_rate", "images_per_second", "time"}
        assert line["learning_rate"] == 0.001 and line["images_per_second"] > 0 and 0 <= line["accuracy"] <= 1
        assert time.strptime(line["time"], "%Y-%m-%dT%H:%M:%S%z")
    assert lines[1]["loss"] < lines[0]["loss"] < 1.2 * math.log(11)


# --- compiling ----------------------------------------------------------------------------------


def test_a_compiled_network_ends_with_the_weights_of_one_that_is_not(monkeypatch):
    compiled, compile_ = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or compile_(model))
    data = Images(torch.randint(256, (20, 1, 4, 4), dtype=torch.uint8), torch.arange(20) % 3)
    ends = []
    for compile_model in (False, True):
        torch.manual_seed(0)  # without a bias or a nonlinearity nothing is left for a C++ compiler, which takes long
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8, bias=False), nn.Linear(8, 3, bias=False))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        objective = ClassifierObjective(augment=False)
        history = fit(model, optimizer, data, objective, CONFIG, CPU, Recorder(name="test"), compile_model)
        ends.append((model.state_dict(), [line["loss"] for line in history]))
        assert compiled == [model] * compile_model
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)
    assert ends[0][1][-1] < ends[0][1][0]


def test_a_compiler_that_is_not_installed_is_named(tiny, capsys, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "cache")
    assert tiny("--compile") == 2
    error = capsys.readouterr().err
    assert "train: error: --compile: the network cannot be compiled (InvalidCxxCompiler: " in error
    assert "C++ compiler such as g++: install one, or leave out --compile\n" in error and "Traceback" not in error
    assert not list(Path().glob("net.pkl*"))


# --- real processes -----------------------------------------------------------------------------


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def shows(output: Path, word: str) -> bool:
    """Whether a process has printed the word."""
    return output.exists() and word in output.read_text()


def options(file: Path, epochs: int) -> list[str]:
    """Of `train`, with a state after every epoch."""
    run = ["--epochs", str(epochs), "--save-every", "1", "--params-dict-name", str(file)]
    return ["--device", "cpu", "--precision", "fp32", *run]


def test_a_run_killed_at_random_moments_ends_in_the_same_network(tmp_path):
    whole, again, parts, output = (tmp_path / name for name in ("whole", "again", "parts", "output"))
    assert finish([children.start(children.train_tiny, options(whole, 15), output=output)]) == [0]
    start = time.monotonic()
    assert finish([children.start(children.train_tiny, options(again, 15), output=output)]) == [0]
    duration = time.monotonic() - start
    kills, completed, chance = 0, 0, random.Random(0)
    while kills < 8 or not completed:
        process = children.start(children.train_tiny, options(parts, 15), output=output)
        if kills % 2:  # every other kill falls into the training, however busy the machine is
            wait_for(lambda process=process: Path(f"{parts}.resume").exists() or not process.is_alive())
        process.join(chance.uniform(0, duration) if kills < 8 else 60)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), output.read_text()
        if process.exitcode:
            kills += 1
        else:
            assert_same_network(parts, whole)
            parts.unlink()
            completed += 1
    assert output.read_text().count("resuming at epoch") >= 2


def test_two_processes_stopped_by_sigterm_save_exit_143_and_resume(tmp_path):
    whole, parts, output = tmp_path / "whole", tmp_path / "parts", tmp_path / "output"
    assert finish(children.start_two(children.train_tiny, options(whole, 30), output=output)) == [0, 0]
    processes = children.start_two(children.train_tiny, options(parts, 30), output=output)
    wait_for(lambda: Path(f"{parts}.resume").exists())
    for process in processes:
        os.kill(process.pid, signal.SIGTERM)
    assert finish(processes) == [143, 143]
    assert load_checkpoint(Path(f"{parts}.resume"))["step"] < 30 * STEPS
    assert finish(children.start_two(children.train_tiny, options(parts, 30), output=output)) == [0, 0]
    assert_same_network(parts, whole)
    main_output, other_output = (Path(f"{output}.{rank}").read_text() for rank in range(2))
    assert "resuming at epoch" in main_output and main_output.count("wrote ") == 2
    assert set(other_output.splitlines()) <= {line for line in other_output.splitlines() if "stopped in epoch" in line}


@pytest.mark.parametrize(
    ("command", "signum"),
    [("train", signal.SIGINT), ("train", signal.SIGUSR1), ("eval", signal.SIGTERM), ("figure.samples", signal.SIGTERM)],
)
def test_a_command_stopped_while_it_reads_ends_in_one_line(tmp_path, monkeypatch, command, signum):
    monkeypatch.chdir(tmp_path)
    if command != "train":
        for name in COMMANDS:
            experiment = Experiment.of("same_dataset_digits", TASKS["same_dataset_digits"])
            save_network(experiment.checkpoint(name), STAGES[name].build(experiment.task), {})
    before, output = sorted(tmp_path.rglob("*.*")), tmp_path / "output"
    process = children.start(children.run_waiting_for_images, command, [], output=output)
    wait_for(lambda: shows(output, "reading\n"))
    os.kill(process.pid, signum)
    assert finish([process], 10) == [128 + signum]
    assert output.read_text() == f"reading\n{command}: stopped by {signum.name}\n"
    assert sorted(tmp_path.rglob("*.*")) == before


@pytest.mark.parametrize("moment", ["reading", "step", "nan"])
def test_one_failing_process_of_two_ends_both(tmp_path, moment):
    whole, parts, output = tmp_path / "whole", tmp_path / "parts", tmp_path / "output"
    processes = children.start_two(children.train_with_one_failing, moment, options(parts, 3), output=output)
    assert finish(processes, 20) == [2, 2]
    main_output, other_output = (Path(f"{output}.{rank}").read_text() for rank in range(2))
    if moment == "nan":  # the average is nan for both
        main = other = (
            "the loss is nan at step 15 (epoch 2): lower --lr, or what else was raised. "
            f"The last good state is kept in {parts}.resume."
        )
    else:
        main, other = "another of the 2 processes failed; see its own message", "this process fails"
    assert main_output.splitlines()[1:] == [f"train: error: {main}"]
    assert other_output.splitlines() == [f"train: error: {other}"]
    states = {path.name: load_checkpoint(path)["step"] for path in tmp_path.glob("parts*")}
    assert states == ({} if moment == "reading" else {"parts.resume": STEPS})
    for file in (parts, whole):
        assert finish(children.start_two(children.train_tiny, options(file, 3), output=output)) == [0, 0]
    assert_same_network(parts, whole)


def test_a_process_that_waits_for_another_can_be_stopped(tmp_path):
    processes = children.start_two(children.wait_for_the_other, output=tmp_path / "output")
    wait_for(lambda: shows(tmp_path / "output.0", "joining\n"))
    time.sleep(0.3)  # torch now waits where no handler of Python's would be called
    os.kill(processes[0].pid, signal.SIGTERM)
    assert finish(processes, 10) == [-signal.SIGTERM, 0]


def test_one_who_joins_computes_with_a_tuned_processor():
    torch.set_flush_denormal(False)
    with joined_processes("cpu") as processes:
        assert (torch.tensor([1e-30]) * 1e-10).item() == 0 and processes.world == 1


@pytest.mark.parametrize("count", [8, 13, 17], ids=["one batch", "unequal shares", "one image in the last batch"])
def test_two_processes_take_the_steps_of_one(tmp_path, count):
    one, two, output = tmp_path / "one", tmp_path / "two", tmp_path / "output"
    children.fit_linear(count, 3, one)
    assert finish(children.start_two(children.fit_linear, count, 3, two, output=output)) == [0, 0]
    expected, found = torch.load(one), torch.load(two)
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-6, atol=1e-7)
    for name, weights in expected["model"].items():
        torch.testing.assert_close(found["model"][name], weights, rtol=1e-5, atol=1e-6)


def test_a_full_disk_leaves_the_previous_file(tmp_path):
    path, output = tmp_path / "net.pkl", tmp_path / "output"
    path.write_bytes(b"the previous file")
    assert finish([children.start(children.save_with_little_room, path, 100_000, output=output)]) == [2]
    assert path.read_bytes() == b"the previous file"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.pkl", "output"]
    assert f"cannot write {path}" in output.read_text() and "Traceback" not in output.read_text()


# --- warm-up ------------------------------------------------------------------------------------


def test_warm_up_rises_linearly_and_stays():
    config = replace(CONFIG, learning_rate=0.4, warmup_steps=4, batch_size=4)
    schedule = warmup_schedule(config, 9)  # three steps an epoch
    assert [schedule(step / 3) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


@pytest.mark.parametrize(("kl", "remarked"), [(0.09, True), (0.1, False), (5.0, False)])
def test_a_collapsed_posterior_is_remarked_on(kl, remarked):
    assert ("posterior has collapsed" in collapse_remark({"mse": 0.0, "kl_nats": kl})) == remarked
