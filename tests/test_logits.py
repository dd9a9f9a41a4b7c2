"""Logits that the loop makes of the student's output: cut, shifted, masked, upsampled, combined."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kd_balance import MetaWeightNet, WeightedKDLoss
from tests.habits import (
    Lab,
    assert_differentiates,
    assert_leaves_what_the_plain_loop_leaves,
    assert_one_sentence,
    plain,
    trained,
)
from tests.students import CLASSES

WIDE = CLASSES + 3
ORDER = torch.tensor([6, 0, 3, 1, 4])


class Wide(nn.Module):
    """More classes than the teacher has, and an auxiliary head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 6)
        self.head, self.second = nn.Linear(6, WIDE), nn.Linear(6, WIDE)

    def forward(self, inputs):
        hidden = torch.tanh(self.body(inputs))
        return self.head(hidden), self.second(hidden)


class Sequence(nn.Module):
    """[B, T, 8] to [B, T, V]."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.GRU(8, 6, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, inputs):
        return self.head(self.body(inputs)[0])


class Image(nn.Module):
    """[B, 2, H, W] to [B, C, H, W]."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, CLASSES, 1)

    def forward(self, inputs):
        return self.head(torch.tanh(self.body(inputs)))


def first(function):
    return lambda student, x: function(student(x)[0])


def whole(function):
    return lambda student, x: function(student(x))


def in_place(logits):
    logits = logits[:, :CLASSES]
    logits *= 0.5
    logits[:, 1] = -3.0
    return logits


def standardised(logits):
    return (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True)


def every_second(logits):
    chosen = torch.arange(logits.shape[1]) % 2 == 0
    mask = chosen.expand(len(logits), -1)
    return logits[mask].view(len(logits), -1, CLASSES)


OF_CLASSES = {
    "cut": first(lambda z: z[:, :CLASSES]),
    "background dropped": first(lambda z: z[:, 3:]),
    "reordered": first(lambda z: z[:, ORDER]),
    "selected": first(lambda z: z.index_select(1, ORDER)),
    "selected by a mask": first(lambda z: z[:, torch.arange(WIDE) % 3 != 0]),
    "gathered": first(lambda z: z.gather(1, ORDER.expand(len(z), -1))),
    "chunks": first(lambda z: torch.cat([z.split(3, 1)[0], z.chunk(4, 1)[1]], 1)),
    "merged classes": first(lambda z: z @ torch.eye(WIDE, CLASSES).cumsum(0).to(z)),
    "grouped by logsumexp": first(
        lambda z: torch.cat([z[:, :4], z[:, 4:].logsumexp(1, keepdim=True)], 1)
    ),
    "temperature": first(lambda z: z[:, :CLASSES] / 2.5),
    "scaled by class": first(lambda z: z[:, :CLASSES] * torch.arange(1, 6).to(z)),
    "shifted": first(lambda z: z[:, :CLASSES] + torch.arange(5).to(z)),
    "in place": first(in_place),
    "masked": first(lambda z: z[:, :CLASSES].masked_fill(torch.arange(5) == 2, -30.0)),
    "where": first(lambda z: torch.where(z > 0, z, 0.1 * z)[:, :CLASSES]),
    "relu": first(lambda z: z[:, :CLASSES].relu()),
    "largest subtracted": first(lambda z: (z - z.amax(1, keepdim=True))[:, :CLASSES]),
    "log probabilities": first(lambda z: z.log_softmax(1)[:, :CLASSES]),
    "standardised": first(lambda z: standardised(z[:, :CLASSES])),
    "normalised": first(lambda z: 4 * F.normalize(z[:, :CLASSES], dim=1)),
    "capped": first(lambda z: 3 * torch.tanh(z[:, :CLASSES] / 3)),
    "squared": first(lambda z: z[:, :CLASSES] * z[:, 3:]),
    "by einsum": first(lambda z: torch.einsum("nc,nd->nc", z, z.exp())[:, :CLASSES]),
    "checkpointed": first(
        lambda z: checkpoint(lambda y: y.tanh()[:, :CLASSES], z, use_reentrant=False)
    ),
    "two heads": whole(lambda heads: (heads[0] + heads[1])[:, :CLASSES] / 2),
    "two heads' probabilities": whole(
        lambda heads: (heads[0].softmax(1) + heads[1].softmax(1)).log()[:, :CLASSES]
    ),
    "two views": lambda student, x: (student(x)[0] + student(x.flip(1))[1])[:, :CLASSES],
}
OF_POSITIONS = {
    "shifted": whole(lambda z: z[:, :-1]),
    "shifted the other way": whole(lambda z: z[:, 1:]),
    "through the time axis": whole(lambda z: z.transpose(1, 2)[..., :-1].transpose(1, 2)),
    "unbound": whole(lambda z: torch.stack(z.unbind(1)[:-1], 1)),
    "flattened": whole(lambda z: z[:, :-1].reshape(-1, CLASSES).view(len(z), -1, CLASSES)),
    "padded": whole(lambda z: F.pad(z, (0, 0, 1, -2))),
}
OF_PIXELS = {
    "bilinear": whole(lambda z: F.interpolate(z, size=(2, 3), mode="bilinear")),
    "corners": whole(lambda z: F.interpolate(z, (2, 3), mode="bilinear", align_corners=True)),
    "nearest": whole(lambda z: F.interpolate(z, scale_factor=(1, 1.5))),
    "bicubic": whole(lambda z: F.interpolate(z, size=(2, 3), mode="bicubic")),
    "pooled": whole(lambda z: F.adaptive_avg_pool2d(z.exp(), (2, 3))),
    "blurred": whole(lambda z: F.conv_transpose2d(z, torch.ones(CLASSES, 1, 1, 2).to(z), groups=5)),
}
KINDS = {
    "classes": (OF_CLASSES, {"make": Wide}),
    "positions": (OF_POSITIONS, {
        "make": Sequence, "shape": (6, 8), "places": (5,), "criterion": {"class_dim": -1},
    }),
    "pixels": (OF_PIXELS, {"make": Image, "shape": (2, 2, 2), "places": (2, 3)}),
}
FUNCTIONS = [(kind, name) for kind, (functions, _) in KINDS.items() for name in functions]


def options_of(kind, name):
    functions, options = KINDS[kind]
    call = functions[name]
    forward = {"meta_forward": lambda student, batch: (call(student, batch[0]), batch[1])}
    return {"call": call, "settings": forward, **options}


@pytest.mark.parametrize("engine", ["adjoint", "unroll"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("kind, name", FUNCTIONS)
def test_the_hypergradient_passes_through_what_the_loop_makes_of_the_output(
    kind, name, steps, engine
):
    options = options_of(kind, name)
    options["settings"] = {**options["settings"], "engine": engine}
    assert_differentiates(plain(steps), steps=steps, rtol=1e-6, **options)


@pytest.mark.parametrize("kind, name", FUNCTIONS)
def test_the_student_is_that_of_the_plain_loop(kind, name):
    assert_leaves_what_the_plain_loop_leaves(plain(3), **options_of(kind, name))


@pytest.mark.parametrize("engine", ["adjoint", "unroll"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("named", [False, True])
def test_classes_that_the_loop_masks_in_student_and_teacher(named, steps, engine):
    mask = torch.tensor([0.0, 0.0, 0.0, float("-inf"), 0.0])

    def loop(lab):
        for inputs, teacher_logits, labels in lab.batches(steps):
            lab.meta[0][1].masked_fill_(lab.meta[0][1] == 3, 0)
            labels = labels.masked_fill(labels == 3, 0)
            lab.optimizer.zero_grad()
            lab.criterion(lab.call(lab.called, inputs), teacher_logits + mask, labels).backward()
            lab.optimizer.step()

    def cut(output):
        return output[0][:, :CLASSES] + mask.to(output[0])

    options = {"make": Wide, "call": lambda student, x: cut(student(x))}
    settings = {"engine": engine}
    if named:
        settings["to_logits"] = cut
    else:
        settings["meta_forward"] = lambda student, batch: (cut(student(batch[0])), batch[1])

    assert_differentiates(loop, steps=steps, rtol=1e-6, settings=settings, **options)


UNKNOWN = {  # what a graph does not tell, or what may mean something else on another batch
    "gathered", "merged classes", "grouped by logsumexp", "scaled by class", "shifted", "in place",
    "masked", "where", "relu", "largest subtracted", "standardised", "normalised", "capped",
    "squared", "by einsum", "checkpointed", "two heads' probabilities", "two views", "flattened",
    "unbound", "padded", "pooled", "blurred",
}


@pytest.mark.parametrize("kind, name", FUNCTIONS)
def test_meta_batches_are_treated_alike_or_refused(kind, name):
    options = options_of(kind, name)
    if kind != "positions" and name in UNKNOWN or name in {"flattened", "unbound", "padded"}:
        with pytest.raises(ValueError, match="to_logits=|meta_forward=") as error:
            trained(plain(1), wrapped=True, **{**options, "settings": {}})
        assert_one_sentence(error)
        return
    expected = trained(plain(4), wrapped=True, **options)
    lab = trained(plain(4), wrapped=True, **{**options, "settings": {}})
    assert lab.hypergradient.abs().sum() > 0
    torch.testing.assert_close(lab.hypergradient, expected.hypergradient)


@pytest.mark.parametrize("kind, name", FUNCTIONS)
def test_a_function_that_is_named_is_used_for_both(kind, name):
    if name == "two views":
        pytest.skip("of two calls")
    functions, options = KINDS[kind]
    named = {"to_logits": lambda output: functions[name](lambda x: x, output)}
    expected = trained(plain(4), wrapped=True, **options_of(kind, name))
    lab = trained(plain(4), wrapped=True, call=functions[name], settings=named, **options)
    torch.testing.assert_close(lab.hypergradient, expected.hypergradient)


def test_a_wrong_function_is_refused():
    options = options_of("classes", "cut")
    named = {"to_logits": lambda output: output[0][:, 3:]}
    with pytest.raises(ValueError, match="losses that differ") as error:
        trained(plain(1), wrapped=True, **{**options, "settings": named})
    assert_one_sentence(error)


# labels that are cut as the logits are


def causal(flat=False, copy=False):
    """A causal language model's loop over batches of tokens."""

    def loop(lab):
        generator = torch.Generator().manual_seed(7)
        for _ in range(2):
            tokens = torch.randint(CLASSES, (9, 6), generator=generator)
            teacher_logits = torch.randn(9, 5, CLASSES, generator=generator).to(lab.dtype)
            logits, labels = lab.called(tokens)[:, :-1], tokens[:, 1:]
            if copy:
                labels = labels.masked_fill(labels == 2, -100)
            if flat:
                logits = logits.reshape(-1, CLASSES)
                labels, teacher_logits = labels.reshape(-1), teacher_logits.view(-1, CLASSES)
            lab.optimizer.zero_grad()
            lab.criterion(logits, teacher_logits, labels).backward()
            lab.optimizer.step()

    return loop


class Language(nn.Module):
    """[B, T] to [B, T, V]."""

    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(CLASSES, 6), nn.GRU(6, 6, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens))[0])


def tokens_of(length):
    return torch.randint(CLASSES, (7, length), generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("length", [6, 9])
def test_a_causal_language_model_needs_no_meta_forward(flat, copy, length):
    tokens = tokens_of(length)
    options = {"make": Language, "criterion": {"class_dim": -1}}

    def forward(student, batch):
        return student(batch)[:, :-1], batch[:, 1:]

    by_hand = {"meta": [tokens], "meta_forward": forward}
    expected = trained(causal(flat, copy), wrapped=True, settings=by_hand, **options)
    settings = {"meta": [(tokens, tokens)]}
    lab = trained(causal(flat, copy), wrapped=True, settings=settings, **options)
    assert lab.hypergradient.abs().sum() > 0
    torch.testing.assert_close(lab.hypergradient, expected.hypergradient)


def padded(flat):
    """A causal language model's loop that fills the place of the label it has not."""

    def loop(lab):
        generator = torch.Generator().manual_seed(7)
        for _ in range(2):
            tokens = torch.randint(CLASSES, (9, 6), generator=generator)
            teacher_logits = torch.randn(9, 6, CLASSES, generator=generator).to(lab.dtype)
            logits, labels = lab.called(tokens), moved(tokens)
            if flat:
                logits, teacher_logits = (z.reshape(-1, CLASSES) for z in (logits, teacher_logits))
                labels = labels.reshape(-1)
            lab.optimizer.zero_grad()
            lab.criterion(logits, teacher_logits, labels).backward()
            lab.optimizer.step()

    return loop


def moved(tokens):
    return torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), -100)], 1)


@pytest.mark.parametrize("flat", [False, True])
def test_meta_labels_that_are_not_moved_as_the_loop_s_are_refused(flat):
    tokens = tokens_of(6)
    options = {"make": Language, "criterion": {"class_dim": -1}, "wrapped": True}
    with pytest.raises(ValueError, match="moved by 1 place.*meta_forward=") as error:
        trained(padded(flat), settings={"meta": [(tokens, tokens)]}, **options)
    assert_one_sentence(error)
    lab = trained(padded(flat), settings={"meta": [(tokens, moved(tokens))]}, **options)

    def forward(student, batch):
        return student(batch), moved(batch)

    by_hand = {"meta": [tokens], "meta_forward": forward}
    expected = trained(padded(flat), settings=by_hand, **options)
    assert lab.hypergradient.abs().sum() > 0
    torch.testing.assert_close(lab.hypergradient, expected.hypergradient)


def test_labels_that_nobody_has_seen_whole_are_refused():
    """Whether the loop shifts them or cuts them alike is not known."""

    def loop(lab):
        labels = torch.randint(CLASSES, (9, 5))
        teacher_logits = torch.randn(9, 5, CLASSES, dtype=lab.dtype)
        lab.criterion(lab.called(tokens_of(6)[:1].expand(9, -1))[:, :-1], teacher_logits, labels)
        lab.criterion(
            lab.called(torch.zeros(9, 6, dtype=torch.long))[:, :-1], teacher_logits, labels
        ).backward()
        lab.optimizer.step()

    settings = {"meta": [(tokens_of(6), tokens_of(6))]}
    with pytest.raises(ValueError, match="meta_forward=") as error:
        trained(loop, wrapped=True, settings=settings, make=Language, criterion={"class_dim": -1})
    assert_one_sentence(error)


# refusals


@pytest.mark.parametrize("known_by", ["bias", "meta_loss"])
def test_a_teacher_of_a_lower_resolution_is_refused_by_both_shapes(known_by):
    """Which the loop upsamples, as it does the student's output, but by another factor."""
    counts = torch.ones(CLASSES, dtype=torch.long)
    lab = Lab(make=Image, shape=(2, 4, 4), places=(8, 8))

    def teacher(inputs):
        return Image().double()(inputs[..., ::2, ::2])

    settings = {"teacher": teacher, "meta_loss": "hard" if known_by == "bias" else "mix"}
    long_tailed = known_by == "bias"
    lab.criterion = (
        WeightedKDLoss.long_tailed(counts) if long_tailed else WeightedKDLoss(MetaWeightNet())
    )
    shapes = {"bias": r"\(7, 8, 8\)", "meta_loss": r"\(7, 5, 8, 8\)"}
    both = rf"teacher gave logits of shape \(7, 5, 2, 2\).*{shapes[known_by]}.*F.interpolate"
    with pytest.raises(ValueError, match=both) as error:
        lab.wrap(**settings)
        for inputs, teacher_logits, labels in lab.batches(1):
            logits = F.interpolate(lab.called(inputs), scale_factor=2)
            lab.criterion(logits, teacher_logits, labels).backward()
            lab.optimizer.step()
    assert_one_sentence(error)


def test_a_teacher_of_the_student_s_resolution_is_upsampled_with_it():
    settings = {"meta_loss": "mix", "teacher": Image().double()}
    options = {"make": Image, "shape": (2, 1, 1), "places": (2, 2), "settings": settings}
    lab = trained(plain(1), wrapped=True, call=whole(lambda z: F.interpolate(z, scale_factor=2)),
                  **options)
    assert lab.hypergradient.abs().sum() > 0


def test_a_mask_over_samples_is_refused_in_one_sentence():
    call = first(lambda z: z[torch.arange(len(z)) >= 0][:, :CLASSES])
    with pytest.raises(ValueError, match="to_logits=.*meta_forward=[.]$") as error:
        trained(plain(1), wrapped=True, make=Wide, call=call)
    assert_one_sentence(error)


@pytest.mark.parametrize("every", [1, 4])
def test_a_head_that_the_loop_applies_is_refused(every):
    def call(student, inputs):
        return student.head(torch.tanh(student.body(inputs)))[:, :CLASSES]

    with pytest.raises(ValueError, match="the student's own output") as error:
        trained(
            plain(1), wrapped=True, make=Wide, call=call, settings={"every": every, "unroll": 1}
        )
    assert_one_sentence(error)


def test_what_cannot_be_differentiated_twice_is_refused():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return 2 * logits

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return 2 * gradient

    options = {"make": Wide, "call": first(lambda z: Once.apply(z)[:, :CLASSES])}
    with pytest.raises(ValueError, match="to_logits=") as error:
        trained(plain(1), wrapped=True, **options)
    assert_one_sentence(error)


def test_a_student_that_changes_from_call_to_call_is_refused_behind_a_slice_too():
    calls = []

    class Changing(Wide):
        def forward(self, inputs):
            calls.append(inputs)
            return [(1 + 0.1 * len(calls)) * logits for logits in super().forward(inputs)]

    with pytest.raises(ValueError, match="losses that differ"):
        trained(plain(1), wrapped=True, **{**options_of("classes", "cut"), "make": Changing})
