"""From a recipe's data sources to batches of tokens.

dataset is the pipeline: sources and readers read records, forms and parse_messages turn them into conversations,
harmony/ into tokens with loss weights, and cache keeps these. packing and batches make the sequences of each step.
preview, stats and duplicates show the data; inspect_file and prepare/ serve commands of their own.
"""
