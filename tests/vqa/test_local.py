"""Image-text-to-text models of transformers, on a tiny LLaVA-NeXT with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lethebench.errors import UserError
from lethebench.metrics.vqa.judges import make_judges
from lethebench.metrics.vqa.local import TransformersJudge
from lethebench.metrics.vqa_mini import GENERAL, SPECIFIC

QUESTIONS = [GENERAL] * 3 + [SPECIFIC.replace("<CONCEPT>", "quorvex")] * 3


def test_answers_do_not_depend_on_batch_and_order(tiny: Path, images: np.ndarray) -> None:
    judge = TransformersJudge(model=str(tiny), batch_size=4)
    judge.check()
    together = judge.answer(images, QUESTIONS)
    backwards = judge.answer(images[::-1], QUESTIONS[::-1])[::-1]
    singly = [judge.answer(images[i : i + 1], QUESTIONS[i : i + 1])[0] for i in range(6)]
    assert [a.text for a in together] == [a.text for a in backwards] == [a.text for a in singly]
    ours = [a.probability for a in together]
    np.testing.assert_allclose(ours, [a.probability for a in singly], atol=1e-5)  # type: ignore[arg-type]
    assert len({a.text for a in together}) > 2  # the image and the question move the answer


def test_answers_are_those_of_a_plain_greedy_loop(tiny: Path, images: np.ndarray) -> None:
    """One token at a time, by the model's own forward pass, without generate, batch or padding."""
    import torch
    from PIL import Image
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

    model = LlavaNextForConditionalGeneration.from_pretrained(tiny).eval()
    processor = LlavaNextProcessor.from_pretrained(tiny)
    yes = processor.tokenizer.convert_tokens_to_ids(["yes", "Yes"])
    no = processor.tokenizer.convert_tokens_to_ids(["no", "No"])
    answers = TransformersJudge(model=str(tiny), max_new_tokens=5).answer(images, QUESTIONS)
    for image, question, answer in zip(images, QUESTIONS, answers, strict=True):
        inputs = processor(
            images=Image.fromarray(image), text=f"user : <image> {question} assistant : ", return_tensors="pt"
        )
        ids, new = inputs["input_ids"], []
        for step in range(5):
            with torch.inference_mode():
                logits = model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    pixel_values=inputs["pixel_values"],
                    image_sizes=inputs["image_sizes"],
                ).logits[0, -1]
            if step == 0:
                share = torch.softmax(logits.double(), -1)
                expected = float(share[yes].sum() / (share[yes].sum() + share[no].sum()))
                assert answer.probability == pytest.approx(expected, abs=1e-5)
            new.append(int(logits.argmax()))
            if new[-1] == processor.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, torch.tensor([[new[-1]]])], 1)
        assert answer.text == processor.decode(new, skip_special_tokens=True)


def test_the_files_are_part_of_the_key(tiny: Path) -> None:
    files = TransformersJudge(model=str(tiny)).files()
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json"} <= set(files)
    assert all(path.is_file() for path in files.values())


def copied(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        make_judges([{"judge": f"transformers:{folder}", **settings}])[0].check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_wrong_with_a_folder_is_found_before_any_work(tiny: Path, tmp_path: Path) -> None:
    assert "no folder" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(tmp_path / "empty")
    folder = copied(tiny, tmp_path)
    edit(folder / "config.json", model_type="bert")
    assert "a 'bert' model answers no questions about images" in refused(folder)
    edit(folder / "config.json", model_type="llava_next")
    (folder / "chat_template.jinja").unlink()
    assert "no chat template" in refused(folder)
    (folder / "processor_config.json").unlink()
    assert "processor" in refused(folder)
    (folder / "model.safetensors").unlink()
    assert "no weights in *.safetensors" in refused(folder)


def test_bad_settings(tiny: Path) -> None:
    assert "dtype='float8' must be one of auto, float32" in refused(tiny, dtype="float8")
    assert "device='warp' can't be used here" in refused(tiny, device="warp")
    assert "batch_size=0 must be a whole number above 0" in refused(tiny, batch_size=0)
    assert "max_new_tokens='x' must be a whole number above 0" in refused(tiny, max_new_tokens="x")
