"""Record references: run prompts and images through open_clip, the trained preprocessing and PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.manifest import Manifest
from cclip_deploy.datasets.synthetic.generator import MIN_SIDE_PX, make_sample
from cclip_deploy.imaging.preprocess import resize_pixels, to_input
from cclip_deploy.imaging.reading import read_image
from cclip_deploy.parity.compare import useful
from cclip_deploy.parity.reference import PICTURE_PROMPTS, SEED, SHORTEST_PROMPT, Reference, record, seeded_inputs
from cclip_deploy.parity.source import TRAINED_PREPROCESSING, open_clip_ids, pack_pixels, record_source, unpack_pixels
from cclip_deploy.prompts.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from cclip_deploy.runtime.pytorch import PyTorchBackend

Progress = Callable[[str], None]
Array = NDArray[np.generic]
Floats = NDArray[np.float32]

DRAWINGS, PROMPTS_KEPT = 3, 2
LARGEST = 4
FURTHER_PROMPTS = (
    "Unilateral pulmonary infection, one infected area, lower right lung.",
    "Unilateral pulmonary infection, one infected area, upper left lung.",
    "Bilateral pulmonary infection, two infected areas, all left lung and all right lung.",
)


@dataclass(frozen=True)
class _Pairs:
    """Images and prompts, and PyTorch's logits of all pairs."""

    prompts: tuple[str, ...]
    tokens: NDArray[np.int64]  # (P, L)
    pictures: tuple[Array, ...]
    image: Floats  # (B, 3, H, W)
    logits: Floats  # (B, P, H, W)

    def with_prompts(self, columns: Sequence[int]) -> _Pairs:
        """Return a selection of the prompts."""
        chosen = list(columns)
        prompts = tuple(self.prompts[column] for column in chosen)
        return _Pairs(prompts, self.tokens[chosen], self.pictures, self.image, self.logits[:, chosen])

    def useful(self) -> NDArray[np.bool_]:
        return useful(self.logits)


def make_references(
    network: PyTorchBackend,
    manifest: Manifest,
    pictures: Sequence[Path] = (),
    prompts: Sequence[str] = (),
    on_progress: Progress = lambda _: None,
) -> list[Reference]:
    """Record the references of a bundle: `seeded` (noise) and `pictures` (from prompts and images to masks).

    Args:
        network: plain PyTorch.
        manifest: gives input sizes and names of graphs; nothing else is read.
        pictures: image files; synthetic radiographs by default.
        prompts: by default, the prompts with the most useful masks among a fixed list.
        on_progress: called with a line for each step.

    Raises:
        ImageError: an image cannot be read.
        PromptError: a prompt is empty or too long.
    """
    graphs, image_hw = tuple(manifest.graphs), manifest.image_hw
    on_progress("Recording references from images")
    recording = _choose(network, manifest, pictures, prompts)
    source = record_source(recording.prompts, recording.pictures, recording.logits, image_hw)
    on_progress("Recording references from seeded noise")
    seeded = record("seeded", network, *seeded_inputs(image_hw, manifest.prompt_length), graphs)
    return [seeded, record("pictures", network, recording.image, recording.tokens, graphs, (source, recording.logits))]


def _choose(network: PyTorchBackend, manifest: Manifest, pictures: Sequence[Path], prompts: Sequence[str]) -> _Pairs:
    tokenizer = PromptTokenizer.from_open_clip()
    given = tuple(_raw(read_image(path).pixels, manifest.image_hw) for path in pictures)
    best: _Pairs | None = None
    for raw, own_prompts in [(given, ())] if given else _synthetic_images(manifest.image_hw):
        texts = tuple(prompts) or _fitting((*own_prompts, *PICTURE_PROMPTS, *FURTHER_PROMPTS), tokenizer, manifest)
        recording = _record_logits(network, manifest, tokenizer, texts, raw)
        if not prompts:
            recording = recording.with_prompts(_most_useful(recording.useful()))
        if best is None or recording.useful().sum() > best.useful().sum():
            best = recording
        if best.useful().all():
            break
    assert best is not None  # there is at least one set of images
    return best


def _raw(pixels: Floats, image_hw: tuple[int, int]) -> Array:
    """Return the stored form of an image: images above `LARGEST` times the network's size are reduced, in 16 bits."""
    hw = (min(pixels.shape[0], LARGEST * image_hw[0]), min(pixels.shape[1], LARGEST * image_hw[1]))
    if hw == pixels.shape[:2]:
        return pack_pixels(pixels)
    reduced = np.rint(resize_pixels(pixels, hw, TRAINED_PREPROCESSING) * 65535).astype(np.uint16)  # (1 or 3, h, w)
    return reduced[0] if len(reduced) == 1 else np.ascontiguousarray(np.moveaxis(reduced, 0, -1))


def _record_logits(
    network: PyTorchBackend,
    manifest: Manifest,
    tokenizer: PromptTokenizer,
    texts: tuple[str, ...],
    raw: tuple[Array, ...],
) -> _Pairs:
    length = manifest.prompt_length
    for text in texts:
        tokenizer.encode(text, length)  # raises PromptError
    tokens = open_clip_ids(texts)[:, :length]
    inputs = [to_input(unpack_pixels(picture), manifest.image_hw, TRAINED_PREPROCESSING) for picture in raw]
    image = np.concatenate(inputs)
    return _Pairs(texts, tokens, raw, image, network.all_pairs(image, tokens))


def _fitting(texts: Sequence[str], tokenizer: PromptTokenizer, manifest: Manifest) -> tuple[str, ...]:
    fitting = (text for text in texts if len(tokenizer.ids(text)) <= manifest.prompt_length)
    return tuple(dict.fromkeys(fitting)) or (SHORTEST_PROMPT,)


def _most_useful(found: NDArray[np.bool_]) -> tuple[int, ...]:
    """Return the columns of the `PROMPTS_KEPT` prompts with the most useful masks over all images."""
    count = min(PROMPTS_KEPT, found.shape[1])
    return max(combinations(range(found.shape[1]), count), key=lambda columns: int(found[:, columns].sum()))


def _synthetic_images(image_hw: tuple[int, int]) -> Iterator[tuple[tuple[Array, ...], tuple[str, ...]]]:
    """Yield pairs of synthetic radiographs, one larger and one smaller than the network's input, with their prompts."""
    height, width = image_hw
    sizes = ((height * 3 // 2, width * 5 // 4), (height * 3 // 4, width * 2 // 3))
    for number in range(DRAWINGS):
        films = [
            make_sample(np.random.default_rng(SEED + 2 * number + place), (max(MIN_SIDE_PX, h), max(MIN_SIDE_PX, w)))
            for place, (h, w) in enumerate(sizes)
        ]
        gray, smaller = (film.image for film in films)
        tinted = np.stack([smaller, smaller * 0.95, smaller * 0.9 + 0.05], axis=-1)
        pictures = tuple(np.rint(values * 255).astype(np.uint8) for values in (gray, tinted))
        yield pictures, tuple(film.prompt for film in films)
