"""What `python eval.py speed` times: ways to train as arms of one interleaved comparison, and what each needs of memory."""
from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForSequenceClassification

from data_prep import (Encoder, Example, Formatter, Pair, TeacherCache, UserError, bar, choose_pad, collate, collate_teacher, load,
                       load_student, load_teacher, load_tokenizer, plan_epoch, probe_student, quiet, read_files, set_up_device)
from idistill import (Config, InteractionTeacher, RewardModel, alignment_loss, block_masks, bt_loss, distillation_losses,
                      make_optimizer, pick, pool_words, tree_mask)
from results.output import draw, print_rows, save_json, shown

ARMS = {"a": "two passes, padded", "b": "one batch of both, random order (as TRL)",
        "b'": "b, bucketed by length", "c": "packed tree, bucketed: plain BT", "tap": "c and its maps",
        "pool": "c, maps, pooling, loss; no teacher", "d": "the whole method with its teacher",
        "d'": "d, the teacher's maps from --cache-teacher", "e": "maps by eager output_attentions, all layers",
        "trl": "TRL's RewardTrainer, no checkpointing"}


def add_flags(add) -> None:
    """The flags of the verb, by the add_argument of its parser."""
    add("--teacher", metavar="DIR", help="encoder that serves as the teacher")
    add("--arms", nargs="+", default=["b", "a", "b'", "c", "tap", "pool", "d", "e"], choices=list(ARMS),
        help="ways to train, ratios are to the first (default: b a b' c tap pool d e)")
    add("--pairs", type=int, default=128, help="pairs a round (default: 128)")
    add("--rounds", type=int, default=5, help="rounds, after one that warms up (default: 5)")
    add("--steps", type=int, default=0, help="steps of each arm a round, of every size, others in each round: as "
        "padded as among all --pairs, in less time (default: 0 = all)")
    add("--lengths", type=int, nargs=3, metavar="N",
        help="random tokens instead of --data: of prompt, chosen, rejected")
    add("--spread", type=float, default=0.0, metavar="SHARE",
        help="lengths vary by up to this share, uniformly (default: 0)")
    add("--shrink", type=int, nargs=2, metavar=("HIDDEN", "LAYERS"),
        help="MODEL's class at this size, random weights")
    add("--align-max-tokens", type=int, default=0, help="as in idistill.py (default: 0)")
    add("--memory", action="store_true", help="peak memory of each arm, in its own process")
    add("--grow", type=int, nargs="+", metavar="N",
        help="each arm at these total lengths (with --lengths: batch sizes), each in its own process")
    add("--peer", choices=["trl"], help="add TRL's own RewardTrainer (pip install trl)")


def shrunk_student(name: str, hidden: int, layers: int):
    """(a model of the class of another, at this size and with random weights; the other's tokenizer)."""
    tokenizer, own = load_tokenizer(name), load(AutoConfig, name, num_labels=1)
    choose_pad(tokenizer)
    small = dict(hidden_size=hidden, num_hidden_layers=layers, intermediate_size=4 * hidden,
                 num_attention_heads=4, num_key_value_heads=4, head_dim=None, layer_types=None,
                 max_position_embeddings=2**15, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32)
    return AutoModelForSequenceClassification.from_config(type(own)(**{**own.to_dict(), **small})), tokenizer


def speed_examples(args, encoder: Encoder, vocabulary: tuple[int, int]) -> list[Example]:
    """For `eval.py speed`: the first --pairs of --data; or random tokens, (prompt, chosen, rejected) of --lengths, each length
    drawn from --spread around it, three words to four tokens, of which the teacher reads what it has room for. vocabulary:
    sizes in student and teacher. Raises UserError."""
    if not args.lengths:
        return encoder([p for some in read_files(args).values() for p in some][:args.pairs], progress="encoding")
    rng, out, low, high = np.random.default_rng(args.seed), [], 1 - args.spread, 1 + args.spread
    for _ in range(args.pairs):
        lengths = [max(1, round(n * rng.uniform(low, high))) for n in args.lengths]
        n, seg = sum(lengths), np.repeat([0, 1, 2], lengths)
        word, share = np.arange(n) * 3 // 4, min(1.0, (encoder.teacher_length - 4) / n)
        word_seg = np.zeros(word[-1] + 1, dtype=int)
        word_seg[word] = seg
        heads = [np.flatnonzero(seg == s)[:int(share * length)] for s, length in enumerate(lengths)]
        word_seg[np.setdiff1d(word, word[np.concatenate(heads)])] = -1
        runs = [(rng.integers(5, vocabulary[1], len(at)), word[at]) for at in heads]
        out.append(Example(rng.integers(5, vocabulary[0], n), seg, word, word_seg, runs, None))
    return out


def training_step(arm: str, model: RewardModel, teacher: InteractionTeacher, examples: list[Example],
                  cfg: Config, device) -> tuple[torch.Tensor, int, int]:
    """(loss of one arm, tokens computed, those that are not padding)."""
    stock, pad, B = model.stock, model.stock.config.get_text_config().pad_token_id, len(examples)
    if arm[0] in "ab":
        rows = [torch.from_numpy(e.ids[(e.seg == 0) | (e.seg == s)]) for s in (1, 2) for e in examples]
        rewards, slots = [], 0
        for some in [rows[:B], rows[B:]] if arm == "a" else [rows]:
            ids = pad_sequence(some, batch_first=True, padding_value=-1).to(device)
            inputs = dict(input_ids=ids.where(ids >= 0, pad), attention_mask=ids >= 0)
            rewards.append(stock(**inputs, use_cache=False).logits[:, 0].float())
            slots += ids.numel()
        return bt_loss(*torch.cat(rewards).chunk(2)).mean(), slots, sum(map(len, rows))
    batch, swap = collate(examples, pad, device), np.zeros(B)
    if arm == "e":
        other = collate_teacher(examples, swap, teacher.tokenizer, device)
        seen = tree_mask(batch["seg"])  # eager attention adds its mask: True would count as + 1
        mask = torch.zeros_like(seen, dtype=torch.float32).masked_fill_(~seen, torch.finfo(torch.float32).min)
        out = stock.base_model(batch["ids"], attention_mask=mask, position_ids=batch["pos"], use_cache=False,
                               output_attentions=True)
        r = stock.score(pick(out.last_hidden_state, batch["last"]))[..., 0].float()
        with torch.no_grad():
            read = teacher.stock(other["ids"], attention_mask=other["mask"], output_attentions=True)
        S, T = (pool_words(maps.attentions[-1].float().mean(1, keepdim=True), b["word"],
                           batch["word_seg"].shape[1]) for maps, b in ((out, batch), (read, other)))
        loss = bt_loss(r[:, 0], r[:, 1]) + alignment_loss(T, S, block_masks(batch["word_seg"], "causal")[0])
    elif arm == "tap":
        r = model(batch)
        loss = bt_loss(r[:, 0], r[:, 1]) + 0 * sum(m.sum() for m in model.maps)
    else:
        reader = teacher if arm[0] == "d" else None
        loss = distillation_losses(model, reader, examples, swap, cfg, device, list(range(B)))["loss"]
    return loss.mean(), batch["ids"].numel(), sum(len(e.ids) for e in examples)


def time_arms(args) -> dict[str, dict]:
    """Every arm, round after round: median pairs a second, ratios to the first arm in the same round, tokens
    a pair, share of padding; of a single arm the peak memory in bytes. With --steps a round takes as many of an
    arm's steps, spread evenly from the shortest to the longest, and the next round others."""
    (device, amp), name, seed, k = set_up_device(args), args.models[0], args.seed, args.batch_size
    stock, tokenizer = shrunk_student(name, *args.shrink) if args.shrink else load_student(name, seed)
    reader, reader_tokenizer, room = load_teacher(args.teacher, seed)
    stock.to(device).train(), reader.to(device).eval().requires_grad_(False)
    encoder = Encoder(tokenizer, args.max_length or 1024, "truncate", reader_tokenizer, room)
    examples = speed_examples(args, encoder, (stock.config.vocab_size, len(reader_tokenizer)))
    depths = [m.config.get_text_config().num_hidden_layers for m in (stock, reader)]
    order = np.random.default_rng(seed).permutation(len(examples))
    lengths = np.array([len(e.ids) for e in examples])
    rows = np.array([max(((e.seg == 0) | (e.seg == s)).sum() for s in (1, 2)) for e in examples])  # its longer row
    shuffled, plans = [order[i:i + k] for i in range(0, len(order), k)], {}
    for arm in args.arms:  # bucketed as in training, by what the arm pads: two rows a pair, or one
        by = rows if arm in ("a", "b", "b'") else lengths
        plan = shuffled if arm in ("a", "b") else plan_epoch(by, k, seed, 0)
        plans[arm] = sorted(plan, key=lambda index: by[index].max())
    optimizer, sdpa = make_optimizer(stock, 0.0, 0.0), stock.config._attn_implementation  # rate 0: no change
    passes, rates, out, peer = {arm: [] for arm in args.arms}, {}, {}, None
    folder = tempfile.TemporaryDirectory()  # of arm d'

    def one_pass(arm: str, batches: list[np.ndarray]) -> list[float]:
        """Trains on the batches: seconds, tokens computed, those that are not padding, pairs."""
        last = [(depth - 1,) if arm in ("tap", "pool", "d", "d'") else () for depth in depths]
        model = RewardModel(stock, "siamese" if arm[0] in "abe" else "packed", last[0])
        probe_student(model, name)
        teacher = InteractionTeacher(reader, reader_tokenizer, last[1])
        cfg = Config(align_target="teacher" if arm[0] == "d" else "uniform", align_max_tokens=args.align_max_tokens)
        if arm == "d'":
            teacher.cache = TeacherCache(folder.name, teacher, amp is not nullcontext)
            with amp(), torch.no_grad():
                for index in batches:  # all is there before the clock starts
                    some = [examples[i] for i in index]
                    teacher.read(some, np.zeros(len(some)), max(len(e.word_seg) for e in some))
        started, done = time.perf_counter(), np.zeros(3)
        for index in batches:
            with amp():
                loss, *counts = training_step(arm, model, teacher, [examples[i] for i in index], cfg, device)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(stock.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done += [*counts, len(index)]
        if device.type == "cuda":
            torch.cuda.synchronize()
        return [time.perf_counter() - started, *done]

    for round in bar(range(args.rounds + 1), "rounds"):
        for arm in args.arms:
            for m in (stock, reader):
                m.set_attn_implementation("eager" if arm == "e" else sdpa)
            if arm == "trl":
                peer = peer or trl_trainer(stock, tokenizer, [e.pair for e in examples], args, amp is not nullcontext)
                passes[arm].append([peer(), np.nan, np.nan, len(examples)])
                continue
            plan = plans[arm]
            steps = min(args.steps or len(plan), len(plan))
            at = (np.arange(steps) + (round - 0.5) / args.rounds) * len(plan) / steps
            passes[arm].append(one_pass(arm, [plan[int(i)] for i in at] if round else plan[-1:]))  # round 0 warms up
    for arm in args.arms:
        seconds, slots, real, pairs = np.array(passes[arm][1:]).T
        rates[arm] = pairs / seconds
        ratios, known = rates[arm] / rates[args.arms[0]], arm != "trl"
        out[arm] = {"pairs_per_s": float(np.median(rates[arm])), "ratio": float(np.median(ratios)),
                    "ratios": ratios.tolist(), "tokens_per_pair": real.sum() / pairs.sum() if known else None,
                    "padding": 1 - real.sum() / slots.sum() if known else None}
    if len(out) == 1:
        out[arm]["peak_bytes"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()
    return out


def peak_memory() -> int:
    """Most bytes this process held. On Linux ru_maxrss also counts what its parent held when it was started."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def trl_trainer(stock, tokenizer, pairs: list[Pair], args, bf16: bool):
    """A function that trains an epoch in TRL on the strings that are scored here: seconds of its steps."""
    try:
        from datasets import Dataset
        from trl import RewardConfig, RewardTrainer
    except ImportError:
        raise UserError("--peer trl needs TRL: pip install trl") from None

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.total += time.perf_counter() - self.began

    def epoch() -> float:
        clock.total = 0.0
        trainer.train()
        stock.train()
        return clock.total

    clock, text, folder = Clock(), Formatter(tokenizer).text, tempfile.TemporaryDirectory()
    clock.folder = folder  # lives as long as the trainer
    rows = [{"chosen": text(p.prompt, p.chosen), "rejected": text(p.prompt, p.rejected)} for p in pairs]
    config = RewardConfig(output_dir=folder.name, per_device_train_batch_size=args.batch_size,
                          num_train_epochs=1, learning_rate=1e-12, max_length=args.max_length or 1024,
                          report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
                          bf16=bf16, gradient_checkpointing=False, use_cpu=not torch.cuda.is_available())
    trainer = RewardTrainer(model=stock, args=config, processing_class=tokenizer, callbacks=[clock],
                            train_dataset=Dataset.from_list(rows))
    return epoch


def own_process(args, arm: str, **changes) -> dict:
    """One arm alone, a round, in a process of its own: what it really needs of memory. Raises UserError."""
    alone = argparse.Namespace(**{**vars(args), "arms": [arm], "rounds": 1, "run": None, **changes})
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        try:
            return process.submit(time_in_silence, alone).result()[arm]
        except BrokenProcessPool:
            raise UserError(f"arm {arm} {changes}: killed, probably for memory") from None
        except UserError as why:
            raise UserError(f"arm {arm} {changes}: {why}") from None


def time_in_silence(args) -> dict[str, dict]:
    """time_arms without a word. Raises UserError for any error: not every kind can be sent from process to process."""
    quiet()
    sys.stdout = open(os.devnull, "w")
    try:
        return time_arms(args)
    except Exception as why:
        raise UserError((str(why).strip() or type(why).__name__).splitlines()[-1].strip()) from None


def speed(args) -> None:
    """Training steps in several ways, interleaved in one process: pairs a second as ratios to the first of
    --arms.

    a, b, b': as most code does it; c: the packed tree mask; d: the whole method, teacher included; d': d where
    --cache-teacher has all maps; e: the naive way to get attention maps. tap and pool are c with a part of
    d: their differences say what each part costs. Data: --data, or random tokens (--lengths PROMPT CHOSEN
    REJECTED). --memory runs each arm again in a process of its own, --grow N... runs it at each total length
    instead (half of it prompt), or, where --lengths are given, at each batch size. The arm trl is TRL's own
    RewardTrainer, where TRL is installed (--peer trl adds it). Here --batch-size counts pairs, --max-length is
    1,024 unless given, and --dtype bf16 is autocast, as in training."""
    if not args.teacher or not (args.data or args.lengths or args.grow):
        raise UserError("speed needs --teacher, and --data, --lengths or --grow")
    if args.plot and not args.grow:
        raise UserError("speed draws what --grow measures: give --grow, or leave --plot out")
    if args.peer and args.peer not in args.arms:
        args.arms.append(args.peer)
    if args.shrink and args.shrink[0] % 8:
        raise UserError("--shrink HIDDEN must be a multiple of 8: four heads, each of an even size")
    if not 0 <= args.spread < 1:
        raise UserError("--spread must be from 0 to under 1")
    if "d'" in args.arms and args.align_max_tokens:
        raise UserError("the arm d' keeps whole maps: without --align-max-tokens")
    if "trl" in args.arms and (args.lengths or args.grow or not args.data):
        raise UserError("the arm trl reads text: give --data, and neither --lengths nor --grow")
    rows, cells, grown = {} if args.grow else time_arms(args), [], "pairs a batch" if args.lengths else "tokens a pair"
    for n in bar(args.grow or [], "sizes"):
        size = dict(batch_size=n, pairs=2 * n) if args.lengths else dict(lengths=[n // 2, n // 4, n // 4])
        for arm in args.arms:
            rows[f"{arm} {n}"] = {"arm": arm, grown.split()[0]: n, **own_process(args, arm, **size)}
    for arm in args.arms if args.memory and not args.grow else ():
        rows[arm]["peak_bytes"] = own_process(args, arm)["peak_bytes"]
    for k, r in rows.items():
        ratio = "" if args.grow else shown(r["ratio"], [min(r["ratios"]), max(r["ratios"])], ".2f")
        memory = f"{r['peak_bytes'] / 1e6:.0f} MB" if args.memory or args.grow else ""
        cells.append([f"{k}: {ARMS[k.split()[0]]}", f"{r['pairs_per_s']:.2f}", ratio,
                      shown(r["tokens_per_pair"], form=".0f"), shown(r["padding"], form=".0%"), memory])
    print_rows(["", "pairs/s", f"ratio to {args.arms[0]} [min, max]", "tokens a pair", "padding",
                "peak memory"], cells)
    device = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    save_json(args, {"arms": rows, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else device})
    if args.plot:
        panels = []
        for label, value in (("seconds a pair", lambda r: 1 / r["pairs_per_s"]),
                             ("peak memory, GB", lambda r: r["peak_bytes"] / 1e9)):
            curves = {f"{arm}: {ARMS[arm]}": (args.grow, [value(rows[f"{arm} {n}"]) for n in args.grow], None)
                      for arm in args.arms}
            panels.append(("", grown, label, curves))
        draw(args.plot, [panels], xscale="log", yscale="log")
