"""Write the model card of an exported model: what the study found about it, and how to use it, with a complete program."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from tadistill.config.data import Data, training_refs
from tadistill.config.evaluate import Evaluate
from tadistill.data.hub import NAMED
from tadistill.data.prompts import in_alpaca, render
from tadistill.data.rows import Example
from tadistill.data.tinyworld import world_rows
from tadistill.disk import read_json
from tadistill.metrics import MEAN, METRICS, metric_title, metric_unit, sorted_names
from tadistill.models import sources, tokens
from tadistill.report.against_sft import own_against_sft
from tadistill.report.analysis import analyses
from tadistill.report.explain import caution_texts, undecided_text, verdict_text
from tadistill.report.path_words import route
from tadistill.report.plain_text import bullets, code, escape_markdown, pipe_table
from tadistill.report.tables import Cell, mean_cell, sample_text
from tadistill.results.collect import Results, primary_metric, sets_with, stack, summarise
from tadistill.results.measured import stream_predictions
from tadistill.results.number_text import number, parameters_text, rows_text, summary_text
from tadistill.results.study import ArmRecord
from tadistill.results.verdict import comparisons, pairs
from tadistill.store import STAGE
from tadistill.text import counted

Format = Literal["alpaca", "plain", "chat", "verbatim"]
_QUESTION = "What is the capital of France?"
_PLACE = "{question}"
_SAID = {
    "alpaca": "It was trained on prompts in the Alpaca template, with a line break at the end:",
    "plain": "It was trained on prompts that end with a line break:",
    "chat": "It was trained on conversations in the chat template of its tokenizer.",
    "verbatim": "It was trained on prompts without a template.",
}
_FILES = (".jsonl", ".json", ".txt", ".parquet", ".csv", ".tsv")


def model_card(results: Results, arm_name: str, seed: int, folder: Path, name: str) -> str:
    """Return the model card of an exported model: how to use it, the verdict on its arm, its scores, how it was made, and its limits.

    Args:
        folder: the trained model.
        name: the directory or the Hub id from which the example program in the card loads the model.
    """
    arm, plan = results.arm(arm_name), results.plan
    size = parameters_text(plan.parameters[arm.model])
    analysis = [sentence for a in analyses(results) if a.arm == arm.name for said in a.explanations.values() for sentence in said]
    blocks = [
        f"---\n{yaml.safe_dump(_front_matter(results, arm, seed), sort_keys=False, allow_unicode=True)}---",
        f"# {escape_markdown(arm.name)} of study {escape_markdown(plan.study)}, seed {seed}",
        _made(results, arm, size),
        "## How to use it\n\n" + _usage(results, arm, folder, name),
        "## Verdict\n\n" + bullets(_verdict(results, arm)),
        "## Numbers\n\n" + _numbers(results, arm, seed),
        *(["## Analysis\n\n" + bullets(analysis)] if analysis else []),
        "## How it was made\n\n" + _provenance(results, arm, seed),
        "## Limits\n\n" + bullets(_limits(results, arm)),
    ]
    return "\n\n".join(blocks) + "\n"


def _made(results: Results, arm: ArmRecord, size: str) -> str:
    name, models = arm.model, results.plan.recipe["models"]
    text = f"Model {escape_markdown(name)} ({size} parameters), made by the path {code(arm.shown_path)} with {escape_markdown(arm.method)}."
    text += "".join(f" {sentence}" for sentence in _beginnings(results, arm))
    for origin in dict.fromkeys(_origin(models, model) for model in (*arm.models, name)):
        if base := results.plan.bases.get(origin):
            adapter = code(models[origin]["load"])
            text += f" Model {escape_markdown(origin)} is the LoRA adapter {adapter}, merged with its base {code(base)}."
    return text


def _beginnings(results: Results, arm: ArmRecord) -> Iterator[str]:
    # what the arm's model, its teachers and the models from which they are made are before any distillation
    models, starts = results.plan.recipe["models"], route(arm).starts
    found, todo = set[str](), [arm.model, *arm.models]
    while todo:
        if (name := todo.pop(0)) not in found:
            what, parent = _beginning(models[name], starts.get(name))
            tuned = ", fine-tuned on the training data" if models[name].get("sft") else ""
            yield f"Model {escape_markdown(name)} is {what}{tuned}."
            found.add(name)
            todo += [parent] if parent else []


def _beginning(model: dict[str, Any], pruned_from: str | None) -> tuple[str, str | None]:
    """Return what a model is before any distillation, and the model from which it is made, if there is one."""
    if pruned_from:
        return f"cut out of model {escape_markdown(pruned_from)}", pruned_from
    if cut := model.get("init"):
        sizes = ", ".join(f"{name} {cut[name]}" for name in ("layers", "hidden", "intermediate", "heads") if cut.get(name))
        return f"cut out of model {escape_markdown(cut['from'])} ({sizes})", cut["from"]
    if kept := model.get("checkpoint"):
        return f"model {escape_markdown(kept['of'])} after update {kept['step']} of its fine-tuning", kept["of"]
    if temper := model.get("temper"):
        return f"model {escape_markdown(temper['of'])} with another temperature", temper["of"]
    if not (load := model.get("load")):
        return "behind an API", None
    return f"{'made with random weights: ' if load.startswith('scratch:') else ''}{code(load)}", None


def _front_matter(results: Results, arm: ArmRecord, seed: int) -> dict[str, Any]:
    plan, on_hub = results.plan, _on_hub(results, arm, seed)
    content: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base := _hub_id(plan.recipe["models"], arm.model, plan.bases, on_hub):
        content["base_model"] = base
    if datasets := _datasets(plan.recipe["data"], on_hub):
        content["datasets"] = datasets
    present = {metric for name, _, metric in results.summaries if name == arm.name}
    metrics = list(dict.fromkeys(m.hub for m in METRICS.values() if m.hub and m.name in present))
    return content | {"metrics": metrics, "tags": ["distillation", "tadistill"]}


Place = tuple[Literal["model", "data"], str]  # a source as the recipe names it


def _on_hub(results: Results, arm: ArmRecord, seed: int) -> dict[Place, bool]:
    """Return for each source of an arm if it was on the Hub when the study was planned. Local sources may be gone, or elsewhere, by now."""
    found: dict[Place, bool] = {}
    files = [results.store.folder(stage.key) / STAGE for stage in results.plan.ancestors(arm.final[seed])]
    todo: list[Any] = [read_json(file)["spec"] for file in files if file.is_file()]
    while todo:
        part = todo.pop()
        if isinstance(part, dict) and "fingerprint" in part and ("load" in part or "ref" in part):
            place: Place = ("model", part["load"]) if "load" in part else ("data", part["ref"]["load"])
            found[place] = part["fingerprint"].startswith("hub:") and found.get(place, True)
        todo += part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
    return found


def _hub_id(models: dict[str, Any], name: str, bases: Mapping[str, str], on_hub: Mapping[Place, bool]) -> str | None:
    origin = _origin(models, name)
    source = bases.get(origin, models[origin]["load"])
    return source if on_hub.get(("model", source), sources.parse_source(source).kind == "hub") else None


def _origin(models: dict[str, Any], name: str) -> str:
    for origin, field in (("init", "from"), ("checkpoint", "of"), ("temper", "of")):
        if models[name].get(origin):
            return _origin(models, models[name][origin][field])
    return name


def _datasets(data: dict[str, Any], on_hub: Mapping[Place, bool]) -> list[str]:
    loads = [ref["load"] for ref in (*training_refs(data), data.get("corpus")) if ref]
    found = [
        NAMED[load].hub if load in NAMED else load for load in loads if load in NAMED or on_hub.get(("data", load), _may_be_on_hub(load))
    ]
    return list(dict.fromkeys(found))


def _may_be_on_hub(load: str) -> bool:
    # for stages of earlier versions, and for a corpus that no stage of the arm reads
    return load.count("/") == 1 and not load.startswith((".", "/", "~")) and not load.endswith(_FILES) and not Path(load).exists()


def _verdict(results: Results, arm: ArmRecord) -> list[str]:
    sentences: list[str] = []
    for c in comparisons(results):
        if arm.name in (c.arm, c.other):
            sentences += [verdict_text(results, c), *caution_texts(c)]
    decided = {c.arm for c in comparisons(results)}
    sentences += [undecided_text(p) for p in pairs(results) if p.arm.name == arm.name and p.against != "pair" and p.arm.name not in decided]
    sentences += own_against_sft(results, arm)
    return sentences or ["The study does not compare this arm with another arm, so it makes no claim about the arm's method."]


def _numbers(results: Results, arm: ArmRecord, seed: int) -> str:
    if seed not in results.scores[arm.name]:
        return f"Seed {seed} is not evaluated yet: run `{results.plan.command}` to evaluate it."
    main = [m for m in dict.fromkeys((primary_metric(results), "rouge_l")) if m in results.metrics]
    shown: list[tuple[str, str]] = []
    for metric in main:
        sets = sets_with(results, metric)
        shown += [(metric, name) for name in ((*sets, MEAN) if len(sets) > 1 else sets)]
    present = [metric for name, _, metric in results.summaries if name == arm.name]
    others = [metric for metric in sorted_names(present, lambda metric: metric.on_card) if metric not in main]
    body: list[list[str]] = []
    for metric, name in [*shown, *((metric, MEAN) for metric in others)]:
        title = f"{metric_title(metric)} ({metric_unit(metric)})" if metric_unit(metric) else metric_title(metric)
        cells = _number_cells(results, arm, seed, metric, name)
        body += [[title, "mean over sets" if name == MEAN else name, *cells]] if cells else []
    found = pipe_table(["metric", "set", f"this model (seed {seed})", "mean of the arm"], body)
    sample = f"The arm's mean {metric_title(main[0])} is computed from {sample_text(results, arm)}."
    return f"{found}\n\nThe numbers in brackets are 95 % intervals. {sample}"


def _number_cells(results: Results, arm: ArmRecord, seed: int, metric: str, set_name: str) -> list[str]:
    if (summary := results.summaries.get((arm.name, set_name, metric))) is None:
        return []
    mean = mean_cell(results, arm.name, metric, set_name)
    if metric not in results.metrics:  # one value per set
        return [number(summary.per_seed[seed], metric) if seed in summary.per_seed else Cell().text, mean.text]
    sets = sets_with(results, metric) if set_name == MEAN else (set_name,)
    if not all(metric in results.scores[arm.name][seed].get(name, {}) for name in sets):
        return [Cell().text, mean.text]
    own = summarise([stack(results, arm.name, (seed,), name, metric) for name in sets], (seed,), metric)
    return [summary_text(own, metric), mean.text]


def _provenance(results: Results, arm: ArmRecord, seed: int) -> str:
    plan = results.plan
    stages = plan.ancestors(arm.final[seed])[::-1]
    versions: dict[str, str] = {}
    for stage in stages:
        versions |= results.manifests[stage.key].versions if stage.key in results.manifests else {}
    listed = [[f"`{stage.key}`", stage.label] for stage in stages]
    packages = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    ran_on = f"\n\nVersions: {packages}." if packages else ""
    made = f"{code(plan.command, 'sh')}\n\n{code(plan.recipe_text, 'yaml')}"
    return f"{made}\n\n{pipe_table(['stage', 'what'], listed)}{ran_on}"


def _limits(results: Results, arm: ArmRecord) -> list[str]:
    sets = ", ".join(results.sets) or "no test set yet"
    trained = len(results.scores[arm.name])
    sentences = [
        f"Measured on {sets}; nothing is known about other tasks or languages, and no safety evaluation was made.",
        "The licences of the base model, the teacher and the data apply; this card does not state them.",
        "The exported seed is the recipe's first finished seed, or the seed that the user named. It was not chosen by its score.",
    ]
    sentences += [f"T{sentence[1:]}." for sentence in arm.inexact]
    sentences += [text for text in [results.plan.drawn, rows_text([s for s in results.used if not s.arms or arm.name in s.arms])] if text]
    if trained < len(arm.evaluate):
        seeds = counted(len(arm.evaluate), "seed of this arm is", "seeds of this arm are")
        sentences.append(f"The study is not finished: {trained} of {seeds} evaluated.")
    return sentences


# --- how to use the model --------------------------------------------------------------------------------------------


def _usage(results: Results, arm: ArmRecord, folder: Path, name: str) -> str:
    """Return the section `How to use it` of a model card.

    Args:
        folder: the trained model. The files of its tokenizer determine if a prompt begins with the BOS token.
        name: the directory or the Hub id from which a user loads the model.
    """
    written, data = prompt_format(results, arm, folder), _data(results)
    text = render(Example(_PLACE, "", ("",), verbatim=written == "verbatim"), written, None) if written != "chat" else ""  # type: ignore[arg-type]
    shown = [code(text, "text")] if written in ("alpaca", "plain") else []
    bos = written != "chat" and data["bos"] == "auto" and tokens.read(folder, folder).bos is not None
    more = ["Every prompt begins with the BOS token, which the program adds."] if bos else []
    said = ("\n\n" if shown else " ").join([_SAID[written], *shown, *more])
    return f"{said}\n\n{code(_program(results, text, name, bos), 'python')}"


def prompt_format(results: Results, arm: ArmRecord, folder: Path) -> Format:
    """Return the name of the format of the prompts on which a model was trained.

    The format is the recipe's template, unless the first evaluated row has a format of its own: a conversation (`chat`), or a whole prompt
    (`verbatim`). If an earlier version evaluated the model, `chat` means only that the tokenizer has a chat template.
    """
    key = arm.evaluate[arm.first_seed(finished)] if (finished := results.scores[arm.name]) else None
    spec = read_json(results.store.folder(key) / STAGE)["spec"] if key else {"data": _data(results)}
    template = spec["data"]["template"]
    if template == "chat" or key is None:
        return template
    row = next(stream_predictions(results.store, key))
    if "turns" in row:
        return "chat"
    prompt = row["prompt"]
    asked = row.get("instruction", prompt) + row.get("input", "")
    written = in_alpaca(prompt, _given_back(asked, folder)) if template == "alpaca" else prompt.endswith("\n")
    if written or not prompt:
        return template
    return "chat" if "instruction" not in row and tokens.read(folder, folder).template else "verbatim"


def _given_back(text: str, folder: Path) -> str:
    tokenizer = tokens.fast_tokenizer(folder)
    return tokenizer.decode(tokenizer.encode(text).ids) if tokenizer else text


def _data(results: Results) -> dict[str, Any]:
    return {name: Data.model_fields[name].default for name in ("template", "bos")} | {"world": {}} | results.plan.recipe["data"]


def _program(results: Results, text: str, name: str, bos: bool) -> str:
    data = _data(results)
    question = _QUESTION
    if training_refs(data)[0]["load"].startswith("tinyworld"):
        question = str(world_rows("tinyworld", "test", **data["world"])[0]["instruction"])
    decoding = ", ".join(f"{key}={value!r}" for key, value in _decoding(Evaluate.model_validate(results.plan.recipe["evaluate"])).items())
    if text:
        shown = "question" if text == _PLACE else f'f"""{text}"""' if text.count("\n") > 1 else f"f{json.dumps(text)}"
        lines = [
            f"question = {json.dumps(question)}",
            f"prompt = {'tokenizer.bos_token + ' if bos else ''}{shown}",
            'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")',
        ]
    else:
        lines = [
            f'messages = [{{"role": "user", "content": {json.dumps(question)}}}]',
            'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
        ]
    return "\n".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})",
            f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})",
            *lines,
            f"output = model.generate(**inputs, {decoding})",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )


def _decoding(settings: Evaluate) -> dict[str, Any]:
    if settings.temperature == 0:
        found: dict[str, Any] = {"do_sample": False}
    else:
        found = {"do_sample": True, "temperature": settings.temperature, "top_k": settings.top_k or 0, "top_p": settings.top_p}
        found |= {"min_p": settings.min_p} if settings.min_p else {}
    found |= {"no_repeat_ngram_size": settings.no_repeat_ngram} if settings.no_repeat_ngram else {}
    return found | {"max_new_tokens": settings.max_new_tokens}
