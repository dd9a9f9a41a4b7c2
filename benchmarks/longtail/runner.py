"""Works through a plan: every run that has no result yet, in as many processes as wanted."""

from __future__ import annotations

import datetime
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from tqdm import tqdm

from longtail import results
from longtail.afterwards import AFTERWARDS, Predict, predict_with
from longtail.data import Raw, Split, Task, load_raw
from longtail.fit import Machine, Progress, fit
from longtail.methods import Method, make_method
from longtail.metrics import evaluate
from longtail.models import build
from longtail.plan import Run
from longtail.protocol import Protocol
from longtail.tally import Tally
from longtail.teachers import Teacher, obtain_teacher, teacher_path


@dataclass(frozen=True)
class Job:
    """What every process of an invocation is told.

    Attributes:
        protocol: the settings.
        runs: in order.
        data: where the images are.
        cache: for teachers, checkpoints and locks.
        out: the file of results.
        machine: where to compute.
        threads: of torch on the CPU; None leaves its default.
    """

    protocol: Protocol
    runs: tuple[Run, ...]
    data: Path | None
    cache: Path
    out: Path
    machine: Machine
    threads: int | None


class Setting:
    """A protocol at one imbalance, with its data and teachers loaded once."""

    def __init__(self, raw: Raw, job: Job, imbalance: float) -> None:
        self.protocol = job.protocol.replace(imbalance=imbalance)
        self.task = Task(raw, self.protocol, job.machine.device)
        self._job = job
        self._teachers: dict[str, Teacher] = {}

    def teacher(self, kind: str) -> Teacher | None:
        """The teacher, trained if need be; None while another process trains it."""
        if kind not in self._teachers:
            path = teacher_path(self._job.cache, kind, self.task, self.protocol)
            with results.claim(path.with_suffix(".lock")) as mine:
                if not mine and not path.exists():
                    return None
                if not path.exists():
                    imbalance = self.protocol.imbalance
                    tqdm.write(f"training the {kind} teacher for imbalance {imbalance:g}")
                args = (kind, self.task, self.protocol, self._job.machine, self._job.cache)
                self._teachers[kind] = obtain_teacher(*args)
        return self._teachers[kind]


def work(job: Job, tally: Tally, show: Callable[[], None] = lambda: None) -> None:
    """Does what is left of the plan and is not being done by another process.

    Args:
        job: the plan.
        tally: of its runs.
        show: called when the tally has changed.
    """
    if job.threads:
        torch.set_num_threads(job.threads)
    raw = load_raw(job.protocol.dataset, job.data)
    imbalances = dict.fromkeys(run.imbalance for run in job.runs)
    settings = {imbalance: Setting(raw, job, imbalance) for imbalance in imbalances}
    identities = {run: _identity(run, settings[run.imbalance]) for run in job.runs}

    def without_result(runs: Iterable[Run]) -> list[Run]:
        finished = {record.get("id") for record in results.read(job.out)}
        left = [run for run in runs if identities[run] not in finished]
        for run in set(runs) - set(left):
            tally.finished(run)
        show()
        return left

    waiting = without_result(job.runs)
    while waiting:
        later = []
        for run in waiting:
            with results.claim(job.cache / "locks" / identities[run]) as mine:
                if not mine or not without_result([run]):
                    continue

                def advance(share: float, found: bool = False, run: Run = run) -> None:
                    tally.add(run, share, found)
                    show()

                try:
                    if not _do(run, identities[run], settings[run.imbalance], job, advance):
                        later.append(run)
                except Exception:  # one run that fails must not end a long plan
                    traceback.print_exc()
        waiting = later
        if waiting:
            time.sleep(2)


def _identity(run: Run, setting: Setting) -> str:
    return setting.protocol.digest(run.method, run.teacher, run.seed, setting.task.digest)


def _do(run: Run, identity: str, setting: Setting, job: Job, advance: Callable) -> bool:
    """Makes the result of one run; False where its teacher is still being trained elsewhere."""
    task, protocol = setting.task, setting.protocol
    teacher = None
    if run.teacher != "none":
        teacher = setting.teacher(run.teacher)
        if teacher is None:
            return False
    logits = None if teacher is None else teacher.logits
    method = make_method(run.method, task, protocol, run.seed)
    candidates = method.candidates()
    trained = []
    for number, candidate in enumerate(candidates):
        student = build(protocol.student, task.num_classes, run.seed)
        checkpoint = job.cache / "runs" / f"{identity}-{number}.pt"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        done = fit(
            student,
            candidate,
            protocol.epochs,
            logits,
            job.machine,
            checkpoint=checkpoint,
            advance=lambda share, found=False: advance(share / len(candidates), found),
        )
        decisive: Split = getattr(task, method.chosen_on)
        score = evaluate(predict_with(student)(decisive.inputs), decisive.targets, task.groups)
        trained.append((score["overall"], candidate, student, done))
    _, best, student, progress = max(trained, key=lambda entry: entry[0])
    progress.seconds = sum(entry[3].seconds for entry in trained)
    progress.cpu_seconds = sum(entry[3].cpu_seconds for entry in trained)

    common = {
        "run": identity,
        "protocol": protocol.name,
        "dataset": protocol.dataset,
        "imbalance": run.imbalance,
        "teacher": Path(run.teacher).stem,
        "seed": run.seed,
        "settings": protocol.settings(),
        "data_digest": task.digest,
        "class_counts": task.counts.tolist(),
        "groups": task.groups,
        "teacher_metrics": teacher and teacher.metrics,
        "teacher_seconds": teacher and round(teacher.seconds, 1),
        "machine": _describe(job),
        "versions": results.versions(),
        "commit": results.commit(),
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    rows = []
    for name in best.derived:
        predict = AFTERWARDS[name](student, task, protocol, run.seed)
        row = _row(f"{run.method}+{name}", predict, task, progress)
        rows.append({**common, "id": f"{identity}+{name}", **row})
    own = _row(run.method, predict_with(student), task, progress)
    own |= {"options": _options(best), "weights": progress.weights, "meta": progress.metrics}
    # The run's own row comes last: without it the run counts as not done.
    results.append(job.out, [*rows, {**common, "id": identity, **own}])
    return True


def _row(name: str, predict: Predict, task: Task, progress: Progress) -> dict[str, Any]:
    def on(split: Split) -> dict[str, Any] | None:
        if not len(split.targets):
            return None
        return evaluate(predict(split.inputs), split.targets, task.groups)

    return {
        "method": name,
        "seconds": round(progress.seconds, 2),
        "cpu_seconds": round(progress.cpu_seconds, 2),
        "test": on(task.test),
        "validation": on(task.validation),
        "meta_set": on(task.meta_set),
    }


def _options(method: Method) -> dict[str, Any]:
    return {"class": type(method).__name__} | getattr(method, "options", {})


def _describe(job: Job) -> dict[str, Any]:
    device = job.machine.device
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "threads": torch.get_num_threads(),
        "amp": job.machine.amp,
        "compile": job.machine.compile,
        "peak_memory": torch.cuda.max_memory_allocated(device) if on_gpu else None,
    }


def estimated_cost(run: Run) -> float:
    """The cost of a run in plain runs, roughly."""
    if "bikd" in run.method:
        return 5.0 if "paper" in run.method or "lookahead" in run.method else 4.0
    return 3.0 if run.method == "kd-chosen" else 1.0


def execute(job: Job, processes: int) -> None:
    """Works off the plan under a progress bar for all of it.

    Args:
        job: the plan.
        processes: that share it, and the GPU if there is one; 1 stays in this process.
    """
    tally = Tally({run: estimated_cost(run) for run in job.runs})
    form = "{percentage:3.0f}%|{bar}| {n:.1f}/{total:.0f} plain runs [{elapsed}<{remaining}]"
    with tqdm(total=0, bar_format=form, mininterval=5, smoothing=0) as bar:
        if processes == 1:
            work(job, tally, lambda: tally.show(bar))
            return
        context = multiprocessing.spawn(_worker, (job, tally), processes, join=False)
        while not context.join(timeout=5):
            tally.show(bar)
        tally.show(bar)


def _worker(index: int, job: Job, tally: Tally) -> None:
    def follow_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            raise SystemExit("the process that started this one is gone.")

    work(job, tally, follow_parent)
