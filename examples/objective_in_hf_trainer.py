"""Use a fused objective in transformers.Trainer: python examples/objective_in_hf_trainer.py [--teacher NAME --student NAME]"""

from argparse import ArgumentParser

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, LlamaConfig, Trainer, TrainingArguments, set_seed

from tadistill.data import tinyworld
from tadistill.objectives import Head, Hidden, fused_divergence, jensen_shannon


class Distiller(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        counted = inputs.pop("labels")[:, 1:] != -100  # the state at t predicts the token at t + 1
        passes = [m(**inputs, output_hidden_states=True, logits_to_keep=1) for m in (model, teacher)]  # the loss computes the logits itself
        states = [p.hidden_states[-1][:, :-1] for p in passes]
        heads = [Head(m.get_output_embeddings().weight) for m in (self.model, teacher)]  # add softcap or scale where a model has one
        world = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1  # processes, over which torch averages
        count = counted.sum() if num_items_in_batch is None else num_items_in_batch.max() / world  # dividing the loss would copy a gradient
        loss, _ = fused_divergence(jensen_shannon, states[0], heads[0], Hidden(states[1], heads[1]), mask=counted / count, beta=0.5)
        return (loss, passes[0]) if return_outputs else loss


def load(name: str | None, std: float):
    size = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tiny = LlamaConfig(**size, initializer_range=std)
    return AutoModelForCausalLM.from_pretrained(name) if name else AutoModelForCausalLM.from_config(tiny)


parser = ArgumentParser()
parser.add_argument("--teacher", help="by default both models are small and random, and nothing is downloaded")
parser.add_argument("--student", help="a model with the teacher's tokenizer")
parser.add_argument("--steps", type=int, default=150)
options = parser.parse_args()
set_seed(0)  # fixes the weights of the random models, too
tokenizer = AutoTokenizer.from_pretrained(options.teacher) if options.teacher else tinyworld.tokenizer()
tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or tokenizer.eos_token, "right"  # left would shift GPT-2's positions
settings = TrainingArguments("runs/hf_trainer", max_steps=options.steps, learning_rate=5e-3, logging_steps=10, report_to=[])
teacher, student = load(options.teacher, 0.1).eval().requires_grad_(False).to(settings.device), load(options.student, 0.02)
texts = [[row["instruction"] + "\n", row["outputs"][0] + tokenizer.eos_token] for row in tinyworld.world_rows("tinyworld", "train")]
data = [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in (tokenizer(text)["input_ids"] for text in texts)]
Distiller(student, settings, DataCollatorForSeq2Seq(tokenizer), data).train()
