"""From prompts to token ids, with and without a chat template."""

import pytest
import torch
from helpers import PROMPTS, make_model

import common
from tasks import UserError
from tasks.prompts import check_token_ids, encode_prompts, end_of_answer, pad, stop_token_ids

CHAT = (  # a template in the manner of Llama's, which writes the BOS itself
    "<bos>{% for m in messages %}[{{ m.role }}]{{ m.content }}<|pad|>\n{% endfor %}"
    "{% if add_generation_prompt %}[bot]{% endif %}"
)


def test_there_is_one_bos_with_and_without_a_chat_template(model_dirs):
    """The tokenizer begins every text with a BOS, and a template does too."""
    model, tokenizer = common.load_model(model_dirs["gemma"], "cpu")
    plain = [f"<bos>{text}" for text in PROMPTS]
    chat = [f"<bos>[user]{text}<|pad|>\n[bot]" for text in PROMPTS]
    for tokenizer.chat_template, expected in ((None, plain), (CHAT, chat)):
        ids, mask, pictures = encode_prompts(model, tokenizer, PROMPTS, 1)
        assert pictures == [None] * 4
        assert [tokenizer.decode(ids[i][mask[i]]) for i in range(4)] == expected
        assert mask[:, -1].all() and mask.sum(1).amax() == mask.shape[1]  # padded on the left
        assert (mask.long().diff(dim=1) >= 0).all()


def test_pad():
    ids, mask = pad([[1, 2, 3], [4]], "left", torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]
    ids, mask = pad([[1, 2, 3], [4]], "right", torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]] and mask.sum(1).tolist() == [3, 1]


def test_what_the_model_cannot_read_is_refused(small):
    model, tokenizer = small
    assert encode_prompts(model, tokenizer, ["1" * 240], 16)[0].shape == (1, 240)
    with pytest.raises(UserError, match=r"'1+ has 241 tokens.* 16 .* 256.*--max-new-tokens"):
        encode_prompts(model, tokenizer, ["7", "1" * 241], 16)
    check_token_ids(model, [[0, 257]], ["a"], 254)
    for row, problem in (([], "no token"), ([258], "token 258 in a vocabulary of 258")):
        with pytest.raises(UserError, match=f"the tokenizer does not fit .*: 'a' gives {problem}"):
            check_token_ids(model, [[1], row], ["b", "a"], 1)
    model = make_model("bloom")
    del model.config.max_position_embeddings  # Bloom has none
    check_token_ids(model, [[1] * 9999], ["a"], 1)


@pytest.mark.parametrize(
    "template, end",
    [
        (None, "<|endoftext|>"),
        (CHAT, "<|pad|>"),
        (CHAT.replace("<|pad|>", "[end]"), "<|endoftext|>"),  # a text, no token
        (CHAT.replace("<|pad|>", "[end]<|pad|>"), "<|pad|>"),
        ("<bos>{{ messages[0].content }}", "<|endoftext|>"),  # without the answer
    ],
)
def test_the_token_that_ends_an_answer(model_dirs, template, end):
    model, tokenizer = common.load_model(model_dirs["gemma"], "cpu")
    tokenizer.chat_template = template
    assert tokenizer.decode(end_of_answer(tokenizer)) == end
    assert end_of_answer(tokenizer) in stop_token_ids(model, tokenizer)
