"""The report: what the stages have written, and what is missing."""

import json

from tests.conftest import nanochat


def test_a_report_names_what_has_not_run(base):
    (base / "report" / "sections").mkdir(parents=True)
    section = {
        "stage": "tokenizer",
        "finished": "now",
        "seconds": 61,
        "processes": 1,
        "settings": {"a|b": 1},
        "results": {},
    }
    (base / "report" / "sections" / "tokenizer.json").write_text(json.dumps(section))
    (base / "report" / "sections" / "base.json").write_text("{broken")
    result = nanochat(base, "report", "--price-per-hour", "24")
    assert result.returncode == 0, result.stderr
    text = (base / "report" / "report.md").read_text()
    assert "1 min 1 s" in text and "This stage (base) has not run." in text and "0.41 for this run" in text
