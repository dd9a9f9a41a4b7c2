"""The fused rules are torch's own derivatives, and only where they apply."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import nn

from kd_balance.replay import fused_rules
from kd_balance.replay.fused_rules import FusedRules
from tests.students import relative_error


def tangent(layer, fused, inputs, dtype=torch.float64, with_parameters=True):
    generator = torch.Generator().manual_seed(1)

    def dual(tensor):
        direction = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        return fwAD.make_dual(tensor.detach(), direction)

    with fwAD.dual_level(), torch.no_grad():
        params = {n: dual(p) for n, p in layer.named_parameters()} if with_parameters else {}
        arguments = (dual(inputs.to(dtype)),)
        if fused:
            with FusedRules(tangents=True):
                output = torch.func.functional_call(layer, params, arguments)
        else:
            output = torch.func.functional_call(layer, params, arguments)
        primal, tangent = fwAD.unpack_dual(output)
        return [primal.clone(), tangent.clone()]


@pytest.mark.parametrize("with_parameters", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 4, 4), (2, 3, 2, 2, 2)])
@pytest.mark.parametrize("few", [0, 10**6])
def test_batch_norm(shape, affine, training, with_parameters, few, monkeypatch):
    monkeypatch.setattr(fused_rules, "_few", lambda device: few)
    torch.manual_seed(0)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    layer = kind[len(shape)](3, affine=affine).double().train(training)
    inputs = 2 + 3 * torch.randn(shape)
    actual = tangent(layer, True, inputs, with_parameters=with_parameters)
    expected = tangent(layer, False, inputs, with_parameters=with_parameters)
    assert relative_error(actual, expected) < 1e-12


class Labelled(torch.Tensor):
    """Images of a library that keeps metadata, and expects no None among results."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, tuple):
            assert all(r is not None for r in result)
        return result


@pytest.mark.parametrize("layer", [
    nn.Conv2d(3, 2, 3), nn.Linear(4, 2), nn.BatchNorm2d(3),
], ids=lambda layer: type(layer).__name__)
def test_inputs_of_a_tensor_subclass(layer):
    layer, inputs = layer.double(), torch.randn(6, 3, 4, 4).double()

    def of(inputs):
        with fwAD.dual_level(), torch.no_grad(), FusedRules(tangents=True):
            params = {n: fwAD.make_dual(p, p + 1) for n, p in layer.named_parameters()}
            output = torch.func.functional_call(layer, params, (inputs,)).as_subclass(torch.Tensor)
            return [x.clone() for x in fwAD.unpack_dual(output)]

    assert relative_error(of(inputs.as_subclass(Labelled)), of(inputs)) == 0


def test_batch_norm_of_half_precision_inputs_keeps_their_dtype():
    torch.manual_seed(0)
    layer, inputs = nn.BatchNorm2d(3), torch.randn(8, 3, 4, 4)
    primal, actual = tangent(layer, True, inputs, torch.bfloat16)
    expected = tangent(layer, False, inputs.bfloat16(), torch.float32)[1]
    assert primal.dtype == actual.dtype == torch.bfloat16
    assert relative_error([actual], [expected]) < 0.02


def curvature(layer, fused, inputs, dtype=torch.float64):
    """Tangents of the gradients of input and parameters: forward over reverse."""
    layer = copy.deepcopy(layer).to(dtype)
    generator = torch.Generator().manual_seed(1)

    def dual(tensor):
        direction = torch.randn(tensor.shape, generator=generator).to(dtype)
        return fwAD.make_dual(tensor.detach().to(dtype).requires_grad_(), direction)

    with fwAD.dual_level():
        params = {name: dual(p) for name, p in layer.named_parameters()}
        leaves = [dual(inputs), *params.values()]
        with FusedRules(tangents=True) if fused else nullcontext():
            output = torch.func.functional_call(layer, params, leaves[0]).tanh()
        gradients = torch.autograd.grad((output.square() + output).sum(), leaves)
        pairs = [fwAD.unpack_dual(gradient) for gradient in gradients]
        return [t.clone() for pair in pairs for t in pair]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 4, 4), (2, 3, 2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("last", [True, False])
def test_batch_norm_forward_over_reverse(shape, affine, dtype, last):
    torch.manual_seed(0)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    layer = kind[len(shape)](3, affine=affine).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    inputs = 2 + 3 * torch.randn(shape, dtype=torch.float64)
    if last and len(shape) == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    actual, expected = (
        curvature(layer, True, inputs, dtype),
        curvature(layer, False, inputs),
    )
    assert relative_error(actual, expected) < {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]


CONVOLUTIONS = {
    "plain": dict(kernel_size=3),
    "no bias, stride, padding": dict(kernel_size=3, bias=False, stride=2, padding=1),
    "padding by name, dilation, groups": dict(
        kernel_size=3, padding="same", dilation=2, groups=2
    ),
    "reflected": dict(kernel_size=3, padding=1, padding_mode="reflect"),
}


@pytest.mark.parametrize("with_parameters", [True, False])
@pytest.mark.parametrize("samples", [1, 7])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv2d(name, samples, with_parameters, monkeypatch):
    """Several slices and a shorter last one; memory format included."""
    monkeypatch.setattr("kd_balance.replay.fused_rules._SLICE", 3 * 4 * 100)
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 4, **CONVOLUTIONS[name]).double()
    inputs = torch.randn(samples, 2, 12, 12).contiguous(memory_format=torch.channels_last)
    actual, expected = (
        tangent(layer, fused, inputs, with_parameters=with_parameters) for fused in (True, False)
    )
    assert relative_error(actual, expected) < 1e-12


def test_conv2d_of_one_image_without_batch():
    torch.manual_seed(0)
    layer, inputs = nn.Conv2d(2, 4, 3).double(), torch.randn(2, 5, 5)
    assert relative_error(tangent(layer, True, inputs), tangent(layer, False, inputs)) < 1e-12


@pytest.mark.parametrize(
    ("kind", "sizes", "shape"),
    [(nn.Conv2d, (2, 4, 3), (5, 2, 8, 8)), (nn.Linear, (64, 32), (5, 64))],
)
def test_under_autocast(kind, sizes, shape):
    torch.manual_seed(0)
    layer, inputs = kind(*sizes), torch.randn(shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        primal, actual = tangent(layer, True, inputs, torch.float32)
    expected = tangent(layer, False, inputs, torch.float32)[1]
    assert primal.dtype == actual.dtype == torch.bfloat16
    assert relative_error([actual], [expected]) < 0.02


@pytest.mark.parametrize("with_parameters", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (4, 3, 2)])
def test_linear(shape, bias, with_parameters):
    torch.manual_seed(0)
    layer, inputs = nn.Linear(4, 5, bias=bias).double(), torch.randn(shape)
    if shape[-1] != 4:
        inputs = inputs.transpose(0, 2)
    actual, expected = (
        tangent(layer, fused, inputs, with_parameters=with_parameters) for fused in (True, False)
    )
    assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_channels_last_loses_no_digits(affine):
    """torch's own kernel adds up float32 numbers one by one there: an error of 1e-5 and more."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3, affine=affine)
    inputs = (1 + torch.randn(99, 3, 32, 32)).contiguous(memory_format=torch.channels_last)
    towards = torch.randn(inputs.shape)

    def gradients(fused, dtype):
        own = copy.deepcopy(layer).to(dtype)
        leaves = [inputs.to(dtype).requires_grad_(), *own.parameters()]
        with FusedRules(tangents=True) if fused else nullcontext():
            output = own(leaves[0])
        return [output.detach(), *torch.autograd.grad(output, leaves, towards.to(dtype))]

    assert relative_error(gradients(True, torch.float32), gradients(False, torch.float64)) < 1e-6
    tangents = [
        tangent(copy.deepcopy(layer).to(dtype), fused, inputs, dtype)
        for fused, dtype in ((True, torch.float32), (False, torch.float64))
    ]
    assert relative_error(*tangents) < 1e-6


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_channels_last_has_a_second_derivative(affine):
    """As the meta loss needs that holds a gradient penalty."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3, affine=affine)
    inputs = (1 + torch.randn(10, 3, 8, 8)).contiguous(memory_format=torch.channels_last)

    def second(fused):
        leaves = [inputs.detach().requires_grad_(), *layer.parameters()]
        with FusedRules(tangents=True) if fused else nullcontext():
            output = layer(leaves[0]).tanh()
            (slope,) = torch.autograd.grad(output.square().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(
            slope.square().sum(), leaves, allow_unused=True, materialize_grads=True
        )

    assert relative_error(second(True), second(False)) < 1e-5


def test_batch_norm_of_one_value_per_channel_is_refused_as_ever():
    inputs = torch.zeros(1, 3, 1, 1).requires_grad_()
    rules, refused = FusedRules(tangents=True), "more than 1 value per channel"
    with rules, pytest.raises(ValueError, match=refused):
        nn.BatchNorm2d(3)(inputs)
