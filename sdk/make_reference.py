"""Makes docs/sdk/reference.md from the SDK's docstrings.

    python sdk/make_reference.py [--check]

--check writes nothing and ends with status 1 if the page is not current.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sdk" / "hypercell"
PAGE = ROOT / "docs" / "sdk" / "reference.md"
# In the order of the page. AsyncSandbox and the like have the same methods as the blocking classes.
MODULES = (
    "blocking/sandbox.py",
    "blocking/commands.py",
    "blocking/shell.py",
    "blocking/files.py",
    "blocking/watch.py",
    "execution.py",
    "values.py",
    "search.py",
    "aio/search.py",
    "errors.py",
)
HIDDEN = {"Recorder", "Heard", "refused"}
HEAD = """\
# Reference

Made by `sdk/make_reference.py` from the docstrings: change those. Every class of `hypercell` with `Async` before its
name has the same methods, awaited; its generators are asynchronous ones.
"""


def page() -> str:
    parts = [HEAD]
    for name in MODULES:
        tree = ast.parse((PACKAGE / name).read_text())
        parts.append(f"## `{module_name(name)}`\n\n{(ast.get_docstring(tree) or '').splitlines()[0]}\n")
        for node in tree.body:
            is_public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
            if is_public and node.name not in HIDDEN and not (name == "aio/search.py" and is_async(node)):
                parts.append(described(node))
    return "\n".join(parts)


def module_name(path: str) -> str:
    if path.startswith(("search", "aio/search")):
        return "hypercell." + path.removesuffix(".py").replace("/", ".")
    return "hypercell"


def is_async(node: ast.stmt) -> bool:
    return isinstance(node, ast.AsyncFunctionDef)


def described(node: ast.ClassDef | ast.FunctionDef) -> str:
    if isinstance(node, ast.FunctionDef):
        return f"### `{signature(node)}`\n\n{text(node)}\n"
    lines = [f"### {node.name}\n", text(node) + "\n"]
    fields = [
        f"`{ast.unparse(item.target)}: {ast.unparse(item.annotation)}`"
        for item in node.body
        if isinstance(item, ast.AnnAssign) and not ast.unparse(item.target).startswith("_")
    ]
    if fields:
        lines.append("Fields: " + ", ".join(fields) + "\n")
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and not item.name.startswith("_") and ast.get_docstring(item):
            lines.append(f"**`{signature(item)}`**  \n{text(item)}\n")
    return "\n".join(lines)


def signature(node: ast.FunctionDef) -> str:
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if "property" in decorators:
        return f"{node.name}{returns}"
    returns = returns.replace("builtins.", "")
    arguments = re.sub(r"^(self|cls)(, )?", "", ast.unparse(node.args))
    return f"{node.name}({arguments}){returns}"


def text(node: ast.ClassDef | ast.FunctionDef) -> str:
    return ast.get_docstring(node) or ""


def main() -> int:
    wanted = page()
    if PAGE.exists() and PAGE.read_text() == wanted:
        return 0
    if "--check" in sys.argv:
        print(f"not current: {PAGE}; run python sdk/make_reference.py")
        return 1
    PAGE.write_text(wanted)
    print(f"made {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
