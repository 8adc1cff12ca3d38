"""Tiny models on a tokenizer of single bytes, with chat templates and several tokens that end an answer."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

PAD, EOS, UNK, BOS, IM_END, IM_START = range(6)
SPECIALS = ("<pad>", "<eos>", "<unk>", "<bos>", "<|im_end|>", "<|im_start|>")
TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
CHATML = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
ROWS = [{"instruction": f"Say {w}", "output": f"{w} it is"} for w in ("red", "blue", "green", "black", "white", "pink", "grey", "gold")]
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


def byte_tokenizer(template: str | None = CHATML, *, eos: str = "<eos>", adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A token per byte after `SPECIALS`; with `adds_bos` the tokenizer puts BOS before a text, as Llama's and Gemma's do."""
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *bytes_to_unicode().values()])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)])
    names = {"pad_token": "<pad>", "eos_token": eos, "unk_token": "<unk>", "bos_token": "<bos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=["<|im_end|>", "<|im_start|>"], **names)
    tokenizer.chat_template = template
    return tokenizer


def bpe_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's, with `size` tokens that are learnt from some texts. It has one special token, <|end|>."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def byte_model(ends: int | list[int] = EOS, *, seed: int = 0, **shape: Any) -> PreTrainedModel:
    """A llama whose generation config ends answers with these tokens; its config says EOS."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", vocab_size=262, eos_token_id=EOS, bos_token_id=BOS, pad_token_id=PAD, **(SHAPE | shape))
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = GenerationConfig(eos_token_id=ends, bos_token_id=BOS, pad_token_id=PAD)
    return model


def save(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> str:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def teach_chat(model: PreTrainedModel, steps: int = 80) -> None:
    """Train a model to answer `ROWS` in ChatML, and to end each answer with <|im_end|>."""
    tokenizer = byte_tokenizer()
    sequences = []
    for row in ROWS:
        prompt = tokenizer.encode(f"<|im_start|>user\n{row['instruction']}<|im_end|>\n<|im_start|>assistant\n")
        sequences.append((len(prompt), [*prompt, *tokenizer.encode(row["output"]), IM_END]))
    width = max(len(ids) for _, ids in sequences)
    ids_BT = torch.tensor([ids + [PAD] * (width - len(ids)) for _, ids in sequences])
    labels_BT = torch.tensor([[-100] * n + ids[n:] + [-100] * (width - len(ids)) for n, ids in sequences])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = model(input_ids=ids_BT, attention_mask=(ids_BT != PAD).long(), labels=labels_BT).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
