"""Configuration: the schema of recipes, composing and checking them, and the meaning of their paths and expert rules.

`compose.compose` gives a checked `schema.RunConfig` for a recipe and overrides; `validate.load_run_config` reads the one
of a stored run. Nothing here imports torch.
"""
