"""Several processes train what one process trains on all the data, in float64 to rounding."""

import inspect
import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.nn.functional import all_reduce
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from kd_balance.check import check_hypergradient
from kd_balance.data import BalancedBatches
from tests import ranks
from tests.students import (
    CLASSES,
    EVERY_STEP,
    MLP,
    OPTIMIZERS,
    Run,
    logits_of,
    relative_error,
)

STEPS = 10
SIZE = 2


@dataclass
class Setting:
    """How the loop differs from the plainest one."""

    student: str = "mlp"
    loop: str = "plain"
    zero: bool = False
    sharded: bool = False
    optimizer: str = "sgd-momentum"
    batch: tuple[int, ...] = (6, 6, 6, 6)  # by rank
    bilevel: dict[str, Any] = field(default_factory=dict)
    net: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-9


THREE = {"unroll": 3, "every": 3}
SETTINGS = {
    **{
        f"{engine}, {optimizer}, unroll {unroll}": Setting(
            optimizer=optimizer,
            bilevel={"engine": engine, **({} if unroll == 1 else THREE)},
        )
        for engine in ("adjoint", "unroll")
        for optimizer in ("sgd-momentum", "adamw")
        for unroll in (1, 3)
    },
    **{
        f"{method}, {optimizer}": Setting(
            optimizer=optimizer, batch=(6, 4, 5, 9), bilevel={"method": method, "every": 2}
        )
        for method in ("lookahead", "paper")
        for optimizer in ("sgd-momentum", "adamw")
    },
    "batch norm": Setting("conv", bilevel={"unroll": 3, "every": 4}),
    "batch norm, unrolled": Setting("conv", bilevel={"engine": "unroll", **THREE}),
    "dropout": Setting("transformer", bilevel=THREE),
    "tied, uneven": Setting("tied", batch=(3, 8, 1, 5), bilevel=THREE),
    "hypergradients averaged": Setting(bilevel={"accumulate": 3}),
    "weights of a fixed mean": Setting(batch=(3, 8, 1, 5), net={"mean": 0.5}, bilevel=THREE),
    "micro-batches": Setting(loop="micro_batches", bilevel=THREE),
    "no_sync": Setting(loop="no_sync", bilevel=THREE),
    "no_sync, lookahead": Setting(loop="no_sync", bilevel={"method": "lookahead"}),
    "clipped": Setting(loop="clipped", bilevel=THREE),
    "clipped, unrolled": Setting(loop="clipped", bilevel={"engine": "unroll"}),
    "another loss on one rank": Setting(loop="another_loss"),
    "another loss, unrolled": Setting(loop="another_loss", bilevel={"engine": "unroll"}),
    "all ignored on one rank": Setting(loop="ignored", bilevel=THREE),
    "an empty batch": Setting(batch=(6, 0, 2, 5), bilevel=THREE),
    "GradScaler": Setting(loop="scaled", bilevel=THREE),
    "GradScaler, told": Setting(loop="scaled", bilevel={"grad_scaler": True, **THREE}),
    "GradScaler, lookahead": Setting(
        loop="scaled", bilevel={"grad_scaler": True, "method": "lookahead"}
    ),
    "an overflow on one rank": Setting(loop="overflowing", bilevel=THREE),
    "autocast": Setting(loop="autocast", bilevel=THREE, dtype=torch.float32, tolerance=1e-3),
    "find_unused_parameters": Setting(
        "branching", bilevel=THREE, ddp={"find_unused_parameters": True}
    ),
    "find_unused_parameters, unrolled": Setting(
        "branching", bilevel={"engine": "unroll", **THREE}, ddp={"find_unused_parameters": True}
    ),
    "static_graph": Setting(bilevel=THREE, ddp={"static_graph": True}),
    "static_graph, another loss": Setting(loop="another_loss", ddp={"static_graph": True}),
    "gradient_as_bucket_view": Setting(bilevel=THREE, ddp={"gradient_as_bucket_view": True}),
    "gradient_as_bucket_view, lookahead": Setting(
        loop="no_sync", bilevel={"method": "lookahead"}, ddp={"gradient_as_bucket_view": True}
    ),
    **{
        f"ZeRO, {optimizer}, {name}": Setting(optimizer=optimizer, zero=True, bilevel=bilevel)
        for optimizer in ("sgd-momentum", "adamw")
        for name, bilevel in {
            "three steps": THREE,
            "finite differences": {"step_derivative": "finite_difference"},
            "lookahead": {"method": "lookahead"},
            "paper": {"method": "paper"},
        }.items()
    },
    "ZeRO, clipped": Setting("conv", loop="clipped", zero=True, bilevel=THREE),
    "FSDP, another loss": Setting(loop="another_loss", sharded=True),
    "FSDP, adamw": Setting(
        optimizer="adamw", batch=(6, 4, 5, 9), sharded=True, bilevel={"unroll": 4, "every": 5}
    ),
    "FSDP, unrolled": Setting(
        loop="clipped", sharded=True, bilevel={"engine": "unroll", **THREE}
    ),
    "FSDP, adamw, unrolled": Setting(
        optimizer="adamw", batch=(6, 4, 5, 9), sharded=True, bilevel={"engine": "unroll", **THREE}
    ),
    "FSDP, clipped": Setting("conv", loop="clipped", sharded=True, bilevel=THREE),
    "FSDP, frozen, two calls": Setting("frozen", loop="two_calls", sharded=True, bilevel=THREE),
    "FSDP, tied": Setting(
        "tied", loop="micro_batches", optimizer="adamw", sharded=True, bilevel=THREE
    ),
    "FSDP, lookahead": Setting(
        optimizer="adamw", loop="no_sync", sharded=True, bilevel={"method": "lookahead"}
    ),
    "FSDP, GradScaler": Setting(
        "transformer", loop="overflowing", sharded=True, bilevel={"grad_scaler": True, **THREE}
    ),
    "SyncBatchNorm": Setting("conv", loop="synchronised", bilevel=THREE),
    "SyncBatchNorm, unrolled": Setting(
        "conv", loop="synchronised", bilevel={"engine": "unroll", **THREE}
    ),
    "SyncBatchNorm, lookahead": Setting(
        "conv", loop="synchronised", bilevel={"method": "lookahead"}
    ),
    "compiled": Setting("conv", loop="compiled", bilevel=THREE),
    "small buckets": Setting("conv", bilevel=THREE, ddp={"bucket_cap_mb": 1e-4}),
}


class Program:
    """A training script; `rank` None is one process that has the data of all ranks."""

    def __init__(self, setting, rank, size):
        self.setting, self.size = setting, size
        self.ranks = range(size) if rank is None else [rank]
        run = Run(setting.student, setting.dtype)
        self.shards = [
            [(run.inputs(n), run.teacher_logits(n), run.labels(n)) for n in setting.batch[:size]]
            for _ in range(STEPS)
        ]
        meta = [[(run.inputs(7), run.labels(7)) for _ in range(size)] for _ in range(STEPS)]
        meta_forward = None
        if rank is None or setting.student == "transformer":
            meta_forward = _one_after_the_other
            if setting.loop == "synchronised":
                meta_forward = _at_once
            meta = [list(enumerate(batches)) for batches in meta]
        if rank is not None:
            meta = [b[rank] if meta_forward is None else b[rank : rank + 1] for b in meta]
        self.meta = meta
        self.student = self.called = run.student
        torch.manual_seed(rank or 0)
        net = MetaWeightNet(hidden=(8,), **setting.net).to(setting.dtype)
        if setting.sharded and rank is not None:
            mesh = init_device_mesh("cpu", (size,))
            layers = [*self.student.children()]  # the last is left to the student itself
            for part in [layers] if setting.student == "tied" else layers[:-1]:
                fully_shard(part, mesh=mesh)
            fully_shard(self.student, mesh=mesh)
        elif rank is not None:
            with torch.no_grad():  # rank 0's is everyone's
                for tensor in self.student.state_dict().values():
                    tensor += rank
            self.called = DistributedDataParallel(self.student, **setting.ddp)
            if setting.loop == "compiled":
                self.called = torch.compile(self.called, backend="eager")
            if setting.loop == "synchronised":  # which DistributedDataParallel refuses on a CPU
                nn.SyncBatchNorm.convert_sync_batchnorm(self.student)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        bilevel = dict(setting.bilevel)
        if bilevel.get("grad_scaler"):
            bilevel["grad_scaler"] = self.scaler
        self.criterion = WeightedKDLoss(net, temperature=2.0)
        self.optimizer = BilevelOptimizer(
            self.student_optimizer(shared=setting.zero and rank is not None),
            self.called,
            self.criterion,
            meta,
            meta_forward=meta_forward,
            **{**EVERY_STEP, "meta_optimizer": torch.optim.Adam(net.parameters(), 0.1),
               **bilevel},
        )

    def student_optimizer(self, shared):
        optimizer = OPTIMIZERS[self.setting.optimizer](self.student.parameters())
        if not shared:
            return optimizer
        accepted = inspect.signature(type(optimizer)).parameters
        options = {k: v for k, v in optimizer.defaults.items() if k in accepted}
        return ZeroRedundancyOptimizer(self.student.parameters(), type(optimizer), **options)

    def plain(self, rank, inputs, teacher_logits, labels):
        self.loss(inputs, teacher_logits, labels).backward()

    compiled = plain

    def micro_batches(self, rank, *batch):
        for part in zip(*(tensor.chunk(2) for tensor in batch)):
            (self.loss(*part) / 2).backward()

    def no_sync(self, rank, *batch):
        first, second = zip(*(tensor.chunk(2) for tensor in batch))
        self.averages(False)
        with getattr(self.called, "no_sync", nullcontext)():
            (self.loss(*first) / 2).backward()
        self.averages(True)
        (self.loss(*second) / 2).backward()

    def averages(self, flag):
        if hasattr(self.called, "set_requires_gradient_sync"):
            self.called.set_requires_gradient_sync(flag)

    def two_calls(self, rank, *batch):
        losses = [self.loss(*part) / 2 for part in zip(*(tensor.chunk(2) for tensor in batch))]
        sum(losses).backward()
        if rank == self.ranks[-1]:
            with torch.no_grad():
                self.called(batch[0])

    def clipped(self, rank, *batch):
        self.loss(*batch).backward()
        if rank == self.ranks[-1]:
            nn.utils.clip_grad_norm_(self.student.parameters(), 0.1)

    def another_loss(self, rank, inputs, teacher_logits, labels):
        output = logits_of(self.called(inputs))
        loss = self.criterion(output, teacher_logits, labels)
        if rank == 1:
            loss = loss + 0.1 * output.square().mean()
        (loss / len(self.ranks)).backward()

    def ignored(self, rank, inputs, teacher_logits, labels):
        if rank == 1:
            labels = labels.fill_(-100)
        self.loss(inputs, teacher_logits, labels).backward()

    def scaled(self, rank, *batch):
        self.scaler.scale(self.loss(*batch)).backward()

    def overflowing(self, rank, *batch):
        overflows = rank == 1 and self.step in (1, 5)
        self.scaler.scale(self.loss(*batch) * (torch.inf if overflows else 1)).backward()

    def autocast(self, rank, *batch):
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.loss(*batch)
        loss.backward()

    def never_averaged(self, rank, *batch):
        with self.called.no_sync():
            self.loss(*batch).backward()

    def without_loss(self, rank, inputs, teacher_logits, labels):
        output = self.called(inputs)
        loss = output.sum() if rank else self.criterion(output, teacher_logits, labels)
        loss.backward()

    def not_a_number(self, rank, inputs, teacher_logits, labels):
        self.loss(inputs * torch.nan if rank else inputs, teacher_logits, labels).backward()

    def dropped(self, rank, *batch):
        self.loss(*batch).backward()
        if rank and self.step == 3:
            self.optimizer.zero_grad()
            self.loss(*batch).backward()

    def parameters_changed(self, rank, *batch):
        if rank and self.step == 3:
            self.student.fc1.weight.data.mul_(1.01)
        self.loss(*batch).backward()

    def overwritten(self, rank, inputs, teacher_logits, labels):
        self.loss(inputs, teacher_logits, labels).backward()
        if rank:
            inputs.zero_()

    def synchronised(self, rank, *batch):
        if len(self.ranks) == 1:
            self.loss(*batch).backward()
        elif rank == 0:  # the batches of all, at once
            output = self.called(torch.cat([shard[0] for shard in self.shards[self.step]]))
            rest = (torch.cat(parts) for parts in list(zip(*self.shards[self.step]))[1:])
            self.criterion(output, *rest).backward()

    def loss(self, inputs, teacher_logits, labels):
        output = logits_of(self.called(inputs))
        return self.criterion(output, teacher_logits, labels) / len(self.ranks)

    def train(self):
        for step, shards in enumerate(self.shards):
            self.step = step
            self.optimizer.zero_grad()
            for rank in self.ranks:
                torch.manual_seed(rank)
                getattr(self, self.setting.loop)(rank, *shards[rank])
            if self.setting.loop in ("scaled", "overflowing"):
                self.scaler.step(self.optimizer)
                self.scaler.update()
            else:
                self.optimizer.step()
        return {
            "student": [whole(p.detach()).clone() for p in self.student.parameters()],
            "weight net": [p.detach().clone() for p in self.criterion.weight_net.parameters()],
            "metrics": self.optimizer.metrics,
        }


def whole(param):
    return param.full_tensor() if hasattr(param, "full_tensor") else param


def _one_after_the_other(student, batches):
    logits = []
    for rank, (inputs, _) in batches:
        torch.manual_seed(rank)
        logits.append(logits_of(student(inputs)))
    return torch.cat(logits), torch.cat([labels for _, (_, labels) in batches])


def _at_once(student, batches):
    inputs, labels = (torch.cat(parts) for parts in zip(*(batch for _, batch in batches)))
    return student(inputs), labels


def train(setting, rank, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.SyncBatchNorm, "forward", sync_batch_norm)
        return Program(setting, rank, size).train()


def sync_batch_norm(module, x):
    """What torch's SyncBatchNorm computes, which does not run on a CPU."""
    over, shape = (0, 2, 3), (1, -1, 1, 1)
    count = SIZE * x.numel() / x.shape[1]
    mean = all_reduce(x.sum(over)) / count
    variance = all_reduce((x - mean.view(shape)).square().sum(over)) / count
    x = (x - mean.view(shape)) * (variance + module.eps).rsqrt().view(shape)
    return x * module.weight.view(shape) + module.bias.view(shape)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two ranks make of all programs of this file."""
    programs = {
        **{name: (train, setting) for name, setting in SETTINGS.items()},
        **{name: (refuse, name) for name in REFUSED},
        **{f"shards: {name}": (refuse_shards, name) for name in UNSHARDABLE},
        "bias": (find_bias, None),
        **{name: (resume, (name, tmp_path_factory.mktemp("checkpoints"))) for name in RESUMED},
    }
    return ranks.run(programs, SIZE)


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_train_what_one_process_trains(name, found):
    assert_trained_alike(SETTINGS[name], found[name])


def test_four_ranks_train_what_one_process_trains():
    names = ("tied, uneven", "paper, adamw", "batch norm", "FSDP, adamw")
    for name, results in ranks.run({n: (train, SETTINGS[n]) for n in names}, 4).items():
        assert_trained_alike(SETTINGS[name], results)


def assert_trained_alike(setting, results):
    for result in results:
        assert not isinstance(result, ranks.Failure), result.traceback
    expected = train(setting, None, len(results))
    first, *others = results
    assert first["metrics"]["meta_updates"] > 0
    for part in ("student", "weight net"):
        for other in others:
            assert all(map(torch.equal, first[part], other[part]))
        assert relative_error(first[part], expected[part]) < setting.tolerance
    assert first["metrics"] == pytest.approx(expected["metrics"], rel=setting.tolerance)


class FullDisk:
    def __iter__(self):
        raise OSError("the disk is full")


REFUSED = {
    "called by itself": "the student was called by itself in 2 processes",
    "a hook that rounds": "communication hook fp16_compress_hook",
    "a hook of torch's own that rounds": "communication hook BuiltinCommHookType.FP16_COMPRESS",
    "mixed precision": "made with mixed_precision",
    "a parameter left out": "leaves out fc1.bias",
    "uneven numbers of steps": "within DistributedDataParallel.join",
    "never averaged": "the gradients differ from the criterion's own",
    "without loss": "no result of the criterion went through backward",
    "not a number": "the criterion returned nan",
    "overwritten": "an input of shape .* was written in place",
    "dropped": "one rank dropped the gradients of a step that another one took",
    "FSDP, not a number": "the criterion returned nan",
    "FSDP, dropped": "one rank dropped the gradients of a step that another one took",
    "FSDP, an error in the meta loader": "the disk is full",
    "FSDP, labels out of range": "labels of a meta batch hold the class 99",
    "checked": "check_hypergradient was called in 2 processes",
    "an error in the meta loader": "the disk is full",
    "labels out of range": "labels of a meta batch hold the class 99",
    "other settings": "every is [12] on rank [01] and [12] on rank [01]",
    "parameters changed": "this rank's student or weight net differs by",
    "begun later": "runs in 2 processes and BilevelOptimizer was made when it ran in 1",
}


def refuse(name, rank, size):
    """Runs a script that cannot work, most often for what rank 1 does."""
    sharded, name = name.startswith("FSDP, "), name.removeprefix("FSDP, ")
    loop = name.replace(" ", "_")
    loop = loop if hasattr(Program, loop) else "plain"
    bilevel = {"every": 1 + rank} if name == "other settings" else {}
    if name == "parameters changed":  # at a step that nothing watches
        bilevel = {"every": 3}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Exception) as error:
        if name == "a parameter left out":
            patch.setattr(MLP, "_ddp_params_and_buffers_to_ignore", ["fc1.bias"], raising=False)
        if name == "begun later":
            patch.setattr("kd_balance.distributed._is_distributed", lambda: False)
        program = Program(Setting(loop=loop, sharded=sharded, bilevel=bilevel), rank, size)
        patch.undo()
        if name == "a hook that rounds":
            program.called.register_comm_hook(None, fp16_compress_hook)
        if name == "a hook of torch's own that rounds":
            program.called._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
        if name == "mixed precision":  # cannot be made on a CPU
            program.called.mixed_precision = _MixedPrecision(param_dtype=torch.float32)
        if name == "checked":
            check_hypergradient(program.optimizer, print, [])
        if name == "called by itself":
            program.called = program.student
        if name == "labels out of range" and rank == 1:
            program.meta[0][1].fill_(99)
        if name == "an error in the meta loader" and rank == 1:
            program.optimizer._steps.meta_set._loader = FullDisk()
        before = [whole(p.detach()).clone() for p in program.student.parameters()]
        joined = name == "uneven numbers of steps"
        with Join([program.called]) if joined else nullcontext():
            program.train()
    late = name in ("parameters changed", "other settings", "dropped", "checked")
    if late:
        return str(error.value), False
    after = [whole(p.detach()) for p in program.student.parameters()]
    return str(error.value), not all(map(torch.equal, before, after))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_on_every_rank(name, found):
    for result in found[name]:
        assert not isinstance(result, ranks.Failure), result.traceback
        text, moved = result
        assert re.search(REFUSED[name], text)
        assert not moved


UNSHARDABLE = {
    "tensor-parallel": "parameters are DTensors over 1 mesh dimensions of a MLP",
    "in two dimensions": "parameters are DTensors over 2 mesh dimensions",
    "flat": "parameters are flat shards",
    "sharded later": "the student was sharded after BilevelOptimizer was made",
    "sharded in part": "fully_shard leaves out fc2.weight",
    "bfloat16": "mp_policy with param_dtype=torch.bfloat16",
    "offloaded": "given a CPUOffloadPolicy",
    "another method": "register_fsdp_forward_method was called for extra_repr",
    "Muon": "optimizer is torch.optim.Muon and the student's parameters are shards",
    "finite differences": "optimizer is .*AdamW and the student's parameters are shards",
    "transformed": "transform_gradients was called and the student's parameters are shards",
    "checked": "check_hypergradient was called in 2 processes",
}


def refuse_shards(name, rank, size):
    """Makes a wrapper of shards that cannot be trained, and calls the student."""
    student, options = MLP(), {}
    mesh = init_device_mesh("cpu", (size,))
    if name == "in two dimensions":
        mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("copies", "shards"))
    if name == "bfloat16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    if name == "offloaded":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)

    def shard():
        if name == "tensor-parallel":
            parallelize_module(student, mesh, {"fc1": ColwiseParallel()})
        elif name == "sharded in part":
            fully_shard(student.fc1, mesh=mesh)
            fully_shard(student, mesh=mesh, ignored_params=set(student.fc2.parameters()))
        else:
            fully_shard(student, mesh=mesh, **options)
        if name == "another method":
            register_fsdp_forward_method(student, "extra_repr")

    if name == "flat":
        student.add_module("flat", FullyShardedDataParallel.__new__(FullyShardedDataParallel))
        nn.Module.__init__(student.flat)
    elif name != "sharded later":
        shard()
    kind = torch.optim.Muon if name == "Muon" else torch.optim.AdamW
    params = [p for p in student.parameters() if p.dim() == 2]
    derivative = "finite_difference" if name == "finite differences" else "exact"
    with pytest.raises(ValueError) as error:
        optimizer = BilevelOptimizer(
            kind(params, lr=0.1), student, WeightedKDLoss(MetaWeightNet()), [0],
            step_derivative=derivative,
        )
        if name == "sharded later":
            shard()
        if name == "transformed":
            optimizer.transform_gradients(lambda gradients: gradients)
        if name == "checked":
            check_hypergradient(optimizer, print, [])
        student(torch.zeros(2, 8))
    return str(error.value)


@pytest.mark.parametrize("name", UNSHARDABLE)
def test_shards_that_cannot_be_trained_are_refused(name, found):
    for text in found[f"shards: {name}"]:
        assert not isinstance(text, ranks.Failure), text.traceback
        assert re.search(UNSHARDABLE[name], text) and text.count(". ") == 0


class Resumable(Program):
    """A script that draws its meta batches from another seed on every rank."""

    def __init__(self, rank, size, kind=""):
        bilevel = {"every": 2, "accumulate": 2}
        setting = Setting(
            optimizer="adamw", zero=kind == "ZeRO", sharded=kind == "FSDP", bilevel=bilevel
        )
        super().__init__(setting, rank, size)
        inputs, labels = Run(seed=1).inputs(40), torch.arange(40) % CLASSES
        self.optimizer.close()
        self.optimizer = BilevelOptimizer(
            self.optimizer.optimizer,
            self.called,
            self.criterion,
            BalancedBatches(inputs, labels, batch_size=7, seed=rank or 0),
            **{**EVERY_STEP, **bilevel},
        )

    def state_dict(self):
        return {"student": self.student.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state):
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])


def find_bias(_, rank, size):
    """What is found of the teacher in each rank's own meta batches."""
    program = Program(Setting(), rank, size)
    criterion = WeightedKDLoss.long_tailed([90, 40, 10, 5, 2])
    teacher = MLP().double()
    BilevelOptimizer(
        program.student_optimizer(shared=False), program.called, criterion,
        [(inputs + rank, labels) for inputs, labels in program.meta], teacher=teacher,
    )
    return criterion.teacher_bias


def test_the_teacher_s_bias_is_the_first_rank_s(found):
    first, other = found["bias"]
    assert first.any() and torch.equal(first, other)


RESUMED = (
    "the first rank's checkpoint",
    "torch.distributed.checkpoint",
    "ZeRO's checkpoint",
    "FSDP's checkpoints, one a rank",
)
SAVED = 5


def resume(argument, rank, size):
    """A run, and one that is broken off and goes on from a checkpoint."""
    name, folder = argument
    kind = name.partition("'")[0]
    file = f"whole{rank}" if kind == "FSDP" else "whole"
    whole = Resumable(rank, size, kind).train()
    first = Resumable(rank, size, kind)
    del first.shards[SAVED:]
    first.train()
    if name == "torch.distributed.checkpoint":
        dist.checkpoint.save(first.state_dict(), checkpoint_id=folder / "parts")
        if rank == 0:
            dcp_to_torch_save(folder / "parts", folder / "whole")
    if kind == "ZeRO":
        first.optimizer.optimizer.consolidate_state_dict()
    if name != "torch.distributed.checkpoint" and (rank == 0 or kind == "FSDP"):
        torch.save(first.state_dict(), folder / file)
    dist.barrier()
    second = Resumable(rank, size, kind)
    del second.shards[:SAVED]
    second.load(torch.load(folder / file))
    return whole, second.train(), folder / file


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(name, found):
    for result in found[name]:
        assert not isinstance(result, ranks.Failure), result.traceback
        whole, resumed, _ = result
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_another_number_of_ranks_goes_on_from_a_checkpoint(found):
    whole, _, path = found[RESUMED[0]][0]
    alone = Resumable(None, 1)
    with pytest.warns(UserWarning, match="written by 2 processes and is loaded by 1"):
        alone.load(torch.load(path))
    assert alone.train()["metrics"]["meta_updates"] > whole["metrics"]["meta_updates"] / 2
