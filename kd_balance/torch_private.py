"""All that torch keeps to itself and this package uses: what it gives, and what could replace it.

Nothing else of the package names what begins with an underscore in torch, but for the operators on
lists, ``torch._foreach_…``, which torch documents. A torch that lacks one of these does not get
past its test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.autograd.forward_ad
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm as ParametrizedWeightNorm
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

# AnyBatchNorm: the class of all batch norms. Instead: a tuple of torch.nn's.
# ParametrizedWeightNorm: what parametrizations.weight_norm registers. Instead: the type of what it
# registers on a small layer.
# function_modes: the TorchFunctionModes that are active. Instead: none; a replay's own could be
# kept in a list of this package's.
# TorchDispatchMode: sees the operators beneath autograd. torch documents it there.
# tree_…: the tensors within an output. Instead: torch.utils.pytree, or the optree package.

__all__ = [
    "AnyBatchNorm",
    "ParametrizedWeightNorm",
    "TorchDispatchMode",
    "function_modes",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
]

# of tensors


def writes_to(tensor: Tensor) -> int:
    """How often a tensor was written in place. Instead: none but to compare the values."""
    return tensor._version


def viewed_by(tensor: Tensor) -> Tensor | None:
    """What a tensor is a view of. Instead: to compare ``untyped_storage()`` with candidates'."""
    return tensor._base


def has_gradient_hooks(tensor: Tensor) -> bool:
    """Whether hooks see its gradient before or after it is added. Instead: none."""
    return bool(tensor._backward_hooks) or has_post_accumulate_hooks(tensor)


def has_post_accumulate_hooks(tensor: Tensor) -> bool:
    """Whether hooks see its gradient after it is added. Instead: none."""
    return bool(tensor._post_accumulate_grad_hooks)


def output_format(node: Any, number: int) -> Any:
    """Shape, dtype and device of an output of a node in the graph. Instead: none."""
    return node._input_metadata[number]


# forward mode


def forward_level() -> int:
    """Of the innermost dual level, −1 outside. Instead: to count ``dual_level()`` blocks."""
    return torch.autograd.forward_ad._current_level


def unpack_dual(tensor: Tensor) -> tuple[Any, Tensor | None]:
    """Primal and tangent. Instead: forward_ad's own, which takes several times as long."""
    with torch._C.DisableTorchFunctionSubclass():  # a subclass expects no missing tangent
        return torch._VF._unpack_dual(tensor, level=forward_level())


def make_dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """Both in one. Instead: forward_ad's own, which takes several times as long."""
    return torch._VF._make_dual(primal, tangent, level=forward_level())


# operators


RECURRENT: Any = torch._VF
"""Where recurrent layers look their operators up. Instead: none; it is patched."""

WEIGHT_NORM: Any = torch._weight_norm
"""The operator of weight norm, to be known again. Instead: none."""


@contextmanager
def without_onednn() -> Iterator[None]:
    """Instead: ``torch.backends.mkldnn.flags``, which also sets what not every build has."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


@contextmanager
def without_parametrization_cache() -> Iterator[None]:
    """Ends ``parametrize.cached()`` for a while. Instead: none."""
    cached, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = cached


# checkpointing


_OF_2_14 = "_checkpoint_without_reentrant_generator_impl"
CHECKPOINT_GENERATOR = (
    _OF_2_14
    if hasattr(torch.utils.checkpoint, _OF_2_14)
    else "_checkpoint_without_reentrant_generator"
)
"""Of torch.utils.checkpoint: runs a checkpoint. Instead: none; it is patched."""


def let_inputs_pass_in_forward_mode() -> None:
    """A derivative for what keeps a checkpoint's inputs. Instead: torch 2.13, which needs none."""
    saver: Any = getattr(torch.utils.checkpoint, "_NoopSaveInputs", None)
    if saver is not None:
        saver.jvp = staticmethod(lambda ctx, *tangents: torch.empty(0))


# modules


def parameters_within(module: nn.Module) -> dict[str, Any]:
    """The dictionary of a module's own parameters. Instead: none; replays put others there."""
    return module._parameters


def buffers_within(module: nn.Module) -> dict[str, Any]:
    """The dictionary of its own buffers. Instead: none."""
    return module._buffers


def modules_within(module: nn.Module) -> dict[str, Any]:
    """The dictionary of its own modules. Instead: ``dict(module.named_children())``."""
    return module._modules


def forward_pre_hooks(module: nn.Module) -> list[Any]:
    """Instead: none."""
    return list(module._forward_pre_hooks.values())


def has_forward_hooks(module: nn.Module) -> bool:
    """Instead: none."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_backward_hooks(module: nn.Module) -> bool:
    """Instead: none."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def is_replica(module: nn.Module) -> bool:
    """Whether nn.DataParallel made it for one of several devices. Instead: none."""
    return getattr(module, "_is_replica", False)


def compiled_from(module: nn.Module) -> nn.Module | None:
    """What torch.compile made a module of, None for others. Instead: none."""
    if isinstance(module, torch._dynamo.OptimizedModule):
        return module._orig_mod
    return None


def compiles_calls(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called. Instead: none."""
    return module._compiled_call_impl is not None


# optimizers


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Its own, and those of all optimizers. Instead: none."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
"""Where an optimizer keeps them, to be left out of a copy. Instead: none."""


def share_out_groups(optimizer: Any) -> None:
    """Gives a ZeroRedundancyOptimizer's groups to its local one, as step() does. Instead: none."""
    optimizer._sync_param_groups(optimizer.param_groups, optimizer.optim.param_groups)


# several processes


def timeout_of(group: Any) -> timedelta | None:
    """How long a process group waits. Instead: to ask the user."""
    backend = group._get_backend(group._device_types[0])
    return getattr(getattr(backend, "options", None), "_timeout", None)


def calling_wrapper() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward is running. Instead: none."""
    return DistributedDataParallel._get_active_ddp_module()


def communication_hook(wrapper: DistributedDataParallel) -> str:
    """The name of that of a DistributedDataParallel. Instead: none."""
    return wrapper._get_ddp_logging_data().get("comm_hook", "allreduce_hook")


def is_joined(wrapper: DistributedDataParallel) -> bool:
    """Whether it runs within its ``join``. Instead: none."""
    return wrapper._join_config.enable


# parameters in shards


FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
"""Where a module keeps them, by number, to be left out of replays. Instead: none."""


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether fully_shard was called on it. Instead: isinstance of FSDPModule, slow to import."""
    return hasattr(module, "_get_fsdp_state")


def fsdp_hooks(module: Any) -> list[int]:
    """The numbers of fully_shard's own hooks on a module. Instead: none."""
    state = module._get_fsdp_state()
    handles = (state._pre_forward_hook_handle, state._post_forward_hook_handle)
    return [part.id for handle in handles for part in getattr(handle, "handles", [handle])]


def fsdp_gathered(module: Any) -> list[Tensor | None]:
    """What its forward passes compute with, None before the first. Instead: none."""
    groups = module._get_fsdp_state()._fsdp_param_groups
    return [getattr(p, "_unsharded_param", None) for group in groups for p in group.fsdp_params]


def fsdp_policies(module: Any) -> tuple[Any, list[Any]]:
    """Its MixedPrecisionPolicy and the policies of offloading. Instead: none."""
    state = module._get_fsdp_state()
    return state._mp_policy, [group.offload_policy for group in state._fsdp_param_groups]
