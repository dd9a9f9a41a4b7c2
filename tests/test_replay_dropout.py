"""Dropout within fused attention: its mask is the same in the loop's own pass and in replays.

A fused kernel of a GPU draws from another stream than the plain operator. Where there is none, an
operator stands in that draws more numbers unless torch's switches ask for the plain kernel.
"""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from tests.devices import CUDA
from tests.students import EVERY_STEP, relative_error

LENGTH, WIDTH, CLASSES = 4, 8, 5


@pytest.fixture
def fused(monkeypatch):
    """Attention on a fused kernel with a stream of its own; counts its calls with dropout."""
    gc.collect()  # optimizers of other tests, which may be within a window
    plain = F.scaled_dot_product_attention
    calls = []

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, *args, **kwargs):
        if dropout_p and torch.backends.cuda.flash_sdp_enabled():
            calls.append(dropout_p)
            torch.rand(3)
        return plain(query, key, value, attn_mask, dropout_p, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    return calls


class Attention(nn.Module):
    def __init__(self, dropout=0.3):
        super().__init__()
        self.inputs = nn.Linear(WIDTH, 3 * WIDTH)
        self.outputs = nn.Linear(WIDTH, CLASSES)
        self.dropout = dropout

    def forward(self, x):
        q, k, v = self.inputs(x).chunk(3, -1)
        drop = self.dropout if self.training else 0.0
        return self.outputs(F.scaled_dot_product_attention(q, k, v, dropout_p=drop).mean(1))


class MultiHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.3, batch_first=True)
        self.outputs = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.outputs(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.outputs = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.outputs(self.encoder(x).mean(1))


class Checkpointed(Attention):
    reentrant = False

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


class Bert(nn.Module):
    """Hugging Face's encoder: attention and hidden states are dropped."""

    def __init__(self):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=20,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=CLASSES,
            attention_probs_dropout_prob=0.1,
        )
        self.bert = transformers.BertForSequenceClassification(config)

    def forward(self, x):
        return self.bert(inputs_embeds=x).logits


STUDENTS = [Attention, MultiHead, Encoder, Checkpointed, Reentrant, Bert]


def batch(seed, dtype=torch.float64, size=6):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, LENGTH, WIDTH, generator=generator, dtype=dtype)
    teacher_logits = torch.randn(size, CLASSES, generator=generator, dtype=dtype)
    return inputs, teacher_logits, torch.randint(CLASSES, (size,), generator=generator)


def criterion_of(flat=None):
    torch.manual_seed(2)
    net = MetaWeightNet(("teacher_ce", "teacher_entropy"), hidden=(3,)).double()
    if flat is not None:
        nn.utils.vector_to_parameters(flat, net.parameters())
    return WeightedKDLoss(net)


def student_of(kind):
    torch.manual_seed(1)
    return kind().double().train()


def step(student, criterion, optimizer, seed):
    inputs, teacher_logits, targets = batch(seed)
    if isinstance(student, Reentrant):  # sees nothing to differentiate otherwise
        inputs.requires_grad_()
    loss = criterion(student(inputs), teacher_logits, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def finite_differences(kind, steps):
    """d(meta loss after the steps)/dφ, φ varied in all of them, the masks being the same.

    The loop's own masks on watched steps are those of the plain kernel.
    """
    inputs, _, targets = batch(99)
    start = nn.utils.parameters_to_vector(criterion_of().weight_net.parameters()).detach()

    def meta_loss(flat):
        student, criterion = student_of(kind), criterion_of(flat)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.3, momentum=0.9)
        torch.manual_seed(9)
        with sdpa_kernel(SDPBackend.MATH):
            for k in range(steps):
                step(student, criterion, optimizer, k)
            with torch.no_grad():
                return F.cross_entropy(student(inputs), targets).item()

    eps = 1e-5 * torch.eye(len(start), dtype=start.dtype)
    return torch.tensor([(meta_loss(start + e) - meta_loss(start - e)) / 2e-5 for e in eps])


def hypergradient(kind, steps, engine="adjoint"):
    student, criterion = student_of(kind), criterion_of()
    inputs, _, targets = batch(99)
    optimizer = BilevelOptimizer(
        torch.optim.SGD(student.parameters(), lr=0.3, momentum=0.9),
        student,
        criterion,
        [(inputs, targets)],
        engine=engine,
        every=steps,
        unroll=steps,
        meta_optimizer=torch.optim.SGD(criterion.weight_net.parameters(), lr=0.0),
    )
    torch.manual_seed(9)
    for k in range(steps):
        step(student, criterion, optimizer, k)
    return torch.cat([p.grad.flatten() for p in criterion.weight_net.parameters()])


@pytest.mark.parametrize("engine", ["adjoint", "unroll"])
@pytest.mark.parametrize("kind", STUDENTS)
def test_the_hypergradient_sees_the_mask_of_the_step(fused, kind, engine):
    expected = finite_differences(kind, 2)
    assert relative_error(hypergradient(kind, 2, engine), expected) < 1e-7
    assert not fused


def wrapped(student, criterion, **windows):
    inputs, _, targets = batch(99)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.3)
    return BilevelOptimizer(optimizer, student, criterion, [(inputs, targets)], **windows)


def test_steps_outside_a_window_keep_the_fused_kernel(fused):
    student, criterion = student_of(Attention), criterion_of()
    optimizer = wrapped(student, criterion, every=4, unroll=1)
    for k in range(8):
        step(student, criterion, optimizer, k)
    assert len(fused) == 5  # the first step is looked at, the fourth and the eighth end windows


def test_attention_without_dropout_is_left_alone(monkeypatch):
    plain = F.scaled_dot_product_attention
    allowed = []

    def attention(*args, **kwargs):
        allowed.append(torch.backends.cuda.flash_sdp_enabled())
        return plain(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    student = student_of(lambda: Attention(dropout=0.0))
    optimizer = wrapped(student, criterion_of(), **EVERY_STEP)
    student(batch(0)[0])
    assert allowed == [True]
    optimizer.close()


def test_a_closed_optimizer_leaves_torch_as_it_was(fused):
    before = F.scaled_dot_product_attention
    students = [student_of(Attention) for _ in range(2)]
    optimizers = [wrapped(student, criterion_of(), **EVERY_STEP) for student in students]
    assert F.scaled_dot_product_attention is not before
    optimizers[0].close()
    assert F.scaled_dot_product_attention is not before
    optimizers[1].close()
    assert F.scaled_dot_product_attention is before


class Heads(nn.Module):
    """Attention of a shape that every fused kernel takes."""

    def __init__(self, masked):
        super().__init__()
        self.inputs = nn.Linear(WIDTH, 3 * 64)
        self.outputs = nn.Linear(64, CLASSES)
        self.masked = masked

    def forward(self, x):
        q, k, v = self.inputs(x).view(len(x), LENGTH, 3, 2, 32).permute(2, 0, 3, 1, 4)
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=x.device).tril()
        y = F.scaled_dot_product_attention(q, k, v, mask if self.masked else None, 0.3)
        return self.outputs(y.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "backend",
    [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION],
)
def test_every_fused_kernel_of_a_gpu(device, backend, masked, dtype):
    found = []
    for engine in ("adjoint", "unroll"):
        torch.manual_seed(1)
        student = Heads(masked).to(device)
        criterion = WeightedKDLoss(MetaWeightNet(("teacher_ce", "teacher_entropy"), hidden=(3,)))
        inputs, _, targets = batch(99, torch.float32)
        optimizer = BilevelOptimizer(
            torch.optim.SGD(student.parameters(), lr=0.3, momentum=0.9),
            student,
            criterion,
            [(inputs, targets)],
            engine=engine,
            every=3,
            unroll=2,
        )
        torch.manual_seed(9)
        for k in range(3):
            inputs, teacher_logits, targets = (t.to(device) for t in batch(k, torch.float32))
            fused = [backend, SDPBackend.MATH]  # not every kernel takes every mask and dtype
            with sdpa_kernel(fused, set_priority=True):
                with torch.autocast(device, dtype, enabled=dtype is not None):
                    logits = student(inputs)
            loss = criterion(logits, teacher_logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(torch.cat([p.grad.flatten() for p in criterion.weight_net.parameters()]))
    assert found[0].norm() > 0
    assert relative_error(*found) < (1e-4 if dtype is None else 5e-2)
