"""Output into a pipe is for other programs and for files: nothing of it is cut."""

from rich.table import Table

from nanochat.platform.console import console, show_table


def test_a_table_in_a_pipe_is_not_cut_to_the_width_of_a_terminal():
    table = Table("name", "reason", box=None)
    table.add_row("a" * 60, "b" * 100)
    with console.capture() as captured:
        show_table(table)
    assert "a" * 60 in captured.get() and "b" * 100 in captured.get()
