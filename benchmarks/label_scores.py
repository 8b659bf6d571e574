"""An evaluation of a classifier: its labels as one tree behind each prompt, or one label after the other.

    python benchmarks/label_scores.py [--threads 1] [--repeats 5] [--rows 200] [--steps 300] [--model FOLDER]

Of test rows, in batches of 32 as `evaluate` makes them: each one's likeliest label, and the score of its own. "one by
one" runs the prompts once and every label on their keys and values, for all rows. "bare": the model as it comes, whose
labels are all unlikely; "tuned": after so many steps of AdamW on training rows, 16 each. Of both ways' results,
"same_label" is the share of rows with the same likeliest label, "own_differs" the largest difference of an own label's
log p.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _harness import finish, ratio
from torch import Tensor

from peertune.config import DataSection, ModelSection
from peertune.data.batches import Batches
from peertune.data.load import load_table
from peertune.data.render import Sample, find_labels, render
from peertune.evaluation.label_scores import label_scores
from peertune.model.language_model import LanguageModel
from peertune.model.load import load_model, load_tokenizer
from peertune.prepare import held_out

SHARED = Path(os.environ.get("PEERTUNE_TEST_DATA") or Path(__file__).parents[2] / "shared")
CPU = torch.device("cpu")
MAX_LENGTH = 96
DTYPES: list[Any] = ["float32", "bfloat16"]
Scores = Any
"""A way to score a batch: samples -> log p [samples, labels]."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "english-4m")
    parser.add_argument("--data", nargs="+", default=["banking77", "20news", "agnews"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {**vars(options), "model": options.model.name}
    for name in options.data:
        trained = None
        for state in ("bare", "tuned"):
            for dtype in DTYPES:
                section = ModelSection(path=str(options.model), dtype=dtype, max_length=MAX_LENGTH)
                task = Task(name, section, options.rows)
                model = LanguageModel(load_model(section, CPU), section)
                if state == "tuned":
                    trained = trained or tuned(task, options.steps)
                    model.module.load_state_dict(trained)
                figures[f"{name}, {state}, {dtype}"] = measured(model, task, options.repeats)
    finish("label_scores", figures)


class Task:
    """Test rows of a data set as `evaluate` batches them, training rows, and labels."""

    def __init__(self, name: str, section: ModelSection, num_rows: int) -> None:
        config, self.section, tokenizer = DataSection(task="classification"), section, load_tokenizer(section)
        files = (str(SHARED / "data" / f"{name}{part}.jsonl.gz") for part in ("", "-test"))
        train, test = (load_table(file, config).rows for file in files)
        names = find_labels(train, config)
        held = held_out(test, config, tokenizer, section.max_length, names, limit=num_rows)
        self.train = render(train, config, tokenizer, section.max_length, names).samples
        self.labels, self.pad_id = held.labels, tokenizer.pad_token_id
        by_length = sorted(held.samples, key=lambda sample: len(sample.input_ids))
        self.batches = [by_length[start : start + 32] for start in range(0, len(by_length), 32)]


def tuned(task: Task, steps: int) -> dict[str, Tensor]:
    """The model's weights after so many steps, float32."""
    section = task.section.model_copy(update={"dtype": "float32"})
    model = LanguageModel(load_model(section, CPU).requires_grad_(True), section)
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=1e-3)
    batches = Batches(task.train, 16, seed=0, pad_id=task.pad_id)
    for _ in range(steps):
        optimizer.zero_grad()
        batch = batches.next()
        model.backward(batch, batch.num_targets)
        optimizer.step()
    return dict(model.module.state_dict())


def measured(model: LanguageModel, task: Task, repeats: int) -> dict[str, Any]:
    tree = partial(label_scores, model, pad_id=task.pad_id, labels=task.labels, only_likeliest=True)
    loose = partial(one_by_one, model, pad_id=task.pad_id, labels=task.labels)
    with model.evaluating():
        found, expected = (torch.cat([way(batch) for batch in task.batches]) for way in (tree, loose))
        work = {"tree": partial(each, tree, task.batches), "one by one": partial(each, loose, task.batches)}
        times = ratio(work, repeats, CPU, "tree", "one by one")
    own = torch.tensor([sample.label for batch in task.batches for sample in batch])[:, None]
    return {
        "labels": len(task.labels),
        "label_tokens": sum(map(len, task.labels)),
        "accuracy": float((expected.argmax(1) == own[:, 0]).double().mean()),
        "same_label": float((found.argmax(1) == expected.argmax(1)).double().mean()),
        "own_differs": float((found.gather(1, own) - expected.gather(1, own)).abs().max()),
        **times,
    }


def each(way: Scores, batches: list[list[Sample]]) -> None:
    for batch in batches:
        way(batch)


def one_by_one(model: LanguageModel, samples: list[Sample], pad_id: int, labels: list[list[int]]) -> Tensor:
    """log p of each label after each prompt [samples, labels], a label of all samples at a time."""
    lengths = torch.tensor([sample.prompt_length for sample in samples])
    prompts = torch.full((len(samples), int(lengths.max())), pad_id)
    for row, sample in zip(prompts, samples, strict=True):
        row[: sample.prompt_length] = torch.from_numpy(sample.input_ids[: sample.prompt_length])
    mask = (torch.arange(prompts.shape[1]) < lengths[:, None]).long()
    hidden, past = model.hidden(prompts, use_cache=True)
    first = model.logits(hidden[torch.arange(len(samples)), lengths - 1]).float().log_softmax(-1)
    scores = torch.stack([first[:, label[0]] for label in labels], 1)
    for j, label in enumerate(labels):
        if len(label) == 1:
            continue
        head = torch.tensor(label[:-1]).expand(len(samples), -1)
        seen = torch.cat([mask, torch.ones_like(head)], 1)
        places = seen.cumsum(1)[:, -head.shape[1] :] - 1
        out = model.core.base_model(
            input_ids=head, attention_mask=seen, position_ids=places, past_key_values=past, use_cache=True
        )
        past.crop(1 - len(label))
        for t in range(len(label) - 1):
            log_p = model.logits(out.last_hidden_state[:, t]).float().log_softmax(-1)
            scores[:, j] += log_p[:, label[t + 1]]
    return scores.double()


if __name__ == "__main__":
    main()
