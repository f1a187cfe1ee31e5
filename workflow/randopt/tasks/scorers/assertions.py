"""Assertions taken apart: what the program is asked, and what its answer is held against, where it cannot reach.

`assert f(3) == 7` asks the program for the value of `f(3)`. The 7 never enters its process, and the comparison takes
place in ours. The rules, in this order:

1. `assert call == value`, where `call` begins with a name of the solution's and `value` uses none: asked for `call`. A
   literal value is read as one; any other is worked out with the data set's own solution, in a sandbox of its own.
2. `assert call` and `assert not call`: asked for `call`, whose truth counts.
3. Any other expression: each call that begins with a name of the solution's is asked for; the rest, with the values put
   in, is worked out in a sandbox that has the data set's solution and never had the program.

A statement that fits none (a loop, a call inside a comprehension that uses its variables) is refused.
"""

import ast
from collections.abc import Set as AbstractSet
from dataclasses import dataclass


class NotSeparable(ValueError):
    """An assertion whose calls cannot be asked for one by one."""


@dataclass(frozen=True)
class Question:
    """One assertion. `asked`: expressions for the program. Exactly one of the other three says what must hold."""

    asked: tuple[str, ...]
    equals: str | None = None  # the value asked for equals that of this expression
    truth: bool | None = None  # the truth of the value asked for
    holds: str | None = None  # an expression of the names value0, value1, ...


def defined_names(code: str) -> frozenset[str]:
    """Names that a solution defines at its top level, by def, class or assignment. Raises SyntaxError."""
    found = set()
    for node in ast.parse(code).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return frozenset(found)


def take_apart(test: str, names: AbstractSet[str]) -> Question:
    """The question of one assertion, for a solution that defines `names`. Raises NotSeparable or SyntaxError."""
    statements = ast.parse(test.strip()).body
    if len(statements) != 1 or not isinstance(statements[0], ast.Assert):
        raise NotSeparable("not a single assert statement")
    claim = statements[0].test
    if isinstance(claim, ast.Compare) and len(claim.ops) == 1 and isinstance(claim.ops[0], ast.Eq):
        for call, value in ((claim.left, claim.comparators[0]), (claim.comparators[0], claim.left)):
            if _root(call) in names and not _uses(value, names):
                return Question((ast.unparse(call),), equals=ast.unparse(value))
    inner = claim.operand if isinstance(claim, ast.UnaryOp) and isinstance(claim.op, ast.Not) else claim
    if _root(inner) in names:
        return Question((ast.unparse(inner),), truth=inner is claim)
    separate = _Separate(names)
    rest = separate.visit(claim)
    if not separate.asked or _uses(rest, names):
        raise NotSeparable("it makes no call of the solution's, or uses it in another way than by calling it")
    return Question(tuple(separate.asked), holds=ast.unparse(rest))


def _root(node: ast.AST) -> str | None:
    """The name that a chain of calls, attributes and subscripts begins with; None for a bare name or anything else."""
    chain = False
    while isinstance(node, (ast.Call, ast.Attribute, ast.Subscript)):
        chain, node = True, node.func if isinstance(node, ast.Call) else node.value
    return node.id if chain and isinstance(node, ast.Name) else None


def _uses(node: ast.AST, names: AbstractSet[str]) -> bool:
    return any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node))


class _Separate(ast.NodeTransformer):
    """Puts value0, value1, ... in the place of the solution's calls, which it collects."""

    def __init__(self, names: AbstractSet[str]) -> None:
        self.names = names
        self.asked: list[str] = []

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            return node  # its calls use variables of its own; left in place they are found, and refused
        if _root(node) in self.names:
            self.asked.append(ast.unparse(node))
            return ast.Name(f"value{len(self.asked) - 1}", ast.Load())
        return self.generic_visit(node)
