"""meta_loader: class-balanced batches out of whatever holds the samples."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, random_split

from kd_balance import BilevelOptimizer, WeightedKDLoss, class_counts, meta_loader
from kd_balance.optimizer import EVERY
from tests.habits import assert_one_sentence

TARGETS = torch.arange(4).repeat_interleave(torch.tensor([9, 5, 7, 3]))[torch.randperm(24)]
INPUTS = torch.arange(24).float().unsqueeze(1)
EXPECTED = torch.bincount(TARGETS).tolist()


class Images(Dataset):
    """Items of a dataset with the transforms of its user, which draw random numbers."""

    def __init__(self, **attributes):
        vars(self).update(attributes)
        self.read = 0

    def __len__(self):
        return 24

    def __getitem__(self, i):
        self.read += 1
        torch.rand(1)
        return INPUTS[i] + 0.5, int(TARGETS[i]), i


class Mappings(Images):
    def __getitem__(self, i):
        inputs, label, _ = super().__getitem__(i)
        return {"input": inputs, "label": label}


DATA = {
    "tensors": lambda: (INPUTS + 0.5, TARGETS),
    "a mapping of tensors": lambda: ({"input": INPUTS + 0.5}, TARGETS.tolist()),
    "a TensorDataset": lambda: TensorDataset(INPUTS + 0.5, TARGETS),
    "a DataLoader": lambda: DataLoader(Images(targets=TARGETS), batch_size=5, shuffle=True),
    "a list of pairs": lambda: [(x + 0.5, y) for x, y in zip(INPUTS, TARGETS, strict=True)],
    "targets, a list": lambda: Images(targets=TARGETS.tolist()),
    "labels, an array": lambda: Images(labels=TARGETS.numpy()),
    "items to be read": Images,
    "mappings to be read": Mappings,
    "a subset of it all": lambda: Subset(Images(targets=TARGETS), range(24)),
    "a subset to be read": lambda: Subset(Images(), range(24)),
    "targets of something else": lambda: Images(targets=[0, 1]),
    "targets to be transformed": lambda: Images(
        targets=(9 - TARGETS).tolist(), target_transform=lambda label: 9 - label
    ),
}


def inputs_and_labels(batch):
    return (batch["input"], batch["labels"]) if isinstance(batch, dict) else batch[:2]


@pytest.mark.parametrize("kind", DATA)
def test_it_is_balanced_and_its_samples_are_those_of_the_data(kind):
    data = DATA[kind]()
    before = torch.get_rng_state()
    assert class_counts(data).tolist() == EXPECTED
    loader = meta_loader(data, per_class=3, batch_size=8)
    torch.testing.assert_close(torch.get_rng_state(), before)
    assert class_counts(TARGETS[loader.indices]).tolist() == [3, 3, 3, 3]
    together = torch.cat((loader.indices, loader.rest)).sort().values
    assert together.tolist() == list(range(24))
    seen = set()
    for _ in range(12):
        inputs, labels = inputs_and_labels(next(loader))
        assert class_counts(labels).tolist() == [2, 2, 2, 2]
        places = (inputs.squeeze(1) - 0.5).long()
        torch.testing.assert_close(TARGETS[places], labels)
        seen.update(places.tolist())
    assert seen == set(loader.indices.tolist())


def test_items_are_read_when_they_are_used():
    data = Images(targets=TARGETS)
    loader = meta_loader(data, per_class=2)
    assert data.read == 0
    assert len(next(loader)[1]) == 8 == data.read  # all of the meta set, by default


def test_a_subset_has_its_own_samples():
    first, second = random_split(Images(targets=TARGETS), [16, 8])
    counts = [class_counts(part, num_classes=4) for part in (first, second)]
    assert sum(counts).tolist() == EXPECTED
    loader = meta_loader(first, per_class=1)
    places = torch.tensor(first.indices)[loader.indices]
    inputs, labels = next(loader)[:2]
    assert {int(x) for x in inputs} == set(places.tolist())
    torch.testing.assert_close(TARGETS[inputs.squeeze(1).long()], labels)


def test_classes_with_few_samples_are_repeated_and_it_says_so():
    sentence = "2 of 4 classes have fewer than the 6 samples asked for, class 3 3"
    with pytest.warns(UserWarning, match=sentence):
        loader = meta_loader((INPUTS, TARGETS), per_class=6, batch_size=16)
    assert class_counts(TARGETS[loader.indices]).tolist() == [6, 5, 6, 3]
    for _ in range(5):
        assert class_counts(next(loader)[1]).tolist() == [4, 4, 4, 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        meta_loader((INPUTS, TARGETS), per_class=3)


def test_classes_may_be_missing():
    loader = meta_loader((INPUTS[:4], [7, 2, 7, 2]), per_class=2)
    assert next(loader)[1].sort().values.tolist() == [2, 2, 7, 7]


def test_the_default_batch_holds_a_hundred():
    targets = torch.arange(300) % 150
    labels = next(meta_loader((torch.rand(300, 1), targets), per_class=2))[1]
    assert len(labels) == 100 == len(labels.unique())


def test_a_seed_decides_and_a_state_goes_on():
    def made(seed=0):
        return meta_loader(Images(targets=TARGETS), per_class=3, batch_size=5, seed=seed)

    assert made().indices.tolist() == made().indices.tolist() != made(1).indices.tolist()
    loader = made()
    for _ in range(3):
        next(loader)
    state = loader.state_dict()
    expected = [next(loader)[0] for _ in range(4)]
    other = made()
    other.load_state_dict(state)
    torch.testing.assert_close([next(other)[0] for _ in range(4)], expected)
    with pytest.raises(ValueError, match="from the same samples"):
        meta_loader((INPUTS, TARGETS), per_class=1).load_state_dict(state)


def test_collate_fn_makes_the_batches():
    def collate(items):
        return {"input": torch.stack([item["input"] for item in items]), "labels": "made"}

    batch = next(meta_loader(Mappings(), per_class=1, collate_fn=collate))
    assert batch["labels"] == "made" and batch["input"].shape == (4, 1)
    batch = next(meta_loader(DataLoader(Mappings(), collate_fn=collate), per_class=1))
    assert batch["labels"] == "made"


@pytest.mark.parametrize("data", [Images, Mappings])
def test_a_plain_loop_needs_three_lines(data):
    train_set = data(targets=TARGETS)
    student = torch.nn.Linear(1, 4)
    teacher = torch.nn.Linear(1, 4)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)

    criterion = WeightedKDLoss.long_tailed(class_counts(train_set))
    meta = meta_loader(train_set, per_class=3)
    optimizer = BilevelOptimizer(optimizer, student, criterion, meta, teacher=teacher)

    for _ in range(EVERY // 3 + 1):
        for batch in DataLoader(train_set, batch_size=8, shuffle=True):
            batch = batch if isinstance(batch, list) else (batch["input"], batch["label"])
            inputs, targets = batch[:2]
            loss = criterion(student(input=inputs), teacher(inputs).detach(), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    metrics = optimizer.metrics
    assert metrics["meta_updates"] == 1 and metrics["hypergradient_norm"] > 0
    assert metrics["meta_loss"] == metrics["meta_loss_start"]


REFUSED = {
    "per_class is 0": lambda: meta_loader((INPUTS, TARGETS), per_class=0),
    "batch_size is 0": lambda: meta_loader((INPUTS, TARGETS), batch_size=0),
    "data is a generator": lambda: meta_loader(pair for pair in [(INPUTS, 0)]),
    "targets are float64 of shape \\(0,\\)": lambda: meta_loader([]),
    "an item of the data is Tensor": lambda: class_counts(SimpleItems(INPUTS)),
    "an item of the data is keys \\['input'\\]": lambda: class_counts(SimpleItems([{"input": 1}])),
    "holds 24 samples and targets 5": lambda: meta_loader((INPUTS, TARGETS[:5]), per_class=1),
    "targets are float32 of shape": lambda: class_counts([(x, torch.tensor(0.5)) for x in INPUTS]),
    "targets are int64 of shape \\(24,\\)": lambda: meta_loader(Images(targets=TARGETS - 1)),
}


class SimpleItems(SimpleNamespace):
    def __init__(self, items):
        super().__init__(items=items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_labels_gets_one_sentence(message):
    with pytest.raises(ValueError, match=message) as error:
        REFUSED[message]()
    assert_one_sentence(error)


def test_arrays_and_lists_of_labels_are_labels():
    array = TARGETS.numpy()
    for labels in (TARGETS, array, TARGETS.tolist(), list(TARGETS), tuple(array)):
        assert class_counts(labels).tolist() == EXPECTED
    assert class_counts(np.array([2, 0, 2])).tolist() == [1, 0, 2]
