"""The diffs in docs/drop_in.md are those of the examples, and the plain loops among them train."""

import importlib.util
import re
import types
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from tests.students import relative_error

ROOT = Path(__file__).parent.parent
LOOPS = ["pytorch_tutorial_loop", "repdistiller_loop", "mdistiller_module"]
FIXED = {  # the plain program's mixture, (hard weight, soft weight)
    "pytorch_tutorial_loop": (0.75, 0.25),
    "repdistiller_loop": (1, 1),
    "mdistiller_module": (0.5, 0.5),
}
FRAMEWORKS = [
    "huggingface_trainer",
    "lightning_module",
    "torchdistill/digits.yaml",
    "accelerate_loop",
]
MARK = "  # kd-balance"

pytest.importorskip("sklearn", reason="the examples' data are scikit-learn's")


def file(name):
    return f"examples/{name}" if "." in name else f"examples/{name}.py"


def source(name):
    return (ROOT / file(name)).read_text()


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / file(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hunks(name):
    """The hunks of an example's diff in the docs, each a list of lines."""
    docs = (ROOT / "docs" / "drop_in.md").read_text()
    section = docs.split(f"`{file(name)}`.", 1)[1]
    diff = re.search(r"```diff\n(.*?)```", section, flags=re.DOTALL)[1]
    return [hunk.splitlines()[1:] for hunk in re.split(r"^(?=@@)", diff, flags=re.MULTILINE)[1:]]


def plain_source(name):
    """The program without kd-balance: the example, its diff taken back."""
    text = source(name)
    for hunk in hunks(name):
        before, after = (
            "".join(f"{line[1:]}\n" for line in hunk if line[:1] != other) for other in "+-"
        )
        assert text.count(after) == 1, after
        text = text.replace(after, before)
    return text


def plain_program(name):
    module = types.ModuleType(name)
    exec(plain_source(name), vars(module))
    return module


@pytest.mark.parametrize("name", LOOPS + FRAMEWORKS)
def test_the_diff_in_the_docs_is_that_of_the_example(name):
    marked = [line for line in source(name).splitlines() if line.endswith(MARK)]
    added = [line[1:] for hunk in hunks(name) for line in hunk if line.startswith("+")]
    assert sorted(added) == sorted(marked)
    assert 1 <= len(marked) <= 9
    plain = plain_source(name)
    if file(name).endswith(".py"):
        compile(plain, name, "exec")
    assert not any(word in plain for word in (MARK, "BilevelOptimizer", "WeightedKDLoss"))
    table = (ROOT / "docs" / "drop_in.md").read_text().split("\n\n")[1]
    row = next(line for line in table.splitlines() if file(name) in line)
    assert f"| [{len(marked)}](#" in row


@pytest.mark.parametrize("name", LOOPS)
def test_the_example_trains_student_and_weight_net(
    name, windows_of_four, monkeypatch, capsys
):
    made = []

    class Watched(BilevelOptimizer):
        def __init__(self, optimizer, student, criterion, meta_loader, teacher):
            super().__init__(optimizer, student, criterion, meta_loader, teacher=teacher)
            self.before = [p.detach().clone() for p in criterion.weight_net.parameters()]
            made.append(self)

    module = example(name)
    monkeypatch.setattr(module, "BilevelOptimizer", Watched)
    student = module.main(["--epochs", "2"])
    (optimizer,) = made
    assert optimizer.student is student
    assert optimizer.metrics["meta_updates"] == 4  # 280 images in batches of 32, twice
    assert optimizer.metrics["skipped_updates"] == 0
    after = optimizer.criterion.weight_net.parameters()
    assert all((new != old).any() for new, old in zip(after, optimizer.before, strict=True))
    assert optimizer.criterion.teacher_bias.any()
    assert re.search(r"student, test: all \d+\.\d%  0-3 .*  7-9 \d+\.\d%", capsys.readouterr().out)


CHECKS = {
    "digits": [],
    "pytorch_tutorial_loop": [],
    "repdistiller_loop": ["--distill", "kd"],
    "mdistiller_module": [],
    "accelerate_loop": [],
    "lightning_module": [],
    "huggingface_trainer": [],
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_hypergradient_of_the_example_is_right(name, capsys):
    try:
        module = example(name)
    except ImportError as error:
        pytest.skip(str(error))
    try:
        module.main(["--check", *([] if name == "digits" else ["--epochs", "1"]), *CHECKS[name]])
    finally:
        torch.set_default_dtype(torch.float32)
    assert "predicts the meta loss with a relative error of" in capsys.readouterr().out


@pytest.mark.parametrize("name", LOOPS)
def test_with_fixed_weights_it_is_the_plain_program(name, monkeypatch):
    """The changed lines change the weights, and nothing else."""
    module = example(name)
    monkeypatch.setattr(module, "BilevelOptimizer", lambda optimizer, *_, teacher: optimizer)
    alphas = []

    def fixed(counts, temperature, alpha):
        alphas.append(alpha)
        return WeightedKDLoss(temperature=temperature, alpha=alpha)

    monkeypatch.setattr(module, "WeightedKDLoss", types.SimpleNamespace(long_tailed=fixed))
    torch.manual_seed(0)
    student = module.main(["--epochs", "1"])
    torch.manual_seed(0)
    expected = plain_program(name).main(["--epochs", "1"])
    assert alphas == [FIXED[name]]
    torch.testing.assert_close(
        student.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-4
    )


# RepDistiller's three terms, against the unrolled graph and against finite differences


def distilled(module, *, steps, opt, engine=None, nudge=0.0):
    """φ's hypergradient after some steps of train_distill, or None, and the student."""
    torch.manual_seed(0)
    model_s, model_t = module.ConvNet(width=3), module.ConvNet(width=4)
    regress_s = nn.Conv2d(6, 8, 1)
    criterion = WeightedKDLoss(MetaWeightNet(hidden=(8,)), temperature=opt.kd_T)
    phi = list(criterion.weight_net.parameters())
    for part in (model_s, model_t, regress_s, criterion):
        part.double()
    direction = [torch.randn_like(p) for p in phi]
    for p, d in zip(phi, direction):
        p.data += nudge * d
    trainable = [*model_s.parameters(), *regress_s.parameters()]
    optimizer = torch.optim.SGD(trainable, lr=0.5, momentum=0.9, weight_decay=5e-4)
    batches = [
        (torch.randn(7, 1, 8, 8).double(), torch.randint(10, (7,)), torch.arange(7))
        for _ in range(steps + 1)
    ]
    *train, (inputs, targets, _) = batches
    modules = [model_s, regress_s, model_t]
    criteria = [nn.CrossEntropyLoss(), criterion, nn.MSELoss()]
    if engine is not None:
        optimizer = BilevelOptimizer(
            optimizer,
            model_s,
            criterion,
            [(inputs, targets)],
            engine=engine,
            every=steps,
            unroll=steps,
            meta_optimizer=torch.optim.SGD(phi, lr=0.0),
        )
    for epoch in (1, 2):
        half = train[: steps // 2] if epoch == 1 else train[steps // 2 :]
        module.adjust_learning_rate(epoch, opt, optimizer)
        if half:
            module.train_distill(epoch, half, modules, criteria, optimizer, opt)
    with torch.no_grad():
        meta_loss = F.cross_entropy(model_s(inputs), targets).item()
    return Namespace(
        gradients=[p.grad for p in phi],
        direction=direction,
        meta_loss=meta_loss,
        student=[p.detach() for p in model_s.parameters()],
        lr=optimizer.param_groups[0]["lr"],
    )


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("factors", [(0.0, 1.0, 10.0), (0.3, 0.7, 2.0)])
def test_three_terms_with_factors(steps, factors):
    module = example("repdistiller_loop")
    opt = module.parse_option(["--learning_rate", "0.5", "--lr_decay_epochs", "1", "--epochs", "2"])
    opt.gamma, opt.alpha, opt.beta = factors
    adjoint, unrolled = (
        distilled(module, steps=steps, opt=opt, engine=engine) for engine in ("adjoint", "unroll")
    )
    assert relative_error(adjoint.gradients, unrolled.gradients) < 1e-9
    assert adjoint.lr == pytest.approx(0.05)

    plain, up, down = (
        distilled(module, steps=steps, opt=opt, nudge=nudge) for nudge in (0.0, 1e-4, -1e-4)
    )
    torch.testing.assert_close(adjoint.student, plain.student, rtol=0, atol=0)
    if steps == 1:  # for more, terms beside the criterion count as constants in the curvature
        slope = sum((g * d).sum() for g, d in zip(adjoint.gradients, adjoint.direction))
        expected = (up.meta_loss - down.meta_loss) / 2e-4
        assert slope.item() == pytest.approx(expected, rel=1e-4)
