"""Where the repository lies."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BOARDS = Path(__file__).with_name("boards")
"""Recorded `/sys` and `/proc` files of boards."""
