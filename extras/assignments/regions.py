"""Pieces of a source file, found by name: cut out, put back, and tests with all they need.

A region is a function, "Class.method", or a paragraph of a function by its numbered comment:
"train 2" runs from the comment "# 2. ..." to the next numbered one. Nothing here runs any code.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ALLOWED = {"torch", "math", "numpy", "itertools", "functools", "collections", "statistics"}
Place = tuple[ast.FunctionDef, list[ast.stmt], int, int, int]


def find(tree: ast.Module, source: str, name: str) -> Place:
    """-> function, block, i, j, line: the region is block[i:j], of the function, below the line.

    Raises LookupError if it is not there.
    """
    path, _, part = name.partition(" ")
    node = tree
    for step in path.split("."):
        kinds = ast.FunctionDef, ast.ClassDef
        node = [n for n in getattr(node, "body", ()) if isinstance(n, kinds) and n.name == step]
        if not node:
            raise LookupError(f"{path} is missing")
        node = node[-1]  # the last definition counts, as in Python
    if not isinstance(node, ast.FunctionDef):
        raise LookupError(f"{path} is not a function")
    lines = source.split("\n")
    if not part:
        i = int(ast.get_docstring(node) is not None)
        line = node.body[0].end_lineno if i else node.body[0].lineno - 1
        while not i and lines[line - 1].strip().startswith("#"):
            line -= 1
        return node, node.body, i, len(node.body), line
    marks = {}
    for number in range(node.lineno, node.end_lineno + 1):
        if mark := re.match(r"\s+# (\d)\. ", lines[number - 1]):
            marks.setdefault(mark[1], number)
    if part not in marks:
        raise LookupError(f"the comment '# {part}. ...' in {path} is missing")
    first = marks[part]
    last = min((n for n in marks.values() if n > first), default=node.end_lineno + 1)
    for owner in ast.walk(node):
        block = getattr(owner, "body", [])
        inside = [i for i, s in enumerate(block) if first < s.lineno < last] if isinstance(
            block, list) else []  # fmt: skip
        if inside:
            return node, block, inside[0], inside[-1] + 1, first
    raise LookupError(f"nothing follows the comment '# {part}. ...' in {path}")


def is_stub(source: str, name: str) -> bool:
    """Is the region as the handout left it? Raises LookupError, SyntaxError."""
    _, block, i, j, _ = find(ast.parse(source), source, name)
    return [ast.unparse(s)[:26] for s in block[i:j]] == ["raise NotImplementedError("]


def stub(source: str, questions: dict[str, str]) -> str:
    """The source with each region as `raise NotImplementedError`; {region: question}.

    Signature, docstring and the comment of a paragraph stay, and the shapes of what is computed.
    """
    lines, tree = source.split("\n"), ast.parse(source)
    places = {name: find(tree, source, name) for name in questions}
    for name in sorted(questions, key=lambda name: -places[name][4]):
        function, block, i, j, line = places[name]
        end, indent = block[j - 1].end_lineno, " " * block[i].col_offset
        new = [f"{indent}# {shape}" for shape in shapes(block[i:j], lines)]
        if " " in name:  # what the paragraphs that follow need
            rest = [n for n in ast.walk(function) if isinstance(n, ast.Name) and n.lineno > end]
            first = {}  # where each name is next used: a line, and then reading before writing
            for n in rest:
                use = n.lineno, isinstance(n.ctx, ast.Store)
                first[n.id] = min(use, first.get(n.id, use))
            stored = names(block[i:j], ast.Store)
            needed = sorted(n for n in stored & first.keys() if not first[n][1])
            new = [f"{indent}# What follows needs: {', '.join(needed)}."] * bool(needed) + new
        lines[line:end] = [*new, f'{indent}raise NotImplementedError("{questions[name]}")']
    return "\n".join(lines)


def shapes(statements: list[ast.stmt], lines: list[str]) -> list[str]:
    """ "name: [B, G]" for each name whose line ends in such a comment."""
    found = {}
    for node in (n for s in statements for n in ast.walk(s) if isinstance(n, ast.Assign)):
        comment = re.search(
            r"  # (\[.*?\]|([A-Zn]|rounds)( \* [A-Z])* rows)", lines[node.end_lineno - 1]
        )
        if comment and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = f"{node.targets[0].id}: {comment[1]}"
    return list(found.values())


def names(nodes, context=(ast.Load, ast.Store)) -> set[str]:
    """The names in these nodes, the arguments of functions (fixtures, in tests) included."""
    found = set()
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, context):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
    return found


def bound(node: ast.stmt) -> set[str]:
    """The names that a statement of a module defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names([node], ast.Store)


# --------------------------------------------------------------------------------------------------
# A student's functions in the reference
# --------------------------------------------------------------------------------------------------


def graft(reference: str, student: str, regions: list[str]) -> tuple[str, list[str]]:
    """The reference with the student's regions -> source, and what is wrong with the submission.

    With a region come the functions that it calls and the reference does not have, imports of
    ALLOWED packages, and constants: nothing else of the student's module. A region that is missing
    becomes a stub. Every function is marked @course_plain, for sandbox.py.
    """
    tree, complaints = ast.parse(reference), []
    try:
        theirs = ast.parse(student)
        ast.unparse(theirs)
    except SyntaxError as error:
        theirs, complaints = ast.parse(""), [f"line {error.lineno}: {error.msg}"]
    except (ValueError, RecursionError, MemoryError) as error:
        theirs, complaints = ast.parse(""), [f"it cannot be read: {type(error).__name__}"]
    used = []
    for region in regions:
        function, block, i, j, _ = find(tree, reference, region)
        new = ast.parse(f'raise NotImplementedError("{region}")').body
        try:
            their_function, their_block, their_i, their_j, _ = find(theirs, student, region)
            if arguments(their_function) != arguments(function):
                raise LookupError(f"the arguments of {region} are not those of the handout")
            new = their_block[their_i:their_j] or [ast.Pass()]
        except LookupError as error:
            complaints += [str(error)] if theirs.body else []
        block[i:j] = new
        used += new
        if " " not in region:
            function.decorator_list.append(ast.Name("course_plain", ast.Load()))
        if "." in region:  # new methods of the same class
            used += add_methods(tree, theirs, region.split(".")[0])
    known = set().union(*map(bound, tree.body))
    after = max(i for i, n in enumerate(tree.body) if ast.unparse(n).startswith("from __future__"))
    tree.body[after + 1 : after + 1] = needed(theirs, names(used), known)
    return ast.unparse(tree), complaints


def arguments(function: ast.FunctionDef) -> list[str]:
    a = function.args
    return [x.arg for x in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg] if x]


def add_methods(tree: ast.Module, theirs: ast.Module, name: str) -> list[ast.stmt]:
    """Put the methods that only the student's class has into the reference's."""
    pairs = [[n for n in t.body if isinstance(n, ast.ClassDef) and n.name == name]
             for t in (tree, theirs)]  # fmt: skip
    if not all(pairs):
        return []
    (ours, *_), (*_, their_class) = pairs
    known = {n.name for n in ours.body if isinstance(n, ast.FunctionDef)}
    new = [n for n in their_class.body if isinstance(n, ast.FunctionDef) and n.name not in known]
    ours.body += [harmless(node) for node in new]
    return new


def needed(theirs: ast.Module, wanted: set[str], known: set[str]) -> list[ast.stmt]:
    """What these names need of the student's module: functions, constants, allowed imports."""
    found, todo = [], set(wanted)
    while todo - known:
        name = min(todo - known)
        known.add(name)
        for node in theirs.body:
            if name not in bound(node) or node in found:
                continue
            if isinstance(node, ast.FunctionDef):
                found.append(harmless(node))
                todo |= names([node])
            elif isinstance(node, ast.Import):
                if all(alias.name.split(".")[0] in ALLOWED for alias in node.names):
                    found.append(node)
            elif isinstance(node, ast.ImportFrom):
                if not node.level and node.module.split(".")[0] in ALLOWED:
                    found.append(node)
            elif isinstance(node, ast.Assign) and is_literal(node.value):
                found.append(node)
    return found


def harmless(node: ast.FunctionDef) -> ast.FunctionDef:
    """A definition that runs nothing: no decorators, and only constants as defaults."""
    node.decorator_list = [
        d for d in node.decorator_list if ast.unparse(d) in ("staticmethod", "property")
    ]
    none = ast.Constant(None)
    node.args.defaults = [d if is_literal(d) else none for d in node.args.defaults]
    node.args.kw_defaults = [d and (d if is_literal(d) else none) for d in node.args.kw_defaults]
    return node


def is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return isinstance(node, ast.Lambda) and not node.args.defaults + node.args.kw_defaults
    return True


# --------------------------------------------------------------------------------------------------
# Tests with all they need
# --------------------------------------------------------------------------------------------------


def cut_tests(folder: Path, tests: list[str]) -> dict[str, str]:
    """["test_gpg.py::test_a", ...] -> {file: source} of these tests, with the helpers, fixtures and
    imports that they need, in whatever test file those stand."""
    todo = [(file, name) for file, name in (test.split("[")[0].split("::") for test in tests)]
    trees, keep, imports = {}, {}, {}
    while todo:
        file, name = todo.pop()
        if file not in trees:
            trees[file] = ast.parse((folder / file).read_text(encoding="utf-8"))
            keep[file], imports[file] = set(), set()
        for i, node in enumerate(trees[file].body):
            if name not in bound(node):
                continue
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                imports[file].add(name)
                if isinstance(node, ast.ImportFrom) and node.module.startswith("test_"):
                    todo.append((f"{node.module}.py", name))
            elif i not in keep[file]:
                keep[file].add(i)
                todo += [(file, other) for other in names([node])]
    return {file: cut_source(folder / file, trees[file], keep[file], imports[file])
            for file in sorted(trees)}  # fmt: skip


def cut_source(path: Path, tree: ast.Module, keep: set[int], imports: set[str]) -> str:
    lines = path.read_text(encoding="utf-8").split("\n")
    head, body = [], []
    for i, node in enumerate(tree.body):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node.names = [a for a in node.names if bound_alias(a) in imports]
            head += [ast.unparse(node)] if node.names else []
        elif i in keep:
            decorators = getattr(node, "decorator_list", [])
            first = min([node.lineno, *(d.lineno for d in decorators)])
            body.append("\n".join(lines[first - 1 : node.end_lineno]))
    title = '"""Part of the project\'s own tests."""'
    return "\n\n\n".join([title, "\n".join(head), *body]) + "\n"


def bound_alias(alias: ast.alias) -> str:
    return (alias.asname or alias.name).split(".")[0]


def first_lines(folder: Path, pattern: str = "test_*.py") -> dict[str, str]:
    """{"test_gpg.py::test_a": first paragraph of its docstring} of all tests in a folder."""
    found = {}
    for path in sorted(folder.glob(pattern)):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                text = (ast.get_docstring(node) or "").strip().split("\n\n")[0]
                found[f"{path.name}::{node.name}"] = " ".join(text.split())
    return found
