"""The command line `fastkl` and its sub-commands."""
