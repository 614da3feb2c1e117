import json
import sys

from vlm.training.monitoring.reporter import METRICS_NAME, Reporter, read_records
from vlm.training.progress import Progress


def report(folder, progress, steps, **values):
    with Reporter(folder, samples=80, progress=progress, active=True) as reporter:
        for step in steps:
            progress.step, progress.samples = step, 8 * step
            reporter.advance(8)
            reporter.record(step, {"loss": 1 / step} | values)


def test_records_are_json_lines_with_steps_and_samples(tmp_path):
    report(tmp_path, Progress(0, 0), range(1, 4))
    lines = (tmp_path / METRICS_NAME).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": step, "samples": 8 * step, "loss": 1 / step} for step in (1, 2, 3)
    ]


def test_resuming_drops_the_records_of_steps_that_are_taken_again(tmp_path):
    report(tmp_path, Progress(0, 0), range(1, 6))
    report(tmp_path, Progress(3, 24), range(4, 6))
    assert [record["step"] for record in read_records(tmp_path / METRICS_NAME)] == [1, 2, 3, 4, 5]


def test_a_line_that_was_cut_off_does_not_stop_a_resume(tmp_path):
    report(tmp_path, Progress(0, 0), range(1, 4))
    path = tmp_path / METRICS_NAME
    path.write_text(path.read_text()[:-7])
    report(tmp_path, Progress(2, 16), [3])
    assert [record["step"] for record in read_records(path)] == [1, 2, 3]


def test_what_is_no_number_is_null(tmp_path):
    report(tmp_path, Progress(0, 0), [1], mfu=None, gradient_norm=float("nan"))
    text = (tmp_path / METRICS_NAME).read_text()
    assert '"mfu": null, "gradient_norm": null' in text


def test_other_ranks_write_nothing(tmp_path):
    with Reporter(tmp_path, samples=8, progress=Progress(0, 0), active=False) as reporter:
        reporter.advance(8)
        reporter.record(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


RATES = {"samples_per_s": 4.0, "data_wait_ratio": 0.25}


def test_a_terminal_shows_a_bar_and_the_scores(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    report(tmp_path, Progress(0, 0), range(1, 11), **RATES)
    shown = capsys.readouterr().err
    assert "sample/s" in shown
    assert "80.0/80.0" in shown
    assert "waiting for data" not in shown


def test_a_log_file_has_a_line_a_report(tmp_path, capsys):
    report(tmp_path, Progress(0, 0), [4, 8], **RATES)
    report(tmp_path, Progress(8, 64), [9], **{"val/zh/mean_recall": 0.5, "val/zh/mrr": 0.6})
    shown = capsys.readouterr().err
    assert shown.splitlines() == [
        "step 4: loss 0.250, 4 samples/s, 25% waiting for data, 00:12 left",
        "step 8: loss 0.125, 4 samples/s, 25% waiting for data, 00:04 left",
        "step 9: loss 0.111, val/zh/mean_recall 0.500",
    ]
