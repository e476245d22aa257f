from __future__ import annotations

import pytest

from curvscope.load.expression import is_arithmetic

ARITHMETIC = [
    "Symbol('s77', positive=True, integer=True)",
    "Mul(Integer(2), Symbol('s0', integer=True))",
    "Add(Symbol('s0'), Integer(-1))",
    "FloorDiv(Symbol('s0'), Integer(2))",
    "Mod(s0, 2)",
    "Pow(Symbol('s0'), Integer(2))",
    "Pow(Symbol('s0'), Rational(1, 2))",
    "Float('0.5', precision=53)",
    "Eq(s0, 3)",
    "Max(1, s0 + u3)",
    "s0 // 2 >= 1",
    "int_oo",
]
ANYTHING_ELSE = [
    "__import__('os').system('touch x')",
    "exec('x')",
    "Symbol('x; import os')",
    "Symbol('s0', **{'a': 1})",
    "Symbol(__import__('os'))",
    "Symbol('s0', positive=open('x', 'w'))",
    "s0.__class__",
    "(lambda: 0)()",
    "[x for x in (1,)]",
    "s0 if s0 else 1",
    "Add('1 + 1', s0)",
    "Integer('2')",
    "f'{s0}'",
    "s0[0]",
    "s0\n+1",
    "s0 # comment",
    "ｓ0",
    "9 ** 9 ** 9",
    "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
    "Pow(Integer(2), Integer(1000000000))",
    "2 << 1000000000",
    "print(1)",
    "(s0, s1)",
    "",
    "1 +" * 6000 + "1",
    "(" * 3000 + "1" + ")" * 3000,
    None,
    3,
]


@pytest.mark.parametrize("text", ARITHMETIC)
def test_arithmetic(text: str) -> None:
    assert is_arithmetic(text)


@pytest.mark.parametrize("text", ANYTHING_ELSE, ids=range(len(ANYTHING_ELSE)))
def test_anything_else(text: str) -> None:
    assert not is_arithmetic(text)
