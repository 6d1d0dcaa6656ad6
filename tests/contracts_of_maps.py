"""The promises of attributions and of measures: what `contracts.check` makes of them."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from maps import trained
from networks import F64, Counting, images, network
from promises import keeps, promise, refuses, same, unchanged
from torch import Tensor, nn

from sdecor.attribution import attribute
from sdecor.measures import Case, available, evaluate, needs
from sdecor.models import build
from sdecor.registers import Attribution, Measure
from sdecor.saliency import logits_and_gradient

# --- attributions ---------------------------------------------------------------------------------------------------


def nearly(entry: Attribution, one: Tensor, other: Tensor, promised: str) -> None:
    keeps(entry, torch.allclose(one, other, rtol=1e-5, atol=1e-8), promised)


@promise("attribution")
def attribution_is_called_as_all_are(entry: Attribution, **options: Any) -> None:
    keeps(entry, entry.parameters[:4] == ("model", "x", "y", "rows"), "its parameters are model, x, y, rows, options")
    keeps(entry, set(entry.parameters[4:]) == set(entry.options), "all others are keyword-only: its options")
    said = [f"`{name}`" in entry.about for name in entry.options if name not in ("baseline", "segments")]
    keeps(entry, all(said), "its docstring names each of its options in backticks")


def attribution_works_on(entry: Attribution, model: nn.Module, x: Tensor, **options: Any) -> None:
    """The shape, the type, and nothing left behind, on a model of any kind; `x` is set to require a gradient."""
    model.train(), x.requires_grad_()
    with unchanged(entry, x, model=model):
        result = attribute(model, x, method=entry.name, **options)
    keeps(entry, result.shape == (x.shape if entry.per_channel else x[:, 0].shape), "its shape is as it says")
    keeps(entry, result.dtype == x.dtype and result.device == x.device, "type and device are those of the images")
    keeps(entry, not result.requires_grad, "it is detached")
    keeps(entry, result.isfinite().all() and (result.flatten(1).abs().amax(1) > 0).all(), "it says something")


@promise("attribution")
def attribution_leaves_nothing_behind(entry: Attribution, **options: Any) -> None:
    for name in ("lenet", "cnn_bn"):
        attribution_works_on(entry, build(name, 3, 4, 16), images(2, dtype=torch.float32), **options)
    model, x = network(), images(2)
    expected = attribute(model, x, method=entry.name, **options)
    with torch.no_grad():
        same(entry, attribute(model, x, method=entry.name, **options), expected, "torch.no_grad does not matter")


@promise("attribution")
def attribution_of_an_image_is_its_own(entry: Attribution, **options: Any) -> None:
    for name in ("lenet", "cnn_bn"):
        model, x = network(name), images(5)
        rows = {"baseline": x.flip(0) / 3} if "baseline" in entry.options else {}
        together = attribute(model, x, method=entry.name, **options, **rows)
        keeps(entry, together.dtype == F64, "float64 stays float64")
        order = torch.tensor([3, 0, 4])
        rows = {key: value[order] for key, value in rows.items()}
        for size in (1, 2, 7):
            part = attribute(model, x[order], method=entry.name, batch_size=size, **options, **rows)
            nearly(entry, part, together[order], f"neither neighbours nor order nor batch_size={size} matter")
        keeps(entry, not torch.allclose(together[0], together[1]), "other images have other maps")


@promise("attribution")
def attribution_keeps_to_the_rows_of_a_pass(entry: Attribution, **options: Any) -> None:
    model, rows = network(), []
    model.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    attribute(model, images(5), method=entry.name, batch_size=2, **options)
    keeps(entry, rows and max(rows) <= 2, f"no forward pass has more rows than batch_size=2, one had {max(rows)}")


@promise("attribution")
def attribution_is_decided_by_its_seed(entry: Attribution, **options: Any) -> None:
    model, x = network(), images(1).expand(3, -1, -1, -1)
    first, again = (attribute(model, x, method=entry.name, seed=4, **options) for _ in range(2))
    same(entry, first, again, "the same seed gives the same bits")
    same(entry, first[0], first[2], "draws are common to all images", 1e-9)


@promise("attribution")
def attribution_explains_the_predicted_class_unless_told(entry: Attribution, **options: Any) -> None:
    model, x = network(), images(2)
    predicted = logits_and_gradient(model, x)[0].argmax(1)
    given = attribute(model, x, predicted, entry.name, **options)
    same(entry, attribute(model, x, method=entry.name, **options), given, "the class explained is the predicted one")
    other = attribute(model, x, ((predicted + 1) % 5).to(torch.int16), entry.name, **options)
    keeps(entry, not torch.allclose(other, given), "another class has another map")


@promise("attribution")
def attribution_switches_activations_in_place_off_and_on_again(entry: Attribution, **options: Any) -> None:
    body = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(784, 3)]
    model = nn.Sequential(nn.ReLU(inplace=True), *body).double()
    x, places = images(2), (model[0], model[3])
    kept, inside = x.clone(), []
    model.register_forward_hook(lambda *_: inside.append([m.inplace for m in places]))
    result = attribute(model, x, method=entry.name, **options)
    same(entry, x, kept, "images are not modified by activations in place")
    keeps(entry, not any(sum(inside, [])) and all(m.inplace for m in places), "in-place activations are off meanwhile")
    for m in places:
        m.inplace = False
    same(entry, attribute(model, x, method=entry.name, **options), result, "in-place activations change nothing")
    keeps(entry, not any(m.inplace for m in places), "what was off stays off")


@promise("attribution")
def attribution_restores_all_when_the_model_raises(entry: Attribution, **options: Any) -> None:
    model, x = Counting(), torch.randn(2, 3, 4, 4)
    model.head.bias.requires_grad_(False)
    model.drop.eval()
    model.inplace = model.broken = True
    with unchanged(entry, x, model=model), pytest.raises(RuntimeError, match="broken on purpose"):
        attribute(model, x, method=entry.name)
    keeps(entry, model.inplace, "flags are restored when the model raises")


@promise("attribution")
def attribution_says_what_it_cannot_take(entry: Attribution, **options: Any) -> None:
    model, x = network(), images(2)
    for wrong, words in (
        ({"x": x[0]}, ("(B, C, H, W)", "(3, 16, 16)")),
        ({"x": x.byte()}, ("floating", "uint8")),
        ({"x": x[:0]}, ("not empty",)),
        ({"x": x / 0}, ("x has NaN or infinity",)),
        ({"target": torch.tensor([0, 5])}, ("target must lie in 0 to 4, got 5",)),
        ({"target": torch.zeros(2)}, ("target", "float32")),
        ({"batch_size": 0}, ("batch_size must be at least 1, got 0",)),
        ({"no_such_option": 1}, (f"attribution '{entry.name}' has no option 'no_such_option'",)),
    ):
        call: dict[str, Any] = {"model": model, "x": x, "method": entry.name, **options, **wrong}
        refuses(entry, lambda call=call: attribute(**call), *words)


def attribution_is_the_same_on_a_gpu(entry: Attribution, **options: Any) -> None:
    """To be called where there is one."""
    model, x = network(), images(3)
    expected, state = attribute(model, x, method=entry.name, **options), torch.cuda.get_rng_state()
    result = attribute(model.cuda(), x.cuda(), method=entry.name, **options)
    keeps(entry, result.device.type == "cuda", "the result is on the device of the images")
    keeps(entry, torch.allclose(result.cpu(), expected, rtol=1e-3, atol=1e-5), "a GPU gives what a CPU gives")
    same(entry, torch.cuda.get_rng_state(), state, "the GPU's random state stays as it is")


# --- measures -------------------------------------------------------------------------------------------------------


def case(count: int = 5, **changes: Any) -> Case:
    """Gradient maps of digits that a small network knows, with all that a measure may ask for."""
    model, x, _ = trained()
    x = x[:count]
    logits, maps = logits_and_gradient(model, x)
    return replace(
        Case(
            attribution=maps,
            mask=x[:, 0] > 0,
            model=model,
            images=x,
            target=logits.argmax(1),
            explain=lambda net, images, target: logits_and_gradient(net, images, target)[1],
            samples=2,
        ),
        **changes,
    )


def value_of(entry: Measure, case: Case) -> Tensor:
    value = evaluate(case, [entry.name])[entry.name]
    count = len(case.attribution)
    keeps(entry, isinstance(value, Tensor) and value.shape == (count,), "it gives one number per image, (B,)")
    keeps(entry, value.dtype == F64 and not value.requires_grad, "these are float64, detached")
    return value


def pick(case: Case, rows: list[int], **changes: Any) -> Case:
    """The case of some of the images."""
    parts = {name: getattr(case, name)[rows] for name in ("attribution", "mask", "images", "target")}
    return replace(case, **parts, **changes)


@promise("measure")
def measure_says_what_is_better_and_its_range(entry: Measure) -> None:
    keeps(entry, entry.better in ("higher", "lower") and entry.family, "it has a direction and a family")
    keeps(entry, entry.low < entry.high, "its range is not empty")
    arrow = {"higher": "↑", "lower": "↓"}[entry.better]
    keeps(entry, entry.heading == f"{entry.title} {arrow}", "its heading has an arrow")


@promise("measure")
def measure_lies_in_its_range_or_is_nan(entry: Measure) -> None:
    plain, pixel = case(), torch.zeros(5, 8, 8)
    pixel[:, 3, 4] = 1.0
    maps = {"gradients": plain.attribution, "noise": torch.rand(5, 8, 8), "one pixel": pixel, "signed": pixel - 0.5}
    maps |= {"constant": torch.ones(5, 8, 8), "large": torch.randn(5, 1, 8, 8).exp() * 1e6, "zeros": 0 * pixel}
    for name, attribution in maps.items():
        value = value_of(entry, replace(plain, attribution=attribution))
        known = value[~value.isnan()]
        inside = (known >= entry.low - 1e-9) & (known <= entry.high + 1e-9)
        keeps(entry, inside.all(), f"it lies in [{entry.low:g}, {entry.high:g}] for maps of {name}, it is {value}")
        keeps(entry, len(known) or name != "gradients", "it is defined for some image")


@promise("measure")
def measure_of_an_image_is_its_own(entry: Measure) -> None:
    plain = case()
    whole, order = value_of(entry, plain), [3, 0, 4]
    # ranks of nearly equal pixels follow rounding
    tolerance = 1e-2 if entry.family == "sanity" else 1e-4
    for size in (1, 2, 256):
        part = value_of(entry, pick(plain, order, batch_size=size))
        same(entry, part, whole[order], f"neither neighbours nor order nor batch_size={size} matter", tolerance)
    spoilt = plain.attribution.clone()
    spoilt[1] = 0
    others = value_of(entry, replace(plain, attribution=spoilt))[[0, 2, 3, 4]]
    same(entry, others, whole[[0, 2, 3, 4]], "a map of zeros does not matter to the others", tolerance)


@promise("measure")
def measure_takes_every_precision(entry: Measure) -> None:
    plain = case()
    assert plain.model is not None and plain.images is not None
    expected = value_of(entry, plain)
    for dtype, most in ((torch.float64, 1e-2), (torch.bfloat16, 0.15), (torch.float16, 0.1)):
        mixed = replace(plain, attribution=plain.attribution.to(dtype))
        rounded = replace(mixed, model=copy.deepcopy(plain.model).to(dtype), images=plain.images.to(dtype))
        for what, other in (("maps", mixed), ("all", rounded)):
            value = value_of(entry, other)
            off = (value - expected).abs() / expected.abs().clamp(min=1)
            if dtype != F64 or what == "maps":  # of double precision all random numbers are others
                keeps(entry, (off <= most).all(), f"{what} in {dtype} give nearly what float32 gives, not {value}")


@promise("measure")
def measure_changes_nothing_and_draws_by_its_seed(entry: Measure) -> None:
    plain = case()
    assert plain.model is not None and plain.images is not None and plain.target is not None
    plain.model.train()
    try:
        with unchanged(entry, plain.attribution, plain.mask, plain.images, plain.target, model=plain.model):
            first = value_of(entry, plain)
        same(entry, value_of(entry, replace(plain)), first, "the same seed gives the same bits")
    finally:
        plain.model.eval()


@promise("measure")
def measure_asks_for_no_more_rows_than_a_batch(entry: Measure) -> None:
    rows: list[int] = []

    def counted(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        rows.append(len(images))
        return logits_and_gradient(model, images, target)[1]

    plain = case(explain=counted, batch_size=2)
    assert plain.model is not None
    handle = plain.model.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    try:
        value_of(entry, plain)
    finally:
        handle.remove()
    keeps(entry, max(rows, default=0) <= 2, f"no pass has more rows than batch_size=2, one had {max(rows, default=0)}")


@promise("measure")
def measure_needs_what_it_says(entry: Measure) -> None:
    plain = case(2)
    needed = {part: getattr(plain, part) for part in needs(entry.name)}
    least = Case(attribution=plain.attribution, samples=1, **needed)
    keeps(entry, entry.name in available(least), "it is available where there is what it needs")
    value_of(entry, least)
    for part in needed:
        without = replace(least, **{part: None})
        keeps(entry, entry.name not in available(without), f"it is not available without {part}")
        words = f"measure '{entry.name}' needs {part}, which this case does not have"
        refuses(entry, lambda without=without: evaluate(without, [entry.name]), words)


@promise("measure")
def measure_says_what_it_cannot_take(entry: Measure) -> None:
    needed, plain = needs(entry.name), case(3)
    refuses(entry, lambda: replace(plain, attribution=plain.attribution * math.nan), "attribution has NaN")
    for part in ("attribution", "mask", "images", "target"):
        for other in (getattr(plain, part).numpy(), getattr(plain, part).tolist()):
            words = f"{part} must be a tensor, got {type(other).__name__}; pass torch.as_tensor({part})"
            refuses(entry, lambda part=part, other=other: replace(plain, **{part: other}), words)
    refuses(entry, lambda: replace(plain, images=torch.zeros(3, 1, 5, 8)), "images have shape")
    wrong: list[tuple[dict[str, Any], str]] = []
    if "mask" in needed:
        wrong += [({"mask": torch.ones(3, 7, 8)}, "mask"), ({"mask": torch.full((3, 8, 8), 0.5)}, "mask")]
    if "target" in needed:
        wrong += [({"target": torch.full((3,), 10)}, "target must lie in 0"), ({"target": torch.tensor([1])}, "target")]
    for change, words in wrong:
        refuses(entry, lambda change=change: evaluate(replace(plain, **change), [entry.name]), words)
