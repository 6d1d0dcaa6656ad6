"""Settings given as text: names, types and defaults are read from the source that declares them."""

from __future__ import annotations

import ast
from typing import Any

Values = dict[str, tuple[str, Any]]


def annotated(body: list[ast.stmt]) -> Values:
    """Name to type and default of every ``name: type = literal`` among these statements."""
    return {
        s.target.id: (ast.unparse(s.annotation), ast.literal_eval(s.value))
        for s in body
        if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name) and s.value is not None
    }


def typed(name: str, kind: str, text: str) -> Any:
    """The value that `text` means for a setting of type `kind`.

    Raises:
        ValueError: If it means none.
    """
    try:
        if kind.endswith("| None") and text.lower() == "none":
            return None
        if kind == "tuple[str, ...]":
            return tuple(text.split(",")) if text else ()
        if kind.startswith("tuple[tuple"):
            return tuple((k, _literal(v)) for k, v in (part.split("=", 1) for part in text.split(",") if part))
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        return {"int": int, "float": float, "str": str}[kind.removesuffix(" | None")](text)
    except (ValueError, KeyError):
        raise ValueError(f"'{name}' must be of type {kind}, got '{text}'") from None


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
