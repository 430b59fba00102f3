"""What importing the package costs above ``import captum.attr``, each time in a fresh process."""

import statistics
import subprocess
import sys

from benchmarks.lib.report import Table
from benchmarks.lib.timing import interleaved, ratio
from benchmarks.lib.workload import Settings

TARGET = 1.2
ROUNDS = 7
IMPORTS = {
    "captum": "import captum.attr",
    "package": "import captum_classfilters",
    "class": "import captum_classfilters; captum_classfilters.InfluentialFeatures",
}


def run(settings: Settings) -> Table:
    table = Table("import: against captum.attr")
    seconds = interleaved({name: lambda code=code: _fresh(code) for name, code in IMPORTS.items()}, ROUNDS)
    for name, code in IMPORTS.items():
        table.add(f"`{code}`, seconds", f"{statistics.median(seconds[name]):.3f}")
    for name in ("package", "class"):
        found = ratio(seconds, name, "captum")
        table.add(f"`{IMPORTS[name]}` / captum.attr", str(found), found.value, TARGET)
    table.notes = [f"ratio of medians over {ROUNDS} rounds in turn; each includes starting Python"]
    return table


def _fresh(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)
