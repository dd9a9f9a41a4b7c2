"""The sets of the benchmark: where they come from, and how they are cut and augmented."""

import io
import pickle

import numpy as np
import pytest
import torch

from longtail.data import CropsAndFlips, FeatureDropout, Raw, Task, frequency_thirds, mislabel
from longtail.images import load_images
from longtail.meta_batches import MetaBatches
from longtail.protocol import Protocol, load_protocol
from longtail.snippets import LIBRARIES, load_snippets


def numbered(per_class=100, test_per_class=20, classes=4):
    """Samples whose every feature is their own number."""
    targets = torch.arange(classes).repeat(per_class)
    inputs = torch.arange(len(targets)).float().unsqueeze(1).expand(-1, 8).contiguous()
    test = torch.arange(classes).repeat(test_per_class)
    return Raw(inputs, targets, -1.0 - torch.arange(len(test)).unsqueeze(1).expand(-1, 8), test)


def small(**changes):
    settings = {
        "name": "test", "dataset": "none", "teacher": "mlp_large", "student": "mlp_small",
        "imbalance": 10, "head": 50, "meta_per_class": 5, "validation_per_class": 7,
        "test_per_class": 10, "views": 3, "batch_size": 20, "meta_batch_size": 8,
    }
    return Protocol(**{**settings, **changes})


@pytest.fixture
def task():
    return Task(numbered(), small(), torch.device("cpu"))


def images(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def write_batch(path, pixels, labels, key):
    path.parent.mkdir(exist_ok=True)
    data = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    path.write_bytes(pickle.dumps({b"data": data, key: labels}))


def test_cifar10_is_read_from_the_standard_folder(tmp_path):
    train, test = images(10), images(3, seed=1)
    for i in range(5):
        file = tmp_path / "cifar-10-batches-py" / f"data_batch_{i + 1}"
        write_batch(file, train[2 * i : 2 * i + 2], [i, 9 - i], b"labels")
    write_batch(tmp_path / "cifar-10-batches-py" / "test_batch", test, [4, 5, 6], b"labels")
    read = load_images("cifar10", tmp_path)
    np.testing.assert_array_equal(read.train, train)
    np.testing.assert_array_equal(read.test, test)
    assert read.train_labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert read.test_labels.tolist() == [4, 5, 6]


def test_cifar100_takes_the_fine_labels(tmp_path):
    for name in ("train", "test"):
        write_batch(tmp_path / "cifar-100-python" / name, images(2), [99, 3], b"fine_labels")
    assert load_images("cifar100", tmp_path).train_labels.tolist() == [99, 3]


def test_jpeg_files_are_decoded_in_order(tmp_path):
    from PIL import Image

    flat = [np.full((32, 32, 3), value, dtype=np.uint8) for value in (10, 200)]
    streams = []
    for pixels in flat:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        streams.append(np.frombuffer(buffer.getvalue(), dtype=np.uint8))
    offsets = np.cumsum([0, *map(len, streams)])
    arrays = {}
    for split in ("train", "test"):
        arrays |= {f"{split}_jpeg": np.concatenate(streams), f"{split}_offsets": offsets}
        arrays[f"{split}_labels"] = np.array([1, 0], dtype=np.uint8)
    np.savez(tmp_path / "images.npz", **arrays)
    read = load_images("cifar10", tmp_path / "images.npz")
    np.testing.assert_allclose(read.train, np.stack(flat), atol=2)
    assert read.test_labels.tolist() == [1, 0]


def test_a_folder_without_cifar_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py"):
        load_images("cifar10", tmp_path)


def test_snippets_know_all_libraries_and_share_no_sample():
    train, labels, test, test_labels = load_snippets(per_class=40)
    assert np.bincount(labels).tolist() == [30] * len(LIBRARIES)
    assert np.bincount(test_labels).tolist() == [10] * len(LIBRARIES)
    np.testing.assert_allclose((train**2).mean(1), 1, rtol=1e-5)
    again = load_snippets(per_class=40)
    np.testing.assert_array_equal(test, again[2])


def test_the_sets_are_balanced_long_tailed_and_disjoint(task):
    assert task.counts.tolist() == [50, 23, 10, 5]
    assert torch.bincount(task.targets[task.train]).tolist() == [50, 23, 10, 5]
    for split, size in ((task.meta_set, 5), (task.validation, 7), (task.test, 10)):
        assert torch.bincount(split.targets).tolist() == [size] * 4
    held = [task.meta_set.inputs, task.validation.inputs]
    pool = task.views._inputs[task.train]
    numbers = torch.cat([pool, *held])[:, 0]
    assert len(numbers.unique()) == len(numbers)


def test_the_meta_set_does_not_depend_on_the_imbalance(task):
    other = Task(numbered(), small(imbalance=2), torch.device("cpu"))
    assert torch.equal(task.meta_set.inputs, other.meta_set.inputs)
    assert task.digest != other.digest


def test_a_share_of_the_training_labels_alone_is_wrong(task):
    noisy = Task(numbered(), small(label_noise=0.9), torch.device("cpu"))
    wrong = noisy.targets != task.targets
    assert wrong[task.train].sum() == round(0.9 * len(task.train)) and not wrong[task.meta].any()
    torch.testing.assert_close(noisy.validation.targets, task.validation.targets)
    torch.testing.assert_close(noisy.test.targets, task.test.targets)
    # the student's user counts what the labels say; the thirds are those of the truth
    torch.testing.assert_close(noisy.counts, noisy.targets[task.train].bincount())
    assert noisy.groups == task.groups
    again = Task(numbered(), small(label_noise=0.9), torch.device("cpu"))
    torch.testing.assert_close(noisy.targets, again.targets)


def test_wrong_labels_are_spread_over_all_other_classes():
    targets = torch.zeros(3000, dtype=torch.long)
    targets[0] = 3
    share = mislabel(targets, 0.9, seed=0).bincount() / len(targets)
    torch.testing.assert_close(share, torch.tensor([0.1, 0.3, 0.3, 0.3]), atol=0.03, rtol=0)


def test_thirds_are_by_count_not_by_index():
    groups = frequency_thirds(torch.tensor([5, 50, 20, 10]))
    assert groups == {"many": [1], "medium": [2, 3], "few": [0]}
    sizes = [len(group) for group in frequency_thirds(torch.arange(10)).values()]
    assert sizes == [3, 4, 3]


def test_views_are_crops_of_the_padded_image_and_their_mirror_images():
    picture = torch.from_numpy(images(1)).float()
    views = CropsAndFlips(torch.from_numpy(images(1)), views=50, seed=0)
    padded = torch.zeros(40, 40, 3)
    padded[4:36, 4:36] = picture[0]
    crops = [padded[y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    possible = torch.stack([*crops, *(crop.flip(1) for crop in crops)])
    seen = set()
    sample = torch.zeros(1, dtype=torch.long)
    for view in torch.arange(50):
        made = views(sample, view)[0].permute(1, 2, 0)
        made = made * torch.tensor([0.2470, 0.2435, 0.2616]) * 255
        made = made + torch.tensor([0.4914, 0.4822, 0.4465]) * 255
        distance = (possible - made).abs().amax((1, 2, 3))
        assert distance.min() < 1e-2
        seen.add(distance.argmin().item())
    assert len(seen) > 20


def test_a_view_is_the_same_alone_and_in_a_batch():
    for views in (
        CropsAndFlips(torch.from_numpy(images(6)), 4, seed=0),
        FeatureDropout(torch.randn(6, 8), 4, seed=0),
    ):
        together = views(torch.tensor([3, 5]), torch.tensor([1, 2]))
        alone = torch.cat([views(torch.tensor([3]), torch.tensor(1)),
                           views(torch.tensor([5]), torch.tensor(2))])
        assert torch.equal(together, alone)


def test_meta_batches_are_balanced_and_know_their_logits(task):
    logits = torch.randn(3, len(task.targets), 4)
    batches = MetaBatches(task, task.meta, logits, views=3, batch_size=8, seed=0)
    inputs, targets = next(batches)
    assert torch.bincount(targets).tolist() == [2] * 4
    state = batches.state_dict()
    following = next(batches)
    known = batches.teacher(following[0])
    batches.load_state_dict(state)
    again = next(batches)
    assert torch.equal(again[0], following[0]) and torch.equal(batches.teacher(again[0]), known)
    assert any(torch.equal(known[0], logits[view, s]) for view in range(3) for s in task.meta)


def test_resampled_meta_batches_are_balanced_too(task):
    batches = MetaBatches(task, task.train, None, views=3, batch_size=40, seed=0)
    assert torch.bincount(next(batches)[1]).tolist() == [10] * 4


def test_protocols_on_file_load_and_differ_from_each_other():
    digests = {load_protocol(name).digest() for name in ("cpu", "paper", "paper-cifar100")}
    assert len(digests) == 3
    assert load_protocol("cpu").imbalance == 100


def test_a_digest_sees_settings_but_neither_plan_nor_name():
    protocol = small()
    assert protocol.digest() == protocol.replace(name="other", seeds=(5,)).digest()
    assert protocol.digest() != protocol.replace(lr=0.2).digest()
    assert protocol.digest("kd") != protocol.digest("ce")
