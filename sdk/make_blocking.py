"""Makes the blocking classes (`hypercell/blocking/`) from the asynchronous ones (`hypercell/aio/`).

    python sdk/make_blocking.py [--check]

Every public method becomes one line that runs its twin in the background loop; signatures and docstrings are copied.
--check writes nothing and ends with status 1 if a file is not current.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent / "hypercell"
MODULES = ("shell", "commands", "watch", "files", "sandbox")
CALLBACK_TYPES = ("OnBytes", "OnError", "OnResult", "OnText")
NAMES = {"__aenter__": "__enter__", "__aexit__": "__exit__", "__aiter__": "__iter__", "__anext__": "__next__"}


def blocking_name(text: str) -> str:
    """The text with the blocking names of things: types, and words in docstrings."""
    text = re.sub(r"AsyncGenerator\[(.+?), None\]", r"Iterator[\1]", text)
    text = re.sub(r"\bAsyncIterable\[bytes\] \| |\| AsyncIterable\[bytes\]", "", text)
    text = re.sub(r"\bAsync(Sandbox|Commands?|Files|Shell|Watch)\b", r"\1", text)
    text = text.replace(" An object belongs to the event loop in which it was made.", "")
    return text.replace("`async with`", "`with`").replace("await ", "").replace("awaits", "calls")


def made(module: str) -> str:
    """The blocking module's source."""
    tree = ast.parse((PACKAGE / "aio" / f"{module}.py").read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.startswith("Async")]
    summary = (ast.get_docstring(tree) or "").splitlines()[0]
    parts = [
        f'"""{summary}\n\nMade by sdk/make_blocking.py from aio/{module}.py: change that.\n"""',
        "from __future__ import annotations",
        imports(tree),
        *(blocking_class(node) for node in classes),
        *(f"register({node.name}, {blocking_name(node.name)})" for node in classes),
    ]
    return formatted("\n\n".join(parts) + "\n")


def imports(tree: ast.Module) -> str:
    """Everything that the original imports or defines; ruff takes out what is not used."""
    lines = ["from hypercell.blocking.portal import BlockingCall, Wrapper, following, here, iterate, register, wrap"]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module not in {"__future__", "hypercell.aio.callbacks"}:
            lines.append(ast.unparse(node))
            for alias in node.names:
                if alias.name.startswith("Async") and (node.module or "").startswith("hypercell.aio"):
                    path = str(node.module).replace("hypercell.aio", "hypercell.blocking")
                    lines.append(f"from {path} import {blocking_name(alias.name)}")
        elif isinstance(node, ast.Import):
            lines.append(ast.unparse(node))
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Async"):
            lines.append(f"from hypercell.aio.{modules_of(tree)} import {node.name}")
    lines.append(f"from hypercell.blocking.portal import {', '.join(CALLBACK_TYPES)}")
    lines.append("from collections.abc import Iterator")
    constants = [
        blocking_name(ast.unparse(node))
        for node in tree.body
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) in {"Content", "DEFAULT_TIMEOUT_S", "PAGE_ENTRIES"}
    ]
    return "\n".join(lines) + "\n\n" + "\n".join(constants)


def modules_of(tree: ast.Module) -> str:
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    return next(module for module in MODULES if f"Async{module.capitalize()}" in names)


def blocking_class(node: ast.ClassDef) -> str:
    lines = [f"class {blocking_name(node.name)}(Wrapper):", docstring(node, "    "), f"    _async: {node.name}"]
    for item in node.body:
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            if item.name == "__init__":
                lines.extend(attribute_properties(item, ast.get_docstring(node) or ""))
            elif not item.name.startswith("_") or item.name in NAMES:
                lines.append(method(node.name, item))
    return "\n\n".join(lines)


def attribute_properties(init: ast.FunctionDef, described: str) -> list[str]:
    """Public attributes (`self.x = x` of an annotated argument) as properties; the class's docstring describes them."""
    types = {
        argument.arg: ast.unparse(argument.annotation)
        for argument in [*init.args.args, *init.args.kwonlyargs]
        if argument.annotation is not None
    }
    found = []
    for statement in init.body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        if isinstance(target, ast.Attribute) and not target.attr.startswith("_"):
            about = re.search(rf"\b{target.attr}: ([^.]+\.)", described)
            text = about[1][0].upper() + about[1][1:] if about else f"Its {target.attr}."
            found.append(
                f"    @property\n    def {target.attr}(self) -> {types[target.attr]}:\n"
                f'        """{text}"""\n        return self._async.{target.attr}'
            )
    return found


def method(class_name: str, item: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    decorators = [ast.unparse(decorator) for decorator in item.decorator_list]
    returns = blocking_name(ast.unparse(item.returns)) if item.returns else "None"
    signature = blocking_name(ast.unparse(item.args))
    lines = [f"    @{decorator}" for decorator in decorators]
    lines.append(f"    def {NAMES.get(item.name, item.name)}({signature}) -> {returns}:")
    if ast.get_docstring(item):
        lines.append(docstring(item, "        "))
    if item.name in {"__aenter__", "__aiter__"}:
        return "\n".join([*lines, "        return self"])
    if item.name == "__anext__":
        return "\n".join([*lines, "        return following(self._async)"])
    target = class_name if "classmethod" in decorators else "self._async"
    if "property" in decorators:
        value = f"wrap({target}.{item.name})"
    else:
        arguments = ", ".join(passed(item.args))
        invocation = f"{target}.{item.name}({arguments})"
        if "AsyncGenerator" in ast.unparse(item.returns or ast.Constant(None)):
            return "\n".join([*lines, f"        return iterate({invocation})"])
        value = f"wrap(BlockingCall().run({invocation}))"
    if returns == "None":
        lines.append("        " + value.removeprefix("wrap(").removesuffix(")"))
    elif "Async" in ast.unparse(item.returns or ast.Constant(None)):
        lines.extend([f"        result: {returns} = {value}", "        return result"])
    else:
        lines.append("        return " + value.removeprefix("wrap(").removesuffix(")"))
    return "\n".join(lines)


def passed(arguments: ast.arguments) -> list[str]:
    def one(argument: ast.arg) -> str:
        is_callback = argument.annotation is not None and ast.unparse(argument.annotation).startswith(CALLBACK_TYPES)
        return f"here({argument.arg})" if is_callback else argument.arg

    # `timeout` has become `timeout_s` (takes_timeout, which the blocking method has as well).
    named = [argument for argument in arguments.kwonlyargs if argument.arg != "timeout"]
    positional = [one(argument) for argument in arguments.args if argument.arg not in {"self", "cls"}]
    starred = [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    return [*positional, *starred, *(f"{argument.arg}={one(argument)}" for argument in named)]


def docstring(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, indent: str) -> str:
    lines = blocking_name(ast.get_docstring(node) or "").splitlines()
    text = "\n".join([lines[0], *(indent + line if line else "" for line in lines[1:])])
    end = f"\n{indent}" if len(lines) > 1 else ""
    return f'{indent}"""{text}{end}"""'


def formatted(source: str) -> str:
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check", "--fix", "--quiet", "--select", "F401,F811,I"], ["format", "--quiet"]):
        options = ["--line-length", "120", "--stdin-filename", str(PACKAGE / "blocking" / "made.py"), "-"]
        source = subprocess.run(
            [*ruff, *command, *options], input=source, capture_output=True, text=True, check=True
        ).stdout
    return source


def main() -> int:
    stale = []
    for module in MODULES:
        path = PACKAGE / "blocking" / f"{module}.py"
        source = made(module)
        if not path.exists() or path.read_text() != source:
            stale.append(path)
            if "--check" not in sys.argv:
                path.write_text(source)
    for path in stale:
        print(("not current: " if "--check" in sys.argv else "made ") + str(path))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
