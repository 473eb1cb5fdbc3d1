#!/usr/bin/env python3
"""Memory of a training step, computed from the code itself: no GPU, no weights (fake tensors).

    python results/memory.py [--tokens 2048] [--gpus 8]      # one pair a GPU, bf16 autocast, the table of the main README

The forward pass of RewardModel with its tap runs on tensors without storage, and a hook adds up what autograd keeps for
the backward pass. The rest is arithmetic on the number of weights P (of one layer: P_l; embeddings and head: P_e).
Below the table: each term and the line of code that it comes from. Not in it: the teacher, word pooling, losses.
"""
import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForSequenceClassification

import idistill
from idistill import RewardModel

SIZES = {  # as published: layers, hidden, feed-forward, heads, key/value heads, vocabulary
    "0.1B (SmolLM2-135M)": (30, 576, 1536, 9, 3, 49152), "1B (Llama 3.2 1B)": (16, 2048, 8192, 32, 8, 128256),
    "8B (Llama 3.1 8B)": (32, 4096, 14336, 32, 8, 128256), "70B (Llama 3.1 70B)": (80, 8192, 28672, 64, 8, 128256)}

TERMS = {  # term -> where it comes from: file, text of the line
    "weights fp32, 4 P, / GPUs with --fsdp": ("data_prep.py", "AutoModelForSequenceClassification, name, config=config, dtype=torch.float32"),
    "gradients fp32, 4 P, / GPUs with --fsdp": ("idistill.py", ".backward()"),
    "AdamW moments fp32, 8 P, / GPUs with --fsdp": ("idistill.py", "return torch.optim.AdamW("),
    "with --fsdp, gathered layers bf16, 4 P_l: the one at work and the next": ("data_prep.py", "MixedPrecisionPolicy(param"),
    "with --fsdp, the gradient of a layer bf16 and its fp32 sum over the processes, 6 P_l": ("data_prep.py", "reduce_dtype=torch.float32"),
    "with --fsdp, gathered embeddings and head fp32, their gradient and its sum, 12 P_e": ("data_prep.py", "fully_shard(model, mesh"),
    "kept for backward, measured; bf16 copies of the matrices, made by autocast, are in it": ("idistill.py", "self.stock.base_model("),
    "of that, the tap, measured: K in fp32 for each head of Q (Q is kept anyway); a map goes when it is pooled": ("idistill.py", "ctx.save_for_backward(Q, K, mask)")}


def kept(model: RewardModel, n: int) -> int:
    """Bytes that autograd keeps for the backward pass of one packed pair of n tokens, weights left out."""
    own, seen = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(t):
        if t.untyped_storage()._cdata not in own:
            seen[t.untyped_storage()._cdata] = (t.untyped_storage().nbytes(), t)  # the reference keeps its name unique
        return t

    seg = torch.zeros(1, n, dtype=torch.long)
    seg[:, n // 2:], seg[:, 3 * n // 4:] = 1, 2
    batch = dict(ids=seg, seg=seg, pos=seg, last=torch.full((1, 2), n - 1), word=seg)
    idistill.two_rows = lambda _: (seg, seg.new_zeros(2, 3 * n // 4), None)  # of fake tensors only the shapes are known
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16):
        model(batch)
    return sum(size for size, _ in seen.values())


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--tokens", type=int, default=2048)
    ap.add_argument("--gpus", type=int, default=8)
    args = ap.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print("| student | weights, gradients, moments | kept for backward | with checkpointing | of that, the tap | one GPU | one GPU, checkpointing "
          f"| --fsdp, {args.gpus} GPUs, checkpointing |\n|---|---|---|---|---|---|---|---|")
    for name, (layers, hidden, ff, heads, kv, vocabulary) in SIZES.items():
        with FakeTensorMode():
            stock = LlamaForSequenceClassification(LlamaConfig(
                num_hidden_layers=layers, hidden_size=hidden, intermediate_size=ff, num_attention_heads=heads, num_key_value_heads=kv,
                vocab_size=vocabulary, num_labels=1, pad_token_id=0, max_position_embeddings=args.tokens))
            P, P_l = (sum(p.numel() for p in m.parameters()) for m in (stock, stock.model.layers[0]))
            P_e = P - layers * P_l
            plain = kept(RewardModel(stock), args.tokens)
            tapped = RewardModel(stock, layers=(layers - 1,))
            tap = kept(tapped, args.tokens) - plain
            stock.train().gradient_checkpointing_enable({"use_reentrant": False})
            tapped.whole = True
            checkpointed = kept(tapped, args.tokens) + plain // layers  # and one layer at a time, computed again
        fixed = 16 * P
        cells = [fixed, plain + tap, checkpointed, tap, fixed + plain + tap, fixed + checkpointed,
                 fixed / args.gpus + 10 * P_l + 12 * P_e + checkpointed]
        print(f"| {name} | " + " | ".join(f"{c / 2**20:.0f} MiB" if c == tap else f"{c / 2**30:.1f} GiB" for c in cells) + " |")
    print("\nP weights, P_l of one layer, P_e of embeddings and head")
    for term, (file, text) in TERMS.items():
        lines = (Path(__file__).resolve().parent.parent / file).read_text().splitlines()
        print(f"{term}: {file}:{next(k for k, line in enumerate(lines, 1) if text in line)}")


if __name__ == "__main__":
    main()
