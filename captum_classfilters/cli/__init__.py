"""The command line, ``captum-classfilters``: what stands in a shell, turned into calls of the package.

`parser.py` knows the options. `prepare.py` finds what they name (`data.py`, `models.py`) and refuses what it can
before work starts. `commands.py` does the work, `writing.py` writes files and prints.
"""
