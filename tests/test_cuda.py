"""The essential habits on a CUDA device, and that a step never waits for it."""

import shutil

import pytest
import torch
from torch import nn

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from kd_balance.data import BalancedBatches
from tests.habits import (
    Lab,
    assert_differentiates,
    assert_leaves_what_the_plain_loop_leaves,
    assert_one_sentence,
    assert_same_hypergradient,
    plain,
    trained,
)
from tests.students import CLASSES, ConvNet, MLP, Tied, Transformer, logits_of, relative_error
from tests.test_habits_accumulation import CLEARINGS, CLIPPINGS, clearing, clipped, micro_batches
from tests.test_habits_calls import loop_of, soft_targets, two_crops, two_labels
from tests.test_habits_modules import (
    ChannelsLast,
    Checkpointed,
    CheckpointedReentrant,
    Dropped,
    FrozenNorm,
    Recurrent,
)
from tests.test_habits_precision import STUDENTS as AUTOCAST_STUDENTS
from tests.test_habits_precision import assert_autocast, assert_skips_overflows, scaled
from tests.test_habits_schedulers import SCHEDULERS, scheduled

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none"
    ),
    pytest.mark.filterwarnings("ignore:.*is deprecated"),
    pytest.mark.filterwarnings("ignore:The student has an operator without forward-mode"),
]

CUDA = {"device": "cuda"}


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    """Ten bits of TF32 are too few to tell engines apart by."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


class OneLayerRecurrent(Recurrent):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 6, batch_first=True)


STUDENTS = {
    "mlp": dict(make=MLP),
    "conv": dict(make=ConvNet, shape=(2, 6, 6)),
    "transformer": dict(make=Transformer, shape=(3, 4)),
    "tied": dict(make=Tied),
    "dropout": dict(make=Dropped),
    "channels_last": dict(make=ChannelsLast, shape=(2, 6, 6)),
    "frozen batch norm": dict(make=FrozenNorm, shape=(2, 6, 6)),
    "checkpointed": dict(make=Checkpointed),
    "checkpointed, reentrant": dict(make=CheckpointedReentrant),
    "lstm": dict(make=OneLayerRecurrent, shape=(3, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("student", STUDENTS)
def test_engines_agree(student, steps, optimizer, dtype):
    assert_same_hypergradient(
        plain(steps),
        plain(steps),
        optimizer=optimizer,
        dtype=dtype,
        settings={"unroll": steps, "every": steps},
        tolerance=1e-6 if dtype == torch.float64 else 1e-3,
        **CUDA,
        **STUDENTS[student],
    )


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("student", STUDENTS)
def test_the_hypergradient_is_the_slope_of_the_real_trajectory(student, steps):
    assert_differentiates(plain(steps), steps=steps, rtol=1e-4, **CUDA, **STUDENTS[student])


LOOPS = {
    "micro-batches": micro_batches(2),
    "norm clipped": clipped("norm", 2),
    "value clipped": clipped("value", 2),
    "two crops": loop_of(two_crops),
    "two labels": loop_of(two_labels),
    "soft targets": loop_of(soft_targets),
    "scaled and clipped": scaled(2, clip=0.05),
    **{name: scheduled(name, steps=2) for name in SCHEDULERS},
    **{f"{name} first": clearing(name, "first", 2) for name in CLEARINGS},
}


@pytest.mark.parametrize("name", LOOPS)
def test_habits(name):
    settings = {"grad_scaler": name == "scaled and clipped"}
    assert_differentiates(LOOPS[name], steps=2, rtol=1e-4, settings=settings, **CUDA)
    assert_leaves_what_the_plain_loop_leaves(LOOPS[name], settings=settings, **CUDA)


@pytest.mark.parametrize("name", CLIPPINGS)
def test_clipping_at_every_step(name):
    """The first step decides whether versions are trusted; clipping has to be seen after it."""
    assert_differentiates(clipped(name, 3), steps=3, rtol=1e-4, **CUDA)


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw"])
@pytest.mark.parametrize("student", ["mlp", "dropout", "transformer"])
def test_the_student_is_that_of_the_plain_loop(student, optimizer):
    assert_leaves_what_the_plain_loop_leaves(
        plain(3), optimizer=optimizer, **CUDA, **STUDENTS[student]
    )


# precision


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("student", AUTOCAST_STUDENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, student, steps):
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported():
        pytest.skip("this CUDA device has no bfloat16")
    assert_autocast(dtype, steps, **CUDA, **AUTOCAST_STUDENTS[student])


def test_an_overflow_of_float16_is_skipped_whole():
    assert_skips_overflows("cuda")


@pytest.mark.parametrize("overflow", [(), (0, 2)])
def test_the_hypergradient_does_not_carry_the_scale(overflow):
    steps = 4 - len(overflow)
    loop = scaled(4, overflow=overflow)
    settings = {"grad_scaler": True}
    assert_differentiates(loop, steps=steps, rtol=1e-4, settings=settings, **CUDA)
    if not overflow:
        assert_differentiates(
            loop, reference=plain(4), steps=4, rtol=1e-4, settings=settings, **CUDA
        )


# students


def test_data_parallel_on_one_device():
    def prepare(student):
        return nn.DataParallel(student, device_ids=[0])

    assert_differentiates(plain(2), steps=2, rtol=1e-4, prepare=prepare, **CUDA)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_data_parallel_on_several_devices_is_refused():
    lab = Lab(**CUDA)
    lab.called = nn.DataParallel(lab.student, device_ids=[0, 1])
    with pytest.raises(ValueError, match="student runs on 2 devices at once") as error:
        lab.wrap()
    assert_one_sentence(error)


@pytest.mark.skipif(not shutil.which("cc"), reason="inductor needs a C compiler")
def test_compiled():
    pytest.importorskip("triton", reason="inductor needs triton on a CUDA device")
    assert_differentiates(plain(2), steps=2, rtol=1e-4, prepare=torch.compile, **CUDA)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_fused_optimizers(kind, fused):
    def optimizer(params):
        return kind(params, lr=0.01, fused=fused, foreach=not fused)

    assert_differentiates(plain(2), steps=2, rtol=1e-4, optimizer=optimizer, **CUDA)


# devices


def test_nothing_has_to_be_moved_by_hand():
    """The weight net is made on the CPU, and meta batches come from there."""
    student = MLP().cuda()
    criterion = WeightedKDLoss(MetaWeightNet(hidden=(4,)))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    meta = [(torch.randn(7, 8), torch.arange(7) % CLASSES)]
    optimizer = BilevelOptimizer(optimizer, student, criterion, meta)
    assert all(p.device.type == "cuda" for p in criterion.weight_net.parameters())
    inputs, labels = torch.randn(9, 8).cuda(), (torch.arange(9) % CLASSES).cuda()
    criterion(student(inputs), torch.randn(9, CLASSES).cuda(), labels).backward()
    optimizer.step()
    assert optimizer.metrics["hypergradient_norm"] > 0


@pytest.mark.parametrize("location", ["cpu", "cuda"])
def test_a_checkpoint_loads_from_either_device(location, tmp_path):
    settings = {"accumulate": 2, "rate": 0.1}
    lab = trained(plain(3), wrapped=True, settings=settings, **CUDA)
    torch.save([lab.student.state_dict(), lab.optimizer.state_dict()], tmp_path / "checkpoint.pt")
    other = Lab(**CUDA)
    other.wrap(**settings)
    state = torch.load(tmp_path / "checkpoint.pt", map_location=location, weights_only=True)
    other.student.load_state_dict(state[0])
    other.optimizer.load_state_dict(state[1])
    other.generator.set_state(lab.generator.get_state())
    plain(3)(lab)
    plain(3)(other)
    assert other.optimizer.metrics == lab.optimizer.metrics
    assert relative_error(other.student.parameters(), lab.student.parameters()) < 1e-9
    assert relative_error([other.table], [lab.table]) < 1e-9


@pytest.mark.parametrize("student", ["mlp", "conv", "transformer"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"every": 2, "unroll": 2},
        {"accumulate": 2},
        {"method": "lookahead"},
        {"method": "paper", "meta_loss": "mix"},
    ],
    ids=str,
)
@pytest.mark.parametrize("on_device", [True, False], ids=["meta set on the device", "on the CPU"])
def test_a_step_never_waits_for_the_device(student, settings, on_device):
    """After the first updates, which are tried out. SGD, no clipping, no gradient scaler."""
    options = STUDENTS[student]
    lab = Lab(dtype=torch.float32, **CUDA, **options)
    teacher = options["make"]().cuda()
    inputs, labels = lab.inputs(20), torch.arange(20) % CLASSES
    meta = BalancedBatches(
        inputs if on_device else inputs.cpu(), labels, batch_size=7, seed=0
    )
    lab.wrap(
        rate=0.1, meta=meta, teacher=lambda x: logits_of(teacher(x)), **settings
    )
    batches = list(lab.batches(8))
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    try:
        for step, (inputs, teacher_logits, labels) in enumerate(batches):
            if step == 4:
                torch.cuda.set_sync_debug_mode("error")
            lab.optimizer.zero_grad()
            logits = logits_of(lab.student(inputs))
            lab.criterion(logits, teacher_logits, labels).backward()
            lab.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert lab.optimizer.metrics["meta_updates"] > 0
