"""Data: one file per task, each exporting META, RECIPES and build (see tasks/base.py for the contract)."""
