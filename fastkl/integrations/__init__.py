"""A callback for transformers, trainers for TRL, functions for verl and Megatron-LM. Import the
module you use.
"""
