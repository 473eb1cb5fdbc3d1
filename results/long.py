#!/usr/bin/env python3
"""An idea for long pairs that is not in idistill.py: in the attention alone, a packed row [x | y_c | y_r] becomes the two
causal rows [x | y_c] and [x | y_r], whose kernel skips what is masked, as it cannot under the tree mask; all else stays packed.

    python results/long.py [--json results/speed_long.json]      # forward and backward, Llama 256 x 4, interleaved, five rounds
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForSequenceClassification
from transformers.masking_utils import AttentionMaskInterface

from data_prep import bar, write_json
from idistill import tree_mask

LENGTHS = {(50, 50, 50): 16, (400, 100, 100): 8, (1024, 512, 512): 2, (2048, 1024, 1024): 1, (4096, 2048, 2048): 1}  # pairs


def places(seg: torch.Tensor, pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(where (B n,) each packed token lies in the two flat rows of its pair, source (2 B m,) the packed token at each
    place, m the length of those rows)."""
    (B, n), m, pair = seg.shape, int(pos.max()) + 1, torch.arange(len(seg))[:, None]
    source, flat = torch.zeros(2 * B * m, dtype=torch.long), torch.arange(B * n).view(B, n)
    for k, own in ((0, seg < 2), (1, (seg == 0) | (seg == 2))):
        source[((pair + k * B) * m + pos)[own]] = flat[own]
    return (torch.where(seg == 2, pair + B, pair) * m + pos).flatten(), source, m


def causal_rows(module, query, key, value, attention_mask, scaling=None, **kwargs):
    (B, H, n, d), (where, source, m) = query.shape, causal_rows.places

    def rows(t):
        return t.transpose(1, 2).reshape(B * n, -1, d).index_select(0, source).view(2 * B, m, -1, d).transpose(1, 2)

    out = F.scaled_dot_product_attention(rows(query), rows(key), rows(value), is_causal=True, scale=scaling)
    return out.transpose(1, 2).reshape(2 * B * m, H, d).index_select(0, where).view(B, n, H, d), None


AttentionInterface.register("rows", causal_rows)
AttentionMaskInterface.register("rows", lambda *args, **kwargs: None)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--json", metavar="OUT")
    ap.add_argument("--rounds", type=int, default=5)
    args, out = ap.parse_args(), {}
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(
        hidden_size=256, num_hidden_layers=4, intermediate_size=1024, num_attention_heads=4, vocab_size=49152,
        max_position_embeddings=2**15, pad_token_id=0, num_labels=1))
    for (x, c, r), B in LENGTHS.items():
        seg = torch.repeat_interleave(torch.arange(3), torch.tensor([x, c, r])).expand(B, -1)
        pos = torch.cat([torch.arange(x + c), torch.arange(x, x + r)]).expand(B, -1)
        ids, causal_rows.places = torch.randint(5, 49152, seg.shape), places(seg, pos)

        def hidden(arm: str) -> torch.Tensor:
            model.set_attn_implementation({"mask": "sdpa", "rows": "rows"}[arm])
            mask = tree_mask(seg) if arm == "mask" else None
            return model.base_model(ids, attention_mask=mask, position_ids=pos, use_cache=False).last_hidden_state

        with torch.no_grad():
            if not torch.allclose(hidden("mask"), hidden("rows"), atol=1e-4):
                raise SystemExit("the two do not compute the same")
        seconds = {"mask": [], "rows": []}
        for _ in bar(range(args.rounds + 1), f"{x + c + r} tokens"):
            for arm, times in seconds.items():
                began = time.perf_counter()
                hidden(arm).square().sum().backward()
                times.append(time.perf_counter() - began)
        ratios = np.divide(seconds["mask"], seconds["rows"])[1:]  # round 0 warmed up
        out[x + c + r] = {"ratio": float(np.median(ratios)), "ratios": ratios.tolist()}
        print(f"{x + c + r} tokens a pair: causal rows {np.median(ratios):.2f} [{ratios.min():.2f}, {ratios.max():.2f}] "
              "times as quick as the tree mask")
    if args.json:
        write_json(args.json, {"tokens": out, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
