"""Build the shipped data sets from their public sources: build is the command, one file per data set."""
