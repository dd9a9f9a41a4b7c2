"""Changes of gradients that the loop names."""

import pytest
import torch

from kd_balance.check import check_hypergradient
from tests.habits import (
    Lab,
    assert_differentiates,
    assert_leaves_what_the_plain_loop_leaves,
    assert_one_sentence,
    trained,
)

ENGINES = ["adjoint", "unroll"]


def centralised(gradients):
    return [g - g.mean(1, keepdim=True) if g.dim() > 1 else g for g in gradients]


def noisy(gradients):
    return [g + 0.01 * torch.randn(g.shape).to(g) for g in gradients]


def normalised(gradients):
    return [g / (g.norm() + 1e-3) for g in gradients]


def adaptively_clipped(gradients):
    total = torch.stack([g.norm() for g in gradients]).norm()
    return [g * (0.1 / total).clamp(max=1.0) for g in gradients]


def by_layer(gradients):
    return [g * 0.9**i for i, g in enumerate(gradients)]


def masked(gradients):
    return [torch.where(torch.arange(g.shape[0]).view(-1, *[1] * (g.dim() - 1)) % 2 == 0, g, 0)
            for g in gradients]


def signs(gradients):
    return [g.sign() for g in gradients]


def compressed(gradients):
    return [g.abs().sqrt() * g.sign() for g in gradients]


def zeros(gradients):
    return [torch.zeros_like(gradients[0]), *gradients[1:]]


FUNCTIONS = [
    centralised, noisy, normalised, adaptively_clipped, by_layer, masked, compressed, zeros,
]


def loop_with(*functions, steps=1, clip=None, accumulate=1):
    """Gradients changed by functions: by hand in a plain loop."""

    def loop(lab):
        for inputs, teacher_logits, labels in lab.batches(steps):
            lab.optimizer.zero_grad()
            for _ in range(accumulate):
                loss = lab.criterion(lab.called(inputs), teacher_logits, labels)
                (loss / accumulate).backward()
            for function in functions:
                if hasattr(lab.optimizer, "transform_gradients"):
                    lab.optimizer.transform_gradients(function)
                else:
                    params = list(lab.student.parameters())
                    with torch.no_grad():
                        after = function([p.grad.clone() for p in params])
                    for param, gradient in zip(params, after, strict=True):
                        param.grad = gradient
            if clip:
                torch.nn.utils.clip_grad_norm_(lab.student.parameters(), clip)
            lab.optimizer.step()

    return loop


@pytest.mark.parametrize("steps, engine", [(4, "adjoint"), (1, "unroll")])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_hypergradients_pass_through_a_named_function(function, steps, engine):
    loop = loop_with(function, steps=steps)
    assert_differentiates(loop, steps=steps, rtol=1e-6, settings={"engine": engine})


@pytest.mark.parametrize("engine", ENGINES)
def test_several_functions_micro_batches_and_clipping_after_them(engine):
    loop = loop_with(compressed, centralised, steps=3, clip=0.2, accumulate=2)
    assert_differentiates(
        loop, steps=3, rtol=1e-6, optimizer="adamw", settings={"engine": engine}
    )


@pytest.mark.parametrize("function", [*FUNCTIONS, signs])
def test_the_student_is_that_of_the_plain_loop(function):
    for every in (1, 3):  # steps outside a window too
        settings = {"unroll": 1, "every": every}
        assert_leaves_what_the_plain_loop_leaves(loop_with(function, steps=3), settings=settings)


def test_a_function_without_derivative_gives_none():
    lab = trained(loop_with(signs), wrapped=True)
    assert lab.hypergradient.abs().sum() == 0


def test_a_transform_before_the_scale_is_taken_out():
    """Of a GradScaler: unscaled first, as recipes do."""

    def loop(lab):
        for inputs, teacher_logits, labels in lab.batches(2):
            lab.optimizer.zero_grad()
            loss = lab.criterion(lab.called(inputs), teacher_logits, labels)
            lab.scaler.scale(loss).backward()
            lab.optimizer.transform_gradients(centralised)
            lab.scaler.step(lab.optimizer)
            lab.scaler.update()

    expected = trained(loop_with(centralised, steps=2), wrapped=True)
    lab = trained(loop, wrapped=True)
    torch.testing.assert_close(lab.hypergradient, expected.hypergradient)


def test_the_check_sees_them():
    lab = Lab()
    lab.wrap(unroll=2, every=2)

    def step(batch):
        inputs, teacher_logits, labels = batch
        lab.optimizer.zero_grad()
        lab.criterion(lab.student(inputs), teacher_logits, labels).backward()
        lab.optimizer.transform_gradients(compressed)
        lab.optimizer.step()

    assert check_hypergradient(lab.optimizer, step, list(lab.batches(2))).passed


@pytest.mark.parametrize("function, shapes", [
    (lambda gradients: gradients[:1], r"\[\(12, 8\)\]"),
    (lambda gradients: [g.flatten() for g in gradients], r"\[\(96,\)"),
])
@pytest.mark.parametrize("every", [1, 9])
def test_other_shapes_are_refused(function, shapes, every):
    with pytest.raises(ValueError, match=f"returned shapes {shapes}.*expected") as error:
        trained(loop_with(function, steps=2), wrapped=True,
                settings={"unroll": 1, "every": every})
    assert_one_sentence(error)


def test_clipping_before_it_is_refused():
    def loop(lab):
        for inputs, teacher_logits, labels in lab.batches(1):
            lab.criterion(lab.called(inputs), teacher_logits, labels).backward()
            torch.nn.utils.clip_grad_norm_(lab.student.parameters(), 0.01)
            lab.optimizer.transform_gradients(centralised)

    with pytest.raises(ValueError, match="clipping after it") as error:
        trained(loop, wrapped=True)
    assert_one_sentence(error)


@pytest.mark.parametrize("method", ["lookahead", "paper"])
def test_other_methods_refuse_it(method):
    with pytest.raises(ValueError, match="expected 'online'") as error:
        trained(loop_with(centralised), wrapped=True, settings={"method": method})
    assert_one_sentence(error)
