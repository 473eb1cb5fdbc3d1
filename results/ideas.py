#!/usr/bin/env python3
"""Ideas that would make training quicker, each built as far as it takes to measure it; and what idistill.py does, without one part.

    python results/ideas.py MODEL --teacher T --data D [--shrink 256 4] [--dtype bf16] --json out.json   # flags of eval.py speed

Arms in one process, round after round, as in `eval.py speed`: pairs a second as ratios to c (plain BT) or d (the whole method).
"""
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as evaluation  # noqa: E402
from data_prep import (Encoder, bar, collate, collate_teacher, load_student, load_teacher, plan_epoch, quiet,  # noqa: E402
                       set_up_device)
from idistill import (Config, InteractionTeacher, RewardModel, alignment_loss, block_masks, bt_loss,  # noqa: E402
                      distillation_losses, make_optimizer, pick, pool_words, tree_mask)
from results.output import print_rows, save_json, shown  # noqa: E402
from results.speed import shrunk_student, speed_examples  # noqa: E402

IDEAS = {  # arm -> (what it is measured against, what it is)
    "c": ("c", "plain BT as it is: packed tree, the same number of pairs a step, bucketed in windows of 64 steps"),
    "epoch": ("c", "c, bucketed over the whole epoch"),
    "budget": ("c", "c, steps of equal tokens in place of equal pairs, bucketed over the whole epoch"),
    "two a row": ("whole", "two pairs a row, block-diagonal tree mask, random order"),
    "four a row": ("whole", "four pairs a row, block-diagonal tree mask, random order"),
    "compile": ("whole", "that under torch.compile, dynamic shapes"),
    "adamw": ("c", "c, AdamW not fused"),
    "whole": ("c", "c, the final layer at all tokens in place of the two that are read"),
    "d": ("d", "the whole method as it is"),
    "whole teacher": ("d", "d, the teacher computes all of its layers, and its verdict"),
    "cache": ("d", "d, the teacher's word maps from an earlier epoch (--cache-teacher), in memory in place of files"),
    "no batch": ("d", "d, its batches built beforehand: the most that prefetching can buy")}


def several_a_row(examples, rows: int, pad: int, device) -> dict:
    """A batch of the packed layout with several pairs in each of `rows` rows of about equal length; mask (rows, 1, n, n)."""
    bins, fill = [[] for _ in range(rows)], np.zeros(rows, int)
    for k in sorted(range(len(examples)), key=lambda k: -len(examples[k].ids)):
        bins[fill.argmin()].append(k)
        fill[fill.argmin()] += len(examples[k].ids)
    n, one = fill.max(), collate(examples, pad)
    ids, pos = torch.full((rows, n), pad), torch.zeros(rows, n, dtype=torch.long)
    seg, pair = torch.full((rows, n), 3), torch.full((rows, n), -1)
    last = torch.zeros(len(examples), 2, dtype=torch.long)
    for r, members in enumerate(bins):
        start = 0
        for k in members:
            at = slice(start, start + len(examples[k].ids))
            for into, name in ((ids, "ids"), (pos, "pos"), (seg, "seg")):
                into[r, at] = one[name][k, :len(examples[k].ids)]
            pair[r, at], last[k] = k, r * n + start + one["last"][k]
            start = at.stop
    mask = torch.ones(n, n, dtype=torch.bool).tril() & (pair[:, :, None] == pair[:, None, :])
    mask &= (seg[:, None, :] == 0) | (seg[:, None, :] == seg[:, :, None])
    return {name: t.to(device) for name, t in dict(ids=ids, pos=pos, mask=mask[:, None], last=last).items()}


def main() -> None:
    args = evaluation.parse_args(["speed", *sys.argv[1:]])
    quiet()
    (device, amp), k = set_up_device(args), args.batch_size
    stock, tokenizer = shrunk_student(args.models[0], *args.shrink) if args.shrink else load_student(args.models[0], args.seed)
    reader, reader_tokenizer, room = load_teacher(args.teacher, args.seed)
    stock.to(device).train(), reader.to(device).eval().requires_grad_(False)
    encoder = Encoder(tokenizer, args.max_length or 1024, "truncate", reader_tokenizer, room)
    examples = speed_examples(args, encoder, (stock.config.vocab_size, len(reader_tokenizer)))
    lengths, pad, cfg = np.array([len(e.ids) for e in examples]), stock.config.pad_token_id, Config()
    last = stock.config.num_hidden_layers - 1, reader.config.num_hidden_layers - 1
    plain, tapped = RewardModel(stock), RewardModel(stock, "packed", last[:1])
    teacher = InteractionTeacher(reader, reader_tokenizer, last[1:])
    whole = SimpleNamespace(read=lambda *given, **asked: teacher.read(*given, **{**asked, "verdict": True}))
    base, optimizer = stock.base_model, make_optimizer(stock, 0.0, 0.0)
    unfused = torch.optim.AdamW([{**g, "fused": False} for g in optimizer.param_groups], lr=0.0, betas=(0.9, 0.95))
    compiled = torch.compile(base, dynamic=True)  # the hooks of the final layer would be compiled anew in each step
    if len(examples) <= 64 * k:
        raise SystemExit(f"--pairs: over {64 * k} are needed, or the bucketing of c is that of a whole epoch")
    order = np.random.default_rng(args.seed).permutation(len(examples))
    plans = dict.fromkeys(IDEAS, plan_epoch(lengths, k, args.seed, 0))
    plans["epoch"] = plan_epoch(lengths, k, args.seed, 0, window=len(examples))
    plans["two a row"] = plans["four a row"] = [order[i:i + k] for i in range(0, len(order), k)]
    ranked, budget = np.argsort(lengths, kind="stable"), k * lengths.mean()
    plans["budget"] = np.split(ranked, np.flatnonzero(np.diff(np.cumsum(lengths[ranked]) // budget)) + 1)
    plans = {arm: sorted(plan, key=lambda index: lengths[index].max()) for arm, plan in plans.items()}
    kept, ready = {}, {}

    def align(S, T, batch) -> torch.Tensor:
        return sum(alignment_loss(T, S, block) for block in block_masks(batch["word_seg"]))

    @torch.no_grad()
    def map_of(other: dict, W: int) -> torch.Tensor:
        teacher(other, maps=True, verdict=False)
        return pool_words(teacher.maps.pop(), other["word"], W)

    def loss_of(arm: str, index: np.ndarray) -> torch.Tensor:
        some, swap = [examples[i] for i in index], np.zeros(len(index))
        if arm in ("d", "whole teacher"):
            return distillation_losses(tapped, teacher if arm == "d" else whole, some, swap, cfg, device, list(index))["loss"]
        if arm.endswith("row"):
            b = several_a_row(some, max(1, len(some) // {"two a row": 2, "four a row": 4}[arm]), pad, device)
            h = base(b["ids"], attention_mask=b["mask"], position_ids=b["pos"], use_cache=False).last_hidden_state.flatten(0, 1)
            r = stock.score(h[b["last"]])[..., 0].float()
            return bt_loss(r[:, 0], r[:, 1])
        batch, other = ready[arm, index[0]] if arm == "no batch" else (collate(some, pad, device), None)
        if arm in ("cache", "no batch"):
            r, W = tapped(batch), batch["word_seg"].shape[1]
            S = pool_words(tapped.maps[0], batch["word"], W)
            if arm == "cache":
                T = torch.zeros_like(S)
                for b, i in enumerate(index):
                    T[b, :, :(n := kept[i].shape[-1]), :n] = kept[i].float()
            else:
                T = map_of(other, W)
            return bt_loss(r[:, 0], r[:, 1]) + align(S, T, batch)
        if arm == "compile":
            h = compiled(batch["ids"], attention_mask=tree_mask(batch["seg"]), position_ids=batch["pos"], use_cache=False).last_hidden_state
            r = stock.score(pick(h, batch["last"]))[..., 0].float()
        else:
            plain.whole = arm == "whole"
            r = plain(batch)
        return bt_loss(r[:, 0], r[:, 1])

    for index in plans["d"]:  # what an epoch before would have left, and the batches of "no batch"
        some = [examples[i] for i in index]
        batch, other = collate(some, pad, device), collate_teacher(some, np.zeros(len(index)), reader_tokenizer, device)
        ready["no batch", index[0]] = batch, other
        with torch.no_grad(), amp():
            T = map_of(other, batch["word_seg"].shape[1])
        kept.update({i: T[b, :, :(W := len(examples[i].word_seg)), :W].half() for b, i in enumerate(index)})
    with amp():  # the ideas compute what they are measured against
        for arm, (against, _) in IDEAS.items():
            one, two = loss_of(arm, plans["d"][0]), loss_of(against, plans["d"][0])
            if not torch.allclose(one, two, atol=0.02 if amp is not nullcontext else 2e-3):
                raise SystemExit(f"{arm}: loss {one.tolist()}, {against}: {two.tolist()}")

    rates = {arm: [] for arm in IDEAS}
    for round in bar(range(args.rounds + 1), "rounds"):
        for arm, plan in plans.items():
            steps = min(args.steps or len(plan), len(plan))
            at = (np.arange(steps) + max(0.5, round - 0.5) / args.rounds) * len(plan) / steps
            pairs, started = 0, time.perf_counter()
            for index in (plan[int(i)] for i in at):
                with amp():
                    loss = loss_of(arm, index).mean()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(stock.parameters(), 1.0)
                (unfused if arm == "adamw" else optimizer).step()
                optimizer.zero_grad(set_to_none=True)
                pairs += len(index)
            rates[arm].append(pairs / (time.perf_counter() - started))
    rows, out = [], {}
    for arm, (against, what) in IDEAS.items():
        ratios = np.divide(rates[arm], rates[against])[1:]  # round 0 warmed up
        out[arm] = {"what": what, "against": against, "pairs_per_s": float(np.median(rates[arm][1:])), "ratio": float(np.median(ratios)),
                    "ratios": ratios.tolist()}
        rows.append([f"{arm}: {what}", f"{out[arm]['pairs_per_s']:.2f}",
                     shown(out[arm]["ratio"], [ratios.min(), ratios.max()], ".2f") + f" {against}"])
    out["cache"]["bytes_a_pair"] = float(np.mean([m.nbytes for m in kept.values()]))
    print_rows(["", "pairs/s", "ratio [min, max]"], rows)
    print(f"the cache takes {out['cache']['bytes_a_pair'] / 1e3:.0f} kB a pair and order of responses")
    save_json(args, {"arms": out, "dtype": args.dtype, "model": args.models[0], "shrink": args.shrink})


if __name__ == "__main__":
    main()
