"""The report: what the stages have written, and what is missing."""

import contextlib
import json
import shutil

import pytest

from nanochat.cluster.status import status
from nanochat.options.cluster import StatusOptions
from nanochat.options.report import ReportOptions
from nanochat.platform.errors import UserError
from nanochat.platform.files import write_json
from nanochat.platform.paths import Paths
from nanochat.report.build import build_report
from tests.conftest import nanochat


def test_a_report_names_what_has_not_run(base):
    (Paths(base).run / "report" / "sections").mkdir(parents=True)
    section = {
        "stage": "tokenizer",
        "finished": "now",
        "seconds": 61,
        "processes": 1,
        "settings": {"a|b": 1},
        "results": {},
    }
    (Paths(base).run / "report" / "sections" / "tokenizer.json").write_text(json.dumps(section))
    (Paths(base).run / "report" / "sections" / "base.json").write_text("{broken")
    result = nanochat(base, "report", "--price-per-hour", "24")
    assert result.returncode == 0, result.stderr
    text = (Paths(base).run / "report" / "report.md").read_text()
    assert "1 min 1 s" in text and "This stage (base) has not run." in text and "0.41 for this run" in text


@pytest.mark.parametrize(
    "value", [None, 7, "x", [], {}, [1], {"seconds": "7"}, {"results": []}, {"step": "1"}, {"step": 1, "loss": "x"}, {"step": 1}],
    ids=str,
)  # fmt: skip
def test_json_of_another_shape_is_left_out(trained_base, tmp_path, capsys, value):
    """In each file that report and status only show: a value, a value in place of each of its values, and a line that is cut off."""
    for what in ("whole", "each value"):
        base = shutil.copytree(trained_base, tmp_path / what)
        paths = Paths(base)
        paths.records.mkdir(exist_ok=True)
        write_json(paths.records / "base.json", {"seconds": 1.0, "command": []})
        paths.jobs.write_text('{"id": "7", "job": "speedrun"}\n')
        shown = [
            *(paths.report / "sections").glob("*.json"),
            *paths.records.glob("*.json"),
            *paths.run.glob("metrics/*"),
            paths.jobs,
        ]
        for path in shown:
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            odd = [json.dumps(value if what == "whole" else dict.fromkeys(json.loads(line), value)) for line in lines]
            path.write_text("\n".join([*odd, *lines[: len(lines) // 2], "{"]) if path.suffix == ".jsonl" else odd[0])
        with contextlib.suppress(UserError):  # where no section is left, there is nothing to report
            build_report(ReportOptions(), paths)
        status(StatusOptions(), paths)
        assert "base-eval" in capsys.readouterr().out
