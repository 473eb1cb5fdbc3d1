#!/usr/bin/env python3
"""What the two shortcuts of a packed row buy, by length: its attention as two causal rows, the final layer at two tokens.

    python results/long.py [--json results/speed_long.json]      # forward and backward, Llama 256 x 4, interleaved, five rounds
"""
import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from data_prep import bar, write_json
from idistill import RewardModel, bt_loss

LENGTHS = {(50, 50, 50): 16, (256, 128, 128): 8, (400, 100, 100): 8, (512, 256, 256): 4, (768, 384, 384): 2, (1024, 512, 512): 2,
           (2048, 1024, 1024): 1, (4096, 2048, 2048): 1}  # tokens of x, y_c, y_r -> pairs
ARMS = {"neither": (math.inf, True), "causal rows": (0, True), "final layer": (math.inf, False), "both": (0, False)}  # long, whole


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--json", metavar="OUT")
    ap.add_argument("--rounds", type=int, default=5)
    args, out = ap.parse_args(), {}
    torch.manual_seed(0)
    model = RewardModel(LlamaForSequenceClassification(LlamaConfig(
        hidden_size=256, num_hidden_layers=4, intermediate_size=1024, num_attention_heads=4, vocab_size=49152,
        max_position_embeddings=2**15, pad_token_id=0, num_labels=1)))
    for (x, c, r), B in LENGTHS.items():
        batch = dict(seg=torch.repeat_interleave(torch.arange(3), torch.tensor([x, c, r])).expand(B, -1),
                     pos=torch.cat([torch.arange(x + c), torch.arange(x, x + r)]).expand(B, -1),
                     last=torch.tensor([x + c - 1, x + c + r - 1]).expand(B, -1))
        batch["ids"], seconds, losses = torch.randint(5, 49152, batch["seg"].shape), {arm: [] for arm in ARMS}, []
        for _ in bar(range(args.rounds + 1), f"{x + c + r} tokens"):
            for arm, (model.long, model.whole) in ARMS.items():
                began = time.perf_counter()
                losses.append(bt_loss(*model(batch).T).sum())
                losses[-1].backward()
                seconds[arm].append(time.perf_counter() - began)
        if max(losses) - min(losses) > 1e-3:
            raise SystemExit("they do not compute the same")
        out[x + c + r] = {}
        for arm in list(ARMS)[1:]:
            ratios = np.divide(seconds["neither"], seconds[arm])[1:]  # round 0 warmed up
            out[x + c + r][arm] = {"ratio": float(np.median(ratios)), "ratios": ratios.tolist()}
            print(f"{x + c + r} tokens a pair, {arm}: {np.median(ratios):.2f} [{ratios.min():.2f}, {ratios.max():.2f}] times as quick")
    if args.json:
        write_json(args.json, {"tokens": out, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
