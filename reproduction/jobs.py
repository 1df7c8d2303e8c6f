"""A job: the commands that make the results of one partition and one training seed, in a folder of its own.

    python -m reproduction.jobs FOLDER

runs what is still to do of the job that FOLDER/job.json describes. Every step is one of the repository's commands and
resumes by itself; what is done is recorded in FOLDER/done.json with the options it was done with.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from cli.errors import Stopped, UserError, run_command
from cli.files import fits, read_json, write_json
from datasets.search import state_of
from datasets.tasks import BackboneChoice
from reproduction.results import read_ablations, read_reported
from training.config import resume_path

ARCHIVES = {".pkl": "/data.pkl", ".resume": "/data.pkl", ".npz": ".npy"}  # zip archives, and what is in them by its end
RESULT_READERS = {
    "eval": read_reported,
    "reproduction.ablations": read_ablations,
}  # module -> of its JSON file

try:
    import fcntl
except ImportError:  # no advisory locks there: then do not start the same job twice at once
    fcntl = None


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        module: of the command, such as "train".
        argv: its options; with other options, or another content of the user's folders and files that they name, it is
            another step, which has to be done again.
        outputs: the files it writes.
    """

    name: str
    module: str
    argv: tuple[str, ...]
    outputs: tuple[Path, ...]

    @property
    def starts_from(self) -> Path | None:
        """The classifier that it is trained on, if it is."""
        return Path(self.argv[self.argv.index("--classifier") + 1]) if "--classifier" in self.argv else None

    @property
    def reads(self) -> list[str]:
        """The state of what it reads of the user's own: images by folder, of which train needs no OOD images, and the
        weights or code of a backbone."""
        flags = ("--ind-dir", "--backbone-weights", *(("--ood-dir",) if self.module != "train" else ()))
        given = [self.argv[i + 1] for i, word in enumerate(self.argv) if word in flags]
        try:
            states = [*map(state_of_input, given), state_of_backbone(own_backbone(self.argv))]
        except UserError:  # an image went meanwhile, or the backbone cannot be made
            return ["changing"]
        return [state for state in states if state]

    def is_intact(self, path: Path, thorough: bool = False) -> bool:
        """Whether an output can be read as what it is, as far as a quick look tells; or a `thorough` one, which reads
        all of it."""
        if not path.is_file():  # nor a pipe, which would be waited for
            return False
        if path.suffix in ARCHIVES:
            return is_whole_archive(path, ARCHIVES[path.suffix], thorough)
        if path.suffix == ".png":
            return is_whole_picture(path)
        try:
            RESULT_READERS.get(self.module, os.stat)(path)
        except (OSError, UserError):
            return False
        return path.is_file()

    def forget_broken(self) -> None:
        """Remove what an earlier attempt left and nobody can read: it is made anew."""
        states = [resume_path(path) for path in self.outputs]
        for path in (*self.outputs, *states):
            if path.is_file() and not self.is_intact(path, thorough=True):
                print(f"{path} cannot be read: it is made again")
                path.unlink()
            elif path.is_file() and self.starts_from and path.stat().st_mtime < self.starts_from.stat().st_mtime:
                print(f"{path} is of another classifier: it is made again")
                path.unlink()


@dataclass(frozen=True)
class Job:
    """Steps in their order; each needs those before it.

    Attributes:
        machine: options of every step that change no result: where the images are, on which device.
    """

    folder: Path
    steps: tuple[Step, ...]
    machine: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def write(self) -> None:
        """Leave the job where `read_job` finds it."""
        write_json(self.folder / "job.json", json.loads(json.dumps(asdict(self), default=str)))

    def recorded(self) -> dict[str, dict]:
        """For each step that was ever done its options, then, and seconds; what cannot be read counts as not done."""
        try:
            content = read_json(self.folder / "done.json", {}, "what is done of a job")
        except UserError:
            return {}
        shape = {"argv": [str], "seconds": float, "reads": ([str],)}
        return {name: record for name, record in content.items() if fits(record, shape)}

    def records(self) -> dict[str, dict]:
        """What is done: for each step, from the first, its options and seconds; nothing after a gap."""
        found, recorded = {}, self.recorded()
        for step in self.steps:
            record = recorded.get(step.name)
            if not record or record["argv"] != list(step.argv) or not all(map(step.is_intact, step.outputs)):
                break
            if record.get("reads", []) != step.reads:
                break
            found[step.name] = record
        return found

    @property
    def is_done(self) -> bool:
        return len(self.records()) == len(self.steps)


def state_of_input(value: str) -> str:
    """What changes when the folder or file that an option names does; empty where there is none."""
    path = Path(value)
    if path.is_dir():
        return state_of(path)
    return state_of(path.parent, [path.name]) if path.is_file() else ""


def own_backbone(argv: Sequence[str]) -> BackboneChoice | None:
    """The backbone of the user's own code that options name, if they do."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--backbone", default="")
    parser.add_argument("--image-size", type=int)
    args, _ = parser.parse_known_args(argv)
    return BackboneChoice(args.backbone, None, args.image_size) if ":" in args.backbone else None


@functools.cache  # in this process the user's code stays as it was imported
def state_of_backbone(choice: BackboneChoice | None) -> str:
    """What changes when a backbone does, wherever its code and weights are; empty where there is none. Raises
    `UserError`."""
    if choice is None:
        return ""
    from training.backbone import identity, load_backbone

    return json.dumps(identity(load_backbone(choice)))


def is_whole_archive(path: Path, end: str, thorough: bool) -> bool:
    """Whether a file is a zip archive with a member whose name ends in `end`, and all members have their checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            held = any(name.endswith(end) for name in archive.namelist())
            return held and not (thorough and archive.testzip())
    except Exception:  # zipfile lets through whatever a damaged archive makes it stumble over
        return False


def is_whole_picture(path: Path) -> bool:
    """Whether a picture's parts have their checksums, up to the last."""
    try:
        with Image.open(path) as image:
            image.verify()
    except Exception:  # Pillow lets through whatever a damaged file makes its readers stumble over
        return False
    return True


def read_job(folder: Path) -> Job:
    """The job that `Job.write` left in `folder`. Raises `UserError`."""
    step = {"name": str, "module": str, "argv": [str], "outputs": [str]}
    shape = {"folder": str, "steps": [step], "machine": [str]}
    try:
        content = read_json(Path(folder) / "job.json", shape, "a job")
    except UserError:
        raise UserError(f"{folder}: holds no job; name a folder that python -m reproduce made for a job") from None
    steps = tuple(
        Step(step["name"], step["module"], tuple(step["argv"]), tuple(map(Path, step["outputs"])))
        for step in content["steps"]
    )
    return Job(Path(content["folder"]), steps, tuple(content["machine"]))


def run_job(folder: Path) -> int:
    """Do what is left of a job, logging to its folder; return the exit status of the step that failed, or 0.

    Another process that runs the same job is waited for, where there are locks.
    """
    job = read_job(folder)
    with (
        open(job.log, "a", buffering=1, encoding="utf-8", errors="backslashreplace") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        if fcntl is not None:
            fcntl.flock(log, fcntl.LOCK_EX)
        for step in job.steps:
            records = job.records()
            if step.name in records:
                continue
            print(f"$ python -m {' '.join([step.module, *step.argv, *job.machine])}")
            start, reads = time.monotonic(), step.reads
            step.forget_broken()
            status = run_step(step, job.machine)
            before = job.recorded().get(step.name)
            if status == 2 and step.module == "train" and before and before.get("reads", []) != reads:
                print("what it was trained on has changed: it is trained again")
                status = run_step(step, (*job.machine, "--restart"))
            if status:
                return status
            record = {"argv": list(step.argv), "seconds": round(time.monotonic() - start, 1)}
            record |= {"reads": reads} if reads else {}
            write_json(job.folder / "done.json", records | {step.name: record})
    return 0


def run_step(step: Step, more: Sequence[str]) -> int:
    """The exit status of a step's command, with `more` options."""
    try:
        command = importlib.import_module(step.module)
        return run_command(command.main, command.get_parser(), [*step.argv, *more])
    except Exception:  # unforeseen: it belongs in the log, too
        traceback.print_exc()
        return 1
    except SystemExit as refusal:  # of an option
        return refusal.code


def last_line(path: Path) -> str:
    """The last line of a log that is not empty."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "nothing was logged"


def stop_with_parent() -> None:
    """Stop this process, as SIGTERM does, when the one that holds the other end of its standard input is gone."""

    def watch() -> None:
        while sys.stdin.buffer.raw.read(1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "reproduction.jobs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="Folder of the job")
    parser.add_argument("--stop-with-parent", action="store_true", help="Stop when standard input is closed")
    return parser


def main(args: argparse.Namespace) -> int:
    if args.stop_with_parent:
        stop_with_parent()
    status = run_job(args.folder)
    if args.stop_with_parent:  # which reads the log, where all is said
        return status
    if status > 128:
        raise Stopped("stopped; the same command goes on from there", status - 128)
    if status:
        raise UserError(last_line(read_job(args.folder).log))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
