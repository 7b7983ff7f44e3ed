"""What is written down so that a later process can continue: a value in a small JSON file. Knows no contents."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError


class Record(BaseModel):
    """Base of such values. file_name: in a directory that the caller names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file_name: ClassVar[str]

    def write(self, directory: Path) -> None:
        """Replace the file in one step, so that no reader sees half of it. Blocking."""
        temporary = directory / f".{self.file_name}"
        temporary.write_text(self.model_dump_json(indent=1))
        temporary.replace(directory / self.file_name)

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """None if there is none that this version understands. Blocking."""
        try:
            return cls.model_validate_json((directory / cls.file_name).read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValidationError):
            return None

    @classmethod
    def remove(cls, directory: Path) -> None:
        """Twice is harmless. Blocking."""
        for name in (cls.file_name, f".{cls.file_name}"):
            (directory / name).unlink(missing_ok=True)
