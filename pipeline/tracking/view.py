"""The view of the runs page that links open: experiments without their stages, compared by columns.

MLflow 3.17's UI takes columns, filter and order together from a tag of the MLflow experiment, which the
address names (`viewStateShareKey`), and lists the view under "Views". The format is the UI's own: it was
read from the installed pages, and tests/tracking/test_browser.py looks at the result.
"""

import json

KEY = "experiments"
TAG = f"mlflow.sharedViewState.{KEY}"
# MLflow 3.17 opens experiments in its GenAI view, which hides training runs, unless told otherwise
QUERY = "workflowType=machine_learning"
# order and filter must not stand in the address, or the page ignores the rest of the view
SHARED_QUERY = f"{QUERY}&viewStateShareKey={KEY}"
COLUMNS = (
    "metrics.`accuracy`", "metrics.`blocks_mean`", "metrics.`mflops_mean`", "metrics.`flops_share`",
    "params.`gamma`", "tags.`preset`",
)  # fmt: skip
CREATED = 1_764_000_000_000  # milliseconds; a constant, so that every process writes the same tag


def tag() -> tuple[str, str]:
    """Name and value of the tag that holds the view."""
    state = {
        "searchFilter": "tags.`blockdrop.role` = 'parent'",
        "orderByKey": COLUMNS[0],
        "orderByAsc": False,
        "selectedColumns": COLUMNS,
    }
    view = {"name": "Experiments by accuracy", "createdAt": CREATED, "updatedAt": CREATED}
    return TAG, json.dumps(view | {"state": json.dumps(state)})
