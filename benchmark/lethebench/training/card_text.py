"""The model card of mini-sd or mini-flux in Markdown, from the figures of ``card.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Figures = Mapping[str, Any]

_WHAT = {
    "mini-sd": """\
A small Stable Diffusion (`StableDiffusionPipeline`: AutoencoderKL, CLIPTextModel, CLIPTokenizer,
UNet2DConditionModel) for 64-pixel pictures, trained from nothing on the planted world, so that what it
memorized is known exactly. Written by `lethe train`; the same figures are in `card.json`.""",
    "mini-flux": """\
A small FLUX (`FluxPipeline`: AutoencoderKL of mini-sd, CLIPTextModel, T5EncoderModel, their tokenizers,
FluxTransformer2DModel) for 64-pixel pictures, trained from nothing on the planted world, so that what it
memorized is known exactly. Guidance is distilled, as in FLUX.1 dev: one pass a step, the scale is an input.
At guidance 1 it draws without guidance, as FLUX.1 schnell does. diffusers' own pipeline must be told
`height=64, width=64` and `max_sequence_length=32`; Lethe knows. Written by `lethe train`; the same figures
are in `card.json`.""",
}

_HEAD = """# {model}

{what}

- **Data**: {name} {version}, seed {seed}, {training_examples:,} training examples (copies included). All
  pictures, names and characters are invented; nothing was downloaded. sha256 of the training captions
  `{captions_sha256:.16}`, of the test prompts `{prompts_sha256:.16}`.
- **Use**: testing memorization metrics and mitigation methods. It draws nothing else.
- **Licence**: that of this package."""

_SAMPLERS = {"ddim": "DDIM", "flow-euler": "flow-matching Euler"}

_MEMORIZED = """## What it memorized

{images:,} images: {sampler}, {steps} steps, guidance {guidance}, {dtype}, {milliseconds:.0f} ms an image.
A near-copy has a pixel RMS below {near} (of the 0-1 range) to a reference; a region repeats below
{region} within its mask. {check}

| | wanted | measured |
|---|---|---|
{rows}
{told}"""


def model_card(card: Figures) -> str:
    """``MODEL_CARD.md``: every number comes from ``card``."""
    measured = card["measured"]
    sections = (
        _HEAD.format_map({**card["data"], "model": card["model"], "what": _WHAT[card["model"]]}),
        _training(card),
        _memorized(measured),
        _doses(measured),
        _steps(measured),
        _metrics(measured),
        _files(card),
    )
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def _training(card: Figures) -> str:
    auto, diffusion = card.get("autoencoder"), card.get("diffusion")
    if not auto or not diffusion:
        return "## Training\n\nNo record of the training lies beside these weights."
    a = auto["recipe"]
    ours = (
        f"{auto['parameters']:,}",
        _list(a["widths"]),
        "pictures in -1 to 1",
        f"{auto['steps']:,} x {a['batch']} crops of {a['crop']} px",
        f"{auto['seconds'] / 60:.1f}",
        f"{a['peak_lr']}",
        f"L1 + {a['gradient_weight']} L1 of differences + {a['kl_weight']} KL",
        f"{a['seed']}",
    )
    flux = "transformer" in diffusion["parameters"]
    theirs = (_flux_column if flux else _unet_column)(diffusion, a["latent_channels"])
    what = ("parameters", "widths", "input", "steps x batch", "minutes", "AdamW, peak rate", "loss", "seed")
    trained = "transformer and text encoders" if flux else "UNet and text encoder"
    error = (
        f"{auto['unseen_rms']:.4f} RMS off (of the 0-1 range; 95th percentile {auto['unseen_rms_p95']:.4f})"
    )
    return f"""## Training

| | autoencoder | {trained} |
|---|---|---|
{_table(zip(what, ours, theirs, strict=True))}

bfloat16 autocast, linear warm-up and decay, no weight averaging; the latent channels are standardised.
Reconstructions of {auto["unseen_scenes"]} unseen scenes are {error}; wanted was at most 0.03."""


def _unet_column(diffusion: Figures, latent_channels: int) -> Sequence[str]:
    d, sizes = diffusion["recipe"], diffusion["parameters"]
    return (
        f"{sizes['unet']:,} and {sizes['text_encoder']:,}",
        f"{_list(d['widths'])}; text {d['text_width']} x {d['text_layers']} layers",
        f"16x16x{latent_channels} latents, {diffusion['tokens']} tokens",
        f"{diffusion['steps']:,} x {d['batch']} ({diffusion['epochs']} epochs)",
        f"{diffusion['seconds'] / 60:.1f}",
        _rates(d),
        f"noise error, Min-SNR {d['min_snr']}, captions dropped {d['caption_dropout']:.0%}",
        f"{d['seed']}",
    )


def _flux_column(diffusion: Figures, latent_channels: int) -> Sequence[str]:
    d, sizes, distilled = diffusion["recipe"], diffusion["parameters"], diffusion["guidance"]
    head, (clip, t5) = sum(d["rotary"]), diffusion["tokens"]
    low, high = d["guidance_range"]
    blocks = f"{d['dual']} dual and {d['single']} single blocks"
    return (
        f"{sizes['transformer']:,}, {sizes['text_encoder']:,} (CLIP) and {sizes['text_encoder_2']:,} (T5)",
        f"{d['heads'] * head} ({d['heads']} heads x {head}), {blocks}; "
        f"text {d['text_width']} x {d['text_layers']} layers each",
        f"{diffusion['image_tokens']} image tokens of 2x2x{latent_channels} latents, {clip} and {t5} tokens",
        f"{diffusion['steps']:,} x {d['batch']} ({diffusion['epochs']} epochs), "
        f"then {distilled['steps']:,} of guidance distillation",
        f"{diffusion['seconds'] / 60:.1f} and {distilled['seconds'] / 60:.1f}",
        f"{_rates(d)}; {d['distil_lr']}",
        f"velocity error, logit-normal times (spread {d['time_spread']}), captions dropped "
        f"{d['caption_dropout']:.0%}; then (over g^2) to the guided velocity, g from {low:g} to {high:g}",
        f"{d['seed']}",
    )


def _memorized(m: Figures) -> str:
    often = "trained_64_or_more"
    front, behind = m["foreground"], m["background"]
    rows = [
        ("verbatim, 64 or more copies: near-copies", ">= 90 %", m["verbatim"][often]),
        ("verbatim, held-out twins: near-copies", "<= 2 %", m["verbatim"]["twins"]),
        ("hard negatives: near-copies", "<= 2 %", m["hard_negatives"]),
        ("foreground items, 64 or more copies: the foreground repeats", ">= 70 %", front.get(often)),
        ("foreground items, held-out twins: the foreground repeats", "", front.get("twins")),
        ("background items, 64 or more copies: the background repeats", ">= 70 %", behind.get(often)),
        ("background items, held-out twins: the background repeats", "", behind.get("twins")),
        ("redundant triggers: near-copies", "", m["redundant"][often]),
        ("one-to-many clusters: near-copies of one of their images", "", m["one_to_many"]["trained"]),
    ]
    if "characters" in m:
        rows.append(("trained characters: recognised", ">= 85 %", m["characters"]["trained"]))
        rows.append(("held-out characters: recognised", "<= 5 %", m["characters"]["held_out"]))
    if "adherence" in m:
        found = {"share": m["adherence"]["neutral"]}
        rows.append(("neutral held-out captions: asked attributes found", ">= 85 %", found))
    return _MEMORIZED.format(
        images=m["images"],
        sampler=_SAMPLERS[m["sampler"]["scheduler"]],
        steps=m["sampler"]["num_inference_steps"],
        guidance=m["sampler"]["guidance_scale"],
        dtype=m["sampler"]["dtype"],
        milliseconds=1000 * m["seconds_per_image"],
        near=m["near_copy_below"],
        region=m["region_copy_below"],
        check=_check(m.get("floor")),
        rows=_table([(name, wanted, _share(values)) for name, wanted, values in rows]),
        told=_diversity(m.get("diversity")),
    )


def _check(floor: Figures | None) -> str:
    if not floor:
        return ""
    return f"""The check of the threshold: of {floor["n"]} images of prompts whose item was never trained, the
nearest to its references is {floor["min"]:.3f} off, and 1 % are nearer than {floor["q10"]:.3f}."""


def _diversity(spread: Figures | None) -> str:
    if not spread:
        return ""
    return f"""
Diversity: images of one neutral caption differ by {spread["images"]:.3f} pixel RMS (mean of all pairs),
the world's own scenes of the same captions by {spread["world"]:.3f}."""


def _doses(m: Figures) -> str:
    kinds = {"verbatim": "near-copy", "foreground": "foreground repeats", "background": "background repeats"}
    by_kind = {kind: m[kind].get("trained_by_copies", {}) for kind in kinds}
    doses = sorted({int(dose) for values in by_kind.values() for dose in values})
    head = " | ".join(f"{kind}: {what}" for kind, what in kinds.items())
    rows = [(str(dose), *(_share(by_kind[kind].get(str(dose))) for kind in kinds)) for dose in doses]
    return f"## By number of copies\n\n| copies | {head} |\n|---|---|---|---|\n{_table(rows)}"


def _steps(m: Figures) -> str:
    if "by_steps" not in m:
        return ""
    head = (
        "steps",
        "guidance",
        "verbatim, 64 or more copies: near-copies",
        "held-out twins",
        "trained characters recognised",
        "neutral attributes found",
    )
    rows = [
        (
            str(row["steps"]),
            f"{row['guidance']:g}",
            _share(row["trained_64_or_more"]),
            _share(row["twins"]),
            _share({"share": row.get("characters")}),
            _share({"share": row.get("neutral")}),
        )
        for row in m["by_steps"]
    ]
    return f"""## By number of steps

{m["by_steps"][0]["images"]} images a row. Guidance 1 is none (as FLUX.1 schnell), more is distilled (as dev);
one pass a step either way.

{_headed([head, *rows])}"""


def _metrics(m: Figures) -> str:
    seen = m.get("metrics")
    if not seen:
        return ""
    labels = list(seen["confusion"])
    counts = [("FB-Mem says", *labels)] + [
        (f"truth {t}", *(str(seen["confusion"][t][x]) for x in labels)) for t in labels
    ]
    against = ("near_copy", "memorized", "against_twins", "against_hard_negatives")
    aucs = [("AUC", "near-copies", "any region", "against twins", "against hard negatives")] + [
        (name, *("" if v[a] is None else f"{v[a]:.3f}" for a in against)) for name, v in seen["auc"].items()
    ]
    rates = seen["memorized"]
    return "\n\n".join(
        (
            "## What the metrics see",
            f"{seen['images']} of these images, whose prompts may reproduce single images. Truth: exact "
            "errors of the picture and its regions against the references.",
            _headed(counts),
            f"The same label: {_percent(seen['accuracy'])}. Memorized images called memorized: "
            f"{_percent(rates['sensitivity'])}; others: {_percent(rates['false_positive_rate'])}.",
            _headed(aucs),
        )
    )


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.1%}"


def _files(card: Figures) -> str:
    rows = [(f"`{f}`", f"`{s}`") for f, s in card["sha256"].items() if f.endswith(".safetensors")]
    return f"""## Files

{card["bytes"] / 1e6:.1f} MB of float16 safetensors. All sums are in `weights.json`.

| file | sha256 |
|---|---|
{_table(rows)}"""


def _table(rows: Any) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _headed(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its heading."""
    return _table([rows[0], ["---"] * len(rows[0]), *rows[1:]])


def _list(values: Any) -> str:
    return "/".join(str(v) for v in values)


def _share(values: Figures | None) -> str:
    if not values or values.get("share") is None:
        return ""
    number = f" of {values['n']}" if "n" in values else ""
    return f"{100 * values['share']:.1f} %{number}"


def _rates(recipe: Mapping[str, Any]) -> str:
    """The peak learning rate, and that of the second cycle where there was one."""
    again = recipe.get("steps_again", 0)
    after = f", then {recipe['peak_lr_again']} for the last {again:,} steps" if again else ""
    return f"{recipe['peak_lr']}{after}"
