"""On-policy distillation in one file: the student writes, and learns from the teacher at every token it wrote.

    python examples/minimal_distillation.py --teacher gpt2-large --student gpt2

It minimises the reverse KL from the student q to the teacher p on text of the student (MiniLLM, Gu et al. 2024; GKD, Agarwal et al. 2024):

    loss = sum over response tokens t of KL(q(. | x, y_<t) || p(. | x, y_<t)) / number of response tokens,    y drawn from q(. | x)

Both models must have the same tokenizer. Shapes: B sequences, T positions of prompt and response together, V vocabulary.
"""

from argparse import ArgumentParser
from itertools import cycle, islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from tadistill.objectives import reverse_kl

PROMPTS = [
    "The three primary colours are",
    "Water boils at a temperature of",
    "To bake bread you need",
    "The capital of France is",
    "A good friend is someone who",
    "The opposite of hot is",
    "Plants turn sunlight into",
    "My favourite season is",
]

parser = ArgumentParser()
parser.add_argument("--teacher", required=True, help="hub id or directory")
parser.add_argument("--student", required=True, help="hub id or directory of a model with the teacher's tokenizer")
parser.add_argument("--prompts", type=Path, help="a text file with one prompt per line")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--new-tokens", type=int, default=64)
parser.add_argument("--lr", type=float, default=1e-5)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--save", type=Path, help="directory for the trained student")
options = parser.parse_args()
lines = options.prompts.read_text(encoding="utf-8").splitlines() if options.prompts else PROMPTS
prompts = [line for line in lines if line.strip()]
if not prompts:
    parser.error(f"{options.prompts} has no prompt; write one per line")

set_seed(options.seed)
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(options.student, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32).to(device).eval()
# eval() turns dropout off, so that the student has the same probabilities in training as when it wrote the text
student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32).to(device).eval()
optimizer = torch.optim.AdamW(student.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0)
shared = min(student.config.vocab_size, teacher.config.vocab_size)  # the larger head has logits for ids that no token has


def response_mask(ids_BT: torch.Tensor, start: int) -> torch.Tensor:
    """Return a bool mask (B, T), True at the tokens of the response up to its first EOS, which is included."""
    is_eos = ids_BT == tokenizer.eos_token_id
    is_eos[:, :start] = False  # if the tokenizer has no padding token, the padding on the left is EOS, too
    ended_before = is_eos.cumsum(1) - is_eos.long() > 0
    mask = ~ended_before
    mask[:, :start] = False
    return mask


def predictions(model, ids_BT: torch.Tensor, attention_BT: torch.Tensor) -> torch.Tensor:
    """Return logits (B, T - 1, V). The logits at position t predict the token at t + 1."""
    # With padding on the left, the first token of the prompt must have position 0, as in `generate`.
    positions_BT = (attention_BT.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids_BT, attention_mask=attention_BT, position_ids=positions_BT, use_cache=False).logits
    return logits[:, :-1, :shared]


endless = cycle(prompts)
for step in range(options.steps):
    # 1. The student answers a batch of prompts, from its whole distribution.
    batch = tokenizer(list(islice(endless, options.batch)), return_tensors="pt", padding=True).to(device)
    with torch.no_grad():
        ids_BT = student.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=options.new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    # 2. The loss counts only the tokens of the response. The models attend to the prompt and the response, but not to padding.
    start = batch["input_ids"].shape[1]
    mask_BT = response_mask(ids_BT, start)
    attention_BT = torch.cat([batch["attention_mask"], mask_BT[:, start:].long()], dim=1)

    # 3. Both models predict every token of the text.
    student_logits = predictions(student, ids_BT, attention_BT)
    with torch.no_grad():
        teacher_logits = predictions(teacher, ids_BT, attention_BT)

    # 4. Reverse KL at each token, summed and divided by the number of tokens. No gradient flows through the sampling.
    counts_BT = mask_BT[:, 1:]  # True where the next token is a response token
    loss = reverse_kl(student_logits[counts_BT], teacher_logits[counts_BT]).sum() / counts_BT.sum()

    # 5. One update.
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f} nats per token, {int(counts_BT.sum())} tokens, gradient norm {norm.item():.2f}")

if options.save:
    student.save_pretrained(options.save)
    tokenizer.save_pretrained(options.save)
