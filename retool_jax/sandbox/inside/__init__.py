"""Programs that run inside a worker, started as `python -I -S supervisor.py SETUP`; standard library only.

They import one another by their bare names, because nothing else of this package is visible where they run.
"""
