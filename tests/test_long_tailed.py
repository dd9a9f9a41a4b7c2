"""WeightedKDLoss.long_tailed, and the teacher's bias that the optimizer finds for it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from kd_balance.data import BalancedBatches
from kd_balance.soft_losses import temperature_kl
from kd_balance.teacher_bias import prior_bias
from tests.habits import assert_one_sentence
from tests.students import EVERY_STEP

COUNTS = [40, 20, 8, 3]
CLASSES = len(COUNTS)
LOG_PRIOR = (torch.tensor(COUNTS) / sum(COUNTS)).log()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch(count=30):
    logits = torch.randn(count, CLASSES), 2 * torch.randn(count, CLASSES)
    return *logits, torch.arange(count) % CLASSES


def weighted(student, teacher, labels, hard, soft, temperature=4.0):
    """Balanced softmax and temperature KL by hand, with the same two weights for all samples."""
    balanced = F.cross_entropy(student + LOG_PRIOR, labels)
    return hard * balanced + soft * temperature_kl(student, teacher, temperature).mean()


@pytest.mark.parametrize(
    "alpha, hard, soft", [(0.5, 0.5, 0.5), (0.9, 0.9, 0.1), ((2, 1), 2, 1), (0, 0, 1)]
)
def test_it_begins_as_ordinary_distillation_with_balanced_softmax(alpha, hard, soft):
    criterion = WeightedKDLoss.long_tailed(COUNTS, temperature=2.0, alpha=alpha)
    student, teacher, labels = batch()
    expected = weighted(student, teacher, labels, hard, soft, temperature=2.0)
    torch.testing.assert_close(criterion(student, teacher, labels), expected)
    with torch.no_grad():
        for param in criterion.weight_net.parameters():
            param.normal_()
    criterion(student, teacher, labels)
    assert criterion.weights.std() > 0.01
    assert criterion.weights.mean().item() == pytest.approx((hard + soft) / 2)


def test_it_takes_the_settings_of_the_class():
    criterion = WeightedKDLoss.long_tailed(
        COUNTS, class_dim=-1, ignore_index=7, reduction="none", soft_loss=temperature_two
    )
    student, teacher = torch.randn(2, 2, 5, CLASSES)
    labels = torch.tensor([[0, 1, 7, 2, 3], [3, 2, 1, 0, 7]])
    loss = criterion(student, teacher, labels)
    assert loss.shape == (2, 5) and (loss == 0).tolist() == (labels == 7).tolist()
    plain = WeightedKDLoss.long_tailed(COUNTS, temperature=2.0, reduction="none")
    expected = plain(student[0, :2], teacher[0, :2], labels[0, :2])
    torch.testing.assert_close(loss[0, :2], expected)
    with pytest.raises(TypeError, match="hard_loss"):
        WeightedKDLoss.long_tailed(COUNTS, hard_loss=F.cross_entropy)


def temperature_two(student_logits, teacher_logits):
    return temperature_kl(student_logits, teacher_logits, 2.0)


def test_classes_without_a_training_sample():
    """Their logits are taught by the teacher alone, and by the meta set."""
    counts = [40, 0, 8, 0]
    criterion = WeightedKDLoss.long_tailed(counts)
    student, teacher, labels = batch()
    student.requires_grad_()
    criterion(student, teacher, labels - labels % 2).backward()
    gradient = student.grad.clone()
    student.grad = None
    WeightedKDLoss(alpha=(0, 0.5))(student, teacher, labels).backward()
    torch.testing.assert_close(gradient[:, 1], student.grad[:, 1])
    assert gradient.isfinite().all()


# the teacher's bias


class Teacher(nn.Module):
    """Knows the labels with some noise, favours frequent classes, and drops out in training."""

    def __init__(self, strength=1.0):
        super().__init__()
        self.linear = nn.Linear(8, CLASSES)
        self.dropout = nn.Dropout(0.9)
        self.strength = strength
        self.requires_grad_(False)

    def forward(self, input):
        return self.dropout(self.linear(input)) + self.strength * LOG_PRIOR


def labelled(count, teacher):
    """Inputs whose labels are drawn from the teacher without its bias."""
    inputs = 2 * torch.randn(count, 8)
    labels = torch.multinomial(teacher.linear(inputs).softmax(1), 1).squeeze(1)
    return inputs, labels


class Setting:
    """A student and its optimizer, wrapped for a criterion with a teacher."""

    def __init__(self, meta, teacher, criterion=None, **settings):
        self.student = nn.Linear(8, CLASSES)
        self.criterion = criterion or WeightedKDLoss.long_tailed(COUNTS)
        self.teacher = teacher
        optimizer = torch.optim.SGD(self.student.parameters(), lr=0.1)
        self.random_numbers = torch.get_rng_state()
        self.optimizer = BilevelOptimizer(
            optimizer, self.student, self.criterion, meta, teacher=teacher, **settings
        )

    def train(self, steps, start=0):
        for step in range(start, start + steps):
            torch.manual_seed(100 + step)
            inputs, labels = labelled(20, Teacher())
            teacher_logits = torch.randn(20, CLASSES)
            self.optimizer.zero_grad()
            self.criterion(self.student(inputs), teacher_logits, labels).backward()
            self.optimizer.step()
        return [*self.student.parameters(), *self.criterion.parameters()]


def in_batches(inputs, labels, size=50):
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def mappings(batches):
    return [{"input": inputs, "labels": labels} for inputs, labels in batches]


class WithFeatures(nn.Module):
    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher

    def forward(self, inputs):
        return self.teacher(inputs), {"features": [inputs], "images": inputs.view(-1, 4, 2)}


class OfLists(nn.Module):
    """The teacher for batches that are (labels, [inputs])."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher

    def forward(self, batch):
        return self.teacher(batch[1][0])


def of_lists(student, batch):
    return student(batch[1][0]), batch[0]


SHAPES = {  # what the meta loader is made of, the teacher's adapter, settings
    "pairs": (list, nn.Sequential, {}),
    "mappings": (mappings, lambda teacher: teacher, {}),
    "logits among others": (list, lambda teacher: WithFeatures(teacher), {}),
    "an iterator": (iter, nn.Sequential, {}),
    "a shape of their own": (
        lambda batches: [(labels, [inputs]) for inputs, labels in batches],
        OfLists,
        {"meta_forward": of_lists},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_found_on_the_meta_set_and_subtracted(shape):
    made_of, adapter, settings = SHAPES[shape]
    teacher = Teacher(strength=1.0)
    inputs, labels = labelled(2000, teacher)
    setting = Setting(made_of(in_batches(inputs, labels)), adapter(teacher), **settings)
    torch.testing.assert_close(torch.get_rng_state(), setting.random_numbers)
    assert all(module.training for module in [*teacher.modules(), *setting.student.modules()])
    teacher.eval()
    raw = teacher(inputs)
    expected = prior_bias(raw[:550], labels[:550], COUNTS)  # 11 batches are the first with 512
    assert (expected / LOG_PRIOR)[0].item() == pytest.approx(1.0, abs=0.3)
    criterion = setting.criterion
    torch.testing.assert_close(criterion.teacher_bias, expected)
    logits, without = torch.randn(2000, CLASSES), raw - expected
    loss = weighted(logits, without, labels, 0.5, 0.5)
    torch.testing.assert_close(criterion(logits, raw, labels), loss)
    teacher_ce = F.cross_entropy(without, labels, reduction="none")
    torch.testing.assert_close(criterion.last_features[:, 1], teacher_ce)


def test_a_teacher_that_cannot_take_the_whole_batch_is_told():
    made_of, _, settings = SHAPES["a shape of their own"]
    teacher = Teacher()
    with pytest.raises(ValueError, match=r"teacher=lambda batch: …"):
        Setting(made_of(in_batches(*labelled(100, teacher))), teacher, **settings)


def test_labels_that_the_loop_shifts_are_told_where_the_teacher_found_its_bias_without():
    tokens = torch.randint(CLASSES, (8, 6))
    student, teacher = (
        nn.Sequential(nn.Embedding(CLASSES, 5), nn.Linear(5, CLASSES)) for _ in range(2)
    )
    criterion = WeightedKDLoss.long_tailed(COUNTS, class_dim=-1)
    optimizer = BilevelOptimizer(
        torch.optim.SGD(student.parameters(), 0.1), student, criterion, [(tokens, tokens)],
        teacher=teacher, unroll=1, every=1,
    )
    criterion(student(tokens)[:, :-1], teacher(tokens)[:, :-1], tokens[:, 1:]).backward()
    with pytest.warns(UserWarning, match="The loop shifts labels"):
        optimizer.step()


def test_class_counts_of_fewer_classes_than_the_logits_are_refused():
    criterion = WeightedKDLoss.long_tailed(COUNTS)
    logits = torch.zeros(2, CLASSES + 1)
    with pytest.raises(ValueError, match=f"num_classes={CLASSES + 1}"):
        criterion(logits, logits, torch.tensor([0, 1]))


def test_without_a_teacher_nothing_is_subtracted():
    meta = in_batches(*labelled(100, Teacher()))
    assert not Setting(meta, None).criterion.teacher_bias.any()
    plain = WeightedKDLoss(MetaWeightNet())
    assert Setting(meta, Teacher(), plain).criterion.teacher_bias is None


def loader(inputs, labels):
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, labels), batch_size=20, shuffle=True
    )


def balanced_batches(inputs, labels):
    return BalancedBatches(inputs, labels, batch_size=20, seed=0)


@pytest.mark.parametrize("made_of", [loader, balanced_batches, lambda *meta: iter(loader(*meta))])
def test_the_meta_batches_come_in_the_order_that_they_would_have_come_in(made_of):
    drawn = []
    for teacher in (None, Teacher()):
        torch.manual_seed(1)
        meta = labelled(120, Teacher())
        torch.manual_seed(2)
        setting = Setting(made_of(*meta), teacher)
        drawn.append([setting.optimizer._steps.meta_set.draw()[0] for _ in range(6)])
    torch.testing.assert_close(*drawn, rtol=0, atol=0)


@pytest.mark.parametrize("made_of", [loader, balanced_batches])
def test_a_resumed_run_is_the_run_that_went_on(made_of, tmp_path):
    """Also where the teacher of the resumed one would show another bias."""

    def setting(strength):
        torch.manual_seed(1)
        meta = labelled(120, Teacher())
        torch.manual_seed(2)
        return Setting(made_of(*meta), Teacher(strength), **EVERY_STEP)

    expected = setting(1.0).train(12)
    first = setting(1.0)
    first.train(6)  # the loader's epoch has six batches
    state = {"student": first.student.state_dict(), "optimizer": first.optimizer.state_dict()}
    torch.save(state, tmp_path / "checkpoint.pt")
    resumed = setting(3.0)
    other = resumed.criterion.teacher_bias
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.student.load_state_dict(state["student"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    assert (resumed.criterion.teacher_bias != other).any()
    torch.testing.assert_close(resumed.train(6, start=6), expected, rtol=0, atol=0)


def test_the_criterion_s_own_state_holds_it():
    first, second = (WeightedKDLoss.long_tailed(COUNTS) for _ in range(2))
    teacher = Teacher().eval()
    inputs, labels = labelled(100, teacher)
    first.find_teacher_bias([(teacher(inputs), labels)])
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.teacher_bias, first.teacher_bias)
    assert first.teacher_bias.any()
    first.find_teacher_bias([(teacher(inputs), labels)])  # of raw logits, once more
    torch.testing.assert_close(second.teacher_bias, first.teacher_bias)


def test_positions_that_are_ignored_do_not_show_it():
    teacher = Teacher().eval()
    inputs, labels = labelled(100, teacher)
    logits = teacher(inputs)
    expected = prior_bias(logits[:50], labels[:50], COUNTS)
    labels = labels.where(torch.arange(100) < 50, -100)
    criterion = WeightedKDLoss.long_tailed(COUNTS, class_dim=-1)
    criterion.find_teacher_bias([(logits.view(2, 50, CLASSES), labels.view(2, 50))])
    torch.testing.assert_close(criterion.teacher_bias, expected)
    probabilities = WeightedKDLoss.long_tailed(COUNTS)
    probabilities.find_teacher_bias([(logits[:50], F.one_hot(labels[:50], CLASSES).float())])
    torch.testing.assert_close(probabilities.teacher_bias, expected)


class Refusing(nn.Module):
    def forward(self, inputs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


REFUSED = {
    "teacher could not be run": lambda meta: Setting(meta, Refusing()),
    "teacher returned tuple": lambda meta: Setting(meta, lambda x: (x[:, :4], x[:, 4:])),
    "teacher returned dict": lambda meta: Setting(meta, lambda x: {"features": x}),
    "no labelled sample": lambda meta: Setting(
        [(inputs, torch.full_like(labels, -100)) for inputs, labels in meta], Teacher()
    ),
    "a meta batch is Tensor": lambda meta: Setting([inputs for inputs, _ in meta], Teacher()),
    "no class_counts": lambda meta: WeightedKDLoss().find_teacher_bias(meta),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_show_it_gets_one_sentence(message):
    meta = in_batches(*labelled(100, Teacher()))
    with pytest.raises(ValueError, match=message) as error:
        REFUSED[message](meta)
    assert_one_sentence(error)
