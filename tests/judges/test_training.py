"""Training of the judges: batches, recipes, resume, cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lethebench import judges
from lethebench.datasets.planted import PlantedWorld, Thing
from lethebench.errors import UserError
from lethebench.judges.clip import Words
from lethebench.judges.nets import DescriptorNet
from lethebench.training import augment
from lethebench.training import judges as training
from lethebench.training.judge_cards import add_generated_errors
from lethebench.training.judge_data import KINDS, Pool, PoolRecipe, attribute_options, make_pool
from lethebench.training.judge_losses import dice_loss, info_nce, koleo, spoil
from lethebench.training.judge_measures import calibration_error

SCALE = 0.001


@pytest.fixture(scope="module")
def trained(world: PlantedWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judges")
    training.train_judges(folder=folder, scale=SCALE, world=world)
    return folder


@pytest.mark.parametrize("name", judges.JUDGES)
def test_a_tiny_training_gives_a_judge_with_a_card(trained: Path, name: str) -> None:
    folder = trained / "weights" / name
    assert judges.judge_class(name).load(folder).config["judge"] == name
    card = json.loads((folder / "card.json").read_text())
    recipe = training.RECIPES[name]
    steps = max(2, round(recipe.steps * SCALE)) + round(recipe.steps_again * SCALE)
    assert card["training"]["steps"] == steps
    text = (folder / "MODEL_CARD.md").read_text()
    assert text.startswith(f"# {name}")
    assert "Figures on held-out scenes" in text


def test_training_resumes_to_the_same_weights(world: PlantedWorld, trained: Path, tmp_path: Path) -> None:
    name = "segmenter-mini"
    data = training.gather(world, trained, SCALE)

    class Killed(Exception):
        pass

    plan = training._PLANS[name]

    def dies(net: Any, data: Any, recipe: Any, device: str) -> Any:
        whole = plan.loss(net, data, recipe, device)

        def loss(step: int, g: torch.Generator) -> torch.Tensor:
            if step == 1:
                raise Killed
            value: torch.Tensor = whole(step, g)
            return value

        return loss

    with pytest.MonkeyPatch.context() as patch:
        original = training.fit
        patch.setattr(training, "fit", lambda *a, **k: original(*a, **k, checkpoint_seconds=-1.0))
        patch.setitem(training._PLANS, name, training._Plan(plan.config, dies, plan.finish, plan.measure))
        with pytest.raises(Killed):
            training.train_judge(name, data, tmp_path / "run", tmp_path / "out", scale=SCALE)
    training.train_judge(name, data, tmp_path / "run", tmp_path / "out", scale=SCALE)
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert first == (trained / "weights" / name / "model.safetensors").read_bytes()


def test_unknown_judge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown judge 'sscd'"):
        training.train_judges(["sscd"], tmp_path)


def test_generated_figures_join_the_card(trained: Path) -> None:
    add_generated_errors(trained / "weights", {"copy-mini": {"auc": 0.5, "n": None}}, "a test")
    folder = trained / "weights" / "copy-mini"
    assert json.loads((folder / "card.json").read_text())["generated"]["auc"] == 0.5
    assert "Figures on generated pictures" in (folder / "MODEL_CARD.md").read_text()


# --- pools ---------------------------------------------------------------------------------------


def test_pool_is_cached_and_the_same(world: PlantedWorld, tmp_path: Path) -> None:
    recipe = PoolRecipe("cached", 2, 2, 2, 2, 2)
    first, second = make_pool(world, recipe, tmp_path), make_pool(world, recipe, tmp_path)
    for name in Pool.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    other = make_pool(world, PoolRecipe("cached", 1, 1, 1, 1, 1), tmp_path)
    assert len(other) == 11


def test_families_show_the_same_kind_in_different_pictures(world: PlantedWorld, sample: Pool) -> None:
    options = list(attribute_options(world))
    for family in sample.families:
        assert len({tuple(row) for row in sample.labels[family, : len(options)]}) == 1
        assert len({sample.images[row].tobytes() for row in family}) == len(family)
        assert len(set(sample.meanings[family, 0])) == 1


def test_labels_follow_the_kinds(world: PlantedWorld, sample: Pool) -> None:
    options = attribute_options(world)
    columns = list(options)
    protected = sample.labels[:, columns.index("protected")]
    np.testing.assert_array_equal(protected == 1, sample.kinds == KINDS.index("character"))
    bare = sample.rows("backdrop")
    assert (sample.labels[bare, columns.index("object")] == options["object"].index("none")).all()
    assert not sample.masks[bare].any()
    assert sample.masks[sample.rows("object", "figure")].any((1, 2)).all()


def test_changed_captions_differ_from_the_true_one(sample: Pool) -> None:
    assert (sample.captions[:, :1] != sample.captions[:, 1:4]).all()
    assert (sample.captions[:, 4] != sample.captions[:, 5]).all()
    words = {word for thing in [Thing("ball", "red", "plain")] for word in (thing.word, thing.colour)}
    assert words <= set(Words.of(sample.captions[:, :4].reshape(-1).tolist(), 16).vocabulary)


# --- losses and changes --------------------------------------------------------------------------


def test_info_nce_and_entropy_against_plain_loops() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(6, 4, generator=g), dim=1)
    terms, entropy = [], []
    for i in range(6):
        partner = (i + 3) % 6
        others = torch.tensor([float(z[i] @ z[j]) / 0.05 for j in range(6) if j != i])
        terms.append(float(torch.logsumexp(others, 0)) - float(z[i] @ z[partner]) / 0.05)
        entropy.append(-np.log(min(float((z[i] - z[j]).norm()) for j in range(6) if j not in (i, partner))))
    assert float(info_nce(z, 0.05)) == pytest.approx(np.mean(terms), rel=1e-4)
    assert float(koleo(z)) == pytest.approx(np.mean(entropy), rel=1e-4)


def test_dice_of_equal_and_disjoint_masks() -> None:
    mask = torch.zeros(2, 64, 64)
    mask[:, :32] = 1
    assert float(dice_loss(mask, mask)) == pytest.approx(0.0, abs=1e-6)
    assert float(dice_loss(mask, 1 - mask)) == pytest.approx(1.0, abs=0.01)
    assert float(dice_loss(mask * 0, mask * 0)) == pytest.approx(0.0)


def test_spoilt_characters_are_no_characters(world: PlantedWorld, sample: Pool) -> None:
    options = attribute_options(world)
    columns = {name: index for index, name in enumerate(options)}
    x, labels = torch.zeros(16, 3, 64, 64), torch.zeros(16, len(options), dtype=torch.long)
    spoil(x, labels, columns, sample, 8, torch.Generator().manual_seed(1))
    none = options["character"].index("none")
    assert set(labels[:8, columns["character"]].tolist()) <= {-1, none}
    assert (labels[:8, columns["character"]] == none).sum() >= 4
    assert set(labels[:8, columns["object"]].tolist()) == {-1}
    assert not labels[8:].any() and not x[8:].any()


@pytest.mark.parametrize("change", [augment.generated_look, augment.copied])
def test_changes_follow_their_generator_and_keep_the_range(change: Any, sample: Pool) -> None:
    x = torch.from_numpy(sample.images[:9]).permute(0, 3, 1, 2).float() / 127.5 - 1
    first = change(x, torch.Generator().manual_seed(3))
    assert first.shape == x.shape
    assert float(first.min()) >= -1 and float(first.max()) <= 1
    assert torch.equal(first, change(x, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, change(x, torch.Generator().manual_seed(4)))


def test_jpeg_like_is_a_rounding_of_the_cosine_transform() -> None:
    x = torch.full((1, 3, 64, 64), 0.5)
    near = augment.jpeg_like(x, torch.Generator().manual_seed(0), probability=1.0)
    assert float((near - x).abs().max()) < 0.05


def test_calibration_error_of_certain_and_of_wrong() -> None:
    right = np.array([True, True, False, False])
    assert calibration_error(np.full(4, 0.5), right) == pytest.approx(0.0)
    assert calibration_error(np.full(4, 1.0), right) == pytest.approx(0.5)


def test_descriptors_are_unit_vectors() -> None:
    z = DescriptorNet((8, 16, 16, 16), 12)(torch.randn(3, 3, 64, 64))
    assert z.shape == (3, 12)
    assert torch.allclose(z.norm(dim=1), torch.ones(3))


def test_pools_join_with_their_families(world: PlantedWorld) -> None:
    first, second = (
        make_pool(world, PoolRecipe(name, 2, 1, sizes, 0, 0)) for name, sizes in (("a", 1), ("b", 3))
    )
    both = first.joined(second)
    assert len(both) == len(first) + len(second) and len(both.families) == 6
    np.testing.assert_array_equal(both.images[both.families[3:]], second.images[second.families])


def test_warping_moves_points_a_little() -> None:
    grid = augment.shift_grid(8, torch.Generator().manual_seed(0), 0.0, 0.0)
    moved = (augment.warped(grid, torch.Generator().manual_seed(1), 1.8) - grid) * 32
    assert 0.3 < float(moved.std()) < 1.8
    assert torch.equal(augment.warped(grid, torch.Generator().manual_seed(1), 0.0), grid)
