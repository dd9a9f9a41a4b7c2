"""Knowledge distillation on long-tailed data, its per-sample weights learned by bilevel steps."""

from kd_balance.data import class_counts, meta_loader
from kd_balance.loss import WeightedKDLoss
from kd_balance.optimizer import BilevelOptimizer
from kd_balance.weight_net import MetaWeightNet

__version__ = "0.1.0"

__all__ = ["BilevelOptimizer", "MetaWeightNet", "WeightedKDLoss", "class_counts", "meta_loader"]
