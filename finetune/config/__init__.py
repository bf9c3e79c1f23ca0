"""Configuration: the schema of recipes, composing and checking them, their paths, and rules for experts.

`compose.compose` gives a checked `schema.RunConfig` for a recipe and overrides; `validate.load_run_config` reads that
of a stored run. Nothing here imports torch.
"""
