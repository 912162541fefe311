"""Train a small Llama to look things up, and export it for vLLM.

    python -m benchmarks.train.train_small_model OUT                on a GPU: minutes
    python -m benchmarks.train.train_small_model OUT --steps 40000  the same run, longer

A run that was stopped goes on where it was when the command is repeated. OUT becomes a
normal Hugging Face folder, with training.json (seed, steps, data, dense scores) and
calibration.jsonl, whose questions the model has not seen:

    tidal-vllm calibrate OUT --prompts OUT/calibration.jsonl --max-loss 0.02

NOTE: not yet run on a GPU. Two CPU cores see 6,000 tokens a second with 3.3 M
parameters, and had learnt no retrieval after 7 M tokens.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.machine import describe_run
from benchmarks.train.small_model_tasks import (
    BOS,
    BYTES,
    EOS,
    PAD,
    TASKS,
    VOCAB_SIZE,
    Text,
    make_batch,
    make_question,
    token_names,
)

TEXT_BYTES = 16 << 20
TEXT_WEIGHT = 0.1  # of a source text token's loss; an answer's is 1
MOST_BYTES = 8 << 20  # of a checkpoint that is kept
GOOD_SCORE = 0.95  # on every dense task
QUESTIONS = 64  # per task and context, for the scores
HELD_OUT = 1 << 40  # first batch number that training never reaches


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("out", type=Path, help="model folder; checkpoints go to OUT.training")
    add("--steps", type=int, default=20_000)
    add(
        "--contexts",
        type=int,
        nargs="+",
        default=[256, 512, 1024, 2048, 4096],
        help="curriculum, an equal share of the steps each (default: %(default)s)",
    )
    add("--batch-tokens", type=int, default=1 << 16)
    add("--layers", type=int, default=10)
    add("--hidden", type=int, default=192)
    add("--heads", type=int, default=6)
    add("--kv-heads", type=int, default=2)
    add("--learning-rate", type=float, default=1.5e-3)
    add("--seed", type=int, default=0)
    add("--text", type=Path, help="folder of .py files (default: Python's library)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--save-seconds", type=float, default=60, help="between two checkpoints")
    add("--stop-after", type=int, help="stop at this step, as an interruption would")
    add("--questions", type=int, default=QUESTIONS, help="per task and context")
    given = parser.parse_args()
    for key in ("steps", "batch_tokens", "layers", "hidden", "heads", "questions"):
        if getattr(given, key) < 1:
            parser.error(f"--{key.replace('_', '-')} must be 1 or more")
    if given.hidden % given.heads or given.heads % given.kv_heads:
        parser.error("--heads must divide --hidden and be a multiple of --kv-heads")
    if min(given.contexts) < 128 or any(n % 8 for n in given.contexts):
        parser.error("--contexts must be multiples of 8, at least 128")
    if given.out.exists() and not (given.out / "training.json").exists():
        parser.error(f"{given.out} exists and was not made by this script")
    return given


def build_model(given: argparse.Namespace):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(given.seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=given.hidden,
        intermediate_size=given.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=given.layers,
        num_attention_heads=given.heads,
        num_key_value_heads=given.kv_heads,
        head_dim=given.hidden // given.heads,
        max_position_embeddings=2 * max(given.contexts),
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class Training:
    """A run: the model, its optimizer and the step it is at."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.step, self.seconds = given, 0, 0.0
        self.text = Text.load(given.text, TEXT_BYTES)
        self.model = build_model(given).to(given.device)
        groups = [
            {"params": [p for p in self.model.parameters() if p.dim() > 1]},
            {
                "params": [p for p in self.model.parameters() if p.dim() < 2],
                "weight_decay": 0.0,
            },
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=given.learning_rate, betas=(0.9, 0.98), weight_decay=0.05
        )
        self.checkpoint = Path(f"{given.out}.training", "state.pt")
        if self.checkpoint.exists():
            self._resume()

    @property
    def identity(self) -> dict:
        """What a resumed run must share with the one that was stopped."""
        names = ("contexts", "batch_tokens", "layers", "hidden", "heads", "kv_heads")
        names += ("learning_rate", "seed", "steps")
        return {name: getattr(self.given, name) for name in names} | self.text.about

    def context(self, step: int) -> int:
        contexts = self.given.contexts
        return contexts[
            min(step * len(contexts) // self.given.steps, len(contexts) - 1)
        ]

    def learning_rate(self, step: int) -> float:
        warm_up = min(200, self.given.steps // 10 + 1)
        if step < warm_up:
            return self.given.learning_rate * (step + 1) / warm_up
        done = (step - warm_up) / max(self.given.steps - warm_up, 1)
        return self.given.learning_rate * (
            0.05 + 0.475 * (1 + math.cos(math.pi * done))
        )

    def run(self) -> bool:
        """Train to the end, or to --stop-after; says whether that was the end."""
        given = self.given
        last = min(given.steps, given.stop_after or given.steps)
        saved = time.monotonic()
        with tqdm(total=given.steps, initial=self.step, unit="step") as bar:
            for batch in self._batches(last):
                started = time.monotonic()
                loss, right = self._train(*batch)
                self.seconds += time.monotonic() - started
                bar.update()
                bar.set_postfix(
                    context=self.context(self.step - 1),
                    loss=f"{loss:.3f}",
                    answers=f"{right:.1%}",
                )
                if time.monotonic() - saved > given.save_seconds:
                    self.save()
                    saved = time.monotonic()
        self.save()
        return self.step == given.steps

    def _batches(self, last: int):
        """Batches from the current step on, made ahead on a GPU's host cores."""
        workers = min(8, (os.cpu_count() or 1) - 1) if self.given.device != "cpu" else 0
        dataset = _Batches(self, last)
        yield from torch.utils.data.DataLoader(
            dataset,
            batch_size=None,
            sampler=range(self.step, last),
            num_workers=workers,
            pin_memory=workers > 0,
        )

    def _train(self, tokens: torch.Tensor, is_answer: torch.Tensor):
        given = self.given
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        tokens = tokens.to(given.device, non_blocking=True)
        is_answer = is_answer.to(given.device, non_blocking=True)[:, 1:]
        half = torch.autocast("cuda", torch.bfloat16, enabled=given.device != "cpu")
        with half:
            logits = self.model(input_ids=tokens[:, :-1]).logits.float()
        targets = tokens[:, 1:]
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none"
        ).view_as(targets)
        weights = torch.where(is_answer, 1.0, TEXT_WEIGHT)
        loss = (each * weights).sum() / weights.sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        right = (logits.argmax(-1) == targets)[is_answer].float().mean()
        return loss.item(), right.item()

    def save(self) -> None:
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.checkpoint.with_suffix(".new")
        state = {
            "identity": self.identity,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, scratch)
        os.replace(scratch, self.checkpoint)

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.given.device)
        theirs, ours = state["identity"], self.identity
        changed = sorted(k for k in ours if theirs.get(k) != ours[k])
        if changed:
            raise SystemExit(
                f"{self.checkpoint}: that run had other {', '.join(changed)}; repeat "
                "its command to resume it, or remove the folder"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        print(f"Resuming at step {self.step} of {self.given.steps}")


class _Batches(torch.utils.data.Dataset):
    """Batch number to tokens and answer mask."""

    def __init__(self, training: Training, last: int) -> None:
        self.text, self.seed = training.text, training.given.seed
        self.contexts = [training.context(step) for step in range(last)]
        self.batch_tokens = training.given.batch_tokens

    def __len__(self) -> int:
        return len(self.contexts)

    def __getitem__(self, number: int):
        length = self.contexts[number]
        rows = max(self.batch_tokens // length, 1)
        made = make_batch(self.text, self.seed, number, rows, length)
        return tuple(torch.from_numpy(array) for array in made)


def questions(given: argparse.Namespace, text: Text, context: int, task: str):
    """Held-out questions: prompt and answer token ids."""
    made = []
    for i in range(given.questions):
        key = [given.seed, HELD_OUT, i, context, TASKS.index(task)]
        prompt, answer = make_question(np.random.default_rng(key), text, context, task)
        made.append((prompt.tolist(), answer.tolist()))
    return made


@torch.inference_mode()
def dense_scores(training: Training) -> dict[str, dict[str, float]]:
    """Share of held-out questions whose whole answer is the likeliest, by context."""
    model, given = training.model.eval(), training.given
    scores: dict[str, dict[str, float]] = {task: {} for task in TASKS}
    for context in given.contexts:
        for task in TASKS:
            asked = questions(given, training.text, context, task)
            right = 0
            for prompt, answer in asked:
                ids = torch.tensor([prompt + answer[:-1]], device=given.device)
                logits = model(input_ids=ids).logits[0, -len(answer) :]
                right += logits.argmax(-1).tolist() == answer
            scores[task][str(context)] = right / len(asked)
    return scores


def export(training: Training) -> dict:
    """Write the model folder; returns what training.json says."""
    given, out = training.given, training.given.out
    scores = dense_scores(training)
    model = training.model.to(torch.bfloat16)
    model.config.use_cache = True
    model.save_pretrained(out)
    write_tokenizer(out, training)
    size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    about = {
        **training.identity,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": size,
        "tokens": sum(
            max(given.batch_tokens // training.context(s), 1) * training.context(s)
            for s in range(training.step)
        ),
        "training_seconds": round(training.seconds, 1),
        "device": given.device,
        "dense_scores": scores,
        "worth_keeping": size <= MOST_BYTES
        and all(min(of.values()) >= GOOD_SCORE for of in scores.values()),
        **describe_run("transformers"),
    }
    with (out / "calibration.jsonl").open("w") as lines:
        for task in TASKS:
            asked = questions(given, training.text, max(given.contexts), task)
            for prompt, answer in asked[: max(given.questions // 2, 1)]:
                line = {"prompt_token_ids": prompt, "answer_token_ids": answer}
                lines.write(json.dumps(line) + "\n")
    (out / "training.json").write_text(json.dumps(about, indent=2) + "\n")
    return about


def write_tokenizer(folder: Path, training: Training) -> None:
    """Bytes, and the other tokens by their names, such as `<k7>`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    ids = {char: byte for byte, char in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    names = token_names()
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    assert tokenizer.token_to_id(names[-1]) == VOCAB_SIZE - 1
    assert len(ids) == BYTES
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=training.model.config.max_position_embeddings,
    ).save_pretrained(folder)


def main() -> None:
    given = parse()
    training = Training(given)
    size = sum(p.numel() for p in training.model.parameters())
    print(f"{size / 1e6:.2f} M parameters on {given.device}", flush=True)
    try:
        if not training.run():
            print(f"Stopped at step {training.step}; repeat the command to go on")
            return
    except KeyboardInterrupt:
        training.save()
        print(f"\nStopped at step {training.step}; repeat the command to go on")
        raise SystemExit(130) from None
    about = export(training)
    for task, scores in about["dense_scores"].items():
        shown = "  ".join(f"{n}: {score:.1%}" for n, score in scores.items())
        print(f"{task:10} {shown}")
    verdict = "yes" if about["worth_keeping"] else "no"
    print(f"{about['weight_bytes'] / 2**20:.2f} MiB in {given.out}; keep: {verdict}")


if __name__ == "__main__":
    main()
