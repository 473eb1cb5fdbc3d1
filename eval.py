#!/usr/bin/env python3
"""Looks at reward models: any stock Hugging Face sequence-classification directory or hub id, trained here or not.

    python eval.py accuracy MODEL... --data FILE... [--json OUT] [--plot OUT.png] [--dump PAIRS.jsonl]
           [--strength OUT.jsonl]

Every verb takes several models and shows them side by side. A model is scored as its stock class scores it: the string
of data_prep.Formatter, tokenised with add_special_tokens=False, read at the right-most token that is not the pad token.
A RUN/teacher directory is scored too: its verdict, mean of both orders, as (verdict / 2, -verdict / 2).
"""
from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification

from data_prep import CALM, Encoder, Pair, UserError, prompt_key, read_pairs, write_pairs
from idistill import (InteractionTeacher, load, load_teacher, load_tokenizer, longer_margins, outcomes, positions_of,
                      refuse_missing, set_up_device, teacher_verdicts, unused_name, write_json, written)

# --------------------------------------------------------------------------------------------------------- scoring


@dataclass
class Judge:
    """A loaded model that scores pairs: a reward model, or an interaction teacher (then encoder is set for it)."""
    name: str
    model: torch.nn.Module
    encoder: Encoder
    device: torch.device
    amp: object

    def score(self, pairs: list[Pair], batch_size: int) -> tuple[np.ndarray, list]:
        """(rewards (N, 2) in fp32, NaN where a response does not fit; the two scored strings of each pair, or None)."""
        if isinstance(self.model, InteractionTeacher):
            examples = self.encoder(pairs, progress="encoding")
            verdict = teacher_verdicts(self.model, examples, batch_size, self.device, self.amp, progress=self.name)
            return np.stack([verdict / 2, -verdict / 2], 1), [(p.chosen, p.rejected) for p in pairs]
        texts = scored_texts(self.encoder, [(p.prompt, [p.chosen, p.rejected]) for p in pairs])
        flat = [t for pair in texts if pair for t in pair]
        rewards = np.full((len(pairs), 2), np.nan, dtype=np.float32)
        rewards[[t is not None for t in texts]] = self.score_texts(flat, batch_size).reshape(-1, 2)
        return rewards, texts

    @torch.no_grad()
    def score_texts(self, texts: list[str], batch_size: int) -> np.ndarray:
        """Rewards (N,) of finished strings: batched by length, padded on the right, the head in fp32."""
        ids = self.encoder.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        pad = self.model.config.get_text_config().pad_token_id
        # the stock class reads the right-most token that is not pad, even where that is not the last one (pad = eos)
        last = [max((k for k, i in enumerate(row) if i != pad), default=len(row) - 1) for row in ids]
        rewards, order = np.zeros(len(ids), dtype=np.float32), np.argsort([-len(row) for row in ids], kind="stable")
        bar = tqdm(total=len(ids), desc=self.name[-40:], unit="text", leave=False, mininterval=CALM)
        for index in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
            n = max(len(ids[i]) for i in index)
            batch = torch.tensor([ids[i] + [pad or 0] * (n - len(ids[i])) for i in index], device=self.device)
            mask = torch.tensor([[1] * len(ids[i]) + [0] * (n - len(ids[i])) for i in index], device=self.device)
            at = torch.tensor([last[i] for i in index], device=self.device)
            with self.amp():
                if hasattr(self.model, "score"):
                    hidden = self.model.base_model(input_ids=batch, attention_mask=mask, use_cache=False).last_hidden_state
                else:  # other heads (DeBERTa, BERT ...) as they are
                    hidden = self.model(input_ids=batch, attention_mask=mask).logits
            if hasattr(self.model, "score"):  # bf16 logits tie often: the head in fp32
                head, hidden = self.model.score, hidden[torch.arange(len(index), device=self.device), at]
                hidden = F.linear(hidden.float(), head.weight.float(), head.bias)
            rewards[index] = hidden[:, 0].float().cpu().numpy()
            bar.update(len(index))
        bar.close()
        return rewards


def scored_texts(encoder: Encoder, items: list[tuple[list[dict], list[str]]]) -> list[list[str] | None]:
    """(prompt, responses) -> the string that is scored for each response; overlong prompts lose their oldest part, the
    same for all responses; None where a response does not fit. Counted in encoder.counts."""
    clean, out = encoder.formatter.clean, []
    items = [([{**m, "content": clean(m["content"])} for m in prompt], [clean(y) for y in responses])
             for prompt, responses in items]
    built = [[encoder.formatter(prompt, y)[0] for y in responses] for prompt, responses in items]
    tokens = iter(encoder.tokenizer([t for texts in built for t in texts], add_special_tokens=False, verbose=False)["input_ids"])
    for (prompt, responses), texts in zip(items, built):
        if max(len(next(tokens)) for _ in texts) > encoder.max_length:
            cut = encoder.shorten(prompt, responses)
            encoder.counts["truncated" if cut else "dropped"] += 1
            texts = cut and [encoder.formatter(cut[0], y)[0] for y in responses]
        out.append(texts)
    return out


def check_model(name: str):
    """The config of a reward model or an interaction teacher; UserError, before any long work, for what is neither."""
    if (Path(name) / "student" / "config.json").exists():
        raise UserError(f"{name}: is a run, not a model; give {name}/student (or {name}/teacher)")
    config = load(AutoConfig, name)
    kind = (getattr(config, "architectures", None) or ["a model without architecture"])[0]
    if not kind.endswith(("ForSequenceClassification", "ForTokenClassification")):
        raise UserError(f"{name}: {kind} has no reward head; a reward model is a sequence classifier with one label "
                        "(train one: python idistill.py --model ...)")
    if config.num_labels != 1:
        raise UserError(f"{name}: {kind} has {config.num_labels} labels, a reward model or interaction teacher has 1")
    return config


def open_judge(name: str, args) -> Judge:
    """A reward model (or interaction teacher), ready to score. Raises UserError for what is neither."""
    config, (device, amp) = check_model(name), set_up_device(args)
    if config.architectures[0].endswith("ForTokenClassification"):
        stock, tokenizer, room = load_teacher(name)
        view = load_tokenizer(name)  # the teacher alone: its own tokens serve where the student's words are asked for
        view.eos_token = view.eos_token or view.sep_token
        encoder = Encoder(view, 10**9, "truncate", tokenizer, min(room, 2 * args.max_length or room))  # as in training
        return Judge(name, InteractionTeacher(stock.to(device).eval(), tokenizer), encoder, device, amp)
    tokenizer = load_tokenizer(name)
    model, info = load(AutoModelForSequenceClassification, name, output_loading_info=True,
                       dtype=torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    refuse_missing(name, model, info["missing_keys"])
    positions = positions_of(config, name, args.max_length)
    tokenizer.padding_side = "right"
    return Judge(name, model.to(device).eval(), Encoder(tokenizer, args.max_length or positions, "truncate"), device, amp)


def read_files(args) -> dict[str, list[Pair]]:
    """The pairs of each --data file, those of --subset only. Raises UserError."""
    files, subsets = {}, set()
    for path in args.data:
        pairs, counts = read_pairs([path])
        left_out = {k: v for k, v in counts.items() if k != "pairs" and v}
        if left_out:
            print(f"{path}: left out " + ", ".join(f"{v} ({k})" for k, v in left_out.items()))
        subsets |= {p.subset for p in pairs}
        pairs = [p for p in pairs if not args.subset or p.subset in args.subset]
        if 0 < args.limit < len(pairs):
            pairs = [pairs[k] for k in np.sort(np.random.default_rng(args.seed).choice(len(pairs), args.limit, replace=False))]
        if pairs:
            files[unused_name(path, files)] = pairs
    unknown = set(args.subset) - subsets
    if unknown:
        raise UserError(f"--subset {' '.join(sorted(unknown))}: not in the data; there are: {', '.join(sorted(subsets - {''})) or 'none'}")
    return files


# ------------------------------------------------------------------------------------------------------ statistics

def bootstrap(values: np.ndarray, groups: np.ndarray, seed: int, rounds: int = 2000) -> list[float]:
    """95 % interval of the mean of values (N,). Prompts (groups (N,)) are drawn, not pairs: pairs that share a prompt
    are not independent."""
    inverse = np.unique(groups, return_inverse=True)[1]
    sums, counts = np.bincount(inverse, values), np.bincount(inverse)
    rng, K = np.random.default_rng(seed), len(counts)
    means = []
    for _ in range(rounds):
        weight = np.bincount(rng.integers(K, size=K), minlength=K)
        means.append(weight @ sums / (weight @ counts))
    return [float(q) for q in np.quantile(means, [0.025, 0.975])]


def prompt_groups(pairs: list[Pair]) -> np.ndarray:
    return np.array([prompt_key(p.prompt) for p in pairs])


def summary(pairs: list[Pair], groups: np.ndarray, rewards: np.ndarray, first: np.ndarray | None, seed: int) -> dict:
    """All that the accuracy table says of one model on some pairs; first: the rewards of the model compared with."""
    scored = ~np.isnan(rewards).any(1)
    lengths = np.array([(len(p.chosen.strip()), len(p.rejected.strip())) for p in pairs])
    if not scored.any():
        return {"pairs": 0, "dropped": len(pairs)}
    margins = rewards[:, 0] - rewards[:, 1]
    right, m = outcomes(margins), margins[scored]
    equal = scored & (np.abs(lengths[:, 0] - lengths[:, 1]) <= 0.1 * lengths.max(1))
    out = {"pairs": int(scored.sum()), "dropped": int((~scored).sum()), "ties": int((m == 0).sum()),
           "accuracy": float(right[scored].mean()), "interval": bootstrap(right[scored], groups[scored], seed),
           "equal_length": {"pairs": int(equal.sum()), "accuracy": float(right[equal].mean()) if equal.any() else None,
                            "interval": bootstrap(right[equal], groups[equal], seed) if equal.any() else None},
           "reward_mean": float(rewards[scored].mean()), "reward_std": float(rewards[scored].std()),
           "margin_mean": float(m.mean()), "margin_std": float(m.std())}
    if first is not None:
        both = scored & ~np.isnan(first).any(1)
        gain = right - outcomes(first[:, 0] - first[:, 1])
        out["difference"] = {"pairs": int(both.sum()), "mean": float(gain[both].mean()) if both.any() else None,
                             "interval": bootstrap(gain[both], groups[both], seed) if both.any() else None}
    return out


# ---------------------------------------------------------------------------------------------------------- output

def percent(value: float | None, interval: list[float] | None = None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{100 * value:{sign}.1f}" + (f" [{100 * interval[0]:{sign}.1f}, {100 * interval[1]:{sign}.1f}]" if interval else "")


def print_rows(header: list[str], rows: list[list[str]]) -> None:
    """A table with the first column at the left, the others at the right."""
    widths = [max(len(r[k]) for r in [header, *rows]) for k in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(c.rjust(w) if k else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths))))


def check_outputs(args) -> None:
    """Before the long work: every file to be written can be written and is no input; matplotlib is there for --plot."""
    for flag in ("json", "plot", "dump", "strength"):
        path = getattr(args, flag, None)
        if not path:
            continue
        if any(os.path.exists(path) and os.path.samefile(path, d) for d in args.data if os.path.exists(d)):
            raise UserError(f"--{flag} {path}: is read as --data; choose another file")
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            if Path(path).is_dir():
                raise OSError(0, "is a directory")
            aside = Path(str(path) + ".tmp")
            aside.touch()
            aside.unlink()
        except OSError as why:
            raise UserError(f"--{flag} {path}: cannot be written ({why.strerror})") from None
    if getattr(args, "plot", None):
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UserError("--plot needs matplotlib: pip install matplotlib (all else works without)") from None
        if Path(args.plot).suffix.lower() not in (".png", ".pdf", ".svg"):
            raise UserError(f"--plot {args.plot}: its name must end in .png, .pdf or .svg")


def save_json(path: str, verb: str, args, result: dict) -> None:
    versions = {m.__name__: m.__version__ for m in (torch, transformers, np)}
    flags = {k: v for k, v in vars(args).items() if k not in ("run", "json", "plot", "dump", "strength")}
    write_json(path, {"verb": verb, "flags": flags, "versions": versions, **result})


def save_plot(figure, path: str) -> None:
    figure.savefig(path + ".tmp", format=Path(path).suffix[1:].lower(), dpi=150, bbox_inches="tight")
    os.replace(path + ".tmp", path)


# -------------------------------------------------------------------------------------------------- verb: accuracy

def accuracy(args) -> None:
    """Accuracy with 95 % intervals, by subset, beside what length alone and a constant answer reach."""
    files = read_files(args)
    groups = {file: prompt_groups(pairs) for file, pairs in files.items()}
    result, dump, first, margins = {}, [], {}, {}
    for file, pairs in files.items():
        longer = outcomes(longer_margins(pairs))
        baselines = {"longer response": {"accuracy": float(longer.mean()), "interval": bootstrap(longer, groups[file], args.seed)},
                     "majority": {"accuracy": 0.5}}
        result[file] = {"models": {}, "subsets": {}, "baselines": baselines}
    for name in args.models:
        judge = open_judge(name, args)
        for file, pairs in files.items():
            judge.encoder.counts.clear()
            rewards, texts = judge.score(pairs, args.batch_size)
            counts = ", ".join(f"{v} {k}" for k, v in judge.encoder.counts.items() if v)
            if counts:
                print(f"{name} on {file}: {counts}")
            margins.setdefault(file, []).append(rewards[:, 0] - rewards[:, 1])
            compared = first.get(file)
            first.setdefault(file, rewards)
            parts = {s: [k for k, p in enumerate(pairs) if p.subset == s] for s in sorted({p.subset for p in pairs} - {""})}
            for subset, index in {"": range(len(pairs)), **(parts if len(parts) > 1 else {})}.items():
                index = list(index)
                some = summary([pairs[k] for k in index], groups[file][index], rewards[index], None if compared is None else compared[index], args.seed)
                some.update({k: v for k, v in judge.encoder.counts.items() if v and not subset and k != "dropped"})
                where = result[file]["subsets"].setdefault(subset, {}) if subset else result[file]["models"]
                where[name] = some
            if args.dump:
                dump += [{"prompt": p.prompt, "text_chosen": t[0], "text_rejected": t[1], "scores_chosen": float(r[0]),
                          "scores_rejected": float(r[1]), "results": float(outcomes(r[0] - r[1])), "subset": p.subset, "id": p.id,
                          "model": name, "data": file} for p, t, r in zip(pairs, texts, rewards) if t]
        del judge
        if args.json:  # after each model: a failure later loses nothing
            save_json(args.json, "accuracy", args, {"files": result})
    for file, pairs in files.items():
        print_accuracy(file, pairs, result[file])
    print("\n(majority: either side of a pair comes first, so a constant answer is right in half; equal length: within 10 %\n"
          " in characters; ties count half; intervals: 95 %, bootstrap over prompts; - first: paired with the first model)")
    if args.dump:
        with written(args.dump) as f:
            f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in dump)
    if args.strength:
        write_strengths(args.strength, files, margins)
    if args.plot:
        plot_accuracy(result, args.plot)


def write_strengths(path: str, files: dict[str, list[Pair]], margins: dict[str, list[np.ndarray]]) -> None:
    """The pairs of all files with strength = mean over the models of r_c - r_r (arXiv 2401.06080, Eq. 4); pairs
    that one of the models could not score are left out."""
    means = np.concatenate([np.mean(margins[file], axis=0) for file in files])
    scored = zip((p for pairs in files.values() for p in pairs), means)
    pairs = [replace(p, strength=float(s)) for p, s in scored if not np.isnan(s)]
    write_pairs(path, pairs, overwrite=True)
    negative = sum(p.strength < 0 for p in pairs)
    print(f"{path}: {len(pairs)} pairs with strength ({negative} negative), {len(means) - len(pairs)} dropped")


def print_accuracy(file: str, pairs: list[Pair], result: dict) -> None:
    header = ["accuracy %", "all [95 %]", "- first", "equal length", "reward", "margin", "ties", "dropped"]
    rows = []

    def add(label: str, r: dict) -> None:
        if not r["pairs"]:
            rows.append([label, "-", "", "", "", "", "", str(r["dropped"])])
            return
        gain, equal = r.get("difference"), r["equal_length"]
        rows.append([label, percent(r["accuracy"], r["interval"]), percent(gain["mean"], gain["interval"], "+") if gain else "",
                     f"{percent(equal['accuracy'])} of {equal['pairs']}", f"{r['reward_mean']:.2f} ± {r['reward_std']:.2f}",
                     f"{r['margin_mean']:.2f} ± {r['margin_std']:.2f}", str(r["ties"]), str(r["dropped"])])

    for name, r in result["models"].items():
        add(name[-44:], r)
    for name, r in result["baselines"].items():
        rows.append([name, percent(r["accuracy"], r.get("interval"))] + [""] * (len(header) - 2))
    for subset, models in result["subsets"].items():
        rows.append([f"{subset} ({next(iter(models.values()))['pairs']})"] + [""] * (len(header) - 1))
        for name, r in models.items():
            add("  " + name[-42:], r)
    print(f"\n{file}: {len(pairs)} pairs")
    print_rows(header, rows)


def plot_accuracy(result: dict, path: str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    names = list(next(iter(result.values()))["models"])
    figure, axes = plt.subplots(figsize=(1.8 + 1.6 * len(result), 3.4))
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        rows = [r["models"][name] for r in result.values()]
        at = np.arange(len(rows)) + (k - (len(names) - 1) / 2) * width
        height = np.array([100 * r.get("accuracy", np.nan) for r in rows])
        ends = 100 * np.array([r.get("interval", [np.nan] * 2) for r in rows]).T
        axes.bar(at, height, width, yerr=np.abs(ends - height), capsize=3, label="/".join(Path(name).parts[-3:]),
                 color=str(0.3 + 0.6 * k / max(1, len(names) - 1)),
                 edgecolor="black", hatch=["", "//", "..", "xx"][k % 4])
    for x, r in enumerate(result.values()):
        axes.hlines(100 * r["baselines"]["longer response"]["accuracy"], x - 0.45, x + 0.45, linestyle="--", color="black",
                    label="longer response" if not x else None)
    axes.axhline(50, color="black", linewidth=0.7)
    axes.set(ylabel="accuracy %, 95 % interval", xticks=range(len(result)), xticklabels=list(result))
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    save_plot(figure, path)


# ---------------------------------------------------------------------------------------------------- command line

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """One sub-command a verb; each function below it takes the parsed flags."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = ap.add_subparsers(dest="verb", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("models", nargs="+", metavar="MODEL", help="reward model (or RUN/teacher): local directory or hub id")
    common.add_argument("--data", nargs="+", required=True, metavar="FILE", help="pairs: JSONL, plain or .gz; raw HH-RLHF too")
    common.add_argument("--json", metavar="OUT", help="write the numbers there")
    common.add_argument("--plot", metavar="OUT.png", help="draw them (needs matplotlib)")
    common.add_argument("--subset", nargs="+", default=[], metavar="NAME", help="only these subsets (default: all)")
    common.add_argument("--limit", type=int, default=0, metavar="N", help="a random N pairs of each file, by --seed (default: 0 = all)")
    common.add_argument("--batch-size", type=int, default=32, help="texts a batch, of about equal length (default: 32)")
    common.add_argument("--max-length", type=int, default=0, help="longest prompt + response in tokens; the oldest of the "
                        "prompt is cut, never a response (default: 0 = the model's positions)")
    common.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 autocast where the hardware "
                        "has it; bf16: the weights too, half the memory (default: auto); the head is always fp32")
    common.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    common.add_argument("--seed", type=int, default=0, help="seed of the bootstrap and of --limit (default: 0)")
    verb = verbs.add_parser("accuracy", parents=[common], help=accuracy.__doc__, description=accuracy.__doc__)
    verb.add_argument("--dump", metavar="PAIRS.jsonl", help="one line a pair, with RewardBench's keys and the exact scored strings")
    verb.add_argument("--strength", metavar="OUT.jsonl", help="write the pairs with the field strength: the mean "
                      "margin of the MODELs, for idistill.py --margin-field strength and others")
    verb.set_defaults(run=accuracy)
    args = ap.parse_args(argv)
    if args.batch_size < 1 or args.max_length < 0 or args.limit < 0:
        ap.error("--batch-size must be at least 1, --max-length and --limit not negative")
    if len(set(args.models)) < len(args.models):
        ap.error("a model is named twice")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        check_outputs(args)
        for name in args.models:
            check_model(name)
        args.run(args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError as why:
        print(f"error: {why}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
