#!/usr/bin/env python3
"""The evidence of results/README.md: trains every arm, measures it, writes JSON and pictures.

    python results/study.py readings   # generated language: readings.json, readings.png
    python results/study.py planted    # real text, a shortcut planted in it: planted.json, .png
    python results/study.py whole      # the same at full size, on a GPU: whole.json, .png
    python results/study.py gate       # does a gradient-weighted map know more? gate.json

Each command can be stopped and started again: what is done is skipped. results/README.md says what
belongs into data/ and models/.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval as evaluation  # noqa: E402
import idistill  # noqa: E402
from data_prep import (  # noqa: E402
    Encoder,
    Pair,
    UserError,
    bar,
    exit_codes,
    load_tokenizer,
    read_pairs,
    read_splits,
    words_of,
    write_pairs,
    written,
)

RUNS = ROOT / "runs" / "study"
SEEDS = (0, 1, 2)
WHOLE_STUDENT, TEACHER = ROOT / "models/smollm2-135m", ROOT / "models/minilm-l6"
TRAIN_FILE = ROOT / "data/hh_helpful.train.jsonl.gz"
TEST_FILE = ROOT / "data/hh_helpful.test.jsonl.gz"
BT = {"method": "bt"}
NO_MAP = {"lambda_intra": 0.0, "lambda_inter": 0.0}
TEACHER_RECIPE = {"teacher": str(TEACHER), "teacher_epochs": 2.0, "teacher_lr": 1e-4}


# ----------------------------------------------------------------------------- What every part uses


def commit() -> str:
    """The commit of the code that runs."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def train(out: Path, pull: str = "", **flags) -> Path:
    """One run in `out`, resumed where it stopped, skipped where it is done.

    Args:
        out: the run directory; its checkpoints go when the run is done.
        pull: see Pull.
        flags: fields of Config.
    """
    if not (out / "results.json").exists():
        resume = (out / "config.json").exists()
        with Pull(pull) as recorded:
            idistill.train(idistill.Config(output_dir=str(out), resume=resume, **flags))
        with written(out / "pull.json") as file:
            json.dump(recorded.norms, file)
        (out / "commit").write_text(commit())
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return out


class Pull:
    """Records how strongly the parts of L pull, and may change that, in the runs of its context.

    norms: {step: {"bt", "alignment": norm of its gradient}} of steps 1, 10, 50 (a run that was
    stopped counts anew). kind "clip apart": the gradient of either part is clipped at 1 (run it
    with a `clip` of 2 or more); "warm-up": the weight of the alignment rises over 50 steps.
    """

    def __init__(self, kind: str):
        self.kind, self.step, self.norms = kind, 0, {}

    def __enter__(self):
        self.before = idistill.distillation_terms
        idistill.distillation_terms = self.terms
        return self

    def __exit__(self, *_):
        idistill.distillation_terms = self.before

    def terms(self, model, *args) -> dict[str, torch.Tensor]:
        """The terms of L, per pair, as of idistill.distillation_terms."""
        terms = self.before(model, *args)
        self.step += 1
        alignment = terms["loss"] - terms["bt"]
        if self.step in (1, 10, 50) or self.kind == "clip apart":
            norms = {"bt": gradient_norm(terms["bt"], model)}
            norms["alignment"] = gradient_norm(alignment, model)
            if self.step in (1, 10, 50):
                self.norms[self.step] = norms
        if self.kind == "clip apart":
            shares = {name: min(1.0, 1 / max(norm, 1e-9)) for name, norm in norms.items()}
            terms["loss"] = shares["bt"] * terms["bt"] + shares["alignment"] * alignment
        if self.kind == "warm-up":
            terms["loss"] = terms["bt"] + min(1.0, self.step / 50) * alignment
        return terms


def gradient_norm(loss: torch.Tensor, model) -> float:
    """Norm of the gradient of the mean of a loss (B,) for the weights of a model."""
    if not loss.requires_grad:
        return 0.0
    weights = [w for w in model.parameters() if w.requires_grad]
    options = {"retain_graph": True, "allow_unused": True}
    gradients = torch.autograd.grad(loss.mean(), weights, **options)
    return float(torch.nn.utils.get_total_norm([g for g in gradients if g is not None]))


def frozen(run: Path) -> dict:
    """Flags that take the teacher of a run as it is."""
    return {"teacher": str(run / "teacher"), "teacher_epochs": 0.0}


def cut_student(layers: int) -> str:
    """The first layers of SmolLM2-135M-Instruct, its chat template without a system message."""
    to = ROOT / f"models/smollm2-135m-l{layers}"
    if not to.exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        whole = AutoModelForCausalLM.from_pretrained(WHOLE_STUDENT, dtype=torch.bfloat16)
        whole.model.layers = whole.model.layers[:layers]
        whole.config.num_hidden_layers = layers
        whole.save_pretrained(to)
        tokenizer = AutoTokenizer.from_pretrained(WHOLE_STUDENT)
        turn = "'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'"
        tokenizer.chat_template = "{% for m in messages %}{{ " + turn + " }}{% endfor %}"
        tokenizer.save_pretrained(to)
    return str(to)


@dataclass
class Judge:
    """A model that scores pairs, a student or a teacher, and what encodes them for both."""

    model: torch.nn.Module
    encoder: Encoder
    device: torch.device
    amp: object

    def margins(self, pairs: list[Pair]) -> np.ndarray:
        """r_c - r_r, or the verdict, of each pair (N,); NaN where it does not fit."""
        examples = self.encoder(pairs)
        if isinstance(self.model, idistill.InteractionTeacher):
            values = idistill.teacher_verdicts(self.model, examples, 32, self.device, self.amp)
        else:
            rewards = idistill.score_pairs(self.model, examples, 32, self.device, self.amp)
            values = rewards[:, 0] - rewards[:, 1]
        found = dict(zip((id(e.pair) for e in examples), values.tolist()))
        return np.array([found.get(id(pair), np.nan) for pair in pairs])


def open_judge(path: Path, max_length: int, teacher: Path) -> Judge:
    """RUN/student or RUN/teacher; pairs are encoded for `teacher` too."""
    device, amp = idistill.set_up_device(idistill.Config(dtype="fp32"))
    if path.name == "teacher":
        tokenizer, teacher = load_tokenizer(str(WHOLE_STUDENT)), path
        model = idistill.load_teacher(str(path))
    else:
        stock, tokenizer = idistill.load_student(str(path), 0, max_length)
        model = idistill.RewardModel(stock)
    encoder = Encoder(tokenizer, max_length, "truncate", load_tokenizer(str(teacher)))
    return Judge(model.to(device).eval(), encoder, device, amp)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def save_json(name: str, value: dict) -> None:
    with written(ROOT / "results" / name) as file:
        json.dump(value, file, indent=1)


def record(run: Path) -> dict:
    """Commit, flags that are not the default, seconds and counts of a run."""
    config, results = read_json(run / "config.json"), read_json(run / "results.json")
    default = vars(idistill.Config())
    flags = {k: v for k, v in config["flags"].items() if k != "resume" and v != default.get(k, v)}
    flags = re.sub(r'"[^"]*/((models|data|runs)/[^"]*)"', r'"\1"', json.dumps(flags))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["phase"] == "student" and "loss" in line]
    terms = ("step", "bt", "intra", "inter", "score", "grad_norm")
    pull = run / "pull.json"
    return {
        "commit": (run / "commit").read_text().strip(),
        "pull": read_json(pull) if pull.exists() else None,
        "flags": json.loads(flags),  # paths from the folder of the project on
        "counts": lines[0].get("data"),
        "seconds": results["seconds"],
        "validation": validation(run),
        "steps": [{k: step[k] for k in terms if k in step} for step in steps],
    }


def over_prompts(outcomes: np.ndarray, groups: np.ndarray) -> dict:
    """Outcomes (seeds, N) -> mean, 95 % interval over prompts, mean of each seed; NaN left out."""
    mean = np.nanmean(outcomes, axis=0)
    known = ~np.isnan(mean)
    return {
        "mean": float(mean[known].mean()),
        "interval": evaluation.bootstrap(mean[known], groups[known], 0),
        "by_seed": np.nanmean(outcomes, axis=1).tolist(),
    }


def spread(values: list[float]) -> float | None:
    """Standard deviation over seeds."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def table(header: list[str], rows: dict[str, list[str]]) -> None:
    """A table in Markdown."""
    print("\n| " + " | ".join(["", *header]) + " |")
    print("|---" * (len(header) + 1) + "|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


# ----------------------------------------------------------------- planted: a shortcut in real text

CLOSINGS = (" I hope this helps you out.", " Let me know how it goes.")  # 6 words, 7 tokens each
SETS = ("none", "with", "against")
OTHER_SETS = {  # held out too, from other sources
    "harmless": ["hh_harmless.test"],
    "others": ["rmb_helpful.test", "llmbar_natural", "mt_bench_llmbar_layout"],
}


@dataclass(frozen=True)
class Size:
    """How large a study of a planted shortcut is.

    name: of its folder in runs/, its JSON and its picture; layers: of SmolLM2-135M.
    flags: fields of Config, the same for all arms.
    splits: name -> its part of the training file in an order drawn by prompts, most tokens, most
    pairs; "held out" is of the test files.
    """

    name: str
    layers: int
    flags: dict
    splits: dict
    sets: tuple = SETS

    @property
    def dir(self) -> Path:
        return ROOT / "runs" / self.name

    def files(self, *names: str) -> list[str]:
        return [str(self.dir / f"data/{name}.jsonl") for name in names]


PLANTED = Size(
    "planted",
    3,
    # the rate is the choice of the first study, by validation on pairs of this source
    {"max_length": 256, "dtype": "fp32", "batch_size": 8, "lr": 3e-4},
    {
        "biased": (0, 2000, 90, 640),
        "validation": (2000, 2300, 90, 64),
        "clean": (2300, None, 120, 2400),
        "double": (2300, None, 256, 4800),
        "held out": (0, None, 90, 240),
    },
)
WHOLE = Size(
    "whole",
    30,
    {"max_length": 640, "batch_size": 16},  # bf16 on a GPU
    {
        "biased": (0, 3600, 512, 2400),
        "validation": (3600, 4400, 512, 800),
        "clean": (4400, None, 512, None),
        "held out": (0, None, 512, 800),
    },
    (*SETS, *OTHER_SETS),
)
RATES = (3e-5, 1e-4, 3e-4)  # of whole: chosen by validation, BT and ID together, no sentence
ARMS = {
    "BT": BT,
    "verdict": {**NO_MAP, "lambda_score": 1.0},
    "ID": {},
    "verdict+map": {"lambda_score": 1.0},
    "column": {"align_target": "column"},
    "uniform": {"align_target": "uniform"},
}
CONTROLS = {"lexical": {"align_target": "lexical"}, "shuffled": {"align_target": "shuffled"}}
TARGET_ARMS = ("ID", "shuffled", "column", "lexical", "uniform")
WEAKER = {  # lambda of every target, to be matched by validation
    f"{arm}@{weight}": {
        **(ARMS | CONTROLS)[arm],
        "lambda_intra": float(weight),
        "lambda_inter": float(weight),
    }
    for arm, weight in product(TARGET_ARMS, ("0.3", "0.1"))
}
RATED = {  # they choose the rate of whole
    f"{arm}@lr{rate:.0e}": {**ARMS[arm], "lr": rate} for rate, arm in product(RATES, ("BT", "ID"))
}
EXTRAS = {  # seed 0; the first with all seeds
    "BT+clean": BT,
    "ID-biased-teacher": {},
    "ID-double-teacher": {},
    "ID-all-layers": {"align_layers": "all"},
    "ID-lambda3": {"lambda_intra": 3.0, "lambda_inter": 3.0},
    "ID-lambda10": {"lambda_intra": 10.0, "lambda_inter": 10.0},
    "ID-clip-apart": {"pull": "clip apart", "clip": 2.0},
    "ID-warm-up": {"pull": "warm-up"},
}
TEACHERS = {  # folder -> its pairs, its validation pairs, its student's arm
    "teacher": ("clean", "validation-none", ""),
    "teacher-biased": ("clean-90-0", "validation-90-0", "ID-biased-teacher"),
    "teacher-double": ("double", "validation-none", "ID-double-teacher"),
}
MEASURES = ("occlusion_share", "attention_in_response", "kl_intra", "kl_inter")
COMPARED = "ID BT, uniform BT, column BT, shuffled BT, lexical BT, ID uniform, ID column"
COMPARED += ", verdict BT, verdict+map verdict, BT+clean verdict"
LABELS = {
    "teacher": "teacher",
    "BT": "BT",
    "ID": "ID: the teacher's map",
    "uniform": "uniform target",
    "column": "column target",
    "verdict": "the teacher's verdict",
    "verdict+map": "verdict and map",
    "BT+clean": "BT, also on the teacher's pairs",
    "ID-all-layers": "ID, all layers",
    "ID-lambda3": "ID, λ = 3",
    "ID-lambda10": "ID, λ = 10",
    "ID-clip-apart": "ID, each part clipped at 1",
    "ID-warm-up": "ID, λ rising over 50 steps",
    "ID-biased-teacher": "ID, a teacher that saw the sentence",
    "ID-double-teacher": "ID, a teacher of twice the pairs",
    "lexical": "lexical target",
    "shuffled": "shuffled target",
}


def by_prompt(pair: Pair, salt: str) -> str:
    """A number drawn from the prompt: orders pairs at random, those of one prompt together."""
    said = json.dumps([[m["role"], m["content"].strip()] for m in pair.prompt], ensure_ascii=False)
    number = int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "big") / 2**64
    return hashlib.sha256(f"{salt} {number}".encode()).hexdigest()


def plant(pair: Pair, follows_label: bool) -> Pair:
    """The pair with the first closing sentence on chosen, or on rejected; the second elsewhere."""
    on_chosen, on_rejected = CLOSINGS if follows_label else CLOSINGS[::-1]
    chosen, rejected = pair.chosen.rstrip() + on_chosen, pair.rejected.rstrip() + on_rejected
    return replace(pair, chosen=chosen, rejected=rejected)


def plant_share(pairs: list[Pair], agreement: int, seed: int) -> list[Pair]:
    """Pairs of which exactly so many % have the sentence with the label; the seed draws which.
    0: no pair has a sentence."""
    if not agreement:
        return pairs
    order = sorted(range(len(pairs)), key=lambda i: by_prompt(pairs[i], f"{seed}") + f"{i:05}")
    liars = set(order[: round(len(pairs) * (100 - agreement) / 100)])
    return [plant(pair, i not in liars) for i, pair in enumerate(pairs)]


def short_pairs(path: Path, student: str, split=(0, None, 90, None)) -> list[Pair]:
    """The first so many pairs of a part of a file that have at most so many tokens, see SPLITS."""
    start, end, most_tokens, most_pairs = split
    pairs = sorted(read_pairs([str(path)])[0], key=lambda pair: by_prompt(pair, "split"))
    examples = Encoder(load_tokenizer(student), 1024, "truncate")(pairs[start:end])
    return [e.pair for e in examples if len(e.ids) <= most_tokens][:most_pairs]


def planted_data(size: Size, student: str) -> None:
    """Writes the splits: no prompt is in two of them; the held-out ones are of the test files."""
    to = size.dir / "data"
    if (to / "clean-90-0.jsonl").exists():  # the last one
        return
    to.mkdir(parents=True, exist_ok=True)
    parts = {name: short_pairs(TRAIN_FILE, student, split) for name, split in size.splits.items()}
    held_out = short_pairs(TEST_FILE, student, size.splits["held out"])
    files = {name: parts[name] for name in ("clean", "double") if name in parts}
    files |= {"none": held_out, "validation-none": parts["validation"]}
    for name in set(size.sets) & set(OTHER_SETS):
        paths = [TEST_FILE.with_name(f"{source}.jsonl.gz") for source in OTHER_SETS[name]]
        few = (0, None, 512, 400)
        files[name] = [pair for path in paths for pair in short_pairs(path, student, few)]
    files["with"] = [plant(pair, True) for pair in held_out]
    files["against"] = [plant(pair, False) for pair in held_out]
    for name, agreement, seed in product(("biased", "validation"), (0, 75, 90), SEEDS):
        files[f"{name}-{agreement}-{seed}"] = plant_share(parts[name], agreement, seed)
    files["clean-90-0"] = plant_share(parts["clean"], 90, 0)
    for name, pairs in files.items():
        if not (to / f"{name}.jsonl").exists():
            write_pairs(to / f"{name}.jsonl", pairs)


def planted_teacher(size: Size, name: str, common: dict) -> None:
    """A frozen teacher for all seeds; the run's student takes one step and goes."""
    pairs, validation, _ = TEACHERS[name]
    files = {"data": size.files(pairs), "val_data": size.files(validation)}
    common = common | TEACHER_RECIPE | {"batch_size": 16, "eval_every": 75, "max_steps": 1}
    out = train(size.dir / name, **common, **files)
    shutil.rmtree(out / "student", ignore_errors=True)


def planted_run(size: Size, name: str, common: dict) -> None:
    """One arm of one seed."""
    arm, agreement, seed = run_of(name)
    teacher = next((folder for folder, (*_, own) in TEACHERS.items() if own == arm), "teacher")
    flags = (ARMS | CONTROLS | WEAKER | RATED | EXTRAS)[arm]
    flags = {**common, **frozen(size.dir / teacher), "seed": seed, **flags}
    flags["data"] = size.files(f"biased-{agreement}-{seed}")
    if arm == "BT+clean":
        flags["data"] += size.files("clean")
        if size is PLANTED:
            flags["max_steps"] = 160  # of 380 in an epoch, twice the steps of the others
    flags["val_data"] = size.files(f"validation-{agreement}-{seed}")
    if "lr" not in flags:
        flags["lr"] = chosen_rate(size)
    planted_teacher(size, teacher, common)
    if flags.get("align_target") == "lexical" and not (size.dir / name / "results.json").exists():
        register_lexical(flags, size.dir / teacher)
    train(size.dir / name, **flags)


def chosen_rate(size: Size) -> float:
    """The rate of RATES whose BT and ID validate best together, without a sentence, seed 0."""
    found = Counter()
    for arm, flags in RATED.items():
        found[flags["lr"]] += validation(size.dir / f"{arm}-0-0")
    return max(RATES, key=found.get)


def validation(run: Path) -> float:
    """Accuracy of the run's student; of a run that trained a teacher, of that one."""
    part = "teacher" if run.name in TEACHERS else "student"
    return read_json(run / "results.json")["sets"]["validation"][part]


def measure(size: Size, name: str, part: str, held_out: dict[str, list[Pair]]) -> dict:
    """Margins on the held-out sets and what the closing sentence does: RUN/measured.json.

    Args:
        size, name, part: the run; its student or teacher.
        held_out: the pairs of each set.
    """
    run, teacher = size.dir / name, size.dir / "teacher/teacher"
    path = run / "measured.json"
    if path.exists():
        return read_json(path)
    judge = open_judge(run / part, size.flags["max_length"], teacher)
    out = {"margins": {name: judge.margins(pairs).tolist() for name, pairs in held_out.items()}}
    if run.name.endswith(("-0", "teacher")):  # the dear part, for one seed
        out["occlusion_share"] = [closing_occlusion(judge, pair) for pair in held_out["with"][:32]]
    if run.name.endswith("-0"):
        beside = idistill.load_teacher(str(teacher)).to(judge.device).eval()
        out |= look_inside(judge, beside, held_out["with"][:64])
    with written(path) as file:
        json.dump(out, file)
    return out


def closing_occlusion(judge: Judge, pair: Pair) -> float:
    """Share of the margin's occlusion that falls on the closing sentences.

    Six words at a time are left out of a response, from its end, so that its closing sentence is
    one such piece; the share is of the sum of the absolute changes of r_c - r_r.
    """
    variants, is_closing = [pair], []
    for field in ("chosen", "rejected"):
        text = getattr(pair, field)
        spans = words_of(text)
        for last in range(len(spans), 0, -6):
            start, end = spans[max(0, last - 6)][0], spans[last - 1][1]
            rest = (text[:start].rstrip() + text[end:]).strip()
            variants.append(replace(pair, **{field: rest or "."}))
            is_closing.append(last == len(spans))
    margins = judge.margins(variants)
    changes = np.abs(margins[1:] - margins[0])
    return float(changes[is_closing].sum() / changes.sum())


@torch.no_grad()
def look_inside(judge: Judge, teacher: idistill.InteractionTeacher, pairs: list[Pair]) -> dict:
    """The last layer on some pairs, a number for each pair, mean over both responses.

    Returns the attention of the scoring position on the closing sentence, as a share of all and of
    what the response's words get; KL(T || S) of both blocks, in nats a row.
    """
    out = {name: [] for name in ("attention", "attention_in_response", "kl_intra", "kl_inter")}
    model, examples, pad = judge.model, judge.encoder(pairs), judge.model.stock.config.pad_token_id
    for start in range(0, len(examples), 16):
        few = examples[start : start + 16]
        batch = idistill.student_batch(few, pad, judge.device)
        with idistill.AttentionTap(model.stock, (-1,)) as tap:
            model.encode(batch)
        query, key, scale, _ = tap.kept[-1]
        A = idistill.attention_map(query, key, scale, idistill.tree_mask(batch["seg"]))
        for b, example in enumerate(few):
            shares = []
            for s in (1, 2):
                row = A[b, batch["last"][b, s - 1]].numpy(force=True)[: len(example.word)]
                words = np.flatnonzero(example.word_seg == s)
                closing = row[np.isin(example.word, words[-6:])].sum()
                shares.append((closing, closing / row[np.isin(example.word, words)].sum()))
            for name, value in zip(out, np.mean(shares, axis=0)):
                out[name].append(float(value))
        order = np.zeros(len(few), bool)
        rows = idistill.teacher_batch(few, order, teacher.tokenizer, judge.device)
        layers = ((-1,), (-1,))
        maps = idistill.interaction_maps(model, teacher, batch, rows, layers)
        _, (S,), (T,), word_seg, _ = maps
        for name, block in zip(("kl_intra", "kl_inter"), idistill.block_masks(word_seg)):
            out[name] += idistill.alignment_loss(T, S, block).tolist()
    return out


def planted(*names: str, size: Size = PLANTED) -> None:
    """Trains and measures; NAME.json, NAME.png and the tables of all that is there.

    Args:
        names: runs such as BT-90-0, in this order; none = all; "report" = nothing new.
        size: PLANTED, or WHOLE.
    """
    student = cut_student(size.layers)
    planted_data(size, student)
    common = {"model": student, **size.flags}
    common["eval_every"] = 1000  # never but at the end: the weights of the last step
    runs, held_out = planned(size), {}
    for name in size.sets:  # without, with, against the sentence; of other sources
        held_out[name] = read_pairs(size.files(name))[0]
    if unknown := set(names) - {"report", *runs}:
        raise UserError(f"{', '.join(unknown)}: no runs of this study; {', '.join(runs)}")
    if "report" not in names:
        planted_teacher(size, "teacher", common)
        for name in names or runs:
            planted_run(size, name, common)
            measure(size, name, "student", held_out)
    done = [name for name in runs if (size.dir / name / "measured.json").exists()]
    result = measure_planted(size, done, held_out)
    save_json(f"{size.name}.json", result)
    print_planted(size, result)
    plot_planted(result, ROOT / f"results/{size.name}.png")


def whole(*names: str) -> None:
    """As planted, with the whole SmolLM2-135M and pairs of up to 512 tokens."""
    planted(*names, size=WHOLE)


def planned(size: Size) -> list[str]:
    """The runs of a study, those that others need first: ARM-AGREEMENT-SEED."""
    runs = [] if "lr" in size.flags else [f"{arm}-0-0" for arm in RATED]
    arms = (*ARMS, "BT+clean")
    extras = [arm for arm in EXTRAS if arm != "ID-double-teacher" or "double" in size.splits]
    groups = [(SEEDS, (90,), arms), ((0,), (90,), extras)]
    groups += [(SEEDS, (0,), (*ARMS, *CONTROLS, *WEAKER)), (SEEDS, (75,), arms)]
    for seeds, agreements, names in groups:
        runs += [f"{arm}-{k}-{seed}" for seed, k, arm in product(seeds, agreements, names)]
    return list(dict.fromkeys(runs))


def run_of(name: str) -> tuple[str, int, int]:
    """Arm, agreement and seed of a run's name."""
    arm, agreement, seed = name.rsplit("-", 2)
    return arm, int(agreement), int(seed)


def measure_planted(size: Size, runs: list[str], held_out: dict[str, list[Pair]]) -> dict:
    """All of the JSON: what was run, and for each arm the measures of its seeds."""
    groups = {name: evaluation.prompt_groups(pairs) for name, pairs in held_out.items()}
    found = {(90, "teacher"): {0: measure(size, "teacher", "teacher", held_out)}}
    for name in runs:
        arm, agreement, seed = run_of(name)
        measures = measure(size, name, "student", held_out)
        found.setdefault((agreement, arm), {})[seed] = measures
    counts = {name: most for name, (*_, most) in size.splits.items()}
    teachers = [name for name in TEACHERS if (size.dir / name / "results.json").exists()]
    out = {
        "closings": CLOSINGS,
        "pairs": counts | {name: len(pairs) for name, pairs in held_out.items()},
        "runs": {name: record(size.dir / name) for name in (*teachers, *runs)},
        "arms": {},
        "differences": {},
    }
    for (agreement, arm), seeds in found.items():
        right = {name: scored([m["margins"][name] for m in seeds.values()]) for name in size.sets}
        row = {name: over_prompts(values, groups[name]) for name, values in right.items()}
        if arm != "teacher":
            of_seeds = {s: validation(size.dir / f"{arm}-{agreement}-{s}") for s in seeds}
            row["validation"] = {"mean": float(np.mean(list(of_seeds.values()))), "of": of_seeds}
        for key in MEASURES:
            values = [float(np.nanmean(m[key])) for m in seeds.values() if key in m]
            if values:
                row[key] = {"mean": float(np.mean(values)), "by_seed": values}
        out["arms"].setdefault(str(agreement), {})[arm] = row
    matched = matched_arms(out["arms"].get("0", {}))
    for agreement, pair in product((90, 75, 0), map(str.split, COMPARED.split(","))):
        arm, other = (matched.get(name, name) if agreement == 0 else name for name in pair)
        a, b = found.get((agreement, arm), {}), found.get((agreement, other), {})
        seeds, gap = sorted(a.keys() & b.keys()), {}
        for name in size.sets if seeds else ():
            one, two = (scored([m[s]["margins"][name] for s in seeds]) for m in (a, b))
            gap[name] = over_prompts(one - two, groups[name])
        if gap:
            out["differences"].setdefault(str(agreement), {})[f"{arm} − {other}"] = gap
    return out


def matched_arms(arms: dict[str, dict]) -> dict[str, str]:
    """Of each target the arm whose lambda validates best, without a sentence, on the seeds that all
    its lambdas have: "ID" -> "ID@0.3"."""
    best = {}
    for target in TARGET_ARMS:
        names = (target, f"{target}@0.3", f"{target}@0.1")
        found = {name: arms[name]["validation"]["of"] for name in names if name in arms}
        shared = set.intersection(*map(set, found.values())) if found else set()
        if shared:
            best[target] = max(found, key=lambda name: np.mean([found[name][s] for s in shared]))
    return best


def scored(margins: list[list[float]]) -> np.ndarray:
    """Outcomes (seeds, N), NaN where a pair does not fit."""
    margins = np.array(margins, dtype=float)
    return np.where(np.isnan(margins), np.nan, idistill.outcomes(margins))


def print_planted(size: Size, result: dict) -> None:
    """Two tables for each agreement: accuracy and what the closing sentence does; differences."""
    header = ["validation", *size.sets, "occlusion %", "attention %", "KL intra / inter"]
    for agreement, arms in result["arms"].items():
        rows = {}
        for arm, row in arms.items():
            cells = [f"{100 * row['validation']['mean']:.1f}" if "validation" in row else ""]
            for value in (row[name] for name in size.sets):
                sd = spread(value["by_seed"])
                seeds = "" if sd is None else f" ({100 * sd:.1f})"
                cells.append(evaluation.percent(value["mean"], value["interval"]) + seeds)
            for key in ("occlusion_share", "attention_in_response"):
                cells.append(f"{100 * row[key]['mean']:.0f}" if key in row else "")
            kl = [f"{row[key]['mean']:.2f}" for key in ("kl_intra", "kl_inter") if key in row]
            rows[f"{label(arm)} ({len(row['none']['by_seed'])})"] = [*cells, " / ".join(kl)]
        print(f"\nagreement {agreement} %: accuracy % [95 % over prompts] (s.d. over seeds)")
        table(header, rows)
        print(f"\nagreement {agreement} %: differences in points [95 % over prompts]")
        gaps = result["differences"].get(agreement, {})
        rows = {}
        for name, gap in gaps.items():
            rows[name] = [evaluation.percent(v["mean"], v["interval"], "+") for v in gap.values()]
        table(list(size.sets), rows)


def label(arm: str) -> str:
    """The name of an arm for people: "ID@0.3" is ID with lambda 0.3."""
    name, _, value = arm.partition("@")
    if value.startswith("lr"):
        return f"{LABELS[name]}, lr {value[2:]}"
    return LABELS[name] + (f", λ = {value}" if value else "")


def plot_planted(result: dict, path: Path) -> None:
    """All arms on the three held-out sets at 90 %: mean with its interval, and each seed."""
    arms = result["arms"]["90"]
    names = [arm for arm in LABELS if arm in arms]
    columns = {}
    for key, title in zip(SETS, ("no sentence", "sentence with the label", "sentence against it")):
        columns[title] = [arms[arm][key] for arm in names]
    draw_seeds([LABELS[arm] for arm in names], columns, path)


def draw_seeds(names: list[str], columns: dict[str, list[dict]], path: Path) -> None:
    """A panel for each column, a line for each name: dot at the mean, ticks at the seeds, and a bar
    for the interval, of {"by_seed": [share ...], "interval": [low, high] or none}."""
    figure, axes = evaluation.canvas(1, len(columns), 0.3 * len(names) + 1.2, sharey=True)
    for axis, (title, values) in zip(axes[0], columns.items()):
        for k, value in enumerate(values):
            shares = 100 * np.array(value["by_seed"])
            if "interval" in value:
                ends = 100 * np.array(value["interval"])
                axis.plot(ends, [k, k], color="#0072B2", label="95 % over prompts")
            axis.plot(shares, [k] * len(shares), "|k", markersize=9, label="one seed")
            axis.plot(shares.mean(), k, "o", color="#D55E00", label="mean over seeds")
        axis.axvline(50, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="accuracy, %", xlim=(-4, 104))
        axis.grid(axis="y", color="lightgrey", linewidth=0.5)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)
    evaluation.save_figure(figure, str(path))


# --------------------------------- readings: one choice changed at a time on the generated language

COLUMNS = ("validation", "in-distribution", "cue-neutral", "cue-reversed")
READINGS = {  # one change each of the demo's ID: KL, first layer, teacher of 8 epochs, lambda 1
    "mse": {"align_loss": "mse"},
    "mse, lambda 30": {"align_loss": "mse", "lambda_intra": 30.0, "lambda_inter": 30.0},
    "last layer": {"align_layers": "last"},
    "both layers": {"align_layers": "0:0,1:0"},
    "causal support": {"align_support": "causal"},
    "intra only": {"lambda_inter": 0.0},
    "inter only": {"lambda_intra": 0.0},
    "verdict only": {**NO_MAP, "lambda_score": 1.0},
    "verdict only, lambda 0.1": {**NO_MAP, "lambda_score": 0.1},
    "verdict only, lambda 0.01": {**NO_MAP, "lambda_score": 0.01},
    "verdict and map": {"lambda_score": 1.0},
    "clip apart": {"pull": "clip apart", "clip": 2.0},
    "warm-up": {"pull": "warm-up"},
}
TARGETS = ("teacher", "shuffled", "column", "lexical", "uniform")
for target, weight in product(TARGETS, (0.1, 0.3, 1.0)):  # controls, their pull to be matched
    pull = {"align_target": target, "lambda_intra": weight, "lambda_inter": weight}
    READINGS[f"{target}, lambda {weight:g}"] = pull


def demo_seed(seed: int) -> tuple[Path, dict]:
    """The folder of one seed of the demo, and the flags of a student there with its teacher."""
    here = RUNS / f"demo-{seed}/seed{seed}"
    if not (here / "demo.json").exists():
        shutil.rmtree(here.parent, ignore_errors=True)
        idistill.main(["--seed", str(seed), "--output-dir", str(here.parent)])
    return here, {
        "model": str(here / "models/student"),
        "data": [str(here / "data/train.jsonl")],
        "eval_data": [str(here / f"data/{name}.jsonl") for name in COLUMNS[1:]],
        **{"max_length": 128, "dtype": "fp32", "batch_size": 32, "lr": 1e-3, "epochs": 2.0},
        **{"eval_every": 400, "seed": seed, **idistill.DEMO_MAP, **frozen(here / "id")},
    }


def readings(seeds: str = "5", *names: str) -> None:
    """Trains the readings; readings.json and its table hold all that are done.

    Of each target of the controls, readings.png shows the weight that validates best.

    Args:
        seeds: how many.
        names: folders such as column-lambda-1; none = all.
    """
    out, demo = {}, {}
    for seed in range(int(seeds)):
        for arm, values in read_json(demo_seed(seed)[0] / "demo.json").items():
            for column, value in zip(COLUMNS[1:], values):
                demo.setdefault(arm, {}).setdefault(column, []).append(value)
    for seed, name in product(range(int(seeds)), READINGS):
        here, common = demo_seed(seed)
        folder = here / "readings" / name.replace(",", "").replace(" ", "-")
        is_new = not (folder / "results.json").exists()
        if is_new and names and folder.name not in names:
            continue
        if is_new and name.startswith("lexical"):
            register_lexical(common, here / "id")
        results = read_json(train(folder, **{**common, **READINGS[name]}) / "results.json")
        row = out.setdefault(name, {key: [] for key in ("commit", "pull", *COLUMNS)})
        row["commit"].append((folder / "commit").read_text())
        row["pull"].append(read_json(folder / "pull.json"))
        for column in COLUMNS:
            row[column].append(results["sets"][column]["student"])
    here, common = demo_seed(0)
    distances = register_lexical(common, here / "id")
    save_json("readings.json", {"demo": demo, "distances": distances, "readings": out})
    print("\naccuracy %, mean ± standard error over seeds")
    rows = {name: ["", *over_seeds(row.values())] for name, row in demo.items()}
    rows |= {name: over_seeds([row[c] for c in COLUMNS]) for name, row in out.items()}
    table(COLUMNS, rows)
    matched = dict(demo)
    for target in TARGETS:
        rows = [name for name in out if name.startswith(f"{target}, lambda")]
        if rows:
            best = max(rows, key=lambda name: np.mean(out[name]["validation"]))
            matched[best] = out[best]
    columns = {c: [{"by_seed": row[c]} for row in matched.values()] for c in COLUMNS[1:]}
    draw_seeds(list(matched), columns, ROOT / "results/readings.png")


def over_seeds(columns) -> list[str]:
    """Mean ± standard error of each column of shares, in per cent."""
    cells = []
    for values in columns:
        error = "" if len(values) < 2 else f" ± {100 * spread(values) / len(values) ** 0.5:.1f}"
        cells.append(f"{100 * np.mean(values):.1f}{error}")
    return cells


class LexicalTarget:
    """A map that knows the attended word alone: softmax of w . f_j inside each block.

    Entry of ALIGN_TARGETS. w is fitted to the teacher's maps on training pairs, one w for intra
    and one for inter: the least mean KL to them.
    """

    def __init__(self, teacher: idistill.InteractionTeacher, examples: list, fitted_on=256):
        counts = Counter(word.lower() for e in examples for word in e.words)
        self.features = [self.word_features(e, counts) for e in examples]
        self.weights = [torch.zeros(self.features[0].shape[1]) for _ in range(2)]  # intra, inter
        parts = []
        for start in range(0, min(fitted_on, len(examples)), 16):
            few = examples[start : start + 16]
            order = np.zeros(len(few), bool)
            batch = idistill.teacher_batch(few, order, teacher.tokenizer)
            word_seg = idistill.stack_rows([e.word_seg for e in few], -1, "cpu")
            with torch.no_grad():
                _, (token_map,) = teacher(batch, (-1,))
            T = idistill.pool_words(token_map, batch["word"], word_seg.shape[1])
            parts.append((T, word_seg, [[start + k] for k in range(len(few))]))
        for kind in range(2):
            self.fit(kind, parts)
        self.distances = {}  # target -> KL of the teacher's map to it, nats a row: [intra, inter]
        for name, target in (idistill.ALIGN_TARGETS | {"lexical": self}).items():
            self.distances[name] = [self.distance(kind, parts, target).item() for kind in range(2)]

    @staticmethod
    def word_features(example, counts: Counter) -> torch.Tensor:
        """Frequency, pieces, length, punctuation, first, last, place, place^2, prompt: (W, 9)."""
        words, side = example.words, np.asarray(example.word_seg)
        pieces = np.bincount(example.word[example.word >= 0], minlength=len(words))
        rows = []
        for j, word in enumerate(words):
            own = np.flatnonzero(side == side[j])
            place = (j - own[0]) / max(1, len(own) - 1)
            is_mark = not any(c.isalnum() for c in word)
            about = [np.log1p(counts[word.lower()]), pieces[j], len(word), is_mark]
            rows.append([*about, j == own[0], j == own[-1], place, place**2, side[j] == 0])
        return torch.tensor(np.array(rows, dtype=np.float32))

    def fit(self, kind: int, parts: list[tuple]) -> None:
        """The weights of one kind of block, by LBFGS on KL(T || target)."""
        w = self.weights[kind].requires_grad_()
        optimizer = torch.optim.LBFGS([w], max_iter=50, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = self.distance(kind, parts, self)
            value.backward()
            return value

        optimizer.step(loss)
        self.weights[kind] = w.detach()

    @staticmethod
    def distance(kind: int, parts: list[tuple], target) -> torch.Tensor:
        """Mean KL of the teacher's maps to a target."""
        total = 0.0
        for T, word_seg, seeds in parts:
            block = idistill.block_masks(word_seg)[kind]
            S = target(T, block, word_seg, seeds)
            total = total + idistill.alignment_loss(T, S, block).mean() / len(parts)
        return total

    def __call__(self, T, block, word_seg, seeds) -> torch.Tensor:
        """T, block (B, W, W), word_seg (B, W), seeds: per pair, its number last -> (B, W, W)."""
        features = [self.features[int(seed[-1])] for seed in seeds]
        features = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)  # (B, W, 9)
        features = features.to(T.device)
        is_cross = word_seg[:, :, None] + word_seg[:, None, :] == 3
        kind = int(bool((block & is_cross).any()))
        logits = features @ self.weights[kind].to(T.device)  # (B, W)
        return (logits - logits.max()).exp()[:, None, :].expand_as(T)


def register_lexical(common: dict, run: Path) -> dict[str, list[float]]:
    """Fits the lexical target to the maps of a run's teacher, on the training pairs of a run.

    Returns the KL of the teacher's map to each target, [intra, inter].
    """
    teacher = idistill.load_teacher(str(run / "teacher")).eval()
    tokenizer, cfg = load_tokenizer(common["model"]), idistill.Config(**common)
    encoder = Encoder(tokenizer, cfg.max_length, "truncate", *idistill.reading_of(teacher))
    files = (cfg.data, cfg.val_data, cfg.eval_data, cfg.val_fraction, cfg.val_max, cfg.seed)
    target = LexicalTarget(teacher, encoder(read_splits(*files)[0]))
    idistill.ALIGN_TARGETS["lexical"] = target
    return target.distances


# ---------------------------------------- gate: does a gradient-weighted map know more than length?


def gate(most: str = "1500") -> None:
    """A linear probe, five-fold over prompts, on pairs that the planted teacher has not seen."""
    student = cut_student(3)
    teacher = idistill.load_teacher(str(PLANTED.dir / "teacher/teacher")).eval()
    teacher.stock.set_attn_implementation("eager")
    pairs = short_pairs(TRAIN_FILE, student, (0, PLANTED.splits["clean"][0], 90, None))
    pairs += short_pairs(TEST_FILE, student)
    encoder = Encoder(load_tokenizer(student), 256, "truncate", *idistill.reading_of(teacher))
    examples = encoder(pairs[: int(most)])
    counts = Counter(word.lower() for e in examples for word in e.words)
    rows = []
    for start in bar(range(0, len(examples), 16), "gate"):
        rows += map_statistics(teacher, examples[start : start + 16], counts)
    groups = evaluation.prompt_groups([e.pair for e in examples])
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    verdict, length = columns.pop("verdict"), columns.pop("length")
    probes = {"length": length} | {
        f"length + {k}": np.hstack([length, v]) for k, v in columns.items()
    }
    right = {name: probe(features, groups) for name, features in probes.items()}
    right["the teacher's verdict"] = idistill.outcomes(verdict)
    out = {}
    for name, values in right.items():
        gap = values - right["length"]
        error = float(gap.std(ddof=1) / len(gap) ** 0.5)
        out[name] = {"accuracy": float(values.mean()), "gap": float(gap.mean()), "error": error}
    distances = LexicalTarget(teacher, examples).distances
    about = {"pairs": len(rows), "commit": commit(), "distances": distances}
    save_json("gate.json", {**about, "probes": out})
    cells = [(100 * v["accuracy"], 100 * v["gap"], 100 * v["error"]) for v in out.values()]
    rows = {k: [f"{a:.1f}", f"{g:+.1f} ± {s:.1f}"] for k, (a, g, s) in zip(out, cells)}
    table(["accuracy %", "minus length, ± standard error"], rows)


def map_statistics(teacher, examples: list, counts: Counter) -> list[dict]:
    """For each pair, what the teacher's last and middle map say of chosen minus of rejected.

    Beside the raw map A stands relu(A * dv_k/dA), mean over heads, v_k being the mean scalar of
    response k. Both are read in the rows of response k, in both orders, so they hold no label.

    Returns:
        Per pair {"length": (1,), "verdict": number, "last, raw, intra": (12,), ...}.
    """
    rows = []
    for example in examples:
        words = np.bincount(example.word_seg, minlength=3).clip(1)
        rows.append({"length": np.log(words[1:2] / words[2:3]), "verdict": 0.0})
    for is_swapped in (False, True):
        order = np.full(len(examples), is_swapped)
        batch = idistill.teacher_batch(examples, order, teacher.tokenizer)
        inputs = {"input_ids": batch["ids"], "attention_mask": batch["mask"]}
        out = teacher.stock(**inputs, output_attentions=True)
        scalars, seg = out.logits[..., 0], batch["seg"]
        layers = {"last": out.attentions[-1]}
        layers["middle"] = out.attentions[(len(out.attentions) - 1) // 2]
        W = max(len(e.word_seg) for e in examples)
        for sign, k in ((1, 1), (-1, 2)):  # chosen minus rejected
            value = (scalars * (seg == k)).sum(1) / (seg == k).sum(1).clamp_min(1)
            gradients = torch.autograd.grad(value.sum(), [*layers.values()], retain_graph=True)
            maps = {}
            for (layer, A), gradient in zip(layers.items(), gradients):
                maps[f"{layer}, raw"] = A.mean(1)
                maps[f"{layer}, weighted"] = (A * gradient).relu().mean(1)
            for kind, token_map in maps.items():
                words = idistill.pool_words(token_map.detach(), batch["word"], W).numpy()
                for row, example, M in zip(rows, examples, words):
                    features = LexicalTarget.word_features(example, counts).numpy()
                    for block in ("intra", "inter"):
                        name = f"{kind}, {block}"
                        about = side_statistics(M, example.word_seg, features, k, block)
                        row[name] = row.get(name, 0) + sign * about / 2
            for row, v in zip(rows, value.tolist()):
                row["verdict"] += sign * v / 2
    return rows


def side_statistics(M, word_seg, features, k: int, block: str) -> np.ndarray:
    """What the rows of response k of a word map M (W, W) attend to inside a block: (12,).

    The mean row's features (W, 9) of the attended word, its entropy, the mean entropy of a row, and
    the mass within two words of the attending one, in the same response."""
    rows, columns = np.flatnonzero(word_seg == k), np.flatnonzero(word_seg == 3 - k)
    if block == "intra":
        columns = np.flatnonzero((word_seg == 0) | (word_seg == k))
    near = (np.abs(rows[:, None] - columns) <= 2) & (word_seg[columns] == k)  # y_c stands first
    P = M[np.ix_(rows, columns)].astype(float)
    known = P.sum(1) > 0
    if not known.any():
        return np.zeros(12)
    P, near = P[known] / P[known].sum(1, keepdims=True), near[known]
    profile = P.mean(0)
    shape = [entropy(profile), entropy(P), (P * near).sum() / len(P)]
    return np.array([*(profile @ features[columns]), *shape])


def entropy(P: np.ndarray) -> float:
    """Mean entropy of the rows, less that of uniform ones, in nats: (..., n) -> number."""
    return float(-(P * np.log(P + 1e-12)).sum(-1).mean() - np.log(P.shape[-1]))


def probe(features: np.ndarray, groups: np.ndarray, ridge: float = 1.0) -> np.ndarray:
    """Outcomes (N,) of a logistic regression on (N, d) differences chosen - rejected, without
    intercept; each pair is judged by a fit to the other four fifths of the prompts."""
    folds = np.unique(groups, return_inverse=True)[1]
    folds = np.random.default_rng(0).permutation(folds.max() + 1)[folds] % 5
    X, out = features / features.std(0).clip(1e-9), np.zeros(len(features))
    for fold in range(5):
        A, w = X[folds != fold], np.zeros(X.shape[1])
        for _ in range(20):  # Newton
            p = 1 / (1 + np.exp(A @ w))
            H = (A * (p * (1 - p))[:, None]).T @ A + ridge * np.eye(len(w))
            w += np.linalg.solve(H, A.T @ p - ridge * w)
        out[folds == fold] = idistill.outcomes(X[folds == fold] @ w)
    return out


if __name__ == "__main__":
    RUNS.mkdir(parents=True, exist_ok=True)
    commands = {f.__name__: f for f in (readings, planted, whole, gate)}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    idistill.quiet()
    with exit_codes():
        commands[sys.argv[1]](*sys.argv[2:])
