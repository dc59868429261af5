"""Small random models of four families, made on the spot: no download, no GPU, no user's cache."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks the network fails at once
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import common
from tasks.tiny import tiny_tokenizer

VOCAB = 258
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.3,
}  # fmt: skip


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU, skipped without one")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(int(os.environ.get("TEST_SEED", "0")))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The tests neither read nor write the user's cache; the tests' subprocesses share this one."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def make_qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, eos_token_id=256, tie_word_embeddings=True))


def make_llama():  # with so many EOS ids that most rows end early, at many different lengths
    model = LlamaForCausalLM(LlamaConfig(**SIZES, eos_token_id=256, bos_token_id=None))
    model.generation_config.eos_token_id = [256, *range(100, 130)]
    return model


def make_gpt2():  # absolute positions, dropout in its config, a bias-free tied head, no pad token
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    config = GPT2Config(**sizes, eos_token_id=256, bos_token_id=256, initializer_range=0.3)
    return GPT2LMHeadModel(config)


def make_gemma():  # multi-query attention, and its own list of EOS ids in the generation config
    sizes = SIZES | {"num_key_value_heads": 1, "head_dim": 16}
    model = GemmaForCausalLM(GemmaConfig(**sizes, eos_token_id=256, bos_token_id=2, pad_token_id=0))
    model.generation_config.eos_token_id = [256, 10]
    return model


FAMILIES = {"qwen2": make_qwen2, "llama": make_llama, "gpt2": make_gpt2, "gemma": make_gemma}


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory):
    """{family: directory}, as `save_pretrained` writes them."""
    dirs = {}
    for family, make in FAMILIES.items():
        torch.manual_seed(1)
        dirs[family] = tmp_path_factory.mktemp(family)
        make().save_pretrained(dirs[family])
        tokenizer = tiny_tokenizer()
        if family == "gpt2":
            tokenizer.pad_token = None
        tokenizer.save_pretrained(dirs[family])
    return dirs


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def loaded(model_dirs, family):
    """(model, tokenizer) of each family, through the scripts' own loader."""
    return common.load_model(str(model_dirs[family]), torch.device("cpu"))


@pytest.fixture
def small(model_dirs):
    """(model, tokenizer) of one family, where one is enough."""
    return common.load_model(str(model_dirs["qwen2"]), torch.device("cpu"))
