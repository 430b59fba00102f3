"""The published tables: each ``*_results.py`` prints one section, and the Markdown files here hold what was printed."""
