"""The sizes of a recipe's models, from their configurations."""

from tadistill.config import Recipe
from tadistill.errors import about
from tadistill.models.counting import shapes, sizes
from tadistill.models.counting.sizes import Adapters, Size, adapters_of
from tadistill.plan.costs.light_tokenizer import vocabulary
from tadistill.plan.costs.training import Described
from tadistill.tuning import PACKED_FAMILIES


class ModelSizes:
    """Computes the sizes of a recipe's models from their configurations, without their weights."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def unknown(self) -> list[str]:
        """Return the models whose config.json is not on this disk, as `NAME (SOURCE)`."""
        models = self.recipe.models.items()
        return [f"{name} ({model.load})" for name, model in models if model.load and self.config(name) is None]

    def size(self, name: str) -> Size | None:
        """Return the size of a model. Return None if its configuration is not on this disk, or if its family is not supported."""
        config = self.config(name)
        with about(f"models.{name}"):
            return None if config is None else sizes.size_of(config)

    def described(self, name: str) -> Described | None:
        """Return a model's size and configuration. Return None if `size` returns None."""
        size, config = self.size(name), self.config(name)
        return None if size is None or config is None else Described(size, config, here=self.recipe.models[name].serve is None)

    def config(self, name: str) -> dict | None:
        """Return a model's configuration, after pruning if the recipe prunes it. Return None if it is not on this disk."""
        with about(f"models.{name}"):
            return self._config(name)

    def _config(self, name: str) -> dict | None:
        model = self.recipe.models[name]
        if model.parent:
            parent = self.config(model.parent)
            if parent is None or model.init is None:
                return parent
            if not model.init.measured:
                shapes.check_layers(parent, model.init.layers, f"models.{name}.init.layers", model.init.from_)
                return sizes.with_layers(parent, model.init.sizes["layers"])
            shape = shapes.resized(shapes.shape_of(parent), **model.init.sizes)
            with about(f"models.{name}.init"):
                shapes.check_shape(parent, shape)
            return shapes.with_shape(parent, shape)
        if model.api:
            return None
        assert model.load is not None
        vocab = vocabulary(model, self.recipe.data.world) if model.tokenizer else None
        return sizes.read_config(model.load, model.revision, model.config, vocab)

    def adapters(self, name: str) -> Adapters | None:
        """Return the parameter counts of a model's LoRA adapters. Return None if the model has no `lora`, or if its size is not known.

        Raises:
            ConfigError: an entry of `lora.targets` is not a linear layer of the model.
        """
        lora, config = self.recipe.models[name].lora, self.config(name)
        if lora is None or config is None:
            return None
        with about(f"models.{name}.lora.targets"):
            return adapters_of(config, lora.r, lora.targets)

    def _packs(self, name: str) -> bool:
        return (self.config(name) or {}).get("model_type") in PACKED_FAMILIES

    def untrained(self, name: str) -> bool:
        """Return True if a model has random weights before its distillation. Such a model never ends an answer."""
        model = self.recipe.models[name]
        if model.sft:
            return False
        return self.untrained(model.parent) if model.parent else str(model.load).startswith("scratch:")
