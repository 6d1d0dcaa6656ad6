"""Training and evaluation of one model: seeded, resumable after any kill, loud when a loss is not finite."""

from __future__ import annotations

import hashlib
import io
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from sdecor import processes
from sdecor._files import replace_atomically, set_aside
from sdecor.config import Objective, Schedule
from sdecor.graphs import Captured
from sdecor.images import ImageData, ImageStream, checked_set
from sdecor.models import uncompiled
from sdecor.objective import capture, layers_of, losses
from sdecor.saliency import frozen_eval, logits_of, same_mode

log = logging.getLogger("sdecor")


@dataclass
class History:
    """Curves of one training run, one number an epoch."""

    terms: dict[str, list[float]] = field(default_factory=dict)  #: Means of the unweighted terms, and of ``total``.
    validation_accuracy: list[float] = field(default_factory=list)  #: After the epoch, if there is validation data.
    seconds: list[float] = field(default_factory=list)  #: Duration.
    computed: list[str] = field(default_factory=list)  #: How, as `way` says it.


def device_of(name: str) -> torch.device:
    """The device called `name`; ``auto`` takes a GPU if there is one. ValueError if it is unknown or absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device '{name}'; use cpu, cuda (or cuda:0, cuda:1, ...) or auto") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ValueError(
            f"device '{name}' is none that sdecor computes on; use cpu, cuda (or cuda:0, cuda:1, ...) or auto"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"torch {torch.__version__} finds {torch.cuda.device_count() or 'no'} CUDA GPU"
        raise ValueError(f"device='{name}' was asked for, but {found}; use device='cpu'")
    return device


def way(device: torch.device, amp: bool = False, compiled: bool = False, number: int = 1) -> str:
    """How training is computed, as far as it may show in the result: ``cuda, bfloat16, compiled, 8 processes``."""
    several = [f"{number} processes"] if number > 1 else []
    return ", ".join([device.type, *["bfloat16"] * amp, *["compiled"] * compiled, *several])


def _now(history: History, where: torch.device, amp: bool, compiled: bool) -> str:
    """The `way` of the epochs to come; one that those done were not computed in is said."""
    now = way(where, amp, compiled, processes.number())
    if history.computed and history.computed[-1] != now:
        done, before = len(history.computed), history.computed[-1]
        log.warning("%d epochs were computed on %s, those to come are on %s", done, before, now)
    return now


class _Sums:
    """Terms of an epoch, summed in float64 and checked: on a GPU every 50 steps, so that it need not wait."""

    def __init__(self, names: list[str], first: int, often: bool) -> None:
        self.names, self.first, self.size = names, first, 1 if often else 50
        self.buffer: list[Tensor] = []
        self.total = torch.zeros(len(names), dtype=torch.float64)
        self.steps = 0

    def add(self, terms: dict[str, Tensor]) -> None:
        self.buffer.append(torch.stack([terms[name].detach() for name in self.names]))
        self.steps += 1
        if len(self.buffer) == self.size:
            self.flush()

    def flush(self) -> None:
        """Raise FloatingPointError if a term is not finite; the first such step is named."""
        if not self.buffer:
            return
        values = processes.mean(torch.stack(self.buffer))  # so that all processes raise what one has to raise
        if not bool(torch.isfinite(values).all()):
            step, term = (int(i) for i in (~torch.isfinite(values)).nonzero()[0])
            at = f"at step {self.first + self.steps - len(self.buffer) + step}"
            became = f"'{self.names[term]}' became {float(values[step, term])} {at}"
            raise FloatingPointError(f"loss term {became}; lower lr or the weight of that term")
        self.total += values.double().sum(0).cpu()
        self.buffer.clear()

    def means_to(self, curves: dict[str, list[float]]) -> None:
        self.flush()
        for name, value in zip(self.names, (self.total / self.steps).tolist(), strict=True):
            curves[name].append(value)


def _save(path: Path | None, about: tuple[str, dict[str, str]], history: History, **parts: Any) -> None:
    """Write a checkpoint: SHA-256 of what follows (torch checks none of its own), then what ``torch.save`` makes."""
    if path is None or processes.rank():
        return
    buffer, state = io.BytesIO(), {name: part.state_dict() for name, part in parts.items()}
    torch.save({"description": about[0], "of": about[1], "history": vars(history), **state}, buffer)
    content = buffer.getvalue()
    replace_atomically(path, lambda f: f.write(hashlib.sha256(content).digest() + content))


def _read(path: Path) -> dict[str, Any] | None:
    """What a checkpoint holds, None if it is damaged."""
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        return None
    state: dict[str, Any] = torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
    return state


def epochs_done(checkpoint: Path) -> int:
    """How many epochs a training that goes on from this file has behind it."""
    state = _read(checkpoint)
    return 0 if state is None else len(state["history"]["seconds"])


def _resume(path: Path | None, about: tuple[str, dict[str, str]], history: History, **parts: Any) -> int:
    """Take up what an earlier `fit` left; the number of epochs done. A damaged file is set aside and said so."""
    if path is None or not path.exists():
        return 0
    if (state := _read(path)) is None:
        aside = set_aside(path).name
        log.warning("checkpoint %s is truncated or corrupt; set aside as %s, training starts over", path, aside)
        return 0
    if state["description"] != about[0]:
        raise ValueError(f"checkpoint {path} is of another run, {state['description']}; delete it or name another file")
    for what, digest in about[1].items():
        if state.get("of", about[1])[what] != digest:
            raise ValueError(f"checkpoint {path} is of other {what}; put those back, or delete it")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    vars(history).update(state["history"])
    return len(history.seconds)


def _digest(model: nn.Module) -> str:
    """Of what the model holds, where processes have to compare it."""
    state = model.state_dict().values() if processes.number() > 1 else ()
    held = (tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in state)
    return hashlib.sha256(b"".join(held)).hexdigest()[:16]


def _of(model: nn.Module, train: ImageData | ImageStream) -> dict[str, str]:
    """Digests of what a checkpoint is of."""
    return {"images": train.digest, "networks": hashlib.sha256(repr(model).encode()).hexdigest()[:16]}


def _checked(
    train: Any, objective: Any, plan: Any, device: str, compiled: bool
) -> tuple[Any, Objective, Schedule, torch.device]:
    """What `fit` was given, if it is of these kinds, and processes can share it; an objective may be named."""
    objective = Objective(objective) if isinstance(objective, str) else objective
    for name, value, kind in (("objective", objective, Objective), ("schedule", plan, Schedule)):
        if not isinstance(value, kind):
            raise ValueError(f"{name} must be of the class {kind.__name__}, got {type(value).__name__}")
    if compiled and processes.number() > 1:
        raise ValueError("a model cannot be compiled in several processes; start without torchrun, or do not compile")
    number, size = processes.number(), min(plan.batch_size, len(checked_set("train", train)))
    if size % number:
        which = "batch_size" if size == plan.batch_size else "the number of images, which is that of the only batch,"
        raise ValueError(f"{which} must be a multiple of the number of processes, {number}; got {size}")
    return train, objective, plan, device_of(device)


def _kept(
    path: str | Path | None, about: tuple[str, dict[str, str]], history: History, spare: float, **parts: Any
) -> tuple[int, Callable[[], AbstractContextManager[None]]]:
    """Epochs that are done, and what to call after each: it saves if that is due, or if its block raises."""
    path = None if path is None else Path(path)
    done, saved = _resume(path, about, history, **parts), time.perf_counter()
    processes.same(epochs=done, of=about, weights=_digest(parts["model"]))

    @contextmanager
    def save() -> Iterator[None]:
        nonlocal saved
        if due := time.perf_counter() - saved >= spare:
            _save(path, about, history, **parts)
            saved = time.perf_counter()
        try:
            yield
        except BaseException:
            if not due:
                _save(path, about, history, **parts)
            raise

    return done, save


@contextmanager
def _laid_out(model: nn.Module, train: ImageData | ImageStream, where: torch.device) -> Iterator[torch.memory_format]:
    """Put the model on a device, with channels last if it can work so, and leave it with the strides that it had.

    Every label must have a logit, too: on a GPU it would be a crash, and -100 would be skipped.
    """
    if len(train) == 0:
        raise ValueError("train holds no images to learn from")
    x, _ = next(train.subset(torch.arange(min(2, len(train)))).batches(2))
    model, x = model.to(where), x.to(where)
    held = [*model.named_parameters(), *model.named_buffers()]
    strides = {name: tensor.stride() for name, tensor in held if not nn.parameter.is_lazy(tensor)}
    try:
        layout, classes = _layout(model, x)
        low, high = (int(v) for v in torch.aminmax(train.labels))
        if low < 0 or high >= classes:
            raise ValueError(
                f"labels must lie in 0..{classes - 1}, as the model gives {classes} logits, got {low}..{high}"
            )
        yield layout
    finally:
        now = [*model.named_parameters(), *model.named_buffers()]  # of buffers other ones than before
        for name, tensor in ((n, t) for n, t in now if not nn.parameter.is_lazy(t)):
            usual = torch.empty_like(tensor, memory_format=torch.contiguous_format, device="meta").stride()
            if tensor.stride() != (wanted := strides.get(name, usual)) and len(wanted) == tensor.ndim:
                tensor.data = torch.empty_strided(tensor.shape, wanted, dtype=tensor.dtype, device=where).copy_(tensor)


def _layout(model: nn.Module, x: Tensor) -> tuple[torch.memory_format, int]:
    """The layout that the model can work in, which it is put in, and its number of classes.

    Passes of a few images find both out, the second one in training mode, which leaves no trace.
    """
    lazy, problem = any(nn.parameter.is_lazy(p) for p in model.parameters()), ""
    for layout in (torch.channels_last, torch.contiguous_format):  # convolutions are faster so, on CPUs too
        try:
            with torch.no_grad(), frozen_eval(model):
                if lazy:
                    logits_of(model, x, finite=False)
                model.to(memory_format=layout)  # type: ignore[call-overload]
                classes = logits_of(model, x.to(memory_format=layout), finite=False).shape[1]
            with torch.no_grad(), same_mode(model), _same_buffers(model):
                logits_of(model.train(), x.to(memory_format=layout), finite=False)
        except RuntimeError as error:
            problem = str(error).splitlines()[0]
        else:
            return layout, classes
    raise ValueError(f"{type(model).__name__} cannot take images of shape {tuple(x.shape)}: {problem}")


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Give buffers back what they held, such as the averages of batch norm."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            if name in before and buffer.shape == before[name].shape:
                buffer.copy_(before[name])


def fit(
    model: nn.Module,
    train: ImageData | ImageStream,
    objective: Objective,
    schedule: Schedule | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
    validation: ImageData | ImageStream | None = None,
    checkpoint: str | Path | None = None,
    spare: float = 0.0,
    amp: bool = False,
    compiled: bool = False,
    graph: bool = True,
    progress: bool | None = None,
    after_epoch: Callable[[int, History], None] | None = None,
) -> History:
    """Train `model` in place, on `device`, and return the curves.

    Every epoch draws its order, masks and dropout from a seed made of `seed` and its number. So a run that was killed
    continues from the last finished epoch with the same bits as one that was not (on the CPU, same number of threads).

    Within `sdecor.processes.joined`, all processes have to call it, with the same arguments, and each takes its part of
    every batch. What they draw, and all else but the order of sums, is as in one process. A model is not compiled then,
    and no CUDA graph made.

    Args:
        model: Classifier, initialized by the caller; all of it is put in training mode.
        train: Training images.
        objective: Terms and weights.
        schedule: Length, batch size, learning rate.
        seed: Of everything random here.
        device: See `device_of`.
        validation: Images whose accuracy is measured after each epoch.
        checkpoint: File to write after each epoch and to continue from. A corrupt one is set aside and said so. All
            processes read it, and process 0 writes it.
        spare: Seconds of work that a kill may cost besides an epoch: shorter epochs share a checkpoint.
        amp: bfloat16 autocast; whitening and all losses stay in float32.
        compiled: Run the model through ``torch.compile``.
        graph: On a GPU, replay the step as a CUDA graph, unless the model is compiled.
        progress: Show a bar; None shows it on a terminal only.
        after_epoch: Called with the number of finished epochs and the history, in every process. If it raises, these
            are kept; it must do so in all.

    Raises:
        ValueError: If anything does not fit: images, device, layers, labels, or a `checkpoint` of other settings.
        OSError: If the checkpoint cannot be written; the one before it is then still there.
        FloatingPointError: If a loss term is not finite; names the term and the step.
    """
    model, compiled = uncompiled(model), compiled or model is not uncompiled(model)
    train, objective, plan, where = _checked(train, objective, schedule or Schedule(), device, compiled)
    history = History({name: [] for name in (*objective.terms, "total")})
    data = train.to(where)
    steps = max(len(train) // plan.batch_size, 1)
    how: dict[str, Any] = {"shuffle": True, "augment": plan.augment, "drop_last": len(train) >= plan.batch_size}
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        stack.enter_context(_own_state(where))
        torch.manual_seed(seed)  # of layers that are made when they see the first images
        layout = stack.enter_context(_laid_out(model, data, where))
        optimizer = _optimizer(plan, model, where)
        about = f"{objective}, {plan}, seed={seed}, images={len(train)}", _of(model, train)
        done, save = _kept(checkpoint, about, history, spare, model=model, optimizer=optimizer)
        now = _now(history, where, amp, compiled)
        rate = _rate(optimizer, where)
        layers = layers_of(model, objective, next(data.subset(torch.arange(1)).batches(1))[0].to(where))
        features = stack.enter_context(capture(model, layers))
        forward = stack.enter_context(_compiled(model)) if compiled else model
        bar = stack.enter_context(_bar(done * steps, plan.epochs * steps, progress))
        order, noise = torch.Generator(where), torch.Generator(where)
        step = _stepper(forward, objective, optimizer, plan, amp, features=features, layers=layers, generator=noise)
        captured = graph and where.type == "cuda" and not compiled and processes.number() == 1
        train_step = Captured(step, noise) if captured else step
        for epoch in range(done, plan.epochs):
            started = time.perf_counter()
            _draw(seed, epoch, order, noise)
            model.train()
            sums = _Sums([*history.terms], epoch * steps, where.type == "cpu")
            with processes.together():
                for x, y in data.batches(plan.batch_size, generator=order, layout=layout, **how):
                    rate(plan.rate(epoch * steps + sums.steps, plan.epochs * steps))
                    sums.add(train_step(x.to(where, memory_format=layout), y.to(where)))
                    bar.update()
                sums.means_to(history.terms)
                if validation is not None:
                    history.validation_accuracy.append(evaluate(model, validation, device=device)["accuracy"])
            history.seconds.append(time.perf_counter() - started)
            history.computed.append(now)
            bar.set_postfix(loss=f"{history.terms['total'][-1]:.3f}")
            with save():
                if after_epoch is not None:
                    after_epoch(epoch + 1, history)
    return history


def _stepper(
    model: Any,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    plan: Schedule,
    amp: bool,
    **seen: Any,
) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """One step of training: from images and labels to the terms, as constants."""

    def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            terms = losses(model, x, y, objective, **seen)
        _descend(optimizer, terms["total"], plan.clip)
        seen["features"].clear()  # they hold the graph of the step
        return {name: value.detach() for name, value in terms.items()}

    return step


def _optimizer(plan: Schedule, model: nn.Module, where: torch.device) -> torch.optim.Optimizer:
    """On a GPU in one kernel, which reads the rate from there, so that a captured step finds the one of today."""
    if not (parameters := [p for p in model.parameters() if p.requires_grad]):
        raise ValueError(f"{type(model).__name__} has no parameter to train: none has requires_grad")
    how: dict[str, Any] = {"lr": plan.lr, "weight_decay": plan.weight_decay}
    if where.type == "cuda":
        how |= {"lr": torch.tensor(plan.lr, device=where), "fused": True}
    if plan.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=plan.momentum, nesterov=plan.momentum > 0, **how)
    return torch.optim.AdamW(parameters, capturable=where.type == "cuda", **how)


def _rate(optimizer: torch.optim.Optimizer, where: torch.device) -> Callable[[float], Any]:
    """What sets the learning rate, also of an optimizer whose state was read from a file."""
    (group,) = optimizer.param_groups
    if where.type != "cuda":
        return lambda rate: group.update(lr=rate)
    group["lr"] = torch.tensor(float(group["lr"]), device=where)
    return lambda rate: group["lr"].fill_(rate)


@contextmanager
def _own_state(where: torch.device) -> Iterator[None]:
    """Leave torch's global draws as they were, and let cuDNN choose its kernels by trial: all steps have one shape."""
    chosen = torch.backends.cudnn.benchmark
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.backends.cudnn.benchmark = chosen or where.type == "cuda"
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = chosen


def _bar(done: int, steps: int, progress: bool | None) -> tqdm[Any]:
    hidden = True if processes.rank() else None if progress is None else not progress
    return tqdm(total=steps, initial=done, unit="step", leave=False, disable=hidden)


@contextmanager
def _compiled(model: nn.Module) -> Iterator[Any]:
    """The model compiled; trainings share the graphs of the same shapes and hooks, which collect the features."""
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False, recompile_limit=64):
        yield torch.compile(model, dynamic=False)  # not the default, so that no graph is taken that ignores the hooks


def _draw(seed: int, epoch: int, order: torch.Generator, noise: torch.Generator) -> None:
    """Seed the sources of order and augmentation, and of masks, and torch's global state, which is for dropout."""
    draw = torch.manual_seed((seed * 1_000_003 + epoch) % 2**63).initial_seed()
    order.manual_seed(draw)
    noise.manual_seed(draw + 500_009)


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor, clip: float | None) -> None:
    """One step; the parameters alone get a gradient, the images need none."""
    (group,) = optimizer.param_groups
    optimizer.zero_grad(set_to_none=True)  # what a capture that broke off may have left
    loss.backward(inputs=group["params"])
    processes.average(p.grad for p in group["params"] if p.grad is not None)
    if clip is not None:
        nn.utils.clip_grad_norm_(group["params"], clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def evaluate(
    model: nn.Module, data: ImageData | ImageStream, *, batch_size: int = 1000, device: str = "cpu"
) -> dict[str, float]:
    """``accuracy`` in [0, 1] and ``cross_entropy`` in nats, in evaluation mode; the model's flags are restored."""
    data, where = checked_set("data", data), device_of(device)
    if len(data) == 0:
        raise ValueError("data holds no images to evaluate on")
    right, loss = 0.0, 0.0
    with frozen_eval(model):
        for x, y in (data.to(where) if isinstance(data, ImageStream) else data).batches(batch_size):
            logits, y = logits_of(model, x.to(where)).float(), y.to(where)
            right += float((logits.argmax(1) == y).sum())
            loss += float(cross_entropy(logits, y, reduction="sum"))
    right, loss = processes.total(torch.tensor([right, loss], dtype=torch.float64, device=where)).tolist()
    return {"accuracy": right / len(data), "cross_entropy": loss / len(data)}


__all__ = ["History", "Objective", "Schedule", "device_of", "epochs_done", "evaluate", "fit", "way"]
