"""Network configurations, their JSON form, and supported image sizes."""

from __future__ import annotations

import dataclasses
import json

import pytest

from cclip_deploy.errors import UsageError
from cclip_deploy.model.config import CONFIGS, RN101, TINY, ModelConfig, check_image_hw, image_hw
from cclip_deploy.model.network import CausalCLIPSeg


def test_tiny_has_under_8_million_parameters_most_of_them_the_token_table(tiny_network: CausalCLIPSeg) -> None:
    parameters = sum(parameter.numel() for parameter in tiny_network.parameters())
    table = tiny_network.text_tower.token_embedding.weight.numel()
    assert parameters < 8_000_000
    assert table > parameters / 2


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_json_form_is_read_back_as_the_same_config(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_configs_are_found_by_their_own_name() -> None:
    assert {"rn101": RN101, "tiny": TINY} == CONFIGS
    assert RN101.neck_width == 512


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"surprise": 1}, "surprise"),
        ({"vision_layers": None}, "vision_layers"),
        ({"vision_layers": [1, 1, 2]}, "not integers"),
        ({"vision_layers": "1121"}, "not integers"),
        ({"text_layers": "2"}, "not integers"),
        ({"text_width": 64.0}, "not integers"),
        ({"text_heads": True}, "not integers"),
        ({"grid": 0}, "not integers"),
        ({"feature_width": 10**12}, "not integers"),
        ({"text_heads": 7}, "divide"),
        ({"vision_heads": 3}, "divide"),
        ({"embed_dim": 128}, "embed_dim must be 8 x vision_width = 64"),
    ],
)
def test_a_config_that_fits_no_network_is_refused_with_the_reason(change: dict[str, object], reason: str) -> None:
    values = {name: value for name, value in {**TINY.to_dict(), **change}.items() if value is not None}
    with pytest.raises(UsageError, match=reason):
        ModelConfig.from_dict(values)


def test_a_config_with_a_key_missing_is_refused() -> None:
    values = TINY.to_dict()
    del values["carafe_width"]
    with pytest.raises(UsageError, match="carafe_width"):
        ModelConfig.from_dict(values)


def test_rn101_in_another_width_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="8 x vision_width = 1024"):
        dataclasses.replace(RN101, vision_width=128)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("224", (224, 224)), (416, (416, 416)), ("256x320", (256, 320)), ("320X256", (320, 256)), ("32x32", (32, 32))],
)
def test_image_size_is_n_or_height_x_width(text: str | int, expected: tuple[int, int]) -> None:
    assert image_hw(text) == expected


@pytest.mark.parametrize("text", ["", "x", "224x", "x224", "big", "1e3", "224x224x3", "224.0", "224*224"])
def test_text_that_is_not_an_image_size_is_refused_and_quoted(text: str) -> None:
    with pytest.raises(UsageError, match="is not N or HxW"):
        image_hw(text)


@pytest.mark.parametrize(
    ("hw", "advice"),
    [
        ((100, 224), "Use 96"),
        ((224, 225), "Use 224"),
        ((0, 0), "Use 32"),
        ((-32, 224), "Use 32"),
        ((224, 16), "Use 32"),
    ],
)
def test_a_side_that_is_not_a_multiple_of_32_is_refused_with_the_nearest(hw: tuple[int, int], advice: str) -> None:
    with pytest.raises(UsageError, match=advice):
        check_image_hw(hw)
