"""Change bytes in every kind of user input and read it: the outcome must be a result or a CclipError.

    python -m tests.attacks.long.flip_inputs [--changes 40000] [--seed 0] [--mib 1500]

Kinds: DICOM in six transfer syntaxes, PNG, TIFF, JPEG, BMP, tables (CSV, XLSX, JSON Lines, MedVLSM's JSON), TOML
recipes, plans and profiles, and sentences. The process may take `--mib` of memory more than it has at the start;
an error that memory ended counts as a failure. The exit code is 1 where anything failed; pytest runs a short form.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image
from pydicom.encaps import encapsulate

from cclip_deploy.ablation.plan import read_plan
from cclip_deploy.common.csv_text import csv_text
from cclip_deploy.datasets.mask_file import read_mask
from cclip_deploy.datasets.reading import read_data_set
from cclip_deploy.datasets.tables import read_table
from cclip_deploy.engines.profile import read_profile
from cclip_deploy.errors import CclipError
from cclip_deploy.imaging.reading import image_orientation, image_size, read_image
from cclip_deploy.prompts.reader import mirror, read_prompt
from cclip_deploy.prompts.spelling import repair_prompt
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.train.config import TrainConfig

MIB = 2**20
ROOT = Path(__file__).parents[3]
LONGEST_SECONDS = 60
PNG = b"\x89PNG\r\n\x1a\n"
LITTLE, IMPLICIT, BIG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
RLE, JPEG, JPEG_2000 = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90"
SENTENCES = [
    "Bilateral pulmonary infection, two infected areas, upper left lung and lower right lung.",
    "opacity in the righht upper zone &amp; both lower lobes, no effusion; 2 lesions",
    "Ã©panchement RUL/LLL — \u201eleft\u201c lowermiddle lung &#xE9;",
]


@dataclass(frozen=True)
class Input:
    """One kind of input: a sound one as bytes, and what reads a file of such bytes."""

    name: str
    suffix: str
    content: bytes
    read: Callable[[Path], object]


@dataclass
class Outcome:
    """What came of all changes."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A line for each kind, and the failures."""
        kinds = sorted({kind for kind, _ in self.counts})
        rows = [
            f"{kind:32} {self.counts[kind, 'answer']:6} answers {self.counts[kind, 'refusal']:6} refusals"
            for kind in kinds
        ]
        return "\n".join([*rows, *self.failures, f"{sum(self.counts.values())} changes, {len(self.failures)} failures"])


def inputs(folder: Path) -> list[Input]:
    """All kinds, each as small as it can be; `folder` takes the files that they name."""
    return [*_pictures(), *_dicoms(), *_tables(folder), *_configs(), *_sentences()]


def change(content: bytes, chance: random.Random) -> bytes:
    """A few bytes replaced, bits flipped, bytes left out or put in; mostly in the first hundreds, where headers are."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 8))):
        if not changed:
            break
        at = chance.randrange(len(changed) if chance.random() < 0.5 else min(len(changed), 600))
        kind = chance.random()
        if kind < 0.4:
            changed[at] ^= 1 << chance.randrange(8)
        elif kind < 0.7:
            changed[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        elif kind < 0.8:
            del changed[at : at + chance.choice((1, 1, 2, 4, 64))]
        elif kind < 0.9:
            changed[at:at] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 2, 4))))
        else:
            changed[at:at] = changed[at : at + chance.choice((4, 16, 200))] * chance.choice((1, 3, 40))
    return bytes(changed)


def with_right_sums(png: bytes) -> bytes:
    """A PNG file whose chunks have right checksums, as far as their lengths hold; else a decoder sees few changes."""
    content, at = bytearray(png), len(PNG)
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4])
        end = at + 8 + length
        if end + 4 > len(content):
            break
        content[end : end + 4] = zlib.crc32(content[at + 4 : end]).to_bytes(4)
        at = end + 4
    return bytes(content)


def flip(changes: int, seed: int, folder: Path) -> Outcome:
    """Change and read `changes` inputs, the kinds in turn; the same seed gives the same changes."""
    chance, outcome, kinds = random.Random(seed), Outcome(), inputs(folder)
    signal.signal(signal.SIGALRM, _too_long)
    for number in range(changes):
        kind = kinds[number % len(kinds)]
        path = folder / f"changed{kind.suffix}"
        changed = change(kind.content, chance)
        path.write_bytes(with_right_sums(changed) if changed.startswith(PNG) and chance.random() < 0.8 else changed)
        signal.alarm(LONGEST_SECONDS)
        try:
            kind.read(path)
            outcome.counts[kind.name, "answer"] += 1
        except CclipError as error:
            outcome.counts[kind.name, "refusal"] += 1
            if _is_of_memory(error) or not str(error):
                outcome.failures.append(_tell(kind, number, seed, error, path))
        except BaseException as error:
            outcome.counts[kind.name, "failure"] += 1
            outcome.failures.append(_tell(kind, number, seed, error, path))
            if isinstance(error, KeyboardInterrupt):
                raise
        finally:
            signal.alarm(0)
    return outcome


def limit_memory(mib: int) -> None:
    """Let this process take only so much more memory than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + mib * MIB
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _is_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, is a lack of memory."""
    return error is not None and (isinstance(error, MemoryError) or _is_of_memory(error.__cause__))


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"more than {LONGEST_SECONDS} s")


def _tell(kind: Input, number: int, seed: int, error: BaseException, path: Path) -> str:
    kept = Path(tempfile.gettempdir()) / f"flip-{seed}-{number}{kind.suffix}"
    kept.write_bytes(path.read_bytes())
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).name}:{last.lineno}"
    return f"FAILED {kind.name}, change {number}, seed {seed}: {type(error).__name__} {error} ({where}; {kept})"


def _read_all(path: Path) -> None:
    """Everything that is done with an image and a mask of a data set; each may refuse, the first is what counts."""
    for read in (image_size, image_orientation, read_mask):
        try:
            read(path)
        except CclipError as error:
            if _is_of_memory(error):
                raise
    read_image(path)


def _pictures() -> list[Input]:
    values = np.random.default_rng(0).integers(0, 256, (24, 20, 4)).astype(np.uint8)
    exif = Image.Exif()
    exif[274], exif[305] = 6, "software"
    palette = Image.fromarray(values[..., 0]).convert("P")
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "png gray": (Image.fromarray(values[..., 0]), "PNG", {"exif": exif}),
        "png mask": (Image.fromarray((values[..., 0] > 99).astype(np.uint8) * np.uint8(255)), "PNG", {}),
        "png gray 16": (Image.fromarray(values.view(np.uint16)[..., 0]), "PNG", {}),
        "png rgba": (Image.fromarray(values), "PNG", {"icc_profile": b"profile" * 9}),
        "png palette": (palette, "PNG", {"transparency": 3}),
        "png bits": (Image.fromarray(values[..., 0] > 99), "PNG", {}),
        "tiff lzw": (Image.fromarray(values[..., :3]), "TIFF", {"compression": "tiff_lzw", "exif": exif}),
        "tiff deflate 16": (Image.fromarray(values.view(np.uint16)[..., 0]), "TIFF", {"compression": "tiff_deflate"}),
        "tiff jpeg": (Image.fromarray(values[..., :3]), "TIFF", {"compression": "jpeg"}),
        "tiff plain": (Image.fromarray(values[..., 0]), "TIFF", {}),
        "tiff group 4": (Image.fromarray(values[..., 0] > 99), "TIFF", {"compression": "group4"}),
        "jpeg": (Image.fromarray(values[..., :3]), "JPEG", {"exif": exif}),
        "jpeg progressive": (Image.fromarray(values[..., 0]), "JPEG", {"progressive": True}),
        "bmp": (Image.fromarray(values[..., :3]), "BMP", {}),
        "bmp palette": (palette, "BMP", {}),
    }  # fmt: skip
    return [Input(name, ".png", _saved(*how), _read_all) for name, how in kinds.items()]


def _saved(image: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _dicoms() -> list[Input]:
    gray = (np.arange(24 * 20) % 4096).astype(np.uint16).reshape(24, 20)
    eight = (gray % 256).astype(np.uint8)
    runs = np.concatenate([[0x0F], eight.ravel()[:16]]).astype(np.uint8).tobytes() * 30
    rle = np.array([1, 64, *[0] * 14], "<u4").tobytes() + runs
    made = {
        "dicom explicit": (LITTLE, gray.tobytes(), 16), "dicom implicit": (IMPLICIT, gray.tobytes(), 16),
        "dicom big endian": (BIG, gray.byteswap().tobytes(), 16), "dicom rle": (RLE, encapsulate([rle]), 8),
        "dicom jpeg": (JPEG, encapsulate([_saved(Image.fromarray(eight), "JPEG", {})]), 8),
        "dicom jpeg 2000": (JPEG_2000, encapsulate([_saved(Image.fromarray(eight), "JPEG2000", {})]), 8),
        "dicom rgb": (LITTLE, np.repeat(eight, 3).tobytes(), 8),
    }  # fmt: skip
    return [Input(name, ".dcm", _dicom(name, *how), _read_all) for name, how in made.items()]


def _dicom(name: str, syntax: str, pixels: bytes, bits: int) -> bytes:
    colors = name == "dicom rgb"
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 24, 20, 3 if colors else 1
    dataset.PhotometricInterpretation = "RGB" if colors else "MONOCHROME1"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, min(bits, 12), min(bits, 12) - 1
    dataset.PixelRepresentation, dataset.PixelPaddingValue = 0, 3
    if colors:
        dataset.PlanarConfiguration = 0
    dataset.WindowCenter, dataset.WindowWidth, dataset.RescaleSlope, dataset.RescaleIntercept = 700, 900, 2, -5
    if name == "dicom implicit":
        table = pydicom.Dataset()
        table.LUTDescriptor, table.LUTData = [256, 0, 16], np.arange(0, 65536, 256).astype("<u2").tobytes()
        dataset.VOILUTSequence = [table]
    dataset.add_new("PixelData", "OB" if bits == 8 else "OW", pixels)
    dataset["PixelData"].is_undefined_length = syntax in (RLE, JPEG, JPEG_2000)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _tables(folder: Path) -> list[Input]:
    Image.new("L", (8, 8), 255).save(folder / "a.png")
    rows = [["Image", "Description"], *([f"a{n}.png", SENTENCES[n % 3]] for n in range(9))]
    import openpyxl

    book, workbook = openpyxl.Workbook(), io.BytesIO()
    for row in rows:
        book.active.append(row)
    book.save(workbook)
    row = {"image": "a.png", "mask": "a.png", "text": SENTENCES[0], "split": "test", "subject": "x"}
    entry = [{"img_name": "a.png", "mask_name": "a.png", "prompts": {"p0": "", "p1": SENTENCES[0], "p2": ["x", "y"]}}]
    return [
        Input("table csv", ".csv", csv_text(rows).encode(), read_table),
        Input("table xlsx", ".xlsx", workbook.getvalue(), read_table),
        Input("table jsonl", ".jsonl", f"{json.dumps(row)}\n{json.dumps(row)}\n".encode(), read_table),
        Input("data set csv", ".csv", csv_text([list(row), list(row.values())]).encode(), _read_flat),
        Input("data set medvlsm", ".json", json.dumps(entry).encode(), _read_medvlsm),
    ]


def _read_flat(path: Path) -> object:
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        (Path(name) / "a.png").symlink_to(path.parent / "a.png")
        (Path(name) / "table.csv").write_bytes(path.read_bytes())
        return read_data_set(Path(name))


def _read_medvlsm(path: Path) -> object:
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        for part in ("images", "masks", "anns"):
            (Path(name) / part).mkdir()
        for part in ("images", "masks"):
            (Path(name) / part / "a.png").symlink_to(path.parent / "a.png")
        (Path(name) / "anns" / "test.json").write_bytes(path.read_bytes())
        return read_data_set(Path(name))


def _configs() -> list[Input]:
    recipe = next((ROOT / "training" / "configs").glob("*.toml"))
    plan = next((ROOT / "training" / "ablations").glob("*.toml"))
    profile = ROOT / "engines" / "profiles" / "workstation.toml"
    return [
        Input("recipe toml", ".toml", recipe.read_bytes(), TrainConfig.from_toml),
        Input("plan toml", ".toml", plan.read_bytes(), read_plan),
        Input("profile toml", ".toml", profile.read_bytes(), read_profile),
    ]


def _sentences() -> list[Input]:
    tokenizer = PromptTokenizer.from_open_clip()

    def read(path: Path) -> None:
        text = path.read_bytes().decode(errors="surrogateescape")
        repair_prompt(text)
        read_prompt(text)
        mirror(text)
        tokenizer.encode(text, 77)

    return [Input(f"sentence {n}", ".txt", text.encode(), read) for n, text in enumerate(SENTENCES)]


def main() -> int:
    """Run it; 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changes", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mib", type=int, default=1500)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        inputs(Path(folder))
        limit_memory(arguments.mib)
        outcome = flip(arguments.changes, arguments.seed, Path(folder))
    print(outcome.summary())
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
