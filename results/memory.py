#!/usr/bin/env python3
"""Memory a GPU of one training step, computed from the code: needs no GPU and no weights.

    python results/memory.py [--tokens 2048]      # one pair a GPU, bf16 autocast

One step of RewardModel and its losses runs forward and backward on fake tensors, which have a
shape and no storage, while the bytes of all that live are counted. The rest is arithmetic on the
number of weights P, of one layer P_l, of embeddings and head P_e:

    16 P      weights, gradients and both moments of AdamW, in fp32; --fsdp divides it by the GPUs
    10 P_l    with --fsdp: the layer at work and the next one gathered in bf16, the gradient of a
              layer in bf16 and its sum over the GPUs in fp32
    12 P_e    with --fsdp: embeddings and head gathered in fp32, their gradient and its sum

Not in it: the teacher, whose weights take 4 bytes each and whose forward pass keeps nothing.
"""

import argparse
import sys
import warnings
import weakref
from pathlib import Path

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForSequenceClassification, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from idistill import Config, RewardModel, pool_words, set_up_device, total_loss

SIZES = {  # as published: layers, hidden, feed-forward, heads, key/value heads, vocabulary
    "0.1B (SmolLM2-135M)": (30, 576, 1536, 9, 3, 49152),
    "1B (Llama 3.2 1B)": (16, 2048, 8192, 32, 8, 128256),
    "8B (Llama 3.1 8B)": (32, 4096, 14336, 32, 8, 128256),
    "70B (Llama 3.1 70B)": (80, 8192, 28672, 64, 8, 128256),
}
COLUMNS = (
    *("student", "weights, gradients, moments", "the rest, plain BT", "the rest, whole method"),
    *("the rest, --gradient-checkpointing", "one GPU", "one GPU, checkpointing"),
    *("--fsdp, 8 GPUs, checkpointing", "64 GPUs"),
)


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the with block, while they live."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.counted = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor):
                self.count(t.untyped_storage())
        return out

    def count(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.counted:
            self.counted.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.counted.remove(key)
        self.now -= size


def build(size: tuple[int, ...], tokens: int):
    """A student of this size, without gradients to keep: 16 P counts those."""
    layers, hidden, feed_forward, heads, kv_heads, vocabulary = size
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=tokens,
        pad_token_id=0,
        num_labels=1,
    )
    stock = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    stock.get_input_embeddings().requires_grad_(False)
    for p in filter(lambda p: p.requires_grad, stock.parameters()):
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return stock.train()


def peak_of_step(stock, tokens: int, layers: tuple[int, ...], amp) -> int:
    """Most bytes that live in one step on one pair, beside weights and gradients.

    Args:
        stock: the student; tokens: of the pair, packed.
        layers: those that are aligned; none for plain BT.
        amp: amp() is the autocast of the forward pass.
    """
    W = 3 * tokens // 4  # words
    zeros = torch.zeros(1, tokens, dtype=torch.long)
    batch = dict.fromkeys(("ids", "seg", "pos", "word"), zeros)
    batch["last"] = torch.zeros(1, 2, dtype=torch.long)
    word_seg = torch.zeros(1, W, dtype=torch.long)
    with PeakBytes() as bytes_of:
        with amp():
            rewards, maps = RewardModel(stock)(batch, layers)
            S = [pool_words(token_map, batch["word"], W) for token_map in maps]
            T = [torch.zeros_like(word_map) for word_map in S]
            loss = total_loss(rewards, S, T, word_seg)["loss"].mean()
        loss.backward()
    return bytes_of.peak


def row_of(size: tuple[int, ...], tokens: int) -> list[float]:
    """The numbers of a row, in bytes."""
    _, amp = set_up_device(Config(device="cpu", dtype="bf16"))
    with FakeTensorMode():
        stock = build(size, tokens)
        P, P_l = (sum(p.numel() for p in m.parameters()) for m in (stock, stock.model.layers[0]))
        plain, method = (peak_of_step(stock, tokens, layers, amp) for layers in ((), (-1,)))
        stock.gradient_checkpointing_enable({"use_reentrant": False})
        checkpointed = peak_of_step(stock, tokens, (-1,), amp)
    gathered = 10 * P_l + 12 * (P - size[0] * P_l)
    one_gpu = [16 * P + method, 16 * P + checkpointed]
    several = [16 * P / gpus + gathered + checkpointed for gpus in (8, 64)]
    return [16 * P, plain, method, checkpointed, *one_gpu, *several]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tokens", type=int, default=2048, help="of the pair (default: 2048)")
    tokens = parser.parse_args().tokens
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for name, size in SIZES.items():
        cells = [f"{value / 2**30:.1f} GiB" for value in row_of(size, tokens)]
        print("| " + " | ".join([name, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
