"""baseline: the pretrained ResNet alone, every block on every image. Does not depend on gamma."""

import time

from pipeline import checkpoint
from pipeline.cost import measure
from pipeline.data import load_split
from pipeline.inference import predict
from pipeline.params import Params
from pipeline.runtime import choose_device, describe_device
from pipeline.tracking.runs import stage_run
from stages import common

PRETRAIN_TIMES = common.METRICS / "times" / "pretrain.json"


def main(params: Params) -> None:
    """Write metrics/baseline.json, and what it took to train and to test in metrics/times."""
    with stage_run("baseline", params.flat()) as mlflow_run:
        device = choose_device()
        pretrained = checkpoint.load(common.PRETRAINED)
        resnet = pretrained.need_resnet().to(device)
        test = load_split(common.PREPARED, "test", device)
        started = time.monotonic()
        found = predict(resnet, test, normalisation=pretrained.normalisation)
        seconds = time.monotonic() - started
        metrics = {
            "accuracy": found.accuracy,
            "loss": float(found.losses.double().mean()),
            "flops": measure(resnet, None, test.image_size).full,
            "num_blocks": resnet.num_blocks,
            "test_images": len(test),
        }
        times = {
            "train_seconds": common.read_json(PRETRAIN_TIMES)["seconds"],
            "test_seconds": round(seconds, 3),
            "device": describe_device(device),
        }
        common.write_json(common.METRICS / "baseline.json", metrics)
        common.write_json(common.METRICS / "times" / "baseline.json", times)
        mlflow_run.log_metrics({**metrics, "test_seconds": seconds})
    print(f"baseline: accuracy {metrics['accuracy']:.4f} with every block")


if __name__ == "__main__":
    common.run(main)
