#!/usr/bin/env python3
"""Preference data: from the files that people have, to pairs, to tokens and words.

    python data_prep.py hh-rlhf --subsets helpful-base harmless-base --out data/hh.jsonl
    python data_prep.py hh-rlhf --input helpful.train.jsonl.gz --out data/hh.jsonl
    python data_prep.py pairs.jsonl.gz more.json --out data/mine.jsonl --val-fraction 0.1
    python data_prep.py trl-lib/ultrafeedback_binarized:train --out data/uf.jsonl
    python data_prep.py rm-bench --input total_dataset.json --out data/rm-bench.jsonl
    python data_prep.py synthetic --pairs 12800 --agreement 0.9 --out data/synthetic.jsonl
    python data_prep.py synthetic --pairs 500 --responses 16 --out data/candidates.jsonl

A pair is one JSON line {"prompt": text or [{"role", "content"}, ...], "chosen": text, "rejected":
text} and, if known, "system" or "system_prompt" (the system turn), "source", "subset", "id",
"margin" (how much better, from 0), "strength" (an ensemble's mean reward of chosen minus rejected).
Also read:
  - whole conversations as chosen and rejected, with or without a prompt (TRL, OpenRLHF);
  - HH-RLHF dialogues ("\\n\\nHuman: ... \\n\\nAssistant: ..."), whole or as the prompt;
  - two whole texts without a prompt: the start that they share is the prompt (TRL);
  - JSON lines and JSON arrays, gzipped or not; with `pip install datasets` also parquet files,
    folders written by save_to_disk, and data sets of the hub, OWNER/NAME or OWNER/NAME:SPLIT.
A field that changes the task and has no place here (input, history, tools, images ...) is refused
by name; other fields (scores, models, ratings ...) are passed over.

The generated language (a test bed for attention hacking): early content decides, a late cue tempts.
    prompt    0-3 fillers, a topic, 1-4 fillers                   "well fruit just maybe"
    response  0-3 fillers, an item, 8-16 fillers, a closing cue   "often apple quite ... thanks"
The item of the chosen response is of the prompt's topic, that of the rejected one of another. The
cue agrees with the label in a share --agreement of the pairs: chosen then closes with the first
cue and rejected with the second; otherwise the cues are exchanged. A model that reads only the end
scores 90 / 50 / 10 % where the agreement is 0.9 / 0.5 / 0.1. With --responses N each prompt has N
candidates, {"prompt", "responses", "gold"}: a quarter of them, at random, name an item of the
topic (gold 1, the others 0), and each cue agrees with its gold in a share --agreement.
"""

from __future__ import annotations

import argparse
import codecs
import difflib
import functools
import gzip
import hashlib
import io
import json
import math
import os
import re
import sys
import zlib
from bisect import bisect_right
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import lru_cache
from itertools import chain, compress, count, product
from pathlib import Path
from typing import NamedTuple
from weakref import WeakSet

import numpy as np
from tqdm import tqdm

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said aloud, it silences a fork warning
BARS: WeakSet = WeakSet()  # the progress bars of this process


class UserError(Exception):
    """A mistake a person can mend: printed as one line, exit code 2, no traceback."""


class UnusablePair(ValueError):
    """A well-formed row that cannot serve (a tie, two prompts): dropped, counted by its reason."""


class UnusableField(ValueError):
    """A field that changes the task and has no place here: refused, or dropped, counted by name."""

    def __init__(self, name: str, why: str):
        super().__init__(why)
        self.name = name


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are told in one line, exit code 2."""

    def error(self, message: str):
        self.exit(2, f"error: {message} (flags: {self.prog} --help)\n")


@contextmanager
def exit_codes():
    """Ends a program as a shell expects: 2 and one line for a UserError or an OSError, 130 for
    Ctrl-C, 141 for a closed pipe."""
    for stream in (sys.stdout, sys.stderr):  # a console may lack a character: "?" in its place
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; the flush at exit is to be quiet too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (KeyboardInterrupt, UserError, OSError) as why:
        for left in list(BARS):  # so that the message gets a line of its own
            left.close()
        stopped, said = isinstance(why, KeyboardInterrupt), first_line(why)
        if isinstance(why, OSError) and why.filename:
            said = f"{why.filename}: {why.strerror}"
        print("\nstopped" if stopped else f"error: {said}", file=sys.stderr)
        raise SystemExit(130 if stopped else 2) from None


def bar(items, name: str, **kwargs) -> tqdm:
    """A progress bar, silent without a name and in all processes but the first."""
    silent = not name or int(os.environ.get("RANK", 0)) > 0
    pause = 0.2 if sys.stderr.isatty() else 15.0  # a log file needs few lines
    options = {"leave": False, "mininterval": pause, "disable": silent, **kwargs}
    made = tqdm(items, desc=name[-40:], **options)
    BARS.add(made)
    return made


@contextmanager
def written(path: str | Path, mode: str = "w"):
    """A file written aside, flushed to disk, renamed: a reader sees the old file or the new one,
    never half. A device or a pipe is written to as it is. Raises UserError where the disk
    refuses."""
    target = aside = Path(path)
    if not is_stream(path):
        target = target.resolve()  # a link stays one
        aside = unfinished(target)
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            if aside is not target:
                os.fsync(f.fileno())
        if aside is not target:
            os.replace(aside, target)
    except (OSError, RuntimeError) as why:
        cause = why if isinstance(why, OSError) else why.__context__  # torch.save hides the disk's
        if not isinstance(cause, OSError):
            raise
        if aside is not target:
            with suppress(OSError):
                aside.unlink()
        said = cause.strerror or cause
        raise UserError(f"{path}: cannot be written ({said}); what was there is whole") from None


def unfinished(path: str | Path) -> Path:
    """Where a file is written before it is renamed."""
    return Path(f"{path}.unfinished")


def is_stream(path: str | Path) -> bool:
    """Whether a path is a device or a pipe, such as /dev/stdout."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def first_line(why: Exception) -> str:
    """What an error says, in one line."""
    return (str(why).strip() or type(why).__name__).splitlines()[0]


# --------------------------------------------------------------------------- pairs and candidates


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

    @property
    def responses(self) -> list[str]:
        """Both answers, the better one first."""
        return [self.chosen, self.rejected]


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


def called(item: Pair | Candidates) -> str:
    """What an item is called in messages: its id, or how its first response begins."""
    return item.id or repr(item.responses[0][:30])


def as_messages(prompt: str | list[dict]) -> list[dict]:
    """A text as one user message (an empty one as none); messages as they are."""
    if not isinstance(prompt, str):
        return prompt
    return [{"role": "user", "content": prompt}] if prompt.strip() else []


# ---------------------------------------------------------------- reading: from one row to a pair

# The names of fields that hold a part of what the model is to read, by their last word: also
# "chat_history", "image_url", "available_tools", but no "question_id" and no "num_images".
TASK_FIELD = re.compile(
    r"(?!(?:has|is|n|num)_)(?:.*_)?"
    r"(?:(?:article|attachment|audio|background|choice|context|conversation|demonstration|dialog|"
    r"dialogue|document|evidence|function|image|input|instruction|message|option|paragraph|passage|"
    r"photo|picture|pixel_value|post|preamble|premise|question|screenshot|snippet|tool|turn|video)s?|"
    r"history|knowledge|kwargs|media|persona|prefill|preprompt|query|user_prompt|thinking|"
    r"reasoning(?:_content|_details)?)"
    r"(?:_(?:text|data|path|url|base64|bytes|call|definition|schema|list|chosen|rejected)s?)?"
)
SYSTEM_FIELD = re.compile(r"system(_(prompt|message|instructions?|text))?|sys_prompt")
OWN_FIELDS = {"prompt", "chosen", "rejected", "responses", "gold"}
OWN_FIELDS.add("reasoning")  # in a row a rater's, in a message the model's


def is_empty(value) -> bool:
    """None, blank text, and lists and objects of nothing else."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return all(map(is_empty, value))
    return value is None or (isinstance(value, str) and not value.strip())


@lru_cache
def is_named(kind: re.Pattern, name: str) -> bool:
    """Whether a field's name, in whatever spelling, is of a kind."""
    return bool(kind.fullmatch(re.sub(r"(?<=[a-z])(?=[A-Z])|[^\w]", "_", name).lower()))


def texts_in(value) -> list[str]:
    """All texts inside a value, and numbers as texts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return list(chain.from_iterable(map(texts_in, value)))
    return [] if value is None else [str(value)]


def refuse_fields(holder: dict, own: set[str], where: str = "") -> None:
    """Raises UnusableField for a field that changes the task, has content, and is not used here.
    Texts that prompt, chosen or rejected repeat say nothing new: those of one or two words as a
    whole text there. Nor does the number of a turn, or of turns."""
    for name, value in holder.items():
        if name in own or not value or is_empty(value) or not is_named(TASK_FIELD, name):
            continue
        if isinstance(value, int) and name in ("turn", "turns"):
            continue
        said = ["user", "assistant"]
        said += texts_in([holder.get(k) for k in ("prompt", "chosen", "rejected")])
        new = [text for text in texts_in(value) if text not in said]
        if any(len(words_of(text)) < 3 or not any(text in s for s in said) for text in new):
            why = f'{where}the field "{name}" changes the task and has no place here'
            raise UnusableField(name, f"{why}; write it into the prompt, or empty it")


def text_of(message: dict, name: str) -> str:
    """The content of a message; text parts are joined."""
    content = message.get("content")
    if not isinstance(content, (str, list)):
        raise ValueError(f"{name} holds a message without a text as its content")
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            why = f'{name}: the field "content" holds a part of the type {kind!r}, not text'
            raise UnusableField(f"content ({kind})", why)
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def check_messages(messages, name: str) -> list[dict]:
    """Messages with exactly the fields role and content, or ValueError."""
    if isinstance(messages, str):
        return as_messages(messages)
    if not isinstance(messages, list):
        raise ValueError(f"{name} is neither a text nor a list of messages")
    checked = []
    for m in messages:
        if not isinstance(m, dict):
            hint = "" if name == "prompt" else "; several answers are for eval.py bestofn"
            raise ValueError(f"{name} is a list, but not of messages{hint}")
        refuse_fields(m, {"role", "content"}, f"{name}: ")
        content, role = text_of(m, name), m.get("role")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"{name} holds the role {role!r}; roles are system, user, assistant")
        checked.append({"role": role, "content": content})
    return checked


def parse_number(value, name: str) -> float:
    """A finite number, also one that is given as text, or ValueError."""
    try:
        number = float(value) if type(value) in (int, float, str) else float("nan")
    except (ValueError, OverflowError):
        number = float("nan")
    if not abs(number) < 1e30:  # NaN fails too
        raise ValueError(f'the field "{name}" is {str(value)[:40]!r}, no finite number')
    return number


# HH-RLHF's turns; copies of it lack the first blank lines, or use single line breaks
TURN = re.compile(r"(?:\A\s*|\n[ \t]*\n)(Human|Assistant):")
TURN_OF_LINES = re.compile(r"(?:\A\s*|\n)(Human|Assistant):")


def split_dialogue(text: str, is_prompt: bool = False) -> list[dict] | None:
    """The turns of an HH-RLHF dialogue, None for another text. What the form adds goes: the blank
    before each turn, and in a prompt the last "Assistant:", before which a text that stands ahead
    of all turns is the system turn."""
    text = text.replace("\r\n", "\n")
    before, *parts = TURN.split(text)
    if "Assistant" not in parts[::2]:
        before, *parts = TURN_OF_LINES.split(text)
        if before.strip():
            return None
    roles = [{"Human": "user", "Assistant": "assistant"}[who] for who in parts[::2]]
    turns = [{"role": r, "content": without_blank(y)} for r, y in zip(roles, parts[1::2])]
    is_whole = not before.strip() and ("assistant" in roles or text.startswith("\n\nHuman:"))
    if not is_prompt:
        return turns if is_whole else None
    is_open = "user" in roles and roles[-1] == "assistant" and not turns[-1]["content"].strip()
    if is_open:
        system = before.strip()
        return with_system(turns[:-1], system) if system else turns[:-1]
    # a question about a dialogue that it quotes ends with an assistant's turn, and is a question
    is_dialogue = is_whole and (roles[-1] == "user" or text.startswith("\n\nHuman:"))
    return turns if is_dialogue else None


def without_blank(said: str) -> str:
    """Without the one blank or line break that a form puts before what is said."""
    return said[1:] if said[:1] in (" ", "\n") else said


def with_system(messages: list[dict], system: str) -> list[dict]:
    """The messages behind a system turn that was given apart from them."""
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"].strip() != system.strip():
        raise ValueError('the field "system" and the prompt hold two system turns; give one')
    return messages


def said_by(turns: list[dict]) -> list[tuple[str, str]]:
    """(role, content) of each turn, without white space at the ends."""
    return [(m["role"], m["content"].strip()) for m in turns]


def holds(turns: list[dict], prompt: list[dict]) -> bool:
    """Whether the turns hold those of the prompt, one behind the other. Turns that begin with the
    assistant's go on from the prompt, unless they begin with it."""
    last = 0 if turns and turns[0]["role"] == "assistant" else len(turns)
    starts = range(min(last, len(turns) - len(prompt)) + 1)
    return any(said_by(turns[k : k + len(prompt)]) == said_by(prompt) for k in starts)


def parse_conversations(sides: dict[str, list], prompt: list[dict]) -> tuple[list[dict], list[str]]:
    """(prompt, answers) of {name: conversation}: the last turns answer; the turns before must be
    the same in all, and hold a given prompt or follow it (TRL). Raises UnusablePair with the reason
    where that is not so."""
    talks = {name: check_messages(side, name) for name, side in sides.items()}
    prompts = []
    for name, talk in talks.items():
        if not talk or talk[-1]["role"] != "assistant":
            raise UnusablePair(f"{name} does not end with the assistant")
        turns = talk[:-1]
        if not holds(turns, prompt):
            if turns and turns[0]["role"] != "assistant" and prompt[-1]["role"] == "user":
                raise UnusablePair("the conversations do not hold the prompt")
            turns = prompt + turns
        prompts.append(turns)
    if any(said_by(turns) != said_by(prompts[0]) for turns in prompts):
        raise UnusablePair("the conversations part before their last turn")
    return prompts[0], [talk[-1]["content"] for talk in talks.values()]


# What opens an answer in common chat templates
OPENER = re.compile(
    r"<\|im_start\|>assistant\n|\[/INST\] ?|<\|assistant\|>\n?|<start_of_turn>model\n|"
    r"### Response:\n?|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|<[|｜]Assistant[|｜]>"
)


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    """(prompt, chosen, rejected) of two whole texts: both start with the prompt, which ends with a
    word (or where a chat template opens the answer). None where they share none, or one adds
    nothing to it."""
    shared = os.path.commonprefix([chosen, rejected])
    for pattern in (OPENER, re.compile(r"(?<=\S)\s")):
        for m in reversed(list(pattern.finditer(shared))):
            at = m.end()
            if chosen[at:].strip() and rejected[at:].strip():
                keep = at if pattern is OPENER else m.start()
                return chosen[:keep], chosen[at:], rejected[at:]
    return None


def read_once(prompt: str, texts: list[str]) -> list[str]:
    """The answers without a prompt that all of them repeat. One or two words in common (or seven
    characters, where each is a word) are a greeting; a prompt may not end inside a word."""
    least = 8 if re.fullmatch(f"[{CJK}]", prompt[-1:]) else 3
    if len(words_of(prompt)) < least or not all(text.startswith(prompt) for text in texts):
        return texts
    rests = [text[len(prompt) :] for text in texts]
    seams = [prompt[-1] + rest[:1] for rest in rests]
    ends_inside = any(len(s) == 2 and s.isalnum() and len(words_of(s)) == 1 for s in seams)
    if ends_inside or not all(rest.strip() for rest in rests):
        return texts
    return [without_blank(rest) for rest in rests]


MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")


def parse_item(row: dict, sides: dict[str, str | list], counts: Counter):
    """(prompt, answers, labels) of a row and its {name: answer}, in any of the forms that the head
    of this file lists. Raises ValueError, UnusableField or UnusablePair."""
    of_system = [name for name in row if is_named(SYSTEM_FIELD, name)]
    refuse_fields(row, OWN_FIELDS.union(of_system))
    given, texts = row.get("prompt"), list(sides.values())
    turns = split_dialogue(given, is_prompt=True) if isinstance(given, str) else None
    prompt = turns or ([] if is_empty(given) else check_messages(given, "prompt"))
    is_text = {isinstance(side, str) for side in texts}
    if any(isinstance(y, str) and MESSAGES_AS_TEXT.match(y) for y in (given, *texts)):
        raise ValueError("messages are written as a text (of a CSV file?); make them a JSON list")
    if len(is_text) > 1:
        raise ValueError(f"one of {' and '.join(sides)} is a text, the other is not")
    talks = [split_dialogue(text) for text in texts] if True in is_text else texts
    is_raw = all(text[:8] == "\n\nHuman:" for text in texts if isinstance(text, str))
    if False in is_text or all(talk and (is_raw or holds(talk[:-1], prompt)) for talk in talks):
        prompt, texts = parse_conversations(dict(zip(sides, talks)), prompt)
    elif turns:
        if all(re.match(r"\s*Assistant:", text) for text in texts):
            texts = [text.partition("Assistant:")[2] for text in texts]
        texts = [without_blank(text) for text in texts]
    elif prompt:
        answers = read_once(given, texts) if isinstance(given, str) else texts
        counts["prompts cut out of answers that repeat them"] += answers is not texts
        texts = answers
    elif "chosen" in sides and not TURN.search(texts[0]) and (parts := split_texts(*texts)):
        counts["prompts read from the start that both texts share"] += 1
        prompt, texts = as_messages(parts[0]), list(parts[1:])
    elif given is None:
        why = 'there is no "prompt", and the texts share no start and are no dialogues'
        raise ValueError(why + ' ("\\n\\nHuman: ...\\n\\nAssistant: ..."); add the field "prompt"')
    for name in of_system:
        if not is_empty(row[name]):
            if not isinstance(row[name], str):
                raise ValueError(f'the field "{name}" is no text')
            prompt = with_system(prompt, row[name])
    labels = {k: str(row[k]) for k in ("source", "subset", "id") if row.get(k) is not None}
    said = [m["content"] for m in prompt] + texts + list(labels.values())
    "".join(said).encode()  # ValueError for half a surrogate pair, which is no character
    return prompt, texts, labels


def parse_pair(row: dict, counts: Counter | None = None) -> Pair:
    """One row as a Pair. Raises ValueError (malformed), UnusableField, or UnusablePair."""
    if not isinstance(row, dict):
        raise ValueError("the line is not a JSON object")
    sides = {name: row.get(name) for name in ("chosen", "rejected")}
    for name, side in sides.items():
        if side is None:
            there = ", ".join(map(str, row))[:200]
            hint = " (candidates are for eval.py bestofn)" if "responses" in row else ""
            raise ValueError(f'the field "{name}" is missing; there are: {there}{hint}')
    prompt, texts, labels = parse_item(row, sides, Counter() if counts is None else counts)
    for text, name in zip(texts, sides):
        if not text.strip():
            raise UnusablePair(f"the {name} response is empty")
    if texts[0].strip() == texts[1].strip():
        raise UnusablePair("chosen equals rejected")
    given = [k for k in ("margin", "strength") if row.get(k) is not None]
    numbers = {k: parse_number(row[k], k) for k in given}
    if numbers.get("margin", 0) < 0:
        raise ValueError(f'the field "margin" must not be negative, is {numbers["margin"]}')
    return Pair(prompt, *texts, **labels, **numbers)


def listed(row: dict, name: str) -> list:
    """The responses of a field: a text or a conversation is one of them, a list holds several."""
    value = row.get(name)
    turns = [y for y in value if isinstance(y, dict)] if isinstance(value, list) else []
    is_talk = len(turns) == 1 or any(m.get("role") != "assistant" for m in turns)
    if isinstance(value, str) or (is_talk and len(turns) == len(value) and name != "responses"):
        return [value]
    if not isinstance(value, list) or not all(isinstance(y, (str, list, dict)) for y in value):
        raise ValueError(f'the field "{name}" is neither a text nor a list of texts or messages')
    return [[y] if isinstance(y, dict) else y for y in value]


def parse_candidates(row: dict, counts: Counter | None = None) -> Candidates:
    """{"prompt", "responses", "gold"}, or right and wrong ones: {"prompt", "chosen", "rejected"},
    each a response or a list of them, gold 1 and 0. A response is a text or messages.

    Raises ValueError (malformed), UnusableField, or UnusablePair."""
    if not isinstance(row, dict) or row.get("prompt") is None:
        raise ValueError('the line is not a JSON object with a "prompt"')
    if "responses" in row:
        responses, gold = listed(row, "responses"), row.get("gold")
    else:
        right, wrong = listed(row, "chosen"), listed(row, "rejected")
        responses, gold = right + wrong, [1.0] * len(right) + [0.0] * len(wrong)
    if not isinstance(gold, list):
        raise ValueError('"gold" is not a list of finite numbers')
    gold = [parse_number(g, "gold") for g in gold]
    if len(responses) < 2 or len(gold) != len(responses):
        raise ValueError(f"{len(responses)} responses have {len(gold)} gold scores; at least 2 do")
    sides = {f"response {k}": y for k, y in enumerate(responses, 1)}
    prompt, texts, labels = parse_item(row, sides, Counter() if counts is None else counts)
    if not all(text.strip() for text in texts):
        raise UnusablePair("a response is empty")
    return Candidates(prompt, texts, gold, **labels)


# ------------------------------------------------- reading: from files, folders, the hub to rows

FILE_END = r"\.(jsonl?|ndjson|gz|parquet|arrow|[ct]sv|txt|zip|zst)$"
HUB_ID = re.compile(rf"(?i)(?!.*{FILE_END})[\w-][\w.-]*/[\w-][\w.-]*")


def without_split(source: str) -> tuple[str, str]:
    """PATH:SPLIT -> (PATH, SPLIT); the split is empty where none is named."""
    folder, _, split = source.rpartition(":")
    return (source, "") if not folder or Path(source).exists() else (folder, split)


def read_rows(source: str):
    """Yields (where, row) of a file, of a folder that datasets wrote, or of a data set of the hub;
    a row is bytes that are still to be decoded, or an object. Raises UserError."""
    source = str(source)
    folder, split = without_split(source)
    is_hub_id = HUB_ID.fullmatch(folder) and not Path(folder).parent.exists()
    saved = [Path(folder) / name for name in ("state.json", "dataset_dict.json")]
    if folder == "hh-rlhf" and not Path(source).exists():  # its helpful half: training's default
        for path in published_files(HH, [f"{HH_SUBSETS[0]}/{split or 'train'}.jsonl.gz"], None):
            yield from read_file(Path(path))
    elif is_hub_id or any(p.exists() for p in saved):
        yield from read_with_datasets(source, folder, split)
    elif Path(folder).is_dir():
        raise UserError(f"{source}: is no folder that save_to_disk wrote; give the files in it")
    elif Path(source).exists():
        yield from read_file(Path(source))
    else:  # a path gone wrong: the hub is not asked
        raise UserError(f"{source}: no such file (data sets of the hub: OWNER/NAME[:SPLIT])")


def read_file(path: Path):
    """The rows of JSON lines, a JSON array or parquet, told apart by what is in the file."""
    number = 0
    try:
        with open(path, "rb") as f:
            if f.peek(2)[:2] == b"\x1f\x8b":
                f = io.BufferedReader(gzip.GzipFile(fileobj=f))
            start = f.peek(32)[:32]
            if start[:4] == b"PAR1":
                yield from read_with_datasets(str(path), str(path), "")
            elif b"\0" in start or start[:2] in (b"\xff\xfe", b"\xfe\xff"):
                what = "is no UTF-8, but UTF-16, another encoding or an archive"
                raise UserError(f"{path}: {what}; write it as UTF-8, or unpack it")
            elif start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
                yield from ((f"row {k}", row) for k, row in enumerate(decoded(f.read()), 1))
            else:
                for number, line in enumerate(f, 1):
                    if line.strip():
                        yield f"line {number}", line
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as why:
        where = f", after line {number}" if number else ""
        raise UserError(f"{path}{where}: cannot be read ({first_line(why)})") from None


def decoded(raw):
    """A row, or an array of them, as an object; ValueError for bytes that are no JSON in UTF-8."""
    if not isinstance(raw, bytes):
        return raw
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except json.JSONDecodeError as why:
        where = f" in line {why.lineno}" if why.lineno > 1 else ""
        raise ValueError(f"not JSON ({why.msg}{where})") from None
    except UnicodeDecodeError as why:
        what = f"byte {raw[why.start]:#x} is no UTF-8, but another encoding, perhaps Latin-1"
        raise ValueError(f"{what}; write the file as UTF-8") from None


def read_with_datasets(source: str, name: str, split: str):
    """The rows of a parquet file, of a folder that save_to_disk wrote, or of a data set of the hub,
    read by the package datasets; of several splits "train", where none is named."""
    try:
        import datasets
    except ImportError:
        what = "parquet files, folders of save_to_disk and data sets of the hub need a package"
        raise UserError(f"{source}: {what}: pip install datasets") from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    problem, what = "", "cannot be read"
    try:
        if Path(name).is_file():
            data = datasets.load_dataset("parquet", data_files=name, split="train", streaming=True)
        elif Path(name).is_dir():
            data = datasets.load_from_disk(name)
        else:
            problem = hub_problem()
            what = "no such file here, nor fetched from the hub; give local files, JSON lines say"
            datasets.config.HF_HUB_OFFLINE = bool(problem)
            data = datasets.load_dataset(name, split=split or "train")
        if isinstance(data, datasets.DatasetDict):
            what = f"has the splits {', '.join(data)}; name one, as {name}:{next(iter(data))}"
            data = data[split or ("train" if len(data) > 1 else next(iter(data)))]
        yield from ((f"row {k}", row) for k, row in enumerate(data, 1))
    except Exception as why:  # network, permission and file errors of several libraries
        raise UserError(f"{source}: {what} ({problem or first_line(why)})") from None


def hub_problem() -> str:
    """Why the hub cannot be asked, "" where it can. Tried once, for five seconds: huggingface_hub
    would try again for half a minute. What it has cached is found all the same."""
    from huggingface_hub import constants, get_session

    if os.environ.get("HF_DATASETS_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
        constants.HF_HUB_OFFLINE = True
    if constants.HF_HUB_OFFLINE:
        return "offline"
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as why:  # requests and httpx raise kinds of their own
        constants.HF_HUB_OFFLINE = True
        return f"no connection: {first_line(why)}"
    return ""


def published_files(home: str, patterns: list[str], inputs: list[str] | None) -> list[str]:
    """The files of a published data set that fit the patterns: those of --input, folders opened, or
    else those of the hub (cached there). Raises UserError."""
    from huggingface_hub import snapshot_download

    instead = f"give local files, as {', '.join(patterns)} of {home}, by --input (training: --data)"
    if not inputs:
        problem = "is no data set of the hub" if "//" in home else hub_problem()
        try:
            inputs = [snapshot_download(home, repo_type="dataset", allow_patterns=patterns)]
        except Exception as why:  # network, permission and missing-file errors of several libraries
            problem = problem or first_line(why)
            raise UserError(f"{home}: cannot be fetched ({problem}); {instead}") from None
    files = []
    for path in map(Path, inputs):
        inside = [p for p in sorted(path.rglob("*")) if p.is_file()]
        names = [p.relative_to(path).as_posix() for p in inside]
        fits = [any(fnmatch(name, pattern) for pattern in patterns) for name in names]
        files += compress(inside, fits) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{', '.join(inputs)}: no such file there; {instead}")
    return list(map(str, files))


HH, HH_SUBSETS = "Anthropic/hh-rlhf", ["helpful-base", "harmless-base"]


def collect(sources: list, parse, skip_bad: bool) -> tuple[list, Counter]:
    """(what parse makes of all rows of files, folders and hub ids; counts: "pairs", each reason of
    UnusablePair, and with skip_bad "bad" and each refused field).

    Args:
        parse: (row, source, counts) -> list of items; raises one of the errors above.
        skip_bad: drop and count malformed rows, in place of a UserError with file and line.
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
                    hint = "mend it, or let `python data_prep.py SOURCE --skip-bad` drop it"
                    raise UserError(f"{source}, {where}: {first_line(why)}; {hint}") from None
                is_field = isinstance(why, UnusableField)
                counts[f'with the field "{why.name}"' if is_field else "bad"] += 1
    if not items:
        left_out = ", ".join(f"{v} {k}" for k, v in counts.items() if v)
        what = f"left out: {left_out}" if left_out else "it is empty"
        raise UserError(f"{', '.join(map(str, sources))}: no usable pair; {what}")
    counts["pairs"] = len(items)
    return items, counts


def read_pairs(sources: list, skip_bad: bool = False) -> tuple[list[Pair], Counter]:
    """(all pairs of files, folders and hub ids, counts), see collect. Raises UserError."""
    return collect(sources, lambda row, _, counts: [parse_pair(row, counts)], skip_bad)


def read_candidates(sources: list, skip_bad: bool = False) -> tuple[list[Candidates], Counter]:
    """read_pairs for candidates; they may differ in number from prompt to prompt."""
    return collect(sources, lambda row, _, counts: [parse_candidates(row, counts)], skip_bad)


# ------------------------------------------------------------------------- writing and splitting


def write_pairs(path: str | Path, pairs: list, overwrite: bool = False) -> None:
    """One JSON line a pair (or prompt with candidates), gzipped where the name ends in .gz; written
    aside, then renamed. Raises UserError."""
    path = Path(path)
    if path.exists() and not (overwrite or is_stream(path)):
        raise UserError(f"{path}: exists; choose another --out, or --overwrite")
    lines = []
    for p in pairs:
        line = {name: value for name, value in vars(p).items() if value not in ("", None)}
        text = p.prompt[0]["content"] if len(p.prompt) == 1 else ""
        is_plain = as_messages(text) == p.prompt and not split_dialogue(text, is_prompt=True)
        if is_plain and not all(y.startswith(text) for y in p.responses):  # read as a prompt again
            line["prompt"] = text
        is_raw = any(y.startswith("\n\nHuman:") for y in p.responses)
        if not p.prompt or is_raw:  # texts might be read as a prompt and its answers
            for name in line.keys() & {"chosen", "rejected"}:
                line[name] = [{"role": "assistant", "content": line[name]}]
            if "responses" in line:
                line["responses"] = [[{"role": "assistant", "content": y}] for y in p.responses]
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    packed = "".join(lines).encode()
    with written(path, "wb") as f:
        f.write(gzip.compress(packed, mtime=0) if path.name.endswith(".gz") else packed)


def prompt_key(prompt: list[dict], *more) -> float:
    """A hash of the prompt (and of more) in [0, 1). Prompts that differ by white space or a system
    turn alone share it: they fall into the same split, and count as a leak."""
    turns = [m for m in prompt if m["role"] != "system"] or prompt
    said = [[m["role"], " ".join(m["content"].split())] for m in turns]
    text = json.dumps([*said, *more], ensure_ascii=False).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64


def repetitions(pairs: list) -> tuple[list, Counter]:
    """(pairs without those that repeat an earlier one, counts). White space around a text makes no
    difference. "reversed": pairs that say the opposite of an earlier one; "contradictions":
    comparisons that are answered both ways."""
    unique, first_seen, counts = [], {}, Counter()
    for number, p in enumerate(pairs):
        sides = [y.strip() for y in p.responses] + getattr(p, "gold", [])
        key, opposite = (json.dumps([said_by(p.prompt), some]) for some in (sides, sides[::-1]))
        is_new = key not in first_seen
        if is_new:
            first_seen[key] = number
            unique.append(p)
        is_reversed = first_seen.get(opposite, number) < first_seen[key]
        counts["repetitions"] += not is_new
        counts["reversed"] += is_reversed
        counts["contradictions"] += is_reversed and is_new
    return unique, +counts  # without zeros


def flip_labels(pairs: list[Pair], noise: float, seed: int, by_strength: bool):
    """(pairs, some with chosen and rejected exchanged; counts).

    First a share `noise` at random, drawn from the seed and the pair itself, so that order and
    other pairs do not matter; then, by_strength, those that an ensemble holds for mislabelled
    (strength < 0, arXiv 2401.06080, 2.4.1). A flip turns the sign of strength; margin stays."""

    def exchanged(p: Pair) -> Pair:
        return replace(p, chosen=p.rejected, rejected=p.chosen, strength=p.strength and -p.strength)

    flipped, counts = [], Counter()
    for p in pairs:
        if prompt_key(p.prompt, p.chosen, p.rejected, seed) < noise:
            p = exchanged(p)
            counts["labels flipped by --label-noise"] += 1
        if by_strength and p.strength < 0:
            p = exchanged(p)
            counts["labels flipped by --flip-negative-strength"] += 1
        flipped.append(p)
    return flipped, counts


def carve(pairs: list[Pair], count: int) -> tuple[list[Pair], list[Pair]]:
    """(rest, carved): about `count` pairs with the smallest prompt hashes; no prompt is in both."""
    keys = sorted(prompt_key(p.prompt) for p in pairs)
    parts = split_pairs(pairs, keys[min(count, len(pairs) - 1)], 0.0)
    return parts[""], parts["val"]


def split_pairs(pairs: list, val: float, test: float) -> dict[str, list]:
    """Train, validation and test parts by the hash of the prompt: no prompt is in two of them."""
    parts: dict[str, list] = {"": [], "val": [], "test": []}
    for p in pairs:
        key = prompt_key(p.prompt)
        held_out = "test" if key < test else "val"
        parts[held_out if key < test + val else ""].append(p)
    return parts


def unused_name(path: str, taken) -> str:
    """What a data file is called in tables: its name without ending; where that is taken, the whole
    path; where that is too, numbered."""
    short = re.sub(r"\.(jsonl?|parquet)(\.gz)?$", "", Path(path).name)
    numbered = (f"{path} ({k})" for k in count(2))
    return next(name for name in chain((short, str(path)), numbered) if name not in taken)


def warn_of_leaks(pairs: list[Pair], held: dict[str, list[Pair]]) -> None:
    """Says which held-out sets share prompts with the training pairs. Prompts of the generated
    language repeat by construction: nothing leaks there."""
    seen = {prompt_key(p.prompt) for p in pairs if p.source != "synthetic"}
    for name, part in held.items():
        shared = sum(prompt_key(p.prompt) in seen for p in part if p.source != "synthetic")
        if shared:
            which = f"{shared} of {len(part)} pairs of {name}"
            print(f"warning: {which} have a prompt that is also trained on")


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
        label_noise, flip_negative_strength: which training labels are flipped, see flip_labels.
        needed: {a field that every training pair must have: the flag that reads it}.
    """
    pairs, counts = read_pairs(data)
    for name, flag in (needed or {}).items():
        if missing := sum(getattr(p, name) is None for p in pairs):
            which = f"{', '.join(data)}: {missing} of {len(pairs)} pairs lack the field {name}"
            hint = " (eval.py accuracy MODEL... --strength OUT writes strengths)"
            raise UserError(f"{which} that {flag} needs" + hint * (name == "strength"))
    counts.update(repetitions(pairs)[1])
    held = {}
    if val_data:
        held["validation"], more = read_pairs(val_data)
        counts.update({f"{k} (validation)": v for k, v in more.items() if k != "pairs"})
    else:
        count = min(val_max, round(val_fraction * len(pairs)))
        pairs, held["validation"] = carve(pairs, count)
    if not held["validation"] or not pairs:
        numbers = f"{len(pairs)} training and {len(held['validation'])} validation pairs"
        raise UserError(f"{numbers}: both are needed; give --val-data or more pairs")
    if label_noise or flip_negative_strength:  # after carving: held-out labels stay as they are
        pairs, flips = flip_labels(pairs, label_noise, seed, flip_negative_strength)
        counts.update(flips)
    for path in eval_data:
        name = unused_name(path, {"training", *held})
        held[name], more = read_pairs([path])
        counts.update({f"{k} ({name})": v for k, v in more.items() if k != "pairs"})
    warn_of_leaks(pairs, held)
    return pairs, held, counts


# -------------------------------------------------------------------------------------- benchmarks

# Benchmarks become pairs whose subset begins with the group that the benchmark reports by, and
# whose source is "data_prep.py NAME". By that eval.py knows them: a source that only happens to be
# a benchmark's name, as in a mixture of data sets, does not say how its rows were made.
# A converter takes a published record and the path of its file, and yields rows.

DOMAINS = ("chat", "code", "math", "safety-refuse", "safety-response")
ADVERSARIAL = [f"Adversarial/{name}" for name in ("Neighbor", "GPTInst", "GPTOut", "Manual")]
GROUPS = {  # benchmark -> {a group that it reports by: a pattern of the names in it}
    "rewardbench": {
        "Chat": "alpacaeval-(easy|length|hard)|mt-bench-(easy|med)",
        "Chat Hard": "mt-bench-hard|llmbar-(natural|adver-(neighbor|GPTInst|GPTOut|manual))",
        "Safety": "refusals-(dangerous|offensive)|xstest-should-(refuse|respond)|donotanswer",
        "Reasoning": "math-prm|hep-(cpp|go|java|js|python|rust)",
    },
    "rm-bench": dict(zip(DOMAINS, DOMAINS)),
    "rmb": {
        "Helpfulness pairwise": "Pairwise_set/Helpfulness",
        "Helpfulness best-of-n": "BoN_set/Helpfulness",
        "Harmlessness pairwise": "Pairwise_set/Harmlessness",
        "Harmlessness best-of-n": "BoN_set/Harmlessness",
    },
    "judgebench": {
        "Knowledge": "mmlu-pro",
        "Reasoning": "livebench-reasoning",
        "Math": "livebench-math",
        "Coding": "livecodebench",
    },
    "llmbar": {"Natural": "Natural", **{name: name.split("/")[1] for name in ADVERSARIAL}},
}


def group_of(benchmark: str, name: str) -> str:
    """The group of a benchmark that the name belongs to, or ValueError."""
    for group, pattern in GROUPS[benchmark].items():
        if re.search(pattern, name, re.IGNORECASE):
            return group
    raise ValueError(f"{name!r} is in none of the groups {', '.join(GROUPS[benchmark])}")


def ordered(a: str, b: str, label, first: str, second: str) -> dict:
    """{"chosen", "rejected"}; the label first says that a is better, second that b is."""
    if re.fullmatch(r"tie.*|A=B", str(label)):
        raise UnusablePair("a tie by its label")
    if str(label) not in (first, second):
        raise ValueError(f"the label {label!r} is neither {first} nor {second}")
    return dict(zip(("chosen", "rejected"), (a, b) if str(label) == first else (b, a)))


def from_rewardbench(record: dict, path: str):
    """RewardBench (arXiv 2403.13787): prompt, chosen, rejected, subset, id; no prior sets."""
    row = {k: record[k] for k in ("prompt", "chosen", "rejected", "id")}
    yield {**row, "subset": f"{group_of('rewardbench', record['subset'])}/{record['subset']}"}


def from_rewardbench2(record: dict, path: str):
    """RewardBench 2 (arXiv 2506.01937): chosen (in Ties several), rejected (three or more), subset,
    id. It becomes candidates, the right ones first."""
    yield {k: record[k] for k in ("prompt", "chosen", "rejected", "subset", "id")}


def from_rm_bench(record: dict, path: str):
    """RM-Bench (arXiv 2410.16184): 3 chosen, 3 rejected: concise, detailed, detailed with markdown.
    Nine pairs a prompt, ids ending in /chosen style-rejected style. The domain: a field, or in the
    file's name."""
    domain = group_of("rm-bench", record.get("domain") or Path(path).name)
    sides = [record[k] for k in ("chosen", "rejected")]
    if not all(isinstance(side, list) and len(side) == 3 for side in sides):
        raise ValueError("there are not three chosen and three rejected")
    for i, j in product(range(3), range(3)):
        texts = {"prompt": record["prompt"], "chosen": sides[0][i], "rejected": sides[1][j]}
        yield {**texts, "subset": domain, "id": f"{record['id']}/{i}-{j}"}


def from_rmb(record: dict, path: str):
    """RMB (arXiv 2410.09893): conversation_input, category_path, chosen and reject; best-of-n:
    bon_best and loser_list, a pair a loser, ids ending in /number of the loser of how many."""
    row = {"prompt": record["conversation_input"], "subset": record["category_path"]}
    group_of("rmb", row["subset"])  # or ValueError
    if "bon_best" not in record:
        texts = {"chosen": record["chosen"]["answer"], "rejected": record["reject"]["answer"]}
        yield {**row, **texts, "id": record["pair_uid"]}
        return
    for k, loser in enumerate(record["loser_list"], 1):
        texts = {"chosen": record["bon_best"]["answer"], "rejected": loser["answer"]}
        yield {**row, **texts, "id": f"{record['bon_uid']}/{k}of{len(record['loser_list'])}"}


def from_judgebench(record: dict, path: str):
    """JudgeBench (arXiv 2410.12784): question, response_A, response_B, label A>B or B>A, source."""
    subset = f"{group_of('judgebench', record['source'])}/{record['source']}"
    sides = ordered(record["response_A"], record["response_B"], record["label"], "A>B", "B>A")
    yield {"prompt": record["question"], **sides, "subset": subset, "id": record["pair_id"]}


def from_llmbar(record: dict, path: str):
    """LLMBar (arXiv 2310.07641): input, output_1, output_2, label 1 or 2; its path: the subset."""
    subset = group_of("llmbar", "/".join(Path(path).parts[-2:]))
    sides = ordered(record["output_1"], record["output_2"], record["label"], "1", "2")
    yield {"prompt": record["input"], **sides, "subset": subset}


def from_mt_bench(record: dict, path: str):
    """MT-Bench (arXiv 2306.05685), a vote: conversation_a, conversation_b, turn, winner, judge.

    Two conversations differ from their first answers on, so the prompt is the first question; a
    second turn continues the response as text, as Formatter writes turns without a template."""
    turn, names = record["turn"], ("conversation_a", "conversation_b")
    talks = [check_messages(record[k], k)[: 2 * turn] for k in names]
    roles = [[m["role"] for m in talk] for talk in talks]
    if turn not in (1, 2) or roles != [["user", "assistant"] * turn] * 2:
        raise ValueError(f"turn {turn} is not 1 or 2, or is lacking in one of the conversations")
    if talks[0][0] != talks[1][0]:
        raise UnusablePair("the conversations part before their last turn")
    marks = ("", "User: ", "Assistant: ")
    texts = ["\n\n".join(k + m["content"] for k, m in zip(marks, talk[1:])) for talk in talks]
    sides = ordered(*texts, record["winner"], "model_a", "model_b")
    vote = [str(record.get(k)) for k in ("question_id", "model_a", "model_b", "judge", "turn")]
    yield {"prompt": talks[0][:1], **sides, "subset": f"turn {turn}", "id": "-".join(vote)}


BENCHMARKS = {  # converter, data set on the hub or repository to clone, its files
    "rewardbench": (from_rewardbench, "allenai/reward-bench", "data/filtered-*.parquet"),
    "rewardbench-2": (from_rewardbench2, "allenai/reward-bench-2", "data/test-*.parquet"),
    "rm-bench": (from_rm_bench, "THU-KEG/RM-Bench", "*total_dataset.json"),
    "rmb": (from_rmb, "https://github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark", "*.json"),
    "judgebench": (from_judgebench, "ScalerLab/JudgeBench", "*gpt*.json*"),
    "llmbar": (from_llmbar, "https://github.com/princeton-nlp/LLMBar", "*dataset.json"),
    "mt-bench": (from_mt_bench, "lmsys/mt_bench_human_judgments", "data/human-*.parquet"),
}
CONVERTED = "data_prep.py "  # how the source of a converted row begins


def benchmark_of(item: Pair | Candidates) -> str:
    """The benchmark that a pair or a prompt with candidates was converted from, "" for none."""
    name = item.source.removeprefix(CONVERTED)
    return name if name in BENCHMARKS and name != item.source else ""


def own_cells(source: str, pairs: list[Pair], margins: np.ndarray):
    """What the numbers of a benchmark are made of, from N pairs and their margins: (the cells of
    each pair, right (N,), weight (N,), {mean: the numbers it is the mean of}). As in the
    benchmarks' own code a tie is a miss; a pair without a score (NaN) weighs nothing.
    RewardBench  sections by pair, but math-prm weighs as much as all code; mean of sections
    RM-Bench     see style_means
    RMB          helpfulness and harmlessness, pairwise and best-of-n; their mean
    JudgeBench   categories, and all by pair
    LLMBar       subsets, and the mean of the adversarial ones
    MT-Bench     turns, and all, by vote"""
    right, weight, means = (margins > 0).astype(float), 1.0 - np.isnan(margins), {}
    cells = [[p.subset.split("/")[0], "all"] for p in pairs]
    if source == "rewardbench":
        cells, means["mean of sections"] = [c[:1] for c in cells], list(GROUPS["rewardbench"])
        prm, code = (np.array([f"/{k}" in p.subset for p in pairs]) for k in ("math-prm", "hep-"))
        if weight[prm].any() and weight[code].any():
            weight[prm] *= weight[code].sum() / weight[prm].sum()
    elif source == "rm-bench":
        cells = [[f"{p.subset} {p.id.rpartition('/')[2]}"] for p in pairs]
        means = style_means()
    elif source == "rmb":
        groups = GROUPS["rmb"]
        cells = [[k for k, start in groups.items() if start in p.subset] for p in pairs]
        means["mean of the four"] = list(groups)
        count_prompts_once(pairs, right, weight)
    elif source == "llmbar":
        cells, means["Adversarial"] = [[p.subset] for p in pairs], ADVERSARIAL
    return cells, right, weight, means


def style_means() -> dict[str, list[str]]:
    """RM-Bench's means, over 3 x 3 cells, chosen style-rejected style; easy: chosen fancier,
    normal: alike, hard: plainer; by domain, by safety (mean of its two), and over chat, code, math
    and safety."""
    levels = {"easy": "1-0 2-0 2-1", "normal": "0-0 1-1 2-2", "hard": "0-1 0-2 1-2"}
    below = dict.fromkeys(DOMAINS, ())
    below |= {"safety": DOMAINS[3:], "all": (*DOMAINS[:3], "safety")}
    means = {}
    for domain, parts in below.items():
        for level, styles in levels.items():
            cells = [f"{domain} {style}" for style in styles.split()]
            means[f"{domain} {level}"] = [f"{part} {level}" for part in parts] or cells
        means[domain] = [f"{domain} {level}" for level in levels]
    return means


def count_prompts_once(pairs: list[Pair], right: np.ndarray, weight: np.ndarray) -> None:
    """RMB's best of n, in place: a prompt counts once, where all its losers are scored, and is
    right where chosen beats each of them."""
    prompts: dict[tuple, list[int]] = {}
    for k, p in enumerate(pairs):
        if p.subset.startswith("BoN_set"):
            prompt, _, loser = p.id.rpartition("/")  # such as 3of5
            prompts.setdefault((p.subset, prompt, loser.partition("of")[2]), []).append(k)
    for (*_, losers), index in prompts.items():
        is_whole = losers == str(int(weight[index].sum()))
        right[index[0]] = right[index].all()
        weight[index] = 0
        weight[index[0]] = is_whole


def rewardbench2_score(items: list[Candidates], rewards: list[np.ndarray]) -> dict[str, float]:
    """RewardBench 2's own numbers: {subset: score, "mean": mean of the subsets there are}.

    A row counts 1 / (responses at the maximum) if its first one, the right one, is at the maximum,
    else 0; for Ties see ties_score. A row that lacks a reward (NaN) counts nowhere, nor does one
    of which all answers are right, or none."""
    rows, ties = {}, {"tied": {}, "ref": {}}
    for item, r in zip(items, rewards):
        kind, _, number = item.id.partition(":")
        if np.isnan(r).any() or len(set(item.gold)) == 1:
            continue
        if item.subset == "Ties" and kind in ties:
            is_right = np.array(item.gold) > 0
            lead = r[is_right].min() - r[~is_right].max()
            ties[kind][number] = (lead, np.ptp(r[is_right]))
        else:
            best = r == r.max()
            rows.setdefault(item.subset, []).append(best[0] / best.sum())
    scores = {subset: float(np.mean(values)) for subset, values in rows.items()}
    if any(ties.values()):
        scores["Ties"] = ties_score(**ties)
    return {**scores, "mean": float(np.mean(list(scores.values())))} if scores else {}


def ties_score(tied: dict, ref: dict) -> float:
    """RewardBench 2's Ties, from {K: (lead, spread)} of the prompts with many right answers, and of
    their references with one: by how much the worst right answer outscores the best wrong one, and
    how far right answers lie apart. The lead is to be above 0, and above the spread."""

    def mean(values) -> float:
        return float(np.mean(values)) if len(values) else 0.0

    both = [(*tied[k], ref[k][0]) for k in tied if k in ref]
    t, d, r = np.array(both).reshape(-1, 3).T
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 counts 0
        closeness = np.nan_to_num(np.tanh(np.minimum(r, t) / d - 1))
    accuracy = [mean([lead > 0 for lead, _ in leads.values()]) for leads in (tied, ref)]
    wider = 0.20 * mean(t > d) + 0.20 * mean(np.minimum(r, t) > d)
    return 0.30 * sum(accuracy) + wider + 0.01 * mean(closeness)


def read_benchmark(name: str, inputs: list[str] | None, skip_bad: bool = False):
    """(pairs or candidates of a benchmark, counts as of read_pairs). Raises UserError."""
    convert, home, pattern = BENCHMARKS[name]
    finish = parse_candidates if convert is from_rewardbench2 else parse_pair

    def parse(record, source: str, counts: Counter) -> list:
        items = []
        try:
            for row in convert(record, source):
                if isinstance(row["prompt"], str):  # a text may be read as a dialogue, these not
                    row["prompt"] = as_messages(row["prompt"])
                try:
                    items.append(finish({**row, "source": CONVERTED + name}))
                except UnusablePair as why:  # the record's other pairs stay
                    counts[str(why)] += 1
        except (LookupError, TypeError, AttributeError) as why:
            raise ValueError(f"not as {name} publishes it ({why!r})") from None
        return items

    return collect(published_files(home, [pattern], inputs), parse, skip_bad)


# --------------------------------------------------------------------------- the generated language

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
    "well often quite maybe really just also then there here some many such very rather indeed "
    "still even only once perhaps always sometimes usually mostly nearly about around over under "
    "again soon later early before after since while though yet else thus hence likely surely "
    "clearly simply fairly partly mainly truly kindly gladly sadly oddly rarely seldom twice "
    "anyway meanwhile"
)
CUES = ("thanks", "regards")


ITEMS = [words.split() for words in TOPICS.values()]


def fillers(rng: np.random.Generator, low: int, high: int) -> list[str]:
    """From low to high of them."""
    known = FILLERS.split()
    return [known[i] for i in rng.integers(len(known), size=rng.integers(low, high + 1))]


def prompt_about(rng: np.random.Generator, topic: int) -> list[dict]:
    """A prompt of the topic."""
    return as_messages(" ".join(fillers(rng, 0, 3) + [list(TOPICS)[topic]] + fillers(rng, 1, 4)))


def response_about(rng: np.random.Generator, topic: int, cue: str) -> str:
    """A response that names an item of the topic and closes with the cue."""
    before = fillers(rng, 0, 3)
    item = ITEMS[topic][rng.integers(len(ITEMS[topic]))]
    return " ".join([*before, item, *fillers(rng, 8, 16), cue])


def synthetic_pairs(n: int, agreement: float, seed: int) -> list[Pair]:
    """n pairs; in a share `agreement` of them the cue goes with the label, as the subset says."""
    rng, pairs = np.random.default_rng([seed, 7]), []
    for k in range(n):
        right, wrong = rng.choice(len(TOPICS), 2, replace=False)
        agrees = rng.random() < agreement
        prompt = prompt_about(rng, right)
        chosen = response_about(rng, right, CUES[not agrees])
        rejected = response_about(rng, wrong, CUES[agrees])
        subset = "with the cue" if agrees else "against the cue"
        pairs.append(Pair(prompt, chosen, rejected, "synthetic", subset, f"{seed}-{k}"))
    return pairs


def synthetic_candidates(n: int, responses: int, agreement: float, seed: int) -> list[Candidates]:
    """n prompts with candidates of which a quarter, at random, are right (gold 1, else 0); each cue
    agrees with its gold in a share `agreement`."""
    rng, items = np.random.default_rng([seed, 8]), []
    for k in range(n):
        topic = rng.integers(len(TOPICS))
        gold, agrees = rng.random(responses) < 0.25, rng.random(responses) < agreement
        other = (topic + rng.integers(1, len(TOPICS), size=responses)) % len(TOPICS)
        prompt = prompt_about(rng, topic)
        topics, cues = np.where(gold, topic, other), [CUES[int(c)] for c in gold != agrees]
        texts = [response_about(rng, about, cue) for about, cue in zip(topics, cues)]
        labels = {"id": f"{seed}-{k}", "source": "synthetic"}
        items.append(Candidates(prompt, texts, gold.astype(float).tolist(), **labels))
    return items


def write_demo_data(folder: str | Path, seed: int, overwrite: bool = False) -> None:
    """The demo's files: pairs to train on, three held-out sets, candidates for best of n; and the
    tokenizer of student and teacher."""
    folder = Path(folder)
    agreements = {"train": 0.9, "in-distribution": 0.9, "cue-neutral": 0.5, "cue-reversed": 0.1}
    for k, (name, agreement) in enumerate(agreements.items()):
        count = 12_800 if name == "train" else 600
        pairs = synthetic_pairs(count, agreement, seed * 10 + k)
        write_pairs(folder / f"{name}.jsonl", pairs, overwrite)
    candidates = synthetic_candidates(500, 16, 0.1, 77 + seed)
    write_pairs(folder / "candidates.jsonl", candidates, overwrite)
    demo_tokenizer().save_pretrained(folder)


def demo_tokenizer():
    """A word-level tokenizer of the language."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "eos": "</s>"}
    words = [*special.values(), "User:", "Assistant:", *TOPICS, *" ".join(TOPICS.values()).split()]
    words += [*FILLERS.split(), *CUES]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {f"{name}_token": token for name, token in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **named)


# -------------------------------------------------------- from a pair's text to tokens and words

FIXED_DATE = "{%- macro strftime_now(form) -%}26 July 2024{%- endmacro -%}"  # not today's


def load_tokenizer(name: str):
    """A fast tokenizer, checked to be one that can serve here; of several chat templates the
    default one, which prints a fixed date, or rewards would change from day to day. Raises
    UserError."""
    from transformers import AutoTokenizer

    is_folder = Path(name).is_dir()
    files = [p.name for p in Path(name).iterdir()] if is_folder else ["tokenizer"]
    if not any(re.search("tok|vocab|merges|spiece|spm|sentencepiece", file) for file in files):
        raise UserError(f"{name}: holds no tokenizer; put it there too (tokenizer.save_pretrained)")
    problem = "" if is_folder else hub_problem() or "no such local directory or hub id"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as why:  # the hub, the disk and every tokenizer raise kinds of their own
        said = f"{first_line(why)} ({problem})" if problem else first_line(why)
        raise UserError(f"{name}: its tokenizer cannot be loaded: {said}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{name}: no fast tokenizer, and only those tell what a token covers")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            names = ", ".join(template)
            raise UserError(f"{name}: none of its chat templates is the default: {names}")
        template = template["default"]
    if template and "strftime_now" in template and FIXED_DATE not in template:
        template = FIXED_DATE + template
    tokenizer.chat_template = template
    return tokenizer


CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
WORD = re.compile(rf"[{CJK}]|[^\s{CJK}]+")  # our choice: runs without white space, CJK characters


@lru_cache(maxsize=64)  # the texts of a pair are asked for several times
def words_of(text: str) -> tuple[tuple[int, int], ...]:
    """Start and end of each word."""
    return tuple(m.span() for m in WORD.finditer(text))


def tokens_to_words(offsets: list, spans: list) -> np.ndarray:
    """For tokens with character offsets (start, end) the index of the first word (start, end) that
    each touches, -1 for none. A word that stands nowhere, (-1, -1), is touched by none."""
    placed = [k for k, (start, _) in enumerate(spans) if start >= 0]
    ends = [spans[k][1] for k in placed]
    words = []
    for start, end in offsets:
        at = bisect_right(ends, start)  # the first word that ends after the token starts
        is_touched = at < len(ends) and start < end and spans[placed[at]][0] < end
        words.append(placed[at] if is_touched else -1)
    return np.array(words, dtype=np.int64)


PROBES = [("user", "assistant"), ("user", "assistant") * 2, ("system", "user", "assistant")]
PROBES.append(("user", "system", "assistant"))


class Formatter:
    """The one place that builds the string that is scored, in training and evaluation.

    It is exactly tokenizer.apply_chat_template(messages, tokenize=False), as TRL and RewardBench
    score; without a chat template the plain form "System: ...\\n\\nUser: ...\\n\\nAssistant: ..."
    and the end token (behind the begin token, where the tokenizer writes one). It is tokenised with
    add_special_tokens=False. Raises UserError for a tokenizer with neither of the two."""

    def __init__(self, tokenizer, counts: Counter | None = None):
        self.tokenizer, self.known_markup = tokenizer, {}
        self.counts = Counter() if counts is None else counts
        self.template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
        self.eos = tokenizer.eos_token or tokenizer.sep_token or ""  # [SEP]: BERT's
        if not self.template and not self.eos:
            name = tokenizer.name_or_path
            raise UserError(f"{name}: no end token; set eos_token in its tokenizer_config.json")
        bos = tokenizer.bos_token or tokenizer.cls_token
        first = tokenizer.convert_ids_to_tokens(tokenizer("a")["input_ids"][:1])
        self.bos = bos if first == [bos] else ""
        self.empty_block = re.compile("")
        if self.markup(PROBES[0])[1] is None:
            self([{"role": "user", "content": "a"}], "b")  # raises what is wrong with it
            raise UserError(f"{tokenizer.name_or_path}: its chat template leaves the answers out")
        self.tags, self.empty_block = self.reasoning_block()
        self.known_markup.clear()  # anew, without such blocks
        longest_first = sorted(self.control_strings(), key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        end = self.markup(PROBES[0])[-1]
        self.closings = [s for s in (end, end.strip(), self.eos) if re.search(r"\w", s)]

    def __call__(self, prompt: list[dict], response: str) -> str:
        """Cleaned messages and response -> the string that is scored. Raises UserError where the
        chat template refuses them."""
        messages = [*prompt, {"role": "assistant", "content": response}]
        if not self.template:
            turns = [f"{m['role'].capitalize()}: {m['content']}" for m in messages]
            return self.bos + "\n\n".join(turns) + self.eos
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as why:  # a template raises what it likes
            what = f"the roles {', '.join(m['role'] for m in messages)} ({first_line(why)})"
            name = self.tokenizer.name_or_path
            raise UserError(f"{name}: its chat template refuses {what}") from None

    def markup(self, roles: tuple[str, ...]) -> list[str | None]:
        """The literal text before each content of these roles, None before one that the template
        leaves out (or refuses), and the text after the last, which is the assistant's: len(roles)
        + 1 pieces. All are "" where the template repeats or moves contents. An empty reasoning
        block, which a content may yet fill, is left out."""
        if roles not in self.known_markup:
            marks = [f"\ue000{i}\ue001" for i in range(len(roles))]  # characters no template has
            text = ""
            with suppress(UserError):
                prompt = [{"role": r, "content": m} for r, m in zip(roles[:-1], marks)]
                text = self(prompt, marks[-1])
            kept = [mark for mark in marks if mark in text]
            pieces = [self.empty_block.sub("", s) for s in re.split("\ue000\\d+\ue001", text)]
            if re.findall("\ue000\\d+\ue001", text) != kept:
                kept, pieces = marks, [""] * (len(marks) + 1)
            before = dict(zip(kept, pieces))
            self.known_markup[roles] = [*map(before.get, marks), pieces[-1]]
        return self.known_markup[roles]

    def probes(self) -> list[list[str]]:
        """The markup of some usual roles."""
        return [[piece or "" for piece in self.markup(roles)] for roles in PROBES]

    def reasoning_block(self) -> tuple[set[str], re.Pattern]:
        """The tags of reasoning, such as <think> and </think>; an empty block of them, or nothing.
        They are those that the template looks for in contents, or writes as an empty block alone.
        Tags around a whole content, as [INST] and [/INST], are none."""
        written = "\n.\n".join(piece for probe in self.probes() for piece in probe)
        closing = re.compile(r"</\w+>|\[/\w+\]")
        sought = rf"""['"]({closing.pattern})['"](?=\s+in\b|\s*[,)])"""
        tags, blocks = set(), []
        for tag in {*closing.findall(written), *re.findall(sought, self.template)}:
            opening = tag.replace("/", "")
            block = re.escape(opening) + r"\s*" + re.escape(tag) + r"\n*"
            rest = re.sub(block, "", written)
            if tag != self.eos and opening not in rest and tag not in rest:
                tags |= {opening, tag}
                blocks.append(block)
        return tags, re.compile(f"(?:{'|'.join(blocks)})?")

    def control_strings(self) -> set[str]:
        """Special tokens, other added tokens that the template writes, its marks such as [INST],
        and the text that it writes between turns."""
        written = "\n".join(piece for probe in self.probes() for piece in probe)
        control = set(self.tokenizer.all_special_tokens)
        for token in self.tokenizer.added_tokens_decoder.values():
            if token.special or token.content in written:
                control.add(token.content.strip())  # Gemma has tokens of line breaks alone
        control |= set(re.findall(r"<[^<>\s]*\w[^<>\s]*>|\[[^][\s]*\w[^][\s]*\]", written))
        between = [piece for probe in self.probes() for piece in probe[1:-1]]
        control |= {piece.strip(" ") for piece in between if re.search(r"\w", piece)}
        return {string for string in control if len(string) > 1} - self.tags

    def clean(self, text: str) -> str:
        """The text in which what would end a turn, or start one, is defused by a space after its
        first character ("< |im_end|>"); counted."""
        while self.control.search(text):
            text, count = self.control.subn(lambda m: m[0][0] + " " + m[0][1:], text)
            self.counts["defused control tokens"] += count
        return text

    def place(self, text: str, prompt: list[dict], response: str) -> tuple[list, int]:
        """Where the W words of all contents stand in the string that __call__ made of them, (start,
        end), or (-1, -1) for one that the template left out; and where the response begins."""
        contents = [m["content"] for m in prompt] + [response]
        pieces = self.markup((*(m["role"] for m in prompt), "assistant"))
        placed, start, end = [], 0, 0
        for k, (content, before) in enumerate(zip(contents, pieces)):
            words = words_of(content)
            if before is None:
                placed += [(-1, -1)] * len(words)
                continue
            start = end + len(os.path.commonprefix([before, text[end : end + len(before)]]))
            if k == len(prompt) or prompt[k]["role"] == "assistant":
                start = self.empty_block.match(text, start).end()
            after = next(piece for piece in pieces[k + 1 :] if piece is not None)
            stop = text.find(after, start) if after.strip() else -1
            limit = stop if stop >= 0 else len(text)
            at = text.find(content.strip(), start, limit)
            if at >= 0:  # as it is, or stripped, as some templates do
                shift = at - content.find(content.strip())
                spans = [(a + shift, b + shift) for a, b in words]
            else:
                spans = find_words(content, text, start, limit)
            placed += spans
            end = stop if stop >= 0 else max([start, *(b for _, b in spans)])
        return placed, start

    def unwrap(self, prompt: list[dict], responses: list[str]) -> tuple[list[dict], list[str]]:
        """Both without the model's own chat template, where they hold it already: one user message
        that is the whole template up to the answer; responses that all close as an answer does."""
        if self.template and len(prompt) == 1 and self.control.search(prompt[0]["content"]):
            prompt = self.inner_messages(prompt[0]["content"]) or prompt
        for close in self.closings:
            if all(y.endswith(close) for y in responses):
                cut = [y.removesuffix(close) for y in responses]
                if not any(map(self.control.search, cut)):
                    return prompt, cut
        return prompt, responses

    def inner_messages(self, text: str) -> list[dict] | None:
        """The messages of a text that is this template, from the first turn (what the template may
        add ahead of it can be missing) to where the answer opens; None for another text, and where
        markup is left over in the messages."""
        text, answer = text.strip(), self.markup(PROBES[0])[1].strip()
        turns = ("user", "assistant") * (text.count(answer) if answer else 0)
        for roles in (turns, ("system", *turns)) if turns else ():
            first, *between, last, _ = self.markup(roles)
            ends = (first[k:] for k in range(len(first or "")))  # the longest first
            opening = next((end for end in ends if text.startswith(end)), "")
            if not re.search(r"\w", opening) or not all([*between, last]):
                continue
            contents, rest = [], text[len(opening) :]
            for piece in between:
                content, _, rest = rest.partition(piece)  # rest is empty where it is not there
                contents.append(content)
            close = re.escape(last.rstrip()) + r"\s*" + self.empty_block.pattern + r"\Z"
            if end := re.search(close, rest):
                contents.append(rest[: end.start()])
                if not any(map(self.control.search, contents)):
                    return [{"role": r, "content": c} for r, c in zip(roles, contents)]
        return None


def find_words(content: str, text: str, start: int, stop: int) -> list[tuple[int, int]]:
    """Where the words of a content that a template rewrote stand in text[start:stop], (-1, -1) for
    one that it left out."""
    words = words_of(content)[::-1]  # from the end: what goes is mostly the reasoning ahead
    there = [(a + start, b + start) for a, b in words_of(text[start:stop])][::-1]
    # a template may change the case
    said = [content[a:b].casefold() for a, b in words], [text[a:b].casefold() for a, b in there]
    spans = [(-1, -1)] * len(words)
    for a, b, size in difflib.SequenceMatcher(None, *said).get_matching_blocks():
        spans[a : a + size] = there[b : b + size]
    return spans[::-1]


@dataclass
class Example:
    """One pair, encoded. Student: packed layout u; teacher: three token runs, for either order.

    Words are those of the contents alone: the prompt's messages in order, y_c, y_r."""

    ids: np.ndarray  # (n,) tokens of [x | y_c | y_r], the start that both share once
    seg: np.ndarray  # (n,) 0 = x, 1 = y_c, 2 = y_r
    word: np.ndarray  # (n,) word of each token, -1 = markup
    word_seg: np.ndarray  # (W,) segment of each word
    runs: list  # teacher: [(ids, word)] of x, y_c, y_r; empty without a teacher
    texts: list[str]  # the contents that hold the words: prompt messages, chosen, rejected
    pair: Pair  # as read

    @property
    def words(self) -> list[str]:
        """The W words."""
        return [text[a:b] for text in self.texts for a, b in words_of(text)]


class Fitted(NamedTuple):
    """One item that fits into the model's length, and what was made of its k responses."""

    item: Pair | Candidates
    prompt: list[dict]  # cleaned and cut
    responses: list[str]  # k, cleaned
    texts: list[str]  # the k strings that are scored
    tokens: list  # k times (ids (n,), offsets: n times (start, end))


REFUSED = "with roles that the chat template refuses"
TEMPLATED = "with a chat template inside"
TEMPLATE_MARK = re.compile(
    r"<\|(im_start|im_end|start_header_id|eot_id|user|assistant|system|end)\|>|\[/?INST\]|<</?SYS>>"
    r"|<(start|end)_of_turn>|<[｜|](User|Assistant)[｜|]>|### (Instruction|Response):"
)


class Encoder:
    """Pairs -> Examples, with the counts of what was cut, dropped or defused.

    Args:
        tokenizer: the student's.
        max_length: tokens of the longer of the two sequences.
        overlong: "truncate" (the oldest of the prompt goes), "drop" or "error".
        teacher_tokenizer: the teacher's, None without a teacher.
        teacher_length: tokens of the teacher's longest row, four special ones among them.
    """

    def __init__(
        self, tokenizer, max_length, overlong="truncate", teacher_tokenizer=None, teacher_length=512
    ):
        self.counts, self.has_warned = Counter(), False
        self.formatter = Formatter(tokenizer, self.counts)
        self.tokenizer, self.max_length, self.overlong = tokenizer, max_length, overlong
        self.teacher, self.teacher_length = teacher_tokenizer, teacher_length

    def __call__(self, pairs: list[Pair], progress: str = "") -> list[Example]:
        """The Examples of the pairs that fit, see fit. Raises UserError."""
        examples = []
        for chunk in self.fit(pairs, lambda p: p.responses, progress):
            kept = [fitted for fitted in chunk if fitted]
            packed = [self.pack(fitted) for fitted in kept]
            if self.teacher is not None:
                self.add_runs(packed, kept)
            examples += packed
        return examples

    def fit(self, items: list, responses, progress: str = "", chunk: int = 1024):
        """Yields chunks of [Fitted or None], one entry an item, with the texts of responses(item).

        Overlong items are cut, dropped (None) or raise UserError, as asked; items that the chat
        template refuses are dropped, and raise it where none is left; all counted."""
        refused, left, templated = None, 0, self.counts[TEMPLATED]
        for start in bar(range(0, len(items), chunk), progress):
            built = []
            for item in items[start : start + chunk]:
                prompt, sides = self.prepare(item, responses(item))
                texts = []
                try:
                    texts = [self.formatter(prompt, y) for y in sides]
                except UserError as why:
                    refused = why
                    self.counts[REFUSED] += 1
                built.append((item, prompt, sides, texts))
            tokens = iter(tokenise(self.tokenizer, [t for *_, texts in built for t in texts]))
            fitted = []
            for *one, texts in built:
                whole = Fitted(*one, texts, [next(tokens) for _ in texts])
                fitted.append(self.within_length(whole) if texts else None)
            left += sum(one is not None for one in fitted)
            yield fitted
        if refused and not left:
            raise refused
        templated = self.counts[TEMPLATED] - templated
        if templated and not self.has_warned:
            self.has_warned = True
            share = f"{templated} of {len(items)} ({templated / len(items):.0%})"
            what = "a chat template that is another model's or not whole"
            print(f"warning: {share} hold {what}, and are read as plain text")

    def prepare(self, item: Pair | Candidates, responses: list[str]) -> tuple[list, list[str]]:
        """(messages, responses), out of the model's own template, with control tokens defused."""
        prompt, sides = self.formatter.unwrap(item.prompt, responses)
        if prompt is not item.prompt or sides is not responses:
            self.counts["unwrapped from the model's own chat template"] += 1
        contents = [m["content"] for m in prompt] + sides
        if any(map(TEMPLATE_MARK.search, contents)):
            self.counts[TEMPLATED] += 1
        clean = self.formatter.clean
        prompt = [{"role": m["role"], "content": clean(m["content"])} for m in prompt]
        return prompt, [clean(y) for y in sides]

    def within_length(self, fitted: Fitted) -> Fitted | None:
        """The item within max_length, None where it is dropped. Raises UserError, see overlong."""
        longest = max(len(ids) for ids, _ in fitted.tokens)
        if longest <= self.max_length:
            return fitted
        if self.overlong == "error":
            what = f"pair {called(fitted.item)} has {longest} tokens"
            how = "raise it, or use --overlong truncate or drop"
            raise UserError(f"{what}, over --max-length {self.max_length}; {how}")
        cut = None
        if self.overlong == "truncate":
            with suppress(UserError):  # a template may refuse what is left
                cut = self.shorten(fitted)
        self.counts["truncated" if cut else "dropped"] += 1
        return cut

    def shorten(self, fitted: Fitted) -> Fitted | None:
        """The item with the oldest of its prompt cut until all sequences fit; None where a response
        cannot. The system turn goes last."""
        prompt = [dict(m) for m in fitted.prompt]
        while (excess := max(len(ids) for ids, _ in fitted.tokens) - self.max_length) > 0:
            turns = [i for i, m in enumerate(prompt) if m["role"] != "system"]
            filled = [i for i in [*turns, *range(len(prompt))] if prompt[i]["content"]]
            if not filled:
                return None
            oldest = prompt[filled[0]]
            later = [i for i in turns if i > filled[0] and prompt[i]["role"] == "user"]
            ((_, offsets),) = tokenise(self.tokenizer, [oldest["content"]])
            rest = ""  # cut before the first token that stays, even inside a word
            if len(offsets) > excess:
                rest = oldest["content"][max(offsets[excess][0], 1) :].lstrip()
            if rest:
                oldest["content"] = rest
            elif later and filled[0] in turns:  # the whole oldest turn goes, its markup too
                del prompt[turns[0] : later[0]]
            else:
                oldest["content"] = ""
            texts = [self.formatter(prompt, y) for y in fitted.responses]
            tokens = tokenise(self.tokenizer, texts)
            fitted = fitted._replace(prompt=prompt, texts=texts, tokens=tokens)
        return fitted

    def pack(self, fitted: Fitted) -> Example:
        """The packed layout and the words of one pair."""
        texts = [*(m["content"] for m in fitted.prompt), *fitted.responses]
        *of_prompt, C, R = (len(words_of(text)) for text in texts)
        P, words, inside = sum(of_prompt), [], []
        for text, response, (_, offsets) in zip(fitted.texts, fitted.responses, fitted.tokens):
            spans, start = self.formatter.place(text, fitted.prompt, response)
            words.append(tokens_to_words(offsets, spans))
            inside.append(sum(end <= start for _, end in offsets))
            if missing := spans.count((-1, -1)):
                self.counts["words that the chat template leaves out"] += missing
        if fitted.texts[0] == fitted.texts[1]:
            self.counts["scored alike, as the chat template writes them"] += 1
        (ids_c, _), (ids_r, _) = fitted.tokens
        shared = min(inside)  # tokens before the first that reaches into a response
        nx = int(np.append(ids_c[:shared] != ids_r[:shared], True).argmax())  # common token prefix
        word_r = np.where(words[1] >= P, words[1] + C, words[1])  # y_r's words come after y_c's
        return Example(
            ids=np.concatenate([ids_c, ids_r[nx:]]),
            seg=np.repeat([0, 1, 2], [nx, len(ids_c) - nx, len(ids_r) - nx]),
            word=np.concatenate([words[0], word_r[nx:]]),
            word_seg=np.repeat([0, 1, 2], [P, C, R]),
            runs=[],
            texts=texts,
            pair=fitted.item,
        )

    def add_runs(self, examples: list[Example], fitted: list[Fitted]) -> None:
        """The teacher's tokens of x, y_c and y_r of each pair, with their words."""
        read = []
        for f in fitted:
            read += [self.teacher_prompt(f.prompt), *((y, words_of(y)) for y in f.responses)]
        special = set(self.teacher.all_special_ids) - {self.teacher.unk_token_id}
        spare = (self.teacher.unk_token_id, self.teacher.mask_token_id, 0)
        harmless = next(i for i in spare if i is not None)
        tokens = tokenise(self.teacher, [text for text, _ in read])
        for k, ((ids, offsets), (_, spans)) in enumerate(zip(tokens, read)):
            example = examples[k // 3]
            first = np.searchsorted(example.word_seg, k % 3)  # word of its own part
            word = tokens_to_words(offsets, spans)
            ids[[i in special for i in ids.tolist()]] = harmless  # "[SEP]" that a user typed
            example.runs.append((ids, np.where(word >= 0, word + first, -1)))
        for example in examples:
            kept = cut_runs(example.runs, self.teacher_length - 4)
            self.counts["cut for the teacher"] += kept is not example.runs
            example.runs = kept

    @staticmethod
    def teacher_prompt(prompt: list[dict]) -> tuple[str, list]:
        """(the prompt as the teacher reads it, with role marks between several turns; the words of
        its contents there, (start, end))."""
        text, spans = "", []
        for m in prompt:
            mark = f"{m['role'].capitalize()}: " if len(prompt) > 1 else ""
            text += ("\n" if text else "") + mark
            spans += [(a + len(text), b + len(text)) for a, b in words_of(m["content"])]
            text += m["content"]
        return text, spans


def cut_runs(runs: list, room: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The (ids, word) runs of x, y_c, y_r, cut to `room` tokens in all: the oldest of x goes, then
    the responses' ends."""
    n_x, n_c, n_r = (len(ids) for ids, _ in runs)
    if n_x + n_c + n_r <= room:
        return runs
    room = max(0, room)
    keep_x = max(0, min(n_x, room - n_c - n_r))
    keep_c = min(n_c, max(room // 2, room - n_r))
    keep_r = min(n_r, room - keep_c)
    kept = []
    for (ids, word), cut in zip(runs, (slice(n_x - keep_x, n_x), slice(keep_c), slice(keep_r))):
        lost = np.concatenate([word[: cut.start or 0], word[cut.stop :]])
        whole = ~np.isin(word[cut], lost)  # a word that is cut in two is no word any more
        kept.append((ids[cut], np.where(whole, word[cut], -1)))
    return kept


def tokenise(tokenizer, texts: list[str]) -> list[tuple[np.ndarray, list]]:
    """(ids (n,), offsets: n times (start, end)) of each text, all in one parallel call."""
    if not texts:
        return []
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    enc = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, **options)
    ids = [np.array(row, dtype=np.int64) for row in enc["input_ids"]]
    return list(zip(ids, enc["offset_mapping"]))


# ------------------------------------------------------------------------------------ command line


NUMBERS = {  # flag -> (default, least, most, what it is)
    "limit": (0, 0, math.inf, "write only the first N pairs; 0: all"),
    "val-fraction": (0.0, 0, 1, "share of the prompts for FILE.val.jsonl"),
    "test-fraction": (0.0, 0, 1, "share of the prompts for FILE.test.jsonl"),
    "pairs": (12_800, 1, 10**8, "synthetic: number of pairs"),
    "responses": (0, 0, 10**4, "synthetic: N candidates with gold scores a prompt, no pairs"),
    "agreement": (0.9, 0, 1, "synthetic: share of pairs whose cue agrees with the label"),
    "seed": (0, 0, math.inf, "synthetic: seed"),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    raw = argparse.RawDescriptionHelpFormatter
    ap = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = ap.add_argument
    known = f"hh-rlhf[:test], synthetic, or a benchmark: {', '.join(BENCHMARKS)}"
    add("source", nargs="+", metavar="SOURCE", help=f"files, folders, hub ids; {known}")
    add("--out", required=True, help="file to write; gzipped where it ends in .gz")
    add("--overwrite", action="store_true", help="replace --out where it exists")
    add("--skip-bad", action="store_true", help="count malformed rows, in place of stopping at one")
    add("--drop-duplicates", action="store_true", help="drop repetitions (counted either way)")
    files = "in place of the hub: files of hh-rlhf or a benchmark as published, or their folders"
    add("--input", nargs="+", metavar="FILE", help=files)
    folders = {"nargs": "+", "default": HH_SUBSETS, "metavar": "NAME"}
    add("--subsets", help="hh-rlhf: folders on the hub", **folders)
    for name, (default, *_, text) in NUMBERS.items():
        text += f" (default: {default})"
        add(f"--{name}", type=type(default), default=default, metavar="N", help=text)
    return ap.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot work."""
    for name, (_, least, most, _) in NUMBERS.items():
        value = getattr(args, name.replace("-", "_"))
        if not least <= value <= most:
            raise UserError(f"--{name} {value}: must lie in {least} to {most}")
    if not Path(args.out).name or Path(args.out).is_dir():
        raise UserError(f"--out {args.out}: is a folder; give the name of a file")
    if is_stream(args.out) and (args.val_fraction or args.test_fraction):
        raise UserError(f"--out {args.out}: parts need the name of a file")
    if args.val_fraction + args.test_fraction >= 1:
        raise UserError("--val-fraction and --test-fraction leave no pairs to train on")
    of_synthetic = ("pairs", "responses", "agreement", "seed")
    typed = [name for name in of_synthetic if getattr(args, name) != NUMBERS[name][0]]
    if typed and args.source != ["synthetic"]:
        raise UserError(f"--{typed[0]}: only the source synthetic takes it")
    if args.responses == 1:
        raise UserError("--responses 1: at least 2")
    source = args.source[0].partition(":")[0]
    if args.input and source not in ("hh-rlhf", *BENCHMARKS):
        raise UserError("--input goes with hh-rlhf or a benchmark; other files are a SOURCE")
    has_folders = source == "hh-rlhf" and (not args.input or any(map(os.path.isdir, args.input)))
    if args.subsets != HH_SUBSETS and not has_folders:
        raise UserError("--subsets: only hh-rlhf takes it, from the hub or folders of --input")


def read_source(args: argparse.Namespace) -> tuple[list, Counter]:
    """The pairs (or candidates) that the command line asks for, and counts. Raises UserError."""
    source = args.source[0] if len(args.source) == 1 else ""
    if source == "synthetic":
        if args.responses:
            items = synthetic_candidates(args.pairs, args.responses, args.agreement, args.seed)
        else:
            items = synthetic_pairs(args.pairs, args.agreement, args.seed)
        return items, Counter(pairs=len(items))
    if source in BENCHMARKS:
        return read_benchmark(source, args.input, args.skip_bad)
    source, _, split = source.partition(":")
    if source != "hh-rlhf":
        return read_pairs(args.source, args.skip_bad)
    pairs, counts = [], Counter()
    files = [f"{subset}/{split or 'train'}.jsonl.gz" for subset in args.subsets]
    for path in published_files(HH, files, args.input):
        some, more = read_pairs([path], args.skip_bad)
        folder = Path(path).parent.name  # HH-RLHF keeps its subsets in folders
        subset = folder if folder.startswith(("helpful-", "harmless-", "red-team")) else ""
        pairs += [replace(p, source=p.source or source, subset=p.subset or subset) for p in some]
        counts += more
    return pairs, counts


def convert(args: argparse.Namespace) -> None:
    """Reads or generates, counts, splits, writes. Raises UserError."""
    check_args(args)
    items, counts = read_source(args)
    unique, repeated = repetitions(items)
    items = (unique if args.drop_duplicates else items)[: args.limit or None]
    noun = "pairs" if isinstance(items[0], Pair) else "prompts"
    parts, out = split_pairs(items, args.val_fraction, args.test_fraction), Path(args.out)
    stem, _, end = out.name.partition(".jsonl")
    files = {"": out}
    others = {k: out.with_name(f"{stem}.{k}.jsonl{end}") for k in ("val", "test")}
    files |= {k: path for k, path in others.items() if parts[k]}
    if not parts[""]:
        raise UserError(f"{out}: no pair is left for it; lower --val-fraction or --test-fraction")
    named = ("synthetic", "hh-rlhf", *BENCHMARKS)
    read = [Path(p).resolve() for p in [*args.source, *(args.input or [])] if p not in named]
    for path in files.values():  # all targets are checked before any is written
        targets = (path.resolve(), unfinished(path).resolve())
        if any(target.is_relative_to(place) for target in targets for place in read):
            raise UserError(f"{path}: is read too; choose another --out")
        if path.exists() and not (args.overwrite or is_stream(path)):
            raise UserError(f"{path}: exists; choose another --out, or --overwrite")
    say = functools.partial(print, file=sys.stderr if is_stream(out) else None)
    counted = {noun: counts.pop("pairs"), **counts, **repeated}
    say("read: " + ", ".join(f"{v} {k}" for k, v in counted.items() if v))
    for k, path in files.items():
        write_pairs(path, parts[k], args.overwrite)
        say(f"wrote {len(parts[k])} {noun} to {path}")
    for path in others.values():
        if path not in files.values() and path.exists():
            say(f"warning: {path} is of an earlier split, and may hold pairs of {out}")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse_args(argv)
    with exit_codes():
        convert(args)


if __name__ == "__main__":
    main()
