"""Telling arithmetic on symbols from anything else, before sympy evaluates it as Python."""

from __future__ import annotations

import ast
import re
from typing import Any

SYMBOL = re.compile(r"[a-z]{1,3}[0-9]{1,6}")
LARGEST_EXPONENT = 16
LONGEST = 10_000
# sympy joins lines and knows notations of its own; without these characters it reads what Python reads
ALPHABET = re.compile(r"[A-Za-z0-9_ '(),.=+\-*/<>&|~%]*")
# torch writes sympy's own notation: Add(Symbol('s0', integer=True), Integer(1))
EXPRESSION_FUNCTIONS = frozenset(
    (
        "Add", "Mul", "Pow", "Integer", "Rational", "Float", "Max", "Min", "Abs", "Mod", "Equality",
        "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "Eq", "Ne",
        "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "floor", "ceiling", "FloorDiv",
        "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv",
        "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv",
        "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity",
    )
)  # fmt: skip
EXPRESSION_NAMES = frozenset(("oo", "int_oo", "true", "false"))
POWERS = {"Pow", "PowByNatural", "FloatPow", "LShift"}
NUMBER = re.compile(r"-?[0-9.]{1,40}(e[+-]?[0-9]{1,3})?")


def is_arithmetic(text: Any) -> bool:
    """Whether it is a string of sums, products and comparisons of symbols and numbers, and nothing else."""
    if not isinstance(text, str) or len(text) > LONGEST or ALPHABET.fullmatch(text) is None:
        return False
    try:
        return _is_arithmetic(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _is_arithmetic(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float, bool)
    if isinstance(node, ast.Name):
        return SYMBOL.fullmatch(node.id) is not None or node.id in EXPRESSION_NAMES
    if isinstance(node, ast.UnaryOp):
        return _is_arithmetic(node.operand)
    if isinstance(node, ast.BoolOp):
        return all(map(_is_arithmetic, node.values))
    if isinstance(node, ast.Compare):
        return all(map(_is_arithmetic, [node.left, *node.comparators]))
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, (ast.Pow, ast.LShift)) and not _is_small(node.right):
            return False
        return _is_arithmetic(node.left) and _is_arithmetic(node.right)
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and _is_known_call(node.func.id, node)


def _is_known_call(name: str, call: ast.Call) -> bool:
    # keywords are a symbol's assumptions (positive=True) and a number's precision
    if not all(
        k.arg and isinstance(k.value, ast.Constant) and type(k.value.value) in (bool, int) for k in call.keywords
    ):
        return False
    if name == "Symbol":
        return len(call.args) == 1 and _is_text(call.args[0], SYMBOL)
    if name == "Float" and call.args and _is_text(call.args[0], NUMBER):
        return all(map(_is_arithmetic, call.args[1:]))
    if name in POWERS and not (len(call.args) == 2 and _is_small(call.args[1])):
        return False
    return name in EXPRESSION_FUNCTIONS and all(map(_is_arithmetic, call.args))


def _is_text(node: ast.expr, pattern: re.Pattern[str]) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and pattern.fullmatch(node.value) is not None


def _is_small(node: ast.expr) -> bool:
    """Whether it is a plain exponent: larger ones could keep sympy busy for ever."""
    if isinstance(node, ast.UnaryOp):
        return _is_small(node.operand)
    if isinstance(node, ast.Call):
        return (
            isinstance(node.func, ast.Name)
            and node.func.id in ("Integer", "Rational")
            and all(map(_is_small, node.args))
        )
    if not isinstance(node, ast.Constant) or not isinstance(node.value, (int, float)):
        return False
    return abs(node.value) <= LARGEST_EXPONENT
