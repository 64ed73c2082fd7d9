"""Report the contents of a data set by split, unusable files, and patients or images shared between splits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from cclip_deploy.common.files import sha256_input
from cclip_deploy.datasets.mask_file import Form, decode_mask
from cclip_deploy.datasets.reading import DataSet
from cclip_deploy.datasets.sample import SPLITS, Sample
from cclip_deploy.datasets.tables import TableFormat
from cclip_deploy.errors import DataError
from cclip_deploy.imaging.reading import failure_of, image_size, is_image_file, read_image
from cclip_deploy.prompts.reader import read_prompt
from cclip_deploy.prompts.tokenizer import PromptTokenizer

EXAMPLES = 5


@dataclass(frozen=True)
class SplitReport:
    """Counts of one split; each row has one prompt.

    Attributes:
        cut_prompts: prompts of more than `prompt_length` tokens.
        free_prompts: prompts whose lung zones could not be read completely.
        lossy_masks: JPEG masks, which are thresholded at half of white.
        soft_masks: gray masks with soft edges, which are thresholded at half of their brightest value.
        colored_masks: masks whose color says what is inside.
        image_sizes: width x height of the smallest and of the largest image.
    """

    images: int
    masks: int
    prompts: int
    distinct_prompts: int
    patients: int
    repaired_prompts: int
    cut_prompts: int
    longest_prompt_tokens: int
    free_prompts: int
    empty_masks: int
    lossy_masks: int
    soft_masks: int
    colored_masks: int
    image_sizes: tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """Patients and images that two splits share; any overlap inflates the scores of the second split."""

    splits: tuple[str, str]
    patients: int
    pictures: int
    """Number of identical files, whatever their names."""
    examples: tuple[str, ...]


@dataclass(frozen=True)
class RepairedRow:
    """A repaired prompt and its repairs (found, replacement)."""

    image: str
    split: str
    written: str
    text: str
    repairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class DataReport:
    """Report of a whole data set; `to_dict` gives the JSON form."""

    folder: str
    layout: str
    prompt_length: int
    patients_known: bool
    """False if no patient is known, so each image counts as one."""
    splits: dict[str, SplitReport]
    overlaps: tuple[Overlap, ...]
    repaired: tuple[RepairedRow, ...]
    unused_files: tuple[str, ...]
    """Image files, in the folders of the used ones, that no row names."""
    failed: tuple[tuple[str, str], ...]
    """Unusable images and masks with the reason; such masks count neither as empty nor as lossy."""
    tables: tuple[TableFormat, ...] = ()
    """How each table was read; none in the layout medvlsm."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        return asdict(self)

    def table_rows(self) -> list[tuple[str, list[str]]]:
        """Return (name, values by split) of every count, as text for a table."""
        rows: dict[str, list[str]] = {}
        for split in self.splits.values():
            for name, value in asdict(split).items():
                shown = " to ".join(value) if isinstance(value, tuple) else f"{value:,}"
                rows.setdefault(name.replace("_", " "), []).append(shown)
        return list(rows.items())

    def remarks(self) -> list[str]:
        """Return sentences on failed files, overlaps, repairs and unused files."""
        tables = [f"Read {table.describe()}" for table in self.tables]
        return [*(reason for _, reason in self.failed), *tables, *self._overlap_remarks(), *self._row_remarks()]

    def _overlap_remarks(self) -> list[str]:
        remarks = [
            f"{' and '.join(overlap.splits)} share {overlap.patients} patients and {overlap.pictures} images"
            + (f": {', '.join(overlap.examples)}" if overlap.examples else "")
            for overlap in self.overlaps
        ]
        if not self.patients_known:
            remarks.append("No patients are known: each image counts as one. Give --subject, or a subject column.")
        return remarks

    def _row_remarks(self) -> list[str]:
        remarks = [
            f"Repaired in {row.image}: {', '.join(f'{found!r} to {put!r}' for found, put in row.repairs)}"
            for row in self.repaired[:EXAMPLES]
        ]
        if len(self.repaired) > EXAMPLES:
            remarks.append(f"... and {len(self.repaired) - EXAMPLES} more; --json lists them all.")
        cut = sum(split.cut_prompts for split in self.splits.values())
        if cut:
            remarks.append(f"{cut} prompts are longer than {self.prompt_length} tokens and would be cut.")
        if self.unused_files:
            shown = ", ".join(self.unused_files[:EXAMPLES])
            remarks.append(f"{len(self.unused_files)} files are not named by any row, such as {shown}")
        return remarks


def report_data_set(
    data_set: DataSet,
    tokenizer: PromptTokenizer,
    prompt_length: int,
    on_mask: Callable[[int, int], None] = lambda done, masks: None,
) -> DataReport:
    """Read every image and mask of a data set and count; unusable files are recorded in `DataReport.failed`.

    Args:
        data_set: data set to check.
        tokenizer: used to count the tokens of prompts.
        prompt_length: prompts with more tokens count as cut.
        on_mask: called with the number of masks read and their total.

    Raises:
        DataError: a prompt has no tokens.
    """
    samples = data_set.samples
    held = [split for split in SPLITS if any(sample.split == split for sample in samples)]
    inspected, failed = _inspect_masks({sample.mask: sample for sample in samples}, on_mask)
    for image in sorted({sample.image for sample in samples}):
        try:
            read_image(image)
        except Exception as error:  # a decoder may raise anything on untrusted bytes
            failed[image] = failure_of(image, error)
    repaired = {row for row, _ in data_set.repaired}
    counts = {
        split: _count([(n, r) for n, r in enumerate(samples) if r.split == split], tokenizer, prompt_length,
                      repaired, inspected)
        for split in held
    }  # fmt: skip
    digests = {image: sha256_input(image) for image in sorted({sample.image for sample in samples})}
    return DataReport(
        folder=str(data_set.folder),
        layout=data_set.layout,
        prompt_length=prompt_length,
        patients_known=any(r.patient is not None for r in samples),
        splits=counts,
        overlaps=tuple(_compare(samples, pair, digests) for pair in combinations(held, 2)),
        repaired=tuple(
            RepairedRow(samples[row].image.name, samples[row].split, prompt.written, prompt.text,
                        tuple((repair.found, repair.put) for repair in prompt.repairs))
            for row, prompt in data_set.repaired
        ),
        unused_files=_find_unused(data_set.folder, samples),
        failed=tuple((str(path), reason) for path, reason in failed.items()),
        tables=data_set.tables,
    )  # fmt: skip


@dataclass(frozen=True)
class _InspectedMask:
    empty: bool
    form: Form


def _count(
    rows: Sequence[tuple[int, Sample]],
    tokenizer: PromptTokenizer,
    prompt_length: int,
    repaired: set[int],
    inspected: Mapping[Path, _InspectedMask],
) -> SplitReport:
    samples = [sample for _, sample in rows]
    tokens = {text: _count_tokens(tokenizer, text) for text in {sample.text for sample in samples}}
    masks = {sample.mask for sample in samples}
    images = {sample.image for sample in samples}
    found = [inspected[mask] for mask in masks & inspected.keys()]
    return SplitReport(
        images=len(images),
        masks=len(masks),
        prompts=len(samples),
        distinct_prompts=len(tokens),
        patients=len({sample.subject for sample in samples}),
        repaired_prompts=sum(row in repaired for row, _ in rows),
        cut_prompts=sum(tokens[sample.text] > prompt_length for sample in samples),
        longest_prompt_tokens=max(tokens.values()),
        free_prompts=sum(not read_prompt(sample.text).complete for sample in samples),
        empty_masks=sum(mask.empty for mask in found),
        lossy_masks=sum(mask.form == "lossy" for mask in found),
        soft_masks=sum(mask.form == "soft" for mask in found),
        colored_masks=sum(mask.form == "colored" for mask in found),
        image_sizes=_size_range(images),
    )


def _inspect_masks(
    samples: Mapping[Path, Sample], on_mask: Callable[[int, int], None]
) -> tuple[dict[Path, _InspectedMask], dict[Path, str]]:
    """Decode the mask of each sample; return the usable masks, and the reasons why others cannot be used."""
    inspected: dict[Path, _InspectedMask] = {}
    failed: dict[Path, str] = {}
    for done, (path, sample) in enumerate(sorted(samples.items()), 1):
        try:
            mask = decode_mask(path, sample.mask_values)
            inspected[path] = _InspectedMask(not mask.inside.any(), mask.form)
        except Exception as error:  # a decoder may raise anything on untrusted bytes
            failed[path] = failure_of(path, error)
        on_mask(done, len(samples))
    return inspected, failed


def _count_tokens(tokenizer: PromptTokenizer, text: str) -> int:
    """Count tokens including start and end; raise DataError if there are no others."""
    count = len(tokenizer.ids(text))
    if count == 2:
        raise DataError(f"The prompt {text!r} has no word. Fill it in, or remove the row.")
    return count


def _size_range(images: Iterable[Path]) -> tuple[str, ...]:
    sizes = {image_size(path) for path in images}
    ends = dict.fromkeys((min(sizes, key=_area), max(sizes, key=_area)))
    return tuple(f"{width}x{height}" for width, height in ends)


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _compare(samples: Sequence[Sample], pair: tuple[str, str], digests: dict[Path, str]) -> Overlap:
    one, other = ([sample for sample in samples if sample.split == split] for split in pair)
    patients = {sample.subject for sample in one} & {sample.subject for sample in other}
    images = {digests[sample.image] for sample in one} & {digests[sample.image] for sample in other}
    shared = patients or {r.image.name for r in other if digests[r.image] in images}
    return Overlap(pair, len(patients), len(images), tuple(sorted(shared)[:EXAMPLES]))


def _find_unused(folder: Path, samples: Sequence[Sample]) -> tuple[str, ...]:
    used = {path for sample in samples for path in (sample.image, sample.mask)}
    places = sorted({path.parent for path in used})
    found = [p for place in places for p in sorted(place.iterdir()) if is_image_file(p)]
    return tuple(os.path.relpath(path, folder) for path in found if path not in used)
