"""The throw-away examples of `test_add_one`: what CONTRIBUTING.md tells, as edits of the package, and code that uses the new thing."""

from dataclasses import dataclass

Edit = tuple[str, str, str]
"""File of the package, an anchor in it, and the text that takes the anchor's place (`@` stands for the anchor itself)."""


@dataclass(frozen=True)
class Walk:
    """One addition."""

    most_files: int
    edits: tuple[Edit, ...]
    use: str
    forgotten: str
    """A word of the error when the last edit is left out."""


HARNESS = """
import pathlib, sys
from tadistill.config import parse
from tadistill.plan.arms import make_plan
from tadistill.plan.task import make_task
from tadistill.stages.execute import run_stage
from tadistill.store import Store

MODEL = "{load: 'scratch:gpt2', tokenizer: tinyworld, seed: %d, config: {n_embd: 8, n_layer: 1, n_head: 1, n_positions: 96}}"

def recipe(method, select="metric: last", arms="new: xl > s"):
    return parse(f'''
study: walk
seeds: [1]
models: {{xl: {MODEL % 1}, s: {MODEL % 2}}}
data:
  {{train: tinyworld, dev: tinyworld, test: [tinyworld], template: plain, max_length: 64, world: {{people: 10}},
   limit: {{train: 8, dev: 4, test: 4}}}}
method: {{{method}, optim: {{steps: 1, batch: 4}}, select: {{{select}}}}}
evaluate: {{seeds: [1], max_new_tokens: 4}}
arms: {{{arms}}}
''', source="walk")

def run(plan, *kinds):
    store = Store(pathlib.Path(sys.argv[1]) / "store")
    for stage in plan.stages.values():
        if stage.kind in kinds:
            run_stage(make_task(plan, stage, store), progress=lambda *_: None, alarm=lambda _: None, stop=lambda: False)
    return store
"""

TRAINS = """
plan = make_plan(recipe("{method}"))
(stage,) = [s for s in plan.stages.values() if s.kind == "distill"]
assert stage.flops > 0
assert run(plan, "distill").manifest(stage.key)["steps"] == 1
"""

# --- an objective -------------------------------------------------------------------------------------------------------

HELLINGER = '''def hellinger(student_logits, teacher_logits, *, scale=1.0, temperature=1.0):
    """Return scale x the squared Hellinger distance."""
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    return 0.5 * scale * ((log_p / 2).exp() - (log_q / 2).exp()).square().sum(-1)


@'''
HELLINGER_CONFIG = '''class Hellinger(Divergence):
    """The squared Hellinger distance."""

    type: Literal["hellinger"] = "hellinger"
    scale: float = 2.0


@'''
OBJECTIVE = Walk(
    most_files=3,
    edits=(
        ("objectives/divergence.py", "def total_variation(", HELLINGER),
        ("config/objective.py", "class TotalVariation(", HELLINGER_CONFIG),
        ("config/objective.py", "    | TotalVariation\n", "    | TotalVariation\n    | Hellinger\n"),
        ("objectives/__init__.py", "    total_variation,\n", "    hellinger,\n@"),
    ),
    use=TRAINS.format(method="objective: {type: hellinger, kd_ratio: 0.5}, sampler: {type: dataset}"),
    forgotten="hellinger",
)

# --- a kind of stage ----------------------------------------------------------------------------------------------------

COUNT_SPEC = '''class CountSpec(Spec):
    """A count of the dev prompts."""

    kind = "count"
    version = 1
    work = "measuring:count"
    measures = True

    model: Handle
    dev: Split


@'''
COUNT = '''def count(context):
    """Count the dev prompts."""
    return {"prompts": context.spec.dev.limit}


@'''
ADD_COUNT = '''    def count(self, name, model, seed):
        """Add a count."""
        from tadistill.plan.kinds import CountSpec

        return self.add(CountSpec(data=self.encoding(name), model=model, dev=self.sets.dev()), f"count {name}", name, seed)

@'''
USE_COUNT = """
from rich.console import Console
from tadistill.plan.arms import _planner
from tadistill.plan.costs import Ledger
from tadistill.plan.preview import print_plan
from tadistill.runner.run_study import save_plan

chosen = recipe("objective: {type: forward_kl}, sampler: {type: dataset}")
planner = _planner(chosen, Ledger(chosen))
plan = planner.plan()
key = planner.stages.count("xl", planner.stages.trained("xl", 1), 1)
planner.graph.mark(key, "new")
store = run(plan, "count")
assert store.manifest(key)["prompts"] == 4
console = Console(record=True, width=200)
print_plan(plan, store, console)
assert "count xl" in console.export_text()
study = save_plan(plan, store.root.parent, recipe_text="", command="")
assert "count xl" in (study / "plan.json").read_text()
"""
KIND = Walk(
    most_files=3,
    edits=(
        ("plan/kinds.py", "KINDS: dict", COUNT_SPEC),
        ("stages/measuring.py", "def probe(", COUNT),
        ("plan/builder.py", "    def probe(", ADD_COUNT),
        ("plan/kinds.py", "ProbeSpec, PairSpec)", "ProbeSpec, PairSpec, CountSpec)"),
    ),
    use=USE_COUNT,
    forgotten="count",
)

# --- a metric -----------------------------------------------------------------------------------------------------------

USE_METRIC = """
import json
from tadistill.report import read_results, write_report
from tadistill.report.model_card import model_card
from tadistill.runner.run_study import save_plan

method = "objective: {type: forward_kl}, sampler: {type: dataset}"
plan = make_plan(recipe(method, "metric: rouge_l", "new: xl > s, old: {path: xl > s, optim: {lr: 1e-3}}"))
store = run(plan, *{stage.kind for stage in plan.stages.values()})
results = read_results(save_plan(plan, store.root.parent, recipe_text="", command=""), store)
page = write_report(results)
rows = [row for row in results.rows if row.metric == "words"]
assert len(rows) == 2 and all(0 <= row.value <= 4 for row in rows)
assert "### number of words\\n" in page.with_suffix(".md").read_text()  # a table of scores
assert "number of words on dev" in page.read_text()  # a learning curve
found = json.loads(page.with_name("results.json").read_text())
assert any(d["metric"] == "words" for d in found["differences"])
card = model_card(results, "new", 1, store.folder(results.arm("new").final[1]), "new")
assert "| number of words (words) | mean over sets |" in card
"""
METRIC = Walk(
    most_files=2,
    edits=(
        (
            "evaluation/text_scores.py",
            '    scores = {"rouge_l": rouge_l(predictions, references)}\n',
            '    scores = {"rouge_l": rouge_l(predictions, references), "words": [float(len(p.split())) for p in predictions]}\n',
        ),
        (
            "metrics.py",
            '    Metric("numeric",',
            '    Metric("words", "number of words", "quality", "words", 1, "higher", selects=True, logs=("dev",), on_card=True),\n@',
        ),
    ),
    use=USE_METRIC,
    forgotten="metric `words` is not known",
)

# --- a sampler ----------------------------------------------------------------------------------------------------------

FRESH_CONFIG = '''class FreshSampler(OnPolicy):
    """New text of the student in every update."""

    type: Literal["fresh"] = "fresh"


@'''
FRESH = '''class Fresh(_WithStudent):
    """New text of the student in every update."""

    def micro_batches(self, step):
        """Return the update's batches."""
        return self.collated(self.fresh(step))


@'''
FRESH_COST = '''    def _fresh(self, cost, method, teacher, name):
        """Count `rollout.samplers.Fresh`."""
        answers = self._answers(name, method.sampler)
        cost.train(answers, teacher=True)
        cost.sample(answers, method.sampler.chunk, 1.0)

@'''
SAMPLER = Walk(
    most_files=4,
    edits=(
        ("config/sampling.py", "class PairSampler(", FRESH_CONFIG),
        ("config/sampling.py", "| PairSampler,", "| PairSampler | FreshSampler,"),
        ("rollout/samplers.py", "class Mix(", FRESH),
        ("rollout/rounds.py", "import Mix, Pairs", "import Fresh, Mix, Pairs"),
        ("rollout/rounds.py", '"pair": Pairs', '"pair": Pairs, "fresh": Fresh'),
        ("plan/costs/ledger.py", "    def _mix(", FRESH_COST),
        ("plan/costs/ledger.py", "    samplers.PairSampler: Ledger._pair,\n", "@    samplers.FreshSampler: Ledger._fresh,\n"),
    ),
    use=TRAINS.format(method="objective: {type: reverse_kl}, sampler: {type: fresh, max_new_tokens: 4}"),
    forgotten="FreshSampler",
)

WALKS = {"metric": METRIC, "objective": OBJECTIVE, "sampler": SAMPLER, "stage kind": KIND}
