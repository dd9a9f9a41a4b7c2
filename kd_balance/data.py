"""Long-tailed profiles, balanced splits and balanced batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from kd_balance.replay import preserved_random_state

Labels = Tensor | np.ndarray | Sequence[int]
"""Class indices of N samples, 0 … C − 1."""

Labelled = (
    Dataset[Any] | DataLoader[Any] | Sequence[Any] | tuple[Tensor | Mapping[str, Tensor], Labels]
)
"""Samples with labels: a map-style dataset of (input, label, …) or of mappings with the key
``label`` or ``labels``, a DataLoader over one, or the pair (inputs, labels) of tensors."""


def class_counts(targets: Labels | Labelled, num_classes: int | None = None) -> Tensor:
    """How many samples each class has.

    Args:
        targets: class indices [N]: a tensor on any device, an array, a list or any other sequence
            of whole numbers, such as a column of a table; or the training set that they are the
            labels of, as for :func:`meta_loader`. Of a DataLoader it is the dataset that counts,
            whatever its sampler does.
        num_classes: C, where classes at the end may have no sample; by default the largest
            index + 1.

    Returns:
        LongTensor [C], on the CPU.

    Raises:
        ValueError: targets that are not class indices, or not below `num_classes`.

    Example::

        >>> class_counts([0, 2, 2], num_classes=4)
        tensor([1, 0, 2, 0])
    """
    labels = _labels_of(targets)
    if num_classes is not None and labels.max() >= num_classes:
        raise ValueError(
            f"targets hold class {labels.max()}, expected indices below num_classes="
            f"{num_classes}: raise num_classes or relabel."
        )
    return torch.bincount(labels, minlength=num_classes or 0)


def long_tail_indices(
    targets: Labels, imbalance_factor: float, seed: int, head_count: int | None = None
) -> Tensor:
    """Choose samples so that the class sizes fall off exponentially.

    Class c of C keeps ``head_count * imbalance_factor ** (-c / (C - 1))`` samples, rounded down:
    class 0 is the head and class C − 1 the tail, as in CIFAR-LT.

    Args:
        targets: class indices [N]: a tensor, a numpy array or a list; every class 0 … C − 1 has
            to occur.
        imbalance_factor: size of the head over size of the tail, at least 1.
        seed: decides which samples of a class stay.
        head_count: samples of class 0; by default as many as let every class keep its share.

    Returns:
        LongTensor of indices into `targets`, ascending, on the CPU.

    Raises:
        ValueError: a factor below 1, a profile that asks a class for more samples than it has or
            for none, or a class without samples.

    Example::

        >>> targets = torch.arange(3).repeat_interleave(100)
        >>> class_counts(targets[long_tail_indices(targets, imbalance_factor=50, seed=0)])
        tensor([100,  14,   2])

    Source: the exponential profile of Cao et al., "Learning Imbalanced Datasets with
    Label-Distribution-Aware Margin Loss", 2019.
    """
    if not imbalance_factor >= 1:
        raise ValueError(
            f"imbalance_factor is {imbalance_factor}, expected the head's size over the tail's, at "
            "least 1: write 100 rather than 0.01."
        )
    members = _members(targets)
    available = np.array([len(member) for member in members])
    share = float(imbalance_factor) ** -np.linspace(0, 1, len(members))
    # The small term keeps a product like 500 * 0.01 from being rounded down to 4.
    largest = int((available / share + 1e-9).min())
    head = largest if head_count is None else head_count
    if not 1 <= head <= largest:
        raise ValueError(
            f"head_count is {head_count}, expected 1 to {largest}: with imbalance_factor="
            f"{imbalance_factor} a larger head asks some class for more samples than it has."
        )
    keep = (head * share + 1e-9).astype(int)
    if keep[-1] < 1:
        raise ValueError(
            f"imbalance_factor={imbalance_factor} leaves class {len(members) - 1} nothing of a "
            f"head of {head} samples, expected at least one: lower imbalance_factor to {head}."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = [
        member[torch.randperm(len(member), generator=generator)[:count]]
        for member, count in zip(members, keep)
    ]
    return torch.cat(chosen).sort().values


def split_balanced(targets: Labels, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out a class-balanced set, the one that the meta loss is taken on.

    Args:
        targets: class indices [N]: a tensor, a numpy array or a list; every class 0 … C − 1 has
            to occur.
        per_class: samples of each class to hold out.
        seed: decides which.

    Returns:
        (meta_indices [C · per_class], rest_indices): LongTensors of indices into `targets`, each
        ascending, on the CPU; together every index once.

    Raises:
        ValueError: a class with fewer than `per_class` samples.

    Example::

        >>> meta, rest = split_balanced([0, 1, 0, 1, 0], per_class=1, seed=0)
        >>> len(meta), len(rest)
        (2, 3)
    """
    members = _members(targets)
    smallest = min(range(len(members)), key=lambda c: len(members[c]))
    if not 1 <= per_class <= len(members[smallest]):
        raise ValueError(
            f"per_class is {per_class}, expected 1 to {len(members[smallest])}: class {smallest} "
            "has no more samples."
        )
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(sum(len(member) for member in members), dtype=torch.bool)
    for member in members:
        held_out[member[torch.randperm(len(member), generator=generator)[:per_class]]] = True
    return held_out.nonzero().squeeze(1), (~held_out).nonzero().squeeze(1)


def meta_loader(
    data: Labelled,
    per_class: int = 20,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> MetaLoader:
    """Class-balanced meta batches out of a training set, or out of a validation set.

    The samples stay where they are: those of a training set are trained on as well, which serves
    the student better than to do without them. ``Subset(data, loader.rest)`` is the set without
    them. A teacher should not have seen them: take them from data that it was not trained on,
    where there are some.

    Args:
        data: a map-style dataset, whose items are read as they are used, a DataLoader over one,
            or the pair (inputs, labels) of tensors. The labels of a dataset are its ``targets`` or
            ``labels``, and where it has neither every item is read once to find them.
        per_class: samples of each class to choose; 5 were too few to gain by, 10 enough. Of a
            class with fewer all are taken, and drawn the more often.
        batch_size: samples in a batch, with the classes as even as it allows; default 100, or all
            of the meta set if that is less.
        seed: decides which samples, and in which order.
        collate_fn: makes a batch of a list of items, as for a DataLoader; default that of `data`.

    Returns:
        An endless iterator of batches, with ``indices`` and ``rest`` as for :class:`MetaLoader`.

    Raises:
        ValueError: data without labels, or a number below 1.

    Example::

        optimizer = BilevelOptimizer(
            optimizer, student, criterion, meta_loader(train_set), teacher=teacher
        )
    """
    if isinstance(data, DataLoader):
        collate_fn, data = collate_fn or data.collate_fn, data.dataset
    for name, value in (("per_class", per_class), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1.")
    labels = _labels_of(data)
    members = [(c, member) for c, member in enumerate(_by_class(labels)) if len(member)]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for _, member in members:
        chosen[member[torch.randperm(len(member), generator=generator)[:per_class]]] = True
    if few := [(len(member), c) for c, member in members if len(member) < per_class]:
        warnings.warn(
            f"{len(few)} of {len(members)} classes have fewer than the {per_class} samples asked "
            f"for, class {min(few)[1]} {min(few)[0]}: theirs are repeated in the meta batches.",
            stacklevel=2,
        )
    fetch = _InMemory(data[0], data[1]) if _is_pair(data) else _Items(data, collate_fn)
    indices, rest = chosen.nonzero().squeeze(1), (~chosen).nonzero().squeeze(1)
    size = batch_size or min(100, per_class * len(members))
    return MetaLoader(fetch, _BalancedOrder(labels[indices], size, seed), indices, rest)


class MetaLoader:
    """The endless iterator that :func:`meta_loader` makes.

    Attributes:
        indices: LongTensor of the meta samples' places in the data, ascending, on the CPU.
        rest: LongTensor of all others.
    """

    def __init__(
        self, fetch: Callable[[Tensor], Any], order: _BalancedOrder, indices: Tensor, rest: Tensor
    ) -> None:
        self.indices = indices
        self.rest = rest
        self._fetch = fetch
        self._order = order

    def __iter__(self) -> MetaLoader:
        return self

    def __next__(self) -> Any:
        return self._fetch(self.indices[self._order.next()])

    def state_dict(self) -> dict[str, Any]:
        """The position, as CPU tensors: a loader that loads it draws the very same samples."""
        return self._order.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another loader of the same data, `per_class` and `seed` stood."""
        self._order.load_state_dict(state)


class BalancedBatches:
    """An endless iterator of class-balanced batches from tensors held in memory.

    Every batch holds the classes as evenly as its size allows; where the size is no multiple of
    the number of classes, the classes take turns at the places left over. The samples of a class
    are drawn in a random order, without repetition until all were used.

    Args:
        inputs: [N, …], or a mapping of such tensors by keyword, on any device.
        targets: class indices [N]: a tensor, a numpy array or a list; they are brought to the
            device of the inputs.
        batch_size: samples in a batch, at least 1.
        seed: of the iterator's own generator; the global random state is never used.

    Yields:
        (inputs [batch_size, …], targets [batch_size]), or for a mapping a dict of its tensors
        with the targets under the key ``labels``.

    Raises:
        ValueError: inputs and targets of different lengths, or a batch size below 1.

    Example::

        >>> batches = BalancedBatches(torch.rand(5, 8), [0, 0, 0, 1, 1], batch_size=4, seed=0)
        >>> inputs, targets = next(batches)
        >>> inputs.shape, class_counts(targets)
        (torch.Size([4, 8]), tensor([2, 2]))
    """

    def __init__(
        self,
        inputs: Tensor | Mapping[str, Tensor],
        targets: Labels,
        batch_size: int,
        seed: int,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1.")
        self._fetch = _InMemory(inputs, targets)
        self._order = _BalancedOrder(_labels(targets), batch_size, seed)

    def __iter__(self) -> BalancedBatches:
        return self

    def __next__(self) -> Any:
        return self._fetch(self._order.next())

    def state_dict(self) -> dict[str, Any]:
        """The position, as CPU tensors: a loader that loads it draws the very same batches."""
        return self._order.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another instance over the same samples stood.

        Args:
            state: what its :meth:`state_dict` returned.

        Raises:
            ValueError: a state taken over other samples.
        """
        self._order.load_state_dict(state)


class _InMemory:
    """Batches of tensors by index."""

    def __init__(self, inputs: Tensor | Mapping[str, Tensor], targets: Labels) -> None:
        labels = _labels(targets)
        named = dict(inputs) if isinstance(inputs, Mapping) else {"inputs": inputs}
        if not named or "labels" in named:
            raise ValueError(
                f"inputs has the keys {list(named)}, expected at least one and none called "
                "'labels': pass the labels as targets."
            )
        for name, tensor in named.items():
            if not isinstance(tensor, Tensor):
                raise ValueError(
                    f"{name} is a {type(tensor).__name__}, expected a tensor [N, …] or a mapping "
                    "of tensors: convert it with torch.as_tensor."
                )
            if len(tensor) != len(labels):
                raise ValueError(
                    f"{name} holds {len(tensor)} samples and targets {len(labels)}, expected as "
                    "many: pass one label for each sample."
                )
        self._is_mapping = isinstance(inputs, Mapping)
        self._device = next(iter(named.values())).device
        self._tensors = {**named, "labels": labels.to(self._device)}

    def __call__(self, index: Tensor) -> Any:
        if self._device.type == "cuda":
            index = index.pin_memory()  # so that the copy does not wait for the GPU
        index = index.to(self._device, non_blocking=True)
        batch = {name: tensor[index] for name, tensor in self._tensors.items()}
        return batch if self._is_mapping else (batch["inputs"], batch["labels"])


class _Items:
    """Batches of a dataset's items by index."""

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any] | None) -> None:
        self._dataset = dataset
        self._collate = collate_fn or default_collate

    def __call__(self, index: Tensor) -> Any:
        batch = self._collate([self._dataset[i] for i in index.tolist()])
        if isinstance(batch, Mapping) and "label" in batch:  # as students name it
            batch = {"labels" if key == "label" else key: part for key, part in batch.items()}
        return batch


class _BalancedOrder:
    """Which samples the batches hold, by their places in `labels`."""

    def __init__(self, labels: Tensor, batch_size: int, seed: int) -> None:
        self._labels = labels
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        # Of each class that occurs: its samples in the order they are drawn, how many of these
        # are used up, and how often it had one of the places left over.
        self._order = [member for member in _by_class(labels) if len(member)]
        self._used = [len(order) for order in self._order]
        self._extras = torch.zeros(len(self._order), dtype=torch.long)

    def next(self) -> Tensor:
        counts = self._next_counts()
        drawn = torch.cat([self._draw(c, count) for c, count in enumerate(counts.tolist())])
        return drawn[self._permutation(len(drawn))]

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self._generator.get_state(),
            "order": torch.cat(self._order),
            "used": torch.tensor(self._used),
            "extras": self._extras.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        order = state["order"].cpu()
        if len(order) != len(self._labels) or not torch.equal(
            self._labels[order], self._labels[torch.cat(self._order)]
        ):
            raise ValueError(
                f"The state was saved over {len(order)} other samples, expected these "
                f"{len(self._labels)}: make this loader from the same samples as that one."
            )
        self._generator.set_state(state["generator"].cpu())
        self._order = list(order.split([len(own) for own in self._order]))
        self._used = state["used"].tolist()
        self._extras = state["extras"].cpu().clone()

    def _permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self._generator)

    def _next_counts(self) -> Tensor:
        """How many samples of each class the next batch holds."""
        classes = len(self._order)
        even, left_over = divmod(self._batch_size, classes)
        # Those that had the fewest places so far come first, in random order among themselves.
        shuffled = self._permutation(classes)
        turn = shuffled[self._extras[shuffled].argsort(stable=True)][:left_over]
        self._extras[turn] += 1
        counts = torch.full((classes,), even)
        counts[turn] += 1
        return counts

    def _draw(self, c: int, count: int) -> Tensor:
        """The next `count` samples of the class at place c."""
        parts = [torch.empty(0, dtype=torch.long)]
        while count > 0:
            if self._used[c] == len(self._order[c]):
                self._order[c] = self._order[c][self._permutation(len(self._order[c]))]
                self._used[c] = 0
            part = self._order[c][self._used[c]:self._used[c] + count]
            self._used[c] += len(part)
            count -= len(part)
            parts.append(part)
        return torch.cat(parts)


def _labels_of(data: Any) -> Tensor:
    """The class indices of samples, or of labels given as such."""
    data = data.dataset if isinstance(data, DataLoader) else data
    if not _are_labels(data):
        found = _listed_labels(data)
        data = _read_labels(data) if found is None else found
    return _labels(data)


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], (Tensor, Mapping))


def _are_labels(data: Any) -> bool:
    if isinstance(data, (list, tuple, range)):
        return not len(data) or not isinstance(data[0], (tuple, Mapping)) and not _is_pair(data)
    if isinstance(data, Sequence):  # a column, say
        first = data[0] if len(data) else None
        return isinstance(first, Integral) or getattr(first, "ndim", None) == 0
    return hasattr(data, "__array__")  # tensors, arrays, series


def _listed_labels(data: Any) -> Any:
    """The labels that samples carry as a whole; None if they have to be read one by one."""
    if _is_pair(data):
        return data[1]
    if isinstance(data, Subset):
        labels = _listed_labels(data.dataset)
        return None if labels is None else np.asarray(labels)[np.asarray(data.indices)]
    if isinstance(data, TensorDataset):
        return data.tensors[1].cpu()
    for name in ("targets", "labels"):
        labels = getattr(data, name, None)
        if labels is not None and len(labels) == len(data):
            labels = labels.cpu() if isinstance(labels, Tensor) else labels
            transform = getattr(data, "target_transform", None)
            return labels if transform is None else [transform(label) for label in labels]
    return None


def _read_labels(data: Any) -> list[Any]:
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise ValueError(
            f"data is a {type(data).__name__}, expected a map-style dataset or the pair (inputs, "
            "labels) of tensors: collect the samples in a list."
        )
    with preserved_random_state(torch.device("cpu")):  # of random transforms
        return [_label_of(data[i]) for i in range(len(data))]


def _label_of(item: Any) -> Any:
    if isinstance(item, Mapping) and ("labels" in item or "label" in item):
        return item["labels"] if "labels" in item else item["label"]
    if isinstance(item, (tuple, list)) and len(item) >= 2:
        return item[1]
    held = f"keys {list(item)}" if isinstance(item, Mapping) else type(item).__name__
    raise ValueError(
        f"an item of the data is {held}, expected (input, label) or a mapping with the key "
        "'label': pass a dataset of such items."
    )


def _labels(targets: Labels) -> Tensor:
    """Class indices as a LongTensor [N] of its own, on the CPU."""
    if isinstance(targets, Tensor):
        targets = targets.detach().cpu()
    elif isinstance(targets, Sequence):
        targets = targets[:]  # of a column on disk, in one reading
    array = np.asarray(targets)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iub" or array.min() < 0:
        raise ValueError(
            f"targets are {array.dtype} of shape {array.shape}, expected class indices [N], "
            "integers from 0 on: flatten them, take the argmax of probabilities, and leave out "
            "samples without a label."
        )
    return torch.from_numpy(array.astype(np.int64))


def _by_class(labels: Tensor) -> list[Tensor]:
    """The samples of each class 0 … C − 1, ascending."""
    return list(labels.argsort(stable=True).split(torch.bincount(labels).tolist()))


def _members(targets: Labels) -> list[Tensor]:
    """The samples of each class 0 … C − 1, none of them empty."""
    members = _by_class(_labels(targets))
    for c, member in enumerate(members):
        if len(member) == 0:
            raise ValueError(
                f"targets hold no sample of class {c}, expected every class from 0 to "
                f"{len(members) - 1}: relabel the classes without gaps."
            )
    return members
