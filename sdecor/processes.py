"""One run in several processes that torchrun started, each with its part of every batch: all that they tell each other.

Within `together`, batches are parts, and what is of a batch (batch norm, covariances, ranges, noise) is of the whole;
the mean over processes of what each then computes, a loss or a gradient, is that of one process with the whole batch.
Where there is one process, every function here gives back what it is given, and nothing is begun.

Neither DistributedDataParallel nor Lightning Fabric, which wraps it, is used: before each of the several passes of a
step it would overwrite the buffers of batch norm in place, and its hooks know neither ``backward(inputs=parameters)``
nor second derivatives. Statistics of the whole batch need sums within the graph in any case, `mean`, and with these the
gradient of the parameters takes one more after the backward pass, `average`.

What a network draws otherwise than by dropout, such as depth or attention that is dropped, each process draws for its
part, with the same numbers in all; a term of one's own draws with `drawn`, and takes its means with `mean`.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.overrides import TorchFunctionMode

LONGEST = timedelta(days=7)  # that a process waits for what process 0 does alone, such as to measure


@dataclass
class _Place:
    """Where this process is."""

    rank: int = 0
    number: int = 1
    parts: int = 1  # of a batch
    waiting: Any = None  # for messages that may be long in coming


_here = _Place()


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


@contextmanager
def joined(device: str = "cpu") -> Iterator[str]:
    """Work together with the other processes, if torchrun started some; what it yields is the device of this one.

    ``cuda`` gives each process of a machine a GPU of its own, with NCCL, and ``cpu`` takes gloo. Only process 0 gives
    warnings. A process that fails is to end; torchrun then ends the others.

    Raises:
        ValueError: If the device is one that processes cannot share, or GPUs are missing.
    """
    if not launched():
        yield device
        return
    kind, here = _device(device, int(os.environ["LOCAL_WORLD_SIZE"])), int(os.environ["LOCAL_RANK"])
    if kind == "cuda":
        torch.cuda.set_device(here)
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    _here.waiting = distributed.new_group(backend="gloo", timeout=LONGEST)
    _here.rank, _here.number = distributed.get_rank(), distributed.get_world_size()
    if _here.rank:
        logging.getLogger("sdecor").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
    yield f"cuda:{here}" if kind == "cuda" else "cpu"
    _here.rank, _here.number, _here.waiting = 0, 1, None
    distributed.destroy_process_group()  # not after an error, when others may never come to it


def _device(name: str, processes: int) -> str:
    """The kind of device, if there is one for each of the processes of this machine."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if kind not in ("cpu", "cuda"):
        wanted = "use cuda, which gives each a GPU of its own, or cpu"
        raise ValueError(f"device='{name}' cannot be that of {processes} processes; {wanted}")
    if kind == "cuda" and (found := torch.cuda.device_count()) < processes:
        instead = f"use --nproc-per-node {found}" if found else "use device='cpu'"
        raise ValueError(f"{processes} processes need as many GPUs, torch {torch.__version__} finds {found}; {instead}")
    return kind


def rank() -> int:
    """Number of this process, from 0 on; process 0 is the one that writes."""
    return _here.rank


def number() -> int:
    """How many processes work together."""
    return _here.number


def parts() -> int:
    """Into how many parts, of equal size, the batch under way is cut."""
    return _here.parts


@contextmanager
def together() -> Iterator[None]:
    """Cut every batch into parts, one for each process; all of them must do the same within."""
    if _here.number == 1:
        yield
        return
    _here.parts = _here.number
    try:
        with OfTheWhole():
            yield
    finally:
        _here.parts = 1


@contextmanager
def alone() -> Iterator[None]:
    """Work as if there were no other process, while the others wait."""
    before = _here.rank, _here.number
    _here.rank, _here.number = 0, 1
    try:
        yield
    finally:
        _here.rank, _here.number = before


def told(text: str = "") -> str:
    """What process 0 says, in every process; the others wait for it, up to `LONGEST`."""
    if _here.number == 1:
        return text
    content = torch.frombuffer(bytearray(text.encode() + b"\n"), dtype=torch.uint8)  # there is no empty buffer
    length = torch.tensor(len(content))
    distributed.broadcast(length, 0, group=_here.waiting)
    content = content if _here.rank == 0 else torch.empty(int(length), dtype=torch.uint8)
    distributed.broadcast(content, 0, group=_here.waiting)
    return bytes(content.tolist()).decode()[:-1]


def same(**values: Any) -> None:
    """Raise ValueError in each process whose `values` are not those of process 0; they are what JSON can hold."""
    mine = json.dumps(values)
    if (theirs := told(mine)) != mine:
        problem = f"process {_here.rank} has {mine}, and process 0 has {theirs}"
        raise ValueError(f"{problem}; all processes must begin alike, and see the same files")


def mine(batch: Tensor) -> Tensor:
    """The part of this process of a batch, which may be of any length ``(B, ...)``."""
    return batch if _here.parts == 1 else batch.tensor_split(_here.parts)[_here.rank]


def drawn(draw: Callable[..., Tensor], shape: Sequence[int], along: int = 0, **how: Any) -> Tensor:
    """What `draw`, such as `torch.rand`, gives for a shape; of a part of a batch, that part of what the whole is given.

    The batch lies `along` a dimension. Every process draws all of it, so that the generators stay alike.
    """
    if _here.parts == 1:
        return draw(shape, **how)
    whole = [size * (_here.parts if i == along else 1) for i, size in enumerate(shape)]
    return draw(whole, **how).chunk(_here.parts, along)[_here.rank]


class _Sum(torch.autograd.Function):
    """Sum over processes. Each process hands on a gradient of its own loss, whose sum is wanted, so they are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Sum.apply(*grads)  # type: ignore[no-untyped-call]


def mean(x: Tensor) -> Tensor:
    """Mean over the parts of a batch, of what is a mean over one; can be differentiated as often as you like."""
    return x if _here.parts == 1 else _Sum.apply(x) / _here.parts  # type: ignore[no-untyped-call]


def total(x: Tensor) -> Tensor:
    """Sum over the parts of a batch."""
    return x if _here.parts == 1 else _Sum.apply(x)  # type: ignore[no-untyped-call]


def least(x: Tensor) -> Tensor:
    """Least value over the parts of a batch, element by element; a constant."""
    if _here.parts == 1:
        return x
    found = x.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(found, distributed.ReduceOp.MIN)
    return found


def average(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their means over the parts of a batch, in one message for those of each type."""
    kinds: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors if _here.parts > 1 else ():
        kinds[tensor.dtype].append(tensor)
    for alike in kinds.values():
        flat = torch.cat([tensor.flatten() for tensor in alike])
        distributed.all_reduce(flat)
        for tensor, new in zip(alike, (flat / _here.parts).split([t.numel() for t in alike]), strict=True):
            tensor.copy_(new.view(tensor.shape))


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` with the statistics of the whole batch, differentiable twice, on any device.

    The kernel is that of evaluation mode, which holds statistics fixed. That they depend on the images is told to it by
    a factor of 1 in the weight and a summand of 0 in the bias, whose gradients are theirs.
    """
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    z = x if x.dtype in (torch.float32, torch.float64) else x.float()
    v, m = torch.var_mean(z, [0, *range(2, x.ndim)], correction=0)
    m, square = mean(torch.stack([m, v + m.square()]).double()).unbind()
    v = (square - m.square()).clamp_min(0)
    fixed_m, fixed_v = m.detach(), v.detach()
    scale = ((fixed_v + eps) / (v + eps)).sqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - scale * (m - fixed_m) / (fixed_v + eps).sqrt()
    if running_mean is not None and running_var is not None:
        count = z.numel() // len(v) * _here.parts
        running_mean.lerp_(fixed_m.to(running_mean), momentum)
        running_var.lerp_((fixed_v * (count / (count - 1))).to(running_var), momentum)
    given = [t.to(z.dtype) for t in (fixed_m, fixed_v, scale, shift)]
    return F.batch_norm(x, given[0], given[1], given[2], given[3], False, 0.0, eps)


def _instance_norm(
    x: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, *rest: Any, **how: Any
) -> Tensor:
    """As torch's; its running averages are means over images, and so over processes too."""
    out = F.instance_norm(x, running_mean, running_var, *rest, **how)
    with torch.no_grad():
        average(t for t in (running_mean, running_var) if t is not None)
    return out


def _dropout(
    function: Callable[..., Tensor], x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """As torch's, never in place, with this part of what would be dropped of the whole batch."""
    if not training:
        return x
    whole = torch.ones_like(torch.cat([x.detach()] * _here.parts))  # of the same layout, as the draws go by that
    return x * function(whole, p).chunk(_here.parts)[_here.rank]


_FUNCTIONS: dict[Any, Callable[..., Any]] = {F.batch_norm: _batch_norm, F.instance_norm: _instance_norm} | {
    function: partial(_dropout, function) for function in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
}


class OfTheWhole(TorchFunctionMode):
    """While it is active, what layers do with a batch is what they would do with the whole."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _FUNCTIONS.get(func, func)(*args, **(kwargs or {}))


__all__ = [
    *("alone", "average", "drawn", "joined", "launched", "least", "mean", "mine", "number", "parts", "rank", "same"),
    *("together", "told", "total"),
]
