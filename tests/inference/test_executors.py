"""Every executor gives what `masked` gives, whatever the policies, the batch and the memory layout."""

import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import time
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
from pipeline.inference import native
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


def agrees_with_masked(name, networks, images, actions=None):
    expected = Masked(networks)(images, actions)
    output = executor(name, networks)(images, actions)
    assert output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)
    assert torch.equal(output.actions, expected.actions)
    return output


# all policies at batches of one part and of several; fewer images than threads; threads in turn
BATCHES_AND_POLICIES = [*itertools.product((1, 25), POLICIES), (2, "random")]


@pytest.mark.parametrize(
    ("batch", "policy", "threads"),
    [(*case, 3 - number % 3) for number, case in enumerate(reversed(BATCHES_AND_POLICIES))],
    indirect=["threads"],
)
@pytest.mark.parametrize("name", NAMES)
def test_executor_agrees_with_masked_under_given_actions(name, batch, policy, threads):
    networks = make_networks()
    actions = POLICIES[policy](batch, networks.num_blocks)
    assert torch.equal(agrees_with_masked(name, networks, make_images(batch), actions).actions, actions)


@pytest.mark.parametrize(
    ("batch", "input_size", "threads"),
    [(1, None, 3), (1, 8, 2), (33, None, 2), (33, 8, 3)],
    indirect=["threads"],
)
@pytest.mark.parametrize("name", [*NAMES, "auto"])
def test_executor_agrees_with_masked_on_the_policy(name, batch, input_size, threads):
    output = agrees_with_masked(name, make_networks(input_size=input_size), make_images(batch))
    assert 0 < output.actions.double().mean() < 1


@pytest.mark.parametrize(
    ("name", "depth", "width", "size"),
    [
        ("native", 8, 4, 8), ("native", 8, 12, 8), ("native", 14, 16, 12), ("native", 8, 32, 32),
        ("native", 8, 20, 20), ("native", 26, 16, 28), ("gather", 8, 12, 8), ("grouped", 26, 16, 28),
    ],
)  # fmt: skip
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_executor_agrees_with_masked_at_other_shapes(name, depth, width, size, threads):
    agrees_with_masked(name, make_networks(depth=depth, width=width), make_images(5, size))


@pytest.mark.parametrize("name", ["masked", *NAMES, "auto"])
def test_without_a_policy_network_every_block_runs(name):
    networks = make_networks(policy=False)
    images = make_images(9)
    with torch.no_grad():
        expected = networks.resnet(NORMALISATION(images))
    output = executor(name, networks)(images)
    assert output.actions.all()
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["masked", *NAMES])
def test_memory_layouts(name):
    networks = make_networks()
    images = make_images(6)
    actions = POLICIES["random"](6, networks.num_blocks)
    execute = executor(name, networks)
    expected = execute(images, actions).logits
    scattered = make_images(12, 2 * SIZE)
    scattered[::2, ::2, ::2] = images
    assert not scattered[::2, ::2, ::2].is_contiguous()
    torch.testing.assert_close(execute(scattered[::2, ::2, ::2], actions).logits, expected)
    transposed = actions.t().contiguous().t()
    torch.testing.assert_close(execute(images, transposed).logits, expected)
    inputs = NORMALISATION(images)
    for form in (inputs, inputs.contiguous(), inputs.contiguous().double().float()):
        torch.testing.assert_close(execute.classify(form, actions), expected, atol=1e-5, rtol=0)


def several_policies(kind: str, batch: int, num_blocks: int) -> torch.Tensor:
    """Three to num_blocks + 2 policies [V, B, K] for each image."""
    base = POLICIES["random"](batch, num_blocks)
    if kind == "one block the other way":
        return base ^ torch.cat([torch.zeros(2, num_blocks), torch.eye(num_blocks)]).bool()[:, None]
    if kind == "equal":
        return base.expand(4, -1, -1)
    draw = torch.Generator().manual_seed(5)
    return torch.rand(7, batch, num_blocks, generator=draw) < 0.6


@pytest.mark.parametrize(
    ("batch", "kind", "threads"),
    [
        (1, "one block the other way", 3), (17, "one block the other way", 1),
        (1, "equal", 2), (17, "nothing in common", 3),
    ],
    indirect=["threads"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["masked", *NAMES, "auto"])
def test_several_policies_give_what_each_gives_alone(name, batch, kind, threads):
    networks = make_networks()
    execute = executor(name, networks)
    inputs = NORMALISATION(make_images(batch))
    policies = several_policies(kind, batch, networks.num_blocks)
    expected = torch.stack([execute.classify(inputs, actions) for actions in policies])
    before = policies.clone()
    output = execute.classify(inputs, policies)
    assert output.shape == (len(policies), batch, 5)
    assert torch.equal(output, expected)
    assert torch.equal(policies, before)
    assert torch.equal(execute.classify(inputs, policies), expected)
    images = make_images(batch)
    output = execute(images, policies)
    assert torch.equal(
        output.logits, torch.stack([execute(images, actions).logits for actions in policies])
    )
    assert torch.equal(output.actions, policies)


@pytest.mark.parametrize("name", ["masked", *NAMES])
def test_several_policies_are_as_many_for_each_image(name):
    networks = make_networks()
    execute = executor(name, networks)
    inputs = NORMALISATION(make_images(3))
    for shape in [(6,), (2, 4, 6), (2, 3, 5), (1, 2, 3, 6), (0, 3, 6)]:
        with pytest.raises(ValueError, match=r"expected \(3, 6\), or \[V, 3, 6\] for V policies"):
            execute.classify(inputs, torch.ones(shape))
    assert execute.classify(inputs[:0], torch.ones(2, 0, 6)).shape == (2, 0, 5)
    assert execute(make_images(0), torch.ones(2, 0, 6)).logits.shape == (2, 0, 5)


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


@pytest.mark.parametrize("name", ["masked", *NAMES])
def test_inputs_are_left_alone_and_calls_do_not_depend_on_each_other(name):
    networks = make_networks()
    execute = executor(name, networks)
    images, others = make_images(20), make_images(33, seed=1)
    actions = POLICIES["random"](20, networks.num_blocks)
    copies = images.clone(), actions.clone()
    first = execute(images, actions)
    execute(others)
    again = execute(images, actions)
    assert torch.equal(first.logits, again.logits)
    assert torch.equal(images, copies[0])
    assert torch.equal(actions, copies[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_block_does_not_run(name):
    """Weights that would show in every logit, in a block that nobody keeps."""
    networks = make_networks()
    images = make_images(12)
    actions = POLICIES["random"](12, networks.num_blocks).clone()
    actions[:, 2] = False
    expected = Masked(networks)(images, actions).logits
    nn.init.constant_(networks.resnet.flat_blocks()[2].conv2.weight, float("nan"))
    output = executor(name, networks)(images, actions).logits
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gather", "grouped", "auto"])
def test_bf16_predicts_nearly_the_same(name):
    networks = make_networks(depth=20, width=16)
    images = make_images(256)
    actions = POLICIES["random"](256, networks.num_blocks)
    expected = Masked(networks)(images, actions).logits
    output = executor(name, networks, "bf16")(images, actions).logits
    assert output.dtype == torch.float32
    scale = expected.abs().max()
    assert (output - expected).abs().max() < 0.05 * scale
    assert not torch.equal(output, expected)


@pytest.mark.parametrize("name", ["masked", "auto"])
@pytest.mark.parametrize(
    ("images", "actions", "words"),
    [
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), None, "uint8 [B, H, W, 3]"),
        (torch.zeros(2, 16, 16, 3), None, "torch.float32"),
        (make_images(2), torch.ones(2, 5), "(2, 5), expected (2, 6)"),
        (make_images(2), torch.ones(3, 6), "(3, 6), expected (2, 6)"),
    ],
)
def test_wrong_shapes_are_refused(name, images, actions, words):
    with pytest.raises(ValueError, match="expected") as error:
        executor(name, make_networks())(images, actions)
    assert words in str(error.value)


@pytest.mark.parametrize("shape", [(16, 8), (8, 16), (10, 10)])
def test_native_refuses_images_for_which_it_has_no_memory(shape):
    with pytest.raises(ValueError, match=f"{shape[0]} x {shape[1]} pixels, expected a square"):
        executor("native", make_networks())(torch.zeros(2, *shape, 3, dtype=torch.uint8))


def test_no_images_give_no_logits():
    for name in NAMES:
        output = executor(name, make_networks())(make_images(0), torch.ones(0, 6))
        assert output.logits.shape == (0, 5)


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"no executor 'fast'; choose one of auto, masked"):
        make_executor(make_networks(), name="fast")


def test_executors_have_the_names_of_params_yaml():
    assert {kind.name: kind for kind in EXECUTORS.values()} == EXECUTORS
    assert list(EXECUTORS) == list(get_args(ExecutorName))


def test_native_says_why_it_is_unavailable(monkeypatch, tmp_path):
    native.library.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UnavailableError, match=r"no C\+\+ compiler"):
        make_executor(make_networks(), name="native")
    auto = make_executor(make_networks())
    assert isinstance(auto, Auto)
    assert "no C++ compiler" in auto.description
    native.library.cache_clear()


@pytest.mark.skipif(shutil.which("false") is None, reason="no command `false`")
def test_native_with_a_compiler_that_fails(monkeypatch, tmp_path):
    native.library.cache_clear()
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    with pytest.raises(UnavailableError, match="does not compile"):
        make_executor(make_networks(), name="native")
    native.library.cache_clear()


def test_native_without_a_place_for_what_it_compiles(monkeypatch, tmp_path):
    native.library.cache_clear()
    (tmp_path / ".native").write_text("a file where the folder should be")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"can't hold the compiled native\.cpp"):
        make_executor(make_networks(), name="native")
    native.library.cache_clear()


def test_native_refuses_channels_that_do_not_fill_a_vector():
    with pytest.raises(UnavailableError, match="6 channels are no multiple of 4"):
        make_executor(make_networks(width=6), name="native")


@pytest.mark.parametrize("form", [full_resnet_forms.eager, full_resnet_forms.fused])
def test_full_resnet_forms_are_the_full_network(form):
    networks = make_networks()
    images = make_images(10)
    with torch.no_grad():
        expected = networks.resnet(NORMALISATION(images))
    torch.testing.assert_close(form(networks, "fp32")(images), expected, atol=1e-4, rtol=0)


def test_auto_chooses_by_how_many_policies_there_are(monkeypatch):
    monkeypatch.setattr(
        "pipeline.inference.auto.Native.__init__",
        lambda *_, **__: (_ for _ in ()).throw(UnavailableError("off")),
    )
    ran = []
    for kind in (Gather, Grouped):
        monkeypatch.setattr(
            kind,
            "_classify",
            lambda self, i, a, n=kind.name, real=kind._classify: ran.append(n) or real(self, i, a),
        )
    auto = make_executor(make_networks())
    images = make_images(64)
    auto(images, POLICIES["two policies"](64, 6))
    auto(images, POLICIES["random"](64, 6))
    assert ran == ["grouped", "gather"]
    both = torch.stack([POLICIES["random"](64, 6), POLICIES["two policies"](64, 6)])
    for ask, form in ((auto.classify, NORMALISATION(images)), (lambda *a: auto(*a).logits, images)):
        ran.clear()
        output = ask(form, both)
        assert ran == ["gather", "grouped"]
        assert torch.equal(output, torch.stack([ask(form, actions) for actions in both]))


@pytest.fixture
def no_choices(monkeypatch) -> dict[str, str]:
    """Who wins races in a test is forgotten after it."""
    choices: dict[str, str] = {}
    monkeypatch.setattr(auto_module, "CHOICES", choices)
    return choices


def test_auto_races_once_for_each_size(no_choices):
    networks = make_networks()
    auto = make_executor(networks)
    ran = []

    class Counted(type(make_executor(networks, name="gather"))):
        def _classify(self, inputs, actions):
            ran.append((self.name, len(inputs)))
            time.sleep(self.nap(len(inputs)))
            return super()._classify(inputs, actions)

    one, other = Counted(networks), Counted(networks)
    one.name, one.nap = "best when small", lambda batch: 0.02 * (batch > 8)
    other.name, other.nap = "best when large", lambda batch: 0.02 * (batch <= 8)
    auto.candidates = [one, other]
    for batch in (4, 33):
        expected = Masked(networks)(make_images(batch)).logits
        torch.testing.assert_close(auto(make_images(batch)).logits, expected, atol=1e-4, rtol=0)
    ran.clear()
    for batch in (4, 5, 40, 63):  # of sizes that have raced
        auto(make_images(batch))
    assert ran == [(one.name, 4), (one.name, 5), (other.name, 40), (other.name, 63)]
    ran.clear()
    auto(make_images(40), torch.ones(3, 40, networks.num_blocks))  # each of several policies
    auto.classify(NORMALISATION(make_images(4)), torch.ones(2, 4, networks.num_blocks))
    assert ran[-5:] == [(other.name, 40)] * 3 + [(one.name, 4)] * 2


def contest(networks, *names: str) -> Auto:
    """An Auto in which these race, as they do on CUDA."""
    auto = make_executor(networks)
    auto.candidates = [make_executor(networks, name=name) for name in names]
    return auto


def test_a_choice_is_for_networks_of_the_same_shapes_in_this_process(no_choices, monkeypatch):
    raced = []
    monkeypatch.setattr(Auto, "_seconds", lambda *_: raced.append(1) or len(raced))
    for width in (4, 4, 8):  # a second validation has other weights alone
        networks = make_networks(width=width)
        with torch.no_grad():
            networks.resnet.fc.weight.normal_()
        contest(networks, "masked", "gather")(make_images(4))
    assert len(raced) == 4
    assert list(no_choices.values()) == ["masked", "masked"]
    contest(networks, "masked", "gather")(make_images(4, 8))  # other images
    assert len(raced) == 6


@pytest.mark.parametrize("chosen", ["masked", "gather"])
def test_a_choice_that_is_known_is_taken_without_a_race(chosen, no_choices, monkeypatch):
    auto = contest(make_networks(), "masked", "gather")
    monkeypatch.setattr(Auto, "_seconds", lambda *_: 1.0)
    auto(make_images(4))
    (key,) = no_choices
    no_choices[key] = chosen
    monkeypatch.setattr(Auto, "_seconds", lambda *_: pytest.fail("a race"))
    ran = []
    for executor in auto.candidates:
        monkeypatch.setattr(executor, "_classify", lambda i, a, e=executor: ran.append(e.name))
    auto(make_images(4))
    assert ran == [chosen]


def test_auto_races_again_when_the_winner_can_not_run_here(no_choices, monkeypatch):
    auto = contest(make_networks(), "masked", "gather")
    auto(make_images(4))
    (key,) = no_choices
    no_choices[key] = "triton"
    with pytest.warns(UserWarning, match="triton can't run now, so others race for cifar"):
        auto(make_images(4))
    assert no_choices[key] in ("masked", "gather")


def test_who_runs_out_of_memory_loses_the_race(no_choices):
    networks = make_networks()
    auto = make_executor(networks)
    greedy, modest = (make_executor(networks, name=name) for name in ("masked", "gather"))

    def fails(*_):
        raise torch.OutOfMemoryError

    greedy._classify = fails
    auto.candidates = [greedy, modest]
    images = make_images(4)
    torch.testing.assert_close(auto(images).logits, modest(images).logits)
    assert set(no_choices.values()) == {"gather"}


def failing(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


@pytest.fixture
def stderr_lines(capsys):
    """The warnings since the last call; each is printed once a process."""
    auto_module._warn_once.cache_clear()
    return lambda: capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("broken", "method", "error"),
    [
        ((Native,), "__init__", OSError(2, "gone")),
        ((Native,), "_run", RuntimeError("no such kernel")),
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
        output = auto(images)
        assert torch.equal(output.actions, expected.actions)
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)
        assert set(auto.left_out) == {kind.name for kind in broken}
        assert str(error) in auto.description
        rest = (GatherOrGrouped, Masked)[len(broken) - 1]
        assert [type(one) for one in auto.candidates] == [rest]
    lines = stderr_lines()
    assert len(lines) == len(broken)
    assert all(
        kind.name in line and str(error) in line for kind, line in zip(broken, lines, strict=True)
    )


@pytest.mark.parametrize("method", ["_run_under", "_classify_under", "_classify"])
def test_auto_goes_on_whatever_it_is_asked(method, monkeypatch):
    networks, images = make_networks(), make_images(6)
    policies = several_policies("equal", 6, networks.num_blocks)
    actions = policies[0] if method == "_classify" else policies
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


def test_who_fails_in_the_race_is_left_out(stderr_lines, no_choices):
    networks, images = make_networks(), make_images(4)
    auto = make_executor(networks)
    broken, sound = (make_executor(networks, name=name) for name in ("masked", "gather"))
    expected = sound(images).logits
    broken._run = failing(RuntimeError("broken"))
    auto.candidates = [broken, sound]
    torch.testing.assert_close(auto(images).logits, expected)
    assert auto.candidates == [sound]
    assert "without the executor masked: broken" in stderr_lines()[-1]
    assert list(no_choices.values()) == ["gather"]


def test_when_all_fail_in_the_race_nobody_is_chosen(stderr_lines, no_choices):
    networks, images = make_networks(), make_images(4)
    auto = contest(networks, "masked", "gather")
    for executor in auto.candidates:
        executor._run = failing(RuntimeError(f"broken {executor.name}"))
    expected = Masked(networks)(images).logits
    torch.testing.assert_close(auto(images).logits, expected, atol=1e-4, rtol=0)
    assert [type(one) for one in auto.candidates] == [GatherOrGrouped]
    assert [line.rsplit(": ", 1)[1] for line in stderr_lines()] == ["broken masked", "broken gather"]
    assert no_choices == {}


ON_AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
IN_BF16 = """
import torch
from executors import make_images, make_networks
from pipeline.inference.base import UnavailableError
from pipeline.inference.auto import EXECUTORS, make_executor
networks, images = make_networks(), make_images(5)
actions = torch.rand(5, 6) < 0.5
expected = make_executor(networks, name="masked")(images, actions).logits
for name in ("auto", *EXECUTORS):
    try:
        logits = make_executor(networks, name=name, precision="bf16")(images, actions).logits
        assert (logits - expected).abs().max() < 0.05 * expected.abs().max(), name
        print(name, "ran")
    except UnavailableError as error:
        print(name, error)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="acts another x86 CPU")
def test_bf16_runs_on_a_cpu_that_has_only_avx2(tmp_path):
    root = Path(__file__).parents[2]
    environment = os.environ | ON_AVX2 | {
        "PYTHONPATH": f"{root / 'tests/helpers'}{os.pathsep}{root}", "DVC_ROOT": str(tmp_path)
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", IN_BF16], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert [name for name, result in lines.items() if result == "ran"] == [
        "auto", "masked", "gather", "grouped"
    ]  # fmt: skip
    assert re.search(r"no bf16 instructions \(AMX or AVX512_BF16\)|no C\+\+ compiler", lines["native"])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="acts another x86 CPU")
def test_native_is_built_for_the_cpu_that_is_emulated(monkeypatch, tmp_path):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", [flag for flag in native.FLAGS if flag != "-O3"])  # quick
    lanes = {}
    for capability in ("", "avx2"):
        native.library.cache_clear()
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        try:
            lanes[capability] = native.library().lanes()
        except UnavailableError as error:
            pytest.skip(str(error))
    native.library.cache_clear()
    assert lanes["avx2"] == 8  # floats of a register
    assert len(list((tmp_path / ".native").glob("*.so"))) == 2


def test_parts_cover_the_batch_once():
    for count, threads in itertools.product([0, 1, 7, 8, 15, 16, 17, 100, 257], [1, 2, 5]):
        parts = in_parts(count, threads)
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
        assert len(parts) <= threads


def test_errors_in_threads_reach_the_caller():
    def fail(item):
        raise RuntimeError(f"item {item}")

    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="item 0"):
        map_torch(fail, [0, 1, 2], threads=2)
    assert map_torch(lambda _: torch.get_num_threads(), [0], threads=1) == [threads]
    with pytest.raises(RuntimeError, match="item 1"):
        native_threads(2).run(lambda member: fail(member) if member else None, 2)


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
def test_map_torch_leaves_the_number_of_threads_as_it_was(threads):
    map_torch(lambda _: torch.rand(3), range(6), threads=2)
    assert torch.get_num_threads() == threads
