"""What all tests share: real data where there is some, a tokenizer that needs none, no network, no chance."""

import os
from pathlib import Path

from peertune.cli import ENVIRONMENT

# Read when the libraries are imported, which is later.
os.environ.update({"HF_HUB_OFFLINE": "1", **ENVIRONMENT, **os.environ})
if not os.environ.get("PEERTUNE_TEST_GPU"):
    # Sites and ranks of the tests are forks of one process, several of them: a GPU is not for that.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

settings.register_profile(
    "repeatable", derandomize=True, database=None, max_examples=50,
    deadline=None, suppress_health_check=[HealthCheck.too_slow],  # a slow machine is no failure
)  # fmt: skip
settings.load_profile("repeatable")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real test data and models."""
    folder = Path(os.environ.get("PEERTUNE_TEST_DATA") or Path(__file__).parents[2] / "shared")
    if not (folder / "data").is_dir():
        pytest.skip(f"no test data in {folder}; set PEERTUNE_TEST_DATA to the folder that holds data/ and models/")
    return folder


@pytest.fixture(scope="session")
def english(shared: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of english-4m: byte-level BPE, puts <s> before a text, has a chat template that ignores tools."""
    return AutoTokenizer.from_pretrained(shared / "models" / "english-4m")


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerBase:
    return make_byte_tokenizer()


def make_byte_tokenizer() -> PreTrainedTokenizerBase:
    """A new tokenizer of one token a byte, that puts <s> before a text and has no chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(specials + letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=specials[3:],
    )


@pytest.fixture(scope="session")
def micro_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of 9,000 random parameters and a tokenizer of one token a byte."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("micro-model")
    tokenizer = make_byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=96,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
