"""`fastkl doctor`: what this machine has, whether fastkl is right on it, and how fast, one line per check.

checks.py has the list of checks and what a check is; machine.py, compiling.py, agreement.py and speed.py have their bodies; process.py runs them in a
process that may crash or hang; run.py prints the report.
"""
