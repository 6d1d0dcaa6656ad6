"""Measures of attributions, of what a model uses, and of its features: tensors in, one number per image or layer out.

What is undefined is NaN, never a silent 0: use `torch.nanmean` and say how many were left out. Inputs are not modified.
"""

from sdecor.measures.faithfulness import ORDERS, masked_accuracy
from sdecor.measures.localization import chance_level, pointing_game, relevance_mass
from sdecor.measures.representation import Covariance, effective_rank, mean_abs_correlation
from sdecor.measures.sharpness import entropy, gini, top_mass
from sdecor.measures.statistics import Difference, Summary, paired_difference, summary

__all__ = [
    "ORDERS",
    "Covariance",
    "Difference",
    "Summary",
    "chance_level",
    "effective_rank",
    "entropy",
    "gini",
    "masked_accuracy",
    "mean_abs_correlation",
    "paired_difference",
    "pointing_game",
    "relevance_mass",
    "summary",
    "top_mass",
]
