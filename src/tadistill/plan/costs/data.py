"""Every split and the corpus, read once so that a missing file or column is known before any work."""

from tadistill.config import Recipe
from tadistill.config.objective import MiniLLM
from tadistill.config.recipe import methods
from tadistill.data import datasets
from tadistill.errors import DataError


def check_data(recipe: Recipe) -> None:
    """Read every split, and the start of the corpus.

    Raises:
        DataError: a file or a column is missing, or two test sets have one name.
    """
    data = recipe.data
    objectives = [method.objective for method in methods(recipe)]
    for ref, role in [(data.train, "train"), (data.dev, "dev"), *((r, "test") for r in data.test)]:
        datasets.load(ref, role, data)
    if data.corpus and any(isinstance(o, MiniLLM) and o.pt_weight for o in objectives):
        next(datasets.texts(data.corpus, world=data.world, root=data.root), None)
    names = [r.name for r in data.test]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"data.test has two sets called `{name}`; rename one of the files")
