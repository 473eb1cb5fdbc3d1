#!/usr/bin/env python3
"""Looks at reward models: any stock Hugging Face sequence-classification directory or hub id, trained here or not.

    python eval.py accuracy  MODEL... --data FILE... [--json OUT] [--plot OUT.png] [--dump PAIRS.jsonl]
            [--strength OUT.jsonl]
    python eval.py attention MODEL... --data FILE... [--teacher RUN/teacher] [--stages 10] [--json OUT] [--plot OUT.png]
    python eval.py show      MODEL... --data FILE... [--teacher RUN/teacher] [--pair 0] [--html OUT.html] [--plot OUT.png]
    python eval.py attack    MODEL... --data FILE... [--json OUT] [--plot OUT.png] [--edits EDITS.json]
    python eval.py bestofn   MODEL... --data FILE... [--json OUT] [--plot OUT.png]     candidates with gold scores
    python eval.py stability RUN/student... --data FILE... [--json OUT] [--plot OUT.png]
    python eval.py speed     MODEL --teacher T --data FILE... [--memory] [--json OUT]   training in several ways, as ratios

Every verb takes several models and shows them side by side. A model is scored as its stock class scores it: the string
of data_prep.Formatter, tokenised with add_special_tokens=False, read at the right-most token that is not the pad token.
A RUN/teacher directory is scored too: its verdict, mean of both orders, as (verdict / 2, -verdict / 2).
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import comb
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification

from data_prep import (BENCHMARKS, DOMAINS, LLMBAR, SECTIONS, Encoder, Example, Formatter, Pair, UserError,
                       bar, choose_pad, load, load_student, load_teacher, load_tokenizer, longer_margins,
                       positions_of, prompt_key, read_candidates, read_pairs, refuse_missing, set_up_device,
                       unused_name, write_json, write_pairs, written)
from idistill import (AttentionTap, Config, InteractionTeacher, RewardModel, alignment_loss, attention_map, block_masks, bt_loss, collate,
                      collate_teacher, distillation_losses, make_optimizer, outcomes, plan_epoch, pool_words, row_divergence,
                      teacher_verdicts, to_device, tree_mask)

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
            verdict = teacher_verdicts(self.model, examples, batch_size, self.device, self.amp, self.name)
            return np.stack([verdict / 2, -verdict / 2], 1), [(p.chosen, p.rejected) for p in pairs]
        return self.score_responses([(p.prompt, [p.chosen, p.rejected]) for p in pairs], batch_size)

    def score_responses(self, items: list[tuple[list[dict], list[str]]], batch_size: int) -> tuple[np.ndarray, list]:
        """(prompt, k responses) -> (rewards (N, k), NaN where a response does not fit; the k scored strings, or None)."""
        texts = scored_texts(self.encoder, items)
        rewards = np.full((len(items), len(items[0][1])), np.nan, dtype=np.float32)
        flat = self.score_texts([t for some in texts if some for t in some], batch_size)
        rewards[[some is not None for some in texts]] = flat.reshape(-1, rewards.shape[1])
        return rewards, texts

    def score_texts(self, texts: list[str], batch_size: int) -> np.ndarray:
        """Rewards (N,) of finished strings; equal ones are scored once: RM-Bench compares each with three."""
        place = {text: k for k, text in enumerate(dict.fromkeys(texts))}
        rows = self.encoder.tokenizer(list(place), add_special_tokens=False)["input_ids"] if texts else []
        return self.score_rows(rows, batch_size)[[place[text] for text in texts]]

    def batches(self, rows: list[list[int]], batch_size: int, hidden: list[tuple[int, int]] | None = None):
        """Token rows, batched by length behind a progress bar and padded on the right: (index, inputs of the model,
        scoring position (B,)). hidden: the range of each row that no token may attend to; its places stay."""
        pad = self.model.config.get_text_config().pad_token_id
        order = np.argsort([-len(row) for row in rows], kind="stable")
        for index in bar([order[i:i + batch_size] for i in range(0, len(order), batch_size)], self.name, unit="batch"):
            shape, at = (len(index), len(rows[index[0]])), []
            ids, mask = np.full(shape, pad or 0), np.zeros(shape, dtype=np.int64)
            for b, i in enumerate(index):
                row = rows[i]
                ids[b, :len(row)], mask[b, :len(row)] = row, 1
                if hidden is not None:
                    mask[b, slice(*hidden[i])] = 0
                # the stock class reads the right-most token that is not pad, even where that is not the last (pad = eos)
                at.append(max((k for k, t in enumerate(row) if t != pad), default=len(row) - 1))
            inputs = dict(input_ids=ids, attention_mask=mask)
            if hidden is not None:  # OPT would count positions by the mask
                inputs["position_ids"] = np.tile(np.arange(shape[1]), (len(index), 1))
            yield index, {k: torch.from_numpy(v).to(self.device) for k, v in inputs.items()}, torch.tensor(at, device=self.device)

    @torch.no_grad()
    def score_rows(self, rows: list[list[int]], batch_size: int, hidden: list[tuple[int, int]] | None = None) -> np.ndarray:
        """Rewards (N,) of token rows, the head in fp32."""
        rewards = np.zeros(len(rows), dtype=np.float32)
        for index, inputs, at in self.batches(rows, batch_size, hidden):
            with self.amp():
                if hasattr(self.model, "score"):
                    out = self.model.base_model(**inputs, use_cache=False).last_hidden_state
                else:  # other heads (DeBERTa, BERT ...) as they are
                    out = self.model(**inputs).logits
            if hasattr(self.model, "score"):  # bf16 logits tie often: the head in fp32
                head = self.model.score
                out = F.linear(out[torch.arange(len(index)), at].float(), head.weight.float(), head.bias)
            rewards[index] = out[:, 0].float().cpu().numpy()
        return rewards

    @torch.no_grad()
    def end_attention(self, rows: list[list[int]], layers: str, rollout: bool, batch_size: int) -> list[np.ndarray]:
        """What the scoring position attends to: (n,) for each row, mean over heads and layers; rollout: through all
        layers, half of each step on the residual stream (arXiv 2005.00928). Raises UserError."""
        model, out = self.model, [np.zeros(0)] * len(rows)
        chosen = pick_layers(self, "all" if rollout else layers)
        hides = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)  # Gemma 2: Q and K are not all
        tap = None if hides else AttentionTap(model, chosen)
        if hides:
            before = model.config._attn_implementation
            model.set_attn_implementation("eager")
        for index, inputs, at in self.batches(rows, batch_size):
            B, n = inputs["input_ids"].shape
            causal = torch.ones(1, 1, n, n, dtype=torch.bool, device=self.device).tril()
            with self.amp(), tap or nullcontext():
                seen = model.base_model(**inputs, use_cache=False, output_attentions=bool(hides))
            row = F.one_hot(at, n).float()[:, None]  # (B, 1, n)
            total = torch.zeros_like(row)
            for k in reversed(chosen):
                if hides:
                    A = seen.attentions[k].float().mean(1)
                else:
                    query, key, scale, mask = tap.kept[k]
                    visible = causal if mask is None else mask if mask.dtype == torch.bool else mask == 0
                    A = attention_map(query, key, scale, visible)[:, 0]
                if rollout:
                    row = row / 2 + row @ A / 2
                else:
                    total += row @ A / len(chosen)
            for i, values in zip(index, (row if rollout else total)[:, 0].cpu().numpy()):
                out[i] = values[:len(rows[i])]
        tap.remove() if tap else model.set_attn_implementation(before)
        return out


def pick_layers(judge: Judge, spec: str) -> list[int]:
    """last, all, or numbers such as 0,3,-1 -> attention layers from 0, counted by running the model on a few tokens."""
    config = judge.model.config.get_text_config()
    count = config.num_hidden_layers
    if not getattr(config, "attn_logit_softcapping", None):  # hybrids have fewer attention layers than layers
        tap = AttentionTap(judge.model, [])
        with torch.no_grad(), judge.amp(), tap:
            judge.model.base_model(torch.tensor([[5, 6, 7]], device=judge.device), use_cache=False)
        tap.remove()
        count = tap.calls
    try:
        layers = {"last": [-1], "all": list(range(count))}.get(spec) or [int(k) for k in spec.split(",")]
        return [range(count)[k] for k in layers]
    except (ValueError, IndexError):
        raise UserError(f"--layers {spec!r}: give last, all, or numbers within the {count} attention layers of "
                        f"{judge.name}, such as 0,-1") from None


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


def open_teacher(name: str, args) -> Judge:
    """An interaction teacher that shows the map of its last layer, the default of training. Raises UserError."""
    judge = open_judge(name, args)
    if not isinstance(judge.model, InteractionTeacher):
        raise UserError(f"--teacher {name}: is no interaction teacher (a token classifier with one label, as RUN/teacher)")
    stock = judge.model.stock
    judge.model = InteractionTeacher(stock, judge.encoder.teacher, (stock.config.num_hidden_layers - 1,))
    return judge


def read_files(args, read=read_pairs) -> dict[str, list]:
    """The pairs (read_candidates: candidates) of each --data file, those of --subset only. Raises UserError."""
    files, subsets = {}, set()
    for path in args.data:
        pairs, counts = read([path])
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


def scored(args, files: dict, score):
    """(model, file, its items, their rewards) for each model and file: score(judge, items) -> rewards. One model is in
    memory at a time; what was cut or dropped is printed."""
    for name in args.models:
        judge = open_judge(name, args)
        for file, items in files.items():
            judge.encoder.counts.clear()
            rewards = score(judge, items)
            if any(judge.encoder.counts.values()):
                print(f"{name} on {file}: " + ", ".join(f"{v} {k}" for k, v in judge.encoder.counts.items() if v))
            yield name, file, items, rewards
        del judge


def refuse_teachers(args) -> None:
    for name in args.models:
        if check_model(name).architectures[0].endswith("ForTokenClassification"):
            raise UserError(f"{name}: is a teacher, which compares two responses; {args.verb} needs a reward for each alone")


# ------------------------------------------------------------------------------------------------------ statistics

def resampled_means(values: np.ndarray, groups: np.ndarray, seed: int, rounds: int = 2000) -> np.ndarray:
    """Means of values (N, ...) over bootstrap samples, (rounds, ...). Prompts (groups (N,)) are drawn, not pairs: pairs
    that share a prompt are not independent."""
    inverse = np.unique(groups, return_inverse=True)[1]
    counts = np.bincount(inverse)
    sums = np.zeros((len(counts), *values.shape[1:]))
    np.add.at(sums, inverse, values)
    rng, K, means = np.random.default_rng(seed), len(counts), []
    for _ in range(rounds):
        weight = np.bincount(rng.integers(K, size=K), minlength=K)
        means.append(weight @ sums / (weight @ counts))
    return np.array(means)


def interval(means: np.ndarray) -> list:
    """[low, high] of 95 % of the bootstrap samples (rounds, ...)."""
    return np.quantile(means, [0.025, 0.975], axis=0).tolist()


def bootstrap(values: np.ndarray, groups: np.ndarray, seed: int) -> list:
    """95 % interval of the mean of values (N, ...), over prompts."""
    return interval(resampled_means(values, groups, seed))


def prompt_groups(pairs: list) -> np.ndarray:
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
    for flag in ("json", "plot", "dump", "html", "strength"):
        path = getattr(args, flag, None)
        if not path:
            continue
        for name, inputs in (("data", args.data), ("edits", [getattr(args, "edits", None) or ""])):
            if any(os.path.exists(path) and os.path.samefile(path, d) for d in inputs if os.path.exists(d)):
                raise UserError(f"--{flag} {path}: is read as --{name}; choose another file")
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
    flags = {k: v for k, v in vars(args).items() if k not in ("run", "json", "plot", "dump", "html", "strength")}
    write_json(path, {"verb": verb, "flags": flags, "versions": versions, **result})


def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    return plt


def short(name: str) -> str:
    """The end of a model's path, for a legend."""
    return "/".join(Path(name).parts[-3:])


def draw(path: str, panels: list[tuple[dict, dict]]) -> None:
    """Panels side by side, told apart without colour; each: (what axes.set takes, {label: (x, y, interval or None)}).
    With xticklabels the points are not joined."""
    plt = pyplot()
    figure, all_axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False)
    for axes, (settings, series) in zip(all_axes[0], panels):
        for k, (label, (x, y, ends)) in enumerate(series.items()):
            y, ends = np.array(y, dtype=float), None if ends is None else np.array(ends, dtype=float)  # None becomes NaN
            axes.errorbar(x, y, None if ends is None else np.abs(ends - y), label=short(label), capsize=2,
                          color=str(0.7 * k / max(1, len(series) - 1)), marker="osD^vx"[k % 6], markersize=4,
                          linestyle="none" if "xticklabels" in settings else ["-", "--", ":", "-."][k % 4])
        axes.set(**settings)
        if "xticklabels" in settings:
            plt.setp(axes.get_xticklabels(), rotation=35, ha="right")
        axes.legend(fontsize=7)
    save_plot(figure, path)


def save_plot(figure, path: str) -> None:
    figure.savefig(path + ".tmp", format=Path(path).suffix[1:].lower(), dpi=150, bbox_inches="tight")
    os.replace(path + ".tmp", path)


# -------------------------------------------------------------------------------------------------- verb: accuracy

def accuracy(args) -> None:
    """Accuracy with 95 % intervals, by subset, beside what length alone and a constant answer reach.

    Pairs of a benchmark that data_prep.py converted have its own numbers too, in a table of their own."""
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
            for source in sorted(BENCHMARKS.keys() & {p.source for p in pairs}):
                index = [k for k, p in enumerate(pairs) if p.source == source]
                table = result[file].setdefault("benchmarks", {}).setdefault(source, {})
                table[name] = own_terms(source, [pairs[k] for k in index], rewards[index] @ [1, -1],
                                        groups[file][index], args.seed)
            if args.dump:
                dump += [{"prompt": p.prompt, "text_chosen": t[0], "text_rejected": t[1], "scores_chosen": float(r[0]),
                          "scores_rejected": float(r[1]), "results": float(outcomes(r[0] - r[1])), "subset": p.subset, "id": p.id,
                          "model": name, "data": file} for p, t, r in zip(pairs, texts, rewards) if t]
        del judge
        if args.json:  # after each model: a failure later loses nothing
            save_json(args.json, "accuracy", args, {"files": result})
    for file, pairs in files.items():
        print_accuracy(file, pairs, result[file])
        print_own_terms(result[file].get("benchmarks", {}))
    print("\n(majority: either side of a pair comes first, so a constant answer is right in half; equal length: within 10 %\n"
          " in characters; ties count half; intervals: 95 %, bootstrap over prompts; - first: paired with the first model)")
    if args.dump:
        with written(args.dump) as f:
            f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in dump)
    if args.strength:
        write_strengths(args.strength, files, margins)
    if args.plot:
        plot_accuracy(result, args.plot)


def own_cells(source: str, pairs: list[Pair], margins: np.ndarray):
    """What the numbers of a benchmark are made of, from N pairs and their margins: (the cells of each pair,
    right (N,), weight (N,), {mean: the numbers it is the mean of}). As in the benchmarks' own code a tie is a
    miss; a pair without a score (NaN) weighs nothing.
    RewardBench  sections by pair, but math-prm weighs as much as all code; mean of sections (no prior sets)
    RM-Bench     3 x 3 cells, chosen style-rejected style; easy: chosen fancier, normal: alike, hard: plainer;
                 by domain, by safety (mean of its two), and over chat, code, math and safety
    RMB          helpfulness and harmlessness, pairwise and best-of-n (chosen beats each rejected); their mean
    JudgeBench   categories, and all by pair
    LLMBar       subsets, and the mean of the adversarial ones
    MT-Bench     turns, and all, by vote"""
    right, weight, means = (margins > 0).astype(float), 1.0 - np.isnan(margins), {}
    cells = [[p.subset.split("/")[0], "all"] for p in pairs]
    if source == "rewardbench":
        cells, means["mean of sections"] = [c[:1] for c in cells], list(SECTIONS)
        math, code = (np.array([f"/{name}" in p.subset for p in pairs]) for name in ("math-prm", "hep-"))
        if weight[math].any() and weight[code].any():
            weight[math] *= weight[code].sum() / weight[math].sum()
    elif source == "rm-bench":
        levels = dict(easy=("1-0", "2-0", "2-1"), normal=("0-0", "1-1", "2-2"), hard=("0-1", "0-2", "1-2"))
        cells = [[p.subset + " " + style for style in sum(levels.values(), ()) if p.id.endswith("/" + style)]
                 for p in pairs]
        for d in (*DOMAINS, "safety", "all"):
            below = {"safety": DOMAINS[3:], "all": (*DOMAINS[:3], "safety")}.get(d)
            for k, styles in levels.items():
                means[f"{d} {k}"] = [f"{b} {k}" for b in below] if below else [f"{d} {s}" for s in styles]
            means[d] = [f"{d} {k}" for k in levels]
    elif source == "rmb":
        names = {f"{kind}_set/{goal}": f"{goal} {name}" for goal in ("Helpfulness", "Harmlessness")
                 for kind, name in (("Pairwise", "pairwise"), ("BoN", "best-of-n"))}
        cells = [[name for start, name in names.items() if p.subset.startswith(start)] for p in pairs]
        means["mean of the four"], prompts = list(names.values()), {}
        for k, p in enumerate(pairs):
            if m := re.fullmatch(r"(.*)/\d+of(\d+)", p.id):
                prompts.setdefault((p.subset, *m.groups()), []).append(k)
            elif p.subset.startswith("BoN_set"):  # who its rivals are is not known
                weight[k] = 0
        for (*_, losers), index in prompts.items():  # a prompt counts once, if all its losers are scored
            right[index[0]], whole = right[index].all(), weight[index].sum() == int(losers)
            weight[index], weight[index[0]] = 0, whole
    elif source == "llmbar":
        cells, means["Adversarial"] = [[p.subset] for p in pairs], list(LLMBAR[1:])
    return cells, right, weight, means


def own_terms(source: str, pairs: list[Pair], margins: np.ndarray, groups: np.ndarray, seed: int) -> dict:
    """The numbers of own_cells with intervals over prompts, {number: {"value", "interval", "count"}}. A mean
    that lacks one of its numbers is left out: a part of a benchmark has no overall."""
    cells, right, weight, means = own_cells(source, pairs, margins)
    names = sorted({name for some in cells for name in some if name})
    W = {name: w for name in names if (w := weight * [name in some for some in cells]).any()}  # (N,) each
    if not W:
        return {}
    sums = resampled_means(np.stack([w * r for r in (right, 1) for w in W.values()], 1), groups, seed)
    with np.errstate(invalid="ignore"):  # a sample of prompts may miss a small cell
        drawn = dict(zip(W, (sums[:, :len(W)] / sums[:, len(W):]).T))  # (rounds,) each
    value = {name: w @ right / w.sum() for name, w in W.items()}
    count = {name: int(np.count_nonzero(w)) for name, w in W.items()}
    for name, parts in means.items():
        if all(k in value for k in parts):
            value[name], count[name] = np.mean([value[k] for k in parts]), sum(count[k] for k in parts)
            drawn[name] = np.mean([drawn[k] for k in parts], axis=0)
    drawn = {name: d[np.isfinite(d)] for name, d in drawn.items()}
    return {name: {"value": float(v), "interval": interval(drawn[name]) if len(drawn[name]) else None,
                   "count": count[name]} for name, v in value.items()}


def print_own_terms(results: dict) -> None:
    """A table a benchmark, a column a model. The nine cells of an RM-Bench domain are in --json alone."""
    for source, models in results.items():
        first = {k: r for m in [*models.values()][::-1] for k, r in m.items()}
        cell = lambda r: percent(r["value"], r["interval"]) if r else "-"  # noqa: E731
        rows = [[f"{k} ({first[k]['count']})"] + [cell(m.get(k)) for m in models.values()]
                for k in first if not re.search(r" \d-\d$", k)]
        if rows:
            print(f"\n{source} in its own terms, a tie being a miss")
            print_rows(["% [95 %]"] + [name[-44:] for name in models], rows)


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
    plt = pyplot()
    names = list(next(iter(result.values()))["models"])
    figure, axes = plt.subplots(figsize=(1.8 + 1.6 * len(result), 3.4))
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        rows = [r["models"][name] for r in result.values()]
        at = np.arange(len(rows)) + (k - (len(names) - 1) / 2) * width
        height = np.array([100 * r.get("accuracy", np.nan) for r in rows])
        ends = 100 * np.array([r.get("interval", [np.nan] * 2) for r in rows]).T
        axes.bar(at, height, width, yerr=np.abs(ends - height), capsize=3, label=short(name),
                 color=str(0.3 + 0.6 * k / max(1, len(names) - 1)),
                 edgecolor="black", hatch=["", "//", "..", "xx"][k % 4])
    for x, r in enumerate(result.values()):
        axes.hlines(100 * r["baselines"]["longer response"]["accuracy"], x - 0.45, x + 0.45, linestyle="--", color="black",
                    label="longer response" if not x else None)
    axes.axhline(50, color="black", linewidth=0.7)
    axes.set(ylabel="accuracy %, 95 % interval", xticks=range(len(result)), xticklabels=list(result))
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    save_plot(figure, path)


# ------------------------------------------------------------------------------------------------- verb: attention

def response_rows(examples: list) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Token rows of (x, y_c) and (x, y_r) of each example in turn, and the token range of the response in each."""
    rows, spans = [], []
    for e in examples:
        segment = np.where(e.word >= 0, e.word_seg[e.word], -1)
        for s in (1, 2):
            mine = np.flatnonzero((e.seg == 0) | (e.seg == s))
            words = np.flatnonzero(segment[mine] == s)
            rows.append(e.ids[mine].tolist())
            spans.append((int(words[0]), int(words[-1]) + 1) if len(words) else (len(mine) - 1, len(mine) - 1))
    return rows, spans


def stage_edges(start: int, end: int, stages: int) -> np.ndarray:
    """Cuts the tokens start..end into stages of about equal length: (stages + 1,) edges."""
    return start + np.round(np.arange(stages + 1) / stages * (end - start)).astype(int)


def stage_density(attention: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Share of the attention inside the edges that each stage gets, over its share of the tokens: (stages,), 1 where
    attention is even, NaN for a stage without token."""
    mass = np.array([attention[a:b].sum() for a, b in zip(edges, edges[1:])])
    size = np.diff(edges).astype(float)
    size[size == 0] = np.nan
    return (mass / mass.sum()) / (size / np.nansum(size)) if mass.sum() > 0 else np.full(len(size), np.nan)


@torch.no_grad()
def word_maps(judge: Judge, teacher: Judge | None, examples: list, layers: str):
    """The simulated word map S of the model, the teacher's T (mean of both orders; None without), the words' segments:
    (B, W, W), (B, W, W), (B, W). Raises UserError where queries and keys do not give the map."""
    if getattr(judge.model.config.get_text_config(), "attn_logit_softcapping", None):
        raise UserError(f"{judge.name}: caps its attention logits, so queries and keys do not give a simulated map")
    model = RewardModel(judge.model.requires_grad_(False), "siamese", tuple(pick_layers(judge, layers)))
    batch = collate(examples, judge.model.config.get_text_config().pad_token_id or 0, judge.device)
    W = batch["word_seg"].shape[1]
    with judge.amp(), torch.enable_grad():  # the student keeps its maps where it trains only
        model(batch)
    model.tap.remove()
    S, T = pool_words(torch.stack(model.maps).mean(0), batch["word"], W)[:, 0], None
    if teacher is not None:
        for swapped in (False, True):
            both = collate_teacher(examples, np.full(len(examples), swapped), teacher.encoder.teacher, judge.device)
            with judge.amp():
                teacher.model(both, maps=True)
            one = pool_words(teacher.model.maps[0], both["word"], W)[:, 0] / 2
            T = one if T is None else T + one
    return S, T, batch["word_seg"]


def with_teacher(encoder: Encoder, teacher: Judge | None) -> Encoder:
    """The same encoder, for a teacher too: words that the teacher does not see are left out of both maps."""
    length, other = (teacher.encoder.teacher_length, teacher.encoder.teacher) if teacher else (0, None)
    return Encoder(encoder.tokenizer, encoder.max_length, encoder.overlong, other, length)


def teacher_agreement(judge: Judge, teacher: Judge, pairs: list[Pair], args) -> dict[str, np.ndarray]:
    """KL(T_i || S_i) of the words of both responses, mean by stage: {"intra", "inter": (N, stages)}."""
    examples = with_teacher(judge.encoder, teacher)(pairs)
    out = {name: np.full((len(examples), args.stages), np.nan) for name in ("intra", "inter")}
    few = max(1, args.batch_size // 4)  # maps need memory
    for start in bar(range(0, len(examples), few), "teacher agreement"):
        S, T, word_seg = word_maps(judge, teacher, examples[start:start + few], args.layers)
        for name, block in zip(out, (b[:, 0] for b in block_masks(word_seg))):
            rows = torch.where(block.any(-1), row_divergence(T, S, block), torch.nan).cpu().numpy()
            for b, segments in enumerate(word_seg.cpu().numpy()):
                stage = np.full(len(segments), -1)
                for s in (1, 2):
                    words = np.flatnonzero(segments == s)
                    stage[words] = np.arange(len(words)) * args.stages // max(1, len(words))
                values = [rows[b][(stage == k) & ~np.isnan(rows[b])] for k in range(args.stages)]
                out[name][start + b] = [v.mean() if len(v) else np.nan for v in values]
    return out


def curve(values: np.ndarray, groups: np.ndarray, seed: int) -> dict:
    """Mean and 95 % interval of each column of (N, stages), NaN left out."""
    real = [~np.isnan(v) for v in values.T]
    return {"mean": [float(v[r].mean()) if r.any() else None for v, r in zip(values.T, real)],
            "interval": [bootstrap(v[r], groups[r], seed) if r.any() else None for v, r in zip(values.T, real)]}


def attention(args) -> None:
    """The paper's Figure 1: accuracy as the response is masked stage by stage, and the attention that the scoring
    position pays to each stage, in rightly and wrongly ranked pairs; with --teacher the KL of the maps by stage."""
    files, result, K = read_files(args), {}, args.stages
    teacher = open_teacher(args.teacher, args) if args.teacher else None
    for name in args.models:
        judge = open_judge(name, args)
        if not hasattr(judge.model, "score"):
            raise UserError(f"{name}: attention reads decoder reward models (a teacher is given as --teacher)")
        for file, pairs in files.items():
            judge.encoder.counts.clear()
            examples = judge.encoder(pairs, progress="encoding")
            if not examples:
                raise UserError(f"{file}: no pair fits into --max-length {judge.encoder.max_length}")
            groups = prompt_groups([e.pair for e in examples])
            rows, spans = response_rows(examples)
            if args.span == "all":
                spans = [(0 if args.with_first else 1, end) for _, end in spans]
            edges = [stage_edges(*span, K) for span in spans]

            def right(hidden: list[tuple[int, int]]) -> np.ndarray:
                kept, hide = rows, hidden
                if args.delete:
                    kept, hide = [row[:a] + row[b:] for row, (a, b) in zip(rows, hidden)], None
                r = judge.score_rows(kept, args.batch_size, hide).reshape(-1, 2)
                return outcomes(r[:, 0] - r[:, 1])

            plain, blank = right([(0, 0)] * len(rows)), right([(e[0], e[K]) for e in edges])
            start = [plain, *(right([(e[0], e[k]) for e in edges]) for k in range(1, K)), blank]
            end = [plain, *(right([(e[K - k], e[K]) for e in edges]) for k in range(1, K)), blank]
            seen = judge.end_attention(rows, args.layers, args.rollout, args.batch_size)
            first = 0 if args.with_first else 1
            density = np.array([stage_density(a, e) for a, e in zip(seen, edges)]).reshape(-1, 2, K).mean(1)
            shares = {"first token": [a[0] for a in seen], "stages": [a[s:e].sum() for a, (s, e) in zip(seen, spans)]}
            shares["before the stages"] = [a[first:s].sum() for a, (s, _) in zip(seen, spans)]
            some = {"pairs": len(examples), **{k: v for k, v in judge.encoder.counts.items() if v},
                    "masked_from_start": curve(np.stack(start, 1), groups, args.seed),
                    "masked_from_end": curve(np.stack(end, 1), groups, args.seed),
                    "shares": {k: float(np.mean(v)) for k, v in shares.items()}}
            for k, those in (("right", plain == 1), ("wrong", plain == 0)):
                some[f"density_{k}"] = {"pairs": int(those.sum()), **curve(density[those], groups[those], args.seed)}
            if teacher is not None:
                for k, v in teacher_agreement(judge, teacher, pairs, args).items():
                    some[f"kl_{k}"] = curve(v, groups, args.seed)
            result.setdefault(file, {})[name] = some
            print_attention(file, name, some, K)
        if args.json:  # after each model: a failure later loses nothing
            save_json(args.json, "attention", args, {"files": result})
    if args.plot:
        plot_attention(result, args.plot)


def print_attention(file: str, name: str, r: dict, stages: int) -> None:
    def cells(key: str, shift: int, scale: float, digits: int) -> list[str]:
        if key not in r:
            return [""] * (stages + 1)
        texts = ["-" if m is None else f"{scale * m:.{digits}f} [{scale * i[0]:.{digits}f}, {scale * i[1]:.{digits}f}]"
                 for m, i in zip(r[key]["mean"], r[key]["interval"])]
        return [""] * shift + texts

    columns = {"masked to here %": cells("masked_from_start", 0, 100, 1),
               "masked from here %": cells("masked_from_end", 0, 100, 1)[::-1],
               f"density, {r['density_right']['pairs']} right": cells("density_right", 1, 1, 2),
               f"density, {r['density_wrong']['pairs']} wrong": cells("density_wrong", 1, 1, 2),
               "KL intra": cells("kl_intra", 1, 1, 2), "KL inter": cells("kl_inter", 1, 1, 2)}
    columns = {k: v for k, v in columns.items() if any(v)}
    print(f"\n{file}, {name}: {r['pairs']} pairs; the scoring position gives "
          + ", ".join(f"{100 * v:.0f} % to {'the ' * (k == 'first token')}{k}" for k, v in r["shares"].items()))
    print_rows(["stage", *columns], [[str(k) if k else "0", *(c[k] for c in columns.values())] for k in range(stages + 1)])


def plot_attention(result: dict, path: str) -> None:
    plt = pyplot()
    models = list(next(iter(result.values())))
    figure, grid = plt.subplots(len(result), 1 + len(models), figsize=(4 * (1 + len(models)), 3.2 * len(result)), squeeze=False)
    for axes, (file, rows) in zip(grid, result.items()):
        for k, (name, r) in enumerate(rows.items()):
            share = np.linspace(0, 100, len(r["masked_from_start"]["mean"]))
            for side, line in (("start", "-"), ("end", "--")):
                c = r[f"masked_from_{side}"]
                low, high = 100 * np.array(c["interval"]).T
                axes[0].plot(share, 100 * np.array(c["mean"]), line, marker="os^D"[k % 4], color=str(0.6 * k / len(models)),
                             markersize=4, label=f"{short(name)}, from the {side}")
                axes[0].fill_between(share, low, high, color=str(0.6 * k / len(models)), alpha=0.1)
            at, panel = np.arange(1, len(share)), axes[1 + k]
            for shift, side, hatch, colour in ((-0.2, "right", "", "0.8"), (0.2, "wrong", "//", "0.5")):
                c = r[f"density_{side}"]
                mean = np.array([np.nan if m is None else m for m in c["mean"]])
                ends = np.array([[np.nan] * 2 if i is None else i for i in c["interval"]]).T
                panel.bar(at + shift, mean, 0.4, yerr=np.abs(ends - mean), hatch=hatch, color=colour, edgecolor="black",
                          capsize=2, label=f"ranked {side} ({c['pairs']})")
            panel.axhline(1, color="black", linewidth=0.7)
            panel.set(title=short(name), xlabel="stage", ylabel="attention density (1 = even)", xticks=at)
            panel.legend(fontsize=7)
        axes[0].axhline(50, color="black", linewidth=0.7)
        axes[0].set(title=file, xlabel="share of the stages masked, %", ylabel="pair accuracy %, 95 % band")
        axes[0].legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    figure.tight_layout()
    save_plot(figure, path)


# ------------------------------------------------------------------------------------------------------ verb: show

def show(args) -> None:
    """One pair: its words shaded by the attention of the scoring position, and the simulated map (beside the
    teacher's with --teacher), its rows renormalised in the intra and the inter block."""
    pairs = [p for some in read_files(args).values() for p in some]
    found = [p for p in pairs if p.id == args.pair] or [p for k, p in enumerate(pairs) if str(k) == args.pair]
    if not found:
        raise UserError(f"--pair {args.pair}: neither an id in the data nor a number from 0 to {len(pairs) - 1}")
    teacher, pages = open_teacher(args.teacher, args) if args.teacher else None, []
    for name in args.models:
        judge = open_judge(name, args)
        if not hasattr(judge.model, "score"):
            raise UserError(f"{name}: show reads decoder reward models (a teacher is given as --teacher)")
        examples = with_teacher(judge.encoder, teacher)(found[:1])
        if not examples:
            raise UserError(f"pair {args.pair}: does not fit into --max-length {judge.encoder.max_length}")
        plain = judge.encoder(found[:1])[0]  # with the words that the teacher does not see
        rows, _ = response_rows([plain])
        ends, words = judge.end_attention(rows, args.layers, args.rollout, args.batch_size), []
        for w, s in enumerate(plain.word_seg):
            own = (plain.word == w) & ((plain.seg != 2) | (s == 2))
            words.append(judge.encoder.tokenizer.decode(plain.ids[own]).strip())
        page = {"model": name, "id": found[0].id, "words": words, "segments": plain.word_seg.tolist(), "maps": {},
                "rewards": [float(r) for r in judge.score_rows(rows, args.batch_size)], "attention": []}
        for s, attention in zip((1, 2), ends):
            mine = (plain.seg == 0) | (plain.seg == s)
            at = plain.word[mine]
            page["attention"].append(np.bincount(at[at >= 0], attention[at >= 0], len(words)).tolist())
        S, T, word_seg = word_maps(judge, teacher, examples, args.layers)
        for kind, block in zip(("intra", "inter"), (b[:, 0] for b in block_masks(word_seg))):
            for who, P in (("student, simulated", S), ("teacher", T)):
                if P is not None:
                    P = P.float() * block
                    P = (P / P.sum(-1, keepdim=True).clamp_min(1e-8))[0].cpu().double().numpy()
                    page["maps"][f"{kind}: {who}"] = P.round(5).tolist()
        print_page(page)
        pages.append(page)
    if args.json:
        save_json(args.json, "show", args, {"models": pages})
    if args.html:
        with written(args.html) as f:
            f.write(HTML.replace("PAGES", json.dumps(pages).replace("<", "\\u003c")))
    if args.plot:
        plot_show(pages, args.plot)


def print_page(page: dict) -> None:
    """The words of each side, in a terminal on a background as red as their share of the scoring position's attention."""
    for s, side, reward, attention in zip((1, 2), ("chosen", "rejected"), page["rewards"], page["attention"]):
        top = max(attention) or 1.0
        print(f"\n{page['model']}, {side}, reward {reward:.3f}; {100 * sum(attention):.0f} % of the attention is on words, most on "
              + ", ".join(f"{page['words'][w]} ({100 * attention[w]:.1f} %)" for w in np.argsort(attention)[::-1][:5]))
        for segment in (0, s):
            shown = [(word, a) for word, t, a in zip(page["words"], page["segments"], attention) if t == segment]
            print(" ".join(f"\x1b[48;2;255;{int(255 - 200 * a / top)};{int(255 - 200 * a / top)}m\x1b[30m{word}\x1b[0m"
                           if sys.stdout.isatty() else word for word, a in shown))


def plot_show(pages: list[dict], path: str) -> None:
    plt = pyplot()
    figure, grid = plt.subplots(len(pages), len(pages[0]["maps"]), squeeze=False,
                                figsize=(4 * len(pages[0]["maps"]), 4 * len(pages)))
    for axes, page in zip(grid, pages):
        for panel, (name, values) in zip(axes, page["maps"].items()):
            values = np.sqrt(np.array(values))  # the root shows small shares too
            panel.imshow(values, cmap="Greys", vmax=np.quantile(values, 0.995) or 1)
            edges = np.flatnonzero(np.diff(np.maximum(page["segments"], 0))) + 0.5
            for edge in edges:
                panel.axhline(edge, color="black", linewidth=0.5)
                panel.axvline(edge, color="black", linewidth=0.5)
            panel.set(title=f"{short(page['model'])}\n{name}", xlabel="attended word", ylabel="attending word")
    figure.tight_layout()
    save_plot(figure, path)


HTML = """<!doctype html><meta charset="utf-8"><title>attention of a reward model</title>
<style>body{font:15px/1.7 sans-serif;margin:2em;max-width:75em} span{padding:1px 2px;cursor:pointer} .on{outline:2px solid #000}
figure{display:inline-block;margin:0 1em 1em 0} canvas{width:20em;height:20em;image-rendering:pixelated;border:1px solid #999}
</style><h1>One pair</h1><p>Words are shaded by the attention of the scoring position, the darkest for the strongest. Click a word:
all words are then shaded by its row of the simulated map (student) or of the teacher's. Maps: rows attend to columns.</p>
<div id="page"></div><script>
const add = (to, tag, text) => { const e = document.createElement(tag); if (text) e.textContent = text; to.append(e); return e }
for (const page of PAGES) {
  const root = document.getElementById("page"), sides = ["prompt", "chosen", "rejected"], spans = []
  add(root, "h2", page.model)
  const paint = (s, list, colour) => s.e.style.background =
    `rgba(${colour},${(0.85 * list[s.i] / (Math.max(...list) || 1)).toFixed(3)})`
  const reset = () => { for (const s of spans) { s.e.className = ""; paint(s, page.attention[s.view], "200,40,0") } }
  for (const k of [0, 1]) {
    add(root, "h3", `${sides[k + 1]}: reward ${page.rewards[k].toFixed(3)}`)
    for (const segment of [0, k + 1]) { const p = add(root, "p"); add(p, "b", sides[segment] + ": ")
      page.words.forEach((w, i) => { if (page.segments[i] == segment) { const e = add(p, "span", w), s = {e, i, view: k}
        spans.push(s); p.append(" "); e.onclick = () => click(s) } }) } }
  const choose = add(root, "p"), names = Object.keys(page.maps); let which = names[0], picked = null
  const show = () => { reset(); if (!picked) return; picked.e.className = "on"
    for (const s of spans) paint(s, page.maps[which][picked.i], "0,60,200") }
  const click = s => { picked = picked === s ? null : s; show() }
  add(choose, "b", "A clicked word shows its row of: ")
  for (const n of names) { const b = add(choose, "button", n); b.onclick = () => { which = n; show() } }
  for (const n of names) { const f = add(root, "figure"), c = add(f, "canvas"), W = page.words.length; add(f, "figcaption", n)
    c.width = c.height = W; const g = c.getContext("2d"), m = page.maps[n], top = Math.max(...m.flat()) || 1
    for (let i = 0; i < W; i++) for (let j = 0; j < W; j++) { const v = 255 - Math.round(255 * Math.sqrt(m[i][j] / top))
      g.fillStyle = `rgb(${v},${v},${v})`; g.fillRect(j, i, 1, 1) } }
  reset()
}
</script>
"""
# ---------------------------------------------------------------------------------------------------- verb: attack

BUILT_IN = {  # edits made of the response's own sentences
    "recap": lambda y: f"{y}\n\nIn short:\n- {sentences(y)[0]}",
    "repeat": lambda y: f"{y} {sentences(y)[-1]}",
    "upper": str.upper,
    "markdown": lambda y: "## Answer\n\n" + "\n".join(f"- **{s}**" for s in sentences(y))}
APPLY = {"append": lambda y, text: y + text, "prepend": lambda y, text: text + y, "built_in": lambda y, name: BUILT_IN[name](y),
         "replace_end": lambda y, text: without_end(y) + text}
EDITS = {
    "closing phrase": {"append": " I hope this helps!"},
    "apology": {"append": " I am sorry if this is not quite what you were looking for."},
    "recap of the first sentence": {"built_in": "recap"},
    "last sentence again": {"built_in": "repeat"},
    "praise": {"prepend": "What a great question! "},
    "padding": {"append": " There is more to be said about this, and it is worth taking the time to think it through." * 3},
    "markdown": {"built_in": "markdown"},
    "upper case": {"built_in": "upper"},
    "off-topic ending": {"replace_end": " The old town is loveliest in spring, when the cafes move their tables out to the square."}}


def sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n+", text.strip()) if s.strip()]


def without_end(text: str) -> str:
    """Without its last sentence; a single sentence loses its second half."""
    if len(sentences(text)) > 1:
        return text[:text.rindex(sentences(text)[-1])].rstrip()
    half = text[:(len(text) + 1) // 2]
    return half.rpartition(" ")[0] or half


def edited(text: str, edit: dict[str, str]) -> str:
    text = text.strip()
    for kind, value in edit.items():
        text = APPLY[kind](text, value)
    return text


def read_edits(path: str | None) -> dict[str, dict]:
    """EDITS with those of a file added, replaced or (null) taken out. Raises UserError."""
    try:
        more = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError) as why:
        raise UserError(f"--edits {path}: cannot be read ({why})") from None
    if not isinstance(more, dict):
        raise UserError(f'--edits {path}: is not one JSON object, such as {{"thanks": {{"append": " Thanks!"}}}}')
    for name, edit in more.items():
        fits = isinstance(edit, dict) and edit and all(k in APPLY and isinstance(v, str) for k, v in edit.items())
        if not (fits and edit.get("built_in", "upper") in BUILT_IN or edit is None and name in EDITS):
            raise UserError(f'--edits {path}: "{name}" is not {{KIND: text}} with a KIND of {", ".join(APPLY)} (one of '
                            f'{", ".join(BUILT_IN)}), nor null for one of: {", ".join(EDITS)}')
    edits = {name: edit for name, edit in {**EDITS, **more}.items() if edit}
    if not edits:
        raise UserError(f"--edits {path}: leaves no edit")
    return edits


def attack(args) -> None:
    """How often surface edits of the rejected response alone overturn a right ranking, and what reward they earn.

    --edits FILE.json, {"name": EDIT, ...}, adds edits to the built-in ones, or replaces those of the same name. An EDIT is
    {"append": text}, {"prepend": text}, {"replace_end": text} (the last sentence is swapped; of a single sentence, the
    second half), {"built_in": "recap" | "repeat" | "markdown" | "upper"}, several of these (applied in order), or null
    (takes a built-in edit out)."""
    refuse_teachers(args)
    edits, files = read_edits(args.edits), read_files(args)
    groups = {file: prompt_groups(pairs) for file, pairs in files.items()}
    result = {file: {} for file in files}

    def score(judge: Judge, pairs: list[Pair]) -> np.ndarray:
        """(N, 2 + edits); all of a pair share one cut of the prompt, and a pair with an edit that does not fit is dropped."""
        items = [(p.prompt, [p.chosen, p.rejected, *(edited(p.rejected, e) for e in edits.values())]) for p in pairs]
        return judge.score_responses(items, args.batch_size)[0]

    for name, file, pairs, rewards in scored(args, files, score):
        fits = ~np.isnan(rewards[:, 0])
        r, of = rewards[fits], groups[file][fits]
        result[file][name] = row = {"pairs": len(r), "dropped": len(pairs) - len(r), "edits": {}}
        if not len(r):
            continue
        right, spread = r[:, 0] > r[:, 1], float(r[:, :2].std())
        row.update(accuracy=float(outcomes(r[:, 0] - r[:, 1]).mean()), ranked_right=int(right.sum()), reward_std=spread)
        for edit, after in zip(edits, r[:, 2:].T):
            flip, shift = 1 - outcomes(r[:, 0] - after), (after - r[:, 1]) / (spread or 1)
            row["edits"][edit] = {
                "flip_rate": float(flip[right].mean()) if right.any() else None,
                "flip_interval": bootstrap(flip[right], of[right], args.seed) if right.any() else None,
                "flips_of_all": float((flip * right).mean()), "accuracy": float(1 - flip.mean()),
                "shift": float(shift.mean()) if spread else None,
                "shift_interval": bootstrap(shift, of, args.seed) if spread else None}
        if args.json:
            save_json(args.json, "attack", args, {"edits": edits, "files": result})
    for file, models in result.items():
        rows = [[f"{name[-44:]} ({m['pairs']} pairs, {m['dropped']} dropped)", "", "", percent(m.get("accuracy")), ""]
                for name, m in models.items()]
        for edit in edits:
            rows.append([edit] + [""] * 4)
            for name, e in ((n, m["edits"][edit]) for n, m in models.items() if m["pairs"]):
                low, high = e["shift_interval"] or [0, 0]
                rows.append(["  " + name[-42:], percent(e["flip_rate"], e["flip_interval"]), percent(e["flips_of_all"]),
                             percent(e["accuracy"]), f"{e['shift']:+.2f} [{low:+.2f}, {high:+.2f}]" if e["shift"] is not None else "-"])
        print(f"\n{file}: {len(files[file])} pairs, only the rejected response is edited")
        print_rows(["", "flips % [95 %]", "of all %", "accuracy %", "shift [95 %]"], rows)
    print("\n(flips: of the pairs ranked right before, ties after the edit count half; shift: of the reward, in standard\n"
          " deviations of the model's rewards of the unedited responses; the same pairs and prompts for every edit)")
    if args.plot:
        draw(args.plot, [({"title": file, "ylabel": "flips %, 95 % interval", "xticks": range(len(edits)), "xticklabels": list(edits)}, {
            name: (np.arange(len(edits)) + 0.12 * k, *(100 * np.array([m["edits"][e][v] or np.nan for e in edits], dtype=float).T
                                                       for v in ("flip_rate", "flip_interval")))
            for k, (name, m) in enumerate(models.items()) if m["pairs"]}) for file, models in result.items()])


# --------------------------------------------------------------------------------------------------- verb: bestofn

def best_of_n(proxy: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Expected value of the candidate with the highest proxy among n drawn without replacement: (P, N), (P, N) -> (P, N),
    column n - 1 for n. The k-th lowest of N is the highest of n in C(k-1, n-1) of C(N, n) draws; candidates of equal
    proxy share the mean of their values, as if ties were broken at random."""
    N = proxy.shape[1]
    weights = np.array([[comb(k - 1, n - 1) / comb(N, n) for k in range(1, N + 1)] for n in range(1, N + 1)])
    out = np.zeros(proxy.shape)
    for row, p, v in zip(out, proxy, values):
        level = np.unique(p, return_inverse=True)[1]
        shared = np.bincount(level, v) / np.bincount(level)
        row[:] = weights @ shared[np.sort(level)]
    return out


def over_optimisation(proxy: np.ndarray, gold: np.ndarray, groups: np.ndarray, seed: int) -> dict:
    """All that bestofn says of one model: curves over n = 1..N of proxy (P, N) and gold (P, N)."""
    of_gold, of_proxy, n = best_of_n(proxy, gold), best_of_n(proxy, proxy).mean(0), np.arange(1, proxy.shape[1] + 1)
    means, curve = resampled_means(of_gold, groups, seed), of_gold.mean(0)
    # spread within prompts: a reward model is only defined up to a constant for each prompt
    gains = [float((c[-1] - c[0]) / s) if (s := np.sqrt(v.var(1).mean())) else None for c, v in ((of_proxy, proxy), (curve, gold))]
    return {"n": n.tolist(), "kl": (np.log(n) - (n - 1) / n).tolist(), "proxy": of_proxy.tolist(), "gold": curve.tolist(),
            "gold_interval": interval(means), "oracle": best_of_n(gold, gold).mean(0).tolist(), "random": float(gold.mean()),
            "gap": float(curve.max() - curve[-1]), "gap_interval": interval(means.max(1) - means[:, -1]), "best_n": int(curve.argmax()) + 1,
            "proxy_gain": gains[0], "gold_gain": gains[1], "gain_difference": None if None in gains else gains[0] - gains[1]}


def bestofn(args) -> None:
    """Proxy and gold score of the best of n candidates by reward, n = 1..N: does choosing harder still choose better?

    A line of --data is {"prompt", "responses": [text, ...], "gold": [number, ...]} or, one good and several bad,
    {"prompt", "chosen": text, "rejected": [text, ...]} (gold 1 and 0); all prompts of a file have the same N."""
    refuse_teachers(args)
    files = read_files(args, read_candidates)
    result = {file: {} for file in files}
    for name, file, items, proxy in scored(args, files, lambda judge, items: judge.score_responses(
            [(c.prompt, c.responses) for c in items], args.batch_size)[0]):
        fits = ~np.isnan(proxy[:, 0])
        result[file][name] = row = {"prompts": int(fits.sum()), "dropped": int((~fits).sum())}
        if fits.any():
            gold = np.array([c.gold for c in items])
            row.update(over_optimisation(proxy[fits].astype(float), gold[fits], prompt_groups(items)[fits], args.seed))
        if args.json:
            save_json(args.json, "bestofn", args, {"files": result})
    for file, models in result.items():
        print(f"\n{file}: {len(files[file])} prompts, {len(files[file][0].responses)} candidates each")
        rows = []
        for name, m in models.items():
            rows.append([f"{name[-44:]} ({m['prompts']} prompts, {m['dropped']} dropped)"] + [""] * 5)
            for k in [k for k, n in enumerate(m.get("n", [])) if n & (n - 1) == 0 or n == len(m["n"])]:
                low, high = (ends[k] for ends in m["gold_interval"])
                rows.append([f"  {k + 1}", f"{m['kl'][k]:.2f}", f"{m['proxy'][k]:.3f}", f"{m['gold'][k]:.3f} [{low:.3f}, {high:.3f}]",
                             f"{m['random']:.3f}", f"{m['oracle'][k]:.3f}"])
        print_rows(["best of n", "KL", "proxy", "gold [95 %]", "random", "oracle"], rows)
        for name, m in ((name, m) for name, m in models.items() if m["prompts"]):
            gain = ["-" if m[k] is None else f"{m[k]:+.2f}" for k in ("proxy_gain", "gold_gain", "gain_difference")]
            print(f"{name[-44:]}: gap {m['gap']:.3f} [{m['gap_interval'][0]:.3f}, {m['gap_interval'][1]:.3f}] below the best gold, at "
                  f"n = {m['best_n']}; proxy gain {gain[0]}, gold gain {gain[1]}, difference {gain[2]}")
    print("\n(KL = log n - (n-1)/n; gap: highest gold of any n minus gold at N, never negative; gains: from n = 1 to N, in standard\n"
          " deviations within a prompt; intervals: 95 %, bootstrap over prompts)")
    if args.plot:
        draw(args.plot, [({"title": file, "xlabel": "KL of the best of n, nats", "ylabel": "gold score, 95 % interval"}, {
            **{name: (m["kl"], m["gold"], m["gold_interval"]) for name, m in models.items() if m["prompts"]},
            **{label: (m["kl"], np.broadcast_to(m[label], len(m["n"])), None) for label in ("oracle", "random")
               for m in list(models.values())[:1] if m["prompts"]}}) for file, models in result.items()])


# ------------------------------------------------------------------------------------------------- verb: stability

def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation of (N,) and (N,), equal values with their average rank; None where one is constant."""
    ranks = []
    for x in (a, b):
        _, level, counts = np.unique(x, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[level])
    return None if min(r.std() for r in ranks) == 0 else float(np.corrcoef(*ranks)[0, 1])


def fitted_temperature(margins: np.ndarray) -> float | None:
    """T > 0 with the least mean of -log sigma(margin / T), by bisection: in 1 / T the loss is convex. None where no finite T is
    best: nothing is ranked wrong, or the margins tell no more than chance."""
    def slope(beta: float) -> float:
        return float(-(margins * np.exp(-np.logaddexp(0, beta * margins))).mean())

    low, high = -20.0, 20.0  # of log(1 / T)
    if slope(np.exp(low)) >= 0 or slope(np.exp(high)) <= 0:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(np.exp(middle)) < 0 else (low, middle)
    return float(np.exp(-low))


def calibration(margins: np.ndarray, bins: int = 15) -> dict:
    """How far sigma(margin) is a probability. Confidence is sigma(|margin|), outcome 1 where the ranking is right, half for
    ties; ECE over equal bins of [0.5, 1]; Brier and negative log-likelihood are those of sigma(margin) against 1."""
    m = margins.astype(float)
    confidence, right = 1 / (1 + np.exp(-np.abs(m))), outcomes(m)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    filled = [{"pairs": int((index == b).sum()), "confidence": float(confidence[index == b].mean()),
               "right": float(right[index == b].mean())} for b in np.unique(index)]
    temperature = fitted_temperature(m)
    return {"nll": float(np.logaddexp(0, -m).mean()), "brier": float((1 / (1 + np.exp(np.minimum(m, 700))) ** 2).mean()),
            "ece": sum(b["pairs"] * abs(b["confidence"] - b["right"]) for b in filled) / len(m), "temperature": temperature,
            "nll_at_temperature": float(np.logaddexp(0, -m / temperature).mean()) if temperature else None, "bins": filled}


def drift(model: str) -> dict | None:
    """Validation rewards by step, from the metrics.jsonl of the run that RUN/student belongs to; None for other models."""
    path = Path(model).resolve().parent / "metrics.jsonl"
    if not Path(model).is_dir() or not path.exists():
        return None
    lines = [json.loads(raw) for raw in path.read_text().splitlines() if raw.endswith("}")]
    lines = [m for m in lines if m.get("phase") == Path(model).resolve().name]
    lines = [m for m in lines if m.get("val_reward_mean") is not None]
    return {k: [m[v] for m in lines] for k, v in (("steps", "step"), ("mean", "val_reward_mean"), ("std", "val_reward_std"))} if lines else None


def stability(args) -> None:
    """Several runs of one recipe (their RUN/student): do they agree, and is sigma(margin) a probability?"""
    files = read_files(args)
    result, kept, drifts = {file: {"models": {}} for file in files}, {file: [] for file in files}, {m: drift(m) for m in args.models}
    for name, file, pairs, rewards in scored(args, files, lambda judge, pairs: judge.score(pairs, args.batch_size)[0]):
        here, margins = result[file], rewards[~np.isnan(rewards).any(1)] @ [1, -1]
        here["models"][name] = row = summary(pairs, prompt_groups(pairs), rewards, None, args.seed)
        kept[file].append(rewards)
        if len(margins):
            row["calibration"] = calibration(margins)
        values = [m["accuracy"] for m in here["models"].values() if m["pairs"]]
        here["accuracy"] = {"mean": float(np.mean(values)) if values else None, "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}
        for what, view in (("rewards", lambda r: r.ravel()), ("margins", lambda r: r @ [1, -1])):
            here["rank_correlation_of_" + what] = [[spearman(view(a[both]), view(b[both])) if (both := ~np.isnan(a + b).any(1)).any() else None
                                                    for b in kept[file]] for a in kept[file]]
        if args.json:
            save_json(args.json, "stability", args, {"files": result, "drift": drifts})
    show = lambda v, form="{:.3f}": "-" if v is None else form.format(v)  # noqa: E731
    for file, r in result.items():
        rows = []
        for k, (name, m) in enumerate(r["models"].items()):
            c, others = m.get("calibration", {}), [v for j, v in enumerate(r["rank_correlation_of_rewards"][k]) if j != k and v is not None]
            of_margins = [v for j, v in enumerate(r["rank_correlation_of_margins"][k]) if j != k and v is not None]
            rows.append([name[-44:], percent(m.get("accuracy"), m.get("interval"))] + [
                show(c.get(v)) for v in ("nll", "brier", "ece", "temperature")] + [
                show(float(np.mean(v)) if v else None) for v in (others, of_margins)] + [str(m["dropped"])])
        spread = r["accuracy"]
        print(f"\n{file}: {len(files[file])} pairs; accuracy of the runs {percent(spread['mean'])} ± {percent(spread['std'])} "
              "(mean, standard deviation)")
        print_rows(["stability", "accuracy % [95 %]", "NLL", "Brier", "ECE", "T", "rank corr.", "of margins", "dropped"], rows)
    for name, d in drifts.items():
        print(f"{name[-44:]}: " + ("no metrics.jsonl beside it, so no drift" if d is None else "validation reward by step: " + ", ".join(
            f"{s}: {m:.2f} ± {v:.2f}" for s, m, v in zip(d["steps"], d["mean"], d["std"]))))
    print("\n(NLL, Brier, ECE of sigma(margin); T: the temperature that would minimise the NLL; rank correlation: Spearman, mean over\n"
          " the other runs, of all rewards and of the margins, which do not see a shift between prompts)")
    if args.plot:
        ends = {name: [np.subtract(d["mean"], d["std"]), np.add(d["mean"], d["std"])] for name, d in drifts.items() if d}
        draw(args.plot, [({"title": file, "xlabel": "confidence, sigma(|margin|)", "ylabel": "share ranked right"}, {
            **{name: (*zip(*[(b["confidence"], b["right"]) for b in m["calibration"]["bins"]]), None)
               for name, m in r["models"].items() if m["pairs"]}, "calibrated": ([0.5, 1], [0.5, 1], None)}) for file, r in result.items()] + [
            ({"xlabel": "step", "ylabel": "validation reward, mean ± standard deviation"}, {
                name: (drifts[name]["steps"], drifts[name]["mean"], e) for name, e in ends.items()})] * bool(ends))


# ----------------------------------------------------------------------------------------------------- verb: speed

ARMS = {"a": "two passes, padded", "b": "one batch of both, random order (as TRL)", "b'": "b, bucketed by length",
        "c": "packed tree, bucketed: plain BT", "tap": "c and its maps", "pool": "c, maps, pooling, loss; no teacher",
        "d": "the whole method with its teacher", "e": "maps by eager output_attentions, all layers", "trl": "TRL's RewardTrainer, no checkpointing"}


def random_examples(count: int, lengths: list[int], vocabulary: tuple[int, int], room: int, seed: int) -> list[Example]:
    """Pairs of random tokens with (prompt, chosen, rejected) of these lengths, three words to four tokens; the teacher
    reads as much of each part as its room allows."""
    rng, out, seg = np.random.default_rng(seed), [], np.repeat([0, 1, 2], lengths)
    word = np.arange(len(seg)) * 3 // 4
    word_seg = np.zeros(word[-1] + 1, dtype=int)
    word_seg[word] = seg
    share = min(1.0, (room - 4) / len(seg))
    heads = [np.flatnonzero(seg == s)[:int(share * n)] for s, n in enumerate(lengths)]
    word_seg[np.setdiff1d(word, word[np.concatenate(heads)])] = -1
    for _ in range(count):
        runs = [(rng.integers(5, vocabulary[1], len(at)), word[at]) for at in heads]
        out.append(Example(rng.integers(5, vocabulary[0], len(seg)), seg, word, word_seg, runs, None))
    return out


def training_step(arm: str, model: RewardModel, teacher: InteractionTeacher, examples: list[Example], cfg: Config,
                  device) -> tuple[torch.Tensor, int, int]:
    """(loss of one arm, tokens computed, those that are not padding)."""
    stock, pad, B = model.stock, model.stock.config.get_text_config().pad_token_id, len(examples)
    if arm[0] in "ab":
        rows = [e.ids[(e.seg == 0) | (e.seg == s)] for s in (1, 2) for e in examples]
        rewards, slots = [], 0
        for some in [rows[:B], rows[B:]] if arm == "a" else [rows]:
            n = max(map(len, some))
            ids = np.stack([np.pad(r, (0, n - len(r)), constant_values=pad) for r in some])
            inputs = to_device(dict(input_ids=ids, attention_mask=np.stack([np.arange(n) < len(r) for r in some])), device)
            rewards.append(stock(**inputs, use_cache=False).logits[:, 0].float())
            slots += ids.size
        return bt_loss(*torch.cat(rewards).chunk(2)).mean(), slots, sum(map(len, rows))
    batch = collate(examples, pad, device)
    if arm == "e":
        other, W = collate_teacher(examples, np.zeros(B), teacher.tokenizer, device), batch["word_seg"].shape[1]
        out = stock.base_model(batch["ids"], attention_mask=tree_mask(batch["seg"]), position_ids=batch["pos"], use_cache=False,
                               output_attentions=True)
        ends = batch["last"][:, :, None].expand(-1, -1, out.last_hidden_state.shape[-1])
        r = stock.score(out.last_hidden_state.gather(1, ends))[..., 0].float()
        with torch.no_grad():
            read = teacher.stock(other["ids"], attention_mask=other["mask"], output_attentions=True).attentions
        S, T = (pool_words(A[-1].float().mean(1, keepdim=True), b["word"], W) for A, b in ((out.attentions, batch), (read, other)))
        loss = bt_loss(r[:, 0], r[:, 1]) + alignment_loss(T, S, block_masks(batch["word_seg"], "causal")[0])
    elif arm == "tap":
        r = model(batch)
        loss = bt_loss(r[:, 0], r[:, 1]) + 0 * sum(m.sum() for m in model.maps)
    else:
        loss = distillation_losses(model, teacher if arm == "d" else None, examples, np.zeros(B), cfg, device, list(range(B)))["loss"]
    return loss.mean(), batch["ids"].numel(), sum(len(e.ids) for e in examples)


def time_arms(args) -> dict[str, dict]:
    """Every arm, round after round: medians of pairs a second, ratios to the first arm of the same round, tokens, peak memory."""
    device, amp = set_up_device(args)
    if args.shrink:
        tokenizer, own, (hidden, layers) = load_tokenizer(args.models[0]), load(AutoConfig, args.models[0], num_labels=1), args.shrink
        choose_pad(tokenizer)
        small = dict(hidden_size=hidden, num_hidden_layers=layers, intermediate_size=4 * hidden, num_attention_heads=4, head_dim=None,
                     num_key_value_heads=4, max_position_embeddings=2**15, layer_types=None, pad_token_id=tokenizer.pad_token_id)
        stock = AutoModelForSequenceClassification.from_config(type(own)(**{**own.to_dict(), **small}))
    else:
        stock, tokenizer = load_student(args.models[0], args.seed)
    reader, reader_tokenizer, room = load_teacher(args.teacher, args.seed)
    stock.to(device).train(), reader.to(device).eval().requires_grad_(False)
    if args.lengths:
        examples = random_examples(args.pairs, args.lengths, (stock.config.vocab_size, len(reader_tokenizer)), room, args.seed)
    else:
        pairs = [p for some in read_files(args).values() for p in some][:8 * args.pairs]
        examples = Encoder(tokenizer, args.max_length or 1024, "truncate", reader_tokenizer, room)(pairs, progress="encoding")
        # every eighth of the length buckets of training: few pairs, with the padding and the lengths of many
        buckets = sorted(plan_epoch(np.array([len(e.ids) for e in examples]), args.batch_size, args.seed, 0), key=lambda i: len(examples[i[0]].ids))
        examples = [examples[i] for bucket in buckets[len(buckets) // 2 % 8::8] for i in bucket][:args.pairs]
    k, pairs = args.batch_size, [e.pair for e in examples]
    order = np.random.default_rng(args.seed).permutation(len(examples))
    random, bucketed = ([o[i:i + k] for i in range(0, len(o), k)] for o in (order, np.arange(len(examples))))
    optimizer, sdpa = make_optimizer(stock, 0.0, 0.0), stock.config._attn_implementation  # lr 0: the same weights throughout
    peer, taken, tokens = None, {arm: [] for arm in args.arms}, {arm: np.zeros(2) for arm in args.arms}
    for round in bar(range(args.rounds + 1), "rounds"):
        for arm in args.arms:
            for m in (stock, reader):
                m.set_attn_implementation("eager" if arm == "e" else sdpa)
            last = [(m.config.get_text_config().num_hidden_layers - 1,) if arm in ("tap", "pool", "d") else () for m in (stock, reader)]
            model, teacher = RewardModel(stock, "packed", last[0]), InteractionTeacher(reader, reader_tokenizer, last[1])
            cfg = Config(align_target="teacher" if arm == "d" else "uniform", align_max_tokens=args.align_max_tokens)
            if arm == "trl":
                peer = peer or trl_trainer(stock, tokenizer, pairs, args, amp is not nullcontext)
                taken[arm] += [peer()] * bool(round)
                continue
            started = time.perf_counter()
            for index in (random if arm in ("a", "b") else bucketed)[:None if round else 1]:  # round 0 warms up
                with amp():
                    loss, *counts = training_step(arm, model, teacher, [examples[i] for i in index], cfg, device)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                tokens[arm] += np.array(counts) * (round == 1)
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken[arm] += [time.perf_counter() - started] * bool(round)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    base, N = np.array(taken[args.arms[0]]), len(examples)
    return {arm: {"pairs_per_s": N / float(np.median(t)), "ratio": float(np.median(base / t)), "ratios": (base / t).tolist(),
                  "tokens_per_pair": tokens[arm][1] / N, "padding": 1 - tokens[arm][1] / max(1, tokens[arm][0]), "peak_bytes": peak}
            for arm, t in ((arm, np.array(t)) for arm, t in taken.items())}


def trl_trainer(stock, tokenizer, pairs: list[Pair], args, bf16: bool):
    """A function that trains one epoch in TRL on the strings that are scored here, and returns the seconds of its steps."""
    try:
        from datasets import Dataset
        from trl import RewardConfig, RewardTrainer
    except ImportError:
        raise UserError("--peer trl needs TRL: pip install trl") from None

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            clock.total += time.perf_counter() - self.began

    clock, text = Clock(), Formatter(tokenizer).text
    rows = [{"chosen": text(p.prompt, p.chosen), "rejected": text(p.prompt, p.rejected)} for p in pairs]
    config = RewardConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=args.batch_size, num_train_epochs=1, bf16=bf16,
                          learning_rate=1e-12, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
                          gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(), max_length=args.max_length or 1024)
    trainer = RewardTrainer(model=stock, args=config, processing_class=tokenizer, train_dataset=Dataset.from_list(rows), callbacks=[clock])

    def epoch() -> float:
        clock.total = 0.0
        trainer.train()
        stock.train()
        return clock.total

    return epoch


def own_process(args, arm: str, *flags) -> dict:
    """One arm alone, a round, in a process of its own: what it really needs of memory. Raises UserError."""
    with tempfile.TemporaryDirectory() as folder:
        given = [a for k in ("teacher", "max_length", "dtype", "device", "seed", "pairs", "batch_size", "align_max_tokens")
                 for a in ("--" + k.replace("_", "-"), str(getattr(args, k)))]
        for k in ("data", "lengths", "shrink"):
            given += ["--" + k, *map(str, getattr(args, k))] if getattr(args, k) else []
        command = [sys.executable, __file__, "speed", args.models[0], *given, *map(str, flags), "--arms", arm, "--rounds", "1",
                   "--json", f"{folder}/out"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"arm {arm} {' '.join(map(str, flags))}: {(done.stderr.strip() or 'killed, probably for memory').splitlines()[-1]}")
        return json.loads(Path(f"{folder}/out").read_text())["arms"][arm]


def speed(args) -> None:
    """Training steps in several ways, interleaved in one process: pairs a second as ratios to the first of --arms.

    a, b, b': as most code does it; c: the packed tree mask; d: the whole method, teacher included; e: the naive way to get attention
    maps. tap and pool are c with a part of d: their differences say what each part costs. Data: --data, or random tokens (--lengths
    PROMPT CHOSEN REJECTED). --memory runs each arm again in a process of its own, --grow N... runs it at each total length instead
    (half of it prompt). The arm trl is TRL's own RewardTrainer, where TRL is installed (--peer trl adds it)."""
    if not args.teacher or not (args.data or args.lengths or args.grow):
        raise UserError("speed needs --teacher, and --data, --lengths or --grow")
    if args.peer and args.peer not in args.arms:
        args.arms.append(args.peer)
    if "trl" in args.arms and not args.data:
        raise UserError("the arm trl reads text: give --data")
    if args.grow:
        rows = {f"{arm} {n}": {"arm": arm, "tokens": n, **own_process(args, arm, "--lengths", n // 2, n // 4, n // 4)}
                for n in bar(args.grow, "lengths") for arm in args.arms}
    else:
        rows = time_arms(args)
        for arm in args.arms if args.memory else ():
            rows[arm]["peak_bytes"] = own_process(args, arm)["peak_bytes"]
    print_rows(["", "pairs/s", f"ratio to {args.arms[0]} [min, max]", "tokens a pair", "padding", "peak memory"], [
        [f"{k}: {ARMS[k.split()[0]]}", f"{r['pairs_per_s']:.2f}",
         "" if args.grow else f"{r['ratio']:.2f} [{min(r['ratios']):.2f}, {max(r['ratios']):.2f}]", f"{r['tokens_per_pair']:.0f}",
         f"{100 * r['padding']:.0f} %", f"{r['peak_bytes'] / 1e6:.0f} MB" if args.memory or args.grow else ""] for k, r in rows.items()])
    if args.json:
        save_json(args.json, "speed", args, {"arms": rows, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else
                                             f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"})
    if args.plot and args.grow:
        of = {arm: [r for r in rows.values() if r["arm"] == arm] for arm in args.arms}
        draw(args.plot, [({"xlabel": "tokens a pair", "ylabel": label, "xscale": "log", "yscale": "log"}, {
            f"{arm}: {ARMS[arm]}": ([r["tokens"] for r in some], [value(r) for r in some], None) for arm, some in of.items()})
            for label, value in (("seconds a pair", lambda r: 1 / r["pairs_per_s"]), ("peak memory, MB", lambda r: r["peak_bytes"] / 1e6))])


# ---------------------------------------------------------------------------------------------------- command line

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """One sub-command a verb; each function below it takes the parsed flags."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = ap.add_subparsers(dest="verb", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("models", nargs="+", metavar="MODEL", help="reward model (or RUN/teacher): local directory or hub id")
    common.add_argument("--data", nargs="+", default=[], metavar="FILE", help="pairs (bestofn: candidates): JSONL, plain or "
                        ".gz; raw HH-RLHF too")
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
    maps = argparse.ArgumentParser(add_help=False)
    maps.add_argument("--teacher", metavar="DIR", help="interaction teacher to compare the simulated maps with (RUN/teacher)")
    maps.add_argument("--layers", default="last", help="attention layers to average: last, all, or numbers as 0,-1 (default: last)")
    maps.add_argument("--rollout", action="store_true", help="attention rollout through all layers (arXiv 2005.00928)")
    flags = {
        accuracy: [("--dump", dict(metavar="PAIRS.jsonl", help="one line a pair, with RewardBench's keys and the exact scored strings")),
                   ("--strength", dict(metavar="OUT.jsonl", help="write the pairs with the field strength: the mean margin of the "
                                       "MODELs, for idistill.py --margin-field strength and others"))],
        attention: [("--stages", dict(type=int, default=10, help="stages, by token position (default: 10)")),
                    ("--span", dict(default="response", choices=["response", "all"], help="what is cut into stages: the response, "
                                    "or prompt + response (default: response)")),
                    ("--with-first", dict(action="store_true", help="count the first token (attention sink, arXiv 2309.17453) "
                                          "into the stages of --span all (default: apart)")),
                    ("--delete", dict(action="store_true", help="delete the masked tokens instead of hiding them in place"))],
        show: [("--pair", dict(default="0", help="id of the pair, or its number from 0 (default: 0)")),
               ("--html", dict(metavar="OUT.html", help="a page that stands alone; click a word to see its row of the maps"))],
        attack: [("--edits", dict(metavar="FILE.json", help="further edits, as described above"))], bestofn: [], stability: [],
        speed: [("--teacher", dict(metavar="DIR", help="encoder that serves as the teacher")),
                ("--arms", dict(nargs="+", default=["b", "a", "b'", "c", "tap", "pool", "d", "e"], choices=list(ARMS), help="ways to train, "
                                "ratios are to the first (default: b a b' c tap pool d e)")),
                ("--pairs", dict(type=int, default=128, help="pairs a round, whole length buckets of 8 times as many (default: 128)")),
                ("--rounds", dict(type=int, default=5, help="rounds, after one that warms up (default: 5)")),
                ("--lengths", dict(type=int, nargs=3, metavar="N", help="random tokens instead of --data: of prompt, chosen, rejected")),
                ("--shrink", dict(type=int, nargs=2, metavar=("HIDDEN", "LAYERS"), help="MODEL's class at this size, random weights")),
                ("--align-max-tokens", dict(type=int, default=0, help="as in idistill.py (default: 0)")),
                ("--memory", dict(action="store_true", help="peak memory of each arm, in its own process")),
                ("--grow", dict(type=int, nargs="+", metavar="N", help="each arm at these total lengths, each in its own process")),
                ("--peer", dict(choices=["trl"], help="add TRL's own RewardTrainer (pip install trl)"))]}
    for run, own in flags.items():
        verb = verbs.add_parser(run.__name__, parents=[common, maps] if run in (attention, show) else [common],
                                help=run.__doc__.split("\n")[0], description=run.__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
        for name, settings in own:
            verb.add_argument(name, **settings)
        verb.set_defaults(run=run)
    args = ap.parse_args(argv)
    if not args.data and args.verb != "speed":
        ap.error("--data is needed")
    if args.batch_size < 1 or args.max_length < 0 or args.limit < 0:
        ap.error("--batch-size must be at least 1, --max-length and --limit not negative")
    if getattr(args, "stages", 2) < 2:
        ap.error("--stages must be at least 2")
    if len(set(args.models)) < len(args.models):
        ap.error("a model is named twice")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        check_outputs(args)
        for name in [*args.models, *filter(None, [getattr(args, "teacher", None)])] if args.verb != "speed" else ():
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
