"""The tokenizer of each model of a study, the tokens that end an answer, and BOS. All come from the models' files on this disk.

Models whose tokenizers give the same ids to the same tokens form a family. Models of one family that teach each other must read the same
tokens and end their answers in the same way. So all of them use the tokenizer of the family's first model, which is the original teacher in
its own family. If a token ends the answers of one of these models, it ends the answers of all of them. Between models of two families, text
can pass, but token ids cannot (`plan.paths`).
"""

from collections.abc import Callable, Mapping
from functools import cache, cached_property

from tadistill.config import DataRef, Recipe
from tadistill.config.data import Data
from tadistill.config.recipe import trains
from tadistill.data import chat, survey
from tadistill.data.encoding_rules import of_one_turn
from tadistill.data.tinyworld import TOKENIZERS, check_name
from tadistill.errors import ModelError, about
from tadistill.models import sources, tokens
from tadistill.models.tokens import Tokens, Vocabulary
from tadistill.plan.costs.light_tokenizer import vocabulary
from tadistill.plan.inputs import Encoding, TokenizerFiles
from tadistill.plan.paths import contexts_of, with_parents
from tadistill.text import counted, listed

_SHOWN = 3  # number of tokens that a sentence names


class StudyTokens:
    """The tokenizers and special tokens of a recipe's models."""

    def __init__(self, recipe: Recipe, teacher: str | None):
        """`teacher` is the original teacher. If it is None and the recipe has no `search`, every model keeps its own tokenizer."""
        self.recipe, self.teacher = recipe, teacher or (recipe.search.teacher if recipe.search else None)
        self._vocabulary: Callable[[str, str], Vocabulary | None] = cache(
            lambda source, revision: vocabulary(source, revision, recipe.data.world)
        )
        self._of_root: Callable[[str], Tokens] = cache(self._read)
        self._lead: Callable[[str], str] = cache(self._first)
        self._encoding: Callable[[str, bool, bool], Encoding] = cache(self._settings)
        self.tokenizer: Callable[[str], tuple[str, str] | None] = cache(self._other_tokenizer)
        """Returns the source and the revision of the tokenizer that a model uses in place of its own. None if it uses its own."""

    def __reduce__(self) -> tuple[type["StudyTokens"], tuple[Recipe, str | None]]:
        return StudyTokens, (self.recipe, self.teacher)  # the caches cannot be pickled

    # --- what the stages need -------------------------------------------------------------------------------------------

    def _other_tokenizer(self, name: str) -> tuple[str, str] | None:
        own, lead = self._of(name), self._of(self._lead(name))
        source, other = self._source(name), self._source(self._lead(name))
        if source == other or None in (own.eos, lead.eos):
            return None
        return other if self._differences(name, str) or self._extra(name, self._lead(name))[0] else None

    def source(self, name: str) -> tuple[str, str]:
        """Return source and revision of the tokenizer that a model uses."""
        return self.tokenizer(name) or self._source(name)

    def files(self, name: str) -> TokenizerFiles:
        """Return the tokenizer that a model uses, as an input of a stage."""
        (source, revision), written = self.source(name), self.recipe.written
        fingerprint = None if source in TOKENIZERS else sources.fingerprint(source, revision, weights=False)
        return TokenizerFiles(source=written(source) or source, revision=revision, fingerprint=fingerprint, at=source)

    def alike(self, one: str, other: str) -> bool:
        """Return True if two models are of one family: a token that both have has the same id in both, and both tokenise a text in the same
        way."""
        return self.family(one) == self.family(other)

    def known(self, *names: str) -> bool:
        """Return True if the tokens of all these models are known. Those of a model that is not on this disk are not."""
        return all(self._tokens(name) is not None for name in names)

    def hands_over_ids(self, one: str, other: str) -> bool:
        """Return True if a student can train on token ids that another model has sampled: their tokenizers have exactly the same tokens."""
        if not self.alike(one, other):
            return False
        mine, theirs = (self._vocabulary(*self.source(name)) for name in (one, other))
        return mine is None or theirs is None or mine.ids == theirs.ids

    def fewer(self, reader: str, writer: str) -> int | None:
        """Return the number of token ids of a model (the largest id plus 1), if another model of its family has more. Return None if it has
        not more, or if the number is not known."""
        if not self.alike(reader, writer):
            return None
        mine, theirs = (self._vocabulary(*self.source(name)) for name in (reader, writer))
        return mine.size if mine and theirs and mine.size < theirs.size else None

    def family(self, name: str) -> tuple[str, ...]:
        """Return the models that share a model's tokenizer, with the model itself."""
        return next((family for family in self._families if name in family), (name,))

    @property
    def families(self) -> list[tuple[str, ...]]:
        """The models of the arms in families: groups that share a tokenizer."""
        return list(dict.fromkeys(map(self.family, self._used)))

    def readers(self, name: str) -> tuple[str, ...]:
        """Return the loaded models of a model's family. Their common tokenizer counts the tokens of the model's texts (`Ledger.of`).
        Empty if all models share one tokenizer."""
        roots = {self.recipe.root(other) for other in self.family(name)}
        return tuple(n for n in self.recipe.models if n in roots) if len(self._families) > 1 else ()

    def sizes(self, *names: str) -> str:
        """Return the vocabulary sizes of some models in words, such as `49,152 and 50,257 tokens`."""
        return f"{listed([f'{len(self._tokens(name) or ()):,}' for name in names])} tokens"

    def encoding(self, name: str, *, samples: bool = True, responses: bool = False) -> Encoding:
        """Return the settings with which the rows of data sets become tokens for a model.

        Args:
            samples: answers are sampled from the model.
            responses: the stage uses the responses of the training set. Only then can a row have several turns.

        Raises:
            ModelError: the prompts need a chat template, but no model that shares this tokenizer has one.
        """
        return self._encoding(name, samples, responses)

    def _settings(self, name: str, samples: bool, responses: bool) -> Encoding:
        self._check_template(name)
        data, lead = self.data(name), self._of(self._lead(name))
        ends, own = self.ends(name), (lead.eos, *self._of(name).generation)
        same = set(ends) == set(own) or not samples
        return Encoding(
            **{field: getattr(data, field) for field in Encoding.model_fields if field not in ("ends", "bos", "turns", "context")},
            turns=data.turns if responses else of_one_turn(data.turns),
            ends=() if lead.eos is None or (same and ends[0] == own[0]) else ends,
            bos=data.bos == "auto" and self.bos_matters(name) and lead.bos is not None,
        )

    def ends(self, name: str) -> tuple[int, ...]:
        """Return every token that ends an answer of a model. The first of them ends the reference answers."""
        return tokens.ends(self._of(self._lead(name)), [self._of(other) for other in self._group(name)], in_chat=self._chat(name))

    def data(self, name: str) -> Data:
        """Return the recipe's `data` with the template of a model.

        Raises:
            ConfigError: models that share the tokenizer name different templates.
        """
        return self.recipe.data_of(dict.fromkeys(self.recipe.root(other) for other in self.family(name)))

    def _check_template(self, name: str) -> None:
        group = self._group(name)
        if not self._templated(name) or any(self._of(other).template or self._of(other).eos is None for other in group):
            return  # a model without a known EOS is not on this disk
        talks = "messages" in self._forms
        in_chat, own = self._chat(name), next((root for root in map(self.recipe.root, group) if self.recipe.models[root].template), None)
        why = f"{f'models.{own}' if own else 'data'}.template is chat" if in_chat else "a `context` has `chat` or `system`"
        key = f"models.{own or self.recipe.root(group[0])}.template" if own or len(self._groups) > 1 else "data.template"
        other = f", or set {key} to alpaca or plain" if in_chat else ", or write the prompt in context.template"
        if talks:
            why, other = "the data has conversations", ""
        raise ModelError(
            f"models.{group[0]}: {why}, but the tokenizer of {listed(group)} has no chat template; set `tokenizer:` of the models to one "
            f"that has a chat template{other}"
        )

    # --- sentences ------------------------------------------------------------------------------------------------------

    def notes(self) -> list[str]:
        """Return sentences for each group of models that share a tokenizer: the tokens that end their answers and, if models have a
        `template`, the text around their instructions."""
        ends: dict[str, list[str]] = {}
        for group in self._groups:
            lead, text = self._lead(group[0]), self._text(group)
            if self._of(lead).eos is not None:
                closing, *others = self.ends(lead)
                also = f"; {listed([*map(text, others)])} can also end it" if others else ""
                ends.setdefault(f"ends with {text(closing)}{also}", []).extend(group)
        found = [f"An answer of {listed(group)} {ending}." for ending, group in ends.items()]
        if "instruction" in self._forms and any(model.template for model in self.recipe.models.values()):
            found += [f"Instructions for {listed(group)} have the template `{self.data(group[0]).template}`." for group in self._groups]
        return found

    def cautions(self) -> list[str]:
        """Return warnings about tokenizers and templates, such as: a model uses another model's tokenizer, or prompts begin with BOS."""
        found = [sentence for group in self._groups for sentence in self._cautions_of(group)]
        for ref, role in self._splits:
            if survey.has_unread_tools(ref, role, self.recipe.data):
                found.append(f"Rows of {ref.name} ({role}) have `tools`, which are ignored; to use them, set `columns: {{tools: tools}}`.")
        return found

    def _cautions_of(self, group: tuple[str, ...]) -> list[str]:
        lead = self._lead(group[0])
        first, text, found, data = self._of(lead), self._text(group), [], self.data(lead)
        for name in group:
            mine, theirs = self._extra(name, lead)
            if mine or theirs:
                found.append(self._matched(name, lead, mine, theirs))
            if self.tokenizer(name):
                why = listed([*self._differences(name, text), *([f"has {_more(mine)}"] if mine else [])])
                found.append(f"{name} uses the tokenizer of {lead}, because the tokenizer of {name} {why}.")
        if first.bos is not None and self.bos_matters(lead):
            if data.bos == "auto":
                found.append(f"Prompts begin with {text(first.bos)}, the BOS of the tokenizer of {lead}; `data.bos: never` leaves it out.")
            else:
                found.append(
                    f"Because of `data.bos: never`, prompts do not begin with {text(first.bos)}, the BOS of the tokenizer of {lead}."
                )
        variables = {**first.specials, **data.chat_template_kwargs}
        if self._templated(lead) and chat.dated(first.template, variables):
            fixed = "{date_string: 26 Jul 2024}"
            how = f"`data.chat_template_kwargs: {fixed}` sets a fixed date"
            if chat.dated(first.template, {**variables, "date_string": "26 Jul 2024"}):
                how = "a tokenizer with a fixed date in its template avoids this"
            found.append(
                f"The chat template of {lead} writes the current date into prompts, so stages that run on other days read other prompts; "
                f"{how}."
            )
        written = chat.opening(first.template, variables)
        if self._chat(lead) and data.turns == "answer" and written:
            found.append(
                f"The chat template of {lead} writes {written!r} before an answer. A student learns to write this text with "
                "`data.turns: last`, but not with `data.turns: answer`."
            )
        chats = [name for name in group if self._of(name).template]
        chosen = data is not self.recipe.data  # a model has its own `template`
        if chats and not chosen and data.template != "chat" and "instruction" in self._forms:
            found.append(
                f"Check data.template: it is {data.template}, but {listed(chats)} {'has' if len(chats) == 1 else 'have'} a chat "
                "template; for chat models set data.template: chat."
            )
        return found

    def _matched(self, name: str, lead: str, mine: Mapping[str, int], theirs: Mapping[str, int]) -> str:
        shared = len(self._tokens(name) or ()) - len(mine)
        who, extra = (name, mine) if mine else (lead, theirs)
        shown = ", ".join(list(extra)[:_SHOWN]) + (" …" if len(extra) > _SHOWN else "")
        return f"{lead} and {name} share {shared:,} tokens. {who} has {_more(extra)} ({shown}); a text with such a token is refused."

    def _differences(self, name: str, text: Callable[[int], str]) -> list[str]:
        found, own, lead = [], self._of(name), self._of(self._lead(name))
        if own.eos is not None and own.eos != lead.eos:
            found.append(f"has the EOS {text(own.eos)}")
        if self._chat(name) and (own.template or "").strip() != (lead.template or "").strip():
            found.append("has another chat template" if own.template else "has no chat template")
        if own.bos != lead.bos and self.bos_matters(name) and self.recipe.data.bos == "auto":
            found.append("puts no BOS first" if own.bos is None else "puts BOS first")
        return found

    def _text(self, group: tuple[str, ...]) -> Callable[[int], str]:
        known = {i: text for name in group for i, text in self._of(name).texts.items()}
        return lambda i: f"{known[i]} (token {i})" if i in known else f"token {i}"

    # --- the models' files ---------------------------------------------------------------------------------------------------

    @cached_property
    def _used(self) -> tuple[str, ...]:
        search = self.recipe.search
        named = {self.teacher, *(m for arm in self.recipe.arms.values() for m in (*arm.models, *arm.init.values()))}
        named |= {*search.models} if search else set()
        used = with_parents(self.recipe, filter(None, named))
        return tuple(name for name, model in self.recipe.models.items() if name in used and not model.api)

    @property
    def _groups(self) -> list[tuple[str, ...]]:
        return list(dict.fromkeys(self._group(name) for name in self._used))

    def _group(self, name: str) -> tuple[str, ...]:
        return self.family(name) if self.teacher and name in self._used else (name,)

    @cached_property
    def _families(self) -> list[tuple[str, ...]]:
        found: list[list[str]] = []
        for name in sorted(self._used, key=lambda name: name != self.teacher):
            known = next((family for family in found if self._fits(name, family[0])), None)
            found.append([name]) if known is None else known.append(name)
        return [tuple(name for name in self._used if name in family) for family in found]

    def _fits(self, one: str, other: str) -> bool:
        # models that are not on this disk are assumed to fit; `runner.preflight` checks again
        mine, theirs = self._tokens(one), self._tokens(other)
        return mine is None or theirs is None or mine.extra(theirs) is not None

    def _extra(self, name: str, lead: str) -> tuple[Mapping[str, int], Mapping[str, int]]:
        mine, theirs = self._tokens(name), self._tokens(lead)
        return (mine.extra(theirs) if mine and theirs and mine is not theirs else None) or ({}, {})

    def _tokens(self, name: str) -> Vocabulary | None:
        return self._vocabulary(*self._source(name))

    def _first(self, name: str) -> str:
        # the model whose tokenizer the group uses: the teacher, unless a chat template is needed and the teacher has none
        group = self._group(name)
        ordered = [self.teacher, *group] if self.teacher in group else group
        wanted = (n for n in ordered if n and (not self._templated(name) or self._of(n).template))
        return next(wanted, ordered[0] or name)

    def _of(self, name: str) -> Tokens:
        return self._of_root(self.recipe.root(name))

    def _read(self, name: str) -> Tokens:
        model = self.recipe.models[name]
        assert model.load is not None
        source, revision = self._source(name)
        if source in TOKENIZERS:
            return tokens.TINYWORLD
        directory = sources.locate(source, revision, weights=False)
        scratch = model.load.startswith("scratch:")
        weights = None if scratch else sources.locate(model.load, model.revision, weights=False)
        return tokens.read(weights, directory) if directory and (weights or scratch) else Tokens(None)

    def _source(self, name: str) -> tuple[str, str]:
        model = self.recipe.models[self.recipe.root(name)]
        source = model.tokenizer_source
        assert source is not None
        with about(f"models.{name}.tokenizer"):
            check_name(source)
        return source, model.revision

    # --- the data -------------------------------------------------------------------------------------------------------

    @cached_property
    def _forms(self) -> frozenset[str]:
        return frozenset(survey.form(ref, role, self.recipe.data) for ref, role in self._splits)

    @property
    def _splits(self) -> list[tuple[DataRef, str]]:
        return [(ref, role) for role, ref in self.recipe.data.splits(trains=trains(self.recipe))]

    def _chat(self, name: str) -> bool:
        return "messages" in self._forms or (self.data(name).template == "chat" and "instruction" in self._forms)

    def _templated(self, name: str) -> bool:
        # a chat template writes some prompts: those of the model, or a teacher's own
        return self._chat(name) or self._templated_contexts

    @cached_property
    def _templated_contexts(self) -> bool:
        return any(context.chat or context.system is not None for context in contexts_of(self.recipe))

    def bos_matters(self, name: str) -> bool:
        """Return True if some texts of a model are written without a chat template. Then `data.bos` decides whether these texts begin
        with BOS."""
        data = self.data(name)
        return data.corpus is not None or "prompt" in self._forms or (data.template != "chat" and "instruction" in self._forms)


def _more(extra: Mapping[str, int]) -> str:
    return counted(len(extra), "more token")
