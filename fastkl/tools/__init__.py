"""The command line `fastkl` and what its sub-commands run."""
