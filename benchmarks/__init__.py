"""What the package costs and what its tables are worth.

``python -m benchmarks`` runs the modules of ``speed``: each has one ``run(settings) -> Table`` of ratios that are
measured side by side, because seconds belong to one machine. The modules of ``results`` print the published tables.
"""
