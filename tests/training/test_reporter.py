import json

from vlm.training.reporter import METRICS_NAME, Reporter, read_records
from vlm.training.state import Progress


def report(folder, progress, steps):
    with Reporter(folder, samples=80, progress=progress, active=True) as reporter:
        for step in steps:
            reporter.advance(8)
            reporter.record(step, {"loss": 1 / step})


def test_records_are_json_lines_and_tensorboard_events(tmp_path):
    report(tmp_path, Progress(0, 0), range(1, 4))
    lines = (tmp_path / METRICS_NAME).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": s, "loss": 1 / s} for s in (1, 2, 3)]
    assert list((tmp_path / "tensorboard").glob("events.*"))


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


def test_other_ranks_write_nothing(tmp_path):
    with Reporter(tmp_path, samples=8, progress=Progress(0, 0), active=False) as reporter:
        reporter.advance(8)
        reporter.record(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_the_bar_shows_samples_a_second_and_the_time_left(tmp_path, capsys):
    report(tmp_path, Progress(0, 0), range(1, 11))
    shown = capsys.readouterr().err
    assert "sample/s" in shown
    assert "80.0/80.0" in shown
