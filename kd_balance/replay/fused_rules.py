"""Derivatives that pass over the activations less often than torch's own, or lose fewer digits.

Batch norm in training mode: with x̂ = (x − μ) r, r the inverse standard deviation, and dots for
tangents,

    ẏ = γ r (ẋ − mean ẋ) + x̂ (γ̇ − γ mean(x̂ ẋ)) + β̇,

which is affine in ẋ and x with coefficients for each channel: two reductions and two passes. The
gradients' tangents, for forward over reverse, are of the same kind. Sums are taken over a few
samples at a time where torch's CPU kernel adds up float32 numbers one by one (channels_last): over
a whole batch its variance is off by 3e-5, enough to move a few inputs of ReLUs across zero and the
hypergradient by 1e-4.

Linear layers, ẏ = x ẇᵀ + ḃ + ẋ wᵀ: the last product is added in place.

Attention without mask and dropout: torch's own, with its scale multiplied into primal and tangent.
In a product of the dual tensor it would be an operand without tangent, which torch goes through
Python for.

Convolution on a CPU: of ẏ = conv(x, ẇ) + conv(ẋ, w) the second term is added in slices of the
batch that stay in the cache, and no second activation is held.

Dropout on a GPU, also within attention: the gradient of torch's fused operator has no tangent, a
product with the mask has. The mask is what the fused operator draws.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_balance.torch_private import forward_level, make_dual, unpack_dual

_SLICE = 2**21  # elements of an activation
_ADDED = 2**12  # float32 numbers that may be added up one by one


class FusedRules:
    """Within it, batch norms, linear layers, 2d convolutions, dropout and attention
    take these rules.

    They leave running statistics alone: they are for replays. For that time they stand in
    torch.nn.functional in the place of torch's own, to which they leave the calls of other threads.

    Args:
        tangents: take the rules for dual tensors too, whose tangents then have no derivative of
            their own.
    """

    _entered = 0

    def __init__(self, *, tangents: bool) -> None:
        self.tangents = tangents
        self._outer: list[FusedRules | None] = []

    @classmethod
    def active(cls) -> FusedRules | None:
        """The rules that this thread is within."""
        return _thread.rules

    def __enter__(self) -> None:
        self._outer.append(_thread.rules)
        _thread.rules = self
        if FusedRules._entered == 0:
            _torchs.update({name: getattr(F, name) for name in _RULES})
            vars(F).update(_RULES)
        FusedRules._entered += 1

    def __exit__(self, *_: Any) -> None:
        _thread.rules = self._outer.pop()
        FusedRules._entered -= 1
        if FusedRules._entered == 0:
            vars(F).update(_torchs)


class _Thread(threading.local):
    rules: FusedRules | None = None


_thread = _Thread()
_torchs: dict[str, Any] = {}


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    rules = _thread.rules
    several = input.numel() > input.shape[1]  # values a channel; one is torch's to refuse
    if rules is None or not training or not several:
        return _torchs["batch_norm"](
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    parts = [unpacked(tensor) for tensor in (input, weight, bias)]
    (x, dx), (scale, dscale), (shift, dshift) = parts
    if dx is None and dscale is None and dshift is None:
        if _adds_up_one_by_one(input):
            return _BatchNorm.apply(input, weight, bias, eps)
    elif rules.tangents:
        if dx is None:  # the layers before it rest
            dx = torch.zeros_like(x)
            input = make_dual(input, dx)
        if torch.is_grad_enabled():
            return _BatchNorm.apply(input, weight, bias, eps)
        y, mean, inverse_std = _normalised(x, scale, shift, eps)
        dy = _tangent(dx, x, scale, mean, inverse_std, dscale, dshift)
        return make_dual(y, dy.to(y.dtype))
    return _torchs["batch_norm"](input, None, None, weight, bias, True, momentum, eps)


def unpacked(tensor: Tensor | None) -> tuple[Any, Tensor | None]:
    """Primal and tangent, which is None where there is none."""
    if tensor is None or forward_level() < 0:
        return tensor, None
    return unpack_dual(tensor)


class _BatchNorm(torch.autograd.Function):
    """Batch norm in training mode; its backward pass is its tangent's formula, transposed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
    ) -> Tensor:
        y, mean, inverse_std = _normalised(x, scale, shift, eps)
        ctx.save_for_backward(x, scale, shift, mean, inverse_std)
        ctx.save_for_forward(x, scale, mean, inverse_std)
        ctx.eps = eps
        return y

    @staticmethod
    def jvp(
        ctx: Any, dx: Tensor, dscale: Tensor | None, dshift: Tensor | None, _: None
    ) -> Tensor:
        x, scale, mean, inverse_std = ctx.saved_tensors
        with torch.no_grad():
            return _tangent(dx, x, scale, mean, inverse_std, dscale, dshift).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, mean, inverse_std = ctx.saved_tensors
        if torch.is_grad_enabled():  # its derivative is wanted too: torch's own rule has one
            y = torch.batch_norm(x, scale, shift, None, None, True, 0.0, ctx.eps, False)
            inputs = [t for t, needs in zip((x, scale, shift), ctx.needs_input_grad) if needs]
            found = iter(torch.autograd.grad(y, inputs, gradient, create_graph=True))
            return tuple(next(found) if needs else None for needs in ctx.needs_input_grad)
        gradients = (*_gradients(gradient, x, scale, mean, inverse_std), None)
        return tuple(g if n else None for g, n in zip(gradients, ctx.needs_input_grad, strict=True))


def _normalised(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm in training mode, the mean and the inverse standard deviation."""
    if not _adds_up_one_by_one(x):
        return torch.native_batch_norm(x, scale, shift, None, None, True, 0.0, eps)
    parts = x.split(_samples_added(x))
    shares = [len(part) / len(x) for part in parts]
    moments = [torch.batch_norm_update_stats(part, None, None, 0.0) for part in parts]
    means, variances = zip(*moments)
    mean = sum(share * m for share, m in zip(shares, means))
    variance = sum(s * (v + (m - mean).square()) for s, m, v in zip(shares, means, variances))
    y = torch.native_batch_norm(x, scale, shift, mean, variance, False, 0.0, eps)[0]
    return y, mean, (variance + eps).rsqrt()


def _tangent(
    dx: Tensor,
    x: Tensor,
    scale: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    dscale: Tensor | None,
    dshift: Tensor | None,
) -> Tensor:
    """ẏ, affine in ẋ and x."""
    if x.dtype == mean.dtype and x.numel() <= _few(x.device) and not _adds_up_one_by_one(x):
        # more passes and fewer operators: what backward does to g, ẋ has to undergo too
        dy = torch.ops.aten.native_batch_norm_backward(
            dx, x, scale, None, None, mean, inverse_std, True, 0.0, [True, False, False]
        )[0]
        shape = (1, -1, *[1] * (x.dim() - 2))
        if dscale is not None:
            of_x = dscale * inverse_std
            dy.addcmul_(x, of_x.view(shape))
            shift = mean * of_x
            dshift = -shift if dshift is None else dshift - shift
        return dy if dshift is None else dy.add_(dshift.view(shape))
    along, total = _sums(dx, x, scale, mean, inverse_std)
    share = -x.shape[1] / x.numel()
    slope = inverse_std if scale is None else scale * inverse_std
    of_x = _plus(dscale, slope, along, share) * inverse_std
    constant = _plus(dshift, slope, total, share).addcmul_(mean, of_x, value=-1)
    return _combined(constant, (dx, slope), (x, of_x))


def _gradients(
    gradient: Tensor, x: Tensor, scale: Tensor | None, mean: Tensor, inverse_std: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of input, scale and shift; dual tensors for dual arguments.

    With g the output's gradient, a = mean g and b = mean(x̂ g), that of the input is
    s (g − a − x̂ b), s = γ r. For tangents, let m = mean ẋ and c = mean(x̂ ẋ): then ṙ = −r² c, the
    tangent of x̂ is r (ẋ − m − x̂ c), and that of the whole is affine in g, ġ, ẋ and x.
    """
    (x, dx), (g, dg), (scale, dscale) = map(unpacked, (x, gradient, scale))
    of_x, along, total = _gradients_of_values(g, x, scale, mean, inverse_std)
    if dx is None or dg is None:
        return of_x, along, total
    r, slope = inverse_std, inverse_std if scale is None else scale * inverse_std
    dg_along, dg_total = _sums(dg, x, scale, mean, r)
    dx_along, dx_total = _sums(dx, x, scale, mean, r)
    sums = (along, total, dg_along, dg_total, dx_along, dx_total, _inner(dx, g, mean.dtype))
    means = torch.stack(sums).mul_(x.shape[1] / x.numel())
    b, a, db, da, c, m, dx_g = means.unbind()
    db = db + r * (dx_g - m * a - c * b)
    of_g = _plus(dscale, slope, c, -1) * r
    of_dx = slope * b * -r
    of_x_hat = -(of_g * b).addcmul_(slope, db).addcmul_(of_dx, c)
    of_input = of_x_hat * r
    constant = -(of_g * a).addcmul_(slope, da).addcmul_(of_dx, m).addcmul_(of_input, mean)
    tangent = _combined(constant, (g, of_g), (dg, slope), (dx, of_dx), (x, of_input))
    return (
        make_dual(of_x, tangent.to(of_x.dtype)),
        make_dual(along, db * (x.numel() // x.shape[1])),
        make_dual(total, dg_total),
    )


def _gradients_of_values(
    g: Tensor, x: Tensor, scale: Tensor | None, mean: Tensor, inverse_std: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of input, scale and shift."""
    if not _adds_up_one_by_one(x):
        return torch.ops.aten.native_batch_norm_backward(
            g, x, scale, None, None, mean, inverse_std, True, 0.0, [True, True, True]
        )
    along, total = _sums(g, x, scale, mean, inverse_std)
    share = -x.shape[1] / x.numel()
    slope = inverse_std if scale is None else scale * inverse_std
    of_x = slope * along * inverse_std * share
    constant = slope * total * share - mean * of_x
    return _combined(constant, (g, slope), (x, of_x)), along, total


def _plus(start: Tensor | None, a: Tensor, b: Tensor, factor: float) -> Tensor:
    """start + factor · a · b."""
    return a * b * factor if start is None else torch.addcmul(start, a, b, value=factor)


def _sums(
    u: Tensor, x: Tensor, scale: Tensor | None, mean: Tensor, inverse_std: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ x̂ u and Σ u of every channel."""
    scale = torch.ones_like(mean) if scale is None else scale  # has no part in them

    def of(u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        # batch norm's backward calls them gradients of scale and shift
        return torch.ops.aten.native_batch_norm_backward(
            u, x, scale, None, None, mean, inverse_std, True, 0.0, [False, True, True]
        )[1:]

    samples = _samples_added(x)
    if samples >= len(x):
        return of(u, x)
    pairs = zip(u.split(samples), x.split(samples), strict=True)
    along, total = (torch.stack(p).sum(0) for p in zip(*(of(*pair) for pair in pairs), strict=True))
    return along, total


def _inner(u: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ u v of every channel."""
    over, samples = [0, *range(2, u.dim())], _samples(u)
    if samples >= len(u):
        return (u * v).sum(over, dtype=dtype)
    parts = zip(u.split(samples), v.split(samples), strict=True)
    return torch.stack([(a * b).sum(over, dtype=dtype) for a, b in parts]).sum(0)


def _combined(constant: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """The constant of every channel and the activations times coefficients of every channel."""
    x = terms[0][0]
    samples, shape = _samples(x), (1, -1, *[1] * (x.dim() - 2))
    constant, factors = constant.view(shape), [factor.view(shape) for _, factor in terms]
    if samples >= len(x):
        total = torch.addcmul(constant, x, factors[0])
        for (activation, _), factor in zip(terms[1:], factors[1:]):
            total.addcmul_(activation, factor)
        return total
    out = torch.empty_like(x, dtype=torch.result_type(x, constant))
    for i, part in enumerate(out.split(samples)):
        rows = slice(i * samples, (i + 1) * samples)
        total = constant
        for (activation, _), factor in zip(terms, factors):
            total = torch.addcmul(total, activation[rows], factor, out=part)
    return out


def _adds_up_one_by_one(x: Tensor) -> bool:
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x.device.type == "cpu" and x.dtype == torch.float32 and channels_last


def _few(device: torch.device) -> int:
    """Elements of an activation up to which an operator costs its launch rather than its passes."""
    return 2**15 if device.type == "cpu" else 2**22


def _samples_added(x: Tensor) -> int:
    """How many samples torch may add up at once for every channel."""
    if not _adds_up_one_by_one(x):
        return len(x)
    return max(1, _ADDED * x.shape[1] // x[0].numel())


def _samples(x: Tensor) -> int:
    """How many samples of an activation stay in the cache; all, where none is to be cared for."""
    one = x.numel() // max(1, len(x))
    return max(1, _SLICE // max(1, one) if x.device.type == "cpu" else len(x))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    linear = _torchs["linear"]
    rules = _thread.rules
    if rules is None or not rules.tangents or torch.is_grad_enabled():
        return linear(input, weight, bias)
    (x, dx), (w, dw), (b, db) = map(unpacked, (input, weight, bias))
    if dx is None or dw is None:
        return linear(input, weight, bias)
    y, dy = linear(x, w, b), linear(x, dw, db)
    if dx.dtype == w.dtype == dy.dtype:
        dy.view(-1, dy.shape[-1]).addmm_(dx.reshape(-1, dx.shape[-1]), w.t())
    else:  # under autocast, which knows no addition in place
        dy = dy + linear(dx, w)
    return make_dual(y, dy)


def _conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    conv2d = _torchs["conv2d"]
    rules = _thread.rules
    if (
        rules is None or not rules.tangents or torch.is_grad_enabled()
        or input.device.type != "cpu" or input.dim() != 4
    ):
        return conv2d(input, weight, bias, *args, **kwargs)
    (x, dx), (w, dw), (b, db) = map(unpacked, (input, weight, bias))
    if dx is None or dw is None:
        return conv2d(input, weight, bias, *args, **kwargs)
    y, dy = conv2d(x, w, b, *args, **kwargs), conv2d(x, dw, db, *args, **kwargs)
    samples = _samples(dy)
    pairs = [(dy, dx)] if samples >= len(dy) else zip(dy.split(samples), dx.split(samples))
    for total, part in pairs:
        total.add_(conv2d(part, w, None, *args, **kwargs))
    return make_dual(y, dy)


def _dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    if inplace or not (training and _drops_by_product(input, p)):
        return _torchs["dropout"](input, p, training, inplace)
    return input * (_mask(input, p).to(input.dtype) / (1 - p))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if _drops_by_product(query, dropout_p):
        return _dropped_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    rules = _thread.rules
    plain = attn_mask is None and not (dropout_p or is_causal or enable_gqa)
    if rules is not None and rules.tangents and plain and not torch.is_grad_enabled():
        q, dq = unpacked(query)
        if dq is not None:
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            query = make_dual(q * scale, dq * scale)
            return (query @ key.transpose(-2, -1)).softmax(-1) @ value
    more = {"scale": scale, "enable_gqa": enable_gqa}
    return _torchs["scaled_dot_product_attention"](
        query, key, value, attn_mask, dropout_p, is_causal, **more
    )


def _dropped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    kind = query.device.type
    low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    exact = torch.float32 if low in (torch.half, torch.bfloat16) else low  # of the plain kernel
    query, key, value = (t.to(low).to(exact) for t in (query, key, value))
    if enable_gqa:
        shared = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(shared, -3) for t in (key, value))
    with torch.autocast(kind, enabled=False):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = query * scale @ key.transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones_like(scores, dtype=torch.bool).tril()
        if attn_mask is None:
            weights = scores.softmax(-1)
        else:
            weights = _masked_softmax(scores, attn_mask)
        return (_dropout(weights, dropout_p) @ value).to(low)


def _masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Rows without a position to look at become zero, as torch's do."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -torch.inf)
    scores = scores + mask
    empty = scores.isneginf().all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def _drops_by_product(x: Tensor, p: float) -> bool:
    """Whether torch would drop by an operator whose gradient has no tangent that is needed."""
    rules = _thread.rules
    differentiated = rules is not None and rules.tangents and torch.is_grad_enabled()
    return differentiated and x.is_cuda and x.numel() > 0 and 0 < p < 1


def _mask(x: Tensor, p: float) -> Tensor:
    """What the fused operator keeps of a tensor like `x`."""
    return torch.native_dropout(x.detach(), p, True)[1]


_RULES = {
    "batch_norm": _batch_norm,
    "linear": _linear,
    "conv2d": _conv2d,
    "dropout": _dropout,
    "scaled_dot_product_attention": _attention,
}
