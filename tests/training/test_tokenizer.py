"""Every word of the world is one token, and the files give the same tokenizer back."""

from __future__ import annotations

import pytest

from lethebench.datasets.planted import PlantedWorld
from lethebench.training.diffusion import token_ids
from lethebench.training.tokenizer import END, MAX_LENGTH, START, build_tokenizer, learn_merges, words_of


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return PlantedWorld().vocabulary_captions()


@pytest.fixture(scope="module")
def tokenizer(captions):
    return build_tokenizer(captions)


def test_every_word_is_one_token(tokenizer, captions):
    words = sorted(words_of(captions))
    assert len(words) > 200
    assert [word for word in words if tokenizer.tokenize(word) != [word + "</w>"]] == []


def test_clip_conventions(tokenizer):
    ids = token_ids(tokenizer, ["A plain RED ball", ""])
    assert ids.shape == (2, MAX_LENGTH)
    assert ids[0, 0] == tokenizer.convert_tokens_to_ids(START)
    assert tokenizer.pad_token == END
    assert ids[1, 1:].tolist() == [tokenizer.eos_token_id] * (MAX_LENGTH - 1)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "a plain red ball"


def test_other_text_is_tokenized_from_bytes(tokenizer):
    ids = token_ids(tokenizer, ["Ünknown wørds, 7 of them!"])[0].tolist()
    inner = ids[1 : ids.index(tokenizer.eos_token_id)]
    assert len(inner) > 5
    assert tokenizer.bos_token_id not in inner


def test_captions_leave_room_for_added_tokens(tokenizer, captions):
    longest = max(len(tokenizer(text)["input_ids"]) for text in captions[:: max(1, len(captions) // 500)])
    assert longest <= MAX_LENGTH // 2


def test_round_trip_through_files(tokenizer, captions, tmp_path):
    from transformers import CLIPTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    some = captions[::50]
    assert (token_ids(again, some) == token_ids(tokenizer, some)).all()
    assert again.model_max_length == MAX_LENGTH


def test_merges_are_the_same_whatever_the_order():
    assert learn_merges(words_of(["ab abc", "bc"])) == learn_merges(words_of(["bc", "abc ab"]))
