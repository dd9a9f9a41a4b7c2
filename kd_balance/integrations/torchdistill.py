"""torchdistill: the loss and the optimizer under keys for its YAML files.

Name this module under ``dependencies``, and torchdistill registers "WeightedKDLoss" among its
mid-level losses and "BilevelOptimizer" among its optimizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torchdistill.losses.registry import register_mid_level_loss
from torchdistill.optim.registry import get_optimizer, register_optimizer

from kd_balance.loss import WeightedKDLoss
from kd_balance.optimizer import BilevelOptimizer
from kd_balance.weight_net import MetaWeightNet

# The optimizer is made right after the loss of its stage, and is not handed it.
_unclaimed: WeakSet[WeightedKDLoss] = WeakSet()


@register_mid_level_loss(key="WeightedKDLoss")
class WeightedKDTerm(nn.Module):
    """A WeightedKDLoss as a term of torchdistill's losses.

    Args:
        student_module_path, student_module_io: where the student's logits lie among what
            torchdistill kept of its forward pass, usually "." and "output".
        teacher_module_path, teacher_module_io: the same of the teacher.
        class_counts: as for WeightedKDLoss.long_tailed, which then makes the loss.
        weight_net: without class counts, settings of the MetaWeightNet.
        **settings: those of WeightedKDLoss or of its long_tailed.

    Raises:
        ValueError: both class_counts and weight_net.

    Example::

        criterion:
          key: 'WeightedSumLoss'
          kwargs:
            sub_terms:
              kd:
                criterion:
                  key: 'WeightedKDLoss'
                  kwargs:
                    student_module_path: '.'
                    student_module_io: 'output'
                    teacher_module_path: '.'
                    teacher_module_io: 'output'
                    class_counts: !import_call
                      key: 'my_data.class_counts'
                    temperature: 4.0
                weight: 1.0
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        class_counts: Tensor | Sequence[int] | None = None,
        weight_net: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.student_module_path, self.student_module_io = student_module_path, student_module_io
        self.teacher_module_path, self.teacher_module_io = teacher_module_path, teacher_module_io
        if class_counts is None:
            self.criterion = WeightedKDLoss(MetaWeightNet(**(weight_net or {})), **settings)
        elif weight_net is None:
            self.criterion = WeightedKDLoss.long_tailed(class_counts, **settings)
        else:
            raise ValueError(
                "WeightedKDLoss was given class_counts and weight_net, expected one of them: the "
                "class counts bring a weight net of their own."
            )
        _unclaimed.add(self.criterion)

    def forward(
        self,
        student_io_dict: Mapping[str, Mapping[str, Any]],
        teacher_io_dict: Mapping[str, Mapping[str, Any]],
        targets: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        student_logits = student_io_dict[self.student_module_path][self.student_module_io]
        teacher_logits = teacher_io_dict[self.teacher_module_path][self.teacher_module_io]
        return self.criterion(student_logits, teacher_logits, targets)


@register_optimizer(key="BilevelOptimizer")
def bilevel_optimizer(
    modules: nn.ModuleList,
    optimizer_key: str,
    meta_loader: Iterable[Any],
    bilevel: Mapping[str, Any] | None = None,
    **settings: Any,
) -> BilevelOptimizer:
    """Another registered optimizer, wrapped for the stage's WeightedKDLoss.

    Args:
        modules: given by torchdistill, the student first; ``filters_params: False`` asks for it.
        optimizer_key: of the optimizer to wrap.
        meta_loader: class-balanced batches, by ``!import_call`` for example.
        bilevel: further settings of BilevelOptimizer.
        **settings: those of the optimizer to wrap.

    Raises:
        ValueError: the stage has no "WeightedKDLoss", or several; or parameters came in the place
            of modules.

    Example::

        optimizer:
          key: 'BilevelOptimizer'
          filters_params: False
          kwargs:
            optimizer_key: 'SGD'
            lr: 0.1
            momentum: 0.9
            meta_loader: !import_call
              key: 'my_data.meta_loader'
    """
    criteria = list(_unclaimed)
    _unclaimed.clear()
    if not isinstance(modules, nn.ModuleList):
        raise ValueError(
            f"BilevelOptimizer was given {type(modules).__name__}, expected the modules to train: "
            "set filters_params: False beside its key, and leave out module_wise_configs."
        )
    if len(criteria) != 1:
        raise ValueError(
            f"{len(criteria)} losses with the key WeightedKDLoss were made for this stage, "
            "expected one for its BilevelOptimizer: name it in the stage's criterion."
        )
    params = [param for param in modules.parameters() if param.requires_grad]
    optimizer = get_optimizer(params, optimizer_key, **settings)
    return BilevelOptimizer(optimizer, modules[0], criteria[0], meta_loader, **(bilevel or {}))
