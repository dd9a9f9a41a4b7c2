"""What people do in a training loop, as choices that hypothesis makes."""

from dataclasses import dataclass

from hypothesis import strategies as st

USUAL = {
    "student": ("mlp", "mlp", "norm", "dropout", "tied", "tuple", "layernorm", "conv"),
    "features": (
        ("teacher_ce",), ("student_ce", "teacher_ce"), ("kl", "student_margin", "teacher_entropy"),
    ),
    "logits": ("returned", "returned", "returned", "halved", "log probabilities", "capped, named"),
    "mean": (None, None, 0.5),
    "reduction": ("mean", "mean", "sum"),
    "labels": ("indices", "indices", "ignored", "probabilities"),
    "hard_loss": (None, None, "balanced", "focal"),
    "temperature": (1.0, 4.0),
    "optimizer": (
        "sgd", "momentum", "momentum", "nesterov", "adam", "adamw", "rmsprop", "adagrad", "nadam",
        "radam", "adamax",
    ),
    "groups": (1, 1, 2),
    "scheduler": (None, None, "step", "cosine", "onecycle"),
    "scaler": (False, False, False, True),
    "closure": (False, False, False, True),
    "method": ("online", "online", "online", "lookahead", "paper"),
    "engine": ("adjoint", "adjoint", "unroll"),
    "meta_loss": ("hard", "mix", "callable"),
    "unroll": (1, 1, 1, 2, 3),
    "idle": (0, 0, 0, 1),  # steps of a window that the hypergradient does not pass through
    "accumulate": (1, 1, 1, 2),
    "windows": (1, 1, 2),
    "micro_batches": (1, 1, 1, 2, 3),
    "zero_grad": ("before backward", "before forward", "after step", "to zero"),
}
"""Settings and habits that every loop has one of; repeated ones are tried more often."""

DEEDS = {
    "loss": (
        "factor", "cross entropy", "penalty", "features", "log", "square", "own value",
        "learned factor", "over mean weight", "shared weight net", "plain criterion", "clamped",
        "exponential average", "of teacher", "twice",
    ),
    "backward": (
        "in parts", "in part", "walked twice", "probed before", "probed after", "by autograd.grad",
        "by autograd.grad, changed", "create_graph", "gradient argument", "raised once",
        "other loss before", "other loss alone", "retain and penalty",
    ),
    "gradients": (
        "clip norm", "clip norm by layer", "clip value", "clip norm inf", "negated", "layer zeroed",
        "scaled", "rows masked", "noise", "normalised", "centralised", "decayed", "one dropped",
        "clipped between micro-batches", "clipped twice", "scaled through .data",
        "clip norm of a part", "unchanged copy", "bits flipped nowhere",
    ),
    "between": (
        "inputs", "targets", "teacher logits", "inputs after", "parameters", "parameters after",
        "temperature", "alpha", "attribute", "train to eval", "second forward", "validation",
        "criterion again", "frozen now", "parameters through .data after",
    ),
    "hooks": (
        "parameter", "activation", "activation clamped", "no_grad within", "detached within",
        "module backward",
        "post accumulate", "step pre clip", "step post shrink", "forward writes buffer",
        "observer",
    ),
    "time": (
        "frozen later", "thawed later", "annealed", "average", "look at weights", "checkpoint",
        "checkpoint into fresh", "skipped batch", "nan batch caught", "second optimizer",
        "wrapped steps itself", "weights clamped", "learning rate by hand", "layer replaced",
        "group added", "weight net moved", "eval mode", "two steps on one gradient",
    ),
}
"""Things that a loop may do beside; most loops do none or one of each kind."""


@dataclass(frozen=True)
class Program:
    """One loop out of the grammar; its fields are those of USUAL, and ``deeds``."""

    choices: tuple
    deeds: frozenset
    seed: int

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return dict(self.choices)[name]

    def does(self, kind, what):
        return (kind, what) in self.deeds

    def __repr__(self):
        usual = {k: v for k, v in self.choices if v != USUAL[k][0]}
        deeds = sorted(map(list, self.deeds))
        return f"program({', '.join(f'{k}={v!r}' for k, v in usual.items())}, deeds={deeds}, " \
               f"seed={self.seed})"


def program(deeds=(), seed=0, **choices):
    """A program by hand: the first of every choice that is not given."""
    chosen = {**{k: v[0] for k, v in USUAL.items()}, **choices}
    return Program(tuple(chosen.items()), frozenset(map(tuple, deeds)), seed)


@st.composite
def programs(draw):
    choices = tuple((name, draw(st.sampled_from(values))) for name, values in USUAL.items())
    every = [(kind, what) for kind, whats in DEEDS.items() for what in whats]
    deeds = draw(st.frozensets(st.sampled_from(every), max_size=2))
    return Program(choices, deeds, draw(st.integers(0, 3)))
