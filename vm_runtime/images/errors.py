"""Errors of images; the name says whose fault it is.

VmRuntimeError
+-- ImageError
    +-- RecipeError               the recipe's author: broken file, wrong key, unknown package, failing warm-up
    |   +-- UnknownPackageError       a Debian or Python package that does not exist
    +-- BuildHostError            the host's: a tool is missing, no space, no user namespaces
    |   +-- NetworkError              the package servers cannot be reached; try later
    +-- BuildFailedError          a step failed for a reason that is not known; `log` has its output
    +-- UnknownImageError         the caller's: no image has this name or digest
    +-- ImageInUseError           the caller's: a template still needs the image
    +-- BrokenImageError          an image directory that is foreign, incomplete or changed
"""

from __future__ import annotations

from vm_runtime.errors import VmRuntimeError


class ImageError(VmRuntimeError):
    """Base of all errors of images."""


class RecipeError(ImageError):
    """The recipe is wrong; the message names the file, the key, what is wrong and what to do."""


class UnknownPackageError(RecipeError):
    """The recipe asks for a Debian or Python package that does not exist."""


class BuildHostError(ImageError):
    """This host cannot build images as it is; the message says what to install or change."""


class NetworkError(BuildHostError):
    """The servers that packages come from cannot be reached."""


class BuildFailedError(ImageError):
    """A step failed for a reason that is not known. `log`: the end of its output."""

    def __init__(self, message: str, *, log: str = "") -> None:
        super().__init__(f"{message}\n--- end of the output ---\n{log}" if log else message)
        self.log = log


class UnknownImageError(ImageError):
    """No image has this name or digest."""


class ImageInUseError(ImageError):
    """The image cannot be removed while a template needs it."""


class BrokenImageError(ImageError):
    """A directory among the images is foreign, incomplete or changed since it was built."""
