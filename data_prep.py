#!/usr/bin/env python3
"""What comes before the method: pairs (reading, splitting, converting, editing), text to tokens to batches, models loaded and
probed, the run directory, the generated language of the demo. On the command line it converts pairs:

    python data_prep.py hh-rlhf --subsets helpful-base harmless-base --out data/hh.jsonl       # from the hub
    python data_prep.py hh-rlhf --input helpful.train.jsonl.gz --out data/hh.jsonl             # from local raw files
    python data_prep.py pairs.jsonl.gz more.jsonl --out data/mine.jsonl --val-fraction 0.1 --test-fraction 0.1
    python data_prep.py rm-bench --input total_dataset.json --out data/rm-bench.jsonl  # a published benchmark
    python data_prep.py synthetic --pairs 12800 --agreement 0.9 --out data/synthetic.jsonl
    python data_prep.py synthetic --pairs 500 --responses 16 --agreement 0.1 --out data/candidates.jsonl   # for bestofn

A pair is one JSON line {"prompt": text or [{"role", "content"}, ...], "chosen": text, "rejected": text, and, if known,
"source", "subset", "id", "margin" (how much better, from 0) and "strength" (an ensemble's mean reward of chosen
minus that of rejected; eval.py writes it)}. Also read: whole conversations as chosen and rejected (message lists,
as TRL and OpenRLHF write them) and raw HH-RLHF dialogues ("\\n\\nHuman: ... \\n\\nAssistant: ...").

The generated language (a test bed for attention hacking): early content decides, a late cue tempts.
    prompt    0-3 fillers, a topic, 1-4 fillers                     "well fruit should maybe"
    response  0-3 fillers, an item, 8-16 fillers, a closing cue     "often apple quite ... really thanks"
The item of the chosen response is of the prompt's topic, that of the rejected response of another. The cue agrees
with the label in a share --agreement of the pairs: the chosen response then closes with the first cue and the
rejected one with the second; otherwise the cues are exchanged. Content is always right, the cue mostly: a model that
reads only the end scores 90 / 50 / 10 % where the agreement is 0.9 / 0.5 / 0.1.
With --responses N each prompt has N candidates instead, {"prompt", "responses", "gold"}: a quarter of them, at random,
name an item of the topic (gold 1, the others 0), and each cue agrees with its gold in a share --agreement.
"""
from __future__ import annotations

import argparse
import atexit
import dataclasses
import fcntl
import gzip
import hashlib
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import socket
import sys
import time
import warnings
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from threading import RLock
from weakref import WeakSet

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
import transformers  # noqa: E402  (after the setting above, which silences a fork warning)
from transformers import (AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification,  # noqa: E402
                          AutoTokenizer)

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
LONGEST_LINE = 4_000_000  # bytes: a context of a million tokens, and up to 2 GB of memory while it is tokenised
BARS: WeakSet = WeakSet()  # the progress bars of this process


class UserError(Exception):
    """A mistake a person can mend: printed as one line, exit code 2, no traceback."""


class UnusablePair(ValueError):
    """A well-formed line that cannot serve as a pair (a tie, two different prompts): dropped and counted."""


def bar(items, name: str, leave: bool = False, **kwargs) -> tqdm:
    """A progress bar, silent without a name and in all processes but the first; a log file needs few lines."""
    made = tqdm(items, desc=name[-40:], disable=not name or RANK > 0, leave=leave,
                mininterval=0.2 if sys.stderr.isatty() else 15.0, **kwargs)
    BARS.add(made)
    return made


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
    margin: float | None = None    # how much better chosen is, from 0
    strength: float | None = None  # an ensemble's mean r_c - r_r (arXiv 2401.06080, Eq. 4)


@dataclass
class Candidates:
    """Several responses to one prompt, each with its gold score: what best of n chooses from."""
    prompt: list[dict]
    responses: list[str]
    gold: list[float]
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


def check_characters(texts: list[str]) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half a surrogate pair, which is no character") from None


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
        heads = [c[:-1] if prompt is None else whole_prompt(prompt, c[:-1]) for c in convs]
        if heads[0] != heads[1]:
            raise UnusablePair("the two prompts differ")
        prompt, sides = heads[0], [c[-1]["content"] for c in convs]
    for text, name in zip(sides, ("chosen", "rejected")):
        if not text.strip():
            raise UnusablePair(f"the {name} response is empty")
    if sides[0].strip() == sides[1].strip():
        raise UnusablePair("chosen equals rejected")
    numbers = {k: parse_number(obj[k], k) for k in ("margin", "strength") if obj.get(k) is not None}
    if numbers.get("margin", 0) < 0:
        raise ValueError(f'the field "margin" must not be negative, is {numbers["margin"]}')
    extra = {k: str(obj[k]) for k in ("source", "subset", "id") if obj.get(k) is not None}
    check_characters([m["content"] for m in prompt] + sides + list(extra.values()))
    return Pair(prompt, sides[0], sides[1], **extra, **numbers)


def whole_prompt(prompt: list[dict], turns: list[dict]) -> list[dict]:
    """Where prompt and conversations are both given (TRL): the turns before the answer hold the prompt, or follow it.
    Raises UnusablePair where they do neither."""
    wanted, seen = ([(m["role"], m["content"].strip()) for m in some] for some in (prompt, turns))
    if any(seen[k:k + len(wanted)] == wanted for k in range(len(seen) + 1)):
        return turns
    if turns and turns[0]["role"] != "assistant" and prompt[-1]["role"] == "user":
        raise UnusablePair("the conversations do not hold the prompt")
    return prompt + turns


def parse_number(value, name: str) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30:  # NaN fails too
        raise ValueError(f'the field "{name}" is no finite number')
    return float(value)


def parse_candidates(obj: dict) -> Candidates:
    """{"prompt", "responses", "gold"}, or one good and several bad: {"prompt", "chosen", "rejected": [...]}, gold 1 and 0.

    Raises ValueError (malformed) or UnusablePair (well-formed, but of no use)."""
    if not isinstance(obj, dict) or obj.get("prompt") is None:
        raise ValueError('the line is not a JSON object with a "prompt"')
    if "responses" in obj:
        responses, gold = obj["responses"], obj.get("gold")
    else:
        bad = obj.get("rejected")
        responses = [obj.get("chosen"), *(bad if isinstance(bad, list) else [bad])]
        gold = [1.0] + [0.0] * (len(responses) - 1)
    if not isinstance(responses, list) or len(responses) < 2 or not all(isinstance(y, str) for y in responses):
        raise ValueError('there are no two texts in "responses", nor in "chosen" (a text) and "rejected" (a list of texts)')
    if not isinstance(gold, list):
        raise ValueError('"gold" is not a list of finite numbers')
    gold = [parse_number(g, "gold") for g in gold]
    if len(gold) != len(responses):
        raise ValueError(f"{len(responses)} responses have {len(gold)} gold scores")
    if not all(y.strip() for y in responses):
        raise UnusablePair("a response is empty")
    prompt, extra = check_messages(obj["prompt"], "prompt"), {k: str(obj[k]) for k in ("subset", "id") if obj.get(k) is not None}
    check_characters([m["content"] for m in prompt] + responses + list(extra.values()))
    return Candidates(prompt, responses, gold, **extra)


def read_candidates(paths: list[str]) -> tuple[list[Candidates], Counter]:
    """read_pairs for candidates; every prompt must have as many as the first."""
    sizes = []

    def parse(obj: dict) -> Candidates:
        found = parse_candidates(obj)
        sizes.append(len(found.responses))
        if sizes[-1] != sizes[0]:
            raise ValueError(f"{sizes[-1]} responses, the prompts before have {sizes[0]}")
        return found

    return read_pairs(paths, parse=parse)


def read_pairs(paths: list[str], skip_bad: bool = False, parse=parse_pair) -> tuple[list, Counter]:
    """All pairs of some JSONL files, and counts: "pairs", "bad" (skip_bad), and each reason of UnusablePair.

    Raises UserError with file and line number."""
    pairs, counts = [], Counter()
    for path in paths:
        number = 0
        try:
            with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as f:
                for number, raw in enumerate(f, 1):
                    if not raw.strip():
                        continue
                    try:
                        if len(raw) > LONGEST_LINE:
                            raise ValueError(f"{len(raw) / 1e6:.0f} MB, over {LONGEST_LINE / 1e6:.0f}")
                        pairs.append(parse(json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))))
                    except UnusablePair as why:
                        counts[str(why)] += 1
                    except (ValueError, RecursionError) as why:  # JSON and UTF-8 errors are ValueErrors
                        if not skip_bad:
                            why = "not JSON" if isinstance(why, json.JSONDecodeError) else why
                            drop = ", or let `python data_prep.py FILE --skip-bad` drop it" if parse is parse_pair else ""
                            raise UserError(f"{path}, line {number}: {why}; mend the line{drop}") from None
                        counts["bad"] += 1
        except (OSError, EOFError, zlib.error) as why:
            where = f", after line {number}" if number else ""
            raise UserError(f"{path}{where}: cannot be read ({why})") from None
    counts["pairs"] = len(pairs)
    if not pairs:
        noun = "pair" if parse is parse_pair else "prompt with candidates"
        raise nothing_usable(", ".join(map(str, paths)), noun, counts)
    return pairs, counts


def nothing_usable(name: str, noun: str, counts: Counter) -> UserError:
    left_out = ", ".join(f"{v} {k}" for k, v in counts.items() if v)
    return UserError(f"{name}: no usable {noun}" + (f"; left out: {left_out}" if left_out else ", it is empty"))


def prompt_key(prompt: list[dict], *more) -> float:
    """A hash of the prompt (and of more) in [0, 1): equal prompts always fall into the same split."""
    text = json.dumps([*([m["role"], m["content"].strip()] for m in prompt), *more], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def flip_labels(pairs: list[Pair], noise: float, seed: int, by_strength: bool) -> tuple[list[Pair], Counter]:
    """Some pairs with chosen and rejected exchanged, and counts: a share `noise` at random, drawn from the seed and
    the pair itself (order and other pairs do not matter); then, by_strength, those that an ensemble holds for
    mislabelled (strength < 0, arXiv 2401.06080, 2.4.1). A flip turns the sign of strength; margin stays."""
    out, counts = [], Counter()
    for p in pairs:
        noisy = prompt_key(p.prompt, p.chosen, p.rejected, seed) < noise
        strength = -p.strength if noisy and p.strength is not None else p.strength
        mistrusted = by_strength and strength < 0
        counts["labels flipped by --label-noise"] += noisy
        counts["labels flipped by --flip-negative-strength"] += mistrusted
        if noisy != mistrusted:  # flipped twice is as it was
            p = replace(p, chosen=p.rejected, rejected=p.chosen, strength=p.strength and -p.strength)
        out.append(p)
    return out, +counts  # without zeros


def carve(pairs: list[Pair], count: int) -> tuple[list[Pair], list[Pair]]:
    """(rest, carved): about `count` pairs with the smallest prompt hashes; no prompt falls on both sides."""
    keys = np.array([prompt_key(p.prompt) for p in pairs])
    bound = np.sort(keys)[min(count, len(pairs) - 1)]
    return [p for p, k in zip(pairs, keys) if k >= bound], [p for p, k in zip(pairs, keys) if k < bound]


# ---------------------------------------------------------------------------------------------------------- writing

def answers(p: Pair | Candidates) -> dict:
    """What a line holds beside its prompt."""
    return {k: getattr(p, k) for k in ("chosen", "rejected", "responses", "gold") if hasattr(p, k)}


def remove(path: Path) -> None:
    """Deletes a file or folder where it can: half of something, or what was replaced."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def write_pairs(path: str | Path, pairs: list, overwrite: bool = False) -> None:
    """One JSON line a pair (or prompt with candidates), gzipped where the name ends in .gz; written aside, then renamed. Raises UserError."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists; choose another --out, or --overwrite")
    aside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (gzip.open if path.name.endswith(".gz") else open)(aside, "wt", encoding="utf-8") as f:
            for p in pairs:
                single = len(p.prompt) == 1 and p.prompt[0]["role"] == "user"
                line = {"prompt": p.prompt[0]["content"] if single else p.prompt, **answers(p)}
                known = {k: getattr(p, k, "") for k in ("source", "subset", "id", "margin", "strength")}
                line |= {k: v for k, v in known.items() if v not in ("", None)}
                f.write(json.dumps(line, ensure_ascii=False) + "\n")
        os.replace(aside, path)
    except OSError as why:
        remove(aside)
        raise UserError(f"{path}: cannot be written ({why.strerror})") from None


def split_pairs(pairs: list, val: float, test: float) -> dict[str, list]:
    """Train, validation and test parts by the hash of the prompt: no prompt is in two of them."""
    parts: dict[str, list] = {"": [], "val": [], "test": []}
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


# -------------------------------------------------------------------------------------------- from text to tokens

class Formatter:
    """The one place that builds the string that is scored, for training, evaluation and users.

    Chat template where the tokenizer has one, else "User: ...\\n\\nAssistant: ..."; always ends in the end token
    (a missing one flips rewards: MOSS-RLHF #21); BOS is the template's affair, without one the tokenizer's. The string is
    tokenised with add_special_tokens=False, so there is never a second BOS. What would end a turn or start
    another is defused inside the contents by a space after its first character ("< |im_end|>").

    Raises UserError for a tokenizer without end token, or a template that loses messages."""

    def __init__(self, tokenizer, counts: Counter | None = None):
        bos, self.eos = tokenizer.bos_token or tokenizer.cls_token, tokenizer.eos_token or tokenizer.sep_token  # [CLS], [SEP]: BERT's
        if self.eos is None:
            raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no end token (eos_token); set one in its "
                            "tokenizer_config.json")
        self.tokenizer, self.cache = tokenizer, {}
        self.bos = bos if bos and tokenizer("a")["input_ids"][:1] == tokenizer.convert_tokens_to_ids([bos]) else ""
        self.counts = Counter() if counts is None else counts
        control = self.control_strings()
        self.control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or r"(?!)")

    def control_strings(self) -> set[str]:
        """Special tokens, other added tokens that the template writes, and the text it puts between turns."""
        pieces, between, special = [], set(), set(self.tokenizer.all_special_tokens)
        for roles in (("user", "assistant", "user", "assistant"), ("user", "system", "assistant")):
            try:
                pieces += self.markup(roles)
                marks = self.markup(roles)[1:-1]
                between |= {p for p in marks if re.search(r"\w", p)}
                # "</s><s>[INST]": a text could hold [INST] alone ("assistant" alone is only a word)
                between |= {m for p in marks for m in re.split("|".join(map(re.escape, special)) or r"(?!)", p)
                            if re.fullmatch(r"\s*[\[<{|].*\w.*[\]>}|]\s*", m)}
            except UserError:  # a template may refuse some roles; it is asked again for those of the data
                pass
        added = {t.content for t in self.tokenizer.added_tokens_decoder.values()
                 if t.special or any(t.content in p for p in pieces)} | special
        return {t for t in added | {b.strip(" ") for b in between} if len(t) > 1}

    def clean(self, text: str) -> str:
        """Stripped, and with control strings defused (counted)."""
        text = text.strip()
        while self.control.search(text):
            text, count = self.control.subn(lambda m: m[0][0] + " " + m[0][1:], text)
            self.counts["defused control tokens"] += count
        return text

    def markup(self, roles: tuple[str, ...]) -> list[str]:
        """The literal text before, between and after the contents: len(roles) + 1 pieces."""
        if roles not in self.cache:
            marks = [f"\ue000{i}\ue001" for i in range(len(roles))]  # private-use characters that no template has
            if self.tokenizer.chat_template:
                messages = [{"role": r, "content": m} for r, m in zip(roles, marks)]
                try:
                    text = self.tokenizer.apply_chat_template(messages, tokenize=False)
                except Exception as why:  # a template raises what it likes
                    raise UserError(f"{self.tokenizer.name_or_path}: its chat template refuses the roles "
                                    f"{', '.join(roles)} ({why})") from None
            else:
                names = {"system": "System", "user": "User", "assistant": "Assistant"}
                text = self.bos + "\n\n".join(f"{names[r]}: {m}" for r, m in zip(roles, marks))
            pieces = re.split("\ue000\\d+\ue001", text)
            if re.findall("\ue000\\d+\ue001", text) != marks:
                raise UserError(f"{self.tokenizer.name_or_path}: its chat template loses or repeats messages of "
                                f"the roles {', '.join(roles)}")
            tail = pieces[-1].rstrip()
            pieces[-1] = tail if tail.endswith(self.eos) else tail + self.eos
            self.cache[roles] = pieces
        return self.cache[roles]

    def text(self, prompt: str | list[dict], response: str | list[dict]) -> str:
        """For users: prompt (text or messages), response (text or one message in a list) -> the string to tokenise with
        add_special_tokens=False and to score."""
        response = response if isinstance(response, str) else response[-1]["content"]
        return self([{**m, "content": self.clean(m["content"])} for m in check_messages(prompt, "prompt")], self.clean(response))[0]

    def __call__(self, prompt: list[dict], response: str) -> tuple[str, list[int]]:
        """Cleaned contents -> (the string that is scored, where each content starts in it)."""
        contents = [m["content"] for m in prompt] + [response]
        pieces = self.markup(tuple(m["role"] for m in prompt) + ("assistant",))
        text, starts = pieces[0], []
        for content, piece in zip(contents, pieces[1:]):
            starts.append(len(text))
            text += content + piece
        return text, starts


CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
WORD = re.compile(rf"[{CJK}]|[^\s{CJK}]+")  # words are our choice: runs without white space, single CJK characters


def words_of(text: str) -> np.ndarray:
    """Start and end of each word, (W, 2)."""
    return np.array([m.span() for m in WORD.finditer(text)], dtype=np.int64).reshape(-1, 2)


def tokens_to_words(offsets: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """For tokens with character offsets (n, 2) the index of the first word (W, 2) each touches, -1 for none."""
    if not len(spans) or not len(offsets):
        return np.full(len(offsets), -1)
    first = np.searchsorted(spans[:, 1], offsets[:, 0], side="right")  # first word that ends after the token starts
    inside = spans[np.minimum(first, len(spans) - 1), 0] < offsets[:, 1]
    return np.where((first < len(spans)) & inside & (offsets[:, 1] > offsets[:, 0]), first, -1)


@dataclass
class Example:
    """One pair, encoded. Student: packed layout u; teacher: three token runs that either order can join."""
    ids: np.ndarray       # (n,) tokens of [x | y_c | y_r]
    seg: np.ndarray       # (n,) 0 = x, 1 = y_c, 2 = y_r
    word: np.ndarray      # (n,) word of each token, -1 = markup
    word_seg: np.ndarray  # (W,) segment of each word, -1 = a word that one of the models does not see
    runs: list            # teacher: [(ids, word)] of x, y_c, y_r; empty without a teacher
    pair: Pair            # as read


REFUSED = "with roles that the chat template refuses"


class Encoder:
    """Pairs -> Examples, with the counts of what was cut, dropped or defused."""

    def __init__(self, tokenizer, max_length: int, overlong: str, teacher_tokenizer=None, teacher_length: int = 512):
        self.counts = Counter()
        self.formatter, self.tokenizer = Formatter(tokenizer, self.counts), tokenizer
        self.max_length, self.overlong = max_length, overlong
        self.teacher, self.teacher_length = teacher_tokenizer, teacher_length

    def tokenise(self, tokenizer, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids (n,), offsets (n, 2)) of each text, all in one parallel call."""
        if not texts:
            return []
        enc = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False,
                        return_token_type_ids=False, verbose=False)
        return [(np.array(i, dtype=np.int64), np.array(o, dtype=np.int64).reshape(-1, 2))
                for i, o in zip(enc["input_ids"], enc["offset_mapping"])]

    def shorten(self, prompt: list[dict], sides: list[str]):
        """Cuts the oldest of the prompt until both sequences fit; None if a response cannot."""
        prompt = [dict(m) for m in prompt]
        while True:
            texts, starts = zip(*(self.formatter(prompt, y) for y in sides))
            tokens = self.tokenise(self.tokenizer, list(texts))
            longest = max(range(len(sides)), key=lambda k: len(tokens[k][0]))
            excess = len(tokens[longest][0]) - self.max_length
            if excess <= 0:
                return prompt, tokens, starts
            filled = [i for i, m in enumerate(prompt) if m["content"]]
            if not filled:
                return None
            target = next((i for i in filled if prompt[i]["role"] != "system"), filled[0])  # the system text goes last
            first = next((i for i, m in enumerate(prompt) if m["role"] != "system"), target)
            later = next((i for i, m in enumerate(prompt) if m["role"] == "user" and i > target), None)
            begin = starts[longest][target]
            offsets = tokens[longest][1]
            inside = np.flatnonzero((offsets[:, 0] >= begin) & (offsets[:, 0] < begin + len(prompt[target]["content"])))
            if len(inside) <= excess and later is not None and target >= first:
                del prompt[first:later]  # the whole oldest turn goes, its markup too
                continue
            cut = offsets[inside[excess], 0] - begin if len(inside) > excess else len(prompt[target]["content"])
            prompt[target]["content"] = prompt[target]["content"][max(cut, 1):].lstrip()

    def fit(self, items: list, responses, progress: str = "", chunk: int = 1024):
        """Yields chunks of [(item, prompt, sides, tokens, starts) or None], one entry an item: its cleaned prompt and the k
        texts of responses(item), the (ids (n,), offsets (n, 2)) of the k sequences, where their contents start.

        Overlong items are cut, dropped (None) or raise UserError, as asked; items whose roles the chat template refuses are
        dropped, and raise it where none is left; all counted."""
        refused, left, clean = None, 0, self.formatter.clean
        for start in bar(range(0, len(items), chunk), progress):
            todo, built, fitted = [], [], []
            for item in items[start:start + chunk]:
                prompt = [{**m, "content": clean(m["content"])} for m in item.prompt]
                sides, first = [clean(y) for y in responses(item)], len(built)
                try:
                    built += [self.formatter(prompt, y) for y in sides]
                except UserError as why:
                    refused = why
                    self.counts[REFUSED] += 1
                todo.append((item, prompt, sides, slice(first, len(built))))
            tokens = self.tokenise(self.tokenizer, [text for text, _ in built])
            for number, (item, prompt, sides, own) in enumerate(todo, start + 1):
                parts, starts = tokens[own], [at for _, at in built[own]]
                longest = max((len(ids) for ids, _ in parts), default=0)
                if longest > self.max_length:
                    if self.overlong == "error":
                        raise UserError(f"pair {item.id or number} has {longest} tokens, over "
                                        f"--max-length {self.max_length}; raise it, or use --overlong truncate or drop")
                    cut = self.shorten(prompt, sides) if self.overlong == "truncate" else None
                    self.counts["truncated" if cut else "dropped"] += 1
                    prompt, parts, starts = cut or (prompt, [], [])
                fitted.append((item, prompt, sides, parts, starts) if parts else None)
                left += bool(parts)
            yield fitted
        if refused and not left:
            raise refused

    def __call__(self, pairs: list[Pair], progress: str = "") -> list[Example]:
        """The Examples of the pairs that fit, see fit. Raises UserError."""
        return [example for some in self.fit(pairs, lambda p: [p.chosen, p.rejected], progress)
                for example in self.pack([kept for kept in some if kept])]

    def pack(self, kept: list) -> list[Example]:
        """Packed layout and words of each pair; the teacher's runs where there is a teacher."""
        out, flat = [], []
        for pair, prompt, sides, two, starts in kept:
            contents = [m["content"] for m in prompt]
            spans = [words_of(c) for c in contents]
            P, C, R = sum(map(len, spans)), *(words_of(y) for y in sides)
            words = []
            for (ids, offsets), at, y in zip(two, starts, (C, R)):
                placed = np.concatenate([s + a for s, a in zip(spans + [y], at)])
                words.append(tokens_to_words(offsets, placed))
            (ids_c, off_c), (ids_r, off_r) = two
            inside = min(int((off[:, 1] <= at[-1]).argmin()) if (off[:, 1] > at[-1]).any() else len(off)
                         for off, at in zip((off_c, off_r), starts))
            differ = np.flatnonzero(ids_c[:inside] != ids_r[:inside])
            nx = int(differ[0]) if len(differ) else inside  # longest common token prefix inside the prompt
            shift = np.where(words[1] >= P, words[1] + len(C), words[1])  # words of y_r come after those of y_c
            seg = np.repeat([0, 1, 2], [nx, len(ids_c) - nx, len(ids_r) - nx])
            ex = Example(np.concatenate([ids_c, ids_r[nx:]]), seg, np.concatenate([words[0], shift[nx:]]),
                         np.repeat([0, 1, 2], [P, len(C), len(R)]), [], pair)
            ex.word_seg[np.setdiff1d(np.arange(len(ex.word_seg)), ex.word)] = -1
            out.append(ex)
            x, x_starts = "", []  # the teacher reads the same contents, its own role marks between several turns
            for m in prompt:
                x += ("\n" if x else "") + (m["role"].capitalize() + ": " if len(prompt) > 1 else "")
                x_starts.append(len(x))
                x += m["content"]
            x_words = np.concatenate([s + a for s, a in zip(spans, x_starts)] or [words_of("")])
            flat.append((x, sides, x_words, C, R, P))
        if self.teacher is not None and out:
            texts = [t for x, sides, *_ in flat for t in (x, *sides)]
            tokens = self.tokenise(self.teacher, texts)
            for k, (ex, (_, _, x_words, C, R, P)) in enumerate(zip(out, flat)):
                self.add_runs(ex, tokens[3 * k:3 * k + 3], (x_words, C, R), (0, P, P + len(C)))
        return out

    def add_runs(self, ex: Example, tokens: list, spans: tuple, first: tuple) -> None:
        """The teacher's tokens of x, y_c, y_r; if too long, the oldest of x goes, then the ends of the responses."""
        room = self.teacher_length - 4
        sizes = [len(ids) for ids, _ in tokens]
        keep_x = max(0, min(sizes[0], room - sizes[1] - sizes[2]))
        keep_c = min(sizes[1], max(room // 2, room - sizes[2]))
        keep_r = min(sizes[2], room - keep_c)
        self.counts["pairs cut for the teacher"] += keep_x + keep_c + keep_r < sum(sizes)
        cuts = (slice(sizes[0] - keep_x, None), slice(keep_c), slice(keep_r))
        special = np.array([i for i in self.teacher.all_special_ids if i != self.teacher.unk_token_id])
        spare = (self.teacher.unk_token_id, self.teacher.mask_token_id)
        harmless = next((i for i in spare if i is not None), 0)
        seen = np.zeros(len(ex.word_seg), dtype=bool)
        for (ids, offsets), words, base, cut in zip(tokens, spans, first, cuts):
            word = tokens_to_words(offsets, words)
            word = np.where(word >= 0, word + base, -1)
            kept = np.zeros(len(word), dtype=bool)
            kept[cut] = True
            seen[word[word >= 0]] = True
            seen[word[(word >= 0) & ~kept]] = False  # a word cut in two is dropped whole
            ids = np.where(np.isin(ids, special), harmless, ids)  # "[SEP]" typed by a user is no separator
            ex.runs.append((ids[cut], word[cut]))
        ex.word_seg[~seen] = -1
        self.counts["words the teacher cannot see"] += int((~seen).sum())


# ------------------------------------------------------------------------------------------- from pairs to batches

def collate(examples: list[Example], pad_id: int, device="cpu") -> dict[str, torch.Tensor]:
    """Examples -> one padded batch of the packed layout, padding on the right.

    ids, seg (3 = padding), word (-1 = none), pos: (B, n); last: (B, 2) where r_c and r_r are read; word_seg: (B, W)."""
    B, n = len(examples), max(len(e.ids) for e in examples)
    W = max(max(len(e.word_seg) for e in examples), 1)
    ids, seg = np.full((B, n), pad_id), np.full((B, n), 3)
    word, pos, word_seg = np.full((B, n), -1), np.zeros((B, n), dtype=np.int64), np.full((B, W), -1)
    last = np.zeros((B, 2), dtype=np.int64)
    for b, e in enumerate(examples):
        k, nx, nc = len(e.ids), int((e.seg == 0).sum()), int((e.seg == 1).sum())
        ids[b, :k], seg[b, :k], word[b, :k], word_seg[b, :len(e.word_seg)] = e.ids, e.seg, e.word, e.word_seg
        pos[b, :k] = np.concatenate([np.arange(nx + nc), np.arange(nx, k - nc)])  # y_r restarts at |x|
        last[b] = nx + nc - 1, k - 1
    return to_device(dict(ids=ids, seg=seg, word=word, pos=pos, word_seg=word_seg, last=last), device)


def collate_teacher(examples: list[Example], swap: np.ndarray, tokenizer, device="cpu") -> dict[str, torch.Tensor]:
    """[CLS] x [SEP] y_a [SEP] y_b [SEP] with (a, b) = (c, r), or (r, c) where swap (B,): ids, seg, word, mask (B, n),
    seg 3 = padding and special tokens."""
    cls = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    sep = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    rows = []
    for e, s in zip(examples, swap):
        parts = [([cls], [-1], [3])]
        for k in (0, 2, 1) if s else (0, 1, 2):
            ids, word = e.runs[k]
            parts += [(ids, word, [k] * len(ids)), ([sep], [-1], [3])]
        rows.append([np.concatenate([np.asarray(p[j], dtype=np.int64) for p in parts]) for j in range(3)])
    n, out = max(len(r[0]) for r in rows), {}
    for j, (name, fill) in enumerate((("ids", tokenizer.pad_token_id), ("word", -1), ("seg", 3))):
        out[name] = np.stack([np.pad(r[j], (0, n - len(r[j])), constant_values=fill) for r in rows])
    out["mask"] = np.stack([np.arange(n) < len(r[0]) for r in rows]).astype(np.int64)
    return to_device(out, device)


def to_device(batch: dict[str, np.ndarray], device) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v).to(device) for k, v in batch.items()}


def two_rows(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pairs of a packed batch as two ordinary padded rows each, B of (x, y_c), then B of (x, y_r): where (B, n) each
    packed token lies in them, source (2B, m) of each place, mask (2B, m): 1 where there is a token. See take."""
    seg, pos = batch["seg"], batch["pos"]
    B, m = len(seg), int(pos.max()) + 1
    pair = torch.arange(B, device=seg.device)[:, None]
    packed = torch.arange(seg.numel(), device=seg.device).view_as(seg)
    source, mask = seg.new_zeros(2 * B * m), seg.new_zeros(2 * B * m)
    for k, mine in ((0, seg < 2), (1, (seg == 0) | (seg == 2))):
        at = ((pair + k * B) * m + pos)[mine]
        source[at], mask[at] = packed[mine], 1
    return torch.where(seg == 2, pair + B, pair) * m + pos, source.view(2 * B, m), mask.view(2 * B, m)


def take(t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """t (B, n, ...), flat numbers (R, m) of its B n tokens -> (R, m, ...)."""
    return t.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


def sample_words(examples: list[Example], limit: int, seeds: list) -> torch.Tensor:
    """Words of each pair, drawn at random until their tokens number `limit`: (B, R) word numbers, -2 = padding. Longer
    words than that (texts without spaces) are left out."""
    drawn = [torch.full((1,), -2)]  # a pair may have none
    for e, seed in zip(examples, seeds):
        sizes = np.bincount(e.word[e.word >= 0], minlength=len(e.word_seg))
        order = np.random.default_rng(seed).permutation(np.flatnonzero((sizes > 0) & (sizes <= limit)))
        drawn.append(torch.from_numpy(np.sort(order[np.cumsum(sizes[order]) <= limit])))
    return torch.nn.utils.rnn.pad_sequence(drawn, batch_first=True, padding_value=-2)[1:]


def with_rows(batch: dict[str, torch.Tensor], attending: torch.Tensor) -> dict[str, torch.Tensor]:
    """The batch of either model, with the rows that belong to the attending words (B, R) alone: rows (B, m) tokens,
    row_word (B, m) places in attending; -1 = padding."""
    at = batch["word"][:, :, None] == attending[:, None, :]  # (B, n, R)
    picked = at.any(-1)
    order = picked.int().argsort(dim=1, descending=True, stable=True)[:, :max(1, int(picked.sum(1).max()))]
    real = picked.gather(1, order)
    return {**batch, "rows": order.where(real, -1), "row_word": at.int().argmax(-1).gather(1, order).where(real, -1)}


def plan_epoch(lengths: np.ndarray, batch_size: int, seed: int, epoch: int, window: int = 64) -> list[np.ndarray]:
    """Steps of one epoch as index arrays: shuffled, then bucketed by length inside windows of `window` steps (on HH-RLHF
    with 16 pairs: padding 58 % without, 22 % in windows of 8 steps, 5 % in 64)."""
    rng = np.random.default_rng([seed, epoch, 11])
    order, steps = rng.permutation(len(lengths)), []
    for start in range(0, len(order), batch_size * window):
        part = order[start:start + batch_size * window]
        part = part[np.argsort(lengths[part], kind="stable")]
        steps += [part[i:i + batch_size] for i in range(0, len(part), batch_size)]
    return [steps[i] for i in rng.permutation(len(steps))]


# --------------------------------------------------------------------------------- flags, device, data of a training run

class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are told in one line, exit code 2."""

    def error(self, message: str):
        self.exit(2, f"error: {message} (flags: {self.prog} --help)\n")


def flag(default, help, choices=None, low=0, high=math.inf):
    """A field of Config: default, help text, and the values it takes."""
    kind = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**kind, metadata={"help": help, "choices": choices, "low": low, "high": high})


def parse_flags(config: type, about: str, argv: list[str] | None = None):
    """The command line, made from the dataclass config; argparse exits with 2 on a wrong flag."""
    ap = Parser(description=about, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    for f in dataclasses.fields(config):
        default = getattr(config(), f.name)
        kw = {"action": "store_true"} if isinstance(default, bool) else {
            "default": default, "type": type(default), "choices": f.metadata["choices"]}
        if isinstance(default, list):
            kw = {"nargs": "+", "default": default}
        shown = "none" if default in ("", []) else default
        ap.add_argument("--" + f.name.replace("_", "-"), help=f"{f.metadata['help']} (default: {shown})", **kw)
    return config(**vars(ap.parse_args(argv)))


def check_config(cfg) -> bool:
    """Refuses flags that cannot work; returns whether a teacher is needed. Raises UserError."""
    for name in ("model", "data", "output_dir"):
        if not getattr(cfg, name):
            raise UserError(f"--{name.replace('_', '-')} is needed beside --model")
    for f in dataclasses.fields(cfg):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        if isinstance(value, (int, float)) and not (low <= value <= high and math.isfinite(value)):
            reach = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise UserError(f"--{f.name.replace('_', '-')} must be a finite number, {reach}, is {value}")
    if not cfg.epochs and not cfg.max_steps:
        raise UserError("--epochs 0 needs --max-steps")
    if cfg.batch_sum and (cfg.grad_accum > 1 or WORLD > 1):
        raise UserError("--batch-sum needs the whole batch at once: --grad-accum 1, one process")
    if cfg.teacher_co_train and WORLD > 1:
        raise UserError("--teacher-co-train runs in one process")
    if cfg.method == "bt":
        if cfg.lambda_score:
            raise UserError("--lambda-score needs --method id (the teacher's verdict alone: with --lambda-intra 0 --lambda-inter 0)")
        cfg.lambda_intra = cfg.lambda_inter = 0.0
    maps = cfg.lambda_intra > 0 or cfg.lambda_inter > 0
    needed = bool(cfg.lambda_score > 0 or (maps and cfg.align_target != "uniform"))
    if needed and not cfg.teacher:
        raise UserError("--teacher is needed: --method id reads its attention (plain Bradley-Terry: --method bt)")
    for name in ("teacher_co_train", "cache_teacher"):
        if getattr(cfg, name) and not needed:
            raise UserError(f"--{name.replace('_', '-')} needs a teacher, and these flags use none")
    if cfg.cache_teacher and (cfg.teacher_co_train or cfg.align_max_tokens):
        raise UserError("--cache-teacher keeps whole maps of a frozen teacher: without --teacher-co-train and --align-max-tokens")
    if cfg.cache_teacher:
        try:  # not check_outputs, which touches a file: all processes come here at once
            Path(cfg.cache_teacher).mkdir(parents=True, exist_ok=True)
            if not os.access(cfg.cache_teacher, os.W_OK):
                raise OSError(0, "cannot be written")
        except OSError as why:
            raise UserError(f"--cache-teacher {cfg.cache_teacher}: {why.strerror}") from None
    return needed


def parse_layers(spec: str, student: int, teacher: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """'last', 'middle', 'all' or 'S:T,S:T' -> layer numbers from 0 of student and teacher; 'all' pairs each teacher
    layer (without teacher: each layer) with the student's at the same relative depth. Raises UserError."""
    depth = teacher or student
    named = {"last": [(-1, -1)], "middle": [((student - 1) // 2, (depth - 1) // 2)],
             "all": [(math.ceil((t + 1) * student / depth) - 1, t) for t in range(depth)]}
    try:
        pairs = named.get(spec) or [tuple(map(int, p.split(":"))) for p in spec.split(",")]
        out = tuple(zip(*((s + student if s < 0 else s, t + depth if t < 0 else t) for s, t in pairs)))
        if not all(0 <= s < student for s in out[0]) or teacher and not all(0 <= t < teacher for t in out[1]):
            raise ValueError
    except ValueError:
        raise UserError(f"--align-layers {spec!r}: give last, middle, all, or student:teacher pairs such as "
                        f"'-1:-1,5:2', within {student} student and {teacher} teacher layers") from None
    return out


def set_up_device(cfg):
    """(device, amp): amp() is bf16 autocast, or nothing; auto takes bf16 where the hardware computes in it. Joins the
    other processes under torchrun. Raises UserError."""
    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if WORLD > 1 and name == "cuda" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as why:
        raise UserError(f"--device {name}: not usable here ({first_line(why)})") from None
    if WORLD > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
        atexit.register(dist.destroy_process_group)
    # bf16 on x86, in speeds of fp32 (measured): 0.6, with AVX512-BF16 1.6, with AMX 4
    units = platform.machine() not in ("x86_64", "AMD64") or any(
        getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile"))
    native = {"cuda": lambda: torch.cuda.is_bf16_supported(), "cpu": lambda: units and torch.backends.mkldnn.is_available()
              and torch.ops.mkldnn._is_mkldnn_bf16_supported()}
    bf16 = cfg.dtype == "bf16" or (cfg.dtype == "auto" and native.get(device.type, lambda: False)())
    return device, (lambda: torch.autocast(device.type, dtype=torch.bfloat16)) if bf16 else nullcontext


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The layers of a transformer, in order."""
    return max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)


def distribute(model: torch.nn.Module, device: torch.device, shard: bool, bf16: bool) -> None:
    """Under torchrun: gradients are averaged over the processes (shard: weights, gradients and optimizer are also split
    among them, FSDP2). One engine for both: without shard each process is a group of its own that holds all."""
    if WORLD == 1:
        return
    mesh = init_device_mesh(device.type, (1, WORLD) if shard else (WORLD, 1), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if shard and bf16 else None, reduce_dtype=torch.float32)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=shard)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)  # embeddings and head stay in fp32


def shares(examples: list[Example], batch_size: int, name: str):
    """Index arrays of this process's batches, longest first (too little memory shows at once), behind a bar. Every
    process has equally many, since a sharded model computes only together; some batches come twice."""
    order = np.argsort([-len(e.ids) for e in examples], kind="stable")
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    everyones = math.ceil(len(batches) / WORLD) * WORLD
    return bar([batches[k % len(batches)] for k in range(RANK, everyones, WORLD)], name)


def together(scores: np.ndarray, device) -> np.ndarray:
    """The scores of all processes; each filled in its share, -inf elsewhere."""
    if WORLD > 1:
        everything = torch.from_numpy(scores).to(device)
        dist.all_reduce(everything, dist.ReduceOp.MAX)
        scores = everything.cpu().numpy()
    return scores


def summed(values: dict[str, float], device) -> dict[str, float]:
    """Sums over all processes."""
    if WORLD > 1:
        everyones = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        dist.all_reduce(everyones)
        values = dict(zip(values, everyones.tolist()))
    return values


def whole_state(model: torch.nn.Module, optimizer=None) -> tuple[dict, dict]:
    """Weights and optimizer state by name, gathered from all processes to the first, on the CPU."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_state_dict(model, optimizer or (), options=options)


def barrier() -> None:
    if WORLD > 1:
        dist.barrier()


def quiet() -> None:
    """No chatter of transformers; tqdm without its lock between processes, which would outlive a killed one."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tqdm.set_lock(RLock())


@contextmanager
def exit_codes():
    """Ends a program as a shell expects: 2 and one line for a UserError, 130 for Ctrl-C, 141 for a closed pipe."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; without a pipe the flush at exit is quiet too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError as why:
        print(f"error: {why}", file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def errors_in_one_line(output_dir: str):
    """Around a training run: what a person can mend, or the death of another process, ends it with one line; only the
    first process speaks of what goes well."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # its outputs are never written to in place
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    with exit_codes():
        try:
            yield
        except UserError as why:
            if RANK == 0:
                raise
            time.sleep(5)  # torchrun ends this process in here, if the first one says the same
            raise UserError(f"{why} (process {RANK} of {WORLD})") from None
        except RuntimeError as why:  # another process died: this one must not wait for it
            if WORLD == 1:
                raise
            saved = any(Path(output_dir).glob("checkpoints/*.pt"))
            raise SystemExit(f"error: process {RANK} of {WORLD} cannot go on ({first_line(why)})" + (
                "; the last checkpoint is whole, go on with --resume" if saved else "; nothing was saved yet")) from None


def labelled(counts: Counter, name: str) -> dict[str, int]:
    return {f"{k} ({name})": v for k, v in counts.items() if k != "pairs"}


def unused_name(path: str, taken) -> str:
    """What a data file is called in tables: its name without ending, where that is taken the whole path, then numbered."""
    names = (Path(path).name.split(".jsonl")[0], str(path), *(f"{path} ({k})" for k in range(2, 2 + len(taken))))
    return next(name for name in names if name not in taken)


def read_all(cfg) -> tuple[list[Pair], dict[str, list[Pair]], Counter]:
    """(training pairs, {"validation": ..., each evaluation file: ...}, counts). A prompt that is both trained on and
    held out is a leak, and is said. Raises UserError."""
    pairs, counts = read_pairs(cfg.data)
    asked = [("strength", "--flip-negative-strength", cfg.flip_negative_strength),
             ("strength", "--preference-loss soft", cfg.preference_loss == "soft"),
             (cfg.margin_field, f"--margin-field {cfg.margin_field}", cfg.margin_field != "none")]
    for name, flag in ((name, flag) for name, flag, on in asked if on):
        missing = sum(getattr(p, name) is None for p in pairs)
        if missing:
            hint = " (eval.py accuracy MODEL... --strength OUT writes it)" if name == "strength" else ""
            raise UserError(f"{', '.join(cfg.data)}: {missing} of {len(pairs)} pairs lack the field {name} that "
                            f"{flag} needs{hint}")
    if cfg.val_data:
        val, more = read_pairs(cfg.val_data)
        counts.update(labelled(more, "validation"))
    else:
        pairs, val = carve(pairs, min(cfg.val_max, round(cfg.val_fraction * len(pairs))))
    if not val or not pairs:
        raise UserError(f"{len(pairs)} training and {len(val)} validation pairs: both are needed; give --val-data or "
                        "more pairs")
    if cfg.label_noise or cfg.flip_negative_strength:  # after carving: held-out labels stay as they are
        pairs, flips = flip_labels(pairs, cfg.label_noise, cfg.seed, cfg.flip_negative_strength)
        counts.update(flips)
    held = {"validation": val}
    for path in cfg.eval_data:
        name = unused_name(path, held)
        held[name], more = read_pairs([path])
        counts.update(labelled(more, name))
    seen = {prompt_key(p.prompt) for p in pairs}
    for name, part in held.items():
        shared = sum(prompt_key(p.prompt) in seen for p in part)
        if shared:
            print(f"warning: {shared} of {len(part)} pairs of {name} have a prompt that is also trained on")
    return pairs, held, counts


def read_files(args, read=read_pairs) -> dict[str, list]:
    """{file: its pairs (read_candidates: candidates)} of --data, --subset and --limit. Raises UserError."""
    files, subsets = {}, set()
    for path in args.data:
        pairs, counts = read([path])
        if left_out := [f"{v} ({k})" for k, v in counts.items() if k != "pairs" and v]:
            print(f"{path}: left out " + ", ".join(left_out))
        subsets |= {p.subset for p in pairs}
        pairs = [p for p in pairs if not args.subset or p.subset in args.subset]
        if 0 < args.limit < len(pairs):
            some = np.random.default_rng(args.seed).choice(len(pairs), args.limit, replace=False)
            pairs = [pairs[k] for k in np.sort(some)]
        if pairs:
            files[unused_name(path, files)] = pairs
    if unknown := set(args.subset) - subsets:
        raise UserError(f"--subset {' '.join(sorted(unknown))}: not in the data; there are: "
                        f"{', '.join(sorted(subsets - {''})) or 'none'}")
    return files


def encode_all(encoder: Encoder, pairs: list[Pair], held_pairs: dict[str, list[Pair]], counts: Counter):
    """(examples of the training pairs, {name: examples} of the held-out ones); the counts, completed, are printed. Raises
    UserError where nothing is left."""
    examples, held = encoder(pairs, progress="encoding"), {}
    counts.update(encoder.counts)
    for name, part in held_pairs.items():
        encoder.counts.clear()
        held[name] = encoder(part, progress=f"encoding {name}")
        counts.update(labelled(encoder.counts, name))
    for name, part in {"the training data": examples, **held}.items():
        if not part:
            raise UserError(f"{name}: no pair fits into --max-length {encoder.max_length}")
    counts.update({"training pairs": len(examples), **{f"pairs of {k}": len(v) for k, v in held.items()}})
    print("data: " + ", ".join(f"{v} {k}" for k, v in counts.items() if v))
    return examples, held


def longer_margins(pairs: list[Pair]) -> np.ndarray:
    """The length baseline: characters of chosen minus characters of rejected, (N,)."""
    return np.array([len(p.chosen.strip()) - len(p.rejected.strip()) for p in pairs])


# ------------------------------------------------------------------------------------------------ models at the door

def first_line(why: Exception) -> str:
    return (str(why).strip() or type(why).__name__).splitlines()[0]


def load(auto, name: str, **kwargs):
    """from_pretrained with the errors made readable; trust_remote_code stays off, weights are safetensors or
    weights_only. Raises UserError."""
    try:
        return auto.from_pretrained(name, trust_remote_code=False, **kwargs)
    except pickle.UnpicklingError:
        raise UserError(f"{name}: refused: its pickled weights hold more than tensors, which could run code; "
                        "use weights saved as safetensors") from None
    except Exception as why:  # the hub, the disk and every model class raise kinds of their own
        hint = "" if Path(name).is_dir() else (
            " (it is a file, a model is a directory or a hub id)" if Path(name).is_file() else
            " (no such local directory; as a hub id it could not be fetched)")
        raise UserError(f"{name}: cannot be loaded{hint}: {first_line(why)}") from None


def positions_of(model, name: str = "", max_length: int = 0) -> int:
    """The longest input of a model, in tokens (10**9: no limit). Raises UserError where max_length is over it."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    for part, table in model.named_modules():
        if part.endswith("position_embeddings") and getattr(table, "padding_idx", None) is not None:
            positions = min(positions, table.num_embeddings - table.padding_idx - 1)  # RoBERTa's kin count from pad + 1
    if max_length > positions:
        raise UserError(f"{name}: --max-length {max_length} is over the model's {positions} positions; use --max-length {positions}")
    return positions


def refuse_missing(name: str, model, keys: list[str]) -> None:
    if keys:
        raise UserError(f"{name}: its weights lack {len(keys)} tensors of {type(model).__name__}, {min(keys)} first; "
                        "they would be random")


def refuse_small_vocabulary(name: str, model, tokens: int) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if tokens > rows:
        raise UserError(f"{name}: the tokenizer has {tokens} tokens, the model only {rows} embeddings")


FIXED_DATE = "{%- macro strftime_now(form) -%}26 July 2024{%- endmacro -%}"  # or rewards would change from day to day


def load_tokenizer(name: str):
    """A tokenizer, checked to be one that can serve here."""
    files = [p.name for p in Path(name).iterdir()] if Path(name).is_dir() else ["tokenizer of the hub"]
    if not any(re.search("tok|vocab|merges|spiece|spm|sentencepiece", file) for file in files):
        raise UserError(f"{name}: holds no tokenizer; put its files there too (tokenizer.save_pretrained)")
    tokenizer = load(AutoTokenizer, name)
    if not tokenizer.is_fast:
        raise UserError(f"{name}: no fast tokenizer, and only those tell which characters a token covers")
    template = tokenizer.chat_template
    if isinstance(template, str) and "strftime_now" in template and FIXED_DATE not in template:
        tokenizer.chat_template = FIXED_DATE + template
    return tokenizer


def choose_pad(tokenizer) -> int:
    """A pad token that is not the end token: the stock class reads the reward at the right-most token that is not
    pad, so with pad = eos it would skip the end token. Any other token serves; a new one only if there is
    none. Returns the number of new ones."""
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        spare = [t for t in (tokenizer.unk_token, *tokenizer.all_special_tokens) if t and t != tokenizer.eos_token]
        if not spare:
            return tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        tokenizer.pad_token = spare[0]
    return 0


def load_student(name: str, seed: int = 0, max_length: int = 0, tied: bool = False):
    """(stock sequence-classification model with one label in fp32, tokenizer); a new head is seeded.

    Raises UserError for what is no decoder, cannot hold max_length tokens, or (tied) has an output head of its own."""
    tokenizer = load_tokenizer(name)
    config = load(AutoConfig, name, num_labels=1)
    text = config.get_text_config()
    caps = any(getattr(text, k, None) for k in ("final_logit_softcapping", "logit_scale", "logits_scaling"))
    if tied and (caps or not getattr(text, "tie_word_embeddings", False)):
        raise UserError(f"{name}: --lambda-sft needs a model whose output head is its input embedding")
    for key, value in text.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(text, key, 0.0)  # dropout off: noise in r would be noise in the margin
    added = choose_pad(tokenizer)
    torch.manual_seed(seed)  # before the load: a missing head is drawn in it
    model, info = load(AutoModelForSequenceClassification, name, config=config, dtype=torch.float32, output_loading_info=True)
    if not hasattr(model, "score"):
        raise UserError(f"{name}: {type(model).__name__} is no decoder reward model (an encoder serves as --teacher)")
    positions_of(model, name, max_length)
    refuse_missing(name, model, [k for k in info["missing_keys"] if not k.startswith("score")])
    if info["missing_keys"]:
        torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))  # arXiv 2009.01325
    refuse_small_vocabulary(name, model, len(tokenizer) - added)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = text.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def is_teacher(name: str) -> bool:
    """Whether what eval.py is to score is an interaction teacher, not a reward model, by its config alone. Raises UserError
    for what is neither."""
    if (Path(name) / "student" / "config.json").exists():
        raise UserError(f"{name}: is a run, not a model; give {name}/student (or {name}/teacher)")
    config = load(AutoConfig, name)
    kind = (getattr(config, "architectures", None) or ["a model without architecture"])[0]
    if not kind.endswith(("ForSequenceClassification", "ForTokenClassification")):
        raise UserError(f"{name}: {kind} has no reward head; a reward model is a sequence classifier with "
                        "one label (train one: python idistill.py --model ...)")
    if (labels := config.num_labels) != 1:
        raise UserError(f"{name}: {kind} has {labels} labels, a reward model or interaction teacher has 1")
    return kind.endswith("ForTokenClassification")


def load_reward_model(name: str, dtype: torch.dtype, max_length: int = 0):
    """(stock sequence-classification model, trained here or not, as it is; tokenizer; longest input). Raises UserError."""
    tokenizer = load_tokenizer(name)
    tokenizer.padding_side = "right"
    model, info = load(AutoModelForSequenceClassification, name, output_loading_info=True, dtype=dtype)
    refuse_missing(name, model, info["missing_keys"])
    positions = positions_of(model, name, max_length)
    return model, tokenizer, max_length or positions


@torch.no_grad()
def probe_student(model, name: str, max_length: int = 0) -> None:
    """Measures, on eight random tokens, that a RewardModel is causal and can do what --encoding asks (no list of names
    to keep up to date), and sets its tap, long and whole to what it can bear. Raises UserError with the flag to use."""
    if model.encoding == "packed":
        check_window(model.stock, max_length, name)
    if model.layers and getattr(model.stock.config.get_text_config(), "attn_logit_softcapping", None):  # Gemma 2
        raise UserError(f"{name}: caps its attention logits, so queries and keys alone do not give its map; use --method bt "
                        "--encoding siamese")
    stock, vocabulary = model.stock, model.stock.get_input_embeddings().num_embeddings
    device = stock.score.weight.device
    ids = torch.randint(vocabulary // 2, (1, 8), generator=torch.Generator().manual_seed(0)).to(device)
    seg = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]], device=device)
    batch = dict(ids=ids, seg=seg, pos=torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5]], device=device),
                 last=torch.tensor([[4, 7]], device=device))
    was, encoding = stock.training, model.encoding
    stock.eval()
    try:
        if model.tap is not None and not tap_changes_nothing(model, batch):  # attention sinks, say, are lost in it
            if model.layers:
                raise UserError(f"{name}: {type(stock).__name__} attends in a way that the tap does not keep; use --method bt")
            model.tap.remove()
            model.tap = None
        model.encoding = "siamese"
        try:
            apart = model(batch)
        except Exception as why:
            raise UserError(f"{name}: {type(stock).__name__} cannot be used as a student ({first_line(why)})") from None
        if not apart.isfinite().all():
            raise UserError(f"{name}: its rewards are not finite; the weights are damaged")
        other = dict(batch, ids=torch.where(torch.arange(8, device=device) == 4, (ids + 1) % (vocabulary // 2), ids))
        hidden = [stock.base_model(b["ids"][:, :5], use_cache=False).last_hidden_state[0, 2] for b in (batch, other)]
        if not torch.allclose(*hidden, atol=1e-4):
            raise UserError(f"{name}: {type(stock).__name__} is not causal: early tokens see late ones; an encoder serves as --teacher")
        if encoding == "packed":
            choose_shortcuts(model, batch, apart, name)
    finally:
        model.encoding = encoding
        stock.train(was)
    if model.layers:
        with torch.enable_grad():
            model(batch)  # the tap raises where the model hides its attention
        model.maps = []


def tap_changes_nothing(model, batch: dict[str, torch.Tensor]) -> bool:
    """Whether the last hidden state of two padded rows is the same under the tap's attention as under the model's own."""
    stock, seen = model.stock, []
    _, source, mask = two_rows(batch)
    tapped = stock.config._attn_implementation
    for implementation in (model.tap.before, tapped):
        stock.set_attn_implementation(implementation)
        try:
            seen.append(stock.base_model(take(batch["ids"], source), attention_mask=mask, use_cache=False).last_hidden_state)
        except ValueError:  # Gemma 2 caps its logits
            return False
    return torch.allclose(*seen, atol=1e-3, rtol=1e-3, equal_nan=True)


def choose_shortcuts(model, batch: dict[str, torch.Tensor], apart: torch.Tensor, name: str) -> None:
    """Tries the packed row with both shortcuts of RewardModel, with the final layer at two tokens, and whole; the first to
    give the rewards (1, 2) of two rows stands. Raises UserError where none does."""
    long, whole = model.long, model.whole
    model.encoding = "packed"
    for model.long, model.whole in ((0, whole), (math.inf, whole), (math.inf, True)):
        try:
            gap = (model(batch) - apart).abs().max().item()
        except Exception as why:
            gap = type(why).__name__
        if not isinstance(gap, str) and gap < 1e-3:
            model.long = max(model.long, long)
            return
    raise UserError(f"{name}: {type(model.stock).__name__} cannot take the tree mask (packed and separate scores differ: "
                    f"{gap}); use --encoding siamese")


def check_teacher(cfg, model, teacher) -> None:
    """Refuses a teacher (or none) that the flags or the student cannot go with. Raises UserError."""
    if cfg.teacher_co_train and teacher.layers and teacher.tap is None:
        raise UserError(f"--teacher-co-train: {cfg.teacher} shows its attention after dropout; take another teacher")
    heads = [m.stock.config.get_text_config().num_attention_heads for m in (model, teacher) if m]
    if cfg.align_heads == "matched" and teacher and teacher.layers and heads[0] != heads[1]:
        raise UserError(f"--align-heads matched: the student has {heads[0]} heads, the teacher {heads[1]}; use mean")


def check_window(model, max_length: int, name: str) -> None:
    """The tree mask takes the place of a sliding window: refused where the two could differ."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True) and {"full_attention"} != set(getattr(config, "layer_types", None) or [0])
    if window and used and max_length > window:
        raise UserError(f"{name}: attention is limited to {window} tokens, which the tree mask cannot express; use "
                        f"--max-length {window} or --encoding siamese")


def load_teacher(name: str, seed: int = 0):
    """(stock token-classification model with one label in fp32, tokenizer, longest input). Raises UserError."""
    tokenizer = load_tokenizer(name)
    config = load(AutoConfig, name, num_labels=1)
    torch.manual_seed(seed + 1)
    if type(config) not in transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        raise UserError(f"{name}: {config.model_type} has no token-classification class; a teacher is a bidirectional encoder")
    model, info = load(AutoModelForTokenClassification, name, config=config, dtype=torch.float32, output_loading_info=True)
    base = model.base_model_prefix + "."  # a missing head is new, and trained
    refuse_missing(name, model, [k for k in info["missing_keys"] if k.startswith(base)])
    refuse_small_vocabulary(name, model, len(tokenizer))
    for one, other in (("pad", "pad"), ("sep", "eos"), ("cls", "bos")):
        if getattr(tokenizer, one + "_token_id") is None and getattr(tokenizer, other + "_token_id") is None:
            raise UserError(f"{name}: the tokenizer has no {one} token; a teacher is a bidirectional encoder")
    ids = torch.arange(5, 13)[None]
    other = ids.clone()
    other[0, -1] += 1
    model.eval()
    with torch.no_grad():
        first = [model.base_model(i).last_hidden_state[0, 0] for i in (ids, other)]
    if not torch.stack(first).isfinite().all():
        raise UserError(f"{name}: its hidden states are not finite; the weights are damaged")
    if torch.equal(*first):
        raise UserError(f"{name}: {type(model).__name__} is causal: its early tokens never see late ones; a teacher "
                        "is a bidirectional encoder (BERT, RoBERTa, ModernBERT, DeBERTa ...)")
    return model, tokenizer, positions_of(model)


def recompute_activations(stock) -> None:
    """Gradient checkpointing; non-reentrant, which the tap works with."""
    enable = getattr(stock, "activation_checkpointing_enable", None) or stock.gradient_checkpointing_enable  # before v6
    enable({"use_reentrant": False})


def add_lora(stock, rank: int):
    """LoRA adapters (arXiv 2106.09685) on every linear map of the decoder, in place; they and the head learn. Returns
    the peft model around it. Raises UserError without peft."""
    try:
        from peft import LoraConfig, LoraModel
    except ImportError:
        raise UserError("--lora-rank needs peft: pip install peft") from None
    from transformers.pytorch_utils import Conv1D
    linear = {n.split(".")[-1] for n, m in stock.base_model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    transposed = any(isinstance(m, Conv1D) for m in stock.modules())  # GPT-2
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(linear), fan_in_fan_out=transposed)
    adapted = LoraModel(stock, config, "default")
    stock.score.requires_grad_(True)
    return adapted


def merge_lora(name: str, rank: int, weights: dict):
    """(stock model, its weights) with the adapters of `weights` merged into the model `name`."""
    with torch.random.fork_rng():  # a save must not turn the random numbers of training back
        stock, _ = load_student(name)
        adapted = add_lora(stock, rank)
    stock.load_state_dict(weights)
    merged = adapted.merge_and_unload()
    return merged, merged.state_dict()


# ------------------------------------------------------------------------------------------------- the run directory

@contextmanager
def written(path: str | Path, mode: str = "w"):
    """A file written aside, flushed to disk, renamed: a reader sees the old file or the new one, never half.
    Raises UserError where the disk refuses."""
    try:
        with open(f"{path}.tmp", mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)
        sync_folder(Path(path).parent)
    except (OSError, RuntimeError) as why:
        cause = why if isinstance(why, OSError) else why.__context__  # torch.save hides the error of the disk
        if not isinstance(cause, OSError):
            raise
        remove(Path(f"{path}.tmp"))
        raise UserError(f"{path}: cannot be written ({cause.strerror}); what was there is whole") from None


def sync_folder(folder: Path) -> None:
    """Flushes a rename to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_outputs(outputs: dict[str, str], inputs: dict[str, list[str]]) -> None:
    """Before the long work, of flags and the files that they name: what is to be written can be, no two are the same, and
    none is an input. Raises UserError."""
    taken = {Path(file).resolve(): f"read as --{flag}" for flag, files in inputs.items() for file in files}
    for flag, path in outputs.items():
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            if Path(path).is_dir():
                raise OSError(0, "is a directory")
            if not (aside := Path(f"{path}.tmp")).exists():
                aside.touch()
                aside.unlink()
        except OSError as why:
            raise UserError(f"--{flag} {path}: cannot be written ({why.strerror})") from None
        if how := taken.get(Path(path).resolve()):
            raise UserError(f"--{flag} {path}: is {how}; choose another file")
        taken[Path(path).resolve()] = f"written by --{flag} too"


class TeacherCache:
    """What a frozen teacher said of each pair, in folder/KEY/PAIR.npy, for further epochs and runs (--cache-teacher DIR).

    KEY: the teacher's weights, configuration, layers, heads and number format; PAIR: its tokens in the order read, and
    their words. A file holds the verdict and the word maps (L, G, W, W) as fp16, and they are used as such even when new:
    what is kept changes a run by rounding alone (of the batch in which a map was computed). Raises UserError (disk)."""

    def __init__(self, folder: str, teacher, bf16: bool):
        stock, tokenizer = teacher.stock, teacher.tokenizer
        config = {k: v for k, v in stock.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
        marks = [tokenizer.cls_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id]
        key = hashlib.sha256(repr((sorted(config.items(), key=str), teacher.layers, teacher.matched, bf16, marks)).encode())
        for name, weight in sorted(stock.state_dict().items()):
            key.update(name.encode() + weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self.folder, self.found, self.written = Path(folder) / key.hexdigest()[:16], 0, 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, e: Example, swap: bool) -> Path:
        """The file of a pair that is read in this order."""
        pair = hashlib.sha256(repr((bool(swap), len(e.word_seg), [len(ids) for ids, _ in e.runs])).encode())
        for ids, word in e.runs:
            pair.update(ids.tobytes() + word.tobytes())
        return self.folder / f"{pair.hexdigest()[:32]}.npy"

    def read(self, teacher, examples: list[Example], swap: np.ndarray, W: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """As InteractionTeacher.read: verdict (B,), word maps (B, G, W, W) of each layer."""
        device, G = teacher.stock.device, teacher.stock.config.num_attention_heads if teacher.matched else 1
        sizes = [1 + len(teacher.layers) * G * len(e.word_seg) ** 2 for e in examples]
        kept = [self.load(self.path(e, s), size) for e, s, size in zip(examples, swap, sizes)]
        missing = [b for b, one in enumerate(kept) if one is None]
        self.found += len(kept) - len(missing)
        if summed({"missing": len(missing)}, device)["missing"]:  # a sharded teacher computes only in all processes together
            lacking = missing or [0]
            some = [examples[b] for b in lacking]
            verdict, maps = teacher.read(some, swap[lacking], W, fresh=True)
            for k, b in enumerate(lacking):
                n = len(examples[b].word_seg)
                of_pair = [verdict[k:k + 1], *(T[k, :, :n, :n].flatten() for T in maps)]
                kept[b] = torch.cat(of_pair).half().cpu().numpy()
                if b in missing:
                    self.keep(self.path(examples[b], swap[b]), kept[b])
        T = np.zeros((len(teacher.layers), len(examples), G, W, W), dtype=np.float16)
        for b, (e, one) in enumerate(zip(examples, kept)):
            n = len(e.word_seg)
            T[:, b, :, :n, :n] = one[1:].reshape(len(T), G, n, n)
        verdict = torch.from_numpy(np.array([one[0] for one in kept], dtype=np.float32)).to(device)
        return verdict, list(torch.from_numpy(T).to(device).float())

    @staticmethod
    def load(path: Path, size: int) -> np.ndarray | None:
        """The numbers in the file; None without one, or where it is damaged."""
        try:
            values = np.load(path)
            return values if values.shape == (size,) else None
        except (OSError, ValueError, EOFError):
            return None

    def keep(self, path: Path, values: np.ndarray) -> None:
        """Written aside, then renamed: other runs may read and write here."""
        aside = path.with_suffix(f".{RANK}.{os.getpid()}.tmp")
        try:
            with open(aside, "wb") as f:
                np.save(f, values)
            os.replace(aside, path)
        except OSError as why:
            remove(aside)
            raise UserError(f"--cache-teacher: {path} cannot be written ({why.strerror}); what was saved before is whole") from None
        self.written += 1

    def report(self, device) -> None:
        """Says how often the teacher was spared."""
        found, written = map(int, summed({"found": self.found, "written": self.written}, device).values())
        if RANK == 0:
            print(f"maps of the teacher: {found} read from {self.folder}, {written} computed and kept there")


def write_json(path: str | Path, obj) -> None:
    with written(path) as f:
        json.dump(obj, f, indent=1)


def save_stock(stock, tokenizer, to: Path, weights: dict | None = None) -> None:
    """A stock directory, written aside and swapped in; weights: its state dict where the model's own is sharded.
    Raises UserError where the disk refuses."""
    aside, old = to.with_name(to.name + ".tmp"), to.with_name(to.name + ".old")
    weights = stock.state_dict() if weights is None else weights
    remove(aside)
    remove(old)
    try:
        stock.save_pretrained(aside, state_dict=weights)
        tokenizer.save_pretrained(aside)
        for path in aside.iterdir():
            with open(path, "rb") as f:
                os.fsync(f.fileno())
        sync_folder(aside)
    except Exception as why:  # safetensors has errors of its own
        remove(aside)
        raise UserError(f"{aside}: cannot be written ({first_line(why)}); {to} is as it was") from None
    if hasattr(stock, "score"):  # reward heads have been lost on save before (OpenRLHF #209): look
        heads = [f.get_tensor("score.weight") for f in (safe_open(p, "pt") for p in aside.glob("*.safetensors"))
                 if "score.weight" in f.keys()]
        if not heads or not torch.equal(heads[0], weights["score.weight"].cpu()):
            raise UserError(f"{aside}: the saved reward head is not the trained one; the folder above it is as it was")
    if to.exists():
        os.replace(to, old)
    os.replace(aside, to)
    sync_folder(to.parent)
    remove(old)


class Run:
    """The output directory: lock, metrics.jsonl, checkpoints, and the wish to stop (SIGTERM, Ctrl-C). Under torchrun
    only the first process writes. rest: after what all is saved, so that a stop costs nothing; "" in a step.
    Raises UserError for a directory that cannot serve."""
    models = ("student", "teacher", "teacher-co-trained")

    def __init__(self, cfg):
        self.dir = Path(cfg.output_dir).absolute()  # no name below it can be taken for a hub id
        self.cfg, self.stop, self.handlers, self.lock, self.rest = cfg, 0, {}, None, ""
        if RANK > 0:
            return
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.dir / "lock", "a+")
        except OSError as why:
            raise UserError(f"{self.dir}: cannot be written ({why.strerror})") from None
        try:
            self.claim()
        except BaseException as why:
            self.__exit__(type(why), why)
            raise

    def claim(self) -> None:
        """Takes the lock; refuses a directory that is in use, or holds another's files or another run."""
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.seek(0)
            raise UserError(f"{self.dir}: in use by another run ({self.lock.read().strip()}); choose another --output-dir") from None
        cfg = self.cfg
        for name in self.models:  # killed between two renames: the old directory is the good one
            if (self.dir / f"{name}.old").exists() and not (self.dir / name).exists():
                os.replace(self.dir / f"{name}.old", self.dir / name)
        try:  # any model directory has a config.json: ours lists flags
            before = json.loads((self.dir / "config.json").read_text())
            before["flags"]["seed"]
        except (OSError, ValueError, KeyError, TypeError):
            before = None
        known = before is not None
        ours = (*self.models, "checkpoints", *["config.json"] * (not known))
        foreign = [n for n in ours if (self.dir / n).exists()]
        self.lock.seek(0)
        foreign += [] if re.match("host |$", self.lock.read()) else ["lock"]
        inputs = [Path(p).resolve() for p in (cfg.model, cfg.teacher, *cfg.data, *cfg.val_data, *cfg.eval_data) if p]
        inside = [p for p in inputs if any(p.is_relative_to((self.dir / n).resolve()) for n in foreign)]
        if (foreign and not known) or (inside and not cfg.resume):
            raise UserError(f"{self.dir}: its {foreign[0]} is no output of an earlier run here, or is read by this one; "
                            "choose another --output-dir")
        if known and not (cfg.resume or cfg.overwrite):
            raise UserError(f"{self.dir}: holds an earlier run; go on with --resume, replace it with --overwrite, or "
                            "choose another --output-dir")
        if known and cfg.resume:
            if (self.dir / "results.json").exists() and not self.checkpoints():
                raise UserError(f"{self.dir}: holds a finished run without its checkpoints, so there is "
                                "nothing to resume; start anew with --overwrite")
            self.compare_flags(before["flags"])
            read = before.get("inputs", {})
            changed = [p for p, crc in self.checksums().items() if read.get(p, crc) != crc]
            if changed:
                raise UserError(f"{self.dir}: --resume with other pairs: {', '.join(changed)} changed since "
                                "the run began; restore it, or start anew with --overwrite")
        self.lock.truncate(0)
        self.lock.write(f"host {socket.gethostname()} pid {os.getpid()}\n")
        self.lock.flush()

    def checksums(self) -> dict[str, int]:
        """CRC-32 of each file of training and validation pairs."""
        files = [p for p in [*self.cfg.data, *self.cfg.val_data] if Path(p).is_file()]
        return {p: zlib.crc32(Path(p).read_bytes()) for p in files}

    def compare_flags(self, before: dict) -> None:
        """--resume with other flags: refused, but for those that change no step."""
        free = {"resume", "overwrite", "output_dir", "eval_data", "log_every", "device", "save_every", "fsdp", "skip_nonfinite",
                "grad_accum", "gradient_checkpointing"}
        now, before = json.loads(json.dumps(asdict(self.cfg))), {**asdict(type(self.cfg)()), **before}  # flags that are new since
        changed = [f"--{k.replace('_', '-')} was {before[k]!r}, is {now[k]!r}" for k in now if k not in free and before[k] != now[k]]
        if changed:
            raise UserError(f"{self.dir}: --resume with other flags: {'; '.join(changed)}. May change: "
                            + ", ".join("--" + k.replace("_", "-") for k in sorted(free)))

    def begin(self, weights: int, phase: str, counts: Counter) -> None:
        """Called when data and models are known to be good: only now is an earlier run replaced. weights: the number
        of the larger model's."""
        self.handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        if RANK > 0:
            return
        need = 4 * weights * (2 * 3 + 3)  # fp32: three checkpoints (one is being written) of weights and moments, students
        held = sum(p.stat().st_size for p in self.dir.rglob("*") if p.is_file())
        free = shutil.disk_usage(self.dir).free + held
        if need > free:
            raise UserError(f"{self.dir}: the disk has {free / 1e9:.1f} GB for this run, checkpoints and "
                            f"models need about {need / 1e9:.1f} GB; choose another --output-dir")
        halves = [self.dir / (n + end) for n in self.models for end in (".tmp", ".old")]
        for half in [*halves, *self.dir.glob("checkpoints/*.pt.tmp")]:  # left by a kill
            remove(half)
        if not self.cfg.resume:
            for *_, path in self.checkpoints():  # first: killed in here, a resumed run finds none, and begins
                path.unlink()
        if not self.checkpoints():
            for name in (*self.models, "metrics.jsonl", "results.json", "bad_batch.jsonl"):
                remove(self.dir / name)
            if self.cfg.resume:
                print(f"{self.dir}: no checkpoint to resume from; starting at the beginning")
        versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__,
                    "numpy": np.__version__}
        write_json(self.dir / "config.json", {"flags": asdict(self.cfg), "versions": versions,
                                              "inputs": self.checksums()})
        if not (self.dir / "metrics.jsonl").exists():
            self.log(phase=phase, step=0, data=dict(counts))
        self.rest = "the data were read"

    def __enter__(self):
        return self

    def __exit__(self, kind, why, *_) -> None:
        """Gives back the lock and the signal handlers. Raises UserError for an error of the disk."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.lock:
            self.lock.close()
        for left in list(BARS):  # an error gets a line of its own
            left.close()
        if isinstance(why, OSError):
            where, what = why.filename or self.dir, why.strerror or why
            raise UserError(f"{where}: {what}; what was saved before is whole") from None

    def on_signal(self, number, _) -> None:
        self.stop = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        if self.rest and WORLD == 1:  # several processes leave together, after a step
            self.leave(self.rest, number)
        if RANK == 0:
            print("\nstopping after this step; once more ends at once", file=sys.stderr)

    def agreed_stop(self, device) -> int:
        """The signal that any process has had, the same answer in all of them; 0 = none."""
        if WORLD == 1:
            return self.stop
        stop = torch.tensor(float(self.stop), device=device)
        dist.all_reduce(stop, dist.ReduceOp.MAX)
        return int(stop)

    def leave(self, where: str, stop: int) -> None:
        """Ends the process after a saved step: 130 after Ctrl-C, 0 after SIGTERM."""
        start = ["torchrun", "--nproc-per-node", str(WORLD)] if WORLD > 1 else ["python"]
        argv = [*start, *(a for a in sys.argv if a not in ("--overwrite", "--resume")), "--resume"]
        print(f"stopped and saved after {where}. Go on with:\n  {shlex.join(argv)}"
              if any(a.startswith("--model") for a in sys.argv) else "the demo is stopped; it starts anew each time")
        raise SystemExit(130 if stop == signal.SIGINT else 0)

    def checkpoints(self) -> list[tuple[int, int, Path]]:
        """(phase 0 = teacher / 1 = student, step, path), newest first."""
        found = [re.fullmatch(r"([01])-(\d+)\.pt", p.name) for p in (self.dir / "checkpoints").glob("*.pt")]
        return sorted(((int(m[1]), int(m[2]), self.dir / "checkpoints" / m[0]) for m in found if m), reverse=True)

    def newest(self):
        """(phase, step, state) of the newest whole checkpoint, or None; a torn one is named and passed over."""
        found = self.checkpoints()
        for k, (phase, step, path) in enumerate(found):
            try:
                with zipfile.ZipFile(path) as parts:  # torch.save writes checksums, torch.load ignores them
                    if broken := parts.testzip():
                        raise ValueError(f"{broken} is damaged")
                return phase, step, torch.load(path, map_location="cpu", weights_only=True, mmap=WORLD > 1)
            except Exception as why:  # zip, pickle and tensor errors alike mean: not whole
                left = k + 1 < len(found)
                then = "using the one before" if left else "none is left, starting at the beginning"
                print(f"{path}: torn or foreign ({first_line(why)[:80]}); {then}", file=sys.stderr)

    def restore(self, phase: int, model, optimizer) -> tuple[int, list[float], int]:
        """--resume: weights, moments and random state of the newest checkpoint, if it is of this phase, and the logs up
        to it: (steps done, [accuracy, -loss] of the best validation, steps passed over)."""
        state, done, best, skipped = self.newest() if self.cfg.resume else None, 0, [-1.0, 0.0], 0
        if state and state[0] == phase:
            _, done, saved = state
            set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"],
                           options=StateDictOptions(full_state_dict=True))
            best, skipped = saved["best"], saved["skipped"]
            if WORLD == 1:
                torch.set_rng_state(saved["rng"])
                if "cuda_rng" in saved and (device := next(model.parameters()).device).type == "cuda":
                    torch.cuda.set_rng_state(saved["cuda_rng"], device)
            print(f"resuming the {self.models[1 - phase]} after step {done}")
        if self.cfg.resume:
            self.rewind(phase, done)
        self.rest = ""
        return done, best, skipped

    def checkpoint(self, phase: int, step: int, model, optimizer, **progress) -> None:
        """All that restore needs, gathered from all processes."""
        (weights, moments), device = whole_state(model, optimizer), next(model.parameters()).device
        cuda_rng = {"cuda_rng": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
        self.save(phase, step, {"model": weights, "optimizer": moments, "rng": torch.get_rng_state(), **cuda_rng, **progress})

    def save(self, phase: int, step: int, state: dict) -> None:
        """Written aside, flushed, renamed, the lines of its steps before it; the last two are kept."""
        if RANK > 0:
            return
        with open(self.dir / "metrics.jsonl", "a") as f:
            os.fsync(f.fileno())
        path = self.dir / "checkpoints" / f"{phase}-{step:08d}.pt"
        path.parent.mkdir(exist_ok=True)
        sync_folder(self.dir)
        with written(path, "wb") as f:
            torch.save(state, f)
        for *_, old in self.checkpoints()[2:]:
            old.unlink()

    def save_model(self, model, tokenizer, name: str) -> None:
        """RUN/name as a stock directory, written by the first process; adapters of the student are merged."""
        weights = {k.removeprefix("stock."): v for k, v in whole_state(model)[0].items()}
        if RANK == 0:
            rank = self.cfg.lora_rank if name == "student" else 0
            stock, weights = merge_lora(self.cfg.model, rank, weights) if rank else (model.stock, weights)
            save_stock(stock, tokenizer, self.dir / name, weights)

    def write(self, name: str, obj) -> None:
        if RANK == 0:
            write_json(self.dir / name, obj)

    def log(self, **line) -> None:
        if RANK == 0:
            with open(self.dir / "metrics.jsonl", "a") as f:
                floats = {k: v for k, v in line.items() if isinstance(v, float)}  # NaN is no JSON
                line |= {k: round(v, 6) if math.isfinite(v) else None for k, v in floats.items()}
                f.write(json.dumps(line) + "\n")

    def bad_batch(self, phase: str, step: int, pairs: list[Pair], skipped: int, loss: float, norm: float) -> None:
        """Keeps the pairs of a step that went wrong, one line each, for a look; skipped: how many have been passed over,
        this one included. Raises UserError over --skip-nonfinite."""
        if RANK == 0:
            with open(self.dir / "bad_batch.jsonl", "a", encoding="utf-8") as f:
                f.writelines(json.dumps({"phase": phase, "step": step, **asdict(p)}, ensure_ascii=False) + "\n" for p in pairs)
        if skipped > self.cfg.skip_nonfinite:
            raise UserError(f"{phase} step {step}: the loss or its gradient is not finite (loss {loss}, gradient norm {norm}); "
                            f"nothing was updated, the last checkpoint is whole, the pairs are in {self.dir}/bad_batch.jsonl. "
                            "Try a lower learning rate, --dtype fp32, or --skip-nonfinite 1")

    def rewind(self, phase: int, step: int) -> None:
        """Drops the lines of metrics.jsonl and bad_batch.jsonl that the resumed run will write again."""
        for path in (self.dir / "metrics.jsonl", self.dir / "bad_batch.jsonl"):
            if RANK > 0 or not path.exists():
                continue
            keep = []
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                with suppress(ValueError, KeyError, TypeError):  # torn by a power cut: after the checkpoint
                    m = json.loads(line)
                    if (m["phase"] == "student", m["step"]) <= (phase == 1, step):
                        keep.append(line + "\n")
            with written(path) as f:
                f.writelines(keep)


def drift(model: str) -> dict | None:
    """For `eval.py stability`: validation rewards by step, from the metrics.jsonl beside a RUN/student; None for other models."""
    folder = Path(model).resolve()
    path = folder.parent / "metrics.jsonl"
    if not folder.is_dir() or not path.exists():
        return None
    lines, names = [], {"steps": "step", "mean": "val_reward_mean", "std": "val_reward_std"}
    for raw in path.read_text(errors="replace").splitlines():
        try:
            m = json.loads(raw)
        except ValueError:  # a line cut by a crash
            continue
        if isinstance(m, dict) and m.get("phase") == folder.name and all(m.get(k) is not None for k in names.values()):
            lines.append(m)
    return {k: [m[name] for m in lines] for k, name in names.items()} if lines else None


# ------------------------------------------------------------------------- edits of a response, for eval.py attack

BUILT_IN = {  # edits made of the response's own sentences
    "recap": lambda y: f"{y}\n\nIn short:\n- {sentences(y)[0]}",
    "repeat": lambda y: f"{y} {sentences(y)[-1]}",
    "upper": str.upper,
    "markdown": lambda y: "## Answer\n\n" + "\n".join(f"- **{s}**" for s in sentences(y))}
APPLY = {"append": lambda y, text: y + text, "prepend": lambda y, text: text + y,
         "built_in": lambda y, name: BUILT_IN[name](y), "replace_end": lambda y, text: without_end(y) + text}
PADDING = " There is more to be said about this, and it is worth taking the time to think it through."
ELSEWHERE = " The old town is loveliest in spring, when the cafes move their tables out to the square."
EDITS = {
    "closing phrase": {"append": " I hope this helps!"},
    "apology": {"append": " I am sorry if this is not quite what you were looking for."},
    "recap of the first sentence": {"built_in": "recap"}, "last sentence again": {"built_in": "repeat"},
    "praise": {"prepend": "What a great question! "}, "padding": {"append": PADDING * 3},
    "markdown": {"built_in": "markdown"}, "upper case": {"built_in": "upper"},
    "off-topic ending": {"replace_end": ELSEWHERE}}


def sentences(text: str) -> list[str]:
    """Split after an end mark (the CJK ones need no space behind them) and at line breaks."""
    return [s for s in re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n+", text.strip()) if s.strip()]


def without_end(text: str) -> str:
    """Without its last sentence; a single sentence loses its second half."""
    if len(sentences(text)) > 1:
        return text[:text.rindex(sentences(text)[-1])].rstrip()
    half = text[:(len(text) + 1) // 2]
    return half.rpartition(" ")[0] or half


def edited(text: str, edit: dict[str, str]) -> str:
    """The text after every KIND: text of an edit, in order."""
    text = text.strip()
    for kind, value in edit.items():
        text = APPLY[kind](text, value)
    return text


def read_edits(path: str | None) -> dict[str, dict]:
    """EDITS with those of a file added, replaced or (null) taken out. Raises UserError."""
    try:
        more = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        check_characters([json.dumps(more, ensure_ascii=False)])
    except (OSError, ValueError) as why:
        raise UserError(f"--edits {path}: cannot be read ({why})") from None
    if not isinstance(more, dict):
        raise UserError(f'--edits {path}: is not one JSON object, such as {{"thanks": {{"append": " Thanks!"}}}}')
    for name, e in more.items():
        fits = isinstance(e, dict) and e and all(k in APPLY and isinstance(v, str) for k, v in e.items())
        if not (fits and e.get("built_in", "upper") in BUILT_IN or e is None and name in EDITS):
            raise UserError(f'--edits {path}: "{name}" is not {{KIND: text}} with a KIND of '
                            f'{", ".join(APPLY)} (one of {", ".join(BUILT_IN)}), nor null for one of: '
                            f'{", ".join(EDITS)}')
    edits = {name: edit for name, edit in {**EDITS, **more}.items() if edit}
    if not edits:
        raise UserError(f"--edits {path}: leaves no edit")
    return edits


# ------------------------------------------------------------------------------------------------- benchmarks

# Benchmarks become pairs whose source is the benchmark and whose subset begins with the group it reports by;
# eval.py accuracy knows them by the source. A converter takes a published record and the path of its file.

SECTIONS = {section: names.split() for section, names in {
    "Chat": "alpacaeval-easy alpacaeval-length alpacaeval-hard mt-bench-easy mt-bench-med",
    "Chat Hard": "mt-bench-hard llmbar-natural llmbar-adver-neighbor llmbar-adver-GPTInst "
                 "llmbar-adver-GPTOut llmbar-adver-manual",
    "Safety": "refusals-dangerous refusals-offensive xstest-should-refuse xstest-should-respond donotanswer",
    "Reasoning": "math-prm hep-cpp hep-go hep-java hep-js hep-python hep-rust"}.items()}
DOMAINS = ("chat", "code", "math", "safety-refuse", "safety-response")
CATEGORIES = {"mmlu-pro": "Knowledge", "livebench-reasoning": "Reasoning", "livebench-math": "Math",
              "livecodebench": "Coding"}
LLMBAR = ("Natural", *("Adversarial/" + s for s in ("Neighbor", "GPTInst", "GPTOut", "Manual")))


def field(record: dict, name: str, kind: type = str):
    """record[name], of that type, or ValueError."""
    if not isinstance(record, dict) or record.get(name) is None:
        raise ValueError(f'the field "{name}" is missing')
    if not isinstance(record[name], kind):
        raise ValueError(f'the field "{name}" is no {kind.__name__}')
    return record[name]


def ordered(a: str, b: str, label, first: str, second: str) -> dict:
    """{"chosen", "rejected"}; the label first says that a is better, second that b is. A tie is unusable."""
    if re.fullmatch(r"tie.*|A=B", str(label)):
        raise UnusablePair("a tie by its label")
    if str(label) not in (first, second):
        raise ValueError(f"the label {label!r} is neither {first} nor {second}")
    return dict(zip(("chosen", "rejected"), (a, b) if str(label) == first else (b, a)))


def from_rewardbench(record: dict, path: str):
    """RewardBench (arXiv 2403.13787): prompt, chosen, rejected, subset, id. Its prior sets are left out."""
    name = field(record, "subset")
    section = next((s for s, names in SECTIONS.items() if name in names), None)
    if section is None:
        raise UnusablePair("the subset is in none of RewardBench's four sections")
    yield {**{k: field(record, k) for k in ("prompt", "chosen", "rejected")}, "id": record.get("id"),
           "subset": f"{section}/{name}"}


def from_rm_bench(record: dict, path: str):
    """RM-Bench (arXiv 2410.16184): 3 chosen, 3 rejected: concise, detailed, detailed with markdown. Nine
    pairs a prompt, ids ending in /chosen style-rejected style. The domain: a field, or in the file's name."""
    sides = [field(record, k, list) for k in ("chosen", "rejected")]
    domain = record.get("domain") or next((d for d in DOMAINS if d in Path(path).name), None)
    if domain not in DOMAINS or [len(side) for side in sides] != [3, 3]:
        raise ValueError(f"not three chosen and three rejected, or the domain, {domain!r}, by the record or "
                         f"the file's name is none of {', '.join(DOMAINS)}")
    for i, j in product(range(3), range(3)):
        yield {"prompt": field(record, "prompt"), "chosen": sides[0][i], "rejected": sides[1][j],
               "subset": domain, "id": f"{record.get('id')}/{i}-{j}"}


def from_rmb(record: dict, path: str):
    """RMB (arXiv 2410.09893): conversation_input, category_path, chosen and reject; best-of-n: bon_best and
    loser_list, a pair a loser, ids ending in /number of the loser of how many."""
    category, best_of_n = field(record, "category_path"), "bon_best" in record
    if not re.match("(Pairwise|BoN)_set/(Helpfulness|Harmlessness)", category):
        raise ValueError(f"the category_path {category!r} is none of RMB's")
    best = field(field(record, "bon_best" if best_of_n else "chosen", dict), "answer")
    losers = field(record, "loser_list", list) if best_of_n else [field(record, "reject", dict)]
    for k, loser in enumerate(losers, 1):
        yield {"prompt": field(record, "conversation_input", list), "chosen": best,
               "rejected": field(loser, "answer"), "subset": category,
               "id": f"{record.get('bon_uid')}/{k}of{len(losers)}" if best_of_n else record.get("pair_uid")}


def from_judgebench(record: dict, path: str):
    """JudgeBench (arXiv 2410.12784): question, response_A, response_B, label A>B or B>A, source."""
    name = field(record, "source")
    category = next((c for start, c in CATEGORIES.items() if name.startswith(start)), None)
    if category is None:
        raise ValueError(f"the source {name!r} is none of JudgeBench's")
    sides = field(record, "response_A"), field(record, "response_B")
    yield {"prompt": field(record, "question"), "subset": f"{category}/{name}", "id": record.get("pair_id"),
           **ordered(*sides, record.get("label"), "A>B", "B>A")}


def from_llmbar(record: dict, path: str):
    """LLMBar (arXiv 2310.07641): input, output_1, output_2, label 1 or 2; the path names the subset."""
    named = re.findall("natural|neighbor|gptinst|gptout|manual", path.lower())
    if not named:
        raise ValueError("the path names none of Natural, Neighbor, GPTInst, GPTOut, Manual")
    sides = field(record, "output_1"), field(record, "output_2")
    yield {"prompt": field(record, "input"), "subset": next(s for s in LLMBAR if named[-1] in s.lower()),
           **ordered(*sides, record.get("label"), "1", "2")}


def from_mt_bench(record: dict, path: str):
    """MT-Bench (arXiv 2306.05685), a vote: conversation_a, conversation_b, turn, winner, judge; or LLMBar's
    layout of the majority on first turns. Two conversations differ from their first answers on, so the prompt
    is the first question; a second turn continues the response as text, as Formatter without a template,
    which defuses it by a space as it does any turn inside a response."""
    if "conversation_a" not in record:
        yield {**next(from_llmbar(record, "natural")), "subset": "turn 1, majority"}
        return
    turn, sides = field(record, "turn", int), ("conversation_a", "conversation_b")
    talks = [check_messages(field(record, k, list), k)[:2 * turn] for k in sides]
    if turn not in (1, 2) or any([m["role"] for m in talk] != ["user", "assistant"] * turn for talk in talks):
        raise ValueError(f"turn {turn} is not 1 or 2, or not in both conversations as question and answer")
    if talks[0][0] != talks[1][0]:
        raise UnusablePair("the two prompts differ")
    marks, names = ("", "User: ", "Assistant: "), ("question_id", "model_a", "model_b", "judge", "turn")
    texts = ["\n\n".join(mark + m["content"].strip() for mark, m in zip(marks, talk[1:])) for talk in talks]
    yield {"prompt": talks[0][:1], **ordered(*texts, record.get("winner"), "model_a", "model_b"),
           "subset": f"turn {turn}", "id": "-".join(str(record.get(k)) for k in names)}


BENCHMARKS = {  # converter, data set on the hub or repository to clone, its files
    "rewardbench": (from_rewardbench, "allenai/reward-bench", "data/filtered-*.parquet"),
    "rm-bench": (from_rm_bench, "THU-KEG/RM-Bench", "*total_dataset.json"),
    "rmb": (from_rmb, "https://github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark", "*.json"),
    "judgebench": (from_judgebench, "ScalerLab/JudgeBench", "*gpt*.json*"),
    "llmbar": (from_llmbar, "https://github.com/princeton-nlp/LLMBar", "*dataset.json"),
    "mt-bench": (from_mt_bench, "lmsys/mt_bench_human_judgments", "data/human-*.parquet")}


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
        styles = sum(levels.values(), ())
        cells = [[f"{p.subset} {s}" for s in styles if p.id.endswith("/" + s)] for p in pairs]
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


def benchmark_files(name: str, inputs: list[str] | None) -> list[str]:
    """The files of --input, folders opened; without it those of the hub (cached there). Raises UserError."""
    _, home, pattern = BENCHMARKS[name]
    try:
        if not inputs and "//" not in home:
            from huggingface_hub import snapshot_download
            inputs = [snapshot_download(home, repo_type="dataset", allow_patterns=pattern)]
    except Exception as why:  # network, permission and missing-file errors of several libraries
        home += f" (now: {type(why).__name__})"
    if not inputs:
        raise UserError(f"{name}: cannot be fetched; give {pattern} of {home}, or their folder, as --input")
    files = []
    for p in map(Path, inputs):
        inside = sorted(q for q in p.rglob("*") if fnmatch(q.relative_to(p).as_posix(), pattern))
        if p.is_dir() and not inside:
            raise UserError(f"{p}: holds no file {pattern}")
        files += map(str, inside if p.is_dir() else [p])
    return files


def read_records(path: str) -> list[tuple[str, object]]:
    """(where, record) of parquet, a JSON array or JSON lines (as text), plain or .gz. Raises UserError."""
    try:
        if path.endswith(".parquet"):
            from pyarrow import parquet
            return [(f"record {k}", r) for k, r in enumerate(parquet.read_table(path).to_pylist(), 1)]
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
            text = f.read().decode("utf-8-sig")
        if text.lstrip().startswith("["):
            return [(f"record {k}", r) for k, r in enumerate(json.loads(text), 1)]
        return [(f"line {k}", raw) for k, raw in enumerate(text.split("\n"), 1) if raw.strip()]
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow: pip install pyarrow (JSON needs nothing)") from None
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as why:
        raise UserError(f"{path}: cannot be read ({first_line(why)})") from None


def read_benchmark(name: str, inputs: list[str] | None, skip_bad: bool = False) -> tuple[list[Pair], Counter]:
    """The pairs of a benchmark, counts as of read_pairs. Raises UserError with file and line or record."""
    pairs, counts = [], Counter()
    for path in benchmark_files(name, inputs):
        for where, record in read_records(path):
            before = len(pairs)
            try:
                record = json.loads(record) if isinstance(record, str) else record
                if not isinstance(record, dict):
                    raise ValueError("is no JSON object")
                for row in BENCHMARKS[name][0](record, path):
                    try:
                        pairs.append(parse_pair({**row, "source": name}))
                    except UnusablePair as why:
                        counts[str(why)] += 1
            except UnusablePair as why:
                counts[str(why)] += 1
            except (ValueError, RecursionError) as why:
                if not skip_bad:
                    why = "not JSON" if isinstance(why, json.JSONDecodeError) else why
                    raise UserError(f"{path}, {where}: {why}; mend it, or drop it with --skip-bad") from None
                del pairs[before:]
                counts["bad"] += 1
    counts["pairs"] = len(pairs)
    if not pairs:
        raise nothing_usable(name, "pair", counts)
    return pairs, counts


# -------------------------------------------------------------------------------------------- the generated language, the demo

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


def speaker(rng, topics: int, items: int, fillers: int, shortest: int, longest: int):
    """(prompt of a topic, response with an item of a topic and a cue): two functions that draw texts of the language."""
    names, things, fill = language(topics, items, fillers)

    def some(low: int, high: int) -> list[str]:
        return [fill[i] for i in rng.integers(len(fill), size=rng.integers(low, high + 1))]

    def prompt(topic: int) -> list[dict]:
        return [{"role": "user", "content": " ".join(some(0, 3) + [names[topic]] + some(1, 4))}]

    def response(topic: int, cue: str) -> str:
        return " ".join(some(0, 3) + [things[topic][rng.integers(items)]] + some(shortest, longest) + [cue])

    return prompt, response


def synthetic_pairs(n: int, agreement: float, seed: int, topics: int = 12, items: int = 10, fillers: int = 60,
                    shortest: int = 8, longest: int = 16) -> list[Pair]:
    """n pairs of the language above; subset says whether the cue goes with or against the label."""
    rng = np.random.default_rng([seed, 7])
    prompt, response = speaker(rng, topics, items, fillers, shortest, longest)
    pairs = []
    for k in range(n):
        right, wrong = rng.choice(topics, 2, replace=False)
        agrees = rng.random() < agreement
        pairs.append(Pair(prompt(right), response(right, CUES[not agrees]), response(wrong, CUES[agrees]), "synthetic",
                          "with the cue" if agrees else "against the cue", f"{seed}-{k}"))
    return pairs


def synthetic_candidates(n: int, responses: int, agreement: float, seed: int, topics: int = 12, items: int = 10,
                         fillers: int = 60, shortest: int = 8, longest: int = 16) -> list[Candidates]:
    """n prompts of the language above, each with candidates of which a quarter, at random, are right (gold 1, else 0)."""
    rng = np.random.default_rng([seed, 8])
    prompt, response = speaker(rng, topics, items, fillers, shortest, longest)
    out = []
    for k in range(n):
        topic = rng.integers(topics)
        gold, agrees = rng.random(responses) < 0.25, rng.random(responses) < agreement
        other = (topic + rng.integers(1, topics, size=responses)) % topics
        out.append(Candidates(prompt(topic), [response(topic if g else o, CUES[int(g != a)])
                                              for g, a, o in zip(gold, agrees, other)], gold.astype(float).tolist(), id=f"{seed}-{k}"))
    return out


def make_demo_models(to: Path, seed: int) -> None:
    """A word-level Llama and a word-level ModernBERT, untrained, as ordinary directories."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + ["User:", "Assistant:"] + synthetic_vocabulary())}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]",
                                                     cls_token="[CLS]", sep_token="[SEP]", eos_token="</s>")
    size = dict(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
                max_position_embeddings=256, pad_token_id=0, bos_token_id=2, eos_token_id=4, cls_token_id=2, sep_token_id=3)
    torch.manual_seed(seed)
    student = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size))
    # every layer global, larger initial weights: with 0.02, or a post-norm BERT, it does not learn the task
    teacher = transformers.ModernBertForTokenClassification(transformers.ModernBertConfig(
        **size, num_labels=1, initializer_range=0.1, global_attn_every_n_layers=1))
    for model, name in ((student, "student"), (teacher, "teacher")):
        model.save_pretrained(to / name)
        tokenizer.save_pretrained(to / name)


def report_teacher(accuracy: float, pairs: int, learns: bool) -> None:
    """What is known of the teacher before it is used."""
    print(f"teacher: validation accuracy {accuracy:.4f} on {pairs} pairs, {'goes on learning' if learns else 'frozen'}")
    if accuracy < 0.5 + 1.64 * math.sqrt(0.25 / pairs):  # one-sided 95 %
        print(f"warning: the teacher is at chance ({accuracy:.3f} on {pairs} pairs); its attention has little to teach. "
              "Train it longer (--teacher-epochs) or faster (--teacher-lr)")


def print_table(results: dict) -> None:
    """Accuracy in % of the student beside the teacher, the longer-response and the majority baseline."""
    print(f"\n{'accuracy %':24}{'pairs':>7}{'student':>9}{'teacher':>9}{'longer':>8}{'majority':>10}")
    for name, r in results["sets"].items():
        cells = [f"{100 * r[k]:.1f}" if r[k] is not None else "-" for k in ("student", "teacher", "longer")]
        print(f"{name:24}{r['pairs']:>7}{cells[0]:>9}{cells[1]:>9}{cells[2]:>8}{'50.0':>10}")
    print("(majority: either side of a pair comes first, so a constant answer is right in half of them)")


def demo(cfg, train) -> None:
    """`python idistill.py` without flags: generated pairs in which a closing cue agrees with the label in 90 % of the
    training pairs, and only early content always decides. Four models learn from them by train(Config), the code of
    a real run; which of them follows the cue? Raises UserError."""
    free = {"output_dir", "overwrite", "seed", "seeds", "device", "dtype", "max_steps"}
    default = asdict(type(cfg)())
    fixed = ["--" + k.replace("_", "-") for k, v in asdict(cfg).items() if k not in free and v != default[k]]
    if fixed or WORLD > 1:
        raise UserError(f"{', '.join(fixed) or 'torchrun'}: --model is needed beside it; the demo (no --model, one process) "
                        "takes " + ", ".join("--" + k.replace("_", "-") for k in sorted(free)))
    if cfg.seeds < 1 or cfg.seed < 0:
        raise UserError(f"--seeds {cfg.seeds} --seed {cfg.seed}: at least 1 seed, from 0 on")
    root = Path(cfg.output_dir or "runs/demo")
    if not cfg.output_dir:  # an earlier demo is never overwritten
        root = next(p for p in [root, *(root.with_name(f"demo-{i}") for i in range(2, 10_000))] if not p.exists())
    columns = {"in-distribution": 0.9, "cue-neutral": 0.5, "cue-reversed": 0.1}
    table: dict[str, list[list[float]]] = {"teacher": [], "BT": [], "ID": [], "ID, uniform target": []}
    started = time.perf_counter()
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        here = root / f"seed{seed}"
        (here / "data").mkdir(parents=True, exist_ok=True)
        for k, (name, rate) in enumerate({"train": 0.9, **columns}.items()):
            rows = synthetic_pairs(12_800 if name == "train" else 600, rate, seed * 10 + k)
            write_pairs(here / "data" / f"{name}.jsonl", rows, overwrite=cfg.overwrite)
        write_pairs(here / "data/candidates.jsonl", synthetic_candidates(500, 16, 0.1, 77 + seed), overwrite=cfg.overwrite)  # bestofn
        make_demo_models(here / "models", seed)
        base = replace(
            cfg, model=str(here / "models/student"), teacher=str(here / "models/teacher"), seed=seed, batch_size=32, lr=1e-3,
            teacher_lr=2e-3, epochs=2, teacher_epochs=8, max_length=128, data=[str(here / "data/train.jsonl")],
            eval_data=[str(here / f"data/{c}.jsonl") for c in columns],
            dtype="fp32" if cfg.dtype == "auto" else cfg.dtype, eval_every=400, log_every=20)
        for name, changes in {"ID": {}, "BT": {"method": "bt"}, "ID, uniform target": {"align_target": "uniform"}}.items():
            out = here / name.split(",")[-1].strip().replace(" ", "-").lower()
            print(f"\n--- seed {seed}: {name}")
            sets = train(replace(base, output_dir=str(out), **changes))["sets"]
            table[name].append([sets[c]["student"] for c in columns])
            if name == "ID":
                table["teacher"].append([sets[c]["teacher"] for c in columns])
    mean = {k: np.mean(v, 0) * 100 for k, v in table.items()}
    spread = {k: np.std(v, 0, ddof=1) * 100 if cfg.seeds > 1 else None for k, v in table.items()}
    print(f"\naccuracy %, 600 pairs each, {cfg.seeds} seed(s){', mean (standard deviation)' if cfg.seeds > 1 else ''}")
    print(f"{'':20}" + "".join(f"{c:>17}" for c in columns))
    for k in table:
        cells = [f"{m:.1f}" + (f" ({s:.1f})" if cfg.seeds > 1 else "")
                 for m, s in zip(mean[k], spread[k] if cfg.seeds > 1 else mean[k])]
        print(f"{k:20}" + "".join(f"{c:>17}" for c in cells))
    verdict = {k: "follows the cue" if m[2] < 40 else "reads the content" if m[2] > 60 else "wavers" for k, m in mean.items()}
    print("\nWhere the cue is reversed: " + "; ".join(f"{k} {verdict[k]} ({mean[k][2]:.0f} %)" for k in verdict) + ".")
    seconds = round(time.perf_counter() - started, 1)
    write_json(root / "demo.json", {"columns": list(columns), "accuracy": table, "seconds": seconds})
    first = root / f"seed{cfg.seed}"
    print(f"Files: {root} ({seconds:.0f} s). Look closer:\n  python eval.py accuracy {first}/bt/student "
          f"{first}/id/student --data {first}/data/cue-reversed.jsonl")


# ------------------------------------------------------------------------------------------------------ command line

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    ap = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    ap.add_argument("source", nargs="+", metavar="SOURCE", help="hh-rlhf, synthetic, JSONL files, plain or "
                    f".gz, or a benchmark: {', '.join(BENCHMARKS)}")
    ap.add_argument("--out", required=True, help="file to write; gzipped where it ends in .gz")
    ap.add_argument("--overwrite", action="store_true", help="replace --out where it exists")
    ap.add_argument("--skip-bad", action="store_true", help="count malformed lines instead of stopping at the first")
    ap.add_argument("--drop-duplicates", action="store_true", help="drop exact repetitions (counted either way)")
    ap.add_argument("--limit", type=int, default=0, help="write only the first N pairs (default: 0 = all)")
    ap.add_argument("--val-fraction", type=float, default=0.0, help="share for FILE.val.jsonl (default: 0)")
    ap.add_argument("--test-fraction", type=float, default=0.0, help="share for FILE.test.jsonl (default: 0)")
    ap.add_argument("--input", nargs="+", metavar="FILE", help="instead of the hub: raw files of hh-rlhf, or "
                    "those of a benchmark as published (JSON, JSONL, .gz, parquet), or their folders")
    hh = ap.add_argument_group("hh-rlhf")
    hh.add_argument("--subsets", nargs="+", default=["helpful-base", "harmless-base"], metavar="NAME",
                    help="folders of Anthropic/hh-rlhf on the hub (default: helpful-base harmless-base)")
    hh.add_argument("--hub-split", default="train", choices=["train", "test"], help="its split (default: train)")
    syn = ap.add_argument_group("synthetic")
    for name, default, text in (("pairs", 12_800, "number of pairs"), ("topics", 12, "topics"), ("items", 10, "items of each topic"),
                                ("fillers", 60, "filler words"), ("shortest", 8, "fewest fillers between item and cue"),
                                ("longest", 16, "most fillers between item and cue"), ("seed", 0, "seed")):
        syn.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    syn.add_argument("--responses", type=int, default=0, metavar="N", help="--pairs prompts, each with N candidates and their "
                     "gold scores, instead of pairs (default: 0 = pairs)")
    syn.add_argument("--agreement", type=float, default=0.9, help="share of pairs whose cue agrees with the label (default: 0.9)")
    return ap.parse_args(argv)


def convert(args: argparse.Namespace) -> None:
    """Reads or generates, counts, splits, writes. Raises UserError."""
    for name in ("val_fraction", "test_fraction", "agreement"):
        if not 0 <= getattr(args, name) <= 1 or args.val_fraction + args.test_fraction >= 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: shares lie in 0 to 1, and some must be left to train on")
    least = {"seed": 0, "limit": 0, "pairs": 1, "topics": 2, "items": 1, "fillers": 1, "shortest": 0}
    if any(getattr(args, name) < n for name, n in least.items()) or args.shortest > args.longest:
        raise UserError("sizes must be positive, --seed not negative, --topics at least 2, and --shortest not over --longest")
    if args.responses and (args.responses < 2 or args.source != ["synthetic"]):
        raise UserError(f"--responses {args.responses}: the source synthetic takes it, and at least 2")
    noun = "prompts" if args.responses else "pairs"
    if args.source == ["synthetic"]:
        sizes = (args.agreement, args.seed, args.topics, args.items, args.fillers, args.shortest, args.longest)
        pairs = synthetic_candidates(args.pairs, args.responses, *sizes) if args.responses else synthetic_pairs(args.pairs, *sizes)
        counts = Counter({noun: args.pairs})
    elif len(args.source) == 1 and args.source[0] in BENCHMARKS:
        pairs, counts = read_benchmark(args.source[0], args.input, args.skip_bad)
    else:
        hh = args.source == ["hh-rlhf"]
        pairs, counts = [], Counter()
        for paths in [[f] for f in args.input or download_hh(args.subsets, args.hub_split)] if hh else [args.source]:
            some, more = read_pairs(paths, args.skip_bad)
            folder = Path(paths[0]).parent.name  # HH-RLHF keeps its subsets in folders
            for p in some if hh else ():
                p.source = p.source or "hh-rlhf"
                p.subset = p.subset or (folder if folder.startswith(("helpful-", "harmless-", "red-team")) else "")
            pairs, counts = pairs + some, counts + more
    seen, unique = set(), []
    for p in pairs:
        key = json.dumps([p.prompt, answers(p)])
        if key not in seen:
            unique.append(p)
        seen.add(key)
    counts["duplicates"] = len(pairs) - len(unique)
    pairs = (unique if args.drop_duplicates else pairs)[:args.limit or None]
    parts, out = split_pairs(pairs, args.val_fraction, args.test_fraction), Path(args.out)
    stem, _, end = out.name.partition(".jsonl")
    files = {k: out.with_name(f"{stem}.{k}.jsonl{end}") if k else out for k in parts if parts[k] or not k}
    read = {Path(p).resolve() for p in [*args.source, *(args.input or [])]}
    for path in files.values():  # all targets are checked before any is written
        if path.resolve() in read:
            raise UserError(f"{path}: is read too; choose another --out")
        if path.exists() and not args.overwrite:
            raise UserError(f"{path}: exists; choose another --out, or --overwrite")
    print("read: " + ", ".join(f"{v} {k}" for k, v in counts.items() if v or k == noun))
    for k, path in files.items():
        write_pairs(path, parts[k], args.overwrite)
        print(f"wrote {len(parts[k])} {noun} to {path}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_codes():
        convert(args)


if __name__ == "__main__":
    main()
