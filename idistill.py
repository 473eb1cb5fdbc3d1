#!/usr/bin/env python3
"""Interaction distillation for discriminative reward models, in one file (after arXiv 2508.02618).

    python idistill.py                                              # offline demo on generated data, 2 CPU cores
    python idistill.py --model M --teacher T --data D.jsonl --eval-data E.jsonl --output-dir runs/x

The problem. A discriminative reward model (RM) maps a prompt x and a response y to a scalar r(x, y), trained on
pairs (x, y_c, y_r) with the Bradley-Terry (BT) loss. Misallocated attention can hack its judgement: (1) causal
attention: early tokens never see late ones; (2) Siamese encoding: chosen and rejected are encoded apart, so no
token of one ever sees the other. The cure: a bidirectional cross-encoder *teacher* reads both responses; the RM
*simulates* the teacher's attention with its own queries and keys, and an alignment loss pulls the simulated map
to the teacher's. Only training changes: what is saved is an ordinary reward model.

What the abstract says: the two flaws above; an interaction-based language-understanding model as the teacher;
the RM simulates its attention pattern through an attentional alignment objective; steadier, more general rewards.
What is our reading (the paper's code is not public): every equation below, and the word-level alignment.

Letters: B pairs, n tokens, W words, H heads, d head size; s segment: 0 = x, 1 = y_c, 2 = y_r.

  packed layout   u = [x | y_c | y_r]                                                     (n tokens, once a pair)
  tree mask       query i sees key j  iff  j <= i and (s_j = 0 or s_j = s_i);  positions of y_r restart at |x|
  reward          r_c = w.h[last token of y_c],  r_r = w.h[last token of y_r]    (= encoding both apart)     (E1)
  BT loss         L_BT = -log sigmoid(r_c - r_r)                                                             (E2)
  simulated map   S = mean over heads of softmax(Q K^T / sqrt(d)), the mask lifted               (B, n, n)   (E3)
  teacher         reads [CLS] x [SEP] y_a [SEP] y_b [SEP], (a, b) a random order of (c, r); its verdict =
                  mean of a per-token scalar over y_c, minus the same over y_r; loss -log sigmoid(verdict)   (E4)
  word map        sum over the tokens of the attended word, mean over those of the attending word (B, W, W)  (E5)
  blocks          intra I: all but y_c x y_r;  inter X: y_c x y_r, both ways; rows renormalised inside each
  alignment       L_I = mean over rows i of KL(T_i^I || S_i^I),  L_X likewise                                (E6)
  total           L = L_BT + lambda_intra L_I + lambda_inter L_X  (+ lambda_score MarginMSE, + centring)     (E7)
  baselines       preference_loss in place of L_BT;  + batch sum, + sft_loss: see there
"""
from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
import transformers  # noqa: E402  (after the setting above, which silences a fork warning)
from transformers import (AttentionInterface, AutoConfig, AutoModelForSequenceClassification,  # noqa: E402
                          AutoModelForTokenClassification, AutoTokenizer)
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask  # noqa: E402

from data_prep import (CALM, Encoder, Example, Pair, UserError, carve, flip_labels,  # noqa: E402
                       make_demo_models, prompt_key, read_pairs, synthetic_pairs, write_pairs)

# ---------------------------------------------------------------------------------------------------------- config

def flag(default, help, **extra):
    """A dataclass field whose metadata becomes the command-line help."""
    kind = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**kind, metadata={"help": help, **extra})


@dataclass
class Config:
    # input / output
    model: str = flag("", "student: local directory or hub id of a decoder (none: the offline demo)")
    teacher: str = flag("", "teacher: local directory or hub id of a bidirectional encoder")
    data: list[str] = flag([], "training pairs: JSONL files, plain or .gz; raw HH-RLHF lines too")
    val_data: list[str] = flag([], "pairs that choose the best checkpoint (none: a split carved from --data)")
    eval_data: list[str] = flag([], "held-out pairs, reported at the end, never used to choose")
    output_dir: str = flag("", "run directory (demo: runs/demo)")
    resume: bool = flag(False, "go on from the newest whole checkpoint in --output-dir")
    overwrite: bool = flag(False, "replace an earlier run in --output-dir")
    # method
    method: str = flag("id", "id = interaction distillation, bt = plain Bradley-Terry", choices=["id", "bt"])
    lambda_intra: float = flag(1.0, "weight of the intra-sequence alignment loss")
    lambda_inter: float = flag(1.0, "weight of the inter-sequence alignment loss")
    lambda_score: float = flag(0.0, "weight of MarginMSE against the teacher's verdict (arXiv 2010.02666)")
    center_rewards: float = flag(0.0, "weight of the squared sum of the two rewards of a pair (arXiv 2312.09244)")
    batch_sum: float = flag(0.0, "weight of batch-sum regularisation (arXiv 2505.07271, there 0.001)")
    lambda_sft: float = flag(0.0, "weight of the language-modelling loss on chosen (GRM, arXiv 2406.10216)")
    preference_loss: str = flag("bt", "smooth = conservative BT (label smoothing), soft = only where strength < 0 "
                                "(arXiv 2401.06080), robust = unbiased under random flips (arXiv 2403.00409)",
                                choices=["bt", "smooth", "soft", "robust"])
    flip_rate: float = flag(0.1, "share of wrong labels that smooth, soft and robust reckon with, under 0.5")
    margin_field: str = flag("none", "field of a pair by which r_c is to exceed r_r: margin (arXiv 2307.09288) "
                             "or strength (adaptive, arXiv 2401.06080)", choices=["none", "margin", "strength"])
    flip_negative_strength: bool = flag(False, "exchange the responses of training pairs with strength < 0")
    label_noise: float = flag(0.0, "share of training labels flipped on purpose, by --seed and the pair "
                              "itself; validation and evaluation pairs stay as they are")
    align_loss: str = flag("kl", "kl, or mse as in VIRT (arXiv 2112.04195)", choices=["kl", "mse"])
    align_layers: str = flag("last", "student:teacher layers, as last or 12:3,5:2 (from 0; from the end: "
                             "--align-layers=-1:-1)")
    align_target: str = flag("teacher", "controls: uniform = no teacher map, shuffled = its rows permuted in each "
                             "segment", choices=["teacher", "uniform", "shuffled"])
    align_support: str = flag("full", "causal = compare only where the student attends (the other reading)",
                              choices=["full", "causal"])
    teacher_epochs: float = flag(1.0, "teacher fine-tuning, passes over the data; 0 = use it as it is")
    encoding: str = flag("packed", "packed = one tree-masked row a pair, siamese = two rows (any causal model)",
                         choices=["packed", "siamese"])
    max_length: int = flag(1024, "longest prompt + response, in student tokens")
    overlong: str = flag("truncate", "pairs over --max-length: truncate cuts the oldest of the prompt, never a "
                         "response (a pair that still does not fit is dropped)", choices=["truncate", "drop", "error"])
    # optimiser
    epochs: float = flag(1.0, "passes over the training pairs")
    max_steps: int = flag(0, "steps of the student, in place of --epochs; 0 = --epochs decides")
    batch_size: int = flag(16, "pairs a step")
    grad_accum: int = flag(1, "micro-batches a step is cut into (less memory, same loss)")
    lr: float = flag(1e-5, "peak learning rate of the student (AdamW, a step)")
    teacher_lr: float = flag(5e-5, "peak learning rate of the teacher (AdamW, a step)")
    warmup: float = flag(0.05, "fraction of the steps with rising learning rate, then cosine to 0")
    weight_decay: float = flag(0.01, "AdamW decay of the matrices (none on norms, biases)")
    clip: float = flag(1.0, "largest gradient norm, over 0; longer gradients are scaled down to it")
    # evaluation and logging
    val_fraction: float = flag(0.1, "share of --data carved for validation when --val-data is not given")
    val_max: int = flag(512, "most pairs of the carved validation split")
    log_every: int = flag(10, "steps between lines of metrics.jsonl")
    eval_every: int = flag(0, "steps between validations; 0 = at a half and at the end")
    save_every: int = flag(0, "steps between checkpoints; 0 = at each validation")
    # system
    seed: int = flag(0, "seed of every random stream")
    seeds: int = flag(1, "demo only: repeat with this many seeds")
    dtype: str = flag("auto", "autocast type; weights stay fp32; auto = bf16 where the device has it",
                      choices=["auto", "fp32", "bf16"])
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps ...")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass (less memory)")


def parse_config(argv: list[str] | None = None) -> Config:
    """The command line, made from Config; argparse exits with 2 on a wrong flag."""
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawTextHelpFormatter)
    for f in dataclasses.fields(Config):
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default
        kw = {"action": "store_true"} if isinstance(default, bool) else {"default": default, "type": type(default)}
        if isinstance(default, list):
            kw = {"nargs": "+", "default": default}
        if "choices" in f.metadata:
            kw["choices"] = f.metadata["choices"]
        shown = "none" if default in ("", []) else default
        ap.add_argument("--" + f.name.replace("_", "-"), help=f"{f.metadata['help']} (default: {shown})", **kw)
    return Config(**vars(ap.parse_args(argv)))


# ---------------------------------------------------------------- data (text becomes tokens in data_prep.Encoder)

def collate(examples: list[Example], pad_id: int, device="cpu") -> dict[str, Tensor]:
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
    batch = dict(ids=ids, seg=seg, word=word, pos=pos, word_seg=word_seg, last=last)
    return {k: torch.from_numpy(v).to(device, non_blocking=True) for k, v in batch.items()}


def collate_teacher(examples: list[Example], swap: np.ndarray, tokenizer, device="cpu") -> dict[str, Tensor]:
    """[CLS] x [SEP] y_a [SEP] y_b [SEP] with (a, b) = (c, r), or (r, c) where swap (B,): ids, seg, word (B, n), seg
    3 = padding and special tokens."""
    cls = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    sep = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    rows = []
    for e, s in zip(examples, swap):
        parts = [([cls], [-1], [3])]
        for k in (0, 2, 1) if s else (0, 1, 2):
            ids, word = e.runs[k]
            parts += [(ids, word, [k] * len(ids)), ([sep], [-1], [3])]
        rows.append([np.concatenate([np.asarray(p[j], dtype=np.int64) for p in parts]) for j in range(3)])
    n = max(len(r[0]) for r in rows)
    out = {}
    for j, (name, fill) in enumerate((("ids", tokenizer.pad_token_id), ("word", -1), ("seg", 3))):
        out[name] = np.stack([np.pad(r[j], (0, n - len(r[j])), constant_values=fill) for r in rows])
    out["mask"] = np.stack([np.arange(n) < len(r[0]) for r in rows]).astype(np.int64)
    return {k: torch.from_numpy(v).to(device, non_blocking=True) for k, v in out.items()}


def plan_epoch(lengths: np.ndarray, batch_size: int, seed: int, epoch: int, window: int = 32) -> list[np.ndarray]:
    """Steps of one epoch as index arrays: shuffled, then bucketed by length inside windows of `window` steps."""
    rng = np.random.default_rng([seed, epoch, 11])
    order, steps = rng.permutation(len(lengths)), []
    for start in range(0, len(order), batch_size * window):
        part = order[start:start + batch_size * window]
        part = part[np.argsort(lengths[part], kind="stable")]
        steps += [part[i:i + batch_size] for i in range(0, len(part), batch_size)]
    return [steps[i] for i in rng.permutation(len(steps))]


# ----------------------------------------------------------------------------------------------------- attention tap

TAP = "idistill_tap"


def tapped_attention(module, query, key, value, attention_mask, **kwargs):
    """transformers' SDPA attention; an active tap sees Q (B, H, n, d) and K (B, H_kv, n, d) after rotation."""
    if AttentionTap.active is not None:
        AttentionTap.active.see(query, key, attention_mask, kwargs.get("scaling"))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(TAP, tapped_attention)
AttentionMaskInterface.register(TAP, sdpa_mask)


class AttentionTap:
    """Keeps Q and K of chosen layers while it is entered: `with tap: model(...)`, then tap.kept[layer].

    Fused attention stays on everywhere; an n x n map is built for tapped layers only (output_attentions=True would
    force eager attention in all). Calls inside the with block are counted: the k-th is layer k, so a recomputation
    under gradient checkpointing, outside the block, is never taken for a forward pass. remove() undoes it all.

    Raises UserError where the model does not call transformers' attention interface."""
    active: "AttentionTap | None" = None

    def __init__(self, model, layers: list[int]):
        self.model, self.layers, self.kept, self.calls = model, set(layers), {}, 0
        self.before = model.config._attn_implementation
        try:
            model.set_attn_implementation(TAP)
        except Exception as why:
            raise UserError(f"{type(model).__name__} does not take a custom attention: {why}") from None
        if model.config._attn_implementation != TAP:  # DeBERTa: transformers warns and goes on without
            raise UserError(f"{type(model).__name__} does not take a custom attention")

    def see(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> None:
        if self.calls in self.layers:
            self.kept[self.calls] = (query, key, query.shape[-1] ** -0.5 if scale is None else scale, mask)
        self.calls += 1

    def __enter__(self):
        self.kept, self.calls, AttentionTap.active = {}, 0, self
        return self

    def __exit__(self, error, *_):
        AttentionTap.active = None
        if error is None and set(self.kept) != self.layers:
            raise UserError(f"{type(self.model).__name__} showed attention in {self.calls} layers, asked for "
                            f"{sorted(self.layers)}: use --method bt, or another model")

    def remove(self) -> None:
        self.model.set_attn_implementation(self.before)


def attention_map(query: Tensor, key: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Mean over heads of softmax(Q K^T * scale) in fp32 (E3).

    query (B, H, n, d), key (B, H_kv, n, d), mask (B or 1, 1, n or 1, n), True = visible -> (B, n, n). Goes through the
    batch a few pairs at a time and recomputes in the backward pass, so that (H, n, n) is never held for a whole batch."""
    B, H, n, _ = query.shape
    few = max(1, 2**22 // (H * n * n))

    def mean_map(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        k = k.repeat_interleave(H // k.shape[1], dim=1)  # grouped-query attention: one key head, several query heads
        return ((q.float() * scale) @ k.float().transpose(-1, -2)).masked_fill(~visible, -torch.inf).softmax(-1).mean(1)

    with torch.autocast(query.device.type, enabled=False):
        if few >= B:
            return mean_map(query, key, mask)
        mask = mask.expand(B, -1, -1, -1)
        return torch.cat([checkpoint(mean_map, query[i:i + few], key[i:i + few], mask[i:i + few], use_reentrant=False)
                          for i in range(0, B, few)])


# -------------------------------------------------------------------------------------------------------- student

def tree_mask(seg: Tensor) -> Tensor:
    """(B, n) segments -> (B, 1, n, n), True where query i sees key j: j <= i and (s_j = 0 or s_j = s_i).

    Padding (segment 3) at the right sees itself, so no row is empty (an empty softmax row is NaN)."""
    n = seg.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=seg.device).tril()
    return (causal & ((seg[:, None, :] == 0) | (seg[:, None, :] == seg[:, :, None])))[:, None]


class RewardModel(nn.Module):
    """A stock decoder for sequence classification with one label, read at the last token of each response (E1).

    forward(batch of collate) -> rewards (B, 2) = (r_c, r_r) in fp32. Afterwards self.hidden is the last hidden
    state (B, n, hidden); with `layers`, self.maps lists their simulated token maps (B, n, n), in their order."""

    def __init__(self, stock, encoding: str = "packed", layers: tuple[int, ...] = ()):
        super().__init__()
        self.stock, self.encoding, self.layers = stock, encoding, layers
        self.tap, self.hidden, self.maps = AttentionTap(stock, list(layers)) if layers else None, None, []

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        seg, last = batch["seg"], batch["last"]
        if self.encoding == "packed":
            inputs = dict(input_ids=batch["ids"], attention_mask=tree_mask(seg), position_ids=batch["pos"])
        else:
            inputs, where = siamese_rows(batch)
        with self.tap if self.tap is not None and torch.is_grad_enabled() else nullcontext():
            hidden = self.stock.base_model(**inputs, use_cache=False).last_hidden_state
        if self.encoding == "siamese":  # back to the packed layout: x from the first of the two rows
            hidden = hidden.flatten(0, 1)[where]
        self.hidden, self.maps = hidden, []
        for layer in self.layers if self.tap is not None and torch.is_grad_enabled() else ():
            query, key, scale, _ = self.tap.kept[layer]
            if self.encoding == "siamese":
                query, key = (t.transpose(1, 2).flatten(0, 1)[where].transpose(1, 2) for t in (query, key))
            self.maps.append(attention_map(query, key, scale, (seg != 3)[:, None, None, :]))
        if self.tap is not None:
            self.tap.kept = {}
        ends = hidden.gather(1, last[:, :, None].expand(-1, -1, hidden.shape[-1]))  # (B, 2, hidden)
        with torch.autocast(ends.device.type, enabled=False):  # bf16 logits tie often: the head stays in fp32
            head = self.stock.score
            return F.linear(ends.float(), head.weight.float(), head.bias).squeeze(-1)


def siamese_rows(batch: dict[str, Tensor]) -> tuple[dict, Tensor]:
    """The same pairs as two ordinary padded rows each, and where (B, n) each packed token lies in the flat rows."""
    ids, seg, pos = batch["ids"], batch["seg"], batch["pos"]
    B, n = ids.shape
    m = int(pos.max()) + 1
    pair = torch.arange(B, device=ids.device)[:, None]
    rows = torch.where(seg == 2, pair + B, pair)  # rows 0..B-1 hold (x, y_c), rows B..2B-1 hold (x, y_r)
    where = rows * m + pos
    flat, mask = ids.new_zeros(2 * B * m), ids.new_zeros(2 * B * m)
    for k, sel in ((0, seg < 2), (1, (seg == 0) | (seg == 2))):
        at = ((pair + k * B) * m + pos)[sel]
        flat[at], mask[at] = ids[sel], 1
    return dict(input_ids=flat.view(2 * B, m), attention_mask=mask.view(2 * B, m)), where


def first_line(why: Exception) -> str:
    return (str(why).strip() or type(why).__name__).splitlines()[0]


def load(auto, name: str, **kwargs):
    """from_pretrained with the errors made readable; trust_remote_code stays off, weights are safetensors or
    weights_only. Raises UserError."""
    try:
        return auto.from_pretrained(name, trust_remote_code=False, **kwargs)
    except Exception as why:  # the hub, the disk and every model class raise kinds of their own
        hint = "" if Path(name).is_dir() else " (no such local directory; as a hub id it could not be fetched)"
        raise UserError(f"{name}: cannot be loaded{hint}: {first_line(why)}") from None


def positions_of(config, name: str = "", max_length: int = 0) -> int:
    """The longest input of a model, in tokens (10**9: no limit). Raises UserError where max_length is over it."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):  # they number positions from pad + 1
        positions -= (config.pad_token_id or 0) + 1
    if max_length > positions:
        raise UserError(f"{name}: --max-length {max_length} is over the model's {positions} positions; use --max-length {positions}")
    return positions


def refuse_missing(name: str, model, keys: list[str]) -> None:
    if keys:
        raise UserError(f"{name}: its weights lack {len(keys)} tensors of {type(model).__name__}, {min(keys)} first; they would be random")


def load_tokenizer(name: str):
    """A tokenizer, checked to be one that can serve here."""
    tokenizer = load(AutoTokenizer, name)
    if not tokenizer.is_fast:
        raise UserError(f"{name}: no fast tokenizer, and only those tell which characters a token covers")
    return tokenizer


def choose_pad(tokenizer) -> None:
    """A pad token that is not the end token: the stock class reads the reward at the right-most token that is not
    pad, so with pad = eos it would skip the end token. Any other token serves; a new one only if there is none."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        spare = [t for t in (tokenizer.unk_token, *tokenizer.all_special_tokens) if t and t != tokenizer.eos_token]
        if spare:
            tokenizer.pad_token = spare[0]
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.padding_side = "right"


def load_student(name: str, seed: int = 0, max_length: int = 0):
    """(stock sequence-classification model with one label in fp32, tokenizer); a new head is seeded.

    Raises UserError for what is no decoder or cannot hold max_length tokens."""
    tokenizer = load_tokenizer(name)
    config = load(AutoConfig, name, num_labels=1)
    text = config.get_text_config()
    for key, value in text.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(text, key, 0.0)  # dropout off: noise in r would be noise in the margin
    choose_pad(tokenizer)
    torch.manual_seed(seed)  # before the load: a missing head is drawn in it
    model, info = load(AutoModelForSequenceClassification, name, config=config, dtype=torch.float32, output_loading_info=True)
    if not hasattr(model, "score"):
        raise UserError(f"{name}: {type(model).__name__} is no decoder reward model (an encoder serves as --teacher)")
    positions_of(config, name, max_length)
    refuse_missing(name, model, [k for k in info["missing_keys"] if not k.startswith("score")])
    if info["missing_keys"]:
        nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))  # arXiv 2009.01325
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        if len(tokenizer) - model.get_input_embeddings().num_embeddings > 1:
            raise UserError(f"{name}: the tokenizer has {len(tokenizer)} tokens, the model only "
                            f"{model.get_input_embeddings().num_embeddings} embeddings")
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = text.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


@torch.no_grad()
def probe_student(model: RewardModel, name: str, max_length: int = 0) -> None:
    """Measures, on eight random tokens, that the model is causal and can do what --encoding asks (no list of names
    to keep up to date). Raises UserError with the flag to use."""
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
        if model.tap is not None:  # the tap must change nothing (attention sinks, say, are lost in it)
            rows, scores = siamese_rows(batch)[0], []
            for implementation in (model.tap.before, TAP):
                stock.set_attn_implementation(implementation)
                scores.append(stock.base_model(**rows, use_cache=False).last_hidden_state)
            if not torch.allclose(*scores, atol=1e-3, rtol=1e-3):
                raise UserError(f"{name}: {type(stock).__name__} attends in a way that the tap does not keep; use --method bt")
        model.encoding = "siamese"
        try:
            apart = model(batch)
        except Exception as why:
            raise UserError(f"{name}: {type(stock).__name__} cannot be used as a student ({first_line(why)})") from None
        other = dict(batch, ids=torch.where(torch.arange(8, device=device) == 4, (ids + 1) % (vocabulary // 2), ids))
        hidden = [stock.base_model(siamese_rows(b)[0]["input_ids"][:1], use_cache=False).last_hidden_state[0, 2] for b in (batch, other)]
        if not torch.allclose(*hidden, atol=1e-4):
            raise UserError(f"{name}: {type(stock).__name__} is not causal: early tokens see late ones; an encoder serves as --teacher")
        if encoding == "packed":
            model.encoding = encoding
            try:
                gap = (model(batch) - apart).abs().max().item()
            except Exception as why:
                gap = f"{type(why).__name__}"
            if isinstance(gap, str) or not gap < 1e-3:
                raise UserError(f"{name}: {type(stock).__name__} cannot take the tree mask (packed and separate "
                                f"scores differ: {gap}); use --encoding siamese")
    finally:
        model.encoding = encoding
        stock.train(was)
    if model.tap is not None:
        with torch.enable_grad():
            model(batch)  # the tap raises where the model hides its attention
        model.maps = []


def check_window(model, max_length: int, name: str) -> None:
    """The tree mask takes the place of a sliding window: refused where the two could differ."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True) and {"full_attention"} != set(getattr(config, "layer_types", None) or [0])
    if window and used and max_length > window:
        raise UserError(f"{name}: attention is limited to {window} tokens, which the tree mask cannot express; use "
                        f"--max-length {window} or --encoding siamese")


# -------------------------------------------------------------------------------------------------------- teacher

class InteractionTeacher(nn.Module):
    """A stock bidirectional encoder for token classification with one label, over both responses at once (E4).

    forward(batch of collate_teacher) -> verdict (B,), positive when it prefers chosen. attend(batch) -> (verdict,
    token maps, one (B, n, n) a layer), by the tap, or by output_attentions where the model lacks the interface
    (DeBERTa)."""

    def __init__(self, stock, tokenizer, layers: tuple[int, ...] = ()):
        super().__init__()
        self.stock, self.tokenizer, self.layers, self.tap = stock, tokenizer, layers, None
        if layers:
            try:
                self.tap = AttentionTap(stock, list(layers))
            except UserError:
                stock.set_attn_implementation("eager")

    def verdict(self, scalars: Tensor, seg: Tensor) -> Tensor:
        """(B, n, 1), (B, n) -> (B,): mean over the tokens of y_c minus mean over those of y_r."""
        means = [(scalars[..., 0].float() * (seg == k)).sum(1) / (seg == k).sum(1).clamp_min(1) for k in (1, 2)]
        return means[0] - means[1]

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.verdict(self.stock(input_ids=batch["ids"], attention_mask=batch["mask"]).logits, batch["seg"])

    @torch.no_grad()
    def attend(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        inputs = dict(input_ids=batch["ids"], attention_mask=batch["mask"])
        if self.tap is None:
            out = self.stock(**inputs, output_attentions=bool(self.layers))
            if self.layers and not out.attentions:
                raise UserError(f"{type(self.stock).__name__} gives no attention maps; take another teacher")
            return self.verdict(out.logits, batch["seg"]), [out.attentions[k].float().mean(1) for k in self.layers]
        with self.tap:
            verdict = self.forward(batch)
        maps, visible = [], batch["mask"].bool()[:, None, None, :]
        for query, key, scale, mask in (self.tap.kept[k] for k in self.layers):
            seen = visible if mask is None else visible & (mask if mask.dtype == torch.bool else mask == 0)
            # ModernBERT's local layers leave padding rows without a key: let them see all, or they turn into NaN
            maps.append(attention_map(query, key, scale, seen | ~seen.any(-1, keepdim=True)))
        self.tap.kept = {}
        return verdict, maps


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
    for one, other in (("pad", "pad"), ("sep", "eos"), ("cls", "bos")):
        if getattr(tokenizer, one + "_token_id") is None and getattr(tokenizer, other + "_token_id") is None:
            raise UserError(f"{name}: the tokenizer has no {one} token; a teacher is a bidirectional encoder")
    ids = torch.arange(5, 13)[None]
    other = ids.clone()
    other[0, -1] += 1
    model.eval()
    with torch.no_grad():
        first = [model.base_model(i).last_hidden_state[0, 0] for i in (ids, other)]
    if torch.equal(*first):
        raise UserError(f"{name}: {type(model).__name__} is causal: its early tokens never see late ones; a teacher "
                        "is a bidirectional encoder (BERT, RoBERTa, ModernBERT, DeBERTa ...)")
    return model, tokenizer, positions_of(config)


# --------------------------------------------------------------------------------------------------------- losses

def bt_loss(r_c: Tensor, r_r: Tensor) -> Tensor:
    """Bradley-Terry, per pair (E2): (B,), (B,) -> (B,)."""
    return -F.logsigmoid(r_c - r_r)


def preference_loss(r_c: Tensor, r_r: Tensor, kind: str, flip_rate=0.0, margin=0.0, strength=None) -> Tensor:
    """BT and its variants against wrong labels, per pair: r_c, r_r, margin, strength (B,) -> (B,).

    margin: Llama 2 (arXiv 2307.09288); margin = strength: arXiv 2401.06080, Eq. 6 (printed there outside of
    log sigmoid, without gradient). smooth: cDPO (Mitchell, "A note on DPO with noisy preferences", Eq. 3) =
    2401.06080, Eq. 5. soft: the same where the ensemble doubts the label (2401.06080, 2.5). robust: arXiv
    2403.00409; its mean over random flips is the clean loss, so one pair's can be negative, without bound."""
    as_labelled, flipped = bt_loss(r_c - margin, r_r), bt_loss(r_r, r_c - margin)
    if kind == "robust":
        return ((1 - flip_rate) * as_labelled - flip_rate * flipped) / (1 - 2 * flip_rate)
    if kind in ("smooth", "soft"):
        rate = flip_rate * (strength < 0) if kind == "soft" else flip_rate
        return (1 - rate) * as_labelled + rate * flipped
    return as_labelled


def sft_loss(hidden: Tensor, ids: Tensor, seg: Tensor, embedding: Tensor, beta: float = 0.1) -> Tensor:
    """GRM's regulariser, SFT variant, per pair: -log sigmoid(beta log pi(y_c | x)) (arXiv 2406.10216).

    hidden (B, n, hidden), ids, seg (B, n), the tied embedding (vocabulary, hidden) -> (B,)."""
    pair, at = (seg[:, 1:] == 1).nonzero(as_tuple=True)  # y_c follows x: its tokens are told at t - 1
    logits = F.linear(hidden[pair, at], embedding).float()
    log_p = -F.cross_entropy(logits, ids[pair, at + 1], reduction="none")
    return -F.logsigmoid(beta * log_p.new_zeros(len(ids)).index_add(0, pair, log_p))


def pool_words(token_map: Tensor, word: Tensor, W: int) -> Tensor:
    """Token map (B, n, n), word of each token (B, n), -1 = none -> word map (B, W, W) (E5, arXiv 1906.04341).

    Sum over the tokens of the attended word, mean over those of the attending word; words without token: zeros."""
    member = F.one_hot(word + 1, W + 1)[..., 1:].to(token_map.dtype)  # (B, n, W)
    rows = member / member.sum(1, keepdim=True).clamp_min(1)
    return rows.transpose(1, 2) @ token_map @ member


def block_masks(word_seg: Tensor, support: str = "full") -> tuple[Tensor, Tensor]:
    """(B, W) -> the block sets intra and inter (B, W, W). Support causal keeps what the student really attends."""
    s_i, s_j = word_seg[:, :, None], word_seg[:, None, :]
    real, cross = (s_i >= 0) & (s_j >= 0), (s_i + s_j == 3) & (s_i > 0) & (s_j > 0)
    if support == "causal":
        return (real & ~cross).tril(), torch.zeros_like(cross)
    return real & ~cross, real & cross


def row_divergence(T: Tensor, S: Tensor, block: Tensor, kind: str = "kl", eps: float = 1e-8) -> Tensor:
    """Word maps T, S and block (B, W, W) -> (B, W), for each row renormalised inside the block: KL(T_i || S_i), or mse,
    the squared distance (VIRT, arXiv 2112.04195); 0 for rows without block."""
    T, S = (P.float() * block for P in (T, S))
    T, S = (P / P.sum(-1, keepdim=True).clamp_min(eps) for P in (T, S))
    return (T * ((T + eps).log() - (S + eps).log())).sum(-1) if kind == "kl" else (T - S).square().sum(-1)


def alignment_loss(T: Tensor, S: Tensor, block: Tensor, kind: str = "kl") -> Tensor:
    """Attentional alignment inside one block set (E6), per pair: the mean of row_divergence over the rows of the
    block, (B, W, W) x 3 -> (B,). A pair without rows in the block gives 0."""
    return row_divergence(T, S, block, kind).sum(-1) / block.any(-1).sum(-1).clamp_min(1)


def shuffle_rows(T: Tensor, word_seg: Tensor, seed: list[int]) -> Tensor:
    """Control: the rows of each map (B, W, W) permuted inside each segment, so each keeps its distribution but belongs to another word."""
    rng, order = np.random.default_rng(seed), np.tile(np.arange(T.shape[1]), (T.shape[0], 1))
    for b, segments in enumerate(word_seg.cpu().numpy()):
        for s in (0, 1, 2):
            at = np.flatnonzero(segments == s)
            order[b, at] = rng.permutation(at)
    return T.gather(1, torch.from_numpy(order).to(T.device)[:, :, None].expand_as(T))


def distillation_losses(model: RewardModel, teacher: InteractionTeacher | None, examples: list[Example],
                        swap: np.ndarray, cfg: Config, device, seed: list[int]) -> dict[str, Tensor]:
    """Every term of L (E7) per pair, (B,) each: bt (or preference in its place), intra, inter, score, center,
    batch_sum, sft, and their weighted sum loss; also the rewards (B, 2)."""
    batch = collate(examples, model.stock.config.get_text_config().pad_token_id, device)
    rewards = model(batch)
    out = {"rewards": rewards.detach(), "bt": bt_loss(rewards[:, 0], rewards[:, 1])}
    out["loss"] = out["bt"]
    if cfg.preference_loss != "bt" or cfg.margin_field != "none":
        given = {k: torch.tensor([getattr(e.pair, k) for e in examples], device=device)
                 for k in needed_fields(cfg)}
        out["preference"] = preference_loss(rewards[:, 0], rewards[:, 1], cfg.preference_loss, cfg.flip_rate,
                                            given.get(cfg.margin_field, 0.0), given.get("strength"))
        out["loss"] = out["preference"]
    W, word_seg, teacher_maps = batch["word_seg"].shape[1], batch["word_seg"], [None] * len(model.layers)
    if teacher is not None:
        teacher_batch = collate_teacher(examples, swap, teacher.tokenizer, device)
        verdict, teacher_maps = teacher.attend(teacher_batch)
        if cfg.lambda_score:
            out["score"] = (rewards[:, 0] - rewards[:, 1] - verdict).square()
            out["loss"] = out["loss"] + cfg.lambda_score * out["score"]
    for simulated, target in zip(model.maps, teacher_maps):
        with torch.autocast(torch.device(device).type, enabled=False):
            S = pool_words(simulated, batch["word"], W)
            T = torch.ones_like(S) if cfg.align_target == "uniform" else pool_words(target, teacher_batch["word"], W)
            T = shuffle_rows(T, word_seg, seed) if cfg.align_target == "shuffled" else T
            for name, weight, block in zip(("intra", "inter"), (cfg.lambda_intra, cfg.lambda_inter),
                                           block_masks(word_seg, cfg.align_support)):
                term = alignment_loss(T, S, block, cfg.align_loss) / len(model.layers)
                out[name] = out.get(name, 0) + term.detach()
                out["loss"] = out["loss"] + weight * term if weight else out["loss"]
    if cfg.center_rewards:
        out["center"] = rewards.sum(1).square()
        out["loss"] = out["loss"] + cfg.center_rewards * out["center"]
    if cfg.batch_sum:  # (sum of 2B rewards)^2 / 4B, as in the authors' code; the same for every pair
        out["batch_sum"] = (len(rewards) * rewards.mean().square()).expand(len(rewards))
        out["loss"] = out["loss"] + cfg.batch_sum * out["batch_sum"]
    if cfg.lambda_sft:
        embedding = model.stock.get_input_embeddings().weight
        out["sft"] = sft_loss(model.hidden, batch["ids"], batch["seg"], embedding)
        out["loss"] = out["loss"] + cfg.lambda_sft * out["sft"]
    return out


# ----------------------------------------------------------------------------------------------------- evaluation

def batches_by_length(examples: list[Example], batch_size: int, progress: str = ""):
    """Index arrays of batches, longest first (too little memory shows at once), behind a bar named progress."""
    order = np.argsort([-len(e.ids) for e in examples], kind="stable")
    return tqdm([order[i:i + batch_size] for i in range(0, len(order), batch_size)], desc=progress, disable=not progress,
                leave=False, mininterval=CALM)


@torch.no_grad()
def score_pairs(model: RewardModel, examples: list[Example], batch_size: int, device, amp, progress: str = "") -> np.ndarray:
    """Rewards (N, 2) in fp32 of encoded pairs, in their order; only scalars are kept."""
    scores, was = np.zeros((len(examples), 2), dtype=np.float32), model.training
    model.eval()
    for index in batches_by_length(examples, batch_size, progress):
        batch = collate([examples[i] for i in index], model.stock.config.get_text_config().pad_token_id, device)
        with amp():
            scores[index] = model(batch).float().cpu().numpy()
    model.train(was)
    return scores


@torch.no_grad()
def teacher_verdicts(teacher: InteractionTeacher, examples: list[Example], batch_size: int, device, amp,
                     progress: str = "") -> np.ndarray:
    """The teacher's verdict (N,), mean of both orders."""
    verdicts, was = np.zeros(len(examples), dtype=np.float32), teacher.training
    teacher.eval()
    for index in batches_by_length(examples, batch_size, progress):
        for swapped in (False, True):
            batch = collate_teacher([examples[i] for i in index], np.full(len(index), swapped), teacher.tokenizer, device)
            with amp():
                verdicts[index] += teacher(batch).float().cpu().numpy() / 2
    teacher.train(was)
    return verdicts


def outcomes(margins: np.ndarray) -> np.ndarray:
    """1 for a positive margin, 0 for a negative one, ties half: (N,) -> (N,)."""
    return (margins > 0) + 0.5 * (margins == 0)


def accuracy(margins: np.ndarray) -> float:
    """Share of positive margins (N,), ties counted as half."""
    return float(outcomes(margins).mean())


def longer_margins(pairs: list[Pair]) -> np.ndarray:
    """The length baseline: characters of chosen minus characters of rejected, (N,)."""
    return np.array([len(p.chosen.strip()) - len(p.rejected.strip()) for p in pairs])


# ------------------------------------------------------------------------------------------------------- training

@contextmanager
def written(path: str | Path, mode: str = "w"):
    """A file written aside, flushed to disk, renamed: a reader sees the old file or the new one, never half."""
    with open(f"{path}.tmp", mode, encoding=None if "b" in mode else "utf-8") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def write_json(path: str | Path, obj) -> None:
    with written(path) as f:
        json.dump(obj, f, indent=1)


def save_stock(stock, tokenizer, to: Path) -> None:
    """A stock directory, written aside and swapped in."""
    aside, old = to.with_name(to.name + ".tmp"), to.with_name(to.name + ".old")
    for stale in (aside, old):
        shutil.rmtree(stale, ignore_errors=True)
    stock.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    if hasattr(stock, "score"):  # reward heads have been lost on save before (OpenRLHF #209): look
        heads = [f.get_tensor("score.weight") for f in (safe_open(p, "pt") for p in aside.glob("*.safetensors"))
                 if "score.weight" in f.keys()]
        if not heads or not torch.equal(heads[0], stock.score.weight.detach().cpu()):
            raise UserError(f"{aside}: the saved reward head is not the trained one; the folder above it is as it was")
    if to.exists():
        os.replace(to, old)
    os.replace(aside, to)
    shutil.rmtree(old, ignore_errors=True)


class Run:
    """The output directory: lock, metrics.jsonl, checkpoints, and the wish to stop (SIGTERM, Ctrl-C)."""

    def __init__(self, cfg: Config):
        self.dir, self.cfg, self.stop, self.handlers = Path(cfg.output_dir), cfg, 0, {}
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.dir / "lock", "a+")
        except OSError as why:
            raise UserError(f"{self.dir}: cannot be written ({why.strerror})") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.seek(0)
            raise UserError(f"{self.dir}: in use by another run ({self.lock.read().strip()}); choose another --output-dir") from None
        self.lock.truncate(0)
        self.lock.write(f"host {socket.gethostname()} pid {os.getpid()}\n")
        self.lock.flush()
        try:  # any model directory has a config.json: ours lists flags
            before = json.loads((self.dir / "config.json").read_text())["flags"]
        except (OSError, ValueError, KeyError, TypeError):
            before = None
        known = before is not None
        foreign = [n for n in ("student", "teacher", "checkpoints", *(() if known else ("config.json",))) if (self.dir / n).exists()]
        inputs = [Path(p).resolve() for p in (cfg.model, cfg.teacher, *cfg.data, *cfg.val_data, *cfg.eval_data) if p]
        inside = [p for p in inputs if any(p.is_relative_to((self.dir / n).resolve()) for n in foreign)]
        if (foreign and not known) or (inside and not cfg.resume):
            raise UserError(f"{self.dir}: its {foreign[0]} is no output of an earlier run here, or is read by this one; "
                            "choose another --output-dir")
        if known and not (cfg.resume or cfg.overwrite):
            raise UserError(f"{self.dir}: holds an earlier run; go on with --resume, replace it with --overwrite, or "
                            "choose another --output-dir")
        if known and cfg.resume:
            self.compare_flags(before)

    def compare_flags(self, before: dict) -> None:
        """--resume with other flags: refused, but for those that change no step."""
        free = {"resume", "overwrite", "output_dir", "eval_data", "log_every", "device", "save_every"}
        now = json.loads(json.dumps(dataclasses.asdict(self.cfg)))
        changed = [f"--{k.replace('_', '-')} was {before.get(k)!r}, is {now[k]!r}" for k in now
                   if k not in free and before.get(k) != now[k]]
        if changed:
            raise UserError(f"{self.dir}: --resume with other flags: {'; '.join(changed)}. May change: "
                            + ", ".join("--" + k.replace("_", "-") for k in sorted(free)))

    def begin(self) -> None:
        """Called when data and models are known to be good: only now is an earlier run replaced."""
        if not self.cfg.resume:
            for name in ("student", "teacher", "checkpoints"):
                shutil.rmtree(self.dir / name, ignore_errors=True)
            for name in ("metrics.jsonl", "results.json"):
                (self.dir / name).unlink(missing_ok=True)
        elif not self.checkpoints():
            print(f"{self.dir}: no whole checkpoint to resume from; starting at the beginning")
        versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__,
                    "numpy": np.__version__}
        write_json(self.dir / "config.json", {"flags": dataclasses.asdict(self.cfg), "versions": versions})
        self.handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}

    def close(self) -> None:
        """Gives back the lock and the signal handlers."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.lock.close()

    def on_signal(self, number, _) -> None:
        self.stop = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        print("\nstopping after this step; once more ends at once", file=sys.stderr)

    def checkpoints(self) -> list[tuple[int, int, Path]]:
        """(phase 0 = teacher / 1 = student, step, path), newest first."""
        found = [re.fullmatch(r"([01])-(\d+)\.pt", p.name) for p in (self.dir / "checkpoints").glob("*.pt")]
        return sorted(((int(m[1]), int(m[2]), self.dir / "checkpoints" / m[0]) for m in found if m), reverse=True)

    def newest(self):
        """(phase, step, state) of the newest whole checkpoint, or None; a torn one is named and passed over."""
        for phase, step, path in self.checkpoints():
            try:
                return phase, step, torch.load(path, map_location="cpu", weights_only=True)
            except Exception as why:  # zip, pickle and tensor errors alike mean: not whole
                print(f"{path}: torn or foreign ({first_line(why)[:80]}); using the one before", file=sys.stderr)
        return None

    def save(self, phase: int, step: int, state: dict) -> None:
        """Written aside, flushed, renamed; the last two are kept."""
        path = self.dir / "checkpoints" / f"{phase}-{step:08d}.pt"
        path.parent.mkdir(exist_ok=True)
        with written(path, "wb") as f:
            torch.save(state, f)
        for *_, old in self.checkpoints()[2:]:
            old.unlink()

    def log(self, **line) -> None:
        with open(self.dir / "metrics.jsonl", "a") as f:
            f.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()}) + "\n")

    def rewind(self, phase: int, step: int) -> None:
        """Drops the lines of metrics.jsonl that the resumed run will write again."""
        path = self.dir / "metrics.jsonl"
        lines = [json.loads(raw) for raw in path.read_text().splitlines() if raw.endswith("}")] if path.exists() else []
        keep = [m for m in lines if (m["phase"] == "student", m["step"]) <= (phase == 1, step)]
        with written(path) as f:
            f.writelines(json.dumps(m) + "\n" for m in keep)


def make_optimizer(model: nn.Module, lr: float, decay: float) -> torch.optim.AdamW:
    """AdamW; decay on matrices only."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": decay},
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def fit(run: Run, phase: int, model: nn.Module, examples: list[Example], losses, validate, save_best, lr: float,
        total: int, device, amp) -> None:
    """The one training loop, of the teacher (phase 0) and the student (phase 1).

    losses(examples, indices, epoch) -> dict of per-pair terms (B,) with "loss"; validate() -> dict with "accuracy" and
    "loss"; save_best() writes the stock directory whenever validation accuracy (then loss) is the best so far."""
    cfg, name = run.cfg, ("teacher", "student")[phase]
    lengths = np.array([len(e.ids) for e in examples])
    per_epoch = math.ceil(len(examples) / cfg.batch_size)
    optimizer = make_optimizer(model, lr, cfg.weight_decay)
    best, done, warm = [-1.0, 0.0], 0, max(1, round(cfg.warmup * total))
    state = run.newest() if cfg.resume else None
    if state and state[0] == phase:
        done, saved = state[1], state[2]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        if device.type == "cuda" and "cuda_rng" in saved:
            torch.cuda.set_rng_state(saved["cuda_rng"], device)
        best = saved["best"]
        print(f"resuming the {name} after step {done} of {total}")
    elif phase == 1 or not state:
        torch.manual_seed(cfg.seed + 10 + phase)  # dropout of the teacher
    if cfg.resume:
        run.rewind(phase, done)
    every = cfg.eval_every or max(1, math.ceil(total / 2))
    model.train()
    bar, plan, planned = tqdm(total=total, initial=done, desc=name, unit="step", mininterval=CALM), [], -1
    for step in range(done + 1, total + 1):
        epoch, at = divmod(step - 1, per_epoch)
        if epoch != planned:
            plan, planned = plan_epoch(lengths, cfg.batch_size, cfg.seed + phase, epoch), epoch
        began, sums, rewards = time.perf_counter(), Counter(), []
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / (total - warm + 1)))
        for part in np.array_split(plan[at], min(cfg.grad_accum, len(plan[at]))):
            with amp():
                terms = losses([examples[i] for i in part], part, epoch)
            (terms["loss"].sum() / len(plan[at])).backward()  # the mean is over the pairs of the whole step
            rewards.append(terms.pop("rewards").float())
            sums.update({k: float(v.detach().sum()) for k, v in terms.items()})
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), cfg.clip))
        if not math.isfinite(norm + sums["loss"]):
            raise UserError(f"{name} step {step}: the loss or its gradient is not finite (loss {sums['loss']}, gradient norm "
                            f"{norm}); nothing was updated; the last checkpoint is whole. Try a lower learning rate or --dtype fp32")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        r = torch.cat(rewards)
        means = {k: v / len(plan[at]) for k, v in sums.items()}
        right = accuracy((r[:, 0] - r[:, 1]).cpu().numpy())
        bar.update()
        bar.set_postfix({k: f"{v:.3f}" for k, v in {**means, "acc": right}.items()}, refresh=False)
        if step % cfg.log_every == 0 or step == total:
            run.log(phase=name, step=step, **means, accuracy=right, margin=float((r[:, 0] - r[:, 1]).mean()),
                    reward_mean=float(r.mean()), reward_std=float(r.std()), lr=optimizer.param_groups[0]["lr"], grad_norm=norm,
                    pairs_per_s=len(plan[at]) / (time.perf_counter() - began))
        due = step % every == 0 or step == total
        if due:
            value = validate()
            run.log(phase=name, step=step, **{"val_" + k: v for k, v in value.items()})
            tqdm.write(f"{name} step {step}: " + ", ".join(f"validation {k} {v:.4f}" for k, v in value.items()))
            if [value["accuracy"], -value["loss"]] > best:
                best = [value["accuracy"], -value["loss"]]
                save_best()
        if (step % cfg.save_every == 0 if cfg.save_every else due) or run.stop or step == total:
            cuda_rng = {"cuda_rng": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
            run.save(phase, step, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "best": best,
                                   "rng": torch.get_rng_state(), **cuda_rng})
        if run.stop and not (phase == 1 and step == total):
            bar.close()
            print(f"stopped and saved after {name} step {step} of {total}. Go on with:\n  {resume_command()}"
                  if "--model" in " ".join(sys.argv) else "the demo is stopped; it starts anew each time")
            raise SystemExit(130 if run.stop == signal.SIGINT else 0)
    bar.close()


def resume_command() -> str:
    import shlex
    return shlex.join(["python", *sys.argv] + ([] if "--resume" in sys.argv else ["--resume"])).replace(" --overwrite", "")


def parse_layers(spec: str, student: int, teacher: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """'last' or 'S:T,S:T' -> layer numbers from 0 of student and teacher. Raises UserError."""
    try:
        pairs = [(-1, -1)] if spec == "last" else [tuple(map(int, p.split(":"))) for p in spec.split(",")]
        out = tuple(zip(*((s + student if s < 0 else s, t + (teacher or 0) if t < 0 else t) for s, t in pairs)))
        if not all(0 <= s < student for s in out[0]) or teacher and not all(0 <= t < teacher for t in out[1]):
            raise ValueError
    except ValueError:
        raise UserError(f"--align-layers {spec!r}: give 'last' or student:teacher pairs such as '-1:-1,5:2', within "
                        f"{student} student and {teacher} teacher layers") from None
    return out


def set_up_device(cfg: Config):
    """(device, amp): amp() is bf16 autocast, or nothing; auto takes bf16 where the hardware computes in it."""
    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as why:
        raise UserError(f"--device {name}: not usable here ({first_line(why)})") from None
    native = {"cuda": lambda: torch.cuda.is_bf16_supported(),
              "cpu": lambda: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()}
    bf16 = cfg.dtype == "bf16" or (cfg.dtype == "auto" and native.get(device.type, lambda: False)())
    return device, (lambda: torch.autocast(device.type, dtype=torch.bfloat16)) if bf16 else nullcontext


def check_config(cfg: Config) -> bool:
    """Refuses flags that cannot work; returns whether a teacher is needed. Raises UserError."""
    for name in ("model", "data", "output_dir"):
        if not getattr(cfg, name):
            raise UserError(f"--{name.replace('_', '-')} is needed beside --model")
    for name in ("batch_size", "grad_accum", "log_every", "max_length"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, is {getattr(cfg, name)}")
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if isinstance(value, (int, float)) and not (value >= 0 and math.isfinite(value)):
            raise UserError(f"--{f.name.replace('_', '-')} must not be negative or infinite, is {value}")
    for name, good in {"warmup": cfg.warmup <= 1, "val_fraction": cfg.val_fraction < 1, "clip": cfg.clip > 0,
                       "epochs": cfg.epochs > 0 or cfg.max_steps > 0, "label_noise": cfg.label_noise <= 1,
                       "flip_rate": cfg.flip_rate < 0.5,
                       "batch_sum": not cfg.batch_sum or cfg.grad_accum == 1}.items():
        if not good:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: --warmup, --label-noise, --val-fraction "
                            "and --flip-rate are shares (at most 1, 1, under 1, under 0.5); --clip and --epochs are "
                            "over 0; --batch-sum needs the whole batch at once (--grad-accum 1)")
    if cfg.method == "bt":
        cfg.lambda_intra = cfg.lambda_inter = cfg.lambda_score = 0.0
    maps = cfg.lambda_intra > 0 or cfg.lambda_inter > 0
    needed = bool(cfg.lambda_score > 0 or (maps and cfg.align_target != "uniform"))
    if needed and not cfg.teacher:
        raise UserError("--teacher is needed: --method id reads its attention (plain Bradley-Terry: --method bt)")
    return needed


def labelled(counts: Counter, name: str) -> dict[str, int]:
    return {f"{k} ({name})": v for k, v in counts.items() if k != "pairs"}


def unused_name(path: str, taken) -> str:
    """What a data file is called in tables: its name without ending, the whole path where that is taken."""
    name = Path(path).name.split(".jsonl")[0]
    return name if name not in taken else str(path)


def needed_fields(cfg: Config) -> dict[str, str]:
    """Fields that every training pair must have -> the flag that asks for each."""
    asked = [("strength", "--flip-negative-strength", cfg.flip_negative_strength),
             ("strength", "--preference-loss soft", cfg.preference_loss == "soft"),
             (cfg.margin_field, f"--margin-field {cfg.margin_field}", cfg.margin_field != "none")]
    return {field: flag for field, flag, on in asked if on}


def read_all(cfg: Config) -> tuple[list[Pair], dict[str, list[Pair]], Counter]:
    """(training pairs, {"validation": ..., each evaluation file: ...}, counts). A prompt that is both trained on and
    held out is a leak, and is said. Raises UserError."""
    pairs, counts = read_pairs(cfg.data)
    for name, flag in needed_fields(cfg).items():
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
        raise UserError(f"{len(pairs)} training and {len(val)} validation pairs: both are needed; give --val-data or more pairs")
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


def train_teacher(run: Run, teacher: InteractionTeacher, examples, validation, swaps, device, amp) -> None:
    """Fine-tunes the teacher on E4; leaves it with the weights that were best, those of RUN/teacher."""
    cfg, tokenizer = run.cfg, teacher.tokenizer

    def losses(part, index, epoch):
        v = teacher(collate_teacher(part, swaps(index, epoch), tokenizer, device))
        return {"loss": bt_loss(v, torch.zeros_like(v)), "rewards": torch.stack([v.detach() / 2, -v.detach() / 2], 1)}

    def validate():
        v = teacher_verdicts(teacher, validation, 2 * cfg.batch_size, device, amp)
        return {"accuracy": accuracy(v), "loss": float(np.logaddexp(0, -v).mean())}

    total = max(1, round(cfg.teacher_epochs * math.ceil(len(examples) / cfg.batch_size)))
    fit(run, 0, teacher, examples, losses, validate, lambda: save_stock(teacher.stock, tokenizer, run.dir / "teacher"),
        cfg.teacher_lr, total, device, amp)
    teacher.stock.load_state_dict(load_teacher(str(run.dir / "teacher"))[0].state_dict())


def train_student(run: Run, model: RewardModel, tokenizer, teacher, examples, validation, swaps, device, amp) -> None:
    """Trains the reward model on E7; the best by validation accuracy is RUN/student."""
    cfg = run.cfg

    def losses(part, index, epoch):
        return distillation_losses(model, teacher, part, swaps(index, epoch), cfg, device, [cfg.seed, epoch, int(index[0])])

    def validate():
        s = score_pairs(model, validation, 2 * cfg.batch_size, device, amp)
        return {"accuracy": accuracy(s[:, 0] - s[:, 1]), "loss": float(np.logaddexp(0, s[:, 1] - s[:, 0]).mean()),
                "reward_mean": float(s.mean()), "reward_std": float(s.std())}

    total = cfg.max_steps or max(1, round(cfg.epochs * math.ceil(len(examples) / cfg.batch_size)))
    fit(run, 1, model, examples, losses, validate, lambda: save_stock(model.stock, tokenizer, run.dir / "student"), cfg.lr,
        total, device, amp)


def train(cfg: Config) -> dict:
    """One whole run: data, teacher, student, final table; returns what RUN/results.json holds. Raises UserError."""
    needs_teacher = check_config(cfg)
    device, amp = set_up_device(cfg)
    run = Run(cfg)
    try:
        return train_in(run, cfg, needs_teacher, device, amp)
    finally:
        run.close()


def train_in(run: Run, cfg: Config, needs_teacher: bool, device, amp) -> dict:
    pairs, held_pairs, counts = read_all(cfg)
    stock, tokenizer = load_student(cfg.model, cfg.seed, cfg.max_length)
    text = stock.config.get_text_config()
    if cfg.lambda_sft and (not getattr(text, "tie_word_embeddings", False) or any(
            getattr(text, k, None) for k in ("final_logit_softcapping", "logit_scale", "logits_scaling"))):
        raise UserError(f"{cfg.model}: --lambda-sft needs a model whose output head is its input embedding")
    teacher, teacher_stock, room, trained = None, None, 512, False
    if needs_teacher:  # a resumed student needs the teacher that was trained for it
        trained = cfg.resume and cfg.teacher_epochs > 0 and any(phase == 1 for phase, *_ in run.checkpoints())
        teacher_stock, teacher_tokenizer, room = load_teacher(str(run.dir / "teacher") if trained else cfg.teacher, cfg.seed)
    layers = parse_layers(cfg.align_layers, stock.config.get_text_config().num_hidden_layers,
                          teacher_stock.config.num_hidden_layers if needs_teacher else None)
    layers = layers if cfg.lambda_intra > 0 or cfg.lambda_inter > 0 else ((), ())
    model = RewardModel(stock.to(device), cfg.encoding, layers[0])
    probe_student(model, cfg.model, cfg.max_length)
    if needs_teacher:
        teacher = InteractionTeacher(teacher_stock.to(device), teacher_tokenizer, layers[1])
        probe = torch.tensor([[5, 6, 7, 8]], device=device)  # the tap raises now, not after the fine-tuning
        teacher.attend(dict(ids=probe, mask=torch.ones_like(probe), seg=probe - 5))
    if cfg.gradient_checkpointing:
        enable = getattr(stock, "activation_checkpointing_enable", None) or stock.gradient_checkpointing_enable  # the new name, the old
        enable({"use_reentrant": False})

    encoder = Encoder(tokenizer, cfg.max_length, cfg.overlong, teacher.tokenizer if teacher else None,
                      min(room, 2 * cfg.max_length))
    examples, held = encoder(pairs, progress="encoding"), {}
    counts.update(encoder.counts)
    for name, part in held_pairs.items():
        encoder.counts.clear()
        held[name] = encoder(part, progress=f"encoding {name}")
        counts.update(labelled(encoder.counts, name))
    for name, part in {"the training data": examples, **held}.items():
        if not part:
            raise UserError(f"{name}: no pair fits into --max-length {cfg.max_length}")
    counts.update({"training pairs": len(examples), **{f"pairs of {k}": len(v) for k, v in held.items()}})
    print("data: " + ", ".join(f"{v} {k}" for k, v in counts.items() if v))
    run.begin()
    if not (run.dir / "metrics.jsonl").exists():
        run.log(phase="teacher" if needs_teacher else "student", step=0, data=dict(counts))

    started, teacher_accuracy = time.perf_counter(), {}

    def swaps(index: np.ndarray, epoch: int) -> np.ndarray:  # the teacher's random order, seeded for each epoch
        return np.random.default_rng([cfg.seed, epoch, 12]).random(len(examples))[index] < 0.5

    if needs_teacher:
        if cfg.teacher_epochs > 0 and not trained:
            train_teacher(run, teacher, examples, held["validation"], swaps, device, amp)
        teacher.eval().requires_grad_(False)
        teacher_accuracy = {name: accuracy(teacher_verdicts(teacher, part, 2 * cfg.batch_size, device, amp, f"teacher: {name}"))
                            for name, part in held.items()}
        n, got = len(held["validation"]), teacher_accuracy["validation"]
        print(f"teacher: validation accuracy {got:.4f} on {n} pairs, frozen")
        if got < 0.5 + 1.64 * math.sqrt(0.25 / n):  # one-sided 95 %
            print(f"warning: the teacher is at chance ({got:.3f} on {n} pairs); its attention has little to teach. "
                  "Train it longer (--teacher-epochs) or faster (--teacher-lr)")
    train_student(run, model, tokenizer, teacher, examples, held["validation"], swaps, device, amp)
    if model.tap is not None:
        model.tap.remove()
    model = RewardModel(load_student(str(run.dir / "student"))[0].to(device), cfg.encoding)  # the best, from disk
    results = {"method": cfg.method, "seed": cfg.seed, "seconds": round(time.perf_counter() - started, 1), "sets": {}}
    for name, part in held.items():
        s = score_pairs(model, part, 2 * cfg.batch_size, device, amp, f"student: {name}")
        results["sets"][name] = {"pairs": len(part), "student": accuracy(s[:, 0] - s[:, 1]),
                                 "ties": int((s[:, 0] == s[:, 1]).sum()), "teacher": teacher_accuracy.get(name),
                                 "longer": accuracy(longer_margins([e.pair for e in part])),
                                 "reward_mean": float(s.mean()), "reward_std": float(s.std())}
    write_json(run.dir / "results.json", results)
    return results


def print_table(results: dict) -> None:
    """Accuracy in % of the student beside the teacher, the longer-response and the majority baseline."""
    print(f"\n{'accuracy %':24}{'pairs':>7}{'student':>9}{'teacher':>9}{'longer':>8}{'majority':>10}")
    for name, r in results["sets"].items():
        cells = [f"{100 * r[k]:.1f}" if r[k] is not None else "-" for k in ("student", "teacher", "longer")]
        print(f"{name:24}{r['pairs']:>7}{cells[0]:>9}{cells[1]:>9}{cells[2]:>8}{'50.0':>10}")
    print("(majority: either side of a pair comes first, so a constant answer is right in half of them)")


# ----------------------------------------------------------------------------------------------------------- demo

def demo(cfg: Config) -> None:
    """Generated pairs in which a closing cue agrees with the label in 90 % of the training pairs, and only early
    content always decides. Four models learn from them; which of them follows the cue?"""
    free = {"output_dir", "overwrite", "seed", "seeds", "device", "dtype", "max_steps"}
    default = dataclasses.asdict(Config())
    fixed = ["--" + k.replace("_", "-") for k, v in dataclasses.asdict(cfg).items() if k not in free and v != default[k]]
    if fixed:
        raise UserError(f"{', '.join(fixed)}: --model is needed beside it; the demo (no --model) takes "
                        + ", ".join("--" + k.replace("_", "-") for k in sorted(free)))
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
        make_demo_models(here / "models", seed)
        base = dataclasses.replace(
            cfg, model=str(here / "models/student"), teacher=str(here / "models/teacher"), seed=seed, batch_size=32, lr=1e-3,
            teacher_lr=2e-3, epochs=2, teacher_epochs=8, max_length=128, data=[str(here / "data/train.jsonl")],
            eval_data=[str(here / f"data/{c}.jsonl") for c in columns],
            dtype="fp32" if cfg.dtype == "auto" else cfg.dtype, eval_every=400, log_every=20)
        for name, changes in {"ID": {}, "BT": {"method": "bt"}, "ID, uniform target": {"align_target": "uniform"}}.items():
            out = here / name.split(",")[-1].strip().replace(" ", "-").lower()
            print(f"\n--- seed {seed}: {name}")
            sets = train(dataclasses.replace(base, output_dir=str(out), **changes))["sets"]
            table[name].append([sets[c]["student"] for c in columns])
            if name == "ID":
                table["teacher"].append([sets[c]["teacher"] for c in columns])
    mean = {k: np.mean(v, 0) * 100 for k, v in table.items()}
    spread = {k: np.std(v, 0, ddof=1) * 100 if cfg.seeds > 1 else None for k, v in table.items()}
    print(f"\naccuracy %, 600 pairs each, {cfg.seeds} seed(s){', mean (standard deviation)' if cfg.seeds > 1 else ''}")
    print(f"{'':20}" + "".join(f"{c:>17}" for c in columns))
    for k in table:
        cells = [f"{m:.1f}" + (f" ({s:.1f})" if cfg.seeds > 1 else "") for m, s in zip(mean[k], spread[k] if cfg.seeds > 1 else mean[k])]
        print(f"{k:20}" + "".join(f"{c:>17}" for c in cells))
    verdict = {k: "follows the cue" if m[2] < 40 else "reads the content" if m[2] > 60 else "wavers" for k, m in mean.items()}
    print("\nWhere the cue is reversed: " + "; ".join(f"{k} {verdict[k]} ({mean[k][2]:.0f} %)" for k in verdict) + ".")
    write_json(root / "demo.json", {"columns": list(columns), "accuracy": table, "seconds": round(time.perf_counter() - started, 1)})
    first = root / f"seed{cfg.seed}"
    print(f"Files: {root} ({time.perf_counter() - started:.0f} s). Look closer:\n  python eval.py accuracy {first}/bt/student "
          f"{first}/id/student --data {first}/data/cue-reversed.jsonl")


def main(argv: list[str] | None = None) -> None:
    cfg = parse_config(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if not cfg.model:
            return demo(cfg)
        results = train(cfg)
    except KeyboardInterrupt:  # before the training loop, which saves first
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError as why:
        print(f"error: {why}", file=sys.stderr)
        raise SystemExit(2) from None
    print_table(results)
    print(f"\nreward model: {Path(cfg.output_dir) / 'student'}  (a stock AutoModelForSequenceClassification directory)")


if __name__ == "__main__":
    main()
