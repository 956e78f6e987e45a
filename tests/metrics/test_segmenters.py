from __future__ import annotations

import dataclasses
import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from metric_fakes import fresh, scene_of, shard, small_world, trained
from scipy.special import expit
from segment_anything import SamAutomaticMaskGenerator, sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from lethebench.errors import UserError
from lethebench.metric import Shard, configure_metric
from lethebench.metrics.fbmem import FBMem, FBMemAsReleased, segmenters
from lethebench.metrics.fbmem._sam import sam_of
from lethebench.prompts import Reference


def images(count: int = 3, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def one_line(error: pytest.ExceptionInfo[UserError], *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# --- BiRefNet -------------------------------------------------------------------------------------

WEIGHT, BIAS = np.array([2.0, -3.0, 1.5], np.float32), np.float32(-0.5)


def birefnet_file(path: Path, side: int = 1024, channels: int = 1, rank: int = 4) -> Path:
    """An ONNX file with the published one's input and output: a 1 x 1 convolution of the three colours."""
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper, floats = onnx.helper, onnx.numpy_helper, onnx.TensorProto.FLOAT
    shape = [1, 3, side, side][:rank]
    weight = np.tile(WEIGHT.reshape(1, 3, 1, 1), (channels, 1, 1, 1))
    graph = helper.make_graph(
        [helper.make_node("Conv", ["input_image", "w", "b"], ["output_image"])]
        if rank == 4
        else [helper.make_node("Identity", ["input_image"], ["output_image"])],
        "birefnet",
        [helper.make_tensor_value_info("input_image", floats, shape)],
        [helper.make_tensor_value_info("output_image", floats, None)],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.full(channels, BIAS), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(path))
    return path


@pytest.fixture
def birefnet(tmp_path: Path) -> Path:
    pytest.importorskip("onnxruntime")
    return birefnet_file(tmp_path / "birefnet.onnx")


def test_birefnet_is_the_sigmoid_of_its_logits_resized_back(birefnet: Path) -> None:
    flat = np.zeros((3, 40, 72, 3), np.uint8)
    flat[0], flat[1], flat[2] = (255, 0, 30), (10, 200, 90), (0, 0, 0)
    found = segmenters.load_segmenter("birefnet", str(birefnet)).masks(flat)
    pixels = (flat[:, 0, 0] / 255 - segmenters.IMAGENET_MEAN) / segmenters.IMAGENET_STD
    expected = expit(pixels @ WEIGHT.astype(float) + BIAS)
    assert found.dtype == np.float32 and found.shape == (3, 40, 72)
    np.testing.assert_allclose(found, np.broadcast_to(expected[:, None, None], found.shape), atol=1e-5)


def test_birefnet_equals_torchvision_and_interpolate_on_a_picture(birefnet: Path) -> None:
    from torchvision.transforms import Compose, Normalize, Resize, ToTensor
    from torchvision.transforms.functional import to_pil_image

    image = fresh(trained("verbatim")[0]).image
    steps = [Resize((1024, 1024)), ToTensor(), Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    x = Compose(steps)(to_pil_image(image))[None]
    logits = torch.nn.functional.conv2d(x, torch.from_numpy(WEIGHT).view(1, 3, 1, 1)) + float(BIAS)
    expected = torch.nn.functional.interpolate(
        logits.sigmoid(), (64, 64), mode="bilinear", antialias=True, align_corners=False
    )[0, 0]
    found = segmenters.load_segmenter("birefnet", str(birefnet)).masks(image[None])[0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_an_empty_scene_keeps_its_low_probabilities(birefnet: Path) -> None:
    """rembg would stretch them from 0 to 1."""
    scene = np.full((1, 64, 64, 3), (0, 250, 0), np.uint8)
    scene[0, :5, :5] = (0, 255, 0)
    assert segmenters.load_segmenter("birefnet", str(birefnet)).masks(scene).max() < 0.01


def test_birefnet_reads_the_side_that_its_file_fixes(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    small = segmenters.load_segmenter("birefnet", str(birefnet_file(tmp_path / "small.onnx", 512)))
    assert small.size == (512, 512)  # type: ignore[attr-defined]
    assert small.masks(images(1, 100, 90)).shape == (1, 100, 90)


def test_files_that_are_not_birefnet_are_one_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    with pytest.raises(UserError) as error:
        FBMem("birefnet", str(text)).check()
    one_line(error, "birefnet", "text.onnx", "not a readable ONNX file")
    with pytest.raises(UserError) as error:
        FBMem("birefnet", str(birefnet_file(tmp_path / "flat.onnx", 32, rank=2))).check()
    one_line(error, "one input [1, 3, height, width]")
    three = segmenters.load_segmenter("birefnet", str(birefnet_file(tmp_path / "three.onnx", 32, 3)))
    with pytest.raises(UserError) as error:
        three.masks(images(1))
    one_line(error, "logits [1, 1, height, width]", "[1, 3, 32, 32]")


# --- segment-anything -----------------------------------------------------------------------------


def tiny_sam(sure: bool = True) -> Sam:
    """A Sam of 32 x 32 pixels with random weights; ``sure`` of its masks, so that none is filtered out."""
    torch.manual_seed(55)  # gives a mask with a corner and one without
    model = Sam(
        ImageEncoderViT(
            img_size=32,
            patch_size=4,
            embed_dim=24,
            depth=3,
            num_heads=3,
            mlp_ratio=2,
            out_chans=16,
            qkv_bias=True,
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1,),
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        ),
        PromptEncoder(embed_dim=16, image_embedding_size=(8, 8), input_image_size=(32, 32), mask_in_chans=4),
        MaskDecoder(
            transformer_dim=16,
            transformer=TwoWayTransformer(depth=2, embedding_dim=16, num_heads=8, mlp_dim=20),
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=12,
        ),
    )
    if sure:
        with torch.no_grad():
            model.mask_decoder.iou_prediction_head.layers[-1].bias.fill_(5)
            for hyper in model.mask_decoder.output_hypernetworks_mlps:
                hyper.layers[-1].weight.mul_(1000)
                hyper.layers[-1].bias.mul_(1000)
    return model.eval()


@pytest.fixture(scope="module")
def sam_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sam") / "sam_tiny.pth"
    torch.save(tiny_sam().state_dict(), path)
    return path


def test_sam_from_its_file_is_the_union_of_masks_without_corners(sam_file: Path) -> None:
    made = np.stack([scene_of(p).image for p in trained("verbatim")[:1]])
    found = segmenters.load_segmenter("sam", str(sam_file)).masks(made)
    generator = SamAutomaticMaskGenerator(tiny_sam())
    kept, left_out = 0, 0
    for image, mask in zip(made, found, strict=True):
        expected = np.zeros((64, 64), bool)
        for one in generator.generate(image):
            held = one["segmentation"]
            if not (held[0, 0] or held[0, -1] or held[-1, 0] or held[-1, -1]):
                expected |= held
                kept += 1
            else:
                left_out += 1
        assert np.array_equal(mask, expected.astype(np.float32))
    assert found.dtype == np.float32 and found.shape == (1, 64, 64)
    assert kept and left_out, "the tiny model must give masks of both sorts"


def test_a_sam_that_is_sure_of_nothing_finds_no_foreground(tmp_path: Path) -> None:
    torch.save(tiny_sam(sure=False).state_dict(), tmp_path / "unsure.pth")
    assert not segmenters.load_segmenter("sam", str(tmp_path / "unsure.pth")).masks(images(1)).any()


@pytest.mark.parametrize("kind", ["vit_b", "vit_l", "vit_h"])
def test_published_sizes_of_sam_are_read_from_the_weights(kind: str) -> None:
    with torch.device("meta"):
        theirs = sam_model_registry[kind]()
        ours = sam_of({**theirs.state_dict()})
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes
    for a, b in zip(ours.image_encoder.blocks, theirs.image_encoder.blocks, strict=True):
        assert (a.window_size, a.attn.num_heads) == (b.window_size, b.attn.num_heads)
    assert ours.image_encoder.img_size == theirs.image_encoder.img_size == 1024
    assert ours.prompt_encoder.input_image_size == theirs.prompt_encoder.input_image_size
    layer, own = theirs.mask_decoder.transformer.layers[0], ours.mask_decoder.transformer.layers[0]
    assert layer.self_attn.num_heads == own.self_attn.num_heads


def test_a_checkpoint_of_another_model_is_one_clear_error(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no pickle")
    for name in ("other.pth", "text.pth"):
        with pytest.raises(UserError) as error:
            FBMem("sam", str(tmp_path / name)).check()
        one_line(error, name, "not a checkpoint of segment-anything")


def test_foreground_is_what_holds_no_corner() -> None:
    sky, ball, hat = np.zeros((3, 8, 8), bool)
    sky[:3] = True
    ball[4:7, 2:5] = True
    hat[3, 3:5] = True
    found = segmenters.foreground_of_masks([sky, ball, hat], 8, 8)
    assert np.array_equal(found, (ball | hat).astype(np.float32))
    assert not segmenters.foreground_of_masks([], 8, 8).any()


# --- given ----------------------------------------------------------------------------------------


def test_given_masks_are_found_by_their_image(tmp_path: Path) -> None:
    made = [*images(2), *images(1, 40, 50)]
    masks = [np.zeros((64, 64), bool), np.full((64, 64), 0.4), np.full((40, 50), 255, np.uint8)]
    masks[0][:9] = True
    segmenters.write_masks(tmp_path / "masks.safetensors", made, masks)
    given = segmenters.load_segmenter("given", str(tmp_path / "masks.safetensors"))
    assert np.array_equal(given.masks(np.stack(made[1::-1]))[1], masks[0].astype(np.float32))
    np.testing.assert_allclose(given.masks(made[1][None]), 0.4, atol=0.5 / 255)
    assert given.masks(made[2][None]).shape == (1, 40, 50) and given.masks(made[2][None]).min() == 1
    assert segmenters.image_key(made[0]) == hashlib.sha256(made[0].tobytes()).hexdigest()


def test_given_masks_that_are_missing_or_wrong_are_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    segmenters.write_masks(path, images(1), [np.zeros((64, 64))])
    with pytest.raises(UserError) as error:
        segmenters.load_segmenter("given", str(path)).masks(images(2))
    one_line(error, "has no mask of the image with sha256", "write_masks")
    with pytest.raises(ValueError, match=r"a mask must be \[64, 64\]; got \[2, 2\]"):
        segmenters.write_masks(path, images(1), [np.zeros((2, 2))])
    with pytest.raises(ValueError, match="bool, float in 0 to 1, or uint8"):
        segmenters.write_masks(path, images(1), [np.full((64, 64), 3.0)])
    path.write_text("nothing")
    with pytest.raises(UserError) as error:
        FBMem("given", str(path)).check()
    one_line(error, "not a safetensors file of masks")


# --- by name, in the metric -----------------------------------------------------------------------


def test_every_segmenter_says_what_it_lacks_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for settings, *words in (
        ({"segmenter": "birefnett"}, "unknown segmenter", "did you mean birefnet?"),
        ({"segmenter": "birefnet"}, "segmenter_weights", "BiRefNet's ONNX file"),
        ({"segmenter": "sam", "segmenter_weights": "nowhere.pth"}, "there is no file nowhere.pth"),
        ({"segmenter_weights": "x.pth"}, "leave segmenter_weights empty"),
        ({"segmenter": "given"}, "segmenter_weights", "write_masks"),
        ({"resolution": 512}, "segmenter-mini reads 64 pixels a side, not 512"),
        ({"resolution": 16}, "resolution must be pixels from 44"),
        ({"keep": 1}, "keep must be a whole number from 2"),
        ({"keep": "all"}, "keep must be"),
        ({"tau_foreground": 1.5}, "tau_foreground must be from 0 to 1"),
        ({"true_masks": 1}, "true_masks must be true or false"),
        ({"segmenter": 3}, "segmenter must be a name; got 3"),
        ({"segmenter": "sam", "segmenter_weights": 3}, "segmenter_weights must be a path; got 3"),
    ):
        for metric in (FBMem, FBMemAsReleased):
            with pytest.raises(UserError) as error:
                configure_metric(metric, settings).check()
            one_line(error, *words)
    monkeypatch.setattr(segmenters, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        FBMem("birefnet", "x.onnx").check()
    one_line(error, "pip install lethebench[birefnet]")
    FBMem().check()


def test_built_in_segmenter_refuses_other_sizes() -> None:
    with pytest.raises(UserError) as error:
        segmenters.load_segmenter("segmenter-mini").masks(images(1, 128, 128))
    one_line(error, "segmenter-mini reads 64 x 64 images; got 128 x 128", "birefnet")


def test_the_segmenters_file_and_name_enter_the_record(sam_file: Path) -> None:
    metric = FBMem("sam", str(sam_file), tau_foreground=0.5, tau_background=0.6)
    assert metric.weights() == {"sam": sam_file}
    assert {s.judge for s in metric.all_scores()} == {"sam"}
    assert {s.judge for s in FBMem().all_scores()} == {"segmenter-mini"}
    assert FBMem().weights()["segmenter-mini"].is_file()
    facts = metric.facts()
    assert facts["foregrounds"] == "sam"
    assert facts["thresholds_from"] == {"foreground": "settings", "background": "settings"}
    assert facts["thresholds"] == {"foreground": 0.5, "background": 0.6}
    for metric, calibrated in ((FBMem("sam", str(sam_file)), False), (FBMem(), True)):
        for told in metric.facts()["thresholds_from"].values():
            assert ("not calibrated" not in told) == calibrated
    assert list(FBMem().facts()["scales"]) == ["44 to 175", "176 or more"]


def test_given_masks_give_the_labels_of_true_masks(tmp_path: Path) -> None:
    made = [(p, scene_of(p)) for p in trained("verbatim")[:2]]
    made += [(p, scene_of(p, 2)) for p in trained("foreground")[:1] + trained("background")[:1]]
    path = tmp_path / "masks.safetensors"
    segmenters.write_masks(path, [m.image for _, m in made], [m.mask for _, m in made])
    metric = FBMem("given", str(path))
    metric.check()
    assert metric.measure(shard(made))["fbmem_label"].tolist() == ["VM", "VM", "FM", "BM"]


class Enlarged:
    """The small world with references at other sizes than the images."""

    name, version = "enlarged", "1"

    def __init__(self) -> None:
        self.world = small_world()

    def __iter__(self) -> Any:
        return iter(self.world)

    def reference(self, name: str) -> Reference:
        own = self.world.reference(name)
        assert own.mask is not None
        return Reference(name, own.image.repeat(3, 0).repeat(4, 1), own.mask.repeat(3, 0).repeat(4, 1))


def test_resolution_compares_pictures_of_different_sizes_with_five_scales(tmp_path: Path) -> None:
    made = [(p, scene_of(p)) for p in trained("verbatim")[:1]]
    made += [(p, scene_of(p, 2)) for p in trained("background")[:1]]
    made += [(p, fresh(p)) for p in trained("verbatim")[:1]]
    given = Shard(np.stack([m.image for _, m in made]), tuple(p for p, _ in made), (0, 1, 2), Enlarged())  # type: ignore[arg-type]
    path = tmp_path / "masks.safetensors"
    segmenters.write_masks(path, [m.image for _, m in made], [m.mask for _, m in made])
    for cls in (FBMem, FBMemAsReleased):
        metric = cls("given", str(path), resolution=176, keep=4)
        columns = metric.measure(given)
        own, best = columns[f"{metric.prefix}_own"], columns[f"{metric.prefix}_best"]
        assert own[0] > 0.9 and best[0] == made[0][0].references[0]
        assert own[2] < own[0]
        assert metric.facts()["scales"] == {"176": [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]}
    assert FBMem("given", str(path), resolution=176, keep=4).measure(given)["fbmem_label"][0] == "VM"
    with pytest.raises(ValueError, match=r"reference .* is .* the images are"):
        FBMem("given", str(path)).measure(given)


def test_settings_are_frozen_and_known() -> None:
    metric = configure_metric(FBMem, {"segmenter": "sam", "segmenter_weights": "x"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        metric.segmenter = "given"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="did you mean 'segmenter'"):
        configure_metric(FBMem, {"segmentor": "sam"})
    for field in dataclasses.fields(FBMem):
        assert field.metadata["help"]
