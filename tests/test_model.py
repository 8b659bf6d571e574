"""Blocks, loss, per-layer behaviour and scoring, over six architectures with tied and untied embeddings."""

import functools
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from peertune.config import ModelSection
from peertune.data.batches import Batch, collate
from peertune.data.render import Sample
from peertune.errors import ModelError
from peertune.evaluation import label_scores as scoring
from peertune.evaluation.label_scores import label_scores, label_scores_plainly
from peertune.evaluation.likelihood import evaluate, macro_f1
from peertune.model import loss
from peertune.model.blocks import block_table, find_layers, frozen_names, is_tied, partition_blocks
from peertune.model.language_model import LanguageModel
from peertune.model.layers import draws_in_training
from peertune.model.load import _is_pointer, clone_model, load_model, load_tokenizer
from tests.shapes import ARCHITECTURES, LAYERS, VOCABULARY, make_model

both = pytest.mark.parametrize("tied", [False, True])
every = pytest.mark.parametrize("name", ARCHITECTURES)


def make_batch(num: int = 3, length: int = 12, seed: int = 0) -> Batch:
    """Rows of different lengths; the last third of each is the target."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(num):
        n = length - i
        mask = np.arange(n) >= 2 * n // 3
        samples.append(Sample(rng.integers(1, VOCABULARY, n).astype(np.int32), mask))
    batch = collate(samples, pad_id=0, pad_to=length)
    return Batch(batch.input_ids, batch.attention_mask, batch.loss_mask, tuple(range(num)))


@both
@every
@pytest.mark.parametrize("layers_per_block", [1, 3, 0])
def test_blocks_are_disjoint_and_cover_what_is_trained(name: str, tied: bool, layers_per_block: int) -> None:
    model = make_model(name, tied)
    blocks = partition_blocks(model, layers_per_block)
    names = [n for block in blocks for n in block.parameters]
    assert len(names) == len(set(names))
    everything = [n for n, _ in model.named_parameters()]
    frozen = frozen_names(model, blocks)
    assert sorted(names + frozen) == sorted(everything)
    assert is_tied(model) == tied
    embedding = [n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight]
    assert frozen == (embedding if tied else [])
    expected = 1 if layers_per_block == 0 else -(-LAYERS // layers_per_block) + (0 if tied else 2)
    assert len(blocks) == expected
    assert [b.index for b in blocks] == list(range(expected))
    table = block_table(model, blocks)
    assert all(block.name in table for block in blocks)


@both
@pytest.mark.parametrize("train", ["all", "none"])
def test_embeddings_are_trained_when_asked(train: Any, tied: bool) -> None:
    model = make_model("llama", tied)
    blocks = partition_blocks(model, 2, train)
    frozen = frozen_names(model, blocks)
    assert frozen == (
        [] if train == "all" else [n for n, _ in model.named_parameters() if "embed" in n or "lm_head" in n]
    )


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="no list of transformer layers"):
        find_layers(torch.nn.Linear(2, 2))


@both
@every
def test_loss_and_gradients_equal_the_models_own(name: str, tied: bool) -> None:
    module = make_model(name, tied)
    batch = make_batch()
    labels = batch.input_ids.masked_fill(~batch.loss_mask, -100)
    own = module(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
    own.backward()
    expected = {n: p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad()
    model = LanguageModel(module, ModelSection())
    assert model.has_plain_head
    total, count = model.loss_sum(batch)
    (total / count).backward()
    torch.testing.assert_close(total / count, own, rtol=1e-5, atol=1e-5)
    for n, p in module.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], rtol=1e-3, atol=1e-5)


def test_a_head_that_is_not_plain_is_noticed_and_still_right() -> None:
    module = make_model("llama")
    module.lm_head.register_forward_hook(lambda _m, _i, out: out)  # a hook alone changes nothing
    plain = module.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = torch.tanh(out.logits)
        return out

    module.forward = capped
    model = LanguageModel(module, ModelSection())
    assert not model.has_plain_head
    batch = make_batch()
    total, count = model.loss_sum(batch)
    rows = batch.loss_mask[:, 1:]
    logits = module(input_ids=batch.input_ids).logits[:, :-1][rows]
    torch.testing.assert_close(total / count, torch.nn.functional.cross_entropy(logits, batch.input_ids[:, 1:][rows]))


def test_a_trained_head_of_a_large_vocabulary_takes_few_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each adds a gradient of the weight's whole size."""
    monkeypatch.setattr(loss, "LOGITS_BYTES_CPU", 1)
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 256, generator=rng, requires_grad=True)
    weight = torch.randn(61, 256, generator=rng, requires_grad=True)
    targets = torch.randint(61, (50,), generator=rng)
    assert loss.chunk_rows(weight, trains=True) == 32 and loss.chunk_rows(weight) == 16
    found = loss.chunked_cross_entropy(hidden, weight, None, targets)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(found, expected)
    for got, wanted in zip(*(torch.autograd.grad(f, (hidden, weight)) for f in (found, expected)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_capped_head_makes_logits_where_they_are_needed_only() -> None:
    """Of all places they are gigabytes, where the vocabulary is that of Gemma 2."""
    shape = AutoConfig.for_model(
        "gemma2", vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=64, final_logit_softcapping=5.0,
    )  # fmt: skip
    model = LanguageModel(AutoModelForCausalLM.from_config(shape, dtype=torch.float32), ModelSection())
    assert not model.has_plain_head
    batch, made, head = make_batch(), [], model.core.get_output_embeddings()
    batch.loss_mask[:, :-2] = False
    rows = batch.loss_mask[:, 1:]
    logits = model.all_logits(batch.input_ids)[:, :-1][rows]
    expected = torch.nn.functional.cross_entropy(logits, batch.input_ids[:, 1:][rows], reduction="sum")
    with torch.no_grad():
        slow = torch.stack([model.all_logits(batch.input_ids)[:, 3].log_softmax(-1)[:, t] for t in (5, 7)], 1)
    head.register_forward_hook(lambda _m, _i, out: made.append(out.shape[1]))
    total, _ = model.loss_sum(batch)
    torch.testing.assert_close(total, expected)
    prompts = [Sample(ids.int().numpy(), np.zeros(len(ids), bool), prompt_length=4) for ids in batch.input_ids]
    with model.evaluating():
        torch.testing.assert_close(label_scores_plainly(model, prompts, 0, [[5], [7]]), slow.double())
    assert made and max(made) <= 2


def test_evaluating_ends_as_it_began_whatever_happens() -> None:
    model = LanguageModel(make_model("llama"), ModelSection())
    for mode in (True, False):
        model.module.train(mode)
        with pytest.raises(ValueError, match="stop"), model.evaluating():
            assert not model.module.training and not torch.is_grad_enabled()
            raise ValueError("stop")
        assert model.module.training == mode and torch.is_grad_enabled()


def gradients(model: LanguageModel, block: Any, batch: Batch, remember: bool = False) -> dict[str, torch.Tensor]:
    active = model.activate(block)
    loss, count = model.loss_sum(batch, remember=remember)
    (loss / count).backward()
    return {n: p.grad.clone() for n, p in active.items() if p.grad is not None}


@every
def test_flops_fall_with_the_block_and_only_it_gets_gradients(name: str) -> None:
    module = make_model(name)
    blocks = partition_blocks(module, 1)
    model = LanguageModel(module, ModelSection())
    batch = make_batch()
    flops = []
    for block in blocks[1:-1]:
        with FlopCounterMode(display=False) as counter:
            grads = gradients(model, block, batch)
        assert set(grads) == set(block.parameters)
        assert [n for n, p in module.named_parameters() if p.grad is not None] == list(grads)
        flops.append(counter.get_total_flops())
    assert all(a > b for a, b in itertools.pairwise(flops)), flops


@every
def test_the_prefix_cache_changes_no_bit(name: str) -> None:
    plain, cached = make_model(name), make_model(name)
    blocks = partition_blocks(plain, 1)
    without = LanguageModel(plain, ModelSection())
    with_cache = LanguageModel(cached, ModelSection(prefix_cache=True))
    batches = [make_batch(seed=seed) for seed in (0, 1)]
    batches[1] = Batch(batches[1].input_ids, batches[1].attention_mask, batches[1].loss_mask, (7, 8, 9))
    for sweep in range(2):
        for block in blocks:
            for _visit in range(2):
                for batch in batches:
                    expected = gradients(without, block, batch)
                    got = gradients(with_cache, block, batch, remember=True)
                    for n in expected:
                        assert torch.equal(got[n], expected[n]), (sweep, block.name, n)
            with torch.no_grad():  # the block's turn ends: it has changed
                for module in (plain, cached):
                    for n, p in module.named_parameters():
                        if n in block.parameters:
                            p.add_(0.01)


def test_the_prefix_cache_saves_the_prefix() -> None:
    module = make_model("llama")
    block = partition_blocks(module, 1)[-2]
    model = LanguageModel(module, ModelSection(prefix_cache=True))
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            gradients(model, block, make_batch(), remember=True)
        counts.append(counter.get_total_flops())
    assert counts[1] < counts[0] / 1.5


@every
def test_recomputing_within_a_budget_changes_no_gradient(name: str) -> None:
    plain, tight = make_model(name), make_model(name)
    without = LanguageModel(plain, ModelSection())
    model = LanguageModel(tight, ModelSection())
    model.stack._budget = 1  # one byte: everything is recomputed
    for block in partition_blocks(plain, 1):
        for _ in range(2):
            expected, got = gradients(without, block, make_batch()), gradients(model, block, make_batch())
            for n in expected:
                torch.testing.assert_close(got[n], expected[n], rtol=1e-5, atol=1e-7)


def saved_bytes(model: LanguageModel, block: Any) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    model.activate(block)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model.loss_sum(make_batch(8, 48))
    return sum(kept.values())


def test_a_budget_is_kept_and_used() -> None:
    """Unbounded > half the need > one byte; and the measured need is within the budget."""
    sizes = []
    for budget in (0, 1):
        model = LanguageModel(make_model("llama"), ModelSection())
        block = partition_blocks(model.module, 1)[1]
        model.stack._budget = budget
        gradients(model, block, make_batch(8, 48))  # measures
        sizes.append(saved_bytes(model, block))
    half = LanguageModel(make_model("llama"), ModelSection())
    block = partition_blocks(half.module, 1)[1]
    half.stack._budget = sizes[0] // 2
    gradients(half, block, make_batch(8, 48))
    middle = saved_bytes(half, block)
    assert sizes[0] > middle > sizes[1]


@pytest.mark.filterwarnings("ignore")  # of the compiler's own insides
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compiled_layers_give_the_same_gradients_from_three_graphs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below, in and above the active block; the back end that only traces stands in for the real one."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    plain = LanguageModel(make_model(name), ModelSection())
    compiled = LanguageModel(make_model(name), ModelSection(compile=True))
    for block in partition_blocks(plain.module, 1)[1:-1]:
        expected = gradients(plain, block, make_batch())
        got = gradients(compiled, block, make_batch())
        for n in expected:
            torch.testing.assert_close(got[n], expected[n], rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


LABELS = [[5], [6, 7, 8], [6, 9], [11], [6, 7, 9, 12, 13], [6, 7, 9, 12, 14], [20, 21], [20, 22, 6, 7, 8], [30, 31, 32]]
"""Of mixed lengths, some of which begin alike."""


def prompts() -> list[Sample]:
    rng = np.random.default_rng(0)
    found = []
    for label, length in enumerate((3, 9, 6)):
        ids = rng.integers(1, VOCABULARY, length).astype(np.int32)
        found.append(Sample(ids, np.zeros(length, bool), label=label, prompt_length=length))
    return found


@both
@every
def test_label_scores_equal_scoring_each_label_anew(name: str, tied: bool) -> None:
    model = LanguageModel(make_model(name, tied), ModelSection())
    with model.evaluating():
        fast = label_scores(model, prompts(), 0, LABELS)
        slow = label_scores_plainly(model, prompts(), 0, LABELS)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    samples = [replace(sample, label=4 * sample.label) for sample in prompts()]
    own = slow[range(3), [sample.label for sample in samples]].sum().item()
    tokens = sum(len(LABELS[sample.label]) for sample in samples)
    assert evaluate(model, samples, 0, labels=LABELS)["loss"] == pytest.approx(-own / tokens, rel=1e-4)


@pytest.mark.parametrize("only_likeliest", [False, True])
@pytest.mark.parametrize("slots", [1, 6, 100])
def test_labels_that_do_not_fit_behind_a_prompt_take_turns(
    slots: int, only_likeliest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "SLOTS", slots)
    monkeypatch.setattr(loss, "LOGITS_BYTES_CPU", 1)  # the logits of some places at a time
    model = LanguageModel(make_model("llama"), ModelSection())
    held = []
    hidden = model.hidden

    def noting(*args: Any, past: Any = None, **options: Any) -> Any:
        out, kept = hidden(*args, past=past, **options)
        held.append(kept.get_seq_length() - 9)
        return out, kept

    monkeypatch.setattr(model, "hidden", noting)
    with model.evaluating():
        fast = label_scores(model, prompts(), 0, LABELS, only_likeliest=only_likeliest)
        slow = label_scores_plainly(model, prompts(), 0, LABELS)
    assert max(held) <= max(slots, 4)
    known = fast.isfinite()
    assert known.all() or only_likeliest
    torch.testing.assert_close(fast[known], slow[known], rtol=1e-4, atol=1e-4)


def test_of_the_likeliest_label_and_a_samples_own_the_scores_are_known() -> None:
    model = LanguageModel(make_model("llama"), ModelSection())
    with torch.no_grad():
        model.core.get_output_embeddings().weight.mul_(3.0)  # sure of itself, as a model that has learned
    rng = np.random.default_rng(1)
    labels = [rng.integers(1, VOCABULARY, rng.integers(1, 6)).tolist() for _ in range(30)]
    samples = [replace(sample, label=own) for own in (0, 7, 29) for sample in prompts()]
    with model.evaluating():
        some = label_scores(model, samples, 0, labels, only_likeliest=True)
        all_ = label_scores(model, samples, 0, labels)
    assert (some == -torch.inf).double().mean() > 0.3
    torch.testing.assert_close(some.max(1).values, all_.max(1).values, rtol=1e-4, atol=1e-4)
    assert torch.equal(some.argmax(1), all_.argmax(1))
    own = torch.tensor([sample.label for sample in samples])[:, None]
    torch.testing.assert_close(some.gather(1, own), all_.gather(1, own), rtol=1e-4, atol=1e-4)


def test_macro_f1_by_hand() -> None:
    truth, predicted = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1])
    assert macro_f1(truth, predicted) == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)
    assert macro_f1(np.array([0, 0, 1]), np.array([0, 2, 1])) == pytest.approx((2 / 3 + 0 + 1) / 3)  # 2 is no one's


def test_clones_share_what_is_frozen_and_own_what_is_trained() -> None:
    module = make_model("llama", tied=True)
    own = {n for block in partition_blocks(module, 2) for n in block.parameters}
    clone = clone_model(module, own)
    originals = dict(module.named_parameters())
    for n, p in clone.named_parameters():
        assert (p.data_ptr() == originals[n].data_ptr()) == (n not in own)
        assert torch.equal(p, originals[n])
    assert clone.lm_head.weight is clone.model.embed_tokens.weight


def test_a_damaged_base_is_refused(tmp_path: Any) -> None:
    module = make_model("llama")
    with torch.no_grad():
        module.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    module.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"up_proj.*NaN"):
        load_model(ModelSection(path=str(tmp_path), max_length=16), torch.device("cpu"))
    with pytest.raises(ModelError, match="64 positions"):
        load_model(ModelSection(path=str(tmp_path), max_length=65), torch.device("cpu"))


def test_attention_that_an_architecture_does_not_have_is_refused(tmp_path: Any) -> None:
    """Gemma 2 caps its attention's scores, which PyTorch's kernels cannot."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 4, "vocab_size": 61}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **sizes)).save_pretrained(tmp_path)
    config = ModelSection(path=str(tmp_path), max_length=8, attention="sdpa")
    with pytest.raises(ModelError, match=r'^model\.attention: got "sdpa".*expected "auto" or "eager"'):
        load_model(config, torch.device("cpu"))


@pytest.mark.parametrize(
    ("key", "value", "draws"),
    [("attention_dropout", 0.1, True), ("router_jitter_noise", 0.01, True), ("router_jitter_noise", 0.0, False)],
)
def test_what_draws_random_numbers_in_training_is_known(key: str, value: float, draws: bool) -> None:
    module = make_model("llama")
    setattr(module.config, key, value)
    assert draws_in_training(module) == draws


def test_a_file_that_cannot_be_read_is_no_pointer_of_git_lfs(tmp_path: Path) -> None:
    """Of why a folder does not load the library has told; that a file may not be read would be a second error."""
    assert not _is_pointer(tmp_path)


def test_a_runs_folder_named_for_a_model_is_told_from_what_the_run_has(tmp_path: Path) -> None:
    """Of a prompt or prefix there is an adapter and no model."""
    (tmp_path / "events.jsonl").touch()
    with pytest.raises(ModelError, match="a run's folder has its model once it is finished; here is none yet"):
        load_tokenizer(ModelSection(path=str(tmp_path)))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in (tmp_path, tmp_path / "model"):
        with pytest.raises(ModelError, match=f"a run's folder has its model .* here {adapter}"):
            load_tokenizer(ModelSection(path=str(name)))
    with pytest.raises(ModelError, match=r"this folder: (?!a run's)"):
        load_tokenizer(ModelSection(path=str(adapter)))
