#!/usr/bin/env python3
"""Interaction distillation for discriminative reward models, in one file (after arXiv 2508.02618).

    python idistill.py                                              # offline demo on generated data, 2 CPU cores
    python idistill.py --model M --teacher T --data D.jsonl --eval-data E.jsonl --output-dir runs/x
    torchrun --nproc-per-node N idistill.py ...                     # the same on N GPUs; --fsdp shards the weights

The problem. A discriminative reward model (RM) maps a prompt x and a response y to a scalar r(x, y), trained on
pairs (x, y_c, y_r) with the Bradley-Terry (BT) loss. Misallocated attention can hack its judgement: (1) causal
attention: early tokens never see late ones; (2) Siamese encoding: chosen and rejected are encoded apart, so no
token of one ever sees the other. The cure: a bidirectional cross-encoder *teacher* reads both responses; the RM
*simulates* the teacher's attention with its own queries and keys, and an alignment loss pulls the simulated map
to the teacher's. Only training changes: what is saved is an ordinary reward model.

What the abstract says: the two flaws above; an interaction-based language-understanding model as the teacher;
the RM simulates its attention pattern through an attentional alignment objective; steadier, more general rewards.
What is our reading (the paper's code is not public): every equation below, and the word-level alignment.

Letters: B pairs of a batch, N of a set, n tokens, W words, H heads, d head size; s segment: 0 = x, 1 = y_c, 2 = y_r
(tokens: 3 = padding; words: -1 = unseen by one of the models); G maps a layer: 1 (mean over heads), or H with
--align-heads matched; m attending tokens and R attending words: n and W, or a sample of them (--align-max-tokens).

  packed layout   u = [x | y_c | y_r]                                                     (n tokens, once a pair)
  tree mask       query i sees key j  iff  j <= i and (s_j = 0 or s_j = s_i);  positions of y_r restart at |x|
  reward          r_c = w.h[last token of y_c],  r_r = w.h[last token of y_r]    (= encoding both apart)     (E1)
  BT loss         L_BT = -log sigmoid(r_c - r_r)                                                             (E2)
  simulated map   S = mean over heads of softmax(Q K^T / sqrt(d)), the mask lifted            (B, G, m, n)   (E3)
  teacher         reads [CLS] x [SEP] y_a [SEP] y_b [SEP], (a, b) a random order of (c, r); its verdict =
                  mean of a per-token scalar over y_c, minus the same over y_r; loss -log sigmoid(verdict)   (E4)
  teacher map     T = mean over heads of the teacher's attention                                (B, G, m, n)
  word map        sum over the tokens of the attended word, mean over those of the attending word
                                                                                              (B, G, R, W)   (E5)
  blocks          intra I: all but y_c x y_r;  inter X: y_c x y_r, both ways; rows renormalised inside each
  alignment       L_I = mean over rows i of KL(T_i^I || S_i^I),  L_X likewise                                (E6)
  total           L = L_BT + lambda_intra L_I + lambda_inter L_X  (+ lambda_score MarginMSE, + centring)     (E7)
  baselines       preference_loss in place of L_BT;  + batch sum, + sft_loss: see there

data_prep.py holds what comes before: files, text to tokens to batches, loading and probing models, the run directory,
the demo.
"""
from __future__ import annotations

import math
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from data_prep import (RANK, WORLD, Encoder, Example, Run, TeacherCache, UserError, add_lora, bar, barrier,
                       check_config, check_teacher, collate, collate_teacher, decoder_layers, demo, distribute,
                       encode_all, errors_in_one_line, flag, load_student, load_teacher, longer_margins, parse_flags,
                       parse_layers, plan_epoch, print_table, probe_student, quiet, read_all, recompute_activations,
                       report_teacher, sample_words, set_up_device, shares, summed, take, together, two_rows, with_rows)

# ---------------------------------------------------------------------------------------------------------- config

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
    method: str = flag("id", "id = interaction distillation, bt = plain Bradley-Terry", ["id", "bt"])
    lambda_intra: float = flag(1.0, "weight of the intra-sequence alignment loss")
    lambda_inter: float = flag(1.0, "weight of the inter-sequence alignment loss")
    lambda_schedule: str = flag("constant", "of both: warmup = from 0 over the first 30 %% of the steps, decay = to 0",
                                ["constant", "warmup", "decay"])
    lambda_score: float = flag(0.0, "weight of MarginMSE against the teacher's verdict (arXiv 2010.02666)")
    align_loss: str = flag("kl", "kl, or mse as in VIRT (arXiv 2112.04195)", ["kl", "mse"])
    align_layers: str = flag("last", "student:teacher layers: last, middle, all, or 12:3,5:2 (from 0; from the end: "
                             "--align-layers=-1:-1)")
    align_heads: str = flag("mean", "mean = maps averaged over heads, matched = head by head (equal numbers)",
                            ["mean", "matched"])
    align_target: str = flag("teacher", "controls: uniform = no teacher map, shuffled = its rows permuted in each "
                             "segment", ["teacher", "uniform", "shuffled"])
    align_support: str = flag("full", "causal = compare only where the student attends (the other reading)",
                              ["full", "causal"])
    align_max_tokens: int = flag(0, "in longer pairs, align only random words of about so many tokens; 0 = all")
    teacher_epochs: float = flag(1.0, "teacher fine-tuning, passes over the data; 0 = use it as it is")
    cache_teacher: str = flag("", "folder that keeps the maps of the frozen teacher (fp16, a file for each pair and order, "
                              "which --seed draws anew in each epoch) for further epochs and runs")
    teacher_co_train: bool = flag(False, "the teacher goes on learning (E4) beside the student, at the "
                                  "student's --lr (saved as RUN/teacher-co-trained)")
    encoding: str = flag("packed", "packed = one tree-masked row a pair, siamese = two rows (any causal model)",
                         ["packed", "siamese"])
    max_length: int = flag(1024, "longest prompt + response, in student tokens", low=1)
    overlong: str = flag("truncate", "pairs over --max-length: truncate cuts the oldest of the prompt, never a "
                         "response (a pair that still does not fit is dropped)", ["truncate", "drop", "error"])
    # baselines
    preference_loss: str = flag("bt", "smooth = conservative BT (label smoothing), soft = only where strength < 0 "
                                "(arXiv 2401.06080), robust = unbiased under random flips (arXiv 2403.00409)",
                                ["bt", "smooth", "soft", "robust"])
    flip_rate: float = flag(0.1, "share of wrong labels that smooth, soft and robust reckon with", high=0.49)
    margin_field: str = flag("none", "field of a pair by which r_c is to exceed r_r: margin (arXiv 2307.09288) "
                             "or strength (adaptive, arXiv 2401.06080)", ["none", "margin", "strength"])
    flip_negative_strength: bool = flag(False, "exchange the responses of training pairs with strength < 0")
    label_noise: float = flag(0.0, "share of training labels flipped on purpose, by --seed and the pair "
                              "itself; validation and evaluation pairs stay as they are", high=1)
    center_rewards: float = flag(0.0, "weight of the squared sum of the two rewards of a pair (arXiv 2312.09244)")
    batch_sum: float = flag(0.0, "weight of batch-sum regularisation (arXiv 2505.07271, there 0.001)")
    lambda_sft: float = flag(0.0, "weight of the language-modelling loss on chosen (GRM, arXiv 2406.10216)")
    # optimiser
    epochs: float = flag(1.0, "passes over the training pairs")
    max_steps: int = flag(0, "steps of the student, in place of --epochs; 0 = --epochs decides")
    batch_size: int = flag(16, "pairs a step, over all processes", low=1)
    grad_accum: int = flag(1, "micro-batches a step is cut into (less memory, same loss)", low=1)
    lr: float = flag(1e-5, "peak learning rate of the student (AdamW, a step)")
    teacher_lr: float = flag(5e-5, "peak learning rate of the teacher (AdamW, a step)")
    warmup: float = flag(0.05, "fraction of the steps with rising learning rate, then cosine to 0", high=1)
    weight_decay: float = flag(0.01, "AdamW decay of the matrices (none on norms, biases)")
    clip: float = flag(1.0, "largest gradient norm; longer gradients are scaled down to it", low=1e-9)
    lora_rank: int = flag(0, "train only LoRA adapters of this rank and the head (needs peft); 0 = all weights")
    skip_nonfinite: int = flag(0, "steps with a non-finite loss or gradient to pass over before the run stops")
    # evaluation and logging
    val_fraction: float = flag(0.1, "share of --data carved for validation when --val-data is not given", high=0.9)
    val_max: int = flag(512, "most pairs of the carved validation split")
    log_every: int = flag(10, "steps between lines of metrics.jsonl", low=1)
    eval_every: int = flag(0, "steps between validations; 0 = at a half and at the end")
    save_every: int = flag(0, "steps between checkpoints; 0 = at each validation")
    # system
    seed: int = flag(0, "seed of every random stream")
    seeds: int = flag(1, "demo only: repeat with this many seeds", low=1)
    dtype: str = flag("auto", "autocast type; weights stay fp32; auto = bf16 where it is the faster one",
                      ["auto", "fp32", "bf16"])
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps ...")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass (less memory)")
    fsdp: bool = flag(False, "under torchrun: shard weights, gradients and optimizer over the processes (FSDP2)")


# ----------------------------------------------------------------------------------- attention: tap and shortcuts

TAP = "idistill_tap"
LONG = 1536  # tokens of a packed row from which tree_rows pay
PIECE = 2**21  # about so many numbers of a map are worked on at a time (64 rows at least)
ONLY_AT: dict[nn.Module, Tensor] = {}  # modules of the layer that only_at is at work in -> the tokens (B, 2)


def tapped_attention(module, query, key, value, attention_mask, tree_rows=None, **kwargs):
    """transformers' SDPA attention; an active tap sees Q (B, H, n, d) and K (B, H_kv, n, d) after rotation.

    In the layer of only_at two queries are answered. tree_rows (see two_rows): a packed row attends as two causal rows,
    whose kernel skips what the tree mask would hide: plain BT 1.2 times as quick at 2,048 tokens, 1.6 at 8,192 (CPU)."""
    if AttentionTap.active is not None:
        AttentionTap.active.see(query, key, attention_mask, kwargs.get("scaling"))
    if module in ONLY_AT:
        at, n = ONLY_AT[module], query.shape[2]
        query, attention_mask = pick_rows(query, at), pick_rows(attention_mask, at)
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return put(out, at, n), None
    if tree_rows is not None:
        where, source, _ = tree_rows
        query, key, value = (take(t.transpose(1, 2), source).transpose(1, 2) for t in (query, key, value))
        out, _ = sdpa_attention_forward(module, query, key, value, None, **{**kwargs, "is_causal": True})
        return take(out, where), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(TAP, tapped_attention)
AttentionMaskInterface.register(TAP, sdpa_mask)


class Enough(Exception):
    """A tap that is asked to stop has seen its layers."""


class AttentionTap:
    """Keeps Q and K of chosen layers while it is entered: `with tap: model(...)`, then tap.kept[layer]. With stop the model
    computes no further than the last of them, and gives nothing.

    Fused attention stays on everywhere; an n x n map is built for tapped layers only (output_attentions=True would
    force eager attention in all: 0.6 of the speed, twice the memory at 512 tokens). Calls inside the with block
    are counted: the k-th is layer k, so a recomputation under gradient checkpointing, outside the block, is never
    taken for a forward pass. remove() undoes it all.

    Raises UserError where the model does not call transformers' attention interface."""
    active: AttentionTap | None = None

    def __init__(self, model, layers):
        self.model, self.layers, self.kept, self.calls, self.stop = model, set(layers), {}, 0, False
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
        if self.stop and set(self.kept) == self.layers:
            raise Enough

    def __enter__(self):
        self.kept, self.calls, AttentionTap.active = {}, 0, self
        return self

    def __exit__(self, error, *_):
        AttentionTap.active = None
        if error is None and set(self.kept) != self.layers:
            raise UserError(f"{type(self.model).__name__} showed attention in {self.calls} layers, asked for "
                            f"{sorted(self.layers)}: use --method bt, or another model")
        return error is Enough

    def remove(self) -> None:
        self.model.set_attn_implementation(self.before)


def attention_layers(model) -> int:
    """Layers that attend, counted on three tokens: hybrids have fewer than num_hidden_layers. Raises UserError."""
    tap = AttentionTap(model, [])
    try:
        with torch.no_grad(), tap:
            model.base_model(torch.tensor([[5, 6, 7]], device=model.device), use_cache=False)
    except ValueError:  # Gemma 2 caps its logits
        tap.calls = 0
    finally:
        tap.remove()
    return tap.calls or model.config.get_text_config().num_hidden_layers  # with none, probe_student says what to do


def pick_rows(A: Tensor, rows: Tensor) -> Tensor:
    """A (B, H, n, k), rows (B, m) -> (B, H, m, k); -1 (padding) takes row 0."""
    return A.gather(2, rows.clamp_min(0)[:, None, :, None].expand(-1, A.shape[1], -1, A.shape[3]))


def pick(h: Tensor, at: Tensor) -> Tensor:
    """h (B, n, k) -> (B, 2, k): its rows at the places (B, 2)."""
    return h.gather(1, at[:, :, None].expand(-1, -1, h.shape[-1]))


def put(t: Tensor, at: Tensor, n: int) -> Tensor:
    """t (B, 2, ...) -> (B, n, ...): its rows at the places (B, 2), zeros elsewhere."""
    places = at.view(*at.shape, *[1] * (t.ndim - 2)).expand_as(t)
    return t.new_zeros(len(t), n, *t.shape[2:]).scatter(1, places, t)


@contextmanager
def only_at(layer: nn.Module, at: Tensor, n: int):
    """Inside, a decoder layer answers and passes through its MLP only the tokens (B, 2) of n a row: nobody reads the
    others after the final layer. 1.2 times the pairs a second of plain BT with 4 layers, the less the more there are."""
    ONLY_AT.update(dict.fromkeys(layer.modules(), at))
    mlp, hooks = getattr(layer, "mlp", None), []
    if mlp is not None:
        hooks = [mlp.register_forward_pre_hook(lambda _, given: (pick(given[0], at),)),
                 mlp.register_forward_hook(lambda _, given, out: put(out, at, n))]
    try:
        yield
    finally:
        ONLY_AT.clear()
        for hook in hooks:
            hook.remove()


class MeanSoftmax(torch.autograd.Function):
    """softmax(Q K^T * scale) under the mask, mean over heads unless matched; shapes as in attention_map, K with Q's heads.

    Some rows at a time, forward and backward (dQ and dK in closed form), so that no head's map is held whole. At 8,192
    tokens a pair the whole method takes 9 s and 4.9 GB; with all rows at once, here and in alignment_loss, 15 s and 7.7 GB
    (CPU)."""

    @staticmethod
    def pieces(Q: Tensor, K: Tensor, mask: Tensor, scale: float):
        few = max(64, PIECE // (Q.shape[0] * Q.shape[1] * K.shape[2]))
        for i in range(0, Q.shape[2], few):
            at = slice(i, i + few)
            seen = mask[:, :, at] if mask.shape[2] > 1 else mask
            yield at, ((Q[:, :, at] * scale) @ K.transpose(2, 3)).masked_fill_(~seen, -torch.inf).softmax(3)

    @staticmethod
    def forward(ctx, Q: Tensor, K: Tensor, mask: Tensor, scale: float, matched: bool) -> Tensor:
        ctx.save_for_backward(Q, K, mask)
        ctx.scale, ctx.share = scale, 1 if matched else Q.shape[1]
        A = Q.new_empty(len(Q), Q.shape[1] // ctx.share, Q.shape[2], K.shape[2])
        for at, P in MeanSoftmax.pieces(Q, K, mask, scale):
            A[:, :, at] = P if matched else P.mean(1, keepdim=True)
        return A

    @staticmethod
    @once_differentiable
    def backward(ctx, dA: Tensor):
        Q, K, mask = ctx.saved_tensors
        dQ, dK = torch.empty_like(Q), torch.zeros_like(K)
        for at, P in MeanSoftmax.pieces(Q, K, mask, ctx.scale):
            D = P * dA[:, :, at]
            D -= P.mul_(D.sum(3, keepdim=True))  # gradient of the logits: P (dA - sum over j of P dA)
            D *= ctx.scale / ctx.share
            dQ[:, :, at] = D @ K
            dK += D.transpose(2, 3) @ Q[:, :, at]
        return dQ, dK, None, None, None


def attention_map(query: Tensor, key: Tensor, scale: float, mask: Tensor, rows: Tensor | None = None,
                  matched: bool = False) -> Tensor:
    """softmax(Q K^T * scale) in fp32, mean over heads unless matched (E3).

    query (B, H, n, d), key (B, H_kv, n, d), mask (B or 1, 1, n or 1, n), True = visible, no row empty, rows (B, m): the
    queries to look at (-1: padding), none = all -> (B, G, m, n)."""
    if rows is not None:
        mask = pick_rows(mask.expand(len(query), -1, -1, -1), rows) if mask.shape[2] > 1 else mask
        query = pick_rows(query, rows)
    with torch.autocast(query.device.type, enabled=False):
        key = key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # grouped queries share a key head
        return MeanSoftmax.apply(query.float(), key, mask, scale, matched)


# -------------------------------------------------------------------------------------------------------- student

def tree_mask(seg: Tensor) -> Tensor:
    """(B, n) segments -> (B, 1, n, n), True where query i sees key j: j <= i and (s_j = 0 or s_j = s_i).

    Padding (segment 3) at the right sees itself and x, so no row is empty (an empty softmax row is NaN)."""
    n = seg.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=seg.device).tril()
    return (causal & ((seg[:, None, :] == 0) | (seg[:, None, :] == seg[:, :, None])))[:, None]


class RewardModel(nn.Module):
    """A stock decoder for sequence classification with one label, read at the last token of each response (E1). Packed
    rows encode x once: 1.5 times the pairs a second of two bucketed rows a pair (HH-RLHF).

    forward(batch of collate) -> rewards (B, 2) = (r_c, r_r) in fp32. Afterwards, with `layers` and gradients, self.maps
    lists their simulated token maps (B, G, m, n), and self.hidden is the last hidden state (B, n, hidden), if `whole`:
    the final layer at all tokens, which gradient checkpointing and sft_loss need; else at the two that are read. Packed
    rows of self.long tokens or more attend as two causal rows."""

    def __init__(self, stock, encoding: str = "packed", layers: tuple[int, ...] = (), matched: bool = False,
                 whole: bool = False):
        super().__init__()
        self.stock, self.encoding, self.layers, self.matched, self.whole = stock, encoding, layers, matched, whole
        self.tap, self.hidden, self.maps = None, None, []
        self.long = LONG
        if layers or encoding == "packed":
            try:
                self.tap = AttentionTap(stock, layers)
            except UserError:
                if layers:
                    raise

    def around(self, stock) -> RewardModel:
        """The same with other weights, without maps, and with what probe_student found of the family."""
        other = RewardModel(stock, self.encoding, whole=self.whole)
        other.long = self.long
        if self.tap is None and other.tap is not None:
            other.tap.remove()
            other.tap = None
        return other

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        ids, seg, last = batch["ids"], batch["seg"], batch["last"]
        packed, tapped = self.encoding == "packed", self.layers and torch.is_grad_enabled()
        ends_only = packed and self.tap is not None and not self.whole
        if packed:
            inputs = dict(input_ids=ids, attention_mask=tree_mask(seg), position_ids=batch["pos"])
            if self.tap is not None and ids.shape[1] >= self.long:
                inputs["tree_rows"] = two_rows(batch)
        else:
            where, source, mask = two_rows(batch)
            inputs = dict(input_ids=take(ids, source), attention_mask=mask)
        final = only_at(decoder_layers(self.stock)[-1], last, ids.shape[1]) if ends_only else nullcontext()
        with self.tap if tapped else nullcontext(), final:
            hidden = self.stock.base_model(**inputs, use_cache=False).last_hidden_state
        if not packed:  # back to the packed layout: x from the first of the two rows
            hidden = take(hidden, where)
        self.hidden, self.maps = None if ends_only else hidden, []
        for layer in self.layers if tapped else ():
            query, key, scale, _ = self.tap.kept[layer]
            if not packed:
                query, key = (take(t.transpose(1, 2), where).transpose(1, 2) for t in (query, key))
            visible = (seg != 3)[:, None, None, :]
            self.maps.append(attention_map(query, key, scale, visible, batch.get("rows"), self.matched))
        if tapped:
            self.tap.kept = {}
        ends = pick(hidden, last)
        with torch.autocast(ends.device.type, enabled=False):  # bf16 logits tie often: the head stays in fp32
            head = self.stock.score
            return F.linear(ends.float(), head.weight.float(), head.bias).squeeze(-1)


# -------------------------------------------------------------------------------------------------------- teacher

class InteractionTeacher(nn.Module):
    """A stock bidirectional encoder for token classification with one label, over both responses at once (E4).

    forward(batch of collate_teacher) -> verdict (B,), positive when it prefers chosen. With maps=True self.maps then
    lists the token maps (B, G, m, n) of `layers`, by the tap, or by output_attentions where the tap cannot show them
    (DeBERTa). With verdict=False the layers beyond may be left out, and the verdict be None: the whole method is 1.06 times
    as quick, where the teacher is 2.5 times its student. Raises UserError where neither can."""

    def __init__(self, stock, tokenizer, layers: tuple[int, ...] = (), matched: bool = False):
        super().__init__()
        self.stock, self.tokenizer, self.layers, self.matched = stock, tokenizer, layers, matched
        self.tap, self.maps, self.cache = None, [], None
        if layers:
            self.choose_tap()

    @torch.no_grad()
    def choose_tap(self) -> None:
        """The tap, if four tokens show in it what eager attention shows: no position bias (T5), no sink."""
        stock, seen, was = self.stock, [], self.stock.training
        try:
            taps = [None, AttentionTap(stock, self.layers)]
        except UserError:
            taps = [None]
        ids = torch.tensor([[5, 6, 7, 8]], device=stock.device)
        stock.eval()
        for self.tap in taps:
            stock.set_attn_implementation(TAP if self.tap else "eager")
            verdict = self(dict(ids=ids, mask=torch.ones_like(ids), seg=ids - 5), maps=True)
            seen.append(torch.cat([verdict, *(m.flatten() for m in self.maps)]))
        if not torch.allclose(seen[0], seen[-1], atol=1e-4):
            self.tap = None
            stock.set_attn_implementation("eager")
        self.maps = []
        stock.train(was)

    def forward(self, batch: dict[str, Tensor], maps: bool = False, verdict: bool = True) -> Tensor | None:
        inputs, seg = dict(input_ids=batch["ids"], attention_mask=batch["mask"]), batch["seg"]
        maps, out = maps and bool(self.layers), None
        if self.tap is not None:
            self.tap.stop = not verdict
        with self.tap if maps and self.tap is not None else nullcontext():
            out = self.stock(**inputs, **({"output_attentions": True} if maps and self.tap is None else {}))
        self.maps = [self.token_map(layer, out, batch) for layer in self.layers] if maps else []
        if self.tap is not None:
            self.tap.kept = {}
        if out is None:
            return None
        scalars = out.logits[..., 0].float()
        means = [(scalars * (seg == k)).sum(1) / (seg == k).sum(1).clamp_min(1) for k in (1, 2)]
        return means[0] - means[1]

    def read(self, examples: list[Example], swap: np.ndarray, W: int, attending: Tensor | None = None,
             fresh: bool = False, verdict: bool = True) -> tuple[Tensor | None, list[Tensor]]:
        """Verdict (B,), or None where it is not asked for, and word maps T (B, G, R, W) of pairs, (b, a) being read for
        (a, b) where swap (B,); from the cache, if there is one, unless fresh: where all is kept, about 1.6 times the pairs a
        second with a teacher 2.5 times its student."""
        if self.cache is not None and not fresh:
            return self.cache.read(self, examples, swap, W)
        batch, R = collate_teacher(examples, swap, self.tokenizer, self.stock.device), 0
        if attending is not None:
            batch, R = with_rows(batch, attending), attending.shape[1]
        v = self(batch, maps=True, verdict=verdict)
        return v, [pool_words(self.maps.pop(0), batch["word"], W, batch.get("row_word"), R) for _ in self.layers]

    @torch.no_grad()
    def token_map(self, layer: int, out, batch: dict[str, Tensor]) -> Tensor:
        rows = batch.get("rows")
        if self.tap is None:
            if not out.attentions:
                raise UserError(f"{type(self.stock).__name__} gives no attention maps; take another teacher")
            A = out.attentions[layer].float()
            if A.shape[-1] != batch["ids"].shape[1]:
                raise UserError(f"{type(self.stock).__name__} gives banded attention maps; take another teacher")
            A = A if self.matched else A.mean(1, keepdim=True)
            return A if rows is None else pick_rows(A, rows)
        query, key, scale, mask = self.tap.kept[layer]
        visible = batch["mask"].bool()[:, None, None, :]
        seen = visible if mask is None else visible & (mask if mask.dtype == torch.bool else mask == 0)
        # ModernBERT's local layers leave padding rows without a key: let them see all, or they turn into NaN
        return attention_map(query, key, scale, seen | ~seen.any(-1, keepdim=True), rows, self.matched)


# --------------------------------------------------------------------------------------------------------- losses

def bt_loss(r_c: Tensor, r_r: Tensor) -> Tensor:
    """Bradley-Terry, per pair (E2): (B,), (B,) -> (B,)."""
    return -F.logsigmoid(r_c - r_r)


def preference_loss(r_c: Tensor, r_r: Tensor, kind: str, flip_rate=0.0, margin=0.0, strength=None,
                    turns=False) -> Tensor:
    """BT and its variants against wrong labels, per pair: r_c, r_r, margin, strength (B,) -> (B,).

    margin: Llama 2 (arXiv 2307.09288), the same for the flipped label; margin = strength: arXiv 2401.06080, Eq. 6
    (printed there outside of log sigmoid, without gradient), where it changes sign with the label (turns). smooth:
    cDPO (Mitchell, "A note on DPO with noisy preferences", Eq. 3) = 2401.06080, Eq. 5. soft: the same where the
    ensemble doubts the label (2401.06080, 2.5). robust: arXiv 2403.00409; its mean over random flips is the clean
    loss, so one pair's can be negative, without bound."""
    as_labelled, flipped = bt_loss(r_c - margin, r_r), bt_loss(r_r + margin if turns else r_r - margin, r_c)
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


def pool_words(token_map: Tensor, word: Tensor, W: int, row_word: Tensor | None = None, R: int = 0) -> Tensor:
    """Token map (B, G, m, n) -> word map (B, G, R, W) (E5, arXiv 1906.04341); word (B, n) is the word of each attended
    token, row_word (B, m) of each attending one (none: the same, R = W); -1 = none.

    Sum over the tokens of the attended word, mean over those of the attending word; words without token: zeros. Two
    scatters: two matrix products with 0/1 members take 1.4 times as long at 150 tokens, 16 times at 8,192 (CPU)."""
    (B, G, m, n), (row_word, R) = token_map.shape, (word, W) if row_word is None else (row_word, R)
    at = (word + 1)[:, None, None].expand(B, G, m, n)  # place 0 takes what is no word
    columns = token_map.new_zeros(B, G, m, W + 1).scatter_add_(3, at, token_map)[..., 1:]
    at = (row_word + 1)[:, None, :, None].expand(B, G, m, W)
    sums = token_map.new_zeros(B, G, R + 1, W).scatter_add_(2, at, columns)[:, :, 1:]
    tokens = token_map.new_zeros(B, R + 1).scatter_add_(1, row_word + 1, token_map.new_ones(B, m))[:, 1:]
    return sums.div_(tokens.clamp_min(1)[:, None, :, None])


def segments_of(word_seg: Tensor, attending: Tensor | None) -> Tensor:
    """Segment of each attending word: word_seg (B, W), numbers (B, R) or none = all -> (B, R) or (B, W)."""
    return word_seg if attending is None else word_seg.gather(1, attending.clamp_min(0)).where(attending >= 0, -1)


def block_masks(word_seg: Tensor, support: str = "full", attending: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """word_seg (B, W) -> the block sets intra and inter (B, 1, R, W), rows for the attending words (B, R) (none: all,
    R = W). Support causal keeps what the student really attends."""
    number = torch.arange(word_seg.shape[1], device=word_seg.device)
    attending = number.expand_as(word_seg) if attending is None else attending
    s_i, s_j = segments_of(word_seg, attending)[:, None, :, None], word_seg[:, None, None, :]
    real, cross = (s_i >= 0) & (s_j >= 0), s_i + s_j == 3  # 1 and 2, or 2 and 1
    if support == "causal":
        return real & ~cross & (number <= attending[:, None, :, None]), torch.zeros_like(cross)
    return real & ~cross, cross


def row_divergence(T: Tensor, S: Tensor, block: Tensor, kind: str = "kl", eps: float = 1e-8) -> Tensor:
    """Word maps T, S (B, G, R, W), block (B, 1, R, W) -> (B, G, R), for each row renormalised inside the block:
    KL(T_i || S_i), or mse, the squared distance (VIRT, arXiv 2112.04195); 0 for rows without block."""
    T, S = (P.float() * block for P in (T, S))
    T, S = (P / P.sum(-1, keepdim=True).clamp_min(eps) for P in (T, S))
    rows = (T * ((T + eps).log() - (S + eps).log())).sum(-1) if kind == "kl" else (T - S).square().sum(-1)
    return rows * (T.sum(-1) > 0)  # a row that the teacher leaves empty (local layers) adds 0


def alignment_loss(T: Tensor, S: Tensor, block: Tensor, kind: str = "kl") -> Tensor:
    """Attentional alignment inside one block set (E6), per pair: the mean of row_divergence over the rows of the
    block and over G, (B, G, R, W) x 2, (B, 1, R, W) -> (B,). A pair without rows in the block gives 0. Some rows at a
    time, recomputed in the backward pass."""
    few = max(64, PIECE // S[:, :, 0].numel())
    pieces = zip(*(A.split(few, dim=2) for A in (T, S, block)))
    rows = torch.cat([checkpoint(row_divergence, *some, kind, use_reentrant=False,
                                 preserve_rng_state=False) for some in pieces], dim=2)
    return (rows.sum(-1) / block.any(-1).sum(-1).clamp_min(1)).mean(1)


def shuffle_rows(T: Tensor, row_seg: Tensor, seeds: list) -> Tensor:
    """Control: the rows of each map (B, G, R, W) permuted inside each segment (row_seg (B, R)), so that each keeps its
    distribution but belongs to another word."""
    order = np.tile(np.arange(T.shape[2]), (T.shape[0], 1))
    for b, (segments, seed) in enumerate(zip(row_seg.cpu().numpy(), seeds)):
        rng = np.random.default_rng(seed)
        for s in (0, 1, 2):
            at = np.flatnonzero(segments == s)
            order[b, at] = rng.permutation(at)
    return pick_rows(T, torch.from_numpy(order).to(T.device))


def distillation_losses(model: RewardModel, teacher: InteractionTeacher | None, examples: list[Example],
                        swap: np.ndarray, cfg: Config, device, seeds: list, progress: float = 1.0) -> dict[str, Tensor]:
    """Every term of L (E7) per pair, (B,) each: bt (or preference in its place), teacher (E4, where it co-trains),
    score, intra, inter, center, batch_sum, sft, and their weighted sum loss; also the rewards (B, 2). seeds: one for
    each pair; progress: 0 to 1. The maps of both models go as they are pooled."""
    batch, attending = collate(examples, model.stock.config.get_text_config().pad_token_id, device), None
    if 0 < cfg.align_max_tokens < batch["ids"].shape[1] and model.layers:
        attending = sample_words(examples, cfg.align_max_tokens, seeds).to(device)
        batch = with_rows(batch, attending)
    word_seg, W, R = batch["word_seg"], batch["word_seg"].shape[1], 0 if attending is None else attending.shape[1]
    targets = [None] * len(model.layers)
    if teacher is not None:  # before the student, whose activations would wait in memory
        asked = bool(cfg.lambda_score) or cfg.teacher_co_train or cfg.fsdp  # a sharded layer must end what it began
        with torch.set_grad_enabled(cfg.teacher_co_train):
            verdict, maps = teacher.read(examples, swap, W, attending, verdict=asked)
        targets = maps or targets
    rewards = model(batch)
    out = {"rewards": rewards.detach(), "bt": bt_loss(rewards[:, 0], rewards[:, 1])}
    out["loss"] = out["bt"]

    def add(name: str, term: Tensor, weight: float) -> None:  # weight 0: only logged
        out[name] = out.get(name, 0) + term.detach()
        out["loss"] = out["loss"] + weight * term if weight else out["loss"]

    if cfg.preference_loss != "bt" or cfg.margin_field != "none":
        given = {k: torch.tensor([getattr(e.pair, k) or 0.0 for e in examples], device=device)
                 for k in ("margin", "strength")}
        out["preference"] = preference_loss(rewards[:, 0], rewards[:, 1], cfg.preference_loss, cfg.flip_rate,
                                            given.get(cfg.margin_field, 0.0), given["strength"],
                                            cfg.margin_field == "strength")
        out["loss"] = out["preference"]
    if cfg.teacher_co_train:
        add("teacher", bt_loss(verdict, torch.zeros_like(verdict)), 1.0)
    if cfg.lambda_score:
        add("score", (rewards[:, 0] - rewards[:, 1] - verdict.detach()).square(), cfg.lambda_score)
    scale = {"constant": 1.0, "warmup": min(1.0, progress / 0.3), "decay": 1.0 - progress}[cfg.lambda_schedule]
    blocks = block_masks(word_seg, cfg.align_support, attending)
    for T in targets if model.maps else ():
        with torch.autocast(torch.device(device).type, enabled=False):
            S = pool_words(model.maps.pop(0), batch["word"], W, batch.get("row_word"), R)
            T = torch.ones_like(S) if cfg.align_target == "uniform" else T
            if cfg.align_target == "shuffled":
                T = shuffle_rows(T, segments_of(word_seg, attending), seeds)
            for name, weight, block in zip(("intra", "inter"), (cfg.lambda_intra, cfg.lambda_inter), blocks):
                add(name, alignment_loss(T, S, block, cfg.align_loss) / len(model.layers), weight * scale)
    if cfg.center_rewards:
        add("center", rewards.sum(1).square(), cfg.center_rewards)
    if cfg.batch_sum:  # (sum of 2B rewards)^2 / 4B, as in the authors' code; the same for every pair
        add("batch_sum", (len(rewards) * rewards.mean().square()).expand(len(rewards)), cfg.batch_sum)
    if cfg.lambda_sft:
        embedding = model.stock.get_input_embeddings().weight
        add("sft", sft_loss(model.hidden, batch["ids"], batch["seg"], embedding), cfg.lambda_sft)
    return out


# ----------------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def score_pairs(model: RewardModel, examples: list[Example], batch_size: int, device, amp,
                name: str = "") -> np.ndarray:
    """Rewards (N, 2) in fp32 of encoded pairs, in their order; only scalars are kept."""
    scores, was = np.full((len(examples), 2), -np.inf, dtype=np.float32), model.training
    model.eval()
    for index in shares(examples, batch_size, name):
        batch = collate([examples[i] for i in index], model.stock.config.get_text_config().pad_token_id, device)
        with amp():
            scores[index] = model(batch).float().cpu().numpy()
    model.train(was)
    return together(scores, device)


@torch.no_grad()
def teacher_verdicts(teacher: InteractionTeacher, examples: list[Example], batch_size: int, device, amp,
                     name: str = "") -> np.ndarray:
    """The teacher's verdict (N,), mean of both orders."""
    verdicts, was = np.full(len(examples), -np.inf, dtype=np.float32), teacher.training
    teacher.eval()
    for index in shares(examples, batch_size, name):
        some = [examples[i] for i in index]
        batches = [collate_teacher(some, np.full(len(some), s), teacher.tokenizer, device) for s in (False, True)]
        with amp():
            verdicts[index] = sum(teacher(b).float().cpu().numpy() for b in batches) / 2
    teacher.train(was)
    return together(verdicts, device)


def outcomes(margins):
    """1 for a positive margin, 0 for a negative one, ties half: (N,) -> (N,), arrays or tensors."""
    return (margins > 0) + 0.5 * (margins == 0)


def accuracy(margins: np.ndarray) -> float:
    """Share of positive margins (N,), ties counted as half."""
    return float(outcomes(margins).mean())


# ------------------------------------------------------------------------------------------------------- training

def make_optimizer(model: nn.Module, lr: float, decay: float) -> torch.optim.AdamW:
    """AdamW; decay on matrices only."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": decay},
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    # fused: a step over 17 million weights takes 10 ms in place of 62 (two CPU cores)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), fused=True)


def fit(run: Run, phase: int, model: nn.Module, examples: list[Example], losses, validate, save_best, lr: float,
        epochs: float, max_steps: int, device, amp) -> None:
    """The one training loop, of the teacher (phase 0) and the student (phase 1).

    losses(examples, indices, epoch, progress) -> dict of per-pair terms (B,) with "loss", and "rewards" (B, 2);
    validate() -> dict with "accuracy" and "loss"; save_best() writes the stock directory whenever validation accuracy
    (then loss) is the best so far. Raises UserError when the loss or its gradient is not finite."""
    cfg, name = run.cfg, ("teacher", "student")[phase]
    lengths = np.array([len(e.ids) for e in examples])
    per_epoch = math.ceil(len(examples) / cfg.batch_size)
    optimizer = make_optimizer(model, lr, cfg.weight_decay)
    total = max_steps or max(1, round(epochs * per_epoch))
    warm, every, plan = max(1, round(cfg.warmup * total)), cfg.eval_every or math.ceil(total / 2), []
    torch.manual_seed(cfg.seed + 10 + phase)  # dropout of the teacher
    done, best, skipped = run.restore(phase, model, optimizer)
    model.train()
    pbar = bar(None, name, total=total, initial=done, unit="step", leave=True)
    for step in range(done + 1, total + 1):
        epoch, at = divmod(step - 1, per_epoch)
        if at == 0 or not plan:  # a new epoch, or resumed inside one
            plan = plan_epoch(lengths, cfg.batch_size, cfg.seed + phase, epoch)
        began, index, sums = time.perf_counter(), plan[at], Counter()
        if WORLD > 1:  # each process draws its own dropout, a resumed run the same again
            torch.manual_seed(hash((cfg.seed, phase, step, RANK)))
        rate = lr * min(step / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / (total - warm + 1)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        parts = np.array_split(index[RANK::WORLD], min(cfg.grad_accum, math.ceil(len(index) / WORLD)))
        for k, part in enumerate(parts):
            if WORLD > 1:  # gradients travel once a step; sharded ones always, or each process would hold them whole
                model.set_requires_gradient_sync(cfg.fsdp or k == len(parts) - 1)
            some, weight = (part, 1.0) if len(part) else (index[:1], 0.0)  # no pair left: compute along, for nothing
            with amp():
                terms = losses([examples[i] for i in some], some, epoch, step / total)
            (weight * WORLD * terms["loss"].sum() / len(index)).backward()  # mean over the pairs of the whole step
            r = terms.pop("rewards").float()
            margin = r[:, 0] - r[:, 1]
            terms |= {"accuracy": outcomes(margin), "margin": margin, "reward_mean": r.mean(1),
                      "reward_std": r.square().mean(1)}  # a mean square until all are summed
            values = torch.stack([v.detach().float() for v in terms.values()]).cpu().double().sum(1)  # no MPS double
            sums.update(dict(zip(terms, (weight * values / len(index)).tolist())))
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        sums = summed(sums, device)
        sums["reward_std"] = max(0.0, sums["reward_std"] - sums["reward_mean"] ** 2) ** 0.5
        if math.isfinite(norm + sums["loss"]):
            optimizer.step()
        else:
            skipped += 1
            run.bad_batch(name, step, [examples[i].pair for i in index], skipped, sums["loss"], norm)
        optimizer.zero_grad(set_to_none=True)
        pbar.update()
        pbar.set_postfix({k: f"{sums[k]:.3f}" for k in sums if k[:6] not in ("reward", "margin")}, refresh=False)
        if step % cfg.log_every == 0 or step == total:
            run.log(phase=name, step=step, **sums, lr=rate, grad_norm=norm,
                    pairs_per_s=len(index) / (time.perf_counter() - began))
        due = step % every == 0 or step == total
        if due:
            value = validate()
            run.log(phase=name, step=step, **{"val_" + k: v for k, v in value.items()})
            pbar.write(f"{name} step {step}: " + ", ".join(f"validation {k} {v:.4f}" for k, v in value.items()))
            if [value["accuracy"], -value["loss"]] > best:
                best = [value["accuracy"], -value["loss"]]
                save_best()
        stop = run.agreed_stop(device)
        if (step % cfg.save_every == 0 if cfg.save_every else due) or stop or step == total:
            run.checkpoint(phase, step, model, optimizer, best=best, skipped=skipped)
        if stop:
            pbar.close()
            run.leave(f"{name} step {step} of {total}", stop)
    run.rest = f"{name} step {total} of {total}"
    pbar.close()
    barrier()


def scored_at_once(cfg: Config) -> int:
    """Pairs a batch of each process where no gradient is kept: twice those of training."""
    return max(1, 2 * cfg.batch_size // (cfg.grad_accum * WORLD))


def train_teacher(run: Run, teacher: InteractionTeacher, examples, validation, swaps, device, amp) -> None:
    """Fine-tunes the teacher on E4; the best by validation accuracy is RUN/teacher."""
    cfg, tokenizer = run.cfg, teacher.tokenizer

    def losses(part, index, epoch, progress):
        v = teacher(collate_teacher(part, swaps(index, epoch), tokenizer, device))
        return {"loss": bt_loss(v, torch.zeros_like(v)), "rewards": torch.stack([v, -v], 1).detach() / 2}

    def validate():
        v = teacher_verdicts(teacher, validation, scored_at_once(cfg), device, amp)
        return {"accuracy": accuracy(v), "loss": float(np.logaddexp(0, -v).mean())}

    fit(run, 0, teacher, examples, losses, validate, lambda: run.save_model(teacher, tokenizer, "teacher"),
        cfg.teacher_lr, cfg.teacher_epochs, 0, device, amp)


def train_student(run: Run, model: RewardModel, tokenizer, teacher, examples, validation, swaps, device,
                  amp) -> None:
    """Trains the reward model on E7; the best by validation accuracy is RUN/student."""
    cfg = run.cfg

    def losses(part, index, epoch, progress):
        seeds = [[cfg.seed, epoch, int(i)] for i in index]
        return distillation_losses(model, teacher, part, swaps(index, epoch), cfg, device, seeds, progress)

    def validate():
        s = score_pairs(model, validation, scored_at_once(cfg), device, amp)
        return {"accuracy": accuracy(s[:, 0] - s[:, 1]), "loss": float(np.logaddexp(0, s[:, 1] - s[:, 0]).mean()),
                "reward_mean": float(s.mean()), "reward_std": float(s.std())}

    def save_best():
        run.save_model(model, tokenizer, "student")
        if cfg.teacher_co_train:
            run.save_model(teacher, teacher.tokenizer, "teacher-co-trained")  # a resumed run needs the other

    learners = nn.ModuleList([model, teacher]) if cfg.teacher_co_train else model
    fit(run, 1, learners, examples, losses, validate, save_best, cfg.lr, cfg.epochs, cfg.max_steps, device, amp)


def train(cfg: Config) -> dict:
    """One whole run: data, teacher, student, final table; returns what RUN/results.json holds. Raises UserError."""
    needs_teacher = check_config(cfg)
    device, amp = set_up_device(cfg)
    with Run(cfg) as run:
        return train_in(run, cfg, needs_teacher, device, amp)


def train_in(run: Run, cfg: Config, needs_teacher: bool, device, amp) -> dict:
    pairs, held_pairs, counts = read_all(cfg)
    trained = False  # a resumed student needs the teacher that was trained for it
    if needs_teacher:
        trained = cfg.resume and cfg.teacher_epochs > 0 and any(phase == 1 for phase, *_ in run.checkpoints())
        name = str(run.dir / "teacher") if trained else cfg.teacher
        teacher_stock, reader_tokenizer, room = load_teacher(name, cfg.seed)
    stock, tokenizer = load_student(cfg.model, cfg.seed, cfg.max_length, cfg.lambda_sft > 0)
    layers, matched = ((), ()), cfg.align_heads == "matched"
    if cfg.lambda_intra > 0 or cfg.lambda_inter > 0:
        layers = parse_layers(cfg.align_layers, attention_layers(stock),
                              teacher_stock.config.num_hidden_layers if needs_teacher else None)
    reads = layers[1] if cfg.align_target != "uniform" else ()  # whose maps the teacher shows
    bf16 = amp is not nullcontext  # so set_up_device says fp32
    home = "cpu" if cfg.fsdp and WORLD > 1 else device  # distribute moves each layer as it shards it
    whole = cfg.gradient_checkpointing or cfg.lambda_sft > 0  # what recomputes, or reads all tokens
    model = RewardModel(stock.to(home), cfg.encoding, layers[0], matched, whole)
    teacher = InteractionTeacher(teacher_stock.to(home), reader_tokenizer, reads, matched) if needs_teacher else None
    probe_student(model, cfg.model, cfg.max_length)
    check_teacher(cfg, model, teacher)
    if cfg.lora_rank:
        add_lora(stock, cfg.lora_rank)
    if cfg.gradient_checkpointing:
        recompute_activations(stock)
    encoder = Encoder(tokenizer, cfg.max_length, cfg.overlong, teacher.tokenizer if teacher else None,
                      min(room, 2 * cfg.max_length) if teacher else 0)
    examples, held = encode_all(encoder, pairs, held_pairs, counts)
    largest = max(sum(p.numel() for p in m.parameters()) for m in (model, teacher) if m is not None)
    started, teacher_accuracy = time.perf_counter(), {}
    run.begin(largest, "teacher" if needs_teacher else "student", counts)

    def swaps(index: np.ndarray, epoch: int) -> np.ndarray:  # the teacher's random order, seeded for each epoch
        return np.random.default_rng([cfg.seed, epoch, 12]).random(len(examples))[index] < 0.5

    if needs_teacher:
        if cfg.teacher_epochs > 0 and not trained:
            distribute(teacher, device, cfg.fsdp, bf16)
            train_teacher(run, teacher, examples, held["validation"], swaps, device, amp)
            teacher_stock = load_teacher(str(run.dir / "teacher"))[0].to(home)  # the best, from disk
            teacher = InteractionTeacher(teacher_stock, reader_tokenizer, reads, matched)
        teacher.eval().requires_grad_(cfg.teacher_co_train)
        teacher.cache = TeacherCache(cfg.cache_teacher, teacher, bf16) if cfg.cache_teacher else None
        if cfg.fsdp or cfg.teacher_co_train:  # a whole one that is frozen has nothing to share, and may stop midway
            distribute(teacher, device, cfg.fsdp, bf16)
        for name, part in held.items():
            v = teacher_verdicts(teacher, part, scored_at_once(cfg), device, amp, f"teacher: {name}")
            teacher_accuracy[name] = accuracy(v)
        report_teacher(teacher_accuracy["validation"], len(held["validation"]), cfg.teacher_co_train)
    distribute(model, device, cfg.fsdp, bf16)
    train_student(run, model, tokenizer, teacher, examples, held["validation"], swaps, device, amp)
    if needs_teacher and teacher.cache:
        teacher.cache.report(device)
    stock = load_student(str(run.dir / "student"))[0].to(home)  # the best, from disk
    model = model.around(stock)
    distribute(model, device, cfg.fsdp, bf16)
    results = {"method": cfg.method, "seed": cfg.seed, "seconds": round(time.perf_counter() - started, 1), "sets": {}}
    for name, part in held.items():
        s = score_pairs(model, part, scored_at_once(cfg), device, amp, f"student: {name}")
        results["sets"][name] = {"pairs": len(part), "student": accuracy(s[:, 0] - s[:, 1]),
                                 "ties": int((s[:, 0] == s[:, 1]).sum()), "teacher": teacher_accuracy.get(name),
                                 "longer": accuracy(longer_margins([e.pair for e in part])),
                                 "reward_mean": float(s.mean()), "reward_std": float(s.std())}
    run.write("results.json", results)
    return results


def main(argv: list[str] | None = None) -> None:
    cfg = parse_flags(Config, __doc__.split("\n")[0], argv)
    quiet()
    with errors_in_one_line(cfg.output_dir):
        if not cfg.model:
            return demo(cfg, train)
        results = train(cfg)
    print_table(results)
    print(f"\nreward model: {Path(cfg.output_dir) / 'student'}  (a stock AutoModelForSequenceClassification directory)")


if __name__ == "__main__":
    main()
