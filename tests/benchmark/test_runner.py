"""The benchmark shows slow and wrong executors, and its answers can be recomputed from its tables."""

import time
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from executors import make_images, make_networks

from pipeline.benchmark import candidates, full_resnet_forms, runner
from pipeline.benchmark.candidates import Settings
from pipeline.benchmark.reference import Reference
from pipeline.benchmark.rounds import Rounds, peak_mib
from pipeline.benchmark.runner import Benchmark
from pipeline.benchmark.sweep import synthetic_policies
from pipeline.flops import measure
from pipeline.inference.base import Executor
from pipeline.inference.gather import Gather
from pipeline.results import Tables, TimingRow


class Sleepy(Gather):
    """Correct, and slow."""

    name = "sleepy"

    def _run(self, images, actions):
        time.sleep(0.02)
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


def fails(*_, **__):
    raise RuntimeError("no such kernel\nand a traceback")


def settings(**changes) -> Settings:
    return Settings(
        **{
            "batch_sizes": [32], "precisions": ["fp32"], "executors": ["masked", "gather"],
            "keep_ratios": [0.4, 1.0], "distinct_policies": 20, "sole_depths": [8], "rounds": 5,
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


def run(*extra: type[Executor], **changes) -> tuple[Benchmark, Tables]:
    benchmark = make_benchmark(*extra, **changes)
    return benchmark, benchmark.run(lambda _: None)


def row_of(tables: Tables, name: str, batch: int) -> TimingRow:
    (row,) = [row for row in tables.times if (row.candidate, row.batch) == (name, batch)]
    return row


TICKS: list[float] = []


@pytest.fixture(scope="module", autouse=True)
def no_peers() -> Iterator[None]:
    """Only our own forms, whether other engines are installed or not (test_peers.py has these)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full_resnet_forms, "PEERS", {})
        yield


@pytest.fixture(scope="module")
def benchmark() -> Benchmark:
    """One that has run, for several tests."""
    made = make_benchmark(
        Sleepy, Cheat, Liar, batch_sizes=[16, 40], executors=["gather", "grouped", "triton"]
    )
    made.run(lambda _: None, TICKS.append)
    return made


def test_a_sleeper_is_shown_as_slow(benchmark):
    row = row_of(benchmark.tables, "sleepy", 40)
    assert row.time.milliseconds > 20
    assert row.agreement.agrees
    assert row.speedup.ratio < row_of(benchmark.tables, "gather", 40).speedup.ratio


@pytest.mark.parametrize(("name", "what"), [("cheat", "decisions"), ("liar", "classes")])
def test_a_cheat_is_shown(benchmark, name, what):
    row = row_of(benchmark.tables, name, 40)
    assert getattr(row.agreement, what) < 0.999
    assert not row.agreement.agrees
    assert not row.speedup.reliable


def test_without_agreement_there_is_no_winner():
    lines = []
    (answer,) = make_benchmark(Liar, executors=[]).run(lines.append).answers
    assert answer.winner is None
    assert "nothing is claimed" in lines[0]


def test_tables_agree_with_each_other(benchmark):
    tables = benchmark.tables
    assert [answer.batch for answer in tables.answers] == [16, 40]
    for answer in tables.answers:
        rows = {row.candidate: row for row in tables.times if row.batch == answer.batch}
        full = {name: row.time.milliseconds for name, row in rows.items() if row.kind == "full"}
        assert set(full) == {"eager", "fused", "gather, all blocks", "grouped, all blocks"}
        assert rows["ResNet-8"].kind == "sole"
        assert answer.full_form == min(full, key=full.get)
        assert rows[answer.full_form].speedup.ratio == 1
        winner, fastest = answer.winner, rows[answer.winner.executor]
        assert winner.executor in ("gather", "grouped")  # not those that sleep or cheat
        assert winner.speedup == fastest.speedup
        assert winner.speedup.ratio == pytest.approx(min(full.values()) / fastest.time.milliseconds)
        assert winner.share_of_ideal == pytest.approx(winner.speedup.ratio / winner.ideal)
        assert fastest.time.rounds == 5
        points = [point for point in tables.sweep if point.batch == answer.batch]
        variants = ["many"] if answer.batch == 16 else ["few", "many"]
        assert [(p.variant, p.keep_ratio) for p in points] == [
            (variant, ratio) for variant in variants for ratio in (2 / 6, 1.0)
        ]
    assert {parts.batch for parts in tables.parts} == {16, 40}
    assert all(parts.policy_network_ms > parts.index_ms > 0 for parts in tables.parts)


def test_ideal_counts_the_policy_network_and_the_timed_images(benchmark):
    cost = benchmark.cost
    actions = Gather(benchmark.networks)(benchmark.images).actions
    expected = cost.full / float(cost.of(actions).mean())
    assert row_of(benchmark.tables, "gather", 40).ideal == pytest.approx(expected)
    assert cost.policy_net > 0


def test_what_cannot_run_is_left_out_and_named(benchmark):
    assert list(benchmark.left_out) == ["triton fp32"]
    assert not [row for row in benchmark.tables.times if "triton" in row.candidate]


@pytest.mark.usefixtures("benchmark")
def test_ticks_tell_the_seconds_that_are_spent():
    assert len(TICKS) > 20
    assert sorted(TICKS) == TICKS
    assert TICKS[-1] > 0


def test_keep_ratios_are_rounded_to_blocks_and_stand_once():
    sweep = settings(keep_ratios=[0.4, 0.45, 0.5, 1.0])
    many = [("many", num_kept) for num_kept in (2, 3, 6)]
    assert synthetic_policies(sweep, num_blocks=6, batch=20) == many
    few = [("few", num_kept) for num_kept in (2, 3, 6)]
    assert synthetic_policies(sweep, num_blocks=6, batch=21) == few + many


def test_rounds_take_turns_through_all_test_images():
    benchmark = make_benchmark()
    rounds = Rounds.of(benchmark.images, batch=4, count=5)
    assert rounds.rows.shape == (5, 8, 4)  # 32 images a round at least
    assert rounds.rows.flatten().tolist() == [i % 40 for i in range(160)]
    assert torch.equal(rounds.batches[1][2], benchmark.images[rounds.rows[1, 2]])


def test_sweep_asks_the_policy_and_takes_the_given_actions():
    benchmark = make_benchmark()
    rounds = Rounds.of(benchmark.images, batch=4, count=5)
    ran = []
    policies = rounds.policies(6, num_kept=3, distinct=None, draw=torch.Generator())
    rounds.forced(
        lambda images, actions: ran.append((images, actions)),
        lambda images: ran.append(images),
        policies,
    )(3)
    assert len(ran) == 16
    for index, (images, actions) in enumerate(zip(rounds.batches[3], policies[3], strict=True)):
        assert torch.equal(ran[2 * index], images)
        assert torch.equal(ran[2 * index + 1][1], actions)


def test_agreement_is_of_the_checked_images_where_batches_go_beyond_them():
    networks, images = make_networks(), make_images(40)
    reference = Reference(networks, images, checked=30)
    output = Gather(networks)(images)
    assert reference.agreement(output.actions, output.logits, "fp32").agrees


def test_agreement_counts_decisions_and_classes_under_them():
    networks, images = make_networks(), make_images(40)
    reference = Reference(networks, images, checked=60)
    output = Gather(networks)(images)
    assert torch.equal(reference.actions, output.actions)

    def shares(actions, logits) -> tuple[float, float]:
        agreement = reference.agreement(actions, logits, "fp32")
        assert agreement.agrees == (min(agreement.decisions, agreement.classes) >= 0.999)
        return agreement.decisions, agreement.classes

    assert shares(output.actions, output.logits) == (1, 1)
    flipped = output.actions.clone()
    flipped[:4, 0] ^= True
    faithful = Gather(networks)(images, flipped)  # it ran the flipped actions
    assert shares(flipped, faithful.logits) == (1 - 4 / flipped.numel(), 1)
    wrong = output.logits.roll(1, dims=1)
    assert shares(output.actions, wrong) == (1, 0)


class Failing(Gather):
    """Fails in a call after so many."""

    calls = 0
    after: int

    def _run(self, images, actions):
        self.calls += 1
        if self.calls > self.after:
            fails()
        return super()._run(images, actions)


def test_who_fails_is_left_out_and_the_others_are_kept():
    after = {f"failing after {count}": count for count in (0, 1, 4, 12)}  # from the warm-up on
    failing = [type("", (Failing,), {"name": name, "after": count}) for name, count in after.items()]
    benchmark, tables = run(*failing, batch_sizes=[32, 40])
    for name in after:
        assert benchmark.left_out[f"{name} fp32 at batch 40"] == "RuntimeError: no such kernel"
        assert name not in [row.candidate for row in tables.times if row.batch == 40]
    assert [answer.batch for answer in tables.answers] == [32, 40]
    assert all(answer.winner is not None for answer in tables.answers)


def test_a_winner_that_fails_in_its_sweep_keeps_its_row(monkeypatch):
    monkeypatch.setattr(Rounds, "forced", lambda *_, **__: fails)
    benchmark, tables = run()
    assert "no such kernel" in benchmark.left_out["keep ratios and parts fp32 at batch 32"]
    assert tables.sweep == []
    assert tables.answers[0].winner is not None


def test_forms_that_can_not_be_made_or_called_are_left_out(monkeypatch):
    forms = candidates.full_resnet_forms

    def with_broken(*arguments, **options):
        return forms(*arguments, **options) | {"compiled": lambda: fails, "cuda_graphs": fails}

    monkeypatch.setattr(candidates, "full_resnet_forms", with_broken)
    benchmark, tables = run(executors=["gather"])
    assert benchmark.left_out == {
        "cuda_graphs fp32": "RuntimeError: no such kernel",
        "compiled fp32 at batch 32": "RuntimeError: no such kernel",
    }
    assert tables.answers[0].full_form in ("eager", "fused", "gather, all blocks")


def test_without_any_full_form_nothing_is_claimed(monkeypatch):
    monkeypatch.setattr(candidates, "full_resnet_forms", lambda *_, **__: {})
    lines = []
    tables = make_benchmark(executors=["masked"]).run(lines.append)
    assert tables.answers == []
    assert lines == ["batch 32: no form of the full ResNet ran, so nothing is claimed"]


def test_a_reference_that_fails_ends_in_tables_all_the_same(monkeypatch):
    monkeypatch.setattr(runner, "Reference", fails)
    benchmark, tables = run()
    assert "RuntimeError: no such kernel" in benchmark.left_out.values()
    assert tables.answers == []


def test_emulated_bf16_is_no_candidate(monkeypatch):
    monkeypatch.setattr(candidates, "computes_in_bf16", lambda _: False)
    benchmark, tables = run(precisions=["fp32", "bf16"])
    assert "would only emulate it" in benchmark.left_out["bf16"]
    assert {row.precision for row in tables.times} == {"fp32"}
    alone, tables = run(precisions=["bf16"])
    assert list(alone.left_out) == ["bf16"]
    assert tables == Tables()


def test_answer_is_beside_the_best_form_of_all_precisions(monkeypatch):
    """What is called bf16 here is fp32, and slow where every block runs."""
    forms, make = candidates.full_resnet_forms, candidates.make_executor

    def slow(images, run):
        time.sleep(0.05)
        return run(images)

    def slow_in_bf16(networks, precision, **options):
        made = forms(networks, "fp32", **options)
        if precision == "fp32":
            return made
        return {name: lambda make=make: partial(slow, run=make()) for name, make in made.items()}

    monkeypatch.setattr(candidates, "computes_in_bf16", lambda _: True)
    monkeypatch.setattr(candidates, "full_resnet_forms", slow_in_bf16)
    monkeypatch.setattr(candidates, "make_executor", lambda *of, precision, **name: make(*of, **name))
    _, tables = run(precisions=["fp32", "bf16"], executors=["masked"])
    assert [answer.precision for answer in tables.answers] == ["fp32", "bf16"]
    fastest = min(
        (row for row in tables.times if row.kind == "full"), key=lambda row: row.time.milliseconds
    )
    assert fastest.precision == "fp32"
    for answer in tables.answers:
        assert (answer.full_form, answer.full_precision) == (fastest.candidate, "fp32")
        assert answer.winner.full_milliseconds == fastest.time.milliseconds
    bf16 = tables.answers[1].winner
    # beside the full forms of its own, slow, precision
    assert bf16.share_of_ideal > 2 * bf16.speedup.ratio / bf16.ideal


def test_seconds_are_kept_by_dropping_the_slowest():
    class Slow(Gather):
        name = "slow"

        def _run(self, images, actions):
            time.sleep(0.3)
            return super()._run(images, actions)

    started = time.monotonic()
    benchmark, tables = run(Slow, seconds=2.0, keep_ratios=[0.5, 1.0])
    assert time.monotonic() - started < 2.0 * 1.5
    assert benchmark.left_out["slow fp32 at batch 32"] == "too slow for benchmark.seconds"
    assert "slow" not in [row.candidate for row in tables.times]
    kinds = {row.kind for row in tables.times}
    assert {"full", "blockdrop"} <= kinds
    assert all(row.time.rounds >= 5 for row in tables.times)


def test_too_few_seconds_are_said_before_the_measurement():
    lines = []
    benchmark = make_benchmark(Sleepy, executors=[], seconds=0.01)
    (answer,) = benchmark.run(lines.append).answers
    warning = next(line for line in lines if "are too few" in line)
    seconds = float(warning.split("about ")[1].split(" s ")[0])
    assert warning.startswith("benchmark.seconds 0.01 are too few: about")
    assert 0 <= seconds < 10
    assert lines.index(warning) < lines.index(lines[-1])
    assert answer.winner.executor == "sleepy"  # the only one, so it stays
    assert "keep ratios and parts fp32 at batch 32" in benchmark.left_out


def test_peak_memory_has_what_earlier_calls_have_left(monkeypatch):
    mib = 2**20
    memory = SimpleNamespace(now=100, most=0)

    class Hoarder(Gather):
        """Keeps a scratch of 8 MiB."""

        held = 0

        def _run(self, images, actions):
            memory.now += 8 * mib - self.held
            self.held = 8 * mib
            memory.most = max(memory.most, memory.now + mib)
            return super()._run(images, actions)

        def free(self):
            memory.now -= self.held
            self.held = 0

    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: setattr(memory, "most", 0))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: memory.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: memory.most)
    benchmark = make_benchmark()
    hoarder = Hoarder(benchmark.networks)
    call = Rounds.of(benchmark.images, batch=32, count=5).on(hoarder)
    call(0)
    assert peak_mib(hoarder, call, torch.device("cuda")) == 9
