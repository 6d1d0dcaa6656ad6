"""Every entry of every register keeps its promises; and the checks notice what breaks one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import pytest
import torch
from contracts import check, check_register
from contracts_of_maps import attribution_is_the_same_on_a_gpu, attribution_works_on
from networks import CHEAP, images
from promises import CHECKS, unchanged
from torch import Tensor, nn

from sdecor import decorrelation
from sdecor.attribution import attribute
from sdecor.data import Request
from sdecor.models import build
from sdecor.objective import Step
from sdecor.registers import (
    ATTRIBUTIONS,
    DATASETS,
    FILLS,
    METHODS,
    REGISTERS,
    TERMS,
    Between,
    Entry,
    Method,
)

#: What makes an entry quick, or sets it apart.
HOW: dict[str, dict[str, Any]] = {"zca": {"exact": False}, "shapes": {"samples": 100}, **CHEAP}
FILES = {name for name, entry in DATASETS.items() if entry.present}  # data sets that need files have tests of their own
ALL = [entry for register in REGISTERS.values() for entry in register.values()]
EVERY = [(entry, one) for entry in ALL for one in CHECKS[""]]
OWN = [(entry, one) for entry in ALL if entry.name not in FILES for one in CHECKS[entry.kind]]
NO_RULE = {("vit", "deeplift"), ("vit", "guided_backprop")}


def named(value: Any) -> str:
    return f"{value.kind}-{value.name}" if isinstance(value, Entry) else value.__name__


@pytest.mark.parametrize(("entry", "promise"), EVERY, ids=named)
def test_what_all_entries_keep(entry: Entry, promise: Any) -> None:
    promise(entry)


@pytest.mark.parametrize(("entry", "promise"), OWN, ids=named)
def test_what_entries_of_a_kind_keep(entry: Entry, promise: Any) -> None:
    promise(entry, **HOW.get(entry.name, {}))


@pytest.mark.parametrize("kind", REGISTERS)
def test_no_two_have_one_label_or_one_look(kind: str) -> None:
    check_register(REGISTERS[kind])


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "vit"])
@pytest.mark.parametrize("method", ATTRIBUTIONS)
def test_every_attribution_on_the_other_models(name: str, method: str) -> None:
    size = {"resnet18": 8, "vgg11_bn": 32}.get(name, 16)
    model, x = build(name, 3, 4, size), images(2, size=size, dtype=torch.float32)
    if (name, method) in NO_RULE:
        with unchanged(ATTRIBUTIONS[method], x, model=model), pytest.raises(ValueError, match=f"^{method} needs"):
            attribute(model, x, method=method)
    else:
        attribution_works_on(ATTRIBUTIONS[method], model, x, **CHEAP.get(method, {}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ATTRIBUTIONS)
def test_attributions_on_a_gpu(method: str) -> None:
    attribution_is_the_same_on_a_gpu(ATTRIBUTIONS[method], **CHEAP.get(method, {}))


# --- what breaks a promise ------------------------------------------------------------------------------------------


def tied(in_channels: int, num_classes: int, image_size: int) -> nn.Module:
    """Normalizes by the batch in evaluation mode, too."""
    net = nn.BatchNorm1d(in_channels * image_size**2, track_running_stats=False)
    return nn.Sequential(nn.Flatten(), net, nn.Linear(in_channels * image_size**2, num_classes))


def passing(step: Step) -> Tensor:
    """A clean pass of its own, which batch norm counts."""
    return step.model(step.images).square().mean()


def alike(request: Request) -> tuple[Tensor, Tensor]:
    """The same images for every split."""
    return torch.arange(8 * 64).remainder(251).to(torch.uint8).view(8, 1, 8, 8), torch.arange(8) % 2


BROKEN: list[tuple[str, Any, str]] = [
    ("penalties", lambda x: x.var(1).mean(), "it is 0 on features that are white"),
    ("penalties", lambda x: decorrelation.correlation(x).sqrt(), "its gradient is finite"),
    ("penalties", lambda x: decorrelation.decov(x) * len(x), "the mean of what its groups give alone"),
    ("penalties", lambda x: decorrelation.decov(x).detach() + 0 * x.sum(), "its gradient is that of its value"),
    ("penalties", lambda x, *, power=2.0: decorrelation.decov(x), "it has no keyword-only parameters"),
    ("terms", lambda step: step.logits.sum() / 0, "it gives one finite number"),
    ("methods", {"classification": 1, passing: 1}, "running statistics describe one pass of the clean images"),
    ("attributions", lambda model, x, y, rows: x, "another class has another map"),
    ("attributions", lambda model, x, y, rows: x * y.view(-1, 1, 1, 1) - x.mean(0), "neither neighbours nor order"),
    ("attributions", lambda model, x, y, rows: x * model(x.repeat(3, 1, 1, 1)).sum(), "no forward pass has more rows"),
    ("attributions", lambda model, x, y, rows: x.zero_(), "it says something"),
    ("attributions", lambda model, x, y, rows, *, power=1.0: x**power, "names each of its options"),
    ("measures", lambda saliency: saliency.mean((1, 2)), "these are float64"),
    ("measures", lambda saliency: 2 + saliency.double().mean((1, 2)), "it lies in [0, 1] for maps of gradients"),
    ("measures", lambda saliency: (saliency / saliency.max()).double().mean((1, 2)), "neither neighbours nor order"),
    ("measures", lambda saliency: saliency.double().mean((1, 2)) * torch.rand(()), "random state"),
    ("measures", lambda model, images: model(images).detach().double()[:, 0] > 9, "these are float64"),
    ("datasets", alike, "no image is in two splits"),
    ("models", tied, "images do not see each other"),
    ("models", lambda c, k, s: nn.Sequential(nn.Flatten(), nn.Linear(c * s * s, k + 1)), "finite logits (B, K)"),
    ("fills", lambda x: torch.rand_like(x), "random state"),
    ("fills", lambda x: x.zero_() + 1, "neither inputs nor"),
    ("fills", lambda x: x[:, :1], "shape and type are those of the images"),
    ("fills", lambda x: x - x.mean(0), "an image's fill does not depend on the others"),
    ("scores", lambda gradient: gradient, "it gives (B, H, W)"),
    ("scores", lambda gradient: gradient.sum(1) / gradient.sum(), "an image's score does not depend on the others"),
]


@pytest.fixture
def entered() -> Iterator[None]:
    """What a test enters is taken out again."""
    before = {kind: set(register) for kind, register in REGISTERS.items()}
    yield
    for kind, register in REGISTERS.items():
        for name in set(register) - before[kind]:
            del register[name]


def enter(kind: str, what: Any) -> Entry:
    """An entry by the name of ``broken``."""
    fields = {"measures": {"low": 0, "high": 1, "family": "mine"}, "datasets": {"classes": 2, "size": 8}}.get(kind, {})
    if kind == "methods":
        TERMS.register(passing)
        REGISTERS[kind]["broken"] = Method(what)
    else:
        REGISTERS[kind].register("broken", **fields)(what)
    return REGISTERS[kind]["broken"]


@pytest.mark.usefixtures("entered")
@pytest.mark.parametrize(("kind", "what", "words"), BROKEN, ids=[f"{kind}-{words}" for kind, _, words in BROKEN])
def test_a_broken_promise_is_noticed(kind: str, what: Any, words: str) -> None:
    entry, said = enter(kind, what), []
    for promise in CHECKS[entry.kind]:
        try:
            promise(entry)
        except AssertionError as error:
            said.append(str(error).splitlines()[0])
    assert any(words in line and line.startswith(f"{entry.kind} 'broken' breaks its promise: ") for line in said), said


@pytest.mark.usefixtures("entered")
def test_what_all_kinds_share_is_noticed() -> None:
    FILLS.register("broken")(lambda x: x + 1)
    with pytest.raises(AssertionError, match="^fill 'broken' breaks its promise: it has a docstring, which help shows"):
        check(FILLS["broken"])

    @FILLS.register
    def paint(x: Tensor, *, shade: Annotated[float, Between(0, 1)] = 2.0) -> Tensor:
        """Everything."""
        return x + shade

    with pytest.raises(ValueError, match="^shade must be from 0 to 1, got 2.0$"):
        check(FILLS["paint"])
    FILLS.register("twin", label="noise")(lambda x: x)
    FILLS.register("other", label="noise", colour="red")(lambda x: x)
    with pytest.raises(AssertionError, match="^fill 'other' and 'twin' have one label: "):
        check_register(FILLS)
    METHODS["one"], METHODS["two"] = (Method({"classification": 1}, label=n, colour="red", dash=n) for n in ("-", "--"))
    with pytest.raises(AssertionError, match="^method 'two' and 'one' have one colour: "):
        check_register(METHODS)
