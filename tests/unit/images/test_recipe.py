"""Recipes: the default one is sound, wrong ones are refused with one sentence that names file, key and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from vm_runtime.images.errors import RecipeError
from vm_runtime.images.recipe import load_recipe

GOOD = 'name = "r"\ndisplay_name = "R"\n'


def write(directory: Path, text: str) -> Path:
    path = directory / "recipe.toml"
    path.write_text(text)
    return path


def test_default_recipe_is_python3_with_the_usual_packages() -> None:
    recipe = load_recipe().recipe
    assert (recipe.name, recipe.display_name) == ("python3", "Python 3 (microVM)")
    names = {package.partition("==")[0] for package in recipe.python_packages}
    assert names >= {"ipykernel", "ipywidgets", "matplotlib", "numpy", "pandas"}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name = ", ["not valid TOML", "Correct that line"]),
        ('name = "r"\n', ["'display_name' is missing"]),
        (GOOD + "colour = 1\n", ["'colour' is unknown", "display_name"]),
        (GOOD + 'suite = "sid"\n', ["suite", "bookworm"]),
        (GOOD + 'python_packages = ["numpy"]\n', ["python_packages", "'numpy' is not pinned", "name==version"]),
        (GOOD + 'debian_packages = ["--x"]\n', ["debian_packages", "'--x'"]),
        (GOOD + 'warmup = "import"\n', ["warmup", "not valid Python"]),
        (GOOD + 'remove = ["../x"]\n', ["remove.0", "absolute path"]),
        (GOOD + '[[files]]\npath = "/a"\n', ["files.0", "exactly one of 'content' and 'source'"]),
        (GOOD + '[[files]]\npath = "/a"\nsource = "none"\n', ["files.0.source", "relative to the recipe"]),
        (GOOD + '[environment]\n"A B" = "1"\n', ["environment", "'A B'"]),
        (GOOD + "memory_mib = 1\n", ["memory_mib", "256"]),
        ('name = "../r"\ndisplay_name = "R"\n', ["name", "a-z"]),
    ],
)
def test_wrong_recipes_are_refused_with_one_sentence(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_unknown_recipe_names_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="one of: python3"):
        load_recipe(tmp_path / "nothing.toml")


def test_digest_follows_the_content_of_files(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + '[[files]]\npath = "/etc/a"\nsource = "a"\n')
    (tmp_path / "a").write_text("one")
    first = load_recipe(path)
    assert load_recipe(path).digest() == first.digest()
    (tmp_path / "a").write_text("two")
    assert load_recipe(path).digest() != first.digest()
