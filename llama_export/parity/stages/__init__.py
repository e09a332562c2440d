"""The comparisons, by task and artefact."""
