"""Training: the same bits after an interruption, no trace left in the model, and what is said when it goes wrong."""

from __future__ import annotations

import copy
import errno
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from networks import flags
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

import sdecor.objective
import sdecor.training
from sdecor.config import AUGMENTATIONS, Objective, Schedule
from sdecor.data import load
from sdecor.images import ImageData, ImageStream
from sdecor.models import build
from sdecor.registers import METHODS
from sdecor.training import History, device_of, epochs_done, evaluate, fit

STANDARD, BOTH = Objective("standard"), Objective("saliencydecor-absolute")
SHORT = Schedule(epochs=3, batch_size=32)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load("digits", limit=96, image_size=12)


@pytest.fixture(scope="module")
def held_out() -> ImageData:
    return load("digits", split="val", limit=50, image_size=12)


def lenet(outputs: int = 10, channels: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return build("lenet", channels, outputs, 12)


def noisy(seed: int = 0, dropout: float = 0.5) -> nn.Module:
    """Batch norm and dropout: running statistics and draws that a checkpoint has to carry on."""
    torch.manual_seed(seed)
    first = (nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(*first, nn.Dropout(dropout), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def trained(
    data: ImageData, objective: Objective = BOTH, plan: Schedule = SHORT, model: nn.Module | None = None, **how: Any
) -> tuple[nn.Module, History]:
    model = model or lenet()
    return model, fit(model, data, objective, plan, **how)


def said(call: Callable[..., object], *args: Any, **how: Any) -> str:
    with pytest.raises(ValueError) as error:
        call(*args, **how)
    return str(error.value)


def bits(model: nn.Module) -> dict[str, list[int]]:
    return {name: v.contiguous().flatten().view(torch.uint8).tolist() for name, v in model.state_dict().items()}


@pytest.fixture
def steps() -> Iterator[list[float]]:
    """Norm of the gradient at every step of an optimizer."""
    norms: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        norms.append(float(nn.utils.get_total_norm(p.grad for p in optimizer.param_groups[0]["params"])))

    handle = register_optimizer_step_pre_hook(note)
    yield norms
    handle.remove()


class Interrupted(Exception):
    pass


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "method", "optimizer"),
    [(make, method, "adamw") for make in (lenet, noisy) for method in ("standard", "saliencydecor-signed")]
    + [(noisy, "saliencydecor-signed", "sgd")],
)
def test_the_same_bits_after_an_interruption_at_each_epoch(digits, held_out, tmp_path, make, method, optimizer) -> None:
    plan = replace(SHORT, augment=AUGMENTATIONS, optimizer=optimizer)
    how: dict[str, Any] = {"objective": Objective(method), "plan": plan, "seed": 7, "validation": held_out}
    whole, expected = trained(digits, model=make(), **how)
    for last in (1, 2, 3):
        path = tmp_path / f"{last}.pt"

        def stop(epoch: int, _history: object, last: int = last) -> None:
            if epoch == last:
                raise Interrupted

        with pytest.raises(Interrupted):
            trained(digits, model=make(), checkpoint=path, after_epoch=stop, **how)
        finished: list[int] = []
        noted = {"after_epoch": lambda epoch, _, finished=finished: finished.append(epoch)}
        again, history = trained(digits, model=make(), checkpoint=path, **noted, **how)
        assert finished == list(range(last + 1, 4))
        assert bits(again) == bits(whole)
        assert history.terms == expected.terms
        assert history.validation_accuracy == expected.validation_accuracy
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        path.unlink()


def test_what_ends_a_training_from_outside_costs_nothing(digits, tmp_path) -> None:
    """Even if epochs are so short that they share a checkpoint."""

    def stop(epoch: int, _history: object) -> None:
        if epoch == 2:
            raise Interrupted

    path = tmp_path / "c.pt"
    with pytest.raises(Interrupted):
        trained(digits, checkpoint=path, spare=1e6, after_epoch=stop)
    assert epochs_done(path) == 2
    finished: list[int] = []
    again, _ = trained(digits, checkpoint=path, spare=1e6, after_epoch=lambda epoch, _: finished.append(epoch))
    assert finished == [3] and bits(again) == bits(trained(digits)[0])
    path.write_bytes(b"damaged")
    assert epochs_done(path) == 0
    with pytest.raises(Interrupted):
        trained(digits, after_epoch=stop)  # without a checkpoint


def test_the_checkpoint_changes_nothing(digits, tmp_path) -> None:
    one, other = (trained(digits, checkpoint=path)[0] for path in (None, tmp_path / "c.pt"))
    assert bits(one) == bits(other)


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda c: c[: len(c) // 2], lambda c: c[:-1], flipped, lambda c: b"", lambda c: b"not a checkpoint"],
    ids=["half", "one byte less", "one bit flipped", "empty", "other content"],
)
def test_a_damaged_checkpoint_is_set_aside_and_training_starts_over(digits, tmp_path, caplog, damage) -> None:
    path, plan = tmp_path / "c.pt", Schedule(epochs=2, batch_size=32)
    whole, _ = trained(digits, plan=plan, checkpoint=path)
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    again, finished = lenet(), []
    with caplog.at_level(logging.WARNING, "sdecor"):
        fit(again, digits, BOTH, plan, checkpoint=path, after_epoch=lambda epoch, _: finished.append(epoch))
    assert caplog.messages == [
        f"checkpoint {path} is truncated or corrupt; set aside as c.pt.corrupt, training starts over"
    ]
    assert finished == [1, 2]
    assert bits(again) == bits(whole)
    assert (tmp_path / "c.pt.corrupt").read_bytes() == damaged


def test_what_was_set_aside_before_is_kept(digits, tmp_path) -> None:
    path, plan = tmp_path / "c.pt", Schedule(epochs=1, batch_size=32)
    for content in (b"first", b"second", b"third"):
        path.write_bytes(content)
        fit(lenet(), digits, STANDARD, plan, checkpoint=path)
    aside = {p.name: p.read_bytes() for p in tmp_path.glob("*.corrupt*")}
    assert aside == {"c.pt.corrupt": b"first", "c.pt.corrupt2": b"second", "c.pt.corrupt3": b"third"}


def test_a_checkpoint_of_another_run_is_refused(digits, tmp_path) -> None:
    path, plan = tmp_path / "c.pt", Schedule(epochs=1, batch_size=32)
    fit(lenet(), digits, BOTH, plan, checkpoint=path)
    before = path.read_bytes()
    assert said(fit, lenet(), digits, BOTH, plan, checkpoint=path, seed=1) == (
        f"checkpoint {path} is of another run, {BOTH}, {plan}, seed=0, images=96; delete it or name another file"
    )
    assert path.read_bytes() == before


# --- randomness -----------------------------------------------------------------------------------------------------


def test_a_seed_decides_everything_and_the_callers_draws_nothing(digits) -> None:
    models = [noisy() for _ in range(3)]
    for model, seed, draws in zip(models, (3, 3, 4), (0, 5, 0), strict=True):
        torch.rand(draws)
        fit(model, digits, BOTH, SHORT, seed=seed)
    assert bits(models[0]) == bits(models[1]) != bits(models[2])


def test_the_callers_random_state_is_left_alone(digits, held_out) -> None:
    torch.manual_seed(11)
    model = noisy()
    before = torch.get_rng_state()
    fit(model, digits, BOTH, replace(SHORT, augment=AUGMENTATIONS), validation=held_out)
    assert torch.equal(torch.get_rng_state(), before)


# --- options --------------------------------------------------------------------------------------------------------


def test_the_curves(digits, held_out) -> None:
    model, history = trained(digits, validation=held_out)
    assert list(history.terms) == ["classification", "consistency", "decorrelation", "total"]
    assert all(len(curve) == 3 for curve in (*history.terms.values(), history.validation_accuracy, history.seconds))
    assert history.validation_accuracy[-1] == evaluate(model, held_out)["accuracy"]
    assert model.training
    for parts in zip(*history.terms.values(), strict=True):
        assert parts[3] == pytest.approx(sum(parts[:3]), rel=1e-6)
    assert history.terms["classification"][-1] < history.terms["classification"][0]
    _, plain = trained(digits, STANDARD)
    assert plain.validation_accuracy == [] and list(plain.terms) == ["classification", "total"]


def test_a_last_smaller_batch_is_dropped_unless_it_is_the_only_one(digits, steps) -> None:
    fit(lenet(), digits, STANDARD, Schedule(epochs=2, batch_size=40))
    assert len(steps) == 2 * 2
    fit(lenet(), digits, STANDARD, Schedule(epochs=3, batch_size=1000))
    assert len(steps) == 4 + 3


def test_gradients_are_clipped_to_the_given_norm(digits, steps) -> None:
    models = [trained(digits, STANDARD, replace(SHORT, clip=clip))[0] for clip in (1e-2, None, 1e9)]
    clipped, free, high = steps[:9], steps[9:18], steps[18:]
    assert max(clipped) == pytest.approx(1e-2, rel=1e-3)
    assert min(free) > 0.1 and free == high
    assert bits(models[1]) == bits(models[2]) != bits(models[0])


def test_the_optimizer_gets_the_rate_of_the_schedule(digits) -> None:
    seen = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    fit(lenet(), digits, STANDARD, SHORT)
    handle.remove()
    assert seen == [SHORT.rate(step, 9) for step in range(9)]
    assert [Schedule(lr=2.0).rate(*at) for at in ((0, 1), (0, 2), (1, 2))] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("momentum", [0.8, 0.0])
def test_two_steps_of_sgd_by_hand(digits, momentum) -> None:
    """Softmax regression on all images at once: the gradient is (p - y) x, and Nesterov looks one step ahead."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 10, bias=False)).double()
    w, x = model[1].weight.detach().numpy().copy(), digits.normalized().double().flatten(1).numpy()
    right, velocity, losses = np.eye(10)[digits.labels.numpy()], np.zeros_like(w), []
    for _ in range(2):
        shares = np.exp(x @ w.T)
        shares /= shares.sum(1, keepdims=True)
        losses.append(-np.log((shares * right).sum(1)).mean())
        gradient = (shares - right).T @ x / len(x) + 0.01 * w
        velocity = momentum * velocity + gradient
        w -= 0.1 * (gradient + momentum * velocity)
    plan = Schedule(2, 96, "sgd", lr=0.1, momentum=momentum, weight_decay=0.01, shape="constant", clip=None)
    history = fit(model.float(), digits, STANDARD, plan)
    assert history.terms["classification"] == pytest.approx(losses, rel=1e-5)
    np.testing.assert_allclose(model[1].weight.detach(), w, rtol=1e-4, atol=1e-6)


def test_each_augmentation_reaches_the_training(digits) -> None:
    found = {name: bits(trained(digits, plan=replace(SHORT, augment=name))[0]) for name in ("", *AUGMENTATIONS)}
    assert len({str(values) for values in found.values()}) == 4
    for name in AUGMENTATIONS:
        assert bits(trained(digits, plan=replace(SHORT, augment=(name,)))[0]) == found[name]


def test_frozen_parameters_stay(digits) -> None:
    model = lenet()
    model.conv1.requires_grad_(False)
    before = copy.deepcopy(model)
    fit(model, digits, BOTH, SHORT)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed == {name for name, _ in model.named_parameters() if not name.startswith("conv1")}


def test_progress_is_shown_on_demand_only(digits, capsys) -> None:
    fit(lenet(), digits, STANDARD, SHORT)
    fit(lenet(), digits, STANDARD, SHORT, progress=False)
    assert capsys.readouterr() == ("", "")
    fit(lenet(), digits, STANDARD, SHORT, progress=True)
    assert "loss=" in capsys.readouterr().err


def test_bfloat16_autocast_keeps_losses_in_float32(digits, monkeypatch) -> None:
    seen = []

    def spied(model: nn.Module, x: Tensor, *args: object, **kwargs: object) -> object:
        terms = losses(model, x, *args, **kwargs)
        seen.append((model(x).dtype, {t.dtype for t in terms.values()}))
        return terms

    losses = sdecor.training.losses
    monkeypatch.setattr(sdecor.training, "losses", spied)
    model, history = trained(digits, amp=True)
    assert set(map(str, seen)) == {"(torch.bfloat16, {torch.float32})"}
    monkeypatch.undo()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    _, reference = trained(digits)
    assert history.terms["total"] == pytest.approx(reference.terms["total"], rel=0.02)
    assert history.terms["total"] != reference.terms["total"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler for the CPU")
def test_compiled_models_train_alike_and_share_their_graphs_with_those_of_the_same_hooks(digits) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    own, x = (v.to(memory_format=torch.channels_last) for v in (noisy(dropout=0), torch.rand(32, 1, 12, 12)))
    torch.compile(own)(x)  # somebody's own, which knows nothing of hooks
    plan = Schedule(epochs=2, batch_size=32)
    for seed, objective, graphs in (
        (0, STANDARD, 1),
        (1, BOTH, 2),  # of clean and of masked images; the graph without hooks gives no features
        (2, BOTH, 0),  # whose features must be those of this model
        (3, Objective("decorrelation", layers=("0", "2")), 1),
        (4, STANDARD, 0),
        (5, BOTH, 0),
        (6, Objective("decorrelation", layers=("0", "2")), 0),
    ):
        before = counters["stats"]["unique_graphs"]
        compiled, history = trained(digits, objective, plan, noisy(seed, dropout=0), compiled=True)
        assert counters["stats"]["unique_graphs"] - before == graphs, seed
        plain, expected = trained(digits, objective, plan, noisy(seed, dropout=0))
        for name, curve in history.terms.items():
            assert min(curve) > 0
            assert curve == pytest.approx(expected.terms[name], rel=1e-3, abs=1e-5), (seed, name)
        assert list(compiled.state_dict()) == list(plain.state_dict())
        for name in ("0.weight", "6.weight", "8.weight"):
            one, other = compiled.get_parameter(name), plain.get_parameter(name)
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=f"{seed} {name}")


def test_streamed_images_give_the_same_bits(digits, tmp_path) -> None:
    from PIL import Image

    for i, image in enumerate(digits.images[:40, 0].numpy()):
        folder = tmp_path / "train" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    memory, stream = load(str(tmp_path)), load(str(tmp_path), memory_limit=1, workers=0)
    assert isinstance(stream, ImageStream)
    plan = Schedule(epochs=2, batch_size=16)
    one, other = (trained(data, BOTH, plan, lenet(2, 3), validation=data)[0] for data in (memory, stream))
    assert bits(one) == bits(other)


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluation_agrees_with_scikit_learn(digits, held_out) -> None:
    model, _ = trained(digits, STANDARD, model=noisy())
    model[5].eval()  # a mode that differs from that of the whole model
    model[0].bias.requires_grad_(False)
    form, before = flags(model), bits(model)
    found = {size: evaluate(model, held_out, batch_size=size) for size in (7, 1000)}
    assert (flags(model), bits(model)) == (form, before)
    with torch.no_grad():
        shares = copy.deepcopy(model).eval()(held_out.normalized()).double().softmax(1).numpy()
    labels = held_out.labels.numpy()
    for result in found.values():
        assert result["accuracy"] == accuracy_score(labels, shares.argmax(1))
        assert result["cross_entropy"] == pytest.approx(log_loss(labels, shares, labels=range(10)), rel=1e-5)


# --- the model afterwards -------------------------------------------------------------------------------------------


def form(model: nn.Module) -> tuple[object, ...]:
    """Everything about a model but the values of its weights."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.rand(4, 1, 12, 12))
    return (
        [(name, tuple(v.shape), v.dtype) for name, v in model.state_dict().items()],
        [(name, type(m), sorted(k for k in vars(m) if k != "training")) for name, m in model.named_modules()],
        [len(getattr(m, hook)) for m in model.modules() for hook in hooks],
        [p.requires_grad for p in model.parameters()],
        {k: dict(v) for k, v in counter.get_flop_counts().items()},
        counter.get_total_flops(),
    )


@pytest.mark.parametrize("make", [lenet, noisy])
def test_no_method_leaves_a_trace_in_the_model(digits, make) -> None:
    plan = Schedule(epochs=1, batch_size=32)
    forms = {method: form(trained(digits, Objective(method), plan, make())[0]) for method in METHODS}
    assert forms["standard"][-1] > 0
    for method, found in forms.items():
        assert found == forms["standard"], method


# --- what is said when something is wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("batch_size", -1), ("lr", 0.0), ("lr", math.nan), ("weight_decay", -0.1), ("clip", 0.0)]
    + [("shape", "linear"), ("optimizer", "lion"), ("momentum", -0.1), ("augment", ("blur",))],
)
def test_impossible_schedules(name, value) -> None:
    message = said(Schedule, **{name: value})
    assert name.rstrip("s") in message and str(value[0] if name == "augment" else value) in message


def spoil(model: nn.Module) -> None:
    with torch.no_grad():
        model.fc3.weight[0, 0] = math.nan


def test_a_loss_that_is_not_finite_is_named_with_its_step(digits) -> None:
    model = lenet()
    with pytest.raises(FloatingPointError) as error:  # 96 / 32 steps an epoch
        fit(model, digits, BOTH, SHORT, after_epoch=lambda epoch, _: spoil(model) if epoch == 2 else None)
    assert str(error.value) == "loss term 'classification' became nan at step 6; lower lr or the weight of that term"
    with pytest.raises(FloatingPointError, match=r"^loss term '\w+' became (nan|inf) at step [1-8]; lower lr or the"):
        fit(lenet(), digits, BOTH, replace(SHORT, lr=1e20, clip=None))


def test_only_the_decorrelation_term_is_to_blame(digits, monkeypatch) -> None:
    monkeypatch.setattr(sdecor.objective, "penalized", lambda z, **_: z.sum() * math.inf)
    with pytest.raises(FloatingPointError, match=r"^loss term 'decorrelation' became -?(inf|nan) at step 0; "):
        fit(lenet(), digits, BOTH, SHORT)


def test_after_a_loss_that_is_not_finite_the_last_checkpoint_is_good(digits, tmp_path) -> None:
    model, path = lenet(), tmp_path / "c.pt"
    with pytest.raises(FloatingPointError):
        fit(model, digits, BOTH, SHORT, checkpoint=path, after_epoch=lambda *_: spoil(model))
    whole, _ = trained(digits)
    again, _ = trained(digits, checkpoint=path)
    assert bits(again) == bits(whole)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_asked_for_and_absent(digits, held_out) -> None:
    message = f"device='cuda' was asked for, but torch {torch.__version__} finds no CUDA GPU; use device='cpu'"
    assert said(device_of, "cuda") == message
    assert said(fit, lenet(), digits, BOTH, SHORT, device="cuda") == message
    assert said(evaluate, lenet(), held_out, device="cuda") == message
    assert device_of("auto") == torch.device("cpu")


def test_a_device_that_does_not_exist() -> None:
    assert said(device_of, "gpu") == "unknown device 'gpu'; use cpu, cuda (or cuda:0, cuda:1, ...) or auto"
    with pytest.raises(ValueError, match=r"^device='cuda:99' was asked for, but torch .* finds \w+ CUDA GPU; use devi"):
        device_of("cuda:99")


def test_a_batch_of_one(digits) -> None:
    one, few = Schedule(epochs=1, batch_size=1), digits.subset(3)
    _, history = trained(few, Objective("consistency-absolute"), one)
    assert math.isfinite(history.terms["total"][0])
    assert said(fit, lenet(), few, BOTH, one) == (
        "layer 'fc2' gives 1 sample of shape (1, 80); a covariance needs at least 2, so use a larger batch"
    )


def test_no_images(digits, held_out) -> None:
    assert said(fit, lenet(), digits.subset(0), BOTH, SHORT) == "train holds no images to learn from"
    assert said(evaluate, lenet(), held_out.subset(0)) == "data holds no images to evaluate on"


def test_labels_without_a_logit(digits) -> None:
    message = "labels must lie in 0..{}, as the model gives {} logits, got {}..9"
    assert said(fit, lenet(5), digits, BOTH, SHORT) == message.format(4, 5, 0)
    hidden = replace(digits, labels=digits.labels.clone().index_fill_(0, torch.tensor([3]), -100))
    assert said(fit, lenet(), hidden, BOTH, SHORT) == message.format(9, 10, -100)


def test_an_unknown_layer_and_a_group_size_that_does_not_divide(digits) -> None:
    assert said(fit, lenet(), digits, Objective(layers=("conv9",)), SHORT) == (
        "unknown layer 'conv9'; this model has: conv1, pool1, relu1, conv2, pool2, relu2, fc1, relu3, fc2, relu4, fc3"
    )
    assert said(fit, lenet(), digits, Objective(group_size=12), SHORT) == (
        "group_size=12 does not divide the 16 channels of layer 'conv2'; use one of 1, 2, 4, 8, 16"
    )


def test_a_full_disk_leaves_the_last_checkpoint(digits, tmp_path, monkeypatch) -> None:
    path, plan = tmp_path / "c.pt", Schedule(epochs=2, batch_size=32)

    def full(_descriptor: int) -> None:
        if path.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as error:
        fit(lenet(), digits, BOTH, plan, checkpoint=path)
    assert error.value.errno == errno.ENOSPC
    assert str(error.value) == (
        f"[Errno {errno.ENOSPC}] could not write {path}: {os.strerror(errno.ENOSPC)}; nothing was changed"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
    monkeypatch.undo()
    finished: list[int] = []
    again, _ = trained(digits, plan=plan, checkpoint=path, after_epoch=lambda epoch, _: finished.append(epoch))
    whole, _ = trained(digits, plan=plan)
    assert finished == [2]
    assert bits(again) == bits(whole)


def test_a_folder_in_place_of_the_checkpoint_is_an_error_of_the_system(digits, tmp_path) -> None:
    with pytest.raises(OSError):
        fit(lenet(), digits, BOTH, SHORT, checkpoint=tmp_path)
