"""Pruning: make a smaller model from parts of a larger model's weights. A model with the key `init` in the recipe is made in this way.

    student = prune_depth(teacher, keep_list(6, teacher.config.num_hidden_layers))      # keeps evenly spaced layers; works for any family

    measured = importance(teacher, calibration)                                         # for depth and width, by activations
    shape = dataclasses.replace(shape_of(teacher.config), layers=6, intermediate=1024)
    student = prune(teacher, shape, measured)

The result is an ordinary model of the same family. `cut` makes the pruned model, `activations` measures which parts are important, and
`weight_names` lists the axes of each weight. Shapes are in `tadistill.models.counting.shapes`.
"""

from tadistill.models.counting.shapes import Shape, check_shape, shape_of
from tadistill.models.pruning.activations import Importance, importance, keep_important
from tadistill.models.pruning.cut import keep_list, prune, prune_depth

__all__ = ["Importance", "Shape", "check_shape", "importance", "keep_important", "keep_list", "prune", "prune_depth", "shape_of"]
