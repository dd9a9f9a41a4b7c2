"""The fused forward-mode rule of batch norm is torch's own, and only where it applies."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import nn

from kd_balance.hypergradient.batch_norm import FusedBatchNorm
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
            with FusedBatchNorm():
                output = torch.func.functional_call(layer, params, arguments)
        else:
            output = torch.func.functional_call(layer, params, arguments)
        primal, tangent = fwAD.unpack_dual(output)
        return [primal.clone(), tangent.clone()]


@pytest.mark.parametrize("with_parameters", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 4, 4), (2, 3, 2, 2, 2)])
def test_it_is_torchs_rule(shape, affine, training, with_parameters):
    torch.manual_seed(0)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    layer = kind[len(shape)](3, affine=affine).double().train(training)
    inputs = 2 + 3 * torch.randn(shape)
    actual = tangent(layer, True, inputs, with_parameters=with_parameters)
    expected = tangent(layer, False, inputs, with_parameters=with_parameters)
    assert relative_error(actual, expected) < 1e-12


def test_half_precision_inputs_keep_their_dtype():
    torch.manual_seed(0)
    layer, inputs = nn.BatchNorm2d(3), torch.randn(8, 3, 4, 4)
    primal, actual = tangent(layer, True, inputs, torch.bfloat16)
    expected = tangent(layer, False, inputs.bfloat16(), torch.float32)[1]
    assert primal.dtype == actual.dtype == torch.bfloat16
    assert relative_error([actual], [expected]) < 0.02
