"""Cases: every measure has its direction and range, asks for what it needs, and gets it, one from outside too."""

from __future__ import annotations

import doctest
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from maps import close
from torch import Tensor, nn

import sdecor.measures.case
from sdecor.attribution import attribute
from sdecor.config import Objective, Schedule
from sdecor.data import load
from sdecor.measures import (
    MEASURES,
    RECOMMENDED,
    Case,
    available,
    evaluate,
    localization,
    measure,
    needs,
    quantity,
    sharpness,
    table,
)
from sdecor.measures.case import QUANTITIES
from sdecor.measures.faithfulness import faithfulness, faithfulness_correlation, infidelity
from sdecor.measures.localization import chance_level
from sdecor.measures.robustness import attack, explanation_shift, local_lipschitz, max_sensitivity, spearman
from sdecor.measures.sanity import controls, randomized
from sdecor.models import build
from sdecor.saliency import logits_and_gradient, pixel_score
from sdecor.training import fit

FAMILIES = {"sharpness": 5, "localization": 6, "faithfulness": 8, "robustness": 3, "sanity": 1}
LOCALIZATION = [name for name, metric in MEASURES.items() if metric.family == "localization"]


def gradient(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    return attribute(model, images, target, progress=False)


def of(model: nn.Module, images: Tensor, mask: Tensor, **options: Any) -> Case:
    """The gradient maps of the predicted class."""
    logits, maps = logits_and_gradient(model, images)
    known = {"mask": mask, "model": model, "images": images, "target": logits.argmax(1), "explain": gradient}
    return Case(attribution=maps, **{**known, **options})


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A LeNet after seconds of training on shapes, and 60 held-out images with their masks."""
    torch.manual_seed(0)
    data = load("shapes", samples=1500)
    model = build("lenet", data.channels, data.num_classes, data.image_size)
    fit(model, data, Objective("standard"), Schedule(epochs=4, batch_size=64, lr=3e-3), seed=0, progress=False)
    held_out = load("shapes", split="val").subset(60)
    assert held_out.masks is not None
    return model, held_out.normalized(), held_out.masks


@pytest.fixture(scope="module")
def untrained() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    mask = torch.zeros(6, 28, 28, dtype=torch.bool)
    mask[:, 5:14, 9:20] = True
    return build("lenet", 1, 10, 28).eval(), torch.randn(6, 1, 28, 28), mask


@pytest.fixture(scope="module", params=["trained", "untrained"])
def case(request: pytest.FixtureRequest) -> Case:
    model, images, mask = request.getfixturevalue(request.param)
    return of(model, images[:6], mask[:6], samples=3, seed=4)


# --- entries --------------------------------------------------------------------------------------------------------


def test_families_directions_and_names() -> None:
    assert {f: sum(m.family == f for m in MEASURES.values()) for f in FAMILIES} == FAMILIES
    assert len(MEASURES) == sum(FAMILIES.values()) == len({m.title for m in MEASURES.values()})
    assert set(RECOMMENDED) <= set(MEASURES)


def test_every_value_is_that_of_its_function(case: Case) -> None:
    model, x, y, mask, a = case.model, case.images, case.target, case.mask, case.attribution
    assert model is not None and x is not None and y is not None and mask is not None
    score = pixel_score(a)

    def explain(images: Tensor, target: Tensor) -> Tensor:
        return pixel_score(gradient(model, images, target))

    def draws() -> torch.Generator:
        return torch.Generator().manual_seed(4)

    noise = {"radius": 0.1, "samples": 3, "seed": 4}
    *_, (_, other) = randomized(model, seed=4)
    expected = {
        **{name: getattr(sharpness, name)(score) for name, m in MEASURES.items() if m.family == "sharpness"},
        **{name: getattr(localization, name)(score, mask) for name in LOCALIZATION},
        **faithfulness(model, x, y, score, fill="linear", generator=draws()),
        "infidelity": infidelity(model, x, y, a, noise=0.1, seed=4),
        "faithfulness_correlation": faithfulness_correlation(model, x, y, score, fill="linear", generator=draws()),
        "max_sensitivity": max_sensitivity(explain, x, y, **noise),
        "local_lipschitz": local_lipschitz(explain, x, y, **noise),
        "explanation_shift": explanation_shift(explain, x, attack(model, x, y, epsilon=0.1, seed=4), y),
        "randomization": spearman(score, pixel_score(gradient(other, x, y))),
    }
    values = evaluate(case)
    assert list(values) == list(MEASURES) == list(available(case))
    assert set(expected) == set(MEASURES)
    for name, value in expected.items():
        assert values[name].shape == (6,) and values[name].dtype == torch.float64
        close(values[name], value)


def test_options_reach_their_functions(untrained: Any) -> None:
    model, x, mask = untrained
    plain, other = (of(model, x, mask, samples=2, **o) for o in ({}, {"radius": 0.5, "fill": "constant", "seed": 1}))
    for name, metric in MEASURES.items():
        same = torch.equal(evaluate(plain, [name])[name], evaluate(other, [name])[name])
        assert same == (metric.family in ("sharpness", "localization")), name
    given = of(model, x, mask, adversarial=x)
    close(evaluate(given, ["explanation_shift"])["explanation_shift"], torch.zeros(6))
    assert given.adversarial is x
    without = of(model, x, mask)
    evaluate(without, ["explanation_shift"])
    assert without.adversarial is None


def test_no_explanation_is_asked_for_more_than_a_batch(untrained: Any) -> None:
    rows: list[int] = []

    def counted(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        rows.append(len(images))
        return gradient(model, images, target)

    evaluate(of(*untrained, explain=counted, batch_size=4, samples=2))
    assert set(rows) == {4, 2}


def test_maps_are_made_once_for_all_measures_of_robustness(untrained: Any) -> None:
    calls: list[bool] = []

    def counted(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        calls.append(model is untrained[0])
        return gradient(model, images, target)

    evaluate(of(*untrained, explain=counted, samples=2))
    assert calls == [True, True, True, False]  # the images, the noisy ones, the attacked ones; another model


# --- directions -----------------------------------------------------------------------------------------------------


def test_ground_truth_is_best_and_noise_at_chance(trained: Any) -> None:
    model, x, mask = trained
    noise = torch.rand(40, *mask.shape[1:], generator=torch.Generator().manual_seed(0))
    best = evaluate(Case(attribution=mask.float(), mask=mask), LOCALIZATION)
    found = evaluate(of(model, x, mask), LOCALIZATION)
    many = mask[:40].repeat_interleave(40, 0)
    random = evaluate(Case(attribution=noise.repeat(40, 1, 1), mask=many), LOCALIZATION)
    area = chance_level(many).mean().item()
    for name in LOCALIZATION:
        close(best[name], torch.ones(60), 1e-9)
        assert MEASURES[name].better == "higher"
        assert found[name].lt(1).all() or name == "pointing_game"
        mean = random[name].mean().item()
        if name == "best_iou":  # the threshold is chosen by the mask
            assert area <= mean < 1.3 * area
        else:
            chance = 0.5 if name == "auroc" else area
            assert mean == pytest.approx(chance, abs=0.03 if name == "pointing_game" else 0.01), name


def test_random_weights_lose_the_object(trained: Any) -> None:
    model, x, mask = trained
    *_, (_, random) = randomized(model)
    before, after = (evaluate(of(net, x, mask), ["auroc"])["auroc"].mean() for net in (model, random))
    assert before > after + 0.05 and before > 0.6


def test_sharper_maps_are_better_in_every_measure_of_sharpness() -> None:
    one, blob = torch.zeros(1, 9, 9), torch.zeros(1, 9, 9)
    one[:, 4, 4], blob[:, 2:7, 2:7] = 1, 1
    for name, metric in MEASURES.items():
        if metric.family == "sharpness" and name != "total_variation":
            sharp, dull = (evaluate(Case(attribution=a), [name])[name] for a in (one, blob))
            assert (sharp > dull) == (metric.better == "higher"), name


def test_a_map_that_knows_the_model_beats_one_that_does_not(trained: Any) -> None:
    """Directions of the measures that run the model: occlusion maps, against edges or maps in reversed order."""
    model, x, mask = trained
    logits, _ = logits_and_gradient(model, x)
    keep = logits.softmax(1).amax(1) > 0.8
    x, target = x[keep], logits[keep].argmax(1)
    good = attribute(model, x, target, "occlusion", progress=False)
    known = {"model": model, "images": x, "target": target, "fill": "constant"}
    names = [name for name, m in MEASURES.items() if m.family == "faithfulness" and name != "monotonicity"]
    right = evaluate(Case(attribution=good, **known), names)
    wrong = evaluate(Case(attribution=controls(x)["noise"], **known), names)
    for name in names:
        higher = right[name].nanmean() > wrong[name].nanmean()
        assert higher == (MEASURES[name].better == "higher"), name


def test_maps_that_ignore_the_model_do_not_change_with_it(untrained: Any) -> None:
    model, x, mask = untrained
    edges = of(model, x, mask, explain=lambda _net, images, _target: controls(images)["edges"])
    edges = replace(edges, attribution=controls(x)["edges"])
    close(evaluate(edges, ["randomization"])["randomization"], torch.ones(6))
    assert evaluate(of(model, x, mask), ["randomization"])["randomization"].abs().max() < 0.5


def test_without_weights_there_is_nothing_to_randomize() -> None:
    x = torch.rand(2, 1, 3, 3)
    close(evaluate(of(nn.Flatten(), x, x[:, 0] > 0.5), ["randomization"])["randomization"], torch.ones(2))


# --- what is needed -------------------------------------------------------------------------------------------------


def test_all_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError) as error:
        evaluate(Case(attribution=torch.ones(1, 2, 2)), ["gini", "randomization"])
    assert str(error.value) == (
        "measure 'randomization' needs model, images, target, explain, which this case does not have"
    )


def test_an_unknown_measure() -> None:
    case = Case(attribution=torch.ones(1, 2, 2))
    for call in (partial(evaluate, case), partial(table, {"a": case}), partial(table, {})):
        with pytest.raises(ValueError) as error:
            call(["gini", "magic"])
        assert str(error.value) == f"unknown measure 'magic'; known: {', '.join(MEASURES)}"


MAPS = torch.rand(2, 4, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attribution": MAPS[0]}, "attribution must have shape (B, C, H, W) or (B, H, W), got (4, 4)"),
        ({"attribution": MAPS / 0}, "attribution has infinity in 2 of 2 rows (the first is row 0)"),
        ({"attribution": MAPS * math.nan}, "attribution has NaN in 2 of 2 rows (the first is row 0)"),
        ({"mask": MAPS[:, 1:] > 0}, "mask has shape (2, 3, 4), the maps have (2, 4, 4); both must be (B, H, W)"),
        ({"mask": MAPS}, "mask must hold only 0 and 1 (or be boolean); threshold it first"),
        (
            {"images": torch.rand(2, 1, 5, 4)},
            "images have shape (2, 1, 5, 4), attribution has (2, 4, 4); both need the same B, H and W",
        ),
        (
            {"images": torch.rand(3, 1, 4, 4)},
            "images have shape (3, 1, 4, 4), attribution has (2, 4, 4); both need the same B, H and W",
        ),
        ({"images": MAPS}, "images have shape (2, 4, 4), attribution has (2, 4, 4); both need the same B, H and W"),
        ({"target": torch.tensor([0, 3])}, "target must lie in 0..2, got 0..3"),
        ({"target": torch.tensor([0, -1])}, "target must lie in 0..2, got -1..0"),
        ({"target": torch.tensor([0])}, "target must be 2 whole numbers, got shape (1,) of torch.int64"),
        ({"fill": "magic"}, "unknown fill 'magic'; known: uniform, mean, constant, blur, linear, or a tensor"),
    ],
)
def test_bad_input_is_named(wrong: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    good = {
        "attribution": MAPS,
        "mask": MAPS > 0.5,
        "model": model,
        "images": torch.rand(2, 1, 4, 4),
        "target": torch.tensor([0, 2]),
        "explain": gradient,
    }
    with pytest.raises(ValueError) as error:
        evaluate(Case(**{**good, **wrong}), [*LOCALIZATION, "deletion"])
    assert str(error.value) == message


# --- tables ---------------------------------------------------------------------------------------------------------


def test_a_table_is_tidy_and_says_what_is_undefined() -> None:
    mask = torch.tensor([[[1, 0], [0, 0]]] * 3)
    maps = torch.tensor([[[4.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
    cases = {"some": Case(attribution=maps, mask=mask), "none": Case(attribution=0 * maps, mask=mask)}
    result = table(cases, iter(["gini", "auroc"]))
    assert list(result.columns) == ["attribution", "metric", "value", "undefined", "images"]
    assert result.astype(object).where(result.notna(), None).values.tolist() == [
        ["some", "gini", 0.375, 1, 3],
        ["some", "auroc", 0.75, 1, 3],
        ["none", "gini", None, 3, 3],
        ["none", "auroc", None, 3, 3],
    ]
    assert list(table(cases)["metric"]) == [n for n in MEASURES if set(needs(n)) <= {"mask"}] * 2
    assert list(table({}).columns) == list(result.columns) and len(table({})) == 0


# --- measures from outside ------------------------------------------------------------------------------------------


@pytest.fixture
def outside() -> Iterator[None]:
    """Whatever a test enters is gone after it."""
    before = [(register, dict(register)) for register in (MEASURES, QUANTITIES)]
    yield
    for register, entries in before:
        for name in [name for name in register if name not in entries]:
            del register[name]


def test_a_measure_from_outside_is_a_measure(outside: None) -> None:
    made: list[int] = []

    @quantity("low", "high")
    def ends(images: Tensor, samples: int) -> dict[str, Tensor]:
        made.append(samples)
        return {"low": images.flatten(1).amin(1), "high": images.flatten(1).amax(1)}

    @measure("mine", better="higher", low=0)
    def mine(saliency: Tensor, images: Tensor, power: float = 2.0, seed: int = 9, mask: Any = None) -> Tensor:
        assert (power, seed) == (2.0, 4)
        return saliency.double().sum((1, 2)) + (0 if mask is None else 100)

    @measure("span", better="lower", name="range", family="sharpness")
    def span(low: Tensor, high: Tensor) -> Tensor:
        return (high - low).double()

    entry = MEASURES["mine"]
    assert (entry.heading, entry.family, entry.low, entry.high) == ("mine ↑", "test_case", 0, math.inf)
    assert (MEASURES["range"].title, MEASURES["range"].family) == ("span", "sharpness")
    assert (needs("mine"), needs("range")) == (("images",), ("images",))
    images = torch.rand(2, 1, 4, 4)
    case = Case(attribution=-MAPS, images=images, seed=4)
    assert {"mine", "range"} <= set(available(case)) and not {"mine", "range"} & set(available(Case(attribution=MAPS)))
    values = evaluate(case)
    close(values["mine"], MAPS.double().sum((1, 2)))
    close(values["range"], (images.amax((1, 2, 3)) - images.amin((1, 2, 3))).double())
    assert made == [10]  # once for both of its parts
    close(evaluate(replace(case, mask=MAPS > 0.5), ["mine"])["mine"], values["mine"] + 100)
    assert list(table({"a": case}, ["mine"])["metric"]) == ["mine"] and "mine" in set(table({"a": case})["metric"])
    with pytest.raises(ValueError) as error:
        evaluate(Case(attribution=MAPS), ["range"])
    assert str(error.value) == "measure 'range' needs images, which this case does not have"


def test_what_no_case_has_is_named(outside: None) -> None:
    @measure("mine", better="higher")
    def mine(salliency: Tensor) -> Tensor:
        return salliency

    for call in (available, evaluate):
        with pytest.raises(ValueError, match=r"^measure 'mine' asks for 'salliency'; it can have: attribution, mask, "):
            call(Case(attribution=MAPS))
    with pytest.raises(ValueError, match=r"^unknown quantity 'salliency'; known: saliency, "):
        Case(attribution=MAPS)["salliency"]


def test_what_cannot_be_entered(outside: None) -> None:
    with pytest.raises(ValueError, match="^better must be 'higher' or 'lower', got 'more'$"):
        measure("mine", better="more")
    with pytest.raises(ValueError, match="^measure 'gini' is there already"):
        measure("mine", better="higher", name="gini")(lambda saliency: saliency)


def test_quantities_of_a_case(case: Case) -> None:
    close(case["saliency"], pixel_score(case.attribution))
    assert case["curves"]["most"] is case["most"] and torch.equal(case["least"], case["back"].flip(1))
    assert case["generator"] is not case["generator"] and case["generator"].initial_seed() == 4
    assert case["noise"] == case["radius"] == 0.1
    assert case.images is not None and (case["adversarial"] - case.images).abs().amax() <= 0.1 + 1e-6


def test_examples() -> None:
    failed, tried = doctest.testmod(sdecor.measures.case)
    assert failed == 0 < tried
