"""Recipes: what an image is made of, as a TOML file checked by one model.

name = "python3"                      # the kernelspec's name
display_name = "Python 3 (microVM)"
debian_packages = ["python3", ...]
python_packages = ["numpy==2.4.6"]    # pinned, so that the same recipe gives the same image
warmup = "import numpy"               # run once per template: imported in every new kernel
[environment]                         # of the kernel's process
[[files]]                             # path in the guest, and `content` or `source` (relative to the recipe)
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vm_runtime.images.errors import RecipeError

RECIPES_DIRECTORY = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "python3"
# A file of a recipe is read into memory and travels in its digest; larger things belong into packages.
MAX_FILE_BYTES = 64 << 20

# Jupyter's own rule for the names of kernelspecs (jupyter_client.kernelspec), in lower case.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DEBIAN_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(=[A-Za-z0-9.+:~-]+)?")
_PYTHON_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[A-Za-z0-9._,-]+\])?==[A-Za-z0-9.!+_-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _absolute(value: str) -> str:
    path = PurePosixPath(value)
    if not path.is_absolute() or ".." in path.parts or len(path.parts) < 2 or not value.isprintable():
        raise ValueError("must be an absolute path inside the image, without '..'")
    return str(path)


GuestPath = Annotated[str, AfterValidator(_absolute)]


class RecipeFile(BaseModel):
    """A file put into the image. path: absolute, in the guest. Exactly one of content (text) and source (a path
    relative to the recipe) says what is in it. mode: permission bits, as an octal string."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: GuestPath
    content: str | None = None
    source: str | None = None
    mode: Annotated[str, Field(pattern="^0?[0-7]{3}$")] = "0644"

    @model_validator(mode="after")
    def _one_origin(self) -> RecipeFile:
        if (self.content is None) == (self.source is None):
            raise ValueError("needs exactly one of 'content' and 'source'")
        return self


class Recipe(BaseModel):
    """What an image is made of, and the usual size of machines made from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    display_name: str
    language: str = "python"
    # Each suite has one version of Python, which the wheels must fit (see rootfs.py).
    suite: Literal["bookworm"] = "bookworm"
    debian_packages: tuple[str, ...] = ()
    python_packages: tuple[str, ...] = ()
    files: tuple[RecipeFile, ...] = ()
    # Left out of the image: what packages bring along and nobody needs (their test suites, mostly).
    remove: tuple[GuestPath, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)
    warmup: str = ""
    memory_mib: Annotated[int, Field(ge=256)] = 1024
    vcpus: Annotated[int, Field(ge=1)] = 1
    disk_mib: Annotated[int, Field(ge=64)] = 4096

    @field_validator("name")
    @classmethod
    def _kernelspec_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("must be 1 to 64 of a-z, 0-9, '.', '_' and '-', and begin with a letter or digit")
        return value

    @field_validator("debian_packages")
    @classmethod
    def _debian_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for package in value:
            if not _DEBIAN_PACKAGE.fullmatch(package):
                raise ValueError(f"{package!r} is not the name of a Debian package; write 'name' or 'name=version'")
        return value

    @field_validator("python_packages")
    @classmethod
    def _pinned(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for package in value:
            if not _PYTHON_PACKAGE.fullmatch(package):
                raise ValueError(f"{package!r} is not pinned; write 'name==version'")
        return value

    @field_validator("environment")
    @classmethod
    def _variables(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not _VARIABLE.fullmatch(name) or "\0" in text:
                raise ValueError(f"{name!r} cannot be an environment variable; use letters, digits and '_'")
        return value

    @field_validator("warmup")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            compile(value, "<warmup>", "exec")
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"is not valid Python: {error}") from error
        return value


class LoadedRecipe(BaseModel):
    """A recipe with the bytes of its files, in the order of `recipe.files`. origin: where it was read from."""

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    contents: tuple[bytes, ...]
    origin: str

    def digest(self) -> str:
        """Hex SHA-256 over everything in it: equal for recipes that give the same image."""
        total = hashlib.sha256(json.dumps(self.recipe.model_dump(mode="json"), sort_keys=True).encode())
        for content in self.contents:
            total.update(hashlib.sha256(content).digest())
        return total.hexdigest()


def load_recipe(name_or_path: str | Path = DEFAULT_RECIPE) -> LoadedRecipe:
    """Reads a recipe: one that comes with Hypercell by its name, any other by its path. Errors: RecipeError."""
    path = RECIPES_DIRECTORY / f"{name_or_path}.toml"
    if not (_NAME.fullmatch(str(name_or_path)) and path.is_file()):
        path = Path(name_or_path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(found.stem for found in RECIPES_DIRECTORY.glob("*.toml")))
        raise RecipeError(
            f"There is no recipe {str(name_or_path)!r}; give the path of a TOML file or one of: {known}."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error}. Check the path and its permissions.") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"The recipe {path} is not valid TOML: {error}. Correct that line.") from error
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"The recipe {path} is wrong: {_first_problem(error)}.") from error
    contents = tuple(_content(path, index, file) for index, file in enumerate(recipe.files))
    return LoadedRecipe(recipe=recipe, contents=contents, origin=str(path))


def _content(recipe_path: Path, index: int, file: RecipeFile) -> bytes:
    if file.source is None:
        return (file.content or "").encode()
    source = recipe_path.parent / file.source
    try:
        size = source.stat().st_size
        if size > MAX_FILE_BYTES:
            raise RecipeError(
                f"The recipe {recipe_path} is wrong: files.{index}.source: {source} has {size >> 20} MiB; "
                f"at most {MAX_FILE_BYTES >> 20} MiB are possible."
            )
        return source.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"The recipe {recipe_path} is wrong: files.{index}.source: {source} cannot be read ({error.strerror}); "
            "paths are relative to the recipe."
        ) from error


def _first_problem(error: ValidationError) -> str:
    """One of pydantic's findings as `key: what is wrong; what to do`."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "the file"
    match first["type"]:
        case "missing":
            return f"the key {key!r} is missing; add it"
        case "extra_forbidden":
            known = ", ".join((RecipeFile if len(first["loc"]) > 1 else Recipe).model_fields)
            return f"the key {key!r} is unknown; remove it or use one of: {known}"
        case _:
            message = first["msg"].removeprefix("Value error, ")
            return f"{key}: {message[:1].lower()}{message[1:]}"
