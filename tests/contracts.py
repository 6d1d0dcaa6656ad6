"""What every entry of a register keeps, of this project or of your own.

With ``tests`` on ``PYTHONPATH``::

    from contracts import check
    check(PENALTIES["mine"])

makes all checks that there are of its kind, one function each, and raises AssertionError that says what is broken, and
whose. What stands behind the entry is what slows it down or sets it apart: options of an attribution or a data set that
make it quick, ``exact=False`` for a penalty that holds a part of its value fixed, ``size`` of the images that a model
can take.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import contracts_of_maps  # noqa: F401 - it adds those of attributions and measures
import torch
from maps import flags
from promises import CHECKS, keeps, promise, refuses, same, seed, unchanged
from torch import Tensor, nn

from sdecor import plotting
from sdecor.config import Objective
from sdecor.data import SPLITS, ImageData, load
from sdecor.decorrelation import decorrelation
from sdecor.masking import replacement
from sdecor.models import build, default_layers
from sdecor.objective import Step, capture, losses
from sdecor.registers import Between, Dataset, Entry, Method, OneOf, Option, Register, Term
from sdecor.saliency import logits_and_gradient

F64 = torch.float64


def check(entry: Entry, **how: Any) -> None:
    """Make all checks of an entry's kind."""
    for one in CHECKS[""]:
        one(entry)
    for one in CHECKS[entry.kind]:
        one(entry, **how)


def check_register(register: Register[Any]) -> None:
    """No two entries have one label, or one colour and dash; for methods, which forest plots show, not one colour."""
    parts = {"label": ("label",), "colour and dash": ("color", "linestyle")}
    if register.kind == "method":
        parts["colour"] = ("color",)
    for what, keys in parts.items():
        seen: dict[str, str] = {}
        for name, entry in register.items():
            look = repr([plotting.style(entry)[key] for key in keys])
            assert look not in seen, f"{register.kind} '{name}' and '{seen[look]}' have one {what}: {look}"
            seen[look] = name


# --- all kinds ------------------------------------------------------------------------------------------------------


@promise("")
def it_says_what_it_is(entry: Entry) -> None:
    keeps(entry, entry.name and entry.title.strip() and entry.kind, "it has a name and a label")
    said = entry.about if isinstance(entry, Method) else entry.function.__doc__
    keeps(entry, said and said.strip(), "it has a docstring, which help shows")


@promise("")
def its_options_have_defaults_within_their_limits(entry: Entry) -> None:
    defaults = {option.name: option.default for option in entry.options.values()}
    keeps(entry, inspect.Parameter.empty not in defaults.values(), "all options have defaults")
    keeps(entry, entry.checked(defaults) == entry.checked({}) == defaults, "its defaults are within its own limits")


def outside(option: Option) -> list[Any]:
    """A value outside each of an option's limits."""
    found: list[Any] = []
    for limit in option.limits:
        if isinstance(limit, OneOf):
            found.append("no such name")
        if isinstance(limit, Between) and limit.low > -math.inf:
            found.append(type(option.default or 0)(limit.low - 1))
    return found


@promise("")
def its_options_are_checked(entry: Entry) -> None:
    refuses(entry, lambda: entry.checked({"no_such_option": 1}), f"{entry.kind} '{entry.name}'", "no_such_option")
    for option in entry.options.values():
        for value in outside(option):
            refuses(entry, lambda given={option.name: value}: entry.checked(given), option.name)  # type: ignore[misc]


# --- penalties ------------------------------------------------------------------------------------------------------


def penalty_of(entry: Entry) -> Callable[..., Tensor]:
    return lambda z, group_size=4, **how: decorrelation(z, kind=entry.name, group_size=group_size, **how)


def white(n: int = 40, c: int = 8) -> Tensor:
    """Features (n, c) whose channels are uncorrelated and have variance 1."""
    raw = torch.randn(n, c, dtype=F64)
    return torch.linalg.qr(raw - raw.mean(0))[0] * n**0.5 + 5


@promise("penalty")
def penalty_has_no_options(entry: Entry, **_: Any) -> None:
    keeps(entry, not entry.options, "it has no keyword-only parameters, since no setting of a run could reach them")


@promise("penalty")
def penalty_is_zero_on_white_features_and_only_there(entry: Entry, **_: Any) -> None:
    value = penalty_of(entry)
    keeps(entry, 0 <= float(value(white())) < 1e-9, "it is 0 on features that are white")
    keeps(entry, float(value(torch.randn(60, 8, dtype=F64).cumsum(1))) > 1e-4, "it is not where they correlate")


@promise("penalty")
def penalty_is_a_finite_number_with_a_finite_gradient(entry: Entry, **_: Any) -> None:
    value = penalty_of(entry)
    for shape, group in (((2, 4), 2), ((6, 6), 3), ((5, 8, 2, 3), None), ((4, 6, 1, 1), 1), ((1, 4, 3, 3), 4)):
        for scale in (0.0, 1e-6, 1.0, 1e5):
            for constant in (False, True):
                z = torch.randn(shape) * scale
                z[:, :1] = 7.0 if constant else z[:, :1]
                z.requires_grad_()
                with unchanged(entry, z):
                    out = value(z, group)
                    (slope,) = torch.autograd.grad(out, z)
                where = f"for features {shape} of scale {scale:g}, groups of {group}"
                keeps(entry, out.shape == () and out.dtype == torch.float32, f"it gives a float32 scalar {where}")
                keeps(entry, out.isfinite() and out >= 0, f"it is finite and not negative {where}; it is {out}")
                keeps(entry, slope.isfinite().all(), f"its gradient is finite {where}, constant channels too")


@promise("penalty")
def penalty_is_the_mean_over_groups_whatever_the_order(entry: Entry, **_: Any) -> None:
    value, z = penalty_of(entry), torch.randn(30, 8, dtype=F64).cumsum(1)
    whole, parts = value(z), torch.stack([value(part) for part in z.split(4, 1)])
    keeps(entry, whole.dtype == F64, "float64 stays float64")
    same(entry, whole, parts.mean(), "it is the mean of what its groups give alone", 1e-9)
    same(entry, value(z[torch.randperm(30)]), whole, "the order of samples does not matter", 1e-9)
    positions = z.view(5, 2, 3, 8).movedim(3, 1)
    same(entry, value(positions), whole, "every position of a feature map is a sample", 1e-9)


@promise("penalty")
def penalty_has_the_gradient_of_its_value(entry: Entry, *, exact: bool = True, **_: Any) -> None:
    for shape in ((7, 4), (3, 4, 2, 2), (2, 4)) if exact else ():
        z = (torch.randn(*shape, dtype=F64) * 0.7).requires_grad_()
        right = torch.autograd.gradcheck(lambda v: penalty_of(entry)(v, 2), z, raise_exception=False)
        keeps(entry, right, f"its gradient is that of its value, for features {shape} (else: exact=False)")


@promise("penalty")
def penalty_falls_where_its_gradient_leads(entry: Entry, **_: Any) -> None:
    z = torch.randn(64, 8, dtype=F64).cumsum(1).requires_grad_()
    optimizer, value = torch.optim.Adam([z], lr=0.05), penalty_of(entry)
    first = float(value(z.detach()))
    for _step in range(60):
        optimizer.zero_grad()
        value(z).backward()
        optimizer.step()
    keeps(entry, float(value(z.detach())) < 0.2 * first, "60 steps of gradient descent take most of it away")
    keeps(entry, float(decorrelation(z.detach(), group_size=4)) < 0.1, "gradient descent decorrelates the features")


@promise("penalty")
def penalty_is_computed_in_float32_whatever_the_autocast(entry: Entry, **_: Any) -> None:
    value, half = penalty_of(entry), torch.randn(32, 16).cumsum(1).bfloat16().requires_grad_()
    out = value(half)
    keeps(entry, out.dtype == torch.float32, "half precision is computed in float32")
    same(entry, out, value(half.detach().float()), "half precision is computed in float32")
    keeps(entry, torch.autograd.grad(out, half)[0].dtype == torch.bfloat16, "the gradient has the features' type")
    with torch.autocast("cpu", torch.bfloat16):
        same(entry, value(half), out, "autocast changes nothing")


@promise("penalty")
def penalty_says_what_it_cannot_take(entry: Entry, **_: Any) -> None:
    value = penalty_of(entry)
    refuses(entry, lambda: value(torch.zeros(4, 20), 16, layer="conv2"), "group_size=16", "'conv2'")
    refuses(entry, lambda: value(torch.zeros(4, 10, 16), layer="encoder"), "'encoder'", "(4, 10, 16)")
    refuses(entry, lambda: value(torch.zeros(1, 16), layer="fc2"), "'fc2'", "at least 2")


# --- terms and methods ----------------------------------------------------------------------------------------------


def small() -> tuple[nn.Module, Tensor, Tensor]:
    """A network with batch norm in training mode, images and classes."""
    torch.manual_seed(1)
    return build("cnn_bn", 3, 4, 8), torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])


@promise("term")
def term_is_a_finite_number_with_a_finite_gradient(entry: Term) -> None:
    model, x, y = small()
    layers, asks = default_layers(model, x), entry.gradient
    with unchanged(entry, x, y), capture(model, layers) as found:
        step = Step(model, x, y, layers=layers, captured=found, generator=seed(), differentiable=asks)
        out = entry.function(step, **entry.checked({}))
    keeps(entry, out.shape == () and out.isfinite(), f"it gives one finite number; it gave {out}")
    slopes = torch.autograd.grad(out, list(model.parameters()), allow_unused=True)
    known = [g for g in slopes if g is not None]
    keeps(entry, known and all(g.isfinite().all() for g in known), "its gradient by the weights is finite")


@promise("method")
def method_has_registered_terms_and_settings_of_theirs(entry: Method) -> None:
    objective = Objective(entry.name)
    keeps(entry, list(objective.weights) == list(entry.terms), "its terms are registered")
    keeps(entry, entry.settings.items() <= objective.settings.items(), "its settings are options of its terms")


@promise("method")
def method_leaves_a_step_as_plain_training_would(entry: Method) -> None:
    (model, x, y), (plain, *_), objective = small(), small(), Objective(entry.name)
    plain(x)
    modes, weights = flags(model), list(model.parameters())
    with unchanged(entry, x, y, *(p.detach() for p in weights)):
        terms = losses(model, x, y, objective, generator=seed(3))
        torch.autograd.grad(terms["total"], weights)
    keeps(entry, not x.requires_grad and flags(model) == modes, "modes and flags are as they were")
    keeps(entry, not any(m._forward_hooks for m in model.modules()), "no hook is left in the model")
    if "classification" in entry.terms:  # else it trains on other images, and these are what averages are to describe
        for now, expected in zip(model.buffers(), plain.buffers(), strict=True):
            same(entry, now, expected, "running statistics describe one pass of the clean images", 1e-6)
    total = torch.stack([weight * terms[name] for name, weight in objective.terms.items()]).sum()
    same(entry, terms["total"], total, "the total is the weighted sum of its terms", 1e-6)
    again = losses(small()[0], x, y, objective, generator=seed(3))["total"]
    same(entry, terms["total"], again, "the same generator gives the same bits")


# --- data sets and models -------------------------------------------------------------------------------------------


@promise("data set")
def dataset_has_disjoint_splits_on_one_scale(entry: Dataset, **options: Any) -> None:
    state = torch.get_rng_state()
    parts, again = ([load(entry.name, split=split, **options) for split in SPLITS] for _ in range(2))
    same(entry, torch.get_rng_state(), state, "torch's global random state stays as it is")
    keeps(entry, len({(p.mean, p.std, p.classes, p.channels, p.image_size) for p in parts}) == 1, "splits are alike")
    seen: set[bytes] = set()
    for part, other in zip(parts, again, strict=True):
        assert isinstance(part, ImageData) and isinstance(other, ImageData)
        repeated = torch.equal(part.images, other.images) and torch.equal(part.labels, other.labels)
        keeps(entry, repeated, "it gives the same images and labels when it is asked again")
        keeps(entry, part.images.dtype == torch.uint8 and part.labels.dtype == torch.int64, "types are as expected")
        keeps(entry, set(part.labels.tolist()) == set(range(part.num_classes)), "every class occurs in every split")
        own = {image.numpy().tobytes() for image in part.images}
        keeps(entry, not own & seen, "no image is in two splits")
        seen |= own


@promise("data set")
def dataset_has_the_size_and_number_asked_for(entry: Dataset, **options: Any) -> None:
    size = 2 * entry.size
    plain, other = load(entry.name, **options), load(entry.name, image_size=size, limit=9, **options)
    number = entry.classes if isinstance(entry.classes, int) else len(entry.classes)
    keeps(entry, plain.image_size == entry.size and plain.num_classes == number, "size and classes are as it says")
    keeps(entry, other.image_size == size and len(other) == 9, "image_size and limit are what is asked for")
    x, y = next(other.batches(4))
    keeps(entry, x.shape[2:] == (size, size) and x.isfinite().all() and len(y) == 4, "batches are fit to use")


def made(entry: Entry, channels: int, classes: int, size: int, **options: Any) -> nn.Module:
    """The network, of which `build` has tried the logits."""
    try:
        return build(entry.name, channels, classes, size, **options)
    except ValueError as error:
        keeps(entry, False, f"it gives finite logits (B, K): {error}")
        raise


@promise("model")
def model_gives_logits_of_each_image_alone(entry: Entry, size: int = 32, **options: Any) -> None:
    net, x = made(entry, 3, 5, size, **options), torch.rand(3, 3, size, size)
    keeps(entry, net.training and not any(getattr(m, "inplace", False) for m in net.modules()), "it is ready to train")
    with unchanged(entry, x, model=net):
        logits, gradient = logits_and_gradient(net, x)
    keeps(entry, logits.shape == (3, 5) and logits.isfinite().all(), "it gives finite logits (B, K)")
    keeps(entry, (gradient.flatten(1).abs().amax(1) > 0).all(), "they depend on each image")
    others = logits_and_gradient(net, x[1:])[0]
    same(entry, others, logits[1:], "in evaluation mode images do not see each other", 1e-4)


@promise("model")
def model_is_decided_by_the_seed(entry: Entry, size: int = 32, **options: Any) -> None:
    weights = []
    for number in (3, 3, 4):
        torch.manual_seed(number)
        net = made(entry, 1, 4, size, **options)
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    same(entry, weights[0], weights[1], "the seed decides the weights")
    keeps(entry, not torch.equal(weights[0], weights[2]), "another seed draws others")


# --- fills and scores -----------------------------------------------------------------------------------------------

SHAPES = (((3, 3, 8, 8), torch.float32), ((2, 1, 5, 9), torch.float64), ((2, 2, 1, 1), torch.float32))


@promise("fill")
def fill_is_like_the_images(entry: Entry) -> None:
    for shape, dtype in SHAPES:
        x = torch.randn(shape, dtype=dtype)
        with unchanged(entry, x):
            out = replacement(x, entry.name, generator=seed())
        keeps(entry, out.shape == x.shape and out.dtype == dtype, "shape and type are those of the images")
        keeps(entry, out.isfinite().all() and out.device == x.device, "it is finite, on their device")


@promise("fill")
def fill_of_an_image_is_its_own(entry: Entry) -> None:
    x = torch.rand(3, 2, 8, 8) * torch.tensor([1.0, 2.0, 5.0]).view(3, 1, 1, 1)
    whole, alone = (replacement(part, entry.name, common=True, generator=seed()) for part in (x, x[2:]))
    same(entry, alone, whole[2:], "with common draws an image's fill does not depend on the others", 1e-6)


@promise("fill")
def fill_draws_from_its_generator_alone(entry: Entry) -> None:
    x, draws = torch.randn(2, 3, 5, 5), seed(3)
    first, again = replacement(x, entry.name, generator=draws), replacement(x, entry.name, generator=seed(3))
    same(entry, first, again, "the same generator gives the same bits")
    untouched = torch.equal(draws.get_state(), seed(3).get_state())
    keeps(entry, "generator" in entry.parameters or untouched, "it draws only if it asks for the generator")


@promise("score")
def score_is_a_finite_number_for_each_pixel(entry: Entry) -> None:
    for shape, dtype in SHAPES:
        gradient, x = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        with unchanged(entry, gradient, x):
            out = entry.ask({"gradient": gradient, "images": x, "generator": seed()})
        keeps(entry, out.shape == x[:, 0].shape, "it gives (B, H, W)")
        keeps(entry, out.is_floating_point() and out.isfinite().all(), "it gives finite numbers")
        keeps(entry, out.dtype == dtype or "gradient" not in entry.parameters, "they have the type of the gradient")


@promise("score")
def score_of_an_image_is_its_own(entry: Entry) -> None:
    gradient, x = torch.randn(4, 3, 6, 6), torch.randn(4, 3, 6, 6)
    given: dict[str, Any] = {"gradient": gradient, "images": x}
    whole, again = (entry.ask({**given, "generator": seed(1)}) for _ in range(2))
    same(entry, again, whole, "the same generator gives the same bits")
    if "generator" not in entry.parameters:
        part = entry.ask({"gradient": gradient[[2, 0]], "images": x[[2, 0]]})
        same(entry, part, whole[[2, 0]], "an image's score does not depend on the others", 1e-6)
