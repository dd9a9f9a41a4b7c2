"""What torch keeps to itself and kd_balance.torch_private lists is there."""

import ast
import importlib
import re
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

PACKAGE = Path(__file__).parent.parent / "kd_balance"
LIST = (PACKAGE / "torch_private.py").read_text()


def node():
    return (2 * torch.ones(2, requires_grad=True)).grad_fn


WHERE = {
    "_version _base _backward_hooks _post_accumulate_grad_hooks": lambda: torch.ones(1),
    "_input_metadata _saved_self": node,
    "_current_level": lambda: torch.autograd.forward_ad,
    "_C _VF _weight_norm _dynamo": lambda: torch,
    "_unpack_dual _make_dual lstm gru rnn_tanh rnn_relu": lambda: torch._VF,
    "DisableTorchFunctionSubclass _get_mkldnn_enabled _set_mkldnn_enabled": lambda: torch._C,
    "_cache_enabled": lambda: parametrize,
    "_checkpoint_without_reentrant_generator CheckpointFunction": lambda: torch.utils.checkpoint,
    "_parameters _buffers _modules _forward_pre_hooks _forward_hooks _backward_hooks "
    "_backward_pre_hooks _compiled_call_impl": lambda: nn.Linear(1, 1),
    "_orig_mod": lambda: torch.compile(nn.Linear(1, 1), backend="eager"),
    "_optimizer_step_pre_hooks _optimizer_step_post_hooks": lambda: torch.optim.SGD(
        [torch.ones(1)]
    ),
    "_get_active_ddp_module _get_ddp_logging_data": lambda: DistributedDataParallel,
    "_get_fsdp_state": lambda: torch.distributed.fsdp.FSDPModule,
    "_get_backend _device_types": lambda: torch.distributed.ProcessGroup,
}
# what is looked for where it may be missing, or is made by torch at run time
ELSEWHERE = {"_NoopSaveInputs", "_sync_param_groups", "_is_replica", "_timeout", "_join_config",
             "_pre_forward_hook_handle", "_post_forward_hook_handle", "_fsdp_param_groups",
             "_unsharded_param", "_mp_policy", "_checkpoint_without_reentrant_generator_impl"}
NAMES = {name for names in WHERE for name in names.split()}
IMPORTS = {
    (node.module, alias.name)
    for node in ast.parse(LIST).body if isinstance(node, ast.ImportFrom)
    for alias in node.names if node.module.startswith("torch")
}


def test_torch_has_them():
    missing = [f"{m}.{name}" for m, name in sorted(IMPORTS)
               if not hasattr(importlib.import_module(m), name)]
    for names, where in WHERE.items():
        holder = where()
        missing += [f"{name} of {holder!r}" for name in names.split() if not hasattr(holder, name)]
    assert not missing, (
        f"torch {torch.__version__} lacks {'; '.join(missing)}: kd_balance/torch_private.py says "
        "what each is for, and what could replace it"
    )


def test_the_lists_are_the_same():
    used = set(re.findall(r"(?<=\.)_[A-Za-z]\w+", LIST)) | set(re.findall(r'"(_[a-z]\w+)"', LIST))
    imported = {name for _, name in IMPORTS}
    known = NAMES | ELSEWHERE | imported | _of_modules()
    assert not (missing := used - known), f"{missing} are in torch_private and in no test"


def _of_modules():
    return {part for module, _ in IMPORTS for part in module.split(".")} | {"_foreach_"}


def _names_in(path):
    """What a file takes from torch that begins with an underscore."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            path = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from (part for part in path if part.startswith("_"))
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_nothing_else_names_them():
    private = NAMES | ELSEWHERE | {name for _, name in IMPORTS}
    private = {name for name in private if name.startswith("_")} - {"_saved_self"}
    private |= {"_pytree", "_python_dispatch"}
    elsewhere = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in sorted(PACKAGE.rglob("*.py")) if path.name != "torch_private.py"
        for name in _names_in(path) if name in private
    }
    assert not elsewhere, f"take these from kd_balance.torch_private: {sorted(elsewhere)}"
