"""What an experiment gave, read from its files alone."""

import experiment_files
import pytest
import yaml

from pipeline.tracking import dvc_results
from pipeline.tracking.dvc_results import RecordError, work_tree


@pytest.fixture
def folder(tmp_path):
    return experiment_files.write(tmp_path)


def read(folder, **changes):
    return dvc_results.read(work_tree(str(folder)), **({"name": "one", "baseline": "abc"} | changes))


def test_record_holds_metrics_parameters_curves_and_models(folder):
    record = read(folder)
    assert record.metrics["accuracy"] == 0.9
    assert record.metrics["data.train_images"] == 100
    assert record.metrics["sole.20.accuracy"] == 0.92
    assert record.metrics["static.first_1.blocks"] == 1
    assert record.metrics["finetune.seconds"] == 12.5
    assert "difficulty_spearman" not in record.metrics  # which is not defined
    assert record.params == {
        "gamma": "2", "seed": "0", "data.source": "digits", "resnet.depth": "8", "resnet.std": "[1, 2.5]"
    }  # fmt: skip
    # an imported stage has no curve
    assert record.curves == {"finetune/validation_accuracy": [(1, 0.5), (2, 0.75)]}
    assert record.outs["models/finetune"] == "2".ljust(32, "b")  # DVC's digest


def test_every_training_stage_has_its_curve_and_seconds(folder):
    for stage in ("pretrain", "prune", "policy_pretrain", "curriculum"):
        (folder / f"plots/{stage}.csv").write_text("epoch,train_accuracy\n1,0.5\n")
        (folder / f"metrics/times/{stage}.json").write_text('{"seconds": 3.0}')
        record = read(folder)
        assert record.curves[f"{stage}/train_accuracy"] == [(1, 0.5)]
        assert record.metrics[f"{stage}.seconds"] == 3.0


def test_artifacts_are_what_one_looks_at(folder):
    artifacts = read(folder).artifacts()
    assert set(artifacts) == {
        "params.yaml", "dvc.lock", "report/report.md", "report/policy.png", "plots/evaluate/policy.png",
        "plots/finetune.csv", "plots/pretrain.csv",
    }  # fmt: skip
    assert artifacts["report/policy.png"] == experiment_files.PNG


def test_record_is_whole_when_report_and_model_can_be_read(folder):
    assert read(folder).is_whole()
    (folder / "models/finetune/model.safetensors").unlink()
    assert not read(folder).is_whole()


def edit_lock(folder, stage: str, section: str, change) -> None:
    lock = yaml.safe_load((folder / "dvc.lock").read_text())
    change(lock["stages"][stage][section])
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock))


def test_fingerprint_follows_results_and_not_names_or_clocks(folder):
    first = read(folder)
    assert read(folder, name="two", baseline="def").fingerprint == first.fingerprint
    edit_lock(folder, "report", "outs", lambda outs: outs[0].update(md5="other"))
    edit_lock(folder, "finetune", "outs", lambda outs: outs[1].update(md5="other seconds"))
    assert read(folder).fingerprint == first.fingerprint
    experiment_files.write(folder, accuracy=0.8)
    assert read(folder).fingerprint != first.fingerprint
    experiment_files.write(folder, gamma=5)
    assert read(folder).fingerprint != first.fingerprint


def test_key_follows_name_baseline_and_parameters(folder):
    first = read(folder).key
    assert read(folder).key == first
    assert len({first, read(folder, name="two").key, read(folder, baseline="def").key}) == 3


def test_changed_parameters_are_no_result(folder):
    params = yaml.safe_load((folder / "params.yaml").read_text())
    (folder / "params.yaml").write_text(yaml.safe_dump(params | {"gamma": 7}))
    with pytest.raises(RecordError, match="gamma was 2 in finetune"):
        read(folder)


def test_stage_that_runs_now_is_not_held_to_what_it_was(folder):
    edit_lock(folder, "report", "params", lambda params: params["params.yaml"].update(gamma=7))
    with pytest.raises(RecordError, match="in report"):
        read(folder)
    assert read(folder, running="report").metrics["accuracy"] == 0.9


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dvc.lock", None, "dvc.lock"),
        ("params.yaml", None, "params.yaml"),
        ("dvc.lock", "schema: '2.0'\nstages: {finetune: {}}\n", "not come to its end"),
        ("metrics/evaluate.json", '{"accuracy": 0.', r"evaluate\.json"),
    ],
)
def test_file_that_is_missing_or_cut_is_named(folder, name, content, message):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(RecordError, match=message):
        read(folder)
