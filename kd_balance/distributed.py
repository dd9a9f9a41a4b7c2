"""Several processes that train one student, each on its own share of the data.

Student and weight net of all of them are those of one process whose loss is the mean of the ranks'
losses and whose meta loss is the mean of the ranks' meta losses. DistributedDataParallel averages
the gradients. What else depends on a rank's own data is averaged here: the gradient of the meta
loss, its products with the Hessian at further steps, and the hypergradient. The rest follows from
parameters, gradients and states, which are the same everywhere.

No rank waits for one that has failed: before every exchange they tell each other whether they have
come so far, and an error on one of them becomes an error on all at the same place.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kd_balance.invariants import Broken
from kd_balance.torch_private import (
    calling_wrapper,
    communication_hook,
    compiled_from,
    fsdp_policies,
    is_fully_sharded,
    is_joined,
    timeout_of,
)

_BUCKET = 2**23  # numbers that are exchanged at once
_NONE = (True,) * 4  # as many flags as are ever told: a rank that fails knows not what is asked


class FailedElsewhere(RuntimeError):
    """What went wrong on another rank, if it is no refusal."""


class Ranks:
    """The processes that train a student. One by itself is the only rank, and exchanges nothing.

    Args:
        student: as it was given to the wrapper; those of its DistributedDataParallel, or those
            that hold its shards, are meant, or else all.
    """

    def __init__(self, student: nn.Module) -> None:
        self.rank, self.size = 0, 1
        self._group: Any = None
        self._agreements: Any = None
        self._all_know = False  # of an error, told in the last exchange
        self._sharded = False
        if not _is_distributed():
            return
        wrapper, mesh = _wrapper_of(student), mesh_of(student)
        self._sharded = mesh is not None
        self._group = dist.group.WORLD if wrapper is None else wrapper.process_group
        if mesh is not None and mesh.ndim == 1:
            self._group = mesh.get_group()
        self.rank, self.size = dist.get_rank(self._group), dist.get_world_size(self._group)
        if self.size > 1:  # on the CPU, where asking waits for no device, and in no other's way
            self._agreements = dist.new_group(
                dist.get_process_group_ranks(self._group),
                timeout=timeout_of(self._group),
                backend="gloo",
                use_local_synchronization=True,
            )

    def check_call(self, student: nn.Module, trained: Mapping[Tensor, str]) -> None:
        """Looks at how the student is being called.

        Args:
            student: as it was given to the wrapper.
            trained: the names of its parameters.

        Raises:
            ValueError: it is not whole, or its gradients will not be the mean of the ranks' own.
        """
        check_shards(student, trained)
        if self._sharded:
            return
        if is_fully_sharded(called_module(student)):
            raise ValueError(
                "the student was sharded after BilevelOptimizer was made, expected before: call "
                "fully_shard, make the student's optimizer, and wrap that."
            )
        inside = calling_wrapper()
        wrapper = inside or _wrapper_of(called_module(student))
        if wrapper is None:
            processes = dist.get_world_size() if _is_distributed() else 1
        else:
            processes = dist.get_world_size(wrapper.process_group)
        if processes != self.size:
            raise ValueError(
                f"the student runs in {processes} processes and BilevelOptimizer was made when it "
                f"ran in {self.size}, expected as many: call torch.distributed.init_process_group "
                "before it, and give it the module that DistributedDataParallel returned."
            )
        if self.size == 1:
            return
        if wrapper is None:
            raise ValueError(
                f"the student was called by itself in {self.size} processes, expected through "
                "DistributedDataParallel, which averages its gradients: call the module that it "
                "returned."
            )
        _check_wrapper(wrapper, trained)

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The means over the ranks of tensors that have the same shapes on all."""
        if self.size == 1:
            return list(tensors)
        self.agree()
        means: dict[int, Tensor] = {}
        for bucket in _buckets(tensors, [tensor.numel() for tensor in tensors]):
            flat = torch.cat([tensors[i].detach().reshape(-1) for i in bucket]).div_(self.size)
            dist.all_reduce(flat, group=self._group_for(flat))
            pieces = flat.split([tensors[i].numel() for i in bucket])
            means.update((i, p.view(tensors[i].shape)) for i, p in zip(bucket, pieces))
        return [means[i] for i in range(len(tensors))]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks of a tensor that has the same shape on all."""
        total = tensor.detach().clone()
        if self.size > 1:
            self.agree()
            dist.all_reduce(total, group=self._group_for(total))
        return total

    def mean_by_name(
        self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The same by name.

        Args:
            tensors: those that a rank has none of are zero there.
            like: the names and shapes of all, the same on every rank.
        """
        if self.size == 1:
            return dict(tensors)
        names = sorted(like)  # ranks may hold them in different orders
        whole = [tensors[n] if n in tensors else torch.zeros_like(like[n]) for n in names]
        return dict(zip(names, self.mean(whole)))

    def gather(
        self, tensors: Sequence[Tensor], lengths: Sequence[Sequence[int]]
    ) -> list[list[Tensor]]:
        """The tensors of all ranks, flat.

        Args:
            tensors: of different sizes on different ranks.
            lengths: how many numbers each of them has on each rank.
        """
        if self.size == 1:
            return [[tensor.reshape(-1)] for tensor in tensors]
        self.agree()
        found: dict[int, list[Tensor]] = {}
        for bucket in _buckets(tensors, list(map(sum, lengths))):
            by_rank = list(zip(*(lengths[i] for i in bucket)))
            longest = max(map(sum, by_rank))
            flat = torch.cat([tensors[i].detach().reshape(-1) for i in bucket])
            flat = torch.nn.functional.pad(flat, (0, longest - len(flat)))
            rows = [torch.empty_like(flat) for _ in range(self.size)]
            dist.all_gather(rows, flat, group=self._group_for(flat))
            pieces = [row[: sum(n)].split(n) for row, n in zip(rows, by_rank)]
            found.update((i, list(of_all)) for i, of_all in zip(bucket, zip(*pieces)))
        return [found[i] for i in range(len(tensors))]

    def give_out(self, tensors: Sequence[Tensor]) -> None:
        """Puts rank 0's values into the tensors of all."""
        if self.size == 1:
            return
        self.agree()
        source = dist.get_global_rank(self._group, 0)
        for tensor in tensors:
            dist.broadcast(tensor.detach(), source, group=self._group_for(tensor))

    def collect(self, value: Any) -> list[Any]:
        """The values of all ranks, any that can be pickled."""
        if self.size == 1:
            return [value]
        self.agree()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._agreements)
        return values

    def check_same(self, **settings: Any) -> None:
        """Refuses settings that differ.

        Raises:
            ValueError: on all ranks.
        """
        for rank, others in enumerate(self.collect(settings)):
            for name, value in settings.items():
                if others[name] != value:
                    raise ValueError(
                        f"{name} is {value!r} on rank {self.rank} and {others[name]!r} on rank "
                        f"{rank}, expected the same on all ranks."
                    )

    def all(self, holds: bool) -> bool:
        """Whether something holds on every rank."""
        return self._ask(None, (holds, *_NONE[1:]))[0]

    def begin_step(self, one: bool, other: bool) -> list[bool]:
        """Whether two flags are set on all ranks, which take the same step.

        Raises:
            ValueError: another rank gave the step up.
        """
        if self.size == 1:
            return [one, other]
        *answers, all_begin, _ = self._ask(None, (one, other, True, False))
        if not all_begin:
            raise self._parted()
        return answers

    def give_up_step(self) -> None:
        """The gradients of a step are dropped, on all ranks.

        Raises:
            ValueError: another rank takes the step.
        """
        if self.size == 1:
            return
        *_, all_give_up = self._ask(None, (True, True, False, True))
        if not all_give_up:
            raise self._parted()

    def _group_for(self, tensor: Tensor) -> Any:
        """NCCL takes no tensors on the CPU, where a student may be until accelerate moves it."""
        return self._agreements if tensor.device.type == "cpu" else self._group

    def _parted(self) -> ValueError:
        self._all_know = True
        return ValueError(
            "one rank dropped the gradients of a step that another one took, expected the same "
            "steps on all ranks: skip a step on all of them or on none."
        )

    def agree(self) -> None:
        """Waits for the other ranks to come to an exchange.

        Raises:
            ValueError, FailedElsewhere: what went wrong on one of them.
        """
        self._ask(None, ())

    @contextmanager
    def together(self) -> Iterator[None]:
        """What goes wrong on one rank within it goes wrong on all."""
        self._all_know = False
        try:
            yield
        except BaseException as error:
            if not self._all_know:  # the others have left what they were within
                with suppress(RuntimeError):  # or are gone, which is not what went wrong
                    self._ask(error, ())
            raise
        self.agree()

    def _ask(self, error: BaseException | None, flags: Sequence[bool]) -> list[bool]:
        if self.size == 1:
            return list(flags)
        holds = torch.tensor([error is None, *(flags or _NONE)], dtype=torch.uint8)
        all_well, *answers = self._least(holds).bool().tolist()
        self._all_know = not all_well
        if not all_well:
            told: list[Any] = [None] * self.size
            dist.all_gather_object(told, _telling(error), group=self._agreements)
            if error is None:
                raise next(_error_of(rank, *t) for rank, t in enumerate(told) if t is not None)
        return answers

    def _least(self, values: Tensor) -> Tensor:
        """The minimum over the ranks, in as many rounds as it takes to double one to all.

        gloo's own passes twice round a ring of them.
        """
        distance = 1
        while distance < self.size:
            to, of = ((self.rank + step) % self.size for step in (distance, -distance))
            others = torch.empty_like(values)
            sending = self._agreements.send([values], to, 0)
            self._agreements.recv([others], of, 0).wait()
            sending.wait()
            values = torch.minimum(values, others)
            distance *= 2
        return values


def called_module(student: nn.Module) -> nn.Module:
    """What sees the arguments and buffers of a call after DistributedDataParallel's own part."""
    while isinstance(student, DistributedDataParallel):
        student = student.module
    return student


def through_sink(node: Any, number: int) -> tuple[Any, int]:
    """Where a tensor came from, DistributedDataParallel having passed it through a node or not."""
    while node is not None and node.name() == "_DDPSinkBackward":
        needs = node.needs_input_grad[1:]  # the first is no output of the student
        edges = [edge for edge in node.next_functions if edge[0] is not None]
        node, number = edges[sum(needs[:number])]
    return node, number


def is_shard(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this process holds a part."""
    return hasattr(tensor, "device_mesh")


def mesh_of(student: nn.Module) -> Any:
    """The processes that hold a part of its parameters; None where each holds all of them."""
    params: Any = student.parameters()
    return next((p.device_mesh for p in params if is_shard(p)), None)


def check_shards(student: nn.Module, trained: Container[Tensor] | None = None) -> None:
    """Looks whether this process holds all of the student, or the shards that fully_shard made.

    Args:
        student: as it was given to the wrapper.
        trained: its parameters; None for all.

    Raises:
        ValueError: its parameters are spread over the processes in another way.
    """
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in student.modules()):
        raise ValueError(
            "the student's parameters are flat shards, as of FullyShardedDataParallel, expected "
            "shards of each: use torch.distributed.fsdp.fully_shard, or DistributedDataParallel."
        )
    mesh = mesh_of(student)
    if mesh is None:
        return
    params: Any = dict(student.named_parameters())
    split: Any = {name: getattr(p, "placements", None) for name, p in params.items()}
    if mesh.ndim > 1 or not is_fully_sharded(called_module(student)):
        raise ValueError(
            f"the student's parameters are DTensors over {mesh.ndim} mesh dimensions of a "
            f"{type(student).__name__}, as of tensor, pipeline or hybrid parallelism, expected "
            "those of fully_shard over one: call fully_shard(student), or train it in "
            "DistributedDataParallel."
        )
    for name, param in params.items():
        if param.requires_grad and not is_shard(param) and (trained is None or param in trained):
            raise ValueError(
                f"fully_shard leaves out {name}, whose gradients are then not the same on all "
                "ranks, expected all parameters that are trained."
            )
        if is_shard(param) and not (param.device_mesh == mesh and split[name][0].is_shard()):
            raise ValueError(
                f"{name} is a DTensor of {split[name][0]} over {param.device_mesh}, expected "
                f"shards over {mesh} like the first parameter's: shard all over one mesh."
            )
    for module in student.modules():
        if is_fully_sharded(module):
            _check_fully_sharded(module)


def _check_fully_sharded(module: Any) -> None:
    policy, offloads = fsdp_policies(module)
    for name in ("param_dtype", "reduce_dtype", "output_dtype"):
        if (dtype := getattr(policy, name)) is not None:
            raise ValueError(
                f"fully_shard was given mp_policy with {name}={dtype}, expected the student to "
                "compute, and average its gradients, in the format of the parameters that the "
                "optimizer moves: leave mp_policy out, and use torch.autocast."
            )
    for method in vars(module).values():
        code = getattr(getattr(method, "__func__", None), "__code__", None)
        if code is not None and code.co_name == "wrapped_method":  # torch's own, around it
            raise ValueError(
                f"register_fsdp_forward_method was called for {method.__name__}, expected the "
                "student to be called by forward alone: call the method within it."
            )
    for offload in offloads:
        if hasattr(offload, "pin_memory"):
            raise ValueError(
                "fully_shard was given a CPUOffloadPolicy, expected shards on the device that the "
                "student computes on: leave offload_policy out."
            )


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _wrapper_of(student: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel in what was given as student, which may be compiled."""
    while not isinstance(student, DistributedDataParallel):
        if (original := compiled_from(student)) is None:
            return None
        student = original
    return student


def _check_wrapper(wrapper: DistributedDataParallel, trained: Mapping[Tensor, str]) -> None:
    hook = communication_hook(wrapper)
    if hook != "allreduce_hook":
        raise ValueError(
            f"DistributedDataParallel has the communication hook {hook}, expected plain means of "
            "the ranks' gradients: register none, or allreduce_hook."
        )
    if wrapper.mixed_precision is not None:
        raise ValueError(
            "DistributedDataParallel was made with mixed_precision, expected the student to "
            "compute with the parameters that the optimizer moves: use torch.autocast."
        )
    if is_joined(wrapper):
        raise ValueError(
            "the student was called within DistributedDataParallel.join, expected as many steps "
            "on every rank: give each as many batches."
        )
    ignored = set(wrapper.parameters_to_ignore)
    params = wrapper.module.named_parameters()
    left_out = [n for n, p in params if n in ignored and p.requires_grad and p in trained]
    if left_out:
        raise ValueError(
            f"DistributedDataParallel leaves out {left_out[0]}, whose gradients are then not the "
            "same on all ranks, expected all parameters that are trained."
        )


def _buckets(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Indices of tensors of one format, of a bounded size in sum unless one is larger.

    Args:
        tensors: as many, and of the same formats, on all ranks.
        sizes: how many numbers they have, the same on all ranks.
    """
    by_format: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_format.setdefault((tensor.dtype, tensor.device), []).append(i)
    for indices in by_format.values():
        bucket: list[int] = []
        held = 0
        for i in indices:
            if bucket and held + sizes[i] > _BUCKET:
                yield bucket
                bucket, held = [], 0
            bucket.append(i)
            held += sizes[i]
        yield bucket


def _telling(error: BaseException | None) -> tuple[str, str | None, bool] | None:
    if error is None:
        return None
    text = str(error) or type(error).__name__
    cause = error.cause if isinstance(error, Broken) else None
    return text, cause, isinstance(error, ValueError)


def _error_of(rank: int, text: str, cause: str | None, refused: bool) -> Exception:
    text = text if text.startswith("on rank ") else f"on rank {rank}, {text}"
    if cause is not None:
        return Broken(cause, text)
    return ValueError(text) if refused else FailedElsewhere(text)
