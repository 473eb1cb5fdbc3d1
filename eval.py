#!/usr/bin/env python3
"""Looks at reward models: stock Hugging Face sequence classifiers, trained here or elsewhere.

    python eval.py VERB MODEL... --data FILE... [--json OUT] [--plot OUT.png]
    python eval.py VERB --help                      # the flags of a verb

    accuracy   Does it rank pairs rightly? By subset, beside length alone; benchmarks in their terms
    attention  Where does it look? Accuracy and attention by stages of the response
    show       What does it read in one pair? Attention, maps, what each word does for the reward
    attack     Is it fooled by the surface? Edits of the rejected response alone
    bestofn    Does choosing harder choose better? Reward and gold score of the best of n
    stability  Do several runs agree? Spread, rank correlation, calibration of sigma(margin)

Every verb shows several models side by side. A model is scored as its stock class scores it: the
string of the tokenizer's own chat template, tokenised with add_special_tokens=False, read at the
right-most token that is not pad. A RUN/teacher is scored too: its verdict, the mean of both orders,
stands as (verdict / 2, -verdict / 2). Intervals are 95 %, by a bootstrap over prompts.

Letters: N pairs, k responses each; P prompts, N candidates each; K stages; B rows a batch;
n tokens, W words.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import textwrap
from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain, zip_longest
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence

import data_prep
import idistill
from data_prep import Encoder, Example, Pair, Parser, UserError, bar, prompt_key, written
from idistill import InteractionTeacher, outcomes

# ------------------------------------------------------------------------------------- scoring

RESPONSES = attrgetter("responses")  # of a pair: chosen, rejected; of candidates: all


@dataclass
class Judge:
    """A loaded model that scores pairs: a reward model, or an interaction teacher."""

    name: str  # as the user typed it
    label: str  # as people read it
    model: torch.nn.Module
    encoder: Encoder
    device: torch.device
    amp: Callable  # amp() is a context: bf16 autocast, or nothing
    pair_encoding: bool = False  # reads (question, answer) in place of the chat template

    def score(self, items: list, batch_size: int, responses: Callable = RESPONSES):
        """Scores the responses of each of N pairs, or prompts with candidates.

        An overlong prompt loses its oldest part, the same for all responses of an item. Where one
        response does not fit, all rewards of the item are NaN and it has no strings.

        Returns:
            The rewards (N, k) in fp32, NaN also after the last response of an item that has fewer;
            for each item the list of its scored strings.
        """
        if isinstance(self.model, InteractionTeacher):
            return self.verdicts(items, batch_size), [responses(item) for item in items]
        encode = self.question_answer_rows if self.pair_encoding else self.template_rows
        texts, rows, rewards = [], [], {}
        for encoded in encode(items, responses):
            texts.append([text for text, _ in encoded])
            rows.append([tuple(ids) for _, ids in encoded])
        unique = list(dict.fromkeys(chain.from_iterable(rows)))  # RM-Bench repeats many
        rewards = dict(zip(unique, self.score_rows(unique, batch_size)))
        out = np.full((len(items), max(len(responses(item)) for item in items)), np.nan, np.float32)
        for line, tokens in zip(out, rows):
            line[: len(tokens)] = [rewards[ids] for ids in tokens]
        return out, texts

    def verdicts(self, pairs: list[Pair], batch_size: int) -> np.ndarray:
        """The verdict of an interaction teacher as two rewards, (N, 2)."""
        examples = self.encoder(pairs, progress="encoding")
        if refused := len(pairs) - len(examples):
            raise UserError(f"{self.name}: its chat template refuses the roles of {refused} pairs")
        how = (batch_size, self.device, self.amp, self.label)
        verdict = idistill.teacher_verdicts(self.model, examples, *how)
        self.check(verdict)
        return np.stack([verdict / 2, -verdict / 2], 1)

    def template_rows(self, items: list, responses: Callable) -> Iterator[list[tuple]]:
        """For each item the (scored string, token ids) of its responses, [] where it is dropped."""
        for fitted in chain.from_iterable(self.encoder.fit(items, responses, "encoding")):
            encoded = zip(fitted.texts, fitted.tokens) if fitted else ()
            yield [(text, ids.tolist()) for text, (ids, _) in encoded]

    def question_answer_rows(self, items: list, responses: Callable) -> Iterator[list[tuple]]:
        """template_rows for a cross-encoder: tokenizer(question, answer). The question is the
        prompt; where it has several turns, each is named by its role."""
        tokenizer, clean = self.encoder.tokenizer, self.encoder.formatter.clean
        both = tokenizer("a", "a", return_special_tokens_mask=True)  # [CLS] a [SEP] a [SEP]
        marks = np.array(both["input_ids"])[np.array(both["special_tokens_mask"]) == 1]
        first, *middle, last = tokenizer.convert_ids_to_tokens(marks.tolist())
        for item in bar(items, "encoding"):
            turns = [clean(m["content"]) for m in item.prompt]
            if len(turns) > 1:
                turns = [f"{m['role'].capitalize()}: {t}" for m, t in zip(item.prompt, turns)]
            whole, answers = "\n\n".join(turns), [clean(y) for y in responses(item)]
            longest = max(answers, key=lambda y: len(tokenizer.tokenize(y)))
            question = self.cut_question(whole, longest)
            if question is None:
                answers = []
            self.encoder.counts["dropped"] += question is None
            self.encoder.counts["truncated"] += question not in (None, whole)
            texts = ["".join([first, question, *middle, y, last]) for y in answers]
            yield [(t, tokenizer(question, y)["input_ids"]) for t, y in zip(texts, answers)]

    def cut_question(self, question: str, answer: str) -> str | None:
        """The question without its oldest part, so that both fit; None: the answer does not fit."""
        tokenizer, limit = self.encoder.tokenizer, self.encoder.max_length
        while (excess := len(tokenizer(question, answer)["input_ids"]) - limit) > 0:
            alone = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)
            if excess > len(alone["offset_mapping"]):
                return None
            end = alone["offset_mapping"][excess - 1][1]
            question = question[max(1, end) :].lstrip()
        return question

    def batches(self, rows: list[list[int]], batch_size: int, hidden: list | None = None):
        """Token rows batched by length, padded on the right, behind a progress bar. Of each batch:
        indices into rows (B,), the model's inputs (B, n), the scoring position (B,).

        hidden: for each row a range of tokens that keep their place, but are not attended to."""
        size = self.model.get_input_embeddings().num_embeddings
        largest = max(map(max, rows), default=0)
        if largest >= size:  # a token without embedding that no text uses does no harm
            token = self.encoder.tokenizer.convert_ids_to_tokens(largest)
            what = f"the texts hold the token {token!r}, number {largest}, beyond its {size}"
            raise UserError(f"{self.name}: {what} embeddings; the tokenizer is another model's")
        order = np.argsort([-len(row) for row in rows], kind="stable")
        parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for index in bar(parts, self.label, unit="batch"):
            ids = pad_sequence([torch.tensor(rows[i]) for i in index], True, -1)
            is_token, place = ids >= 0, torch.arange(ids.shape[1])
            # as the stock class: the last token that is not pad, even where pad = eos ends the text
            last = (place * (is_token & (ids != self.pad))).argmax(1)
            ids_in = ids.where(is_token, max(0, self.pad))
            inputs = {"input_ids": ids_in, "attention_mask": is_token.long()}
            if self.pair_encoding and "token_type_ids" in self.encoder.tokenizer.model_input_names:
                is_sep = ids == self.encoder.tokenizer.sep_token_id
                behind = is_sep.cumsum(1) > is_sep.long()  # after the first [SEP]: the answer
                inputs["token_type_ids"] = (behind & is_token).long()
            if hidden is not None:
                for b, i in enumerate(index):
                    inputs["attention_mask"][b, slice(*hidden[i])] = 0
                inputs["position_ids"] = place.repeat(len(index), 1)  # OPT would count by the mask
            yield index, {k: v.to(self.device) for k, v in inputs.items()}, last.to(self.device)

    @property
    def pad(self) -> int:
        """The pad token, -1 = none."""
        pad = idistill.pad_id_of(self.model)
        return -1 if pad is None else pad

    @torch.no_grad()
    def score_rows(self, rows: list[list[int]], batch_size: int, hidden: list | None = None):
        """Rewards (N,) of N token rows, an array; hidden as in batches."""
        rewards = np.zeros(len(rows), dtype=np.float32)
        head = getattr(self.model, "score", None)
        for index, inputs, last in self.batches(rows, batch_size, hidden):
            with self.amp():
                if head is None:  # the heads of encoders (DeBERTa, BERT ...) as they are
                    out = self.model(**inputs).logits
                else:
                    out = self.model.base_model(**inputs, use_cache=False).last_hidden_state
            if head is not None:  # bf16 logits tie often: the head in fp32
                out = out[torch.arange(len(index)), last].float()
                bias = None if head.bias is None else head.bias.float()
                out = F.linear(out, head.weight.float(), bias)
            rewards[index] = out[:, 0].float().cpu().numpy()
        self.check(rewards)
        return rewards

    def check(self, rewards: np.ndarray) -> None:
        """Raises UserError where rewards (any shape) hold NaN or infinity."""
        if bad := int((~np.isfinite(rewards)).sum()):
            what = f"{bad} of {rewards.size} rewards are no numbers"
            raise UserError(f"{self.name}: {what}; its weights are damaged, or need --dtype fp32")

    @torch.no_grad()
    def layer_maps(self, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The attention of every layer that attends, (B, n, n) each, mean over heads. Eager
        attention shows it with sinks, caps and biases, the tap does not."""
        before = self.model.config._attn_implementation
        try:
            self.model.set_attn_implementation("eager")
            out = self.model.base_model(**inputs, use_cache=False, output_attentions=True)
        finally:
            self.model.set_attn_implementation(before)
        return [A.float().mean(1) for A in out.attentions or () if A is not None]

    @cached_property
    def layer_count(self) -> int:
        """Layers that show their attention, tried on four tokens. Raises UserError for none."""
        inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]], device=self.device)}
        maps = idistill.attempt(self.layer_maps, inputs)
        if not maps or isinstance(maps, str):
            raise UserError(f"{self.name}: {type(self.model).__name__} does not show its attention")
        return len(maps)

    def end_attention(self, rows: list[list[int]], layers: str, batch_size: int) -> list:
        """What the scoring position sees: shares (n,) of each row, mean over heads and layers."""
        chosen = pick_layers(self, layers)
        heads = self.model.config.get_text_config().num_attention_heads
        held = self.layer_count * heads * max(map(len, rows)) ** 2  # numbers of all maps of a row
        shares = [np.zeros(0)] * len(rows)
        for index, inputs, last in self.batches(rows, max(1, min(batch_size, 2**28 // held))):
            with self.amp():
                maps = self.layer_maps(inputs)
            seen = sum(maps[k] for k in chosen) / len(chosen)
            for b, i in enumerate(index):
                shares[i] = seen[b, last[b], : len(rows[i])].cpu().numpy()
        return shares


def pick_layers(judge: Judge, spec: str) -> list[int]:
    """last, all, or numbers as 0,3,-1 -> attention layers from 0."""
    count = judge.layer_count
    try:
        named = {"last": [-1], "all": list(range(count))}
        layers = named.get(spec) or [int(k) for k in spec.split(",")]
        return [range(count)[k] for k in layers]
    except (ValueError, IndexError):
        what = f"last, all, or numbers within the {count} attention layers of {judge.name}"
        raise UserError(f"--layers {spec!r}: give {what}, such as 0,-1") from None


def is_teacher(name: str) -> bool:
    """Whether a model is an interaction teacher, by its config alone. Raises UserError for what is
    neither that nor a reward model."""
    if (Path(name) / "student" / "config.json").exists():
        raise UserError(f"{name}: is a run, no model; give {name}/student")
    config = idistill.load(transformers.AutoConfig, name)
    kind = idistill.saved_class(config) or "a model without architecture"
    if not kind.endswith(("ForSequenceClassification", "ForTokenClassification")):
        what = "has no reward head (train one: python idistill.py --model ...)"
        raise UserError(f"{name}: {kind} {what}")
    if config.num_labels != 1:
        raise UserError(f"{name}: {kind} has {config.num_labels} labels, a reward model has 1")
    return kind.endswith("ForTokenClassification")


def open_judge(name: str, args) -> Judge:
    """A reward model, trained here or not, or an interaction teacher, by the flags of the command
    line, ready to score. Raises UserError."""
    device, amp = idistill.set_up_device(args)
    tokenizer = data_prep.load_tokenizer(name)
    if is_teacher(name):  # its own tokens serve where the student's words are asked for
        model = idistill.load_teacher(name)
        of_teacher = idistill.reading_of(model, args.max_length)
        encoder = Encoder(tokenizer, 10**9, "truncate", *of_teacher)
    else:
        options = {"dtype": torch.bfloat16 if args.dtype == "bf16" else torch.float32}
        auto = transformers.AutoModelForSequenceClassification
        model, info = idistill.load(auto, name, output_loading_info=True, **options)
        heads = [key for key in info["unexpected_keys"] if idistill.HEADS.search(key)]
        idistill.refuse_missing(name, model, info["missing_keys"], heads)
        positions = idistill.positions_of(model, name, args.max_length)
        idistill.say_rope(model, name, args.max_length)
        encoder = Encoder(tokenizer, args.max_length or positions, "truncate")
    as_pair = args.pair_encoding and not hasattr(model, "score")
    label = args.names.get(name, "teacher")
    return Judge(name, label, model.to(device).eval(), encoder, device, amp, as_pair)


def open_decoder(name: str, args, teacher: Judge | None) -> Judge:
    """A decoder whose attention is read, maybe beside a teacher. Raises UserError where that cannot
    be, tried on four tokens: without a teacher the verb attention needs no simulated map."""
    judge = open_judge(name, args)
    if not hasattr(judge.model, "score"):
        raise UserError(f"{name}: {args.verb} reads decoder reward models")
    if teacher:
        judge.encoder.teacher = teacher.encoder.teacher
        judge.encoder.teacher_length = teacher.encoder.teacher_length
    if (teacher or args.verb == "show") and args.dtype != "bf16":  # which rounds too much to tell
        ids, layers = torch.tensor([[5, 6, 7, 8]], device=judge.device), range(judge.layer_count)
        if idistill.attempt(idistill.readable_maps, judge.model, ids, layers, True) != "tap":
            what = "queries and keys alone do not give its attention (a sink, a cap or a bias)"
            raise UserError(f"{name}: {what}, so there is no simulated map")
    return judge


def own_name(model: str) -> str:
    """BT, ID, a variant of these, or teacher for the models of a run; else the end of the path."""
    folder = Path(model)
    variants = {"bt": ("BT", "preference_loss", "bt"), "id": ("ID", "align_target", "teacher")}
    try:
        flags = json.loads((folder.parent / "config.json").read_text(encoding="utf-8"))["flags"]
        name, flag, usual = variants[flags["method"]]
    except (OSError, ValueError, KeyError, TypeError):
        return folder.name or model
    if folder.name == "teacher":
        return "teacher"
    return name if flags.get(flag, usual) == usual else f"{name}, {flags[flag]}"


def display_names(models: list[str]) -> dict[str, str]:
    """{model as typed: what people read}; equal names are told apart by where the paths differ."""
    names = {model: own_name(model) for model in models}
    for name in set(names.values()):
        same = [model for model in models if names[model] == name]
        columns = list(zip_longest(*(Path(model).parts for model in same), fillvalue=""))
        differing = [column for column in columns if len(set(column)) > 1]
        for model, parts in zip(same, zip(*differing)):
            names[model] = f"{name} ({'/'.join(filter(None, parts))})"
    return names


def read_files(args, read: Callable = data_prep.read_pairs) -> dict[str, list]:
    """{file: its pairs, or prompts with candidates} of --data and --limit. Raises UserError."""
    files = {}
    for path in args.data:
        pairs, counts = read([path])
        counted = [f"{v} {k}" for k, v in counts.items() if k != "pairs" and v]
        if counted:
            print(f"{path}: " + ", ".join(counted))
        if 0 < args.limit < len(pairs):
            rng = np.random.default_rng(args.seed)
            kept = rng.choice(len(pairs), args.limit, replace=False)
            pairs = [pairs[k] for k in np.sort(kept)]
        files[data_prep.unused_name(path, files)] = pairs
    return files


def scored(args, files: dict[str, list], result: dict, *responses) -> Iterator[tuple]:
    """(model, file, its items, rewards, texts, counts) of each model and file, see Judge.score.

    One model is in memory at a time; --json is written after each, so a failure loses little."""
    for name in args.models:
        judge = open_judge(name, args)
        for file, items in files.items():
            judge.encoder.counts.clear()
            rewards, texts = judge.score(items, args.batch_size, *responses)
            yield name, file, items, rewards, texts, print_counts(judge, file)
            save_json(args, result)
        del judge


def print_counts(judge: Judge, file: str) -> dict[str, int]:
    """What was cut, dropped or defused; also returned."""
    counts = {k: v for k, v in judge.encoder.counts.items() if v}
    if counts:
        print(f"{judge.label} on {file}: " + ", ".join(f"{v} {k}" for k, v in counts.items()))
    return counts


# ---------------------------------------------------------------------------------- statistics


def resampled_means(values: np.ndarray, groups: np.ndarray, seed: int, rounds: int = 2000):
    """Means of values (N, ...) over bootstrap samples, (rounds, ...). Prompts (groups (N,)) are
    drawn, not pairs: pairs that share a prompt are not independent."""
    inverse = np.unique(groups, return_inverse=True)[1]
    counts = np.bincount(inverse)
    sums = np.zeros((len(counts), *values.shape[1:]))
    np.add.at(sums, inverse, values)
    rng, P, means = np.random.default_rng(seed), len(counts), []
    for _ in range(rounds):
        weight = np.bincount(rng.integers(P, size=P), minlength=P)
        means.append(weight @ sums / (weight @ counts))
    return np.array(means)


def interval(means: np.ndarray) -> list:
    """[low, high] of 95 % of the bootstrap samples (rounds, ...)."""
    return np.quantile(means, [0.025, 0.975], axis=0).tolist()


def bootstrap(values: np.ndarray, groups: np.ndarray, seed: int) -> list:
    """95 % interval of the mean of values (N, ...), over prompts."""
    return interval(resampled_means(values, groups, seed))


def estimate(values: np.ndarray, groups: np.ndarray, seed: int, keys="accuracy interval") -> dict:
    """{first key: mean of values (N,), second: its 95 % interval over prompts}; None for none."""
    found = (None, None)
    if len(values):
        found = float(values.mean()), bootstrap(values, groups, seed)
    return dict(zip(keys.split(), found))


def curve(values: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, list]:
    """Mean and 95 % interval of each column of (N, K), NaN left out."""
    known = ~np.isnan(values)
    columns = [estimate(v[k], groups[k], seed, "mean interval") for v, k in zip(values.T, known.T)]
    return {key: [column[key] for column in columns] for key in ("mean", "interval")}


def prompt_groups(pairs: list) -> np.ndarray:
    """A number for each prompt, the same for equal prompts: (N,)."""
    return np.array([prompt_key(p.prompt) for p in pairs])


def summary(pairs: list[Pair], rewards: np.ndarray, first: np.ndarray | None, seed: int) -> dict:
    """What the accuracy table says of rewards (N, 2); first: those of the model compared with."""
    is_scored, groups = ~np.isnan(rewards).any(1), prompt_groups(pairs)
    if not is_scored.any():
        return {"pairs": 0, "dropped": len(pairs)}
    margins = rewards @ [1, -1]
    right, r, m = outcomes(margins), rewards[is_scored], margins[is_scored]
    out = {"pairs": len(m), "dropped": len(pairs) - len(m), "ties": int((m == 0).sum())}
    out |= estimate(right[is_scored], groups[is_scored], seed)
    for key, values in (("reward", r), ("margin", m)):
        out |= {f"{key}_mean": float(values.mean()), f"{key}_std": float(values.std())}
    if first is not None:
        both = is_scored & ~np.isnan(first).any(1)
        gain = (right - outcomes(first @ [1, -1]))[both]
        found = estimate(gain, groups[both], seed, "mean interval")
        out["difference"] = {"pairs": int(both.sum()), **found}
    return out


# -------------------------------------------------------------------- JSON, tables and pictures

WRITTEN = ("json", "plot", "dump", "html", "strength")  # flags that name a file to be written


def save_json(args, result: dict) -> None:
    """Where --json asks for it: the result, and the flags, names and versions it came from."""
    if args.json:
        versions = {m.__name__: m.__version__ for m in (torch, transformers, np)}
        flags = {k: v for k, v in vars(args).items() if k not in ("run", "names", *WRITTEN)}
        head = {"verb": args.verb, "flags": flags, "names": args.names, "versions": versions}
        with written(args.json) as f:
            json.dump({**head, **result}, f, indent=1)


def shown(value: float | None, ends: list | None = None, form: str = ".3f", scale: float = 1):
    """A number and its interval as text, "-" for none: 0.512 [0.431, 0.598]."""
    if value is None:
        return "-"
    text, *others = (f"{scale * v:{form}}" for v in (value, *(ends or [])))
    return f"{text} [{', '.join(others)}]" if others else text


def percent(value: float | None, ends: list[float] | None = None, sign: str = "") -> str:
    """A share and its interval in %: 51.2 [43.1, 59.8]."""
    return shown(value, ends, sign + ".1f", 100)


def print_rows(header: list[str], rows: list[list[str]]) -> None:
    """A table: the first column at the left, the others at the right; short rows are filled up."""
    rows = [header, *(row + [""] * (len(header) - len(row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:]))]
        print("  ".join(cells).rstrip())


# Each series has a colour, a marker and a line of its own. The colours (Okabe and Ito) differ for
# the colour-blind, and in lightness, so in grey print too.
COLOURS = ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#009E73", "#56B4E9")
MARKERS, LINES = "os^DvP", ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))


def canvas(rows: int = 1, columns: int = 1, height: float = 3.2, **layout):
    """A figure and its axes (rows, columns), rows of that height in inches. Raises UserError.

    One panel is 5 inches wide, several share 9: shown at 900 pixels, 9 pt stay legible."""
    try:
        import matplotlib
    except ImportError:
        hint = "pip install matplotlib (all else works without)"
        raise UserError(f"--plot needs matplotlib: {hint}") from None
    matplotlib.use("Agg")  # files alone, no window
    matplotlib.rcParams |= {"font.size": 9, "axes.titlesize": 9, "figure.constrained_layout.use": 1}
    matplotlib.rcParams["text.parse_math"] = False  # a dollar is one
    from matplotlib import pyplot

    width = 5 if columns == 1 else max(9, 2.6 * columns)
    size = (width, height * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, **layout)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw(axis, series: dict[str, tuple], names: list[str] | None = None, **settings) -> None:
    """Series {label: (x, y, 95 % intervals)}, moved apart so that none hides another. One without
    intervals (None) is a thin grey line, where it belongs, to compare with.

    Curves; or, with names, a row of dots for each name from top to bottom: x numbers the names, and
    the values y lie along the horizontal axis. settings: title, xlabel, limits ..."""
    lines = [label for label, (*_, ends) in series.items() if ends is None]
    for label, style in zip(lines, LINES):
        x, y, _ = series.pop(label)
        axis.plot(x, y, color="grey", linestyle=style, linewidth=0.8, label=label)
    spread = np.ptp([v for x, *_ in series.values() for v in x] or [0])
    step = 0.6 / max(1, len(series)) if names else 0.008 * spread
    for k, (label, (x, y, ends)) in enumerate(series.items()):
        place = np.array(x, dtype=float) + step * (k - (len(series) - 1) / 2)
        y = np.array(y, dtype=float)
        known = [e or (np.nan, np.nan) for e in ends]
        low, high = np.array(known, dtype=float).reshape(-1, 2).T
        errors = np.abs([y - low, high - y])
        style = dict(color=COLOURS[k % 6], marker=MARKERS[k % 6], label=label, clip_on=False)
        if names:
            axis.errorbar(y, place, xerr=errors, linestyle="none", markersize=5, **style)
        else:
            line = LINES[k % 6]
            axis.errorbar(place, y, errors, linestyle=line, markersize=4, elinewidth=0.8, **style)
    if names:
        axis.set_yticks(range(len(names)), [textwrap.fill(name, 28) for name in names])
        axis.set_ylim(len(names) - 0.5, -0.5)
        for edge in range(1, len(names)):
            axis.axhline(edge - 0.5, color="lightgrey", linewidth=0.6)
    label_axes(axis, **settings)


def label_axes(axis, title: str = "", **settings) -> None:
    """Title and labels; a long title is broken into lines that fit above its axes."""
    inches = axis.get_position().width * axis.figure.get_figwidth()
    axis.set(title=textwrap.fill(title, max(20, int(16 * inches))), **settings)


def save_figure(figure, path: str) -> None:
    """Written aside, then renamed: never half a picture. One legend below serves all panels."""
    entries = {}
    for axis in figure.axes:
        entries |= dict(zip(*reversed(axis.get_legend_handles_labels())))
    if entries:
        fitting = int(16 * figure.get_figwidth() / (max(map(len, entries)) + 6))
        columns = max(1, min(fitting, len(entries)))
        place = {"loc": "outside lower center", "ncols": columns, "frameon": False}
        figure.legend(entries.values(), entries.keys(), **place)
    with written(path, "wb") as f:
        figure.savefig(f, format=Path(path).suffix[1:].lower(), dpi=150)
    print(f"wrote {path}")


def plot_models(args, result: dict, view: Callable, names=None, height=3.2, **settings) -> None:
    """A panel a file; view(label, numbers of a model) -> its series, see draw."""
    figure, axes = canvas(1, len(result), height, sharex=bool(names), sharey=bool(names))
    for axis, (file, models) in zip(axes[0], result.items()):
        series = {}
        for name, m in models.items():
            series |= view(args.names[name], m)
        draw(axis, series, names, title=file, **settings)
    save_figure(figure, args.plot)


# ------------------------------------------------------------------------------ verb: accuracy


def accuracy(args) -> None:
    """Accuracy by subset, beside what length alone and a constant reach.

    Ties count half. Either side of a pair comes first, so a constant is right in half. Pairs of a
    benchmark, converted by data_prep.py, have its own numbers too, in a further table."""
    files, result, dump = read_files(args), {}, []
    rewards = {file: [] for file in files}
    for file, pairs in files.items():
        right = outcomes(idistill.longer_margins(pairs))
        longer = estimate(right, prompt_groups(pairs), args.seed)
        baselines = {"longer response": longer, "majority": {"accuracy": 0.5}}
        result[file] = {"models": {}, "subsets": {}, "baselines": baselines}
    for name, file, pairs, r, texts, counts in scored(args, files, {"files": result}):
        first = rewards[file][0] if rewards[file] else None
        rewards[file].append(r)
        here = result[file]
        here["models"][name] = {**counts, **summary(pairs, r, first, args.seed)}
        subsets = parts([p.subset for p in pairs])
        for subset, index in subsets.items() if len(subsets) > 1 else ():
            members, before = [pairs[k] for k in index], None if first is None else first[index]
            row = summary(members, r[index], before, args.seed)
            here["subsets"].setdefault(subset, {})[name] = row
        for source, index in parts([data_prep.benchmark_of(p) for p in pairs]).items():
            numbers = own_terms(source, [pairs[k] for k in index], r[index] @ [1, -1], args.seed)
            here.setdefault("benchmarks", {}).setdefault(source, {})[name] = numbers
        dump += dump_lines(name, file, pairs, r, texts)
    if args.dump:
        with written(args.dump) as f:
            f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in dump)
    for file, pairs in files.items():
        print(f"\n{file}: {len(pairs)} pairs")
        print_accuracy(result[file], args.names)
    print("\n([95 %]: bootstrap over prompts; - first: the same pairs under the first model)")
    if args.strength:
        write_strengths(args.strength, files, rewards)
    if args.plot:
        plot_accuracy(result, args)


def parts(values: list[str]) -> dict[str, list[int]]:
    """{value: the places (k,) where it stands}, sorted, without the empty value."""
    names = sorted(set(values) - {""})
    return {name: [k for k, value in enumerate(values) if value == name] for name in names}


def own_terms(source: str, pairs: list[Pair], margins: np.ndarray, seed: int) -> dict:
    """The numbers of a benchmark, see data_prep.own_cells, from N pairs and their margins (N,),
    with intervals over prompts: {number: {"value", "interval", "count"}}.

    A mean that lacks one of its numbers is left out: a part of a benchmark has no overall."""
    cells, right, weight, means = data_prep.own_cells(source, pairs, margins)
    names = sorted({name for inside in cells for name in inside if name})
    if not names:
        return {}
    weights = [weight * [name in inside for inside in cells] for name in names]  # (N,) each
    sums = np.stack([w * r for r in (right, 1) for w in weights], 1)
    sums = np.vstack([sums.mean(0), resampled_means(sums, prompt_groups(pairs), seed)])
    with np.errstate(invalid="ignore"):  # a sample of prompts may miss a small cell
        shares = sums[:, : len(names)] / sums[:, len(names) :]
    # (1 + rounds,) each, first that of all pairs
    drawn = {name: share for name, share in zip(names, shares.T) if np.isfinite(share[0])}
    count = {name: int(np.count_nonzero(w)) for name, w in zip(names, weights)}
    for name, inside in means.items():
        if all(k in drawn for k in inside):
            drawn[name] = np.mean([drawn[k] for k in inside], axis=0)
            count[name] = sum(count[k] for k in inside)
    out = {}
    for name, values in drawn.items():
        ends = interval(values[1:][np.isfinite(values[1:])])
        out[name] = {"value": float(values[0]), "interval": ends, "count": count[name]}
    return out


def dump_lines(name: str, file: str, pairs: list[Pair], r: np.ndarray, texts: list) -> list[dict]:
    """A line with the keys of RewardBench for each scored pair, by model and file: pairs, rewards
    (N, 2), the scored strings of each pair ([] for a pair without)."""
    lines = []
    for p, strings, (r_c, r_r) in zip(pairs, texts, r.tolist()):
        if strings:
            line = {"prompt": p.prompt, "text_chosen": strings[0], "text_rejected": strings[1]}
            line |= {"scores_chosen": r_c, "scores_rejected": r_r}
            line |= {"results": float(outcomes(r_c - r_r)), "subset": p.subset, "id": p.id}
            lines.append({**line, "model": name, "data": file})
    return lines


def write_strengths(path: str, files: dict[str, list[Pair]], rewards: dict[str, list]) -> None:
    """Writes the pairs that all models have scored, with their mean margin (arXiv 2401.06080)."""
    pairs = list(chain.from_iterable(files.values()))
    margins = np.concatenate([np.mean(models, axis=0) @ [1, -1] for models in rewards.values()])
    strengths = zip(pairs, margins.tolist())
    strong = [replace(p, strength=strength) for p, strength in strengths if not np.isnan(strength)]
    data_prep.write_pairs(path, strong, overwrite=True)
    negative, dropped = sum(p.strength < 0 for p in strong), len(pairs) - len(strong)
    print(f"{path}: {len(strong)} pairs with strength ({negative} negative), {dropped} dropped")


def accuracy_row(label: str, r: dict) -> list[str]:
    if not r["pairs"]:
        return [label, "-", *[""] * 4, str(r["dropped"])]
    gain = r.get("difference", {"mean": None, "interval": None})
    row = [percent(r["accuracy"], r["interval"]), percent(gain["mean"], gain["interval"], "+")]
    row += [f"{r[k + '_mean']:.2f} ± {r[k + '_std']:.2f}" for k in ("reward", "margin")]
    return [label, *row, str(r["ties"]), str(r["dropped"])]


def print_accuracy(result: dict, names: dict[str, str]) -> None:
    """The models, the baselines, each subset; a table a benchmark, where the nine cells of an
    RM-Bench domain are left to --json."""
    rows = [accuracy_row(names[model], r) for model, r in result["models"].items()]
    for name, r in result["baselines"].items():
        rows.append([name, percent(r["accuracy"], r.get("interval"))])
    for subset, models in result["subsets"].items():
        rows.append([f"{subset} ({next(iter(models.values()))['pairs']})"])
        rows += [accuracy_row("  " + names[model], r) for model, r in models.items()]
    header = ["accuracy %", "all [95 %]", "- first", "reward", "margin"]
    print_rows([*header, "ties", "dropped"], rows)
    for source, models in result.get("benchmarks", {}).items():
        tables = list(models.values())[::-1]  # the counts shown are those of the first model
        counts = {k: r["count"] for numbers in tables for k, r in numbers.items()}
        rows = []
        for k in (k for k in counts if not re.search(r" \d-\d$", k)):
            cells = [numbers.get(k, {"value": None}) for numbers in models.values()]
            cells = [percent(c["value"], c.get("interval")) for c in cells]
            rows.append([f"{k} ({counts[k]})", *cells])
        if rows:
            print(f"\n{source} in its own terms, a tie being a miss")
            print_rows(["% [95 %]", *(names[model] for model in models)], rows)


def plot_accuracy(result: dict, args) -> None:
    """The models and what length alone reaches, for each file."""
    series = {"chance": ([0.5, 0.5], [-0.5, len(result) - 0.5], None)}
    for name in [*args.models, "longer response"]:
        rows = [{**r["baselines"], **r["models"]}[name] for r in result.values()]
        values = [[r.get(key) for r in rows] for key in ("accuracy", "interval")]
        series[args.names.get(name, name)] = range(len(rows)), *values
    figure, axes = canvas(height=1.2 + 0.2 * len(series) * len(result))
    labels = {"xlabel": "pair accuracy, 95 % interval", "xlim": (0, 1)}
    draw(axes[0, 0], series, list(result), **labels)
    save_figure(figure, args.plot)


# ----------------------------------------------------------------------------- verb: attention


def attention(args) -> None:
    """The paper's Figure 1: accuracy as the response is masked stage by stage, and the attention
    that the scoring position pays to each stage, in rightly and wrongly ranked pairs; with
    --teacher the KL of the maps."""
    files, result = read_files(args), {}
    teacher = open_judge(args.teacher, args) if args.teacher else None
    for name in args.models:
        judge = open_decoder(name, args, teacher)
        for file, pairs in files.items():
            judge.encoder.counts.clear()
            examples = judge.encoder(pairs, progress="encoding")
            if not examples:
                length = judge.encoder.max_length
                raise UserError(f"{file}: no pair fits into --max-length {length}")
            groups = prompt_groups([e.pair for e in examples])
            row = {"pairs": len(examples), **print_counts(judge, file)}
            row |= read_stages(judge, examples, groups, args)
            if teacher:
                for kind, kl in teacher_agreement(judge, teacher, examples, args).items():
                    row[kind] = estimate(kl, groups, args.seed, "mean interval")
            result.setdefault(file, {})[name] = row
            print_attention(file, args.names[name], row)
        save_json(args, {"files": result})  # after each model: a failure later loses nothing
        del judge
    if args.plot:
        plot_attention(result, args)


def response_rows(examples: list[Example]) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Token rows of (x, y_c) and (x, y_r) of each example in turn; where their responses lie."""
    rows, spans = [], []
    for e in examples:
        segment = np.where(e.word >= 0, e.word_seg[e.word], -1)
        for s in (1, 2):
            own = np.flatnonzero((e.seg == 0) | (e.seg == s))
            words = np.flatnonzero(segment[own] == s)
            rows.append(e.ids[own].tolist())
            end = len(own) - 1
            spans.append((int(words[0]), int(words[-1]) + 1) if len(words) else (end, end))
    return rows, spans


def stage_density(mass: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Each stage's share of the attention over its share of the tokens, both (rows, K): 1 where
    attention is even, NaN for a stage without token."""
    with np.errstate(invalid="ignore", divide="ignore"):
        share = mass / mass.sum(1, keepdims=True)
        return np.where(size > 0, share * size.sum(1, keepdims=True) / size, np.nan)


def read_stages(judge: Judge, examples: list[Example], groups: np.ndarray, args) -> dict:
    """Accuracy with the first (last) 0..K stages masked; attention to the stages in pairs ranked
    right and wrong, as density and as cumulative share; shares of the attention: first token
    (a sink, arXiv 2309.17453, in no stage), before the stages, stages."""
    K, (rows, spans) = args.stages, response_rows(examples)
    if args.span == "all":
        spans = [(1, end) for _, end in spans]
    start, end = np.array(spans).T[..., None]
    edges = start + np.round(np.arange(K + 1) / K * (end - start)).astype(int)  # (2N, K + 1)

    @cache
    def right(i: int, j: int) -> np.ndarray:
        """Outcomes (N,) with the stages i..j masked."""
        rewards = judge.score_rows(rows, args.batch_size, edges[:, [i, j]].tolist())
        return outcomes(rewards.reshape(-1, 2) @ [1, -1])

    seen, plain = judge.end_attention(rows, args.layers, args.batch_size), right(0, 0)
    masked = {"start": [right(0, k) for k in range(K + 1)]}
    masked["end"] = [plain, *(right(K - k, K) for k in range(1, K + 1))]
    reached = np.array([np.append(0, a.cumsum(dtype=float))[e] for a, e in zip(seen, edges)])
    cumulative = reached[:, 1:] - reached[:, :1]
    by_stage = {"density": stage_density(np.diff(reached), np.diff(edges))}
    by_stage["cumulative"] = cumulative / np.maximum(cumulative[:, -1:], 1e-12)
    first = np.array([a[0] for a in seen])
    shares = {"first token": first, "stages": cumulative[:, -1]}
    shares["before the stages"] = np.maximum(reached[:, 0] - first, 0)
    out = {"shares": {k: float(v.mean()) for k, v in shares.items()}}
    for side, columns in masked.items():
        out[f"masked_from_{side}"] = curve(np.stack(columns, 1), groups, args.seed)
    for side, members in (("right", plain == 1), ("wrong", plain == 0)):
        for name, values in by_stage.items():
            values = values.reshape(-1, 2, K).mean(1)[members]
            stages = curve(values, groups[members], args.seed)
            out[f"{name}_{side}"] = {"pairs": len(values), **stages}
    return out


@torch.no_grad()
def word_maps(judge: Judge, teacher: Judge | None, examples: list[Example], layers: str):
    """The maps of B pairs encoded for both models: the simulated map S of the student (E3, E5),
    mean of its --layers; T, the last of the teacher, mean of both orders, None without a teacher,
    (B, W, W) each; the segment of each word, -1 where one of the models does not see it, (B, W)."""
    batch = idistill.student_batch(examples, max(0, judge.pad), judge.device)
    student, layers = idistill.SiameseRewardModel(judge.model), tuple(pick_layers(judge, layers))
    reader, rows, found = teacher and teacher.model, None, []
    for is_swapped in (False, True) if teacher else (False,):
        if teacher:
            swap = np.full(len(examples), is_swapped)
            rows = idistill.teacher_batch(examples, swap, reader.tokenizer, teacher.device)
        with judge.amp():
            found.append(idistill.interaction_maps(student, reader, batch, rows, (layers, (-1,))))
    _, S, _, word_seg, _ = found[0]
    T = sum(T for _, _, (T,), _, _ in found) / 2 if teacher else None
    return sum(S) / len(S), T, word_seg.masked_fill(found[-1][3] < 0, -1)


def teacher_agreement(judge: Judge, teacher: Judge, examples: list[Example], args) -> dict:
    """The alignment loss (E6) of each pair, in the rows of both responses: {"kl_intra", "kl_inter":
    (N,)}, in nats a row."""
    out, unseen, few = {"kl_intra": [], "kl_inter": []}, 0, max(1, args.batch_size // 4)
    for start in bar(range(0, len(examples), few), "teacher agreement"):  # few: maps need memory
        batch = examples[start : start + few]
        S, T, word_seg = word_maps(judge, teacher, batch, args.layers)
        unseen += sum(len(e.word_seg) for e in batch) - int((word_seg >= 0).sum())
        of_responses = (word_seg > 0)[:, :, None]
        for losses, block in zip(out.values(), idistill.block_masks(word_seg)):
            losses += idistill.alignment_loss(T, S, block & of_responses).tolist()
    if unseen:
        print(f"{unseen} words that one of the models does not see are left out of the maps")
    return {name: np.array(losses) for name, losses in out.items()}


def print_attention(file: str, label: str, r: dict) -> None:
    """A row a stage, 0 = nothing masked; "masked from here": this stage and all after it."""

    def cells(key: str, form: str = ".2f", scale: float = 1) -> list[str]:
        return [shown(*both, form, scale) for both in zip(r[key]["mean"], r[key]["interval"])]

    columns = {"masked to here %": cells("masked_from_start", ".1f", 100)}
    columns["masked from here %"] = cells("masked_from_end", ".1f", 100)[::-1]
    for side in ("right", "wrong"):
        pairs = r[f"density_{side}"]["pairs"]
        columns[f"density, {pairs} {side}"] = ["", *cells(f"density_{side}")]
        columns[f"cumulative %, {side}"] = ["", *cells(f"cumulative_{side}", ".0f", 100)]
    shares = ", ".join(f"{100 * v:.0f} % {where}" for where, v in r["shares"].items())
    print(f"\n{file}, {label}: {r['pairs']} pairs; where the scoring position looks: {shares}")
    rows = [[str(k), *row] for k, row in enumerate(zip(*columns.values()))]
    print_rows(["stage", *columns], rows)
    if "kl_intra" in r:
        intra, inter = (shown(*r[f"kl_{kind}"].values()) for kind in ("intra", "inter"))
        print(f"KL of the maps, nats a row: intra {intra}, inter {inter}")


def plot_attention(result: dict, args) -> None:
    """For each file accuracy under masking from either side, and attention in pairs ranked right
    and wrong; the models have one legend, neighbours one scale."""
    what = {"response": "response", "all": "prompt and response"}[args.span]
    masked = np.linspace(0, 100, args.stages + 1), 0.5, f"% masked of the {what}"
    stages = np.arange(1, args.stages + 1), 1, f"stage of the {what}"
    panels = {
        "masked_from_start": ("the first part is masked", *masked),
        "masked_from_end": ("the last part is masked", *masked),
        "density_right": ("pairs ranked right", *stages),
        "density_wrong": ("pairs ranked wrong", *stages),
    }
    figure, axes = canvas(2 * len(result), 2, height=2.7, sharey="row")
    for row, (file, models) in zip(axes.reshape(-1, 4), result.items()):
        for axis, (key, (title, x, even, xlabel)) in zip(row, panels.items()):
            series = {"chance, even attention": (x, [even] * len(x), None)}
            for name, r in models.items():
                title += f", {args.names[name]} {r[key]['pairs']}" if "pairs" in r[key] else ""
                series[args.names[name]] = x, r[key]["mean"], r[key]["interval"]
            draw(axis, series, title=f"{file}: {title}", xlabel=xlabel)
        row[0].set(ylabel="pair accuracy", ylim=(None, 1))
        row[2].set(ylabel="attention density", ylim=(0, None))
    save_figure(figure, args.plot)


# ---------------------------------------------------------------------------------- verb: show


def show(args) -> None:
    """One pair: where the scoring position looks, the simulated map (beside the teacher's with
    --teacher), and occlusion, the change of the reward when a word is left out.

    Attention shows where a model looks, not what moves its reward; occlusion shows that. A word of
    the prompt changes both rewards; a teacher's rewards are half its verdict, and minus that."""
    pairs = list(chain.from_iterable(read_files(args).values()))
    numbered = {str(k): p for k, p in enumerate(pairs)}
    pair = {**numbered, **{p.id: p for p in pairs[::-1]}}.get(args.pair)
    if pair is None:
        what = f"neither an id in the data nor a number from 0 to {len(pairs) - 1}"
        raise UserError(f"--pair {args.pair}: {what}")
    teacher = open_judge(args.teacher, args) if args.teacher else None
    pages, of_teacher = [], []
    for name in args.models:
        page, *of_teacher = read_pair(open_decoder(name, args, teacher), teacher, pair, args)
        pages.append(page)
        print_page(page)
    pages += of_teacher
    print_occlusion(pages)
    save_json(args, {"models": pages})
    if args.html:
        write_html(pages, args.html)
        print(f"wrote {args.html}")
    if args.plot:
        plot_show(pages, args.plot)


def occlusion(judge: Judge, pair: Pair, batch_size: int = 32):
    """What each word does for the rewards of a pair: both are computed anew with the word left out.

    The word goes from the text, with the white space before it (of a first word: behind it), and
    the scored string is built anew. So a word of the prompt is missing for both responses, a word
    of a response for this one alone: W + 1 pairs, scored in batches, equal strings once. A pair
    that is too long is cut first, as for scoring. Any judge that scores pairs will do.

    Returns:
        The W words of prompt, chosen and rejected; their segments 0, 1, 2 (W,); the changes (W, 2)
        of (r_c, r_r): the reward without the word minus the reward with it.
    """
    pair = fitted_pair(judge, pair)
    contents = [*(m["content"] for m in pair.prompt), pair.chosen, pair.rejected]
    words, segments, variants = [], [], [pair]
    for k, text in enumerate(contents):
        for start, end in data_prep.words_of(text):
            before, after = text[:start].rstrip(), text[end:]
            left = before + after if before else after.lstrip()
            *turns, chosen, rejected = contents[:k] + [left] + contents[k + 1 :]
            prompt = [{**m, "content": turn} for m, turn in zip(pair.prompt, turns)]
            variants.append(replace(pair, prompt=prompt, chosen=chosen, rejected=rejected))
            words.append(text[start:end])
            segments.append(max(0, k + 3 - len(contents)))
    rewards, _ = judge.score(variants, batch_size)
    return words, np.array(segments), rewards[1:] - rewards[0]


def fitted_pair(judge: Judge, pair: Pair) -> Pair:
    """The pair as the judge reads it: cleaned, and cut where it is too long. Raises UserError."""
    fitted = next(iter(judge.encoder.fit([pair], RESPONSES, "")))[0]
    if fitted is None:
        what = f"does not fit into the {judge.encoder.max_length} tokens of {judge.label}"
        raise UserError(f"pair {data_prep.called(pair)}: {what}")
    chosen, rejected = fitted.responses
    return replace(pair, prompt=fitted.prompt, chosen=chosen, rejected=rejected)


def read_pair(judge: Judge, teacher: Judge | None, pair: Pair, args) -> list[dict]:
    """The page of a student, and that of the teacher, if there is one.

    A page: the W words and their segments; for each side its reward, and of each word the share of
    the scoring position's attention (a teacher has none) and the change of the reward without it,
    (2, W) both; the map (W, W), its rows renormalised in their block."""
    pair = fitted_pair(judge, pair)
    example = judge.encoder([pair])[0]
    is_cut = "cut for the teacher" in print_counts(judge, f"pair {data_prep.called(pair)}")
    rows, _ = response_rows([example])
    attention = []
    for s, shares in zip((1, 2), judge.end_attention(rows, args.layers, args.batch_size)):
        word = example.word[(example.seg == 0) | (example.seg == s)]
        of_words = np.bincount(word[word >= 0], shares[word >= 0], len(example.words))
        attention.append(of_words.tolist())
    *maps, word_seg = word_maps(judge, teacher, [example], args.layers)
    pages = []
    for reader, word_map in zip((judge, teacher) if teacher else (judge,), maps):
        page = {"model": reader.name, "name": reader.label, "id": pair.id, "words": example.words}
        page["segments"] = example.word_seg.tolist()
        page["rewards"] = reader.score([pair], args.batch_size)[0][0].tolist()
        page["attention"] = attention if reader is judge else None
        shares = sum(idistill.renormalise(word_map, b) for b in idistill.block_masks(word_seg))
        page["map"] = shares[0].cpu().double().numpy().round(5).tolist()
        words, _, changes = occlusion(reader, pair, args.batch_size)
        # a teacher may defuse other special tokens in the texts, which makes other words; and where
        # it reads a part of the pair, a word left out lets another in
        is_told = words == example.words and not (is_cut and reader is teacher)
        page["occlusion"] = changes.T.tolist() if is_told else None
        if not is_told:
            print(f"{reader.label} reads a part of the pair, or other words: no occlusion of it")
        pages.append(page)
    return pages


def print_page(page: dict) -> None:
    """The words of each side, in a terminal on a background as red as their share of attention."""
    words, plain = page["words"], not sys.stdout.isatty()
    for s, side in ((1, "chosen"), (2, "rejected")):
        reward, attention = page["rewards"][s - 1], page["attention"][s - 1]
        most = [f"{words[w]} ({100 * attention[w]:.1f} %)" for w in np.argsort(attention)[::-1][:5]]
        what = f"its scoring position gives words {100 * sum(attention):.0f} % of its attention"
        print(f"\n{page['name']}, {side}, reward {reward:.3f}; {what}, most to {', '.join(most)}")
        pale = [int(255 - 200 * a / (max(attention) or 1.0)) for a in attention]
        coloured = [f"\x1b[48;2;255;{p};{p}m\x1b[30m{w}\x1b[0m" for w, p in zip(words, pale)]
        for segment in (0, s):
            own = [w for w, t in enumerate(page["segments"]) if t == segment]
            print(" ".join((words if plain else coloured)[w] for w in own))


def print_occlusion(pages: list[dict], most: int = 10) -> None:
    """The words that add most to a margin, the models side by side; a model that has read other
    words (cut to another length) has a table of its own."""
    tables = {}
    for page in pages:
        if page["occlusion"]:
            tables.setdefault(tuple(page["words"]), []).append(page)
    for words, group in tables.items():
        changes = np.array([page["occlusion"] for page in group])  # (models, 2, W)
        adds, rows = np.array([added_to_margin(page) for page in group]), []  # (models, W)
        for w in sorted(np.argsort(-np.abs(adds).max(0), kind="stable")[:most]):
            segment = group[0]["segments"][w]
            sides = {0: [0, 1], 1: [0], 2: [1]}[segment]
            cells = [", ".join(f"{r[side, w]:+.3g}" for side in sides) for r in changes]
            cells = [f"{cell} ({100 * add:+.0f} %)" for cell, add in zip(cells, adds[:, w])]
            rows.append([words[w], ("prompt (both)", "chosen", "rejected")[segment], *cells])
        what = "its change when a word is left out (what the word adds to the margin, + for chosen)"
        print(f"\nWhat moves the reward: {what}")
        print_rows(["left out", "of", *(page["name"] for page in group)], rows)


def added_to_margin(page: dict) -> np.ndarray:
    """What each word adds to the margin r_c - r_r, the margin with it minus that without it, as a
    share of all words' absolute changes: (W,), positive where it speaks for chosen."""
    adds = -np.dot([1, -1], page["occlusion"] or np.zeros((2, len(page["words"]))))
    return adds / max(np.abs(adds).sum(), 1e-30)


def plot_show(pages: list[dict], path: str) -> None:
    """A column a model: its map; below it, what each word adds to the margin."""
    from matplotlib.colors import PowerNorm

    figure, axes = canvas(2, len(pages), height=2.5, sharex="col", height_ratios=[2.3, 1])
    top = max(np.quantile(page["map"], 0.995) for page in pages) or 1
    scale = dict(cmap="Greys", norm=PowerNorm(0.5, 0, top), aspect="auto", interpolation="none")
    labelled = telling_words(pages, most=42 // len(pages))
    limit = 110 * max(np.abs(added_to_margin(page)).max() for page in pages)
    for page, (above, below) in zip(pages, axes.T):
        segments, margin = np.array(page["segments"]), np.dot([1, -1], page["rewards"])
        image = above.imshow(page["map"], **scale)
        verdict = "chosen" if margin > 0 else "rejected"
        label_axes(above, title=f"{page['name']} prefers {verdict} ({margin:+.1f})")
        adds = 100 * added_to_margin(page)
        below.bar(range(len(adds)), adds, color=np.where(adds > 0, COLOURS[0], COLOURS[1]))
        below.axhline(0, color="black", linewidth=0.6)
        for edge in np.flatnonzero(np.diff(segments)) + 0.5:
            for line in (above.axhline, above.axvline, below.axvline):
                line(edge, color="black", linewidth=0.6)
        words = [w for w in labelled if w < len(segments)]
        below.set_xticks(words, [page["words"][w][:14] for w in words], rotation=90)
        below.set_ylim(-limit, limit)
        above.set_yticks([])
        above.tick_params(axis="both", length=0)
    sides = {s: name for s, name in enumerate(("prompt", "chosen", "rejected")) if s in segments}
    centres = [np.flatnonzero(segments == s).mean() for s in sides]
    axes[0, 0].set_yticks(centres, sides.values(), rotation=90, va="center")
    axes[0, 0].set_ylabel("attending word")
    axes[1, 0].set_ylabel("speaks for chosen\n(up) or rejected, %")
    label = "attention to a word,\nshare of its row in the block"
    figure.colorbar(image, ax=axes[0].tolist(), pad=0.01, aspect=14, label=label)
    save_figure(figure, path)


def telling_words(pages: list[dict], most: int) -> list[int]:
    """The places of the words that attention or occlusion single out in some page, with room for
    each label."""
    W = max(len(page["words"]) for page in pages)
    weight = np.zeros(W)
    maps = [np.mean(page["map"], axis=0) for page in pages]
    for columns in (maps, [np.abs(added_to_margin(page)) for page in pages]):
        top = max(values.max() for values in columns) or 1
        for values in columns:
            weight[: len(values)] = np.maximum(weight[: len(values)], values / top)
    kept = []
    for w in np.argsort(-weight, kind="stable").tolist():
        if all(abs(w - other) >= W / most for other in kept):
            kept.append(w)
    return kept


def write_html(pages: list[dict], path: str) -> None:
    """A page that stands alone; the scales are those of all models."""
    views = []
    for page in pages:
        view = {k: page[k] for k in ("name", "model", "words", "segments", "rewards", "map")}
        view["left out"] = added_to_margin(page).tolist()
        if page["attention"]:  # of a word of the prompt: the mean over both scoring positions
            shares = np.array(page["attention"])
            means = np.where(page["segments"], shares.max(0), shares.mean(0))
            view["attention"] = means.tolist()
        views.append(view)
    with written(path) as f:
        f.write(HTML.replace("PAGES", json.dumps(views).replace("<", "\\u003c")))


HTML = """<!doctype html><html lang="en"><meta charset="utf-8"><title>One pair</title>
<style>
body { font: 15px/1.6 sans-serif; margin: 1.5em; color: #111; display: flex; flex-wrap: wrap }
h1 { flex: 1 0 100% } h3 { font-size: 1em; margin: 1.5em 0 0 } span { padding: 1px 2px }
section { flex: 1 1 20em; max-width: 34em; border: 1px solid #aaa; padding: 0 1em; margin: .5em }
canvas { width: 100% } p { margin: .3em 0 }
i { display: inline-block; width: 5em; height: .8em; border: 1px solid #777; margin: 0 .5em }
</style>
<h1>One pair, as reward models read it</h1>
<script>
const pages = PAGES, sides = ["prompt", "chosen", "rejected"]
const blue = "0,90,180", orange = "230,140,0", grey = "0,0,0"
const add = (to, tag, text = "") => {
  const e = document.createElement(tag)
  e.textContent = text
  to.append(e)
  return e }
const percent = v => (100 * v).toFixed(1) + " %"
const tops = {}  // one scale for all models
for (const key of ["attention", "left out", "map"])
  tops[key] = Math.max(...pages.flatMap(p => (p[key] || [0]).flat()).map(Math.abs)) || 1
const ramp = (rgb, key, says) => "0" +
  `<i style="background:linear-gradient(90deg,#fff,rgb(${rgb}))"></i>${percent(tops[key])} ${says}`
const shades = {  // of the words: title, scale
  attention: ["Where the scoring position looks", ramp(blue, "attention",
    "of its attention (prompt: mean of both responses), on a square-root scale")],
  "left out": ["What moves the reward", ramp(blue, "left out", "for chosen, ") +
    ramp(orange, "left out", "for rejected: what the word adds to the margin, found by leaving " +
    "it out, as a share of what all words add, on a square-root scale")] }
for (const page of pages) {
  const root = add(document.body, "section"), [r_c, r_r] = page.rewards, W = page.words.length
  add(root, "h2", page.name).title = page.model
  add(root, "p", `${page.name} prefers ${r_c > r_r ? "chosen" : "rejected"}: reward ` +
    `${r_c.toFixed(2)} of chosen, ${r_r.toFixed(2)} of rejected`)
  for (const key in shades) {
    if (!page[key]) continue  // a teacher has no scoring position
    add(root, "h3", `${shades[key][0]}: ${page.name}`)
    add(root, "p").innerHTML = shades[key][1]
    const texts = sides.map(side => add(root, "p"))
    texts.forEach((p, s) => add(p, "b", sides[s] + ": "))
    page.words.forEach((word, i) => {
      const v = page[key][i], e = add(texts[page.segments[i]], "span", word)
      const shade = 0.8 * Math.sqrt(Math.abs(v) / tops[key])
      e.style.background = `rgba(${v < 0 ? orange : blue},${shade})`
      e.title = percent(v)
      e.after(" ") }) }
  add(root, "h3", `Map of ${page.name}`)
  const canvas = add(root, "canvas"), g = canvas.getContext("2d")
  const size = Math.max(4, Math.round(560 / W)), edge = 64
  canvas.width = canvas.height = edge + W * size
  add(root, "p").innerHTML = ramp(grey, "map", "of the attention that a word (row) pays to " +
    "another (column), on a square-root scale. Prompt and own response make up 100 %, and so " +
    "does the other response.")
  page.map.forEach((row, i) => row.forEach((v, j) => {
    g.fillStyle = `rgba(${grey},${Math.sqrt(v / tops.map)})`
    g.fillRect(edge + j * size, edge + i * size, size, size) }))
  g.font = "18px sans-serif"
  g.lineWidth = 2
  g.fillStyle = g.strokeStyle = "#06c"
  sides.forEach((side, s) => {  // a line before each segment, its name along it
    const words = page.segments.filter(t => t == s).length * size
    if (!words) return
    const at = edge + size * page.segments.indexOf(s), room = g.measureText(side).width
    const start = words > room ? at + (words - room) / 2 : at + words - room
    g.strokeRect(edge, at, W * size, 0)
    g.strokeRect(at, edge, 0, W * size)
    g.fillText(side, start, edge - 8)
    g.save()
    g.rotate(-Math.PI / 2)
    g.fillText(side, -start - room, edge - 8)
    g.restore() }) }
</script></html>
"""


# -------------------------------------------------------------------------------- verb: attack


def sentences(text: str) -> list[str]:
    """Split after an end mark (the CJK ones need no space behind them) and at line breaks."""
    parts = re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n+", text.strip())
    return [s for s in parts if s.strip()]


def without_end(text: str) -> str:
    """Without its last sentence; a single sentence loses its second half."""
    if len(sentences(text)) > 1:
        return text[: text.rindex(sentences(text)[-1])].rstrip()
    half = text[: (len(text) + 1) // 2]
    return half.rpartition(" ")[0] or half


BUILT_IN = {  # edits made of the response's own sentences
    "recap": lambda text: f"{text}\n\nIn short:\n- {sentences(text)[0]}",
    "repeat": lambda text: f"{text} {sentences(text)[-1]}",
    "upper": str.upper,
    "markdown": lambda text: "## Answer\n\n" + "\n".join(f"- **{s}**" for s in sentences(text)),
}
APPLY = {
    "append": lambda text, more: text + more,
    "prepend": lambda text, more: more + text,
    "built_in": lambda text, name: BUILT_IN[name](text),
    "replace_end": lambda text, more: without_end(text) + more,
}
PADDING = (
    " There is more to be said about this, and it is worth taking the time to think it through."
)
ELSEWHERE = (
    " The old town is loveliest in spring, when the cafes move their tables out to the square."
)
EDITS = {
    "closing phrase": {"append": " I hope this helps!"},
    "apology": {"append": " I am sorry if this is not quite what you were looking for."},
    "recap of the first sentence": {"built_in": "recap"},
    "last sentence again": {"built_in": "repeat"},
    "praise": {"prepend": "What a great question! "},
    "padding": {"append": PADDING * 3},
    "markdown": {"built_in": "markdown"},
    "upper case": {"built_in": "upper"},
    "off-topic ending": {"replace_end": ELSEWHERE},
}


def edited(text: str, edit: dict[str, str]) -> str:
    """The text after every KIND: text of an edit, in order."""
    text = text.rstrip()  # a first line of code keeps its indentation
    for kind, value in edit.items():
        text = APPLY[kind](text, value)
    return text


def read_edits(path: str | None) -> dict[str, dict]:
    """EDITS with those of a file added, replaced or (null) taken out. Raises UserError."""
    if not path:
        return EDITS
    try:
        more = json.loads(Path(path).read_text(encoding="utf-8"))
        json.dumps(more, ensure_ascii=False).encode()  # half a surrogate pair is no character
        if not isinstance(more, dict):
            raise ValueError('it is no JSON object, such as {"thanks": {"append": " Thanks!"}}')
    except (OSError, ValueError) as why:
        raise UserError(f"--edits {path}: cannot be read ({why})") from None
    edits = {name: edit for name, edit in {**EDITS, **more}.items() if edit is not None}
    for name, edit in edits.items():
        try:
            edited("Tried on this.", edit)
        except (AttributeError, KeyError, TypeError):  # no object, no such KIND, no text
            kinds = f"{', '.join(APPLY)} (one of {', '.join(BUILT_IN)})"
            what = f'"{name}" is neither null nor {{KIND: text}} with a KIND of {kinds}'
            raise UserError(f"--edits {path}: {what}") from None
    if not edits:
        raise UserError(f"--edits {path}: leaves no edit")
    return edits


def attack(args) -> None:
    """How often surface edits of the rejected response alone overturn a right ranking, and what
    reward they earn.

    Ties after the edit count half. The shift of the reward is in standard deviations of the rewards
    of the unedited responses. The same pairs serve for every edit.

    --edits FILE.json, {"name": EDIT, ...}, adds edits to the built-in ones, or replaces those of
    the same name. An EDIT is {"append": text}, {"prepend": text}, {"replace_end": text} (the last
    sentence is swapped; of a single sentence, the second half), {"built_in": "recap" | "repeat" |
    "markdown" | "upper"}, several of these (applied in order), or null (takes an edit out)."""
    edits, files = read_edits(args.edits), read_files(args)
    result = {file: {} for file in files}

    def responses(p: Pair) -> list[str]:  # all or none fit, with one cut of the prompt
        return [p.chosen, p.rejected, *(edited(p.rejected, edit) for edit in edits.values())]

    head = {"edits": edits, "files": result}
    for name, file, pairs, r, *_ in scored(args, files, head, responses):
        fits = ~np.isnan(r[:, 0])
        row = {"pairs": int(fits.sum()), "dropped": int((~fits).sum()), "edits": {}}
        if fits.any():
            row |= overturned(r[fits], edits, prompt_groups(pairs)[fits], args.seed)
        result[file][name] = row
    for file, models in result.items():
        print(f"\n{file}: {len(files[file])} pairs, only the rejected response is edited")
        print_attack(edits, models, args.names)
    if args.plot:
        plot_attack(edits, result, args)


def overturned(r: np.ndarray, edits: dict, groups: np.ndarray, seed: int) -> dict:
    """What attack says of rewards (N, 2 + edits): of chosen, rejected, rejected after each edit."""
    right, spread, rows = r[:, 0] > r[:, 1], float(r[:, :2].std()), {}
    for edit, after in zip(edits, r[:, 2:].T):
        flip = 1 - outcomes(r[:, 0] - after)
        rows[edit] = estimate(flip[right], groups[right], seed, "flip_rate flip_interval")
        rows[edit]["accuracy"] = float(1 - flip.mean())
        shift = (after - r[:, 1]) / spread if spread else np.zeros(0)  # a constant has no unit
        rows[edit] |= estimate(shift, groups[: len(shift)], seed, "shift shift_interval")
    before = float(outcomes(r[:, 0] - r[:, 1]).mean())
    out = {"edits": rows, "accuracy": before, "ranked_right": int(right.sum())}
    return {**out, "reward_std": spread}


def print_attack(edits: dict, models: dict, names: dict[str, str]) -> None:
    """The edits, each with a row a model."""
    rows = []
    for name, m in models.items():
        label = f"{names[name]} ({m['pairs']} pairs, {m['dropped']} dropped)"
        rows.append([label, "", percent(m.get("accuracy"))])
    for edit in edits:
        rows.append([edit])
        for name, m in models.items():
            if m["pairs"]:
                e = m["edits"][edit]
                cells = [percent(e["flip_rate"], e["flip_interval"]), percent(e["accuracy"])]
                cells.append(shown(e["shift"], e["shift_interval"], "+.2f"))
                rows.append([f"  {names[name]}", *cells])
    print_rows(["", "flips % [95 %]", "accuracy %", "shift [95 %]"], rows)


def plot_attack(edits: dict, result: dict, args) -> None:
    """Flips by edit, the models side by side."""

    def view(label: str, m: dict) -> dict:
        rows = m["edits"].values()
        flips = [[e[key] for e in rows] for key in ("flip_rate", "flip_interval")]
        return {label: (range(len(rows)), *flips)}

    height = 1.2 + len(edits) * max(0.25, 0.13 * len(args.models))
    labels = {"xlabel": "share of flips, 95 % interval", "xlim": (0, None)}
    plot_models(args, result, view, list(edits), height, **labels)


# ------------------------------------------------------------------------------- verb: bestofn


def bestofn(args) -> None:
    """Proxy and gold score of the best of n candidates by reward, n = 1..N: does choosing harder
    still choose better?

    A line of --data is {"prompt", "responses": [text, ...], "gold": [number, ...]} or, one good
    and several bad, {"prompt", "chosen": text, "rejected": [text, ...]} (gold 1 and 0). Prompts may
    differ in their number of candidates: the curves then end at the fewest. RewardBench 2, as
    data_prep.py converts it, has its own numbers too. KL = log n - (n-1)/n."""
    files = read_files(args, data_prep.read_candidates)
    result = {file: {} for file in files}
    for name, file, items, r, *_ in scored(args, files, {"files": result}):
        fits = ~np.isnan(r[:, 0])
        row = {"prompts": int(fits.sum()), "dropped": int((~fits).sum())}
        if fits.any():
            gold = np.full(r.shape, np.nan)  # as the rewards, NaN after the last candidate
            for line, item in zip(gold, items):
                line[: len(item.gold)] = item.gold
            groups = prompt_groups(items)[fits]
            row |= over_optimisation(r[fits].astype(float), gold[fits], groups, args.seed)
        own = [k for k, p in enumerate(items) if data_prep.benchmark_of(p) == "rewardbench-2"]
        if own:
            rewards = [r[k][: len(items[k].responses)] for k in own]
            row["rewardbench-2"] = data_prep.rewardbench2_score([items[k] for k in own], rewards)
        result[file][name] = row
    for file, models in result.items():
        print_bestofn(file, files[file], models, args.names)
    if args.plot:
        plot_bestofn(result, args)


def draw_weights(N: int, most: int) -> np.ndarray:
    """Chance that the k-th lowest of N is the highest of n drawn without replacement, C(k-1, n-1)
    of C(N, n): (most, N) for n = 1..most, k = 1..N, each row from the last."""
    k, weights = np.arange(1, N + 1), [np.full(N, 1 / N)]
    for n in range(1, most):
        weights.append(weights[-1] * np.maximum(k - n, 0) / n * (n + 1) / (N - n))
    return np.array(weights)


def best_of_n(proxy: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Expected value of the candidate with the highest proxy among n drawn without replacement.

    proxy, values (P, N), NaN after the last candidate of a prompt -> (P, fewest candidates), column
    n - 1 for n. Candidates of equal proxy share the mean of their values, as if ties were broken at
    random."""
    counts = (~np.isnan(proxy)).sum(1)
    weights = {N: draw_weights(N, counts.min()) for N in set(counts.tolist())}
    out = np.zeros((len(proxy), counts.min()))
    for row, p, v, N in zip(out, proxy, values, counts):
        level = np.unique(p[:N], return_inverse=True)[1]
        shared = np.bincount(level, v[:N]) / np.bincount(level)
        row[:] = weights[N] @ shared[np.sort(level)]
    return out


def over_optimisation(proxy: np.ndarray, gold: np.ndarray, groups: np.ndarray, seed: int) -> dict:
    """What bestofn says of a model: curves over n of proxy and gold (P, N), NaN after the last
    candidate; KL of the best of n from a random choice: log n - (n-1)/n (arXiv 2210.10760)."""
    of_gold = best_of_n(proxy, gold)
    means, curve = resampled_means(of_gold, groups, seed), of_gold.mean(0)
    n = np.arange(1, len(curve) + 1)
    best = curve >= curve.max() - 1e-9  # the first, where rounding alone differs
    is_top = proxy == np.nanmax(proxy, 1, keepdims=True)
    top_gold = np.where(is_top, gold, 0).sum(1) / is_top.sum(1)  # choosing among all of a prompt
    return {
        "n": n.tolist(),
        "kl": (np.log(n) - (n - 1) / n).tolist(),
        "proxy": best_of_n(proxy, proxy).mean(0).tolist(),
        "gold": curve.tolist(),
        "gold_interval": interval(means),
        **estimate(top_gold, groups, seed, "gold_of_all gold_of_all_interval"),
        "oracle": best_of_n(gold, gold).mean(0).tolist(),
        "random": float(np.nanmean(gold, 1).mean()),
        "gap": float(curve.max() - curve[-1]),
        "gap_interval": interval(means.max(1) - means[:, -1]),
        "best_n": int(best.argmax()) + 1,
    }


def shown_n(m: dict) -> list[int]:
    """The columns of n = 1, 2, 4 ... and of the largest n."""
    n = m.get("n", [])
    return [k for k, value in enumerate(n) if value & (value - 1) == 0 or value == len(n)]


def print_bestofn(file: str, items: list, models: dict, names: dict[str, str]) -> None:
    """A row for n = 1, 2, 4 ... N of each model."""
    counts = sorted({len(item.responses) for item in items})
    each = " to ".join(map(str, counts[:1] + counts[1:][-1:]))
    print(f"\n{file}: {len(items)} prompts, {each} candidates each")
    rows, gaps, own = [], [], {}
    for name, m in models.items():
        rows.append([f"{names[name]} ({m['prompts']} prompts, {m['dropped']} dropped)"])
        for k in shown_n(m):
            gold = shown(m["gold"][k], [ends[k] for ends in m["gold_interval"]])
            others = [shown(m["random"]), shown(m["oracle"][k])]
            rows.append([f"  {k + 1}", f"{m['kl'][k]:.2f}", shown(m["proxy"][k]), gold, *others])
        if m["prompts"] and len(counts) > 1:
            gold = shown(m["gold_of_all"], m["gold_of_all_interval"])
            rows.append(["  all of a prompt", "", "", gold, shown(m["random"])])
        if m["prompts"]:
            gap = f"{shown(m['gap'], m['gap_interval'])} below the best gold, at n = {m['best_n']}"
            gaps.append(f"{names[name]}: the last gold is {gap}")
        if "rewardbench-2" in m:
            own[names[name]] = m["rewardbench-2"]
    print_rows(["best of n", "KL", "proxy", "gold [95 %]", "random", "oracle"], rows)
    print("\n".join(gaps))
    if own:
        print("\nrewardbench-2 in its own terms")
        subsets = next(iter(own.values()))
        print_rows(["%", *own], [[k, *(percent(s[k]) for s in own.values())] for k in subsets])


def plot_bestofn(result: dict, args) -> None:
    """Gold score against the KL of the best of n, beside the best and a random choice."""

    def view(label: str, m: dict) -> dict:
        if not m["prompts"]:
            return {}
        columns = shown_n(m)
        kl, gold, oracle = (np.array(m[key])[columns] for key in ("kl", "gold", "oracle"))
        series = {label: (kl, gold, np.transpose(m["gold_interval"])[columns].tolist())}
        series["oracle"] = kl, oracle, None
        return series | {"random choice": (kl, [m["random"]] * len(kl), None)}

    labels = {"xlabel": "KL of the best of n, nats", "ylabel": "gold score, 95 % interval"}
    plot_models(args, result, view, **labels)


# ----------------------------------------------------------------------------- verb: stability


def stability(args) -> None:
    """Several runs of one recipe (their RUN/student): do they agree, and is sigma(margin) a
    probability?

    NLL, Brier score and ECE are those of sigma(margin); T is the temperature that would minimise
    the NLL. Rank correlation is Spearman's, the mean over the other runs: of all rewards, and of
    the margins, which do not see a shift between prompts."""
    files, drifts = read_files(args), {m: drift(m) for m in args.models}
    result = {file: {"models": {}} for file in files}
    kept = {file: [] for file in files}
    for name, file, pairs, r, *_ in scored(args, files, {"files": result, "drift": drifts}):
        here, margins = result[file], r[~np.isnan(r).any(1)] @ [1, -1]
        here["models"][name] = summary(pairs, r, None, args.seed)
        if len(margins):
            here["models"][name]["calibration"] = calibration(margins)
        values = [m["accuracy"] for m in here["models"].values() if m["pairs"]]
        mean = float(np.mean(values)) if values else None
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        here["accuracy"] = {"mean": mean, "std": std}
        kept[file].append(r)
        for what, view in (("rewards", np.ravel), ("margins", lambda r: r @ [1, -1])):
            runs = [view(r) for r in kept[file]]
            table = [[spearman(a, b) for b in runs] for a in runs]
            here[f"rank_correlation_of_{what}"] = table
    for file, r in result.items():
        print_stability(file, len(files[file]), r, args.names)
    for name in filter(drifts.get, drifts):
        steps = zip(*drifts[name].values())
        said = ", ".join(f"{step}: {mean:.2f} ± {std:.2f}" for step, mean, std in steps)
        print(f"{args.names[name]}, validation reward by step: {said}")
    if args.plot:
        plot_stability(result, args)


def drift(model: str) -> dict | None:
    """Validation rewards by step, from the metrics.jsonl beside a RUN/student; None for others."""
    folder = Path(model).resolve()
    path = folder.parent / "metrics.jsonl"
    raw = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    lines = [idistill.attempt(json.loads, line) for line in raw]  # a crash may cut one
    lines = [m for m in lines if isinstance(m, dict) and m.get("phase") == folder.name]
    lines = [m for m in lines if m.get("val_reward_std") is not None]
    names = {"steps": "step", "mean": "val_reward_mean", "std": "val_reward_std"}
    return {k: [m[name] for m in lines] for k, name in names.items()} if lines else None


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation of (N,) and (N,) where both are known (not NaN), equal values with their
    average rank; None where nothing is, or one is constant."""
    both, ranks = ~np.isnan(a + b), []
    if not both.any():
        return None
    for x in (a[both], b[both]):
        _, level, counts = np.unique(x, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[level])
    return None if min(r.std() for r in ranks) == 0 else float(np.corrcoef(*ranks)[0, 1])


def fitted_temperature(margins: np.ndarray) -> float | None:
    """T > 0 with the least mean of -log sigma(margin / T), margins (N,): the loss is convex in
    1 / T, so its slope has one root. None where no finite T is best: nothing is ranked wrong, or
    margins tell no more than chance."""
    scales = np.geomspace(1e-8, 1e8, 2**20)  # of 1 / T

    def slope(scale: float) -> float:
        return -(margins * np.exp(-np.logaddexp(0, scale * margins))).mean()

    k = bisect(scales, 0, key=slope)
    return float(1 / scales[k]) if 0 < k < len(scales) else None


def calibration(margins: np.ndarray, bins: int = 15) -> dict:
    """How far sigma(margin) is a probability (arXiv 1706.04599), margins (N,).

    Confidence is sigma(|margin|), outcome 1 where the ranking is right, half for ties; ECE over
    equal bins of [0.5, 1]; Brier and log-likelihood are those of sigma(margin) against 1."""
    m = margins.astype(float)
    T, right = fitted_temperature(m), outcomes(m)
    confidence = 1 / (1 + np.exp(-np.abs(m)))
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    filled = []
    for inside in (index == b for b in np.unique(index)):
        means = {"confidence": confidence[inside].mean(), "right": right[inside].mean()}
        filled.append({"pairs": int(inside.sum()), **{k: float(v) for k, v in means.items()}})
    return {
        "nll": float(np.logaddexp(0, -m).mean()),
        "brier": float(np.exp(-2 * np.logaddexp(0, m)).mean()),  # of 1 - sigma(m), squared
        "ece": sum(b["pairs"] * abs(b["confidence"] - b["right"]) for b in filled) / len(m),
        "temperature": T,
        "nll_at_temperature": float(np.logaddexp(0, -m / T).mean()) if T else None,
        "bins": filled,
    }


def print_stability(file: str, pairs: int, r: dict, names: dict[str, str]) -> None:
    """A row a run."""
    rows = []
    for k, (name, m) in enumerate(r["models"].items()):
        c = m.get("calibration", {})
        numbers = [c.get(v) for v in ("nll", "brier", "ece", "temperature")]
        for what in ("rewards", "margins"):
            row = r[f"rank_correlation_of_{what}"][k]
            others = [v for j, v in enumerate(row) if j != k and v is not None]
            numbers.append(float(np.mean(others)) if others else None)
        right = percent(m.get("accuracy"), m.get("interval"))
        rows.append([names[name], right, *map(shown, numbers), str(m["dropped"])])
    spread = " ± ".join(map(percent, r["accuracy"].values()))
    print(f"\n{file}: {pairs} pairs; accuracy of the runs {spread} (mean, standard deviation)")
    header = ["stability", "accuracy % [95 %]", "NLL", "Brier", "ECE", "T", "rank corr."]
    print_rows([*header, "of margins", "dropped"], rows)


def plot_stability(result: dict, args) -> None:
    """Reliability of sigma(|margin|)."""

    def view(label: str, m: dict) -> dict:
        bins = m.get("calibration", {}).get("bins", [])
        confidence, right = ([b[key] for b in bins] for key in ("confidence", "right"))
        series = {label: (confidence, right, [None] * len(bins))}
        return {"calibrated": ([0.5, 1], [0.5, 1], None), **series}

    models = {file: r["models"] for file, r in result.items()}
    labels = {"xlabel": "confidence, sigma(|margin|)", "ylabel": "share ranked right"}
    plot_models(args, models, view, ylim=(0, 1), **labels)


# -------------------------------------------------------------------------------- command line

FLAGS = {  # flag: (its verbs, "" for all; default; help)
    "--data": ("", [], "pairs (bestofn: candidates), in any form that data_prep.py reads"),
    "--json": ("", None, "file to write the numbers to"),
    "--plot": ("", None, "file to draw them in: .png, .pdf or .svg (needs matplotlib)"),
    "--limit": ("", 0, "a random so many pairs of each file, by --seed; 0: all"),
    "--batch-size": ("", 32, "texts a batch, of about equal length"),
    "--max-length": ("", 0, "tokens; the oldest of the prompt is cut; 0: the model's positions"),
    "--dtype": ("", "auto", "auto: bf16 autocast on hardware that has it; bf16: weights too"),
    "--device": ("", "auto", "auto, cpu, cuda, cuda:1, mps"),
    "--seed": ("", 0, "seed of the bootstrap and of --limit"),
    "--pair-encoding": ("", False, "for encoders trained on tokenizer(question, answer)"),
    "--dump": ("accuracy", None, "file: a line a pair, RewardBench's keys, exact scored strings"),
    "--strength": ("accuracy", None, "file: the pairs, strength = mean margin of all models"),
    "--teacher": ("attention show", None, "RUN/teacher to compare the simulated maps with"),
    "--layers": ("attention show", "last", "layers to average: last, all, numbers: --layers=-1,0"),
    "--stages": ("attention", 10, "stages, by token position"),
    "--span": ("attention", "response", "what is cut into stages: the response, all: prompt too"),
    "--pair": ("show", "0", "id of the pair, or its number from 0"),
    "--html": ("show", None, "file: a page that stands alone, to be opened in a browser"),
    "--edits": ("attack", None, "JSON file of further edits, as described above"),
}
CHOICES = {"--dtype": ("auto", "fp32", "bf16"), "--span": ("response", "all")}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """One sub-command a verb; exits with 2 and one line for what argparse cannot check."""
    layout = argparse.RawDescriptionHelpFormatter
    ap = Parser(description=__doc__, formatter_class=layout)
    verbs = ap.add_subparsers(dest="verb", required=True)
    kinds = {bool: {"action": "store_true"}, int: {"type": int}, list: {"nargs": "+"}}
    for run in (accuracy, attention, show, attack, bestofn, stability):
        about = {"description": inspect.cleandoc(run.__doc__), "formatter_class": layout}
        verb = verbs.add_parser(run.__name__, allow_abbrev=False, **about)
        verb.set_defaults(run=run)
        text = "reward model (or RUN/teacher): local directory or hub id"
        verb.add_argument("models", nargs="+", metavar="MODEL", help=text)
        for flag, (names, default, text) in FLAGS.items():
            if not names or run.__name__ in names.split():
                kind = kinds.get(type(default), {"choices": CHOICES.get(flag)})
                text += f" (default: {default})" if default else ""
                verb.add_argument(flag, default=default, help=text, **kind)
    args = ap.parse_args(argv)
    if not args.data:
        ap.error("--data is needed")
    bounds = {"batch_size": (1,), "max_length": (0,), "limit": (0,), "seed": (0,)}
    bounds["stages"] = (2, 1000)
    for name, (low, *high) in bounds.items():
        value = getattr(args, name, low)
        if value < low or value > max(high, default=value):
            most = "".join(f" and at most {k}" for k in high)
            ap.error(f"--{name.replace('_', '-')} must be at least {low}{most}, is {value}")
    if len({Path(model).resolve() for model in args.models}) < len(args.models):
        ap.error("a model is named twice")
    args.names = display_names(args.models)
    return args


def check_outputs(args) -> None:
    """Before the long work: what is to be written can be, and is no input, nor named twice;
    pictures can be drawn. Raises UserError."""
    more = filter(None, [getattr(args, flag, None) for flag in ("edits", "teacher")])
    inputs, taken = [Path(p).resolve() for p in [*args.data, *args.models, *more]], {}
    for flag in WRITTEN:
        path = getattr(args, flag, None)
        if not path or data_prep.is_stream(path):
            continue
        place = Path(path).resolve()
        aside = data_prep.unfinished(place)
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            if place.is_dir():
                raise OSError(0, "is a directory")
            if not aside.exists():
                aside.touch()
                aside.unlink()
        except OSError as why:
            raise UserError(f"--{flag} {path}: cannot be written ({why.strerror})") from None
        for target in (place, aside):
            if any(map(target.is_relative_to, inputs)):
                taken[target] = "an input, or in the folder of one"
            if target in taken:
                what = f"{target.name} is {taken[target]}; choose another"
                raise UserError(f"--{flag} {path}: {what}")
            taken[target] = f"written by --{flag} too"
    if args.plot:
        canvas()
        if Path(args.plot).suffix.lower() not in (".png", ".pdf", ".svg"):
            raise UserError(f"--plot {args.plot}: its name must end in .png, .pdf or .svg")


def main(argv: list[str] | None = None) -> None:
    """Checks what can be checked at once, then runs the verb; exits with 2 and one line for a
    UserError."""
    args = parse_args(argv)
    idistill.quiet()
    with data_prep.exit_codes():
        check_outputs(args)
        for name in args.models:  # all of them, before any long work
            if is_teacher(name) and args.verb not in ("accuracy", "stability"):
                hint = "; give it as --teacher" if args.verb in ("attention", "show") else ""
                what = f"is a teacher, which compares two responses; {args.verb} needs a reward"
                raise UserError(f"{name}: {what} for each alone{hint}")
        if getattr(args, "teacher", None) and not is_teacher(args.teacher):
            what = "is no interaction teacher (a token classifier with one label, as RUN/teacher)"
            raise UserError(f"--teacher {args.teacher}: {what}")
        args.run(args)


if __name__ == "__main__":
    main()
