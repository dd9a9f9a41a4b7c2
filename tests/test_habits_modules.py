"""What the student is made of: compiled, checkpointed, parametrised, recurrent, partly frozen."""

import copy
import pickle
import random
import shutil
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from tests.habits import (
    Lab,
    assert_differentiates,
    assert_leaves_what_the_plain_loop_leaves,
    assert_one_sentence,
    assert_same_hypergradient,
    plain,
    trained,
)
from tests.students import CLASSES, MLP, ConvNet

# torch.compile: `jit.script` warns of its own deprecation when dynamo is imported
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated")

needs_compiler = pytest.mark.skipif(
    not shutil.which("c++"), reason="inductor needs a C++ compiler, and there is none"
)
BACKENDS = ["eager", pytest.param("inductor", marks=needs_compiler)]


class Dropped(MLP):
    def forward(self, inputs):
        return self.fc2(F.dropout(torch.tanh(self.fc1(inputs)), 0.3, self.training))


# torch.compile


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(backend, steps):
    assert_differentiates(
        plain(steps), steps=steps, prepare=lambda m: torch.compile(m, backend=backend)
    )


def compiled_in_place(student):
    student.compile(backend="aot_eager")
    return student


def compiled_within(student):
    student.fc1 = torch.compile(student.fc1, backend="aot_eager")
    return student


@pytest.mark.parametrize("prepare", [compiled_in_place, compiled_within])
def test_compiled_in_place_or_within(prepare):
    assert_differentiates(plain(3), steps=3, prepare=prepare)


def test_compiled_dropout_that_draws_as_eager_dropout_does():
    prepare = lambda m: torch.compile(m, backend="aot_eager")  # noqa: E731
    assert_differentiates(plain(1), make=Dropped, prepare=prepare)


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(()).item()])
def test_layers_dropped_at_random(draw):
    """Stochastic depth, whichever generator decides."""

    class Student(Deep):
        def forward(self, inputs):
            hidden = torch.tanh(self.first(inputs))
            return self.last(self.block(hidden) if draw() < 0.5 else hidden)

    assert_differentiates(plain(4), steps=4, make=Student)
    assert_leaves_what_the_plain_loop_leaves(plain(4), make=Student)


@needs_compiler
@pytest.mark.parametrize("prepare", [torch.compile, lambda m: (m.compile(), m)[1]])
def test_compiled_dropout_runs_uncompiled_where_it_is_replayed(prepare):
    """The first step, which finds that out, counts for no hypergradient."""
    hypergradients = []
    for engine in ("adjoint", "unroll"):
        settings = {"engine": engine, "unroll": 2, "every": 2}
        with pytest.warns(UserWarning, match="runs uncompiled"):
            lab = trained(
                plain(4), wrapped=True, make=Dropped, prepare=prepare, settings=settings
            )
        assert lab.optimizer.metrics["meta_updates"] == 1
        hypergradients.append(lab.hypergradient)
        lab.optimizer.close()
    assert hypergradients[0].abs().sum() > 0
    torch.testing.assert_close(*hypergradients, rtol=1e-6, atol=1e-12)


@needs_compiler
def test_compiled_dropout_is_compiled_once():
    counters = torch._dynamo.utils.counters["stats"]
    seen = []

    def loop(lab):
        for _ in range(10):
            plain(10)(lab)
            seen.append(counters["unique_graphs"])

    with pytest.warns(UserWarning, match="runs uncompiled"):
        lab = trained(
            loop, wrapped=True, make=Dropped, prepare=torch.compile,
            settings={"unroll": 2, "every": 5},
        )
    assert lab.optimizer.metrics["meta_updates"] >= 18
    assert seen[0] > 0 and len(set(seen)) == 1


@needs_compiler
def test_compiled_dropout_with_fallback_random(monkeypatch):
    import torch._inductor.config

    torch._dynamo.reset()  # what was compiled without it
    monkeypatch.setattr(torch._inductor.config, "fallback_random", True)
    assert_differentiates(plain(1), make=Dropped, prepare=torch.compile)


# a replay that is not faithful, by whatever cause


class Counting(MLP):
    """Behaves otherwise at every call."""

    calls = 0

    def forward(self, inputs):
        self.calls += 1
        return super().forward(inputs) * (1 + 0.1 * self.calls)


def test_a_student_that_changes_from_call_to_call_is_refused():
    lab = Lab(Counting)
    lab.wrap()
    with pytest.raises(ValueError, match="expected the same ones") as error:
        plain(1)(lab)
    assert_one_sentence(error)


class OwnGenerator(MLP):
    """Noise from a generator that nobody else knows."""

    def __init__(self):
        super().__init__()
        self.generator = [torch.Generator().manual_seed(0)]

    def forward(self, inputs):
        return super().forward(inputs + torch.randn(inputs.shape, generator=self.generator[0]))


def test_a_generator_of_the_student_s_own_is_refused():
    lab = Lab(OwnGenerator)
    lab.wrap()
    with pytest.raises(ValueError, match="no random generator of your own") as error:
        plain(1)(lab)
    assert_one_sentence(error)


def test_parameters_that_another_optimizer_moved_before_the_step_are_refused():
    lab = Lab(optimizer=lambda params: torch.optim.SGD(list(params)[:2], lr=0.1))
    other = torch.optim.SGD(lab.student.fc2.parameters(), lr=0.1)
    lab.wrap()
    inputs, teacher_logits, labels = next(lab.batches(1))
    lab.criterion(lab.student(inputs), teacher_logits, labels).backward()
    other.step()
    with pytest.raises(ValueError, match="leave inputs, targets, parameters"):
        lab.optimizer.step()


class Remembering(MLP):
    """Keeps what is no tensor: a counter, a list that is made anew, an attribute that appears."""

    def forward(self, inputs):
        self.calls = getattr(self, "calls", 0) + 1
        self.sizes = [*getattr(self, "sizes", []), len(inputs)]
        self.last = super().forward(inputs)
        return self.last


def test_attributes_are_left_as_the_plain_loop_leaves_them():
    lab = trained(plain(3), wrapped=True, make=Remembering)
    assert lab.student.calls == 3
    assert lab.student.sizes == [9, 9, 9]
    assert len(lab.student.last) == 9


class OneBlockTwice(nn.Module):
    """A module with two names, each of whose tensors is tied to itself."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.second = self.first
        self.last = nn.Linear(8, CLASSES)

    def forward(self, inputs):
        hidden = torch.tanh(self.first(inputs))
        return self.last(torch.tanh(self.second(hidden)))


@pytest.mark.parametrize("steps", [1, 3])
def test_a_module_with_several_names(steps):
    assert_differentiates(plain(steps), steps=steps, make=OneBlockTwice)
    assert_leaves_what_the_plain_loop_leaves(plain(steps), make=OneBlockTwice)


# memory formats, activation checkpointing


class ChannelsLast(ConvNet):
    def forward(self, inputs):
        return super().forward(inputs.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw"])
def test_channels_last(optimizer):
    def prepare(student):
        return student.to(memory_format=torch.channels_last)

    options = dict(make=ChannelsLast, shape=(2, 6, 6), optimizer=optimizer)
    assert_differentiates(plain(2), steps=2, prepare=prepare, **options)
    assert_leaves_what_the_plain_loop_leaves(plain(2), prepare=prepare, **options)


class Block(nn.Module):
    """Random numbers and batch norm, which a recomputation has to repeat."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 12)
        self.norm = nn.BatchNorm1d(12)

    def forward(self, hidden):
        return F.dropout(torch.tanh(self.norm(self.fc(hidden))), 0.3)


class Deep(nn.Module):
    reentrant = None

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.block = Block()
        self.last = nn.Linear(12, CLASSES)

    def forward(self, inputs):
        hidden = torch.tanh(self.first(inputs))
        if self.reentrant is None:
            hidden = self.block(hidden)
        else:
            hidden = checkpoint(self.block, hidden, use_reentrant=self.reentrant)
        return self.last(hidden)


class Checkpointed(Deep):
    reentrant = False


class CheckpointedReentrant(Deep):
    reentrant = True


@pytest.mark.parametrize("method", ["online", "lookahead", "paper"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("make", [Checkpointed, CheckpointedReentrant])
def test_activation_checkpointing(make, steps, method):
    """It changes nothing but memory; neither engine sees it."""
    settings = {"unroll": steps, "every": steps, "method": method}
    expected = trained(plain(steps), wrapped=True, make=Deep, settings=settings)
    for engine in ("adjoint", "unroll"):
        lab = trained(
            plain(steps), wrapped=True, make=make, settings={**settings, "engine": engine}
        )
        torch.testing.assert_close(lab.hypergradient, expected.hypergradient, rtol=1e-9, atol=0)


class Convolutional(Deep):
    """In float32 its replays' batch norm is none of torch's, which recomputations must repeat."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh())
        self.last = nn.Linear(12, CLASSES)

    def forward(self, inputs):
        hidden = torch.tanh(self.first(inputs)).view(-1, 3, 2, 2)
        if self.reentrant is None:
            hidden = self.block(hidden)
        else:
            hidden = checkpoint(self.block, hidden, use_reentrant=self.reentrant)
        return self.last(hidden.flatten(1))


class ConvolutionalCheckpointed(Convolutional):
    reentrant = False


@pytest.mark.parametrize("steps", [1, 3])
def test_activation_checkpointing_of_convolutions(steps):
    settings = {"unroll": steps, "every": steps}
    expected, actual = (
        trained(plain(steps), wrapped=True, make=make, dtype=torch.float32, settings=settings)
        for make in (Convolutional, ConvolutionalCheckpointed)
    )
    torch.testing.assert_close(
        actual.hypergradient, expected.hypergradient, rtol=1e-4, atol=1e-8
    )


@pytest.mark.parametrize("make", [Checkpointed, CheckpointedReentrant])
def test_activation_checkpointing_leaves_the_student_alone(make):
    """Recomputation passes batch norm once more; that of a replay must not."""
    assert_leaves_what_the_plain_loop_leaves(plain(2), make=make)


def test_activation_checkpointing_saves_memory_in_replays_too():
    """The block runs again in the backward pass of the meta loss, instead of being kept."""
    counts = {}
    for make in (Deep, Checkpointed):
        lab = Lab(make)
        lab.wrap()
        calls = []
        lab.student.block.register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(torch.is_grad_enabled())
        )
        plain(2)(lab)
        del calls[:]
        plain(1)(lab)
        counts[make] = sum(calls)
    # once more for every backward pass at least; some versions of torch start over in between
    assert counts[Deep] == 2 and counts[Checkpointed] >= 4


# replicas


def test_data_parallel_on_one_device():
    assert_differentiates(plain(2), steps=2, prepare=nn.DataParallel)


def test_data_parallel_on_several_devices_is_refused():
    lab = Lab()
    lab.called = nn.DataParallel(lab.student)
    lab.called.device_ids = [0, 1]
    with pytest.raises(ValueError, match="student runs on 2 devices at once") as error:
        lab.wrap()
    assert_one_sentence(error)


@contextmanager
def process_group(backend, **settings):
    torch.distributed.init_process_group(backend, rank=0, **settings)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_distributed_data_parallel_in_one_process():
    with process_group("gloo", world_size=1, store=torch.distributed.HashStore()):
        prepare = nn.parallel.DistributedDataParallel
        assert_differentiates(plain(3), steps=3, prepare=prepare)
        assert_leaves_what_the_plain_loop_leaves(plain(3), prepare=prepare)


def test_a_student_spread_over_devices_is_refused():
    lab = Lab()
    lab.student.fc2.to("meta")
    with pytest.raises(ValueError, match="student runs on 2 devices at once") as error:
        lab.wrap()
    assert_one_sentence(error)


def test_a_scripted_student_is_refused():
    lab = Lab()
    lab.called = torch.jit.script(lab.student)
    with pytest.raises(ValueError, match="torch.compile") as error:
        lab.wrap()
    assert_one_sentence(error)


def test_sparse_gradients_are_refused():
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(4, CLASSES, sparse=True)

    with pytest.raises(ValueError, match="sparse=False") as error:
        Lab(Student, optimizer="sgd").wrap()
    assert_one_sentence(error)


# layers


class Normalised(nn.Module):
    """A classifier by cosine similarity."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, hidden):
        return 4 * F.linear(F.normalize(hidden), F.normalize(self.fc.weight))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 12)

    def forward(self, hidden):
        query, key, value = self.fc(hidden.view(-1, 3, 4)).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).flatten(1)


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 12)

    def forward(self, hidden):
        return hidden + self.embed(hidden.sum(1).detach().abs().long().clamp(max=4))


def image(*layers):
    return nn.Sequential(nn.Unflatten(1, (3, 2, 2)), *layers, nn.Flatten())


LAYERS = {
    "layer norm": lambda: nn.LayerNorm(12),
    "group norm": lambda: nn.GroupNorm(3, 12),
    "RMS norm": lambda: nn.RMSNorm(12),
    "batch norm": lambda: nn.BatchNorm1d(12),
    "instance norm": lambda: image(nn.InstanceNorm2d(3, affine=True)),
    "cosine": Normalised,
    "attention": Attention,
    "embedding": Embedded,
    "transposed convolution": lambda: image(nn.ConvTranspose2d(3, 3, 3, padding=1)),
    "grouped convolution": lambda: image(nn.Conv2d(3, 3, 3, padding=1, groups=3)),
    "max pooling": lambda: image(nn.MaxPool2d(2), nn.Conv2d(3, 12, 1)),
    "average pooling": lambda: image(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 12, 1)),
    "interpolation": lambda: image(
        nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(3, 3, 3, stride=2, padding=1)
    ),
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "Mish": nn.Mish,
    "ELU": nn.ELU,
    "PReLU": nn.PReLU,
    "Hardswish": nn.Hardswish,
    "Softplus": nn.Softplus,
    "RReLU": nn.RReLU,
    "alpha dropout": lambda: nn.AlphaDropout(0.3),
}


@pytest.mark.filterwarnings("ignore:The student has an operator without forward-mode")
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    """torch's own second derivatives are not taken on trust: weight norm's was wrong."""

    def make():
        return nn.Sequential(nn.Linear(8, 12), LAYERS[name](), nn.Linear(12, CLASSES))

    assert_differentiates(plain(2), steps=2, make=make, rtol=1e-4)


def parametrised(kind):
    class Student(MLP):
        def __init__(self):
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the old style is deprecated
                self.fc1, self.fc2 = kind(self.fc1), kind(self.fc2)

    return Student


PARAMETRISED = {
    "weight_norm, old": torch.nn.utils.weight_norm,
    "weight_norm": torch.nn.utils.parametrizations.weight_norm,
    "orthogonal": torch.nn.utils.parametrizations.orthogonal,
    "spectral_norm, old": torch.nn.utils.spectral_norm,
    "spectral_norm": torch.nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:The student has an operator without forward-mode")
@pytest.mark.parametrize("name", PARAMETRISED)
def test_parametrised_layers(name):
    make = parametrised(PARAMETRISED[name])
    if "spectral" in name:
        # its power iteration goes on with every call in training mode, and counts as constant
        settings = {"unroll": 3, "every": 3}
        assert_same_hypergradient(plain(3), plain(3), make=make, settings=settings)
        assert_differentiates(plain(3), steps=3, make=lambda: make().eval())
    else:
        assert_differentiates(plain(3), steps=3, make=make)
    assert_leaves_what_the_plain_loop_leaves(plain(3), make=make)


def test_parametrisations_cached_by_the_loop():
    """A replay must not see the weights that were computed for the call."""

    def loop(lab):
        for inputs, teacher_logits, labels in lab.batches(2):
            lab.optimizer.zero_grad()
            with nn.utils.parametrize.cached():
                lab.criterion(lab.student(inputs), teacher_logits, labels).backward()
                lab.optimizer.step()

    make = parametrised(PARAMETRISED["weight_norm"])
    assert_differentiates(loop, steps=2, make=make)
    assert_leaves_what_the_plain_loop_leaves(loop, make=make)


class Recurrent(nn.Module):
    kind = nn.LSTM

    def __init__(self):
        super().__init__()
        self.rnn = self.kind(4, 6, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, inputs):
        return self.head(self.rnn(inputs)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers(kind):
    make = type("Student", (Recurrent,), {"kind": kind})
    assert_differentiates(plain(2), steps=2, make=make, shape=(3, 4))
    settings = {"unroll": 2, "every": 2}
    assert_same_hypergradient(  # float32 has fused operators of its own
        plain(2), plain(2), make=make, shape=(3, 4), dtype=torch.float32, settings=settings,
        tolerance=1e-4,
    )


class FrozenNorm(ConvNet):
    """Batch norm in eval mode while the rest trains."""

    def train(self, mode=True):
        super().train(mode)
        self.bn1.eval()
        self.bn2.eval()
        return self

    def __init__(self):
        super().__init__()
        self.train()


class Evaluating(ConvNet):
    def __init__(self):
        super().__init__()
        self.eval()


class FrozenStem(ConvNet):
    """Batch norm trains behind a layer that does not."""

    def __init__(self):
        super().__init__()
        self.conv1.requires_grad_(False)


@pytest.mark.filterwarnings("error:Forward mode")
@pytest.mark.parametrize("steps", [1, 3])
def test_batch_norm_behind_a_frozen_layer_keeps_forward_mode(steps):
    assert_differentiates(plain(steps), steps=steps, make=FrozenStem, shape=(2, 6, 6))


@pytest.mark.parametrize("make", [FrozenNorm, Evaluating])
def test_eval_mode_and_frozen_batch_norm(make):
    assert_differentiates(plain(2), steps=2, make=make, shape=(2, 6, 6))
    assert_leaves_what_the_plain_loop_leaves(plain(2), make=make, shape=(2, 6, 6))


def test_hooks_of_the_user_fire_in_replays_too():
    seen = []

    def loop(lab):
        lab.student.fc1.register_forward_hook(lambda *args: seen.append(args[2]))
        plain(1)(lab)

    assert_differentiates(loop)
    wrapped = trained(plain(1), wrapped=True)
    before = len(seen)
    wrapped.student.fc1.register_forward_hook(lambda *args: seen.append(args[2]))
    plain(1)(wrapped)
    assert len(seen) - before == 3  # the call, its replay, the meta batch


# which parameters train


def test_parameters_that_no_optimizer_holds():
    assert_differentiates(
        plain(2),
        steps=2,
        optimizer=lambda params: torch.optim.SGD(list(params)[2:], lr=0.1, momentum=0.9),
    )


def thaw_after(step, group):
    """Trains the second layer alone at first, then both."""

    def loop(lab):
        first = list(lab.student.fc1.parameters())
        for index, (inputs, teacher_logits, labels) in enumerate(lab.batches(4)):
            for param in first:
                param.requires_grad_(index >= step)
            if index == step and group:
                group(lab.optimizer).add_param_group({"params": first, "lr": 0.05})
            lab.optimizer.zero_grad()
            lab.criterion(lab.student(inputs), teacher_logits, labels).backward()
            nn.utils.clip_grad_norm_(lab.student.parameters(), 0.05)
            lab.optimizer.step()

    return loop


@pytest.mark.parametrize("step", [1, 3])
def test_a_frozen_parameter_thawed_later(step):
    assert_differentiates(thaw_after(step, None), steps=4, rtol=1e-4)


def head_only(params):
    return torch.optim.SGD(list(params)[2:], lr=0.1, momentum=0.9)


GROUPS = {
    "through the wrapper": lambda optimizer: optimizer,
    "behind its back": lambda optimizer: getattr(optimizer, "optimizer", optimizer),
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("step", [1, 3])
def test_add_param_group(step, name):
    loop = thaw_after(step, GROUPS[name])
    assert_differentiates(loop, steps=4, optimizer=head_only, rtol=1e-4)
    assert_leaves_what_the_plain_loop_leaves(loop, optimizer=head_only)


def test_a_layer_replaced_after_wrapping():
    """The new head is added to the optimizer behind the wrapper's back."""

    def loop(lab):
        torch.manual_seed(5)
        lab.student.fc2 = nn.Linear(12, CLASSES).double()
        inner = getattr(lab.optimizer, "optimizer", lab.optimizer)
        inner.add_param_group({"params": lab.student.fc2.parameters(), "lr": 0.05})
        plain(2)(lab)

    assert_differentiates(loop, steps=2)


# copies


def test_moving_averages_of_the_student():
    """Copies carry no hook of ours that lives, and follow the student as in the plain loop."""

    def loop(lab):
        lab.average = AveragedModel(lab.student)
        lab.copy = copy.deepcopy(lab.student)
        for inputs, teacher_logits, labels in lab.batches(3):
            lab.optimizer.zero_grad()
            lab.copy(inputs).sum().backward()
            lab.criterion(lab.called(inputs), teacher_logits, labels).backward()
            lab.average(inputs)
            lab.optimizer.step()
            lab.average.update_parameters(lab.student)
            for mine, theirs in zip(lab.copy.parameters(), lab.student.parameters()):
                mine.data.lerp_(theirs.data, 0.1)

    assert_differentiates(loop, steps=3)
    assert_leaves_what_the_plain_loop_leaves(loop)
    expected, lab = (trained(loop, wrapped=wrapped) for wrapped in (False, True))
    for name in ("average", "copy"):
        mine, theirs = getattr(lab, name), getattr(expected, name)
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_a_copy_keeps_nothing_of_the_wrapper():
    lab = Lab()
    lab.wrap()
    for other in (copy.deepcopy(lab.student), pickle.loads(pickle.dumps(lab.student))):
        hooks = [*other._forward_hooks.values(), *other._forward_pre_hooks.values()]
        assert all(hook._method is None for hook in hooks)
        assert all(not p._post_accumulate_grad_hooks for p in other.parameters())
        # the wrapper does not take the copy's output for the student's
        with pytest.raises(ValueError, match="the wrapped student returned"):
            lab.criterion(other(lab.inputs()), lab.teacher_logits(), lab.labels())
