"""The benchmark shows slow and wrong executors, and its answers can be recomputed from its tables."""

import time
from functools import partial

import pytest
import torch
from executors import make_images, make_networks

from pipeline.benchmark import candidates, runner
from pipeline.benchmark.candidates import Settings
from pipeline.benchmark.reference import Reference
from pipeline.benchmark.rounds import Rounds, peak_mib
from pipeline.benchmark.runner import Benchmark
from pipeline.flops import measure
from pipeline.inference.base import Executor, Output
from pipeline.inference.gather import Gather
from pipeline.results import Tables, TimingRow, Winner


class Sleepy(Gather):
    """Correct, and slow."""

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


def run(*extra: type[Executor], **changes) -> tuple[Benchmark, Tables]:
    benchmark = make_benchmark(*extra, **changes)
    return benchmark, benchmark.run(lambda _: None)


def row_of(tables: Tables, name: str) -> TimingRow:
    (row,) = [row for row in tables.times if row.candidate == name]
    return row


def winner_of(tables: Tables) -> Winner:
    """Of the first answer."""
    assert tables.answers[0].winner is not None
    return tables.answers[0].winner


def test_a_sleeper_is_shown_as_slow():
    _, tables = run(Sleepy)
    row = row_of(tables, "sleepy")
    assert row.time.milliseconds > 50
    assert row.agreement.agrees
    assert row.speedup.ratio < row_of(tables, "gather").speedup.ratio
    assert winner_of(tables).executor != "sleepy"


@pytest.mark.parametrize(("kind", "what"), [(Cheat, "decisions"), (Liar, "classes")])
def test_a_cheat_is_shown_and_wins_nothing(kind, what):
    _, tables = run(kind)
    row = row_of(tables, kind.name)
    assert getattr(row.agreement, what) < 0.999
    assert not row.agreement.agrees
    assert not row.speedup.reliable
    assert winner_of(tables).executor in ("gather", "masked")


def test_without_agreement_there_is_no_winner():
    lines = []
    benchmark = make_benchmark(Broken, executors=[])
    (answer,) = benchmark.run(lines.append).answers
    assert answer.winner is None
    assert "nothing is claimed" in lines[0]


def test_tables_agree_with_each_other():
    benchmark, tables = run(batch_sizes=[16, 40], executors=["gather", "grouped"])
    assert [answer.batch for answer in tables.answers] == [16, 40]
    for answer in tables.answers:
        rows = {row.candidate: row for row in tables.times if row.batch == answer.batch}
        full = {name: row.time.milliseconds for name, row in rows.items() if row.kind == "full"}
        assert set(full) == {"eager", "fused", "gather, all blocks", "grouped, all blocks"}
        assert rows["ResNet-8"].kind == "sole"
        assert answer.full_form == min(full, key=full.get)
        assert rows[answer.full_form].speedup.ratio == 1
        winner, fastest = answer.winner, rows[answer.winner.executor]
        assert winner.speedup == fastest.speedup
        assert winner.speedup.ratio == pytest.approx(min(full.values()) / fastest.time.milliseconds)
        assert winner.share_of_ideal == pytest.approx(winner.speedup.ratio / winner.ideal)
        assert fastest.time.rounds == 5
        points = [point for point in tables.sweep if point.batch == answer.batch]
        variants = ["many"] if answer.batch == 16 else ["few", "many"]
        assert [(p.variant, p.keep_ratio) for p in points] == [
            (variant, ratio) for variant in variants for ratio in (0.0, 1.0)
        ]
    assert {parts.batch for parts in tables.parts} == {16, 40}
    assert all(parts.policy_network_ms > parts.index_ms > 0 for parts in tables.parts)
    assert benchmark.left_out == {}


def test_ideal_counts_the_policy_network_and_the_images_that_were_timed():
    networks = make_networks()
    cost = measure(networks.resnet, networks.policy_net, 16)
    benchmark, tables = run(batch_sizes=[40])
    actions = Gather(networks)(benchmark.images).actions
    expected = cost.full / float(cost.of(actions).mean())
    assert row_of(tables, "gather").ideal == pytest.approx(expected)
    assert cost.policy_net > 0


def test_what_cannot_run_is_left_out_and_named():
    benchmark, tables = run(executors=["gather", "triton"])
    assert list(benchmark.left_out) == ["triton fp32"]
    assert not [row for row in tables.times if "triton" in row.candidate]


def test_rounds_take_turns_through_all_test_images():
    benchmark = make_benchmark()
    rounds = Rounds.of(benchmark.images, batch=4, count=5)
    assert rounds.rows.shape == (5, 8, 4)  # 32 images a round at least
    assert rounds.rows.flatten().tolist() == [i % 40 for i in range(160)]
    assert torch.equal(rounds.batches[1][2], benchmark.images[rounds.rows[1, 2]])


def test_a_sweep_runs_the_policy_network_and_takes_the_given_actions():
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
    assert "failing" not in [row.candidate for row in tables.times if row.batch == 40]
    assert [answer.batch for answer in tables.answers] == [32, 40]
    assert all(answer.winner is not None for answer in tables.answers)


def test_a_winner_that_fails_in_its_sweep_is_named_and_keeps_its_row(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Rounds, "forced", lambda *_, **__: broken)
    benchmark, tables = run()
    assert "no such kernel" in benchmark.left_out["keep ratios and parts fp32 at batch 32"]
    assert tables.sweep == []
    assert tables.answers[0].winner is not None


def test_forms_that_fail_when_they_are_made_or_called_are_left_out(monkeypatch):
    def refuses():
        raise RuntimeError("no compiler")

    def fails(images):
        raise OSError("no file")

    forms = candidates.full_resnet_forms

    def with_broken(*arguments, **options):
        return forms(*arguments, **options) | {"compiled": lambda: fails, "cuda_graphs": refuses}

    monkeypatch.setattr(candidates, "full_resnet_forms", with_broken)
    benchmark, tables = run(executors=["gather"])
    assert benchmark.left_out == {
        "cuda_graphs fp32": "RuntimeError: no compiler",
        "compiled fp32 at batch 32": "OSError: no file",
    }
    assert tables.answers[0].full_form in ("eager", "fused", "gather, all blocks")


def test_without_any_full_form_nothing_is_claimed(monkeypatch):
    monkeypatch.setattr(candidates, "full_resnet_forms", lambda *_, **__: {})
    lines = []
    tables = make_benchmark(executors=["masked"]).run(lines.append)
    assert tables.answers == []
    assert lines == ["batch 32: no form of the full ResNet ran, so nothing is claimed"]


def test_a_reference_that_fails_ends_in_tables_all_the_same(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runner, "Reference", broken)
    benchmark, tables = run()
    assert "RuntimeError: out of memory" in benchmark.left_out.values()
    assert tables.answers == []


def test_emulated_bf16_is_no_candidate(monkeypatch):
    monkeypatch.setattr(candidates, "computes_in_bf16", lambda _: False)
    benchmark, tables = run(precisions=["fp32", "bf16"])
    assert "would only emulate it" in benchmark.left_out["bf16"]
    assert {row.precision for row in tables.times} == {"fp32"}
    alone, tables = run(precisions=["bf16"])
    assert list(alone.left_out) == ["bf16"]
    assert tables == Tables()


def test_answer_compares_with_the_best_full_form_of_all_precisions(monkeypatch):
    monkeypatch.setattr(candidates, "computes_in_bf16", lambda _: True)
    forms = candidates.full_resnet_forms

    def slow_in_bf16(networks, precision, *, with_compile):
        def slow(images, run):
            time.sleep(0.05)
            return run(images)

        made = forms(networks, "fp32", with_compile=with_compile)
        if precision == "fp32":
            return made
        return {name: lambda make=make: partial(slow, run=make()) for name, make in made.items()}

    monkeypatch.setattr(candidates, "full_resnet_forms", slow_in_bf16)
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
    assert "slow" not in [row.candidate for row in tables.times]
    kinds = {row.kind for row in tables.times}
    assert {"full", "blockdrop"} <= kinds
    assert all(row.time.rounds >= 5 for row in tables.times)


def test_what_is_less_than_the_least_is_said_before_it_is_measured():
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


def test_ticks_tell_the_seconds_that_are_spent():
    ticks = []
    make_benchmark().run(lambda _: None, ticks.append)
    assert len(ticks) > 20
    assert ticks == sorted(ticks)
    assert ticks[-1] > 0


def test_a_sweep_says_what_share_ran():
    _, tables = run(keep_ratios=[0.4, 0.5, 1.0], batch_sizes=[4])  # of 6 blocks: 2, 3 and 6
    assert [row.keep_ratio for row in tables.sweep] == [2 / 6, 3 / 6, 1.0]
    _, tables = run(keep_ratios=[0.45, 0.5, 1.0], batch_sizes=[4])  # 3, 3 and 6: one point, not two
    assert [row.keep_ratio for row in tables.sweep] == [3 / 6, 1.0]


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
    call = Rounds.of(benchmark.images, batch=32, count=5).on(hoarder)
    call(0)
    assert peak_mib(hoarder, call, torch.device("cuda")) == 9
