"""Small random models of four families, made on the spot: no download, no GPU, no user's cache."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks the network fails at once
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tensors this small, threads only wait

import pytest

pytest.register_assert_rewrite("helpers", "stage")

import torch
from helpers import make_model, write_around
from stage import Stage

import common
from tasks.tiny import tiny_tokenizer

FAMILIES = {  # what each has that the others have not
    "qwen2": {"tie_word_embeddings": True},
    "llama": {},  # so many EOS ids that most rows end early, at many different lengths
    "gpt2": {},  # absolute positions, dropout, no pad token
    "gemma": {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 264},  # a BOS; unused ids
}
EOS_IDS = {"llama": [256, *range(100, 130)], "gemma": [256, 10]}  # else the tokenizer's alone


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU, skipped without one")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(int(os.environ.get("TEST_SEED", "0")))


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing them takes longer than a short run."""
    monkeypatch.setattr("run.draw_curves", lambda runs, path: path.touch())


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The tests neither read nor write the user's cache; the tests' subprocesses share this one."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def make_tokenizer(family):
    tokenizer = tiny_tokenizer()
    if family == "gpt2":
        tokenizer.pad_token = None
    if family == "gemma":  # like the real one, it writes a BOS before every text
        tokenizer.add_special_tokens({"bos_token": "<bos>"})
        write_around(tokenizer, "<bos> $A")
    return tokenizer


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory):
    """{family: directory}, as `save_pretrained` writes them."""
    dirs = {}
    for family, config in FAMILIES.items():
        torch.manual_seed(1)
        dirs[family] = tmp_path_factory.mktemp(family)
        model = make_model(family, **config)
        model.generation_config.eos_token_id = EOS_IDS.get(family, 256)
        model.save_pretrained(dirs[family])
        make_tokenizer(family).save_pretrained(dirs[family])
    return dirs


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def loaded(model_dirs, family):
    """(model, tokenizer) of each family, through the scripts' own loader."""
    return common.load_model(model_dirs[family], "cpu")


@pytest.fixture
def small(model_dirs):
    """(model, tokenizer) of one family, where one is enough."""
    return common.load_model(model_dirs["qwen2"], "cpu")


@pytest.fixture
def stage(monkeypatch, tmp_path):
    return Stage(monkeypatch, tmp_path)
