"""A folder of scores, as tests compare it with another."""

import json

SUMMARY = ("summary.json", "summary.html")


def contents(folder):
    """Bytes of every file but the summary, which tells times; what else it tells is compared by `counted`."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in SUMMARY}


def counted(folder):
    """What every run that leaves the same scores has to summarise them by."""
    summary = json.loads((folder / "summary.json").read_text())
    del summary["run"]
    return summary
