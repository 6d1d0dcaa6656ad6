"""Registers: options read from signatures, limits that name what they got, and who may enter what."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest

import sdecor.registers
from sdecor.registers import (
    FILLS,
    TERMS,
    USE,
    Between,
    Entry,
    Method,
    OneOf,
    OnlyWith,
    Option,
    Register,
    UnknownName,
    literal,
    options_of,
    use,
)

HOME = """
from sdecor.registers import THINGS

@THINGS.register
def first():
    "The first."
"""


@pytest.fixture
def things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Register[Entry]:
    """A register whose home is a file; what is imported meanwhile is forgotten."""
    register = Register("thing", Entry, "home_of_things")
    monkeypatch.setattr(sdecor.registers, "THINGS", register, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    (tmp_path / "home_of_things.py").write_text(HOME)
    return register


def message(call: Any, *arguments: Any) -> str:
    with pytest.raises(ValueError) as error:
        call(*arguments)
    return str(error.value)


# --- options --------------------------------------------------------------------------------------------------------

SHARE, COUNT = Annotated[float, Between(0, 1, ends=False)], Annotated[int | None, Between(1)]


@pytest.mark.parametrize(
    ("hint", "given", "expected"),
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (bool, True, True),
        (str, "a", "a"),
        (int | None, None, None),
        (Annotated[str, OneOf(("a", "b"))], "b", "b"),
        (SHARE, 0.5, 0.5),
        (Annotated[float, Between(0, 1)], 1, 1.0),
        (Annotated[float, Between(0)], 1e9, 1e9),
        (COUNT, 1, 1),
        (tuple[str, ...], "a,b", ("a", "b")),
        (tuple[str, ...], ["a"], ("a",)),
        (tuple[str, ...], "", ()),
        (float | Path, Path("x"), Path("x")),
        (Any, object, object),
    ],
)
def test_values_that_fit(hint: Any, given: Any, expected: Any) -> None:
    value = Option("it", None, hint).checked(given)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("hint", "given", "said"),
    [
        (int, 3.0, "it must be of type int, got 3.0 (float)"),
        (int, True, "it must be of type int, got True (bool)"),
        (bool, 1, "it must be of type bool, got 1 (int)"),
        (str, 1, "it must be of type str, got 1 (int)"),
        (int, None, "it must be of type int, got None (NoneType)"),
        (float | Path, "x", "it must be of type float or Path, got 'x' (str)"),
        (tuple[str, ...], 3, "it must be of type a sequence, got 3 (int)"),
        (SHARE, 0, "it must be strictly between 0 and 1, got 0.0"),
        (SHARE, math.nan, "it must be strictly between 0 and 1, got nan"),
        (Annotated[float, Between(0, 1)], -1, "it must be from 0 to 1, got -1.0"),
        (Annotated[float, Between(0)], math.inf, "it must be finite and at least 0, got inf"),
        (Annotated[float, Between(0, ends=False)], 0, "it must be finite and greater than 0, got 0.0"),
        (Annotated[str, OneOf(("a", "b"))], "c", "unknown it 'c'; known: a, b"),
    ],
)
def test_values_that_do_not(hint: Any, given: Any, said: str) -> None:
    assert message(Option("it", None, hint).checked, given) == said


@pytest.mark.parametrize(
    ("hint", "text", "expected", "kind"),
    [
        (int, "3", 3, "int"),
        (float, "1e-3", 1e-3, "float"),
        (bool, "true", True, "bool"),
        (str, "3", "3", "str"),
        (COUNT, "None", None, "int|none"),
        (tuple[str, ...], "a,b", ("a", "b"), "a,b,..."),
        (SHARE, ".5", 0.5, "float"),
    ],
)
def test_texts_mean_values(hint: Any, text: str, expected: Any, kind: str) -> None:
    option = Option("it", None, hint)
    assert option.of_text(text) == expected and option.type_name == kind


def test_literals() -> None:
    assert [literal(t) for t in ("3", "false", "x", "(1, 2)", "a b", "None")] == [3, False, "x", (1, 2), "a b", None]


def test_an_option_that_needs_another_one() -> None:
    limit = OnlyWith("fill", "constant")
    limit.check("value", 3.0)
    limit.check_with("value", {"fill": "constant"})
    assert message(limit.check_with, "value", {"fill": "mean"}) == "value has no effect with fill='mean'"


def test_options_are_the_keyword_only_parameters_of_functions_and_classes() -> None:
    def plain(
        x: int, y: int = 2, *, power: Annotated[float, Between(1)] = 2.0, kind: Any = "a", rest: Any = None
    ) -> None:
        pass

    class Made:
        def __init__(self, x: int, *, width: int = 3) -> None:
            pass

    found = options_of(plain)
    assert list(found) == ["power", "kind", "rest"]
    assert found["power"].default == 2.0 and found["power"].limits == (Between(1),)
    assert options_of(Made)["width"].hint is int
    plain.__annotations__["kind"] = "OnlyForTypeCheckers"  # then defaults say the type
    assert [option.hint for option in options_of(plain).values()] == [float, str, Any]


def test_an_entry_asks_by_names_and_checks_its_options() -> None:
    def grow(x: int, generator: None, *, power: int = 2) -> int:
        """Grow it."""
        return int(x**power)

    entry = Entry(name="grow_it", function=grow, kind="thing")
    assert (entry.title, entry.about, entry.parameters) == ("grow it", "Grow it.", ("x", "generator", "power"))
    assert entry.ask({"x": 3, "generator": None, "power": 3, "other": 1}) == 27
    assert message(entry.ask, {"x": 3}) == "thing 'grow_it' asks for 'generator'; it can have: x"
    assert entry.checked({}) == {"power": 2} and entry.checked({"power": 5}) == {"power": 5}
    assert message(entry.checked, {"powr": 5}) == "thing 'grow_it' has no option 'powr'; it has: power"
    assert message(Entry(name="a", kind="thing").checked, {"b": 1}) == "thing 'a' has no option 'b'; it has: none"
    assert Entry(name="a", label="A", function=lambda: None).about == "A"


def test_a_method_names_its_terms_and_says_what_it_is() -> None:
    def own() -> None:
        pass

    method = Method({"classification": 1, own: 0.5}, settings={"fraction": 0.3}, label="mine")
    assert method.terms == {"classification": 1.0, "own": 0.5}
    assert method.about == "mine: 1 classification + 0.5 own, fraction=0.3"


# --- registers ------------------------------------------------------------------------------------------------------


def test_a_register_fills_itself_and_knows_its_names(things: Register[Entry]) -> None:
    assert list(things) == ["first"] and len(things) == 1 and "first" in things
    assert things["first"].about == "The first." and things["first"].kind == "thing"
    assert repr(things) == "<register of kind 'thing': first>"
    with pytest.raises(UnknownName) as error:
        things["second"]
    assert str(error.value) == "unknown thing 'second'; known: first"
    assert isinstance(error.value, ValueError) and isinstance(error.value, KeyError)
    assert things.get("second") is None
    del things["first"]
    assert list(things) == []


def test_a_function_stays_what_it_is_and_has_its_own_name_or_another(things: Register[Entry]) -> None:
    def one() -> None:
        pass

    assert things.register(one) is one and things.register("two", label="Two")(one) is one
    assert list(things) == ["first", "one", "two"]
    assert things["two"].title == "Two" and things["two"].function is things["one"].function is one


def test_what_comes_from_outside_comes_after_what_is_there(things: Register[Entry]) -> None:
    """Even if nobody has asked yet: else colours and orders would depend on who asks first."""
    things.register("mine")(lambda: None)
    assert list(things) == ["first", "mine"]


def test_only_who_entered_something_may_replace_it(things: Register[Entry], tmp_path: Path) -> None:
    taken = "thing 'first' is there already (home_of_things); choose another name"
    assert message(things.register("first"), lambda: None) == taken
    for label in ("a", "b"):  # a cell that runs again
        things.register("mine", label=label)(lambda: None)
    assert things["mine"].label == "b"


def test_a_method_belongs_to_the_module_that_enters_it(things: Register[Entry], tmp_path: Path) -> None:
    (tmp_path / "home_of_things.py").write_text(
        "from sdecor.registers import THINGS, Method\nTHINGS['first'] = Method({'classification': 1})\n"
    )
    assert list(things) == ["first"]
    for weight in (1, 2, 2):
        things["mine"] = Method({"classification": weight})
    assert getattr(things["mine"], "terms") == {"classification": 2.0}  # noqa: B009
    said = "thing 'first' is there already (home_of_things); choose another name"
    assert message(things.__setitem__, "first", Method({"classification": 2})) == said


# --- files of one's own ---------------------------------------------------------------------------------------------


def test_files_and_modules_that_are_named_are_used_once(
    things: Register[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("by_file", "by_module"):
        (tmp_path / f"{name}.py").write_text(f"{HOME}\nprint('here is {name}')".replace("first", name))
    monkeypatch.setenv(USE, f"{tmp_path / 'by_file.py'}:by_module:")
    assert list(things) == ["first", "by_file", "by_module"]
    before = things["by_file"].function
    use(str(tmp_path / "by_file.py"), "by_module")
    assert things["by_file"].function is before


def test_what_cannot_be_used_is_named(things: Register[Entry], tmp_path: Path) -> None:
    assert message(use, str(tmp_path / "no.py")) == f"no file '{tmp_path / 'no.py'}' to use"
    wanted = "give a module on PYTHONPATH, or a file FILE.py"
    for name in ("no_such_module", "no_such.module", "./net", ".", "/abs/file", "a-b"):
        assert message(use, name) == f"no module '{name}' to use; {wanted}"
    (tmp_path / "needs_more.py").write_text("import no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        use("needs_more")


def test_a_file_that_fails_is_not_taken_for_used(
    things: Register[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "failing.py"
    file.write_text(f"{HOME}\nraise RuntimeError('half way')".replace("first", "half"))
    monkeypatch.setenv(USE, str(file))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^cannot use '.*failing\.py': RuntimeError: half way$"):
            list(things)
    file.write_text(HOME.replace("first", "half"))
    assert list(things) == ["first", "half"]


def test_two_files_of_one_name_are_two_files(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(
            "from sdecor.registers import FILLS\n\n\n@FILLS.register\ndef same(x):\n    return x\n"
        )
    try:
        use(str(tmp_path / "a" / "mine.py"))
        with pytest.raises(ValueError, match="fill 'same' is there already"):
            use(str(tmp_path / "b" / "mine.py"))
    finally:
        del FILLS["same"]
        for alias in [name for name in sys.modules if name.startswith("sdecor_use_mine")]:
            del sys.modules[alias]


def test_no_term_is_called_total() -> None:
    with pytest.raises(ValueError, match="a term cannot be called 'total'"):
        TERMS.register("total")(lambda step: step.logits.sum())
