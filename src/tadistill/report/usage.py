"""The part of a model card that shows how to use the model: its prompt format, and a complete program."""

import json
from pathlib import Path
from typing import Any, Literal

from tadistill.config.data import Data, training_refs
from tadistill.config.evaluate import Evaluate
from tadistill.data.prompts import render, split_prompt
from tadistill.data.rows import Example
from tadistill.data.tinyworld import world_rows
from tadistill.disk import read_json
from tadistill.models import tokens
from tadistill.report.plain import code
from tadistill.results.collect import Results
from tadistill.results.measured import load_predictions
from tadistill.results.study import ArmRecord

Format = Literal["alpaca", "plain", "chat", "verbatim"]
_QUESTION = "What is the capital of France?"
_PLACE = "{question}"
_SAID = {
    "alpaca": "It was trained on prompts in the Alpaca template, with a line break at the end:",
    "plain": "It was trained on prompts that end with a line break:",
    "chat": "It was trained on conversations in the chat template of its tokenizer.",
    "verbatim": "It was trained on prompts without a template.",
}


def usage(results: Results, arm: ArmRecord, folder: Path, name: str) -> str:
    """Return the section `How to use it` of a model card.

    Args:
        folder: the trained model. The files of its tokenizer determine if a prompt begins with the BOS token.
        name: the directory or the Hub id from which a user loads the model.
    """
    written = prompt_format(results, arm, folder)
    text = render(Example(_PLACE, "", ("",), verbatim=written == "verbatim"), written, None) if written != "chat" else ""  # type: ignore[arg-type]
    shown = [code(text, "text")] if written in ("alpaca", "plain") else []
    bos = _puts_bos(results, written, folder)
    more = ["Every prompt begins with the BOS token, which the program adds."] if bos else []
    said = " ".join([_SAID[written], *more]) if not shown else "\n\n".join([_SAID[written], *shown, *more])
    return f"{said}\n\n{code(_program(results, text, name, bos), 'python')}"


def prompt_format(results: Results, arm: ArmRecord, folder: Path) -> Format:
    """Return the format of the prompts on which a model was trained.

    It is the template of the recipe, unless the first evaluated prompt does not have this template. The rows then have a format of their
    own. It is `chat` if the model's tokenizer has a chat template, else `verbatim`.
    """
    key = _evaluated(results, arm)
    spec = read_json(results.store.folder(key) / "stage.json")["spec"] if key else {"data": _data(results)}
    template = spec["data"]["template"]
    if template == "chat" or not (prompt := _first_prompt(results, arm)):
        return template
    if split_prompt(prompt) != (prompt.strip(), "") if template == "alpaca" else prompt.endswith("\n"):
        return template
    return "chat" if tokens.read(folder, folder).template else "verbatim"


def _data(results: Results) -> dict[str, Any]:
    return {name: Data.model_fields[name].default for name in ("template", "bos")} | {"world": {}} | results.plan.recipe["data"]


def _first_prompt(results: Results, arm: ArmRecord) -> str:
    key = _evaluated(results, arm)
    return load_predictions(results.store, key)[0]["prompt"] if key else ""


def _evaluated(results: Results, arm: ArmRecord) -> str | None:
    # the first finished evaluation of the arm
    return arm.evaluate[arm.first_seed(results.scores[arm.name])] if results.scores[arm.name] else None


def _puts_bos(results: Results, written: Format, folder: Path) -> bool:
    return written != "chat" and _data(results)["bos"] == "auto" and tokens.read(folder, folder).bos is not None


def _program(results: Results, text: str, name: str, bos: bool) -> str:
    question = _question(_data(results))
    decoding = ", ".join(f"{key}={value!r}" for key, value in _decoding(Evaluate.model_validate(results.plan.recipe["evaluate"])).items())
    if text:
        lines = [
            f"question = {json.dumps(question)}",
            f"prompt = {'tokenizer.bos_token + ' if bos else ''}{_quoted(text)}",
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


def _quoted(text: str) -> str:
    if text == _PLACE:
        return "question"
    return f'f"""{text}"""' if text.count("\n") > 1 else f"f{json.dumps(text)}"


def _question(data: dict[str, Any]) -> str:
    if not training_refs(data)[0]["load"].startswith("tinyworld"):
        return _QUESTION
    return str(world_rows("tinyworld", "test", **data["world"])[0]["instruction"])


def _decoding(settings: Evaluate) -> dict[str, Any]:
    if settings.temperature == 0:
        found: dict[str, Any] = {"do_sample": False}
    else:
        found = {"do_sample": True, "temperature": settings.temperature, "top_k": settings.top_k or 0, "top_p": settings.top_p}
        found |= {"min_p": settings.min_p} if settings.min_p else {}
    found |= {"no_repeat_ngram_size": settings.no_repeat_ngram} if settings.no_repeat_ngram else {}
    return found | {"max_new_tokens": settings.max_new_tokens}
