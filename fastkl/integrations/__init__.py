"""Callback for transformers, trainers for TRL, functions for verl. Import the one you use."""
