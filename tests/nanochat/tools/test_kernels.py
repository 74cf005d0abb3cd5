"""`nanochat kernels inspect` and `tune`: one line for what a user can change, a traceback for a bug."""

import pytest

from nanochat.options.tools import KernelsInspectOptions, KernelsTuneOptions
from nanochat.platform.errors import UserError
from nanochat.tools.kernels import inspect_kernels, tune_kernels
from nanochat_kernels import configs, inspect, tune

COMMANDS = [
    (inspect_kernels, KernelsInspectOptions, inspect, "inspect_all"),
    (tune_kernels, KernelsTuneOptions, tune, "tune"),
]


def raising(error: Exception):
    def function(*arguments):
        raise error

    return function


@pytest.mark.parametrize(("command", "options", "module", "name"), COMMANDS)
@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (inspect.CannotRun("no GPU"), UserError),
        (configs.LaunchTableError("no table"), UserError),
        (RuntimeError("a bug"), RuntimeError),
        (ValueError("a bug"), ValueError),
    ],
)
def test_only_errors_raised_for_a_user_become_one_line(monkeypatch, command, options, module, name, error, shown):
    monkeypatch.setattr(module, name, raising(error))
    with pytest.raises(shown, match=str(error)) as raised:
        command(options())
    assert raised.type is shown


@pytest.mark.parametrize(("command", "options", "module", "name"), COMMANDS)
def test_a_kernel_that_does_not_exist_is_a_users_error(command, options, module, name):
    with pytest.raises(UserError, match="no kernel is called no_kernel; there are"):
        command(options(kernel=("no_kernel",)))
