"""Execution of a run: incremental stages, in one process or several."""
