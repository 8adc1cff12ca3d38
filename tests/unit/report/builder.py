"""A synthetic study on disk: the files that a run leaves behind, with numbers that the tests know."""

import json
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from tadistill.config.arm import flat
from tadistill.results.collect import Results, read_results
from tadistill.store import Store

PARAMETERS = {"xl": 1_557_611_200, "l": 774_030_080, "m": 354_823_168, "s": 124_439_808}
NASTY = "</script><script>window.hacked = 1</script> <b>bold</b> & 'quotes' \u2028 end"
VERSIONS = {"tadistill": "0.1.0", "torch": "2.13.0", "transformers": "5.8.1"}


@dataclass(eq=False)
class ArmSpec:
    """What the builder needs to know of an arm: its path, and by how much it beats the baseline."""

    name: str
    path: tuple[str, ...]
    gain: float = 0.0
    compute: str | None = None
    flops: float | None = 3.0e17
    method: str = "minillm (teacher_mixed)"
    published: dict | None = None
    sharper: float = 0.0
    """Divides every temperature by 1 / (1 - sharper): the arm moves along its curve of metric over entropy."""
    before: tuple[str, ...] = ()
    """An earlier path, as `xl > l` of `xl > l then xl > s`."""
    text: str = ""
    """The whole path as a recipe writes it, if it is more than `path`."""
    of_budget: float | None = None
    """The arm's FLOPs divided by those that `compute` sets."""


@dataclass
class StudySpec:
    """Everything the builder writes; the defaults are the small study of the tests."""

    arms: list[ArmSpec]
    seeds: tuple[int, ...] = (10, 20)
    sets: dict[str, int] = field(default_factory=lambda: {"dolly": 12, "facts": 9})
    fact_sets: tuple[str, ...] = ("facts",)
    decoding_seeds: int = 3
    unfinished: tuple[tuple[str, int], ...] = ()
    steps: int = 10
    prompt: str = "Instruction: name the capital of country {index}."
    template: str = "alpaca"
    answer: str = NASTY
    also: dict[str, dict] = field(default_factory=lambda: {"greedy": {"temperature": 0.0}, "t0.5": {"temperature": 0.5}})
    teacher: str | None = "xl"
    numbered: bool = False
    """True: evaluations name the rows that they answered, as those of this version do; False: as those of earlier versions."""
    trained: bool = True
    """False: every model is loaded as it is, as in `tadistill eval`."""


@dataclass
class Study:
    """A study on disk, with the scores it was built from: (arm, seed) -> set -> metric -> (prompts, decoding seeds)."""

    study_dir: Path
    store_dir: Path
    scores: dict[tuple[str, int], dict[str, dict[str, np.ndarray]]]

    def read(self) -> Results:
        """What the files say now."""
        return read_results(self.study_dir, Store(self.store_dir))

    @cached_property
    def results(self) -> Results:
        """What the files said at first, for tests that change none."""
        return self.read()


def key_of(*parts: object) -> str:
    text = "/".join(map(str, parts)).encode()
    return f"{zlib.crc32(text):08x}{zlib.crc32(text[::-1]):08x}"


def build_study(root: Path, spec: StudySpec) -> Study:
    """Writes plan.json and the store."""
    study = Study(root / "demo", root / "store", {})
    stages: dict[str, dict] = {}
    arms = [_arm(study, spec, arm, stages) for arm in spec.arms]
    models = {model: {"parameters": count} for model, count in PARAMETERS.items()}
    plan = {
        "study": "demo",
        "created": "2026-01-02T03:04:05+00:00",
        "command": "tadistill run recipes/demo.yaml",
        "recipe_text": "study: demo\nseeds: [10, 20]\narms:\n  direct: xl > s\n",
        "recipe": {
            "margin": 0.3,
            "evaluate": {"also": spec.also, "temperature": 1.0},
            "models": {model: {"load": f"gpt2-{model}", "init": None} for model in PARAMETERS},
            "data": {"train": {"load": "dolly"}, "corpus": None},
        },
        "teacher": spec.teacher,
        "models": models,
        "stages": list(stages.values()),
        "arms": arms,
    }
    study.study_dir.mkdir(parents=True)
    (study.study_dir / "plan.json").write_text(json.dumps(plan))
    return study


def _arm(study: Study, spec: StudySpec, arm: ArmSpec, stages: dict[str, dict]) -> dict:
    evaluate, analyse, final = {}, {}, {}
    also: dict[str, dict[str, str]] = {name: {} for name in spec.also}
    for seed in spec.seeds:
        if arm.before:
            key = key_of("distill", arm.before, seed, "")
            _stage(
                stages,
                key,
                "distill",
                f"distill {arm.before[-2]} -> {arm.before[-1]}, minillm, seed {seed}",
                arm.before[-1],
                seed,
                arm.name,
            )
            if not (study.store_dir / key[:2] / key).exists():
                _train(study, spec, arm, "distill", arm.before, seed, key)
        final[str(seed)] = _train_path(study, spec, arm, seed, stages) if spec.trained else None
        keys = {"evaluate": evaluate, **({"analyse": analyse} if spec.teacher else {}), **also}
        for what, found in keys.items():
            found[str(seed)] = key = key_of(what, arm.name, seed)
            kind = what if what in ("evaluate", "analyse") else "evaluate"
            label = f"{kind} {arm.name}{f' {what}' if what in also else ''}, seed {seed}"
            _stage(stages, key, kind, label, arm.path[-1], seed, arm.name)
        if (arm.name, seed) not in spec.unfinished:
            _measure(study, spec, arm, seed, {what: found[str(seed)] for what, found in keys.items()})
    return {
        "name": arm.name,
        "path": list(arm.path),
        "text": arm.text,
        "models": list(dict.fromkeys(flat((*arm.before, *arm.path)))),
        "method": arm.method,
        "model": arm.path[-1],
        "compute": arm.compute,
        "of_budget": arm.of_budget,
        "flops": arm.flops,
        "evaluate": evaluate,
        "analyse": analyse,
        "also": also,
        "final": final,
        "published": arm.published,
    }


def _train_path(study: Study, spec: StudySpec, arm: ArmSpec, seed: int, stages: dict[str, dict]) -> str | None:
    """SFT of the student, then one distillation a hop; chains share their first hops."""
    key = None
    hops = [("sft", arm.path[-1:])] + [("distill", arm.path[: i + 1]) for i in range(1, len(arm.path))]
    for kind, path in hops:
        last = len(path) == len(arm.path) and kind == "distill"
        above = key if len(path) > 2 else None  # the teacher of the first hop is loaded as it is
        key = key_of(kind, path, seed, arm.name if last else "")
        edge = f"{path[-2]} -> {path[-1]}, minillm" if kind == "distill" else path[-1]
        name = f", {arm.name}" if last else ""
        parents = {"teacher": above} if kind == "distill" and above else {}
        if kind == "distill" and path[-1] == arm.path[-1]:
            parents["student"] = key_of("sft", arm.path[-1:], seed, "")
        _stage(stages, key, kind, f"{kind} {edge}{name}, seed {seed}", path[-1], seed, arm.name, parents)
        if not (study.store_dir / key[:2] / key).exists():
            _train(study, spec, arm, kind, path, seed, key)
    return key


def _stage(stages: dict, key: str, kind: str, label: str, model: str, seed: int, arm: str, parents: dict[str, str] | None = None) -> None:
    entry = stages.setdefault(
        key,
        {"key": key, "kind": kind, "label": label, "model": model, "parents": parents or {}, "seed": seed, "arms": [],
         "flops": 1e16, "steps": 10, "checkpoints": 10 if kind in ("sft", "distill") else 0},
    )  # fmt: skip
    if arm not in entry["arms"]:
        entry["arms"].append(arm)


def _train(study: Study, spec: StudySpec, arm: ArmSpec, kind: str, path: tuple[str, ...], seed: int, key: str) -> None:
    rng = np.random.default_rng(zlib.crc32(f"{arm.name}{path}{seed}{kind}".encode()))
    lines = []
    level = np.log10(PARAMETERS[path[-1]]) + 0.4 * arm.gain
    for step in range(1, spec.steps + 1):
        progress = 1 - np.exp(-3 * step / spec.steps)
        line = {"step": step, "train/loss": 3.2 - 1.4 * progress + rng.normal(0, 0.08), "train/tokens_per_second": 9e3}
        if step % max(1, spec.steps // 20) == 0:
            line["dev/loss"] = 2.9 - 0.08 * level * progress + rng.normal(0, 0.01)
            line["dev/rouge_l"] = 14 + level * progress + rng.normal(0, 0.25)
            if spec.fact_sets:
                line["dev/fact_accuracy"] = 20 + 4 * level * progress + rng.normal(0, 1)
        lines.append(json.dumps(line))
    finish(
        study.store_dir, key, {"metrics.jsonl": "\n".join(lines) + "\n", "model/config.json": json.dumps({"arm": arm.name, "seed": seed})}
    )


def _measure(study: Study, spec: StudySpec, arm: ArmSpec, seed: int, keys: dict[str, str]) -> None:
    """What the evaluate stage, the analyse stage and the evaluate stages of other decodings leave behind."""
    rng = np.random.default_rng(zlib.crc32(f"{arm.name}/{seed}".encode()))
    wobble = rng.normal(0, 0.3)
    parts: dict[str, dict[str, dict[str, np.ndarray]]] = {what: {} for what in keys}
    predictions = []
    for set_name, count in spec.sets.items():
        hard = np.random.default_rng(zlib.crc32(set_name.encode())).normal(0, 9, size=(count, 1))  # same for all arms
        table = _text_scores(spec, arm, set_name, hard + wobble, rng, spec.decoding_seeds, 1.0)
        table["loss"] = 2.5 - 0.05 * arm.gain + rng.normal(0, 0.2, (count, 1))
        table["self_bleu"] = np.clip(30 + 5 * arm.gain + rng.normal(0, 4, (count, 1)), 0, 100)
        parts["evaluate"][set_name] = table
        predictions += _predictions(spec, arm, set_name, table)
        if "analyse" in keys:
            parts["analyse"][set_name] = _divergences(arm, count, spec.decoding_seeds, rng)
        for name, changes in spec.also.items():
            parts[name][set_name] = _text_scores(spec, arm, set_name, hard + wobble, rng, 1, changes.get("temperature", 1.0))
    scores = {name: dict(table) for name, table in parts["evaluate"].items()}
    for what, by_set in parts.items():
        for name, table in by_set.items():
            suffix = f"@{what}" if what in spec.also else ""
            scores[name] |= {f"{metric}{suffix}": values for metric, values in table.items()}
    study.scores[arm.name, seed] = scores
    for what, by_set in parts.items():
        as_lists = {name: {metric: values.tolist() for metric, values in table.items()} for name, table in by_set.items()}
        files = {"scores.json": json.dumps(as_lists)}
        if what == "evaluate":
            files |= {"predictions.jsonl": "\n".join(predictions) + "\n", "corpus.json": json.dumps(_corpus(spec, arm, rng))}
            files["stage.json"] = json.dumps({"spec": {"data": {"template": spec.template}}})
        if what == "analyse":
            files["exposure.json"] = json.dumps({name: _exposure(arm, rng) for name in spec.sets})
        finish(study.store_dir, keys[what], files)


def _text_scores(
    spec: StudySpec, arm: ArmSpec, set_name: str, level: np.ndarray, rng: np.random.Generator, seeds: int, temperature: float
) -> dict[str, np.ndarray]:
    sampled = (spec.sets[set_name], seeds)
    temperature *= 1 - arm.sharper
    sharper = 3 * (1 - temperature)
    table = {
        "rouge_l": np.clip(24 + arm.gain + sharper + level + rng.normal(0, 4, sampled), 0, 100),
        "exact_match": np.where(rng.random(sampled) < 0.05, 100.0, 0.0),
        "length": rng.integers(5, 60, sampled).astype(float),
        "repetition": np.clip(2 + 8 * (1 - temperature) + rng.normal(0, 1, sampled), 0, 100),
        "entropy": np.clip(temperature * (1.9 - 0.1 * arm.gain) + rng.normal(0, 0.1, sampled), 0, None),
    }
    if set_name in spec.fact_sets:
        table["fact_accuracy"] = np.where(rng.random(sampled) < 0.3 + 0.15 * arm.gain, 100.0, 0.0)
    return table


def _divergences(arm: ArmSpec, count: int, seeds: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    table = {"forward_kl": 0.61 - 0.02 * arm.gain + rng.normal(0, 0.05, (count, 1))}
    terms = [0.48 - 0.02 * arm.gain + rng.normal(0, 0.05, (count, seeds))]
    terms += [0.06 + rng.normal(0, 0.02, (count, seeds)) for _ in arm.path[1:-1]]
    table["reverse_kl"] = np.sum(terms, axis=0)
    if len(terms) > 1:
        table |= {f"budget/{j}": term for j, term in enumerate(terms)}
    return table


def _corpus(spec: StudySpec, arm: ArmSpec, rng: np.random.Generator) -> dict[str, dict]:
    found = {}
    for name, count in spec.sets.items():
        confidence = (np.arange(15) + 0.5) / 15
        correct = np.clip(confidence - 0.05 + rng.normal(0, 0.02, 15), 0, 1)
        numbers = {"perplexity": 12.0 - arm.gain, "distinct_1": 31.0, "distinct_2": 72.0, "distinct_4": 98.5 - arm.gain, "ece_tokens": 5.0}
        bins = {"count": [20 * (i + 1) for i in range(15)], "confidence": confidence.tolist(), "correct": correct.tolist()}
        lengths = rng.integers(1, 30, count).tolist()
        rows = {"rows": list(range(count))} if spec.numbered else {}
        found[name] = {"numbers": numbers, "calibration": {"tokens": bins}, "reference_length": lengths, **rows}
    return found


def _exposure(arm: ArmSpec, rng: np.random.Generator) -> dict[str, dict[str, list[float]]]:
    positions = np.arange(30)
    count = np.maximum(1, 40 - positions).tolist()
    teacher = 0.4 + 0.01 * rng.normal(size=30)
    student = teacher * (1.05 + positions / (60 + 30 * arm.gain))
    return {"student": {"kl": student.tolist(), "count": count}, "teacher": {"kl": teacher.tolist(), "count": count}}


def _predictions(spec: StudySpec, arm: ArmSpec, set_name: str, table: dict[str, np.ndarray]) -> list[str]:
    rows = []
    for index in range(spec.sets[set_name]):
        for decoding in range(spec.decoding_seeds):
            row = {
                "set": set_name,
                "index": index,
                "seed": decoding,
                "prompt": spec.prompt.format(index=index),
                "prediction": f"{arm.name} answers {index} in {set_name}. {spec.answer}",
                "references": [f"reference {index}", "another"],
            }
            sampled = ("rouge_l", "length", "fact_accuracy")
            row |= {metric: float(table[metric][index, decoding]) for metric in sampled if metric in table}
            rows.append(json.dumps(row, ensure_ascii=False))
    return rows


def finish(store_dir: Path, key: str, files: dict[str, str]) -> None:
    """Writes a stage as a run does: its files, then the manifest."""
    directory = store_dir / key[:2] / key
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(content, encoding="utf-8")
    manifest = {"key": key, "seconds": 12.5, "versions": VERSIONS, "files": dict.fromkeys(files, "")}
    (directory / "manifest.json").write_text(json.dumps(manifest))


SMALL = [
    ArmSpec("direct", ("xl", "s")),
    ArmSpec("chain", ("xl", "l", "s"), gain=3.0, flops=7.4e17),
    ArmSpec("direct-long", ("xl", "s"), gain=0.2, compute="as chain", flops=7.4e17),
]
