"""A segment-anything model from a checkpoint of any size."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor
from torch.nn import LayerNorm

DECODER_HEADS = 8
"""Attention heads of every published mask decoder; a checkpoint doesn't tell them."""


def sam_of(state: Mapping[str, Tensor]) -> Sam:
    """A ``segment_anything`` Sam of any size with these weights, in evaluation mode.

    Its sizes are read from the weights' shapes, so that the published files (vit_b, vit_l, vit_h) need no
    further name; what the shapes don't tell is as in all of them. Raises KeyError or RuntimeError for weights
    of another model.
    """

    def shape(name: str) -> tuple[int, ...]:
        return tuple(state[name].shape)

    blocks = range(_count(state, "image_encoder.blocks"))
    width, _, patch, _ = shape("image_encoder.patch_embed.proj.weight")
    grid, channels = shape("image_encoder.pos_embed")[1], shape("image_encoder.neck.0.weight")[0]
    rows = [(shape(f"image_encoder.blocks.{i}.attn.rel_pos_h")[0] + 1) // 2 for i in blocks]
    heads = width // shape("image_encoder.blocks.0.attn.rel_pos_h")[1]
    head = "mask_decoder.iou_prediction_head.layers"
    model = Sam(
        ImageEncoderViT(
            img_size=grid * patch,
            patch_size=patch,
            embed_dim=width,
            depth=len(blocks),
            num_heads=heads,
            mlp_ratio=shape("image_encoder.blocks.0.mlp.lin1.weight")[0] / width,
            out_chans=channels,
            norm_layer=partial(LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=next((r for r in rows if r != grid), 0),
            global_attn_indexes=tuple(i for i, r in enumerate(rows) if r == grid),
        ),
        PromptEncoder(
            embed_dim=channels,
            image_embedding_size=(grid, grid),
            input_image_size=(grid * patch, grid * patch),
            mask_in_chans=shape("prompt_encoder.mask_downscaling.3.weight")[0],
        ),
        MaskDecoder(
            transformer_dim=channels,
            transformer=TwoWayTransformer(
                depth=_count(state, "mask_decoder.transformer.layers"),
                embedding_dim=channels,
                num_heads=DECODER_HEADS,
                mlp_dim=shape("mask_decoder.transformer.layers.0.mlp.lin1.weight")[0],
            ),
            num_multimask_outputs=shape("mask_decoder.mask_tokens.weight")[0] - 1,
            iou_head_depth=_count(state, head),
            iou_head_hidden_dim=shape(f"{head}.0.weight")[0],
        ),
    )
    model.load_state_dict(state)
    return model.eval()


def _count(state: Mapping[str, Any], prefix: str) -> int:
    """How many numbered modules there are under a prefix."""
    start = prefix.count(".") + 1
    return len({name.split(".")[start] for name in state if name.startswith(prefix + ".")})
