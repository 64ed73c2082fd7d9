"""Columns of tables: names, precedence, and what is refused."""

from __future__ import annotations

import pytest

from cclip_deploy.datasets.columns import find_columns, role_of, split_of
from cclip_deploy.datasets.options import DataSetOptions, parse_columns
from cclip_deploy.errors import DataError, UsageError

ROLES = {"image": True, "mask": True, "prompt": True, "split": False, "patient": False}


def find(*header: str, **chosen: str) -> dict[str, str]:
    return find_columns("t.csv, row 1", header, ROLES, chosen)


def test_the_documented_name_goes_before_an_alias() -> None:
    header = ("image", "mask", "text", "label", "caption", "filename", "set", "split", "patient", "subject")
    assert find(*header) == {
        "image": "image", "mask": "mask", "prompt": "text", "split": "split", "patient": "subject",
    }  # fmt: skip


def test_case_and_separators_do_not_matter_and_other_columns_are_left() -> None:
    assert find("IMAGE PATH", "Ground.Truth", "Caption", "age", "Patient-ID") == {
        "image": "IMAGE PATH", "mask": "Ground.Truth", "prompt": "Caption", "patient": "Patient-ID",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("header", "chosen", "words"),
    [
        (("image", "label", "gt", "text"), {}, "label, gt may all be the mask. Give --column mask=label or --column"),
        (("Image", "image", "mask", "text"), {}, "--column image=Image or --column image=image"),
        (("image", "mask"), {}, "'text' is missing; its columns are image, mask. Add it, or .* --column prompt=NAME"),
        (
            ("image", "mask", "text", "patients"),
            {},
            "'patients' looks like the patient. Give --column pat",
        ),
        (("image", "mask", "text"), {"mask": "lable"}, "no column 'lable', which --column names for the mask"),
        (("image", "mask", "text"), {"mask": ""}, "column 'mask' is missing"),
    ],
)
def test_what_is_not_clear_is_refused_with_the_option(
    header: tuple[str, ...], chosen: dict[str, str], words: str
) -> None:
    with pytest.raises(DataError, match=f"t.csv, row 1.*{words}"):
        find(*header, **chosen)


def test_a_chosen_column_is_taken_whatever_its_name_and_no_column_if_it_is_empty() -> None:
    assert find("image", "text", "caption", "mask", prompt="Caption", mask="text")["mask"] == "text"
    assert "patient" not in find("image", "mask", "text", "patients", patient="")
    assert "split" not in find("image", "mask", "text", "split", split="")


@pytest.mark.parametrize("name", ["age", "patient_age", "patient_sex", "side", "view", "study", "test"])
def test_usual_columns_of_other_use_are_not_taken_for_misspelled_ones(name: str) -> None:
    assert name not in find("image", "mask", "text", name).values()


def test_assignments_are_parsed_and_wrong_ones_refused() -> None:
    assert parse_columns(["image=a=b", "text=Caption", "patient="]) == {
        "image": "a=b", "prompt": "Caption", "patient": "",
    }  # fmt: skip
    assert (role_of("Caption"), split_of(" Validation"), split_of("fold 1")) == ("prompt", "val", None)
    for wrong, words in (
        (["image"], "has no '='"), (["age=x"], "Roles are image, mask, prompt, split, patient"),
        (["mask=a", "label=b"], "names the mask column twice"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            parse_columns(wrong)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"encoding": "utf-99"}, "Unknown text encoding 'utf-99'"),
        ({"encoding": "hex"}, "Unknown text encoding 'hex'"),
        ({"delimiter": "::"}, "give comma, semicolon, tab, pipe, or one character"),
        ({"delimiter": '"'}, "not a quote"),
        ({"mask_values": ("reddish",)}, "mask value 'reddish' is unknown"),
        ({"mask_values": ("9-1",)}, "mask value '9-1' is unknown"),
        ({"columns": {"age": "x"}}, "Unknown column role 'age'"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_read(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        DataSetOptions(**options)  # type: ignore[arg-type]
