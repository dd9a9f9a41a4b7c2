"""The rules for dropout on a GPU, played on a CPU, where torch's plain kernel draws otherwise."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F

from kd_balance.replay import fused_rules
from kd_balance.replay.fused_rules import FusedRules
from tests.students import relative_error

torch.manual_seed(0)
MASK = torch.rand(5, 6) > 0.3
MASK[2] = False  # a row that sees nothing


@pytest.fixture
def by_product(monkeypatch):
    """Rules that a CPU's tensors take too; their masks are drawn once and then kept."""

    def mask(x, p):
        generator = torch.Generator().manual_seed(4)
        return torch.rand(x.shape, generator=generator) >= p

    monkeypatch.setattr(fused_rules, "_drops_by_product", lambda x, p: 0 < p < 1)
    monkeypatch.setattr(fused_rules, "_mask", mask)
    return mask


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"is_causal": True},
        {"attn_mask": MASK},
        {"attn_mask": torch.randn(5, 6)},
        {"scale": 0.3},
        {"enable_gqa": True},
    ],
    ids=["plain", "causal", "mask", "bias", "scale", "grouped"],
)
def test_attention_is_torch_s_but_for_the_mask(by_product, settings):
    heads = 2 if settings.get("enable_gqa") else 4
    query = torch.randn(3, 4, 5, 8)
    key, value = torch.randn(2, 3, heads, 6, 8)
    settings = dict(settings)
    with FusedRules(tangents=True):
        ours = F.scaled_dot_product_attention(query, key, value, dropout_p=1e-9, **settings)
    torchs = F.scaled_dot_product_attention(query, key, value, **settings)
    assert relative_error(ours, torchs) < 1e-6


@pytest.mark.parametrize("attends", [False, True])
def test_gradients_have_tangents(by_product, attends):
    """Forward over reverse, as for curvature, against a difference of gradients."""
    query = torch.randn(2, 4, 5, dtype=torch.float64)
    direction = torch.randn_like(query)

    def gradient(x):
        with FusedRules(tangents=True):
            y = F.scaled_dot_product_attention(x, x, x, None, 0.4) if attends else F.dropout(x, 0.4)
        return torch.autograd.grad(y.square().sum(), x)[0]

    with fwAD.dual_level():
        dual = fwAD.make_dual(query.clone().requires_grad_(), direction)
        tangent = fwAD.unpack_dual(gradient(dual)).tangent
    ahead, behind = (gradient((query + h * direction).requires_grad_()) for h in (1e-6, -1e-6))
    assert relative_error(tangent, (ahead - behind) / 2e-6) < 1e-6
