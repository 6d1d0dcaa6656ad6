"""Measures of attributions, of what a model uses, and of its features: tensors in, one number per image or layer out.

What is undefined is NaN, never a silent 0: use `torch.nanmean` and say how many were left out. Inputs are not modified.
Not here is `sdecor.measures.faithfulness.faithfulness`, which has the name of its module.
"""

from sdecor.measures.faithfulness import (
    ORDERS,
    area_between,
    comprehensiveness,
    deletion,
    faithfulness_correlation,
    infidelity,
    insertion,
    masked_accuracy,
    monotonicity,
    perturbation_curve,
    sufficiency,
)
from sdecor.measures.localization import (
    auroc,
    average_precision,
    best_iou,
    box_masks,
    chance_level,
    mosaic,
    pointing_game,
    relevance_mass,
    relevance_rank,
)
from sdecor.measures.representation import (
    Covariance,
    cka,
    condition_number,
    effective_rank,
    mean_abs_correlation,
    participation_ratio,
)
from sdecor.measures.robustness import attack, explanation_shift, local_lipschitz, max_sensitivity, spearman, ssim
from sdecor.measures.sanity import controls, parameter_randomization, randomized
from sdecor.measures.sharpness import effective_support, entropy, gini, top_mass, total_variation
from sdecor.measures.statistics import (
    Difference,
    Summary,
    compare,
    effect_size,
    equivalence,
    holm,
    paired_bootstrap,
    paired_difference,
    summary,
)

__all__ = [
    "ORDERS",
    "Covariance",
    "Difference",
    "Summary",
    "area_between",
    "attack",
    "auroc",
    "average_precision",
    "best_iou",
    "box_masks",
    "chance_level",
    "cka",
    "compare",
    "comprehensiveness",
    "condition_number",
    "controls",
    "deletion",
    "effect_size",
    "effective_rank",
    "effective_support",
    "entropy",
    "equivalence",
    "explanation_shift",
    "faithfulness_correlation",
    "gini",
    "holm",
    "infidelity",
    "insertion",
    "local_lipschitz",
    "masked_accuracy",
    "max_sensitivity",
    "mean_abs_correlation",
    "monotonicity",
    "mosaic",
    "paired_bootstrap",
    "paired_difference",
    "parameter_randomization",
    "participation_ratio",
    "perturbation_curve",
    "pointing_game",
    "randomized",
    "relevance_mass",
    "relevance_rank",
    "spearman",
    "ssim",
    "sufficiency",
    "summary",
    "top_mass",
    "total_variation",
]
