"""Where jobs run: on this machine, one for each GPU or a share of the cores, or as an array of a Slurm cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch  # at the top: a signal during its import would leave the step that goes on with half of it

from cli.errors import STOP_SIGNALS, Stopped, UserError, handling, raise_stopped
from cli.files import fits, read_json, write_json
from reproduction.jobs import Job, run_job
from utils import pick_device

REPOSITORY = Path(__file__).resolve().parents[1]
QUEUE = "the jobs in the queue; remove it once none of them waits or runs"
POLL_SECONDS = 0.2
FREE_SHARE = 0.9  # of the memory of a GPU that counts as free
TIME_OUTS = 30  # how often a job may continue after its time was up; submitit's 3 would end a long training


def local_slots(device: str | None, jobs: int | None, waiting: int) -> list[dict[str, str]]:
    """The environment of each of the `waiting` jobs that may run at the same time on this machine.

    Raises `UserError` when `device` is none, or no GPU is free.

    Every GPU that is free takes one job, or the one that `device` names; without GPUs `jobs` of them, or two, share the
    cores, within the limit of the environment's OMP_NUM_THREADS: small networks do not fill many.
    """
    pick_device(device)
    if device in (None, "cuda") and has_gpus():
        free = [index for index in range(torch.cuda.device_count()) if gpu_is_free(index)]
        if not free:
            raise UserError("no GPU is free: wait, name one with --device cuda:N, or use --device cpu")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
        return [{"CUDA_VISIBLE_DEVICES": names[index]} for index in free[: min(jobs or waiting, waiting)]]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(jobs or (min(2, cores) if device in (None, "cpu") else 1), waiting)
    limit = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(1, min(cores // count, int(limit)) if limit.isdecimal() else cores // count)
    return [{"OMP_NUM_THREADS": str(threads)}] * count


def has_gpus() -> bool:
    return torch.cuda.is_available()


def gpu_is_free(index: int) -> bool:
    """Whether almost all of a GPU's memory is unused."""
    free, total = torch.cuda.mem_get_info(index)
    return free / total > FREE_SHARE


def run_local(
    jobs: Sequence[Job], slots: Sequence[dict[str, str]], report: Callable[[str], None] = print
) -> dict[str, int]:
    """Run the jobs here, as many at a time as there are slots; a job that fails does not stop the others.

    When this process is stopped, so are the jobs, which save what they have; they stop too if it is killed.

    Returns:
        the exit status of each job, by name.
    """
    waiting, free, running, statuses = list(jobs), list(slots), {}, {}
    try:
        while waiting or running:
            while waiting and free:
                job, slot = waiting.pop(0), free.pop(0)
                running[job.name] = (start_job(job, slot), job, slot, time.monotonic())
            for name, (process, job, slot, start) in list(running.items()):
                if process.poll() is not None:
                    statuses[name] = process.returncode
                    free.append(slot)
                    del running[name]
                    how = f"{how_it_ended(job, process.returncode)} ({time.monotonic() - start:.0f} s)"
                    report(f"[{len(statuses)}/{len(jobs)}] {name}: {how}")
            time.sleep(POLL_SECONDS)
    finally:
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.wait()
    return statuses


def start_job(job: Job, slot: dict[str, str]) -> subprocess.Popen:
    """A process for a job, all of whose output goes to the job's log; it finds this repository from any folder."""
    # -P: what lies in the current folder is not taken for a module of ours.
    command = [sys.executable, "-P", "-m", "reproduction.jobs", str(job.folder), "--stop-with-parent"]
    with open(job.log, "ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=os.environ | import_path() | slot
        )


def import_path() -> dict[str, str]:
    """The environment in which other processes find this repository."""
    return {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])}


def how_it_ended(job: Job, status: int) -> str:
    """The end of a job in words, which go to its log, too, where a signal left it no time to say so."""
    if status < 0:
        ended = f"killed by {signal.Signals(-status).name}"
        with open(job.log, "a", encoding="utf-8") as log:
            log.write(f"{ended}{': was there enough memory?' if -status == signal.SIGKILL else ''}\n")
        return f"{ended}, see {job.log}"
    return "done" if status == 0 else f"failed with status {status}, see {job.log}"


class ClusterJob:
    """A job as submitit runs it: again from where it stood when its time is up or it is preempted.

    Slurm sends SIGTERM to warn a job that it will be killed, whether it is preempted, out of time or cancelled: the
    step under way saves what it has, and goes on. At submitit's own signal it saves what it has, too, and submitit
    puts the job into the queue again.
    """

    def __call__(self, folder: str) -> int:
        import submitit

        last_call = getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}")
        requeue = signal.getsignal(last_call)
        leaving = {128 + last_call}  # exit statuses of a step with which the job leaves

        def leave(signum: int, frame: object) -> None:
            leaving.add(128 + signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # which the step, whatever it is, knows

        with handling(raise_stopped):  # between the steps, which have handlers of their own
            if last_call not in STOP_SIGNALS:
                signal.signal(last_call, leave)
            try:
                while (status := stoppable(folder)) == 128 + signal.SIGTERM and status not in leaving:
                    pass
            finally:
                signal.signal(last_call, requeue)
        if status in leaving:
            requeue(last_call, None)  # does not return
        if status:
            raise RuntimeError(f"{folder}: exit status {status}, see log.txt there")
        return status

    def checkpoint(self, folder: str):
        """What submitit puts into the queue instead."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, folder)


def stoppable(folder: str) -> int:
    """`run_job`, with an exit status also where a signal comes between two steps."""
    try:
        return run_job(Path(folder))
    except Stopped as stop:
        return 128 + stop.signum


def submit(jobs: Sequence[Job], folder: Path, cluster: str = "slurm", **parameters: object) -> dict[str, str]:
    """Put those jobs into the queue, as one array, that are not in it already.

    Args:
        folder: of submitit's files.
        cluster: "slurm", or "local" to try the same on this machine.
        parameters: of submitit's AutoExecutor, such as timeout_min, slurm_partition, gpus_per_node.

    Returns:
        the number in the queue of each job, by name.

    Raises:
        UserError: submitit is not installed, there is no Slurm here, a parameter is invalid, or Slurm refuses the jobs.
    """
    try:
        import submitit
        from submitit.core.utils import FailedSubmissionError, UncompletedJobError
    except ImportError:
        raise UserError("--launcher slurm needs submitit: pip install submitit") from None
    time_outs = parameters.pop("slurm_max_num_timeout", TIME_OUTS)  # of the executor itself, not of what it submits
    if not isinstance(time_outs, int):
        raise UserError(f"--slurm slurm_max_num_timeout={time_outs}: expected a whole number")
    queue, numbers = folder / "queue.json", submitted_before(folder)
    waiting = [job for job in jobs if not is_queued(numbers.get(job.name), folder, cluster)]
    if waiting:
        try:
            executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=time_outs)
        except RuntimeError as error:
            raise UserError(f"--launcher slurm: {error}; run it where sbatch is, or use --launcher local") from None
        for name, value in parameters.items():  # one by one, so that the wrong one can be named
            try:
                executor.update_parameters(**{name: value})
            except (NameError, TypeError, ValueError, AssertionError) as error:
                reason = str(error).partition("\n")[0]
                raise UserError(f"--slurm {name}={value}: submitit does not take it: {reason}") from None
        try:
            os.environ.update(import_path())  # which the jobs inherit
            submitted = executor.map_array(ClusterJob(), [str(job.folder) for job in waiting])
        except (UncompletedJobError, FailedSubmissionError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), "it gives no reason")
            raise UserError(f"--launcher slurm: sbatch refuses the jobs: {reason}; correct --slurm") from None
        numbers |= {job.name: one.job_id for job, one in zip(waiting, submitted, strict=True)}
        write_json(queue, numbers)
    return {job.name: numbers[job.name] for job in jobs}


def submitted_before(folder: Path) -> dict[str, str]:
    """The number in the queue that each job had last, by name."""
    queue = folder / "queue.json"
    numbers = read_json(queue, {}, QUEUE) if queue.is_file() else {}
    if not fits(list(numbers.values()), [str]):
        raise UserError(f"{queue}: holds something else; expected {QUEUE}")
    return numbers


def ended(jobs: Sequence[Job], folder: Path, cluster: str = "slurm") -> list[Job]:
    """Those of the unfinished `jobs` that were submitted before and are neither waiting nor running."""
    numbers = submitted_before(folder)
    return [job for job in jobs if job.name in numbers and not is_queued(numbers[job.name], folder, cluster)]


def is_queued(number: str | None, folder: Path, cluster: str) -> bool:
    """Whether a job that was submitted before is still waiting or running."""
    import submitit

    if number is None:
        return False
    kind = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}[cluster]
    return kind(folder, number).state in ("PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "CONFIGURING")
