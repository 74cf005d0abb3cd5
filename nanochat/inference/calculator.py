"""The calculator that the model calls: arithmetic, and counting a part of a string. Nothing is evaluated as Python."""

import ast
import operator

# Without powers, numbers grow no longer than the expression, so that the worst one of this length takes milliseconds.
MAX_LENGTH = 256
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def calculate(expression: str) -> str | None:
    """The result of an expression of numbers and + - * / ( ), or of 'text'.count('part'); None for anything else.

    Whole results are written without a decimal point, others with at most ten digits. Commas in numbers are ignored.
    """
    expression = expression.replace(",", "") if not set("'\"") & set(expression) else expression
    if len(expression) > MAX_LENGTH:
        return None
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.10g}"
    return str(value)


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left), _value(right))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            return text.count(part)
    raise ValueError("not a sum")
