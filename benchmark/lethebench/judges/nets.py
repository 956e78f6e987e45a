"""The small networks of the built-in judges: residual convolutions, poolings and a text transformer.

Everything normalises within one image (GroupNorm, LayerNorm), so that an image's answer doesn't
depend on the batch it is in. Widths and depths are ours: about a million parameters an image tower,
so that an image costs one or two milliseconds on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 64
"""Height and width of the images that the judges look at."""


class ResidualBlock(nn.Module):
    """Pre-activation residual block (He et al. 2016) with GroupNorm and SiLU.

    ``[n, width_in, h, w]`` to ``[n, width_out, h / stride, w / stride]``.
    """

    def __init__(self, width_in: int, width_out: int, stride: int = 1, groups: int = 8) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1)
        self.norm2 = nn.GroupNorm(groups, width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1)
        same = width_in == width_out and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(width_in, width_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Residual plus (projected) input."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return torch.add(self.skip(x), hidden)


class Trunk(nn.Module):
    """Convolutional image tower: ``[n, 3, 64, 64]`` in [-1, 1] to the maps of its last two stages.

    A 5x5 convolution of stride 2, one residual block at 32 pixels, then two blocks a stage, each
    stage halving the side. With four widths the maps are 8x8 and 4x4.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.stem = nn.Conv2d(3, widths[0], 5, 2, 2)
        self.stages = nn.ModuleList()
        for index, width in enumerate(widths):
            if index == 0:
                self.stages.append(ResidualBlock(width, width))
            else:
                before = widths[index - 1]
                self.stages.append(
                    nn.Sequential(ResidualBlock(before, width, 2), ResidualBlock(width, width))
                )
        self.norm = nn.GroupNorm(8, widths[-1])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The maps of the last stage but one and of the last stage (normalised, activated)."""
        x = self.stem(images)
        before = x
        for stage in self.stages:
            before, x = x, stage(x)
        return F.silu(before), F.silu(self.norm(x))


class MixedPool(nn.Module):
    """Means and maxima of the last maps and maxima of the finer ones, ``[n, 2 c_last + c_before]``."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.width = 2 * widths[-1] + widths[-2]

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        """Pool over space."""
        return torch.cat([last.mean((2, 3)), last.amax((2, 3)), before.amax((2, 3))], dim=1)


class GeMPool(nn.Module):
    """Generalised mean pooling (Radenovic et al. 2019) with fixed p, as SSCD uses (p = 3)."""

    def __init__(self, p: float = 3.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, maps: Tensor) -> Tensor:
        """``[n, c, h, w]`` to ``[n, c]``."""
        pooled: Tensor = maps.float().clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p)
        return pooled


class RecogniserNet(nn.Module):
    """A trunk, one hidden layer, and one linear map that is split into the heads' logits."""

    def __init__(self, widths: Sequence[int], hidden: int, heads: Sequence[int]) -> None:
        super().__init__()
        self.heads = tuple(heads)
        self.trunk = Trunk(widths)
        self.pool = MixedPool(widths)
        self.hidden = nn.Linear(self.pool.width, hidden)
        self.logits = nn.Linear(hidden, sum(heads))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits ``[n, options]`` of each head, float32."""
        pooled = self.pool(*self.trunk(images))
        logits = self.logits(F.silu(self.hidden(pooled))).float()
        return torch.split(logits, list(self.heads), dim=1)


class SegmenterNet(nn.Module):
    """A small U-net (Ronneberger et al. 2015): ``[n, 3, 64, 64]`` to foreground logits ``[n, 64, 64]``.

    Sides 64, 32, 16, 8; one convolution at full size keeps the outline sharp at little cost.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        fine, *coarse = widths
        self.stem = nn.Conv2d(3, fine, 3, 1, 1)
        self.down = nn.ModuleList()
        before = fine
        for width in coarse:
            self.down.append(ResidualBlock(before, width, 2))
            before = width
        self.middle = ResidualBlock(before, before)
        self.up = nn.ModuleList()
        for width in reversed(coarse[:-1]):
            self.up.append(ResidualBlock(before + width, width))
            before = width
        self.refine = nn.Sequential(
            nn.GroupNorm(8, before + fine),
            nn.SiLU(),
            nn.Conv2d(before + fine, fine, 3, 1, 1),
            nn.GroupNorm(8, fine),
            nn.SiLU(),
            nn.Conv2d(fine, 1, 3, 1, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Foreground logits, float32."""
        x = self.stem(images)
        kept = [x]
        for block in self.down:
            x = block(x)
            kept.append(x)
        x = self.middle(kept.pop())
        for block in self.up:
            x = block(torch.cat([_double(x), kept.pop()], dim=1))
        x = self.refine(torch.cat([_double(x), kept.pop()], dim=1))
        logits: Tensor = x[:, 0].float()
        return logits


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class DescriptorNet(nn.Module):
    """SSCD's shape (Pizzi et al. 2022): trunk, GeM pooling, a linear map, l2 normalisation.

    ``[n, 3, 64, 64]`` to unit descriptors ``[n, size]``, float32.
    """

    def __init__(self, widths: Sequence[int], size: int) -> None:
        super().__init__()
        self.trunk = Trunk(widths)
        self.pool = GeMPool()
        self.project = nn.Linear(widths[-1] + widths[-2], size)

    def forward(self, images: Tensor) -> Tensor:
        """Unit descriptors."""
        before, last = self.trunk(images)
        pooled = torch.cat([self.pool(before), self.pool(last)], dim=1)
        return F.normalize(self.project(pooled).float(), dim=1)


class ImageTower(nn.Module):
    """clip-mini's image side: trunk, a narrow layer of ``features``, an embedding of size ``size``.

    The narrow layer is the penultimate one, on which the Frechet distance is taken.
    """

    def __init__(self, widths: Sequence[int], features: int, size: int) -> None:
        super().__init__()
        self.trunk = Trunk(widths)
        self.pool = MixedPool(widths)
        self.narrow = nn.Linear(self.pool.width, features)
        self.project = nn.Linear(features, size)

    def features(self, images: Tensor) -> Tensor:
        """The penultimate features ``[n, features]``, float32."""
        narrow: Tensor = self.narrow(self.pool(*self.trunk(images)))
        return narrow.float()

    def forward(self, images: Tensor) -> Tensor:
        """Unit embeddings ``[n, size]``, float32."""
        return F.normalize(self.project(F.silu(self.features(images))).float(), dim=1)


class TextLayer(nn.Module):
    """A pre-norm transformer layer; ``bias`` float32 ``[n, 1, 1, length]`` is added to the scores.

    Written out because PyTorch's own layer takes twice the time in bfloat16 on a CPU.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.join = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """``[n, length, width]`` to the same shape."""
        n, length, width = x.shape
        size = width // self.heads
        q, k, v = self.join(self.norm1(x)).view(n, length, 3, self.heads, size).permute(2, 0, 3, 1, 4)
        attention = torch.softmax((q @ k.transpose(2, 3)).float() / size**0.5 + bias, -1).to(v.dtype)
        x = x + self.out((attention @ v).transpose(1, 2).reshape(n, length, width))
        return torch.add(x, self.down(F.gelu(self.up(self.norm2(x)))))


class TextTower(nn.Module):
    """clip-mini's text side: word and place embeddings, a small transformer, the mean over words.

    ``tokens`` int64 ``[n, length]``, 0 being padding, to unit embeddings ``[n, size]``. Attention is
    full, not causal (CLIP's is causal; our captions are short and read at once).
    """

    def __init__(self, words: int, width: int, layers: int, heads: int, length: int, size: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width, padding_idx=0)
        self.places = nn.Parameter(torch.randn(length, width) * 0.02)
        self.layers = nn.ModuleList(TextLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Unit embeddings, float32."""
        empty = tokens == 0
        bias = torch.where(empty, -1e4, 0.0)[:, None, None]
        x = self.words(tokens) + self.places[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, bias)
        x = self.norm(x)
        kept = (~empty).unsqueeze(2).to(x.dtype)
        mean = (x * kept).sum(1) / kept.sum(1).clamp(min=1)
        return F.normalize(self.project(mean).float(), dim=1)


class ClipNet(nn.Module):
    """Both towers and the learnt logit scale (Radford et al. 2021: starts at 1 / 0.07, at most 100)."""

    def __init__(self, image: ImageTower, text: TextTower) -> None:
        super().__init__()
        self.image = image
        self.text = text
        self.log_scale = nn.Parameter(torch.tensor(2.659))

    def scale(self) -> Tensor:
        """The logit scale."""
        return self.log_scale.exp().clamp(max=100.0)


def parameters_of(net: nn.Module) -> int:
    """How many parameters the network has."""
    return sum(p.numel() for p in net.parameters())
