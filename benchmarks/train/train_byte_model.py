"""Train a small Llama on source text, byte by byte: attention that means something.

The text is the Python standard library of the interpreter that runs this, split by
file into training and held-out text. Sequences grow from `--short` to `--length`
tokens for the last third of the time. The result is an ordinary HF folder, with the
held-out bytes in `held_out.txt` and the record of the training in `training.json`.

    python -m benchmarks.train.train_byte_model .cache/byte-model --minutes 40
"""

import argparse
import json
import random
import sys
import sysconfig
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import describe_run


def read_text(held_out_share: float) -> tuple[bytes, bytes]:
    """Training and held-out text; which files are held out does not change."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in root.rglob("*.py") if "site-packages" not in p.parts]
    texts = [p.read_bytes() for p in sorted(files)]
    random.Random(0).shuffle(texts)
    held_out = int(len(texts) * held_out_share)
    return b"\0".join(texts[held_out:]), b"\0".join(texts[:held_out])


def build(args) -> LlamaForCausalLM:
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 11 // 4,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        num_key_value_heads=args.num_heads // 2,
        head_dim=args.hidden_size // args.num_heads,
        max_position_embeddings=1 << 15,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def batch_of(text: torch.Tensor, length: int, tokens: int, generator) -> torch.Tensor:
    """[tokens // length, length + 1] token ids from random places."""
    count = max(tokens // length, 1)
    starts = torch.randint(len(text) - length - 1, (count,), generator=generator)
    return torch.stack([text[s : s + length + 1] for s in starts.tolist()]).long()


def loss_of(model, batch: torch.Tensor) -> torch.Tensor:
    logits = model(batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch[:, 1:].flatten()
    )


def train(args) -> dict:
    train_text, held_out = (
        torch.frombuffer(bytearray(t), dtype=torch.uint8) for t in read_text(0.05)
    )
    model = build(args)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(args.seed)
    started, step, seen, smooth = time.monotonic(), 0, 0, None
    while (done := (time.monotonic() - started) / (60 * args.minutes)) < 1:
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * warm * max(1 - done, 0.02)
        length = args.short if done < 2 / 3 else args.length
        batch = batch_of(train_text, length, args.batch_tokens, generator)
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, seen = step + 1, seen + batch[:, 1:].numel()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0:
            left = args.minutes * (1 - done)
            print(
                f"step {step}, {seen / 1e6:.1f} M tokens, loss {smooth:.3f} nats, "
                f"{left:.1f} min left",
                flush=True,
            )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        test = [
            loss_of(model, batch_of(held_out, args.length, args.length, generator))
            for _ in range(8)
        ]
    model.save_pretrained(args.folder)
    (args.folder / "held_out.txt").write_bytes(bytes(held_out.tolist()))
    return {
        "held_out_nats_per_byte": round(torch.stack(test).mean().item(), 4),
        "steps": step,
        "tokens": seen,
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": {k: v for k, v in vars(args).items() if k != "folder"},
        **describe_run("transformers"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path)
    add("--minutes", type=float, default=40)
    add("--num-layers", type=int, default=8)
    add("--hidden-size", type=int, default=128)
    add("--num-heads", type=int, default=4)
    add("--short", type=int, default=512)
    add("--length", type=int, default=2048)
    add("--batch-tokens", type=int, default=8192)
    add("--learning-rate", type=float, default=2e-3)
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    record = train(args)
    (args.folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
