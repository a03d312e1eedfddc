"""The model card: what a logged model is, what it was measured at, how to call it, where its limits are.

It stands beside the model as README.md, and in MLflow as the description of the model and its version.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from scipy.stats import binomtest

from pipeline.infra.safe_io import truncate
from pipeline.models.checkpoint import Checkpoint
from pipeline.report.html import as_markdown

if TYPE_CHECKING:
    from mlflow.entities import Run

FILE = "README.md"
MAX_CLASSES = 20  # that are named
LIMIT = 4900  # characters; MLflow takes 5,000 as a version's description
ABOUT = (
    "BlockDrop (Wu et al., CVPR 2018): a policy network looks at an image once and decides which "
    "residual blocks of a ResNet run for it. Each version is described by its model card."
)


def model_card(networks: Checkpoint, run: "Run", dvc_md5: str = "") -> str:
    """Markdown from the networks and from parameters, metrics and tags of the run that trained them.

    Args:
        networks: with a ResNet and its image size.
        dvc_md5: DVC's digest of the checkpoint's folder.
    """
    params, metrics = run.data.params, run.data.metrics
    sections = {
        "": _what(networks, params),
        "Data": _data(networks, params, metrics),
        "Results on the test images": _results(metrics),
        "How to call it": _call(networks),
        "Limits": _limits(networks),
        "Licence and origin": _origin(run, dvc_md5),
    }
    texts = [f"## {title}\n\n{text}" if title else text for title, text in sections.items() if text]
    return truncate("\n\n".join(texts), LIMIT) + "\n"


def _what(networks: Checkpoint, params: Mapping[str, str]) -> str:
    resnet, policy_net = networks.need_resnet(), networks.policy_net
    title = f"# BlockDrop: ResNet-{resnet.depth} on {as_markdown(params.get('data.source', 'images'))}"
    if policy_net is None:
        return f"{title}\n\nA ResNet-{resnet.depth} of which every block runs."
    if policy_net.path_values is None:
        decides = "decides for each residual block whether it runs"
    else:
        decides = "chooses one of a few paths through the residual blocks"
    text = (
        f"{title}\n\nA policy network (ResNet-{policy_net.features.depth}) looks at an image once and "
        f"{decides}; a ResNet-{resnet.depth} with {len(resnet.blocks)} blocks then classifies it."
    )
    if "gamma" in params:
        text += f" Gamma, the price of a wrong prediction, was {params['gamma']}."
    return text


def _data(networks: Checkpoint, params: Mapping[str, str], metrics: Mapping[str, float]) -> str:
    counts = [
        f"{metrics[name]:,.0f} {split}"
        for split in ("training", "validation", "test")
        if (name := f"data.{split.replace('training', 'train')}_images") in metrics
    ]
    size, classes = networks.image_size, networks.classes
    names = ", ".join(map(as_markdown, classes[:MAX_CLASSES]))
    more = ", ..." if len(classes) > MAX_CLASSES else ""
    source = f"{as_markdown(params['data.source'])}: " if "data.source" in params else ""
    images = (
        f"{', '.join(counts)} images of {size} x {size} pixels" if counts else f"{size} x {size} pixels"
    )
    return f"{source}{images}. {len(classes)} classes: {names}{more}."


def _results(metrics: Mapping[str, float]) -> str:
    names = (
        ("BlockDrop", "accuracy", "blocks_mean", "mflops_mean"),
        ("every block", "full_accuracy", "num_blocks", "full_mflops"),
    )
    rows = [
        f"| {label} | {_accuracy(metrics[accuracy], metrics)} | {_number(metrics.get(blocks))} "
        f"| {_number(metrics.get(mflops))} |"
        for label, accuracy, blocks, mflops in names
        if accuracy in metrics
    ]
    if not rows:
        return ""
    table = ["| | accuracy (95 % interval) | blocks | MFLOPs an image |", "|---|---|---|---|", *rows]
    if "flops_share" in metrics:
        table += ["", f"{100 * metrics['flops_share']:.1f} % of the full ResNet's FLOPs, policy network "
                  "counted; a multiply-add is two FLOPs."]  # fmt: skip
    return "\n".join(table)


def _accuracy(share: float, metrics: Mapping[str, float]) -> str:
    """With Wilson's interval, where the number of test images is known."""
    text, count = f"{100 * share:.2f} %", round(metrics.get("data.test_images", 0))
    if not count:
        return text
    interval = binomtest(round(share * count), count).proportion_ci(method="wilson")
    return f"{text} ({100 * interval.low:.2f} to {100 * interval.high:.2f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _call(networks: Checkpoint) -> str:
    size, policy_net = networks.image_size, networks.policy_net
    lines = [
        "```python",
        "import mlflow, numpy",
        'model = mlflow.pyfunc.load_model("models:/NAME/VERSION")',
        f"images = numpy.zeros((1, {size}, {size}, 3), numpy.uint8)  # RGB, 0 to 255",
        "model.predict(images)  # a row for each: class, confidence, kept_blocks, flops and more",
        "```",
        "",
        'Served, it takes `{"inputs": [B, H, W, 3]}` in JSON at `/invocations`.',
    ]
    if policy_net is not None and policy_net.path_values is not None:
        lines += [
            "",
            'Beside `inputs`, `"params": {"budget": 0.4}` (a fraction of the full ResNet\'s FLOPs) or '
            '`{"gamma": 5}` is for that request alone.',
        ]
    return "\n".join(lines)


def _limits(networks: Checkpoint) -> str:
    return (
        f"It takes images of {networks.image_size} x {networks.image_size} pixels, and answers with one "
        "of its classes whatever an image shows. Accuracy and blocks hold for images like the test "
        "images; for others they were not measured. Fewer FLOPs are not the same share of time: that "
        "depends on the machine and on the batch. The interval covers the choice of test images, not "
        "that of the seed."
    )


def _origin(run: "Run", dvc_md5: str) -> str:
    tags = run.data.tags
    commit = tags.get("git.commit", "")
    dirty = " with uncommitted changes" if commit and tags.get("git.dirty") == "true" else ""
    origin = [
        "Code and weights: MIT. The data set has terms of its own.",
        f"Run {as_markdown(str(run.info.run_name))} ({run.info.run_id}).",
        f"Commit {commit}{dirty}." if commit else "",
        f"DVC's digest of the weights' folder: {dvc_md5}." if dvc_md5 else "",
    ]
    return " ".join(filter(None, origin))
