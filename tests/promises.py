"""What contracts are made of: a list of checks for each kind of entry, and the words for what is broken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from maps import flags
from torch import Tensor, nn

from sdecor.registers import Entry

Check = Callable[..., None]
#: Kind of entry to its checks, functions of an entry and of what it is to be tried with; "" for all kinds.
CHECKS: dict[str, list[Check]] = defaultdict(list)


def promise(kind: str) -> Callable[[Check], Check]:
    """Decorator that adds a check, and lets its random numbers start from a seed of their own."""

    def enter(check: Check) -> Check:
        def seeded(entry: Any, **how: Any) -> None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                check(entry, **how)

        seeded.__name__ = check.__name__
        CHECKS[kind].append(seeded)
        return seeded

    return enter


def keeps(entry: Entry, held: Any, promised: str) -> None:
    assert bool(held), f"{entry.kind} '{entry.name}' breaks its promise: {promised}"


def same(entry: Entry, one: Tensor, other: Tensor, promised: str, tolerance: float = 0.0) -> None:
    alike = one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
    keeps(entry, alike, promised)


def refuses(entry: Entry, call: Callable[[], Any], *words: str) -> None:
    """The call must raise a ValueError of one line that has these words."""
    try:
        call()
    except ValueError as error:
        found = all(word in str(error) for word in words) and "\n" not in str(error)
        keeps(entry, found, f"its error is one line with the words {words}; it is: {error}")
    else:
        keeps(entry, False, f"it refuses what is wrong, with an error that has the words {words}")


@contextmanager
def unchanged(entry: Entry, *inputs: Tensor, model: nn.Module | None = None) -> Iterator[None]:
    """Inputs, torch's global random state, the switch for gradients, the model's flags, weights and hooks stay."""
    parts = [] if model is None else list(model.modules())
    modes, state = [] if model is None else flags(model), [*inputs, *(model.state_dict().values() if model else ())]
    copies, draws = [t.detach().clone() for t in state], torch.get_rng_state()
    asked = [t.requires_grad for t in inputs]
    yield
    same(entry, torch.get_rng_state(), draws, "torch's global random state stays as it is")
    for now, before in zip(state, copies, strict=True):
        same(entry, now.detach(), before, "neither inputs nor the model's numbers are changed")
    clean = all(t.grad is None for t in inputs) and [t.requires_grad for t in inputs] == asked
    keeps(entry, clean, "no gradient is left at an input")
    keeps(entry, torch.is_grad_enabled(), "gradients stay switched on")
    keeps(entry, model is None or flags(model) == modes, "modes and flags of the model are restored")
    left = [m for m in parts if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    keeps(entry, not left, "no hook is left in the model")


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)
