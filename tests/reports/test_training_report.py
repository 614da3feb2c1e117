"""`vlm plot`: what runs recorded, drawn and compared."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from vlm.cli.main import main
from vlm.errors import ConfigError, DataError
from vlm.reports import training_plots
from vlm.reports.document import Figure, Table, as_html
from vlm.reports.training_report import training_document

RUNS = 10


def write_run(folder, *, steps=100, batch=8, rate=0.1, tail="", without=()):
    folder.mkdir(parents=True)
    records = [
        {
            "step": step, "samples": step * batch, "loss": 5 - step * rate, "mfu": None,
            "gradient_norm": 1 / step, "gradient_norm/image": 0.5 / step, "samples_per_s": 100.0,
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip
    records += [{"step": steps, "samples": steps * batch, "val/zh/mean_recall": rate}]
    lines = [
        json.dumps({name: value for name, value in record.items() if name not in without})
        for record in records
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + tail)
    settings = f"run_folder: {folder}\nseed: 0\noptimizer:\n  learning_rate: {rate}\n"
    (folder / "config.yaml").write_text(settings)
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """Collect the figures as they are turned into images."""
    figures, as_png = [], training_plots.figure_png

    def collect(figure):
        figures.append(figure)
        return as_png(figure)

    monkeypatch.setattr(training_plots, "figure_png", collect)
    return figures


def panels(figures):
    return {axes.get_title(): axes for figure in figures for axes in figure.axes if axes.axison}


def test_what_a_run_recorded_is_drawn_and_what_it_could_not_measure_is_left_out(tmp_path, drawn):
    document = training_document([write_run(tmp_path / "run", steps=30)])
    assert list(panels(drawn)) == [
        "loss", "val/zh/mean_recall", "gradient_norm", "gradient_norm/image", "samples_per_s",
    ]  # fmt: skip
    along, values = panels(drawn)["loss"].lines[0].get_data()
    assert list(along) == list(range(1, 31))
    assert values == pytest.approx([5 - 0.1 * step for step in range(1, 31)])
    assert not drawn[0].legends
    table = document.summary[0]
    assert isinstance(table, Table)
    assert table.rows == [["run", "30", "2.000", "0.100", "100", ""]]


def test_runs_are_compared_by_samples_with_their_settings(tmp_path, drawn):
    small = write_run(tmp_path / "a" / "run", batch=8, rate=0.01)
    large = write_run(tmp_path / "b" / "run", batch=32, rate=0.02, steps=20)
    document = training_document([small, large], by="samples")
    ends = {line.get_xdata()[-1] for line in panels(drawn)["loss"].lines}
    assert ends == {800, 640}
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a/run", "b/run"]
    differing = document.sections[-1].blocks[0]
    assert differing.rows == [["`optimizer.learning_rate`", "0.01", "0.02"]]
    page = as_html(document)
    assert "<script" not in page
    assert page.count("data:image/png;base64,") == 4


@pytest.mark.slow
def test_ten_runs_have_ten_looks_and_keep_them_in_all_panels(tmp_path, drawn):
    folders = [write_run(tmp_path / f"run-{k}", steps=30, rate=k / 100) for k in range(RUNS)]
    document = training_document(folders)
    looks = {
        name: [(line.get_color(), line.get_linestyle()) for line in axes.lines]
        for name, axes in panels(drawn).items()
    }
    assert len(set(looks["loss"])) == RUNS
    assert all(look == looks["loss"] for look in looks.values())
    for section in document.sections[:-1]:
        figure = section.blocks[0]
        assert isinstance(figure, Figure)
        with Image.open(io.BytesIO(figure.content)) as image:
            assert image.width < 1600


def test_many_records_are_drawn_with_their_running_mean(tmp_path, drawn):
    training_document([write_run(tmp_path / "run", steps=400)])
    records, mean = panels(drawn)["gradient_norm"].lines
    values = records.get_ydata()
    assert mean.get_ydata()[200] == pytest.approx(np.mean(values[190:211]))
    assert mean.get_ydata()[[0, -1]] == pytest.approx(values[[0, -1]])


def test_a_number_that_is_not_finite_leaves_a_gap(tmp_path, drawn):
    folder = write_run(tmp_path / "run", steps=3, tail='{"step": 4, "loss": NaN}\n')
    training_document([folder])
    assert list(panels(drawn)["loss"].lines[0].get_xdata()) == [1, 2, 3]


def test_a_run_that_is_writing_is_drawn_as_far_as_it_has_come(tmp_path):
    folder = write_run(tmp_path / "run", steps=5, tail='{"step": 6, "lo')
    assert training_document([folder]).summary[0].rows[0][1] == "5"


def test_what_is_no_run_is_refused(tmp_path):
    run = write_run(tmp_path / "run")
    with pytest.raises(DataError, match=r"missing is no folder; expected the run_folder"):
        training_document([run, tmp_path / "missing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"metrics.jsonl holds no record; expected those"):
        training_document([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="is given twice"):
        training_document([run, tmp_path / "run"])
    old = write_run(tmp_path / "old", without=("samples",))
    with pytest.raises(DataError, match="have no number of samples"):
        training_document([run, old], by="samples")


def test_the_command_writes_a_page_into_the_run(tmp_path, capsys):
    run = write_run(tmp_path / "run", steps=3)
    assert main(["plot", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "plot" / "report.html")
    names = {path.name for path in (run / "plot").iterdir()}
    assert names == {
        "report.html", "report.md", "loss.png", "recall.png", "optimization.png", "speed.png",
    }  # fmt: skip
    assert main(["plot"]) == 2
    assert "expected `vlm plot RUN" in capsys.readouterr().err
