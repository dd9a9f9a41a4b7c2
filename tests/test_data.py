"""Long-tailed profiles, balanced splits and balanced batches."""

import io
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from kd_balance.data import BalancedBatches, class_counts, long_tail_indices, split_balanced
from tests.devices import CUDA, STANDIN

TARGETS = torch.arange(4).repeat_interleave(torch.tensor([9, 5, 7, 3]))
INPUTS = torch.arange(len(TARGETS)).float().unsqueeze(1)


class Column(Sequence):
    """Read from somewhere else, one number at a time, as a column of a table on disk."""

    def __init__(self, values):
        self.values = [int(value) for value in values]

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]


def batches(batch_size=6, seed=0):
    return BalancedBatches(INPUTS, TARGETS, batch_size, seed)


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray, list, torch.Tensor.byte, Column])
def test_targets_may_be_any_kind_of_sequence(kind):
    targets = kind(TARGETS)
    assert class_counts(targets).tolist() == [9, 5, 7, 3]
    assert class_counts(targets, num_classes=6).tolist() == [9, 5, 7, 3, 0, 0]
    assert class_counts(TARGETS[split_balanced(targets, 3, seed=0)[0]]).tolist() == [3] * 4


def test_long_tail_is_the_exponential_profile_of_cifar_lt():
    targets = torch.arange(10).repeat(500)
    chosen = long_tail_indices(targets, 100, seed=0)
    # int(500 * 0.01 ** (c / 9)), as the usual CIFAR-LT code has it
    assert class_counts(targets[chosen]).tolist() == [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]
    assert len(chosen.unique()) == len(chosen)


def test_long_tail_takes_the_largest_head_that_every_class_can_follow():
    chosen = long_tail_indices(TARGETS, 3, seed=0)
    # head 7: class 1 would need 4.85 of its 5 samples; with a head of 8 it would need 5.5
    assert class_counts(TARGETS[chosen]).tolist() == [7, 4, 3, 2]
    chosen = long_tail_indices(TARGETS, 3, seed=0, head_count=6)
    assert class_counts(TARGETS[chosen]).tolist() == [6, 4, 2, 2]


@pytest.mark.parametrize(
    "choose",
    [
        lambda targets, seed: long_tail_indices(targets, 10, seed),
        lambda targets, seed: split_balanced(targets, 5, seed)[0],
    ],
)
def test_the_seed_alone_decides_the_choice(choose):
    targets = torch.arange(3).repeat(50)
    before = torch.get_rng_state()
    first = choose(targets, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, choose(targets, 3))
    assert not torch.equal(first, choose(targets, 4))


def test_split_holds_out_as_many_of_each_class_and_loses_nothing():
    meta, rest = split_balanced(TARGETS, per_class=3, seed=0)
    assert class_counts(TARGETS[meta]).tolist() == [3, 3, 3, 3]
    assert torch.cat((meta, rest)).sort().values.tolist() == list(range(len(TARGETS)))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 6, 11])
def test_batches_are_as_even_as_their_size_allows_and_even_over_time(batch_size):
    loader = batches(batch_size)
    total = torch.zeros(4, dtype=torch.long)
    for _ in range(20):
        inputs, targets = next(loader)
        assert torch.equal(TARGETS[inputs.squeeze(1).long()], targets)
        counts = class_counts(targets, num_classes=4)
        assert counts.sum() == batch_size and counts.max() - counts.min() <= 1
        total += counts
        assert total.max() - total.min() <= 1


def test_each_class_is_walked_through_before_a_sample_comes_again():
    loader = batches(batch_size=4)
    drawn = torch.cat([next(loader)[0].squeeze(1) for _ in range(45)]).long()
    for c, size in enumerate([9, 5, 7, 3]):
        own = drawn[TARGETS[drawn] == c]
        walks = own[: len(own) // size * size].view(-1, size)
        assert (walks.sort(dim=1).values == (TARGETS == c).nonzero().squeeze(1)).all()
        assert not (walks == walks[0]).all()


def test_a_resumed_loader_draws_the_very_same_batches():
    loader = batches()
    for _ in range(7):
        next(loader)
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    expected = [next(loader) for _ in range(9)]
    file.seek(0)
    resumed = batches(seed=99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for inputs, targets in expected:
        again = next(resumed)
        assert torch.equal(inputs, again[0]) and torch.equal(targets, again[1])


def test_a_saved_state_does_not_move_on_with_the_loader():
    loader = batches()
    state = loader.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    next(loader)
    loader.load_state_dict(state)
    next(loader)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_batches_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    loader = batches()
    assert iter(loader) is loader
    next(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_mapping_yields_a_mapping_with_labels():
    inputs = {"input_ids": INPUTS.long(), "attention_mask": torch.ones(len(TARGETS), 3)}
    batch = next(BalancedBatches(inputs, TARGETS, batch_size=8, seed=0))
    assert batch["attention_mask"].shape == (8, 3)
    assert torch.equal(TARGETS[batch["input_ids"].squeeze(1)], batch["labels"])


def test_classes_may_be_missing_from_the_samples_of_a_loader():
    _, targets = next(BalancedBatches(torch.rand(4, 2), [5, 5, 2, 2], batch_size=4, seed=0))
    assert targets.sort().values.tolist() == [2, 2, 5, 5]


@pytest.mark.parametrize("device", [CUDA, STANDIN])
def test_batches_on_a_device_are_those_on_the_cpu(device):
    there = BalancedBatches(INPUTS.to(device), TARGETS, batch_size=6, seed=0)
    for (inputs, targets), (again, labels), _ in zip(batches(), there, range(5)):
        assert again.device.type == labels.device.type == device
        assert torch.equal(inputs, again.cpu()) and torch.equal(targets, labels.cpu())


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: class_counts([]), "targets are float64 of shape"),
        (lambda: class_counts([[1, 2]]), "expected class indices"),
        (lambda: class_counts([0.5]), "take the argmax"),
        (lambda: class_counts([0, -100]), "integers from 0 on"),
        (lambda: class_counts([0, 3], num_classes=3), "targets hold class 3"),
        (lambda: long_tail_indices(TARGETS, 0.01, seed=0), "write 100 rather than 0.01"),
        (lambda: long_tail_indices([0, 2], 2, seed=0), "no sample of class 1"),
        (lambda: long_tail_indices(TARGETS, 3, seed=0, head_count=8), "expected 1 to 7"),
        (lambda: long_tail_indices([0, 1], 2, seed=0), "lower imbalance_factor to 1"),
        (lambda: split_balanced(TARGETS, 4, seed=0), "per_class is 4, expected 1 to 3: class 3"),
        (lambda: split_balanced(TARGETS, 0, seed=0), "per_class is 0"),
        (lambda: batches(batch_size=0), "batch_size is 0"),
        (lambda: BalancedBatches(INPUTS[:5], TARGETS, 4, 0), "holds 5 samples and targets 24"),
        (lambda: BalancedBatches(INPUTS.tolist(), TARGETS, 4, 0), "inputs is a list"),
        (lambda: BalancedBatches({"labels": INPUTS}, TARGETS, 4, 0), "none called 'labels'"),
        (
            lambda: batches().load_state_dict(
                BalancedBatches(INPUTS, TARGETS.flip(0), 4, 0).state_dict()
            ),
            "make this loader from the same samples",
        ),
    ],
)
def test_a_bad_argument_gets_one_sentence(call, sentence):
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert sentence in message
    assert message.endswith(".") and ". " not in message
