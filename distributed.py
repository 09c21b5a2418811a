"""Several processes, one batch: the ranks of torchrun, on torch.distributed.

    torchrun --nproc_per_node 4 train.py --data_name f30k_precomp
    torchrun --nproc_per_node 4 evaluation.py

`--batch_size` is that of all ranks together. Each rank encodes its share, gathers the captions of
all, and scores its own images against them. So the scoring, which costs most, is divided, and the
hardest negatives come from the whole batch. BatchNorm's statistics are summed over the ranks. The
loss is that of the whole score matrix, the same on every rank, so the gradient of a parameter is
the *sum* of what the ranks have of it.

What the ranks add up in a step, with W words in the global batch: (W + C) D numbers for the
captions and as many back, B C scores, all parameters once, and 4 D numbers for each graph layer.
With a single process every function here returns its input.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import InputError

TIMEOUT = datetime.timedelta(minutes=5)  # of a silent rank; a dead one is noticed at once


def _checked(collective: Callable) -> Callable:
    """A collective of torch.distributed that reports in one line that another rank is gone."""

    def run(*args, **kwargs):
        try:
            return collective(*args, **kwargs)
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:120]
            raise InputError(
                f"rank {rank()}: another process is gone or silent ({reason}); what is saved is "
                "whole, continue with --resume"
            ) from error

    return run


all_reduce = _checked(dist.all_reduce)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Around all that the ranks do: they start and leave together. Gives this rank's device.

    A process that torchrun has not started stays alone, and keeps the device.

    Raises InputError if there are fewer CUDA devices than processes.
    """
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device.type == "cuda":
        local, n = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= n:
            raise InputError(f"torchrun --nproc_per_node: there are only {n} CUDA devices")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    _checked(dist.init_process_group)(backend, timeout=TIMEOUT)
    try:
        yield device
    except SystemExit:
        _leave()
        raise
    except (InputError, OSError) as error:
        if rank() > 0 and not isinstance(error.__cause__, RuntimeError):
            time.sleep(2)  # rank 0 has the same to say, and torchrun ends this one meanwhile
        raise
    _leave()


def _leave() -> None:
    """Wait for the others, which may still be writing."""
    _checked(dist.barrier)()
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process writes and prints for all."""
    return rank() == 0


def rank_slice(n: int) -> slice:
    """The part of n things that belongs to this rank: consecutive, as even as can be."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def print_on_main(line: str) -> None:
    if is_main_process():
        print(line, flush=True)


def all_reduce_max(number: int, device: torch.device) -> int:
    """The largest of the ranks' numbers."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, device=device)
    all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


# -- collectives that pass gradients --------------------------------------------------------------
# What a rank gives to them matters on every rank, so its gradients are summed over the ranks.


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over ranks; so is its gradient."""
    return x if world_size() == 1 else _AllReduce.apply(x, True)


def all_gather_with_grad(x: Tensor, replicated: bool = False) -> Tensor:
    """The rows of all ranks end to end; the ranks may have different numbers of rows.

    replicated: every rank does the same with the rows from then on, so each already holds the whole
    gradient, and nothing is summed.
    """
    if world_size() == 1:
        return x
    counts = all_gather_object(len(x))
    rows = [x if r == rank() else x.new_zeros(n, *x.shape[1:]) for r, n in enumerate(counts)]
    return _AllReduce.apply(torch.cat(rows), not replicated)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sum_gradients: bool) -> Tensor:
        ctx.sum_gradients = sum_gradients
        x = x.clone(memory_format=torch.contiguous_format)
        all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grad) if ctx.sum_gradients else grad, None


# -- without gradients ----------------------------------------------------------------------------


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all ranks, in one exchange."""
    if world_size() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = nn.utils.parameters_to_vector(grads)
    all_reduce(flat)
    nn.utils.vector_to_parameters(flat, grads)


def all_gather_object(value: object) -> list:
    """What every rank has, on every rank."""
    values: list = [value] * world_size()
    if world_size() > 1:
        _checked(dist.all_gather_object)(values, value)
    return values
