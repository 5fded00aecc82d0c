# SPDX-License-Identifier: MIT
"""Non-local means denoising of a photograph, as neighborhood attention.

Non-local means replaces every pixel by a mean of the pixels around it, weighted by how much their patches look alike:

    weight(i, j) = exp(-|f_i - f_j|^2 / h^2)        normalised over the j in a 21x21 window around i

Expanded, the exponent is 2 f_i.f_j - |f_j|^2 - |f_i|^2, and its last term cancels in the normalisation. What is left
is a dot product of vectors with one more column, so the whole filter is one call of neighborhood attention:

    query_i = [2 f_i / h, 1]        key_j = [f_j / h, -|f_j|^2 / h^2]        value_j = the pixels

Run it: ``python examples/denoise.py [--image camera | astronaut | chelsea | ...]``
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage
import torch
from PIL import Image, ImageDraw, ImageFont
from skimage import data
from skimage.metrics import peak_signal_noise_ratio
from skimage.restoration import denoise_nl_means
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

import natten

WINDOW = 21  # pixels across: what a pixel looks at
COMPONENTS = (
    7  # principal components of a patch that are compared; with the extra column, head_dim 8
)
IMAGES = (
    "camera",
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "moon",
)  # shipped inside scikit-image


def padded(image: Tensor, radius: int) -> Tensor:
    """[x, y, channels] -> [1, channels, x + 2 * radius, y + 2 * radius]."""
    return functional.pad(image.permute(2, 0, 1)[None], (radius,) * 4, mode="reflect")


def patches(image: Tensor, radius: int) -> Tensor:
    """The square around every pixel: [x, y, channels] -> [x, y, channels * side * side]."""
    x, y, _ = image.shape
    return functional.unfold(padded(image, radius), 2 * radius + 1)[0].T.reshape(x, y, -1)


def overlap_mean(squares: Tensor, radius: int) -> Tensor:
    """The inverse of `patches`: every pixel becomes the mean of all the squares that cover it."""
    x, y, n = squares.shape
    side = 2 * radius + 1
    grid = (x + 2 * radius, y + 2 * radius)
    columns = squares.reshape(x * y, n).T[None]
    total = functional.fold(columns, grid, side)
    count = functional.fold(torch.ones(1, side * side, x * y), grid, side)
    return (total / count)[0, :, radius:-radius, radius:-radius].permute(1, 2, 0)


def features(noisy: Tensor, radius: int, sigma: float) -> Tensor:
    """The main principal components of every patch, each weighted by the share of it that is not noise.

    Noise is the same in all components and the picture is in a few: comparing those is both faster and less noisy.
    """
    squares = patches(noisy, radius).flatten(0, 1)[::7]  # enough to know the covariance
    squares = squares - squares.mean(0)
    variance, vectors = torch.linalg.eigh(squares.T @ squares / len(squares))
    variance, vectors = variance[-COMPONENTS:], vectors[:, -COMPONENTS:]
    vectors = vectors * ((variance - sigma**2).clamp_min(0) / variance).sqrt()
    kernels = vectors.T.reshape(COMPONENTS, noisy.shape[-1], 2 * radius + 1, 2 * radius + 1)
    found = functional.conv2d(padded(noisy, radius), kernels)[0]
    # Smaller numbers, smaller rounding errors; differences stay.
    return (found - found.mean((1, 2), keepdim=True)).permute(1, 2, 0)


@dataclass(frozen=True)
class Attention:
    """Arguments of the one call of neighborhood attention, each [1, x, y, 1, head_dim]."""

    query: Tensor
    key: Tensor
    value: Tensor

    def __call__(self) -> Tensor:
        return natten.na2d(self.query, self.key, self.value, kernel_size=WINDOW, scale=1.0)

    def kernel(self) -> str:
        """What runs it."""
        found = natten.explain(self.query, self.key, self.value, kernel_size=WINDOW, scale=1.0)
        return found.selected.kernel if found.selected else "nothing"


def attention_of(noisy: Tensor, sigma: float, strength: float) -> Attention:
    # A colour patch has three numbers a pixel, so a smaller one says as much.
    f = features(noisy, 2 if noisy.shape[-1] == 1 else 1, sigma) / (strength * sigma)
    query = torch.cat([2 * f, torch.ones_like(f[..., :1])], dim=-1)
    key = torch.cat([f, -f.square().sum(-1, keepdim=True)], dim=-1)
    value = patches(noisy, 1)  # whole 3x3 squares: their overlaps are averaged once more
    return Attention(*(t[None, :, :, None].contiguous() for t in (query, key, value)))


def denoise(noisy: Tensor, sigma: float, strength: float) -> Tensor:
    return overlap_mean(attention_of(noisy, sigma, strength)()[0, :, :, 0], 1)


def scikit_image(noisy: Tensor, sigma: float, strength: float, patch: int, *, fast: bool) -> Tensor:
    result = denoise_nl_means(
        noisy.squeeze(-1).numpy(),
        patch_size=patch,
        patch_distance=WINDOW // 2,
        h=strength * sigma,
        sigma=sigma,
        fast_mode=fast,
        channel_axis=-1 if noisy.shape[-1] > 1 else None,
    )
    return torch.from_numpy(result).reshape(noisy.shape)


@dataclass(frozen=True)
class Result:
    name: str
    strength: float
    picture: Tensor
    psnr: float
    seconds: float


def psnr(clean: Tensor, other: Tensor) -> float:
    return float(peak_signal_noise_ratio(clean.numpy(), other.numpy(), data_range=1.0))


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def best_of(
    name: str,
    run: Callable[[float], Tensor],
    strengths: Sequence[float],
    clean: Tensor,
    repeats: int,
) -> Result:
    """Runs a method at several strengths, and `repeats` times more at the one with the highest PSNR."""
    runs: Iterable[float] = tqdm(strengths, desc=f"{name}, strengths", leave=False)
    trials = {strength: timed(lambda s=strength: run(s)) for strength in runs}
    strength = max(trials, key=lambda s: psnr(clean, trials[s][0]))
    picture, first = trials[strength]
    times = [first, *(timed(lambda: run(strength))[1] for _ in range(repeats))]
    return Result(name, strength, picture, psnr(clean, picture), statistics.median(times))


def side_by_side(pictures: dict[str, Tensor]) -> Image.Image:
    """The pictures in a row, each with its label above it."""
    font = ImageFont.load_default(20)
    height, width, _ = next(iter(pictures.values())).shape
    row = Image.new("RGB", (len(pictures) * width + 8 * (len(pictures) - 1), height + 32), "white")
    draw = ImageDraw.Draw(row)
    for n, (label, picture) in enumerate(pictures.items()):
        levels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        left = n * (width + 8)
        row.paste(Image.fromarray(levels.squeeze()).convert("RGB"), (left, 32))
        draw.text((left + 4, 4), label, fill="black", font=font)
    return row


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Denoises a photograph by neighborhood attention.")
    parser.add_argument("--image", choices=IMAGES, default="camera")
    parser.add_argument("--sigma", type=float, default=0.1, help="noise, of a range of 1")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    parser.add_argument("--skip-direct", action="store_true", help="skip the slowest baseline")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    sigma: float = arguments.sigma
    loaded = np.atleast_3d(skimage.img_as_float32(getattr(data, arguments.image)()))
    clean = torch.from_numpy(loaded)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = clean + sigma * noise

    results = [
        best_of("natten", lambda s: denoise(noisy, sigma, s), (2.0, 2.2, 2.4, 2.7, 3.0), clean, 9),
        best_of(
            "scikit-image, fast",
            lambda s: scikit_image(noisy, sigma, s, 5, fast=True),
            (0.4, 0.5, 0.6, 0.7),
            clean,
            3,
        ),
    ]
    if not arguments.skip_direct:
        results.append(
            best_of(
                "scikit-image, direct",
                lambda s: scikit_image(noisy, sigma, s, 7, fast=False),
                (0.8, 0.9, 1.0),
                clean,
                0,
            )
        )

    ours = results[0]
    attention = attention_of(noisy, sigma, ours.strength)
    kernel_seconds = statistics.median(timed(attention)[1] for _ in range(9))
    x, y, channels = clean.shape
    print(f"{arguments.image} {x}x{y}x{channels}, noise {sigma:g}, window {WINDOW}x{WINDOW}")
    print(f"{'':24}{'PSNR':>9}{'time':>12}{'strength':>10}")
    print(f"{'noisy':24}{psnr(clean, noisy):6.2f} dB")
    for r in results:
        print(f"{r.name:24}{r.psnr:6.2f} dB{r.seconds * 1e3:9.1f} ms{r.strength:10.2f}")
    print(
        f"natten ran {attention.kernel()} on {torch.get_num_threads()} threads; the attention alone took "
        f"{kernel_seconds * 1e3:.1f} ms. scikit-image runs on one."
    )

    arguments.output.mkdir(parents=True, exist_ok=True)
    target = arguments.output / f"denoise_{arguments.image}.png"
    side_by_side(
        {
            f"noisy, {psnr(clean, noisy):.2f} dB": noisy,
            f"denoised, {ours.psnr:.2f} dB": ours.picture,
            "clean": clean,
        }
    ).save(target)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
