"""check: params.yaml as a whole, before any other stage runs.

DVC gives a stage only the parameters that it names, so a mistyped key would change nothing and pass
unseen. This stage depends on the file, and its out never changes, so it makes no other stage rerun.
"""

from pathlib import Path

from pipeline.params import ParamsError, load

OUT = Path("data/params.ok")


def main() -> None:
    """Refuse a params.yaml that can't be used."""
    load()
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text("params.yaml was read and can be used\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except ParamsError as error:
        raise SystemExit(f"error: {error}") from None
