"""From records to what a page shows: a tidy frame, of it tables, differences, verdicts, figures, glued numbers.

The frame has a row for every record and measure, and all settings as columns. Runs that differ in anything but the seed
are different **arms**; nothing here pools them. A measure is undefined where a record lacks it or holds no finite
number: tables then show a dash, or, if other seeds have it, how many these are, such as ``(4 of 5)``.

`columns` and `panels` name the measures that are wanted: names alone, or a mapping of names to heading, factor and
decimals, such as ``{"accuracy": ("accuracy, %", 100, 2)}``.
"""

from sdecor.report.figures import forest, response_figure, verdict_figure
from sdecor.report.frames import arms, curves, frame, headings
from sdecor.report.page import glue, glue_differences, glue_values, provenance
from sdecor.report.tables import difference_table, differences, overview, pairs, score_table, table
from sdecor.report.verdicts import verdict, verdict_table

__all__ = ["arms", "curves", "difference_table", "differences", "forest", "frame", "glue", "glue_differences"]
__all__ += ["glue_values", "headings", "overview", "pairs", "provenance", "response_figure", "score_table", "table"]
__all__ += ["verdict", "verdict_figure", "verdict_table"]
