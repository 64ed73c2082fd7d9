"""docs/recipes.md lists every key of recipes and plans."""

from __future__ import annotations

from benchmarks.tables.recipe_reference import PAGE, reference
from cclip_deploy.train.config import TrainConfig


def test_the_page_of_keys_is_that_of_the_models() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == reference(), "Run: python -m benchmarks.tables.recipe_reference"
    assert all(f"`{name}" in page for name in TrainConfig.model_fields)
    assert "| `game.masker_steps` | `1` | integer > 0 | Masker steps after each step of the rest" in page
