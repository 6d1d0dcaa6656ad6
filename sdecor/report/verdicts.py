"""What became of the claims of a plan."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from sdecor.measures.statistics import below, equivalence, holm
from sdecor.report.frames import Columns, headings, wide
from sdecor.report.tables import DASH, ENDS, difference_table, differences

if TYPE_CHECKING:
    from sdecor.plan import Claim

LEVEL = 0.05
_CLAIMED = ["name", "text", "measure", "direction", "arm", "reference", "method", "n", "seeds", *ENDS]
_CLAIMED += ["planned", "p", "p_holm", "p_equivalent", "smallest"]
_SIGNS = {"higher": "+", "lower": "-", "equal": "±"}


def verdict(
    frame: pd.DataFrame,
    claims: Iterable[Claim],
    arms: Mapping[str, str] | None = None,
    planned: Mapping[str, int] | None = None,
) -> pd.DataFrame:
    r"""What became of the claims of a plan: 'holds', 'does not hold', or in all other cases 'cannot tell'.

    Of the paired differences of a claim's `arm` to the one it is `against`, with `smallest` the smallest that matters:

    =======  =======================================  =============================================================
    claimed  holds                                    does not hold
    =======  =======================================  =============================================================
    higher   ``p_holm`` < 0.05 and mean >= smallest   ``p_equivalent`` < 0.05, or ``p_holm`` < 0.05 and mean < 0
    lower    ``p_holm`` < 0.05 and mean <= -smallest  ``p_equivalent`` < 0.05, or ``p_holm`` < 0.05 and mean > 0
    equal    ``p_equivalent`` < 0.05                  ``p_holm`` < 0.05 and \|mean\| > smallest
    =======  =======================================  =============================================================

    ``p_holm`` is that of the paired t test for any difference, ``p_equivalent`` that for one too small to matter: for
    less than `smallest` in the claimed direction (`below`), or, if `equal` is claimed, in either (`equivalence`). An
    effect that is certain, but not certain to matter, is thus left open, and more seeds of the same mean and spread
    take back no claim that holds. All claims of the plan are one family in each of the two columns, whatever they claim
    and also if undefined, so that a plan has even one false alarm in a column in at most 5 % of cases, and no claim
    gains by another's lack of data. This is so for one look, when all seeds are there that were `planned`, by arm; who
    looks after every seed has more false alarms. Intervals are not corrected.

    Fewer than two pairs, or differences that are all the same, leave no test and NaN; only where all are 0 there is
    exactly no change, and the p-values are 1 and 0. Without `arms`, claims name arms as `pairs` does, or keys; with it,
    they name what `arms` maps to those, and a name that it lacks has no runs yet, so no pairs. A row for every claim
    has the columns of `differences`, for `difference_table`, `forest` and `glue_differences`, and ``text``,
    ``direction``, ``smallest``, ``planned`` (seeds, 0 if unknown), ``p_equivalent`` and ``verdict``. ValueError for
    claims that share a name, unknown arms, and arms of which several have the method.
    """
    rows = [_of_claim(frame, claim, arms, planned or {}) for claim in claims]
    if twice := [name for name, times in Counter(row["name"] for row in rows).items() if times > 1]:
        raise ValueError(f"several claims have the name '{twice[0]}'")
    out = pd.DataFrame(rows, columns=_CLAIMED)
    out = out.assign(p_holm=_over_all(out["p"]), p_equivalent=_over_all(out["p_equivalent"]))
    return out.assign(verdict=[_decided(row) for row in out.to_dict("records")])


def _of_claim(
    frame: pd.DataFrame, claim: Claim, arms: Mapping[str, str] | None, planned: Mapping[str, int]
) -> dict[Any, Any]:
    """The row of a claim, its p-values not yet corrected."""
    row: dict[Any, Any] = {name: getattr(claim, name) for name in ("name", "text", "measure", "direction", "smallest")}
    row |= {"arm": claim.arm, "reference": claim.against, "method": "", "n": 0, "seeds": 0}
    row["planned"] = min(planned.get(name, 0) for name in (claim.arm, claim.against))
    row |= dict.fromkeys((*ENDS, "p", "p_equivalent"), math.nan)
    if arms is not None and not {claim.arm, claim.against} <= {*arms}:
        return row
    arm, against = (name if arms is None else arms[name] for name in (claim.arm, claim.against))
    row |= differences(frame, {claim.name: (arm, against)}, [claim.measure]).to_dict("records")[0]
    if row["n"] > 1 and row["low"] == row["high"] == 0:
        return row | {"p": 1.0, "p_equivalent": 0.0}
    both = wide(frame, claim.measure)[[row["arm"], row["reference"]]].dropna()
    return row | {"p_equivalent": _too_small(claim, *both.to_numpy().T.tolist())} if row["n"] else row


def _too_small(claim: Claim, a: list[float], b: list[float]) -> float:
    """P-value of the test that `a` differs from `b` by less than matters."""
    if claim.direction == "equal":
        return equivalence(a, b, claim.smallest)
    return below(a, b, claim.smallest) if claim.direction == "higher" else below(b, a, claim.smallest)


def _over_all(p: pd.Series) -> pd.Series:
    """Corrected p-values; one that is undefined stays so, but counts as a test that was planned."""
    return pd.Series(holm(p.fillna(1.0).tolist()).numpy(), p.index).where(p.notna())


def _decided(row: Mapping[Any, Any]) -> str:
    """The verdict on a claim; comparisons with NaN are false."""
    differs, small = row["p_holm"] < LEVEL, row["p_equivalent"] < LEVEL
    effect = -row["mean"] if row["direction"] == "lower" else row["mean"]
    if row["direction"] == "equal":
        yes, no = small, differs and abs(effect) > row["smallest"]
    else:
        yes, no = differs and effect >= row["smallest"], small or (differs and effect < 0)
    return "holds" if yes else "does not hold" if no else "cannot tell"


def verdict_table(verdicts: pd.DataFrame, columns: Columns = ()) -> pd.DataFrame:
    """Strings, a row a claim, of what `verdict` gives: the effect with its interval, what matters, and what decides.

    The p-values are the corrected ones: ``p`` of any effect, ``p, too small`` of one too small to matter.
    """
    of = {**headings(list(verdicts["measure"].unique())), **headings(columns)}
    out: dict[str, dict[str, str]] = {}
    for name, row in verdicts.set_index("name", drop=False).to_dict("index").items():
        heading, factor, _ = column = of[row["measure"]]
        out[str(name)] = {
            "measure": heading,
            "effect": str(difference_table(pd.DataFrame([row]), {row["measure"]: column}).iloc[0, 0]),
            "smallest effect": f"{_SIGNS[row['direction']]}{factor * row['smallest']:g}",
            "seeds": f"{row['n']} of {row['planned']}" if row["n"] < row["planned"] else str(row["n"]),
            "p": _p_text(row["p_holm"]),
            "p, too small": _p_text(row["p_equivalent"]),
            "verdict": row["verdict"],
        }
    return pd.DataFrame.from_dict(out, orient="index")


def _p_text(p: float) -> str:
    return DASH if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
