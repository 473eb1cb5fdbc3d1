#!/usr/bin/env python3
"""What a training step costs: several ways to train, timed against each other.

    M="--model models/smollm2-135m --teacher models/minilm-l6"
    python results/speed.py $M --data data/hh_helpful.train.jsonl.gz --trl    # pairs a second
    python results/speed.py $M --memory 512:16 2048:4 8192:1                  # peak memory

The ways ("arms"). Each makes whole steps: batch, forward, loss, backward, clipping, AdamW (at rate
0, so that all of them time the same weights):

    b    two padded rows a pair, batches in random order: as most code trains
    b'   the same rows, batches of pairs of about equal length
    c    one packed row a pair, batches of about equal length: plain BT of idistill.py
    d    the whole method of idistill.py: c, the teacher, both maps, the alignment losses
    e    d by output_attentions, which makes attention eager in every layer of both models
    trl  TRL's own RewardTrainer (pip install trl), on the batches of b

With --data the arms take turns in one process, round after round. A ratio compares the pairs a
second of an arm with those of the first arm in the same round; the table shows the median over the
rounds [least, most]. With --memory each arm makes two steps in a process of its own, and the second
is timed. On a CPU that has other work too, --cpu-seconds counts the seconds of this process alone;
give it one thread then (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import idistill
from data_prep import (
    Encoder,
    Example,
    Parser,
    UserError,
    bar,
    cut_runs,
    exit_codes,
    first_line,
    read_pairs,
    written,
)
from idistill import Config, InteractionTeacher, RewardModel

# ------------------------------------------------------------------------------ what all arms share


@dataclass
class Setting:
    """Models on their device, and the pairs."""

    student: RewardModel
    tokenizer: object
    teacher: InteractionTeacher
    examples: list[Example]
    device: torch.device
    amp: object
    clock: object  # () -> seconds

    def teacher_rows(self, part: list[Example]) -> dict[str, Tensor]:
        """The batch that the teacher reads."""
        swap = np.zeros(len(part), dtype=bool)
        return idistill.teacher_batch(part, swap, self.teacher.tokenizer, self.device)

    def student_rows(self, part: list[Example]) -> dict[str, Tensor]:
        """The packed batch."""
        return idistill.student_batch(part, idistill.pad_id_of(self.student.stock), self.device)


def set_up(args, examples_of) -> Setting:
    """Models as the flags say, and the pairs that examples_of(tokenizer, teacher) gives."""
    device, amp = idistill.set_up_device(Config(dtype=args.dtype, device=args.device))
    if args.shrink:
        stock, tokenizer = shrunk_student(args.model, *args.shrink)
    else:
        stock, tokenizer = idistill.load_student(args.model, args.seed)
    teacher = idistill.load_teacher(args.teacher, args.seed)
    examples = examples_of(tokenizer, teacher)
    stock.to(device).train()
    teacher.to(device).eval().requires_grad_(False)
    clock = time.process_time if args.cpu_seconds else time.perf_counter
    if device.type == "cuda":
        clock = gpu_clock
    return Setting(RewardModel(stock), tokenizer, teacher, examples, device, amp, clock)


def gpu_clock() -> float:
    """Seconds, once the GPU has done all that it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def shrunk_student(name: str, hidden: int, layers: int):
    """(a model of another's class at this size, with random weights; the other's tokenizer)."""
    tokenizer = idistill.load_tokenizer(name)
    config = idistill.load(transformers.AutoConfig, name, num_labels=1)
    idistill.choose_pad(tokenizer, config.vocab_size)
    size = dict(hidden_size=hidden, num_hidden_layers=layers, intermediate_size=4 * hidden)
    heads = dict(num_attention_heads=4, num_key_value_heads=4, head_dim=None, layer_types=None)
    other = dict(max_position_embeddings=2**15, pad_token_id=tokenizer.pad_token_id)
    small = type(config)(**{**config.to_dict(), **size, **heads, **other, "dtype": torch.float32})
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_config(small), tokenizer


# ----------------------------------------------------------------------------------------- the arms


def two_rows_a_pair(part: list[Example]) -> list[np.ndarray]:
    """Tokens of [x | y_c] of every pair, then of [x | y_r]."""
    return [e.ids[(e.seg == 0) | (e.seg == s)] for s in (1, 2) for e in part]


def two_row_loss(setting: Setting, part: list[Example]) -> Tensor:
    """b and b': 2B padded causal rows through the stock class -> (B,)."""
    stock, rows = setting.student.stock, two_rows_a_pair(part)
    ids = idistill.stack_rows(rows, idistill.pad_id_of(stock), setting.device)
    mask = idistill.stack_rows([np.ones(len(row)) for row in rows], 0, setting.device)
    out = stock(input_ids=ids, attention_mask=mask, use_cache=False)
    r_c, r_r = out.logits[:, 0].float().chunk(2)
    return idistill.bt_loss(r_c - r_r)


def packed_loss(setting: Setting, part: list[Example]) -> Tensor:
    """c: plain BT as idistill.py trains it -> (B,)."""
    rewards, _ = setting.student(setting.student_rows(part))
    return idistill.bt_loss(rewards[:, 0] - rewards[:, 1])


def method_loss(setting: Setting, part: list[Example]) -> Tensor:
    """d: interaction distillation as idistill.py trains it, last layer to last layer -> (B,)."""
    batches = setting.student_rows(part), setting.teacher_rows(part)
    last = (-1,), (-1,)
    read = idistill.interaction_maps(setting.student, setting.teacher, *batches, last)
    return idistill.total_loss(*read)["loss"]


def eager_loss(setting: Setting, part: list[Example]) -> Tensor:
    """e: both models give their maps by output_attentions -> (B,).

    The student's map is then the one under its own mask, which cannot be lifted there.
    """
    student, teacher = setting.student, setting.teacher
    batch, rows = setting.student_rows(part), setting.teacher_rows(part)
    visible = idistill.tree_mask(batch["seg"])
    added = torch.zeros_like(visible, dtype=torch.float32)  # eager attention adds its mask
    added = added.masked_fill(~visible, torch.finfo(torch.float32).min)
    inputs = dict(attention_mask=added, position_ids=batch["pos"], use_cache=False)
    out = student.stock.base_model(batch["ids"], **inputs, output_attentions=True)
    rewards = student.rewards_at(out.last_hidden_state, batch["last"])
    with torch.no_grad():
        read = teacher.stock(rows["ids"], attention_mask=rows["mask"], output_attentions=True)
    W = batch["word_seg"].shape[1]
    S = idistill.pool_words(out.attentions[-1].float().mean(1), batch["word"], W)
    T = idistill.pool_words(read.attentions[-1].float().mean(1), rows["word"], W)
    word_seg = batch["word_seg"].masked_fill(~idistill.seen_words(rows["word"], W), -1)
    return idistill.total_loss(rewards, [S], [T], word_seg, align_support="causal")["loss"]


ARMS = {
    "b": ("two rows a pair, random order", two_row_loss),
    "b'": ("two rows a pair, bucketed", two_row_loss),
    "c": ("packed row, bucketed: plain BT", packed_loss),
    "d": ("the whole method", method_loss),
    "e": ("d by output_attentions", eager_loss),
    "trl": ("TRL's RewardTrainer", None),
}
TWO_ROWS, RANDOM_ORDER = ("b", "b'", "trl"), ("b", "trl")


def train(setting: Setting, arm: str, batches: list[np.ndarray], optimizer) -> float:
    """Seconds that an arm needs to train on these batches (indices of the pairs)."""
    loss_of, models = ARMS[arm][1], (setting.student.stock, setting.teacher.stock)
    before = [model.config._attn_implementation for model in models]
    if arm == "e":
        for model in models:
            model.set_attn_implementation("eager")
    started = setting.clock()
    for index in batches:
        with setting.amp():
            loss = loss_of(setting, [setting.examples[i] for i in index]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(setting.student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = setting.clock() - started
    for model, implementation in zip(models, before):
        model.set_attn_implementation(implementation)
    return seconds


class Clock(transformers.TrainerCallback):
    """Adds up the seconds of a Trainer's steps, without the loading of data."""

    def __init__(self, clock):
        self.clock, self.seconds = clock, 0.0

    def on_step_begin(self, *_, **__):
        self.began = self.clock()

    def on_step_end(self, *_, **__):
        self.seconds += self.clock() - self.began


def train_in_trl(setting: Setting, batches: list[np.ndarray]) -> float:
    """Seconds of TRL's steps on the same tokens in the same batches."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = [two_rows_a_pair([setting.examples[i]]) for index in batches for i in index]
    data = [{"chosen_ids": c.tolist(), "rejected_ids": r.tolist()} for c, r in rows]
    clock = Clock(setting.clock)
    silent = dict(report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        config = RewardConfig(
            output_dir=folder,
            per_device_train_batch_size=len(batches[0]),
            train_sampling_strategy="sequential",
            num_train_epochs=1,
            learning_rate=1e-12,
            max_length=None,
            gradient_checkpointing=False,
            bf16=setting.amp is not contextlib.nullcontext,
            use_cpu=setting.device.type == "cpu",
            **silent,
        )
        trainer = RewardTrainer(
            model=setting.student.stock,
            args=config,
            processing_class=setting.tokenizer,
            train_dataset=Dataset.from_list(data),
            callbacks=[clock],
        )
        trainer.train()
        vars(setting.student.stock).pop("forward", None)  # accelerate's, with its autocast
    return clock.seconds


# ------------------------------------------------------------------------ pairs a second, in turns


def row_lengths(arm: str, example: Example) -> list[int]:
    """Tokens of each row that the arm makes of a pair."""
    n_x, n_c, n_r = np.bincount(example.seg, minlength=3).tolist()
    return [n_x + n_c, n_x + n_r] if arm in TWO_ROWS else [n_x + n_c + n_r]


def epoch_of(arm: str, examples: list[Example], batch_size: int, seed: int) -> list[np.ndarray]:
    """The arm's batches of one epoch, sorted from the shortest to the longest."""
    longest = np.array([max(row_lengths(arm, e)) for e in examples])
    if arm in RANDOM_ORDER:
        order = np.random.default_rng(seed).permutation(len(examples))
        plan = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    else:
        plan = idistill.plan_epoch(longest, batch_size, seed, 0)
    return sorted(plan, key=lambda index: longest[index].max())


def sample_of(plan: list, steps: int, rounds: int, k: int) -> list:
    """Round k: `steps` batches spread evenly over the sorted plan, others in each round.

    So a round costs a few steps, and all rounds together are padded as a whole epoch is.
    """
    steps = min(steps, len(plan))
    places = (np.arange(steps) + (k + 0.5) / rounds) * len(plan) / steps
    return [plan[int(place)] for place in places]


def padding_of(arm: str, examples: list[Example], batches: list) -> dict[str, float]:
    """Tokens a pair that are no padding, and the share of padding."""
    lengths = [[n for i in index for n in row_lengths(arm, examples[i])] for index in batches]
    tokens = sum(map(sum, lengths))
    slots = sum(max(rows) * len(rows) for rows in lengths)
    return {"tokens_per_pair": tokens / sum(map(len, batches)), "padding": 1 - tokens / slots}


def time_arms(args) -> dict[str, dict]:
    """All arms in turns: median pairs a second, and ratios to the first arm of the same round."""

    def examples_of(tokenizer, teacher):
        pairs, _ = read_pairs(args.data)
        encoder = Encoder(tokenizer, args.max_length, "drop", *idistill.reading_of(teacher))
        examples = encoder(pairs[: args.pairs], progress="encoding")
        return examples[: len(examples) // args.batch_size * args.batch_size]  # whole batches

    setting = set_up(args, examples_of)
    if not setting.examples:
        raise UserError("--data: fewer pairs than --batch-size fit into --max-length")
    optimizer = idistill.make_optimizer(setting.student, 0.0, 0.0)
    plans = {a: epoch_of(a, setting.examples, args.batch_size, args.seed) for a in args.arms}

    def seconds_of(arm: str, batches: list) -> float:
        if arm == "trl":
            return train_in_trl(setting, batches)
        return train(setting, arm, batches, optimizer)

    for arm in bar(args.arms, "warming up"):
        seconds_of(arm, plans[arm][:1])
    rates, batches_of = {arm: [] for arm in args.arms}, {arm: [] for arm in args.arms}
    for k in bar(range(args.rounds), "rounds"):
        for arm in args.arms:
            batches = sample_of(plans[arm], args.steps, args.rounds, k)
            rates[arm].append(sum(map(len, batches)) / seconds_of(arm, batches))
            batches_of[arm] += batches
    out = {}
    for arm in args.arms:
        ratios = np.divide(rates[arm], rates[args.arms[0]])
        out[arm] = {"pairs_per_s": float(np.median(rates[arm])), "ratio": float(np.median(ratios))}
        out[arm] |= {"rates": rates[arm], "ratios": ratios.tolist()}
        out[arm] |= padding_of(arm, setting.examples, batches_of[arm])
    return out


def print_times(arms: dict[str, dict], first: str) -> None:
    """A line an arm."""
    ratio = f"ratio to {first} [least, most]"
    print(f"{'':36}{'pairs/s':>8}{ratio:>28}{'tokens a pair':>15}{'padding':>9}")
    for arm, row in arms.items():
        name = f"{arm}: {ARMS[arm][0]}"
        spread = f"{row['ratio']:.2f} [{min(row['ratios']):.2f}, {max(row['ratios']):.2f}]"
        tokens, padding = row["tokens_per_pair"], row["padding"]
        print(f"{name:36}{row['pairs_per_s']:>8.2f}{spread:>28}{tokens:>15.0f}{padding:>9.0%}")


# ------------------------------------------------------------------ peak memory, process by process


def random_pairs(count: int, tokens: int, sizes: tuple[int, int]) -> list[Example]:
    """Pairs of random tokens: half prompt, a quarter each response, three words to four tokens.

    sizes: of the vocabularies of student and teacher.
    """
    rng = np.random.default_rng(0)
    seg = np.repeat([0, 1, 2], [tokens - 2 * (tokens // 4), tokens // 4, tokens // 4])
    word = np.arange(tokens) * 3 // 4
    word_seg = np.zeros(word[-1] + 1, dtype=int)
    word_seg[word] = seg
    examples = []
    for _ in range(count):
        ids = rng.integers(5, sizes[0], tokens)
        runs = [(rng.integers(5, sizes[1], sum(seg == s)), word[seg == s]) for s in (0, 1, 2)]
        examples.append(Example(ids, seg, word, word_seg, runs, texts=[], pair=None))
    return examples


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far, by the GPU, or by this process with its libraries."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss also counts what the parent held when it started this process
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def two_steps(args, arm: str, tokens: int, pairs: int) -> dict[str, float]:
    """Seconds of an arm's second step, and the peak memory of this process, which does no more."""
    idistill.quiet()

    def examples_of(tokenizer, teacher):
        return random_pairs(pairs, tokens, (len(tokenizer), len(teacher.tokenizer)))

    setting = set_up(args, examples_of)
    _, longest = idistill.reading_of(setting.teacher)
    for example in setting.examples:
        example.runs = cut_runs(example.runs, longest - 4)
    optimizer = idistill.make_optimizer(setting.student, 0.0, 0.0)
    seconds = [train(setting, arm, [np.arange(pairs)], optimizer) for _ in range(2)]
    return {"seconds": seconds[1], "peak_bytes": peak_memory(setting.device)}


def measure_memory(args) -> dict[str, dict]:
    """Every arm at every size, each in a process of its own."""
    out = {}
    for tokens, pairs in bar(args.memory, "sizes"):
        for arm in args.arms:
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                try:
                    row = process.submit(two_steps, args, arm, tokens, pairs).result()
                except RuntimeError as why:  # the process was killed, or torch found no memory
                    where = f"--memory {tokens}:{pairs}, arm {arm}"
                    raise UserError(f"{where}: {first_line(why)}") from None
            out[f"{arm} {tokens}"] = {"arm": arm, "tokens": tokens, "pairs": pairs, **row}
    return out


def print_memory(rows: dict[str, dict]) -> None:
    """A line a size and arm."""
    print(f"{'':36}{'tokens a pair':>14}{'pairs':>7}{'s a step':>10}{'peak, GB':>10}")
    for row in rows.values():
        name = f"{row['arm']}: {ARMS[row['arm']][0]}"
        cells = f"{row['seconds']:>10.2f}{row['peak_bytes'] / 1e9:>10.2f}"
        print(f"{name:36}{row['tokens']:>14}{row['pairs']:>7}{cells}")


# ------------------------------------------------------------------------------------ command line


def save_json(args, rows: dict) -> None:
    """Puts the rows under --name into the file --json; what is there under other names stays."""
    path, held = Path(args.json), idistill.read_rows(Path(args.json))
    device = f"{platform.machine()} CPU, threads: {torch.get_num_threads()}"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
    flags = {k: v for k, v in vars(args).items() if v and k not in ("json", "name")}
    held[args.name] = {"flags": flags, "device": device, "versions": versions, "arms": rows}
    with written(path) as f:
        json.dump(held, f, indent=1)


def size(text: str) -> tuple[int, int]:
    """'2048:4' -> (2048, 4): tokens a pair, pairs a step."""
    tokens, pairs = text.split(":")
    if int(tokens) < 4:
        raise ValueError
    return int(tokens), positive(pairs)


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="student: a decoder")
    add("--teacher", required=True, metavar="DIR", help="an encoder")
    add("--data", nargs="+", default=[], metavar="FILE", help="pairs to time the arms on")
    add("--memory", nargs="+", type=size, default=[], metavar="N:B", help="tokens, pairs a step")
    add("--arms", nargs="+", choices=ARMS, default=["b", "b'", "c", "d", "e"])
    add("--trl", action="store_true", help="add the arm trl")
    add("--shrink", nargs=2, type=int, metavar=("HIDDEN", "LAYERS"), help="a smaller --model")
    add("--batch-size", type=positive, default=16, help="pairs a step (default: 16)")
    add("--pairs", type=positive, default=1088, help="of --data (default: 1088, 68 steps)")
    add("--steps", type=positive, default=5, help="of each arm a round (default: 5)")
    add("--rounds", type=positive, default=5, help="default: 5")
    add("--max-length", type=positive, default=1024, help="of the pairs (default: 1024)")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto")
    add("--device", default="auto")
    add("--cpu-seconds", action="store_true", help="of this process, in place of the wall clock")
    add("--seed", type=int, default=0)
    add("--json", metavar="OUT", help="file that gets the rows, under --name")
    add("--name", default="speed", help="default: speed")
    return parser.parse_args(argv)


def check_args(args) -> None:
    """Raises UserError for flags that cannot work."""
    if bool(args.data) == bool(args.memory):
        raise UserError("give --data to time the arms, or --memory to measure what they hold")
    if args.trl and "trl" not in args.arms:
        args.arms.append("trl")
    if "trl" in args.arms:
        if args.memory:
            raise UserError("--memory does not measure the arm trl")
        try:
            import trl  # noqa: F401
        except ImportError:
            raise UserError("the arm trl needs TRL: pip install trl") from None
    if args.json:
        idistill.read_rows(Path(args.json))  # or UserError, before the timing
    if args.seed < 0:
        raise UserError("--seed must be at least 0")
    if args.shrink and (args.shrink[0] < 8 or args.shrink[0] % 8 or args.shrink[1] < 1):
        raise UserError("--shrink: HIDDEN is a multiple of 8 (four heads), LAYERS at least 1")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    idistill.quiet()
    with exit_codes():
        check_args(args)
        if args.memory:
            rows = measure_memory(args)
            print_memory(rows)
        else:
            rows = time_arms(args)
            print_times(rows, args.arms[0])
        if args.json:
            save_json(args, rows)


if __name__ == "__main__":
    main()
