"""Source of a reference: sentences and images, with the expected tokens, network inputs and masks.

Expected values come from open_clip and from the checkpoint's preprocessing and threshold, never from the bundle that is
verified.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.imaging.preprocess import Preprocessing, to_input, to_source

if TYPE_CHECKING:
    from cclip_deploy.prompts.tokenizer import PromptTokenizer

Array = NDArray[np.generic]
Floats = NDArray[np.float32]
Masks = NDArray[np.bool_]

SEED = 20241
CONTEXT = 77
"""Context length of CLIP; ids are stored at this length for every prompt length."""
TRAINED_PREPROCESSING = Preprocessing()
"""Preprocessing of every checkpoint: CLIP's, which training uses."""
TRAINED_THRESHOLD = 0.5
WORDS_APART, WORDS_IN_SENTENCE = 450, 12
PROBE_SENTENCES = (
    "Unilateral pulmonary infection, one infected area, upper left lung.",
    "Unilateral pulmonary infection, one infected area, upper right lung.",
    "LEFT LUNG AND RIGHT LUNG",
    "left",
    "right",
    "Lower LEFT lung",
    "bilateral pulmonary infection; three infected areas: all left lung & middle lower right lung!",
    "Bilateral pulmonary infection involving two regions with involvement of the lower left lung and the lower right "
    "lung, of which the larger is at the base and the smaller, which is not well seen, lies behind the heart",
    "Unilateral pulmonary infecton, one infceted area, mmiddle leff lung",
    "uppper lowerright aall llower",
    "the patient's right lung isn't clear; it doesn't change, we'll see",
    "round opacity of 23 mm (2.3 cm) at 45% of 1,024",
    "na\u00efve  fa\u00e7ade \u2013 \u00b5m\t\u2018quoted\u2019 &lt;5 &amp;amp; more",
    "<start_of_text> lung <end_of_text>",
)
"""Cases: upper and lower case, both sides, punctuation, contractions, digits, typing errors, accents, a long one."""
_DEPTHS = ((np.uint8, 255), (np.uint16, 65535))


@dataclass(frozen=True)
class Source:
    """Sentences and images, and the expected values of each stage before and after the graphs.

    Attributes:
        sentences: the first P are the prompts of the reference's tokens.
        ids: open_clip's ids of each sentence, (N, 77), zeros after the end token.
        vocabulary_sha256: `vocabulary_hash` of open_clip's vocabulary and merges.
        pictures: images (h, w) or (h, w, 3), uint8 or uint16 (the largest value is white) or float32 in [0, 1]. The
            first B are those of the reference's logits; the others only check the preprocessing.
        probe_inputs: network inputs of the images after the first B, (M - B, 3, H, W).
        masks: masks (P, h, w) of all prompts, for each of the first B images.
        preprocessing: that the checkpoint was trained with.
        threshold: probability from which a pixel is part of the mask.
    """

    sentences: tuple[str, ...]
    ids: NDArray[np.int64]
    vocabulary_sha256: str
    pictures: tuple[Array, ...]
    probe_inputs: Floats
    masks: tuple[Masks, ...]
    preprocessing: Preprocessing = TRAINED_PREPROCESSING
    threshold: float = TRAINED_THRESHOLD

    def to_arrays(self) -> dict[str, Array]:
        """Return named arrays for a reference file; inverse of `from_arrays`."""
        arrays: dict[str, Array] = {
            "source/sentences": np.array(self.sentences),
            "source/ids": self.ids,
            "source/vocabulary_sha256": np.array(self.vocabulary_sha256),
            "source/preprocessing": np.array(self.preprocessing.model_dump_json()),
            "source/threshold": np.array(self.threshold),
            "source/probe_inputs": self.probe_inputs,
        }
        arrays |= {f"source/picture/{number}": picture for number, picture in enumerate(self.pictures)}
        for number, masks in enumerate(self.masks):
            arrays[f"source/mask/{number}"] = np.packbits(masks, axis=-1)
        return arrays

    @staticmethod
    def from_arrays(arrays: Mapping[str, Array]) -> Source | None:
        """Return the source from a reference file's arrays; None if there is none.

        Raises:
            KeyError: an array is missing.
            ValueError: the shapes of arrays do not match.
        """
        if not any(name.startswith("source/") for name in arrays):
            return None
        count = sum(name.startswith("source/picture/") for name in arrays)
        pictures = tuple(arrays[f"source/picture/{number}"] for number in range(count))
        packed = [arrays[f"source/mask/{n}"] for n in range(sum(name.startswith("source/mask/") for name in arrays))]
        masks = tuple(
            np.unpackbits(np.asarray(bits, np.uint8), axis=-1, count=picture.shape[1]).astype(bool)
            for bits, picture in zip(packed, pictures, strict=False)
        )
        source = Source(
            tuple(str(sentence) for sentence in arrays["source/sentences"]),
            np.asarray(arrays["source/ids"], np.int64),
            str(arrays["source/vocabulary_sha256"]),
            pictures,
            np.asarray(arrays["source/probe_inputs"], np.float32),
            masks,
            Preprocessing.model_validate_json(str(arrays["source/preprocessing"])),
            float(arrays["source/threshold"]),
        )
        source._check()
        return source

    def _check(self) -> None:
        if not self.sentences or self.ids.shape != (len(self.sentences), CONTEXT):
            raise ValueError(f"source ids {self.ids.shape} of {len(self.sentences)} sentences")
        for picture in self.pictures:
            if picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,)) or not picture.size:
                raise ValueError(f"source image {picture.shape}")
            if picture.dtype not in (np.uint8, np.uint16, np.float32):
                raise ValueError(f"source image of {picture.dtype}")
        for masks, picture in zip(self.masks, self.pictures, strict=False):
            if masks.shape[1:] != picture.shape[:2]:
                raise ValueError(f"source masks {masks.shape} of an image {picture.shape}")
        if len(self.masks) + len(self.probe_inputs) != len(self.pictures):
            raise ValueError(f"source masks and inputs do not match its {len(self.pictures)} images")


def pack_pixels(pixels: Floats) -> Array:
    """Return pixels in [0, 1] as uint8 or uint16 if that is exact, else unchanged."""
    for kind, white in _DEPTHS:
        packed = np.rint(pixels * np.float64(white)).astype(kind)
        if np.array_equal(unpack_pixels(packed), pixels):
            return packed
    return pixels


def unpack_pixels(picture: Array) -> Floats:
    """Return the pixels of a stored image as float32 in [0, 1]."""
    for kind, white in _DEPTHS:
        if picture.dtype == kind:
            return (picture.astype(np.float64) / white).astype(np.float32)
    return np.asarray(picture, np.float32)


def probe_pictures(image_hw: tuple[int, int]) -> tuple[Array, ...]:
    """Return two color images of blocks and noise, one larger and one smaller than the network's input."""
    rng = np.random.default_rng(SEED)
    height, width = image_hw
    pictures = []
    for h, w in ((height * 7 // 4 + 3, width * 5 // 4 + 1), (height // 2 + 1, width * 3 // 4 - 1)):
        blocks = np.kron(rng.uniform(0, 1, (-(-h // 8), -(-w // 8), 3)), np.ones((8, 8, 1)))[:h, :w]
        noisy = blocks * 0.8 + rng.uniform(0, 0.2, (h, w, 3))
        noisy[: h // 4, : w // 4] = [1, 0, 0]  # edges at which a bicubic filter overshoots
        pictures.append(np.rint(noisy * 255).astype(np.uint8))
    return tuple(pictures)


def record_source(
    prompts: Sequence[str], pictures: Sequence[Array], logits: Floats, image_hw: tuple[int, int]
) -> Source:
    """Return the source of a reference, with further sentences and images that check tokenizer and preprocessing.

    Args:
        prompts: P prompts.
        pictures: B images.
        logits: PyTorch's logits of all pairs, (B, P, H, W).
        image_hw: size of the network's input.
    """
    sentences = (*prompts, *PROBE_SENTENCES, *vocabulary_sentences())
    probes = probe_pictures(image_hw)
    inputs = [to_input(unpack_pixels(probe), image_hw, TRAINED_PREPROCESSING) for probe in probes]
    masks = tuple(
        np.stack([to_source(_probability(one), picture.shape[:2]) >= TRAINED_THRESHOLD for one in each])
        for each, picture in zip(logits, pictures, strict=True)
    )
    return Source(
        sentences, open_clip_ids(sentences), open_clip_vocabulary_hash(), (*pictures, *probes),
        np.concatenate(inputs), masks,
    )  # fmt: skip


@cache
def _open_clip() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def open_clip_ids(sentences: Sequence[str]) -> NDArray[np.int64]:
    """Return ids from open_clip's tokenizer, (N, 77)."""
    ids: NDArray[np.int64] = _open_clip()(list(sentences), context_length=CONTEXT).numpy().astype(np.int64)
    return ids


def vocabulary_sentences() -> tuple[str, ...]:
    """Return sentences of words from the whole vocabulary of open_clip, so that a shift anywhere changes an id."""
    open_clip = _open_clip()
    words = []
    for start in range(512, len(open_clip.encoder) - WORDS_APART, WORDS_APART):
        for place in range(start, start + WORDS_APART):
            word = open_clip.decode([place])
            if word.strip().isascii() and word.strip().isalpha() and open_clip.encode(word.strip()) == [place]:
                words.append(word.strip())
                break
    return tuple(
        " ".join(words[place : place + WORDS_IN_SENTENCE]) for place in range(0, len(words), WORDS_IN_SENTENCE)
    )


def open_clip_vocabulary_hash() -> str:
    """Return the `vocabulary_hash` of open_clip's tables."""
    open_clip = _open_clip()
    return vocabulary_hash(open_clip.encoder, sorted(open_clip.bpe_ranks, key=open_clip.bpe_ranks.__getitem__))


def vocabulary_hash(vocabulary: Mapping[str, int], merges: Sequence[Sequence[str]]) -> str:
    """Return the SHA-256 of all tokens with their ids and all merges in order."""
    content = json.dumps([sorted(vocabulary.items()), [list(pair) for pair in merges]])
    return hashlib.sha256(content.encode()).hexdigest()


def tokenizer_hash(tokenizer: PromptTokenizer) -> str:
    """Return the `vocabulary_hash` of a bundle's tokenizer."""
    model = json.loads(tokenizer.to_json())["model"]
    return vocabulary_hash(
        model["vocab"], [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    )


def _probability(logits: Floats) -> Floats:
    return (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
