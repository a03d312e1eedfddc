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


def test_metrics_of_all_stages_are_flat_and_defined(folder):
    metrics = read(folder).metrics
    assert metrics["accuracy"] == 0.9
    assert metrics["data.train_images"] == 100
    assert metrics["sole.20.accuracy"] == 0.92
    assert metrics["static.first_1.blocks"] == 1
    assert metrics["finetune.seconds"] == 12.5
    assert "difficulty_spearman" not in metrics


def test_parameters_are_texts_under_dotted_keys(folder):
    assert read(folder).params == {
        "gamma": "2", "seed": "0", "data.source": "digits", "resnet.depth": "8", "resnet.std": "[1, 2.5]"
    }  # fmt: skip


def test_curves_have_a_point_for_each_epoch_and_imported_stages_none(folder):
    assert read(folder).curves == {"finetune/validation_accuracy": [(1, 0.5), (2, 0.75)]}


def test_models_have_dvcs_digest(folder):
    assert read(folder).models == {"models/finetune": "2".ljust(32, "b")}


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


def test_fingerprint_follows_results_and_parameters_and_not_names_or_clocks(folder):
    first = read(folder)
    assert read(folder, name="two", baseline="def").fingerprint == first.fingerprint
    lock = yaml.safe_load((folder / "dvc.lock").read_text())
    lock["stages"]["report"]["outs"][0]["md5"] = "other"
    lock["stages"]["finetune"]["outs"][1]["md5"] = "other seconds"
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock))
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
    lock = yaml.safe_load((folder / "dvc.lock").read_text())
    lock["stages"]["report"]["params"]["params.yaml"]["gamma"] = 7
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock))
    with pytest.raises(RecordError, match="in report"):
        read(folder)
    assert read(folder, running="report").metrics["accuracy"] == 0.9


@pytest.mark.parametrize("missing", ["dvc.lock", "params.yaml"])
def test_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(RecordError, match=missing):
        read(folder)


def test_pipeline_that_did_not_end_is_no_experiment(folder):
    lock = yaml.safe_load((folder / "dvc.lock").read_text())
    del lock["stages"]["evaluate"]
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock))
    with pytest.raises(RecordError, match="not come to its end"):
        read(folder)


def test_cut_metrics_do_not_pass_for_none(folder):
    (folder / "metrics/evaluate.json").write_text('{"accuracy": 0.')
    with pytest.raises(RecordError, match=r"evaluate\.json"):
        read(folder)
