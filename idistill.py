#!/usr/bin/env python3
"""Interaction distillation for discriminative reward models, in one file (after arXiv 2508.02618).

    python idistill.py                          # offline demo on generated data, 2 CPU cores
    python idistill.py --align-loss mse         # one ablation, beside the last demo's table
    python idistill.py --model M --teacher T --data D.jsonl --eval-data E.jsonl --output-dir runs/x
    torchrun --nproc-per-node N idistill.py ... # the same in N processes; --fsdp shards

The problem. A discriminative reward model (RM) maps a prompt x and a response y to a scalar
r(x, y). It learns from pairs (x, y_c, y_r) with the Bradley-Terry (BT) loss. Misallocated attention
can hack its judgement: (1) causal attention decays forward: early tokens never see late ones;
(2) Siamese encoding: chosen and rejected are encoded apart, so no token of one sees the other.

The cure. A bidirectional cross-encoder, the *teacher*, reads both responses at once. The RM, the
*student*, simulates the teacher's attention map with its own queries and keys; an alignment loss
pulls that map towards the teacher's. Only training changes: what is saved is an ordinary RM.

The abstract says: the two flaws; an interaction-based language-understanding model as the teacher;
the RM simulates its attention through an attentional alignment objective; steadier, more general
rewards. Our reading (no public code): every equation below, and the alignment by words.

Letters, in every docstring: N pairs, B of them in a batch, n tokens, W words, H heads (H_kv of
keys), d size of a head, D of a hidden state. s = segment: 0 prompt x, 1 chosen y_c, 2 rejected y_r;
3 = padding, or the teacher's [CLS], [SEP]. Maps are those of one layer, as a rule the last.

  packed row       u = [x | y_c | y_r]: n tokens, x is encoded once
  tree mask        query i sees key j  iff  j <= i and (s_j = 0 or s_j = s_i);
                   positions of y_r restart at |x|
  rewards          r_c = w.h[last token of y_c],  r_r = w.h[last token of y_r]                  (E1)
  BT loss          L_BT = -log sigmoid(r_c - r_r)                                               (E2)
  simulated map    S = mean over heads of softmax(Q K^T / sqrt(d)), the mask lifted (B, n, n)   (E3)
  teacher          reads [CLS] x [SEP] y_a [SEP] y_b [SEP], (a, b) a random order of (c, r);
                   verdict = mean of a scalar per token over y_c - the same over y_r;
                   loss -log sigmoid(verdict); scored: mean of both orders;
                   its map T = mean over heads                                      (B, n, n)   (E4)
  word map         sum over the tokens of the attended word,
                   mean over the tokens of the attending word                       (B, W, W)   (E5)
  blocks           inter: a word of y_c and one of y_r, either way;  intra: all other word pairs
  alignment        L_intra = mean over rows i of KL(T_i || S_i), rows renormalised in the
                   intra block;  L_inter = the same in the inter block;  of several
                   layers the mean                                                              (E6)
  total            L = L_BT + lambda_intra L_intra + lambda_inter L_inter                       (E7)

Part 1 is the method. Part 2 trains it. Part 3 is what a program needs besides: models loaded and
tried, processes, the run directory, the demo, the command line.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import functools
import gc
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import data_prep
from data_prep import Encoder, Example, Pair, UserError, bar, first_line, load_tokenizer, written

# ==================================================================================================
# Part 1: the method. No files and no flags, so that each piece works in a notebook.
# ==================================================================================================

# ------------------------------------------------------------------------- the layout of a pair


def tree_mask(seg: Tensor) -> Tensor:
    """The student's own attention in a packed row: (B, n) segments -> (B, 1, n, n), True = visible.

    Padding (segment 3, at the right) sees x and padding: a row without a key would turn into NaN.
    """
    n = seg.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=seg.device).tril()
    s_i, s_j = seg[:, :, None], seg[:, None, :]
    return (causal & ((s_j == 0) | (s_j == s_i)))[:, None]


def teacher_row(example: Example, swap: bool, cls: int, sep: int) -> dict[str, list]:
    """The teacher's row [CLS] x [SEP] y_a [SEP] y_b [SEP]: ids, seg, word, mask (n,)   (E4).

    swap: False = (a, b) is (c, r), True = (r, c). The ids cls and sep belong to no segment (3) and
    no word (-1).
    """
    x, y_c, y_r = example.runs
    order = [(0, x), (2, y_r), (1, y_c)] if swap else [(0, x), (1, y_c), (2, y_r)]
    row = dict(ids=[cls], seg=[3], word=[-1], mask=[1])
    for segment, (ids, word) in order:
        row["ids"] += [*ids.tolist(), sep]
        row["seg"] += [segment] * len(ids) + [3]
        row["word"] += [*word.tolist(), -1]
        row["mask"] += [1] * len(ids) + [1]
    return row


def stack_rows(rows: list, fill: int, device) -> Tensor:
    """Rows of different lengths -> (B, n), filled up on the right."""
    stacked = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for line, row in zip(stacked, rows):
        line[: len(row)] = row
    return torch.from_numpy(stacked).to(device)


def student_batch(examples: list[Example], pad_id: int, device="cpu") -> dict[str, Tensor]:
    """Packed rows u = [x | y_c | y_r] as one batch, padded on the right.

    Returns ids, seg (3 = padding), word (-1 = none), pos: (B, n); last (B, 2): where r_c and r_r
    are read; word_seg (B, W): segment of each word, -1 = padding, or a word without a token.
    """
    ids = stack_rows([e.ids for e in examples], pad_id, device)
    seg = stack_rows([e.seg for e in examples], 3, device)
    word = stack_rows([e.word for e in examples], -1, device)
    word_seg = stack_rows([e.word_seg for e in examples], -1, device)
    word_seg = word_seg.masked_fill(~seen_words(word, word_seg.shape[1]), -1)
    n_x, n_c, n_r = ((seg == s).sum(1, keepdim=True) for s in (0, 1, 2))
    last = torch.cat([n_x + n_c, n_x + n_c + n_r], dim=1) - 1
    place = torch.arange(seg.shape[1], device=device).expand_as(seg)
    pos = torch.where(seg == 2, place - n_c, place)  # y_r restarts at |x|
    return dict(ids=ids, seg=seg, word=word, pos=pos * (seg < 3), last=last, word_seg=word_seg)


def teacher_batch(examples: list[Example], swap: np.ndarray, tokenizer, device="cpu") -> dict:
    """Teacher's rows as one batch: ids, seg (3 = special, padding), word, mask (B, n)   (E4).

    Args:
        examples, swap: B pairs, and for each whether y_r is read before y_c, (B,) booleans.
        tokenizer: the teacher's; its [CLS] and [SEP] may be called BOS and EOS.
    """
    cls = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
    sep = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    rows = [teacher_row(e, s, cls, sep) for e, s in zip(examples, swap)]
    fills = dict(ids=tokenizer.pad_token_id, seg=3, word=-1, mask=0)
    return {name: stack_rows([row[name] for row in rows], fills[name], device) for name in fills}


# ---------------------------------------------------------------------- tap and simulated map

TAP = "idistill_tap"
LONG_ROW = 1024  # tokens from which a map is computed one head at a time


def tapped_attention(module, query, key, value, attention_mask, **kwargs):
    """transformers' SDPA attention; an active tap sees Q (B, H, n, d), K (B, H_kv, n, d)."""
    if AttentionTap.active is not None:
        AttentionTap.active.see(query, key, kwargs.get("scaling"), attention_mask)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


transformers.AttentionInterface.register(TAP, tapped_attention)
AttentionMaskInterface.register(TAP, sdpa_mask)


class Tapped(NamedTuple):
    """What one layer's attention was computed from."""

    query: Tensor  # (B, H, n, d), after rotation
    key: Tensor  # (B, H_kv, n, d), after rotation
    scale: float  # 1 / sqrt(d) as a rule
    mask: Tensor | None  # (B or 1, 1, n, n), boolean or added to the logits; None = all is seen


class AttentionTap:
    """Keeps Q and K of chosen layers in one forward pass.

        with AttentionTap(model, layers=(-1,)) as tap:
            model(...)
        query, key = tap.kept[-1].query, tap.kept[-1].key

    The k-th call of attention is layer k; negative numbers count from the last. Attention stays
    fused everywhere: output_attentions=True would make it eager in every layer (1.6 times the
    memory at 512 tokens). On exit the model is as it was.

    Raises UserError where the model does not call transformers' attention interface.
    """

    active: AttentionTap | None = None

    def __init__(self, model, layers):
        self.model, self.layers = model, layers
        self.kept, self.calls = {}, 0

    def see(self, query: Tensor, key: Tensor, scale: float | None, mask: Tensor | None) -> None:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.kept[self.calls] = Tapped(query, key, scale, mask)
        # no -k can mean a layer so far back: without this all Q and K would live till the end
        outdated = self.calls + min((0, *self.layers))
        if outdated not in self.layers:
            self.kept.pop(outdated, None)
        self.calls += 1

    def __enter__(self):
        name, self.before = type(self.model).__name__, self.model.config._attn_implementation
        try:
            self.model.set_attn_implementation(TAP)
        except Exception as why:
            raise UserError(f"{name} does not take a custom attention: {first_line(why)}") from None
        if self.model.config._attn_implementation != TAP:  # DeBERTa: only a warning
            raise UserError(f"{name} does not take a custom attention")
        AttentionTap.active = self
        return self

    def __exit__(self, error, *_):
        AttentionTap.active = None
        self.model.set_attn_implementation(self.before)
        numbers = {k: k if k >= 0 else self.calls + k for k in self.layers}
        if error is None and not set(numbers.values()) <= set(self.kept):
            asked = f"{self.calls} layers, asked for {list(self.layers)}"
            name, advice = type(self.model).__name__, "use --method bt, or another model"
            raise UserError(f"{name} showed attention in {asked}: {advice}")
        self.kept = {k: self.kept.get(number) for k, number in numbers.items()}


def attention_probabilities(query: Tensor, key: Tensor, scale: float, visible: Tensor) -> Tensor:
    """softmax(Q K^T * scale) over the visible keys, in fp32, of each head: (B, H, n, n)."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # queries share key heads
    with torch.autocast(query.device.type, enabled=False):
        logits = (query.float() * scale) @ key.float().transpose(2, 3)
        return logits.masked_fill_(~visible, -torch.inf).softmax(dim=-1)  # in place: n x n is large


def attention_map(query: Tensor, key: Tensor, scale: float, visible: Tensor) -> Tensor:
    """The attention map of one layer, mean over heads: (B, n, n), rows sum to 1   (E3, E4).

    query (B, H, n, d) and key (B, H_kv, n, d) after rotation; scale: 1 / sqrt(d) as a rule;
    visible (B or 1, 1, n or 1, n): True where a query sees a key, which every query must.
    """
    if query.shape[2] < LONG_ROW:
        return attention_probabilities(query, key, scale, visible).mean(dim=1)
    # long rows, the same mean: one head at a time, recomputed in backward; no head's map is kept
    H, H_kv = query.shape[1], key.shape[1]
    total = 0
    for h, q in enumerate(query.split(1, dim=1)):
        k = key[:, [h * H_kv // H]]
        args = (attention_probabilities, q, k, scale, visible)
        total = total + checkpoint(*args, use_reentrant=False, preserve_rng_state=False)[:, 0]
    return total / H


# -------------------------------------------------------------------------------------- student


class RewardModel(nn.Module):
    """The student: a stock decoder for sequence classification with one label, on packed rows."""

    def __init__(self, stock):
        super().__init__()
        self.stock = stock

    def forward(self, batch: dict[str, Tensor], layers=()) -> tuple[Tensor, list[Tensor]]:
        """Batch of student_batch -> rewards (B, 2) = (r_c, r_r) in fp32   (E1);
        simulated token maps S, (B, n, n) each, one for each of `layers`   (E3)."""
        with AttentionTap(self.stock, layers) if layers else nullcontext() as tap:
            hidden = self.encode(batch)
        rewards = self.rewards_at(hidden, batch["last"])

        # (E3) The mask is lifted: every query sees every key, later ones and those of the other
        # response too. Only padding stays hidden.
        visible = (batch["seg"] != 3)[:, None, None, :]
        maps = []
        for layer in layers:
            tapped = tap.kept[layer]
            query, key = (self.as_packed(heads, batch) for heads in (tapped.query, tapped.key))
            maps.append(attention_map(query, key, tapped.scale, visible))
        return rewards, maps

    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        """The last hidden state (B, n, D) of the packed rows, under the tree mask."""
        inputs = dict(attention_mask=tree_mask(batch["seg"]), position_ids=batch["pos"])
        return self.stock.base_model(batch["ids"], **inputs, use_cache=False).last_hidden_state

    def as_packed(self, heads: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Queries or keys (B, H, n, d) in the order of the packed row. Here they are in it already;
        SiameseRewardModel, in part 3, gathers them from two rows a pair."""
        return heads

    def rewards_at(self, hidden: Tensor, last: Tensor) -> Tensor:
        """w.h at the two last tokens: hidden (B, n, D), last (B, 2) -> (B, 2)   (E1)."""
        ends = hidden.gather(1, last[:, :, None].expand(-1, -1, hidden.shape[-1]))
        head = self.stock.score
        with torch.autocast(ends.device.type, enabled=False):  # rewards in bf16 tie often
            return F.linear(ends.float(), head.weight.float(), head.bias)[..., 0]


# -------------------------------------------------------------------------------------- teacher


class InteractionTeacher(nn.Module):
    """A stock bidirectional encoder for token classification with one label, over both responses.

    eager: its maps come from output_attentions, where the tap cannot show them (DeBERTa);
    readable_maps in part 3 tries which.
    """

    def __init__(self, stock, tokenizer, eager: bool = False):
        super().__init__()
        self.stock, self.tokenizer, self.eager = stock, tokenizer, eager

    def forward(self, batch: dict[str, Tensor], layers=()) -> tuple[Tensor, list[Tensor]]:
        """Batch of teacher_batch -> verdict (B,), positive when it prefers chosen;
        token maps T, (B, n, n) each, one for each of `layers`   (E4)."""
        inputs = dict(input_ids=batch["ids"], attention_mask=batch["mask"])
        maps = []
        if layers and self.eager:
            out = self.stock(**inputs, output_attentions=True)
            if not out.attentions:  # BigBird turns to full attention in its first short batch
                out = self.stock(**inputs, output_attentions=True)
            maps = [out.attentions[layer].float().mean(dim=1) for layer in layers]
        else:
            with AttentionTap(self.stock, layers) if layers else nullcontext() as tap:
                out = self.stock(**inputs)
            for layer in layers:
                query, key, scale, mask = tap.kept[layer]
                visible = self.visible(batch["mask"], mask)
                maps.append(attention_map(query, key, scale, visible))

        # (E4) The verdict: mean over the tokens of y_c minus the same over y_r.
        scalars, seg = out.logits[..., 0].float(), batch["seg"]
        v_c, v_r = ((scalars * (seg == s)).sum(1) / (seg == s).sum(1).clamp_min(1) for s in (1, 2))
        return v_c - v_r, maps

    @staticmethod
    def visible(is_token: Tensor, layer_mask: Tensor | None) -> Tensor:
        """Tokens (B, n) that are no padding, within the layer's own mask: (B, 1, n or 1, n)."""
        there = is_token.bool()[:, None, None, :]
        if layer_mask is None:
            return there
        there = there & (layer_mask if layer_mask.dtype == torch.bool else layer_mask == 0)
        return there | ~there.any(-1, keepdim=True)  # local layers leave padding without a key: NaN


# -------------------------------------------------------------------------------- preference losses


# Each takes gap = r_c - r_r - margin, and the same with the label flipped, (B,) both; flip_rate,
# the share of wrong labels reckoned with; strength (B,), an ensemble's mean r_c - r_r.


def bt_loss(gap: Tensor, *_) -> Tensor:
    """Bradley-Terry of the pair as labelled   (E2): (B,) -> (B,)."""
    return -F.logsigmoid(gap)


def smooth(gap: Tensor, flipped: Tensor, flip_rate: float, strength: Tensor) -> Tensor:
    """Label smoothing: conservative BT (Mitchell's cDPO, Eq. 3; arXiv 2401.06080, Eq. 5)."""
    return -(1 - flip_rate) * F.logsigmoid(gap) - flip_rate * F.logsigmoid(flipped)


def soft(gap: Tensor, flipped: Tensor, flip_rate: float, strength: Tensor) -> Tensor:
    """Label smoothing only where an ensemble doubts the label (arXiv 2401.06080, section 2.5)."""
    return smooth(gap, flipped, flip_rate * (strength < 0), strength)


def robust(gap: Tensor, flipped: Tensor, flip_rate: float, strength: Tensor) -> Tensor:
    """A loss whose mean over random flips is that of clean labels (arXiv 2403.00409); it can be
    negative."""
    loss = -(1 - flip_rate) * F.logsigmoid(gap) + flip_rate * F.logsigmoid(flipped)
    return loss / (1 - 2 * flip_rate)


PREFERENCE_LOSSES = {"bt": bt_loss, "smooth": smooth, "soft": soft, "robust": robust}


def pair_loss(
    rewards: Tensor, *, preference_loss="bt", flip_rate=0.1, margin=0.0, strength=0.0, signed=False
) -> Tensor:
    """BT or one of its variants against wrong labels, per pair: (B, 2) -> (B,).

    Args:
        rewards: (B, 2), r_c and r_r.
        preference_loss: a key of PREFERENCE_LOSSES.
        flip_rate: share of wrong labels that the loss reckons with.
        margin: (B,), by how much r_c is to exceed r_r (Llama 2, arXiv 2307.09288).
        strength: (B,), an ensemble's mean r_c - r_r (arXiv 2401.06080).
        signed: the margin changes its sign with the label, as strength does (Eq. 6 there).
    """
    difference, strength = rewards[:, 0] - rewards[:, 1], torch.as_tensor(strength)
    gap, flipped = difference - margin, -difference + (margin if signed else -margin)
    return PREFERENCE_LOSSES[preference_loss](gap, flipped, flip_rate, strength)


# ----------------------------------------------------------------- from token maps to word maps


def pool_words(token_map: Tensor, word: Tensor, W: int) -> Tensor:
    """Token map (B, n, n), word of each token (B, n), -1 = none -> word map (B, W, W)   (E5).

    Sum over the tokens of the attended word, mean over those of the attending word (Clark et al.,
    arXiv 1906.04341). Words without tokens get zeros. Two scatters: a matrix product with a 0/1
    matrix takes 1.4 times as long at 150 tokens, 16 times at 8,192.
    """
    B, n = word.shape
    slot = word + 1  # slot 0 takes the tokens that belong to no word
    attended = token_map.new_zeros(B, n, W + 1)
    attended = attended.scatter_add(2, slot[:, None, :].expand(B, n, n), token_map)
    sums = token_map.new_zeros(B, W + 1, W + 1)
    sums = sums.scatter_add(1, slot[:, :, None].expand(B, n, W + 1), attended)
    tokens = token_map.new_zeros(B, W + 1).scatter_add(1, slot, token_map.new_ones(B, n))
    return sums[:, 1:, 1:] / tokens[:, 1:, None].clamp_min(1)


def seen_words(word: Tensor, W: int) -> Tensor:
    """Words that have a token in a row: (B, n) -> (B, W) booleans."""
    seen = torch.zeros(len(word), W + 1, dtype=torch.bool, device=word.device)
    return seen.scatter(1, word + 1, True)[:, 1:]


def interaction_maps(model: RewardModel, teacher, batch: dict, teacher_rows: dict | None, layers):
    """Both models on one batch, and their maps over the words that both see   (E1, E3 - E5).

    Args:
        model, batch: the student and its rows, of student_batch.
        teacher, teacher_rows: InteractionTeacher and its rows, of teacher_batch for the same
            pairs; None where a control needs no map of a teacher.
        layers: ((student's), (teacher's)), aligned in this order.

    Returns the first arguments of total_loss: rewards (B, 2); student's and teacher's word maps
    (B, W, W), one for each layer (teacher's None without one); word_seg (B, W), -1 = unseen by one
    of the models that are there; verdict (B,) or None.
    """
    word_seg = batch["word_seg"]
    W = word_seg.shape[1]
    verdict, teacher_maps = None, [None] * len(layers[0])
    if teacher is not None:
        with torch.no_grad():
            verdict, T = teacher(teacher_rows, layers[1])
        teacher_maps = [pool_words(token_map, teacher_rows["word"], W) for token_map in T]
        word_seg = word_seg.masked_fill(~seen_words(teacher_rows["word"], W), -1)
    rewards, S = model(batch, layers[0])
    student_maps = [pool_words(token_map, batch["word"], W) for token_map in S]
    return rewards, student_maps, teacher_maps, word_seg, verdict


# -------------------------------------------------------------------------------------- alignment

TINY = 1e-30  # in logarithms and divisions; a larger one ends the gradient of keys of small share


def block_masks(word_seg: Tensor, support: str = "full") -> tuple[Tensor, Tensor]:
    """Segments (B, W) of the words -> the block sets intra and inter, (B, W, W), True = inside.

    support "causal" keeps what the student really attends, by words: no later one, no inter block.
    """
    s_i, s_j = word_seg[:, :, None], word_seg[:, None, :]
    real = (s_i >= 0) & (s_j >= 0)
    inter = s_i + s_j == 3  # 1 and 2, or 2 and 1
    if support == "causal":
        return (real & ~inter).tril(), torch.zeros_like(inter)
    return real & ~inter, real & inter


def renormalise(word_map: Tensor, block: Tensor) -> Tensor:
    """The rows of a map (B, W, W) as distributions inside the block; empty rows stay zero."""
    inside = word_map.float() * block
    return inside / inside.sum(-1, keepdim=True).clamp_min(TINY)


def kl_rows(T: Tensor, S: Tensor) -> Tensor:
    """KL(T_i || S_i) of each row: (B, W, W) twice -> (B, W)."""
    return (T * ((T + TINY).log() - (S + TINY).log())).sum(-1)


def mse_rows(T: Tensor, S: Tensor) -> Tensor:
    """Squared distance of each row, VIRT's loss (arXiv 2112.04195)."""
    return (T - S).square().sum(-1)


ALIGN_LOSSES = {"kl": kl_rows, "mse": mse_rows}


def alignment_loss(T: Tensor, S: Tensor, block: Tensor, kind: str = "kl") -> Tensor:
    """Attentional alignment inside one block set, per pair   (E6).

    Target and simulated word map T, S (B, W, W), block (B, W, W) -> (B,): mean over the rows that
    have a word in the block. A row that the teacher leaves empty (local attention) adds 0.
    """
    T, S = renormalise(T, block), renormalise(S, block)
    rows = ALIGN_LOSSES[kind](T, S) * (T.sum(-1) > 0)
    return rows.sum(-1) / block.any(-1).sum(-1).clamp_min(1)


# Teacher's word map (None: no teacher) and block (B, W, W), word_seg (B, W), a seed for each pair
# -> target (B, W, W), whose rows are renormalised in the block afterwards.


def teacher_target(T, block, word_seg, seeds) -> Tensor:
    """The method: the teacher's map."""
    return T


def uniform_target(T, block, word_seg, seeds) -> Tensor:
    """Control: every word of the block alike; no teacher is needed."""
    return block.float()


def column_target(T, block, word_seg, seeds) -> Tensor:
    """Control: each row becomes the block's mean row. What is attended stays, by whom is lost."""
    rows = renormalise(T, block)
    mean = rows.sum(1, keepdim=True) / (rows.sum(-1) > 0).sum(1).clamp_min(1)[:, None, None]
    return mean.expand_as(T)


def shuffled_target(T, block, word_seg, seeds) -> Tensor:
    """Control: rows permuted inside each segment, by one seed a pair."""
    order = np.tile(np.arange(T.shape[1]), (len(T), 1))
    for b, seed in zip(range(len(T)), seeds, strict=True):
        rng = np.random.default_rng(seed)
        for s in (0, 1, 2):
            words = np.flatnonzero(word_seg[b].cpu().numpy() == s)
            order[b, words] = rng.permutation(words)
    return T.gather(1, torch.from_numpy(order).to(T.device)[:, :, None].expand_as(T))


ALIGN_TARGETS = {
    "teacher": teacher_target,
    "uniform": uniform_target,
    "shuffled": shuffled_target,
    "column": column_target,
}


# ------------------------------------------------------------------------------------- total loss


def total_loss(
    rewards: Tensor,
    student_maps: list[Tensor],
    teacher_maps: list[Tensor],
    word_seg: Tensor,
    verdict: Tensor | None = None,
    *,
    lambda_intra=1.0,
    lambda_inter=1.0,
    lambda_score=0.0,
    center_rewards=0.0,
    align_loss="kl",
    align_target="teacher",
    align_support="full",
    shuffle_seeds=(),
    **preference,
) -> dict[str, Tensor]:
    """The terms of L that there are per pair, unweighted, (B,) each, and L as "loss"   (E7).

    Training logs the mean of each; a further key is logged too. Alignment: nats a row under KL.

    Args:
        rewards: (B, 2), r_c and r_r.
        student_maps, teacher_maps: word maps S and T of the aligned layers, (B, W, W) each.
        word_seg: (B, W) segment of each word, -1 = unseen by one of the models.
        verdict: (B,), the teacher's; only lambda_score needs it.
        lambda_intra, lambda_inter: weights of the two alignment losses.
        lambda_score: weight of MarginMSE against the verdict, in one order (arXiv 2010.02666).
        center_rewards: weight of the squared sum of a pair's rewards (arXiv 2312.09244).
        align_loss, align_target, align_support: see ALIGN_LOSSES, ALIGN_TARGETS, block_masks.
        shuffle_seeds: one a pair, for the shuffled target.
        preference: see pair_loss; whatever it says, its loss is the term "bt".
    """
    blocks = block_masks(word_seg, align_support)
    L_intra, L_inter = rewards.new_zeros(2, len(rewards))
    target = ALIGN_TARGETS[align_target]
    for S, T in zip(student_maps, teacher_maps):
        intra, inter = (
            alignment_loss(target(T, block, word_seg, shuffle_seeds), S, block, align_loss)
            for block in blocks
        )
        L_intra = L_intra + intra / len(student_maps)
        L_inter = L_inter + inter / len(student_maps)
    L_BT = pair_loss(rewards, **preference)
    L_center = rewards.sum(1).square()
    L_score = torch.zeros_like(L_BT)
    if verdict is not None:
        L_score = (rewards[:, 0] - rewards[:, 1] - verdict).square()

    L = (  # (E7); the last two are options with weight 0
        L_BT
        + lambda_intra * L_intra
        + lambda_inter * L_inter
        + lambda_score * L_score
        + center_rewards * L_center
    )
    terms = dict(loss=L, bt=L_BT, center=L_center)  # what nothing was computed for stays out
    if student_maps:
        terms |= dict(intra=L_intra, inter=L_inter)
    return terms if verdict is None else terms | dict(score=L_score)


# ==================================================================================================
# Part 2: training. The method is complete above. RANK of WORLD is this process, run.scoring is
# (pairs at once, device, autocast): see part 3.
# ==================================================================================================


def flag(default, help, choices=None, low=0, high=math.inf):
    """A field of Config: default, help text, and the values it takes."""
    limits = {"help": help, "choices": choices, "low": low, "high": high}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=limits)
    return field(default=default, metadata=limits)


@dataclass
class Config:
    # input and output
    model: str = flag("", "student: directory or hub id of a decoder (none: the offline demo)")
    teacher: str = flag("", "teacher: directory or hub id of an encoder (none: ModernBERT-base)")
    data: list[str] = flag([], "training pairs: JSONL files, plain or .gz (none: HH-RLHF helpful)")
    val_data: list[str] = flag([], "pairs that choose the checkpoint (none: carved from --data)")
    eval_data: list[str] = flag([], "held-out pairs, reported at the end, never used to choose")
    output_dir: str = flag("", "run directory (none: runs/MODEL-METHOD)")
    resume: bool = flag(False, "go on from the newest whole checkpoint in --output-dir")
    overwrite: bool = flag(False, "replace an earlier run in --output-dir")
    # method
    method: str = flag("id", "id = interaction distillation, bt = plain BT", ["id", "bt"])
    lambda_intra: float = flag(1.0, "weight of the intra-sequence alignment loss")
    lambda_inter: float = flag(1.0, "weight of the inter-sequence alignment loss")
    lambda_score: float = flag(0.0, "weight of MarginMSE against the verdict (arXiv 2010.02666)")
    align_loss: str = flag("kl", "kl, or mse as in VIRT (arXiv 2112.04195)", ALIGN_LOSSES)
    align_layers: str = flag("last", "last, middle, all, or student:teacher pairs as 12:3,-1:-1")
    align_target: str = flag("teacher", "the map to match; the others are controls", ALIGN_TARGETS)
    align_support: str = flag("full", "causal = only where the student attends", ["full", "causal"])
    teacher_epochs: float = flag(1.0, "passes of the teacher over the data; 0: as it is", high=1e6)
    encoding: str = flag(
        "packed",
        "siamese = two causal rows a pair: for any decoder, and faster from about 2,000 tokens",
        ["packed", "siamese"],
    )
    max_length: int = flag(1024, "longest prompt + response, in student tokens", low=1)
    overlong: str = flag(
        "truncate",
        "longer pairs: truncate cuts the oldest of the prompt, and drops what still does not fit",
        ["truncate", "drop", "error"],
    )
    # baselines
    preference_loss: str = flag("bt", "BT, or a variant for wrong labels", PREFERENCE_LOSSES)
    flip_rate: float = flag(0.1, "share of wrong labels that the variants reckon with", high=0.49)
    margin_field: str = flag(
        "none",
        "by which r_c is to exceed r_r: margin (arXiv 2307.09288) or strength (arXiv 2401.06080)",
        ["none", "margin", "strength"],
    )
    flip_negative_strength: bool = flag(False, "exchange responses of pairs with strength < 0")
    label_noise: float = flag(0.0, "share of training labels flipped on purpose", high=1)
    center_rewards: float = flag(0.0, "weight of (r_c + r_r)^2 (arXiv 2312.09244)")
    # optimiser
    epochs: float = flag(1.0, "passes of the student over the training pairs", high=1e6)
    max_steps: int = flag(0, "steps of the student in place of --epochs; 0 = --epochs decides")
    batch_size: int = flag(16, "pairs a step, over all processes", low=1)
    grad_accum: int = flag(1, "micro-batches a step is cut into (less memory)", low=1)
    lr: float = flag(1e-5, "peak learning rate of the student (AdamW)")
    teacher_lr: float = flag(5e-5, "peak learning rate of the teacher (AdamW)")
    warmup: float = flag(0.05, "share of the steps with rising rate, then cosine to 0", high=1)
    weight_decay: float = flag(0.01, "AdamW decay of the matrices (none on norms, biases)")
    clip: float = flag(1.0, "largest gradient norm; longer ones are scaled down to it", low=1e-9)
    # evaluation and logging
    val_fraction: float = flag(0.1, "share of --data carved for validation", high=0.9)
    val_max: int = flag(512, "most pairs of the carved validation split")
    log_every: int = flag(10, "steps between lines of metrics.jsonl", low=1)
    eval_every: int = flag(0, "steps between validations; 0 = at a half and at the end")
    save_every: int = flag(0, "steps between checkpoints; 0 = at each validation")
    # system
    seed: int = flag(0, "seed of every random stream", high=2**63 - 1)
    seeds: int = flag(1, "demo only: repeat with this many seeds", low=1)
    dtype: str = flag("auto", "autocast; auto = bf16 where faster", ["auto", "fp32", "bf16"])
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps ...")
    gradient_checkpointing: bool = flag(False, "recompute activations in backward (less memory)")
    fsdp: bool = flag(False, "under torchrun: shard weights, gradients and optimizer (FSDP2)")


# --------------------------------------------------------------------------------- scoring pairs


@torch.no_grad()
def score_pairs(model: RewardModel, examples, batch_size: int, device, amp, name="") -> np.ndarray:
    """Rewards (N, 2) in fp32 of encoded pairs, in their order; only scalars are kept."""
    scores, was_training = np.full((len(examples), 2), -np.inf, dtype=np.float32), model.training
    model.eval()
    for index in shares(examples, batch_size, name):
        batch = student_batch([examples[i] for i in index], pad_id_of(model.stock), device)
        with amp():
            rewards, _ = model(batch)
        scores[index] = rewards.float().cpu().numpy()
    model.train(was_training)
    return over_processes(scores, "MAX", device)


@torch.no_grad()
def teacher_verdicts(teacher, examples, batch_size: int, device, amp, name="") -> np.ndarray:
    """The teacher's verdicts (N,), mean of both orders."""
    verdicts, was_training = np.full(len(examples), -np.inf, dtype=np.float32), teacher.training
    teacher.eval()
    for index in shares(examples, batch_size, name):
        part, both = [examples[i] for i in index], 0
        for swap in (False, True):
            order = np.full(len(part), swap)
            batch = teacher_batch(part, order, teacher.tokenizer, device)
            with amp():
                both = both + teacher(batch)[0].float()
        verdicts[index] = (both / 2).cpu().numpy()
    teacher.train(was_training)
    return over_processes(verdicts, "MAX", device)


def outcomes(margins):
    """1 for a positive margin, 0 for a negative one, ties half: (N,) -> (N,), arrays or tensors."""
    return (margins > 0) + 0.5 * (margins == 0)


def accuracy(margins: np.ndarray) -> float:
    """Share of positive margins (N,), ties counted as half."""
    return float(outcomes(margins).mean())


def longer_margins(pairs: list[Pair]) -> np.ndarray:
    """The length baseline: characters of chosen minus characters of rejected, (N,)."""
    return np.array([len(p.chosen.strip()) - len(p.rejected.strip()) for p in pairs])


# -------------------------------------------------------------------------------------- the loop


@dataclass
class Phase:
    """What the loop trains: the teacher first, then the student.

    terms(index, epoch) -> per-pair terms (B,) with "loss", and "rewards" (B, 2); validate() -> dict
    with "accuracy" and "bt". The best so far is written as RUN/name, a stock directory.
    """

    name: str
    model: nn.Module
    tokenizer: object
    examples: list[Example]
    terms: object
    validate: object
    lr: float
    steps: int


def make_optimizer(model: nn.Module, lr: float, decay: float) -> torch.optim.AdamW:
    """AdamW; decay on matrices only."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    # fused: a step over 17 million weights takes 10 ms in place of 62 (two CPU cores)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr, (0.9, 0.95), fused=True)


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate: linear rise over `warmup` of the steps, then cosine to 0."""
    warm = max(1, round(warmup * steps))
    if step <= warm:
        return step / warm
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (steps - warm + 1))


def plan_epoch(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Steps of one epoch as index arrays: shuffled, then sorted by length in windows of 64 steps.

    On HH-RLHF with 16 pairs a step (measured, not kept): padding 58 % without, 22 % in windows of 8
    steps, 5 % in 64.
    """
    rng = np.random.default_rng([seed, epoch, 11])
    order, steps = rng.permutation(len(lengths)), []
    for start in range(0, len(order), batch_size * 64):
        part = order[start : start + batch_size * 64]
        part = part[np.argsort(lengths[part], kind="stable")]
        steps += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [steps[i] for i in rng.permutation(len(steps))]


def training_step(run: Run, phase: Phase, optimizer, index: np.ndarray, epoch: int) -> dict:
    """Forward, backward, clip, update on the pairs `index`; the means of all terms over them."""
    cfg, sums = run.cfg, Counter()
    parts = np.array_split(index[RANK::WORLD], min(cfg.grad_accum, math.ceil(len(index) / WORLD)))
    for k, part in enumerate(parts):
        if WORLD > 1:  # gradients travel once a step; sharded ones always
            phase.model.set_requires_gradient_sync(cfg.fsdp or k == len(parts) - 1)
        weight = 1.0
        if not len(part):  # no pair is left for this process: it computes along, for nothing
            part, weight = index[:1], 0.0
        with run.amp():
            terms = phase.terms(part, epoch)
        # the mean over the pairs of the whole step, however it is cut (processes take the mean)
        (weight * WORLD * terms["loss"].sum() / len(index)).backward()
        rewards = terms.pop("rewards").float()
        margin = rewards[:, 0] - rewards[:, 1]
        terms |= {"accuracy": outcomes(margin), "margin": margin}
        terms |= {"reward_mean": rewards.mean(1), "reward_square": rewards.square().mean(1)}
        values = torch.stack([v.detach().float() for v in terms.values()]).cpu().double().sum(1)
        sums.update(dict(zip(terms, (weight * values / len(index)).tolist())))
    norm = nn.utils.clip_grad_norm_(phase.model.parameters(), cfg.clip)
    means = over_processes(np.array(list(sums.values())), "SUM", run.device)
    sums = dict(zip(sums, means.tolist()))
    sums["reward_std"] = max(0.0, sums.pop("reward_square") - sums["reward_mean"] ** 2) ** 0.5
    sums["grad_norm"] = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums


def fit(run: Run, phase: Phase) -> None:
    """The one training loop. Raises UserError when the loss or its gradient is not finite."""
    cfg, name = run.cfg, phase.name
    lengths = np.array([len(e.ids) for e in phase.examples])
    per_epoch = math.ceil(len(lengths) / cfg.batch_size)
    eval_every = cfg.eval_every or math.ceil(phase.steps / 2)
    stream = cfg.seed + (name == "student")  # teacher and student get the pairs in other orders
    optimizer = make_optimizer(phase.model, phase.lr, cfg.weight_decay)
    done, best = run.restore(phase, optimizer)
    phase.model.train()
    progress = bar(None, name, total=phase.steps, initial=done, unit="step")
    for step in range(done + 1, phase.steps + 1):
        epoch, place = divmod(step - 1, per_epoch)
        if place == 0 or step == done + 1:
            plan = plan_epoch(lengths, cfg.batch_size, stream, epoch)
        index, began = plan[place], time.perf_counter()
        torch.manual_seed(hash((cfg.seed, name == "student", step, RANK)))  # also when resumed
        lr = phase.lr * learning_rate(step, phase.steps, cfg.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = training_step(run, phase, optimizer, index, epoch)
        if not math.isfinite(sums["grad_norm"] + sums["loss"]):
            raise not_finite(name, step, sums, [phase.examples[i].pair for i in index])
        progress.update()
        progress.set_postfix(
            loss=f"{sums['loss']:.3f}", accuracy=f"{sums['accuracy']:.2f}", refresh=False
        )
        if step % cfg.log_every == 0 or step == phase.steps:
            speed = len(index) / (time.perf_counter() - began)
            run.log(phase=name, step=step, **sums, lr=lr, pairs_per_s=speed)
        is_due = step % eval_every == 0 or step == phase.steps
        if is_due:
            value = phase.validate()
            run.log(phase=name, step=step, **{"val_" + k: v for k, v in value.items()})
            shown = ", ".join(f"{k} {v:.4f}" for k, v in value.items())
            progress.write(f"{name} step {step}: validation {shown}")
            if [value["accuracy"], -value["bt"]] > best:
                best = [value["accuracy"], -value["bt"]]
                run.save_model(phase.model, phase.tokenizer, name)
        stop = run.agreed_stop()
        is_saved = step % cfg.save_every == 0 if cfg.save_every else is_due
        if is_saved or stop or step == phase.steps:
            run.checkpoint(phase, step, optimizer, best)
        if stop:
            progress.close()
            run.leave(f"{name} step {step} of {phase.steps}", stop)
    progress.close()


def not_finite(name: str, step: int, sums: dict, pairs: list[Pair]) -> UserError:
    """What to say when a loss turns to NaN or infinity."""
    ids = ", ".join(map(data_prep.called, pairs[:8]))
    what = f"loss {sums['loss']}, gradient norm {sums['grad_norm']}, on the pairs {ids} ..."
    advice = "the last checkpoint stays; try a lower learning rate or --dtype fp32"
    return UserError(f"{name} step {step}: not finite: {what}; {advice}")


# -------------------------------------------------------------- a whole run, from pairs to table


SPLIT_OPTIONS = (  # arguments of read_splits that are flags too
    *("data", "val_data", "eval_data", "val_fraction", "val_max", "seed"),
    *("label_noise", "flip_negative_strength"),
)
LOSS_OPTIONS = [  # arguments of total_loss and pair_loss that are flags too
    f.name for f in fields(Config) for of in (total_loss, pair_loss) if f.name in of.__kwdefaults__
]


def distillation_terms(model, teacher, part: list[Example], swap, layers, seeds, cfg) -> dict:
    """The terms of L (E7) for some pairs: batches, both models, loss.

    Args:
        model: RewardModel; teacher: InteractionTeacher, frozen, or None.
        part: B pairs; swap: (B,) booleans, the teacher's order.
        layers: ((student's), (teacher's)).
        seeds: one a pair, for the shuffled target.
        cfg: weights and choices.
    """
    device, rows = model.stock.device, None
    batch = student_batch(part, pad_id_of(model.stock), device)
    if teacher is not None:
        rows = teacher_batch(part, swap, teacher.tokenizer, device)
    read = interaction_maps(model, teacher, batch, rows, layers)
    options = {name: getattr(cfg, name) for name in LOSS_OPTIONS}
    extras = {
        name: torch.tensor([getattr(e.pair, name) for e in part], device=device)
        for name in needed_fields(cfg)
    }
    options |= dict(margin=extras.get(cfg.margin_field, 0.0), strength=extras.get("strength", 0.0))
    options["signed"] = cfg.margin_field == "strength"
    return {**total_loss(*read, shuffle_seeds=seeds, **options), "rewards": read[0].detach()}


def train_teacher(run: Run, teacher, examples, validation, swaps) -> None:
    """Fine-tunes the teacher on (E4); the best by validation accuracy is RUN/teacher."""
    cfg, tokenizer = run.cfg, teacher.tokenizer

    def terms(index, epoch):
        part, swap = [examples[i] for i in index], swaps(index, epoch)
        verdict, _ = teacher(teacher_batch(part, swap, tokenizer, run.device))
        rewards = torch.stack([verdict, -verdict], dim=1).detach() / 2
        return {"loss": bt_loss(verdict), "rewards": rewards}

    def validate():
        verdicts = teacher_verdicts(teacher, validation, *run.scoring)
        return {"accuracy": accuracy(verdicts), "bt": float(np.logaddexp(0, -verdicts).mean())}

    steps = max(1, round(cfg.teacher_epochs * math.ceil(len(examples) / cfg.batch_size)))
    fit(run, Phase("teacher", teacher, tokenizer, examples, terms, validate, cfg.teacher_lr, steps))


def train_student(run: Run, model, tokenizer, teacher, layers, examples, validation, swaps) -> None:
    """Trains the reward model on L (E7); the best by validation accuracy is RUN/student."""
    cfg = run.cfg

    def terms(index, epoch):
        part, swap = [examples[i] for i in index], swaps(index, epoch)
        seeds = [[cfg.seed, epoch, int(i)] for i in index]
        return distillation_terms(model, teacher, part, swap, layers, seeds, cfg)

    def validate():
        rewards = score_pairs(model, validation, *run.scoring)
        margins = rewards[:, 0] - rewards[:, 1]
        bt = float(np.logaddexp(0, -margins).mean())
        spread = {"reward_mean": float(rewards.mean()), "reward_std": float(rewards.std())}
        return {"accuracy": accuracy(margins), "bt": bt, **spread}

    steps = cfg.max_steps or max(1, round(cfg.epochs * math.ceil(len(examples) / cfg.batch_size)))
    fit(run, Phase("student", model, tokenizer, examples, terms, validate, cfg.lr, steps))


def train(cfg: Config) -> dict:
    """One whole run: pairs, teacher, student, table; returns what RUN/results.json holds.

    Raises UserError for all that a person can mend, before anything slow where it can be known.
    """
    needs_teacher = check_config(cfg)
    with Run(cfg) as run:
        options = {name: getattr(cfg, name) for name in SPLIT_OPTIONS}
        pairs, held_pairs, counts = data_prep.read_splits(**options, needed=needed_fields(cfg))
        resumes_student = run.saved is not None and run.saved[0] == "student"
        is_trained = resumes_student and cfg.teacher_epochs > 0  # its teacher is in RUN/teacher
        model, tokenizer, teacher, layers = load_models(run, needs_teacher, is_trained)
        examples, held = encode_all(cfg, model, tokenizer, teacher, pairs, held_pairs, counts)
        run.begin(counts)
        started, validation, verdicts = time.perf_counter(), held["validation"], {}

        def swaps(index: np.ndarray, epoch: int) -> np.ndarray:  # the random order of (E4)
            return np.random.default_rng([cfg.seed, epoch, 12]).random(len(examples))[index] < 0.5

        if teacher is not None:
            if cfg.teacher_epochs > 0 and not is_trained:
                distribute(run, teacher)
                train_teacher(run, teacher, examples, validation, swaps)
                teacher = run.place(load_teacher(str(run.dir / "teacher")))
            teacher.eval().requires_grad_(False)
            if cfg.fsdp:  # a whole frozen model has nothing to share
                distribute(run, teacher)
            for name, part in held.items():
                verdicts[name] = teacher_verdicts(teacher, part, *run.scoring, f"teacher: {name}")
            report_teacher(verdicts["validation"])
        distribute(run, model)
        train_student(run, model, tokenizer, teacher, layers, examples, validation, swaps)
        best, _ = load_student(str(run.dir / "student"))
        model = run.place(ENCODINGS[cfg.encoding](best))
        if cfg.fsdp:
            distribute(run, model)
        results = {"method": cfg.method, "seed": cfg.seed, "sets": {}}
        for name, part in held.items():
            rewards = score_pairs(model, part, *run.scoring, f"student: {name}")
            results["sets"][name] = table_row(part, rewards, verdicts.get(name))
        results["seconds"] = round(time.perf_counter() - started, 1)
        run.write("results.json", results)
        return results


def table_row(examples: list[Example], rewards: np.ndarray, verdicts: np.ndarray | None) -> dict:
    """One row of the final table: rewards (N, 2), the teacher's verdicts (N,) if there are any."""
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "pairs": len(examples),
        "student": accuracy(margins),
        "ties": int((margins == 0).sum()),
        "teacher": None if verdicts is None else accuracy(verdicts),
        "longer": accuracy(longer_margins([e.pair for e in examples])),
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
    }


def report_teacher(verdicts: np.ndarray) -> None:
    """What is known of the teacher before it is used."""
    value, pairs = accuracy(verdicts), len(verdicts)
    print(f"teacher: validation accuracy {value:.4f} on {pairs} pairs, frozen")
    if value < 0.5 + 1.64 * math.sqrt(0.25 / pairs):  # one-sided 95 %
        what = f"the teacher is at chance ({value:.3f} on {pairs} pairs)"
        advice = "Train it longer (--teacher-epochs) or faster (--teacher-lr)"
        print(f"warning: {what}; its attention has little to teach. {advice}")


def print_table(results: dict) -> None:
    """Accuracy in % of the student beside the teacher and two baselines."""
    columns = ("pairs", "student", "teacher", "longer", "majority")
    print(f"\n{'accuracy %':24}" + "".join(f"{c:>10}" for c in columns))
    for name, row in results["sets"].items():
        values = [row[k] for k in ("student", "teacher", "longer")] + [0.5]
        cells = ["-" if v is None else f"{100 * v:.1f}" for v in values]
        print(f"{name:24}{row['pairs']:>10}" + "".join(f"{c:>10}" for c in cells))
    print("(majority: either side of a pair comes first, so a constant answer is right in half)")


# ==================================================================================================
# Part 3: plumbing. The training is complete above; what follows is needed by a program only.
# ==================================================================================================

# ------------------------------------------------------------------------------ models at the door

# There is no list of supported models: each is tried on a few tokens before any long work, and
# refused with the reason and the flag that helps.

HEADS = re.compile(r"(^|[._])(v_head|value_head|reward_head|regression_head|score|classifier)\b")


def load(auto, name: str, **kwargs):
    """from_pretrained with errors in one line; no remote code; offline from the cache alone."""
    hint, folder = "", Path(name)
    if not folder.is_dir():
        data_prep.hub_problem()  # without a network: offline from here on, in place of retries
        hint = " (no such directory, and as a hub id it could not be fetched)"
    elif (folder / "adapter_config.json").exists():
        hint = " (a peft adapter: merge it into its base model and save that)"
    try:
        return auto.from_pretrained(name, trust_remote_code=False, **kwargs)
    except Exception as why:  # the hub, the disk and every model class raise kinds of their own
        raise UserError(f"{name}: cannot be loaded{hint}: {first_line(why)}") from None


def positions_of(model, name: str = "", max_length: int = 0) -> int:
    """The longest input in tokens, 10**6 = no limit; UserError where max_length is over it."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or -1
    positions = positions if positions > 0 else 10**6  # XLNet says -1
    for part, table in model.named_modules():
        if part.endswith("position_embeddings") and getattr(table, "padding_idx", None) is not None:
            # RoBERTa's kin count positions from pad + 1
            positions = min(positions, len(table.weight) - table.padding_idx - 1)
    if max_length > positions:
        advice = f"over the model's {positions} positions; use --max-length {positions}"
        raise UserError(f"{name}: --max-length {max_length} is {advice}")
    return positions


def refuse_missing(name: str, model, keys: list[str], heads=()) -> None:
    """Weights that a checkpoint lacks would be random; heads: what it holds under other names."""
    if keys:
        what = f"its weights lack {len(keys)} tensors of {type(model).__name__}, {min(keys)} first"
        there = f"; it holds {heads[0]}: rename that to score.weight, or remove it" if heads else ""
        raise UserError(f"{name}: {what}{there}")


def reading_of(teacher: InteractionTeacher, max_length: int = 0) -> tuple:
    """(tokenizer, tokens of its longest row) of a teacher, as Encoder takes them: no longer than
    two sequences of the student, where a max_length is given."""
    positions = positions_of(teacher.stock)
    return teacher.tokenizer, min(positions, 2 * max_length or positions)


def saved_class(config) -> str:
    """The class that a checkpoint was saved from, "" where its config does not say."""
    return (getattr(config, "architectures", None) or [""])[0]


def pad_id_of(stock) -> int:
    return stock.config.get_text_config().pad_token_id


def configs_of(config) -> list:
    """A config and those inside it (composite models: text, vision)."""
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, *(c for part in inner if part is not None for c in configs_of(part))]


def choose_pad(tokenizer, rows: int) -> None:
    """A pad token that never ends a text, if possible within the model's `rows` of embeddings.

    The stock class reads the reward at the right-most token that is not pad: with pad = eos it
    would skip the end token (transformers #35352). Any other special token serves.
    """
    tokenizer.padding_side = "right"
    unfit = {None, tokenizer.eos_token_id}
    with suppress(UserError):  # nor one that may end the scored string
        formatter = data_prep.Formatter(tokenizer)
        for last_word in ("yes", "\ue000"):
            text = formatter([{"role": "user", "content": "hi"}], last_word)
            unfit.update(tokenizer(text, add_special_tokens=False)["input_ids"][-1:])
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids)
    spare = [i for i in candidates if i not in unfit and i < rows]
    if spare:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(spare[0])
    else:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})


def load_student(name: str, seed: int = 0, max_length: int = 0):
    """(stock sequence classifier with one label in fp32, tokenizer); a new head is seeded.

    Raises UserError for what is no decoder or cannot hold max_length tokens.
    """
    tokenizer = load_tokenizer(name)
    config = load(transformers.AutoConfig, name)
    kind = saved_class(config)
    if kind.endswith("ForSequenceClassification") and config.num_labels != 1:
        raise UserError(f"{name}: {kind} has {config.num_labels} labels, a reward model has 1")
    if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        what = f"no sequence-classification class for {config.model_type}, which a student needs"
        raise UserError(f"{name}: transformers has {what}; take another model")
    config.num_labels = 1
    for part in configs_of(config):
        for key, value in part.to_dict().items():
            if ("drop" in key or "jitter" in key) and isinstance(value, float):
                setattr(part, key, 0.0)  # noise in r would be noise in the margin
                if "jitter" in key and value:
                    print(f"{name}: its router draws no noise here ({key} 0, was {value})")
    torch.manual_seed(seed)  # before the load: a missing head is drawn in it
    options = dict(config=config, dtype=torch.float32, output_loading_info=True)
    model, info = load(transformers.AutoModelForSequenceClassification, name, **options)
    if not hasattr(model, "score"):
        what = f"{type(model).__name__} has no linear head called score, as decoders have"
        raise UserError(f"{name}: {what}; take another decoder (an encoder can be a --teacher)")
    heads = list(filter(HEADS.search, info["unexpected_keys"]))  # a trained one is not to be lost
    missing = [k for k in info["missing_keys"] if heads or not k.startswith("score")]
    refuse_missing(name, model, missing, heads)
    if info["missing_keys"]:
        std = 1 / math.sqrt(model.score.in_features + 1)  # arXiv 2009.01325
        nn.init.normal_(model.score.weight, std=std)
    positions_of(model, name, max_length)
    say_rope(model, name, max_length)
    rows = model.get_input_embeddings().num_embeddings
    choose_pad(tokenizer, rows)
    if tokenizer.pad_token_id >= rows:
        model.resize_token_embeddings(tokenizer.pad_token_id + 1)
    for part in configs_of(model.config):  # every config that some part of the model may read
        part.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def say_rope(model, name: str, max_length: int) -> None:
    """LongRoPE turns to other frequencies for a whole batch once one row is over the old window."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    window = rope.get("original_max_position_embeddings") or 10**6
    if rope.get("rope_type") in ("longrope", "dynamic") and max_length > window:
        what = f"over {window} tokens a row changes the frequencies of its whole batch"
        print(f"warning: {name}: {what}, and so its rewards; --max-length {window} avoids it")


def attention_layers(model) -> int:
    """Layers that call the attention interface (hybrids have fewer than num_hidden_layers).

    Raises UserError where the model does not take the tap.
    """
    try:
        with torch.no_grad(), AttentionTap(model, ()) as tap:
            model.base_model(torch.tensor([[5, 6, 7]], device=model.device), use_cache=False)
    except Exception as why:  # of the model's own
        what = f"{first_line(why)}, so it shows no maps; use --method bt --encoding siamese"
        raise UserError(f"{model.name_or_path}: {what}") from None
    return tap.calls


def sliding_window(config) -> int:
    """Tokens that a layer attends over, 10**6 = all before it."""
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["unknown"])
    is_used = getattr(config, "use_sliding_window", True) and kinds != {"full_attention"}
    window = (is_used and getattr(config, "sliding_window", None)) or 10**6
    # sparse attention picks its keys (DeepSeek-V3.2: index_topk) before the tree mask hides some
    picked = getattr(config, "index_topk", None)
    return min(window, picked // 2) if picked else window


def attempt(function, *args, **kwargs):
    """What a model gives, or the first line of what it raises, of whatever kind."""
    try:
        return function(*args, **kwargs)
    except Exception as why:
        return first_line(why)


def agree(a, b, tolerance: float = 1e-3) -> bool:
    """Whether two attempts gave the same finite numbers."""
    if isinstance(a, str) or isinstance(b, str) or a.shape != b.shape:
        return False
    return bool(a.isfinite().all()) and torch.allclose(a, b, atol=tolerance, rtol=tolerance)


def cache_off(model) -> dict:
    """Decoders keep no cache here; encoders do not know the word."""
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


@torch.no_grad()
def sees_ahead(model, ids: Tensor) -> bool:
    """Whether an early token's hidden state changes with the last token (1, n)."""
    other = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
    states = [model.base_model(i, **cache_off(model)).last_hidden_state for i in (ids, other)]
    states = [state[0, 0] for state in states]
    if not torch.stack(states).isfinite().all():
        raise ValueError("its hidden states are not finite; the weights are damaged")
    return not agree(*states, 1e-4)


@torch.no_grad()
def readable_maps(model, ids: Tensor, layers, is_causal: bool) -> str:
    """How the maps of a model can be read, tried on ids (1, n): "tap", "eager" or "".

    "tap": the tap changes nothing, and queries and keys give what eager attention shows (they do
    not with a position bias (T5, DeBERTa), a sink or capped logits). "eager": by output_attentions,
    whose rows are probabilities.
    """
    n, before, tokens = ids.shape[1], model.config._attn_implementation, torch.ones_like(ids)
    inputs = dict(input_ids=ids, attention_mask=tokens, **cache_off(model))
    causal = torch.ones(1, 1, n, n, dtype=torch.bool, device=ids.device).tril()
    plain = model.base_model(**inputs).last_hidden_state
    tapped, hidden = {}, ""
    with suppress(UserError, ValueError):
        with AttentionTap(model, layers) as tap:
            under_tap = model.base_model(**inputs).last_hidden_state
        tapped, hidden = tap.kept, under_tap
    model.set_attn_implementation("eager")
    out = attempt(model.base_model, **inputs, output_attentions=True)
    model.set_attn_implementation(before)
    eager = [A.float() for A in getattr(out, "attentions", None) or () if A is not None]
    is_told = agree(hidden, plain) and not getattr(model.config, "attn_logit_softcapping", None)
    for query, key, scale, mask in tapped.values() if is_told and eager else ():
        visible = causal if is_causal else InteractionTeacher.visible(tokens, mask)
        A = attention_probabilities(query, key, scale, visible)
        is_told &= any(agree(A, shown) for shown in eager)  # hybrids show maps of some layers only
    if is_told:
        return "tap"
    rows = [A.sum(-1) for A in eager if A.shape[2:] == (n, n)]
    is_complete = len(rows) == len(eager) > max(layers)
    return "eager" if is_complete and all(agree(r, torch.ones_like(r)) for r in rows) else ""


@torch.no_grad()
def probe_student(model: RewardModel, name: str, max_length: int = 0, layers=()) -> None:
    """Compares stock, siamese and packed rewards on eight tokens: x of three, y_c two, y_r three.

    Raises UserError with the reason and the flag to use.
    """
    stock, was_training = model.stock, model.stock.training
    known, window = stock.get_input_embeddings().num_embeddings, sliding_window(stock.config)
    free = [i for i in range(known // 2, known) if i != pad_id_of(stock)]
    rows = dict(seg=[0, 0, 0, 1, 1, 2, 2, 2], pos=[0, 1, 2, 3, 4, 3, 4, 5], last=[4, 7])
    rows["ids"] = [free[i % len(free)] for i in range(8)]
    batch = {name: torch.tensor([row], device=stock.device) for name, row in rows.items()}
    row_c, row_r = batch["ids"][:, :5], batch["ids"][:, [0, 1, 2, 5, 6, 7]]

    def stock_rewards() -> Tensor:
        logits = [stock(input_ids=row, use_cache=False).logits for row in (row_c, row_r)]
        return torch.cat(logits, dim=1).float()

    stock.eval()
    alone = attempt(stock_rewards)
    apart = attempt(lambda: SiameseRewardModel(stock)(batch)[0])
    ahead = attempt(sees_ahead, stock, row_c)
    why = next((reason for reason in (alone, apart, ahead) if isinstance(reason, str)), "")
    checks = [  # what must hold, and what to say where it does not
        (not why, f"cannot be a student: {why}"),
        (agree(alone, alone), "gives rewards that are not finite; its weights are damaged"),
        (agree(apart, alone), "does not read its reward at the last token"),
        (not ahead, "is not causal: early tokens see late ones; an encoder can be a --teacher"),
    ]
    if not isinstance(model, SiameseRewardModel):
        shorter = f"sees {window} tokens at a time, which the tree mask does not know: use "
        shorter += f"--max-length {window}, or --encoding siamese"
        packed = attempt(lambda: model(batch)[0])
        checks.append((max_length <= window, shorter))
        checks.append((agree(packed, apart), "cannot take the tree mask; use --encoding siamese"))
    if layers:
        how = attempt(readable_maps, stock, row_c, layers, True)
        what = "attends in a way that its queries and keys do not tell; use --method bt"
        checks.append((how == "tap", what))
    stock.train(was_training)
    for holds, what in checks:
        if not holds:
            raise UserError(f"{name}: {type(stock).__name__} {what}")


def load_teacher(name: str, seed: int = 0) -> InteractionTeacher:
    """A stock token classifier with one label in fp32, tried on four tokens. Raises UserError."""
    tokenizer = load_tokenizer(name)
    config = load(transformers.AutoConfig, name)
    kind = saved_class(config)
    labels, config.num_labels = config.num_labels, 1
    torch.manual_seed(seed + 1)
    if type(config) not in transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        what = f"{config.model_type} has no token-classification class"
        raise UserError(f"{name}: {what}; a teacher is a bidirectional encoder")
    options = dict(config=config, dtype=torch.float32, output_loading_info=True)
    try:
        model, info = load(transformers.AutoModelForTokenClassification, name, **options)
    except UserError as why:
        has_head = kind.endswith("Classification") and labels != 1
        raise UserError(f"{why} ({kind} of {labels} labels)" if has_head else str(why)) from None
    base = model.base_model_prefix + "."  # a missing head is new, and trained
    refuse_missing(name, model, [k for k in info["missing_keys"] if k.startswith(base)])
    for kinds in (("pad", "pad"), ("sep", "eos"), ("cls", "bos")):
        if all(getattr(tokenizer, f"{kind}_token_id") is None for kind in kinds):
            what = f"the tokenizer has no {kinds[0]} token"
            raise UserError(f"{name}: {what}; a teacher is a bidirectional encoder")
    trial = copy.deepcopy(model).eval()  # BigBird turns from sparse to full for good on short rows
    ids, kind = torch.tensor([[5, 6, 7, 8]]), type(model).__name__
    ahead = attempt(sees_ahead, trial, ids)
    how = attempt(readable_maps, trial, ids, range(model.config.num_hidden_layers), False)
    if not ahead:
        what = "is causal, its early tokens never see late ones; a teacher is an encoder (BERT ...)"
        raise UserError(f"{name}: {kind} {what}")
    if isinstance(ahead, str) or how not in ("tap", "eager"):
        what = how or "it shows no attention maps whose rows are probabilities"
        what = ahead if isinstance(ahead, str) else what
        raise UserError(f"{name}: {kind} cannot be a teacher: {what}")
    if how == "eager":
        model.set_attn_implementation("eager")
        print(f"{name}: its maps are read by output_attentions, in eager attention (slower)")
    return InteractionTeacher(model, tokenizer, eager=how == "eager")


def open_student(student) -> tuple[RewardModel, object]:
    """(RewardModel, tokenizer) of a directory, a hub id, or a loaded model; tried first."""
    if isinstance(student, str | Path):
        stock, tokenizer = load_student(str(student))
    else:
        stock = getattr(student, "stock", student)
        tokenizer = load_tokenizer(stock.name_or_path)
    problems = {}
    for encoding in ENCODINGS.values():
        problems[encoding] = attempt(probe_student, encoding(stock), stock.name_or_path)
        if problems[encoding] is None:
            return encoding(stock), tokenizer
    raise UserError(problems[RewardModel])


# ------------------------------------------------------------------------------ the notebook door


@torch.no_grad()
def maps_of_pair(student, teacher, prompt, chosen: str, rejected: str, layers=(-1,)):
    """Simulated and teacher map of one pair, by the same steps as in training.

    Args:
        student, teacher: directory, hub id, or a model that load_student / load_teacher gave.
        prompt: text or messages; chosen, rejected: texts.
        layers: numbers of the layers to show (or one), the same of both models; -1 = the last.

    Returns words (W strings), segments (W,), S and T (len(layers), W, W), over the words that both
    models see. Rows of S and T sum to at most 1: markup, which is no word, takes the rest.
    """
    layers = (layers,) if isinstance(layers, int) else tuple(layers)
    model, tokenizer = open_student(student)
    teacher = load_teacher(teacher) if isinstance(teacher, str | Path) else teacher
    depths = attention_layers(model.stock), teacher.stock.config.num_hidden_layers
    if not layers or not all(k in range(-depth, depth) for k, depth in product(layers, depths)):
        what = f"give numbers within the student's {depths[0]} and the teacher's {depths[1]} layers"
        raise UserError(f"layers {layers}: {what}")
    probe_student(model, model.stock.name_or_path, 0, layers)
    length = positions_of(model.stock)
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        raise UserError("chosen and rejected must be texts")
    try:
        pair = Pair(data_prep.check_messages(prompt, "prompt"), chosen, rejected)
    except ValueError as why:
        raise UserError(str(why)) from None
    examples = Encoder(tokenizer, length, "truncate", *reading_of(teacher))([pair])
    if not examples:
        raise UserError(f"the pair does not fit into the student's {length} positions")
    batch = student_batch(examples, pad_id_of(model.stock), model.stock.device)
    rows = teacher_batch(examples, np.array([False]), teacher.tokenizer, teacher.stock.device)
    modes = [(m, m.training) for m in (model.stock, teacher.stock)]
    for m, _ in modes:
        m.eval()
    _, S, T, word_seg, _ = interaction_maps(model, teacher, batch, rows, (layers, layers))
    for m, was_training in modes:
        m.train(was_training)
    seen = (word_seg[0] >= 0).cpu()
    words = [word for word, is_seen in zip(examples[0].words, seen.tolist()) if is_seen]
    if not words:
        raise UserError("no word of the pair is seen by both models")
    S, T = (torch.cat(maps).cpu()[:, seen][:, :, seen] for maps in (S, T))
    return words, word_seg[0].cpu()[seen], S, T


# ------------------------------------------------------------------------------ --encoding siamese


def two_rows(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """A packed batch as 2B ordinary rows, (x, y_c) of all pairs, then (x, y_r): --encoding siamese.

    Returns ids and mask (2B, m), 1 = a token; where (B, n): the place of each packed token among
    the 2B m places.
    """
    seg, pos = batch["seg"], batch["pos"]
    B, m = len(seg), int(pos.max()) + 1
    pair = torch.arange(B, device=seg.device)[:, None]
    ids, mask = seg.new_zeros(2 * B * m), seg.new_zeros(2 * B * m)
    for k, mine in ((0, seg < 2), (1, (seg == 0) | (seg == 2))):
        place = ((pair + k * B) * m + pos)[mine]
        ids[place], mask[place] = batch["ids"][mine], 1
    where = torch.where(seg == 2, pair + B, pair) * m + pos
    return ids.view(2 * B, m), mask.view(2 * B, m), where


def take(t: Tensor, index: Tensor) -> Tensor:
    """t (B, n, ...), numbers (R, m) of its B n tokens -> (R, m, ...)."""
    return t.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


class SiameseRewardModel(RewardModel):
    """The same rewards and maps from two causal rows a pair, which any decoder can read."""

    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        ids, mask, where = two_rows(batch)
        out = self.stock.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return take(out.last_hidden_state, where)

    def as_packed(self, heads: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """(2B, H, m, d) -> (B, H, n, d): the prompt's heads are those of the first row."""
        return take(heads.transpose(1, 2), two_rows(batch)[2]).transpose(1, 2)


ENCODINGS = {"packed": RewardModel, "siamese": SiameseRewardModel}


# --------------------------------------------------------- what a run needs before its first step


def check_numbers(cfg: Config) -> None:
    """Raises UserError for a number outside its limits."""
    for f in fields(cfg):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        if isinstance(value, int | float) and not (low <= value <= high and math.isfinite(value)):
            reach = f"from {low:g} to {high:g}".removesuffix(" to inf")
            raise UserError(f"{option_of(f.name)} must be a finite number {reach}, is {value}")


def check_config(cfg: Config) -> bool:
    """Fills in defaults, refuses flags that cannot work; returns whether a teacher is needed."""
    check_numbers(cfg)
    if not cfg.epochs and not cfg.max_steps:
        raise UserError("--epochs 0 needs --max-steps")
    if cfg.method == "bt":
        of_map = [f for f in fields(cfg) if f.name.startswith(("lambda_", "align_"))]
        unread = [f.name for f in of_map if getattr(cfg, f.name) not in (f.default, 0.0)]
        if unread:
            how = "--method id; the verdict alone: with --lambda-intra 0 --lambda-inter 0"
            how = how if cfg.lambda_score else "--method id"
            raise UserError(f"{option_of(unread[0])} needs {how}")
        cfg.lambda_intra = cfg.lambda_inter = 0.0
    has_maps = cfg.lambda_intra > 0 or cfg.lambda_inter > 0
    needs_teacher = cfg.lambda_score > 0 or (has_maps and cfg.align_target != "uniform")
    if cfg.align_support == "causal" and not cfg.lambda_intra and has_maps:
        raise UserError("--align-support causal has no inter block: give --lambda-intra above 0")
    is_idle = {"flip_rate": cfg.preference_loss == "bt", "fsdp": WORLD == 1}
    is_idle |= dict.fromkeys(("align_loss", "align_target", "align_support"), not has_maps)
    for f in fields(cfg):
        if is_idle.get(f.name) and getattr(cfg, f.name) != f.default:
            print(f"warning: {option_of(f.name)} changes nothing here")
    defaults = {"output_dir": f"runs/{Path(cfg.model).name}-{cfg.method}"}
    if needs_teacher:
        defaults["teacher"] = "answerdotai/ModernBERT-base"
    if not cfg.data:
        defaults |= {"data": ["hh-rlhf"], "eval_data": ["hh-rlhf:test"]}
    for name, value in defaults.items():
        if not getattr(cfg, name):
            setattr(cfg, name, value)
            print(f"default: {option_of(name)} {value if isinstance(value, str) else value[0]}")
    return needs_teacher


def needed_fields(cfg: Config) -> dict[str, str]:
    """{field that every training pair must have: the flag that needs it}."""
    needed = {}
    if cfg.flip_negative_strength:
        needed["strength"] = "--flip-negative-strength"
    if cfg.preference_loss == "soft":
        needed["strength"] = "--preference-loss soft"
    if cfg.margin_field != "none":
        needed[cfg.margin_field] = f"--margin-field {cfg.margin_field}"
    return needed


def parse_layers(spec: str, student: int, teacher: int) -> tuple[tuple, tuple]:
    """'last', 'middle', 'all' or 'S:T,S:T' -> layer numbers from 0, ((student's), (teacher's)).

    'all' pairs each of the teacher's layers with the student's at the same relative depth.
    """
    named = {
        "last": [(-1, -1)],
        "middle": [((student - 1) // 2, (teacher - 1) // 2)],
        "all": [(math.ceil((t + 1) * student / teacher) - 1, t) for t in range(teacher)],
    }
    try:
        pairs = named.get(spec) or [map(int, part.split(":")) for part in spec.split(",")]
        return tuple(zip(*((range(student)[s], range(teacher)[t]) for s, t in pairs)))
    except (ValueError, IndexError):
        within = f"within {student} student and {teacher} teacher layers"
        advice = "give last, middle, all, or student:teacher pairs as --align-layers=-1:-1,5:2"
        raise UserError(f"--align-layers {spec!r}: {advice}, {within}") from None


def load_models(run: Run, needs_teacher: bool, is_trained: bool):
    """RewardModel, its tokenizer, InteractionTeacher or None, and the aligned layers; all tried."""
    cfg, teacher, layers = run.cfg, None, ((), ())
    if needs_teacher:
        teacher = load_teacher(str(run.dir / "teacher") if is_trained else cfg.teacher, cfg.seed)
        run.place(teacher)
    stock, tokenizer = load_student(cfg.model, cfg.seed, cfg.max_length)
    model = run.place(ENCODINGS[cfg.encoding](stock))
    if cfg.lambda_intra > 0 or cfg.lambda_inter > 0:
        depth = attention_layers(stock)
        teacher_depth = teacher.stock.config.num_hidden_layers if needs_teacher else depth
        layers = parse_layers(cfg.align_layers, depth, teacher_depth)
    probe_student(model, cfg.model, cfg.max_length, layers[0])
    if cfg.gradient_checkpointing:  # non-reentrant, which the tap works with
        enable = getattr(stock, "activation_checkpointing_enable", None)  # its name from v6 on
        (enable or stock.gradient_checkpointing_enable)({"use_reentrant": False})
    return model, tokenizer, teacher, layers


@contextmanager
def frozen_objects():
    """What is alive before is not looked through for garbage: a quarter of the time of encoding."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@frozen_objects()
def encode_all(cfg: Config, model, tokenizer, teacher, pairs, held_pairs, counts: Counter):
    """(examples of the training pairs, {name: examples} of the held-out ones); counts are printed.

    Raises UserError where nothing is left, or where a token id is beyond a model's embeddings: a
    tokenizer may know more than its model, what counts is which ids occur.
    """
    of_teacher = ()
    if teacher is not None:
        of_teacher = reading_of(teacher, cfg.max_length)
    encoder, encoded = Encoder(tokenizer, cfg.max_length, cfg.overlong, *of_teacher), {}
    for name, part in {"training": pairs, **held_pairs}.items():
        encoder.counts.clear()
        encoded[name] = examples = encoder(part, progress=f"encoding {name}")
        if not examples:
            raise UserError(f"{name}: no pair fits into --max-length {cfg.max_length}")
        encoder.counts["pairs"] = len(examples)
        read = [(cfg.model, model.stock, [e.ids for e in examples])]
        if teacher is not None:
            runs = [np.concatenate([ids for ids, _ in e.runs]) for e in examples]
            read.append((cfg.teacher, teacher.stock, runs))
        for model_name, stock, rows in read:
            known = stock.get_input_embeddings().num_embeddings
            largest = max(row.max(initial=0) for row in rows)
            if largest >= known:
                what = f"the pairs hold the token id {largest}, the model has {known} embeddings"
                raise UserError(f"{model_name}: {what}")
        counts.update({f"{what} ({name})": k for what, k in encoder.counts.items()})
    print("data: " + ", ".join(f"{k} {what}" for what, k in counts.items() if k))
    return encoded.pop("training"), encoded


# -------------------------------------------------------------------------------------- processes

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun


def computes_in_bf16(kind: str) -> bool:
    """Whether bf16 is the faster type. On x86 it has 0.6 of fp32's speed without units for it, 1.6
    with AVX512-BF16, 4 times with AMX (measured)."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported()
    names = [f"_is_{unit}_supported" for unit in ("avx512_bf16", "amx_tile")]
    has_units = any(getattr(torch.cpu, name, bool)() for name in names)
    is_faster = has_units or platform.machine() not in ("x86_64", "AMD64")
    return kind == "cpu" and is_faster and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def set_up_device(cfg):
    """(device, amp): amp() is bf16 autocast, or nothing. Joins the other processes of torchrun."""
    name = cfg.device
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as why:
        raise UserError(f"--device {name}: not usable here ({first_line(why)})") from None
    # cuDNN plans anew for each length: slower than eager attention (H100, torch 2.11), and may fail
    torch.backends.cuda.enable_cudnn_sdp(False)
    if WORLD > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
        atexit.register(dist.destroy_process_group)
    if cfg.dtype == "bf16" or (cfg.dtype == "auto" and computes_in_bf16(device.type)):
        # no cache: it would keep a second copy of all weights under gradient checkpointing
        options = dict(dtype=torch.bfloat16, cache_enabled=False)
        return device, functools.partial(torch.autocast, device.type, **options)
    return device, nullcontext


def distribute(run: Run, model: nn.Module) -> None:
    """Under torchrun: gradients are averaged over the processes; --fsdp: weights, gradients and
    optimizer are split among them too (FSDP2). One engine for both: without it each process is a
    group of its own that holds all. The step is that of one process, but for a teacher's dropout,
    which each process (and each micro-batch) draws for itself."""
    if WORLD == 1:
        return
    shard = run.cfg.fsdp
    shape = (1, WORLD) if shard else (WORLD, 1)
    mesh = dist.init_device_mesh(run.device.type, shape, mesh_dim_names=("replicate", "shard"))
    dtype = torch.bfloat16 if shard and run.amp is not nullcontext else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    layers = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=shard)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)  # embeddings and head stay in fp32


def shares(examples: list[Example], batch_size: int, name: str):
    """Index arrays of this process's batches, longest first: too little memory shows at once.

    Every process has equally many (some twice): a sharded model computes only in all together.
    """
    order = np.argsort([-len(e.ids) for e in examples], kind="stable")
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rounds = math.ceil(len(batches) / WORLD) * WORLD
    return bar([batches[k % len(batches)] for k in range(RANK, rounds, WORLD)], name)


def over_processes(values: np.ndarray, operation: str, device) -> np.ndarray:
    """The "SUM" or "MAX" over all processes, element by element."""
    if WORLD == 1:
        return values
    everyones = torch.from_numpy(values).to(device)
    dist.all_reduce(everyones, getattr(dist.ReduceOp, operation))
    return everyones.cpu().numpy()


# ------------------------------------------------------------------------------- the run directory


def remove(path: Path) -> None:
    """Deletes a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def save_stock(stock, tokenizer, to: Path, weights: dict | None = None) -> None:
    """A stock directory, written aside and swapped in; weights: where the model's own are sharded.

    Raises UserError where the disk refuses, or the reward head was lost (OpenRLHF #209).
    """
    aside, old = to.with_name(to.name + ".tmp"), to.with_name(to.name + ".old")
    weights = stock.state_dict() if weights is None else weights
    remove(aside)
    try:
        stock.save_pretrained(aside, state_dict=dict(weights))
        tokenizer.save_pretrained(aside)
        if hasattr(stock, "score"):
            files = [safe_open(path, "pt") for path in aside.glob("*.safetensors")]
            has_head = [f for f in files if "score.weight" in f.keys()]  # noqa: SIM118
            heads = [f.get_tensor("score.weight") for f in has_head]
            torch.testing.assert_close(heads, [weights["score.weight"].cpu()])
    except Exception as why:  # safetensors has errors of its own
        remove(aside)
        raise UserError(f"{aside}: cannot be written ({first_line(why)}); {to} stays") from None
    remove(old)
    if to.exists():
        os.replace(to, old)
    os.replace(aside, to)  # Run mends a kill between the two renames
    remove(old)


class Run:
    """RUN/: lock, config.json, metrics.jsonl, checkpoints/, teacher/, student/, results.json.

    One rule: the folder is empty, or holds our config.json. Under torchrun the first process
    writes. Raises UserError for a folder that cannot serve.
    """

    outputs = ("checkpoints", "results.json", "student", "teacher", "metrics.jsonl")
    may_change = (  # flags that change no step (grad_accum: but for a teacher's dropout)
        *("resume", "overwrite", "output_dir", "eval_data", "log_every", "save_every", "device"),
        *("fsdp", "grad_accum", "gradient_checkpointing"),
    )
    gathered = StateDictOptions(full_state_dict=True, cpu_offload=True)

    def __init__(self, cfg: Config):
        self.cfg, self.stop, self.handlers, self.saved = cfg, 0, {}, None
        self.dir = Path(cfg.output_dir).absolute()  # no name below it can be taken for a hub id
        self.device, self.amp = set_up_device(cfg)
        at_once = max(1, 2 * cfg.batch_size // (cfg.grad_accum * WORLD))  # no gradient is kept
        self.scoring = (at_once, self.device, self.amp)  # arguments of score_pairs
        self.lock = FileLock(self.dir / "lock", timeout=0)

    def __enter__(self):
        try:
            if RANK == 0:
                self.check_folder()  # a folder that is refused stays as it is
                self.dir.mkdir(parents=True, exist_ok=True)
                self.lock.acquire()
                self.check_folder()
                for old in self.dir.glob("*.old"):  # killed between two renames: this is whole
                    if not old.with_suffix("").exists():
                        os.replace(old, old.with_suffix(""))
            self.saved = self.newest() if self.cfg.resume else None
        except Timeout:
            what = "in use by another run; choose another --output-dir"
            raise UserError(f"{self.dir}: {what}") from None
        except BaseException as why:
            self.lock.release()
            if isinstance(why, OSError):
                raise UserError(f"{self.dir}: cannot be written ({why.strerror})") from None
            raise
        return self

    def __exit__(self, kind, why, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.lock.release()
        if isinstance(why, OSError):
            where, said = why.filename or self.dir, why.strerror or why
            raise UserError(f"{where}: {said}; what was saved before is whole") from None

    def check_folder(self) -> None:
        """The one rule, and that this run may go on or replace what is there."""
        cfg = self.cfg
        try:
            before = json.loads((self.dir / "config.json").read_text(encoding="utf-8"))
            before["flags"]["seed"]  # any model directory has a config.json: ours lists flags
        except (OSError, ValueError, KeyError, TypeError):
            foreign = sorted(path.name for path in self.dir.glob("*") if path.name != "lock")
            if foreign:
                what = f"holds {foreign[0]} and is no earlier run; choose a new --output-dir"
                raise UserError(f"{self.dir}: {what}") from None
            return
        if cfg.resume:
            return self.check_resume(before)
        if not cfg.overwrite:
            advice = "go on with --resume, replace it with --overwrite"
            what = f"holds an earlier run; {advice}, or choose another --output-dir"
            raise UserError(f"{self.dir}: {what}")
        for path in [cfg.model, cfg.teacher, *cfg.data, *cfg.val_data, *cfg.eval_data]:
            if path and Path(path).resolve().is_relative_to(self.dir.resolve()):
                raise UserError(f"{self.dir}: holds {path}, an input; choose another --output-dir")

    def check_resume(self, before: dict) -> None:
        """--resume with other flags or pairs is refused, but for flags that change no step."""
        now = json.loads(json.dumps(asdict(self.cfg)))
        was = {**asdict(Config()), **before["flags"]}
        fixed = [k for k in now if k not in self.may_change and was[k] != now[k]]
        changed = [f"{option_of(k)} was {was[k]!r}, is {now[k]!r}" for k in fixed]
        read, inputs = before.get("inputs", {}), self.checksums()
        both = sorted(read.keys() | inputs.keys()) if read else ()
        changed += [f"{path} changed" for path in both if read.get(path) != inputs.get(path)]
        if changed:
            what = f"--resume with other flags or pairs: {'; '.join(changed)}"
            raise UserError(f"{self.dir}: {what}. Restore them, or start anew with --overwrite")
        if (self.dir / "results.json").exists() and not self.checkpoints():
            what = "a finished run without its checkpoints: nothing to resume; use --overwrite"
            raise UserError(f"{self.dir}: {what}")

    def checksums(self) -> dict[str, int]:
        """CRC-32 of each file of training and validation pairs, also of those inside folders."""
        files = []
        for source in [*self.cfg.data, *self.cfg.val_data]:
            path = Path(data_prep.without_split(source)[0])
            files += filter(Path.is_file, [path, *sorted(path.rglob("*"))])
        return {str(path): zlib.crc32(path.read_bytes()) for path in files}

    def begin(self, counts: Counter) -> None:
        """Data and models are known to be good: only now is an earlier run replaced."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self.on_signal)
        if RANK > 0:
            return
        if self.saved is None:
            for name in self.outputs:  # checkpoints first: killed in here, a resumed run begins
                remove(self.dir / name)
            if self.cfg.resume:
                print(f"{self.dir}: no checkpoint to resume from; starting at the beginning")
            self.log(phase="data", step=0, data=dict(counts))
        else:
            with written(self.dir / "metrics.jsonl") as f:
                f.write(self.saved[2]["log"])
        versions = {m.__name__: m.__version__ for m in (torch, transformers, np)}
        versions["python"] = platform.python_version()
        config = {"flags": asdict(self.cfg), "versions": versions, "inputs": self.checksums()}
        self.write("config.json", config)

    def place(self, model: nn.Module) -> nn.Module:
        """On its device; what will be sharded waits on the CPU, and is moved layer by layer."""
        return model.to("cpu" if self.cfg.fsdp and WORLD > 1 else self.device)

    def write(self, name: str, obj) -> None:
        if RANK == 0:
            with written(self.dir / name) as f:
                json.dump(obj, f, indent=1)

    def log(self, **line) -> None:
        """One line of metrics.jsonl; NaN, which is no JSON, becomes null."""
        if RANK == 0:
            finite = {k: v for k, v in line.items() if not isinstance(v, float) or math.isfinite(v)}
            with open(self.dir / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps({**dict.fromkeys(line), **finite}) + "\n")

    def on_signal(self, number, _) -> None:
        self.stop = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        if RANK == 0:
            said = "stopping after this step (scoring goes to its end)"
            print(f"\n{said}; once more ends at once", file=sys.stderr)

    def agreed_stop(self) -> int:
        """The signal that any process has had, the same answer in all of them; 0 = none."""
        return int(over_processes(np.array([self.stop]), "MAX", self.device)[0])

    def leave(self, where: str, stop: int) -> None:
        """Ends the process after a saved step: 130 after Ctrl-C, 0 after SIGTERM."""
        start = ["torchrun", "--nproc-per-node", str(WORLD)] if WORLD > 1 else ["python"]
        argv = [*start, *(a for a in sys.argv if a not in ("--overwrite", "--resume")), "--resume"]
        is_demo = not any(a.startswith("--model") for a in argv)
        then = "the demo starts anew" if is_demo else f"go on with:\n  {shlex.join(argv)}"
        print(f"stopped and saved after {where}; {then}")
        raise SystemExit(130 if stop == signal.SIGINT else 0)

    def save_model(self, model: nn.Module, tokenizer, name: str) -> None:
        """RUN/name as a stock directory, gathered from all processes, written by the first."""
        weights, _ = get_state_dict(model, (), options=self.gathered)
        if RANK == 0:
            weights = {k.removeprefix("stock."): v for k, v in weights.items()}
            save_stock(model.stock, tokenizer, self.dir / name, weights)

    def checkpoints(self) -> list[Path]:
        """Files 1-teacher-STEP.pt and 2-student-STEP.pt, newest first."""
        return sorted((self.dir / "checkpoints").glob("*-*-*.pt"), reverse=True)

    def newest(self) -> tuple[str, int, dict] | None:
        """(phase, step, state) of the newest whole checkpoint; a damaged one is named, and left."""
        for path in self.checkpoints():
            try:
                with zipfile.ZipFile(path) as parts:  # torch.load ignores the checksums
                    if damaged := parts.testzip():
                        raise ValueError(f"{damaged} is damaged")
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                _, phase, step = path.stem.split("-")
                return phase, int(step), state
            except Exception as why:  # zip, pickle and tensor errors alike mean: not whole
                print(f"{path}: torn or foreign, not used ({first_line(why)})", file=sys.stderr)
        return None

    def checkpoint(self, phase: Phase, step: int, optimizer, best: list[float]) -> None:
        """Weights and moments of all processes, and the log so far; the last two stay."""
        weights, moments = get_state_dict(phase.model, optimizer, options=self.gathered)
        if RANK > 0:
            return
        log = (self.dir / "metrics.jsonl").read_text(encoding="utf-8")
        folder, number = self.dir / "checkpoints", 1 + (phase.name == "student")
        folder.mkdir(exist_ok=True)
        with written(folder / f"{number}-{phase.name}-{step:08d}.pt", "wb") as f:
            torch.save({"model": weights, "optimizer": moments, "best": best, "log": log}, f)
        for old in self.checkpoints()[2:]:
            remove(old)

    def restore(self, phase: Phase, optimizer) -> tuple[int, list[float]]:
        """--resume: weights, moments and log of the newest checkpoint, if it is of this phase.

        Returns the steps done, and [accuracy, -bt] of the best validation.
        """
        if self.saved is None or self.saved[0] != phase.name:
            return 0, [-1.0, 0.0]
        _, done, state = self.saved
        # not strict: weights that never get a gradient have no moments (composite models)
        options = StateDictOptions(full_state_dict=True, strict=False)
        states = dict(model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        set_state_dict(phase.model, optimizer, **states, options=options)
        print(f"resuming the {phase.name} after step {done}")
        return done, state["best"]


# ----------------------------------------------------------------------------------------- the demo

# The demo's flags; the teacher's recipe was chosen by validation accuracy.
DEMO = dict(batch_size=32, lr=1e-3, teacher_lr=2e-3, epochs=2.0, teacher_epochs=8.0)
DEMO |= dict(max_length=128, dtype="fp32", eval_every=400, log_every=20)
DEMO_LAYERS = (2, 1)  # of student and teacher
DEMO_MAP = {"align_layers": "0:0"}  # the teacher's one layer, taught early enough to be used
DEMO_SETS = ("in-distribution", "cue-neutral", "cue-reversed")  # the cue is right in 90, 50, 10 %
DEMO_ARMS = {  # name -> folder, purpose, flags
    "BT": ("bt", "the plain reward model", {"method": "bt"}),
    "ID": ("id", "the method: a teacher, then a student pulled to its map", DEMO_MAP),
    "ID, uniform target": (
        "uniform",
        "control: a map of nothing",
        {**DEMO_MAP, "align_target": "uniform"},
    ),
}


def make_demo_models(here: Path, seed: int) -> None:
    """A word-level Llama and a word-level ModernBERT, untrained, as ordinary directories."""
    tokenizer = load_tokenizer(str(here / "data"))
    size = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128)
    size |= dict(num_attention_heads=4, max_position_embeddings=256)
    size |= dict(pad_token_id=0, bos_token_id=2, eos_token_id=4, cls_token_id=2, sep_token_id=3)
    torch.manual_seed(seed)
    of_student, of_teacher = (dict(num_hidden_layers=k) for k in DEMO_LAYERS)
    student = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, **of_student))
    # all layers global, larger initial weights: with 0.02, or a post-norm BERT, it does not learn
    extra = dict(num_labels=1, initializer_range=0.1, global_attn_every_n_layers=1)
    config = transformers.ModernBertConfig(**size, **of_teacher, **extra)
    teacher = transformers.ModernBertForTokenClassification(config)
    for model, name in ((student, "student"), (teacher, "teacher")):
        model.save_pretrained(here / "models" / name)
        tokenizer.save_pretrained(here / "models" / name)


def demo_arm(cfg: Config, here: Path, folder: str, **flags) -> dict:
    """One run of the demo in the folder of its seed: {set: row of the final table}."""
    torch.set_num_threads(1)  # as quick as more, and the same numbers on any number of cores
    models, data = here / "models", here / "data"
    own = dict(model=str(models / "student"), teacher=str(models / "teacher"))
    own |= dict(data=[str(data / "train.jsonl")], output_dir=str(here / folder), overwrite=True)
    own |= dict(eval_data=[str(data / f"{name}.jsonl") for name in DEMO_SETS])
    return train(replace(cfg, **{**own, **flags}))["sets"]


def arms_beside(cfg: Config, here: Path) -> None:
    """The demo's arms without a teacher, in a silent process beside that of the method, which ends
    when that one does, however it ends."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    quiet()
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for name, (folder, _, flags) in DEMO_ARMS.items():
        if name != "ID":
            demo_arm(cfg, here, folder, **flags)


def demo_seed(cfg: Config, here: Path) -> dict[str, list[float]]:
    """Pairs, models, all arms of one seed: {arm: accuracy on each set}, kept as demo.json."""
    print(f"\nseed {cfg.seed}: pairs of a small language. The response that names an item of the")
    print("prompt's topic is chosen; in 90 % of the training pairs a closing cue goes with it.")
    for name in ("demo.json", "ablations.json"):  # of the demo that this one replaces
        remove(here / name)
    data_prep.write_demo_data(here / "data", cfg.seed, overwrite=True)
    make_demo_models(here, cfg.seed)
    print("Three reward models:")
    for name, (_, purpose, _) in DEMO_ARMS.items():
        print(f"  {name}: {purpose}")
    print("What follows is the log of ID; the two others train beside it.")
    spawned = multiprocessing.get_context("spawn")
    beside = spawned.Process(target=arms_beside, args=(cfg, here), daemon=True)
    beside.start()
    folder, _, flags = DEMO_ARMS["ID"]
    try:
        demo_arm(cfg, here, folder, **flags)
        beside.join()
    finally:
        beside.terminate()
    if beside.exitcode:
        raise UserError(f"{here}: BT or the uniform target ended with code {beside.exitcode}")
    table = {"teacher": []}
    for name, (folder, _, _) in DEMO_ARMS.items():
        sets = read_rows(here / folder / "results.json")["sets"]
        table[name] = [sets[s]["student"] for s in DEMO_SETS]
        if name == "ID":
            table["teacher"] = [sets[s]["teacher"] for s in DEMO_SETS]
    with written(here / "demo.json") as f:
        json.dump(table, f, indent=1)
    return table


def read_rows(path: Path) -> dict:
    """What an earlier run left, {} for nothing. Raises UserError where it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (ValueError, TypeError):
        raise UserError(f"{path}: is damaged; remove it") from None


def print_demo(tables: list[dict[str, list[float]]]) -> None:
    """Mean (and standard deviation) over seeds, in %."""
    width = 2 + max(map(len, tables[0]))
    print(f"\n{'accuracy %':{width}}" + "".join(f"{c:>17}" for c in DEMO_SETS))
    print(f"{'cue right in':{width}}" + "".join(f"{c:>17}" for c in ("90 %", "50 %", "10 %")))
    for name in tables[0]:
        if not all(name in table for table in tables):
            continue  # an ablation of other seeds
        rows = 100 * np.array([table[name] for table in tables])
        cells = [f"{mean:.1f}" for mean in rows.mean(0)]
        if len(tables) > 1:
            cells = [f"{m:.1f} ({s:.1f})" for m, s in zip(rows.mean(0), rows.std(0, ddof=1))]
        print(f"{name:{width}}" + "".join(f"{c:>17}" for c in cells))
    seeds = f"{len(tables)} seeds, mean (standard deviation)" if len(tables) > 1 else "one seed"
    print(f"600 pairs a column, {seeds}")


def demo(cfg: Config, typed: dict) -> None:
    """`python idistill.py`: which of four models reads the content, which the cue?

    With flags of the method, one arm with these flags, beside the rows of the last demo with that
    seed (which is made first where there is none); its row joins ROOT/seedN/ablations.json.

    typed: {field of cfg: value} of the flags on the command line.
    """
    check_config(replace(cfg, model="-", teacher="-", data=["-"], output_dir="-"))
    parse_layers(cfg.align_layers, *DEMO_LAYERS)
    typed = as_typed(typed)
    if lacking := needed_fields(cfg):
        raise UserError(f"{', '.join(lacking.values())}: the demo's pairs lack {min(lacking)}")
    root = Path(cfg.output_dir or "runs/demo")
    if not root.name:
        raise UserError(f"--output-dir {root}: give the demo a folder of its own")
    if WORLD > 1 or cfg.resume:
        raise UserError("torchrun and --resume need --model beside them; the demo starts anew")
    roots = [root] + [root.with_name(f"{root.name}-{i}") for i in range(2, 1000)]
    seeds, tables = range(cfg.seed, cfg.seed + cfg.seeds), []
    folder = "ablations/" + re.sub(r"[^\w.-]+", "_", " ".join(typed.values())).lstrip("-")
    made = [r for r in roots if all((r / f"seed{s}/demo.json").exists() for s in seeds)]
    if typed and made:
        root = made[-1]
    elif not cfg.overwrite:  # an earlier demo is never overwritten
        root = next(path for path in roots if not path.exists())
    for seed in seeds:
        here = root / f"seed{seed}"
        if typed and made:
            table = read_rows(here / "demo.json")
        else:
            base = replace(Config(**DEMO), seed=seed, device=cfg.device, dtype=cfg.dtype)
            table = demo_seed(base, here)
        if typed:
            table |= ablation(replace(cfg, seed=seed), here, folder, typed)
        tables.append(table)
    print_demo(tables)
    if not typed:
        print("\nWhere the cue lies (last column), who reads the content stays near 100, who reads")
        print("the cue falls towards 10. The teacher's map says what to read, a uniform one not.")
    folders = ["bt", "id", folder] if typed else ["bt", "id"]
    students = " ".join(f"{here}/{name}/student" for name in folders)
    show = f"python eval.py show {students} --teacher {here}/id/teacher --layers 0"
    print(f"Files: {here}. Look closer:\n  {show} --data {here}/data/cue-reversed.jsonl")


def ablation(cfg: Config, here: Path, folder: str, typed: dict) -> dict[str, list[float]]:
    """One arm with other flags, and those before it: {name: accuracy on each set}."""
    name, path = " ".join(typed.values()), here / "ablations.json"
    print(f"\n--- {name}")
    rows, flags = read_rows(path), {}
    of_teacher = {"teacher_epochs", "teacher_lr", "label_noise"}
    if not of_teacher & set(typed):  # the demo's teacher is reused
        flags = {"teacher": str(here / "id/teacher"), "teacher_epochs": 0.0}
    sets = demo_arm(cfg, here, folder, **flags)
    rows[name] = [sets[s]["student"] for s in DEMO_SETS]
    with written(path) as f:
        json.dump(rows, f, indent=1)
    return rows


# --------------------------------------------------------------------------------- the command line

GROUPS = {  # the first field of each group of Config
    "model": "input and output",
    "method": "method",
    "preference_loss": "baselines",
    "epochs": "optimiser",
    "val_fraction": "evaluation and logging",
    "seed": "system",
}
NO_ABLATION = {"output_dir", "overwrite", "resume", "seed", "seeds", "device", "dtype"}


def option_of(field: str) -> str:
    return "--" + field.replace("_", "-")


def typed_flags(argv: list[str] | None = None) -> dict:
    """{field of Config: value} of the command line; a wrong flag is one line and exit code 2."""
    layout = functools.partial(argparse.HelpFormatter, max_help_position=32, width=100)
    options = {"formatter_class": layout, "allow_abbrev": False}
    parser = data_prep.Parser(description=__doc__.split("\n")[0], **options)
    config = Config()
    for f in fields(Config):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        value = getattr(config, f.name)
        kinds = {bool: {"action": "store_true"}, list: {"nargs": "+"}}
        kind = kinds.get(type(value), {"type": type(value), "choices": f.metadata["choices"]})
        shown = "" if value is False or value in ("", []) else f" (default: {value})"
        about = f.metadata["help"] + shown
        group.add_argument(option_of(f.name), default=argparse.SUPPRESS, help=about, **kind)
    return vars(parser.parse_args(argv))


def as_typed(flags: dict) -> dict[str, str]:
    """{field: the flag as a person types it} of those that make an ablation."""
    typed = {}
    for name, value in flags.items():
        if name not in NO_ABLATION:
            shown = "" if value is True else f" {value}"
            typed[name] = option_of(name) + shown.removesuffix(".0")
    return typed


def quiet() -> None:
    """No chatter of libraries between our lines."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # its outputs are never written to
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


@contextmanager
def errors_in_one_line(output_dir: str):
    """What a person can mend, or the death of another process, ends a run with one line; only the
    first process speaks of what goes well."""
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    with data_prep.exit_codes():
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
            is_saved = any(Path(output_dir).glob("checkpoints/*-*"))
            then = "go on with --resume" if is_saved else "nothing was saved yet"
            what = f"lost another one ({first_line(why)}); {then}"
            raise UserError(f"process {RANK} of {WORLD} {what}") from why


def main(argv: list[str] | None = None) -> None:
    typed = typed_flags(argv)
    cfg = Config(**typed)
    quiet()
    with errors_in_one_line(cfg.output_dir):
        if not cfg.model:
            if cfg.teacher or cfg.data or cfg.val_data or cfg.eval_data:
                raise UserError("--model is needed beside --teacher and data; without: the demo")
            of_map = {} if cfg.method == "bt" else DEMO_MAP
            return demo(Config(**{**DEMO, **of_map, **typed}), typed)
        if cfg.seeds > 1:
            raise UserError("--seeds repeats the demo; with --model give --seed")
        print_table(train(cfg))
        folder = Path(cfg.output_dir) / "student"
        print(f"\nreward model: {folder}  (a stock AutoModelForSequenceClassification directory)")


if __name__ == "__main__":
    main()
