"""Several processes, one batch: torchrun's ranks, on PyTorch's own distributed engine.

    torchrun --nproc_per_node 4 train.py --data_name f30k_precomp
    torchrun --nproc_per_node 4 evaluation.py

The global batch is `--batch_size`, divided over the ranks: each encodes its share, gathers the
captions of all and scores its own images against them, so that the scoring, which costs most, is
divided, and the hardest negatives come from the whole batch. What is summed over the batch inside
the model (BatchNorm's statistics) is summed over the ranks. The loss is of the whole score matrix,
the same on every rank; so a parameter's gradient is the *sum* of what the ranks have of it.

Three exchanges that gradients pass through, each nothing at all in a single process:

    total(x)     the sum over ranks of what all of them then use, each for its own part
    gather(x)    the rows of all ranks, which all of them then use, each for its own part
    collect(x)   the rows of all ranks, with which all of them then do the same

With `total` and `gather` a rank's input matters on every rank, so its gradients are summed over
them; with `collect` every rank holds the whole gradient already.

A step's traffic for each rank, with W words of the global batch: (W + C) D numbers for the captions
and as many back, B C scores, the parameters once (23 million at full size), and 4 D numbers for
each graph layer.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from errors import InputError

TIMEOUT = datetime.timedelta(minutes=5)  # of a silent rank; a dead one is noticed at once
GONE = ("onnection", "imed out", "imeout", "NCCL", "gloo", "ocket")  # signs in what they then say


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around all that the ranks do: leaves in good order, and says so when another is gone.

    Raises:
        InputError: if another rank has died or does not answer any more.
    """
    try:
        yield
    except RuntimeError as error:
        if size() == 1 or not any(sign in str(error) for sign in GONE):
            raise
        raise InputError(
            f"rank {rank()}: another process of this run is gone or silent "
            f"({str(error).splitlines()[0][:120]}); what is saved is whole, go on with --resume"
        ) from error
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else 1)
        raise
    leave(0)


def leave(status: int) -> None:
    """Wait for the others, which may still be writing, and end all processes but the first."""
    if not dist.is_initialized():
        return
    first = is_first()
    dist.barrier()
    dist.destroy_process_group()
    if not first:
        # gloo's threads have been seen to abort a process while Python was tearing itself down,
        # once in some sixty runs; there is nothing left to do in this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start(device: torch.device) -> torch.device:
    """Join the other processes that torchrun has started; returns this one's device.

    A process that torchrun has not started stays alone, and keeps the device.

    Raises:
        InputError: if there are fewer CUDA devices than processes.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return device
    if device.type == "cuda":
        local, n = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= n:
            raise InputError(f"torchrun --nproc_per_node: there are {n} CUDA devices only")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes and speaks for all."""
    return rank() == 0


def share(n: int) -> slice:
    """The part of n things that is this rank's: consecutive, and as even as can be."""
    return slice(n * rank() // size(), n * (rank() + 1) // size())


def say(line: str) -> None:
    """A line for people, once for all ranks."""
    if is_first():
        print(line, flush=True)


def largest(number: int, device: torch.device) -> int:
    """The largest of the ranks' numbers."""
    if size() == 1:
        return number
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


# -- exchanges that gradients pass through --------------------------------------------------------


def total(x: Tensor) -> Tensor:
    """The sum over ranks; so is its gradient."""
    return x if size() == 1 else _Total.apply(x)


def gather(x: Tensor) -> Tensor:
    """The rows of all ranks end to end, of which a rank may have any number."""
    return x if size() == 1 else _Gather.apply(x, True)


def collect(x: Tensor) -> Tensor:
    """As gather, where every rank goes on in the same way, and has the same gradient."""
    return x if size() == 1 else _Gather.apply(x, False)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        result = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result)
        return result

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, summed: bool) -> Tensor:
        counts = row_counts(x)
        first = sum(counts[: rank()])
        ctx.mine, ctx.summed = slice(first, first + len(x)), summed
        return torch.cat(all_rows(x, counts))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.summed:
            grad = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(grad)
        return grad[ctx.mine], None


def row_counts(x: Tensor) -> list[int]:
    """The number of rows each rank has."""
    counts = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(size())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    return [int(count) for count in counts]


def all_rows(x: Tensor, counts: list[int]) -> list[Tensor]:
    """The rows of each rank; shorter ones travel padded, as the engine wants equal sizes."""
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    rows = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(rows, padded)
    return [row[:count] for row, count in zip(rows, counts, strict=True)]


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Every rank's part of the gradients added up, in one piece."""
    if size() == 1:
        return
    parameters = [p for p in parameters if p.requires_grad]
    for p in parameters:
        if p.grad is None:  # of a rank whose share was empty
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(grad.view_as(p))


class BatchNorm1d(nn.BatchNorm1d):
    """BatchNorm over the global batch: PyTorch's own in a single process and for inference.

    Otherwise mean and variance are summed over the ranks, and the buffers move on every rank alike
    (PyTorch's SyncBatchNorm does this on GPUs only).
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C) or (N, C, L), statistics of each channel over the rest and all ranks."""
        if size() == 1 or not self.training:
            return super().forward(x)
        x = x.to(self.running_mean.dtype)  # of mixed precision's bfloat16, too
        rest = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        n = total(x.new_tensor(x.numel() / x.shape[1]))
        mean = total(x.sum(rest)) / n
        centred = x - mean.view(shape)
        var = total(centred.square().sum(rest)) / n
        with torch.no_grad():
            for buffer, now in ((self.running_mean, mean), (self.running_var, var * n / (n - 1))):
                buffer.lerp_(now, self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return centred * scale.view(shape) + self.bias.view(shape)


# -- without gradients ----------------------------------------------------------------------------


def gather_rows(x: Tensor) -> Tensor:
    """The rows of all ranks end to end, on every rank."""
    return x if size() == 1 else torch.cat(all_rows(x, row_counts(x)))


def to_first(rows: np.ndarray) -> np.ndarray | None:
    """The rows of all ranks end to end on the first, None on the others."""
    if size() == 1:
        return rows
    gathered: list | None = [None] * size() if is_first() else None
    dist.gather_object(rows, gathered)
    return np.concatenate(gathered) if gathered else None


def from_first(value: object) -> object:
    """What the first rank has, on every rank."""
    values = [value]
    if size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def of_all(value: object) -> list:
    """What every rank has, on every rank."""
    values: list = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values
