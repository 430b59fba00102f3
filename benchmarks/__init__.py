"""What the package costs, as ratios measured side by side in one run: ``python -m benchmarks``.

Each module has one ``run(settings) -> Table``. Ratios, because seconds belong to one machine.
"""
