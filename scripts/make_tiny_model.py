#!/usr/bin/env python3
"""Pre-train the tiny base model that ships with peertune, on standard-library text that no peer of the demo holds.

    python scripts/make_tiny_model.py src/peertune/tiny

Writes a Llama-shaped model (bfloat16 safetensors, untied embeddings) and a byte-level BPE tokenizer with a chat
template. The work is a number of steps, not a time, and all randomness is seeded: the same files come out for the same
Python version (the standard library is the text), PyTorch build, kind of CPU and thread count. About 15 minutes on
one core. Nothing is downloaded.
"""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peertune.data.stdlib import load_stdlib
from peertune.seeds import derive_seed, torch_rng

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
ROLES = ("system", "user", "assistant", "tool")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def train_tokenizer(texts: Sequence[str], vocab_size: int = 2048, max_length: int = 512) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text encodes, and decodes to itself.

    Args:
        texts: documents to learn the merges from.
        vocab_size: tokens in all, special ones included (at least 256 bytes + 7 special tokens).
        max_length: longest sequence of the model it is for, tokens.
    """
    special = [PAD, BOS, EOS, *(f"<|{role}|>" for role in ROLES)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, bpe.token_to_id(BOS))],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=special[3:],
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def model_config(tokenizer: PreTrainedTokenizerFast, **shape: int) -> LlamaConfig:
    """The shipped shape, 1.4 million parameters; `shape` overrides fields of `LlamaConfig` (tests use a smaller)."""
    default = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    return LlamaConfig(
        **(default | shape),
        vocab_size=len(tokenizer),
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """Token ids of all texts one after the other, each as `<s> text </s>`: int64, shape [num_tokens]."""
    encoded = tokenizer(list(texts), verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, tokenizer.eos_token_id)])


def windows(ids: Tensor, context: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of windows, shape [batch_size, context].

    Each epoch cuts the text at another offset and deals the windows in another order.
    """
    epoch = 0
    while True:
        rng = torch_rng(seed, "pretrain", "windows", epoch)
        offset = int(torch.randint(context, (), generator=rng))
        num = (len(ids) - offset) // context
        if num < batch_size:
            raise ValueError(f"{len(ids)} tokens are too few for a batch of {batch_size} windows of {context}")
        rows = ids[offset : offset + num * context].view(num, context)
        for batch in torch.randperm(num, generator=rng)[: num - num % batch_size].view(-1, batch_size):
            yield rows[batch]
        epoch += 1


def learning_rate(step: int, num_steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then a cosine to 0 at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def train(
    config: LlamaConfig,
    ids: Tensor,
    *,
    num_steps: int,
    context: int = 256,
    batch_size: int = 8,
    peak_lr: float = 3e-3,
    seed: int = 0,
    log_every: int = 100,
) -> tuple[LlamaForCausalLM, list[float]]:
    """Pre-train from scratch: AdamW (0.9, 0.95), decay 0.1 on matrices, gradient clipped to norm 1, bfloat16 autocast.

    Args:
        config: shape of the model.
        ids: packed token ids, shape [num_tokens].
        num_steps: batches of `batch_size` windows of `context` tokens.
        log_every: steps between printed lines; 0 prints nothing.

    Returns:
        The model, float32, and the loss of each step in nats a token.
    """
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator only
        torch.manual_seed(derive_seed(seed, "pretrain", "weights"))
        model = LlamaForCausalLM(config)
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim > 1]
    norms = [p for p in parameters if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=peak_lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    losses: list[float] = []
    started = time.monotonic()
    batches = windows(ids, context, batch_size, seed)
    model.train()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, peak_lr, warmup=min(100, num_steps // 10 + 1))
        batch = next(batches)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if log_every and (step + 1) % log_every == 0:
            mean = sum(losses[-log_every:]) / log_every
            print(f"step {step + 1}/{num_steps}  loss {mean:.3f}  {time.monotonic() - started:.0f} s", flush=True)
    return model.eval(), losses


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, ids: Tensor, context: int = 256) -> float:
    """Mean loss in nats a token over all whole windows of `ids`, shape [num_tokens]."""
    rows = ids[: len(ids) // context * context].view(-1, context)
    losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in rows]
    return sum(losses) / len(losses)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write model (bfloat16), tokenizer, chat template and generation config into folder `out`."""
    model.generation_config.max_new_tokens = 64
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write the model and its tokenizer to")
    parser.add_argument("--steps", type=int, default=4400, help="training steps of 8 x 256 tokens")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; another number gives slightly other weights"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)

    rows, _ = load_stdlib("pretrain")
    texts = [row["text"] for row in rows]
    tokenizer = train_tokenizer(texts)
    config = model_config(tokenizer)
    ids = pack(tokenizer, texts)
    print(f"{len(texts)} files, {sum(map(len, texts)) / 1e6:.2f} M characters, {len(ids) / 1e6:.2f} M tokens")
    model, _ = train(config, ids, num_steps=options.steps)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters")
    save(model, tokenizer, options.out)

    model.float()  # measure what was saved, rounding included
    held_out: dict[str, list[str]] = {}
    for row in load_stdlib("test")[0]:
        held_out.setdefault(row["client"], []).append(row["text"])
    for group, group_texts in held_out.items():
        print(f"{group:20} held-out loss {evaluate(model, pack(tokenizer, group_texts)):.3f}")


if __name__ == "__main__":
    main()
