#!/usr/bin/env python3
"""Preference pairs: reading, splitting, converting, and the generated language of the demo.

    python data_prep.py hh-rlhf --subsets helpful-base harmless-base --out data/hh.jsonl       # from the hub
    python data_prep.py hh-rlhf --input helpful.train.jsonl.gz --out data/hh.jsonl             # from local raw files
    python data_prep.py pairs.jsonl.gz more.jsonl --out data/mine.jsonl --val-fraction 0.1 --test-fraction 0.1
    python data_prep.py synthetic --pairs 12800 --agreement 0.9 --out data/synthetic.jsonl

A pair is one JSON line {"prompt": text or [{"role", "content"}, ...], "chosen": text, "rejected": text, and, if known,
"source", "subset", "id"}. Also read: whole conversations as chosen and rejected (message lists, as TRL and OpenRLHF
write them) and raw HH-RLHF dialogues ("\\n\\nHuman: ... \\n\\nAssistant: ...").

The generated language (a test bed for attention hacking): early content decides, a late cue tempts.
    prompt    0-3 fillers, a topic, 1-4 fillers                     "well fruit should maybe"
    response  0-3 fillers, an item, 8-16 fillers, a closing cue     "often apple quite ... really thanks"
The item of the chosen response is of the prompt's topic, that of the rejected response of another. The cue agrees
with the label in a share --agreement of the pairs: the chosen response then closes with the first cue and the
rejected one with the second; otherwise the cues are exchanged. Content is always right, the cue mostly: a model that
reads only the end scores 90 / 50 / 10 % where the agreement is 0.9 / 0.5 / 0.1.
"""
from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import re
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class UserError(Exception):
    """A mistake a person can mend: printed as one line, exit code 2, no traceback."""


class UnusablePair(ValueError):
    """A well-formed line that cannot serve as a pair (a tie, two different prompts): dropped and counted."""


# ---------------------------------------------------------------------------------------------------------- reading

@dataclass
class Pair:
    """One preference: chosen is better than rejected as the answer to prompt (messages with role and content)."""
    prompt: list[dict]
    chosen: str
    rejected: str
    source: str = ""
    subset: str = ""
    id: str = ""


def check_messages(messages, name: str) -> list[dict]:
    """Messages with exactly the fields role and content, or ValueError."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, list):
        raise ValueError(f"{name} is neither a text nor a list of messages")
    for m in messages:
        if not isinstance(m, dict) or not isinstance(m.get("content"), str):
            raise ValueError(f"{name} holds a message without a text as its content")
        if m.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"{name} holds the role {m.get('role')!r}; roles are system, user, assistant")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def split_dialogue(text: str) -> list[dict]:
    """A raw HH-RLHF dialogue, "\\n\\nHuman: ...\\n\\nAssistant: ...", as messages."""
    parts = re.split(r"\n\n(Human|Assistant):", text)
    if len(parts) < 3 or parts[0].strip():
        raise ValueError('there is no "prompt", and the text is no "\\n\\nHuman: ... \\n\\nAssistant: ..." dialogue')
    return [{"role": "user" if who == "Human" else "assistant", "content": said.strip()}
            for who, said in zip(parts[1::2], parts[2::2])]


def parse_pair(obj: dict) -> Pair:
    """One JSON object as a Pair. Forms: prompt + two texts; two whole conversations; raw HH-RLHF.

    Raises ValueError (malformed) or UnusablePair (well-formed, but of no use)."""
    if not isinstance(obj, dict):
        raise ValueError("the line is not a JSON object")
    for key in ("chosen", "rejected"):
        if obj.get(key) is None:
            raise ValueError(f'the field "{key}" is missing')
        if not isinstance(obj[key], (str, list)):
            raise ValueError(f'the field "{key}" is neither a text nor a list of messages')
    sides = [obj["chosen"], obj["rejected"]]
    prompt = check_messages(obj["prompt"], "prompt") if obj.get("prompt") is not None else None
    if isinstance(sides[0], str) and isinstance(sides[1], str) and prompt is None:
        sides = [split_dialogue(s) for s in sides]
    if isinstance(sides[0], list) != isinstance(sides[1], list):
        raise ValueError("one of chosen and rejected is a text, the other a list of messages")
    if isinstance(sides[0], list):
        convs = [check_messages(s, name) for s, name in zip(sides, ("chosen", "rejected"))]
        for conv, name in zip(convs, ("chosen", "rejected")):
            if not conv or conv[-1]["role"] != "assistant":
                raise UnusablePair(f"{name} does not end with the assistant")
        lead = [] if prompt is None else prompt  # TRL: prompt and conversations may both be given, apart or whole
        heads = [c[:-1] if c[:len(lead)] == lead else lead + c[:-1] for c in convs]
        if heads[0] != heads[1]:
            raise UnusablePair("the two prompts differ")
        prompt, sides = heads[0], [c[-1]["content"] for c in convs]
    for text, name in zip(sides, ("chosen", "rejected")):
        if not text.strip():
            raise UnusablePair(f"the {name} response is empty")
    if sides[0].strip() == sides[1].strip():
        raise UnusablePair("chosen equals rejected")
    extra = {k: str(obj[k]) for k in ("source", "subset", "id") if obj.get(k) is not None}
    try:
        "".join([m["content"] for m in prompt] + sides + list(extra.values())).encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half a surrogate pair, which is no character") from None
    return Pair(prompt, sides[0], sides[1], **extra)


def read_pairs(paths: list[str], skip_bad: bool = False) -> tuple[list[Pair], Counter]:
    """All pairs of some JSONL files, and counts: "pairs", "bad" (skip_bad), and each reason of UnusablePair.

    Raises UserError with file and line number."""
    pairs, counts = [], Counter()
    for path in paths:
        try:
            with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as f:
                for number, raw in enumerate(f, 1):
                    if not raw.strip():
                        continue
                    try:
                        pairs.append(parse_pair(json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))))
                    except UnusablePair as why:
                        counts[str(why)] += 1
                    except (ValueError, RecursionError) as why:  # JSON and UTF-8 errors are ValueErrors
                        if not skip_bad:
                            why = "not JSON" if isinstance(why, json.JSONDecodeError) else why
                            raise UserError(f"{path}, line {number}: {why}; mend the line, or let "
                                            "`python data_prep.py FILE --skip-bad` drop it") from None
                        counts["bad"] += 1
        except (OSError, EOFError, zlib.error) as why:
            raise UserError(f"{path}: cannot be read ({why})") from None
    counts["pairs"] = len(pairs)
    if not pairs:
        raise UserError(f"{', '.join(map(str, paths))}: no usable pair ({dict(counts)})")
    return pairs, counts


def prompt_key(prompt: list[dict]) -> float:
    """A hash of the prompt in [0, 1): equal prompts always fall into the same split."""
    text = json.dumps([[m["role"], m["content"].strip()] for m in prompt], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def carve(pairs: list[Pair], count: int) -> tuple[list[Pair], list[Pair]]:
    """(rest, carved): about `count` pairs with the smallest prompt hashes; no prompt falls on both sides."""
    keys = np.array([prompt_key(p.prompt) for p in pairs])
    bound = np.sort(keys)[min(count, len(pairs) - 1)]
    return [p for p, k in zip(pairs, keys) if k >= bound], [p for p, k in zip(pairs, keys) if k < bound]


# ---------------------------------------------------------------------------------------------------------- writing

def write_pairs(path: str | Path, pairs: list[Pair], overwrite: bool = False) -> None:
    """One JSON line a pair, gzipped where the name ends in .gz; written aside, then renamed. Raises UserError."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists; choose another --out, or --overwrite")
    aside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (gzip.open if path.name.endswith(".gz") else open)(aside, "wt", encoding="utf-8") as f:
            for p in pairs:
                single = len(p.prompt) == 1 and p.prompt[0]["role"] == "user"
                line = {"prompt": p.prompt[0]["content"] if single else p.prompt, "chosen": p.chosen, "rejected": p.rejected}
                line |= {k: getattr(p, k) for k in ("source", "subset", "id") if getattr(p, k)}
                f.write(json.dumps(line, ensure_ascii=False) + "\n")
        os.replace(aside, path)
    except OSError as why:
        raise UserError(f"{path}: cannot be written ({why.strerror})") from None


def split_pairs(pairs: list[Pair], val: float, test: float) -> dict[str, list[Pair]]:
    """Train, validation and test parts by the hash of the prompt: no prompt is in two of them."""
    parts: dict[str, list[Pair]] = {"": [], "val": [], "test": []}
    for p in pairs:
        key = prompt_key(p.prompt)
        parts["test" if key < test else "val" if key < test + val else ""].append(p)
    return parts


def download_hh(subsets: list[str], split: str) -> list[str]:
    """Raw HH-RLHF files from the hub (cached there). Raises UserError without a network."""
    from huggingface_hub import hf_hub_download
    try:
        return [hf_hub_download("Anthropic/hh-rlhf", f"{s}/{split}.jsonl.gz", repo_type="dataset") for s in subsets]
    except Exception as why:  # network, permission and missing-file errors of several libraries
        raise UserError(f"Anthropic/hh-rlhf cannot be fetched ({type(why).__name__}); download its {split}.jsonl.gz files "
                        "and give them as --input") from None


# -------------------------------------------------------------------------------------------- the generated language

TOPICS = {
    "fruit": "apple pear plum cherry mango peach grape lemon melon fig",
    "animals": "dog cat horse cow sheep goat lion tiger bear wolf",
    "colours": "red blue green yellow purple orange pink brown grey violet",
    "tools": "hammer saw drill wrench pliers chisel screwdriver axe shovel rake",
    "music": "violin piano guitar flute drum trumpet cello harp oboe banjo",
    "weather": "rain snow hail fog storm thunder breeze frost drizzle sleet",
    "sports": "football tennis golf hockey rugby cricket boxing rowing fencing judo",
    "clothes": "shirt trousers jacket scarf hat glove sock boot coat belt",
    "kitchen": "pan pot kettle spoon fork knife plate bowl cup whisk",
    "travel": "train bus plane ship bicycle tram ferry taxi truck canoe",
    "garden": "rose tulip daisy lily ivy fern moss hedge lawn shrub",
    "space": "moon star planet comet rocket orbit galaxy meteor nebula satellite"}
FILLERS = ("well often quite maybe really just also then there here some many such very rather indeed still even only once "
           "perhaps always sometimes usually mostly nearly about around over under again soon later early before after since "
           "while though yet else thus hence likely surely clearly simply fairly partly mainly truly kindly gladly sadly "
           "oddly rarely seldom twice anyway meanwhile").split()
CUES = ("thanks", "regards")


def language(topics: int, items: int, fillers: int) -> tuple[list[str], list[list[str]], list[str]]:
    """(topic words, items of each, fillers); words beyond the built-in ones are numbered, as topic13 or item13x4."""
    names = list(TOPICS)[:topics] + [f"topic{i}" for i in range(len(TOPICS), topics)]
    return (names, [(TOPICS.get(t, "").split() + [f"{t}item{k}" for k in range(len(TOPICS.get(t, "").split()), items)])[:items]
                    for t in names], FILLERS[:fillers] + [f"filler{i}" for i in range(len(FILLERS), fillers)])


def synthetic_vocabulary(topics: int = 12, items: int = 10, fillers: int = 60) -> list[str]:
    """Every word of the language, for a word-level tokenizer."""
    names, things, fill = language(topics, items, fillers)
    return [*names, *(w for t in things for w in t), *fill, *CUES]


def synthetic_pairs(n: int, agreement: float, seed: int, topics: int = 12, items: int = 10, fillers: int = 60,
                    shortest: int = 8, longest: int = 16) -> list[Pair]:
    """n pairs of the language above; subset says whether the cue goes with or against the label."""
    rng = np.random.default_rng([seed, 7])
    names, things, fill = language(topics, items, fillers)

    def some(low: int, high: int) -> list[str]:
        return [fill[i] for i in rng.integers(len(fill), size=rng.integers(low, high + 1))]

    pairs = []
    for k in range(n):
        right, wrong = rng.choice(topics, 2, replace=False)
        agrees = rng.random() < agreement
        prompt = some(0, 3) + [names[right]] + some(1, 4)
        sides = [some(0, 3) + [things[t][rng.integers(items)]] + some(shortest, longest) + [CUES[(side == 1) == agrees]]
                 for side, t in enumerate((right, wrong))]
        pairs.append(Pair([{"role": "user", "content": " ".join(prompt)}], *(" ".join(s) for s in sides), "synthetic",
                          "with the cue" if agrees else "against the cue", f"{seed}-{k}"))
    return pairs


# ------------------------------------------------------------------------------------------------------ command line

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("source", nargs="+", metavar="SOURCE", help="hh-rlhf, synthetic, or JSONL files, plain or .gz")
    ap.add_argument("--out", required=True, help="file to write; gzipped where it ends in .gz")
    ap.add_argument("--overwrite", action="store_true", help="replace --out where it exists")
    ap.add_argument("--skip-bad", action="store_true", help="count malformed lines instead of stopping at the first")
    ap.add_argument("--drop-duplicates", action="store_true", help="drop exact repetitions (counted either way)")
    ap.add_argument("--limit", type=int, default=0, help="write only the first N pairs (default: 0 = all)")
    ap.add_argument("--val-fraction", type=float, default=0.0, help="share for FILE.val.jsonl (default: 0)")
    ap.add_argument("--test-fraction", type=float, default=0.0, help="share for FILE.test.jsonl (default: 0)")
    hh = ap.add_argument_group("hh-rlhf")
    hh.add_argument("--subsets", nargs="+", default=["helpful-base", "harmless-base"], metavar="NAME",
                    help="folders of Anthropic/hh-rlhf on the hub (default: helpful-base harmless-base)")
    hh.add_argument("--hub-split", default="train", choices=["train", "test"], help="its split (default: train)")
    hh.add_argument("--input", nargs="+", metavar="FILE", help="local raw files instead of the hub")
    syn = ap.add_argument_group("synthetic")
    for name, default, text in (("pairs", 12_800, "number of pairs"), ("topics", 12, "topics"), ("items", 10, "items of each topic"),
                                ("fillers", 60, "filler words"), ("shortest", 8, "fewest fillers between item and cue"),
                                ("longest", 16, "most fillers between item and cue"), ("seed", 0, "seed")):
        syn.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    syn.add_argument("--agreement", type=float, default=0.9, help="share of pairs whose cue agrees with the label (default: 0.9)")
    return ap.parse_args(argv)


def convert(args: argparse.Namespace) -> None:
    """Reads or generates, counts, splits, writes. Raises UserError."""
    for name in ("val_fraction", "test_fraction", "agreement"):
        if not 0 <= getattr(args, name) <= 1 or args.val_fraction + args.test_fraction >= 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: shares lie in 0 to 1, and some must be left to train on")
    if args.limit < 0 or args.pairs < 1 or args.topics < 2 or args.items < 1 or args.fillers < 1 or not 0 <= args.shortest <= args.longest:
        raise UserError("sizes must be positive, --topics at least 2, and --shortest not over --longest")
    if args.source == ["synthetic"]:
        pairs, counts = synthetic_pairs(args.pairs, args.agreement, args.seed, args.topics, args.items, args.fillers,
                                        args.shortest, args.longest), Counter(pairs=args.pairs)
    else:
        hh = args.source == ["hh-rlhf"]
        pairs, counts = read_pairs((args.input or download_hh(args.subsets, args.hub_split)) if hh else args.source, args.skip_bad)
        for p in pairs:
            p.source = p.source or ("hh-rlhf" if hh else "")
    seen, unique = set(), []
    for p in pairs:
        key = json.dumps([p.prompt, p.chosen, p.rejected])
        if key not in seen:
            unique.append(p)
        seen.add(key)
    counts["duplicates"] = len(pairs) - len(unique)
    pairs = (unique if args.drop_duplicates else pairs)[:args.limit or None]
    parts, out = split_pairs(pairs, args.val_fraction, args.test_fraction), Path(args.out)
    stem, _, end = out.name.partition(".jsonl")
    files = {k: out.with_name(f"{stem}.{k}.jsonl{end}") if k else out for k in parts if parts[k] or not k}
    for path in files.values():  # all targets are checked before any is written
        if path.exists() and not args.overwrite:
            raise UserError(f"{path}: exists; choose another --out, or --overwrite")
    print("read: " + ", ".join(f"{v} {k}" for k, v in counts.items() if v or k == "pairs"))
    for k, path in files.items():
        write_pairs(path, parts[k], args.overwrite)
        print(f"wrote {len(parts[k])} pairs to {path}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        convert(args)
    except UserError as why:
        print(f"error: {why}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
