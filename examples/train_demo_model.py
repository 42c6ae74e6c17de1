"""Trains the demo model: a small Llama that looks up words in a list of key-value pairs.

    python examples/train_demo_model.py --output my-demo-model

Seeded; about half an hour on 2 CPU cores, a few minutes on a GPU. The model is trained on prompts of up to 256
tokens and writes an ordinary transformers folder. The recipe:

1. form    short lists, longer as accuracy rises, with repeated random strings mixed in: induction forms
2. train   lists that fill most of the window, many questions after each, single layers left out at random
3. settle  the same, every layer's RoPE factor drawn from U(1, 1.35) per batch and the learning rate going to
           zero: the model learns to bear scaled rotations, as far as its window goes
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_layerrope import KeyValueWords, LayerRopeConfig, evaluate
from peft_layerrope.tasks.kv import key_words, value_words

WINDOW = 256
LAYERS = 6
SPECIAL = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "?", ","]
PAD, BOS, EOS, UNK, QUESTION, SEPARATOR = range(len(SPECIAL))
KEYS, VALUES = key_words(), value_words()
FIRST_KEY, FIRST_VALUE = len(SPECIAL), len(SPECIAL) + len(KEYS)
PAIR = 4  # tokens: key value value ,
MOST_PAIRS = (WINDOW - 1 - PAIR) // PAIR
IGNORE = -100


@dataclass(frozen=True)
class Phase:
    """One stretch of training; one with a curriculum ends early, once lists fill the window."""

    name: str
    tokens: float
    batch_tokens: int
    first_lr: float
    last_lr: float
    fewest_pairs: int
    copying: float = 0.0
    curriculum: bool = False
    jitter: float = 1.0
    layer_drop: float = 0.0
    value_words: int = len(VALUES)


PHASES = (
    Phase("form", 6e6, 1024, 1.5e-3, 1.5e-3, 4, copying=0.3, curriculum=True, value_words=128),
    Phase("train", 4e6, 2048, 1.2e-3, 1e-3, 24, layer_drop=0.2),
    Phase("settle", 3e6, 4096, 1e-3, 0.0, 40, layer_drop=0.2, jitter=1.35),
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer: special tokens, keys, values; a prompt starts with [BOS]."""
    words = [*SPECIAL, *KEYS, *VALUES]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]", pad_token="[PAD]"
    )


def build_model(layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(KEYS) + len(VALUES),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
        initializer_range=0.08,  # at the usual 0.02 retrieval does not form
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def retrieval_batch(
    rng: np.random.Generator, rows: int, pairs: int, queries: int, value_words: int = len(VALUES)
) -> tuple[np.ndarray, np.ndarray]:
    """A list of pairs and questions about it; labels are the values asked for."""
    keys = np.argsort(rng.random((rows, len(KEYS))), axis=1)[:, :pairs]
    values = np.argsort(rng.random((rows, value_words)), axis=1)[:, : 2 * pairs].reshape(rows, pairs, 2)
    listing = np.concatenate(
        [FIRST_KEY + keys[..., None], FIRST_VALUE + values, np.full((rows, pairs, 1), SEPARATOR)], axis=2
    )
    if queries <= pairs:
        asked = np.argsort(rng.random((rows, pairs)), axis=1)[:, :queries]
    else:
        asked = rng.integers(0, pairs, (rows, queries))
    row = np.arange(rows)[:, None]
    answers = FIRST_VALUE + values[row, asked]
    questions = np.concatenate(
        [np.full((rows, queries, 1), QUESTION), FIRST_KEY + keys[row, asked][..., None], answers], axis=2
    )
    ids = np.concatenate([np.full((rows, 1), BOS), listing.reshape(rows, -1), questions.reshape(rows, -1)], axis=1)
    labels = np.full_like(ids, IGNORE)
    unlabeled = np.full((rows, queries, 2), IGNORE)
    labels[:, 1 + PAIR * pairs :] = np.concatenate([unlabeled, answers], axis=2).reshape(rows, -1)
    return ids, labels


def copying_batch(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Random words repeated with a random period. One fixed period would be copied by position instead."""
    words = rng.integers(FIRST_KEY, FIRST_VALUE + len(VALUES), (rows, WINDOW - 1))
    period = rng.integers(16, WINDOW // 2, (rows, 1))
    place = np.arange(WINDOW - 1)[None]
    repeated = np.take_along_axis(words, place % period, axis=1)
    ids = np.concatenate([np.full((rows, 1), BOS), repeated], axis=1)
    labels = np.concatenate([np.full((rows, 1), IGNORE), np.where(place > period, repeated, IGNORE)], axis=1)
    return ids, labels


class Curriculum:
    """The longest list of the first phase: grows while the model answers most questions right."""

    def __init__(self) -> None:
        self.longest = 6.0
        self.accuracy = 0.0

    def update(self, accuracy: float) -> None:
        self.accuracy += 0.02 * (accuracy - self.accuracy)
        if self.accuracy > 0.85:
            self.longest = min(MOST_PAIRS, self.longest + 0.15)


def draw_batch(rng: np.random.Generator, phase: Phase, curriculum: Curriculum) -> tuple[np.ndarray, np.ndarray, bool]:
    if rng.random() < phase.copying:
        return *copying_batch(rng, phase.batch_tokens // WINDOW), False
    most = int(curriculum.longest) if phase.curriculum else MOST_PAIRS
    fewest = max(phase.fewest_pairs, most // 2) if phase.curriculum else phase.fewest_pairs
    pairs = int(rng.integers(fewest, most + 1))
    room = (WINDOW - 1) // PAIR - pairs
    queries = min(room, pairs) if phase.curriculum else room
    rows = max(1, phase.batch_tokens // (1 + PAIR * (pairs + queries)))
    return *retrieval_batch(rng, rows, pairs, queries, phase.value_words), True


@contextmanager
def dropped_layers(model: LlamaForCausalLM, rng: np.random.Generator, probability: float) -> Iterator[None]:
    """LayerDrop (arXiv 1909.11556): leaves each layer out with this probability, but keeps two at least."""
    layers = model.model.layers
    kept = list(layers) if probability == 0 else []
    while len(kept) < 2:
        kept = [layer for layer in layers if rng.random() >= probability]
    model.model.layers = torch.nn.ModuleList(kept)
    try:
        yield
    finally:
        model.model.layers = layers


def train(model: LlamaForCausalLM, seed: int, device: str, scale: float = 1.0) -> None:
    """Runs all phases; `scale` shortens them for a trial.

    Raises:
        RuntimeError: retrieval did not form in the first phase, which depends on the seed.
    """
    rng = np.random.default_rng(seed)
    roped = get_peft_model(model, LayerRopeConfig())
    model.requires_grad_(True)  # PEFT froze them
    layers = model.config.num_hidden_layers
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    curriculum, started, total = Curriculum(), time.time(), 0
    roped.train()
    for phase in PHASES:
        done, step, budget = 0, 0, phase.tokens * scale
        while done < budget and not (phase.curriculum and curriculum.longest == MOST_PAIRS):
            warmup = min(1.0, (total + 1024) / 2e5)
            rate = warmup * (phase.first_lr + (phase.last_lr - phase.first_lr) * done / budget)
            for group in optimizer.param_groups:
                group["lr"] = rate
            factors = rng.uniform(1.0, phase.jitter, layers) if phase.jitter > 1 else np.ones(layers)
            roped.base_model.set_layer_factors(factors.tolist())
            ids, labels, is_retrieval = draw_batch(rng, phase, curriculum)
            with dropped_layers(model, rng, phase.layer_drop):
                logits = roped(torch.from_numpy(ids).to(device)).logits[:, :-1]
            targets = torch.from_numpy(labels).to(device)[:, 1:]
            wanted = targets != IGNORE
            loss = cross_entropy(logits[wanted].float(), targets[wanted])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if is_retrieval:
                curriculum.update((logits[wanted].argmax(-1) == targets[wanted]).float().mean().item())
            done, step, total = done + ids.size, step + 1, total + ids.size
            if step % 100 == 0:
                speed = total / (time.time() - started)
                print(
                    f"{phase.name:7} {total / 1e6:5.2f}M tokens  lists up to {curriculum.longest:.0f}  "
                    f"accuracy {curriculum.accuracy:.3f}  loss {loss.item():.3f}  {speed:,.0f} tokens/s",
                    flush=True,
                )
        if phase.curriculum and scale == 1.0 and curriculum.longest < MOST_PAIRS:
            raise RuntimeError(
                f"retrieval did not form in {total / 1e6:.1f}M tokens (lists of {curriculum.longest:.0f} of "
                f"{MOST_PAIRS} pairs, accuracy {curriculum.accuracy:.2f}): try another --seed than {seed}."
            )
    roped.unload()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the training to do, for a quick trial")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order: the same run every time; matrices this small gain little from more
    tokenizer = build_tokenizer()
    model = build_model(args.layers, args.seed).to(args.device)
    train(model, args.seed, args.device, args.scale)
    args.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.output)
    (args.output / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(args.output)
    inside = evaluate(model, KeyValueWords(tokenizer, WINDOW), split="validation", num_groups=100)
    print(f"accuracy inside the window (validation split): {100 * inside.average().value:.1f} %")


if __name__ == "__main__":
    main()
