"""Every executor gives what `masked` gives, whatever the policies, the batch and the memory layout."""

import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import timeit
from pathlib import Path
from typing import get_args

import pytest
import torch
from builders import NORMALISATION
from executors import POLICIES, SIZE, make_images, make_networks
from torch import nn

from pipeline.benchmark import full_resnet_forms
from pipeline.config import ExecutorName
from pipeline.inference import auto as auto_module
from pipeline.inference import fused, native
from pipeline.inference.auto import EXECUTORS, Auto, GatherOrGrouped, make_executor
from pipeline.inference.base import Networks, UnavailableError
from pipeline.inference.gather import Gather, in_parts
from pipeline.inference.grouped import Grouped
from pipeline.inference.masked import Masked
from pipeline.inference.native import Native
from pipeline.inference.threads import map_torch, native_threads
from pipeline.infra.errors import UserError

NAMES = ["gather", "grouped", "native"]  # `auto` is one of them on a CPU


def executor(name: str, networks: Networks, precision: str = "fp32"):
    try:
        return make_executor(networks, name=name, precision=precision)
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def threads(request):
    """Several threads, also more than cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_close(output, expected):
    assert output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)
    assert torch.equal(output.actions, expected.actions)


# batches of one part and of several, and of fewer images than threads
@pytest.mark.parametrize(
    ("name", "batch", "policy", "threads"),
    [
        ("gather", 25, "random", 3), ("gather", 25, "one image keeps", 1),
        ("gather", 1, "first of stages dropped", 2), ("gather", 25, "all kept", 2),
        ("grouped", 25, "random", 3), ("grouped", 25, "two policies", 2), ("grouped", 1, "random", 1),
        ("native", 1, "random", 3), ("native", 2, "random", 3), ("native", 25, "random", 2),
        ("native", 1, "all kept", 1), ("native", 25, "all dropped", 3),
        ("native", 25, "first of stages dropped", 2), ("native", 1, "only first of stages", 2),
    ],
    indirect=["threads"],
)  # fmt: skip
def test_executor_agrees_with_masked_under_actions(name, batch, policy, threads):
    networks, images = make_networks(), make_images(batch)
    actions = POLICIES[policy](batch, networks.num_blocks)
    output = executor(name, networks)(images, actions)
    assert_close(output, Masked(networks)(images, actions))
    assert torch.equal(output.actions, actions)


@pytest.mark.parametrize(
    ("name", "batch", "input_size", "threads"),
    [
        ("gather", 33, None, 3), ("grouped", 1, 8, 2), ("auto", 33, 8, 2),
        ("native", 1, None, 3), ("native", 33, 8, 3), ("native", 33, None, 2),
    ],
    indirect=["threads"],
)  # fmt: skip
def test_executor_agrees_with_masked_on_the_policy(name, batch, input_size, threads):
    networks, images = make_networks(input_size=input_size), make_images(batch)
    output = executor(name, networks)(images)
    assert_close(output, Masked(networks)(images))
    assert 0 < output.actions.double().mean() < 1


@pytest.mark.parametrize(
    ("depth", "width", "size"),
    [(8, 4, 8), (8, 12, 20), (14, 16, 12), (8, 32, 32), (26, 16, 28)],
)
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_native_agrees_with_masked_at_other_shapes(depth, width, size, threads):
    networks, images = make_networks(depth=depth, width=width), make_images(5, size)
    assert_close(executor("native", networks)(images), Masked(networks)(images))


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        *((name, ((8,), (4,), (12,), (8,), (24,), (20,))) for name in NAMES),
        # native takes multiples of 4; auto finds that out
        *((name, ((3,), (1,), (5,), (7,), (9,), (31,))) for name in ("gather", "grouped", "auto")),
        ("native", ((8,), (8,), (16,), (16,), (28,), (32,))),
    ],
)
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_executor_agrees_with_masked_on_pruned_blocks(name, channels, threads):
    networks, images = make_networks(inner_channels=channels), make_images(9)
    assert networks.resnet.inner_channels == channels
    execute, reference = executor(name, networks), Masked(networks)
    assert_close(execute(images), reference(images))
    for batch, policy in itertools.product((1, 9), ("random", "all kept", "first of stages dropped")):
        actions = POLICIES[policy](batch, networks.num_blocks)
        assert_close(execute(images[:batch], actions), reference(images[:batch], actions))


@pytest.mark.parametrize(
    ("size", "batch", "policies", "grouped"),
    [(16, 4, 4, False), (16, 32, 2, True), (124, 2, 2, False), (128, 2, 2, True)],
)
def test_images_are_grouped_where_they_are_large_or_policies_are_few(
    size, batch, policies, grouped, monkeypatch
):
    taken = []
    for kind in (Gather, Grouped):
        monkeypatch.setattr(kind, "_classify", lambda self, x, a, kind=kind: taken.append(kind) or x)
    networks = make_networks()
    actions = torch.eye(policies, networks.num_blocks).bool().repeat(batch // policies, 1)
    GatherOrGrouped(networks).classify(torch.zeros(batch, 3, size, size), actions)
    assert taken == [Grouped if grouped else Gather]


@pytest.mark.serial
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_fused_convolution_is_given_a_weight_in_the_layout_of_its_images(batch, threads):
    """In another layout, that of another number of images say, it takes up to 50 times as long."""
    conv, bn = nn.Conv2d(2048, 512, 1, bias=False), nn.BatchNorm2d(512).eval()
    x = torch.rand(batch, 2048, 7, 7).contiguous(memory_format=torch.channels_last)
    kinds = [fused.FusedConv] + ([fused.OneDnnConv] if fused._has_fused_onednn(torch.float32) else [])
    seconds = []
    with torch.no_grad():
        for fused_conv in (kind(conv, bn, torch.float32) for kind in kinds):
            fused_conv(x[:1].contiguous(memory_format=torch.channels_last))
            torch.testing.assert_close(fused_conv(x), bn(conv(x)), atol=1e-5, rtol=1e-4)
            seconds.append(min(timeit.repeat(lambda call=fused_conv: call(x), number=3, repeat=5)))
    assert seconds[-1] < 5 * seconds[0]


@pytest.mark.parametrize("name", ["masked", "native"])
def test_without_a_policy_network_every_block_runs(name):
    networks, images = make_networks(policy=False), make_images(9)
    output = executor(name, networks)(images)
    assert output.actions.all()
    with torch.no_grad():
        expected = networks.resnet(NORMALISATION(images))
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["masked", "gather", "native"])
def test_memory_layouts(name):
    networks, images = make_networks(), make_images(6)
    actions = POLICIES["random"](6, networks.num_blocks)
    execute = executor(name, networks)
    expected = execute(images, actions).logits
    scattered = make_images(12, 2 * SIZE)
    scattered[::2, ::2, ::2] = images
    assert not scattered[::2, ::2, ::2].is_contiguous()
    transposed = actions.t().contiguous().t()
    output = execute(scattered[::2, ::2, ::2], transposed)
    torch.testing.assert_close(output.logits, expected)
    inputs = NORMALISATION(images)
    for form in (inputs, inputs.contiguous(), inputs.contiguous().double().float()):
        torch.testing.assert_close(execute.classify(form, actions), expected, atol=1e-5, rtol=0)


def one_block_the_other_way(batch: int, num_blocks: int) -> torch.Tensor:
    """Policies [K + 2, B, K], the first two of which are equal."""
    changes = torch.cat([torch.zeros(2, num_blocks), torch.eye(num_blocks)]).bool()
    return POLICIES["random"](batch, num_blocks) ^ changes[:, None]


def nothing_in_common(batch: int, num_blocks: int) -> torch.Tensor:
    return torch.rand(7, batch, num_blocks, generator=torch.Generator().manual_seed(5)) < 0.6


@pytest.mark.parametrize(
    ("name", "batch", "make_policies", "threads"),
    [
        ("native", 1, one_block_the_other_way, 3), ("native", 17, one_block_the_other_way, 1),
        ("native", 17, nothing_in_common, 3), ("gather", 17, nothing_in_common, 2),
        ("auto", 17, one_block_the_other_way, 2),
    ],
    indirect=["threads"],
)  # fmt: skip
def test_several_policies_give_what_each_gives_alone(name, batch, make_policies, threads):
    networks, images = make_networks(), make_images(batch)
    execute = executor(name, networks)
    inputs = NORMALISATION(images)
    policies = make_policies(batch, networks.num_blocks)
    before = policies.clone()
    expected = torch.stack([execute.classify(inputs, actions) for actions in policies])
    for _ in range(2):
        assert torch.equal(execute.classify(inputs, policies), expected)
    output = execute(images, policies)
    expected = torch.stack([execute(images, actions).logits for actions in policies])
    assert torch.equal(output.logits, expected)
    assert torch.equal(output.actions, before)
    assert torch.equal(policies, before)


def test_several_policies_are_as_many_for_each_image():
    execute = make_executor(make_networks(), name="gather")
    inputs = NORMALISATION(make_images(3))
    for shape in [(6,), (2, 4, 6), (2, 3, 5), (1, 2, 3, 6), (0, 3, 6)]:
        with pytest.raises(ValueError, match=r"expected \(3, 6\), or \[V, 3, 6\] for V policies"):
            execute.classify(inputs, torch.ones(shape))


@pytest.mark.parametrize(("shape", "expected"), [((0, 6), (0, 5)), ((2, 0, 6), (2, 0, 5))])
def test_no_images_give_no_logits(shape, expected):
    execute = make_executor(make_networks())
    images, actions = make_images(0), torch.ones(shape)
    assert execute(images, actions).logits.shape == expected
    assert execute.classify(NORMALISATION(images), actions).shape == expected


@pytest.mark.serial
def test_native_runs_once_what_policies_have_in_common():
    networks = make_networks(depth=26, width=16)
    execute = executor("native", networks)
    inputs = NORMALISATION(make_images(8, 32))
    every = torch.ones(8, networks.num_blocks)

    def seconds(count: int) -> float:
        begun = time.perf_counter()
        execute.classify(inputs, every.expand(count, -1, -1))
        return time.perf_counter() - begun

    assert min(seconds(16) for _ in range(5)) < 4 * min(seconds(1) for _ in range(5))  # not 16 times


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_left_alone_and_calls_are_independent(name):
    networks = make_networks()
    execute = executor(name, networks)
    images = make_images(20)
    actions = POLICIES["random"](20, networks.num_blocks)
    copies = images.clone(), actions.clone()
    first = execute(images, actions)
    execute(make_images(33, seed=1))
    assert torch.equal(execute(images, actions).logits, first.logits)
    assert torch.equal(images, copies[0])
    assert torch.equal(actions, copies[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_block_does_not_run(name):
    """Weights that would show in every logit, in a block that nobody keeps."""
    networks, images = make_networks(), make_images(12)
    actions = POLICIES["random"](12, networks.num_blocks)
    actions[:, 2] = False
    expected = Masked(networks)(images, actions)
    nn.init.constant_(networks.resnet.flat_blocks()[2].conv2.weight, float("nan"))
    assert_close(executor(name, networks)(images, actions), expected)


@pytest.mark.parametrize("name", ["masked", *NAMES, "auto"])
def test_bf16_predicts_nearly_the_same(name):
    networks, images = make_networks(depth=20, width=16), make_images(32)
    actions = POLICIES["random"](32, networks.num_blocks)
    expected = Masked(networks)(images, actions).logits
    output = executor(name, networks, "bf16")(images, actions).logits
    assert output.dtype == torch.float32
    assert (output - expected).abs().max() < 0.05 * expected.abs().max()
    assert not torch.equal(output, expected)


@pytest.mark.parametrize(
    ("images", "actions", "words"),
    [
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), None, "uint8 [B, H, W, 3]"),
        (torch.zeros(2, 16, 16, 3), None, "torch.float32"),
        (make_images(2), torch.ones(2, 5), "(2, 5), expected (2, 6)"),
        (make_images(2), torch.ones(3, 6), "(3, 6), expected (2, 6)"),
    ],
)
def test_wrong_shapes_are_refused(images, actions, words):
    with pytest.raises(ValueError, match="expected") as error:
        make_executor(make_networks(), name="masked")(images, actions)
    assert words in str(error.value)


@pytest.mark.parametrize("shape", [(16, 8), (10, 10)])
def test_native_refuses_images_for_which_it_has_no_memory(shape):
    with pytest.raises(ValueError, match=f"{shape[0]} x {shape[1]} pixels, expected a square"):
        executor("native", make_networks())(torch.zeros(2, *shape, 3, dtype=torch.uint8))


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"no executor 'fast'; choose one of auto, masked"):
        make_executor(make_networks(), name="fast")


def test_executors_have_the_names_of_params_yaml():
    assert {kind.name: kind for kind in EXECUTORS.values()} == EXECUTORS
    assert list(EXECUTORS) == list(get_args(ExecutorName))


@pytest.fixture
def builds(monkeypatch, tmp_path):
    """A project in which native.cpp is not compiled yet."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path / ".native"
    native.library.cache_clear()


@pytest.mark.parametrize("obstacle", ["no C++ compiler", "does not compile", "can't hold the compiled"])
def test_native_says_why_it_is_unavailable(builds, monkeypatch, obstacle):
    if obstacle == "no C++ compiler":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", "")
    elif obstacle == "does not compile":
        monkeypatch.setenv("CXX", shutil.which("false") or pytest.skip("no command `false`"))
    else:
        builds.write_text("a file where the folder should be")
    with pytest.raises(UnavailableError, match=re.escape(obstacle)):
        make_executor(make_networks(), name="native")
    assert obstacle in make_executor(make_networks()).description


def test_native_refuses_channels_that_do_not_fill_a_vector():
    with pytest.raises(UnavailableError, match="6 channels are no multiple of 4"):
        make_executor(make_networks(width=6), name="native")


@pytest.mark.parametrize("form", [full_resnet_forms.eager, full_resnet_forms.fused])
def test_full_resnet_forms_are_the_full_network(form):
    networks, images = make_networks(), make_images(10)
    with torch.no_grad():
        expected = networks.resnet(NORMALISATION(images))
    torch.testing.assert_close(form(networks, "fp32")(images), expected, atol=1e-4, rtol=0)


def failing(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


def test_auto_chooses_by_how_many_policies_there_are(monkeypatch):
    monkeypatch.setattr(Native, "__init__", failing(UnavailableError("off")))
    ran = []
    for kind in (Gather, Grouped):
        monkeypatch.setattr(
            kind,
            "_classify",
            lambda self, i, a, n=kind.name, real=kind._classify: ran.append(n) or real(self, i, a),
        )
    auto = make_executor(make_networks())
    images = make_images(64)
    policies = torch.stack([POLICIES[name](64, 6) for name in ("two policies", "random")])
    for ask, form in ((auto.classify, NORMALISATION(images)), (lambda *a: auto(*a).logits, images)):
        expected = torch.stack([ask(form, actions) for actions in policies])
        assert torch.equal(ask(form, policies), expected)
    assert ran == ["grouped", "gather"] * 4


@pytest.fixture
def choices(monkeypatch) -> dict[str, str]:
    """Who wins races in a test is forgotten after it."""
    choices: dict[str, str] = {}
    monkeypatch.setattr(auto_module, "CHOICES", choices)
    return choices


def contest(networks, *names: str) -> Auto:
    """An Auto in which these race, as they do on CUDA."""
    auto = make_executor(networks)
    auto.candidates = [make_executor(networks, name=name) for name in names]
    return auto


def test_auto_races_once_for_each_size(choices, monkeypatch):
    networks = make_networks()
    auto = contest(networks, "masked", "gather")
    ran = []

    def seconds(_, call, executor, failures):
        """`masked` wins where batches are small."""
        call()
        return (executor.name == "masked") == (ran[-1][1] > 8)

    monkeypatch.setattr(Auto, "_seconds", seconds)
    for one in auto.candidates:
        monkeypatch.setattr(
            one,
            "_classify",
            lambda i, a, n=one.name, real=one._classify: ran.append((n, len(i))) or real(i, a),
        )
    for batch in (4, 33):
        assert_close(auto(make_images(batch)), Masked(networks)(make_images(batch)))
    ran.clear()
    for batch in (4, 5, 40, 63):  # of sizes that have raced
        auto(make_images(batch))
    assert ran == [("masked", 4), ("masked", 5), ("gather", 40), ("gather", 63)]
    ran.clear()
    auto(make_images(40), torch.ones(3, 40, networks.num_blocks))  # each of several policies
    auto.classify(NORMALISATION(make_images(4)), torch.ones(2, 4, networks.num_blocks))
    assert ran == [("gather", 40)] * 3 + [("masked", 4)] * 2


def test_a_choice_is_for_networks_of_the_same_shapes(choices, monkeypatch):
    raced = []
    monkeypatch.setattr(Auto, "_seconds", lambda *_: raced.append(1) or len(raced))
    for width in (4, 4, 8):  # a second validation has other weights alone
        networks = make_networks(width=width)
        with torch.no_grad():
            networks.resnet.fc.weight.normal_()
        contest(networks, "masked", "gather")(make_images(4))
    assert len(raced) == 4
    assert list(choices.values()) == ["masked", "masked"]
    contest(networks, "masked", "gather")(make_images(4, 8))  # other images
    assert len(raced) == 6


def test_a_known_choice_is_taken_without_a_race_if_it_can_run(choices, monkeypatch):
    auto = contest(make_networks(), "masked", "gather")
    monkeypatch.setattr(Auto, "_seconds", lambda *_: 1.0)  # the first wins
    auto(make_images(4))
    assert list(choices.values()) == ["masked"]
    (key,) = choices
    choices[key] = "triton"
    with pytest.warns(UserWarning, match="triton can't run now, so others race for cifar"):
        auto(make_images(4))
    assert choices == {key: "masked"}
    choices[key] = "gather"
    monkeypatch.setattr(Auto, "_seconds", lambda *_: pytest.fail("a race"))
    monkeypatch.setattr(Masked, "_classify", lambda *_: pytest.fail("not the choice"))
    auto(make_images(4))


@pytest.fixture
def stderr_lines(capsys):
    """The warnings since the last call; each is printed once a process."""
    auto_module._warn_once.cache_clear()
    return lambda: capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("error", "left_out"), [(RuntimeError("broken"), True), (torch.OutOfMemoryError(), False)]
)
def test_who_fails_in_the_race_loses_it(error, left_out, stderr_lines, choices):
    networks, images = make_networks(), make_images(4)
    auto = contest(networks, "masked", "gather")
    broken, sound = auto.candidates
    broken._run = failing(error)
    assert_close(auto(images), sound(images))
    assert auto.candidates == ([sound] if left_out else [broken, sound])
    assert ("without the executor masked: broken" in "".join(stderr_lines())) == left_out
    assert list(choices.values()) == ["gather"]


def test_when_all_fail_in_the_race_nobody_is_chosen(stderr_lines, choices):
    networks, images = make_networks(), make_images(4)
    auto = contest(networks, "masked", "gather")
    for executor in auto.candidates:
        executor._run = failing(RuntimeError(f"broken {executor.name}"))
    assert_close(auto(images), Masked(networks)(images))
    assert [type(one) for one in auto.candidates] == [GatherOrGrouped]
    assert [line.rsplit(": ", 1)[1] for line in stderr_lines()] == ["broken masked", "broken gather"]
    assert choices == {}


@pytest.mark.parametrize(
    ("broken", "method", "error"),
    [
        ((Native,), "__init__", OSError(2, "gone")),
        ((Native, GatherOrGrouped), "__init__", TypeError("odd")),
        ((Native, GatherOrGrouped), "_run", RuntimeError("no such kernel")),
    ],
)
def test_auto_goes_on_without_executors_that_fail(broken, method, error, monkeypatch, stderr_lines):
    networks, images = make_networks(), make_images(6)
    expected = Masked(networks)(images)
    for kind in broken:
        monkeypatch.setattr(kind, method, failing(error))
    for _ in range(2):
        auto = make_executor(networks)
        assert_close(auto(images), expected)
        assert set(auto.left_out) == {kind.name for kind in broken}
        assert str(error) in auto.description
        rest = (GatherOrGrouped, Masked)[len(broken) - 1]
        assert [type(one) for one in auto.candidates] == [rest]
    for kind, line in zip(broken, stderr_lines(), strict=True):
        assert kind.name in line
        assert str(error) in line


@pytest.mark.parametrize("method", ["_run_under", "_classify_under", "_classify"])
def test_auto_goes_on_whatever_it_is_asked(method, monkeypatch):
    networks, images = make_networks(), make_images(6)
    actions = POLICIES["random"](6, networks.num_blocks)
    if method != "_classify":
        actions = actions.expand(4, -1, -1)
    expected = Masked(networks)(images, actions).logits
    monkeypatch.setattr(Native, method, failing(RuntimeError("broken")))
    auto = make_executor(networks)
    if method == "_run_under":
        output = auto(images, actions).logits
    else:
        output = auto.classify(NORMALISATION(images), actions)
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)
    assert "native" in auto.left_out


def test_input_that_nobody_can_take_leaves_nobody_out(stderr_lines):
    auto = make_executor(make_networks())
    able = auto.candidates
    with pytest.raises(Exception, match=r"pixels, expected a square|size"):
        auto(torch.zeros(2, 10, 10, 3, dtype=torch.uint8))
    assert auto.candidates == able
    auto(make_images(2))
    assert not [line for line in stderr_lines() if "expected a square" in line]


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("_run", torch.OutOfMemoryError("CUDA out of memory")), ("__init__", MemoryError()),
        ("__init__", OSError(28, "full")), ("_run", UserError("no")),
    ],
)  # fmt: skip
def test_what_is_no_executors_fault_is_raised(method, error, monkeypatch):
    monkeypatch.setattr(Native, method, failing(error))
    with pytest.raises(type(error)):
        make_executor(make_networks())(make_images(2))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="acts another x86 CPU")
def test_bf16_runs_on_a_cpu_that_has_only_avx2():
    """By the test of bf16 above, in a process that has no other instructions."""
    lesser = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "COLUMNS": "300"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "bf16_predicts"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=os.environ | lesser, capture_output=True, text=True
    )
    assert "4 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    assert re.search(r"no bf16 instructions \(AMX or AVX512_BF16\)|no C\+\+ compiler", done.stdout)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="acts another x86 CPU")
def test_native_is_built_for_the_cpu_that_is_emulated(builds, monkeypatch):
    monkeypatch.setattr(native, "FLAGS", [flag for flag in native.FLAGS if flag != "-O3"])  # quick
    for capability in ("", "avx2"):
        native.library.cache_clear()
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        try:
            lanes = native.library().lanes()
        except UnavailableError as error:
            pytest.skip(str(error))
    assert lanes == 8  # floats of a register
    assert len(list(builds.glob("*.so"))) == 2


def test_parts_cover_the_batch_once():
    for count, threads in itertools.product([0, 1, 7, 8, 15, 16, 17, 100, 257], [1, 2, 5]):
        parts = in_parts(count, threads)
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
        assert len(parts) <= threads


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
def test_map_torch_leaves_the_number_of_threads_as_it_was(threads):
    inside = map_torch(lambda _: torch.get_num_threads(), range(6), threads=2)
    assert inside == [1] * 6
    assert map_torch(lambda _: torch.get_num_threads(), [0], threads=1) == [threads]
    assert torch.get_num_threads() == threads


def test_errors_in_threads_reach_the_caller():
    def fail(item):
        raise RuntimeError(f"item {item}")

    with pytest.raises(RuntimeError, match="item 0"):
        map_torch(fail, [0, 1, 2], threads=2)
    with pytest.raises(RuntimeError, match="item 1"):
        native_threads(2).run(lambda member: fail(member) if member else None, 2)
