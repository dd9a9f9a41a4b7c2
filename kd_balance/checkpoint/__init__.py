"""What a checkpoint holds beside the wrapped optimizer's own state."""

from kd_balance.checkpoint.checks import check_optimizer
from kd_balance.checkpoint.meta_state import by_index, load_meta_state, meta_state_of

__all__ = ["by_index", "check_optimizer", "load_meta_state", "meta_state_of"]
