"""The benchmark shows who sleeps and who cheats, and what it says can be recomputed from its tables."""

import time
from functools import partial

import pytest
import torch
from executors import make_images, make_networks

from pipeline.benchmark import runner as benchmark_module
from pipeline.benchmark.runner import Benchmark, Full, Reference, Settings, peak_mib
from pipeline.flops import measure
from pipeline.inference.base import Executor, Output
from pipeline.inference.gather import Gather


class Sleepy(Gather):
    """Right, and slow."""

    name = "sleepy"

    def _run(self, images, actions):
        time.sleep(0.05)
        return super()._run(images, actions)


class Cheat(Gather):
    """Fast, because it asks no policy network: one policy for all."""

    name = "cheat"

    def _decide(self, inputs):
        actions = torch.zeros(len(inputs), self.networks.num_blocks, dtype=torch.bool)
        actions[:, 0] = True
        return actions


class Liar(Gather):
    """The right actions, with logits that do not come from them."""

    name = "liar"

    def _classify(self, inputs, actions):
        return torch.zeros(len(inputs), self.networks.resnet.num_classes)


class Broken(Gather):
    """Gives nothing."""

    name = "broken"

    def _run(self, images, actions):
        return Output(logits=torch.zeros(len(images), 5), actions=torch.zeros(len(images), 6) > 0)


def settings(**changes) -> Settings:
    return Settings(
        **{
            "batch_sizes": [32], "precisions": ["fp32"], "executors": ["masked", "gather"],
            "keep_ratios": [0.0, 1.0], "distinct_policies": 20, "sole_depths": [8], "rounds": 5,
            "seconds": 60.0, "with_compile": False, **changes,
        }
    )  # fmt: skip


def make_benchmark(*extra: type[Executor], **changes) -> Benchmark:
    networks = make_networks()
    return Benchmark(
        networks,
        full=networks.resnet,
        images=make_images(40),
        cost=measure(networks.resnet, networks.policy_net, 16),
        settings=settings(**changes),
        extra={kind.name: kind(networks) for kind in extra},
    )


def run(*extra: type[Executor], **changes) -> tuple[Benchmark, dict[str, list[dict]]]:
    benchmark = make_benchmark(*extra, **changes)
    return benchmark, benchmark.run(lambda _: None)


def row_of(tables, name: str) -> dict:
    (row,) = [row for row in tables["times"] if row["contestant"] == name]
    return row


def test_a_sleeper_is_shown_as_slow():
    _, tables = run(Sleepy)
    assert row_of(tables, "sleepy")["milliseconds"] > 50
    assert row_of(tables, "sleepy")["agrees"]
    assert row_of(tables, "sleepy")["speedup"] < row_of(tables, "gather")["speedup"]
    assert tables["answers"][0]["executor"] != "sleepy"


@pytest.mark.parametrize(("kind", "what"), [(Cheat, "same_decisions"), (Liar, "same_classes")])
def test_a_cheat_is_shown_and_wins_nothing(kind, what):
    _, tables = run(kind)
    row = row_of(tables, kind.name)
    assert row[what] < 0.999
    assert not row["agrees"]
    assert not row["reliable"]
    assert tables["answers"][0]["executor"] in ("gather", "masked")


def test_nobody_who_agrees_is_no_answer():
    said = []
    benchmark = make_benchmark(Broken, executors=[])
    (answer,) = benchmark.run(said.append)["answers"]
    assert not answer["reliable"]
    assert "speedup" not in answer
    assert "nothing is claimed" in said[0]


def test_tables_agree_with_each_other():
    benchmark, tables = run(batch_sizes=[16, 40], executors=["gather", "grouped"])
    assert [answer["batch"] for answer in tables["answers"]] == [16, 40]
    for answer in tables["answers"]:
        rows = {r["contestant"]: r for r in tables["times"] if r["batch"] == answer["batch"]}
        static = {name: r["milliseconds"] for name, r in rows.items() if r["kind"] == "static"}
        assert set(static) == {"eager", "fused", "gather, all blocks", "grouped, all blocks"}
        assert rows["ResNet-8"]["kind"] == "sole"
        assert answer["best_static"] == min(static, key=static.get)
        assert rows[answer["best_static"]]["speedup"] == 1
        fastest = rows[answer["executor"]]
        assert answer["speedup"] == fastest["speedup"]
        assert fastest["speedup"] == pytest.approx(min(static.values()) / fastest["milliseconds"])
        assert answer["share_of_ideal"] == pytest.approx(answer["speedup"] / answer["ideal"])
        assert fastest["rounds"] == 5
        of_this = [r for r in tables["sweep"] if r["batch"] == answer["batch"]]
        variants = ["many"] if answer["batch"] == 16 else ["few", "many"]
        assert [(r["variant"], r["keep_ratio"]) for r in of_this] == [
            (variant, share) for variant in variants for share in (0.0, 1.0)
        ]
    assert {row["batch"] for row in tables["parts"]} == {16, 40}
    assert all(row["policy_network_ms"] > row["index_ms"] > 0 for row in tables["parts"])
    assert benchmark.left_out == {}


def test_ideal_counts_the_policy_network_and_the_images_that_were_timed():
    networks = make_networks()
    cost = measure(networks.resnet, networks.policy_net, 16)
    benchmark, tables = run(batch_sizes=[40])
    actions = Gather(networks)(benchmark.images).actions
    expected = cost.full / float(cost.of(actions).mean())
    assert row_of(tables, "gather")["ideal"] == pytest.approx(expected)
    assert cost.policy_net > 0


def test_what_cannot_run_is_left_out_and_named():
    benchmark, tables = run(executors=["gather", "triton"])
    assert list(benchmark.left_out) == ["triton fp32"]
    assert not [row for row in tables["times"] if "triton" in row["contestant"]]


def test_rounds_take_turns_through_all_test_images():
    benchmark = make_benchmark()
    rounds = benchmark.rounds(4)
    assert rounds.rows.shape == (5, 8, 4)  # 32 images a round at least
    assert rounds.rows.flatten().tolist() == [i % 40 for i in range(160)]
    assert torch.equal(rounds.batches[1][2], benchmark.images[rounds.rows[1, 2]])


def test_a_sweep_runs_the_policy_network_and_takes_the_given_actions():
    benchmark = make_benchmark()
    rounds = benchmark.rounds(4)
    ran = []
    policies = rounds.policies(6, kept=3, distinct=None, draw=torch.Generator())
    rounds.forced(
        lambda images, actions: ran.append((images, actions)),
        lambda images: ran.append(images),
        policies,
    )(3)
    assert len(ran) == 16
    for index, (images, actions) in enumerate(zip(rounds.batches[3], policies[3], strict=True)):
        assert torch.equal(ran[2 * index], images)
        assert torch.equal(ran[2 * index + 1][1], actions)


def test_agreement_counts_decisions_and_classes_under_them():
    networks, images = make_networks(), make_images(40)
    reference = Reference(networks, images, checked=60)
    output = Gather(networks)(images)
    assert torch.equal(reference.actions, output.actions)
    assert reference.agreement(output.actions, output.logits) == (1, 1)
    flipped = output.actions.clone()
    flipped[:4, 0] ^= True
    right = Gather(networks)(images, flipped)  # right about what it ran
    assert reference.agreement(flipped, right.logits) == (1 - 4 / flipped.numel(), 1)
    wrong = output.logits.roll(1, dims=1)
    assert reference.agreement(output.actions, wrong) == (1, 0)


class Failing(Gather):
    """Fails in a call after so many."""

    name = "failing"
    calls = 0
    after = 0

    def _run(self, images, actions):
        self.calls += 1
        if self.calls > self.after:
            raise RuntimeError("could not create a primitive\nand a traceback")
        return super()._run(images, actions)


@pytest.mark.parametrize("after", [0, 1, 4, 12])  # warm-up, agreement, rounds, the sweep
def test_who_fails_at_any_call_is_left_out_and_the_others_are_kept(monkeypatch, after):
    monkeypatch.setattr(Failing, "after", after)
    benchmark, tables = run(Failing, batch_sizes=[32, 40])
    assert benchmark.left_out["failing fp32 at batch 40"] == "RuntimeError: could not create a primitive"
    assert "failing" not in [row["contestant"] for row in tables["times"] if row["batch"] == 40]
    assert [answer["batch"] for answer in tables["answers"]] == [32, 40]
    assert all("executor" in answer for answer in tables["answers"])


def test_a_winner_that_fails_in_its_sweep_is_named_and_keeps_its_row(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(benchmark_module.Rounds, "forced", lambda *_, **__: broken)
    benchmark, tables = run()
    assert "no such kernel" in benchmark.left_out["kept shares and parts fp32 at batch 32"]
    assert tables["sweep"] == []
    assert "executor" in tables["answers"][0]


def test_forms_that_fail_when_they_are_made_or_called_are_left_out(monkeypatch):
    def refuses():
        raise RuntimeError("no compiler")

    def fails(images):
        raise OSError("no file")

    forms = benchmark_module.static_forms

    def with_broken(*arguments, **options):
        return forms(*arguments, **options) | {"compiled": lambda: fails, "cuda_graphs": refuses}

    monkeypatch.setattr(benchmark_module, "static_forms", with_broken)
    benchmark, tables = run(executors=["gather"])
    assert benchmark.left_out == {
        "cuda_graphs fp32": "RuntimeError: no compiler",
        "compiled fp32 at batch 32": "OSError: no file",
    }
    assert tables["answers"][0]["best_static"] in ("eager", "fused", "gather, all blocks")


def test_without_any_static_form_nothing_is_claimed(monkeypatch):
    monkeypatch.setattr(benchmark_module, "static_forms", lambda *_, **__: {})
    said = []
    tables = make_benchmark(executors=["masked"]).run(said.append)
    assert tables["answers"] == []
    assert said == ["batch 32: no static form ran, so nothing is claimed"]


def test_a_reference_that_fails_ends_in_tables_all_the_same(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(benchmark_module, "Reference", broken)
    benchmark, tables = run()
    assert "RuntimeError: out of memory" in benchmark.left_out.values()
    assert tables["answers"] == []


def test_bf16_that_is_emulated_is_no_contestant(monkeypatch):
    monkeypatch.setattr(benchmark_module, "computes_in_bf16", lambda _: False)
    benchmark, tables = run(precisions=["fp32", "bf16"])
    assert "would only emulate it" in benchmark.left_out["bf16"]
    assert {row["precision"] for row in tables["times"]} == {"fp32"}
    alone, tables = run(precisions=["bf16"])
    assert list(alone.left_out) == ["bf16"]
    assert all(rows == [] for rows in tables.values())


def test_each_precision_is_held_against_the_best_static_form_of_all(monkeypatch):
    monkeypatch.setattr(benchmark_module, "computes_in_bf16", lambda _: True)
    forms = benchmark_module.static_forms

    def slow_in_bf16(networks, precision, *, with_compile):
        def slow(images, run):
            time.sleep(0.05)
            return run(images)

        made = forms(networks, "fp32", with_compile=with_compile)
        if precision == "fp32":
            return made
        return {name: lambda make=make: partial(slow, run=make()) for name, make in made.items()}

    monkeypatch.setattr(benchmark_module, "static_forms", slow_in_bf16)
    _, tables = run(precisions=["fp32", "bf16"], executors=["masked"])
    assert [answer["precision"] for answer in tables["answers"]] == ["fp32", "bf16"]
    fastest = min(
        (row for row in tables["times"] if row["kind"] == "static"), key=lambda row: row["milliseconds"]
    )
    assert fastest["precision"] == "fp32"
    for answer in tables["answers"]:
        assert (answer["best_static"], answer["static_precision"]) == (fastest["contestant"], "fp32")
        assert answer["static_milliseconds"] == fastest["milliseconds"]
    bf16 = tables["answers"][1]
    assert (
        bf16["share_of_ideal"] > 2 * bf16["speedup"] / bf16["ideal"]
    )  # beside its own, slow, precision


def test_seconds_are_kept_by_dropping_the_slowest_and_never_who_matters():
    class Slow(Gather):
        name = "slow"

        def _run(self, images, actions):
            time.sleep(0.3)
            return super()._run(images, actions)

    started = time.monotonic()
    benchmark, tables = run(Slow, seconds=2.0, keep_ratios=[0.5, 1.0])
    assert time.monotonic() - started < 2.0 * 1.5
    assert benchmark.left_out["slow fp32 at batch 32"] == "too slow for benchmark.seconds"
    assert "slow" not in [row["contestant"] for row in tables["times"]]
    kinds = {row["kind"] for row in tables["times"]}
    assert {"static", "blockdrop"} <= kinds
    assert all(row["rounds"] >= 5 for row in tables["times"])


def test_what_is_less_than_the_least_is_said_before_it_is_measured():
    said = []
    benchmark = make_benchmark(Sleepy, executors=[], seconds=0.01)
    (answer,) = benchmark.run(said.append)["answers"]
    told = next(line for line in said if "are too few" in line)
    seconds = float(told.split("about ")[1].split(" s ")[0])
    assert told.startswith("benchmark.seconds 0.01 are too few: about")
    assert 0 <= seconds < 10
    assert said.index(told) < said.index(said[-1])
    assert answer["executor"] == "sleepy"  # the only one, so it stays
    assert "kept shares and parts fp32 at batch 32" in benchmark.left_out


def test_ticks_tell_the_seconds_that_are_spent():
    ticks = []
    make_benchmark().run(lambda _: None, ticks.append)
    assert len(ticks) > 20
    assert ticks == sorted(ticks)
    assert ticks[-1] > 0


def test_a_sweep_says_what_share_ran():
    _, tables = run(keep_ratios=[0.4, 0.5, 1.0], batch_sizes=[4])  # of 6 blocks: 2, 3 and 6
    assert [row["keep_ratio"] for row in tables["sweep"]] == [2 / 6, 3 / 6, 1.0]
    _, tables = run(keep_ratios=[0.45, 0.5, 1.0], batch_sizes=[4])  # 3, 3 and 6: one point, not two
    assert [row["keep_ratio"] for row in tables["sweep"]] == [3 / 6, 1.0]


def test_peak_memory_has_what_calls_before_have_left_on_the_device(monkeypatch):
    allocated = {"now": 100, "most": 0}

    class Hoarder(Gather):
        """Keeps a scratch of 8 MiB."""

        held = 0

        def _run(self, images, actions):
            if not self.held:
                self.held = 8 * 2**20
                allocated["now"] += self.held
            allocated["most"] = max(allocated["most"], allocated["now"] + 2**20)
            return super()._run(images, actions)

        def free(self):
            allocated["now"] -= self.held
            self.held = 0

    for name, found in {
        "synchronize": None,
        "reset_peak_memory_stats": lambda: allocated.update(most=0),
        "memory_allocated": lambda: allocated["now"],
        "max_memory_allocated": lambda: allocated["most"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, found=found: found and found())
    benchmark = make_benchmark()
    hoarder = Hoarder(benchmark.networks)
    for run in (hoarder, Full(hoarder)):
        call = benchmark.rounds(32).on(run)
        call(0)
        assert peak_mib(run, call, torch.device("cuda")) == 9
