"""The calculator that the model calls: arithmetic, and counting a part of a string. Nothing is evaluated as Python."""

import ast
import math
import operator
import re
from decimal import Decimal

# Without powers, numbers grow no longer than the expression, so that the worst one of this length takes milliseconds.
MAX_LENGTH = 256
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_ARITHMETIC = re.compile(r"[0-9+\-*/.() ]+")


def calculate(expression: str) -> str | None:
    """The result of an expression of numbers and + - * / // ( ), or of 'text'.count('part'); None for anything else.

    Whole results are written without a decimal point, others with at most ten digits, and none with an exponent. Commas between
    thousands are ignored. What is not a finite number has no result.
    """
    if len(expression) > MAX_LENGTH:
        return None
    text = _THOUSANDS.sub("", expression).strip()
    try:
        if _ARITHMETIC.fullmatch(text):
            value = _value(ast.parse(text, mode="eval").body)
        else:
            value = _occurrences(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    if isinstance(value, int) or value.is_integer():
        return str(int(value))
    return f"{Decimal(f'{value:.10g}'):f}" if math.isfinite(value) else None


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left), _value(right))
    raise ValueError("not a sum")


def _occurrences(node: ast.expr) -> int:
    match node:
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            return text.count(part)
    raise ValueError("not a count")
