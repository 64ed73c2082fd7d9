"""Data-set report, compared with counts made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.datasets.options import DataSetOptions
from cclip_deploy.datasets.reading import read_data_set
from cclip_deploy.datasets.report import DataReport, report_data_set
from cclip_deploy.errors import DataError
from cclip_deploy.prompts.tokenizer import PromptTokenizer

LEFT = "Unilateral pulmonary infection, one infected area, lower left lung."
ROWS = [
    ("a.png", "full.png", LEFT, "train", "p1"),
    ("a.png", "empty.png", LEFT.replace("left", "rught"), "train", "p1"),
    ("b.png", "soft.jpg", "a polyp", "train", "p2"),
    ("c.png", "full.png", "word " * 40, "val", "p2"),
    ("d.png", "full.png", LEFT, "test", "p3"),
]


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer.from_open_clip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures, the last a copy of the second under another name; b and c are larger than a."""
    for number, (name, side) in enumerate((("a", 16), ("b", 16), ("c", 16), ("spare", 16))):
        Image.fromarray(np.full((side, side), number, np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "d.png").write_bytes((tmp_path / "b.png").read_bytes())
    (tmp_path / "masks").mkdir()
    half = np.zeros((16, 16), np.uint8)
    half[:8] = 255
    for name, mask in (("full.png", half), ("empty.png", 0 * half), ("soft.jpg", half)):
        Image.fromarray(mask).save(tmp_path / "masks" / name, quality=95)
    rows = "".join(f'{i},masks/{m},"{t}",{s},{p}\n' for i, m, t, s, p in ROWS)
    (tmp_path / "table.csv").write_text("image,mask,text,split,subject\n" + rows)
    return tmp_path


def report(folder: Path, tokenizer: PromptTokenizer, length: int = 32) -> DataReport:
    return report_data_set(read_data_set(folder), tokenizer, length)


def test_every_count_is_that_of_the_rows(folder: Path, tokenizer: PromptTokenizer) -> None:
    said = report(folder, tokenizer)
    train = said.splits["train"]
    assert (said.layout, list(said.splits)) == ("flat", ["train", "val", "test"])
    assert (train.images, train.masks, train.prompts, train.distinct_prompts, train.patients) == (2, 3, 3, 3, 2)
    assert (train.repaired_prompts, train.free_prompts, train.cut_prompts) == (1, 1, 0)
    assert (train.empty_masks, train.lossy_masks, train.image_sizes) == (1, 1, ("16x16",))
    assert (said.splits["val"].cut_prompts, said.splits["val"].longest_prompt_tokens) == (1, 42)
    assert report(folder, tokenizer, 42).splits["val"].cut_prompts == 0


def test_shared_patients_and_shared_images_are_found(folder: Path, tokenizer: PromptTokenizer) -> None:
    overlaps = {overlap.splits: overlap for overlap in report(folder, tokenizer).overlaps}
    assert (overlaps["train", "val"].patients, overlaps["train", "val"].examples) == (1, ("p2",))
    assert (overlaps["train", "test"].patients, overlaps["train", "test"].pictures) == (0, 1)
    assert overlaps["train", "test"].examples == ("d.png",)
    assert (overlaps["val", "test"].patients, overlaps["val", "test"].pictures) == (0, 0)


def test_repairs_and_unused_files_are_listed_and_all_of_it_is_json(folder: Path, tokenizer: PromptTokenizer) -> None:
    said = report(folder, tokenizer)
    assert [(row.image, row.repairs) for row in said.repaired] == [("a.png", (("rught", "right"),))]
    assert said.unused_files == ("spare.png",)
    assert json.loads(json.dumps(said.to_dict()))["splits"]["test"]["images"] == 1
    remarks = "\n".join(said.remarks())
    for words in ("train and val share 1 patients", "'rught' to 'right'", "1 prompts are longer than 32", "spare.png"):
        assert words in remarks
    assert dict(said.table_rows())["patients"] == ["2", "1", "1"]


def test_without_patients_the_report_says_so(folder: Path, tokenizer: PromptTokenizer) -> None:
    (folder / "table.csv").write_text("image,mask,text\na.png,masks/full.png,x\n")
    said = report(folder, tokenizer)
    assert not said.patients_known
    assert any("No patients are known" in remark for remark in said.remarks())
    assert report_data_set(read_data_set(folder, DataSetOptions(subject_pattern="^."))
                           , tokenizer, 32).patients_known  # fmt: skip


def test_prompts_without_a_word_are_refused_and_masks_of_more_values_named(
    folder: Path, tokenizer: PromptTokenizer
) -> None:
    (folder / "table.csv").write_text("image,mask,text\na.png,masks/full.png,\u0345\n", encoding="utf-8")
    with pytest.raises(DataError, match="has no word"):
        report(folder, tokenizer)
    (folder / "table.csv").write_text("image,mask,text\na.png,masks/gray.png,x\n")
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(folder / "masks/gray.png")
    ((mask, reason),) = report(folder, tokenizer).failed
    assert mask == str(folder / "masks/gray.png")
    assert "255 values besides 0" in reason


def test_progress_is_reported_mask_by_mask(folder: Path, tokenizer: PromptTokenizer) -> None:
    told: list[tuple[int, int]] = []
    report_data_set(read_data_set(folder), tokenizer, 32, lambda *pair: told.append(pair))
    assert told == [(1, 3), (2, 3), (3, 3)]
