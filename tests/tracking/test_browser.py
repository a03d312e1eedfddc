"""MLflow's pages that the printed links open, in a headless Chromium."""

import shutil
from collections.abc import Iterator
from typing import Any

import experiment_files
import pytest
from builders import enter_project

from pipeline.tracking import dvc_results, experiment_runs, overview
from pipeline.tracking.runs import stage_run
from research import screenshots

pytestmark = pytest.mark.slow
ACCURACIES = {"1": 0.97, "5": 0.9, "10": 0.95}  # by gamma, logged in this order


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Iterator[tuple[dict[str, str], Any]]:
    """The printed links to a store with three gammas, and a browser."""
    pytest.importorskip("playwright")
    if shutil.which("chromium") is None:
        pytest.skip("needs a Chromium (`apt-get install chromium`)")
    folder = tmp_path_factory.mktemp("ui")
    with pytest.MonkeyPatch.context() as patch:
        enter_project(folder, patch)
        for gamma, accuracy in ACCURACIES.items():
            files = folder / gamma
            files.mkdir()
            experiment_files.write(files, gamma=int(gamma), accuracy=accuracy, model=False)
            record = dvc_results.read(
                dvc_results.work_tree(str(files)), name=f"gamma-{gamma}", baseline="abc", revision=gamma
            )
            run_id = experiment_runs.complete(record, finish=True)
        with stage_run("evaluate", {"gamma": 7}) as stage:  # is no experiment's row of the table
            stage.log_metrics({"accuracy": 1.0})
        experiment_id, finished = overview.experiments()
        with screenshots.server() as address, screenshots.browser() as browser:
            yield overview.links(experiment_id, finished, run_id, address=address), browser


def test_table_of_runs_has_the_columns_that_compare_and_the_most_accurate_first(pages):
    links, browser = pages
    page = browser.new_page()
    page.goto(links["all runs"])
    page.get_by_text("gamma-10").locator("visible=true").first.wait_for()
    headers = {text.strip() for text in page.get_by_role("columnheader").all_inner_texts()}
    assert headers >= {"accuracy", "blocks_mean", "mflops_mean", "flops_share", "gamma"}
    assert not headers & {"Dataset", "Source", "Models"}
    names = [text for text in page.get_by_role("link").all_inner_texts() if text.startswith("gamma-")]
    assert names == ["gamma-1", "gamma-10", "gamma-5"]
    assert not page.get_by_role("link", name="evaluate").count()
    page.close()


def test_comparison_shows_gamma_beside_accuracy(pages):
    links, browser = pages
    page = browser.new_page()
    page.goto(links["its gammas compared"])
    page.get_by_text("Comparing 3 Runs from 1 Experiment").wait_for()
    page.get_by_text("Parallel Coordinates Plot").wait_for()
    page.locator(".parcoords .axis-title").nth(1).wait_for()
    titles = page.locator(".parcoords .axis-title").all_text_contents()
    assert titles == ["gamma", "accuracy"]
    page.close()
