"""Training and evaluation of one model: seeded, resumable after any kill, loud when a loss is not finite."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from sdecor._files import replace_atomically, set_aside
from sdecor.data import ImageData, ImageStream
from sdecor.models import default_layers
from sdecor.objective import Objective, Terms, capture, losses
from sdecor.saliency import frozen_eval

log = logging.getLogger("sdecor")
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Args:
        epochs: Passes over the training data.
        batch_size: Images per step; a last smaller batch is dropped when there is a full one.
        lr: Peak learning rate of AdamW.
        weight_decay: Of AdamW.
        shape: ``cosine`` (5 % linear warm-up, then half a cosine to 0) or ``constant``.
        clip: Largest norm of the parameter gradient; None to leave it.
        augment: Random shifts and flips of the training images (see `sdecor.data.ImageData.batches`).

    Raises:
        ValueError: If a value is impossible.
    """

    epochs: int = 8
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 1e-4
    shape: str = "cosine"
    clip: float | None = 5.0
    augment: bool = False

    def __post_init__(self) -> None:
        """Reject impossible settings by name."""
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be finite and positive, got {self.lr}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be finite and not negative, got {self.weight_decay}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, or None to leave the gradient as it is, got {self.clip}")
        if self.shape not in SCHEDULES:
            raise ValueError(f"unknown schedule '{self.shape}'; known: {', '.join(SCHEDULES)}")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate at `step` of `steps`."""
        if self.shape == "constant":
            return self.lr
        warm = max(1, round(0.05 * steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@dataclass
class History:
    """Curves of a run, one entry an epoch: mean of each loss term, validation accuracy (if asked for), seconds."""

    terms: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in Terms._fields})
    validation_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def device_of(name: str) -> torch.device:
    """The device called `name`; ``auto`` takes a GPU if there is one.

    Raises:
        ValueError: If there is no such device, or ``cuda`` is asked for and absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device '{name}'; use cpu, cuda (or cuda:0, cuda:1, ...) or auto") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count() or 'no'} CUDA GPU"
        raise ValueError(
            f"device='{name}' was asked for, but torch {torch.__version__} finds {found}; use device='cpu'"
        )
    return device


def _check(steps: list[Tensor], first: int) -> None:
    """Raise if a term of the buffered steps is not finite; the first such step is named."""
    values = torch.stack(steps)
    if not bool(torch.isfinite(values).all()):
        step, term = (int(i) for i in (~torch.isfinite(values)).nonzero()[0])
        raise FloatingPointError(
            f"loss term '{Terms._fields[term]}' became {float(values[step, term])} at step {first + step}; "
            "lower lr or the weight of that term"
        )


def _save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint: SHA-256 of what follows (torch checks none of its own), then what ``torch.save`` makes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    replace_atomically(path, lambda f: f.write(hashlib.sha256(content).digest() + content))


def _saved_state(path: Path | None, description: str) -> dict[str, Any] | None:
    """State of an earlier `fit`, or None; a damaged file is set aside and said so."""
    if path is None or not path.exists():
        return None
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        aside = set_aside(path).name
        log.warning("checkpoint %s is truncated or corrupt; set aside as %s, training starts over", path, aside)
        return None
    state: dict[str, Any] = torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
    if state["description"] != description:
        raise ValueError(f"checkpoint {path} is of another run, {state['description']}; delete it or name another file")
    return state


def _check_labels(model: nn.Module, x: Tensor, labels: Tensor) -> None:
    """Raise unless every label has a logit: on a GPU it would be a crash, and -100 would be skipped."""
    with torch.no_grad(), frozen_eval(model):
        classes = model(x[:1]).shape[1]
    low, high = (int(v) for v in torch.aminmax(labels))
    if low < 0 or high >= classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}, as the model gives {classes} logits, got {low}..{high}")


def fit(
    model: nn.Module,
    train: ImageData | ImageStream,
    objective: Objective,
    schedule: Schedule | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
    validation: ImageData | ImageStream | None = None,
    checkpoint: Path | None = None,
    amp: bool = False,
    compiled: bool = False,
    progress: bool | None = None,
    after_epoch: Callable[[int, History], None] | None = None,
) -> History:
    """Train `model` in place.

    Every epoch draws its order, masks and dropout from a seed made of `seed` and its number. So a run that was killed
    continues from the last finished epoch with the same bits as one that was not (on the CPU, same number of threads).

    Args:
        model: Classifier; moved to `device`.
        train: Training images.
        objective: Terms and weights.
        schedule: Length, batch size, learning rate.
        seed: Of everything random here. The initialization of `model` is the caller's.
        device: ``cpu``, ``cuda`` or ``auto``.
        validation: Images whose accuracy is measured after each epoch.
        checkpoint: File to write after each epoch and to continue from. A corrupt one is set aside and said so.
        amp: bfloat16 autocast; whitening and all losses stay in float32.
        compiled: Run the model through ``torch.compile``.
        progress: Show a bar; None shows it on a terminal only.
        after_epoch: Called with the number of finished epochs and the history.

    Returns:
        The curves.

    Raises:
        ValueError: If there are no images, the device is absent, a layer is unknown, labels do not fit the logits, or
            `checkpoint` is of a run with other settings.
        OSError: If the checkpoint cannot be written; the one before it is then still there.
        FloatingPointError: If a loss term is not finite; names the term and the step.
    """
    plan = schedule or Schedule()
    where = device_of(device)
    if len(train) == 0:
        raise ValueError("train holds no images to learn from")
    description = f"{objective}, {plan}, seed={seed}, images={len(train)}"
    state = _saved_state(checkpoint, description)
    model.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]  # convolutions are faster so, on CPUs too
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.lr, weight_decay=plan.weight_decay)
    done, history = 0, History()
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, history = state["epoch"], History(**state["history"])
    drop_last = len(train) >= plan.batch_size
    steps_per_epoch = len(train) // plan.batch_size if drop_last else 1
    layers = (objective.layers or default_layers(model)) if objective.lambda_d > 0 else ()
    data = train.to(where) if isinstance(train, ImageData) else train
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[where] if where.type == "cuda" else []))
        features = stack.enter_context(capture(model, layers))
        if compiled:  # else the graph of an earlier training, made without hooks, may be taken for this one
            torch.compiler.reset()
        forward: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]
        bar = stack.enter_context(
            tqdm(
                total=plan.epochs * steps_per_epoch,
                initial=done * steps_per_epoch,
                unit="step",
                leave=False,
                disable=None if progress is None else not progress,
            )
        )
        for epoch in range(done, plan.epochs):
            started = time.perf_counter()
            draw = torch.manual_seed(seed * 1_000_003 + epoch).initial_seed()
            order = torch.Generator().manual_seed(draw)
            noise = torch.Generator(where).manual_seed(draw + 500_009)
            model.train()
            buffer: list[Tensor] = []
            total = torch.zeros(len(Terms._fields), dtype=torch.float64)
            step = 0
            for x, y in data.batches(
                plan.batch_size, shuffle=True, generator=order, augment=plan.augment, drop_last=drop_last
            ):
                x, y = x.to(where, memory_format=torch.channels_last), y.to(where)
                if epoch == done and step == 0:
                    _check_labels(model, x, train.labels)
                for group in optimizer.param_groups:
                    group["lr"] = plan.rate(epoch * steps_per_epoch + step, plan.epochs * steps_per_epoch)
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast(where.type, torch.bfloat16, enabled=amp):
                    terms = losses(forward, x, y, objective, generator=noise, features=features if layers else None)
                terms.total.backward(inputs=parameters)
                if plan.clip is not None:
                    nn.utils.clip_grad_norm_(parameters, plan.clip)
                optimizer.step()
                buffer.append(torch.stack([t.detach() for t in terms]))
                step += 1
                bar.update()
                if len(buffer) == 50 or where.type == "cpu":
                    total += _flush(buffer, epoch * steps_per_epoch + step)
            total += _flush(buffer, epoch * steps_per_epoch + step)
            for name, value in zip(Terms._fields, total / step, strict=True):
                history.terms[name].append(float(value))
            if validation is not None:
                history.validation_accuracy.append(evaluate(model, validation, device=device)["accuracy"])
            history.seconds.append(time.perf_counter() - started)
            bar.set_postfix(loss=f"{history.terms['total'][-1]:.3f}")
            if checkpoint is not None:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
                _save(checkpoint, {**state, "history": vars(history), "description": description})
            if after_epoch is not None:
                after_epoch(epoch + 1, history)
    return history


def _flush(buffer: list[Tensor], end: int) -> Tensor:
    """Sum of the buffered steps, after checking them; empties the buffer. `end` is the number of steps so far."""
    if not buffer:
        return torch.zeros(len(Terms._fields), dtype=torch.float64)
    _check(buffer, end - len(buffer))
    summed = torch.stack(buffer).double().sum(0).cpu()
    buffer.clear()
    return summed


@torch.no_grad()
def evaluate(
    model: nn.Module, data: ImageData | ImageStream, *, batch_size: int = 1000, device: str = "cpu"
) -> dict[str, float]:
    """Accuracy and cross-entropy on `data`, in evaluation mode; the model's flags are restored.

    Returns:
        ``{"accuracy": share in [0, 1], "cross_entropy": nats}``.

    Raises:
        ValueError: If `data` is empty or the device is absent.
    """
    where = device_of(device)
    if len(data) == 0:
        raise ValueError("data holds no images to evaluate on")
    right, loss = 0.0, 0.0
    with frozen_eval(model):
        for x, y in data.batches(batch_size):
            logits = model(x.to(where)).float()
            y = y.to(where)
            right += float((logits.argmax(1) == y).sum())
            loss += float(cross_entropy(logits, y, reduction="sum"))
    return {"accuracy": right / len(data), "cross_entropy": loss / len(data)}


__all__ = ["SCHEDULES", "History", "Schedule", "device_of", "evaluate", "fit"]
