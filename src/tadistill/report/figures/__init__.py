"""The figures of a report, as HTML divs; None or an empty dict where a study has nothing to show."""

from tadistill.report.figures.behaviour import (
    calibration_figures,
    calibration_legend,
    curve_figures,
    curve_legend,
    exposure_figure,
    exposure_legend,
    length_figure,
)
from tadistill.report.figures.paths import budget_figures, lattice_figure, lattice_legend
from tadistill.report.figures.scores import (
    cost_legend,
    difference_figure,
    direct_longer,
    means_figure,
    pareto_figure,
    plane_figure,
    plane_legend,
)
from tadistill.report.figures.style import LegendEntry, Look, arm_legend, looks

__all__ = [
    "LegendEntry",
    "Look",
    "arm_legend",
    "budget_figures",
    "calibration_figures",
    "calibration_legend",
    "cost_legend",
    "curve_figures",
    "curve_legend",
    "difference_figure",
    "direct_longer",
    "exposure_figure",
    "exposure_legend",
    "lattice_figure",
    "lattice_legend",
    "length_figure",
    "looks",
    "means_figure",
    "pareto_figure",
    "plane_figure",
    "plane_legend",
]
