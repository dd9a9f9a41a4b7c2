"""WeightedKDLoss: its values, shapes and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_balance import MetaWeightNet, WeightedKDLoss
from kd_balance.hard_losses import BalancedSoftmax
from kd_balance.soft_losses import (
    BalancedKL,
    DecoupledKD,
    FlattenedKL,
    GeneralizedJSD,
    ReverseKL,
    SkewedKL,
)
from kd_balance.weight_net import FEATURES, LogFrequency


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch(*shape, classes=5, class_dim=1):
    """Student and teacher logits, and labels, for [N, C, …] or [N, …, C]."""
    full = [shape[0], classes, *shape[1:]] if class_dim == 1 else [*shape, classes]
    return torch.randn(full), 3 * torch.randn(full), torch.randint(classes, shape)


def hinton(student, teacher, labels, temperature):
    """Written out sample by sample."""
    hard, soft = [], []
    for s, t, y in zip(student, teacher, labels, strict=True):
        hard.append(-torch.log(torch.exp(s[y]) / torch.exp(s).sum()))
        p = torch.softmax(t / temperature, 0)
        q = torch.softmax(s / temperature, 0)
        soft.append(temperature**2 * (p * (p / q).log()).sum())
    return torch.stack(hard), torch.stack(soft)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_without_a_net_it_is_ordinary_distillation(temperature):
    student, teacher, labels = batch(6)
    hard, soft = hinton(student, teacher, labels, temperature)
    for alpha, expected in [
        (0.9, 0.9 * hard + 0.1 * soft),
        ((0.5, 2.0), 0.5 * hard + 2 * soft),
    ]:
        criterion = WeightedKDLoss(temperature=temperature, alpha=alpha)
        torch.testing.assert_close(criterion(student, teacher, labels), expected.mean())
    torch.testing.assert_close(
        criterion.losses(student, teacher, labels), torch.stack((hard, soft), 1)
    )
    torch.testing.assert_close(criterion.weights, torch.tensor([[0.5, 2.0]] * 6))


def test_weights_come_from_the_net_and_are_constants_to_the_student():
    student, teacher, labels = batch(6)
    student.requires_grad_()
    net = MetaWeightNet()
    criterion = WeightedKDLoss(net)
    loss = criterion(student, teacher, labels)
    losses = criterion.losses(student, teacher, labels)
    features = torch.stack(
        (
            F.cross_entropy(student, labels, reduction="none"),
            F.cross_entropy(teacher, labels, reduction="none"),
        ),
        1,
    )
    weights = net(features).detach()
    torch.testing.assert_close(criterion.weights, weights)
    torch.testing.assert_close(loss, (weights * losses).sum() / 6)
    (actual,) = torch.autograd.grad(loss, student)
    (expected,) = torch.autograd.grad((weights * losses).sum() / 6, student)
    torch.testing.assert_close(actual, expected)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(6,), (4, 3), (2, 3, 2)])
@pytest.mark.parametrize("class_dim", [1, -1])
def test_every_position_is_a_sample(shape, class_dim, reduction):
    student, teacher, labels = batch(*shape, class_dim=class_dim)
    criterion = WeightedKDLoss(alpha=0.3, class_dim=class_dim, reduction=reduction)
    loss = criterion(student, teacher, labels)
    rows = [t.movedim(class_dim, -1).reshape(-1, 5) for t in (student, teacher)]
    hard, soft = hinton(*rows, labels.flatten(), 4.0)
    expected = (0.3 * hard + 0.7 * soft).view(shape)
    expected = {"mean": expected.mean(), "sum": expected.sum(), "none": expected}[reduction]
    torch.testing.assert_close(loss, expected)
    assert criterion.weights.shape == (labels.numel(), 2)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_positions_weigh_nothing_and_are_not_counted(reduction):
    student, teacher, labels = batch(4, 3)
    ignored = labels.clone()
    ignored[1, 2] = ignored[3, 0] = -100
    criterion = WeightedKDLoss(MetaWeightNet(), reduction=reduction)
    student.requires_grad_()
    loss = criterion(student, teacher, ignored)
    kept = ignored != -100
    assert (criterion.weights.view(4, 3, 2).sum(2) > 0).equal(kept)
    whole = WeightedKDLoss(criterion.weight_net, reduction="none")(student, teacher, labels)
    expected = {"mean": whole[kept].mean(), "sum": whole[kept].sum(), "none": whole * kept}
    torch.testing.assert_close(loss, expected[reduction])
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert (gradient.abs().sum(1) > 0).equal(kept)


MASKED = [2, 4]  # classes
OWN_LOSSES = {
    "usual": {},
    "balanced": {"hard_loss": BalancedSoftmax([9, 5, 4, 2, 1])},
    "flattened": {"soft_loss": FlattenedKL()},
    "balanced KL": {"soft_loss": BalancedKL([9, 5, 4, 2, 1])},
    "decoupled": {"soft_loss": DecoupledKD()},
    "reverse": {"soft_loss": ReverseKL()},
    "jsd": {"soft_loss": GeneralizedJSD(0.3, 2.0)},
    "skewed": {"soft_loss": SkewedKL()},
    "skewed reverse": {"soft_loss": SkewedKL(reverse=True)},
}


def masked_batch(kind):
    """Logits [6, 5] with two classes of −∞, the classes left, and targets of both."""
    student, teacher, labels = batch(6)
    left = [c for c in range(5) if c not in MASKED]
    labels = torch.tensor(left)[labels % len(left)]
    mask = torch.zeros(5).index_fill(0, torch.tensor(MASKED), float("-inf"))
    targets = F.one_hot(labels, 5).float()
    if kind == "smoothed":
        targets = 0.9 * targets + 0.1 * (mask == 0) / len(left)
    if kind == "indices":
        targets = labels
    return student + mask, teacher + mask, targets, left


@pytest.mark.parametrize("name", OWN_LOSSES)
@pytest.mark.parametrize("kind", ["indices", "smoothed"])
def test_classes_masked_in_both_have_no_part(name, kind):
    """In value, gradient and every feature."""
    if name == "decoupled" and kind == "smoothed":
        pytest.skip("decoupled KD takes class indices")
    student, teacher, targets, left = masked_batch(kind)
    settings = OWN_LOSSES[name]
    criterion = WeightedKDLoss(MetaWeightNet(tuple(FEATURES)), **settings)
    student.requires_grad_()
    criterion(student, teacher, targets).backward()
    assert student.grad.isfinite().all() and (student.grad[:, MASKED] == 0).all()
    if "balanced" in name:
        return  # its priors are those of the classes left
    small = student[:, left].detach().requires_grad_()
    fewer = targets[:, left] if kind == "smoothed" else torch.tensor(
        [left.index(label) for label in targets.tolist()]
    )
    other = WeightedKDLoss(criterion.weight_net, **settings)
    other(small, teacher[:, left], fewer).backward()
    torch.testing.assert_close(criterion.last_losses, other.last_losses)
    torch.testing.assert_close(criterion.last_features, other.last_features)
    torch.testing.assert_close(student.grad[:, left], small.grad)


def test_a_class_masked_in_the_teacher_has_probability_zero_and_in_the_student_alone_no_loss():
    student, teacher, labels, left = masked_batch("indices")
    criterion = WeightedKDLoss(alpha=(0.0, 1.0))
    finite = torch.where(student.isinf(), 0.3, student).requires_grad_()
    loss = criterion(finite, teacher, labels)
    low = torch.where(teacher.isinf(), -1e4, teacher)
    torch.testing.assert_close(loss, criterion(finite, low, labels))
    loss.backward()
    assert finite.grad.isfinite().all()
    assert criterion(student, low, labels).isfinite()
    assert criterion(student, torch.where(teacher.isinf(), 0.0, teacher), labels) == float("inf")


def test_a_teacher_without_any_probability_for_the_label_has_finite_features():
    student, teacher, labels = batch(6)
    teacher[0, labels[0]] = float("-inf")
    criterion = WeightedKDLoss(MetaWeightNet(tuple(FEATURES)))
    assert criterion(student, teacher, labels).isfinite()
    assert criterion.last_features.isfinite().all()


def test_a_batch_of_ignored_positions_gives_zero():
    student, teacher, labels = batch(4)
    student.requires_grad_()
    loss = WeightedKDLoss()(student, teacher, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0 and student.grad.abs().sum() == 0


@pytest.mark.parametrize(
    "features",
    [("student_ce", "teacher_ce"), tuple(FEATURES), (LogFrequency([9, 5, 4, 2, 1]), "kl")],
)
def test_one_hot_probabilities_are_class_indices(features):
    student, teacher, labels = batch(4, 3)
    criterion = WeightedKDLoss(MetaWeightNet(features), class_dim=1)
    probabilities = F.one_hot(labels, 5).movedim(-1, 1).float()
    torch.testing.assert_close(
        criterion(student, teacher, probabilities), criterion(student, teacher, labels)
    )


def test_own_losses_take_the_place_of_both():
    student, teacher, labels = batch(6)
    criterion = WeightedKDLoss(
        alpha=(1.0, 2.0),
        hard_loss=lambda s, y: F.multi_margin_loss(s, y, reduction="none"),
        soft_loss=lambda s, t: (s - t).pow(2).mean(1),
    )
    expected = F.multi_margin_loss(student, labels) + 2 * F.mse_loss(student, teacher)
    torch.testing.assert_close(criterion(student, teacher, labels), expected)


def test_a_soft_loss_may_ask_for_the_targets():
    student, teacher, labels = batch(4, 3)
    soft = DecoupledKD(temperature=2.0)
    criterion = WeightedKDLoss(alpha=(0.0, 1.0), soft_loss=soft, reduction="none")
    rows = [t.movedim(1, -1).reshape(-1, 5) for t in (student, teacher)]
    expected = soft(*rows, labels.flatten()).view(4, 3)
    torch.testing.assert_close(criterion(student, teacher, labels), expected)


def test_half_precision_logits_give_float32_losses_under_autocast():
    student, teacher, labels = batch(6)
    criterion = WeightedKDLoss(MetaWeightNet())
    expected = criterion(student.bfloat16().float(), teacher.bfloat16().float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(student.bfloat16(), teacher.bfloat16(), labels)
    assert loss.dtype == criterion.weights.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_no_gradient_reaches_the_teacher():
    student, teacher, labels = batch(6)
    student.requires_grad_()
    teacher.requires_grad_()
    WeightedKDLoss()(student, teacher, labels).backward()
    assert teacher.grad is None


def test_any_module_may_be_the_weight_net():
    class Labels(nn.Module):
        features = (lambda s, t, y: y.float(),)

        def forward(self, features):
            return torch.cat((features, 1 - features), 1)

    student, teacher, labels = batch(6)
    criterion = WeightedKDLoss(Labels())
    criterion(student, teacher, labels)
    torch.testing.assert_close(criterion.weights[:, 0], labels.float())


def test_features_are_what_they_are_called():
    student, teacher, labels = batch(1)
    p, q = teacher[0].softmax(0), student[0].softmax(0)
    y = labels[0]
    expected = {
        "student_ce": -q[y].log(),
        "teacher_ce": -p[y].log(),
        "teacher_probability": p[y],
        "kl": (p * (p / q).log()).sum(),
        "student_entropy": -(q * q.log()).sum(),
        "teacher_entropy": -(p * p.log()).sum(),
        "student_margin": student[0, y] - max(v for i, v in enumerate(student[0]) if i != y),
        "teacher_margin": teacher[0, y] - max(v for i, v in enumerate(teacher[0]) if i != y),
    }
    assert expected.keys() == FEATURES.keys()
    for name, value in expected.items():
        torch.testing.assert_close(FEATURES[name](student, teacher, labels)[0], value)


def test_weights_may_differ_by_class_alone():
    counts = [50, 30, 10, 9, 1]
    student, teacher = torch.randn(2, 5, 5)
    criterion = WeightedKDLoss(MetaWeightNet((LogFrequency(counts),)))
    criterion(student, teacher, torch.arange(5))
    log_shares = torch.tensor([[0.5], [0.3], [0.1], [0.09], [0.01]]).log()
    torch.testing.assert_close(criterion.weights, criterion.weight_net(log_shares).detach())


def test_a_mean_and_a_ratio_bind_the_weights():
    net = far_apart(MetaWeightNet(mean=0.25, ratio=3.0))
    weights = net(5 * torch.randn(50, 2)).detach()
    assert weights.mean().item() == pytest.approx(0.25)
    assert weights.max() / weights.min() == pytest.approx(3.0)


def far_apart(net):
    """Its weights as far apart as a sigmoid goes."""
    torch.nn.init.normal_(net.layers[-2].weight, std=1e4)
    return net


def test_a_pair_is_where_the_weights_begin_and_its_average_stays():
    net = MetaWeightNet(mean=(0.9, 0.3), ratio=10.0)
    features = torch.randn(50, 2)
    torch.testing.assert_close(net(features), torch.tensor([0.9, 0.3]).expand(50, 2))
    weights = far_apart(net)(features).detach()
    assert weights.mean().item() == pytest.approx(0.6)
    for column in weights.T:
        assert column.max() / column.min() == pytest.approx(10.0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ignored_positions_do_not_count_in_the_average(reduction):
    """Padding adds nothing to a loss, whatever stands there."""
    student, teacher = torch.randn(2, 12, 5)
    labels = torch.arange(12) % 5
    criterion = WeightedKDLoss(far_apart(MetaWeightNet(mean=0.5)), reduction=reduction)
    expected = criterion(student[:4], teacher[:4], labels[:4])
    weights = criterion.weights
    assert weights.mean().item() == pytest.approx(0.5)
    padded = torch.cat((teacher[:4], 3 * teacher[4:]))
    loss = criterion(student, padded, labels.where(torch.arange(12) < 4, -100))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(criterion.weights[:4], weights)
    assert not criterion.weights[4:].any()


def test_a_batch_of_ignored_positions_alone_has_no_loss():
    criterion = WeightedKDLoss(MetaWeightNet(mean=0.5))
    student = torch.randn(3, 5, requires_grad=True)
    loss = criterion(student, torch.randn(3, 5), torch.full((3,), -100))
    loss.backward()
    assert loss == 0 and not student.grad.any() and not criterion.weights.any()


def test_labels_of_few_bits_are_not_taken_for_ignored():
    """-100 and 156 are the same in eight bits."""
    student, teacher = torch.randn(2, 3, 200)
    labels = torch.tensor([156, 3, 4])
    criterion = WeightedKDLoss()
    assert criterion(student, teacher, labels.byte()) == criterion(student, teacher, labels)


def test_features_that_are_modules_move_and_are_saved_with_the_net():
    net = MetaWeightNet((LogFrequency([3, 1]),)).double()
    assert net.features[0].log_prior.dtype == torch.float64
    other = MetaWeightNet((LogFrequency([1, 1]),))
    other.load_state_dict(net.state_dict())
    assert other.features[0].log_prior.exp().tolist() == pytest.approx([0.75, 0.25])


REFUSED = {
    "class_counts is \\[0.0, 0.0\\]": lambda: LogFrequency([0, 0]),
    "class_counts is \\[3.0, -1.0\\]": lambda: LogFrequency([3, -1]),
    "class_counts has 4 numbers and the logits 5 classes": lambda: BalancedSoftmax([4, 3, 2, 1])(
        torch.zeros(6, 5), torch.zeros(6).long()
    ),
    "temperature is 0": lambda: WeightedKDLoss(temperature=0),
    "alpha is 1.5": lambda: WeightedKDLoss(alpha=1.5),
    "alpha is \\(1, 2, 3\\)": lambda: WeightedKDLoss(alpha=(1, 2, 3)),
    "reduction is 'average'": lambda: WeightedKDLoss(reduction="average"),
    "weight_net is 4.0": lambda: WeightedKDLoss(4.0),
    "feature 'student_loss' is unknown": lambda: MetaWeightNet(("student_loss",)),
    "features is 'kl'": lambda: MetaWeightNet("kl"),
    "hidden is \\(0,\\)": lambda: MetaWeightNet(hidden=(0,)),
    "mean is 0": lambda: MetaWeightNet(mean=0),
    "mean is \\(1, 2, 3\\)": lambda: MetaWeightNet(mean=(1, 2, 3)),
    "mean is \\(1, -1\\)": lambda: MetaWeightNet(mean=(1, -1)),
    "ratio is 1": lambda: MetaWeightNet(mean=0.5, ratio=1),
    "student_logits have shape \\(5,\\)": lambda: WeightedKDLoss()(
        torch.zeros(5), torch.zeros(5), torch.tensor(0)
    ),
    "teacher_logits have shape \\(6, 4\\)": lambda: WeightedKDLoss()(
        torch.zeros(6, 5), torch.zeros(6, 4), torch.zeros(6).long()
    ),
    "class indices. have shape \\(5,\\)": lambda: WeightedKDLoss()(
        torch.zeros(6, 5), torch.zeros(6, 5), torch.zeros(5).long()
    ),
    "class probabilities. have shape \\(6,\\)": lambda: WeightedKDLoss()(
        torch.zeros(6, 5), torch.zeros(6, 5), torch.zeros(6)
    ),
    "hard_loss returned shape \\(\\)": lambda: WeightedKDLoss(hard_loss=F.cross_entropy)(
        torch.zeros(6, 5), torch.zeros(6, 5), torch.zeros(6).long()
    ),
    "weight_net returned shape \\(6, 3\\)": lambda: WeightedKDLoss(nn.Linear(2, 3))(
        torch.zeros(6, 5), torch.zeros(6, 5), torch.zeros(6).long()
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_arguments_get_one_sentence(message):
    with pytest.raises(ValueError, match=message) as error:
        REFUSED[message]()
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_weights_before_the_first_call_are_refused():
    with pytest.raises(RuntimeError, match="before the first call"):
        _ = WeightedKDLoss().weights
