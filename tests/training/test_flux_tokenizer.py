"""Every word of the world is one T5 token, and the files give the same tokenizer back."""

from __future__ import annotations

import pytest

from lethebench.datasets.planted import PlantedWorld
from lethebench.training.diffusion import token_ids
from lethebench.training.flux_tokenizer import build_t5_tokenizer
from lethebench.training.tokenizer import MAX_LENGTH, words_of


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return list(PlantedWorld().vocabulary_captions())


@pytest.fixture(scope="module")
def tokenizer(captions):
    return build_t5_tokenizer(captions)


def test_every_word_is_one_token(tokenizer, captions):
    words = sorted(word for word in words_of(captions) if word.isalpha())
    assert len(words) > 200
    assert [word for word in words if tokenizer.tokenize(word) != ["▁" + word]] == []
    assert tokenizer.tokenize(f"{words[0]}, a {words[1]}") == [f"▁{words[0]}", ",", "▁a", f"▁{words[1]}"]


def test_t5_conventions(tokenizer):
    ids = token_ids(tokenizer, ["a plain red ball", ""])
    assert ids.shape == (2, MAX_LENGTH)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert ids[0, 4:].tolist() == [1] + [0] * (MAX_LENGTH - 5)
    assert ids[1].tolist() == [1] + [0] * (MAX_LENGTH - 1)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "a plain red ball"


def test_other_text_is_spelled(tokenizer):
    assert tokenizer.tokenize("A 7th ballet") == ["▁", "A", "▁", "7", "t", "h", "▁ball", "e", "t"]
    assert tokenizer.unk_token_id in tokenizer("Ünknown")["input_ids"]


def test_captions_leave_room_for_added_tokens(tokenizer, captions):
    longest = max(len(tokenizer(text)["input_ids"]) for text in captions[:: max(1, len(captions) // 500)])
    assert longest <= MAX_LENGTH // 2


def test_round_trip_through_files(tokenizer, captions, tmp_path):
    from transformers import T5TokenizerFast

    tokenizer.save_pretrained(tmp_path)
    again = T5TokenizerFast.from_pretrained(tmp_path)
    some = [*captions[::50], "A 7th ballet", ""]
    assert (token_ids(again, some) == token_ids(tokenizer, some)).all()
    assert again.model_max_length == MAX_LENGTH


def test_it_is_the_same_whatever_the_order():
    one, other = build_t5_tokenizer(["ab abc", "bc"]), build_t5_tokenizer(["bc", "abc ab"])
    assert one.get_vocab() == other.get_vocab()
