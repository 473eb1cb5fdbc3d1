#!/usr/bin/env python3
"""Looks at reward models: stock Hugging Face sequence classifiers (directory or hub id), trained here or not.

    python eval.py VERB MODEL... --data FILE... [--json OUT] [--plot OUT.png]     (flags: eval.py VERB --help)

    accuracy   Does it rank pairs rightly? By subset, beside length alone; six benchmarks in their own terms
    attention  Where does it look? Accuracy as the response is masked stage by stage, attention by stage
    show       What does it read in one pair? Words shaded, maps: in the terminal, --html, --plot
    attack     Is it fooled by the surface? Edits of the rejected response alone; more of them by --edits
    bestofn    Does choosing harder choose better? Reward and gold score of the best of n candidates
    stability  Do several runs agree? Spread, rank correlation, calibration of sigma(margin), drift
    speed      What does a training step cost? Ways to train as ratios of pairs a second, --memory (results/speed.py)

Every verb but speed shows several models side by side. A model is scored as its stock class scores it: the
string of data_prep.Formatter, tokenised with add_special_tokens=False, read at the right-most token that is
not pad. A RUN/teacher is scored too: its verdict, mean of both orders, as (verdict / 2, -verdict / 2).

Letters: N pairs, k responses each; P prompts, N candidates each; K stages; B rows a batch, n tokens, W words.
"""
from __future__ import annotations

import argparse
import json
from bisect import bisect
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from math import lgamma
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data_prep import (BENCHMARKS, Encoder, Example, Pair, Parser, UserError, bar, check_outputs, collate,
                       collate_teacher, drift, edited, exit_codes, is_teacher, load_reward_model, load_teacher,
                       load_tokenizer, longer_margins, own_cells, prompt_key, quiet, read_candidates, read_edits,
                       read_files, set_up_device, write_pairs, written)
from idistill import (AttentionTap, InteractionTeacher, RewardModel, attention_layers, attention_map, block_masks,
                      outcomes, pool_words, row_divergence, teacher_verdicts)
from results.output import (HTML, WRITTEN, canvas, plot_accuracy, plot_attack, plot_attention, plot_bestofn,
                            plot_show, plot_stability, print_accuracy, print_attack, print_attention, print_bestofn,
                            print_page, print_stability, save_json)
from results.speed import add_flags, speed

# ---------------------------------------------------------------------------------------------------- scoring

@dataclass
class Judge:
    """A loaded model that scores pairs: a reward model, or an interaction teacher; encoder fits it."""
    name: str
    model: torch.nn.Module
    encoder: Encoder
    device: torch.device
    amp: object  # amp() is a context: bf16 autocast, or nothing

    @cached_property
    def attends(self) -> tuple[int, bool]:
        """(layers that attend, whether queries and keys alone give their maps: not where logits are capped, biased or
        share their mass with a sink; eager attention shows those). Raises UserError where neither shows the maps."""
        inputs = dict(input_ids=torch.tensor([[5, 6, 7, 8]], device=self.device))
        with torch.no_grad():
            plain = self.model.base_model(**inputs, use_cache=False).last_hidden_state
            eager, hidden = self.layer_maps(inputs, None)
            if not eager:  # some hybrids show none
                return attention_layers(self.model), True
            if not (hidden - plain).abs().max() <= 0.05 * plain.abs().max():
                raise UserError(f"{self.name}: {type(self.model).__name__} does not show its attention")
            try:
                taps = self.layer_maps(inputs, list(range(len(eager))))[0]
            except (UserError, ValueError):  # it takes no custom attention
                return len(eager), False
        loose = 0.05 if plain.dtype == torch.bfloat16 else 1e-3
        return len(eager), all((a - b).abs().max() <= loose for a, b in zip(eager, taps))

    def layer_maps(self, inputs: dict[str, torch.Tensor], layers: list[int] | None):
        """Maps (B, n, n) of some layers by the tap, or (None) of all by eager attention, mean over heads; the last
        hidden state."""
        n, before = inputs["input_ids"].shape[1], self.model.config._attn_implementation
        try:
            if layers is None:
                self.model.set_attn_implementation("eager")
                seen = self.model.base_model(**inputs, use_cache=False, output_attentions=True)
                return [A.float().mean(1) for A in seen.attentions or () if A is not None], seen.last_hidden_state
            with AttentionTap(self.model, layers) as tap:
                hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        finally:
            self.model.set_attn_implementation(before)
        maps, causal = [], torch.ones(1, 1, n, n, dtype=torch.bool, device=self.device).tril()
        for query, key, scale, mask in (tap.kept[k] for k in layers):
            visible = causal if mask is None else mask if mask.dtype == torch.bool else mask == 0
            maps.append(attention_map(query, key, scale, visible)[:, 0])
        return maps, hidden

    def score(self, items: list, batch_size: int, responses=lambda pair: [pair.chosen, pair.rejected]):
        """Of the k responses of each item: (rewards (N, k) in fp32, the k scored strings). An overlong prompt
        loses its oldest part, the same for all; where one does not fit, all are NaN and the strings None."""
        if isinstance(self.model, InteractionTeacher):  # always of pairs
            examples = self.encoder(items, progress="encoding")
            if len(examples) < len(items):
                refused = len(items) - len(examples)
                raise UserError(f"{self.name}: its chat template refuses the roles of {refused} pairs")
            verdict = teacher_verdicts(self.model, examples, batch_size, self.device, self.amp, self.name)
            self.check(verdict)
            return np.stack([verdict / 2, -verdict / 2], 1), [responses(p) for p in items]
        texts, rows, k = [], {}, len(responses(items[0]))  # rows: equal strings are scored once (RM-Bench has many)
        for fitted in chain.from_iterable(self.encoder.fit(items, responses, "encoding")):
            if fitted is None:
                texts.append(None)
                continue
            _, prompt, sides, tokens, _ = fitted
            texts.append([self.encoder.formatter(prompt, y)[0] for y in sides])
            rows |= zip(texts[-1], (ids.tolist() for ids, _ in tokens))
        reward = dict(zip(rows, self.score_rows(list(rows.values()), batch_size)))
        rewards = [[reward[t] for t in some] if some else [np.nan] * k for some in texts]
        return np.array(rewards, dtype=np.float32), texts

    def batches(self, rows: list[list[int]], batch_size: int, hidden: list[tuple[int, int]] | None = None):
        """Token rows batched by length, behind a progress bar, padded on the right: (index (B,), the model's
        inputs (B, n), scoring position (B,)). hidden: a range of each row that keeps its place unattended."""
        pad = self.model.config.get_text_config().pad_token_id
        order = np.argsort([-len(row) for row in rows], kind="stable")
        parts = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
        for index in bar(parts, self.name, unit="batch"):
            ids = pad_sequence([torch.tensor(rows[i]) for i in index], batch_first=True, padding_value=-1)
            there, place = ids >= 0, torch.arange(ids.shape[1])
            # as the stock class: the last token that is not pad, even where pad = eos ends the text
            at = (place * (there & (ids != (-1 if pad is None else pad)))).argmax(1)
            inputs = dict(input_ids=ids.where(there, pad or 0), attention_mask=there.long())
            if hidden is not None:  # OPT would count positions by the mask
                for b, i in enumerate(index):
                    inputs["attention_mask"][b, slice(*hidden[i])] = 0
                inputs["position_ids"] = place.repeat(len(index), 1)
            yield index, {k: v.to(self.device) for k, v in inputs.items()}, at.to(self.device)

    @torch.no_grad()
    def score_rows(self, rows: list[list[int]], batch_size: int, hidden=None) -> np.ndarray:
        """Rewards (N,) of N token rows; hidden as in batches."""
        rewards, head = np.zeros(len(rows), dtype=np.float32), getattr(self.model, "score", None)
        for index, inputs, at in self.batches(rows, batch_size, hidden):
            with self.amp():
                if head is None:  # other heads (DeBERTa, BERT ...) as they are
                    out = self.model(**inputs).logits
                else:
                    out = self.model.base_model(**inputs, use_cache=False).last_hidden_state
            if head is not None:  # bf16 logits tie often: the head in fp32
                out = F.linear(out[torch.arange(len(index)), at].float(), head.weight.float(), head.bias)
            rewards[index] = out[:, 0].float().cpu().numpy()
        self.check(rewards)
        return rewards

    def check(self, rewards: np.ndarray) -> None:
        """Raises UserError where rewards (any shape) hold NaN or infinity."""
        if not np.isfinite(rewards).all():
            raise UserError(f"{self.name}: {(~np.isfinite(rewards)).sum()} of {rewards.size} rewards are no numbers; "
                            "its weights are damaged, or need --dtype fp32")

    @torch.no_grad()
    def end_attention(self, rows: list[list[int]], layers: str, rollout: bool, batch_size: int):
        """What the scoring position attends to: (n,) for a row, mean over heads and layers; rollout: through
        all layers, half of each step on the residual stream (arXiv 2005.00928). Raises UserError."""
        out, chosen = [np.zeros(0)] * len(rows), pick_layers(self, "all" if rollout else layers)
        for index, inputs, at in self.batches(rows, batch_size):
            with self.amp():
                maps = self.layer_maps(inputs, chosen if self.attends[1] else None)[0]
            end = rolled = F.one_hot(at, inputs["input_ids"].shape[1]).float()[:, None]  # (B, 1, n)
            mean = 0
            for A in reversed(maps if self.attends[1] else [maps[k] for k in chosen]):
                rolled, mean = rolled / 2 + rolled @ A / 2, mean + end @ A / len(chosen)
            for i, values in zip(index, (rolled if rollout else mean)[:, 0].cpu().numpy()):
                out[i] = values[:len(rows[i])]
        return out


def pick_layers(judge: Judge, spec: str) -> list[int]:
    """last, all, or numbers as 0,3,-1 -> attention layers from 0."""
    count = judge.attends[0]
    try:
        layers = {"last": [-1], "all": list(range(count))}.get(spec) or [int(k) for k in spec.split(",")]
        return [range(count)[k] for k in layers]
    except (ValueError, IndexError):
        raise UserError(f"--layers {spec!r}: give last, all, or numbers within the {count} attention layers "
                        f"of {judge.name}, such as 0,-1") from None


def open_judge(name: str, args, decoder: bool = False) -> Judge:
    """A reward model or interaction teacher (decoder: a decoder alone), ready to score. Raises UserError."""
    teaches, (device, amp) = is_teacher(name), set_up_device(args)
    if teaches:  # its own tokens serve where the student's words are asked for
        stock, tokenizer, room = load_teacher(name)
        model, room = InteractionTeacher(stock, tokenizer), min(room, 2 * args.max_length or room)
        encoder = Encoder(load_tokenizer(name), 10**9, "truncate", tokenizer, room)
    else:
        dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
        model, tokenizer, length = load_reward_model(name, dtype, args.max_length)
        encoder = Encoder(tokenizer, length, "truncate")
    if decoder and not hasattr(model, "score"):
        raise UserError(f"{name}: {args.verb} reads decoder reward models (a teacher is given as --teacher)")
    return Judge(name, model.to(device).eval(), encoder, device, amp)


def open_teacher(name: str, args) -> Judge:
    """An interaction teacher that shows the map of its last layer, as training does. Raises UserError."""
    judge = open_judge(name, args)
    if not isinstance(judge.model, InteractionTeacher):
        raise UserError(f"--teacher {name}: is no interaction teacher (a token classifier with one label, as "
                        "RUN/teacher)")
    stock = judge.model.stock
    judge.model = InteractionTeacher(stock, judge.encoder.teacher, (stock.config.num_hidden_layers - 1,))
    return judge


def scored(args, files: dict[str, list], result: dict, *responses):
    """(model, file, its items, rewards, texts, counts) of each model and file, see Judge.score. One model is
    in memory at a time; what was cut is printed; --json is written each time, so a failure loses little."""
    for name in args.models:
        judge = open_judge(name, args)
        for file, items in files.items():
            judge.encoder.counts.clear()
            rewards, texts = judge.score(items, args.batch_size, *responses)
            counts = print_counts(judge, file)
            yield name, file, items, rewards, texts, counts
            save_json(args, result)
        del judge


def print_counts(judge: Judge, file: str) -> dict[str, int]:
    """What was cut, dropped or defused; also returned."""
    counts = {k: v for k, v in judge.encoder.counts.items() if v}
    if counts:
        print(f"{judge.name} on {file}: " + ", ".join(f"{v} {k}" for k, v in counts.items()))
    return counts


# ------------------------------------------------------------------------------------------------- statistics

def resampled_means(values: np.ndarray, groups: np.ndarray, seed: int, rounds: int = 2000) -> np.ndarray:
    """Means of values (N, ...) over bootstrap samples, (rounds, ...). Prompts (groups (N,)) are drawn, not
    pairs: pairs that share a prompt are not independent."""
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


def estimate(values: np.ndarray, groups: np.ndarray, seed: int, mean="accuracy", ends="interval") -> dict:
    """{mean: of values (N,), ends: its 95 % interval over prompts}; without values both are None."""
    if not len(values):
        return {mean: None, ends: None}
    return {mean: float(values.mean()), ends: bootstrap(values, groups, seed)}


def prompt_groups(pairs: list) -> np.ndarray:
    """A number for each prompt, the same for equal prompts: (N,)."""
    return np.array([prompt_key(p.prompt) for p in pairs])


def summary(pairs: list[Pair], rewards: np.ndarray, first: np.ndarray | None, seed: int) -> dict:
    """All that the accuracy table says of rewards (N, 2); first: those of the model compared with."""
    scored, groups = ~np.isnan(rewards).any(1), prompt_groups(pairs)
    if not scored.any():
        return {"pairs": 0, "dropped": len(pairs)}
    lengths = np.array([(len(p.chosen.strip()), len(p.rejected.strip())) for p in pairs])
    equal = scored & (np.abs(lengths[:, 0] - lengths[:, 1]) <= 0.1 * lengths.max(1))
    margins, r = rewards[:, 0] - rewards[:, 1], rewards[scored]
    right, m = outcomes(margins), margins[scored]
    out = {"pairs": len(m), "dropped": len(pairs) - len(m), "ties": int((m == 0).sum()),
           **estimate(right[scored], groups[scored], seed),
           "equal_length": {"pairs": int(equal.sum()), **estimate(right[equal], groups[equal], seed)},
           "reward_mean": float(r.mean()), "reward_std": float(r.std()),
           "margin_mean": float(m.mean()), "margin_std": float(m.std())}
    if first is not None:
        both = scored & ~np.isnan(first).any(1)
        gain = (right - outcomes(first[:, 0] - first[:, 1]))[both]
        out["difference"] = {"pairs": int(both.sum()), **estimate(gain, groups[both], seed, "mean")}
    return out


# --------------------------------------------------------------------------------------------- verb: accuracy

def accuracy(args) -> None:
    """Accuracy with 95 % intervals, by subset, beside what length alone and a constant answer reach.

    Pairs of a benchmark that data_prep.py converted have its own numbers too, in a table of their own."""
    files, result, dump = read_files(args), {}, []
    rewards = {file: [] for file in files}
    for file, pairs in files.items():
        longer = estimate(outcomes(longer_margins(pairs)), prompt_groups(pairs), args.seed)
        baselines = {"longer response": longer, "majority": {"accuracy": 0.5}}
        result[file] = {"models": {}, "subsets": {}, "baselines": baselines}
    for name, file, pairs, r, texts, counts in scored(args, files, {"files": result}):
        rewards[file].append(r)
        here, first = result[file], rewards[file][0] if len(rewards[file]) > 1 else None
        here["models"][name] = {**counts, **summary(pairs, r, first, args.seed)}
        subsets = sorted({p.subset for p in pairs} - {""})
        for subset in subsets if len(subsets) > 1 else ():
            index = [k for k, p in enumerate(pairs) if p.subset == subset]
            some, before = [pairs[k] for k in index], None if first is None else first[index]
            here["subsets"].setdefault(subset, {})[name] = summary(some, r[index], before, args.seed)
        for source in sorted(BENCHMARKS.keys() & {p.source for p in pairs}):
            index = [k for k, p in enumerate(pairs) if p.source == source]
            some, table = [pairs[k] for k in index], here.setdefault("benchmarks", {}).setdefault(source, {})
            table[name] = own_terms(source, some, r[index] @ [1, -1], prompt_groups(some), args.seed)
        dump += [{"prompt": p.prompt, "text_chosen": two[0], "text_rejected": two[1],
                  "scores_chosen": float(r_c), "scores_rejected": float(r_r),
                  "results": float(outcomes(r_c - r_r)), "subset": p.subset, "id": p.id, "model": name,
                  "data": file} for p, two, (r_c, r_r) in zip(pairs, texts, r) if two and args.dump]
    if args.dump:
        with written(args.dump) as f:
            f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in dump)
    for file, pairs in files.items():
        print(f"\n{file}: {len(pairs)} pairs")
        print_accuracy(result[file])
    print("\n(majority: either side of a pair comes first, so a constant answer is right in half; "
          "equal length: within 10 %\n in characters; ties count half; intervals: 95 %, bootstrap over "
          "prompts; - first: paired with the first model)")
    if args.strength:  # mean over the models of r_c - r_r (arXiv 2401.06080, Eq. 4), where all have scored
        margins = [np.mean([r[:, 0] - r[:, 1] for r in of_models], axis=0) for of_models in rewards.values()]
        scored_by_all = zip(sum(files.values(), []), np.concatenate(margins))
        strong = [replace(p, strength=float(m)) for p, m in scored_by_all if not np.isnan(m)]
        write_pairs(args.strength, strong, overwrite=True)
        negative, dropped = sum(p.strength < 0 for p in strong), sum(map(len, margins)) - len(strong)
        print(f"{args.strength}: {len(strong)} pairs with strength ({negative} negative), {dropped} dropped")
    if args.plot:
        plot_accuracy(result, args.plot)


def own_terms(source: str, pairs: list[Pair], margins: np.ndarray, groups: np.ndarray, seed: int) -> dict:
    """The numbers of own_cells with intervals over prompts, {number: {"value", "interval", "count"}}. A mean
    that lacks one of its numbers is left out: a part of a benchmark has no overall."""
    cells, right, weight, means = own_cells(source, pairs, margins)
    names = sorted({name for some in cells for name in some if name})
    W = {name: w for name in names if (w := weight * [name in some for some in cells]).any()}  # (N,) each
    if not W:
        return {}
    sums = np.stack([w * r for r in (right, 1) for w in W.values()], 1)
    sums = np.vstack([sums.mean(0), resampled_means(sums, groups, seed)])
    with np.errstate(invalid="ignore"):  # a sample of prompts may miss a small cell
        drawn = dict(zip(W, (sums[:, :len(W)] / sums[:, len(W):]).T))  # (1 + rounds,) each, first that of all pairs
    count = {name: int(np.count_nonzero(w)) for name, w in W.items()}
    for name, parts in means.items():
        if all(k in drawn for k in parts):
            drawn[name], count[name] = np.mean([drawn[k] for k in parts], axis=0), sum(count[k] for k in parts)
    known = {name: d[1:][np.isfinite(d[1:])] for name, d in drawn.items()}
    return {name: {"value": float(d[0]), "interval": interval(known[name]) if len(known[name]) else None,
                   "count": count[name]} for name, d in drawn.items()}


# -------------------------------------------------------------------------------------------- verb: attention

def response_rows(examples: list[Example]) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Token rows of (x, y_c) and (x, y_r) of each example in turn, and the tokens of the response in each."""
    rows, spans = [], []
    for e in examples:
        segment = np.where(e.word >= 0, e.word_seg[e.word], -1)
        for s in (1, 2):
            mine = np.flatnonzero((e.seg == 0) | (e.seg == s))
            words = np.flatnonzero(segment[mine] == s)
            rows.append(e.ids[mine].tolist())
            spans.append((int(words[0]), int(words[-1]) + 1) if len(words) else (len(mine) - 1,) * 2)
    return rows, spans


def stage_edges(start: int, end: int, stages: int) -> np.ndarray:
    """Cuts the tokens start..end into stages of about equal length: (K + 1,) edges."""
    return start + np.round(np.arange(stages + 1) / stages * (end - start)).astype(int)


def stage_mass(attention: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The attention (n,) inside each stage, edges (K + 1,) -> (K,)."""
    return np.array([attention[a:b].sum() for a, b in zip(edges, edges[1:])])


def stage_density(attention: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Each stage's share of the attention (n,) inside the edges (K + 1,), over its share of the tokens: (K,),
    1 where attention is even, NaN for a stage without token."""
    mass = stage_mass(attention, edges)
    size = np.diff(edges).astype(float)
    size[size == 0] = np.nan
    return (mass / mass.sum()) / (size / np.nansum(size)) if mass.sum() > 0 else np.full(len(size), np.nan)


@torch.no_grad()
def word_maps(judge: Judge, teacher: Judge | None, examples: list[Example], layers: str):
    """The simulated word map S (E3, E5), the teacher's T (mean of both orders, None without a teacher), the
    segments: (B, W, W), (B, W, W), (B, W). Raises UserError where queries and keys do not give the map."""
    if not judge.attends[1]:
        raise UserError(f"{judge.name}: queries and keys alone do not give its attention (capped logits, a sink or a "
                        "position bias), so there is no simulated map")
    model = RewardModel(judge.model.requires_grad_(False), "siamese", tuple(pick_layers(judge, layers)))
    batch = collate(examples, judge.model.config.get_text_config().pad_token_id or 0, judge.device)
    W, T = batch["word_seg"].shape[1], None
    with judge.amp(), torch.enable_grad():  # the student keeps its maps where it trains only
        model(batch)
    model.tap.remove()
    S = pool_words(torch.stack(model.maps).mean(0), batch["word"], W)[:, 0]
    for swap in (np.zeros(len(examples)), np.ones(len(examples))) if teacher else ():
        both = collate_teacher(examples, swap, teacher.encoder.teacher, judge.device)
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
    """KL(T_i || S_i) of the words of both responses, mean by stage: {"intra", "inter": (N, K)}."""
    reader, K = with_teacher(judge.encoder, teacher), args.stages
    examples = reader(pairs)
    print(f"{reader.counts['words the teacher cannot see']} words that the teacher cannot see are left out of the maps")
    whole = judge.encoder(pairs)  # the stages are cut over all words, those that the teacher does not see too
    out = {name: np.full((len(examples), K), np.nan) for name in ("intra", "inter")}
    few = max(1, args.batch_size // 4)  # maps need memory
    for start in bar(range(0, len(examples), few), "teacher agreement"):
        S, T, word_seg = word_maps(judge, teacher, examples[start:start + few], args.layers)
        stage = np.full(word_seg.shape, -1)
        for b, e in enumerate(whole[start:start + few]):
            for words in (np.flatnonzero(e.word_seg == s) for s in (1, 2)):
                stage[b, words] = np.arange(len(words)) * K // max(1, len(words))
        for name, block in zip(out, (block[:, 0] for block in block_masks(word_seg))):
            kl = torch.where(block.any(-1), row_divergence(T, S, block), torch.nan).cpu().numpy()  # (B, W)
            for b, k in np.ndindex(len(kl), K):
                values = kl[b][(stage[b] == k) & ~np.isnan(kl[b])]
                out[name][start + b, k] = values.mean() if len(values) else np.nan
    return out


def curve(values: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, list]:
    """Mean and 95 % interval of each column of (N, K), NaN left out."""
    real = ~np.isnan(values)
    columns = [estimate(v[r], groups[r], seed, "mean") for v, r in zip(values.T, real.T)]
    return {k: [column[k] for column in columns] for k in ("mean", "interval")}


def attention(args) -> None:
    """The paper's Figure 1: accuracy as the response is masked stage by stage, and the attention that the
    scoring position pays to each stage, in rightly and wrongly ranked pairs; with --teacher the KL of the
    maps by stage."""
    files, result = read_files(args), {}
    if args.with_first and args.span != "all":
        raise UserError("--with-first counts the first token into the stages of --span all: give that too")
    teacher = open_teacher(args.teacher, args) if args.teacher else None
    for name in args.models:
        judge = open_judge(name, args, decoder=True)
        for file, pairs in files.items():
            judge.encoder.counts.clear()
            examples = judge.encoder(pairs, progress="encoding")
            if not examples:
                raise UserError(f"{file}: no pair fits into --max-length {judge.encoder.max_length}")
            groups = prompt_groups([e.pair for e in examples])
            row = {"pairs": len(examples), **print_counts(judge, file), **read_stages(judge, examples, groups, args)}
            for k, kl in teacher_agreement(judge, teacher, pairs, args).items() if teacher else ():
                row[f"kl_{k}"] = curve(kl, groups, args.seed)
            result.setdefault(file, {})[name] = row
            print_attention(file, name, row)
        save_json(args, {"files": result})  # after each model: a failure later loses nothing
        del judge
    if args.plot:
        plot_attention(result, args.plot)


def read_stages(judge: Judge, examples: list[Example], groups: np.ndarray, args) -> dict:
    """Accuracy with the first (last) 0..K stages masked; attention to the stages in pairs ranked right and wrong, as
    density and as cumulative share; shares of the attention: first token, before the stages, stages."""
    K, first, (rows, spans) = args.stages, 0 if args.with_first else 1, response_rows(examples)
    if args.span == "all":
        spans = [(first, end) for _, end in spans]
    edges = [stage_edges(*span, K) for span in spans]

    def right(i: int, j: int) -> np.ndarray:
        """Outcomes (N,) with the stages i..j masked."""
        kept, hidden = rows, [(e[i], e[j]) for e in edges]
        if args.delete:
            kept, hidden = [row[:a] + row[b:] for row, (a, b) in zip(rows, hidden)], None
        r = judge.score_rows(kept, args.batch_size, hidden).reshape(-1, 2)
        return outcomes(r[:, 0] - r[:, 1])

    seen = judge.end_attention(rows, args.layers, args.rollout, args.batch_size)
    plain, blank = right(0, 0), right(0, K)
    masked = {"start": [plain, *(right(0, k) for k in range(1, K)), blank],
              "end": [plain, *(right(K - k, K) for k in range(1, K)), blank]}
    mass = np.array([stage_mass(a, e) for a, e in zip(seen, edges)]).cumsum(1)
    by_stage = {"density": np.array([stage_density(a, e) for a, e in zip(seen, edges)]),
                "cumulative": mass / np.maximum(mass[:, -1:], 1e-12)}
    shares = {"first token": [a[0] for a in seen],
              "stages": [a[start:end].sum() for a, (start, end) in zip(seen, spans)],
              "before the stages": [a[first:start].sum() for a, (start, _) in zip(seen, spans)]}
    out = {f"masked_from_{k}": curve(np.stack(v, 1), groups, args.seed) for k, v in masked.items()}
    out["shares"] = {k: float(np.mean(v)) for k, v in shares.items()}
    for k, those in (("right", plain == 1), ("wrong", plain == 0)):
        for name, values in by_stage.items():
            values = values.reshape(-1, 2, K).mean(1)[those]
            out[f"{name}_{k}"] = {"pairs": len(values), **curve(values, groups[those], args.seed)}
    return out


# ------------------------------------------------------------------------------------------------- verb: show

def show(args) -> None:
    """One pair: its words shaded by the attention of the scoring position, and the simulated map (beside the
    teacher's with --teacher), its rows renormalised in the intra and the inter block."""
    pairs = [p for some in read_files(args).values() for p in some]
    found = [p for p in pairs if p.id == args.pair] or [p for k, p in enumerate(pairs) if str(k) == args.pair]
    if not found:
        last = len(pairs) - 1
        raise UserError(f"--pair {args.pair}: neither an id in the data nor a number from 0 to {last}")
    teacher, pages = open_teacher(args.teacher, args) if args.teacher else None, []
    for name in args.models:
        pages.append(read_pair(open_judge(name, args, decoder=True), teacher, found[0], args))
        print_page(pages[-1])
    save_json(args, {"models": pages})
    if args.html:
        with written(args.html) as f:
            f.write(HTML.replace("PAGES", json.dumps(pages).replace("<", "\\u003c")))
    if args.plot:
        plot_show(pages, args.plot)


def read_pair(judge: Judge, teacher: Judge | None, pair: Pair, args) -> dict:
    """A page: the W words and their segments; for each side its reward and the words' shares of the scoring
    position's attention (W,); the maps (W, W), rows renormalised in their block."""
    examples = with_teacher(judge.encoder, teacher)([pair])
    if not examples:
        raise UserError(f"pair {args.pair}: does not fit into --max-length {judge.encoder.max_length}")
    plain, words = judge.encoder([pair])[0], []  # with the words that the teacher does not see
    for w, s in enumerate(plain.word_seg):
        own = (plain.word == w) & ((plain.seg != 2) | (s == 2))
        words.append(judge.encoder.tokenizer.decode(plain.ids[own]).strip())
    rows, _ = response_rows([plain])
    page = {"model": judge.name, "id": pair.id, "words": words, "segments": plain.word_seg.tolist(),
            "maps": {}, "rewards": judge.score_rows(rows, args.batch_size).tolist(), "attention": []}
    for s, seen in zip((1, 2), judge.end_attention(rows, args.layers, args.rollout, args.batch_size)):
        word = plain.word[(plain.seg == 0) | (plain.seg == s)]
        page["attention"].append(np.bincount(word[word >= 0], seen[word >= 0], len(words)).tolist())
    S, T, word_seg = word_maps(judge, teacher, examples, args.layers)
    for kind, block in zip(("intra", "inter"), (block[:, 0] for block in block_masks(word_seg))):
        for who, P in {"student, simulated": S, **({"teacher": T} if teacher else {})}.items():
            P = P.float() * block
            P = (P / P.sum(-1, keepdim=True).clamp_min(1e-8))[0].cpu().double().numpy()
            page["maps"][f"{kind}: {who}"] = P.round(5).tolist()
    return page


# ----------------------------------------------------------------------------------------------- verb: attack

def overturned(r: np.ndarray, edits: dict, groups: np.ndarray, seed: int) -> dict:
    """All that attack says of rewards (N, 2 + edits): of chosen, rejected, rejected after each edit."""
    right, spread, of_edits = r[:, 0] > r[:, 1], float(r[:, :2].std()), {}
    for edit, after in zip(edits, r[:, 2:].T):
        flip = 1 - outcomes(r[:, 0] - after)
        shift = (after - r[:, 1]) / spread if spread else np.zeros(0)  # constant rewards have no unit
        of_edits[edit] = {**estimate(flip[right], groups[right], seed, "flip_rate", "flip_interval"),
                          "flips_of_all": float((flip * right).mean()), "accuracy": float(1 - flip.mean()),
                          **estimate(shift, groups[:len(shift)], seed, "shift", "shift_interval")}
    return {"edits": of_edits, "accuracy": float(outcomes(r[:, 0] - r[:, 1]).mean()),
            "ranked_right": int(right.sum()), "reward_std": spread}


def attack(args) -> None:
    """How often surface edits of the rejected response alone overturn a right ranking, and what reward they
    earn.

    --edits FILE.json, {"name": EDIT, ...}, adds edits to the built-in ones, or replaces those of the same
    name. An EDIT is {"append": text}, {"prepend": text}, {"replace_end": text} (the last sentence is swapped;
    of a single sentence, the second half), {"built_in": "recap" | "repeat" | "markdown" | "upper"}, several
    of these (applied in order), or null (takes a built-in edit out)."""
    edits, files = read_edits(args.edits), read_files(args)
    result = {file: {} for file in files}

    def responses(p: Pair) -> list[str]:  # all or none fit, with one cut of the prompt
        return [p.chosen, p.rejected, *(edited(p.rejected, edit) for edit in edits.values())]

    for name, file, pairs, r, *_ in scored(args, files, {"edits": edits, "files": result}, responses):
        fits = ~np.isnan(r[:, 0])
        result[file][name] = {"pairs": int(fits.sum()), "dropped": int((~fits).sum()), "edits": {}}
        if fits.any():
            result[file][name] |= overturned(r[fits], edits, prompt_groups(pairs)[fits], args.seed)
    print_attack(files, edits, result)
    if args.plot:
        plot_attack(edits, result, args.plot)


# ---------------------------------------------------------------------------------------------- verb: bestofn

def best_of_n(proxy: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Expected value of the candidate with the highest proxy among n drawn without replacement: (P, N) and
    (P, N) -> (P, N), column n - 1 for n. The k-th lowest of N is the highest of n in C(k-1, n-1) of C(N, n)
    draws; candidates of equal proxy share the mean of their values, as if ties were broken at random."""
    N, out = proxy.shape[1], np.zeros(proxy.shape)
    log_f = np.array([lgamma(k + 1) for k in range(N + 1)])  # log k!; C(k-1, n-1) / C(N, n) in logarithms
    k, n = np.arange(1, N + 1), np.arange(1, N + 1)[:, None]
    logs = log_f[k - 1] - log_f[n - 1] - log_f[np.maximum(k - n, 0)] - log_f[N] + log_f[n] + log_f[N - n]
    weights = np.where(k >= n, np.exp(logs), 0.0)
    for row, p, v in zip(out, proxy, values):
        level = np.unique(p, return_inverse=True)[1]
        shared = np.bincount(level, v) / np.bincount(level)
        row[:] = weights @ shared[np.sort(level)]
    return out


def over_optimisation(proxy: np.ndarray, gold: np.ndarray, groups: np.ndarray, seed: int) -> dict:
    """All that bestofn says of one model: curves over n = 1..N of proxy (P, N) and gold (P, N); the KL of the
    best of n from a random choice is log n - (n-1)/n (arXiv 2210.10760)."""
    of_gold, of_proxy = best_of_n(proxy, gold), best_of_n(proxy, proxy).mean(0)
    means, curve, gains = resampled_means(of_gold, groups, seed), of_gold.mean(0), []
    n = np.arange(1, len(curve) + 1)
    for c, values in ((of_proxy, proxy), (curve, gold)):
        spread = np.sqrt(values.var(1).mean())  # within prompts: each has a constant of its own
        gains.append(float((c[-1] - c[0]) / spread) if spread else None)
    return {"n": n.tolist(), "kl": (np.log(n) - (n - 1) / n).tolist(), "proxy": of_proxy.tolist(),
            "gold": curve.tolist(), "gold_interval": interval(means),
            "oracle": best_of_n(gold, gold).mean(0).tolist(), "random": float(gold.mean()),
            "gap": float(curve.max() - curve[-1]), "gap_interval": interval(means.max(1) - means[:, -1]),
            "best_n": int((curve >= curve.max() - 1e-9).argmax()) + 1,  # the first, where rounding alone differs
            "proxy_gain": gains[0], "gold_gain": gains[1],
            "gain_difference": None if None in gains else gains[0] - gains[1]}


def bestofn(args) -> None:
    """Proxy and gold score of the best of n candidates by reward, n = 1..N: does choosing harder still choose
    better?

    A line of --data is {"prompt", "responses": [text, ...], "gold": [number, ...]} or, one good and several
    bad, {"prompt", "chosen": text, "rejected": [text, ...]} (gold 1 and 0); all prompts of a file have the
    same N."""
    files = read_files(args, read_candidates)
    result = {file: {} for file in files}
    for name, file, items, r, *_ in scored(args, files, {"files": result}, lambda c: c.responses):
        fits = ~np.isnan(r[:, 0])
        result[file][name] = {"prompts": int(fits.sum()), "dropped": int((~fits).sum())}
        if fits.any():
            gold, groups = np.array([c.gold for c in items])[fits], prompt_groups(items)[fits]
            result[file][name] |= over_optimisation(r[fits].astype(float), gold, groups, args.seed)
    print_bestofn(files, result)
    if args.plot:
        plot_bestofn(result, args.plot)


# -------------------------------------------------------------------------------------------- verb: stability

def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation of (N,) and (N,) where both are known (not NaN), equal values with their average rank; None
    where nothing is, or one is constant."""
    both, ranks = ~np.isnan(a + b), []
    if not both.any():
        return None
    for x in (a[both], b[both]):
        _, level, counts = np.unique(x, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[level])
    return None if min(r.std() for r in ranks) == 0 else float(np.corrcoef(*ranks)[0, 1])


def fitted_temperature(margins: np.ndarray) -> float | None:
    """T > 0 with the least mean of -log sigma(margin / T), margins (N,): the loss is convex in 1 / T, so its slope has
    one root. None where no finite T is best: nothing is ranked wrong, or margins tell no more than chance."""
    def log_beta(k: int) -> float:
        return 40 * k / 2**50 - 20

    def slope(k: int) -> float:
        return -(margins * np.exp(-np.logaddexp(0, np.exp(log_beta(k)) * margins))).mean()

    k = bisect(range(2**50), 0, key=slope)
    return float(np.exp(-log_beta(k))) if 0 < k < 2**50 else None


def calibration(margins: np.ndarray, bins: int = 15) -> dict:
    """How far sigma(margin) is a probability (arXiv 1706.04599), margins (N,). Confidence is sigma(|margin|),
    outcome 1 where the ranking is right, half for ties; ECE over equal bins of [0.5, 1]; Brier and negative
    log-likelihood are those of sigma(margin) against 1."""
    m, T, filled = margins.astype(float), fitted_temperature(margins.astype(float)), []
    confidence, right = 1 / (1 + np.exp(-np.abs(m))), outcomes(m)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    for mine in (index == b for b in np.unique(index)):
        filled.append({"pairs": int(mine.sum()), "confidence": float(confidence[mine].mean()),
                       "right": float(right[mine].mean())})
    return {"nll": float(np.logaddexp(0, -m).mean()),
            "brier": float((1 / (1 + np.exp(np.minimum(m, 700))) ** 2).mean()),  # 700: exp stays finite
            "ece": sum(b["pairs"] * abs(b["confidence"] - b["right"]) for b in filled) / len(m),
            "temperature": T, "nll_at_temperature": float(np.logaddexp(0, -m / T).mean()) if T else None,
            "bins": filled}


def stability(args) -> None:
    """Several runs of one recipe (their RUN/student): do they agree, and is sigma(margin) a probability?"""
    files, drifts = read_files(args), {m: drift(m) for m in args.models}
    result, kept = {file: {"models": {}} for file in files}, {file: [] for file in files}
    for name, file, pairs, r, *_ in scored(args, files, {"files": result, "drift": drifts}):
        here, margins = result[file], r[~np.isnan(r).any(1)] @ [1, -1]
        here["models"][name] = summary(pairs, r, None, args.seed)
        if len(margins):
            here["models"][name]["calibration"] = calibration(margins)
        kept[file].append(r)
        values = [m["accuracy"] for m in here["models"].values() if m["pairs"]]
        here["accuracy"] = {"mean": float(np.mean(values)) if values else None,
                            "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}
        for what, view in (("rewards", np.ravel), ("margins", lambda r: r @ [1, -1])):
            runs = [view(r) for r in kept[file]]
            here[f"rank_correlation_of_{what}"] = [[spearman(a, b) for b in runs] for a in runs]
    print_stability(files, result, drifts)
    if args.plot:
        plot_stability(result, drifts, args.plot)


# ----------------------------------------------------------------------------------------------- command line

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """One sub-command a verb: flags of all verbs, of the two that read attention, of each verb alone."""
    ap = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common, maps = (Parser(add_help=False) for _ in range(2))
    add = common.add_argument
    add("models", nargs="+", metavar="MODEL", help="reward model (or RUN/teacher): local directory or hub id")
    add("--data", nargs="+", default=[], metavar="FILE",
        help="pairs (bestofn: candidates): JSONL, plain or .gz; raw HH-RLHF too")
    add("--json", metavar="OUT", help="write the numbers there")
    add("--plot", metavar="OUT.png", help="draw them (needs matplotlib)")
    add("--subset", nargs="+", default=[], metavar="NAME", help="only these subsets (default: all)")
    add("--limit", type=int, default=0, metavar="N",
        help="a random N pairs of each file, by --seed (default: 0 = all)")
    add("--batch-size", type=int, default=32, help="texts a batch, of about equal length (default: 32)")
    add("--max-length", type=int, default=0, help="longest prompt + response in tokens; the oldest of the "
        "prompt is cut, never a response (default: 0 = the model's positions)")
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 autocast where the "
        "hardware has it; bf16: the weights too, half the memory (default: auto); a decoder's head is always fp32")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--seed", type=int, default=0, help="seed of the bootstrap and of --limit (default: 0)")
    add = maps.add_argument
    add("--teacher", metavar="DIR",
        help="interaction teacher to compare the simulated maps with (RUN/teacher)")
    add("--layers", default="last",
        help="attention layers to average: last, all, or numbers as 0,-1 (default: last)")
    add("--rollout", action="store_true", help="attention rollout, through all layers whatever "
        "--layers says (arXiv 2005.00928)")
    verbs, adders = ap.add_subparsers(dest="verb", required=True), {}
    for run in (accuracy, attention, show, attack, bestofn, stability, speed):
        parents = [common, maps] if run in (attention, show) else [common]
        verb = verbs.add_parser(run.__name__, parents=parents, description=run.__doc__,
                                formatter_class=ap.formatter_class, allow_abbrev=False)
        verb.set_defaults(run=run)
        adders[run] = verb.add_argument
    add = adders[accuracy]
    add("--dump", metavar="PAIRS.jsonl",
        help="one line a pair, with RewardBench's keys and the exact scored strings")
    add("--strength", metavar="OUT.jsonl", help="write the pairs with the field strength: the mean margin of "
        "the MODELs, for idistill.py --margin-field strength and others")
    add = adders[attention]
    add("--stages", type=int, default=10, help="stages, by token position (default: 10)")
    add("--span", default="response", choices=["response", "all"], help="what is cut into stages: the "
        "response, or prompt + response (default: response)")
    add("--with-first", action="store_true", help="count the first token (attention sink, arXiv 2309.17453) "
        "into the stages of --span all (default: apart)")
    add("--delete", action="store_true", help="delete the masked tokens instead of hiding them in place")
    add = adders[show]
    add("--pair", default="0", help="id of the pair, or its number from 0 (default: 0)")
    add("--html", metavar="OUT.html",
        help="a page that stands alone; click a word to see its row of the maps")
    adders[attack]("--edits", metavar="FILE.json", help="further edits, as described above")
    add_flags(adders[speed])
    args = ap.parse_args(argv)
    if not args.data and args.verb != "speed":
        ap.error("--data is needed")
    least = dict(batch_size=1, max_length=0, limit=0, seed=0, pairs=1, rounds=1, steps=0, align_max_tokens=0, stages=2,
                 grow=1, lengths=1, shrink=1)
    for name, low in least.items():
        given = getattr(args, name, None)
        if min(given if isinstance(given, list) else [low if given is None else given]) < low:
            ap.error(f"--{name.replace('_', '-')} must be at least {low}, is {given}")
    if len(set(args.models)) < len(args.models):
        ap.error("a model is named twice")
    return args


def main(argv: list[str] | None = None) -> None:
    """Checks what can be checked at once, then runs the verb; exits with 2 and one line for a UserError."""
    args = parse_args(argv)
    quiet()
    edits = getattr(args, "edits", None)
    with exit_codes():
        check_outputs({flag: path for flag in WRITTEN if (path := getattr(args, flag, None))},
                      {"data": args.data, "edits": [edits] if edits else []})
        if args.plot:
            canvas()
            if Path(args.plot).suffix.lower() not in (".png", ".pdf", ".svg"):
                raise UserError(f"--plot {args.plot}: its name must end in .png, .pdf or .svg")
        for name in args.models if args.verb != "speed" else ():  # all of them, before any long work
            if is_teacher(name) and args.verb not in ("accuracy", "stability"):
                given = "; give it as --teacher" if args.verb in ("attention", "show") else ""
                raise UserError(f"{name}: is a teacher, which compares two responses; {args.verb} needs a "
                                f"reward for each alone{given}")
        args.run(args)


if __name__ == "__main__":
    main()
