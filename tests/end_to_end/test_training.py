"""The training command on real emoji images, in real processes."""

import json
import shutil
import signal
import time

import pytest
import yaml

from tests.support.commands import ROOT, run_vlm, start_vlm
from tests.support.object_store import ObjectStore
from vlm.cli.main import main


def train_arguments(run_folder, *, steps, data=ROOT / "data/emoji", **changes):
    options = {
        "config": "configs/train/emoji.yaml",
        "run_folder": run_folder,
        "data.folder": data,
        "data.batch_size": 32,
        "data.workers": 0,
        "schedule.steps": steps,
        "schedule.warmup_steps": 4,
        "report_every": 1,
        "evaluation.every_steps": 0,
        "checkpoint.every_steps": 0,
    } | changes
    return ["train", *(str(part) for key, value in options.items() for part in (f"--{key}", value))]


def records(run_folder):
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def losses(run_folder, key="loss"):
    return [record[key] for record in records(run_folder) if key in record]


def what_was_learnt(run_folder):
    """Return all that was recorded but the time and the memory that it took."""
    of_machine = {"samples_per_s", "data_wait_ratio", "memory_gib", "tflop_per_s", "mfu"}
    return [
        {name: value for name, value in record.items() if name not in of_machine}
        for record in records(run_folder)
    ]


def weights(run_folder):
    return (run_folder / "bundle" / "open_clip_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_report_the_losses_of_one_with_the_same_global_batch(tmp_path, small_emoji):
    # At the recipe's rate AdamW turns gradients that are rounding errors into steps of 3e-3.
    changes = {
        "optimizer.learning_rate": 3e-4, "evaluation.every_steps": 6, "data": small_emoji,
    }  # fmt: skip
    run_vlm(*train_arguments(tmp_path / "one", steps=6, **changes))
    changes["loss.plan.group_size"] = 2  # one process would refuse that
    launcher = (
        "accelerate.commands.launch", "--config_file", "configs/accelerate/2-cpus.yaml",
    )  # fmt: skip
    run_vlm(*train_arguments(tmp_path / "two", steps=6, **changes), launcher=launcher)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 6
    assert two == pytest.approx(one, rel=1e-4)
    for key in ("gradient_norm", "gradient_norm/text", "loss/image-zh"):
        of_one, of_two = (losses(tmp_path / name, key) for name in ("one", "two"))
        assert of_two == pytest.approx(of_one, rel=1e-2), key
    assert sum(one[-3:]) < sum(one[:3])
    for key in (
        "accuracy", "accuracy/image-zh", "duplicate_ratio", "truncated_ratio/en",
        "val/zh/mean_recall", "val/en/text_to_image/mrr",
    ):  # fmt: skip
        of_one, of_two = (losses(tmp_path / name, key) for name in ("one", "two"))
        assert of_one
        assert of_two == pytest.approx(of_one, abs=0.02), key


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_very_same_weights_and_losses(tmp_path, small_emoji):
    # Killed once the second checkpoint is there, that is, most likely in the evaluation after it.
    changes = {"checkpoint.every_steps": 3, "evaluation.every_steps": 3, "data": small_emoji}
    run_vlm(*train_arguments(tmp_path / "whole", steps=9, **changes))

    arguments = train_arguments(tmp_path / "killed", steps=9, **changes)
    process = start_vlm(*arguments)
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed/checkpoints/step-00000006").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed/bundle").exists()

    _, refusal = run_vlm(*arguments, code=2)
    assert "holds a run already" in refusal
    run_vlm(*arguments, "--resume")
    assert what_was_learnt(tmp_path / "killed") == what_was_learnt(tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_the_configuration_that_a_run_leaves_describes_the_same_run(tmp_path, small_emoji):
    run_vlm(*train_arguments(tmp_path / "first", steps=6, data=small_emoji))
    left = tmp_path / "first" / "config.yaml"
    assert yaml.safe_load(left.read_text())["data"]["batch_size"] == 32
    run_vlm("train", "--config", left, "--run_folder", tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tmp_path / "first")


@pytest.mark.slow
def test_bfloat16_trains_to_nearly_the_same_losses(tmp_path, small_emoji):
    run_vlm(*train_arguments(tmp_path / "fp32", steps=6, data=small_emoji))
    run_vlm(*train_arguments(tmp_path / "bf16", steps=6, data=small_emoji, precision="bf16"))
    full, half = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert half == pytest.approx(full, rel=0.02)
    assert half != full


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "changes",
    [
        {
            "loss.plan.kind": "sigmoid",
            "model.init_logit_bias": -10,
            "model.init_logit_scale": 10,
            "loss.plan.group_size": 1,
            "loss.micro_batches": 3,
        },
        {
            "loss.captions": "together",
            "loss.text_text_weight": 0.5,
            "loss.micro_batches": 2,
            "loss.accumulation": "one_pass",
            "loss.plan.duplicates": "ignore",
            "precision": "bf16",
            "optimizer.learning_rate": 1e-3,
            "schedule.steps": 20,
        },
    ],
    ids=["sigmoid", "together"],
)
def test_every_kind_of_loss_trains_on_two_processes(tmp_path, small_emoji, changes):
    # The recipe's tower exchanges the statistics of every batch norm, which costs most of the time
    # (and is tested above); this one has none.
    changes = changes | {
        "model.vision_cfg.timm_model_name": "test_vit", "model.vision_cfg.timm_pool": "avg",
        "model.vision_cfg.timm_output_stride": "null",
    }  # fmt: skip
    arguments = train_arguments(tmp_path / "run", steps=12, data=small_emoji, **changes)
    run_vlm(*arguments, processes=2)
    found = losses(tmp_path / "run")
    assert len(found) >= 12
    assert sum(found[-5:]) < 0.99 * sum(found[:5])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data.batch_size": 100_000},
            "takes 100000 samples of the source 'data', which has 8410; expected a smaller batch",
        ),
        ({"data.batch_size": 1}, "compared with one caption alone, where a softmax is always 0"),
        ({"data.split": "trian"}, "has no split 'trian'; its splits are"),
        ({"data.folder": "nowhere"}, "nowhere is missing"),
        ({"tokenizer": "configs"}, "configs holds no tokenizer"),
        ({"model.vision_cfg.timm_model_name": "resnet10"}, "timm has no model 'resnet10'; did"),
        ({"loss.plan.group_size": 2}, "group_size is 2; expected a divisor of the world size, 1"),
        ({"loss.plan.mesh": "[2, 1]"}, "the mesh is 2 x 1; expected rows times columns to be "),
        (
            {"loss.plan.kind": "sigmoid"},
            "expected model.init_logit_bias for a sigmoid loss, for example -10",
        ),
        ({"model.init_logit_bias": -10}, "kind is softmax and the model has a bias; expected"),
        ({"loss.micro_batches": 0}, "micro_batches is 0; expected at least 1"),
        (
            {"loss.text_text_weight": 0.5, "captions.languages": "[zh]"},
            "text_text_weight is 0.5 for the languages zh; expected two languages",
        ),
        ({"optimizer.learning_rat": 1}, "did you mean 'optimizer.learning_rate'?"),
        ({"schedule.steps": "many"}, "many"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_is_one_clear_line_before_anything_is_written(
    tmp_path, monkeypatch, capsys, changes, message
):
    monkeypatch.chdir(ROOT)
    assert main(train_arguments(tmp_path / "run", steps=6, **changes)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_damaged_shard_stops_the_run_with_its_name(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "data/emoji", tmp_path / "emoji")
    shard = tmp_path / "emoji" / "train-00002.tar.gz"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    arguments = train_arguments(tmp_path / "run", steps=5, data=tmp_path / "emoji")
    monkeypatch.chdir(ROOT)
    assert main([*arguments, "--data.allowed_share", "0"]) == 2
    assert f"shard {shard} is damaged" in capsys.readouterr().err
    assert main([*arguments, "--run_folder", str(tmp_path / "lenient")]) == 0
    assert f"shard {shard} is damaged" in capsys.readouterr().err
    shard.unlink()
    assert main(arguments) == 2
    assert f"shard {shard} is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_from_a_bucket_has_the_losses_scores_and_weights_of_one_from_the_disk(
    tmp_path, small_emoji
):
    changes = {"steps": 6, "evaluation.every_steps": 3, "data.workers": 1}
    run_vlm(*train_arguments(tmp_path / "disk", data=small_emoji, **changes))
    with ObjectStore() as store:
        store.put_folder(small_emoji, "emoji")
        arguments = train_arguments(tmp_path / "bucket", data="s3://pairs/emoji", **changes)
        process = start_vlm(*arguments)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    for key in ("loss", "val/zh/mean_recall", "val/en/text_to_image/mrr"):
        assert losses(tmp_path / "bucket", key) == losses(tmp_path / "disk", key) != []
    assert weights(tmp_path / "bucket") == weights(tmp_path / "disk")
