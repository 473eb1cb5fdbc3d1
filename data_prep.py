#!/usr/bin/env python3
"""Preference data: from the files that people have, to pairs, to tokens and words. The command line converts:

    python data_prep.py hh-rlhf --subsets helpful-base harmless-base --out data/hh.jsonl
    python data_prep.py hh-rlhf --input helpful.train.jsonl.gz --out data/hh.jsonl
    python data_prep.py pairs.jsonl.gz more.json --out data/mine.jsonl --val-fraction 0.1
    python data_prep.py trl-lib/ultrafeedback_binarized:train --out data/uf.jsonl
    python data_prep.py rm-bench --input total_dataset.json --out data/rm-bench.jsonl
    python data_prep.py rewardbench-2 --out data/rewardbench-2.jsonl
    python data_prep.py synthetic --pairs 12800 --agreement 0.9 --out data/synthetic.jsonl
    python data_prep.py synthetic --pairs 500 --responses 16 --out data/candidates.jsonl

A pair is one JSON line {"prompt": text or [{"role", "content"}, ...], "chosen": text, "rejected": text}
and, if known, "system" (the system turn), "source", "subset", "id", "margin" (how much better, from 0)
and "strength" (an ensemble's mean reward of chosen minus that of rejected; eval.py writes it). Also read:
  - whole conversations as chosen and rejected, with or without a prompt (TRL, OpenRLHF);
  - HH-RLHF dialogues ("\\n\\nHuman: ... \\n\\nAssistant: ..."), whole or in the prompt alone;
  - two whole texts without a prompt: the start that they share is the prompt (TRL's implicit prompt);
  - JSON lines and JSON arrays, gzipped or not; with `pip install datasets` also parquet files, folders
    written by save_to_disk, and data sets of the hub, as NAME or NAME:SPLIT.
A field that changes the task and has no place here (input, history, tools, images ...) is refused by name.
Other fields (scores, models, ratings ...) are passed over.

The generated language (a test bed for attention hacking): early content decides, a late cue tempts.
    prompt    0-3 fillers, a topic, 1-4 fillers                     "well fruit should maybe"
    response  0-3 fillers, an item, 8-16 fillers, a closing cue     "often apple quite ... really thanks"
The item of the chosen response is of the prompt's topic, that of the rejected response of another. The
cue agrees with the label in a share --agreement of the pairs: the chosen response then closes with the
first cue and the rejected one with the second; otherwise the cues are exchanged. Content is always
right, the cue mostly: a model that reads only the end scores 90 / 50 / 10 % where the agreement is
0.9 / 0.5 / 0.1. With --responses N each prompt has N candidates, {"prompt", "responses", "gold"}: a
quarter of them, at random, name an item of the topic (gold 1, the others 0), and each cue agrees with
its gold in a share --agreement.
"""

from __future__ import annotations

import argparse
import difflib
import gzip
import hashlib
import io
import json
import os
import re
import sys
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import NamedTuple
from weakref import WeakSet

import numpy as np
from tqdm import tqdm

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said aloud, it silences a fork warning
LONGEST_LINE = 4_000_000  # bytes: a context of a million tokens
BARS: WeakSet = WeakSet()  # the progress bars of this process


class UserError(Exception):
    """A mistake a person can mend: printed as one line, exit code 2, no traceback."""


class UnusablePair(ValueError):
    """A well-formed line that cannot serve as a pair (a tie, two prompts): dropped and counted."""


class UnusableField(ValueError):
    """A field that changes the task and has no place here: refused, or dropped and counted by name."""

    def __init__(self, name: str, why: str):
        super().__init__(why)
        self.name = name


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are told in one line, exit code 2."""

    def error(self, message: str):
        self.exit(2, f"error: {message} (flags: {self.prog} --help)\n")


@contextmanager
def exit_codes():
    """Ends a program as a shell expects: 2 and one line for a UserError, 130 for Ctrl-C, 141 for a
    closed pipe."""
    try:
        yield
        sys.stdout.flush()
    except (
        BrokenPipeError
    ):  # `| head` has seen enough; without a pipe the flush at exit is quiet too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        close_bars()
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError as why:
        close_bars()
        print(f"error: {why}", file=sys.stderr)
        raise SystemExit(2) from None


def bar(items, name: str, **kwargs) -> tqdm:
    """A progress bar, silent without a name and in all processes but the first."""
    silent = not name or int(os.environ.get("RANK", 0)) > 0
    pause = 0.2 if sys.stderr.isatty() else 15.0  # a log file needs few lines
    options = {"leave": False, "mininterval": pause, **kwargs}
    made = tqdm(items, desc=name[-40:], disable=silent, **options)
    BARS.add(made)
    return made


def close_bars() -> None:
    """Ends the bars that an error left open, so that its message gets a line of its own."""
    for left in list(BARS):
        left.close()


@contextmanager
def written(path: str | Path, mode: str = "w"):
    """A file written aside, flushed to disk, renamed: a reader sees the old file or the new one, never
    half. Raises UserError where the disk refuses."""
    aside = Path(f"{path}.tmp")
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(aside, mode, encoding=encoding) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
        sync_folder(Path(path).parent)
    except (OSError, RuntimeError) as why:
        cause = (
            why if isinstance(why, OSError) else why.__context__
        )  # torch.save hides the disk's error
        if not isinstance(cause, OSError):
            raise
        with suppress(OSError):
            aside.unlink()
        problem = cause.strerror or cause
        raise UserError(f"{path}: cannot be written ({problem}); what was there is whole") from None


def sync_folder(folder: Path) -> None:
    """Flushes a rename to disk, where the system lets a folder be opened (Windows does not)."""
    with suppress(PermissionError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def first_line(why: Exception) -> str:
    """What an error says, in one line."""
    return (str(why).strip() or type(why).__name__).splitlines()[0]


# --------------------------------------------------------------------------------------------------
# pairs and candidates
# --------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """One preference: chosen is better than rejected as the answer to prompt.

    prompt: messages {"role", "content"}; a text becomes one user message, an empty one none."""

    prompt: list[dict]
    chosen: str
    rejected: str
    source: str = ""
    subset: str = ""
    id: str = ""
    margin: float | None = None  # how much better chosen is, from 0
    strength: float | None = None  # an ensemble's mean r_c - r_r (arXiv 2401.06080, Eq. 4)

    def __post_init__(self):
        self.prompt = as_messages(self.prompt)


@dataclass
class Candidates:
    """Several responses to one prompt, each with its gold score: what best of n chooses from."""

    prompt: list[dict]
    responses: list[str]
    gold: list[float]
    subset: str = ""
    id: str = ""
    source: str = ""

    def __post_init__(self):
        self.prompt = as_messages(self.prompt)


def as_messages(prompt: str | list[dict]) -> list[dict]:
    """A text as one user message (an empty one as none); messages as they are."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}] if prompt.strip() else []
    return prompt


# --------------------------------------------------------------------------------------------------
# reading: from one row to a pair
# --------------------------------------------------------------------------------------------------

# A field is taken for a part of the task by the last word of its name, but for a SUFFIX of that word:
# "chat_history", "image_url", "available_tools". Scores, ids, models and the like are none.
TASK_WORDS = set(
    "attachment attachments audio audios context contexts conversation conversations dialog dialogs "
    "dialogue dialogues document documents function functions history image images input inputs "
    "instruction instructions kwargs media messages passage passages photo photos picture pictures "
    "query question thinking tool tools video videos".split()
)
SUFFIXES = set(
    "base64 bytes call calls data definitions list path paths schema schemas text url urls".split()
)
SYSTEM_FIELDS = ("system", "system_prompt", "system_message", "system_instruction")
OWN_FIELDS = {"prompt", "chosen", "rejected", "responses", "gold", *SYSTEM_FIELDS}


def is_empty(value) -> bool:
    """None, blank text, and lists and objects of nothing else."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return all(map(is_empty, value))
    return value is None or (isinstance(value, str) and not value.strip())


def changes_task(name: str) -> bool:
    """Whether a field of this name holds a part of what the model is to read."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    if words[-2:] == ["reasoning", "content"]:
        return True
    while len(words) > 1 and words[-1] in SUFFIXES:
        words.pop()
    return bool(words) and words[-1] in TASK_WORDS


def refuse_task_fields(row: dict, own: set[str], where: str = "") -> None:
    """Raises UnusableField for a field that changes the task, has content, and is not used here."""
    used = [row.get(k) for k in ("prompt", "chosen", "rejected")]
    for name, value in row.items():
        is_number = isinstance(value, (int, float))  # "tools": 3 counts something
        if name in own or is_number or is_empty(value) or not changes_task(name):
            continue
        if where or value not in used:  # "messages" that repeat chosen say nothing new
            raise UnusableField(
                f'with the field "{name}"',
                f'{where}the field "{name}" changes the task and has no place here; '
                "write what it holds into the prompt, or empty it",
            )


def content_of(message, name: str) -> str:
    """The text of a message; text parts are joined."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise UnusableField(
                    f'with content of the type "{kind}"',
                    f'{name}, field "content": a part of the type {kind!r}; only text parts can be used',
                )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{name} holds a message without a text as its content")
    return content


def check_messages(messages, name: str) -> list[dict]:
    """Messages with exactly the fields role and content, or ValueError."""
    if isinstance(messages, str):
        return as_messages(messages)
    if not isinstance(messages, list):
        raise ValueError(f"{name} is neither a text nor a list of messages")
    checked = []
    for m in messages:
        if isinstance(m, dict):
            refuse_task_fields(m, {"role", "content"}, f"{name}: ")
            if not is_empty(m.get("reasoning")):
                raise UnusableField(
                    'with the field "reasoning"', f'{name}: the field "reasoning" has no place here'
                )
        content = content_of(m, name)
        if m.get("role") not in ("system", "user", "assistant"):
            raise ValueError(
                f"{name} holds the role {m.get('role')!r}; roles are system, user, assistant"
            )
        checked.append({"role": m["role"], "content": content})
    return checked


def check_characters(texts: list[str]) -> None:
    """Raises ValueError for text that cannot be written as UTF-8."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half a surrogate pair, which is no character") from None


def parse_number(value, name: str) -> float:
    """A finite number, also one that is given as text, or ValueError."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f'the field "{name}" is the text {value[:40]!r}, no number') from None
    if type(value) not in (int, float) or not abs(value) < 1e30:  # NaN fails too
        raise ValueError(f'the field "{name}" is no finite number')
    return float(value)


# HH-RLHF: "\n\nHuman: ...\n\nAssistant: ..."; copies of it lack the first blank lines, or use one line break
TURN = re.compile(r"(?:\A\s*|\n[ \t]*\n\s*)(Human|Assistant):")
TURN_OF_LINES = re.compile(r"(?:\A\s*|\n)(Human|Assistant):")


def split_dialogue(text: str) -> list[dict] | None:
    """The turns of an HH-RLHF dialogue, None for any other text. The blank that the form puts before
    each turn goes; an assistant's turn that is still to be written is an empty one."""
    text = text.replace("\r\n", "\n")
    for marker in (TURN, TURN_OF_LINES):
        before, *parts = marker.split(text)
        whole = "Assistant" in parts[::2] or text.startswith("\n\nHuman:")
        if not before.strip() and whole:
            roles = ["user" if who == "Human" else "assistant" for who in parts[::2]]
            return [
                {"role": role, "content": without_blank(said)}
                for role, said in zip(roles, parts[1::2])
            ]
    return None


def without_blank(said: str) -> str:
    """Without the one blank or line break that a data set's form puts before what is said."""
    return said[1:] if said[:1] in (" ", "\n") else said


def split_prompt(text: str) -> list[dict] | None:
    """The turns of a prompt that is an HH-RLHF dialogue up to the answer, None for any other text."""
    turns = split_dialogue(text)
    if not turns:
        return None
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        return turns[:-1]
    is_dialogue = turns[-1]["role"] == "user" or text.startswith("\n\nHuman:")
    return (
        turns if is_dialogue else None
    )  # a question about a dialogue that it quotes is a question


def parse_system(row: dict) -> str:
    """The system turn that stands in a field of its own, "" without one."""
    found = {name: row[name] for name in SYSTEM_FIELDS if not is_empty(row.get(name))}
    for name, value in found.items():
        if not isinstance(value, str):
            raise ValueError(f'the field "{name}" is no text')
    if len(set(found.values())) > 1:
        raise ValueError(f"the fields {' and '.join(found)} are two system turns; give one")
    return next(iter(found.values()), "")


def with_system(messages: list[dict], system: str) -> list[dict]:
    """The messages behind the system turn of a field of its own."""
    if not system:
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() != system.strip():
            raise ValueError(
                'the field "system" and the first message are two system turns; give one'
            )
        return messages
    return [{"role": "system", "content": system}, *messages]


def same_turns(a: list[dict], b: list[dict]) -> bool:
    """Whether two lists of messages say the same, but for white space at the ends."""
    said = [[(m["role"], m["content"].strip()) for m in some] for some in (a, b)]
    return said[0] == said[1]


def whole_prompt(prompt: list[dict], turns: list[dict]) -> list[dict]:
    """Where prompt and conversations are both given (TRL): the turns before the answer hold the prompt,
    or follow it. Raises UnusablePair where they do neither."""
    starts = range(len(turns) - len(prompt) + 1)
    if any(same_turns(turns[k : k + len(prompt)], prompt) for k in starts):
        return turns
    if turns and turns[0]["role"] != "assistant" and prompt[-1]["role"] == "user":
        raise UnusablePair("the conversations do not hold the prompt")
    return prompt + turns


def shared_prompt(conversations: list[list[dict]], prompt: list[dict]) -> list[dict]:
    """The turns before the last one, which must be the same in all conversations.

    Raises UnusablePair with the reason where they are not."""
    heads = [whole_prompt(prompt, talk[:-1]) for talk in conversations]
    for head, talk in zip(heads, conversations):
        if same_turns(head, heads[0]):
            continue
        if same_turns(talk[:1], conversations[0][:1]):
            raise UnusablePair("the conversations part before their last turn")
        raise UnusablePair("the two prompts differ")
    return heads[0]


# What opens an answer in common chat templates: texts that hold one part behind it
OPENERS = re.compile(
    r"<\|im_start\|>assistant\n|\[/INST\]|<\|assistant\|>\n?|<start_of_turn>model\n"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|<\|Assistant\|>|<｜Assistant｜>"
    r"|### (?:Response|Assistant):\n?"
)


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    """(prompt, chosen, rejected) of two whole texts: what both start with, up to the end of a word (or
    to where a chat template opens the answer); None where they share no word, or nothing is left."""
    shared = os.path.commonprefix([chosen, rejected])
    room = min(len(chosen.rstrip()), len(rejected.rstrip())) - 1
    openers = [m.end() for m in OPENERS.finditer(shared) if m.end() <= room]
    if openers:
        at = openers[-1]
        return chosen[:at], chosen[at:], rejected[at:]
    blanks = [m.start() for m in re.finditer(r"\s", shared) if m.start() < room]
    at = next(
        (k for k in reversed(blanks) if chosen[k + 1 :].strip() and rejected[k + 1 :].strip()), 0
    )
    if not chosen[:at].strip():
        return None
    return chosen[:at], chosen[at + 1 :], rejected[at + 1 :]


def read_once(prompt: str, texts: list[str]) -> list[str]:
    """The answers without a prompt that all of them repeat. One or two words in common are a greeting,
    and a prompt that ends inside a word of the answer is none of its parts."""
    repeats = len(words_of(prompt)) >= 3 and all(
        text.startswith(prompt) and text[len(prompt) :].strip() for text in texts
    )
    if not repeats:
        return texts
    rests = [text[len(prompt) :] for text in texts]
    ends_whole = not prompt[-1].isalnum() or all(not rest[0].isalnum() for rest in rests)
    return [without_blank(rest) for rest in rests] if ends_whole else texts


def parse_prompt(row: dict) -> tuple[list[dict], bool]:
    """(the prompt's messages, none where it is empty; whether it was an HH-RLHF dialogue)."""
    prompt = row.get("prompt")
    if is_empty(prompt):
        return [], False
    turns = split_prompt(prompt) if isinstance(prompt, str) else None
    return turns or check_messages(prompt, "prompt"), turns is not None


def parse_sides(row: dict, prompt: list[dict], is_dialogue: bool, names: list[str], sides: list):
    """(prompt, answers) of answers in any form: texts, whole dialogues as texts, conversations.

    Args:
        row: the row as read.
        prompt: its prompt, [] for none.
        is_dialogue: whether the prompt was an HH-RLHF dialogue.
        names: what each side is called in messages.
        sides: for each a text or a list of messages.
    """
    texts = [isinstance(side, str) for side in sides]
    if any(texts) and not all(texts):
        raise ValueError(f"one of {' and '.join(names)} is a text, the other a list of messages")
    talks = [split_dialogue(side) for side in sides] if all(texts) else []
    if all(talks) and talks and (not prompt or all(holds(talk, prompt) for talk in talks)):
        sides, texts = talks, [False]
    if not all(texts):
        talks = [check_messages(side, name) for side, name in zip(sides, names)]
        for talk, name in zip(talks, names):
            if not talk or talk[-1]["role"] != "assistant":
                raise UnusablePair(f"{name} does not end with the assistant")
        return shared_prompt(talks, prompt), [talk[-1]["content"] for talk in talks]
    if is_dialogue:
        return prompt, [without_blank(side) for side in sides]
    if prompt:
        raw = row["prompt"] if isinstance(row["prompt"], str) else prompt[-1]["content"]
        return prompt, read_once(raw, sides)
    parts = split_texts(*sides) if len(sides) == 2 else None
    if parts:
        return as_messages(parts[0]), list(parts[1:])
    if row.get("prompt") is None:
        raise ValueError(
            'there is no "prompt", and the texts neither share their start nor are '
            '"\\n\\nHuman: ... \\n\\nAssistant: ..." dialogues; write {"prompt", "chosen", "rejected"}'
        )
    return [], sides


def holds(talk: list[dict], prompt: list[dict]) -> bool:
    """Whether a conversation goes on from the prompt."""
    return same_turns(talk[-1 - len(prompt) : -1], prompt)


def parse_pair(row: dict, counts: Counter | None = None) -> Pair:
    """One row as a Pair, in any of the forms that the head of this file lists.

    Raises ValueError (malformed), UnusableField, or UnusablePair (well-formed, but of no use)."""
    if not isinstance(row, dict):
        raise ValueError("the line is not a JSON object")
    names = ["chosen", "rejected"]
    for name in names:
        if row.get(name) is None:
            there = ", ".join(map(str, row)) or "none"
            raise ValueError(f'the field "{name}" is missing (there are: {there[:200]})')
        if not isinstance(row[name], (str, list)):
            raise ValueError(f'the field "{name}" is neither a text nor a list of messages')
    refuse_task_fields(row, OWN_FIELDS)
    system, (prompt, is_dialogue) = parse_system(row), parse_prompt(row)
    prompt, sides = parse_sides(row, prompt, is_dialogue, names, [row[name] for name in names])
    for text, name in zip(sides, names):
        if not text.strip():
            raise UnusablePair(f"the {name} response is empty")
    if sides[0].strip() == sides[1].strip():
        raise UnusablePair("chosen equals rejected")
    if counts is not None and not is_dialogue and prompt and is_empty(row.get("prompt")):
        counts["prompts read from what both texts share"] += isinstance(row["chosen"], str)
    numbers = {k: parse_number(row[k], k) for k in ("margin", "strength") if row.get(k) is not None}
    if numbers.get("margin", 0) < 0:
        raise ValueError(f'the field "margin" must not be negative, is {numbers["margin"]}')
    labels = {k: str(row[k]) for k in ("source", "subset", "id") if row.get(k) is not None}
    prompt = with_system(prompt, system)
    check_characters([m["content"] for m in prompt] + sides + list(labels.values()))
    return Pair(prompt, *sides, **labels, **numbers)


def listed(value, name: str) -> list:
    """The responses of a field: a text or a conversation is one, a list of them several."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError(f'the field "{name}" is neither a text nor a list')
    if value and all(isinstance(one, dict) for one in value):
        several = name == "responses" or (
            len(value) > 1 and all(m.get("role") == "assistant" for m in value)
        )
        return [[m] for m in value] if several else [value]
    return value


def parse_candidates(row: dict, counts: Counter | None = None) -> Candidates:
    """{"prompt", "responses", "gold"}, or right and wrong ones: {"prompt", "chosen", "rejected"}, each a
    response or a list of them, gold 1 and 0. A response is a text or messages.

    Raises ValueError (malformed), UnusableField, or UnusablePair (well-formed, but of no use)."""
    if not isinstance(row, dict) or row.get("prompt") is None:
        raise ValueError('the line is not a JSON object with a "prompt"')
    refuse_task_fields(row, OWN_FIELDS)
    if "responses" in row:
        responses, gold = listed(row["responses"], "responses"), row.get("gold")
    else:
        right, wrong = (listed(row.get(k), k) for k in ("chosen", "rejected"))
        responses, gold = right + wrong, [1.0] * len(right) + [0.0] * len(wrong)
    if len(responses) < 2 or not all(isinstance(y, (str, list)) for y in responses):
        raise ValueError(
            'there are no two responses (texts or messages) in "responses", nor in "chosen" and "rejected"'
        )
    if not isinstance(gold, list):
        raise ValueError('"gold" is not a list of finite numbers')
    gold = [parse_number(g, "gold") for g in gold]
    if len(gold) != len(responses):
        raise ValueError(f"{len(responses)} responses have {len(gold)} gold scores")
    system, (prompt, is_dialogue) = parse_system(row), parse_prompt(row)
    names = [f"response {k}" for k in range(1, len(responses) + 1)]
    prompt, responses = parse_sides(row, prompt, is_dialogue, names, responses)
    if not all(y.strip() for y in responses):
        raise UnusablePair("a response is empty")
    labels = {k: str(row[k]) for k in ("source", "subset", "id") if row.get(k) is not None}
    prompt = with_system(prompt, system)
    check_characters([m["content"] for m in prompt] + responses + list(labels.values()))
    return Candidates(prompt, responses, gold, **labels)


# --------------------------------------------------------------------------------------------------
# reading: from files, folders and the hub to rows
# --------------------------------------------------------------------------------------------------

OTHER_FORMATS = {  # how a file begins -> what it is; UTF-16 and UTF-32 by their byte-order marks
    b"PK\x03\x04": "a zip archive; unpack it",
    b"BZh": "packed by bzip2; unpack it",
    b"\xfd7zXZ": "packed by xz; unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it",
    b"ARROW1": "an arrow file; give the folder that save_to_disk wrote",
    b"\xff\xfe\0\0": "in UTF-32; write it as UTF-8 (iconv -f UTF-32 -t UTF-8)",
    b"\0\0\xfe\xff": "in UTF-32; write it as UTF-8 (iconv -f UTF-32 -t UTF-8)",
    b"\xff\xfe": "in UTF-16; write it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "in UTF-16; write it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
}
FILE_ENDINGS = (".json", ".jsonl", ".gz", ".parquet", ".arrow", ".csv", ".tsv", ".txt", ".zip", ".zst", ".bz2", ".xz", ".ndjson")  # fmt: skip
HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<split>[\w.-]+))?")


def read_rows(source: str):
    """Yields (where, row) of a file, of a folder that datasets wrote, or of a data set of the hub; a row
    is bytes that are still to be decoded, or an object. Raises UserError for what cannot be read."""
    path = Path(source)
    folder, _, split = str(source).rpartition(":")
    if path.is_dir():
        yield from read_folder(path, "")
    elif path.exists():
        yield from read_file(path)
    elif folder and Path(folder).is_dir():
        yield from read_folder(Path(folder), split)
    elif is_hub_id(str(source)):
        yield from read_hub(str(source))
    else:
        raise UserError(
            f"{source}: there is no such file (a data set of the hub is OWNER/NAME or OWNER/NAME:SPLIT)"
        )


def is_hub_id(source: str) -> bool:
    """Whether a source that is no file here names a data set of the hub, and is not a path gone wrong."""
    match = HUB_ID.fullmatch(source)
    return (
        bool(match)
        and not match["name"].lower().endswith(FILE_ENDINGS)
        and not Path(source).parent.exists()
    )


def read_file(path: Path):
    """The rows of JSON lines, a JSON array or parquet, told apart by what is in the file."""
    number = 0
    try:
        with open(path, "rb") as raw:
            f = raw
            if raw.peek(2)[:2] == b"\x1f\x8b":
                f = io.BufferedReader(gzip.GzipFile(fileobj=raw))
            start = f.peek(64)
            if start[:4] == b"PAR1":
                yield from read_parquet(path)
                return
            for magic, what in OTHER_FORMATS.items():
                if start.startswith(magic):
                    raise UserError(f"{path}: is {what}")
            if b"\0" in (start[0:1], start[1:2]):
                raise UserError(
                    f"{path}: is in UTF-16; write it as UTF-8 (iconv -f UTF-16 -t UTF-8)"
                )
            if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                yield from read_array(path, f.read())
                return
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield f"line {number}", line
    except (OSError, EOFError, zlib.error) as why:
        where = f", after line {number}" if number else ""
        raise UserError(f"{path}{where}: cannot be read ({why})") from None


def read_array(path: Path, raw: bytes):
    """The rows of a JSON array."""
    try:
        rows = json.loads(raw.decode("utf-8-sig"))
    except json.JSONDecodeError as why:
        raise UserError(
            f"{path}, line {why.lineno}: not JSON ({why.msg}); a file is a JSON array or JSON lines"
        ) from None
    except (ValueError, RecursionError) as why:
        raise UserError(f"{path}: cannot be read ({first_line(why)})") from None
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def decoded(row) -> object:
    """A row as an object; ValueError for bytes that are no JSON in UTF-8."""
    if not isinstance(row, bytes):
        return row
    if len(row) > LONGEST_LINE:
        raise ValueError(f"{len(row) / 1e6:.0f} MB, over {LONGEST_LINE / 1e6:.0f}")
    try:
        return json.loads(row.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except json.JSONDecodeError:
        raise ValueError("not JSON") from None
    except UnicodeDecodeError as why:
        raise ValueError(
            f"not UTF-8 but another encoding, perhaps Latin-1 ({why.reason}: {row[why.start]:#x})"
        ) from None


def read_parquet(path: Path):
    """The rows of a parquet file."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(
            f"{path}: parquet files need the package datasets: pip install datasets"
        ) from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            for number, row in enumerate(batch.to_pylist(), number + 1):
                yield f"row {number}", row
    except ArrowException as why:
        raise UserError(f"{path}: cannot be read ({first_line(why)})") from None


def import_datasets(source):
    """The package datasets, or a UserError that says how to install it."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{source}: data sets of the hub and folders of save_to_disk need a package: pip install datasets"
        ) from None
    return datasets


def read_folder(path: Path, split: str):
    """The rows of a folder that datasets' save_to_disk wrote."""
    if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise UserError(
            f"{path}: is a folder, and not one that save_to_disk wrote; give the files in it"
        )
    datasets = import_datasets(path)
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as why:  # arrow, file and version errors of several libraries
        raise UserError(f"{path}: cannot be read ({first_line(why)})") from None
    if isinstance(data, datasets.DatasetDict):
        if (split or "train") not in data:
            raise UserError(
                f"{path}: has the splits {', '.join(data)}; name one, as {path}:{next(iter(data), '')}"
            )
        data = data[split or "train"]
    yield from ((f"row {k}", row) for k, row in enumerate(data, 1))


def read_hub(source: str):
    """The rows of a data set of the hub, NAME or NAME:SPLIT (train, where none is named)."""
    datasets = import_datasets(f"{source}: is no file here, and")
    name, _, split = source.partition(":")
    problem = hub_problem()
    if hasattr(datasets.config, "HF_HUB_OFFLINE"):
        datasets.config.HF_HUB_OFFLINE = bool(problem)
    try:
        data = datasets.load_dataset(name, split=split or "train")
    except Exception as why:  # network, permission, script and file errors of several libraries
        raise UserError(
            f"{source}: is no file here, and cannot be fetched from the hub ({problem or first_line(why)}); "
            "give local files: JSON lines, JSON, parquet"
        ) from None
    yield from ((f"row {k}", row) for k, row in enumerate(data, 1))


def hub_problem() -> str:
    """Why the hub cannot be asked, "" where it can. Asked once, for five seconds: huggingface_hub would
    try again for half a minute. What it has cached is found all the same."""
    from huggingface_hub import constants, get_session

    if os.environ.get("HF_DATASETS_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        constants.HF_HUB_OFFLINE = True
    if constants.HF_HUB_OFFLINE:
        return "offline mode is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as why:  # requests and httpx raise kinds of their own
        constants.HF_HUB_OFFLINE = True
        return f"no connection: {first_line(why)}"
    return ""


def fetch_files(name: str, patterns: list[str], instead: str) -> Path:
    """The folder of a hub data set's files that fit the patterns (cached). Raises UserError."""
    from huggingface_hub import snapshot_download

    problem = hub_problem()
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except Exception as why:  # network, permission and missing-file errors of several libraries
        raise UserError(
            f"{name}: cannot be fetched from the hub ({problem or first_line(why)}); {instead}"
        ) from None


def download_hh(subsets: list[str], split: str) -> list[str]:
    """Raw HH-RLHF files from the hub (cached there). Raises UserError without a network."""
    files = [f"{subset}/{split}.jsonl.gz" for subset in subsets]
    name = "Anthropic/hh-rlhf"
    instead = f"download its {', '.join(files)} elsewhere and give them, or pairs of your own, as local files"
    folder = fetch_files(name, files, instead)
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise UserError(f"{name}: holds no {', '.join(missing)}; {instead}")
    return [str(folder / file) for file in files]


def collect(sources: list, parse, skip_bad: bool, noun: str, hint: str) -> tuple[list, Counter]:
    """(what parse(row, source, counts) makes of all rows of the sources, counts).

    Args:
        sources: files, folders or hub ids.
        parse: a list of items from a row, or one of the errors above.
        skip_bad: drop and count what is malformed, in place of a UserError with file and line.
        noun: what an item is called, in the singular.
        hint: what to do about a malformed row.
    """
    items, counts = [], Counter()
    for source in sources:
        for where, row in read_rows(source):
            try:
                items += parse(decoded(row), source, counts)
            except UnusablePair as why:
                counts[str(why)] += 1
            except (ValueError, RecursionError) as why:
                if not skip_bad:
                    raise UserError(f"{source}, {where}: {first_line(why)}; {hint}") from None
                counts[why.name if isinstance(why, UnusableField) else "bad"] += 1
    counts["pairs"] = len(items)
    if not items:
        left_out = ", ".join(f"{v} {k}" for k, v in counts.items() if v)
        what = f"; left out: {left_out}" if left_out else ", it is empty"
        raise UserError(f"{', '.join(map(str, sources))}: no usable {noun}{what}")
    return items, counts


def read_pairs(sources: list, skip_bad: bool = False, parse=parse_pair) -> tuple[list, Counter]:
    """All pairs of files, folders and hub ids, and counts: "pairs", each reason of UnusablePair, and with
    skip_bad "bad" and each field that was refused. Raises UserError with file and line."""
    hint = "mend the line"
    if parse is parse_pair:
        hint += ", or let `python data_prep.py FILE --skip-bad` drop it"
    noun = "pair" if parse is parse_pair else "prompt with candidates"
    return collect(sources, lambda row, _, counts: [parse(row, counts)], skip_bad, noun, hint)


def read_candidates(sources: list, skip_bad: bool = False) -> tuple[list[Candidates], Counter]:
    """read_pairs for candidates; they may differ in number from prompt to prompt."""
    return read_pairs(sources, skip_bad, parse_candidates)


# --------------------------------------------------------------------------------------------------
# writing and splitting
# --------------------------------------------------------------------------------------------------


def answers(item: Pair | Candidates) -> dict:
    """What a line holds beside its prompt."""
    names = ("chosen", "rejected", "responses", "gold")
    return {k: getattr(item, k) for k in names if hasattr(item, k)}


def write_pairs(path: str | Path, pairs: list, overwrite: bool = False) -> None:
    """One JSON line a pair (or prompt with candidates), gzipped where the name ends in .gz; written
    aside, then renamed. Raises UserError."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists; choose another --out, or --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as why:
        raise UserError(f"{path}: cannot be written ({why.strerror})") from None
    labels = ("source", "subset", "id", "margin", "strength")
    with written(path, "wb") as raw:
        out = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.name.endswith(".gz") else raw
        for p in pairs:
            single = len(p.prompt) == 1 and p.prompt[0]["role"] == "user"
            is_plain = (
                single
                and as_messages(p.prompt[0]["content"])
                and not split_prompt(p.prompt[0]["content"])
            )
            line = {"prompt": p.prompt[0]["content"] if is_plain else p.prompt, **answers(p)}
            known = {k: getattr(p, k, "") for k in labels}
            line |= {k: v for k, v in known.items() if v not in ("", None)}
            out.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        if out is not raw:
            out.close()


def prompt_key(prompt: list[dict], *more) -> float:
    """A hash of the prompt (and of more) in [0, 1). Prompts that differ by white space or a system turn
    alone have the same one: they fall into the same split, and count as a leak."""
    turns = [m for m in prompt if m["role"] != "system"] or prompt
    said = [[m["role"], " ".join(m["content"].split())] for m in turns]
    text = json.dumps([*said, *more], ensure_ascii=False).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64


def repetitions(pairs: list) -> tuple[list, Counter]:
    """(pairs without those that repeat an earlier one, counts). White space around a text makes no
    difference. "reversed": the pairs that say the opposite of an earlier one; "contradictions": the
    comparisons that are answered both ways."""
    unique, first_seen, counts = [], {}, Counter()
    for number, p in enumerate(pairs):
        prompt = [(m["role"], m["content"].strip()) for m in p.prompt]
        sides = [y.strip() if isinstance(y, str) else y for y in answers(p).values()]
        key, opposite = (json.dumps([prompt, some]) for some in (sides, sides[::-1]))
        is_new = key not in first_seen
        if is_new:
            first_seen[key] = number
            unique.append(p)
        is_reversed = first_seen.get(opposite, number) < first_seen[key]
        counts["repetitions"] += not is_new
        counts["reversed"] += is_reversed
        counts["contradictions"] += is_reversed and is_new
    return unique, counts


def flip_labels(
    pairs: list[Pair], noise: float, seed: int, by_strength: bool
) -> tuple[list[Pair], Counter]:
    """Some pairs with chosen and rejected exchanged, and counts.

    First a share `noise` at random, drawn from the seed and the pair itself, so that order and other
    pairs do not matter; then, by_strength, those that an ensemble holds for mislabelled (strength < 0,
    arXiv 2401.06080, 2.4.1). A flip turns the sign of strength; margin stays."""
    flipped, counts = [], Counter()
    for p in pairs:
        is_noisy = prompt_key(p.prompt, p.chosen, p.rejected, seed) < noise
        strength = -p.strength if is_noisy and p.strength is not None else p.strength
        is_mistrusted = by_strength and strength < 0
        counts["labels flipped by --label-noise"] += is_noisy
        counts["labels flipped by --flip-negative-strength"] += is_mistrusted
        if is_noisy != is_mistrusted:  # flipped twice is as it was
            p = replace(
                p, chosen=p.rejected, rejected=p.chosen, strength=p.strength and -p.strength
            )
        flipped.append(p)
    return flipped, +counts  # without zeros


def carve(pairs: list[Pair], count: int) -> tuple[list[Pair], list[Pair]]:
    """(rest, carved): about `count` pairs with the smallest prompt hashes; no prompt is on both sides."""
    keys = np.array([prompt_key(p.prompt) for p in pairs])
    bound = np.sort(keys)[min(count, len(pairs) - 1)]
    rest = [p for p, k in zip(pairs, keys) if k >= bound]
    return rest, [p for p, k in zip(pairs, keys) if k < bound]


def split_pairs(pairs: list, val: float, test: float) -> dict[str, list]:
    """Train, validation and test parts by the hash of the prompt: no prompt is in two of them."""
    parts: dict[str, list] = {"": [], "val": [], "test": []}
    for p in pairs:
        key = prompt_key(p.prompt)
        name = "test" if key < test else "val"
        parts[name if key < test + val else ""].append(p)
    return parts


def labelled(counts: Counter, name: str) -> dict[str, int]:
    """Counts with the name of their set."""
    return {f"{k} ({name})": v for k, v in counts.items() if k != "pairs"}


def unused_name(path: str, taken) -> str:
    """What a data file is called in tables: its name without ending; where that is taken the whole path,
    then numbered."""
    numbered = (f"{path} ({k})" for k in range(2, 2 + len(taken)))
    short = re.sub(r"\.(jsonl|json|parquet)(\.gz)?$", "", Path(path).name)
    return next(name for name in (short, str(path), *numbered) if name not in taken)


def warn_of_leaks(pairs: list[Pair], held: dict[str, list[Pair]]) -> None:
    """Says which held-out sets share prompts with the training pairs. Prompts of the generated language
    repeat by construction, and are none."""
    seen = {prompt_key(p.prompt) for p in pairs if p.source != "synthetic"}
    for name, part in held.items():
        shared = sum(prompt_key(p.prompt) in seen for p in part if p.source != "synthetic")
        if shared:
            print(
                f"warning: {shared} of {len(part)} pairs of {name} have a prompt that is also trained on"
            )


def read_splits(
    data: list[str],
    val_data: list[str],
    eval_data: list[str],
    val_fraction: float,
    val_max: int,
    seed: int,
    label_noise: float = 0.0,
    flip_negative_strength: bool = False,
    needed: dict[str, str] | None = None,
) -> tuple[list[Pair], dict[str, list[Pair]], Counter]:
    """(training pairs, {"validation": ..., each evaluation file: ...}, counts). Raises UserError.

    Args:
        data, val_data, eval_data: files, folders or hub ids.
        val_fraction, val_max: without val_data this share of the pairs, at most so many, validates.
        seed: of the flipped labels.
        label_noise, flip_negative_strength: labels of training pairs that are flipped, see flip_labels.
        needed: {a field that every training pair must have: the flag that reads it}.
    """
    pairs, counts = read_pairs(data)
    for name, flag in (needed or {}).items():
        missing = sum(getattr(p, name) is None for p in pairs)
        if missing:
            hint = (
                " (eval.py accuracy MODEL... --strength OUT writes it)"
                if name == "strength"
                else ""
            )
            raise UserError(
                f"{', '.join(data)}: {missing} of {len(pairs)} pairs lack the field {name} that "
                f"{flag} needs{hint}"
            )
    counts.update(repetitions(pairs)[1])
    if val_data:
        val, more = read_pairs(val_data)
        counts.update(labelled(more, "validation"))
    else:
        pairs, val = carve(pairs, min(val_max, round(val_fraction * len(pairs))))
    if not val or not pairs:
        raise UserError(
            f"{len(pairs)} training and {len(val)} validation pairs: both are needed; give --val-data "
            "or more pairs"
        )
    if label_noise or flip_negative_strength:  # after carving: held-out labels stay as they are
        pairs, flips = flip_labels(pairs, label_noise, seed, flip_negative_strength)
        counts.update(flips)
    held = {"validation": val}
    for path in eval_data:
        name = unused_name(path, held)
        held[name], more = read_pairs([path])
        counts.update(labelled(more, name))
    warn_of_leaks(pairs, held)
    return pairs, held, counts


# --------------------------------------------------------------------------------------------------
# benchmarks
# --------------------------------------------------------------------------------------------------

# Benchmarks become pairs whose subset begins with the group that the benchmark reports by, and whose
# source is "data_prep.py NAME". By that eval.py knows them: a source that only happens to be the name of
# a benchmark, as in a mixture of data sets, says nothing of how the rows were made.
# A converter takes a published record and the path of its file.

SECTIONS = {
    "Chat": "alpacaeval-easy alpacaeval-length alpacaeval-hard mt-bench-easy mt-bench-med".split(),
    "Chat Hard": "mt-bench-hard llmbar-natural llmbar-adver-neighbor llmbar-adver-GPTInst "
    "llmbar-adver-GPTOut llmbar-adver-manual".split(),
    "Safety": "refusals-dangerous refusals-offensive xstest-should-refuse xstest-should-respond "
    "donotanswer".split(),
    "Reasoning": "math-prm hep-cpp hep-go hep-java hep-js hep-python hep-rust".split(),
}
DOMAINS = ("chat", "code", "math", "safety-refuse", "safety-response")
CATEGORIES = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}
ADVERSARIAL = [f"Adversarial/{name}" for name in ("Neighbor", "GPTInst", "GPTOut", "Manual")]


def get(record: dict, name: str, kind: type = str):
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
    if str(label) == second:
        a, b = b, a
    return {"chosen": a, "rejected": b}


def from_rewardbench(record: dict, path: str):
    """RewardBench (arXiv 2403.13787): prompt, chosen, rejected, subset, id. Its prior sets are left out."""
    name = get(record, "subset")
    section = next((s for s, names in SECTIONS.items() if name in names), None)
    if section is None:
        raise UnusablePair("the subset is in none of RewardBench's four sections")
    texts = {k: get(record, k) for k in ("prompt", "chosen", "rejected")}
    yield {**texts, "id": record.get("id"), "subset": f"{section}/{name}"}


def from_rewardbench2(record: dict, path: str):
    """RewardBench 2 (arXiv 2506.01937): chosen (in Ties several), rejected (three or more), subset, id.
    Becomes candidates, the right ones first."""
    sides = {k: record.get(k) for k in ("chosen", "rejected")}
    yield {
        "prompt": get(record, "prompt", (str, list)),
        **sides,
        "subset": get(record, "subset"),
        "id": record.get("id"),
    }


def from_rm_bench(record: dict, path: str):
    """RM-Bench (arXiv 2410.16184): 3 chosen, 3 rejected: concise, detailed, detailed with markdown. Nine
    pairs a prompt, ids ending in /chosen style-rejected style. The domain: a field, or in the file's name."""
    sides = [get(record, k, list) for k in ("chosen", "rejected")]
    domain = record.get("domain") or next((d for d in DOMAINS if d in Path(path).name), None)
    if domain not in DOMAINS or [len(side) for side in sides] != [3, 3]:
        raise ValueError(
            f"not three chosen and three rejected, or the domain, {domain!r}, by the record or the "
            f"file's name is none of {', '.join(DOMAINS)}"
        )
    for i, j in product(range(3), range(3)):
        yield {
            "prompt": get(record, "prompt"),
            "chosen": sides[0][i],
            "rejected": sides[1][j],
            "subset": domain,
            "id": f"{record.get('id')}/{i}-{j}",
        }


def from_rmb(record: dict, path: str):
    """RMB (arXiv 2410.09893): conversation_input, category_path, chosen and reject; best-of-n: bon_best and
    loser_list, a pair a loser, ids ending in /number of the loser of how many."""
    category, is_best_of_n = get(record, "category_path"), "bon_best" in record
    if not re.match("(Pairwise|BoN)_set/(Helpfulness|Harmlessness)", category):
        raise ValueError(f"the category_path {category!r} is none of RMB's")
    best = get(get(record, "bon_best" if is_best_of_n else "chosen", dict), "answer")
    losers = get(record, "loser_list", list) if is_best_of_n else [get(record, "reject", dict)]
    for k, loser in enumerate(losers, 1):
        number = f"{record.get('bon_uid')}/{k}of{len(losers)}"
        yield {
            "prompt": get(record, "conversation_input", list),
            "chosen": best,
            "rejected": get(loser, "answer"),
            "subset": category,
            "id": number if is_best_of_n else record.get("pair_uid"),
        }


def from_judgebench(record: dict, path: str):
    """JudgeBench (arXiv 2410.12784): question, response_A, response_B, label A>B or B>A, source."""
    name = get(record, "source")
    category = next((c for start, c in CATEGORIES.items() if name.startswith(start)), None)
    if category is None:
        raise ValueError(f"the source {name!r} is none of JudgeBench's")
    sides = ordered(
        get(record, "response_A"), get(record, "response_B"), record.get("label"), "A>B", "B>A"
    )
    yield {
        "prompt": get(record, "question"),
        "subset": f"{category}/{name}",
        "id": record.get("pair_id"),
        **sides,
    }


def from_llmbar(record: dict, path: str):
    """LLMBar (arXiv 2310.07641): input, output_1, output_2, label 1 or 2; the path names the subset."""
    named = re.findall("natural|neighbor|gptinst|gptout|manual", path.lower())
    if not named:
        raise ValueError("the path names none of Natural, Neighbor, GPTInst, GPTOut, Manual")
    subset = next(s for s in ("Natural", *ADVERSARIAL) if named[-1] in s.lower())
    sides = ordered(get(record, "output_1"), get(record, "output_2"), record.get("label"), "1", "2")
    yield {"prompt": get(record, "input"), "subset": subset, **sides}


def from_mt_bench(record: dict, path: str):
    """MT-Bench (arXiv 2306.05685), a vote: conversation_a, conversation_b, turn, winner, judge; or LLMBar's
    layout of the majority on first turns.

    Two conversations differ from their first answers on, so the prompt is the first question; a second
    turn continues the response as text, as Formatter writes turns without a template."""
    if "conversation_a" not in record:
        yield {**next(from_llmbar(record, "natural")), "subset": "turn 1, majority"}
        return
    turn, sides = get(record, "turn", int), ("conversation_a", "conversation_b")
    talks = [check_messages(get(record, k, list), k)[: 2 * turn] for k in sides]
    roles = [[m["role"] for m in talk] for talk in talks]
    if turn not in (1, 2) or any(some != ["user", "assistant"] * turn for some in roles):
        raise ValueError(
            f"turn {turn} is not 1 or 2, or not in both conversations as question and answer"
        )
    if talks[0][0] != talks[1][0]:
        raise UnusablePair("the two prompts differ")
    marks = ("", "User: ", "Assistant: ")
    texts = ["\n\n".join(mark + m["content"] for mark, m in zip(marks, talk[1:])) for talk in talks]
    names = ("question_id", "model_a", "model_b", "judge", "turn")
    yield {
        "prompt": talks[0][:1],
        **ordered(*texts, record.get("winner"), "model_a", "model_b"),
        "subset": f"turn {turn}",
        "id": "-".join(str(record.get(k)) for k in names),
    }


BENCHMARKS = {  # converter, data set on the hub or repository to clone, its files
    "rewardbench": (from_rewardbench, "allenai/reward-bench", "data/filtered-*.parquet"),
    "rewardbench-2": (from_rewardbench2, "allenai/reward-bench-2", "data/test-*.parquet"),
    "rm-bench": (from_rm_bench, "THU-KEG/RM-Bench", "*total_dataset.json"),
    "rmb": (from_rmb, "https://github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark", "*.json"),
    "judgebench": (from_judgebench, "ScalerLab/JudgeBench", "*gpt*.json*"),
    "llmbar": (from_llmbar, "https://github.com/princeton-nlp/LLMBar", "*dataset.json"),
    "mt-bench": (from_mt_bench, "lmsys/mt_bench_human_judgments", "data/human-*.parquet"),
}
CONVERTED = "data_prep.py "  # what the source of a converted row begins with


def benchmark_of(item: Pair | Candidates) -> str:
    """The benchmark that a pair (or prompt with candidates) was converted from here, "" for none."""
    name = item.source.removeprefix(CONVERTED)
    return name if name in BENCHMARKS and name != item.source else ""


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
    if source == "rewardbench":
        cells = [[p.subset.split("/")[0]] for p in pairs]
        means["mean of sections"] = list(SECTIONS)
        math = np.array(["/math-prm" in p.subset for p in pairs])
        code = np.array(["/hep-" in p.subset for p in pairs])
        if weight[math].any() and weight[code].any():
            weight[math] *= weight[code].sum() / weight[math].sum()
    elif source == "rm-bench":
        cells, means = style_cells(pairs)
    elif source == "rmb":
        cells = [
            [name for start, name in RMB_SETS.items() if p.subset.startswith(start)] for p in pairs
        ]
        means["mean of the four"] = list(RMB_SETS.values())
        count_prompts_once(pairs, right, weight)
    elif source == "llmbar":
        cells = [[p.subset] for p in pairs]
        means["Adversarial"] = ADVERSARIAL
    else:
        cells = [[p.subset.split("/")[0], "all"] for p in pairs]
    return cells, right, weight, means


def style_cells(pairs: list[Pair]) -> tuple[list[list[str]], dict[str, list[str]]]:
    """RM-Bench: the cell of each pair, {mean: its parts}."""
    levels = {
        "easy": ["1-0", "2-0", "2-1"],
        "normal": ["0-0", "1-1", "2-2"],
        "hard": ["0-1", "0-2", "1-2"],
    }
    styles = sum(levels.values(), [])
    cells = [[f"{p.subset} {s}" for s in styles if p.id.endswith("/" + s)] for p in pairs]
    above = {"safety": DOMAINS[3:], "all": (*DOMAINS[:3], "safety")}
    means = {}
    for domain in (*DOMAINS, *above):
        for level, own in levels.items():
            parts = [f"{domain} {style}" for style in own]
            if domain in above:
                parts = [f"{below} {level}" for below in above[domain]]
            means[f"{domain} {level}"] = parts
        means[domain] = [f"{domain} {level}" for level in levels]
    return cells, means


RMB_SETS = {
    "Pairwise_set/Helpfulness": "Helpfulness pairwise",
    "BoN_set/Helpfulness": "Helpfulness best-of-n",
    "Pairwise_set/Harmlessness": "Harmlessness pairwise",
    "BoN_set/Harmlessness": "Harmlessness best-of-n",
}


def count_prompts_once(pairs: list[Pair], right: np.ndarray, weight: np.ndarray) -> None:
    """RMB's best of n, in place: a prompt counts once, if all its losers are scored, and is right where
    chosen beats each of them."""
    prompts: dict[tuple, list[int]] = {}
    for k, p in enumerate(pairs):
        if m := re.fullmatch(r"(.*)/\d+of(\d+)", p.id):
            prompts.setdefault((p.subset, *m.groups()), []).append(k)
        elif p.subset.startswith("BoN_set"):  # who its rivals are is not known
            weight[k] = 0
    for (*_, losers), index in prompts.items():
        is_whole = weight[index].sum() == int(losers)
        right[index[0]] = right[index].all()
        weight[index] = 0
        weight[index[0]] = is_whole


def rewardbench2_score(items: list[Candidates], rewards: list[np.ndarray]) -> dict[str, float]:
    """RewardBench 2's own numbers: {subset: score, "mean": mean of the subsets there are}.

    A row counts 1 / (responses at the maximum) if its first one, the right one, is at the maximum, else
    0; Ties is another matter, see ties_score. A row that lacks a reward (NaN) counts nowhere."""
    rows, ties = {}, {}
    for item, r in zip(items, rewards):
        r = np.asarray(r, dtype=float)
        if np.isnan(r).any():
            continue
        if item.subset.lower() == "ties":
            is_right = np.array(item.gold) > 0
            kind, _, number = item.id.partition(":")
            ties.setdefault(kind, {})[number] = r[is_right], r[~is_right]
        else:
            best = r == r.max()
            rows.setdefault(item.subset, []).append(best[0] / best.sum())
    scores = {subset: float(np.mean(values)) for subset, values in rows.items()}
    if ties:
        scores["Ties"] = ties_score(ties.get("tied", {}), ties.get("ref", {}))
    if scores:
        scores["mean"] = float(np.mean(list(scores.values())))
    return scores


def ties_score(tied: dict, ref: dict) -> float:
    """The score of RewardBench 2's Ties: {K: (rewards of right answers, of wrong ones)} of the prompts
    with several right answers, and of their references. A prompt is accurate where its worst right answer
    outscores its best wrong one; the spread among right answers should be less than that distance."""

    def distance(prompts: dict, keys) -> np.ndarray:
        return np.array([prompts[k][0].min() - prompts[k][1].max() for k in keys])

    def mean(values: np.ndarray) -> float:
        return float(np.mean(values)) if len(values) else 0.0

    both = [k for k in tied if k in ref]
    d = np.array([np.ptp(tied[k][0]) for k in both])
    t, r = distance(tied, both), distance(ref, both)
    least = np.minimum(r, t)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.nan_to_num(np.tanh(least / d - 1), nan=0.0)  # 0/0
    return (
        0.30 * mean(distance(tied, tied) > 0)
        + 0.30 * mean(distance(ref, ref) > 0)
        + 0.20 * mean(t > d)
        + 0.20 * mean(least > d)
        + 0.01 * mean(ratio)
    )


def benchmark_files(name: str, inputs: list[str] | None) -> list[str]:
    """The files of --input, folders opened; without it those of the hub (cached). Raises UserError."""
    _, home, pattern = BENCHMARKS[name]
    instead = f"give {pattern} of {home}, or their folder, as --input"
    if not inputs and "//" in home:
        raise UserError(f"{name}: is not on the hub; {instead}")
    files = []
    for path in map(Path, inputs or [fetch_files(home, [pattern], instead)]):
        inside = sorted(
            q for q in path.rglob("*") if fnmatch(q.relative_to(path).as_posix(), pattern)
        )
        if path.is_dir() and not inside:
            raise UserError(f"{path}: holds no file {pattern}")
        files += map(str, inside if path.is_dir() else [path])
    return files


def read_benchmark(
    name: str, inputs: list[str] | None, skip_bad: bool = False
) -> tuple[list, Counter]:
    """The pairs (candidates) of a benchmark, counts as of read_pairs. Raises UserError with file and row."""
    convert = BENCHMARKS[name][0]
    finish = parse_candidates if convert is from_rewardbench2 else parse_pair

    def parse(record, source: str, counts: Counter) -> list:
        if not isinstance(record, dict):
            raise ValueError("is no JSON object")
        items = []
        for row in convert(record, source):
            try:
                items.append(finish({**row, "source": CONVERTED + name}))
            except UnusablePair as why:
                counts[str(why)] += 1
        return items

    hint = "mend it, or drop it with --skip-bad"
    return collect(benchmark_files(name, inputs), parse, skip_bad, "pair", hint)


# --------------------------------------------------------------------------------------------------
# the generated language
# --------------------------------------------------------------------------------------------------

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
    "space": "moon star planet comet rocket orbit galaxy meteor nebula satellite",
}
FILLERS = (
    "well often quite maybe really just also then there here some many such very rather indeed still "
    "even only once perhaps always sometimes usually mostly nearly about around over under again soon "
    "later early before after since while though yet else thus hence likely surely clearly simply "
    "fairly partly mainly truly kindly gladly sadly oddly rarely seldom twice anyway meanwhile"
).split()
CUES = ("thanks", "regards")


@dataclass
class Language:
    """How large the language is: topics, items of each, filler words, and fillers between item and cue."""

    topics: int = 12
    items: int = 10
    fillers: int = 60
    shortest: int = 8
    longest: int = 16

    def __post_init__(self):
        """Words beyond the built-in ones are numbered, as topic13 or fruititem10."""
        self.names = list(TOPICS)[: self.topics]
        self.names += [f"topic{i}" for i in range(len(TOPICS), self.topics)]
        self.things = []
        for name in self.names:
            known = TOPICS.get(name, "").split()
            numbered = [f"{name}item{k}" for k in range(len(known), self.items)]
            self.things.append((known + numbered)[: self.items])
        numbered = [f"filler{i}" for i in range(len(FILLERS), self.fillers)]
        self.fill = FILLERS[: self.fillers] + numbered

    def vocabulary(self) -> list[str]:
        """Every word, for a word-level tokenizer."""
        return [*self.names, *(w for things in self.things for w in things), *self.fill, *CUES]

    def some(self, rng, low: int, high: int) -> list[str]:
        """From low to high fillers."""
        return [
            self.fill[i] for i in rng.integers(len(self.fill), size=rng.integers(low, high + 1))
        ]

    def prompt(self, rng, topic: int) -> list[dict]:
        """A prompt of the topic."""
        words = self.some(rng, 0, 3) + [self.names[topic]] + self.some(rng, 1, 4)
        return [{"role": "user", "content": " ".join(words)}]

    def response(self, rng, topic: int, cue: str) -> str:
        """A response that names an item of the topic and closes with the cue."""
        words = self.some(rng, 0, 3) + [self.things[topic][rng.integers(self.items)]]
        return " ".join(words + self.some(rng, self.shortest, self.longest) + [cue])


def synthetic_vocabulary() -> list[str]:
    """Every word of the language in its usual size."""
    return Language().vocabulary()


def synthetic_pairs(n: int, agreement: float, seed: int, **sizes) -> list[Pair]:
    """n pairs of the Language of these sizes; subset says whether the cue goes with or against the label."""
    rng, language = np.random.default_rng([seed, 7]), Language(**sizes)
    pairs = []
    for k in range(n):
        right, wrong = rng.choice(language.topics, 2, replace=False)
        agrees = rng.random() < agreement
        prompt = language.prompt(rng, right)
        chosen = language.response(rng, right, CUES[not agrees])
        rejected = language.response(rng, wrong, CUES[agrees])
        subset = "with the cue" if agrees else "against the cue"
        pairs.append(Pair(prompt, chosen, rejected, "synthetic", subset, f"{seed}-{k}"))
    return pairs


def synthetic_candidates(
    n: int, responses: int, agreement: float, seed: int, **sizes
) -> list[Candidates]:
    """n prompts, each with candidates of which a quarter, at random, are right (gold 1, else 0)."""
    rng, language = np.random.default_rng([seed, 8]), Language(**sizes)
    out = []
    for k in range(n):
        topic = rng.integers(language.topics)
        gold = rng.random(responses) < 0.25
        agrees = rng.random(responses) < agreement
        other = (topic + rng.integers(1, language.topics, size=responses)) % language.topics
        prompt = language.prompt(rng, topic)
        texts = []
        for is_right, with_cue, wrong in zip(gold, agrees, other):
            about = topic if is_right else wrong
            texts.append(language.response(rng, about, CUES[int(is_right != with_cue)]))
        labels = {"id": f"{seed}-{k}", "source": "synthetic"}
        out.append(Candidates(prompt, texts, gold.astype(float).tolist(), **labels))
    return out


def write_demo_data(folder: str | Path, seed: int, overwrite: bool = False) -> None:
    """The demo's files: pairs to train on, three held-out sets, candidates for best of n."""
    folder = Path(folder)
    agreements = {"train": 0.9, "in-distribution": 0.9, "cue-neutral": 0.5, "cue-reversed": 0.1}
    for k, (name, agreement) in enumerate(agreements.items()):
        pairs = synthetic_pairs(12_800 if name == "train" else 600, agreement, seed * 10 + k)
        write_pairs(folder / f"{name}.jsonl", pairs, overwrite)
    write_pairs(
        folder / "candidates.jsonl", synthetic_candidates(500, 16, 0.1, 77 + seed), overwrite
    )


def demo_tokenizer():
    """A word-level tokenizer of the language, for student and teacher."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "eos": "</s>"}
    words = [*special.values(), "User:", "Assistant:", *synthetic_vocabulary()]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {f"{name}_token": token for name, token in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **named)


# --------------------------------------------------------------------------------------------------
# from a pair's text to tokens and words
# --------------------------------------------------------------------------------------------------

FIXED_DATE = "{%- macro strftime_now(form) -%}26 July 2024{%- endmacro -%}"  # or rewards change from day to day


def load_tokenizer(name: str):
    """A fast tokenizer, checked to be one that can serve here; of several chat templates the default one.

    Raises UserError."""
    from transformers import AutoTokenizer

    is_local = Path(name).is_dir()
    if is_local and not any(
        re.search("tok|vocab|merges|spiece|spm|sentencepiece", p.name) for p in Path(name).iterdir()
    ):
        raise UserError(
            f"{name}: holds no tokenizer; put its files there too (tokenizer.save_pretrained)"
        )
    problem = "" if is_local else hub_problem()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as why:  # the hub, the disk and every tokenizer raise kinds of their own
        hint = (
            ""
            if is_local
            else f" (no such local directory; as a hub id it could not be fetched{problem and ', ' + problem})"
        )
        raise UserError(
            f"{name}: its tokenizer cannot be loaded{hint}: {first_line(why)}"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(
            f"{name}: no fast tokenizer, and only those tell which characters a token covers"
        )
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise UserError(
                f"{name}: has the chat templates {', '.join(template)}, none of them the default"
            )
        template = tokenizer.chat_template = template["default"]
    if template and "strftime_now" in template and FIXED_DATE not in template:
        tokenizer.chat_template = FIXED_DATE + template
    return tokenizer


CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
WORD = re.compile(
    rf"[{CJK}]|[^\s{CJK}]+"
)  # our choice: runs without white space, single CJK characters


def words_of(text: str) -> np.ndarray:
    """Start and end of each word, (W, 2)."""
    return np.array([m.span() for m in WORD.finditer(text)], dtype=np.int64).reshape(-1, 2)


def tokens_to_words(offsets: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """For tokens with character offsets (n, 2) the index of the first word (W, 2) each touches, -1 for
    none. A word that stands nowhere, (-1, -1), is touched by none."""
    placed = np.flatnonzero(spans[:, 0] >= 0)
    if not len(placed) or not len(offsets):
        return np.full(len(offsets), -1)
    spans = spans[placed]
    first = np.searchsorted(spans[:, 1], offsets[:, 0], side="right")  # ends after the token starts
    touches = spans[np.minimum(first, len(spans) - 1), 0] < offsets[:, 1]
    touches &= (first < len(spans)) & (offsets[:, 1] > offsets[:, 0])
    return np.where(touches, placed[np.minimum(first, len(spans) - 1)], -1)


def match_words(wanted: list[str], there: list[str]) -> np.ndarray:
    """For each wanted word its place in a rewritten text, in order, -1 for none: (W,). The ends first,
    since a template mostly takes a part away."""
    place = np.full(len(wanted), -1)
    room = min(len(wanted), len(there))
    tail = next((k for k in range(room) if wanted[-1 - k] != there[-1 - k]), room)
    head = next((k for k in range(room - tail) if wanted[k] != there[k]), room - tail)
    place[len(wanted) - tail :] = np.arange(len(there) - tail, len(there))
    place[:head] = np.arange(head)
    middle = wanted[head : len(wanted) - tail], there[head : len(there) - tail]
    for a, b, size in difflib.SequenceMatcher(None, *middle, autojunk=False).get_matching_blocks():
        place[head + a : head + a + size] = np.arange(head + b, head + b + size)
    return place


class Formatter:
    """The one place that builds the string that is scored, in training and evaluation.

    It is what the tokenizer's chat template makes of the messages, tokenizer.apply_chat_template(messages,
    tokenize=False), and nothing else: so TRL and RewardBench score. Without a chat template it is the
    plain form "System: ...\\n\\nUser: ...\\n\\nAssistant: ..." and the end token, after the begin token
    where the tokenizer writes one. The string is tokenised with add_special_tokens=False.

    What would end a turn or start another is defused inside the contents by a space after its first
    character ("< |im_end|>"), see clean. Raises UserError for a tokenizer with neither template nor end
    token, and where the template refuses the messages."""

    def __init__(self, tokenizer, counts: Counter | None = None):
        self.tokenizer = tokenizer
        self.counts = Counter() if counts is None else counts
        self.eos = tokenizer.eos_token or tokenizer.sep_token  # [SEP]: BERT's
        bos = tokenizer.bos_token or tokenizer.cls_token
        writes_bos = bos and tokenizer("a")["input_ids"][:1] == tokenizer.convert_tokens_to_ids(
            [bos]
        )
        self.bos = bos if writes_bos else ""
        self.template = self.template_source()
        if not self.template and self.eos is None:
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer has no end token (eos_token); set one in its "
                "tokenizer_config.json"
            )
        self.known_markup: dict[tuple, list[str]] = {}
        self.reasoning = self.reasoning_tags()
        control = sorted(self.control_strings(), key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, control)) or r"(?!)")

    def template_source(self) -> str:
        """The chat template in use, "" for none."""
        if not self.tokenizer.chat_template:
            return ""
        try:
            return self.tokenizer.get_chat_template()
        except Exception as why:  # several, and none of them the default
            raise UserError(f"{self.tokenizer.name_or_path}: {first_line(why)}") from None

    def __call__(self, prompt: list[dict], response: str) -> str:
        """Cleaned messages and response -> the string that is scored."""
        return self.render([*prompt, {"role": "assistant", "content": response}])

    def render(self, messages: list[dict]) -> str:
        """The string of whole messages."""
        if not self.template:
            names = {"system": "System", "user": "User", "assistant": "Assistant"}
            turns = [f"{names[m['role']]}: {m['content']}" for m in messages]
            return self.bos + "\n\n".join(turns) + self.eos
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as why:  # a template raises what it likes
            roles = ", ".join(m["role"] for m in messages)
            raise UserError(
                f"{self.tokenizer.name_or_path}: its chat template refuses the roles {roles} "
                f"({first_line(why)})"
            ) from None

    def markup(self, roles: tuple[str, ...]) -> list[str]:
        """The literal text before, between and after contents of these roles: len(roles) + 1 pieces, all
        empty where the template leaves contents out, repeats or moves them."""
        if roles not in self.known_markup:
            marks = [
                f"\ue000{i}\ue001" for i in range(len(roles))
            ]  # characters that no template has
            text = self.render([{"role": r, "content": m} for r, m in zip(roles, marks)])
            pieces = re.split("\ue000\\d+\ue001", text)
            if re.findall("\ue000\\d+\ue001", text) != marks:
                pieces = [""] * (len(roles) + 1)
            self.known_markup[roles] = pieces
        return self.known_markup[roles]

    def without_reasoning(self, piece: str) -> str:
        """A piece of markup up to the template's own reasoning tags, as of an empty think block."""
        return min((piece.split(tag)[0] for tag in self.reasoning), key=len, default=piece)

    def probes(self) -> list[list[str]]:
        """The markup of some usual conversations, those that the template takes."""
        found = []
        for roles in (
            "user assistant user assistant",
            "system user assistant",
            "user system assistant",
        ):
            with suppress(UserError):  # the template is asked again for the roles of the data
                found.append(self.markup(tuple(roles.split())))
        return found

    def reasoning_tags(self) -> set[str]:
        """Pairs of tags that the template itself writes or looks for inside a turn, as <think> and
        </think>; pairs around a whole content, as [INST] and [/INST], are none."""
        names = {("<{}>", "</{}>"): r"</(\w+)>", ("[{}]", "[/{}]"): r"\[/(\w+)\]"}
        named = {
            getattr(self.tokenizer, f"{k}_token")
            for k in ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
        }
        tags = set()
        for forms, pattern in names.items():
            for name in set(re.findall(pattern, self.template)):
                opening, closing = (form.format(name) for form in forms)
                starts = ["".join(p[:k]) for p in self.probes() for k in range(1, len(p))]
                encloses = any(start.count(opening) > start.count(closing) for start in starts)
                if not encloses and not named & {opening, closing}:
                    tags |= {opening, closing}
        return tags

    def control_strings(self) -> set[str]:
        """Special tokens, other added tokens that the template writes, and the text it puts between turns."""
        special = set(self.tokenizer.all_special_tokens)
        splitter = "|".join(map(re.escape, special)) or r"(?!)"
        pieces, between = [], set()
        for probe in self.probes():
            pieces += probe
            marks = probe[1:-1]
            between |= {p for p in marks if re.search(r"\w", p)}
            # "</s><s>[INST]": a text could hold [INST] alone ("assistant" alone is only a word)
            parts = [part for p in marks for part in re.split(splitter, p)]
            between |= {p for p in parts if re.fullmatch(r"\s*[\[<{|].*\w.*[\]>}|]\s*", p)}
        added = {
            t.content
            for t in self.tokenizer.added_tokens_decoder.values()
            if t.special or any(t.content in p for p in pieces)
        }
        strings = added | special | {b.strip(" ") for b in between}
        return {t for t in strings - self.reasoning if len(t) > 1}

    def clean(self, text: str) -> str:
        """The text with control strings defused (counted)."""
        while self.control.search(text):
            text, count = self.control.subn(lambda m: m[0][0] + " " + m[0][1:], text)
            self.counts["defused control tokens"] += count
        return text

    def place(self, text: str, prompt: list[dict], response: str) -> tuple[list[np.ndarray], int]:
        """Where the words of each content stand in the string that __call__ made of them: for each a
        (W, 2) array, (-1, -1) for a word that the template left out; and where the response begins."""
        contents = [m["content"] for m in prompt] + [response]
        pieces = self.markup((*(m["role"] for m in prompt), "assistant"))
        heads = [self.without_reasoning(p) for p in pieces]
        placed, end, start = [], 0, 0
        for content, piece, head, after in zip(contents, pieces, heads, heads[1:]):
            found = self.place_exactly(text, content, (piece, head), after, end)
            if found is None:
                found = self.place_words(text, content, head, after, end)
            spans, start, end = found
            placed.append(spans)
        return placed, start

    @staticmethod
    def place_exactly(text: str, content: str, before: tuple[str, str], after: str, end: int):
        """(word spans, start, end) of a content that stands between the markup as it is, or stripped, as
        some templates do; None if it does not. end: where the content before it ended."""
        lead = len(content) - len(content.lstrip())
        forms = [
            (content, 0),
            (content.strip(), lead),
            (content.rstrip(), 0),
            (content.lstrip(), lead),
        ]
        for piece, (form, shift) in product(before, forms):
            start = end + len(piece)
            if text.startswith(piece, end) and text.startswith(form + after, start):
                return words_of(content) + (start - shift), start, start + len(form)
        return None

    @staticmethod
    def place_words(text: str, content: str, before: str, after: str, end: int):
        """(word spans, start, end) of a content that the template rewrote: word by word, between the
        markup as far as that is to be found."""
        start = end + len(os.path.commonprefix([before, text[end:]]))
        stop = text.find(after, start) if after.strip() else -1
        stop = len(text) if stop < 0 else stop
        words, there = words_of(content), words_of(text[start:stop])
        at = match_words(
            [content[a:b] for a, b in words], [text[start + a : start + b] for a, b in there]
        )
        spans = np.full_like(words, -1)
        spans[at >= 0] = there[at[at >= 0]] + start
        is_bounded = stop < len(text)
        return spans, start, stop if is_bounded else max(int(spans.max(initial=0)), start)

    def unwrap(self, prompt: list[dict], responses: list[str]) -> tuple[list[dict], list[str]]:
        """Messages and responses without the model's own chat template, where they hold it already and
        that is unambiguous: one user message that is the whole template up to the answer, responses that
        all close as an answer does. Others come back as they are."""
        if not self.template:
            return prompt, responses
        inner = None
        if len(prompt) == 1 and self.control.search(prompt[0]["content"]):
            inner = self.inner_messages(prompt[0]["content"])
        tail = self.markup(("user", "assistant"))[-1]
        for close in (tail, tail.strip(), self.eos):
            cut = [y.removesuffix(close or "") for y in responses]
            if (
                close
                and all(y.endswith(close) for y in responses)
                and not any(map(self.control.search, cut))
            ):
                responses = cut
                break
        return inner or prompt, responses

    def inner_messages(self, text: str) -> list[dict] | None:
        """The messages of a text that is this template, from the first turn to where the answer opens."""
        two = [self.without_reasoning(p) for p in self.markup(("user", "assistant") * 2)]
        opener = two[2][len(os.path.commonprefix([two[2], two[4]])) :]  # of a later user turn
        turns = text.count(two[1].strip()) if two[1].strip() else 0
        if not turns:
            return None
        for system in ((), ("system",)):
            roles = (*system, *("user", "assistant") * turns)
            with suppress(UserError):
                heads = [self.without_reasoning(p) for p in self.markup(roles)][:-1]
                rest = "(.*?)".join(map(re.escape, ["", *heads[1:-1], heads[-1].rstrip()]))
                for first in {heads[0], heads[0].removeprefix(self.bos)} | (
                    {opener} if not system else set()
                ):
                    match = re.fullmatch(re.escape(first.lstrip()) + rest, text.strip(), re.DOTALL)
                    if match and not any(map(self.control.search, match.groups())):
                        return [{"role": r, "content": c} for r, c in zip(roles, match.groups())]
        return None


@dataclass
class Example:
    """One pair, encoded. Student: packed layout u; teacher: three token runs that either order can join.

    Words are those of the contents alone: of the prompt's messages in order, of y_c, of y_r."""

    ids: (
        np.ndarray
    )  # (n,) tokens of [x | y_c | y_r], what both sequences start with inside the prompt once
    seg: np.ndarray  # (n,) 0 = x, 1 = y_c, 2 = y_r
    word: np.ndarray  # (n,) word of each token, -1 = markup
    word_seg: np.ndarray  # (W,) segment of each word
    runs: list  # teacher: [(ids, word)] of x, y_c, y_r, uncut; empty without a teacher
    texts: list[str]  # the contents that hold the words: prompt messages, chosen, rejected
    pair: Pair  # as read

    @property
    def words(self) -> list[str]:
        """The W words."""
        return [text[a:b] for text in self.texts for a, b in words_of(text)]


class Fitted(NamedTuple):
    """One item that fits into the model's length, and what was made of it."""

    item: Pair | Candidates
    prompt: list[dict]  # cleaned and cut
    responses: list[str]  # k of them, cleaned
    texts: list[str]  # k strings that are scored
    tokens: list  # k times (ids (n,), offsets (n, 2))


REFUSED = "with roles that the chat template refuses"
FOREIGN = "with another chat template inside"
MARKS = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|eot_id|user|assistant|system|end)\|>|\[/?INST\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>|<[｜|](?:User|Assistant)[｜|]>|### (?:Instruction|Response|Human|Assistant):"
)


class Encoder:
    """Pairs -> Examples, with the counts of what was cut, dropped or defused.

    Args:
        tokenizer: the student's.
        max_length: tokens of the longer of the two sequences.
        overlong: "truncate" (the oldest of the prompt goes), "drop" or "error".
        teacher_tokenizer: the teacher's, None without a teacher.
    """

    def __init__(
        self, tokenizer, max_length: int, overlong: str = "truncate", teacher_tokenizer=None
    ):
        self.counts = Counter()
        self.formatter = Formatter(tokenizer, self.counts)
        self.tokenizer, self.teacher = tokenizer, teacher_tokenizer
        self.max_length, self.overlong = max_length, overlong
        self.has_warned = False

    def tokenise(self, tokenizer, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids (n,), offsets (n, 2)) of each text, all in one parallel call."""
        if not texts:
            return []
        enc = tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [
            (np.array(ids, dtype=np.int64), np.array(offsets, dtype=np.int64).reshape(-1, 2))
            for ids, offsets in zip(enc["input_ids"], enc["offset_mapping"])
        ]

    def shorten(self, prompt: list[dict], responses: list[str]):
        """(prompt, strings, tokens) with the oldest of the prompt cut until all sequences fit; None where
        a response cannot. The system turn goes last."""
        prompt = [dict(m) for m in prompt]
        while True:
            texts = [self.formatter(prompt, y) for y in responses]
            tokens = self.tokenise(self.tokenizer, texts)
            longest = max(range(len(tokens)), key=lambda k: len(tokens[k][0]))
            excess = len(tokens[longest][0]) - self.max_length
            if excess <= 0:
                return prompt, texts, tokens
            filled = [i for i, m in enumerate(prompt) if m["content"]]
            if not filled:
                return None
            turns = [i for i, m in enumerate(prompt) if m["role"] != "system"]
            target = next((i for i in filled if i in turns), filled[0])
            spans, _ = self.formatter.place(texts[longest], prompt, responses[longest])
            tokens_of_words = tokens_to_words(tokens[longest][1], spans[target])
            inside = np.flatnonzero(tokens_of_words >= 0)
            later = [i for i in turns if i > target and prompt[i]["role"] == "user"]
            if len(inside) <= excess and later and target in turns:
                del prompt[turns[0] : later[0]]  # the whole oldest turn goes, its markup too
                continue
            content, cut = prompt[target]["content"], None
            if len(inside) > excess:  # inside the word of the first token that stays
                token, word = inside[excess], tokens_of_words[inside[excess]]
                within = tokens[longest][1][token, 0] - spans[target][word, 0]
                cut = max(words_of(content)[word, 0] + max(within, 0), 1)
            prompt[target]["content"] = content[cut:].lstrip() if cut else ""

    def prepare(self, item, responses) -> tuple[list[dict], list[str]]:
        """The item's messages and responses, out of the model's own template, control tokens defused."""
        prompt, sides = self.formatter.unwrap(item.prompt, responses(item))
        self.counts["in the model's own chat template, unwrapped"] += prompt is not item.prompt
        contents = [m["content"] for m in prompt] + sides
        self.counts[FOREIGN] += any(map(MARKS.search, contents))
        prompt = [{**m, "content": self.formatter.clean(m["content"])} for m in prompt]
        return prompt, [self.formatter.clean(y) for y in sides]

    def fit(self, items: list, responses, progress: str = "", chunk: int = 1024):
        """Yields chunks of [Fitted or None], one entry an item, with the k texts of responses(item).

        Overlong items are cut, dropped (None) or raise UserError, as asked; items whose roles the chat
        template refuses are dropped, and raise it where none is left; all counted."""
        refused, left, foreign = None, 0, self.counts[FOREIGN]
        for start in bar(range(0, len(items), chunk), progress):
            built = []
            for item in items[start : start + chunk]:
                prompt, sides = self.prepare(item, responses)
                texts = []
                try:
                    texts = [self.formatter(prompt, y) for y in sides]
                except UserError as why:
                    refused = why
                    self.counts[REFUSED] += 1
                built.append((item, prompt, sides, texts))
            tokens = iter(self.tokenise(self.tokenizer, [t for *_, texts in built for t in texts]))
            fitted = []
            for number, (item, prompt, sides, texts) in enumerate(built, start + 1):
                own = [next(tokens) for _ in texts]
                fitted.append(self.fit_one(Fitted(item, prompt, sides, texts, own), number))
            left += sum(one is not None for one in fitted)
            yield fitted
        if refused and not left:
            raise refused
        self.warn_of_templates(self.counts[FOREIGN] - foreign, len(items))

    def fit_one(self, fitted: Fitted, number: int) -> Fitted | None:
        """The item within max_length, None where it is dropped."""
        longest = max((len(ids) for ids, _ in fitted.tokens), default=0)
        if 0 < longest <= self.max_length:
            return fitted
        if not longest:
            return None
        if self.overlong == "error":
            raise UserError(
                f"pair {fitted.item.id or number} has {longest} tokens, over --max-length "
                f"{self.max_length}; raise it, or use --overlong truncate or drop"
            )
        cut = self.shorten(fitted.prompt, fitted.responses) if self.overlong == "truncate" else None
        self.counts["truncated" if cut else "dropped"] += 1
        if not cut:
            return None
        prompt, texts, tokens = cut
        return fitted._replace(prompt=prompt, texts=texts, tokens=tokens)

    def warn_of_templates(self, foreign: int, items: int) -> None:
        """Says once that contents hold a chat template which cannot be taken off."""
        if foreign and not self.has_warned:
            self.has_warned = True
            print(
                f"warning: {foreign} of {items} prompts or responses ({foreign / items:.0%}) hold chat markup "
                "(<|im_start|>, [INST] ...) that is not this model's template; give the bare messages"
            )

    def __call__(self, pairs: list[Pair], progress: str = "") -> list[Example]:
        """The Examples of the pairs that fit, see fit. Raises UserError."""
        examples = []
        for chunk in self.fit(pairs, lambda p: [p.chosen, p.rejected], progress):
            some = [fitted for fitted in chunk if fitted]
            packed = [self.pack(fitted) for fitted in some]
            if self.teacher is not None:
                self.add_runs(packed, some)
            examples += packed
        return examples

    def pack(self, fitted: Fitted) -> Example:
        """The packed layout and the words of one pair."""
        (ids_c, off_c), (ids_r, off_r) = fitted.tokens
        contents = [m["content"] for m in fitted.prompt]
        words, inside, missing = [], [], 0
        for text, response, (_, offsets) in zip(fitted.texts, fitted.responses, fitted.tokens):
            spans, start = self.formatter.place(text, fitted.prompt, response)
            words.append(tokens_to_words(offsets, np.concatenate(spans)))
            beyond = np.flatnonzero(offsets[:, 1] > start)  # tokens that reach into the response
            inside.append(int(beyond[0]) if len(beyond) else len(offsets))
            missing += sum(int((s[:, 0] < 0).sum()) for s in spans)
        self.counts["words that the chat template leaves out"] += missing
        P, C, R = (
            sum(len(words_of(t)) for t in some)
            for some in (contents, *[[y] for y in fitted.responses])
        )
        shared = min(inside)
        differ = np.flatnonzero(ids_c[:shared] != ids_r[:shared])
        nx = (
            int(differ[0]) if len(differ) else shared
        )  # longest common token prefix inside the prompt
        word_r = np.where(
            words[1] >= P, words[1] + C, words[1]
        )  # words of y_r come after those of y_c
        return Example(
            ids=np.concatenate([ids_c, ids_r[nx:]]),
            seg=np.repeat([0, 1, 2], [nx, len(ids_c) - nx, len(ids_r) - nx]),
            word=np.concatenate([words[0], word_r[nx:]]),
            word_seg=np.repeat([0, 1, 2], [P, C, R]),
            runs=[],
            texts=[*contents, *fitted.responses],
            pair=fitted.item,
        )

    def add_runs(self, examples: list[Example], fitted: list[Fitted]) -> None:
        """The teacher's tokens of x, y_c and y_r of each pair, with their words."""
        read = [(*self.teacher_prompt(f.prompt), *f.responses) for f in fitted]
        tokens = iter(
            self.tokenise(self.teacher, [t for x, _, *sides in read for t in (x, *sides)])
        )
        special = [i for i in self.teacher.all_special_ids if i != self.teacher.unk_token_id]
        spare = (self.teacher.unk_token_id, self.teacher.mask_token_id)
        harmless = next((i for i in spare if i is not None), 0)
        for example, (_, x_words, chosen, rejected) in zip(examples, read):
            first = 0
            for spans in (x_words, words_of(chosen), words_of(rejected)):
                ids, offsets = next(tokens)
                word = tokens_to_words(offsets, spans)
                word = np.where(word >= 0, word + first, -1)
                ids = np.where(
                    np.isin(ids, special), harmless, ids
                )  # a typed "[SEP]" is no separator
                example.runs.append((ids, word))
                first += len(spans)

    @staticmethod
    def teacher_prompt(prompt: list[dict]) -> tuple[str, np.ndarray]:
        """(the prompt as the teacher reads it, with its own role marks between several turns, the words
        of the contents in it (P, 2))."""
        text, spans = "", [words_of("")]
        for m in prompt:
            text += "\n" if text else ""
            text += m["role"].capitalize() + ": " if len(prompt) > 1 else ""
            spans.append(words_of(m["content"]) + len(text))
            text += m["content"]
        return text, np.concatenate(spans)


# --------------------------------------------------------------------------------------------------
# command line
# --------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    ap = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    ap.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="hh-rlhf, synthetic, files, folders of save_to_disk, hub ids, or a benchmark: "
        + ", ".join(BENCHMARKS),
    )
    ap.add_argument("--out", required=True, help="file to write; gzipped where it ends in .gz")
    ap.add_argument("--overwrite", action="store_true", help="replace --out where it exists")
    ap.add_argument(
        "--skip-bad",
        action="store_true",
        help="count malformed rows instead of stopping at the first",
    )
    ap.add_argument(
        "--drop-duplicates", action="store_true", help="drop exact repetitions (counted either way)"
    )
    ap.add_argument(
        "--limit", type=int, default=0, help="write only the first N pairs (default: 0 = all)"
    )
    ap.add_argument(
        "--val-fraction", type=float, default=0.0, help="share for FILE.val.jsonl (default: 0)"
    )
    ap.add_argument(
        "--test-fraction", type=float, default=0.0, help="share for FILE.test.jsonl (default: 0)"
    )
    ap.add_argument(
        "--input",
        nargs="+",
        metavar="FILE",
        help="instead of the hub: raw files of hh-rlhf, or those of a benchmark as published (JSON, JSON lines, parquet, "
        "gzipped or not), or their folders",
    )
    hh = ap.add_argument_group("hh-rlhf")
    hh.add_argument(
        "--subsets",
        nargs="+",
        default=["helpful-base", "harmless-base"],
        metavar="NAME",
        help="folders of Anthropic/hh-rlhf on the hub (default: helpful-base harmless-base)",
    )
    hh.add_argument(
        "--hub-split", default="train", choices=["train", "test"], help="its split (default: train)"
    )
    syn = ap.add_argument_group("synthetic")
    for name, default, text in (
        ("pairs", 12_800, "number of pairs"),
        ("topics", 12, "topics"),
        ("items", 10, "items of each topic"),
        ("fillers", 60, "filler words"),
        ("shortest", 8, "fewest fillers between item and cue"),
        ("longest", 16, "most fillers between item and cue"),
        ("seed", 0, "seed"),
    ):
        syn.add_argument(
            f"--{name}", type=int, default=default, help=f"{text} (default: {default})"
        )
    syn.add_argument(
        "--responses",
        type=int,
        default=0,
        metavar="N",
        help="--pairs prompts, each with N candidates and their gold scores, instead of pairs (default: 0 = pairs)",
    )
    syn.add_argument(
        "--agreement",
        type=float,
        default=0.9,
        help="share of pairs whose cue agrees with the label (default: 0.9)",
    )
    return ap.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot work."""
    for name in ("val_fraction", "test_fraction", "agreement"):
        if not 0 <= getattr(args, name) <= 1 or args.val_fraction + args.test_fraction >= 1:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: shares lie in 0 to 1, and some must be left to train on"
            )
    least = {
        "seed": 0,
        "limit": 0,
        "pairs": 1,
        "topics": 2,
        "items": 1,
        "fillers": 1,
        "shortest": 0,
    }
    if any(getattr(args, name) < n for name, n in least.items()) or args.shortest > args.longest:
        raise UserError(
            "sizes must be positive, --seed not negative, --topics at least 2, and --shortest not over --longest"
        )
    if args.responses and (args.responses < 2 or args.source != ["synthetic"]):
        raise UserError(
            f"--responses {args.responses}: the source synthetic takes it, and at least 2"
        )
    if args.input and args.source != ["hh-rlhf"] and args.source[0] not in BENCHMARKS:
        raise UserError("--input goes with hh-rlhf or a benchmark; other files are given as SOURCE")


def read_hh(files: list[str], skip_bad: bool) -> tuple[list[Pair], Counter]:
    """HH-RLHF, whose subsets are folders."""
    pairs, counts = [], Counter()
    for path in files:
        some, more = read_pairs([path], skip_bad)
        folder = Path(path).parent.name
        is_subset = folder.startswith(("helpful-", "harmless-", "red-team"))
        for p in some:
            p.source = p.source or "hh-rlhf"
            p.subset = p.subset or (folder if is_subset else "")
        pairs += some
        counts += more
    return pairs, counts


def read_source(args: argparse.Namespace) -> tuple[list, Counter]:
    """The pairs (or candidates) that the command line asks for, and counts. Raises UserError."""
    source = args.source[0] if len(args.source) == 1 else ""
    if source == "synthetic":
        sizes = {k: getattr(args, k) for k in ("topics", "items", "fillers", "shortest", "longest")}
        if args.responses:
            items = synthetic_candidates(
                args.pairs, args.responses, args.agreement, args.seed, **sizes
            )
        else:
            items = synthetic_pairs(args.pairs, args.agreement, args.seed, **sizes)
        return items, Counter(pairs=len(items))
    if source in BENCHMARKS:
        return read_benchmark(source, args.input, args.skip_bad)
    if source == "hh-rlhf":
        return read_hh(args.input or download_hh(args.subsets, args.hub_split), args.skip_bad)
    return read_pairs(args.source, args.skip_bad)


def convert(args: argparse.Namespace) -> None:
    """Reads or generates, counts, splits, writes. Raises UserError."""
    check_args(args)
    items, counts = read_source(args)
    unique, repeated = repetitions(items)
    counts.update(repeated)
    items = (unique if args.drop_duplicates else items)[: args.limit or None]
    noun = "prompts" if items and isinstance(items[0], Candidates) else "pairs"
    parts, out = split_pairs(items, args.val_fraction, args.test_fraction), Path(args.out)
    stem, _, end = out.name.partition(".jsonl")
    files = {
        k: out.with_name(f"{stem}.{k}.jsonl{end}") if k else out for k in parts if parts[k] or not k
    }
    read = {Path(p).resolve() for p in [*args.source, *(args.input or [])]}
    for path in files.values():  # all targets are checked before any is written
        if path.resolve() in read:
            raise UserError(f"{path}: is read too; choose another --out")
        if path.exists() and not args.overwrite:
            raise UserError(f"{path}: exists; choose another --out, or --overwrite")
    counts[noun] = counts.pop("pairs")
    print("read: " + ", ".join(f"{v} {k}" for k, v in counts.items() if v or k == noun))
    for k, path in files.items():
        write_pairs(path, parts[k], args.overwrite)
        print(f"wrote {len(parts[k])} {noun} to {path}")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse_args(argv)
    with exit_codes():
        convert(args)


if __name__ == "__main__":
    main()
