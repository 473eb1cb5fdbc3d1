#!/usr/bin/env python3
"""The study of results/README.md: trains every arm, scores it, reports. Restartable: what is done is skipped.

    python results/study.py prepare    # splits, the cut student (data/ and models/ as in results/README.md)
    python results/study.py tune       # learning rate, lambda and teacher recipe, chosen on the validation split alone
    python results/study.py real       # the arms on real pairs (or: real BT "label smoothing"), their margins on held-out files
    python results/study.py synthetic  # the readings of the paper on the generated language, five seeds
    python results/study.py figures    # every verb of eval.py on the demo's models and on those of seed 0: JSON and PNG files here
    python results/study.py gradients  # norms of the gradients of the terms of the loss: real_gradients.json
    python results/study.py report     # results/study.json, and the tables in Markdown on the screen
"""
import fcntl
import gzip
import json
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RUNS, SEEDS = ROOT / "runs" / "study", (0, 1, 2)
STUDENT, TEACHER, RAW = "models/smollm2-135m-l6", "models/minilm-l6", "data/hh_helpful.train.jsonl.gz"
HELD_OUT = {"data/hh_helpful.test.jsonl.gz": 600, "data/hh_harmless.test.jsonl.gz": 300, "data/rmb_helpful.test.jsonl.gz": 200,
            "data/llmbar_natural.jsonl.gz": 100, "data/mt_bench_llmbar_layout.jsonl.gz": 200}  # file -> random pairs of it
POOLED = "the last three together"  # helpfulness by other sources; computed after the rest had been looked at
LR = {"BT": "3e-4", "ID": "3e-4"}  # what `tune` chose by validation accuracy, for arms with --method bt and for the others
TEACHER_FLAGS = ["--teacher-epochs", "2", "--teacher-lr", "1e-4"]
COMMON = ["--data", "runs/study/hh.jsonl", "--val-data", "runs/study/hh.val.jsonl", "--max-length", "512", "--dtype", "fp32",
          "--eval-every", "77", "--model", STUDENT]
MORE = "teacher of 6,800 pairs"  # every pair of RAW but those of the validation split
BT, UNIFORM = ["--method", "bt"], ["--align-target", "uniform"]


def folder(arm: str, seed: int | None = None) -> Path:
    return RUNS / (arm.replace(",", "").replace(" %", "").replace(" ", "-") + ("" if seed is None else f"-{seed}"))


ARMS = {  # arm -> (flags, seeds); all but ID take the teacher that the ID run of the same seed has trained
    "ID": ([], SEEDS), "BT": (BT, SEEDS), "ID, uniform target": (UNIFORM, SEEDS),
    **{f"{name}, {n} % noise": ([*flags, "--label-noise", f"0.{n}"], (0,)) for n in (40, 20) for name, flags in (
        ("ID", ["--teacher", TEACHER, *TEACHER_FLAGS]), ("BT", BT),
        ("label smoothing", [*BT, "--preference-loss", "smooth", "--flip-rate", f"0.{n}"]))},
    "adaptive margin": ([*BT, "--margin-field", "strength", "--data", "runs/study/hh.strength.jsonl"], (0,)),
    "robust": ([*BT, "--preference-loss", "robust"], (0,)), "ID, causal support": (["--align-support", "causal"], (0,)),
    "ID, untrained teacher": (["--teacher", TEACHER, "--teacher-epochs", "0"], (0,)),
    "label smoothing": ([*BT, "--preference-loss", "smooth"], (0,)),
    "ID, intra only": (["--lambda-inter", "0"], (0,)), "ID, inter only": (["--lambda-intra", "0"], (0,)),
    "score + ID": (["--lambda-score", "1"], (0,)),
    "score only": (["--lambda-score", "1", "--lambda-intra", "0", "--lambda-inter", "0"], (0,)),
    "ID, shuffled teacher": (["--align-target", "shuffled"], (0,)),
    "ID, lambda decay": (["--lambda-schedule", "decay"], (0,)), "ID, all layers": (["--align-layers", "all"], (0,)),
    **{f"{name}, {MORE}": (["--teacher", f"{folder(MORE)}/teacher", "--teacher-epochs", "0", *flags], (0,))
       for name, flags in (("ID", []), ("score only", ["--lambda-score", "1", "--lambda-intra", "0", "--lambda-inter", "0"]))}}
TUNE = {**{f"BT lr {lr}": [*BT, "--lr", lr] for lr in ("3e-5", "1e-4", "3e-4")},
        **{f"teacher {e} x {lr}": ["--teacher", TEACHER, "--teacher-epochs", e, "--teacher-lr", lr, "--max-steps", "1"]
           for e, lr in (("1", "5e-5"), ("2", "1e-4"))},
        **{f"ID lr {lr} lambda {w}": ["--teacher", "runs/study/tune/teacher-2-x-1e-4/teacher", "--teacher-epochs", "0", "--lr", lr,
                                      "--lambda-intra", w, "--lambda-inter", w]
           for lr, w in (("3e-5", "1"), ("1e-4", "1"), ("3e-4", "1"))}}
READINGS = {  # on the generated language, against the demo's default: KL, last layer, mean over heads, frozen teacher, constant
    "default": [], "mse": ["--align-loss", "mse"], "mse, lambda 30": ["--align-loss", "mse", "--lambda-intra", "30", "--lambda-inter", "30"],
    "middle layer": ["--align-layers", "middle"], "all layers": ["--align-layers", "all"], "heads matched": ["--align-heads", "matched"],
    "causal support": ["--align-support", "causal"], "intra only": ["--lambda-inter", "0"], "inter only": ["--lambda-intra", "0"],
    "shuffled teacher": ["--align-target", "shuffled"], "score only": ["--lambda-score", "1", "--lambda-intra", "0", "--lambda-inter", "0"],
    "lambda warm-up": ["--lambda-schedule", "warmup"], "lambda decay": ["--lambda-schedule", "decay"],
    "lambda 0.3": ["--lambda-intra", "0.3", "--lambda-inter", "0.3"], "lambda 3": ["--lambda-intra", "3", "--lambda-inter", "3"],
    "co-trained teacher": ["--teacher", "RAW", "--teacher-co-train"], "untrained teacher": ["--teacher", "RAW"],
    **{f"teacher of {e} passes": ["--teacher", "RAW", "--teacher-epochs", e] for e in ("1", "2", "4")},
    "BT": BT, "BT of 10 passes": [*BT, "--epochs", "10"]}  # as many as teacher and student together


def sh(*command) -> None:
    print("$", *command, flush=True)
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)


@contextmanager
def claim(name: str, wait: bool = True):
    """True inside while no other process of the study is at it; without wait False where one is."""
    with open(RUNS / f"{name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield True
        except BlockingIOError:
            yield False


def train(out: Path, flags: list[str]) -> None:
    """One run, resumed where it stopped, skipped where it is done; the checkpoints go when it is."""
    if not (out / "results.json").exists():
        resume = ["--resume"] if (out / "config.json").exists() else []
        sh(sys.executable, "idistill.py", *flags, "--output-dir", out.relative_to(ROOT), *resume)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def prepare() -> None:
    if not (RUNS / "hh.jsonl").exists():
        sh(sys.executable, "data_prep.py", RAW, "--limit", 2900, "--val-fraction", 0.15, "--out", RUNS / "hh.jsonl")
    if not (ROOT / STUDENT).exists():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        whole = AutoModelForCausalLM.from_pretrained(ROOT / "models/smollm2-135m", dtype=torch.bfloat16)
        whole.model.layers, whole.config.num_hidden_layers = whole.model.layers[:6], 6
        whole.save_pretrained(ROOT / STUDENT)
        AutoTokenizer.from_pretrained(ROOT / "models/smollm2-135m").save_pretrained(ROOT / STUDENT)


def tune() -> None:
    for name, flags in TUNE.items():
        train(RUNS / "tune" / name.replace(" ", "-"), [*COMMON, "--eval-every", "50", *flags])


def real(*arms: str) -> None:
    """Every arm, or those named, with its seeds; a second process may run beside."""
    def one(arm: str, seed: int, wait: bool = True) -> bool:
        with claim(folder(arm, seed).name, wait) as mine:
            if mine:
                run(arm, seed)
            return mine

    def run(arm: str, seed: int) -> None:
        (flags, _), to = ARMS[arm], folder(arm, seed)
        lr, teacher = LR["BT" if "bt" in flags else "ID"], ["--teacher", TEACHER, *TEACHER_FLAGS]
        if arm == "adaptive margin" and not (RUNS / "hh.strength.jsonl").exists():
            for other in SEEDS:
                one("BT", other)
            sh(sys.executable, "eval.py", "accuracy", *(folder("BT", s) / "student" for s in SEEDS), "--data", RUNS / "hh.jsonl",
               "--max-length", 512, "--strength", RUNS / "hh.strength.jsonl")
        if MORE in arm:
            with claim(folder(MORE).name):
                if not (RUNS / "hh.all.jsonl").exists():  # its validation split, cut by the same hash of the prompt, holds that of hh.jsonl
                    sh(sys.executable, "data_prep.py", RAW, "--val-fraction", 0.15, "--out", RUNS / "hh.all.jsonl")
                train(folder(MORE), [*COMMON, "--data", "runs/study/hh.all.jsonl", *teacher, "--max-steps", "1"])
                score(folder(MORE) / "teacher")
        if arm != "ID" and "bt" not in flags and "--teacher" not in flags:
            one("ID", seed)
            teacher = ["--teacher", f"{folder('ID', seed)}/teacher", "--teacher-epochs", "0"]
        train(to, [*COMMON, "--lr", lr, "--seed", str(seed), *teacher, *flags])
        score(to / "student")

    todo = [(arm, seed) for arm in arms or ARMS for seed in ARMS[arm][1]]
    while todo:
        arm, seed = todo.pop(0)
        if not one(arm, seed, wait=not todo):
            todo.append((arm, seed))
            time.sleep(5)
    for seed in SEEDS:
        with claim(folder("ID", seed).name):
            score(folder("ID", seed) / "teacher")


def score(model: Path) -> None:
    """The margins of one model on every held-out file: MODEL.margins.json beside it."""
    out = model.parent / f"{model.name}.margins.json"
    if out.exists():
        return
    import eval as evaluation
    import transformers
    transformers.logging.set_verbosity_error()
    margins = {}
    for path, limit in HELD_OUT.items():
        args = evaluation.parse_args(["accuracy", str(model), "--data", str(ROOT / path), "--limit", str(limit), "--max-length",
                                      "768", "--dtype", "fp32", "--batch-size", "16"])
        judge, (name, pairs), = evaluation.open_judge(str(model), args), *evaluation.read_files(args).items()
        rewards, _ = judge.score(pairs, args.batch_size)
        margins[name] = [None if m != m else float(m) for m in rewards[:, 0] - rewards[:, 1]]
    out.write_text(json.dumps(margins))


def synthetic() -> None:
    demo = RUNS / "demo"
    if not (demo / "demo.json").exists():
        shutil.rmtree(demo, ignore_errors=True)
        sh(sys.executable, "idistill.py", "--seeds", "5", "--output-dir", demo.relative_to(ROOT))
    for seed in range(5):
        here = demo / f"seed{seed}"
        for name, flags in READINGS.items():
            flags = [str(here / "models/teacher") if f == "RAW" else f for f in flags]
            train(here / "readings" / name.replace(",", "").replace(" ", "-"), [
                "--model", here / "models/student", "--data", here / "data/train.jsonl", "--max-length", "128", "--dtype", "fp32",
                "--eval-data", *(here / f"data/{c}.jsonl" for c in ("in-distribution", "cue-neutral", "cue-reversed")),
                "--batch-size", "32", "--lr", "1e-3", "--teacher-lr", "2e-3", "--epochs", "2", "--eval-every", "400", "--seed", str(seed),
                "--teacher", here / "id/teacher", "--teacher-epochs", "0", *flags])


def figures() -> None:
    demo, out = "runs/study/demo", "results"

    def verb(name: str, to: str, *args) -> None:
        if not (ROOT / out / f"{to}.json").exists():
            sh(sys.executable, "eval.py", name, *args, "--json", f"{out}/{to}.json", "--plot", f"{out}/{to}.png")

    one = f"{demo}/seed0"
    two = [f"{one}/bt/student", f"{one}/id/student"]
    sets = [f"{one}/data/{c}.jsonl" for c in ("in-distribution", "cue-neutral", "cue-reversed")]
    verb("accuracy", "demo_accuracy", *two, f"{one}/uniform-target/student", "--data", *sets)
    verb("attention", "demo_attention", *two, "--teacher", f"{one}/id/teacher", "--data", f"{one}/data/cue-neutral.jsonl")
    verb("show", "demo_show", *two, "--teacher", f"{one}/id/teacher", "--data", f"{one}/data/cue-reversed.jsonl", "--pair", 0)
    verb("attack", "demo_attack", *two, "--data", f"{one}/data/cue-neutral.jsonl", "--edits", "results/demo_edits.json")
    verb("bestofn", "demo_bestofn", *two, f"{one}/uniform-target/student", "--data", f"{one}/data/candidates.jsonl")
    verb("stability", "demo_stability", *(f"{demo}/seed{s}/id/student" for s in range(5)), "--data", f"{one}/data/cue-neutral.jsonl")
    real, teacher = [f"{folder(arm, 0).relative_to(ROOT)}/student" for arm in ("BT", "ID")], "runs/study/ID-0/teacher"
    few, (same_source, *_) = ["--max-length", 768, "--limit", 100, "--dtype", "fp32", "--batch-size", 16], HELD_OUT
    verb("accuracy", "real_accuracy", *real, teacher, "--data", *list(HELD_OUT)[:3], *few)
    verb("attention", "real_attention", *real, "--teacher", teacher, "--data", same_source, *few)
    verb("show", "real_show", *real, "--teacher", teacher, "--data", "data/llmbar_natural.jsonl.gz", "--pair", 72)
    verb("attack", "real_attack", *real, "--data", same_source, *few)
    if not (RUNS / "rmb.three.jsonl").exists():  # RMB's best-of-n sets, one good and two bad answers of each
        with gzip.open(ROOT / "data/layouts/rmb.bon_helpfulness_chat_casual.json.gz") as f:
            sets = [{"prompt": [{k: turn[k] for k in ("role", "content")} for turn in s["conversation_input"]],
                     "chosen": s["bon_best"]["answer"], "rejected": [r["answer"] for r in s["loser_list"][:2]]} for s in json.load(f)]
        (RUNS / "rmb.three.jsonl").write_text("".join(json.dumps(s) + "\n" for s in sets))
    verb("bestofn", "real_bestofn", *real, "--data", "runs/study/rmb.three.jsonl", *few)
    for arm, name in (("BT", "BT"), ("ID", "ID"), ("ID, uniform target", "uniform")):
        verb("stability", f"real_stability_{name}", *(folder(arm, s).relative_to(ROOT) / "student" for s in SEEDS), "--data", same_source, *few)


def gradients() -> None:
    """Norm of the gradient of each term of the loss, before and after training, on validation pairs: is the alignment
    large enough beside BT, and do the two pull in the same direction?"""
    import numpy as np
    import torch
    import transformers

    from data_prep import Encoder, load_student, load_teacher, read_pairs
    from idistill import Config, InteractionTeacher, RewardModel, distillation_losses
    transformers.logging.set_verbosity_error()
    out, cfg = {}, Config()
    for when, name in (("before", STUDENT), ("after ID", f"{folder('ID', 0)}/student"), ("after BT", f"{folder('BT', 0)}/student")):
        stock, tokenizer = load_student(str(ROOT / name) if not Path(name).is_absolute() else name, 0, 512)
        reader, reader_tokenizer, room = load_teacher(f"{folder('ID', 0)}/teacher")
        model = RewardModel(stock, "packed", (stock.config.num_hidden_layers - 1,))
        teacher = InteractionTeacher(reader.eval().requires_grad_(False), reader_tokenizer, (reader.config.num_hidden_layers - 1,))
        examples = Encoder(tokenizer, 512, "truncate", reader_tokenizer, room)(read_pairs([str(RUNS / "hh.val.jsonl")])[0][:64])
        grads = {}
        for term, weights in (("bt", (0, 0)), ("intra", (1, 0)), ("inter", (0, 1))):
            cfg.lambda_intra, cfg.lambda_inter = weights
            total = None
            for start in range(0, 64, 16):
                some = examples[start:start + 16]
                losses = distillation_losses(model, teacher, some, np.zeros(len(some)), cfg, "cpu", list(range(len(some))))
                loss = losses["bt"].mean() if term == "bt" else (losses["loss"] - losses["bt"]).mean()
                model.zero_grad()
                loss.backward()
                flat = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.parameters()])
                total = flat if total is None else total + flat
            grads[term] = total / 4
        cosine = torch.nn.functional.cosine_similarity
        out[when] = {"norm": {k: float(g.norm()) for k, g in grads.items()},
                     "cosine_to_bt": {k: float(cosine(grads["bt"], grads[k], 0)) for k in ("intra", "inter")}}
        print(when, out[when], flush=True)
    (ROOT / "results/real_gradients.json").write_text(json.dumps(out, indent=1))


def flags_of(run: Path) -> dict:
    """Flags that are not the default, versions, validation accuracy, seconds, end of the loss curve."""
    from dataclasses import asdict

    from idistill import Config
    config, results = (json.loads((run / f"{n}.json").read_text()) for n in ("config", "results"))
    steps = [m for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if m["phase"] == "student" and "loss" in m]
    kept = ("bt", "preference", "intra", "inter", "score")
    flags = {k: v for k, v in config["flags"].items() if v != asdict(Config())[k] and "resume" != k}
    return {"flags": json.loads(json.dumps(flags).replace(f"{ROOT}/", "")),
            "versions": config["versions"], "seconds": results["seconds"], "validation": results["sets"]["validation"]["student"],
            "teacher_validation": results["sets"]["validation"]["teacher"],
            "first_step": {k: steps[0][k] for k in kept if k in steps[0]}, "last_step": {k: steps[-1][k] for k in kept if k in steps[-1]}}


def report() -> None:
    import numpy as np

    import eval as evaluation
    from data_prep import longer_margins
    from results.output import percent, shown
    files = {}
    for path, limit in HELD_OUT.items():
        args = evaluation.parse_args(["accuracy", "none", "--data", str(ROOT / path), "--limit", str(limit)])
        files.update(evaluation.read_files(args))
    groups = {name: evaluation.prompt_groups(pairs) for name, pairs in files.items()}

    def read(run: Path, model: str) -> dict[str, np.ndarray]:
        """{file: margins (N,), NaN where the pair was too long}; empty while the model is not scored."""
        path = run / f"{model}.margins.json"
        values = json.loads(path.read_text()) if path.exists() else {}
        return {name: np.array(v, dtype=float) for name, v in values.items()}

    fits = {name: np.ones(len(pairs), bool) for name, pairs in files.items()}
    fits |= {name: ~np.isnan(v) for name, v in read(folder("BT", 0), "student").items()}

    def margins(run: Path, model: str) -> dict[str, np.ndarray]:
        """The same, on the pairs that fit into the reward models: they drop alike, a teacher reads more."""
        return {name: np.where(fits[name], v, np.nan) for name, v in read(run, model).items()}

    def measured(v: np.ndarray) -> dict:
        real = v[~np.isnan(v)]
        return {"pairs": len(real), "dropped": len(v) - len(real), "accuracy": float(evaluation.outcomes(real).mean()),
                **{k: c for k, c in evaluation.calibration(real).items() if k != "bins"}}

    scored = {arm: {s: m for s in seeds if (m := margins(folder(arm, s), "student"))} for arm, (_, seeds) in ARMS.items()}
    scored["teacher"] = {s: m for s in SEEDS if (m := margins(folder("ID", s), "teacher"))}
    scored[MORE] = {0: m for m in [margins(folder(MORE), "teacher")] if m}
    done = {arm: {s: {name: np.where(np.isnan(v), np.nan, evaluation.outcomes(v)) for name, v in m.items()} for s, m in of.items()}
            for arm, of in scored.items()}
    tuned = {n: RUNS / "tune" / n.replace(" ", "-") for n in TUNE}
    study = {"tuning": {n: flags_of(run) for n, run in tuned.items() if (run / "results.json").exists()},
             "runs": {arm: {s: {**(flags_of(folder(arm, s)) if arm in ARMS else {}), "sets": {
                 name: measured(v) for name, v in m.items()}} for s, m in of.items()} for arm, of in scored.items()}, "differences": {}}

    def difference(arm: str, other: str) -> dict:
        """Paired by seed and by pair: mean, 95 % bootstrap interval over prompts, standard error over seeds."""
        seeds, out = sorted(done[arm].keys() & done[other].keys()), {}
        for name, parts in {**{name: [name] for name in files}, POOLED: list(files)[2:]}.items() if seeds else ():
            gaps = np.concatenate([[done[arm][s][part] - done[other][s][part] for s in seeds] for part in parts], axis=1)
            gap, by_seed = gaps.mean(0), np.nanmean(gaps, axis=1)
            both, prompt = ~np.isnan(gap), np.concatenate([groups[part] for part in parts])
            out[name] = {"seeds": len(seeds), "pairs": int(both.sum()), "mean": float(gap[both].mean()),
                         "interval": evaluation.bootstrap(gap[both], prompt[both], 0), "by_seed": by_seed.tolist(),
                         "standard_error_over_seeds": float(np.std(by_seed, ddof=1) / len(seeds) ** 0.5) if len(seeds) > 1 else None}
        return out

    def table(rows: dict[str, list[str]], header: list[str]) -> None:
        print("\n| " + " | ".join(["", *header]) + " |\n" + "|---" * (len(header) + 1) + "|")
        for name, cells in rows.items():
            print(f"| {name} | " + " | ".join(cells) + " |")

    rows = {}
    for arm, of in done.items():
        if of:
            of_seeds = {name: [100 * float(np.nanmean(r[name])) for r in of.values()] for name in files}
            rows[f"{arm} ({len(of)})"] = [f"{np.mean(v):.1f}" + (f" ± {np.std(v, ddof=1) / len(v) ** 0.5:.1f}" if len(v) > 1 else "")
                                          for v in of_seeds.values()]
    rows["longer response"] = [f"{100 * evaluation.outcomes(longer_margins(p)[fits[name]]).mean():.1f}" for name, p in files.items()]
    print("\naccuracy %, mean ± standard error over seeds (number of seeds), on the pairs that fit into every model")
    table(rows, [f"{name} ({fits[name].sum()})" for name in files])
    same, kinds, rows = next(iter(files)), ("nll", "brier", "ece", "temperature"), {}
    for arm, runs in study["runs"].items():
        if len(runs) > 1:
            of_seeds = [[r["sets"][same][k] for r in runs.values()] for k in kinds]
            rows[f"{arm} ({len(runs)})"] = [f"{np.mean(v):.3f} ± {np.std(v, ddof=1) / len(v) ** 0.5:.3f}" for v in of_seeds]
    print(f"\ncalibration of sigma(margin) on {same}, mean ± standard error over seeds")
    table(rows, list(kinds))

    def agreement(file: str) -> dict[str, np.ndarray]:
        """Mean rank correlation of the margins of two seeds, over the three pairs of seeds: its value, then bootstrap samples over prompts."""
        rng, inverse = np.random.default_rng(0), np.unique(groups[file], return_inverse=True)[1]
        of_prompt = [np.flatnonzero((inverse == g) & fits[file]) for g in range(inverse.max() + 1)]
        samples = [np.concatenate([of_prompt[g] for g in rng.integers(len(of_prompt), size=len(of_prompt))]) for _ in range(1000)]
        two = {arm: [(of[a][file], of[b][file]) for a, b in ((0, 1), (0, 2), (1, 2))] for arm, of in scored.items() if len(of) == 3}
        return {arm: np.array([np.mean([evaluation.spearman(a[k], b[k]) for a, b in some]) for k in [np.flatnonzero(fits[file]), *samples]])
                for arm, some in two.items()}

    rows, agree = {}, {file: agreement(file) for file in files}
    for arm, *others in (("ID",), ("BT",), ("ID, uniform target",), ("ID", "BT"), ("ID", "ID, uniform target"), ("ID, uniform target", "BT")):
        if not all({arm, *others} <= of.keys() for of in agree.values()):
            continue  # not all seeds have run
        name = " − ".join([arm, *others])
        values = {file: of[arm] - (of[others[0]] if others else 0) for file, of in agree.items()}
        study.setdefault("agreement", {})[name] = {f: {"mean": float(v[0]), "interval": evaluation.interval(v[1:])} for f, v in values.items()}
        rows[name] = [shown(v[0], evaluation.interval(v[1:]), "+.3f" if others else ".3f") for v in values.values()]
    print("\nrank correlation of the margins of two seeds, mean of three pairs of seeds [95 %, bootstrap over prompts]")
    table(rows, list(files))
    pairs = [("ID", "BT"), ("ID", "ID, uniform target"), ("ID, uniform target", "BT"), ("ID", "teacher"),
             *((arm, other) for arm in ARMS if arm not in ("BT", "ID", "ID, uniform target") and "noise" not in arm for other in ("BT", "ID")),
             (f"ID, {MORE}", f"score only, {MORE}"), (f"ID, {MORE}", MORE),
             *((f"{a}, {n} % noise", f"{b}, {n} % noise") for n in (20, 40) for a, b in (("ID", "BT"), ("label smoothing", "BT")))]
    rows = {}
    for arm, other in pairs:
        if done.get(arm) and done.get(other):
            study["differences"][f"{arm} - {other}"] = found = difference(arm, other)
            rows[f"{arm} − {other}"] = [percent(d["mean"], d["interval"], "+") + (
                f", s.e. {100 * d['standard_error_over_seeds']:.1f}" if d["standard_error_over_seeds"] is not None else "") for d in found.values()]
    print("\ndifferences in points [95 %, bootstrap over prompts], standard error over seeds where there are several")
    table(rows, [*files, POOLED])
    columns = ("in-distribution", "cue-neutral", "cue-reversed")
    read = {}
    for name in READINGS:
        found = [RUNS / f"demo/seed{s}/readings/{name.replace(',', '').replace(' ', '-')}/results.json" for s in range(5)]
        if all(p.exists() for p in found):
            sets = [json.loads(p.read_text())["sets"] for p in found]
            read[name] = {c: {k: [s[c][k] for s in sets] for k in ("student", "teacher")} for c in ("validation", *columns)}
    study["readings"], rows = read, {}
    for name, r in read.items():
        gaps = [100 * (np.array(r[c]["student"]) - np.array(read["default"][c]["student"])) for c in columns]
        rows[name] = [f"{100 * np.mean(r[c]['student']):.1f} ± {100 * np.std(r[c]['student'], ddof=1) / 5 ** 0.5:.1f}" for c in ("validation", *columns)] + [
            f"{g.mean():+.1f} ± {g.std(ddof=1) / 5 ** 0.5:.1f}" for g in gaps[1:]]
    print("\ngenerated language, five seeds, mean ± standard error; the last two columns: minus the default, paired by seed")
    table(rows, ["validation", *columns, "neutral − default", "reversed − default"])
    (ROOT / "results/study.json").write_text(json.dumps(study, indent=1))


if __name__ == "__main__":
    RUNS.mkdir(parents=True, exist_ok=True)
    {f.__name__: f for f in (prepare, tune, real, synthetic, figures, gradients, report)}[sys.argv[1]](*sys.argv[2:])
