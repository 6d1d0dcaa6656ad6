"""Measures of attributions, of what a model uses, and of its features: tensors in, one number per image or layer out.

What is undefined is NaN, never a silent 0: use `torch.nanmean` and say how many were left out. Inputs are not modified.
"""

# The register has its measures in the order of this import.
# isort: skip_file

from sdecor.measures import sharpness, localization, faithfulness, robustness, sanity, representation, statistics
from sdecor.measures.case import RECOMMENDED, Case, available, evaluate, measure, needs, quantity, table
from sdecor.registers import MEASURES

__all__ = ["MEASURES", "RECOMMENDED", "Case", "available", "evaluate", "measure", "needs", "quantity", "table"]
__all__ += ["sharpness", "localization", "faithfulness", "robustness", "sanity", "representation", "statistics"]
