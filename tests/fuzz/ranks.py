"""Faults on one of several ranks, at random: every rank must end with an error, and none may wait.

    python -m tests.fuzz.ranks --cases 1000 --seed 0      # about ten minutes on two cores

In each case two processes train for some steps, with a random method, engine and window. On a
random rank at a random step something goes wrong. A rank that an exception ends closes its
connections, as a process does that exits. What must come out: an error on every rank within
seconds; or, of what is no fault (a batch without a sample, a loss on one rank alone), the same
student and weight net on all.
"""

import argparse
import collections
import gc
import random
import time

import torch

from tests import ranks
from tests.test_distributed import Program, Setting

STEPS, LATEST, SECONDS = 9, 4, 30
HARMLESS = ("nothing", "an empty batch", "another loss")


class Fault(Exception):
    """What a user's code raises."""


class Faulty(Program):
    """A script in which `fault` befalls one rank at one step."""

    def __init__(self, case, rank, size):
        self.case, self.befalls = case, rank == case["rank"]
        super().__init__(Setting(optimizer=case["optimizer"], bilevel=case["bilevel"]), rank, size)
        del self.shards[STEPS:]
        self.optimizer._steps.meta_set._loader = self.batches()
        self.student.register_forward_hook(self.in_student)
        self.optimizer.optimizer.register_step_pre_hook(self.in_step)

    @property
    def now(self):
        return self.befalls and self.step == self.case["step"]

    def is_now(self, *faults):
        return self.now and self.case["fault"] in faults

    def raise_now(self, fault):
        if self.is_now(fault):
            raise Fault(fault)

    def batches(self):
        while True:
            for batch in self.meta:
                self.raise_now("the meta loader raises")
                yield batch

    def in_student(self, student, args, output):
        if not torch.is_grad_enabled() or output.grad_fn is None:
            self.raise_now("the student raises where it is replayed")

    def in_step(self, *_):
        self.raise_now("a hook of the step raises")

    def plain(self, rank, inputs, teacher_logits, labels):
        if self.is_now("an empty batch"):
            inputs, teacher_logits, labels = inputs[:0], teacher_logits[:0], labels[:0]
        if self.is_now("a batch that is not finite"):
            inputs = inputs * torch.nan
        self.raise_now("the loop raises before backward")
        output = self.called(inputs)
        loss = self.criterion(output, teacher_logits, labels)
        if self.is_now("another loss"):
            loss = loss + 0.1 * output.square().mean()
        if self.is_now("no loss"):
            loss = output.sum()
        loss.backward()
        self.raise_now("the loop raises after backward")
        if self.is_now("an input is overwritten"):
            inputs.zero_()
        if self.is_now("gradients are changed"):
            self.student.fc1.weight.grad.cos_()
        if self.is_now("parameters are changed"):
            self.student.fc1.weight.data.mul_(2)
        if self.is_now("the weight net is changed"):
            self.criterion.phi[0].data.add_(1)
        # elsewhere DistributedDataParallel's own passes no longer meet
        if self.is_now("the gradients are dropped") and self.optimizer._steps.recorder.active:
            self.optimizer.zero_grad()
            self.criterion(self.called(inputs), teacher_logits, labels).backward()


FAULTS = (
    *HARMLESS,
    "the meta loader raises",
    "the student raises where it is replayed",
    "a hook of the step raises",
    "a batch that is not finite",
    "the loop raises before backward",
    "the loop raises after backward",
    "no loss",
    "an input is overwritten",
    "gradients are changed",
    "parameters are changed",
    "the weight net is changed",
    "the gradients are dropped",
)


def draw(seed):
    rng = random.Random(seed)
    method = rng.choice(["online", "online", "lookahead", "paper"])
    unroll = rng.choice([1, 1, 2, 3])
    bilevel = {
        "method": method,
        "engine": rng.choice(["adjoint", "unroll"]),
        "unroll": unroll,
        "every": unroll + rng.choice([0, 0, 1]),
        "accumulate": rng.choice([1, 1, 2]),
    }
    return {
        "fault": rng.choice(FAULTS),
        "rank": rng.randrange(2),
        "step": rng.randrange(LATEST + 1),
        "optimizer": rng.choice(["sgd-momentum", "adamw"]),
        "bilevel": bilevel,
    }


def befall(case, rank, size):
    start = time.monotonic()
    found = error = program = None
    try:
        program = Faulty(case, rank, size)
        found = program.train()
    except Exception as e:
        error = f"{type(e).__name__}: {e}"
    del program
    gc.collect()  # a process that exits closes its connections
    return found, error, time.monotonic() - start


def verdict(case, results):
    """What is wrong with the outcome; None where nothing is."""
    for result in results:
        if isinstance(result, ranks.Failure):
            return result.traceback
    found, errors, seconds = zip(*results)
    if max(seconds) > SECONDS:
        return f"a rank took {max(seconds):.0f} s: {errors}"
    if any(errors) and not all(errors):
        return f"not every rank ended with an error: {errors}"
    if any(errors):
        return f"was refused: {errors}" if case["fault"] in HARMLESS else None
    for part in ("student", "weight net"):
        if not all(map(torch.equal, *(f[part] for f in found))):
            return f"the ranks have different parts: {part}"
    return None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cases = {seed: draw(seed) for seed in range(options.seed, options.seed + options.cases)}
    start = time.monotonic()
    outcomes = ranks.run({seed: (befall, case) for seed, case in cases.items()})
    counts = collections.Counter()
    for seed, case in cases.items():
        wrong = verdict(case, outcomes[seed])
        ended = wrong is None and outcomes[seed][0][1] is not None
        counts[case["fault"], "wrong" if wrong else "error" if ended else "trained"] += 1
        if wrong:
            print(seed, case, "\n   ", wrong)
    for (fault, outcome), count in sorted(counts.items()):
        print(f"{fault:45s} {outcome:8s} {count}")
    longest = max(r[2] for results in outcomes.values() for r in results)
    print(f"{len(cases)} cases, {time.monotonic() - start:.0f} s, the longest {longest:.1f} s")


if __name__ == "__main__":
    main()
