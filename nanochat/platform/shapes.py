"""Checks that a value which was read from JSON or YAML has the shape that a reader relies on."""

from nanochat.platform.errors import UserError

LARGEST = 1e300  # what is larger is no measurement, and cannot be drawn
NAMES = {
    int: "an integer",
    float: "a finite number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def check_shape(value: object, shape: object, place: str) -> None:
    """Raise UserError, which names the place in the file, unless a value of JSON has a shape.

    shape: a type (float also takes integers, and neither NaN nor infinity; object takes anything); [shape]: a list of that;
    {str: shape}: an object with any keys; {"key": shape, …}: an object with these keys, and perhaps others.
    """
    if isinstance(shape, list):
        _check_type(value, list, place)
        for i, item in enumerate(value):
            check_shape(item, shape[0], f"{place}[{i}]")
    elif isinstance(shape, dict):
        _check_type(value, dict, place)
        wanted = dict.fromkeys(value, shape[str]) if str in shape else shape
        for key, item in wanted.items():
            if key not in value:
                raise UserError(f"{place} has no {key!r}")
            check_shape(value[key], item, f"{place}[{key!r}]")
    else:
        _check_type(value, shape, place)


def is_number(value: object) -> bool:
    """Whether a value of JSON is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _check_type(value: object, wanted: type, place: str) -> None:
    if wanted in (int, float):
        fits = is_number(value) and (wanted is float or isinstance(value, int))
    else:
        fits = isinstance(value, wanted)
    if not fits:
        raise UserError(f"{place} is {str(value)[:40]!r}, wanted {NAMES[wanted]}")
