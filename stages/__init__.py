"""One script a stage of dvc.yaml: read params, load, call `pipeline`, write. No mathematics here."""
