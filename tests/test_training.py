"""Training: the same bits after an interruption, no trace left in the model, and what is said when it goes wrong."""

from __future__ import annotations

import copy
import logging
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from sdecor.data import ImageData, load
from sdecor.images import ImageStream
from sdecor.models import build
from sdecor.objective import METHODS, Objective
from sdecor.training import SCHEDULES, Schedule, device_of, evaluate, fit

BOTH = Objective.of("saliencydecor-absolute")
SHORT = Schedule(epochs=3, batch_size=32)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load("digits", limit=96, image_size=12)


@pytest.fixture(scope="module")
def held_out() -> ImageData:
    return load("digits", split="val", limit=50, image_size=12)


def lenet(outputs: int = 10, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build("lenet", 1, outputs, 12)


def noisy(outputs: int = 10) -> nn.Module:
    """Batch norm and dropout: running statistics and draws that a checkpoint has to carry on."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(64, 16),
        nn.ReLU(),
        nn.Linear(16, outputs),
    )


def bits(model: nn.Module) -> dict[str, list[int]]:
    return {name: v.contiguous().flatten().view(torch.uint8).tolist() for name, v in model.state_dict().items()}


@pytest.fixture
def steps() -> Iterator[list[float]]:
    """Norm of the gradient at every step of an optimizer."""
    norms: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [
            p.grad.flatten() for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norms.append(float(torch.cat(gradients).norm()))

    handle = register_optimizer_step_pre_hook(note)
    yield norms
    handle.remove()


class Interrupted(Exception):
    pass


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lenet, noisy])
@pytest.mark.parametrize("method", ["standard", "saliencydecor-signed"])
def test_the_same_bits_after_an_interruption_at_each_epoch(digits, held_out, tmp_path, make, method) -> None:
    plan, objective = replace(SHORT, augment=True), Objective.of(method)
    whole = make()
    expected = fit(whole, digits, objective, plan, seed=7, validation=held_out)
    for last in (1, 2, 3):
        path = tmp_path / f"{last}.pt"

        def stop(epoch: int, _history: object, last: int = last) -> None:
            if epoch == last:
                raise Interrupted

        with pytest.raises(Interrupted):
            fit(make(), digits, objective, plan, seed=7, validation=held_out, checkpoint=path, after_epoch=stop)
        again, finished = make(), []
        history = fit(
            again,
            digits,
            objective,
            plan,
            seed=7,
            validation=held_out,
            checkpoint=path,
            after_epoch=lambda epoch, _, finished=finished: finished.append(epoch),
        )
        assert finished == list(range(last + 1, 4))
        assert bits(again) == bits(whole)
        assert history.terms == expected.terms
        assert history.validation_accuracy == expected.validation_accuracy
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        path.unlink()


def test_the_checkpoint_changes_nothing(digits, tmp_path) -> None:
    one, other = lenet(), lenet()
    fit(one, digits, BOTH, SHORT)
    fit(other, digits, BOTH, SHORT, checkpoint=tmp_path / "c.pt")
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
    whole = lenet()
    fit(whole, digits, BOTH, plan, checkpoint=path)
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
        fit(lenet(), digits, Objective.of("standard"), plan, checkpoint=path)
    aside = {p.name: p.read_bytes() for p in tmp_path.glob("*.corrupt*")}
    assert aside == {"c.pt.corrupt": b"first", "c.pt.corrupt2": b"second", "c.pt.corrupt3": b"third"}


def test_a_checkpoint_of_another_run_is_refused(digits, tmp_path) -> None:
    path, plan = tmp_path / "c.pt", Schedule(epochs=1, batch_size=32)
    fit(lenet(), digits, BOTH, plan, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ValueError) as error:
        fit(lenet(), digits, BOTH, plan, checkpoint=path, seed=1)
    assert str(error.value) == (
        f"checkpoint {path} is of another run, {BOTH}, {plan}, seed=0, images=96; delete it or name another file"
    )
    assert path.read_bytes() == before


# --- randomness -----------------------------------------------------------------------------------------------------


def test_a_seed_decides_everything_and_the_callers_draws_nothing(digits) -> None:
    models = []
    for seed, draws in ((3, 0), (3, 5), (4, 0)):
        models.append(noisy())
        torch.rand(draws)
        fit(models[-1], digits, BOTH, SHORT, seed=seed)
    assert bits(models[0]) == bits(models[1]) != bits(models[2])


def test_the_callers_random_state_is_left_alone(digits, held_out) -> None:
    torch.manual_seed(11)
    model = noisy()
    before = torch.get_rng_state()
    fit(model, digits, BOTH, replace(SHORT, augment=True), validation=held_out)
    assert torch.equal(torch.get_rng_state(), before)


# --- options --------------------------------------------------------------------------------------------------------


def test_the_curves(digits, held_out) -> None:
    model = lenet()
    history = fit(model, digits, BOTH, SHORT, validation=held_out)
    assert list(history.terms) == ["classification", "consistency", "decorrelation", "total"]
    assert all(len(curve) == 3 for curve in (*history.terms.values(), history.validation_accuracy, history.seconds))
    assert history.validation_accuracy[-1] == evaluate(model, held_out)["accuracy"]
    assert model.training
    for parts in zip(*history.terms.values(), strict=True):
        assert parts[3] == pytest.approx(sum(parts[:3]), rel=1e-6)
    assert history.terms["classification"][-1] < history.terms["classification"][0]
    assert fit(lenet(), digits, Objective.of("standard"), SHORT).validation_accuracy == []


def test_a_last_smaller_batch_is_dropped_unless_it_is_the_only_one(digits, steps) -> None:
    fit(lenet(), digits, Objective.of("standard"), Schedule(epochs=2, batch_size=40))
    assert len(steps) == 2 * 2
    fit(lenet(), digits, Objective.of("standard"), Schedule(epochs=3, batch_size=1000))
    assert len(steps) == 4 + 3


def test_gradients_are_clipped_to_the_given_norm(digits, steps) -> None:
    models = [lenet() for _ in range(3)]
    for model, clip in zip(models, (1e-2, None, 1e9), strict=True):
        fit(model, digits, Objective.of("standard"), replace(SHORT, clip=clip))
    clipped, free, high = steps[:9], steps[9:18], steps[18:]
    assert max(clipped) == pytest.approx(1e-2, rel=1e-3)
    assert min(free) > 0.1
    assert free == high
    assert bits(models[1]) == bits(models[2]) != bits(models[0])


def test_the_learning_rate_by_hand() -> None:
    cosine = Schedule(lr=2.0)
    assert [cosine.rate(step, 100) for step in (0, 1, 4)] == pytest.approx([0.4, 0.8, 2.0])  # 5 % of 100 steps up
    assert cosine.rate(5, 100) == 2.0
    assert cosine.rate(5 + 95 // 5, 100) == pytest.approx(1 + math.cos(math.pi / 5))
    assert cosine.rate(99, 100) == pytest.approx(1 + math.cos(math.pi * 94 / 95))
    assert [cosine.rate(step, 2) for step in (0, 1)] == [2.0, 2.0]
    assert cosine.rate(0, 1) == 2.0
    assert [Schedule(lr=2.0, shape="constant").rate(step, 100) for step in (0, 50, 99)] == [2.0, 2.0, 2.0]


def test_the_optimizer_gets_that_rate(digits, monkeypatch) -> None:
    seen = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    fit(lenet(), digits, Objective.of("standard"), SHORT)
    handle.remove()
    assert seen == [SHORT.rate(step, 9) for step in range(9)]


def test_frozen_parameters_stay(digits) -> None:
    model = lenet()
    model.conv1.requires_grad_(False)
    before = copy.deepcopy(model)
    fit(model, digits, BOTH, SHORT)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed == {name for name, _ in model.named_parameters() if not name.startswith("conv1")}


def test_progress_is_shown_on_demand_only(digits, capsys) -> None:
    fit(lenet(), digits, Objective.of("standard"), SHORT)
    fit(lenet(), digits, Objective.of("standard"), SHORT, progress=False)
    assert capsys.readouterr() == ("", "")
    fit(lenet(), digits, Objective.of("standard"), SHORT, progress=True)
    assert "loss=" in capsys.readouterr().err


def test_bfloat16_autocast_keeps_losses_in_float32(digits, monkeypatch) -> None:
    import sdecor.training

    seen = []

    def spied(model: nn.Module, x: Tensor, *args: object, **kwargs: object) -> object:
        terms = losses(model, x, *args, **kwargs)
        seen.append((model(x).dtype, {t.dtype for t in terms}))
        return terms

    losses = sdecor.training.losses
    monkeypatch.setattr(sdecor.training, "losses", spied)
    model, exact = lenet(), lenet()
    history = fit(model, digits, BOTH, SHORT, amp=True)
    assert set(map(str, seen)) == {"(torch.bfloat16, {torch.float32})"}
    monkeypatch.undo()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    reference = fit(exact, digits, BOTH, SHORT)
    assert history.terms["total"] == pytest.approx(reference.terms["total"], rel=0.02)
    assert history.terms["total"] != reference.terms["total"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler for the CPU")
def test_a_compiled_model_trains_alike(digits) -> None:
    plain, compiled = lenet(), lenet()
    plan = Schedule(epochs=2, batch_size=32)
    expected = fit(plain, digits, BOTH, plan)
    # compiled without hooks: the next training must not take its graph, in which no features are captured
    fit(lenet(), digits, Objective.of("standard"), Schedule(epochs=1, batch_size=32), compiled=True)
    history = fit(compiled, digits, BOTH, plan, compiled=True)
    assert min(history.terms["decorrelation"]) > 0
    assert min(history.terms["consistency"]) > 0
    for name, curve in history.terms.items():
        assert curve == pytest.approx(expected.terms[name], rel=1e-3, abs=1e-6), name
    assert list(compiled.state_dict()) == list(plain.state_dict())
    one, other = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (compiled, plain))
    # decorrelation divides by small deviations: a change of 1e-7 at the start, too, moves single weights by 1e-3
    assert (~torch.isclose(one, other, rtol=1e-2, atol=1e-3)).float().mean() < 1e-3


def test_streamed_images_give_the_same_bits(digits, tmp_path) -> None:
    from PIL import Image

    for i, image in enumerate(digits.images[:40, 0].numpy()):
        folder = tmp_path / "train" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    memory, stream = load(str(tmp_path)), load(str(tmp_path), memory_limit=1, workers=0)
    assert isinstance(stream, ImageStream)
    models = []
    for data in (memory, stream):
        torch.manual_seed(0)
        models.append(build("lenet", 3, 2, 12))
        fit(models[-1], data, BOTH, Schedule(epochs=2, batch_size=16), validation=data)
    assert bits(models[0]) == bits(models[1])


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluation_agrees_with_scikit_learn(digits, held_out) -> None:
    model = noisy()
    fit(model, digits, Objective.of("standard"), SHORT)
    model[5].eval()  # a mode that differs from that of the whole model
    model[0].bias.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    before = bits(model)
    found = {size: evaluate(model, held_out, batch_size=size) for size in (7, 1000)}
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert bits(model) == before
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
    x = torch.rand(4, 1, 12, 12)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
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
    forms = {}
    for method in METHODS:
        model = make()
        fit(model, digits, Objective.of(method), Schedule(epochs=1, batch_size=32))
        forms[method] = form(model)
    assert forms["standard"][-1] > 0
    for method, found in forms.items():
        assert found == forms["standard"], method


# --- what is said when something is wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"lr": 0.0}, "lr must be finite and positive, got 0.0"),
        ({"lr": math.nan}, "lr must be finite and positive, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and not negative, got -0.1"),
        ({"clip": 0.0}, "clip must be positive, or None to leave the gradient as it is, got 0.0"),
        ({"shape": "linear"}, "unknown schedule 'linear'; known: cosine, constant"),
    ],
)
def test_impossible_schedules(settings, message) -> None:
    assert SCHEDULES == ("cosine", "constant")
    with pytest.raises(ValueError) as error:
        Schedule(**settings)
    assert str(error.value) == message


def test_a_loss_that_is_not_finite_is_named_with_its_step(digits) -> None:
    def poison(epoch: int, _history: object) -> None:
        if epoch == 2:
            with torch.no_grad():
                model.fc3.weight[0, 0] = math.nan

    model = lenet()
    with pytest.raises(FloatingPointError) as error:
        fit(model, digits, BOTH, SHORT, after_epoch=poison)
    assert str(error.value) == (
        "loss term 'classification' became nan at step 6; lower lr or the weight of that term"  # 96 / 32 steps an epoch
    )
    with pytest.raises(FloatingPointError, match=r"^loss term '\w+' became (nan|inf) at step [1-8]; lower lr or the"):
        fit(lenet(), digits, BOTH, replace(SHORT, lr=1e20, clip=None))


def test_only_the_decorrelation_term_is_to_blame(digits, monkeypatch) -> None:
    import sdecor.objective

    monkeypatch.setattr(sdecor.objective, "decorrelation", lambda z, **_: z.sum() * math.inf)
    with pytest.raises(FloatingPointError, match=r"^loss term 'decorrelation' became -?(inf|nan) at step 0; "):
        fit(lenet(), digits, BOTH, SHORT)


def test_after_a_loss_that_is_not_finite_the_last_checkpoint_is_good(digits, tmp_path) -> None:
    path = tmp_path / "c.pt"

    def poison(epoch: int, _history: object) -> None:
        with torch.no_grad():
            model.fc3.weight[0, 0] = math.nan

    model, whole, again = lenet(), lenet(), lenet()
    with pytest.raises(FloatingPointError):
        fit(model, digits, BOTH, SHORT, checkpoint=path, after_epoch=poison)
    fit(whole, digits, BOTH, SHORT)
    fit(again, digits, BOTH, SHORT, checkpoint=path)
    assert bits(again) == bits(whole)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_asked_for_and_absent(digits, held_out) -> None:
    message = f"device='cuda' was asked for, but torch {torch.__version__} finds no CUDA GPU; use device='cpu'"
    for call in (
        lambda: device_of("cuda"),
        lambda: fit(lenet(), digits, BOTH, SHORT, device="cuda"),
        lambda: evaluate(lenet(), held_out, device="cuda"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message
    assert device_of("auto") == torch.device("cpu")


def test_a_device_that_does_not_exist() -> None:
    with pytest.raises(ValueError) as error:
        device_of("gpu")
    assert str(error.value) == "unknown device 'gpu'; use cpu, cuda (or cuda:0, cuda:1, ...) or auto"
    with pytest.raises(ValueError, match=r"^device='cuda:99' was asked for, but torch .* finds \w+ CUDA GPU; use devi"):
        device_of("cuda:99")


def test_a_batch_of_one(digits) -> None:
    one = Schedule(epochs=1, batch_size=1)
    few = digits.subset(3)
    history = fit(lenet(), few, Objective.of("consistency-absolute"), one)
    assert math.isfinite(history.terms["total"][0])
    with pytest.raises(ValueError) as error:
        fit(lenet(), few, BOTH, one)
    assert str(error.value) == (
        "layer 'fc2' gives 1 sample of shape (1, 80); a covariance needs at least 2, so use a larger batch"
    )


def test_no_images(digits, held_out) -> None:
    with pytest.raises(ValueError) as error:
        fit(lenet(), digits.subset(0), BOTH, SHORT)
    assert str(error.value) == "train holds no images to learn from"
    with pytest.raises(ValueError) as error:
        evaluate(lenet(), held_out.subset(0))
    assert str(error.value) == "data holds no images to evaluate on"


def test_labels_without_a_logit(digits) -> None:
    with pytest.raises(ValueError) as error:
        fit(lenet(5), digits, BOTH, SHORT)
    assert str(error.value) == "labels must lie in 0..4, as the model gives 5 logits, got 0..9"
    hidden = replace(digits, labels=digits.labels.clone().index_fill_(0, torch.tensor([3]), -100))
    with pytest.raises(ValueError) as error:
        fit(lenet(), hidden, BOTH, SHORT)
    assert str(error.value) == "labels must lie in 0..9, as the model gives 10 logits, got -100..9"


def test_an_unknown_layer(digits) -> None:
    with pytest.raises(ValueError) as error:
        fit(lenet(), digits, Objective(layers=("conv9",)), SHORT)
    assert str(error.value) == (
        "unknown layer 'conv9'; this model has: conv1, pool1, relu1, conv2, pool2, relu2, fc1, relu3, fc2, relu4, fc3"
    )


def test_a_group_size_that_does_not_divide(digits) -> None:
    with pytest.raises(ValueError) as error:
        fit(lenet(), digits, Objective(group_size=12), SHORT)
    assert str(error.value) == (
        "group_size=12 does not divide the 16 channels of layer 'conv2'; use one of 1, 2, 4, 8, 16"
    )


def test_a_full_disk_leaves_the_last_checkpoint(digits, tmp_path, monkeypatch) -> None:
    import errno
    import os

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
    again, whole = lenet(), lenet()
    finished: list[int] = []
    fit(again, digits, BOTH, plan, checkpoint=path, after_epoch=lambda epoch, _: finished.append(epoch))
    fit(whole, digits, BOTH, plan)
    assert finished == [2]
    assert bits(again) == bits(whole)


def test_a_folder_in_place_of_the_checkpoint_is_an_error_of_the_system(digits, tmp_path) -> None:
    with pytest.raises(OSError):
        fit(lenet(), digits, BOTH, SHORT, checkpoint=Path(tmp_path))
