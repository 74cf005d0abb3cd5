"""The report: what the stages have written, and what is missing."""

import contextlib
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from nanochat.cluster.status import status
from nanochat.evaluate.chat import say_accuracies, shown_name
from nanochat.options.cluster import StatusOptions
from nanochat.options.report import ReportOptions
from nanochat.platform.errors import UserError
from nanochat.platform.files import write_json
from nanochat.platform.paths import Paths
from nanochat.report.build import build_report
from nanochat.report.plots import centred_mean, plot_metrics
from nanochat.report.sections import write_section
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


class Seen(HTMLParser):
    """What a browser makes of a page: its elements with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = (
    "<script>alert(1)</script>", "]]><img src=x onerror=alert(1)>", "\"'><b>", "&lt;i&gt;", "a|b", "# head", "1. one", "- item", "= x",
    "*em* _em_ __b__ ~~s~~ `code` **b**", "[here](javascript:alert(1))",
    "![x](http://a.b/c.png)", "<http://a.b>", "\\", "\\|", "a\\",
    "$x$", "</details></table>", "<!-- ", "x_y_z", "\ud800", "\x00\x1b[31m", "\u202etxt",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_from_outside_is_markup(tmp_path, text):
    """As the name and the value of a setting and a result, in a list, as time, and as what was said in a conversation."""

    def written(text: str) -> tuple[Seen, str]:
        paths = Paths(tmp_path)
        values = {text: text, "list": [text, text], "nested": {text: {text: text}}}
        samples = [{"you": f"{text}\n{text}", text: text}]
        section = {"stage": "sft-eval", "finished": text, "seconds": 1.0, "processes": 2}
        write_json(paths.section("sft-eval"), section | {"settings": values, "results": values | {"samples": samples}})
        build_report(ReportOptions(), paths)
        markdown = (paths.report / "report.md").read_text("utf-8")
        # report.md as a site renders it that lets HTML in markdown through
        return Seen((paths.report / "report.html").read_text("utf-8")), MarkdownIt("commonmark").enable(
            ["table", "strikethrough"]
        ).render(markdown)

    page, rendered = written(text)
    plain, plain_rendered = written("plain")
    assert page.elements == plain.elements and Seen(rendered).elements == Seen(plain_rendered).elements
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text).strip()
    assert page.text.count(shown) >= 10 and Seen(rendered).text.count(shown) >= 10


def a_run(paths: Paths) -> Paths:
    """Sections and metrics of a run whose loss falls from 5 to 1 within 200 steps."""
    for stage, name in (("base", "CORE"), ("base-eval", "CORE"), ("sft-eval", "GSM8K")):
        settings = {
            "depth": 3,
            "n_kv_head": None,
            "num_iterations": -1,
            "target_flops": -1.0,
            "only": [],
            "wandb_run": "",
        }
        write_section(paths, stage, settings, {name: 0.99, "tokens": 4096, "parameters": 12}, 3.0, 1)
    steps = [{"step": step, "loss": 1 + 4 * 0.97**step, "tokens_per_second": 1e3} for step in range(200)]
    records = [{"step": 0, "val_bpb": 3.14}, *steps, {"step": 200, "val_bpb": 0.35}, {"step": 201, "val_bpb": 1e999}]
    paths.metrics("base").parent.mkdir(parents=True)
    paths.metrics("base").write_text("".join(json.dumps(record) + "\n" for record in records))
    return paths


@pytest.mark.parametrize("embedded", [True, False])
def test_the_tests_of_the_embedded_data_are_not_named_as_the_benchmarks(tmp_path, embedded, capsys):
    paths = Paths(tmp_path)
    if embedded:
        paths.embedded.mkdir(parents=True)
    a_run(paths)
    if embedded:
        paths.embedded.rmdir()  # the report knows what was measured
    build_report(ReportOptions(), paths)
    say_accuracies({"GSM8K": 0.99, "world_choice": 0.5}, Paths(tmp_path, "other"))
    assert capsys.readouterr().out.endswith("GSM8K                    0.9900\nworld_choice             0.5000\n")
    text = (paths.report / "report.md").read_text()
    for name in ("CORE", "GSM8K"):
        ending = " stand-in" if embedded else ""
        assert re.findall(rf"\| {name}.* \| .*0\.99", text)
        assert all(line.startswith(f"| {name}{ending} | ") for line in text.splitlines() if f"| {name}" in line)
    assert ("is not that of the benchmark" in text) == embedded
    assert shown_name("GSM8K: did not fit", embedded) == f"GSM8K{' stand-in' if embedded else ''}: did not fit"
    assert shown_name("GSM8K, any of 8", embedded) == f"GSM8K{' stand-in' if embedded else ''}, any of 8"


def test_what_is_not_set_is_not_in_the_report_and_settings_are_folded(tmp_path):
    paths = a_run(Paths(tmp_path))
    build_report(ReportOptions(), paths)
    text, page = (paths.report / "report.md").read_text(), (paths.report / "report.html").read_text()
    assert "| depth | 3 |" in text and not re.search(r"None|\| \\?-1|n_kv_head|only|wandb", text)
    assert page.count("<details>") == 3 and not re.search(
        r"depth</td>", re.sub(r"<details>.*?</details>", "", page, flags=re.DOTALL)
    )
    # one page that needs nothing else, and is also made for the dark
    assert "prefers-color-scheme: dark" in page and not re.search(r"(src|href)=\"(?!data:image/svg)", page)


def test_the_curve_of_the_loss_does_not_lag_and_validation_has_an_axis_of_its_own(tmp_path):
    falling = [1 + 4 * 0.97**step for step in range(200)]
    mean = centred_mean(falling)
    assert mean[-1] == pytest.approx(falling[-1]) and mean[0] == pytest.approx(falling[0])
    assert max(abs(mean - falling)) < 0.05  # the mean of the last twenty lagged by 0.8
    noisy = centred_mean([(-1) ** step for step in range(200)])
    assert max(abs(noisy[5:-5])) < 0.2
    plots = plot_metrics(a_run(Paths(tmp_path)), tmp_path)
    assert [path.name for files in plots.values() for path in files] == ["loss-base.svg", "throughput-base.svg"]
    drawing = plots["Loss"][0].read_text()
    assert ">3.14<" in drawing and ">0.35<" in drawing and "prefers-color-scheme: dark" in drawing
    width = float(re.search(r'<svg [^>]*width="([\d.]+)pt"', drawing)[1]) * 96 / 72
    assert width <= 388  # of a page of 420 pixels, without its margins
