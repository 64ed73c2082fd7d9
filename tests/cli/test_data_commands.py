"""Tests of synth, data and prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.run import invoke


@pytest.mark.parametrize("layout", ["qata", "mosmed", "languidemedseg", "medvlsm", "flat", "jsonl"])
def test_a_synthetic_data_set_is_generated_and_checked(tmp_path: Path, layout: str) -> None:
    made = invoke(
        "synth", tmp_path / "set", "--layout", layout, "--images", "10", "--size", "32", "--seed", "3",
        "--confounder-rho", "0.95", "--absent-share", "0.5", "--typo-share", "0.5", "--json",
    )  # fmt: skip
    assert made.exit_code == 0, made.stderr
    assert json.loads(made.stdout)["films"] == {"train": 6, "val": 2, "test": 2}
    said = invoke("data", tmp_path / "set", "--json")
    assert said.exit_code == 0, said.stderr
    report = json.loads(said.stdout)
    splits = report["splits"].values()
    assert [split["images"] for split in splits] == [6, 2, 2]
    assert all(overlap["patients"] == overlap["pictures"] == 0 for overlap in report["overlaps"])
    assert sum(split["repaired_prompts"] for split in splits) == len(report["repaired"]) > 0
    assert sum(split["empty_masks"] for split in splits) > 0
    assert sum(split["free_prompts"] for split in splits) == 0


def test_data_prints_a_table(tmp_path: Path) -> None:
    assert invoke("synth", tmp_path / "set", "--images", "5", "--size", "32").exit_code == 0
    said = invoke("data", tmp_path / "set", "--layout", "flat", "--prompt-length", "8", "--subject", "train")
    assert said.exit_code == 0
    assert "train and test share 0 patients and 0 images" in said.stdout
    assert "5 prompts are longer than 8 tokens" in said.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("--layout coco", 2), ("--confounder hair", 2), ("--confounder-rho 2", 2), ("--test-rho 0.5", 2),
        ("--layout qata --prompts-per-image 2", 2), ("--images 4", 2),
    ],
)  # fmt: skip
def test_invalid_options_of_synth_write_nothing(tmp_path: Path, arguments: str, code: int) -> None:
    done = invoke("synth", tmp_path / "set", "--size", "32", *arguments.split())
    assert done.exit_code == code
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_a_data_set_ends_with_6(tmp_path: Path) -> None:
    done = invoke("data", tmp_path, "--json")
    assert (done.exit_code, json.loads(done.stdout)["error"]["type"]) == (6, "DataError")
    assert "none of the layouts" in done.stderr


def test_prompt_corrects_parses_and_tokenizes() -> None:
    text = "Bilateral pulmonary infection, two infected areas, uppper left lung and middle lowerright lung."
    done = invoke("prompt", text, "--json", "--prompt-length", "16")
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    assert said["written"] == text
    assert said["text"] == text.replace("uppper", "upper").replace("lowerright", "lower right")
    assert said["repairs"] == [{"found": "uppper", "put": "upper"}, {"found": "lowerright", "put": "lower right"}]
    assert (said["zones"], said["side"], said["count"]) == (
        {"left": ["upper"], "right": ["middle", "lower"]},
        "both",
        2,
    )
    assert said["tokens"][0] == 49406
    assert said["tokens"][-1] == 49407
    assert (said["token_count"], said["prompt_length"], said["cut"]) == (len(said["tokens"]), 16, True)
    assert "lower right" in invoke("prompt", text).stdout


def test_free_text_has_no_zones_and_an_empty_prompt_is_an_error() -> None:
    said = json.loads(invoke("prompt", "a [polyp] in the colon", "--json").stdout)
    assert (said["zones"], said["side"], said["count"], said["repairs"], said["cut"]) == (None, None, None, [], False)
    assert "a [polyp] in the colon" in invoke("prompt", "a [polyp] in the colon").stdout
    assert invoke("prompt", " ").exit_code == 2
    assert invoke("prompt", "x", "--prompt-length", "99").exit_code == 2


def test_other_wordings_are_parsed_and_unknown_words_are_listed() -> None:
    said = json.loads(invoke("prompt", "opacities in the rigth upper and middle zones", "--json").stdout)
    assert (said["zones"], said["side"]) == ({"left": [], "right": ["upper", "middle"]}, "right")
    assert said["repairs"] == [{"found": "rigth", "put": "right"}]
    kept = json.loads(invoke("prompt", "the rigth lung", "--json", "--no-repair").stdout)
    assert (kept["text"], kept["repairs"]) == ("the rigth lung", [])
    denied = json.loads(invoke("prompt", "no infection in the left lung", "--json").stdout)
    assert (denied["zones"], denied["side"], denied["not_understood"]) == (None, None, ["no"])
    assert "not understood" in invoke("prompt", "no infection in the left lung").stdout


def test_prompt_uses_the_tokenizer_and_length_of_a_bundle(tiny_bundle_path: Path) -> None:
    from cclip_deploy.bundle.bundle import Bundle

    said = json.loads(invoke("prompt", "lower left lung", "--json", "--bundle", tiny_bundle_path).stdout)
    assert said["prompt_length"] == Bundle.open(tiny_bundle_path).manifest.prompt_length
    assert said["token_count"] == 5
