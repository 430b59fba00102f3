"""The command line, ``captum-classfilters``: what stands in a shell, turned into calls of the package.

`parser.py` knows the options. `prepare.py` finds what they name (`sources.py`, `images.py`, `models.py`,
`checkpoints.py`) and refuses what can be refused before work starts. `commands.py` does the work, `writing.py` and
`report.py` say what came out.
"""
