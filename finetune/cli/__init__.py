"""The command line: `main` dispatches to one module per command, with `add_arguments(parser)` and `run(args)`.

Commands translate options and print results; the work is done in the packages below. Nothing here imports torch.
"""
