"""Comparing folders of scores."""

import json

SUMMARY = ("_summary.json", "_summary.html")


def contents(folder):
    """Return the bytes of every file except the summary, which holds times; `counted` returns the rest of it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in SUMMARY}


def counted(folder):
    """Return the summary without the facts that differ between runs with the same scores."""
    summary = json.loads((folder / "_summary.json").read_text())
    del summary["run"]
    return summary
