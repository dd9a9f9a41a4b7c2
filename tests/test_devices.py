"""The essential habits on a device other than the CPU, and that a step never waits for it.

Each on a CUDA device, where there is one, and on a stand-in for one.
"""

import shutil
from itertools import product

import pytest
import torch
from torch import nn

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from kd_balance.data import BalancedBatches
from kd_balance.teacher_bias import prior_bias
from tests import standin
from tests.devices import CUDA, STANDIN, never_waits, on_devices
from tests.habits import (
    Lab,
    assert_differentiates,
    assert_leaves_what_the_plain_loop_leaves,
    assert_one_sentence,
    assert_same_hypergradient,
    plain,
    train,
    trained,
)
from tests.students import (
    CLASSES,
    EVERY_STEP,
    MLP,
    ConvNet,
    Tied,
    Transformer,
    logits_of,
    relative_error,
)
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
from tests.test_habits_precision import (
    STUDENTS as AUTOCAST_STUDENTS,
    assert_autocast,
    assert_skips_overflows,
    scaled,
)
from tests.test_habits_schedulers import SCHEDULERS, scheduled

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated"),
    pytest.mark.filterwarnings("ignore:The student has an operator without forward-mode"),
]


@pytest.fixture(params=[CUDA, STANDIN])
def device(request):
    return request.param


@pytest.fixture(params=[CUDA])
def cuda(request):
    """For what the stand-in does not stand in for."""
    return request.param


@pytest.fixture(autouse=True)
def full_float32():
    """Ten bits of TF32 are too few to tell engines apart by."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.set_float32_matmul_precision(precision)


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


def skip_without_kernel(device, student):
    if device == standin.DEVICE and student == "lstm":
        pytest.skip("the stand-in has no kernel for LSTMs")


@on_devices(
    "student, steps, optimizer, dtype",
    cuda=product(STUDENTS, (1, 3), ("sgd-momentum", "adamw"), (torch.float64, torch.float32)),
    standin=product(STUDENTS, (3,), ("adamw",), (torch.float64,)),
)
def test_engines_agree(device, student, steps, optimizer, dtype):
    skip_without_kernel(device, student)
    assert_same_hypergradient(
        plain(steps),
        plain(steps),
        optimizer=optimizer,
        dtype=dtype,
        settings={"unroll": steps, "every": steps},
        tolerance=1e-6 if dtype == torch.float64 else 1e-3,
        device=device,
        **STUDENTS[student],
    )


@on_devices(
    "student, steps", cuda=product(STUDENTS, (1, 3)), standin=product(STUDENTS, (1,))
)
def test_the_hypergradient_is_the_slope_of_the_real_trajectory(device, student, steps):
    skip_without_kernel(device, student)
    assert_differentiates(plain(steps), steps=steps, rtol=1e-4, device=device, **STUDENTS[student])


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


# a scheduler moves rates, which are numbers of the host: one of them stands for all
FEW_LOOPS = [name for name in LOOPS if name not in list(SCHEDULERS)[1:]]


@on_devices("name", cuda=product(LOOPS), standin=product(FEW_LOOPS))
def test_habits(device, name):
    settings = {"grad_scaler": name == "scaled and clipped"}
    assert_differentiates(LOOPS[name], steps=2, rtol=1e-4, settings=settings, device=device)
    assert_leaves_what_the_plain_loop_leaves(LOOPS[name], settings=settings, device=device)


@pytest.mark.parametrize("name", CLIPPINGS)
def test_clipping_at_every_step(name, device):
    """The first step decides whether versions are trusted; clipping has to be seen after it."""
    assert_differentiates(clipped(name, 3), steps=3, rtol=1e-4, device=device)


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw"])
@pytest.mark.parametrize("student", ["mlp", "dropout", "transformer"])
def test_the_student_is_that_of_the_plain_loop(student, optimizer, device):
    assert_leaves_what_the_plain_loop_leaves(
        plain(3), optimizer=optimizer, device=device, **STUDENTS[student]
    )


# precision


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("student", AUTOCAST_STUDENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, student, steps, cuda):
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported():
        pytest.skip("this CUDA device has no bfloat16")
    assert_autocast(dtype, steps, device=cuda, **AUTOCAST_STUDENTS[student])


def test_an_overflow_of_float16_is_skipped_whole(cuda):
    assert_skips_overflows(cuda)


@pytest.mark.parametrize("overflow", [(), (0, 2)])
def test_the_hypergradient_does_not_carry_the_scale(overflow, device):
    steps = 4 - len(overflow)
    loop = scaled(4, overflow=overflow)
    settings = {"grad_scaler": True}
    assert_differentiates(loop, steps=steps, rtol=1e-4, settings=settings, device=device)
    if not overflow:
        assert_differentiates(
            loop, reference=plain(4), steps=4, rtol=1e-4, settings=settings, device=device
        )


# students


def test_data_parallel_on_one_device(cuda):
    def prepare(student):
        return nn.DataParallel(student, device_ids=[0])

    assert_differentiates(plain(2), steps=2, rtol=1e-4, prepare=prepare, device=cuda)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_data_parallel_on_several_devices_is_refused(cuda):
    lab = Lab(device=cuda)
    lab.called = nn.DataParallel(lab.student, device_ids=[0, 1])
    with pytest.raises(ValueError, match="student runs on 2 devices at once") as error:
        lab.wrap()
    assert_one_sentence(error)


@pytest.mark.skipif(not shutil.which("cc"), reason="inductor needs a C compiler")
def test_compiled(cuda):
    pytest.importorskip("triton", reason="inductor needs triton on a CUDA device")
    assert_differentiates(plain(2), steps=2, rtol=1e-4, prepare=torch.compile, device=cuda)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_fused_optimizers(kind, fused, device):
    def optimizer(params):
        return kind(params, lr=0.01, fused=fused, foreach=not fused)

    assert_differentiates(plain(2), steps=2, rtol=1e-4, optimizer=optimizer, device=device)


# devices


def test_nothing_has_to_be_moved_by_hand(device):
    """The weight net is made on the CPU, and meta batches come from there."""
    student = MLP().to(device)
    criterion = WeightedKDLoss(MetaWeightNet(hidden=(4,)))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    meta = [(torch.randn(7, 8), torch.arange(7) % CLASSES)]
    optimizer = BilevelOptimizer(optimizer, student, criterion, meta, **EVERY_STEP)
    assert all(p.device.type == device for p in criterion.weight_net.parameters())
    inputs, labels = torch.randn(9, 8).to(device), (torch.arange(9) % CLASSES).to(device)
    criterion(student(inputs), torch.randn(9, CLASSES).to(device), labels).backward()
    optimizer.step()
    assert optimizer.metrics["hypergradient_norm"] > 0


def test_the_two_lines_never_wait_for_the_device(device):
    """Counts come from the CPU, and the teacher's bias is found where its logits are."""
    lab = Lab(dtype=torch.float32, device=device)
    counts = torch.arange(CLASSES, 0, -1)
    lab.criterion = WeightedKDLoss.long_tailed(counts)
    meta_inputs = lab.inputs(2 * CLASSES)
    meta_labels = (torch.arange(2 * CLASSES) % CLASSES).to(device)
    teacher = MLP().to(device)
    lab.wrap(
        meta=[(meta_inputs, meta_labels)], rate=0.1, unroll=2, every=2, teacher=teacher
    )
    assert lab.criterion.teacher_bias.any()
    batches = list(lab.batches(6))
    train(lab, batches[:4])
    with never_waits(device):
        train(lab, batches[4:])
    metrics = lab.optimizer.metrics
    assert metrics["hypergradient_norm"] > 0 and metrics["skipped_updates"] == 0


@pytest.mark.skipif(not standin.available(), reason="the stand-in stands in for Apple's MPS")
@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_device_without_float64(steps, optimizer, monkeypatch):
    monkeypatch.setattr("kd_balance.inner_step.differentiable._WITHOUT_FLOAT64", {standin.DEVICE})
    options = {"optimizer": optimizer, "dtype": torch.float32, "wrapped": True}
    options["settings"] = {"unroll": steps, "every": steps}
    expected = trained(plain(steps), **options).hypergradient
    with standin.without_float64():
        found = trained(plain(steps), device=standin.DEVICE, **options).hypergradient
        counts = torch.arange(CLASSES, 0, -1)
        logits, labels = torch.rand(9, CLASSES), torch.arange(9) % CLASSES
        bias = prior_bias(logits.to(standin.DEVICE), labels.to(standin.DEVICE), counts)
    assert relative_error([found.cpu()], [expected]) < 5e-3
    assert torch.equal(bias.cpu(), prior_bias(logits, labels, counts))


@pytest.mark.parametrize("location", ["cpu", "cuda"])
def test_a_checkpoint_loads_from_either_device(location, tmp_path, cuda):
    settings = {"accumulate": 2, "rate": 0.1}
    lab = trained(plain(3), wrapped=True, settings=settings, device=cuda)
    torch.save([lab.student.state_dict(), lab.optimizer.state_dict()], tmp_path / "checkpoint.pt")
    other = Lab(device=cuda)
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


WAYS = [
    {},
    {"every": 2, "unroll": 2},
    {"accumulate": 2},
    {"engine": "unroll"},
    {"method": "lookahead"},
    {"method": "paper", "meta_loss": "mix"},
]


@on_devices(
    "student, settings, meta_device",
    cuda=product(("mlp", "conv", "transformer"), WAYS, ("cuda", "cpu")),
    standin=[
        *product(("mlp",), WAYS, (standin.DEVICE,)),
        *product(("conv", "transformer"), WAYS[:2], (standin.DEVICE,)),
    ],
)
def test_a_step_never_waits_for_the_device(device, student, settings, meta_device):
    """After the first updates, which are tried out. SGD, no clipping, no gradient scaler."""
    options = STUDENTS[student]
    lab = Lab(dtype=torch.float32, device=device, **options)
    teacher = options["make"]().to(device)
    meta_inputs, labels = lab.inputs(20).to(meta_device), torch.arange(20) % CLASSES
    meta = BalancedBatches(meta_inputs, labels, batch_size=7, seed=0)
    lab.wrap(rate=0.1, meta=meta, teacher=lambda x: logits_of(teacher(x)), **settings)
    batches = list(lab.batches(8))
    train(lab, batches[:4])
    with never_waits(device):
        train(lab, batches[4:])
    assert lab.optimizer.metrics["meta_updates"] > 0
