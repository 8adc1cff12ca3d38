"""The section of a model card that shows how to use the model: the format of its prompts, and a complete program."""

import json
from pathlib import Path
from typing import Any, Literal

from tadistill.config.data import Data, training_refs
from tadistill.config.evaluate import Evaluate
from tadistill.data.prompts import in_alpaca, render
from tadistill.data.rows import Example
from tadistill.data.tinyworld import world_rows
from tadistill.disk import read_json
from tadistill.models import tokens
from tadistill.report.plain_text import code
from tadistill.results.collect import Results
from tadistill.results.measured import stream_predictions
from tadistill.results.study import ArmRecord
from tadistill.store import STAGE

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
