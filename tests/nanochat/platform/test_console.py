"""Output into a pipe is not cut, because other programs and files take it; durations are shown in two forms."""

from rich.table import Table

from nanochat.platform.console import console, format_duration, show_table


def test_a_table_in_a_pipe_is_not_cut_to_the_width_of_a_terminal():
    table = Table("name", "reason", box=None)
    table.add_row("a" * 60, "b" * 100)
    with console.capture() as captured:
        show_table(table)
    assert "a" * 60 in captured.get() and "b" * 100 in captured.get()


def test_durations_are_shown_as_words_or_as_a_clock():
    assert [format_duration(seconds) for seconds in (6.6, 61, 7500)] == ["7 s", "1 min 1 s", "2 h 5 min"]
    assert [format_duration(seconds, clock=True) for seconds in (6.6, 61, 7500)] == ["0:06", "1:01", "2:05:00"]
