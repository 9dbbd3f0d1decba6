"""fastkl inside other people's trainers, a few lines each: transformers (callback), TRL (trainers),
verl (functions). Import the one you use.
"""
